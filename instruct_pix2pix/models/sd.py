"""The parts of a Stable Diffusion pipeline: checked before weights load, loaded, widened, put together, made readable.

`config` is the training's configuration; models/base_files.py says which flags of it name the base model.
"""

import importlib.util
import inspect
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
from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from instruct_pix2pix.cli import UserError, first_line
from instruct_pix2pix.files import write_json, write_text, written_whole
from instruct_pix2pix.models import adapters, base_files

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
    """Configurations of the base model's "unet", "vae", "scheduler" and "text_encoder", read without loading a weight.

    Raises UserError where the folder, file or repository is missing, incomplete or unreadable, where a pickled file
    holds more than weights, and where --variant names weights that are not there.
    """
    name, file = config.pretrained_model_name_or_path, base_files.single_file(config)
    source = base_files.source_of(config)
    if os.path.isdir(source):
        for folder, part in CONFIG_FILES.items():
            if not (Path(source) / folder / part).is_file():
                raise UserError(
                    f"{base_files.source_flag(config)}: {source} has no {folder}/{part}; it needs a whole Stable"
                    f" Diffusion pipeline in diffusers' format ({', '.join(CONFIG_FILES)})"
                )
    elif os.path.exists(source) or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise UserError(
            f"{base_files.source_flag(config)}: {source} is not a folder; give a pipeline's folder or a Hub id"
        )

    classes = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "scheduler": DDPMScheduler}
    configs = {}
    for folder, cls in classes.items():
        with base_files.explained(config, folder):
            configs[folder] = dict(cls.load_config(source, subfolder=folder, **base_files.where(config, folder)))
    configs["scheduler"] = with_zero_terminal_snr(configs["scheduler"], config.zero_terminal_snr)
    with base_files.explained(config, "text_encoder"):
        text = CLIPTextConfig.from_pretrained(
            source, subfolder="text_encoder", **base_files.where(config, "text_encoder")
        )
    configs["text_encoder"] = text.to_dict()
    if file:
        configs["unet"]["in_channels"] = base_files.layout(file)[1]
        return configs
    variants = {part: base_files.variant_of(config, part) for part in ("unet", "vae", "text_encoder")}
    found = sorted(part for part, variant in variants.items() if variant != config.variant)
    if found:
        logger.info("%s of %s: only %s weights are there, and used", ", ".join(found), name, variants[found[0]])
    return configs


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


def count_parameters(configs: dict) -> dict[str, int]:
    """How many weights the trained "unet", the "vae" and the "text_encoder" have, from their configurations alone."""
    with torch.device("meta"):
        models = {
            "unet": UNet2DConditionModel.from_config(configs["unet"] | {"in_channels": 8}),
            "vae": AutoencoderKL.from_config(configs["vae"]),
            "text_encoder": CLIPTextModel(CLIPTextConfig.from_dict(configs["text_encoder"])),
        }
    return {part: sum(p.numel() for p in model.parameters()) for part, model in models.items()}


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
    if kind == "epsilon" and configs["scheduler"].get("rescale_betas_zero_snr"):
        raise UserError(
            "--pretrained_model_name_or_path: it predicts epsilon, which says nothing of an image that is all noise;"
            " with rescale_betas_zero_snr or --zero_terminal_snr use a base model that predicts v"
        )
    return kind


