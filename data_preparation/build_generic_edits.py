"""Build a dataset of generic edits: a tile of a photo, an instruction, the tile edited.

    python data_preparation/build_generic_edits.py --photos DIR --output_dir DATASET

Columns: original_image, edit_prompt, edited_image, task. Gray, sepia, more contrast, sharpen, denoise and more, each
in several wordings, and pairs that keep the image. A build that was stopped goes on when the same command is run again;
the result is the same to the byte, and the same on Ray (`--ray`).
"""

from instruct_pix2pix.building.build import add_dataset_flags, add_photo_flags, check_dataset_flags
from instruct_pix2pix.cli import Parser, UserError, run, whole_number


def main(argv: list[str] | None = None) -> None:
    # fmt: off
    parser = Parser(__doc__)
    add = parser.add_argument_group("pairs").add_argument
    add_photo_flags(add, required=True)
    add("--rows", type=whole_number(1), default=12000, metavar="N", help="make so many pairs, in all splits")
    add("--tile", type=whole_number(16), default=64, metavar="PIXELS", help="side of the images")
    add("--keep_share", type=float, default=0.2, metavar="F", help="share of pairs whose two images are the same")
    add_dataset_flags(parser, None, "folder of <task>.txt files to use instead of the edits' own wordings")
    # fmt: on
    args = parser.parse_args(argv)
    check_dataset_flags(args)
    if not 0 <= args.keep_share <= 1:
        raise UserError(f"--keep_share: {args.keep_share} is not a share; give one from 0 to 1")
    # OpenCV and numpy, which --help and a wrong flag need not wait for.
    from instruct_pix2pix.building.generic_edits import build_generic_edits

    build_generic_edits(args)


if __name__ == "__main__":
    run(main)
