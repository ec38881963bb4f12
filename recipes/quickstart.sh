#!/usr/bin/env bash
# The whole way in ten minutes, without a GPU, an account or a download: build a small dataset from the
# photographs in assets/, fine-tune the tiny InstructPix2Pix in assets/ on it, edit held-out photographs, measure.
#
#     make quickstart                                      # cartoonization
#     TASK=low_level bash recipes/quickstart.sh            # deblur, derain, denoise, enhance, one model for all
#     MAX_TRAIN_STEPS=200 OUTPUT_DIR=/tmp/try bash recipes/quickstart.sh --learning_rate=1e-4
#
# Run again, it goes on where it stopped. Further flags go to the fine-tuning. A GPU is used where there is one.
set -euo pipefail
cd "$(dirname "$0")/.."

TASK=${TASK:-cartoonization}
MODEL_ID=${MODEL_ID:-assets/tiny-instruct-pix2pix}
case $TASK in
  cartoonization)
    OUTPUT_DIR=${OUTPUT_DIR:-outputs/quickstart}
    MAX_TRAIN_STEPS=${MAX_TRAIN_STEPS:-900}
    DECODER_SKIPS=${DECODER_SKIPS:-300}
    BUILD="data_preparation/build_cartoonization.py --cartoonizer opencv"
    ;;
  low_level)
    OUTPUT_DIR=${OUTPUT_DIR:-outputs/quickstart-low-level}
    MAX_TRAIN_STEPS=${MAX_TRAIN_STEPS:-1800}
    DECODER_SKIPS=${DECODER_SKIPS:-1500}
    # The strong end of the range: at 128 pixels the mild end leaves photos less damaged than the autoencoder does.
    BUILD="data_preparation/build_low_level.py --synthesize 1600 --tasks deblur derain denoise enhance --severity 0.8 1"
    ;;
  *)
    echo "quickstart.sh: error: TASK: $TASK is unknown; use cartoonization or low_level" >&2
    exit 2
    ;;
esac
# Threads that wait for each other sleep instead of spinning: on a machine that does other things too, that is several
# times faster.
CORES=$(python -c "import os; print(len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count())")
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}

echo "1/3  Building the dataset"
# shellcheck disable=SC2086 # BUILD is a script and its flags
python $BUILD --all_instructions \
  --photos assets/photos --photos_license "public domain and CC0; see assets/photos/CREDITS.csv" \
  --max_short_side 128 --output_dir "$OUTPUT_DIR/dataset"

echo "2/3  Fine-tuning ($MAX_TRAIN_STEPS updates)"
# 64-pixel crops train well and fast; the edits that follow are of whole 128-pixel pictures. All these edits have one
# right answer. So no guidance, which overshoots, nor the dropout that it needs; few steps, and training that suits them;
# noise on words, so that wordings never seen are read too; then detail of the input into the decoder:
# docs/restoration.md says what each is worth.
train() {  # THREADS, further flags
  accelerate launch --quiet --num_processes=1 --num_machines=1 --mixed_precision=no --dynamo_backend=no \
    --num_cpu_threads_per_process="$1" \
    finetune_instruct_pix2pix.py \
    --pretrained_model_name_or_path="$MODEL_ID" \
    --dataset_name="$OUTPUT_DIR/dataset" \
    --resolution=64 --image_geometry=crop --random_flip \
    --cached_crops=4 --train_batch_size=16 --max_train_steps="$MAX_TRAIN_STEPS" \
    --optimizer=muon --learning_rate=3e-3 --adam_beta2=0.99 --adam_weight_decay=1e-4 \
    --lr_scheduler=cosine --lr_warmup_steps=20 --use_ema --ema_decay=0.99 \
    --guidance_scale=1 --image_guidance_scale=1 --conditioning_dropout_prob=0 --timestep_bias_multiplier=99 \
    --embedding_noise=2 \
    --checkpointing_steps=300 --checkpoints_total_limit=1 --resume_from_checkpoint=latest \
    --seed=42 --report_to=none \
    --output_dir="$OUTPUT_DIR/pipeline" \
    "${@:2}"
}
# Muon's products of small matrices take two threads twice as long as one; the skips are faster on all.
train 1 "$@"
echo "     then decoder skips ($DECODER_SKIPS updates)"
train "${THREADS:-$CORES}" --train_decoder_skips="$DECODER_SKIPS" "$@"

echo "3/3  Editing held-out photographs"
# How many steps suit each task?
python evaluation/sweep.py --model "$OUTPUT_DIR/pipeline" --dataset "$OUTPUT_DIR/dataset" --split train \
  --images_per_task 8 --guidance_scales 1 --image_guidance_scales 1 --steps 1 2 4 --schedulers own \
  --output_dir "$OUTPUT_DIR/sweep"
python evaluation/evaluate.py --model "$OUTPUT_DIR/pipeline" --dataset "$OUTPUT_DIR/dataset" \
  --split test --batch_size 12 --recommended_settings --output_dir "$OUTPUT_DIR/evaluation"
