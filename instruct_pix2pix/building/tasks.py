"""Tasks by clusters, for the question whether instruction tuning generalises (tools/flan.py), and datasets of them.

A task makes (input, target) of an image, uint8 (H, W, 3) RGB, and a `numpy.random.Generator`; both have the image's
shape and type. Adding one is a line of `CLUSTERS`: its function, and its phrases between commas. In the cluster
restoration the changed image is the input and the image itself the target, in all others it is the other way round.

A task's last phrase is held out. The others make its wordings for training, at least MOST_WORDINGS: first as they
stand, then with other nouns ("make it gray", "make the photo gray"), then in FRAMES ("please make it gray"). Held-out
wordings are the last phrase, and it and the first one in HELD_OUT_FRAMES. A compound is two tasks of different
clusters in order ("denoise the image, then make it gray"), worded by the first wordings of both: for evaluation.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

from instruct_pix2pix.building import degradations
from instruct_pix2pix.building.cartoonizer import opencv_cartoonize
from instruct_pix2pix.building.generic_edits import (
    EDITS,
    LUMA,
    RESTORATIONS,
    add_noise,
    add_rain,
    build_tiles,
    choose_instructions,
    contrast,
    edges,
    tint,
    to_uint8,
)
from instruct_pix2pix.cli import UserError, nearest
from instruct_pix2pix.files import unit_hash

MOST_WORDINGS = 20
NOUNS = "it", "the image", "the photo", "the picture"
FRAMES = "{}", "please {}", "can you {}", "{} now", "just {}", "now {}", "{} please"
HELD_OUT_FRAMES = "could you {}", "you should {}"
CONNECTIVES, HELD_OUT_CONNECTIVES = ("{}, then {}", "{} and {}", "{} and then {}"), ("{}, then just {}",)
Pair = Callable[[np.ndarray, np.random.Generator], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Task:
    name: str
    cluster: str
    pair: Pair
    wordings: list[str]
    held_out: list[str]  # wordings that no training sees
    parts: tuple[str, ...] = ()  # of a compound, the names of its tasks


def degraded(function: Callable):
    """The strong end of one of degradations.py."""
    return lambda image, rng: to_uint8(255 * function(image.astype(np.float32) / 255, rng.uniform(0.8, 1), rng))


def swap(*channels: int):
    return lambda image, rng: image[..., channels].copy()


def solarize(image, rng):
    return np.where(image < 128, image, 255 - image)


def pixelate(image, rng):
    height, width = image.shape[:2]
    small = cv2.resize(image, (max(1, width // 4), max(1, height // 4)), interpolation=cv2.INTER_AREA)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_NEAREST)


def emboss(image, rng):
    """The slope along the diagonal, on middle gray."""
    slope = cv2.filter2D(image @ LUMA, -1, np.diag([-1.0, 0, 1]))
    return np.repeat(to_uint8(128 + 2 * slope)[..., None], 3, axis=2)


def add_fog(image, rng):
    share = rng.uniform(0.5, 0.7)
    return to_uint8((1 - share) * image + share * 225)


def add_snow(image, rng):
    flakes = (rng.random(image.shape[:2]) > 0.97).astype(np.float32)
    share = np.minimum(3 * cv2.GaussianBlur(flakes, (0, 0), 0.7), 1)[..., None]
    return to_uint8(image * (1 - share) + 250 * share)


def add_frame(image, rng):
    framed, width = np.full_like(image, 255), max(1, min(image.shape[:2]) // 8)
    framed[width:-width, width:-width] = image[width:-width, width:-width]
    return framed


def add_lines(image, rng):
    lined = image.copy()
    lined[np.arange(len(image)) % 8 < 2] = 0
    return lined


# fmt: off
CLUSTERS = {
    "tint": {
        "warm": EDITS["warm"],
        "cool": EDITS["cool"],
        "green": EDITS["green"],
        "red": (tint(1.3, 0.75, 0.75), "make it red, add a red tint, tint it red, give it a red tone"),
        "purple": (tint(1.1, 0.7, 1.25), "make it purple, add a purple tint, tint it purple, give it a purple tone"),
        "yellow": (tint(1.15, 1.1, 0.5), "make it yellow, add a yellow tint, tint it yellow, give it a yellow tone"),
    },
    "color": {
        "gray": EDITS["gray"],
        "sepia": EDITS["sepia"],
        "invert": EDITS["invert"],
        "vivid": EDITS["vivid"],
        "pale": EDITS["pale"],
        "swap red and blue": (EDITS["swap red and blue"][0],
            EDITS["swap red and blue"][1] + ", make red blue and blue red"),
        "swap red and green": (swap(1, 0, 2),
            "swap red and green, flip the red and green colors, replace red with green and green with red, "
            "make red green and green red"),
    },
    "tone": {
        "darker": EDITS["darker"],
        "brighter": EDITS["brighter"],
        "more contrast": EDITS["more contrast"],
        "less contrast": EDITS["less contrast"],
        "solarize": (solarize, "solarize the image, make it solarized, add a solarized effect, reverse the highlights"),
    },
    "detail": {
        "blur": EDITS["blur"],
        "sharpen": EDITS["sharpen"],
        "pixelate": (pixelate, "pixelate the image, make it blocky, show large pixels, make it a mosaic"),
        "smooth": (lambda image, rng: cv2.medianBlur(image, 5),
            "smooth the image, remove the texture, make it smoother, flatten the texture"),
    },
    "style": {
        "edges": EDITS["edges"],
        "posterize": EDITS["posterize"],
        "cartoon": (lambda image, rng: opencv_cartoonize(image[None])[0],
            "cartoonize the image, make it a cartoon, turn it into a comic, draw it as anime"),
        "emboss": (emboss, "emboss the image, add an emboss effect, turn it into an emboss, make it look like stone"),
        "neon": (lambda image, rng: 255 - edges(image, rng),
            "make it neon, draw bright lines on black, show neon outlines, turn it into neon lights"),
    },
    "restoration": {
        **RESTORATIONS,
        "dejpeg": (degraded(degradations.jpeg),
            "remove the jpeg artifacts, remove the compression, clean the compressed image, undo the compression"),
        "dehaze": (add_fog, "dehaze the image, remove the fog, clear the mist, take the haze away"),
        "unfade": (contrast(0.45),
            "restore the faded image, undo the fade, recover the contrast, repair the faded look"),
    },
    "cover": {
        "add rain": (add_rain, "add rain, make it rainy, draw rain streaks, put rain into the image"),
        "add noise": (add_noise, "add noise, make it noisy, add film grain, put grain into the image"),
        "add fog": (add_fog, "add fog, make it foggy, put haze into it, put mist into the image"),
        "add snow": (add_snow, "add snow, make it snowy, put snow on it, put snow into the image"),
        "frame": (add_frame, "add a white frame, frame the image, draw a white frame, put it into a white frame"),
        "lines": (add_lines, "add black lines, draw horizontal lines, put black lines on it, add dark lines"),
    },
}
# fmt: on


def make_task(name: str, cluster: str, function: Callable, phrases: str) -> Task:
    def pair(image, rng):
        changed = function(image, rng)
        return (changed, image) if cluster == "restoration" else (image, changed)

    *known, new = phrases.split(", ")
    nouns = [re.sub(r"\b(it|the (image|photo|picture))\b", noun, phrase) for noun in NOUNS for phrase in known]
    framed = [frame.format(phrase) for frame in FRAMES for phrase in (*known, *nouns)]
    wordings = list(dict.fromkeys(framed))[:MOST_WORDINGS]
    held_out = [new, *(frame.format(phrase) for frame in HELD_OUT_FRAMES for phrase in (new, known[0]))]
    return Task(name, cluster, pair, wordings, held_out)


TASKS = {name: make_task(name, cluster, *of) for cluster, tasks in CLUSTERS.items() for name, of in tasks.items()}


def compound(first: Task, second: Task) -> Task:
    """Both in order: what one degrades is undone, what one edits is edited."""

    def pair(image, rng):
        source, target = first.pair(image, rng)
        return second.pair(source, rng)[0], second.pair(target, rng)[1]

    words = first.wordings[0], second.wordings[0]
    wordings, held_out = ([form.format(*words) for form in forms] for forms in (CONNECTIVES, HELD_OUT_CONNECTIVES))
    parts = first.name, second.name
    return Task(" then ".join(parts), "compound", pair, wordings, held_out, parts)


def partner(task: Task) -> Task:
    """One of another cluster, always the same, to follow it in a compound."""
    others = (other for other in TASKS.values() if other.cluster != task.cluster)
    return min(others, key=lambda other: unit_hash("compound", task.name, other.name))


COMPOUNDS = {made.name: made for made in (compound(task, partner(task)) for task in TASKS.values())}


def choose(names: list[str]) -> list[Task]:
    """The tasks of these names of tasks or clusters, once each, in the order given. Raises UserError."""
    every = TASKS | COMPOUNDS
    chosen = {}
    for name in names:
        found = [task for task in every.values() if name in (task.name, task.cluster)]
        if not found:
            known = [*CLUSTERS, "compound", *every]
            raise UserError(f"--tasks: {name!r} is unknown; the nearest is {nearest(name, known)!r}")
        chosen |= {task.name: task for task in found}
    return list(chosen.values())


def build_tasks(args) -> None:
    """Make the dataset that the flags of build_tasks.py ask for."""
    tasks = {task.name: task for task in choose(args.tasks)}
    names = list(tasks)
    about = {
        "title": "Tasks",
        "about": f"Tiles of {args.tile} pixels, cut from photos at several scales, before and after tasks of the"
        f" clusters {', '.join(dict.fromkeys(task.cluster for task in tasks.values()))}."
        " The tasks are described in `tasks.py` of the project.",
    }
    found = choose_instructions(args, {name: (task.wordings, task.held_out) for name, task in tasks.items()})
    instructions = {name: (training[: args.wordings], testing) for name, (training, testing) in found.items()}
    build_tiles(args, about, {"tasks": names}, instructions, lambda n: names[n % len(names)], make_pair)


def make_pair(name: str, tile: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(source, target) of the task of that name, from a tile of a photo."""
    return (TASKS.get(name) or COMPOUNDS[name]).pair(tile, rng)
