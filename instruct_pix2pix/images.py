"""From a path, an address or bytes to an upright RGB picture; encoded files; the contact sheet.

Every picture that training, evaluation, editing or a dataset builder sees is opened here, so that all see the same.
Pillow and numpy are imported where they are used: `--help` answers at once.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import time
import urllib.request
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from pathlib import Path
from typing import TYPE_CHECKING

from instruct_pix2pix.cli import UserError, first_line, whole_number

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = (
    100_000_000  # a file that claims more is taken for a decompression bomb, unless --max_image_pixels allows it
)
PIXEL_LIMIT = "INSTRUCT_PIX2PIX_MAX_IMAGE_PIXELS"  # in the environment, so that a loader's processes keep to it too
MAX_DOWNLOAD_BYTES = 256 * 2**20
URL_TIMEOUT_SECONDS = 30  # of silence, and
DOWNLOAD_SECONDS = 300  # in all
# Formats that Pillow hands to other programs, only identifies, or that are no pictures.
NOT_READ = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
JUNK = {"thumbs.db", "desktop.ini", "__macosx"}  # besides hidden files: .DS_Store, ._*, .ipynb_checkpoints


class BadImage(UserError):
    """An image that cannot be used; the message is the reason."""


def add_pixel_limit(add) -> None:
    """Add --max_image_pixels with a parser's or a group's `add_argument`."""
    add(
        "--max_image_pixels",
        type=_pixel_limit,
        default=MAX_PIXELS,
        metavar="N",
        help="images of more pixels are refused: a small file may unpack to more than the memory holds",
    )


def _pixel_limit(text: str) -> int:
    """An argparse type that sets the limit: for this process, and for those that it starts."""
    limit = whole_number(1)(text)
    os.environ[PIXEL_LIMIT] = str(limit)
    return limit


def pixel_limit() -> int:
    return int(os.environ.get(PIXEL_LIMIT, MAX_PIXELS))


@functools.cache
def suffixes() -> dict[str, str]:
    """The endings, such as ".jpg", that image files have -> the name of the format: all that Pillow can read, and HEIC
    where pillow-heif is installed."""
    from PIL import Image

    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    known = Image.registered_extensions().items()  # loads all of Pillow's formats
    return {ending: name for ending, name in known if name in Image.OPEN and name not in NOT_READ}


def is_url(text: str) -> bool:
    return str(text).startswith(("http://", "https://"))


def read_image(source: str | os.PathLike | bytes) -> Image.Image:
    """The picture behind a path, an http(s) address or an encoded file's bytes: RGB, upright, see `to_rgb`.

    Raises BadImage for what cannot be fetched, is truncated, is no image, or has more pixels than `pixel_limit`.
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
            turned = False
            with contextlib.suppress(Exception):  # a broken EXIF block says nothing against the picture
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
    image = Image.open(source, formats=sorted(set(suffixes().values())))
    pixels, limit = image.width * image.height, pixel_limit()
    if pixels > limit:
        size = f"{image.width}x{image.height}"
        image.close()
        raise BadImage(f"{size} is more than {limit / 1e6:g} million pixels; allow it with --max_image_pixels {pixels}")
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
    """The bytes behind an address. Raises BadImage where it cannot be reached, holds more than MAX_DOWNLOAD_BYTES, or
    takes longer than DOWNLOAD_SECONDS."""
    content, deadline = io.BytesIO(), time.monotonic() + DOWNLOAD_SECONDS
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "Mozilla/5.0"})
        opener = urllib.request.build_opener(_WebOnly)
        with opener.open(request, timeout=URL_TIMEOUT_SECONDS) as response:
            while part := response.read1(2**16):
                content.write(part)
                if content.tell() > MAX_DOWNLOAD_BYTES:
                    raise BadImage(f"is larger than {MAX_DOWNLOAD_BYTES // 2**20} MiB")
                if time.monotonic() > deadline:
                    raise BadImage(f"takes longer than {DOWNLOAD_SECONDS} seconds")
            if response.length:  # of what was announced, so much has not come
                raise BadImage("cannot be fetched (the answer was cut short)")
    except BadImage:
        raise
    except Exception as error:  # a malformed address, a refused connection, an answer that is none
        raise BadImage(f"cannot be fetched ({first_line(error)})") from None
    return content.getvalue()


class _WebOnly(urllib.request.HTTPRedirectHandler):
    """Follows a redirect to another web address only: urllib's own would also go on to ftp."""

    def redirect_request(self, request, response, code, message, headers, address):
        if not is_url(address):
            raise BadImage(f"leads to {address[:80]}, which is not a web address")
        return super().redirect_request(request, response, code, message, headers, address)


def ordered_map(pool: Executor, function: Callable, items: Iterable, ahead: int = 32) -> Iterator:
    """`pool.map`, but at most `ahead` items are taken before their turn, and what nobody waits for is not begun."""
    waiting: deque = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image as 8-bit RGB, turned upright, transparency on white; 16-bit and float pictures scaled to 8 bits."""
    import numpy as np
    from PIL import Image, ImageOps

    with contextlib.suppress(Exception):  # a broken EXIF block
        image = ImageOps.exif_transpose(image)
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


def is_junk(name: str) -> bool:
    """Whether a file or folder of this name is the system's, not the user's: hidden ones, Thumbs.db, __MACOSX."""
    return name.startswith(".") or name.lower() in JUNK


def find_images(root: str | os.PathLike, without: str | os.PathLike | None = None) -> tuple[list[str], Counter[str]]:
    """The image files under `root` at any depth, sorted, as paths within it; and how many others there are by ending.

    What `is_junk` is neither, nor is what the folder `without` holds. Folders behind links count, each once.
    """
    found, others, seen = [], Counter(), {os.path.realpath(without)} if without else set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:  # a link that leads back
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not is_junk(name))
        for name in files:
            ending = os.path.splitext(name)[1].lower()
            if is_junk(name):
                continue
            if ending in suffixes():
                found.append(os.path.relpath(os.path.join(folder, name), root).replace(os.sep, "/"))
            else:
                others[ending or "no ending"] += 1
    return sorted(found), others


def describe_others(others: Counter[str]) -> str:
    """What `find_images` left out, for a message: "2 .pdf, 1 .heic (pip install pillow-heif)"."""
    heic = " (pip install pillow-heif)"
    known = [
        f"{count} {ending}{heic if ending in ('.heic', '.heif') else ''}" for ending, count in others.most_common(9)
    ]
    return ", ".join(known) + (", ..." if len(others) > 9 else "")


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
