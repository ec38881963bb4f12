"""Build a dataset for low-level image processing: instruction, degraded image, image without the flaw.

    python data_preparation/build_low_level.py --reds REDS --rain13k Rain13k --sidd SIDD --lol LOL \\
        --num_reds 1200 --num_rain13k 686 --num_sidd 8 --num_lol 23 --output_dir DATASET
    python data_preparation/build_low_level.py --photos DIR --synthesize 2000 --output_dir DATASET

Columns: instruction, input_image, ground_truth_image, task. Real sets are read as they are downloaded;
--synthesize makes the same tasks from any photos. A build that was stopped goes on when the same command is
run again; the result is the same to the byte, and the same for any number of processes (`accelerate launch`).
"""

import argparse
import hashlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from instruct_pix2pix.building import build as records
from instruct_pix2pix.building import photos as sources
from instruct_pix2pix.building.build import Row, UserError
from instruct_pix2pix.building.photos import BadImage
from instruct_pix2pix.building.restoration_sets import SETS, find_pairs

INSTRUCTIONS = Path(__file__).parent / "instructions"
SYNTHETIC_TASKS = ["deblur", "derain", "denoise", "enhance", "dejpeg", "deblur_denoise", "denoise_dejpeg"]
THREADS = 4  # large images are decoded: 16 million pixels take 100 MB a pair


def parse_arguments():
    # fmt: off
    parser = records.Parser(__doc__)
    add = parser.add_argument_group("real sets").add_argument
    for name, restoration_set in SETS.items():
        add(f"--{name}", type=Path, metavar="DIR",
            help=f"{restoration_set.task}: the folder that holds {restoration_set.layouts}")
    for name in SETS:
        add(f"--num_{name}", type=int, metavar="N",
            help="take so many of its training pairs, and of its held-out pairs the same share")
    add("--fraction", type=float, default=1.0, metavar="F", help="share of the other sets to take")

    add = parser.add_argument_group("synthetic pairs").add_argument
    add("--photos", type=Path, metavar="DIR",
        help="folder of photos, nested in any way; children train, val or validation, test are its splits")
    add("--synthesize", type=int, default=0, metavar="N", help="make so many pairs, in all splits")
    add("--tasks", nargs="+", choices=SYNTHETIC_TASKS, default=SYNTHETIC_TASKS, metavar="TASK",
        help="the tasks to make, in equal numbers")
    add("--severity", type=float, nargs=2, default=[0.1, 0.9], metavar=("LOW", "HIGH"),
        help="range from which each row's severity is drawn; 0 is barely visible, 1 is strong")
    add("--max_short_side", type=int, metavar="PIXELS",
        help="scale larger photos down to this short side before degrading them")
    add("--photos_license", default="unknown, see where they come from", metavar="TEXT",
        help="licence of the photos, for the dataset card")

    add = parser.add_argument_group("mixture").add_argument
    add("--tile", type=int, default=0, metavar="PIXELS",
        help="cut larger images into tiles of this side, one row each; 0 keeps native resolution")
    add("--weights", nargs="+", type=task_weight, default=[], metavar="TASK=W",
        help="multiply the training rows of a task: below 1 leaves some out, above 1 repeats them")
    add("--mixing_cap", type=int, metavar="N",
        help="at most so many training rows a task, after --weights: examples-proportional mixing as in FLAN")
    add("--instructions", type=Path, default=INSTRUCTIONS, metavar="DIR",
        help="folder of <task>.txt, one sentence a line; lines that begin with 'held-out:' are for testing")
    add("--all_instructions", action="store_true",
        help="keep the whole list in every row, so that training draws one anew each epoch")

    add = parser.add_argument_group("dataset").add_argument
    records.add_dataset_flags(add)
    # fmt: on
    args = parser.parse_args()
    records.check_dataset_flags(parser, args)
    if not any(getattr(args, name) for name in SETS) and not args.synthesize:
        parser.error("--synthesize: no source; name a real set or give --photos DIR --synthesize N")
    if bool(args.synthesize) != bool(args.photos) or args.synthesize < 0:
        parser.error(f"--synthesize: {args.synthesize} with --photos {args.photos}; give both or neither")
    if not 0 < args.fraction <= 1:
        parser.error(f"--fraction: {args.fraction} is not a share; give one above 0, up to 1")
    if not 0 <= args.severity[0] <= args.severity[1] <= 1:
        parser.error(f"--severity: {args.severity} is no range within 0 to 1; give LOW and HIGH")
    for flag, least in (
        ("tile", 64),
        ("mixing_cap", 1),
        ("max_short_side", 16),
        *((f"num_{name}", 1) for name in SETS),
    ):
        if getattr(args, flag) and getattr(args, flag) < least:
            parser.error(f"--{flag}: {getattr(args, flag)} is too small; give {least} or more")
    for name in SETS:
        if getattr(args, f"num_{name}") and not getattr(args, name):
            parser.error(f"--num_{name}: no folder of the set; give --{name} DIR as well")
    return parser, args


