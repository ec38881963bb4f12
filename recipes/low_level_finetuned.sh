#!/usr/bin/env bash
# Low-level image processing (deblur, derain, denoise, enhance), from InstructPix2Pix.
# The same as low_level_from_scratch.sh, but the base follows instructions already.
# Validation and model card edit without guidance: a restoration has one right answer, which guidance overshoots.
# published.sh has what the four recipes share, and how to override it.
MODEL_ID=${MODEL_ID:-timbrooks/instruct-pix2pix}
DATASET_ID=${DATASET_ID:-instruction-tuning-sd/low-level-image-proc}
OUTPUT_DIR=${OUTPUT_DIR:-outputs/low-level-finetuned}
VAL_IMAGE_URL=${VAL_IMAGE_URL:-https://hf.co/datasets/sayakpaul/sample-datasets/resolve/main/derain_the_image_1.png}
source "$(dirname "$0")/published.sh" finetune_instruct_pix2pix.py \
  --original_image_column="input_image" --edit_prompt_column="instruction" --edited_image_column="ground_truth_image" \
  --image_geometry=crop \
  --validation_prompt="Derain the image" \
  --guidance_scale=1 --image_guidance_scale=1 \
  "$@"
