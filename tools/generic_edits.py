"""Generic photo edits and degradations with several wordings each: what the tiny InstructPix2Pix is taught.

Every edit takes an image, uint8 (H, W, 3) RGB, and a `numpy.random.Generator`, and returns a new image of the
same shape and type. In `EDITS` the photo is the source and the edited photo the target; in `RESTORATIONS` the
degraded photo is the source and the photo itself the target. Cartoons are absent on purpose: they are what a
fine-tune of the tiny model has to learn.
"""

import cv2
import numpy as np

LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601


def to_uint8(image: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def keep(image, rng):
    return image.copy()


def gray(image, rng):
    return to_uint8(np.repeat((image @ LUMA)[..., None], 3, axis=2))


def tint(image, red: float, green: float, blue: float):
    return to_uint8(image * np.array([red, green, blue], dtype=np.float32))


def warm(image, rng):
    return tint(image, 1.2, 1.0, 0.7)


def cool(image, rng):
    return tint(image, 0.75, 0.98, 1.25)


def sepia(image, rng):
    return to_uint8((image @ LUMA)[..., None] * np.array([1.1, 0.93, 0.7], dtype=np.float32))


def gamma(image, exponent: float):
    return to_uint8(255 * (image / 255.0) ** exponent)


def darker(image, rng):
    return gamma(image, 1.9)


def brighter(image, rng):
    return gamma(image, 0.55)


def more_contrast(image, rng):
    return to_uint8((image.astype(np.float32) - 127.5) * 1.6 + 127.5)


def less_contrast(image, rng):
    return to_uint8((image.astype(np.float32) - 127.5) * 0.55 + 127.5)


def saturate(image, factor: float):
    luma = (image @ LUMA)[..., None]
    return to_uint8(luma + factor * (image - luma))


def vivid(image, rng):
    return saturate(image, 1.9)


def pale(image, rng):
    return saturate(image, 0.45)


def blur(image, rng):
    return cv2.GaussianBlur(image, (0, 0), 1.8)


def sharpen(image, rng):
    soft = cv2.GaussianBlur(image, (0, 0), 1.2).astype(np.float32)
    return to_uint8(image + 1.2 * (image - soft))


def invert(image, rng):
    return 255 - image


def posterize(image, rng):
    return to_uint8(np.floor(image / 64.0) * 64 + 32)


def edges(image, rng):
    luma = cv2.GaussianBlur(image @ LUMA, (0, 0), 0.8)
    gradient = np.hypot(cv2.Sobel(luma, cv2.CV_32F, 1, 0), cv2.Sobel(luma, cv2.CV_32F, 0, 1))
    return to_uint8(np.repeat((255 - np.minimum(gradient, 255))[..., None], 3, axis=2))


def swap_red_and_blue(image, rng):
    return image[..., ::-1].copy()


def green(image, rng):
    return tint(image, 0.75, 1.15, 0.75)


def flat_colours(image, rng):
    """Areas of one colour, stronger than life, most with dark outlines: a drawing.

    For the autoencoder alone, which has to hold drawings too. The outlines lie where the brightness is below
    that of its surroundings (difference of Gaussians).
    """
    flat = cv2.pyrMeanShiftFiltering(image, int(rng.integers(3, 9)), int(rng.integers(12, 40)))
    flat = saturate(flat, rng.uniform(1.0, 1.5))
    if rng.random() < 0.3:
        return flat
    luma, sigma = image @ LUMA, rng.uniform(0.6, 1.2)
    below = cv2.GaussianBlur(luma, (0, 0), 1.6 * sigma) - cv2.GaussianBlur(luma, (0, 0), sigma)
    ink = np.clip((below - rng.uniform(2, 6)) / 8, 0, 1)[..., None] * rng.uniform(0.6, 1.0)
    return to_uint8(flat * (1 - ink))


def add_noise(image, rng):
    return to_uint8(image + rng.normal(0, rng.uniform(15, 30), image.shape))


def add_rain(image, rng):
    """Bright slanted streaks: sparse random drops smeared along one direction."""
    height, width = image.shape[:2]
    drops = (rng.random((height, width)) > 1 - rng.uniform(0.01, 0.025)).astype(np.float32)
    length = int(rng.integers(7, 14)) | 1
    kernel = np.zeros((length, length), dtype=np.float32)
    lean = rng.uniform(-0.35, 0.35) * length
    start, end = (round(length / 2 - lean), 0), (round(length / 2 + lean), length - 1)
    cv2.line(kernel, start, end, 1.0, 1)
    streaks = np.minimum(cv2.filter2D(drops, -1, kernel), 1.0)[..., None] * rng.uniform(0.45, 0.75)
    return to_uint8(image * (1 - streaks) + 235 * streaks)


def add_blur(image, rng):
    return cv2.GaussianBlur(image, (0, 0), rng.uniform(1.0, 1.8))


def dim(image, rng):
    """Low light: gamma, then a dark exposure and a little sensor noise."""
    exposed = 255 * (image / 255.0) ** rng.uniform(1.2, 1.8) * rng.uniform(0.25, 0.45)
    return to_uint8(exposed + rng.normal(0, 2, image.shape))


EDITS = {
    "keep": (
        keep,
        [
            "keep the image",
            "keep the image unchanged",
            "keep the photo as it is",
            "do nothing",
            "do not change anything",
            "leave the picture alone",
            "copy the image exactly",
            "the same image",
        ],
    ),
    "gray": (
        gray,
        ["make it gray", "make it black and white", "turn the photo into grayscale", "remove the colors"],
    ),
    "warm": (warm, ["make it warm", "make the colors warmer", "add a warm tone", "make it look like sunset"]),
    "cool": (cool, ["make it cool", "make the colors cooler", "add a cold blue tone", "make it look cold"]),
    "sepia": (
        sepia,
        ["make it sepia", "apply a sepia tone", "turn it into an old photo", "give it a vintage brown tint"],
    ),
    "darker": (darker, ["make it darker", "darken the image", "reduce the brightness", "lower the exposure"]),
    "brighter": (
        brighter,
        ["make it brighter", "brighten the image", "increase the brightness", "raise the exposure"],
    ),
    "more contrast": (
        more_contrast,
        ["increase the contrast", "make the contrast higher", "boost the contrast", "add more contrast"],
    ),
    "less contrast": (
        less_contrast,
        ["reduce the contrast", "make the contrast lower", "make it look faded", "less contrast"],
    ),
    "vivid": (
        vivid,
        ["make it vivid", "increase the saturation", "make colors vibrant", "boost the colors"],
    ),
    "pale": (pale, ["make it pale", "reduce the saturation", "make the colors dull", "desaturate it a bit"]),
    "blur": (blur, ["blur the image", "make it blurry", "make it softer", "put it out of focus"]),
    "sharpen": (sharpen, ["sharpen the image", "make it sharper", "add sharpness", "make the details crisp"]),
    "invert": (
        invert,
        ["invert the colors", "turn it into a negative", "make a negative image", "reverse the colors"],
    ),
    "posterize": (
        posterize,
        ["posterize the image", "use only a few color levels", "make it a poster", "reduce the color levels"],
    ),
    "edges": (
        edges,
        [
            "draw the edges",
            "show only the outlines",
            "turn it into a pencil sketch",
            "make it a line drawing",
        ],
    ),
    "swap red and blue": (
        swap_red_and_blue,
        ["swap red and blue", "flip the red and blue colors", "replace red with blue and blue with red"],
    ),
    "green": (green, ["make it green", "add a green tint", "give it a green tone", "tint the image green"]),
}

RESTORATIONS = {
    "denoise": (
        add_noise,
        ["denoise the image", "remove the noise", "clean the noisy photo", "get rid of the grain"],
    ),
    "derain": (
        add_rain,
        ["derain the image", "remove the rain", "remove the rain streaks", "take the rain away"],
    ),
    "deblur": (
        add_blur,
        ["deblur the image", "remove the blur", "restore the sharp image", "make the blurry photo clear"],
    ),
    "low light": (
        dim,
        [
            "enhance the low light image",
            "light up the dark photo",
            "fix the underexposed photo",
            "restore the lighting",
        ],
    ),
}
