#!/usr/bin/env bash
# What a second task takes from the first, and what replay leaves of it: fine-tune the tiny InstructPix2Pix on cartoons, go on
# from there on rain alone, on both datasets, and on rain with the cartoons' photos replayed, and measure both tasks of all.
# No GPU, account or download; docs/mixtures.md has the figures.
#
#     bash recipes/replay.sh
#     FIRST_STEPS=100 SECOND_STEPS=50 OUTPUT_DIR=/tmp/try bash recipes/replay.sh --learning_rate=1e-4
#
# Run again, it goes on where it stopped. Further flags go to all trainings.
set -euo pipefail
cd "$(dirname "$0")/.."

MODEL_ID=${MODEL_ID:-assets/tiny-instruct-pix2pix}
OUTPUT_DIR=${OUTPUT_DIR:-outputs/replay}
FIRST_STEPS=${FIRST_STEPS:-450}
SECOND_STEPS=${SECOND_STEPS:-300}
PHOTOS_LICENSE="public domain and CC0; see assets/photos/CREDITS.csv"
THREADS=$(python -c "import os; print(len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count())")
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}

train() { # name, base model, updates, further flags
  local name=$1 base=$2 steps=$3
  shift 3
  if [ -f "$OUTPUT_DIR/$name/model_index.json" ]; then
    return # is there
  fi
  accelerate launch --quiet --num_processes=1 --num_machines=1 --mixed_precision=no --dynamo_backend=no \
    --num_cpu_threads_per_process="${OMP_NUM_THREADS:-$THREADS}" \
    finetune_instruct_pix2pix.py \
    --pretrained_model_name_or_path="$base" \
    --resolution=64 --image_geometry=crop --random_flip \
    --cached_crops=4 --train_batch_size=16 --max_train_steps="$steps" \
    --learning_rate=1e-3 --lr_scheduler=cosine --lr_warmup_steps=20 \
    --use_ema --ema_decay=0.99 --guidance_scale=1 --image_guidance_scale=1 \
    --checkpointing_steps=100 --checkpoints_total_limit=1 --resume_from_checkpoint=latest \
    --seed=42 --report_to=none --cache_dir="$OUTPUT_DIR/cache" \
    --output_dir="$OUTPUT_DIR/$name" "$@"
}

echo "1/4  Building cartoons and rain"
python data_preparation/build_cartoonization.py --cartoonizer opencv --all_instructions \
  --photos assets/photos --photos_license "$PHOTOS_LICENSE" --max_short_side 128 --output_dir "$OUTPUT_DIR/cartoons"
python data_preparation/build_low_level.py --synthesize 400 --tasks derain --severity 0.8 1 --all_instructions \
  --photos assets/photos --photos_license "$PHOTOS_LICENSE" --max_short_side 128 --output_dir "$OUTPUT_DIR/rain"

mixture() { # name, what the cartoons' entry says beside
  cat > "$OUTPUT_DIR/$1.yaml" <<YAML
datasets:
  - dataset_name: $OUTPUT_DIR/rain
    weight: 1
  - dataset_name: $OUTPUT_DIR/cartoons
    weight: 1
    $2
YAML
}
mixture replay "replay: true"
mixture both "replay: false"

echo "2/4  Learning cartoons ($FIRST_STEPS updates)"
train first "$MODEL_ID" "$FIRST_STEPS" --dataset_name="$OUTPUT_DIR/cartoons" "$@"

echo "3/4  Going on with rain ($SECOND_STEPS updates): alone, with cartoons replayed, with cartoons trained on"
train alone "$OUTPUT_DIR/first" "$SECOND_STEPS" --dataset_name="$OUTPUT_DIR/rain" "$@"
train replay "$OUTPUT_DIR/first" "$SECOND_STEPS" --dataset_mixture="$OUTPUT_DIR/replay.yaml" "$@"
train both "$OUTPUT_DIR/first" "$SECOND_STEPS" --dataset_mixture="$OUTPUT_DIR/both.yaml" "$@"

echo "4/4  Both tasks of each, on held-out photographs"
for task in cartoons rain; do
  python evaluation/evaluate.py --model "$OUTPUT_DIR"/{first,alone,replay,both} --dataset "$OUTPUT_DIR/$task" \
    --split test --batch_size 12 --guidance_scale 1 --image_guidance_scale 1 --output_dir "$OUTPUT_DIR/evaluation-$task"
done
