"""How close one image is to another. PSNR and SSIM are computed on RGB at the target's own resolution."""

import numpy as np
from skimage.metrics import structural_similarity


def psnr(image: np.ndarray, target: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB, over all pixels and channels of two uint8 arrays (H, W, 3).

    Equal images would be infinitely good; they are reported as 100 dB, so that a mean stays a number.
    """
    error = np.mean((image.astype(np.float64) - target.astype(np.float64)) ** 2)
    return 100.0 if error == 0 else min(100.0, float(10 * np.log10(255.0**2 / error)))


def ssim(image: np.ndarray, target: np.ndarray) -> float:
    """Structural similarity as its authors defined it (Wang et al. 2004: Gaussian window of 11 pixels, sigma 1.5),
    the mean over the channels of two uint8 arrays (H, W, 3)."""
    return float(
        structural_similarity(
            image,
            target,
            data_range=255,
            channel_axis=2,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
    )
