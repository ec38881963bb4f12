"""The low-level dataset: pairs of public restoration sets, and photos degraded on purpose, mixed by task."""

from collections import Counter
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import groupby
from operator import attrgetter

from instruct_pix2pix.building.build import Work, build
from instruct_pix2pix.building.pairs import Found, find_given_pairs, find_pairs, read_file
from instruct_pix2pix.building.photos import (
    UNKNOWN_LICENCE,
    Photos,
    decode_image,
    encode_png,
    find_photos,
    image_hash,
    is_plain,
)
from instruct_pix2pix.building.plan import SPLITS, Row, read_again, read_instructions, split_of, take, take_photos
from instruct_pix2pix.building.restoration_sets import SETS
from instruct_pix2pix.cli import UserError
from instruct_pix2pix.data.geometry import whitebox_size
from instruct_pix2pix.files import as_code, as_text, for_others, unit_hash
from instruct_pix2pix.images import BadImage

# The keys of degradations.TASKS, for a command line that does not import OpenCV.
SYNTHETIC_TASKS = ["deblur", "derain", "denoise", "enhance", "dejpeg", "deblur_denoise", "denoise_dejpeg"]
DEGRADATIONS = "instruct_pix2pix/building/degradations.py"
THREADS = 4  # large images are decoded: 16 million pixels take 100 MB a pair

pair_of = attrgetter("source", "input", "task", "repeat")  # the same for the tiles of one pair


def build_low_level(args) -> None:
    """Make the dataset that the flags of build_low_level.py ask for."""
    found = {name: find_pairs(name, getattr(args, name)) for name in SETS if getattr(args, name)}
    for number, given in enumerate(args.pairs):
        found[f"pairs{number}"] = find_given_pairs(number, *given)
    photos = find_photos(args.photos) if args.photos else None
    reports = [source.report for source in found.values()]
    if photos:
        reports.append(f"--photos: {len(photos.names)} photos")
    print("\n".join(reports), flush=True)
    if args.dry_run:
        return
    roots = {head: root for source in found.values() for head, root in source.roots.items()}
    tasks = list(dict.fromkeys([*(source.task for source in found.values()), *(args.tasks if photos else [])]))
    instructions = {task: read_instructions(args.instructions / f"{task}.txt") for task in tasks}
    flags = "fraction", "synthesize", "tasks", "severity", "max_short_side", "tile", "weights", "mixing_cap"
    settings = {name: getattr(args, name) for name in (*flags, *(f"num_{name}" for name in SETS))}
    settings |= {name: source.digest for name, source in found.items()}
    settings["photos"] = photos.digest if photos else None
    columns = {
        "instruction": ("instruction", "what to do"),
        "input_image": ("input", "the degraded image"),
        "ground_truth_image": ("target", "the same view without the flaw, of the same size"),
        "task": ("task", "what has to be undone"),
    }
    licences = [f"- {source.task}: {source.about}" for source in found.values()]
    if photos:
        licence = as_text(args.photos_license or UNKNOWN_LICENCE)
        licences.append(f"- synthetic pairs: photos of {as_code(for_others(args.photos))}, licence: {licence}")
    about = {
        "title": "Low-level image processing",
        "licence": "other",
        "tags": ["image-editing", "instruction-tuning", "image-restoration", *tasks],
        "about": "Degraded images, the images without the flaw, and instructions that ask for the repair."
        + (f" Images larger than {args.tile} pixels are cut into tiles." if args.tile else "")
        + (f" The degradations are described in `{DEGRADATIONS}` of the project." if photos else ""),
        "licences": "\n".join(licences),
        "sources": "\n".join(f"- `{line.replace(': ', '`: ', 1)}" for line in reports),
    }
    read = partial(read_source, roots, photos and photos.read)

    def make_plan() -> tuple[list[Row], list[dict]]:
        rows, skipped = [], []
        with ThreadPoolExecutor(THREADS) as pool:
            for name, source in found.items():
                skipped += source.skipped
                rows += plan_real(name, source, read, skipped, args, pool)
            if photos:
                rows += plan_synthetic(photos, skipped, args, pool)
        # No picture in two splits, whichever set or folder it comes from: the most held-out one wins.
        held: dict[str, str] = {}
        for row in rows:
            held[row.image_hash] = max(held.get(row.image_hash, row.split), row.split, key=SPLITS.index)
        for row in rows:
            row.split = held[row.image_hash]
        rows = mix([tile for row in rows for tile in cut_tiles(row, args.tile)], args)
        # In a random order, but the tiles of one image together, to decode it once.
        rows.sort(key=lambda row: unit_hash(args.seed, *pair_of(row)))
        return rows, skipped

    build(Work(args, columns, instructions, partial(pair_rows, args, read)), settings, about, make_plan)


