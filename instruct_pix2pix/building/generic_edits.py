"""Generic edits with several wordings each, and a dataset of them: what the tiny InstructPix2Pix is taught.

Every edit takes an image, uint8 (H, W, 3) RGB, and a `numpy.random.Generator`, and returns a new image of the same
shape and type. In `EDITS` the photo is the source and the edited photo the target; in `RESTORATIONS` the degraded photo
is the source and the photo itself the target. Cartoons are absent on purpose: they are left for a fine-tune to learn.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache, partial

import cv2
import numpy as np

from instruct_pix2pix.building.build import Work, build
from instruct_pix2pix.building.photos import UNKNOWN_LICENCE, encode_png, find_photos
from instruct_pix2pix.building.plan import Row, read_again, read_instructions, take_photos
from instruct_pix2pix.files import as_code, as_text, for_others, unit_hash

LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601
SCALES = (96, 128, 160, 192, 256)  # pixels of the photo's short side when a tile is cut from it


def to_uint8(image: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def tint(red: float, green: float, blue: float):
    return lambda image, rng: to_uint8(image * np.array([red, green, blue], dtype=np.float32))


def tone(red: float, green: float, blue: float):
    """The brightness alone, in one colour."""
    return lambda image, rng: tint(red, green, blue)((image @ LUMA)[..., None], rng)


def gamma(exponent: float):
    return lambda image, rng: to_uint8(255 * (image / 255.0) ** exponent)


def contrast(factor: float):
    return lambda image, rng: to_uint8((image.astype(np.float32) - 127.5) * factor + 127.5)


def saturate(image, factor: float):
    luma = (image @ LUMA)[..., None]
    return to_uint8(luma + factor * (image - luma))


def sharpen(image, rng):
    soft = cv2.GaussianBlur(image, (0, 0), 1.2).astype(np.float32)
    return to_uint8(image + 1.2 * (image - soft))


def edges(image, rng):
    luma = cv2.GaussianBlur(image @ LUMA, (0, 0), 0.8)
    gradient = np.hypot(cv2.Sobel(luma, cv2.CV_32F, 1, 0), cv2.Sobel(luma, cv2.CV_32F, 0, 1))
    return tone(1, 1, 1)(np.repeat((255 - np.minimum(gradient, 255))[..., None], 3, axis=2), rng)


def add_noise(image, rng):
    return to_uint8(image + rng.normal(0, rng.uniform(15, 30), image.shape))


def add_rain(image, rng):
    """Bright slanted streaks: sparse random drops smeared along one direction."""
    drops = (rng.random(image.shape[:2]) > 1 - rng.uniform(0.01, 0.025)).astype(np.float32)
    length = int(rng.integers(7, 14)) | 1
    kernel = np.zeros((length, length), dtype=np.float32)
    lean = rng.uniform(-0.35, 0.35) * length
    cv2.line(kernel, (round(length / 2 - lean), 0), (round(length / 2 + lean), length - 1), 1.0, 1)
    streaks = np.minimum(cv2.filter2D(drops, -1, kernel), 1.0)[..., None] * rng.uniform(0.45, 0.75)
    return to_uint8(image * (1 - streaks) + 235 * streaks)


def add_blur(image, rng):
    return cv2.GaussianBlur(image, (0, 0), rng.uniform(1.0, 1.8))


def dim(image, rng):
    """Low light: gamma, then a dark exposure and a little sensor noise."""
    exposed = 255 * (image / 255.0) ** rng.uniform(1.2, 1.8) * rng.uniform(0.25, 0.45)
    return to_uint8(exposed + rng.normal(0, 2, image.shape))


# Of each edit the function, and its wordings between commas.
# fmt: off
EDITS = {
    "keep": (lambda image, rng: image.copy(),
        "keep the image, keep the image unchanged, keep the photo as it is, do nothing, do not change anything, "
        "leave the picture alone, copy the image exactly, the same image"),
    "gray": (tone(1, 1, 1),
        "make it gray, make it black and white, turn the photo into grayscale, remove the colors"),
    "warm": (tint(1.2, 1.0, 0.7), "make it warm, make the colors warmer, add a warm tone, make it look like sunset"),
    "cool": (tint(0.75, 0.98, 1.25), "make it cool, make the colors cooler, add a cold blue tone, make it look cold"),
    "sepia": (tone(1.1, 0.93, 0.7),
        "make it sepia, apply a sepia tone, turn it into an old photo, give it a vintage brown tint"),
    "darker": (gamma(1.9), "make it darker, darken the image, reduce the brightness, lower the exposure"),
    "brighter": (gamma(0.55), "make it brighter, brighten the image, increase the brightness, raise the exposure"),
    "more contrast": (contrast(1.6),
        "increase the contrast, make the contrast higher, boost the contrast, add more contrast"),
    "less contrast": (contrast(0.55),
        "reduce the contrast, make the contrast lower, make it look faded, less contrast"),
    "vivid": (lambda image, rng: saturate(image, 1.9),
        "make it vivid, increase the saturation, make colors vibrant, boost the colors"),
    "pale": (lambda image, rng: saturate(image, 0.45),
        "make it pale, reduce the saturation, make the colors dull, desaturate it a bit"),
    "blur": (lambda image, rng: cv2.GaussianBlur(image, (0, 0), 1.8),
        "blur the image, make it blurry, make it softer, put it out of focus"),
    "sharpen": (sharpen, "sharpen the image, make it sharper, add sharpness, make the details crisp"),
    "invert": (lambda image, rng: 255 - image,
        "invert the colors, turn it into a negative, make a negative image, reverse the colors"),
    "posterize": (lambda image, rng: image // 64 * 64 + 32,
        "posterize the image, use only a few color levels, make it a poster, reduce the color levels"),
    "edges": (edges, "draw the edges, show only the outlines, turn it into a pencil sketch, make it a line drawing"),
    "swap red and blue": (lambda image, rng: image[..., ::-1].copy(),
        "swap red and blue, flip the red and blue colors, replace red with blue and blue with red"),
    "green": (tint(0.75, 1.15, 0.75), "make it green, add a green tint, give it a green tone, tint the image green"),
}
RESTORATIONS = {
    "denoise": (add_noise, "denoise the image, remove the noise, clean the noisy photo, get rid of the grain"),
    "derain": (add_rain, "derain the image, remove the rain, remove the rain streaks, take the rain away"),
    "deblur": (add_blur, "deblur the image, remove the blur, restore the sharp image, make the blurry photo clear"),
    "low light": (dim,
        "enhance the low light image, light up the dark photo, fix the underexposed photo, restore the lighting"),
}
# fmt: on
FUNCTIONS = {name: function for name, (function, _) in (EDITS | RESTORATIONS).items()}
WORDINGS = {name: wordings.split(", ") for name, (_, wordings) in (EDITS | RESTORATIONS).items()}
# In turn, one row each. Restorations are harder: they come twice.
TURNS = [*(name for name in EDITS if name != "keep"), *RESTORATIONS, *RESTORATIONS]


def cut_tile(photo: np.ndarray, side: int, rng: np.random.Generator) -> np.ndarray:
    """A part of a photo (H, W, 3) as uint8 (side, side, 3): at one of SCALES, anywhere, mirrored half of the time.

    A photo is enlarged by a fifth at most, or to `side` if that is more.
    """
    short = min(photo.shape[:2])
    scale = int(rng.choice([scale for scale in SCALES if side <= scale <= 1.2 * short] or [side]))
    height, width = (max(scale, round(length * scale / short)) for length in photo.shape[:2])
    scaled = cv2.resize(photo, (width, height), interpolation=cv2.INTER_AREA if scale < short else cv2.INTER_CUBIC)
    top, left = rng.integers(height - side + 1), rng.integers(width - side + 1)
    tile = scaled[top : top + side, left : left + side]
    return np.ascontiguousarray(tile[:, ::-1] if rng.random() < 0.5 else tile)


def make_pair(task: str, tile: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(source, target) of a task, from a tile of a photo."""
    if task == "keep" and rng.random() < 0.5:  # every kind of picture is kept, edited and degraded ones too
        tile = FUNCTIONS[rng.choice(TURNS)](tile, rng)
    changed = FUNCTIONS[task](tile, rng)
    return (changed, tile) if task in RESTORATIONS else (tile, changed)


