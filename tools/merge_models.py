#!/usr/bin/env python
"""Teach another model of the family what training taught one: its UNet becomes OURS - BASE + THEIRS.

    python tools/merge_models.py outputs/cartoonizer stable-diffusion-v1-5 other-model cartoonizing-other-model

OURS is a trained pipeline, BASE the model that it was trained from, THEIRS another one that came of BASE. All three are
folders in diffusers' format, with weights in safetensors. OUT is a pipeline folder with the parts of THEIRS but for
the UNet; with BASE for THEIRS its UNet is that of OURS, bit for bit.
"""

from pathlib import Path

from instruct_pix2pix.cli import Parser, run
from instruct_pix2pix.files import check_new_folder


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("OURS", help="the pipeline that training left")
    parser.add_argument("BASE", help="the model it was trained from")
    parser.add_argument("THEIRS", help="the model to teach")
    parser.add_argument("OUT", type=Path, help="the folder to make")
    args = parser.parse_args(argv)
    check_new_folder("OUT", args.OUT)
    from instruct_pix2pix import publishing

    models = {name: getattr(args, name) for name in ("OURS", "BASE", "THEIRS")}
    publishing.export_transplant(models, args.OUT.absolute())
    print(f"{args.OUT}: {args.THEIRS} with what {args.OURS} learned")


if __name__ == "__main__":
    run(main, stopped="nothing was written; run it again")
