"""Tasks by clusters, for the question whether instruction tuning generalises (tools/flan.py), and datasets of them.

A task makes (input, target) of an image, uint8 (H, W, 3) RGB, and a `numpy.random.Generator`; both have the image's
shape and type. Adding one is a line of `CLUSTERS`: its function, and its phrases between commas. In the cluster
restoration the changed image is the input and the image itself the target, in all others it is the other way round.

Edits are left out that the tiny autoencoder hides at 32 pixels, and random additions, which no model can foresee.

A task's last phrase is held out. The others make its wordings for training, of which MOST_WORDINGS are kept: first as
they stand, then with other nouns ("make it gray", "make the photo gray"), then in FRAMES ("please make it gray").
Held-out wordings are the last phrase, and it and the first one in HELD_OUT_FRAMES. A compound is two tasks of different
clusters in order ("denoise the image, then make it gray"), worded by the first wordings of both: for evaluation.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

from instruct_pix2pix.building import generic_edits as generic
from instruct_pix2pix.building.cartoonizer import opencv_cartoonize
from instruct_pix2pix.building.generic_edits import EDITS, RESTORATIONS, tint, to_uint8
from instruct_pix2pix.cli import UserError, nearest
from instruct_pix2pix.files import unit_hash

MOST_WORDINGS = 20
NOUNS = "it", "the image", "the photo", "the picture"
FRAMES = "{}", "please {}", "can you {}", "{} now", "just {}", "now {}", "{} please"
HELD_OUT_FRAMES = "could you {}", "you should {}"
CONNECTIVES, HELD_OUT_CONNECTIVES = ("{}, then {}", "{} and {}", "{} and then {}"), ("{}, then just {}",)


@dataclass(frozen=True)
class Task:
    name: str
    cluster: str
    pair: Callable[[np.ndarray, np.random.Generator], tuple[np.ndarray, np.ndarray]]
    wordings: list[str]
    held_out: list[str]  # wordings that no training sees
    parts: tuple[str, ...] = ()  # of a compound, the names of its tasks


def pixelate(image, rng):
    small = cv2.resize(image, None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA)
    return cv2.resize(small, image.shape[1::-1], interpolation=cv2.INTER_NEAREST)


def emboss(image, rng):
    """The slope along the diagonal, on middle gray."""
    slope = cv2.filter2D(image @ generic.LUMA, -1, np.diag([-1.0, 0, 1]))
    return np.repeat(to_uint8(128 + 2 * slope)[..., None], 3, axis=2)


def add_fog(image, rng):
    share = rng.uniform(0.5, 0.7)
    return to_uint8((1 - share) * image + share * 225)


def add_frame(image, rng):
    width = max(1, min(image.shape[:2]) // 8)
    inner = image[width:-width, width:-width]
    return cv2.copyMakeBorder(inner, *(width,) * 4, cv2.BORDER_CONSTANT, value=(255, 255, 255))


def add_sun(image, rng):
    height, width = image.shape[:2]
    return cv2.circle(image.copy(), (3 * width // 4, height // 4), min(height, width) // 5, (255, 225, 50), cv2.FILLED)


# fmt: off
CLUSTERS = {
    "tint": {
        **{name: EDITS[name] for name in ("warm", "cool", "green")},
        "red": (tint(1.3, 0.75, 0.75), "make it red, add a red tint, tint it red, give it a red tone"),
        "purple": (tint(1.1, 0.7, 1.25), "make it purple, add a purple tint, tint it purple, give it a purple tone"),
        "yellow": (tint(1.15, 1.1, 0.5), "make it yellow, add a yellow tint, tint it yellow, give it a yellow tone"),
    },
    "color": {
        **{name: EDITS[name] for name in ("gray", "sepia", "invert")},
        "swap red and blue": (EDITS["swap red and blue"][0],
            EDITS["swap red and blue"][1] + ", make red blue and blue red"),
    },
    "tone": {
        **{name: EDITS[name] for name in ("darker", "brighter", "more contrast", "less contrast")},
        "solarize": (lambda image, rng: np.where(image < 128, image, 255 - image),
            "solarize the image, make it solarized, add a solarized effect, reverse the highlights"),
    },
    "style": {
        **{name: EDITS[name] for name in ("blur", "edges")},
        "neon": (lambda image, rng: 255 - generic.edges(image, rng),
            "make it neon, draw bright lines on black, show neon outlines, turn it into neon lights"),
        "emboss": (emboss, "emboss the image, add an emboss effect, turn it into an emboss, make it look like stone"),
        "cartoon": (lambda image, rng: opencv_cartoonize(image[None])[0],
            "cartoonize the image, make it a cartoon, turn it into a comic, draw it as anime"),
        "pixelate": (pixelate, "pixelate the image, make it blocky, show large pixels, make it a mosaic"),
    },
    "restoration": {
        **{name: RESTORATIONS[name] for name in ("denoise", "derain", "low light")},
        "dehaze": (add_fog, "dehaze the image, remove the fog, clear the mist, take the haze away"),
        "unfade": (generic.contrast(0.45), "undo the fade, restore the contrast, make it less faded, repair the fade"),
    },
    "cover": {
        "fog": (add_fog, "add fog, make it foggy, put haze into it, put mist into the image"),
        "sun": (add_sun, "add a sun, draw a yellow sun, put a sun into it, show the sun"),
        "frame": (add_frame, "add a white frame, frame the image, draw a white frame, put it into a white frame"),
        "lines": (lambda image, rng: np.where(np.arange(len(image))[:, None, None] % 8 < 2, np.uint8(0), image),
            "add black lines, draw horizontal lines, put black lines on it, add dark lines"),
    },
}
# fmt: on


def make_task(name: str, cluster: str, function: Callable, phrases: str) -> Task:
    def pair(image, rng):
        changed = function(image, rng)
        return (changed, image) if cluster == "restoration" else (image, changed)

    *known, new = phrases.split(", ")
    nouns = [re.sub(r"\b(it|the (image|photo|picture))\b", noun, phrase) for noun in NOUNS for phrase in known]
    framed = dict.fromkeys(frame.format(phrase) for frame in FRAMES for phrase in (*known, *nouns))
    held_out = [new, *(frame.format(phrase) for frame in HELD_OUT_FRAMES for phrase in (new, known[0]))]
    return Task(name, cluster, pair, list(framed)[:MOST_WORDINGS], held_out)


def compound(first: Task, second: Task) -> Task:
    """Both in order: what one degrades is undone, what one edits is edited."""

    def pair(image, rng):
        source, target = first.pair(image, rng)
        return second.pair(source, rng)[0], second.pair(target, rng)[1]

    words, parts = (first.wordings[0], second.wordings[0]), (first.name, second.name)
    wordings = ([form.format(*words) for form in forms] for forms in (CONNECTIVES, HELD_OUT_CONNECTIVES))
    return Task(" then ".join(parts), "compound", pair, *wordings, parts)


def follower(task: Task) -> Task:
    """A task of another cluster, always the same, that follows this one in a compound."""
    others = (other for other in TASKS.values() if other.cluster != task.cluster)
    return min(others, key=lambda other: unit_hash("compound", task.name, other.name))


TASKS = {name: make_task(name, cluster, *of) for cluster, tasks in CLUSTERS.items() for name, of in tasks.items()}
COMPOUNDS = {made.name: made for made in (compound(task, follower(task)) for task in TASKS.values())}


def choose(names: list[str]) -> dict[str, Task]:
    """By name the tasks that are named, or whose cluster is, in the order given. Raises UserError."""
    every, chosen = TASKS | COMPOUNDS, {}
    for name in names:
        found = {task.name: task for task in every.values() if name in (task.name, task.cluster)}
        if not found:
            close = nearest(name, [*CLUSTERS, "compound", *every])
            raise UserError(f"--tasks: {name!r} is no task and no cluster; the nearest is {close!r}")
        chosen |= found
    return chosen


def build_tasks(args) -> None:
    """Make the dataset that the flags of build_tasks.py ask for."""
    tasks = choose(args.tasks)
    names = list(tasks)
    about = {"title": "Tasks", "about": f"Tiles of {args.tile} pixels of photos, before and after tasks of `tasks.py`."}
    found = generic.choose_instructions(args, {name: (task.wordings, task.held_out) for name, task in tasks.items()})
    instructions = {name: (training[: args.wordings], testing) for name, (training, testing) in found.items()}
    generic.build_tiles(args, about, {"tasks": names}, instructions, lambda n: names[n % len(names)], make_pair)


def make_pair(name: str, tile: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(source, target) of the task of that name, from a tile of a photo."""
    return (TASKS.get(name) or COMPOUNDS[name]).pair(tile, rng)
