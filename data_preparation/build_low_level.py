"""Build a dataset for low-level image processing: instruction, degraded image, image without the flaw.

    python data_preparation/build_low_level.py --reds REDS --rain13k Rain13k --sidd SIDD --lol LOL \\
        --num_reds 1200 --num_rain13k 686 --num_sidd 8 --num_lol 23 --output_dir DATASET
    python data_preparation/build_low_level.py --pairs derain=DEGRADED_DIR:CLEAN_DIR --output_dir DATASET
    python data_preparation/build_low_level.py --photos DIR --synthesize 2000 --output_dir DATASET

Columns: instruction, input_image, ground_truth_image, task. Real sets are read as they are downloaded;
--pairs takes two folders of your own, --synthesize makes the same tasks from any photos. --dry_run counts and stops.
A build that was stopped goes on when the same command is run again; the result is the same to the byte, and the
same on Ray (`--ray`).
"""

import argparse
import re
from pathlib import Path

from instruct_pix2pix.building.build import add_dataset_flags, add_photo_flags, check_dataset_flags
from instruct_pix2pix.building.low_level import SYNTHETIC_TASKS, build_low_level
from instruct_pix2pix.building.restoration_sets import SETS
from instruct_pix2pix.cli import Parser, UserError, run, whole_number

INSTRUCTIONS = Path(__file__).parent / "instructions"


def main(argv: list[str] | None = None) -> None:
    # fmt: off
    parser = Parser(__doc__)
    add = parser.add_argument_group("real sets").add_argument
    for name, restoration_set in SETS.items():
        add(f"--{name}", type=Path, metavar="DIR",
            help=f"{restoration_set.task}: the folder that holds {restoration_set.layouts}")
    for name in SETS:
        add(f"--num_{name}", type=whole_number(1), metavar="N",
            help="take so many of its training pairs, and of its held-out pairs the same share")
    add("--pairs", type=task_folders, action="append", default=[], metavar="TASK=DEGRADED_DIR:CLEAN_DIR",
        help="two folders of your own, paired by name; may be given again. Any task that has a file in --instructions")
    add("--fraction", type=float, default=1.0, metavar="F", help="share of the other sets to take")

    add = parser.add_argument_group("synthetic pairs").add_argument
    add_photo_flags(add)
    add("--synthesize", type=whole_number(0), default=0, metavar="N", help="make so many pairs, in all splits")
    add("--tasks", nargs="+", choices=SYNTHETIC_TASKS, default=SYNTHETIC_TASKS, metavar="TASK",
        help="the tasks to make, in equal numbers")
    add("--severity", type=float, nargs=2, default=[0.1, 0.9], metavar=("LOW", "HIGH"),
        help="range from which each row's severity is drawn; 0 is barely visible, 1 is strong")
    add("--max_short_side", type=whole_number(16), metavar="PIXELS",
        help="scale larger photos down to this short side before degrading them")

    add = parser.add_argument_group("mixture").add_argument
    add("--tile", type=whole_number(0), default=0, metavar="PIXELS",
        help="cut larger images into tiles of this side, one row each; 0 keeps native resolution")
    add("--weights", nargs="+", type=task_weight, default=[], metavar="TASK=W",
        help="multiply the training rows of a task: below 1 leaves some out, above 1 repeats them")
    add("--mixing_cap", type=whole_number(1), metavar="N",
        help="at most so many training rows a task, after --weights: examples-proportional mixing as in FLAN")

    add_dataset_flags(parser, INSTRUCTIONS, "folder of <task>.txt files")
    parser.add_argument("--dry_run", action="store_true",
        help="count pairs, images without a partner and files left out, and stop")
    # fmt: on
    args = parser.parse_args(argv)
    check_dataset_flags(args)
    if not any(getattr(args, name) for name in SETS) and not args.pairs and not args.synthesize:
        raise UserError("--synthesize: no source; name a real set, or give --pairs or --photos DIR --synthesize N")
    if bool(args.synthesize) != bool(args.photos):
        raise UserError(f"--synthesize: {args.synthesize} with --photos {args.photos}; give both or neither")
    if not 0 < args.fraction <= 1:
        raise UserError(f"--fraction: {args.fraction} is not a share; give one above 0, up to 1")
    if not 0 <= args.severity[0] <= args.severity[1] <= 1:
        raise UserError(f"--severity: {args.severity} is no range within 0 to 1; give LOW and HIGH")
    if 0 < args.tile < 64:
        raise UserError(f"--tile: {args.tile} is too small; give 64 or more")
    for name in SETS:
        if getattr(args, f"num_{name}") and not getattr(args, name):
            raise UserError(f"--num_{name}: no folder of the set; give --{name} DIR as well")
    for task, _, _ in args.pairs:
        if not (path := args.instructions / f"{task}.txt").is_file():
            raise UserError(f"--pairs: {task}: no instructions for it; write {path}, one sentence a line")
    tasks = {*SYNTHETIC_TASKS, *(chosen.task for chosen in SETS.values()), *(task for task, _, _ in args.pairs)}
    for task, weight in args.weights:
        if task not in tasks:
            raise UserError(f"--weights: {task}={weight}: no such task; tasks are {', '.join(sorted(tasks))}")
    build_low_level(args)


def task_weight(text: str) -> tuple[str, float]:
    task, _, weight = text.partition("=")
    try:
        if 0 <= float(weight) < 1000:
            return task, float(weight)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text}: not TASK=W, where W is 0 or more")


def task_folders(text: str) -> tuple[str, Path, Path]:
    """TASK=DEGRADED_DIR:CLEAN_DIR; a colon may be part of a folder's name."""
    task, _, both = text.partition("=")
    parts = both.split(":")
    ways = [(Path(":".join(parts[:i])), Path(":".join(parts[i:]))) for i in range(1, len(parts))]
    folders = [way for way in ways if way[0].is_dir() and way[1].is_dir()]
    if not re.fullmatch(r"[\w-]+", task) or not ways:
        raise argparse.ArgumentTypeError(f"{text}: not TASK=DEGRADED_DIR:CLEAN_DIR")
    if len(folders) != 1:
        missing = [str(folder) for folder in ways[0] if not folder.is_dir()]
        raise argparse.ArgumentTypeError(
            f"{text}: {' and '.join(missing) or 'more than one way to split it'}: no such folder"
        )
    return task, *folders[0]


if __name__ == "__main__":
    run(main)
