# What the four published trainings have in common. The two from Stable Diffusion source this with the script and their flags,
# and the two from InstructPix2Pix source those.
#
#     bash recipes/cartoonizer_finetuned.sh                   # the whole run
#     bash recipes/cartoonizer_finetuned.sh --push_to_hub     # and upload it: further flags go to the script, the last one wins
#     MAX_TRAIN_STEPS=1000 OUTPUT_DIR=/data/try bash recipes/cartoonizer_finetuned.sh
#
# Latents of four random crops of each pair, mirrored and not, are encoded once; forward passes are as large as fit. For a
# GPU of 16 GB add --offload_ema --use_8bit_adam; --compile is worth a try on a long run.
# shellcheck shell=bash disable=SC2154 # what is used and not set here is the recipe's
set -euo pipefail
cd "$(dirname "$0")/.."

MAX_TRAIN_STEPS=${MAX_TRAIN_STEPS:-15000}
MIXED_PRECISION=${MIXED_PRECISION:-fp16}
NUM_PROCESSES=${NUM_PROCESSES:-1} # GPUs; each adds 8 images to an update
REPORT_TO=${REPORT_TO:-wandb}

# Said in full, so that a configuration saved by `accelerate config` changes nothing. `exec`: the launcher gets the signals
# that a container sends to this script.
LAUNCH=(--quiet --num_processes="$NUM_PROCESSES" --num_machines=1 --dynamo_backend=no --mixed_precision="$MIXED_PRECISION")
[ "$NUM_PROCESSES" -eq 1 ] || LAUNCH+=(--multi_gpu)
exec accelerate launch "${LAUNCH[@]}" "$1" \
  --pretrained_model_name_or_path="$MODEL_ID" \
  --dataset_name="$DATASET_ID" \
  --use_ema \
  --enable_xformers_memory_efficient_attention \
  --resolution=256 --random_flip --cached_crops=4 \
  --train_batch_size=2 --gradient_accumulation_steps=4 --max_micro_batch_size=auto \
  --max_train_steps="$MAX_TRAIN_STEPS" \
  --checkpointing_steps=1000 --checkpoints_total_limit=1 --resume_from_checkpoint=latest \
  --learning_rate=5e-05 --lr_warmup_steps=0 \
  --conditioning_dropout_prob=0.05 \
  --mixed_precision="$MIXED_PRECISION" \
  --val_image_url="$VAL_IMAGE_URL" \
  --seed=42 \
  --output_dir="$OUTPUT_DIR" \
  --report_to="$REPORT_TO" \
  "${@:2}"
