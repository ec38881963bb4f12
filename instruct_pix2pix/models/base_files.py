"""Where the parts of a base model lie and what they are opened with: a folder, a Hub's snapshot, or one file.

`config` is the training's configuration; its base model is pretrained_model_name_or_path, with revision,
non_ema_revision (the UNet's), variant, base_config (of a single file), cache_dir and hub_token.
"""

import contextlib
import functools
import os
import re
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace

import torch
from huggingface_hub import HfApi, hf_hub_download
from safetensors.torch import load_file

from instruct_pix2pix.cli import UserError, first_line

# A model's weights, whole or in shards: diffusion_pytorch_model.safetensors, model.fp16-00001-of-00002.safetensors.
WEIGHTS = re.compile(
    r"(diffusion_pytorch_model|(pytorch_)?model)(\.(?P<variant>\w+))?(-\d+-of-\d+)?(\.(?P<old>\w+))?\.(safetensors|bin)"
)
PICKLED = (".bin", ".ckpt", ".pt", ".pth")
# A single-file checkpoint holds weights alone: whose configuration and tokenizer it goes by, by its input channels.
SINGLE_FILE_CONFIGS = {4: "stable-diffusion-v1-5/stable-diffusion-v1-5", 8: "timbrooks/instruct-pix2pix"}
SINGLE_FILE_CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
SINGLE_FILE_PARTS = {
    "UNet": "model.diffusion_model.",
    "autoencoder": ("first_stage_model.", "vae."),
    "text encoder": "cond_stage_model.",
}


def configuration(name: str, base_config: str | None = None) -> SimpleNamespace:
    """Flags that name a base model, and what a single file goes by, and nothing else."""
    left_out = dict.fromkeys(("revision", "non_ema_revision", "variant", "cache_dir", "hub_token", "lora_rank"))
    left_out["zero_terminal_snr"] = False
    return SimpleNamespace(pretrained_model_name_or_path=name, base_config=base_config, **left_out)


def source_flag(config) -> str:
    """The flag that names where configurations and tokenizer come from."""
    by_flag = single_file(config) and config.base_config
    return "--base_config" if by_flag else "--pretrained_model_name_or_path"


def single_file(config) -> str | None:
    """The path of a base model that is one file, as Stable Diffusion was first published."""
    name = config.pretrained_model_name_or_path
    return name if os.path.isfile(name) and name.endswith((".safetensors", *PICKLED)) else None


def source_of(config) -> str:
    """The folder or Hub id of the base model's configurations and tokenizer: its own, or those its one file goes by."""
    file = single_file(config)
    if file is None:
        return config.pretrained_model_name_or_path
    names, channels = layout(file)
    missing = [part for part, prefix in SINGLE_FILE_PARTS.items() if not any(name.startswith(prefix) for name in names)]
    if missing or not channels:
        raise UserError(
            f"--pretrained_model_name_or_path: {file} has no {missing[0] if missing else 'UNet'} under the names of a"
            " Stable Diffusion 1 or 2 checkpoint; give a whole one, or a pipeline's folder"
        )
    if config.base_config:
        return config.base_config
    if channels not in SINGLE_FILE_CONFIGS or any(name.startswith("cond_stage_model.model.") for name in names):
        raise UserError(  # Stable Diffusion 2 predicts epsilon or v, and the file does not say which
            f"--base_config: missing; {file} does not say what its scheduler is; name the folder or Hub id of a"
            " pipeline of its kind, such as stabilityai/stable-diffusion-2-1"
        )
    return SINGLE_FILE_CONFIGS[channels]


@functools.cache
def layout(file: str) -> tuple[frozenset[str], int | None]:
    """The names in a single-file checkpoint, and its UNet's input channels if it has one."""
    tensors = read_tensors(file)
    conv_in = tensors.get(SINGLE_FILE_CONV_IN)
    return frozenset(tensors), conv_in.shape[1] if conv_in is not None and conv_in.dim() == 4 else None


def read_tensors(file: str) -> dict[str, torch.Tensor]:
    """The tensors of a single-file checkpoint by name, mapped into memory: read from the disk only where used."""
    if file.endswith(PICKLED):
        tensors = _unpickle(file)
        if isinstance(tensors, dict) and isinstance(tensors.get("state_dict"), dict):
            tensors = tensors["state_dict"]  # beside what else Lightning keeps
    else:
        try:
            tensors = load_file(file)
        except Exception as error:  # safetensors' own error, or the system's
            raise UserError(f"--pretrained_model_name_or_path: cannot read {file}: {first_line(error)}") from None
    if not isinstance(tensors, dict):
        raise UserError(f"--pretrained_model_name_or_path: {file} holds no weights by name; give another file")
    return {name: tensor for name, tensor in tensors.items() if isinstance(name, str) and torch.is_tensor(tensor)}