def task_weight(text: str) -> tuple[str, float]:
    task, _, weight = text.partition("=")
    tasks = {*SYNTHETIC_TASKS, *(restoration_set.task for restoration_set in SETS.values())}
    try:
        if task in tasks and 0 <= float(weight) < 1000:
            return task, float(weight)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text}: not TASK=W; tasks are {', '.join(sorted(tasks))}, W is 0 or more")


def main(args) -> None:
    roots = {name: getattr(args, name) for name in SETS if getattr(args, name)}
    found = {name: find_pairs(name, root) for name, root in roots.items()}
    photos = sources.find_photos(args.photos) if args.photos else None
    tasks = list(dict.fromkeys([*(SETS[name].task for name in roots), *(args.tasks if photos else [])]))
    instructions = {task: records.read_instructions(args.instructions / f"{task}.txt") for task in tasks}

    def read(name: str) -> bytes:
        head, _, rest = name.partition("/")
        return photos.read(rest) if head == "photos" else (roots[head] / rest).read_bytes()

    settings = {
        **{name: digest for name, (_, _, digest) in found.items()},
        "photos": photos.digest if photos else None,
        "instructions": hashlib.sha256(repr(instructions).encode()).hexdigest(),
        **{f"num_{name}": getattr(args, f"num_{name}") for name in SETS},
        **{
            name: getattr(args, name)
            for name in ("fraction", "synthesize", "tasks", "severity", "max_short_side", "tile", "weights",
                         "mixing_cap", "all_instructions")
        },
    }  # fmt: skip
    text = {"dtype": "string", "_type": "Value"}
    features = {
        "instruction": {"feature": text, "_type": "List"} if args.all_instructions else text,
        "input_image": {"_type": "Image"},
        "ground_truth_image": {"_type": "Image"},
        "task": text,
    }

    def make_plan() -> tuple[list[Row], list[dict]]:
        rows, skipped = [], []
        for name, (pairs, alone, _) in found.items():
            skipped += alone
            rows += plan_real(name, pairs, read, skipped, args)
        if photos:
            rows += plan_synthetic(photos, skipped, args)
        # No picture in two splits, whichever set or folder it comes from: the most held-out one wins.
        order = ["test", "validation", "train"]
        held: dict[str, str] = {}
        for row in rows:
            held[row.image_hash] = min(held.get(row.image_hash, row.split), row.split, key=order.index)
        for row in rows:
            row.split = held[row.image_hash]
        rows = mix([tile for row in rows for tile in cut_tiles(row, args.tile)], dict(args.weights), args)
        # In a random order, but the tiles of one image together, to decode it once.
        rows.sort(key=lambda row: records.unit_hash(args.seed, row.source, row.input, row.task, row.repeat))
        return rows, skipped

    pool = ThreadPoolExecutor(THREADS)

    def make_rows(rows: list[Row]) -> list[dict]:
        groups = [list(g) for _, g in groupby(rows, key=lambda row: (row.source, row.input, row.task, row.repeat))]
        return [made for group in pool.map(make_group, groups) for made in group]

    def make_group(rows: list[Row]) -> list[dict]:
        """Rows that share their images: tiles of one pair."""
        first = rows[0]
        files = [read(first.source)]
        target = sources.decode_image(files[0])
        if sources.image_hash(target) != first.image_hash:
            raise UserError(f"--output_dir: {first.source} has changed since the build began; choose another folder")
        if first.input:
            files.insert(0, read(first.input))
            pair = [sources.decode_image(files[0]), target]
        else:
            pair, files = synthesize(target, first, args), []
        made = []
        for row in rows:
            if (row.height, row.width) == target.shape[:2] and files and all(map(sources.is_plain, files)):
                encoded = files  # untouched: embedded as the set ships it
            else:
                box = slice(row.top, row.top + row.height), slice(row.left, row.left + row.width)
                encoded = [records.encode_png(image[box]) for image in pair]
            key = args.seed, row.image_hash, row.task, row.input, row.left, row.top, row.repeat
            prompt = records.draw_instruction(instructions[row.task], row.split, args.all_instructions, *key)
            made.append(dict(zip(features, (prompt, *encoded, row.task), strict=True)))
        return made

    def write_card(rows, skipped, checksums) -> str:
        from_sets = [f"- {SETS[name].task}: {SETS[name].about}" for name in roots]
        from_photos = (
            [f"- synthetic pairs: photos of `{records.for_others(args.photos)}`, licence: {args.photos_license}"]
            if photos
            else []
        )
        return records.card(
            title="Low-level image processing",
            licence="other",
            tags=["image-editing", "instruction-tuning", "image-restoration", *(task for task in tasks)],
            about="Degraded images, the images without the flaw, and instructions that ask for the repair. "
            "No picture is in two splits."
            + records.about_wordings(instructions.values())
            + (f" Images larger than {args.tile} pixels are cut into tiles." if args.tile else "")
            + (" The degradations are described in `degradations.py` of the project." if photos else ""),
            columns={
                "instruction": "what to do" + (", every wording" if args.all_instructions else ""),
                "input_image": "the degraded image",
                "ground_truth_image": "the same view without the flaw, of the same size",
                "task": "what has to be undone",
            },
            licences="\n".join([*from_sets, *from_photos]),
            rows=rows,
            skipped=skipped,
            checksums=checksums,
            seed=args.seed,
        )

    records.build(args, settings, features, make_plan, make_rows, write_card)


