"""Pairs of degraded and clean images: those of the public sets, and those of two folders of the user's own.

Pairs go by whole names. What could be paired in two ways is refused, and what has no partner or is not read is told.
"""

import os
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from instruct_pix2pix.building.photos import decode_image, encode_png, files_digest
from instruct_pix2pix.building.plan import SPLITS, by_reason
from instruct_pix2pix.building.restoration_sets import SETS, RestorationSet
from instruct_pix2pix.cli import UserError, warn
from instruct_pix2pix.data.pairing import SPLIT_NAMES, Pairs, pair_by_keys, pair_by_name, stem
from instruct_pix2pix.images import BadImage, describe_others, find_images

# Behind the name of a file that holds both images of a pair, the ground truth on the left.
HALVES = " [left half]", " [right half]"
NO_PARTNER = "no partner"


class Pair(NamedTuple):
    target: str  # "<source>/<path within its folder>"
    input: str
    split: str  # "" where the source does not tell
    group: str  # pictures of one scene: they stay in one split where the source does not tell it


class Found(NamedTuple):
    """What a source holds."""

    task: str
    about: str  # for the dataset card
    roots: dict[str, Path]  # what stands before the first slash of a pair's names -> the folder meant
    pairs: list[Pair]
    skipped: list[dict]  # {"source", "reason"}
    report: str  # one line: pairs, images without a partner, what was left out
    digest: str  # changes when names or sizes change


def find_pairs(name: str, root: Path) -> Found:
    """The pairs of set `name` under `root`.

    One image may lack its partner, or 1% of them; more is an error, since a part of the set is then missing. So is a
    pair of which no folder tells whether it is for training or testing, unless the set has no splits.
    """
    flag, wanted = f"--{name}: {root}", SETS[name]
    if not root.is_dir():
        raise UserError(f"{flag}: no such folder; give the folder that holds {wanted.layouts}")
    paths, others = find_images(root)
    (inputs, targets, both, strange), keys = sort_out(wanted, root, paths)
    used = sorted([*inputs, *targets, *both])
    skipped = [{"source": f"{name}/{path}", "reason": "of no known layout"} for path in strange]
    second = second_choices(wanted, inputs, keys)
    skipped += [{"source": f"{name}/{path}", "reason": f"the same frame as {name}/{second[path]}"} for path in second]
    inputs = [path for path in inputs if path not in second]
    found = pair_by_keys(inputs, targets, [keys.get], flag, wanted.several_inputs)
    listed = read_lists(wanted, root)
    pairs = []
    for input_path, target_path in [*found.pairs, *((path, path) for path in both)]:
        left, right = HALVES if input_path == target_path else ("", "")
        split = listed.get(listed_name(root, input_path)) or told(root, input_path, SPLIT_NAMES | wanted.splits)
        scene = wanted.scene(surroundings(root, input_path)) if wanted.scene else ""
        if not split and not scene:
            raise UserError(
                f"{flag}: no folder on the way to {input_path} tells whether it is for training or for testing; "
                f"give the folder above, that holds {wanted.layouts}"
            )
        pairs.append(Pair(f"{name}/{target_path}{left}", f"{name}/{input_path}{right}", split, f"{name}/scene {scene}"))
    if not pairs:
        alike = [f"--{other}" for other in SETS if other != name and holds_pairs(SETS[other], root, paths)]
        hint = f"; it looks like what {' or '.join(alike)} reads" if alike else ""
        raise UserError(f"{flag}: no pair found{hint}; looked for {wanted.layouts}")
    alone = [*found.inputs_alone, *found.targets_alone]
    if len(alone) > max(1, 0.01 * (len(pairs) + len(alone))):
        raise UserError(
            f"{flag}: {len(alone)} of {len(pairs) + len(alone)} images have no partner ({alone[0]}); "
            "unpack both sides of the set, or take such images out of the folder"
        )
    skipped += no_partner(found, f"{name}/", f"{name}/")
    line = report(f"--{name}", pairs, found, skipped, others)
    return Found(wanted.task, wanted.about, {name: root}, pairs, skipped, line, files_digest(root, used))


