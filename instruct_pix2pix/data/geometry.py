"""From a pair of pictures of any size to a pair of aligned square crops: one decision per pair, applied to both.

Pure functions of images and a random generator. The command line reads this module for its names, so what is heavy is
imported where it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

GEOMETRIES = ("resize_crop", "crop", "squash")
# Two sizes whose aspect ratios differ by no more than this show the same picture, scaled.
ASPECT_TOLERANCE = 0.02
MOST_SCALED_PIXELS = 100_000_000  # that a picture is scaled to before it is cropped: a longer one is cropped first
WHITEBOX_SHORT_SIDE = 720  # pixels, to which White-box CartoonGAN's script scales a larger photo's short side


def crop_is_fixed(geometry: str, center_crop: bool) -> bool:
    """Whether every epoch sees the same part of a picture."""
    return center_crop or geometry == "squash"


def whitebox_size(width: int, height: int, max_short_side: int = WHITEBOX_SHORT_SIDE):
    """Sizes through which White-box CartoonGAN's script takes a photo: (width, height) once scaled, and once cut.

    First the photo is scaled so that its short side is at most `max_short_side`, then right and bottom are cut down to
    multiples of 8. The published cartoonization set pairs such cartoons with photos left as they were.
    """
    short = min(width, height)
    if short > max_short_side:
        # The long side is floored, as the reference's int() does; integers keep 720 from becoming 719.
        width, height = width * max_short_side // short, height * max_short_side // short
    return (width, height), (width // 8 * 8, height // 8 * 8)


def fit_photo(photo: np.ndarray, max_short_side: int = WHITEBOX_SHORT_SIDE) -> np.ndarray:
    """(H, W, 3) uint8 -> the photo as the cartoonizer sees it (its `resize_crop`): scaled by area averaging and cut to
    multiples of 8 as `whitebox_size` says. With it as the original, a pair is aligned to the pixel."""
    import cv2

    scaled, (width, height) = whitebox_size(photo.shape[1], photo.shape[0], max_short_side)
    if scaled != (photo.shape[1], photo.shape[0]):
        photo = cv2.resize(photo, scaled, interpolation=cv2.INTER_AREA)
    return photo[:height, :width]


def alignment(original_size: tuple[int, int], edited_size: tuple[int, int], geometry: str = "resize_crop") -> str:
    """How a pair of sizes (width, height) fits together: same, whitebox (scaled and cut by that script) or resized; of
    other sizes, squash takes each by itself.

    Raises ValueError where the aspect ratios differ by more than 2% and nothing of that explains it.
    """
    if original_size == edited_size:
        return "same"
    if edited_size == whitebox_size(*original_size)[1]:
        return "whitebox"
    if geometry == "squash":
        return "squash"
    ratio = (original_size[0] / original_size[1]) / (edited_size[0] / edited_size[1])
    if max(ratio, 1 / ratio) > 1 + ASPECT_TOLERANCE:
        raise ValueError(
            f"the original is {original_size[0]}x{original_size[1]} and the edited image"
            f" {edited_size[0]}x{edited_size[1]}; a pair needs one aspect ratio (within 2%)"
        )
    return "resized"


def align_original(original: Image.Image, edited_size: tuple[int, int], geometry: str = "resize_crop") -> Image.Image:
    """The original brought to the edited image's size, or left to squash. The edited image is the training target and
    is never resampled here. Raises ValueError as `alignment` does."""
    import numpy as np
    from PIL import Image

    kind = alignment(original.size, edited_size, geometry)
    if kind == "resized":
        return original.resize(edited_size, Image.Resampling.BICUBIC)
    if kind == "whitebox":
        return Image.fromarray(fit_photo(np.asarray(original)))
    return original


def _with_short_side(size: tuple[int, int], resolution: int) -> tuple[int, int]:
    width, height = (max(resolution, round(side * resolution / min(size))) for side in size)
    return width, height


def scale_pair(original: Image.Image, edited: Image.Image, resolution: int) -> tuple[Image.Image, Image.Image]:
    """Two aligned images, whole, with a short side above `resolution` scaled down to it as resize_crop does before it
    crops; 0 leaves every size."""
    from PIL import Image

    if resolution == 0 or min(edited.size) <= resolution:
        return original, edited
    size = _with_short_side(edited.size, resolution)
    return original.resize(size, Image.Resampling.BICUBIC), edited.resize(size, Image.Resampling.BICUBIC)


def crop_pair(
    original: Image.Image,
    edited: Image.Image,
    resolution: int,
    geometry: str,
    center_crop: bool,
    random_flip: bool,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Two aligned RGB images to two uint8 arrays (resolution, resolution, 3).

    resize_crop scales the short side to `resolution` and crops; crop cuts at native resolution and enlarges only a pair
    that is too small; squash, where the two sizes may differ, brings each image to the square by itself. Place and
    mirroring are drawn once, for both.
    """
    import numpy as np
    from PIL import Image

    assert original.size == edited.size or geometry == "squash", "align_original comes first"
    # All three numbers are always drawn, so that one flag does not shift the others' draws.
    across, down, mirror = rng.random(3)
    width, height = edited.size
    short = min(width, height)
    if geometry == "squash":
        size = (resolution, resolution)
    elif geometry == "resize_crop" or short < resolution:
        size = _with_short_side(edited.size, resolution)
    else:
        size = (width, height)
    if center_crop:
        across = down = 0.5
    left = int(across * (size[0] - resolution + 1))
    top = int(down * (size[1] - resolution + 1))

    def cut(image: Image.Image) -> np.ndarray:
        box = (left, top, left + resolution, top + resolution)
        if image.size == size:
            image = image.crop(box)
        elif size[0] * size[1] <= MOST_SCALED_PIXELS:
            image = image.resize(size, Image.Resampling.BICUBIC).crop(box)
        else:  # nearly the same pixels, but for rounding, without the memory
            scales = (width / size[0], height / size[1]) * 2
            source = [min(place * scale, most) for place, scale, most in zip(box, scales, image.size * 2, strict=True)]
            image = image.resize((resolution, resolution), Image.Resampling.BICUBIC, source)
        pixels = np.asarray(image)
        return pixels[:, ::-1] if random_flip and mirror < 0.5 else pixels

    return cut(original), cut(edited)
