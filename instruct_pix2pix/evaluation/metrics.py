"""How close one image is to another, pixel by pixel, at the target's own resolution; and the table of every metric."""

import functools
from dataclasses import dataclass

import numpy as np
from skimage.metrics import structural_similarity

from instruct_pix2pix.evaluation.protocols import Protocol


@dataclass(frozen=True)
class Metric:
    """A column of the tables."""

    name: str  # the key in files
    label: str
    unit: str = ""
    better: str = "higher"
    decimals: int = 3

    @property
    def title(self) -> str:
        return f"{self.label}{' ' * bool(self.unit)}{self.unit} {'↑' if self.better == 'higher' else '↓'}"


METRICS = {
    metric.name: metric
    for metric in (
        Metric("psnr", "PSNR", "dB", decimals=2),
        Metric("ssim", "SSIM"),
        Metric("psnr_y", "PSNR-Y", "dB", decimals=2),
        Metric("ssim_y", "SSIM-Y"),
        Metric("l1", "L1 (MAE)", better="lower", decimals=4),
        Metric("l2", "L2", better="lower", decimals=4),
        Metric("gmsd", "GMSD", better="lower"),
        Metric("haarpsi", "HaarPSI"),
        Metric("lpips", "LPIPS", better="lower"),
        Metric("dists", "DISTS", better="lower"),
        Metric("clip_i", "CLIP-I"),
        Metric("clip_t", "CLIP-T"),
        Metric("clip_direction", "CLIP direction"),
        Metric("dino", "DINO"),
        Metric("fid", "FID", better="lower", decimals=1),
    )
}


def psnr(image: np.ndarray, target: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB, over all pixels and channels of two arrays of one shape in [0, 255].

    Equal images would be infinitely good; they are reported as 100 dB, so that a mean stays a number.
    """
    error = np.mean((image.astype(np.float64) - target.astype(np.float64)) ** 2)
    return 100.0 if error == 0 else min(100.0, float(10 * np.log10(255.0**2 / error)))


def ssim(image: np.ndarray, target: np.ndarray, window: str = "gaussian") -> float:
    """Structural similarity of two arrays (H, W, 3) or (H, W) in [0, 255]; `window` is one of protocols.WINDOWS.

    The default is as its authors defined it (Wang et al. 2004), the mean over the channels. Sides are at least as long
    as the window.
    """
    image, target = image.astype(np.float64), target.astype(np.float64)
    if window == "matlab":
        return _matlab_ssim(image, target)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False} if window == "gaussian" else {}
    channels = 2 if image.ndim == 3 else None
    return float(structural_similarity(image, target, data_range=255, channel_axis=channels, **options))


def _matlab_ssim(image: np.ndarray, target: np.ndarray) -> float:
    """MATLAB's ssim: a colour image is a volume to it, filtered across the channels too."""
    from scipy.ndimage import gaussian_filter

    blur = functools.partial(gaussian_filter, sigma=1.5, radius=5, mode="nearest")
    mean_i, mean_t = blur(image), blur(target)
    variances = blur(image**2) - mean_i**2 + blur(target**2) - mean_t**2
    covariance = blur(image * target) - mean_i * mean_t
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * mean_i * mean_t + c1) * (2 * covariance + c2)
    return float(np.mean(similarity / ((mean_i**2 + mean_t**2 + c1) * (variances + c2))))


def luma(image: np.ndarray, kind: str = "matlab") -> np.ndarray:
    """Y (H, W) float64 in [16, 235] of RGB (H, W, 3) in [0, 255]; `kind` is one of protocols.Y."""
    weights = np.array([65.481, 128.553, 24.966])
    y = 16 + image.astype(np.float64) @ (weights if kind == "matlab" else weights[::-1]) / 255
    return np.rint(y) if kind == "matlab" else y


def pixel_scores(image: np.ndarray, target: np.ndarray, protocol: Protocol) -> dict[str, float]:
    """The metrics of an edit that take no library or network of their own, by their keys in METRICS.

    Both images uint8 RGB (H, W, 3). L1 (mean absolute) and L2 (mean squared) are MagicBrush's, of images in [0, 1].
    """
    y, target_y = (luma(side, protocol.y) for side in (image, target))
    difference = (image.astype(np.float64) - target) / 255
    return {
        "psnr": psnr(image, target),
        "ssim": ssim(image, target, protocol.window),
        "psnr_y": psnr(y, target_y),
        "ssim_y": ssim(y, target_y, protocol.window),
        "l1": float(np.mean(np.abs(difference))),
        "l2": float(np.mean(difference**2)),
    }