def find_given_pairs(number: int, task: str, degraded: Path, clean: Path) -> Found:
    """The pairs of two folders by name: the `number`-th --pairs TASK=DEGRADED_DIR:CLEAN_DIR.

    Where no name is on both sides, an input may be named <name of its ground truth>_<anything>, so that one ground
    truth has several. A folder train, val or test, inside or around, tells the split; the more held-out one counts.
    """
    flag = f"--pairs: {task}"
    if os.path.samefile(degraded, clean):
        raise UserError(
            f"{flag}: {degraded} is given twice; give the folder of degraded images, then that of clean ones"
        )
    # One of the two may lie inside the other.
    (inputs, other_inputs), (targets, other_targets) = find_images(degraded, clean), find_images(clean, degraded)
    for folder, images in ((degraded, inputs), (clean, targets)):
        if not images:
            raise UserError(f"{flag}: {folder}: no image at any depth; give a folder of images")
    found = pair_by_name(inputs, targets, flag)
    if not found.pairs:
        owners = owners_by_prefix(inputs, targets)
        found = pair_by_keys(inputs, targets, [lambda path: owners.get(path, path)], flag, several_inputs=True)
    if not found.pairs:
        raise UserError(
            f"{flag}: no name is in both folders ({inputs[0]}, {targets[0]}); name each degraded image as its ground "
            "truth, or <that name>_<anything>"
        )
    heads = f"pairs{number}-degraded", f"pairs{number}-clean"
    pairs = []
    for input_path, target_path in found.pairs:
        splits = told(degraded, input_path, SPLIT_NAMES), told(clean, target_path, SPLIT_NAMES)
        split = max(splits, key=("", *SPLITS).index)
        target = f"{heads[1]}/{target_path}"
        pairs.append(Pair(target, f"{heads[0]}/{input_path}", split, target))
    skipped = no_partner(found, f"{heads[0]}/", f"{heads[1]}/")
    if skipped:
        warn(f"{flag}: {len(skipped)} images have no partner of their name, such as {skipped[0]['source']}")
    return Found(
        task,
        f"pairs of `{degraded.name}` and `{clean.name}`",
        dict(zip(heads, (degraded, clean), strict=True)),
        pairs,
        skipped,
        report(flag, pairs, found, skipped, other_inputs + other_targets),
        files_digest(degraded, inputs) + files_digest(clean, targets),
    )


def owners_by_prefix(inputs: list[str], targets: list[str]) -> dict[str, str]:
    """Of each input <name of a target>_<anything> or <name>-<anything> the target, where only one can be meant."""
    stems: dict[str, list[str]] = {}
    for path in targets:
        stems.setdefault(stem(path), []).append(path)
    owners = {}
    for path in inputs:
        folder = path.rpartition("/")[0]
        places = [match.start() for match in re.finditer("[_-]", path) if match.start() > len(folder)]
        possible = [target for place in places for target in stems.get(path[:place], [])]
        if len(possible) == 1:
            owners[path] = possible[0]
    return owners


def read_file(root: Path, name: str) -> bytes:
    """The encoded image behind a pair's name, which may be one half of a file."""
    for half, ending in enumerate(HALVES):
        if name.endswith(ending):
            both = decode_image((root / name.removesuffix(ending)).read_bytes())
            if both.shape[1] % 2:
                raise BadImage(f"cannot hold two images side by side (it is {both.shape[1]} pixels wide)")
            width = both.shape[1] // 2
            return encode_png(both[:, half * width : (half + 1) * width])
    return (root / name).read_bytes()


def around(root: Path) -> list[str]:
    """The names of the folder that holds `root`, and of `root`: they tell sides and splits too."""
    path = Path(os.path.abspath(root))
    return [
        "" if name == "dev" else name for name in (path.parent.name.lower(), path.name.lower())
    ]  # ~/dev is no split


