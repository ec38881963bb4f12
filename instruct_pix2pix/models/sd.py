"""The parts of a Stable Diffusion pipeline: checked before weights load, loaded, widened, put together again."""

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
from transformers import CLIPTextModel, CLIPTokenizer

from instruct_pix2pix.cli import UserError

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


def read_base_configs(args) -> dict[str, dict]:
    """Configurations of the base model's UNet, VAE and scheduler, read without loading a weight.

    Raises UserError where the folder or repository is missing, incomplete or unreadable.
    """
    name = args.pretrained_model_name_or_path
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
        revision = (args.non_ema_revision or args.revision) if folder == "unet" else args.revision
        with _explained(name, folder):
            configs[folder] = dict(
                cls.load_config(
                    name, subfolder=folder, revision=revision, cache_dir=args.cache_dir, token=args.hub_token
                )
            )
    return configs


class _explained:
    """Turns what the libraries raise for a missing or broken part into one line that names it."""

    def __init__(self, name: str, folder: str):
        self.name, self.folder = name, folder

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        # The libraries have no common error of their own; what they raise for files is among these.
        if isinstance(error, (OSError, ValueError, RuntimeError, json.JSONDecodeError)) or (
            kind is not None and kind.__module__.startswith(("safetensors", "huggingface_hub", "pickle", "_pickle"))
        ):
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"--pretrained_model_name_or_path: cannot read {self.folder} of {self.name}: {reason}"
            ) from error


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


def load_unet(args, checkpoint: Path | None) -> UNet2DConditionModel:
    """The UNet in float32 with 8 input channels: from a checkpoint to resume, or from the base model."""
    name = args.pretrained_model_name_or_path
    if checkpoint is not None:
        return UNet2DConditionModel.from_pretrained(checkpoint, subfolder="unet", dtype=torch.float32)
    with _explained(name, "unet"):
        unet = UNet2DConditionModel.from_pretrained(
            name, subfolder="unet", dtype=torch.float32, **_where(args, args.non_ema_revision or args.revision)
        )
    if unet.config.in_channels == 4:
        widen_conv_in(unet)
    return unet


def load_tokenizer(args) -> CLIPTokenizer:
    name, where = args.pretrained_model_name_or_path, _where(args, args.revision)
    del where["variant"]
    with _explained(name, "tokenizer"):
        return CLIPTokenizer.from_pretrained(name, subfolder="tokenizer", **where)


def load_frozen(args) -> tuple[CLIPTokenizer, CLIPTextModel, AutoencoderKL]:
    """Tokenizer, text encoder and VAE in float32, frozen, on the CPU."""
    name, where = args.pretrained_model_name_or_path, _where(args, args.revision)
    tokenizer = load_tokenizer(args)
    with _explained(name, "text_encoder"):
        text_encoder = CLIPTextModel.from_pretrained(name, subfolder="text_encoder", dtype=torch.float32, **where)
    with _explained(name, "vae"):
        vae = AutoencoderKL.from_pretrained(name, subfolder="vae", dtype=torch.float32, **where)
    for model in (text_encoder, vae):
        model.requires_grad_(False).eval()
    return tokenizer, text_encoder, vae


def _where(args, revision) -> dict:
    return {
        "revision": revision,
        "variant": args.variant,
        "cache_dir": args.cache_dir,
        "token": args.hub_token,
    }


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


def build_pipeline(configs: dict, tokenizer, text_encoder, vae, unet) -> StableDiffusionInstructPix2PixPipeline:
    """The editing pipeline, with the base model's own kind of scheduler and no safety checker."""
    scheduler_class = getattr(diffusers, configs["scheduler"].get("_class_name", "DDPMScheduler"))
    pipeline = StableDiffusionInstructPix2PixPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler_class.from_config(configs["scheduler"]),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
