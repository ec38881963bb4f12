"""Synthetic degradations: what cameras, weather and compression do to a photo, as seeded pure functions.

Every function takes an (H, W, 3) float32 RGB image in [0, 1] (display values, gamma-encoded), a severity from
0 (barely visible) to 1 (strong) and a `numpy.random.Generator`, and returns a new image of the same shape,
range and geometry. Blur and streaks are sized by the short side; noise and JPEG blocks belong to the pixel
grid.
"""

import cv2
import numpy as np

GAMMA = 2.2  # light is x ** GAMMA: blur and noise act on light, before the camera's tone curve


def degrade(image, task: str, severity: float, seed: int):
    """(H, W, 3) uint8 photo -> the uint8 input from which `task` has to recover it."""
    rng = np.random.default_rng(seed)
    x = image.astype(np.float32) / 255
    for function in TASKS[task]:
        x = function(x, severity, rng)
    return (np.clip(x, 0, 1) * 255).round().astype(np.uint8)


def motion_blur(image, severity, rng):
    """Camera shake: B = g(k * g^-1(S)), S the sharp image, g the tone curve, k the path of a point on the
    sensor.

    Blur as averaged light under a gamma curve: Nah et al., CVPR 2017, equations 1 and 2. The path is a smooth
    random walk as in Boracchi and Foi, IEEE TIP 2012; its centroid is the origin, so that the pair stays
    aligned. Its length is 1.2% to 6% of the short side.
    """
    length = max(3.0, min(image.shape[:2]) * (0.012 + 0.048 * severity))
    steps = 64
    angle = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.normal(0, 1.2 / steps**0.5, steps))
    path = np.cumsum(np.stack([np.sin(angle), np.cos(angle)], 1), 0) * length / steps  # (steps, 2): y, x
    path -= path.mean(0)
    radius = int(np.ceil(np.abs(path).max())) + 1
    kernel = np.zeros((2 * radius + 1, 2 * radius + 1), np.float32)
    corner = np.floor(path).astype(int)
    for dy in (0, 1):  # every point is shared among the four pixels around it
        for dx in (0, 1):
            place = corner + (dy, dx)
            share = (1 - np.abs(path - place)).prod(1)
            np.add.at(kernel, (place[:, 0] + radius, place[:, 1] + radius), share.astype(np.float32))
    return _blur_light(image, kernel)


def defocus_blur(image, severity, rng):
    """A lens out of focus: light spread evenly over a disc, the circle of confusion of a thin lens.

    B = g(k * g^-1(S)) with k a disc of radius 0.4% to 1.6% of the short side, a tenth more or less, whose rim
    is antialiased.
    """
    radius = max(1.0, min(image.shape[:2]) * (0.004 + 0.012 * severity) * rng.uniform(0.9, 1.1))
    half = int(np.ceil(radius))
    y, x = np.mgrid[-half : half + 1, -half : half + 1]
    return _blur_light(image, np.clip(radius + 0.5 - np.hypot(x, y), 0, 1).astype(np.float32))


def blur(image, severity, rng):
    """Camera shake or defocus, with equal odds."""
    return (motion_blur if rng.random() < 0.5 else defocus_blur)(image, severity, rng)


def _blur_light(image, kernel):
    light = cv2.filter2D(image**GAMMA, -1, kernel / kernel.sum(), borderType=cv2.BORDER_REFLECT_101)
    return np.clip(light, 0, 1) ** (1 / GAMMA)


def rain_streaks(image, severity, rng):
    """Rain: O = B + sum over t of S_t, the additive composite model of Yang et al., CVPR 2017, equation 2.

    Each of one to three layers S_t is a sprinkling of drops drawn out along its own direction, within 8
    degrees of a common one, itself within 35 degrees of the vertical. A streak is 3% to 8% of the short side
    long and 0.1 to 0.5 bright; by severity streaks cover about 1% to 7% of a layer.
    """
    height, width = image.shape[:2]
    direction = rng.uniform(-35, 35)
    rain = np.zeros((height, width), np.float32)
    for _ in range(rng.integers(1, 4)):
        angle = np.deg2rad(direction + rng.uniform(-8, 8))
        length = max(4.0, min(height, width) * rng.uniform(0.03, 0.08))
        half = int(np.ceil(length / 2))
        streak = np.zeros((2 * half + 1, 2 * half + 1), np.float32)
        end = np.array([np.sin(angle), np.cos(angle)]) * length / 2  # x, y
        points = [tuple(np.round((half + sign * end) * 16).astype(int).tolist()) for sign in (-1, 1)]
        cv2.line(streak, *points, 1.0, 1, cv2.LINE_8, shift=4)
        drops = rng.random((height, width), np.float32)
        density = (0.01 + 0.06 * severity) / length  # so that the share of wet pixels does not depend on length
        drops = np.where(drops < density, rng.uniform(0.1, 0.5, (height, width)), 0).astype(np.float32)
        layer = cv2.filter2D(drops, -1, streak, borderType=cv2.BORDER_REFLECT_101)
        rain += cv2.GaussianBlur(np.minimum(layer, 0.6), (0, 0), max(0.5, min(height, width) / 900))
    return np.clip(image + rain[..., None], 0, 1)


def sensor_noise(image, severity, rng):
    """Noise that grows with the light: y = x + sqrt(a x + b) n on light x, n standard normal.

    The Poissonian-Gaussian model of Foi et al., IEEE TIP 2008, equations 1 to 3: a for photons, b for the
    read-out. a goes from 0.0005 to 0.02 and b from 0.000005 to 0.0003, evenly in the logarithm. Pixels are
    independent: the correlation that demosaicking leaves in a phone's picture is not modelled.
    """
    a = 0.0005 * 40**severity
    b = 0.000005 * 60**severity
    light = image**GAMMA
    noise = rng.standard_normal(image.shape, np.float32)
    return np.clip(light + np.sqrt(a * light + b) * noise, 0, 1).astype(np.float32) ** (1 / GAMMA)


def low_light(image, severity, rng):
    """A dark exposure with its noise: L = beta (alpha I) ** gamma, then `sensor_noise` of half the severity.

    Lv, Li and Lu, IJCV 2021 (its low-light simulation), with alpha in [0.9, 1] and, by severity, beta from 1
    to 0.6 and gamma from 1.5 to 3.
    """
    dark = (1 - 0.4 * severity) * (rng.uniform(0.9, 1) * image) ** (1.5 + 1.5 * severity)
    return sensor_noise(dark.astype(np.float32), severity / 2, rng)


def jpeg(image, severity, rng):
    """JPEG compression (ITU-T T.81, 4:2:0) at a quality from 50 down to 8 on the scale of libjpeg."""
    bgr = (np.clip(image, 0, 1) * 255).round().astype(np.uint8)[..., ::-1]
    quality = int(round(50 - 42 * severity))
    _, data = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])
    return cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1].astype(np.float32) / 255


# What the restoration task undoes, in the order in which it happens to a picture.
TASKS = {
    "deblur": [blur],
    "derain": [rain_streaks],
    "denoise": [sensor_noise],
    "enhance": [low_light],
    "dejpeg": [jpeg],
    "deblur_denoise": [blur, sensor_noise],
    "denoise_dejpeg": [sensor_noise, jpeg],
}
