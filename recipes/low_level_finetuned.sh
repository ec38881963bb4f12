#!/usr/bin/env bash
# Low-level image processing (deblur, derain, denoise, enhance), from InstructPix2Pix.
# The same as low_level_from_scratch.sh, but the base follows instructions already.
MODEL_ID=${MODEL_ID:-timbrooks/instruct-pix2pix}
OUTPUT_DIR=${OUTPUT_DIR:-outputs/low-level-finetuned}
TRAINING_SCRIPT=finetune_instruct_pix2pix.py
source "$(dirname "$0")/low_level_from_scratch.sh"
