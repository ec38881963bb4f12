"""The parts of a Stable Diffusion pipeline: checked before weights load, loaded, widened, put together, made readable.

`config` is the training's configuration; its base model is pretrained_model_name_or_path, with revision,
non_ema_revision (the UNet's), variant, cache_dir and hub_token.
"""

import contextlib
import functools
import importlib.util
import json
import logging
import os
from pathlib import Path

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    StableDiffusionInstructPix2PixPipeline,
    UNet2DConditionModel,
)
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

from instruct_pix2pix.cli import UserError
from instruct_pix2pix.files import write_json, write_text, written_whole

logger = logging.getLogger(__name__)

# What a folder of a base model has to hold: sub-folder -> its configuration file.
CONFIG_FILES = {
    "tokenizer": "tokenizer_config.json",
    "text_encoder": "config.json",
    "vae": "config.json",
    "unet": "config.json",
    "scheduler": "scheduler_config.json",
}

PIXELS_PER_PASS = 16 * 256 * 256  # of each side of the pairs, in one pass of the VAE


# ---- before weights load


def read_base_configs(config) -> dict[str, dict]:
    """Configurations of the base model's "unet", "vae" and "scheduler", read without loading a weight.

    Raises UserError where the folder or repository is missing, incomplete or unreadable.
    """
    name = config.pretrained_model_name_or_path
    if os.path.isdir(name):
        for folder, file in CONFIG_FILES.items():
            if not (Path(name) / folder / file).is_file():
                raise UserError(
                    f"--pretrained_model_name_or_path: {name} has no {folder}/{file}; it needs a whole Stable"
                    f" Diffusion pipeline in diffusers' format ({', '.join(CONFIG_FILES)})"
                )
        for folder in ("text_encoder", "vae", "unet"):
            weights = [f for f in (Path(name) / folder).iterdir() if f.suffix in (".safetensors", ".bin")]
            if not weights:
                raise UserError(f"--pretrained_model_name_or_path: {name}/{folder} holds no weights (.safetensors)")
    elif os.path.exists(name) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(
            f"--pretrained_model_name_or_path: {name} is not a folder; give a pipeline's folder or a Hub id"
        )

    classes = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "scheduler": DDPMScheduler}
    configs = {}
    for folder, cls in classes.items():
        with _explained(name, folder):
            configs[folder] = dict(cls.load_config(name, subfolder=folder, **_where(config, folder)))
    return configs


def base_folder(config, part: str | None = None) -> Path:
    """The folder with the base model's files: the local one, or the Hub's snapshot in the cache, which holds what has
    been loaded so far. The UNet's may be another revision."""
    name = config.pretrained_model_name_or_path
    if os.path.isdir(name):
        return Path(name)
    revision = (config.non_ema_revision or config.revision) if part == "unet" else config.revision
    return _snapshot(name, revision, config.cache_dir, config.hub_token)


@functools.cache  # asked once: a branch that moves on during a long run changes nothing
def _snapshot(name: str, revision: str | None, cache_dir: str | None, token: str | None) -> Path:
    file = hf_hub_download(name, "unet/config.json", revision=revision, cache_dir=cache_dir, token=token)
    return Path(file).parents[1]


def _where(config, part: str) -> dict:
    """Where from_pretrained and load_config find a part of the base model; of a branch, the commit first seen."""
    local = os.path.isdir(config.pretrained_model_name_or_path)
    return {
        "revision": None if local else base_folder(config, part).name,
        "cache_dir": config.cache_dir,
        "token": config.hub_token,
    }


@contextlib.contextmanager
def _explained(name: str, folder: str):
    """Turns what the libraries raise for a missing or broken part into one line that names it."""
    try:
        yield
    except Exception as error:
        # The libraries have no common error of their own; what they raise for files is among these.
        library = type(error).__module__.startswith(("safetensors", "huggingface_hub", "pickle", "_pickle"))
        if not library and not isinstance(error, (OSError, ValueError, RuntimeError)):
            raise
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"--pretrained_model_name_or_path: cannot read {folder} of {name}: {reason}") from error


