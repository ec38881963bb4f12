#!/usr/bin/env bash
# The cartoonizer, from InstructPix2Pix.
# The same as cartoonizer_from_scratch.sh, but the base follows instructions already.
# published.sh has what the four recipes share, and how to override it.
MODEL_ID=${MODEL_ID:-timbrooks/instruct-pix2pix}
DATASET_ID=${DATASET_ID:-instruction-tuning-sd/cartoonization}
OUTPUT_DIR=${OUTPUT_DIR:-outputs/cartoonizer-finetuned}
VAL_IMAGE_URL=${VAL_IMAGE_URL:-https://hf.co/datasets/diffusers/diffusers-images-docs/resolve/main/mountain.png}
source "$(dirname "$0")/published.sh" finetune_instruct_pix2pix.py \
  --validation_prompt="Generate a cartoonized version of the natural image" \
  --guidance_scale=7.0 --image_guidance_scale=1.5 \
  "$@"