def surroundings(root: Path, path: str) -> str:
    """A path within `root` as the patterns see it."""
    return "/".join([*around(root), stem(path).lower()])


def told(root: Path, path: str, splits: dict[str, str]) -> str:
    """The split that the folder nearest to an image tells, or "".

    `root` counts, and what holds `root` where it holds images at once: a set may be kept in somebody's folder "test".
    """
    inside = path.lower().split("/")[:-1]
    outside = around(root) if len(inside) < 2 else around(root)[1:]
    return next((splits[folder] for folder in reversed([*outside, *inside]) if folder in splits), "")


def sort_out(wanted: RestorationSet, root: Path, paths: list[str]) -> tuple[list[list[str]], dict[str, str]]:
    """Inputs, targets, files that hold both, and others; what the paths of a pair have in common, of each path."""
    sorted_out, keys = [[], [], [], []], {}
    for path in paths:
        whole = surroundings(root, path)
        for side, pattern in ((side, pattern) for patterns in wanted.patterns for side, pattern in enumerate(patterns)):
            if match := re.fullmatch(pattern, whole):
                sorted_out[side].append(path)
                keys[path] = "/".join(group or "" for group in match.groups())
                break
        else:
            sorted_out[2 if wanted.halves and re.fullmatch(wanted.halves, whole) else 3].append(path)
    return sorted_out, keys


def holds_pairs(wanted: RestorationSet, root: Path, paths: list[str]) -> bool:
    (inputs, targets, _, _), keys = sort_out(wanted, root, paths)
    return not {keys[path] for path in inputs}.isdisjoint(keys[path] for path in targets)


def second_choices(wanted: RestorationSet, inputs: list[str], keys: dict[str, str]) -> dict[str, str]:
    """The inputs that do not count -> the same frame in the format that does."""
    second = {path for path in inputs if wanted.second_choice and re.search(wanted.second_choice, path.lower())}
    first = {keys[path]: path for path in inputs if path not in second}
    return {path: first[keys[path]] for path in sorted(second) if keys[path] in first}


def listed_name(root: Path, path: str) -> str:
    """A path as the lists of a set name it: from the set's own folder on, whatever stands before it."""
    return "/".join([*around(root), *path.lower().split("/")][-4:])


def read_lists(wanted: RestorationSet, root: Path) -> dict[str, str]:
    """What lists in `root` or beside it tell: `listed_name` -> split."""
    listed = {}
    if wanted.lists:
        for path in sorted([*root.rglob("*.txt"), *root.absolute().parent.glob("*.txt")]):
            if match := re.fullmatch(wanted.lists, path.name.lower()):
                for name in path.read_text(encoding="utf-8", errors="replace").lower().split():
                    listed["/".join(name.split("/")[-4:])] = match[1]
    return listed


def no_partner(found: Pairs, inputs: str, targets: str) -> list[dict]:
    names = [inputs + path for path in found.inputs_alone] + [targets + path for path in found.targets_alone]
    return [{"source": name, "reason": NO_PARTNER} for name in sorted(names)]


def report(flag: str, pairs: list[Pair], found: Pairs, skipped: list[dict], others: Counter) -> str:
    splits = Counter(pair.split or "still to be split" for pair in pairs)
    split = ", ".join(f"{splits[name]} {name}" for name in (*SPLITS, "still to be split") if splits[name])
    alone = "; ".join(f"{name}: {number}" for name, number in found.counts().items() if name != "pairs")
    left_out = by_reason([row for row in skipped if row["reason"] != NO_PARTNER])
    parts = [
        f"{len(pairs)} pairs ({split}); {alone}",
        left_out,
        f"no image: {describe_others(others)}" if others else "",
    ]
    return f"{flag}: {'; '.join(filter(None, parts))}"
