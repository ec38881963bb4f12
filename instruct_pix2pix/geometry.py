"""From a pair of pictures of any size to a pair of aligned square crops: one decision per pair, applied to both.

Pure functions of images and a random generator.
"""

import cv2
import numpy as np
from PIL import Image, ImageOps

# Two sizes whose aspect ratios differ by no more than this show the same picture, scaled.
ASPECT_TOLERANCE = 0.02


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image as 8-bit RGB, upright, transparency on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I") or image.mode == "F":
        # 16-bit and float pictures: PIL's convert() clips at 255, scaling keeps the picture.
        values = np.asarray(image, dtype=np.float32)
        top = 65535 if image.mode.startswith("I;16") or values.max() > 255 else 1 if values.max() <= 1 else 255
        image = Image.fromarray(np.clip(values * (255 / top) + 0.5, 0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def whitebox_size(width: int, height: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Sizes through which White-box CartoonGAN's script takes a photo, each (width, height).

    First the photo is scaled so that its short side is at most 720, then right and bottom are cut down to
    multiples of 8. The published cartoonization set pairs such cartoons with photos left as they were.
    """
    if min(width, height) > 720:
        if height > width:
            width, height = 720, int(720 * height / width)
        else:
            width, height = int(720 * width / height), 720
    return (width, height), (width // 8 * 8, height // 8 * 8)


def alignment(original_size: tuple[int, int], edited_size: tuple[int, int]) -> str:
    """How a pair of sizes (width, height) fits together: same, whitebox (scaled and cut by that script) or resized.

    Raises ValueError where the aspect ratios differ by more than 2% and the White-box crop does not explain it.
    """
    if original_size == edited_size:
        return "same"
    if edited_size == whitebox_size(*original_size)[1]:
        return "whitebox"
    ratio = (original_size[0] / original_size[1]) / (edited_size[0] / edited_size[1])
    if max(ratio, 1 / ratio) > 1 + ASPECT_TOLERANCE:
        raise ValueError(
            f"the original is {original_size[0]}x{original_size[1]} and the edited image"
            f" {edited_size[0]}x{edited_size[1]}; a pair needs one aspect ratio (within 2%)"
        )
    return "resized"


def align_original(original: Image.Image, edited_size: tuple[int, int]) -> Image.Image:
    """The original brought to the edited image's size. The edited image is the training target and is never
    resampled here. Raises ValueError as `alignment` does."""
    kind = alignment(original.size, edited_size)
    if kind == "resized":
        return original.resize(edited_size, Image.Resampling.BICUBIC)
    if kind == "whitebox":
        scaled, (width, height) = whitebox_size(*original.size)
        pixels = np.asarray(original)
        if scaled != original.size:
            pixels = cv2.resize(pixels, scaled, interpolation=cv2.INTER_AREA)
        return Image.fromarray(pixels[:height, :width])
    return original


def crop_pair(
    original: Image.Image,
    edited: Image.Image,
    resolution: int,
    geometry: str,
    center_crop: bool,
    random_flip: bool,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Two aligned RGB images of equal size to two uint8 arrays (resolution, resolution, 3).

    resize_crop scales the short side to `resolution` and crops; crop cuts at native resolution and enlarges only
    a pair that is too small; squash ignores the aspect ratio. Place and mirroring are drawn once, for both.
    """
    assert original.size == edited.size, "align_original comes first"
    # All three numbers are always drawn, so that one flag does not shift the others' draws.
    across, down, mirror = rng.random(3)
    width, height = edited.size
    short = min(width, height)
    if geometry == "squash":
        size = (resolution, resolution)
    elif geometry == "resize_crop" or short < resolution:
        size = (
            max(resolution, round(width * resolution / short)),
            max(resolution, round(height * resolution / short)),
        )
    else:
        size = (width, height)
    if center_crop:
        across = down = 0.5
    left = int(across * (size[0] - resolution + 1))
    top = int(down * (size[1] - resolution + 1))

    def cut(image: Image.Image) -> np.ndarray:
        if image.size != size:
            image = image.resize(size, Image.Resampling.BICUBIC)
        pixels = np.asarray(image.crop((left, top, left + resolution, top + resolution)))
        return pixels[:, ::-1] if random_flip and mirror < 0.5 else pixels

    return cut(original), cut(edited)