def build_generic_edits(args) -> None:
    """Make the dataset that the flags of build_generic_edits.py ask for."""

    def turn(number: int) -> str:
        kept = unit_hash("keep", args.seed, number) < args.keep_share
        return "keep" if kept else TURNS[number % len(TURNS)]

    about = {
        "title": "Generic edits",
        "about": f"Tiles of {args.tile} pixels, cut from photos at several scales, with simple edits of them."
        " The edits are described in `generic_edits.py` of the project.",
    }
    instructions = choose_instructions(args, {name: (wordings, wordings) for name, wordings in WORDINGS.items()})
    build_tiles(args, about, {"keep_share": args.keep_share}, instructions, turn, make_pair)


def choose_instructions(
    args, wordings: dict[str, tuple[list[str], list[str]]]
) -> dict[str, tuple[list[str], list[str]]]:
    """Of each task its wordings, or those of <task>.txt in --instructions: for training, and for the test split."""
    if not args.instructions:
        return wordings
    return {name: read_instructions(args.instructions / f"{name}.txt") for name in wordings}


def build_tiles(args, about: dict, settings: dict, instructions: dict, turn: Callable, pair: Callable) -> None:
    """Make a dataset of tiles of --photos, the same part of a photo before and after a task.

    about: the card's title, and what it says of the dataset. settings: what decides the bytes beside the photos and the
    flags that all builders have. turn(row number) -> the row's task. pair(task, tile, rng) -> (source, target).
    """
    photos = find_photos(args.photos)
    columns = {
        "original_image": ("input", "a part of a photo, or such a part degraded"),
        "edit_prompt": ("instruction", "what to do"),
        "edited_image": ("target", "the same part edited, or without the flaw"),
        "task": ("task", "the edit's name"),
    }
    about = about | {
        "licence": "other",
        "tags": ["image-editing", "instruction-tuning"],
        "licences": f"Photos of {as_code(for_others(args.photos))}, licence: "
        + as_text(args.photos_license or UNKNOWN_LICENCE),
    }

    def make_plan() -> tuple[list[Row], list[dict]]:
        skipped, rows = [], []
        with ThreadPoolExecutor() as pool:
            usable = take_photos(photos, skipped, lambda *_: (args.tile,) * 2, args.tile, 0, args, pool)
        for number in range(args.rows if usable else 0):
            photo = usable[int(unit_hash("photo", args.seed, number) * len(usable))]
            rows.append(replace(photo, task=turn(number), repeat=number))
        return rows, skipped

    settings = {"photos": photos.digest, "rows": args.rows, "tile": args.tile} | settings
    build(Work(args, columns, instructions, partial(edit_rows, args, photos.read, pair)), settings, about, make_plan)


def edit_rows(args, read_photo: Callable[[str], bytes], pair: Callable) -> Callable[[list[Row]], list]:
    """What makes rows: of each a tile of a photo before and after its task, see `build_tiles`, as PNG files."""

    @lru_cache(256)
    def read(source: str, image_hash: str) -> np.ndarray:
        return read_again(source, read_photo, image_hash)[1]

    def make_rows(rows: list[Row]) -> list[tuple[bytes, ...]]:
        made = []
        for row in rows:
            rng = np.random.default_rng(int(unit_hash("edit", args.seed, row.image_hash, row.repeat) * 2**48))
            tile = cut_tile(read(row.source, row.image_hash), args.tile, rng)
            made.append(tuple(map(encode_png, pair(row.task, tile, rng))))
        return made

    return make_rows