def plan_real(name: str, pairs: list, read, skipped: list[dict], args) -> list[Row]:
    """Draw pairs of a set: so many of the training split, the same share of the others; sizes must agree."""
    from tqdm import tqdm

    def look(pair):
        try:
            target = sources.decode_image(read(pair.target))
            degraded = sources.decode_image(read(pair.input))
            if target.shape != degraded.shape:
                sizes = [f"{image.shape[1]}x{image.shape[0]}" for image in (degraded, target)]
                raise BadImage(f"input and ground truth differ in size: {sizes[0]} and {sizes[1]}")
            return pair, sources.image_hash(target), sources.image_hash(degraded), target.shape
        except (BadImage, OSError) as error:
            return pair, str(error)

    fractions = args.validation_fraction, args.test_fraction
    by_split: dict[str, list] = {split: [] for split in records.SPLITS}
    for pair in sorted(pairs, key=lambda pair: records.unit_hash(args.seed, pair.input)):
        by_split[pair.split or records.split_of(pair.group, *fractions)].append(pair)
    total = len(by_split["train"])
    number = getattr(args, f"num_{name}")
    if number and number > total:
        raise UserError(f"--num_{name}: {number} is more than its {total} training pairs; give at most {total}")
    share = number / total if number else args.fraction
    rows, seen = [], set()
    for split, candidates in by_split.items():
        wanted = max(1, round(share * len(candidates))) if candidates else 0
        taken = 0
        with tqdm(total=wanted, desc=f"plan, {name} {split}", unit=" pairs", disable=not wanted) as bar:
            for pair, *result in sources.ordered_map(look, candidates if wanted else [], THREADS, ahead=2):
                if len(result) == 1:
                    skipped.append({"source": pair.input, "reason": result[0]})
                    continue
                digest, input_digest, (height, width, _) = result
                if (digest, input_digest) in seen:
                    skipped.append({"source": pair.input, "reason": "the same pair was there before"})
                    continue
                seen.add((digest, input_digest))
                rows.append(Row(split, pair.target, digest, width, height, SETS[name].task, pair.input))
                taken += 1
                bar.update()
                if taken == wanted:
                    break
    return rows


