"""Build a dataset of any tasks of instruct_pix2pix/building/tasks.py, by their names or by clusters.

    python data_preparation/build_tasks.py --tasks tint restoration gray --photos DIR --output_dir DATASET

Columns: original_image, edit_prompt, edited_image, task: the tasks come in turn, a row each. A build that was stopped
goes on when the same command is run again; the result is the same to the byte, and the same on Ray (`--ray`).
"""

from instruct_pix2pix.building.build import add_dataset_flags, add_photo_flags, check_dataset_flags
from instruct_pix2pix.cli import Parser, run, whole_number


def main(argv: list[str] | None = None) -> None:
    # fmt: off
    parser = Parser(__doc__)
    add = parser.add_argument_group("pairs").add_argument
    add("--tasks", nargs="+", required=True, metavar="NAME_OR_CLUSTER",
        help="tint, color, tone, style, restoration, cover, compound, or a task's name")
    add_photo_flags(add, required=True)
    add("--rows", type=whole_number(1), default=4000, metavar="N", help="make so many pairs, in all splits")
    add("--tile", type=whole_number(16), default=64, metavar="PIXELS", help="side of the images")
    add("--wordings", type=whole_number(1), metavar="N", help="of each task's wordings the first N; left out, all")
    add_dataset_flags(parser, None, "folder of <task>.txt files to use instead of the tasks' own wordings")
    # fmt: on
    args = parser.parse_args(argv)
    check_dataset_flags(args)
    # OpenCV and numpy, which --help and a wrong flag need not wait for.
    from instruct_pix2pix.building.tasks import build_tasks

    build_tasks(args)


if __name__ == "__main__":
    run(main)
