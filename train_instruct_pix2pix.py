#!/usr/bin/env python
"""Train an image editor from a 4-channel Stable Diffusion checkpoint, the InstructPix2Pix way.

    accelerate launch train_instruct_pix2pix.py \\
        --pretrained_model_name_or_path=stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --dataset_name=instruction-tuning-sd/cartoonization \\
        --resolution=256 --random_flip --use_ema --max_train_steps=15000 --output_dir=cartoonizer

The UNet's first convolution is widened to take the source image's latents; its new weights start at zero. To start
from an InstructPix2Pix model use finetune_instruct_pix2pix.py. The recipes of the published models are in recipes/.
"""

from instruct_pix2pix.cli import run
from instruct_pix2pix.training.options import parse_args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(__doc__, argv)
    from instruct_pix2pix.training.trainer import train  # after parsing: --help and wrong flags answer at once

    train(args, expected_in_channels=4)


if __name__ == "__main__":
    run(main, stopped="the same command with --resume_from_checkpoint latest goes on from the last checkpoint there is")