class _Callback:
    """Stands in for the class by which Lightning's checkpoints (Stable Diffusion's own .ckpt) name a dict's entry."""


def _unpickle(file: str | os.PathLike):
    """What a pickled file of weights holds; UserError where unpickling would call anything but what makes tensors."""
    lightning = (_Callback, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")
    try:
        with torch.serialization.safe_globals([lightning]), warnings.catch_warnings(action="ignore"):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # damaged pickles fail in many ways
        called = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"would run code when opened ({called[1]})" if called else "is damaged, or holds more than weights"
        raise UserError(
            f"--pretrained_model_name_or_path: {file} {reason}, so it is not used; take the model's .safetensors"
        ) from None


@functools.cache
def _hub_files(name: str, part: str, revision: str | None, cache_dir: str | None, token: str | None) -> list[str]:
    """The names of the files in a folder of a Hub's model, or of the cached ones where the Hub does not answer."""
    try:
        return sorted(Path(item.path).name for item in HfApi(token=token).list_repo_tree(name, part, revision=revision))
    except Exception:  # no network, or a Hub that lists nothing
        return sorted(path.name for path in (_snapshot(name, revision, cache_dir, token) / part).iterdir())


def variant_of(config, part: str) -> str | None:
    """The variant of the weights of the base model's "unet", "vae" or "text_encoder" to load: --variant, or fp16 where
    there are no plain ones. Pickled weights that are the only ones are looked into. UserError where there are none."""
    if single_file(config):
        return config.variant
    name, flag = config.pretrained_model_name_or_path, "--pretrained_model_name_or_path"
    local = os.path.isdir(name)
    files = sorted(os.listdir(Path(name) / part)) if local else _hub_files(name, part, **where(config, part))
    found = {file: match["variant"] or match["old"] for file in files if (match := WEIGHTS.fullmatch(file))}
    if not found and local:
        raise UserError(f"{flag}: {name}/{part} holds no weights (.safetensors)")
    variants = set(found.values())
    variant = "fp16" if config.variant is None and None not in variants and "fp16" in variants else config.variant
    if found and variant not in variants:
        known = " or ".join(f"--variant {v}" if v else "no --variant" for v in sorted(variants, key=str))
        raise UserError(
            f"--variant: {variant or 'not given'}, and {name}/{part} has no {variant or 'plain'} weights; use {known}"
        )
    chosen = [file for file in found if found[file] == variant]
    if local and not any(file.endswith(".safetensors") for file in chosen):
        for file in chosen:
            _unpickle(Path(name) / part / file)
    return variant


def weights(config, folder: Path, stem: str) -> Path:
    """The file of a model's weights in `folder`, of the variant that is loaded, if they are one safetensors file."""
    variant = variant_of(config, folder.name)
    return folder / f"{stem}{f'.{variant}' if variant else ''}.safetensors"


def base_folder(config, part: str | None = None) -> Path:
    """The folder with the base model's files, or of a single file with the configurations it goes by: the local one, or
    the Hub's snapshot in the cache, which holds what has been loaded so far. The UNet's may be another revision."""
    name = source_of(config)
    if os.path.isdir(name):
        return Path(name)
    revision = (config.non_ema_revision or config.revision) if part == "unet" else config.revision
    return _snapshot(name, None if single_file(config) else revision, config.cache_dir, config.hub_token)


@functools.cache  # asked once: a branch that moves on during a long run changes nothing
def _snapshot(name: str, revision: str | None, cache_dir: str | None, token: str | None) -> Path:
    file = hf_hub_download(name, "unet/config.json", revision=revision, cache_dir=cache_dir, token=token)
    return Path(file).parents[1]


def where(config, part: str) -> dict:
    """Where from_pretrained and load_config find a part of the base model; of a branch, the commit first seen."""
    return {
        "revision": None if os.path.isdir(source_of(config)) else base_folder(config, part).name,
        "cache_dir": config.cache_dir,
        "token": config.hub_token,
    }


@contextlib.contextmanager
def explained(config, folder: str):
    """Turns what the libraries raise for a missing or broken part into one line that names it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # The libraries have no common error of their own; what they raise for files is among these.
        library = type(error).__module__.startswith(("safetensors", "huggingface_hub", "pickle", "_pickle"))
        if not library and not isinstance(error, (OSError, ValueError, RuntimeError)):
            raise
        reason = " ".join(str(error).split())[:300]
        source, file = source_of(config), single_file(config)
        if file and not config.base_config:
            raise UserError(
                f"--base_config: missing, and {folder} of {source}, by which {file} would go, cannot be had ({reason});"
                " name the folder of a pipeline of its kind"
            ) from error
        raise UserError(f"{source_flag(config)}: cannot read {folder} of {source}: {reason}") from error
