#!/usr/bin/env bash
# Makes two models like those kept in assets/ from assets/photos: the autoencoder and the text-to-image UNet by a script
# of their own, the InstructPix2Pix by the training script, on a dataset of generic edits. An hour on one CPU core, by the
# times of its parts. Words have the vectors of assets/tiny-stable-diffusion (tools/make_tiny_words.py).
#
#     bash recipes/tiny_base.sh                            # into outputs/tiny_models
#     OUTPUT_DIR=/tmp/try bash recipes/tiny_base.sh --seed=1   # further flags go to the last training
#
# Run again, it goes on where it stopped: within the last training, or else with the stage that was stopped.
set -euo pipefail
cd "$(dirname "$0")/.."

WORK_DIR=${WORK_DIR:-outputs/tiny_base}
OUTPUT_DIR=${OUTPUT_DIR:-outputs/tiny_models}
STEPS=${STEPS:-5000 1000} # updates of the stages vae and base
TILES=${TILES:-12000}
MAX_TRAIN_STEPS=${MAX_TRAIN_STEPS:-4500}
EDITS_MEASURED=${EDITS_MEASURED:-200}
export OMP_NUM_THREADS=${THREADS:-1} OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}

echo "1/4  Building the datasets"
edits() {
  python data_preparation/build_generic_edits.py --validation_fraction 0 --test_fraction 0 \
    --photos_license "public domain and CC0; see assets/photos/CREDITS.csv" "$@"
}
edits --photos assets/photos/train --rows "$TILES" --output_dir "$WORK_DIR/edits"
edits --photos assets/photos/test --rows "$EDITS_MEASURED" --tile 128 --output_dir "$WORK_DIR/held_out"

echo "2/4  Autoencoder and text to image"
# shellcheck disable=SC2086 # two numbers
python tools/train_tiny_base.py --work_dir "$WORK_DIR" --tiles "$TILES" --steps $STEPS

echo "3/4  InstructPix2Pix ($MAX_TRAIN_STEPS updates)"
accelerate launch --quiet --num_processes=1 --num_machines=1 --mixed_precision=no --dynamo_backend=no \
  --num_cpu_threads_per_process="$OMP_NUM_THREADS" \
  train_instruct_pix2pix.py \
  --pretrained_model_name_or_path="$WORK_DIR/tiny-stable-diffusion" \
  --dataset_name="$WORK_DIR/edits" \
  --resolution=64 --image_geometry=crop --center_crop --cache_latents \
  --train_batch_size=16 --max_train_steps="$MAX_TRAIN_STEPS" \
  --optimizer=muon --learning_rate=3e-3 --lr_scheduler=cosine --lr_warmup_steps=200 \
  --adam_beta2=0.99 --adam_weight_decay=1e-4 \
  --use_ema --ema_decay=0.995 \
  --checkpointing_steps=500 --checkpoints_total_limit=1 --resume_from_checkpoint=latest \
  --guidance_scale=1 --image_guidance_scale=1 \
  --seed=0 --report_to=none \
  --output_dir="$WORK_DIR/tiny-instruct-pix2pix" \
  "$@"

echo "4/4  Measuring"
measure() {
  python evaluation/evaluate.py --model "$WORK_DIR/tiny-instruct-pix2pix" --dataset "$WORK_DIR/held_out" --split train \
    --output_dir "$WORK_DIR/$1" --guidance_scale "$2" --image_guidance_scale "$3"
}
measure unguided 1 1
measure guided 7 1.5
python tools/save_tiny_base.py --work_dir "$WORK_DIR" --output_dir "$OUTPUT_DIR"
