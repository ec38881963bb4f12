"""Which files belong together: pairs by name, never guessed, and the split that a folder's name tells."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import NamedTuple

from instruct_pix2pix.cli import UserError

# Names that people give to a split's folder or file -> the split.
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}


class Pairs(NamedTuple):
    """`pairs` are (input, target), sorted; the other two lists hold files that have no partner."""

    pairs: list[tuple[str, str]]
    inputs_alone: list[str]
    targets_alone: list[str]

    def counts(self) -> dict[str, int]:
        """For a report."""
        return {
            "pairs": len(self.pairs),
            "inputs without a partner": len(self.inputs_alone),
            "targets without a partner": len(self.targets_alone),
        }


def split_in_name(name: str) -> str:
    """The split that a word of a path or name tells first, or ""."""
    return next((SPLIT_NAMES[word] for word in re.split(r"[/_.-]", name.lower()) if word in SPLIT_NAMES), "")


def stem(name: str) -> str:
    """A path without its file's ending: a dot in a folder's name is none."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + (file.rpartition(".")[0] or file)


def pair_by_name(inputs: Iterable[str], targets: Iterable[str], what: str) -> Pairs:
    """Pair paths whose names agree: letter by letter, then in another Unicode form, at last but for the ending.

    a.jpg and a.png are two pictures: each takes the partner of its very name, and where only a.webp is on the other
    side, nobody knows whose it is. Raises UserError then, beginning with `what` and showing both names.
    """
    return pair_by_keys(inputs, targets, [str, _normal, lambda name: _normal(stem(name))], what)


def pair_by_keys(
    inputs: Iterable[str],
    targets: Iterable[str],
    keys: list[Callable[[str], str]],
    what: str,
    several_inputs: bool = False,
) -> Pairs:
    """Pair those with equal keys, by one key function after the other.

    Raises UserError for files without a partner whose key is that of a second file on their side: whose of the two the
    other side's is, nobody knows. With `several_inputs`, several inputs may go with one target.
    """
    sides = (list(inputs), list(targets))
    pairs: list[tuple[str, str]] = []
    paired: tuple[set[str], set[str]] = (set(), set())
    for key in keys:
        by_key = tuple(defaultdict(list) for _ in sides)
        for names, groups in zip(sides, by_key, strict=True):
            for name in names:
                groups[key(name)].append(name)
        for shared in by_key[0].keys() & by_key[1].keys():
            groups = [groups[shared] for groups in by_key]
            left = [[name for name in names if name not in done] for names, done in zip(groups, paired, strict=True)]
            if not left[0] or not (left[1] or several_inputs):
                continue
            for side, names in enumerate(groups):
                if len(names) > 1 and not (several_inputs and side == 0):
                    first, second = sorted(names)[:2]
                    other = left[1 - side][0]
                    raise UserError(f"{what}: {first} and {second} could both belong to {other}; rename one of them")
            pairs += [(name, groups[1][0]) for name in left[0]]
            paired[0].update(left[0])
            paired[1].update(groups[1])
    alone = [sorted(set(names) - done) for names, done in zip(sides, paired, strict=True)]
    return Pairs(sorted(pairs), *alone)


def _normal(name: str) -> str:
    """One Unicode form for all: macOS writes an accent as a character of its own."""
    return unicodedata.normalize("NFC", name)
