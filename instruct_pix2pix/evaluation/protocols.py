"""Published ways of measuring restored images: how a test set is cropped, noised and compared, and who wrote so where.

Papers differ by decibels through this alone, so a table names its protocol. The facts were read in the authors' code.
"""

import zlib
from dataclasses import dataclass

import numpy as np

from instruct_pix2pix.cli import UserError

WINDOWS = {
    "gaussian": "Gaussian of 11, sigma 1.5, where it fits inside the image (Wang et al. 2004), mean over channels",
    "uniform": "7 x 7 uniform, sample covariance (scikit-image's default), mean over channels",
    "matlab": "MATLAB's ssim: Gaussian of 11, sigma 1.5, across the three channels as well, edges repeated",
}
Y = {
    "matlab": "Y = 16 + (65.481 R + 128.553 G + 24.966 B) / 255, rounded (MATLAB's rgb2ycbcr)",
    "swapped": "Y = 16 + (24.966 R + 128.553 G + 65.481 B) / 255, not rounded (R and B swapped in the authors' code)",
}
NOISE = {
    "none": "none added",
    "files": "Gaussian, sigma {}, in the authors' noisy images, which are the inputs",
    "clipped": "Gaussian, sigma {}, cut to [0, 255] and truncated to uint8, seeded by the clean pixels "
    "(the authors: one stream of seed 0 over all images, in the folder's own order)",
    "float": "Gaussian, sigma {}, seed 0 for every image; cut and rounded to 8 bits (the authors': float32, neither)",
}


