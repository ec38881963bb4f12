"""The public restoration sets in the layouts in which they are downloaded: which file is whose ground truth.

A set is recognised by the names of folders and files on the way to an image, at any depth and in any case, so
that an archive may be unpacked as it is, or nested once more, and one part of a set will do.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from instruct_pix2pix.building.photos import files_digest
from instruct_pix2pix.cli import UserError
from instruct_pix2pix.data.pairing import SPLIT_NAMES
from instruct_pix2pix.images import find_images


class Place(NamedTuple):
    """What a path tells about an image."""

    side: str  # "input" or "target"
    key: str  # the same for the two images of a pair
    split: str  # "" where the set does not tell
    group: str  # pictures of one scene: they stay in one split where the set does not tell it


class Pair(NamedTuple):
    target: str  # "<set>/<path within its folder>"
    input: str
    split: str
    group: str


def reds(parts: list[str], stem: str) -> Place | None:
    """REDS: [train/]train_{sharp,blur,blur_jpeg}/<clip>/<frame>, {train,val}/{sharp,blur}/<clip>/<frame>."""
    for i in range(len(parts) - 1, -1, -1):
        if match := re.fullmatch(r"(?:(train|val)_)?(sharp|blur|blur_jpeg)", parts[i]):
            break
    else:
        return None
    split = match[1] or next((part for part in reversed(parts[:i]) if part in ("train", "val")), "")
    clip = parts[-1] if len(parts) - 1 > i else ""
    side = "target" if match[2] == "sharp" else "input"
    return Place(side, f"{split}/{clip}/{stem}", SPLIT_NAMES.get(split, ""), f"clip {split}/{clip}")


def side_by_side(
    parts: list[str], stem: str, input_folder: str, target_folder: str, train: str, tests: set[str]
) -> Place | None:
    """.../{input,target}/<name>, where a folder on the way tells the split."""
    if not parts or parts[-1] not in (input_folder, target_folder):
        return None
    split = "test" if tests & set(parts) else "train" if train in parts else ""
    key = "/".join([*parts[:-1], stem])
    return Place("input" if parts[-1] == input_folder else "target", key, split, key)


def rain13k(parts: list[str], stem: str) -> Place | None:
    """Rain13k: {train,test}[/<set>]/{input,target}/<name>, as HINet, MPRNet and Restormer each arrange it."""
    tests = {"test", "test100", "rain100h", "rain100l", "test2800", "test1200"}
    return side_by_side(parts, stem, "input", "target", "train", tests)


def sidd(parts: list[str], stem: str) -> Place | None:
    """SIDD small or medium: Data/<instance>/[<instance number>_]{NOISY,GT}_SRGB_<number>.

    It has no splits of its own. An instance's name is <instance>_<scene>_<phone>_...: there are ten scenes,
    each taken many times, and the pictures of one are kept in one split.
    """
    match = re.fullmatch(r"(?:.*_)?(noisy|gt)_srgb_(\d+)", stem)
    if not match:
        return None
    instance = parts[-1] if parts else ""
    scene = instance.split("_")[1] if re.match(r"\d+_\d+_", instance) else instance
    side = "input" if match[1] == "noisy" else "target"
    return Place(side, f"{'/'.join(parts)}/{match[2]}", "", f"sidd/scene {scene}")


def lol(parts: list[str], stem: str) -> Place | None:
    """LOL: {our485,eval15}/{low,high}/<name>."""
    return side_by_side(parts, stem, "low", "high", "our485", {"eval15"})


def raindrop(parts: list[str], stem: str) -> Place | None:
    """RainDrop: {train,test_a,test_b}/{data,gt}/<number>_{rain,clean}; test_a is part of test_b."""
    number = re.match(r"\d+", stem)
    return side_by_side(parts, number[0], "data", "gt", "train", {"test_a", "test_b"}) if number else None


class RestorationSet(NamedTuple):
    task: str
    place: Callable[[list[str], str], Place | None]
    layouts: str  # what is looked for, told to a user whose folder has none of it
    about: str  # for the dataset card


SETS = {
    "reds": RestorationSet(
        "deblur",
        reds,
        "{train,val}_{sharp,blur,blur_jpeg}/<clip>/ or {train,val}/{sharp,blur}/<clip>/",
        "REDS (Nah et al., CVPRW 2019), CC BY 4.0",
    ),
    "rain13k": RestorationSet(
        "derain",
        rain13k,
        "train/[Rain13K/]{input,target}/, test/{Test100,Rain100H,Rain100L,Test2800,Test1200}/{input,target}/",
        "Rain13k (as gathered for MPRNet, CVPR 2021, from several sets, each under its own terms)",
    ),
    "sidd": RestorationSet(
        "denoise",
        sidd,
        "Data/<instance>/[<number>_]NOISY_SRGB_010.PNG and [<number>_]GT_SRGB_010.PNG",
        "SIDD (Abdelhamed et al., CVPR 2018), see its page for the terms",
    ),
    "lol": RestorationSet(
        "enhance",
        lol,
        "our485/{low,high}/ and eval15/{low,high}/",
        "LOL (Wei et al., BMVC 2018), see its page for the terms",
    ),
    "raindrop": RestorationSet(
        "deraindrop",
        raindrop,
        "train/{data,gt}/, test_a/{data,gt}/, test_b/{data,gt}/ with <number>_rain and <number>_clean",
        "RainDrop (Qian et al., CVPR 2018), see its page for the terms",
    ),
}


def find_pairs(name: str, root: Path) -> tuple[list[Pair], list[dict], str]:
    """The pairs of set `name` under `root`, the images without a partner (as skipped rows), a digest of the names.

    Up to 1% of the images may lack their partner; more is an error, since a part of the set is then missing.
    """
    flag, restoration_set = f"--{name}", SETS[name]
    if not root.is_dir():
        raise UserError(f"{flag}: {root}: no such folder; give the folder that holds {restoration_set.layouts}")
    sides: dict[str, dict[str, tuple[str, Place]]] = {"input": {}, "target": {}}
    used = []
    for path in find_images(root)[0]:
        parts = path.lower().split("/")
        place = restoration_set.place(parts[:-1], parts[-1].rsplit(".", 1)[0])
        if place is None:
            continue
        known = sides[place.side].get(place.key)
        # Of a frame kept in both formats, the PNG.
        if known is None or known[0].lower().endswith(("jpg", "jpeg")):
            sides[place.side][place.key] = path, place
        used.append(path)
    inputs, targets = sides["input"], sides["target"]
    pairs = [
        Pair(f"{name}/{targets[key][0]}", f"{name}/{path}", place.split, place.group)
        for key, (path, place) in inputs.items()
        if key in targets
    ]
    alone = [inputs.get(key, targets.get(key))[0] for key in sorted(inputs.keys() ^ targets.keys())]
    if not pairs:
        raise UserError(f"{flag}: {root}: no pair found; looked for {restoration_set.layouts}")
    if len(alone) > 0.01 * (len(pairs) + len(alone)):
        raise UserError(
            f"{flag}: {root}: {len(alone)} of {len(pairs) + len(alone)} images have no partner ({alone[0]}); "
            "unpack both sides of the set"
        )
    skipped = [{"source": f"{name}/{path}", "reason": "no partner"} for path in alone]
    return pairs, skipped, files_digest(root, used)
