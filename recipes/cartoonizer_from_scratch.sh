#!/usr/bin/env bash
# The cartoonizer, from Stable Diffusion v1.5.
# Cartoonization triples, 15,000 updates of 8 images.
# published.sh has what the four recipes share, and how to override it.
#
#     bash recipes/cartoonizer_from_scratch.sh --lora_rank=16 --learning_rate=1e-4    # an adapter of 13 MB (docs/adapters.md)
MODEL_ID=${MODEL_ID:-stable-diffusion-v1-5/stable-diffusion-v1-5}
DATASET_ID=${DATASET_ID:-instruction-tuning-sd/cartoonization}
OUTPUT_DIR=${OUTPUT_DIR:-outputs/cartoonizer-from-scratch}
VAL_IMAGE_URL=${VAL_IMAGE_URL:-https://hf.co/datasets/diffusers/diffusers-images-docs/resolve/main/mountain.png}
source "$(dirname "$0")/published.sh" "${TRAINING_SCRIPT:-train_instruct_pix2pix.py}" \
  --validation_prompt="Generate a cartoonized version of the natural image" \
  --guidance_scale=7.0 --image_guidance_scale=1.5 \
  "$@"
