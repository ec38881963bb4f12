"""Which rows a dataset gets: photos or pairs are looked at until enough can be used; their splits and wordings."""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

from instruct_pix2pix.building.photos import Photos, decode_image, image_hash
from instruct_pix2pix.cli import RowError, UserError
from instruct_pix2pix.data.sources import read_lines
from instruct_pix2pix.files import unit_hash
from instruct_pix2pix.images import BadImage, ordered_map

SPLITS = ("train", "validation", "test")  # a picture that is in two belongs to the later one


@dataclass(slots=True)
class Row:
    """One row of the dataset, as planned."""

    split: str
    source: str  # the photo, or the ground truth of a real pair: its name within the source
    image_hash: str = ""  # of the source's pixels
    width: int = 0  # of the row's images, in pixels
    height: int = 0
    task: str = ""
    input: str = ""  # the degraded partner's name; empty where the degraded image is made here
    left: int = 0  # the tile's corner in the source, in pixels
    top: int = 0
    repeat: int = 0  # which of several rows made from the same source


def split_of(image_hash: str, args) -> str:
    """The split of an image, from its hash alone: no seed, so that it is held out everywhere or nowhere."""
    u = unit_hash("split", image_hash)
    if u < args.test_fraction:
        return "test"
    return "validation" if u < args.test_fraction + args.validation_fraction else "train"


def take(
    chosen: dict[str, Row],
    skipped: list[dict],
    candidates: Iterable[Row],
    look,
    wanted: int,
    label: str,
    pool: Executor,
) -> None:
    """Look at candidates in their order until `wanted` more of them are in `chosen`.

    look(row) -> a key; fills in what the row lacks; raises BadImage or OSError. Of rows with one key the first is
    taken, for the most held-out split of all. What cannot be used goes to `skipped`.
    """
    from tqdm import tqdm

    def try_to_look(row: Row):
        try:
            return row, look(row), ""
        except (BadImage, OSError) as error:
            return row, None, str(error)

    enough = len(chosen) + wanted
    with tqdm(total=wanted, desc=f"plan, {label}", unit=" images", mininterval=0.5, disable=not wanted) as bar:
        for row, key, reason in ordered_map(pool, try_to_look, candidates if wanted else ()):
            if twin := chosen.get(key):
                twin.split = max(twin.split, row.split, key=SPLITS.index)
                reason = f"the same picture as {twin.input or twin.source}"
            if reason:
                skipped.append({"source": row.input or row.source, "reason": reason})
                continue
            chosen[key] = row
            bar.update()
            if len(chosen) == enough:
                break


def take_photos(
    photos: Photos,
    skipped: list[dict],
    fitted: Callable,
    least: int,
    wanted: int,
    args,
    pool: Executor,
    inside: str = "",
) -> list[Row]:
    """Rows for `wanted` different photos (0: for all), in an order decided by the seed and their names.

    fitted(width, height) -> the size of the row's images. Photos with a side below `least` pixels are left out.
    `inside` stands before the photos' names, where a row has other sources too.
    """

    def look(row: Row) -> str:
        image = decode_image(photos.read(row.source.removeprefix(inside)))
        height, width = image.shape[:2]
        if min(width, height) < least:
            raise BadImage(f"{width}x{height} is too small: sides must be {least} or more")
        row.width, row.height = fitted(width, height)
        row.image_hash = image_hash(image)
        row.split = row.split or split_of(row.image_hash, args)
        return row.image_hash

    names = sorted(zip(photos.names, photos.splits, strict=True), key=lambda photo: unit_hash(args.seed, photo[0]))
    chosen: dict[str, Row] = {}
    candidates = (Row(split, inside + name) for name, split in names)
    take(chosen, skipped, candidates, look, min(wanted or len(names), len(names)), "photos", pool)
    return list(chosen.values())


def by_reason(skipped: list[dict]) -> str:
    """How many images were left out for which reason: "3 no partner, 1 not an image"."""

    def kind(reason: str) -> str:  # without what is said of the one image
        return re.sub(r"^\d+x\d+ is | as \S.*$| \(.*$|[:;].*$", "", reason)

    counts = Counter(kind(row["reason"]) for row in skipped)
    return ", ".join(f"{number} {reason}" for reason, number in counts.most_common())


def read_again(name: str, read: Callable[[str], bytes], planned_hash: str | None = None):
    """(the file behind a planned name, its picture); RowError where it is no longer the one that was looked at."""
    changed = RowError(f"--output_dir: {name} has changed since the build began; choose another folder")
    try:
        data = read(name)
        image = decode_image(data)
    except (BadImage, OSError):
        raise changed from None
    if planned_hash not in (None, image_hash(image)):
        raise changed
    return data, image


def read_instructions(path: Path) -> tuple[list[str], list[str]]:
    """The sentences of an instruction file, one a line, and those among them that are held out.

    Empty lines and lines that begin with `#` are left out. A line that begins with `held-out:` is a wording
    kept for the test split. Returns (wordings for training, wordings for testing); the second falls back to
    the first.
    """
    lines = (" ".join(line.split()) for line in read_lines(Path(path), "--instructions"))
    lines = list(dict.fromkeys(line for line in lines if not line.startswith("#")))
    held_out = [line.removeprefix("held-out:").strip() for line in lines if line.startswith("held-out:")]
    training = [line for line in lines if not line.startswith("held-out:")]
    if not training:
        raise UserError(f"{path}: no instruction in it; write one sentence a line")
    return training, [line for line in held_out if line] or training


def draw_instruction(row: Row, instructions: dict, args) -> str | list[str]:
    """One wording for a row, drawn by the seed and the picture, or all for training to draw from."""
    training, testing = instructions[row.task]
    wordings = testing if row.split == "test" else training
    if args.all_instructions:
        return wordings
    key = args.seed, row.image_hash, row.task, row.input, row.left, row.top, row.repeat
    return wordings[int(unit_hash("instruction", *key) * len(wordings))]