def with_zero_terminal_snr(scheduler_config: dict, wanted: bool) -> dict:
    """A scheduler's configuration with a schedule that ends without signal and steps that start from its end (Lin et
    al. 2023, sections 3.1 and 3.3), where `wanted` or where it has such a schedule itself; else as it is. A kind of
    scheduler that has none gives way to DDIM."""
    if not (wanted or scheduler_config.get("rescale_betas_zero_snr")):
        return scheduler_config
    kind = scheduler_class(scheduler_config)
    if "rescale_betas_zero_snr" not in inspect.signature(getattr(diffusers, kind)).parameters:
        kind = "DDIMScheduler"
    ending = {"_class_name": kind, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return {"clip_sample": False} | scheduler_config | ending


# ---- loading


def widen_conv_in(unet: UNet2DConditionModel) -> None:
    """Give a 4-channel UNet four more input channels for the source image's latents (InstructPix2Pix, section 3.2).

    The new weights are zero and the old ones and the bias are kept, so the widened UNet predicts exactly what the
    old one did until it has learned to look at the source image.
    """
    weight = torch.nn.functional.pad(unet.conv_in.weight.detach(), (0, 0, 0, 0, 0, 4))  # of the input channels
    unet.conv_in.weight, unet.conv_in.in_channels = torch.nn.Parameter(weight), 8
    unet.register_to_config(in_channels=8)


def load_unet(config, checkpoint: Path | None, **options) -> UNet2DConditionModel:
    """The UNet in float32 with 8 input channels, from a checkpoint to resume or from the base model; with --lora_rank
    from the base model, with adapters, which are the checkpoint's or new. `options` are from_pretrained's."""
    if checkpoint is not None and config.lora_rank is None:
        unet = UNet2DConditionModel.from_pretrained(checkpoint, subfolder="unet", dtype=torch.float32, **options)
        return in_memory(unet)
    unet = load_model(config, "unet", **options)
    if unet.config.in_channels == 4:
        widen_conv_in(unet)
    if config.lora_rank is not None:
        adapters.attach(unet, config)
        if checkpoint is not None:
            adapters.fill(unet, adapters.read(checkpoint))
    return unet


def in_memory(model: torch.nn.Module) -> torch.nn.Module:
    """The model with tensors of its own, where they were a mapped file's: those begin at any address, and on some
    processors the last bit of a matrix product depends on where its factors lie."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def load_frozen(config) -> tuple[CLIPTokenizer, CLIPTextModel, AutoencoderKL]:
    """Tokenizer, text encoder and VAE, the models in float32, frozen, on the CPU."""
    tokenizer = load_tokenizer(config)
    text_encoder, vae = (load_model(config, part).requires_grad_(False).eval() for part in ("text_encoder", "vae"))
    return tokenizer, text_encoder, vae


def load_tokenizer(config) -> CLIPTokenizer:
    with base_files.explained(config, "tokenizer"):
        tokenizer = CLIPTokenizer.from_pretrained(
            base_files.source_of(config), subfolder="tokenizer", **base_files.where(config, "tokenizer")
        )
        check_vocabulary(tokenizer)
        return tokenizer


def check_vocabulary(tokenizer: CLIPTokenizer) -> None:
    """Raise OSError for a tokenizer without its words, which transformers makes without a complaint."""
    if len(tokenizer) < 256:
        raise OSError("vocab.json is missing")


def load_model(config, part: str, **options) -> CLIPTextModel | AutoencoderKL | UNet2DConditionModel:
    """The base model's "text_encoder", "vae" or "unet" in float32, on the CPU. UserError where it cannot be read.
    `options` are from_pretrained's, for a base model that is a folder."""
    cls = {"text_encoder": CLIPTextModel, "vae": AutoencoderKL, "unet": UNet2DConditionModel}[part]
    if base_files.single_file(config):
        return _convert(config, cls, part)
    with base_files.explained(config, part):
        variant, where = base_files.variant_of(config, part), base_files.where(config, part)
        name = config.pretrained_model_name_or_path
        options |= where
        model = cls.from_pretrained(name, subfolder=part, dtype=torch.float32, variant=variant, **options)
    return in_memory(model)


def _convert(config, cls: type, part: str) -> CLIPTextModel | AutoencoderKL | UNet2DConditionModel:
    """A part of a base model in one file: its tensors as diffusers renames them, in the sizes that the configuration
    says. UserError where they do not fit it."""
    file, folder = base_files.single_file(config), base_files.base_folder(config, part)
    tensors = base_files.read_tensors(file)
    where = {"subfolder": part, "config": str(folder), "local_files_only": True}
    try:
        if part == "text_encoder":
            model = create_diffusers_clip_model_from_ldm(cls, tensors, **where)
        else:
            channels = {"in_channels": base_files.layout(file)[1]} if part == "unet" else {}
            model = cls.from_single_file(tensors, **where, **channels)
        missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
        if missing:
            raise ValueError(f"{missing[0]} is missing")
    except Exception as error:  # the converters trust the file
        raise UserError(
            f"--pretrained_model_name_or_path: the weights of {file} do not fit the {part} of"
            f" {base_files.source_of(config)} ({first_line(error)}); name a pipeline of their kind by --base_config"
        ) from error
    return model.float()


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
