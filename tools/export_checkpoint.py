#!/usr/bin/env python
"""Export a checkpoint of a training as a pipeline, the files that training would have exported at that update.

    python tools/export_checkpoint.py outputs/my_run/checkpoint-500 --output_dir pipeline

With --use_ema the average is exported, as training does. The parts that training does not change come from the base
model, by the path that training was given: run this from the same folder. The model card says what the checkpoint
knows, and all of it for a training's last update.
"""

from pathlib import Path

from instruct_pix2pix.cli import Parser, UserError, run
from instruct_pix2pix.files import check_new_folder
from instruct_pix2pix.models import trained


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("checkpoint", type=Path, help="the folder OUTPUT_DIR/checkpoint-N of a training")
    parser.add_argument("--output_dir", type=Path, required=True, help="the folder to make")
    args = parser.parse_args(argv)
    if not trained.is_checkpoint(args.checkpoint):
        raise UserError(f"checkpoint: {args.checkpoint} is no checkpoint of a training; give OUTPUT_DIR/checkpoint-N")
    trained.check_base(args.checkpoint, "checkpoint")
    check_new_folder("--output_dir", args.output_dir)
    from instruct_pix2pix import publishing

    publishing.export_checkpoint(args.checkpoint, args.output_dir.absolute())
    print(f"{args.output_dir}: the pipeline of {args.checkpoint}")


if __name__ == "__main__":
    run(main, stopped="nothing was written; run it again")
