#!/usr/bin/env bash
# A training on Hugging Face Jobs. The disk goes with the machine, so the newest checkpoint is kept on the Hub, and the same
# command goes on from there:
#
#     docker build -f recipes/launch/Dockerfile -t OWNER/instruct-pix2pix . && docker push OWNER/instruct-pix2pix
#     export HF_TOKEN=...                                                # or hf auth login
#     IMAGE=OWNER/instruct-pix2pix HUB_MODEL_ID=OWNER/cartoonizer bash recipes/launch/hf_jobs.sh \
#       finetune_instruct_pix2pix.py --config recipes/launch/run.yaml
#
# A file for --config is read inside the image. FLAVOR=a100x8 takes a machine of eight GPUs, all of which are used;
# `hf jobs hardware` lists them. TIMEOUT ends a job, ATTEMPTS starts a failed one again.
set -euo pipefail

exec hf jobs run --detach \
  --flavor "${FLAVOR:-a100-large}" --timeout "${TIMEOUT:-24h}" --attempts "${ATTEMPTS:-3}" --secrets HF_TOKEN \
  "${IMAGE:?name the image that recipes/launch/Dockerfile builds}" \
  torchrun --standalone --nproc-per-node=gpu "$@" \
  --push_to_hub --hub_model_id="${HUB_MODEL_ID:?name the repository to keep checkpoints and pipeline in}" \
  --hub_strategy=checkpoint --resume_from_checkpoint=hub
