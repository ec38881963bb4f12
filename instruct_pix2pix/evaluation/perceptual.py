"""Measures that take a library or a network of their own: piq's, CLIP, DINO, FID; or why one cannot be had here.

Weights come from the local cache, else from where they are published; without a network that is said at once.
"""

from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import cosine_similarity, normalize

from instruct_pix2pix.cli import first_line

INSTALL = "pip install -r requirements-evaluation.txt"
CLIP, DINO = "openai/clip-vit-base-patch32", "facebook/dino-vits16"  # MagicBrush's
CLIP_STATISTICS = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # mean, deviation
IMAGENET_STATISTICS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Of edit, target and source, uint8 RGB (H, W, 3), edit and target of one size, and the instruction.
Measure = Callable[[np.ndarray, np.ndarray, np.ndarray, str], dict[str, float]]


class Unavailable(Exception):
    """Why a measure cannot be had, in one line."""


def load(device: str = "cpu") -> tuple[list[Measure], dict[str, str]]:
    """The measures that can be had, and for the others the reason, by their keys in METRICS.

    FID, which is of folders and not of images, is called by itself; here stands only whether it can be.
    """
    build = {(name,): partial(_load_piq, name) for name in ("gmsd", "haarpsi", "lpips", "dists")}
    build |= {("clip_i", "clip_t", "clip_direction"): _load_clip, ("dino",): _load_dino, ("fid",): _check_fid}
    measures, skipped = [], {}
    for names, one in build.items():
        try:
            measures += [measure] if (measure := one(device)) else []
        except Unavailable as reason:
            skipped |= dict.fromkeys(names, str(reason))
    return measures, skipped


def scores(measures: list[Measure], image, target, source, instruction: str) -> dict[str, float]:
    """What `load`'s measures say of an edit, by their keys in METRICS; arrays uint8 RGB (H, W, 3)."""
    return {name: value for measure in measures for name, value in measure(image, target, source, instruction).items()}


def fid(images: Iterable[np.ndarray], targets: Iterable[np.ndarray], device="cpu", feature=2048) -> float:
    """Frechet distance (Heusel et al. 2017) between two or more edits and their targets, by Inception's features.

    Means little below some thousands of images. `feature`: another network, uint8 (1, 3, H, W) to (1, d).
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    distance = FrechetInceptionDistance(feature=feature).to(device)
    for real, row in ((True, targets), (False, images)):
        for image in row:
            distance.update(torch.from_numpy(image).permute(2, 0, 1)[None].to(device), real=real)
    return float(distance.compute())


def clip_measure(model, tokenizer, device) -> Measure:
    """CLIP-I: edit and target. CLIP-T: edit and instruction. Direction: edit - source and target - source; all cosines.

    MagicBrush's CLIP-T and InstructPix2Pix's direction take captions of both images, and datasets of instructions have
    none: do not compare those two with theirs. The direction of an edit that changes nothing is 0.
    """
    size = model.config.vision_config.image_size

    @torch.no_grad()
    def measure(image, target, source, instruction):
        views = torch.cat([_view(side, size, size, CLIP_STATISTICS) for side in (image, target, source)])
        pictures = model.get_image_features(pixel_values=views.to(device)).pooler_output
        edit, wanted, start = normalize(pictures, dim=-1)
        tokens = tokenizer([instruction], truncation=True, return_tensors="pt").to(device)
        text = model.get_text_features(**tokens).pooler_output[0]
        pairs = {"clip_i": (edit, wanted), "clip_t": (edit, text), "clip_direction": (edit - start, wanted - start)}
        return {name: float(cosine_similarity(*pair, dim=0)) for name, pair in pairs.items()}

    return measure


def dino_measure(model, device) -> Measure:
    """DINO: the cosine of the class tokens of edit and target."""
    size = model.config.image_size

    @torch.no_grad()
    def measure(image, target, source, instruction):
        views = torch.cat([_view(side, size * 8 // 7, size, IMAGENET_STATISTICS) for side in (image, target)])
        return {"dino": float(cosine_similarity(*model(pixel_values=views.to(device)).last_hidden_state[:, 0], dim=0))}

    return measure


def _view(image: np.ndarray, shorter: int, size: int, statistics) -> torch.Tensor:
    """(1, 3, size, size): the shorter side resized to `shorter`, the centre cut out, standardised."""
    photo = Image.fromarray(image)
    photo = photo.resize([side * shorter // min(photo.size) for side in photo.size], Image.Resampling.BICUBIC)
    left, top = (round((side - size) / 2) for side in photo.size)
    mean, deviation = (torch.tensor(channels)[:, None, None] for channels in statistics)
    return (_unit(np.asarray(photo.crop((left, top, left + size, top + size)))) - mean) / deviation


def _unit(image: np.ndarray) -> torch.Tensor:
    """uint8 (H, W, 3) as float32 (1, 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.float32(image) / 255).permute(2, 0, 1)[None]


def _load_piq(name: str, device) -> Measure:
    try:
        import piq
        from torchvision.models import VGG16_Weights
    except Exception as error:  # missing, or a torchvision of another torch, which fails in many ways
        raise Unavailable(f"needs piq and its torchvision ({first_line(error)}): {INSTALL}") from None
    network = {"gmsd": piq.gmsd, "haarpsi": piq.haarpsi, "lpips": piq.LPIPS, "dists": piq.DISTS}[name]
    if isinstance(network, type):
        _check_weights(network._weights_url, VGG16_Weights.IMAGENET1K_V1.url)
        network = network()  # moves itself to the images' device

    @torch.no_grad()
    def measure(image, target, source, instruction):
        return {name: float(network(_unit(image).to(device), _unit(target).to(device)))}

    return measure


def _load_clip(device) -> Measure:
    from transformers import CLIPModel, CLIPTokenizer

    model, tokenizer = _from_hub(CLIP, CLIPModel), _from_hub(CLIP, CLIPTokenizer, "vocab.json")
    return clip_measure(model.to(device), tokenizer, device)


def _load_dino(device) -> Measure:
    from transformers import ViTModel

    return dino_measure(_from_hub(DINO, ViTModel, add_pooling_layer=False).to(device), device)


def _from_hub(model_id: str, cls, file: str = "config.json", **options):
    """A pretrained `cls`, from the cache where that has the `file` and all else of it, else from the Hub."""
    import huggingface_hub

    try:
        if isinstance(huggingface_hub.try_to_load_from_cache(model_id, file), str):
            with suppress(OSError):  # a download that was broken off
                return cls.from_pretrained(model_id, local_files_only=True, **options)
        # Asked first because it answers at once; a download retries for half a minute without a network.
        if not huggingface_hub.file_exists(model_id, file):
            raise OSError("no such model")
        return cls.from_pretrained(model_id, **options)
    except Exception as error:
        raise Unavailable(f"{model_id}: neither in the cache nor from the Hub ({first_line(error)})") from None


def _check_fid(device) -> None:
    try:
        import torchmetrics.image.fid  # noqa: F401
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
    except Exception as error:
        raise Unavailable(f"needs torchmetrics and torch-fidelity ({first_line(error)}): {INSTALL}") from None
    _check_weights(URL_INCEPTION_V3)


def _check_weights(*urls: str) -> None:
    for url in urls:
        file = Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[-1])
        try:
            if not file.exists():
                urlopen(url, timeout=5).close()
        except OSError as error:
            raise Unavailable(f"{file.name} is not in torch's cache, and {url} fails ({first_line(error)})") from None
