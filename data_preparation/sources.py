"""Where images come from: folders of photos, datasets with an image column, downloaded restoration sets."""

import hashlib
import io
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from records import UserError

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".gif"}
MAX_PIXELS = 100_000_000  # a file that claims more is taken for a decompression bomb
SPLIT_NAMES = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}


class Photos(NamedTuple):
    """A source of photos that are read one at a time."""

    names: list[str]  # sorted; a file's path within the folder, or "<split>/<row number>"
    splits: list[str]  # the split the source itself puts each photo in, or ""
    read: Callable[[str], bytes]  # the encoded file behind a name
    digest: str  # changes when names or sizes change


class BadImage(ValueError):
    """An image that cannot be used; the message is the reason."""


def decode_image(data: bytes):
    """The file's picture as (H, W, 3) uint8 RGB, upright.

    EXIF rotation is applied. Transparent pixels are laid on white. 16-bit and float greyscale are scaled to 8
    bits. An animation gives its first frame. Raises BadImage for what is truncated, no image, or over
    MAX_PIXELS.
    """
    import numpy as np
    from PIL import Image, ImageOps

    Image.MAX_IMAGE_PIXELS = None  # our own check below names the size
    try:
        image = Image.open(io.BytesIO(data))
        if image.width * image.height > MAX_PIXELS:
            raise BadImage(
                f"{image.width}x{image.height} is more than {MAX_PIXELS // 1_000_000} million pixels"
            )
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16-bit greyscale; Pillow's own conversion would clip it to white
            values = np.asarray(image).astype(np.float64)
            image = Image.fromarray((np.clip(values, 0, 65535) / 257).round().astype(np.uint8))
        elif image.mode == "F":
            values = np.nan_to_num(np.asarray(image))
            image = Image.fromarray((np.clip(values, 0, 1) * 255).round().astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.array(image.convert("RGB"))
    except BadImage:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds for broken files
        raise BadImage(f"{type(error).__name__}: {error}"[:200]) from None


def image_hash(image) -> str:
    """SHA-256 of the pixels and the size: the same for two files that hold the same picture."""
    return hashlib.sha256(repr(image.shape).encode() + image.tobytes()).hexdigest()


def walk_images(root: Path) -> Iterator[str]:
    """The image files under `root` at any depth, as paths within it. Not hidden or `__MACOSX` ones."""
    seen = set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:  # a link that leads back
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = [name for name in subfolders if not name.startswith((".", "__MACOSX"))]
        for name in files:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in EXTENSIONS:
                yield os.path.relpath(os.path.join(folder, name), root).replace(os.sep, "/")


def find_photos(root: Path, flag: str = "--photos") -> Photos:
    """A folder of photos, nested in any way. Children train, val or validation, and test are its splits.

    Imagenette's own archives are known too: `imagenette2*/{train,val}/<synset>/*.JPEG`, unpacked inside
    `root`.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{flag}: {root}: no such folder; give a folder of images")
    names = sorted(walk_images(root))
    if not names:
        raise UserError(f"{flag}: {root}: no image at any depth (looked for {' '.join(sorted(EXTENSIONS))})")
    splits = []
    for name in names:
        parts = name.split("/")
        if parts[0].startswith("imagenette2"):
            parts = parts[1:]
        splits.append(SPLIT_NAMES.get(parts[0].lower(), "") if len(parts) > 1 else "")
    digest = hashlib.sha256()
    for name in names:
        digest.update(os.fsencode(f"{name}\t{(root / name).stat().st_size}\n"))
    return Photos(names, splits, lambda name: (root / name).read_bytes(), digest.hexdigest())


def ordered_map(function: Callable, items: Iterable, threads: int, ahead: int = 4) -> Iterator:
    """`map` over a pool of threads, in order, at most `threads * ahead` results waiting."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= threads * ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