def check_channels(configs: dict, expected: int, name: str) -> None:
    """The scratch script starts from 4 input channels, the fine-tuning one from 8; each names the other. A UNet that
    asks for more than image, time and text is another family's: Stable Diffusion XL, unCLIP."""
    for key in ("addition_embed_type", "class_embed_type", "num_class_embeds"):
        value = configs["unet"].get(key)
        if value not in (None, "text"):  # the text's own is made of what the UNet is given anyway
            raise UserError(
                f"--pretrained_model_name_or_path: {name} has a UNet with {key} {value}, which asks for more than"
                " image, time and text, as Stable Diffusion XL's does; use Stable Diffusion 1 or 2, or InstructPix2Pix"
            )
    channels = configs["unet"].get("in_channels")
    if channels == expected:
        return
    if (channels, expected) == (8, 4):
        raise UserError(
            f"--pretrained_model_name_or_path: {name} has an 8-channel UNet, an InstructPix2Pix model already; use"
            " finetune_instruct_pix2pix.py"
        )
    if (channels, expected) == (4, 8):
        raise UserError(
            f"--pretrained_model_name_or_path: {name} has a 4-channel UNet, plain Stable Diffusion; use"
            " train_instruct_pix2pix.py"
        )
    raise UserError(
        f"--pretrained_model_name_or_path: {name} has a UNet of {channels} input channels; this script needs {expected}"
    )


def _factor(config: dict) -> int:
    """How much smaller a VAE's or UNet's innermost side is: one halving between each two blocks."""
    return 2 ** (len(config["block_out_channels"]) - 1)


def resolution_multiple(configs: dict) -> int:
    """Image sides must be multiples of the VAE's factor times the UNet's downsampling: 64 for Stable Diffusion."""
    return _factor(configs["vae"]) * _factor(configs["unet"])


def check_resolution(configs: dict, resolution: int) -> int:
    """Latent side for a resolution; UserError unless the resolution fits."""
    multiple = resolution_multiple(configs)
    if resolution % multiple:
        lower = resolution // multiple * multiple
        near = f"{lower} or {lower + multiple}" if lower else f"{multiple}"
        raise UserError(
            f"--resolution: {resolution} is not a multiple of {multiple}, the VAE's factor times the UNet's"
            f" downsampling; use {near}"
        )
    return resolution // _factor(configs["vae"])


def prediction_type(configs: dict) -> str:
    """What the base model's UNet predicts: epsilon (Stable Diffusion's default) or v_prediction."""
    kind = configs["scheduler"].get("prediction_type", "epsilon")
    if kind not in ("epsilon", "v_prediction"):
        raise UserError(f"--pretrained_model_name_or_path: the scheduler's prediction_type {kind!r} is not supported")
    return kind


# ---- loading


def widen_conv_in(unet: UNet2DConditionModel) -> None:
    """Give a 4-channel UNet four more input channels for the source image's latents (InstructPix2Pix, section 3.2).

    The new weights are zero and the old ones and the bias are kept, so the widened UNet predicts exactly what the
    old one did until it has learned to look at the source image.
    """
    old = unet.conv_in
    new = torch.nn.Conv2d(
        8,
        old.out_channels,
        old.kernel_size,
        old.stride,
        old.padding,
        device=old.weight.device,
        dtype=old.weight.dtype,
    )
    with torch.no_grad():
        new.weight.zero_()
        new.weight[:, :4].copy_(old.weight)
        new.bias.copy_(old.bias)
    unet.conv_in = new
    unet.register_to_config(in_channels=8)


def load_unet(config, checkpoint: Path | None) -> UNet2DConditionModel:
    """The UNet in float32 with 8 input channels: from a checkpoint to resume, or from the base model."""
    if checkpoint is not None:
        return UNet2DConditionModel.from_pretrained(checkpoint, subfolder="unet", dtype=torch.float32)
    unet = load_model(config, "unet")
    if unet.config.in_channels == 4:
        widen_conv_in(unet)
    return unet


def load_frozen(config) -> tuple[CLIPTokenizer, CLIPTextModel, AutoencoderKL]:
    """Tokenizer, text encoder and VAE, the models in float32, frozen, on the CPU."""
    tokenizer = load_tokenizer(config)
    text_encoder, vae = (load_model(config, part).requires_grad_(False).eval() for part in ("text_encoder", "vae"))
    return tokenizer, text_encoder, vae


def load_tokenizer(config) -> CLIPTokenizer:
    name = config.pretrained_model_name_or_path
    with _explained(name, "tokenizer"):
        return CLIPTokenizer.from_pretrained(name, subfolder="tokenizer", **_where(config, "tokenizer"))


def load_model(config, part: str) -> CLIPTextModel | AutoencoderKL | UNet2DConditionModel:
    """The base model's "text_encoder", "vae" or "unet" in float32, on the CPU. UserError where it cannot be read."""
    name = config.pretrained_model_name_or_path
    cls = {"text_encoder": CLIPTextModel, "vae": AutoencoderKL, "unet": UNet2DConditionModel}[part]
    with _explained(name, part):
        where = _where(config, part)
        return cls.from_pretrained(name, subfolder=part, dtype=torch.float32, variant=config.variant, **where)


