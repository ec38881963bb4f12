"""From a path, an address or bytes to an upright RGB picture; encoded files; the contact sheet.

Every picture that training, evaluation, editing or a dataset builder sees is opened here, so that all see the same.
Pillow and numpy are imported where they are used: `--help` answers at once.
"""

from __future__ import annotations

import io
import os
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from instruct_pix2pix.cli import UserError, first_line

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".gif"}
MAX_PIXELS = 100_000_000  # a file that claims more is taken for a decompression bomb
MAX_DOWNLOAD_BYTES = 256 * 2**20
URL_TIMEOUT_SECONDS = 30


class BadImage(UserError):
    """An image that cannot be used; the message is the reason."""


def is_url(text: str) -> bool:
    return str(text).startswith(("http://", "https://"))


def read_image(source: str | os.PathLike | bytes) -> Image.Image:
    """The picture behind a path, an http(s) address or an encoded file's bytes: RGB, upright, see `to_rgb`.

    Raises BadImage for what cannot be fetched, is truncated, is no image, or has more than MAX_PIXELS pixels.
    """
    try:
        with _opened(source) as image:
            image.load()
            return to_rgb(image)
    except Exception as error:  # Pillow's decoders raise almost anything on damaged bytes
        raise _bad(error) from None


def image_size(source: str | os.PathLike | bytes) -> tuple[int, int]:
    """(width, height) of an image turned upright, from its header. Raises BadImage like `read_image`."""
    from PIL import Image

    try:
        with _opened(source) as image:
            # The base class's getexif: the PNG reader's own would decode the whole image to look for a late chunk.
            turned = Image.Image.getexif(image).get(0x0112, 1) in (5, 6, 7, 8)
            return (image.height, image.width) if turned else image.size
    except Exception as error:
        raise _bad(error) from None


def _opened(source):
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None  # the check below names the size
    if isinstance(source, bytes):
        source = io.BytesIO(source)
    elif is_url(source):
        source = io.BytesIO(fetch(source))
    else:
        source = Path(source).expanduser()
    image = Image.open(source)
    if image.width * image.height > MAX_PIXELS:
        size = f"{image.width}x{image.height}"
        image.close()
        raise BadImage(f"{size} is more than {MAX_PIXELS // 1_000_000} million pixels")
    return image


def _bad(error: Exception) -> BadImage:
    from PIL import UnidentifiedImageError

    if isinstance(error, BadImage):
        return error
    if isinstance(error, FileNotFoundError):
        return BadImage("does not exist")
    if isinstance(error, UnidentifiedImageError):
        return BadImage("not an image")
    reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
    return BadImage(f"cannot be read ({reason})")


def fetch(url: str) -> bytes:
    """The bytes behind an address. Raises BadImage where it cannot be reached or holds more than MAX_DOWNLOAD_BYTES."""
    request = urllib.request.Request(url, headers={"User-Agent": "Mozilla/5.0"})
    try:
        with urllib.request.urlopen(request, timeout=URL_TIMEOUT_SECONDS) as response:
            content = response.read(MAX_DOWNLOAD_BYTES + 1)
    except Exception as error:  # a malformed address, a refused connection, an answer cut short
        raise BadImage(f"cannot be fetched ({first_line(error)})") from None
    if len(content) > MAX_DOWNLOAD_BYTES:
        raise BadImage(f"is larger than {MAX_DOWNLOAD_BYTES // 2**20} MiB")
    return content


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image as 8-bit RGB, turned upright, transparency on white; 16-bit and float pictures scaled to 8 bits."""
    import numpy as np
    from PIL import Image, ImageOps

    try:
        image = ImageOps.exif_transpose(image)
    except Exception:  # a broken EXIF block says nothing against the picture
        pass
    if image.mode == "RGB":
        return image.convert("RGB") if "transparency" not in image.info else _on_white(image)
    if image.mode.startswith("I") or image.mode == "F":
        # PIL's convert() clips at 255; scaling keeps the picture.
        values = np.nan_to_num(np.asarray(image, dtype=np.float32))
        top = 65535 if image.mode.startswith("I;16") or values.max() > 255 else 1 if values.max() <= 1 else 255
        image = Image.fromarray(np.clip(values * (255 / top) + 0.5, 0, 255).astype(np.uint8))
    return _on_white(image) if image.has_transparency_data else image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    from PIL import Image

    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def walk_images(root: str | os.PathLike) -> Iterator[str]:
    """The image files under `root` at any depth, as paths within it. Not hidden or `__MACOSX` ones."""
    seen = set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:  # a link that leads back
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith((".", "__MACOSX")))
        for name in sorted(files):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES:
                yield os.path.relpath(os.path.join(folder, name), root).replace(os.sep, "/")


def encode_image(image: Image.Image, suffix: str, fast: bool = False) -> bytes:
    """The bytes of an image file: lossless for .png and .webp, quality 95 for .jpg and .jpeg.

    `fast` is for PNG files by the thousand: within a few per cent of the smallest size, in a fraction of the time.
    """
    buffer = io.BytesIO()
    if suffix.lower() == ".webp":
        image.save(buffer, "WEBP", lossless=True)
    elif suffix.lower() in (".jpg", ".jpeg"):
        image.save(buffer, "JPEG", quality=95, subsampling=0)
    else:
        image.save(buffer, "PNG", **({"compress_level": 1} if fast else {}))
    return buffer.getvalue()


def contact_sheet(
    entries: list[tuple[list[Image.Image], list[str]]],
    cell: int = 224,
    columns: int | None = None,
    headings: tuple[str, ...] = (),
) -> Image.Image:
    """Pictures to look at: each entry is some images in a row with lines of text below, entries in `columns`.

    Images larger than `cell` pixels are scaled down. Without `columns` the sheet is roughly square. `headings` name the
    images of an entry, once above each column. The first line of an entry is black, the others are grey.
    """
    from PIL import Image, ImageDraw, ImageFont

    gap, line, font = 8, 18, ImageFont.load_default(13)
    shown = []
    for images, lines in entries:
        images = [image.copy() for image in images]
        for image in images:
            image.thumbnail((cell, cell), Image.Resampling.LANCZOS)
        shown.append((images, [" ".join(text[:1000].split()) for text in lines]))  # no line is so long
    across = max(len(images) for images, _ in shown)
    slot = max(image.width for images, _ in shown for image in images)
    width = across * (slot + gap) + gap
    columns = columns or max(1, round((len(shown) / across) ** 0.5))
    columns = min(columns, len(shown))
    rows = [shown[start : start + columns] for start in range(0, len(shown), columns)]
    heights = [
        max(image.height for images, _ in row for image in images)
        + line * max(len(lines) for _, lines in row)
        + 2 * gap
        for row in rows
    ]
    top = gap + (line if headings else 0)
    sheet = Image.new("RGB", (columns * width, top + sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    for column in range(columns if headings else 0):
        for place, heading in enumerate(headings):
            middle = column * width + gap + place * (slot + gap) + slot / 2
            draw.text((middle, gap / 2), heading, "black", font, anchor="ma")
    for row, height in zip(rows, heights, strict=True):
        tallest = max(image.height for images, _ in row for image in images)
        for column, (images, lines) in enumerate(row):
            left = column * width + gap
            for place, image in enumerate(images):
                sheet.paste(image, (left + place * (slot + gap), top))
            for number, text in enumerate(lines):
                while draw.textlength(text, font) > width - 2 * gap:
                    text = text.removesuffix("…")[:-1] + "…"
                colour = "dimgray" if number else "black"
                draw.text((left, top + tallest + 2 + number * line), text, colour, font)
        top += height
    return sheet