@dataclass(frozen=True)
class Protocol:
    """How one test set is prepared and measured."""

    name: str
    set_name: str = ""
    task: str = ""  # as the datasets built here name it
    images: int | None = None  # in the published set; None: a set of one's own
    source: str = ""
    compare: tuple[str, ...] = ("psnr", "ssim")  # what the authors publish
    crop: int = 0  # both sides are cut about the centre to a multiple of it; 0: whole image
    float_edits: bool = False  # the authors do not round edits to 8 bits, as is done here
    y: str = "matlab"
    window: str = "gaussian"
    noise: str = "none"
    sigma: int = 0  # standard deviation of the noise, of 255
    note: str = ""

    def prepare(self, original: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The model's input and the target, of a pair of uint8 RGB arrays (H, W, 3).

        Where noise is added, `original` is not used: the input is the noisy target. The noise depends on the protocol
        and the target alone, not on order or batch. Both are uint8 again, as they are kept.
        """
        original, target = (self._cropped(image) for image in (original, target))
        if self.noise == "clipped":
            noise = np.random.RandomState(zlib.crc32(target.tobytes())).standard_normal(target.shape)
            original = np.clip(target + self.sigma * noise, 0, 255).astype(np.uint8)
        elif self.noise == "float":
            noise = np.random.RandomState(0).normal(0, self.sigma / 255, target.shape)
            noisy = (target.astype(np.float32) / 255 + noise).astype(np.float32) * np.float32(255)
            original = np.clip(np.rint(noisy), 0, 255).astype(np.uint8)
        return original, target

    def _cropped(self, image: np.ndarray) -> np.ndarray:
        height, width = (side - side % self.crop if self.crop else side for side in image.shape[:2])
        top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
        return image[top : top + height, left : left + width]

    def lines(self, images: int) -> list[str]:
        """What was measured and how, a line each, for people; `images` is how many there were."""
        count = f"{images}" if self.images is None else f"{images} of the published {self.images}"
        if self.images not in (None, images):
            count += ": NOT the published set, do not compare"
        found = {
            "protocol": f"{self.name}, set {self.set_name} ({self.task})" if self.set_name else self.name,
            "images": count,
            "to compare": ", ".join(self.compare),
            "crop": f"centre, to multiples of {self.crop}" if self.crop else "whole image",
            "border left out": "0 pixels",
            "colour": f"RGB; {Y[self.y]}",
            "quantisation": "inputs and edits are kept with 8 bits"
            + "; the authors do not round edits" * self.float_edits,
            "noise": NOISE[self.noise].format(self.sigma),
            "SSIM window": WINDOWS[self.window],
            "note": self.note,
            "source": self.source,
        }
        return [f"{what}: {text}" for what, text in found.items() if text]


_ALL = ("psnr", "ssim", "psnr_y", "ssim_y")
PLAIN = Protocol("plain", compare=_ALL)

_COMMON = {
    "promptir": {
        "source": "va1shn9v/PromptIR 106159a: test.py, utils/{dataset,image,val}_utils.py",
        **{"crop": 16, "float_edits": True, "window": "uniform"},
    },
    "instructir": {
        "source": "mv-lab/InstructIR 3c0299f: test.py, metrics.py, datasets.py, configs/eval5d.yml",
        **{"crop": 16, "float_edits": True, "y": "swapped"},
    },
    "restormer": {},
    "instructdiffusion": {
        "source": "cientgu/InstructDiffusion 435f0c3: edit_cli.py (an edit has its input's size); paper, table 5",
        "note": "the authors publish no measuring code: whole image, RGB, 8 bits and the count are our reading",
        "compare": ("psnr",),
    },
}
_RESTORMER = "swz30/Restormer df766d5: "
_BLUR = _RESTORMER + "Motion_Deblurring/test.py, evaluate_gopro_hide.m; HIDE's count: swz30/MPRNet#27"
_SIDD = _RESTORMER + "Denoising/test_real_denoising_sidd.py, evaluate_sidd.m"
_RAIN = _RESTORMER + "Deraining/test.py, evaluate_PSNR_SSIM.m; counts: swz30/MPRNet#23"
_GAUSSIAN = _RESTORMER + "Denoising/test_gaussian_color_denoising.py, evaluate_gaussian_color_denoising.py"
_RAINS = {"Rain100L": 100, "Rain100H": 100, "Test100": 98, "Test1200": 1200, "Test2800": 2800}
_CLEAN = {"CBSD68": 68, "Kodak24": 24, "McMaster": 18, "Urban100": 100}
_OUTDOOR, _COLOUR = {"note": "the outdoor part"}, "the colour images (CBSD68): va1shn9v/PromptIR#4"
_BLOCKS, _LIGHT = "the 256 x 256 validation blocks", {"note": "brightness is not scaled to the target's"}

# Protocol, task, images in each published set, what else these sets have. Sets with noise come at three strengths.
_TABLE = [
    ("promptir", "dehaze", {"SOTS": 500}, _OUTDOOR),
    ("promptir", "derain", {"Rain100L": 100}, {}),
    ("promptir", "denoise", {"BSD68": 68}, {"noise": "clipped", "note": _COLOUR}),
    ("instructir", "dehaze", {"SOTS": 500}, _OUTDOOR),
    ("instructir", "derain", {"Rain100L": 100}, {"compare": _ALL}),
    ("instructir", "denoise", {"CBSD68": 68, "Urban100": 100, "Kodak24": 24}, {"noise": "files"}),
    ("instructir", "deblur", {"GoPro": 1111}, {}),
    ("instructir", "enhance", {"LOL": 15}, _LIGHT),
    ("restormer", "deblur", {"GoPro": 1111, "HIDE": 2025}, {"source": _BLUR, "window": "matlab"}),
    (
        "restormer",
        "denoise",
        {"SIDD": 1280},
        {"source": _SIDD, "window": "matlab", "float_edits": True, "note": _BLOCKS},
    ),
    ("restormer", "derain", _RAINS, {"source": _RAIN, "compare": ("psnr_y", "ssim_y")}),
    ("restormer", "denoise", _CLEAN, {"source": _GAUSSIAN, "compare": ("psnr",), "noise": "float"}),
    ("instructdiffusion", "deblur", {"GoPro": 1111}, {}),
    ("instructdiffusion", "denoise", {"SIDD": 1280}, {}),
]
PROTOCOLS = [
    Protocol(name, set_name + f"_{sigma}" * (sigma > 0), task, images, sigma=sigma, **_COMMON[name] | more)
    for name, task, sets, more in _TABLE
    for set_name, images in sets.items()
    for sigma in ((15, 25, 50) if "noise" in more else (0,))
]


def find(protocol: str, set_name: str | None) -> Protocol:
    """The protocol of a set, by `--protocol` and `--set` (in capitals or not); UserError where there is none."""
    if protocol not in _COMMON:
        raise UserError(f"--protocol: {protocol}: no such protocol; give {', '.join(_COMMON)}")
    sets = {found.set_name.lower(): found for found in PROTOCOLS if found.name == protocol}
    if set_name is None or set_name.lower() not in sets:
        wrong = "missing" if set_name is None else f"{set_name}: {protocol} has no such set"
        raise UserError(f"--set: {wrong}; {protocol} has {', '.join(found.set_name for found in sets.values())}")
    return sets[set_name.lower()]
