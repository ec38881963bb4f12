#!/usr/bin/env bash
# Trains the two models kept in assets/tiny-stable-diffusion and assets/tiny-instruct-pix2pix from assets/photos:
# about an hour of training and a quarter of measuring on one CPU core. Run from the repository's root, with the
# requirements installed:
#
#     bash recipes/tiny_base.sh [folder for the new models, outputs/tiny_models by default]
#
# It may be stopped at any time: run again, it goes on from where it was. The environment variable THREADS sets
# the number of CPU threads.
set -euo pipefail
cd "$(dirname "$0")/.."
output_dir=${1:-outputs/tiny_models}
work_dir=outputs/tiny_base
threads=${THREADS:-1}

train() { python -m tools.train_tiny_base --work_dir "$work_dir" --threads "$threads" "$@"; }

train --stage linear --steps 1500
train --stage vae --steps 5000
train --stage base --steps 1000 --tiles 6000
train --stage instruct --steps 4500 --tiles 6000 --log_every 500
python -m tools.save_tiny_base --work_dir "$work_dir" --output_dir "$output_dir" --threads "$threads"
