#!/usr/bin/env bash
# Low-level image processing (deblur, derain, denoise, enhance), from Stable Diffusion v1.5.
# Crops at native resolution: scaling down would erase the blur, rain and noise that the model is to remove.
# Validation and model card edit without guidance: a restoration has one right answer, which guidance overshoots.
# published.sh has what the four recipes share, and how to override it.
MODEL_ID=${MODEL_ID:-stable-diffusion-v1-5/stable-diffusion-v1-5}
DATASET_ID=${DATASET_ID:-instruction-tuning-sd/low-level-image-proc}
OUTPUT_DIR=${OUTPUT_DIR:-outputs/low-level-from-scratch}
VAL_IMAGE_URL=${VAL_IMAGE_URL:-https://hf.co/datasets/sayakpaul/sample-datasets/resolve/main/derain_the_image_1.png}
source "$(dirname "$0")/published.sh" "${TRAINING_SCRIPT:-train_instruct_pix2pix.py}" \
  --original_image_column="input_image" --edit_prompt_column="instruction" --edited_image_column="ground_truth_image" \
  --image_geometry=crop \
  --validation_prompt="Derain the image" \
  --guidance_scale=1 --image_guidance_scale=1 \
  "$@"