def plan_synthetic(photos, skipped: list[dict], args) -> list[Row]:
    """`--synthesize` rows: the photos in a random order, over and over, the tasks in turn."""
    from tqdm import tqdm

    from instruct_pix2pix.building.cartoonizer import fitted_size

    def look(candidate):
        name, split = candidate
        try:
            image = sources.decode_image(photos.read(name))
            if min(image.shape[:2]) < 16:
                raise BadImage(f"{image.shape[1]}x{image.shape[0]} is too small: sides must be 16 or more")
            return name, split, sources.image_hash(image), image.shape
        except (BadImage, OSError) as error:
            return name, split, str(error)

    candidates = sorted(zip(photos.names, photos.splits, strict=True), key=lambda c: records.unit_hash(args.seed, c[0]))
    usable: list[Row] = []
    by_hash: dict[str, Row] = {}
    with tqdm(total=min(args.synthesize, len(candidates)), desc="plan, photos", unit=" images") as bar:
        for name, split, *found in sources.ordered_map(look, candidates, THREADS):
            if len(found) == 1:
                skipped.append({"source": f"photos/{name}", "reason": found[0]})
                continue
            digest, (height, width, _) = found
            split = split or records.split_of(digest, args.validation_fraction, args.test_fraction)
            if twin := by_hash.get(digest):
                skipped.append({"source": f"photos/{name}", "reason": f"the same picture as {twin.source}"})
                twin.split = min(twin.split, split, key=["test", "validation", "train"].index)
                continue
            width, height = fitted_size(width, height, args.max_short_side or max(width, height), multiple=1)
            by_hash[digest] = Row(split, f"photos/{name}", digest, width, height)
            usable.append(by_hash[digest])
            bar.update()
            if len(usable) == args.synthesize:
                break
    rows = []
    by_split = {split: [row for row in usable if row.split == split] for split in records.SPLITS}
    counts = {
        split: round(args.synthesize * len(of_split) / max(1, len(usable))) for split, of_split in by_split.items()
    }
    counts[max(counts, key=counts.get)] += args.synthesize - sum(counts.values())  # what rounding left over
    for split, of_split in by_split.items():
        for i in range(counts[split] if of_split else 0):
            turn, place = divmod(i, len(of_split))
            # Tasks go round; where the photos' number would give a photo the same task again, a turn shifts them.
            shift = 0 if len(of_split) % len(args.tasks) else turn
            rows.append(replace(of_split[place], task=args.tasks[(i + shift) % len(args.tasks)], repeat=turn))
    return rows


def synthesize(photo, row: Row, args) -> list:
    """(H, W, 3) uint8 photo -> [degraded, ground truth], the photo scaled down if a flag asks for it."""
    import cv2

    from instruct_pix2pix.building.cartoonizer import fitted_size
    from instruct_pix2pix.building.degradations import degrade

    size = fitted_size(photo.shape[1], photo.shape[0], args.max_short_side or max(photo.shape), multiple=1)
    if size != photo.shape[1::-1]:
        photo = cv2.resize(photo, size, interpolation=cv2.INTER_AREA)
    low, high = args.severity
    u = records.unit_hash("severity", args.seed, row.image_hash, row.task, row.repeat)
    seed = int(records.unit_hash("noise", args.seed, row.image_hash, row.task, row.repeat) * 2**48)
    return [degrade(photo, row.task, low + (high - low) * u, seed), photo]


def cut_tiles(row: Row, tile: int) -> list[Row]:
    """Tiles that cover the image, side by side; the last of a line is moved back, over its neighbour."""
    if not tile or max(row.width, row.height) <= tile:
        return [row]

    def starts(length: int) -> list[int]:
        return [*range(0, length - tile, tile), length - tile] if length > tile else [0]

    return [
        replace(row, left=left, top=top, width=min(tile, row.width), height=min(tile, row.height))
        for top in starts(row.height)
        for left in starts(row.width)
    ]


def mix(rows: list[Row], weights: dict[str, float], args) -> list[Row]:
    """Apply the cap or the weights to the training rows of each task; copies count `repeat` up."""
    mixed = [row for row in rows if row.split != "train"]
    for task in dict.fromkeys(row.task for row in rows):
        of_task = [row for row in rows if row.task == task and row.split == "train"]
        of_task.sort(key=lambda row: records.unit_hash("mix", args.seed, row.source, row.input, row.left, row.top))
        wanted = round(len(of_task) * weights.get(task, 1.0))
        if args.mixing_cap:
            wanted = min(wanted, args.mixing_cap)
        times = Counter()
        for i in range(wanted):
            row = of_task[i % len(of_task)]
            place = row.source, row.input, row.left, row.top
            mixed.append(replace(row, repeat=times[place]))
            times[place] += 1
    return mixed


if __name__ == "__main__":
    parser, args = parse_arguments()
    records.run(parser, lambda: main(args))