def read_source(roots: dict, read_photo: Callable[[str], bytes] | None, name: str) -> bytes:
    """The encoded image behind a planned name, which begins with the source's."""
    head, _, rest = name.partition("/")
    return read_photo(rest) if head == "photos" else read_file(roots[head], rest)


def pair_rows(args, read: Callable[[str], bytes]) -> Callable[[list[Row]], list[tuple[bytes, bytes]]]:
    """What makes rows: of each the degraded image and the ground truth, as PNG files."""
    pool = ThreadPoolExecutor(THREADS)

    def make_rows(rows: list[Row]) -> list[tuple[bytes, bytes]]:
        groups = [list(tiles) for _, tiles in groupby(rows, key=pair_of)]
        return [made for group in pool.map(make_tiles, groups) for made in group]

    def make_tiles(rows: list[Row]) -> list[tuple[bytes, bytes]]:
        first = rows[0]
        target_file, target = read_again(first.source, read, first.image_hash)
        files = None  # of a real pair, where they can be embedded as the set ships them
        if first.input:
            input_file, degraded = read_again(first.input, read)
            if is_plain(input_file) and is_plain(target_file):
                files = input_file, target_file
        else:
            degraded, target = synthesize(target, first, args)
        made = []
        for row in rows:
            if files and (row.height, row.width) == target.shape[:2]:
                made.append(files)
                continue
            box = slice(row.top, row.top + row.height), slice(row.left, row.left + row.width)
            made.append((encode_png(degraded[box]), encode_png(target[box])))
        return made

    return make_rows


def plan_real(
    name: str, found: Found, read: Callable[[str], bytes], skipped: list[dict], args, pool: Executor
) -> list[Row]:
    """Draw pairs of a source: so many of the training split, the same share of the others; sizes must agree."""

    def look(row: Row) -> str:
        target, degraded = decode_image(read(row.source)), decode_image(read(row.input))
        if target.shape != degraded.shape:
            sizes = [f"{image.shape[1]}x{image.shape[0]}" for image in (degraded, target)]
            raise BadImage(f"input and ground truth differ in size: {sizes[0]} and {sizes[1]}")
        row.height, row.width = target.shape[:2]
        row.image_hash = image_hash(target)
        return row.image_hash + image_hash(degraded)

    by_split: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for pair in sorted(found.pairs, key=lambda pair: unit_hash(args.seed, pair.input)):
        split = pair.split or split_of(pair.group, args)
        by_split[split].append(Row(split, pair.target, task=found.task, input=pair.input))
    total = len(by_split["train"])
    number = getattr(args, f"num_{name}", None)
    if number and number > total:
        raise UserError(f"--num_{name}: {number} is more than its {total} training pairs; give at most {total}")
    share = number / total if number else args.fraction
    chosen: dict[str, Row] = {}
    for split, candidates in by_split.items():
        wanted = max(1, round(share * len(candidates))) if candidates else 0
        take(chosen, skipped, candidates, look, wanted, f"{name} {split}", pool)
    return list(chosen.values())


def plan_synthetic(photos: Photos, skipped: list[dict], args, pool: Executor) -> list[Row]:
    """`--synthesize` rows: the photos in a random order, over and over, the tasks in turn."""
    fitted = partial(scaled_size, args=args)
    usable = take_photos(photos, skipped, fitted, 16, args.synthesize, args, pool, inside="photos/")
    rows = []
    by_split = {split: [row for row in usable if row.split == split] for split in SPLITS}
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


def scaled_size(width: int, height: int, args) -> tuple[int, int]:
    """The size of a photo once it is scaled down, if a flag asks for it."""
    return whitebox_size(width, height, args.max_short_side or max(width, height))[0]


def synthesize(photo, row: Row, args):
    """(H, W, 3) uint8 photo -> (degraded, ground truth), both scaled down if a flag asks for it."""
    import cv2

    from instruct_pix2pix.building.degradations import degrade

    height, width = photo.shape[:2]
    if (size := scaled_size(width, height, args)) != (width, height):
        photo = cv2.resize(photo, size, interpolation=cv2.INTER_AREA)
    low, high = args.severity
    key = args.seed, row.image_hash, row.task, row.repeat
    severity = low + (high - low) * unit_hash("severity", *key)
    return degrade(photo, row.task, severity, int(unit_hash("noise", *key) * 2**48)), photo


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


def mix(rows: list[Row], args) -> list[Row]:
    """Apply --weights and --mixing_cap to the training rows of each task; copies count `repeat` up."""
    weights = dict(args.weights)
    mixed = [row for row in rows if row.split != "train"]
    for task in dict.fromkeys(row.task for row in rows):
        of_task = [row for row in rows if row.task == task and row.split == "train"]
        of_task.sort(key=lambda row: unit_hash("mix", args.seed, row.source, row.input, row.left, row.top))
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
