#!/usr/bin/env bash
# The cartoonizer, from InstructPix2Pix.
# The same as cartoonizer_from_scratch.sh, but the base follows instructions already.
MODEL_ID=${MODEL_ID:-timbrooks/instruct-pix2pix}
OUTPUT_DIR=${OUTPUT_DIR:-outputs/cartoonizer-finetuned}
TRAINING_SCRIPT=finetune_instruct_pix2pix.py
source "$(dirname "$0")/cartoonizer_from_scratch.sh"
