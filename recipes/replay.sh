#!/usr/bin/env bash
# What replay is for, on the tiny model in assets/: teach it cartoons, then rain, once with the cartoons replayed and once
# without, and measure both tasks after each. docs/mixtures.md has the figures.
#
#     bash recipes/replay.sh
#     CARTOON_STEPS=250 RAIN_STEPS=150 OUTPUT_DIR=/tmp/replay bash recipes/replay.sh --train_batch_size=8
#
# Run again, it goes on where it stopped. Further flags go to all three trainings.
set -euo pipefail
cd "$(dirname "$0")/.."

OUTPUT_DIR=${OUTPUT_DIR:-outputs/replay}
CARTOON_STEPS=${CARTOON_STEPS:-900}
RAIN_STEPS=${RAIN_STEPS:-600}
THREADS=${THREADS:-$(python -c "import os; print(len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count())")}
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
PHOTOS=(--photos assets/photos --photos_license "public domain and CC0; see assets/photos/CREDITS.csv"
  --max_short_side 128 --all_instructions)

train() { # output folder, base model, updates, what to train on, further flags
  local output=$1 base=$2 steps=$3
  shift 3
  accelerate launch --quiet --num_processes=1 --num_machines=1 --mixed_precision=no --dynamo_backend=no \
    --num_cpu_threads_per_process="$THREADS" \
    finetune_instruct_pix2pix.py --pretrained_model_name_or_path="$base" --output_dir="$output" \
    --resolution=64 --image_geometry=crop --random_flip --cached_crops=2 --train_batch_size=16 \
    --max_train_steps="$steps" --learning_rate=1e-3 --lr_scheduler=cosine --lr_warmup_steps=20 \
    --use_ema --ema_decay=0.99 --checkpointing_steps=100 --checkpoints_total_limit=1 \
    --resume_from_checkpoint=latest --seed=42 --report_to=none --guidance_scale 1 --image_guidance_scale 1 "$@"
}

echo "1/5  Building two datasets"
python data_preparation/build_cartoonization.py --cartoonizer opencv "${PHOTOS[@]}" --output_dir "$OUTPUT_DIR/cartoons"
python data_preparation/build_low_level.py --synthesize 400 --tasks derain --severity 0.8 1 "${PHOTOS[@]}" \
  --output_dir "$OUTPUT_DIR/rain"
# Equal shares, whatever the datasets' sizes. The cartoons give photographs, instructions and noised latents; what is to
# be predicted of them is what the model that learned them predicts.
cat > "$OUTPUT_DIR/mix.yaml" <<MIX
cap: 100
datasets:
  - dataset_name: $OUTPUT_DIR/rain
  - dataset_name: $OUTPUT_DIR/cartoons
    replay: true
MIX

echo "2/5  Cartoons ($CARTOON_STEPS updates)"
train "$OUTPUT_DIR/learned-cartoons" assets/tiny-instruct-pix2pix "$CARTOON_STEPS" \
  --dataset_name="$OUTPUT_DIR/cartoons" "$@"
echo "3/5  Then rain ($RAIN_STEPS updates)"
train "$OUTPUT_DIR/then-rain" "$OUTPUT_DIR/learned-cartoons" "$RAIN_STEPS" --dataset_name="$OUTPUT_DIR/rain" "$@"
echo "4/5  Then rain, with the cartoons replayed ($RAIN_STEPS updates)"
train "$OUTPUT_DIR/then-rain-and-replay" "$OUTPUT_DIR/learned-cartoons" "$RAIN_STEPS" \
  --dataset_mixture="$OUTPUT_DIR/mix.yaml" "$@"

echo "5/5  Editing held-out photographs"
for task in cartoons rain; do
  python evaluation/evaluate.py --dataset "$OUTPUT_DIR/$task" --split test --max_samples 24 --batch_size 12 \
    --model assets/tiny-instruct-pix2pix "$OUTPUT_DIR/learned-cartoons" "$OUTPUT_DIR/then-rain" \
    "$OUTPUT_DIR/then-rain-and-replay" \
    --guidance_scale 1 --image_guidance_scale 1 --output_dir "$OUTPUT_DIR/evaluation-$task"
done
