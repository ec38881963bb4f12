#!/usr/bin/env python
"""Fine-tune an 8-channel InstructPix2Pix checkpoint on new instructions.

    accelerate launch finetune_instruct_pix2pix.py \\
        --pretrained_model_name_or_path=timbrooks/instruct-pix2pix \\
        --dataset_name=instruction-tuning-sd/cartoonization \\
        --resolution=256 --random_flip --use_ema --max_train_steps=15000 --output_dir=cartoonizer-finetuned

It adapts faster than plain Stable Diffusion, because following instructions is known to it. To start from plain
Stable Diffusion use train_instruct_pix2pix.py. The recipes of the published models are in recipes/.
"""

from instruct_pix2pix.cli import run
from instruct_pix2pix.training.options import parse_args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(__doc__, argv)
    from instruct_pix2pix.training.trainer import train  # after parsing: --help and wrong flags answer at once

    train(args, expected_in_channels=8)


if __name__ == "__main__":
    run(main, stopped="the same command with --resume_from_checkpoint latest goes on from the last checkpoint there is")