def enable_memory_efficient_attention(unet: UNet2DConditionModel) -> None:
    """xformers if it is there and works; otherwise one line, and PyTorch's attention, which is as lean, stays."""
    if importlib.util.find_spec("xformers") is None:
        reason = "not installed"
    else:
        try:
            unet.enable_xformers_memory_efficient_attention()
            return
        except Exception as error:  # built for another torch, no GPU: each raises something of its own
            reason = " ".join(str(error).split())[:200]
    logger.warning("xformers cannot be used (%s); PyTorch's scaled-dot-product attention does the work", reason)


# ---- encoding


@torch.no_grad()
def encode_pair(
    vae: AutoencoderKL, original: torch.Tensor, edited: torch.Tensor, posterior_noise: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents of a batch of pairs, in one pass of the encoder.

    The edited image is sampled from the posterior and scaled (the diffusion's x_0); the original is the posterior's
    mode, unscaled, as the pipeline feeds it at inference.

    Args:
        original, edited: (B, 3, H, W) in [-1, 1].
        posterior_noise: (B, 4, H/f, W/f), standard normal.

    Returns:
        original latents and edited latents, (B, 4, H/f, W/f) float32.
    """
    posterior = vae.encode(torch.cat([original, edited]).to(vae.dtype)).latent_dist
    mean, std = posterior.mean.float(), posterior.std.float()
    batch = len(original)
    edited_latents = mean[batch:] + std[batch:] * posterior_noise.float()
    return mean[:batch], edited_latents * vae.config.scaling_factor


@torch.no_grad()
def encode_text(text_encoder: CLIPTextModel, input_ids: torch.Tensor) -> torch.Tensor:
    """Token ids (B, L) to the last hidden state (B, L, D) that the UNet attends to."""
    return text_encoder(input_ids)[0]


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """Texts to ids (B, L), padded and truncated to the tokenizer's length as the pipeline does."""
    return tokenizer(
        texts,
        max_length=tokenizer.model_max_length,
        padding="max_length",
        truncation=True,
        return_tensors="pt",
    ).input_ids


def tokenize_whole(tokenizer: CLIPTokenizer, texts: list[str]) -> list[list[int]]:
    """Texts to ids as they are, neither padded nor cut, the start and end tokens included."""
    return tokenizer(texts, verbose=False).input_ids


# ---- pipelines


def scheduler_class(scheduler_config: dict) -> str:
    """The name of the base model's own kind of scheduler."""
    return scheduler_config.get("_class_name", "DDPMScheduler")


def build_pipeline(configs: dict, tokenizer, text_encoder, vae, unet) -> StableDiffusionInstructPix2PixPipeline:
    """The editing pipeline of these parts in memory, with the base model's own kind of scheduler and no safety checker.

    `configs` are those of read_base_configs.
    """
    pipeline = StableDiffusionInstructPix2PixPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=getattr(diffusers, scheduler_class(configs["scheduler"])).from_config(configs["scheduler"]),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_readable(pipeline_folder: Path) -> None:
    """Bring tokenizer/ and text_encoder/ of a saved pipeline into the layout that transformers 4 and 5 both read.

    Transformers 5 writes a layout of its own: only tokenizer.json, where 4 wants vocab.json and merges.txt; and weights
    without "text_model." before their names, without which 4 silently starts from random ones. A folder that is in
    order stays as it is, byte by byte.
    """
    tokenizer = pipeline_folder / "tokenizer"
    if not ((tokenizer / "vocab.json").is_file() and (tokenizer / "merges.txt").is_file()):
        model = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))["model"]
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        write_text(tokenizer / "vocab.json", json.dumps(model["vocab"], ensure_ascii=False))
        write_text(tokenizer / "merges.txt", "\n".join(["#version: 0.2", *merges, ""]))

    weights = pipeline_folder / "text_encoder" / "model.safetensors"
    tensors = load_file(weights)
    flat = [name for name in tensors if name.startswith(("embeddings.", "encoder.", "final_layer_norm."))]
    if flat:
        named = {f"text_model.{name}" if name in flat else name: tensor for name, tensor in tensors.items()}
        with written_whole(weights) as temporary:
            save_file(named, temporary, {"format": "pt"})

    # Transformers 5 loads a model in its configuration's or its file's precision, diffusers the rest in float32.
    file = pipeline_folder / "text_encoder" / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    stored = next(tensor.dtype for tensor in tensors.values() if tensor.is_floating_point())
    if (config.get("dtype") or config.get("torch_dtype") or str(stored).removeprefix("torch.")) != "float32":
        config.pop("torch_dtype", None)
        write_json(file, config | {"dtype": "float32"})
