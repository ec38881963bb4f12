"""A checkpoint or an exported adapter of a training as a model: whether it is whole, and the editor it stands for.

training/checkpoint.py and docs/adapters.md say what lies in the folders. Nothing heavy is imported at the top.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

from instruct_pix2pix.cli import UserError

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionInstructPix2PixPipeline, UNet2DConditionModel

SKIPS_FOLDER = "decoder_skips"  # beside a pipeline's own parts, which load without it
EMA_FILE, STATE_FILE = "ema.safetensors", "state.json"
UNET_FILE = "unet/diffusion_pytorch_model.safetensors"
ADAPTER_FILE = "adapter.safetensors"  # instead of that, with --lora_rank: what is trained
LORA_FILE, CONFIG_FILE = "pytorch_lora_weights.safetensors", "training_config.json"  # of an exported adapter
# What state.json must hold, and the files without which there is nothing to go on with.
STATE_TYPES = {"step": int, "samples_seen": int, "flags": dict, "optimizer": dict, "files": dict}
NEEDED_FILES = {"unet/config.json", "optimizer.safetensors"}


def is_checkpoint(folder: str | os.PathLike) -> bool:
    """Whether a folder is a checkpoint of a training, whole or damaged."""
    folder = Path(folder)
    named = re.fullmatch(r"checkpoint-\d+", folder.resolve().name) is not None
    return folder.is_dir() and (named or (folder / STATE_FILE).is_file()) and not (folder / "model_index.json").exists()


def is_adapter(folder: str | os.PathLike) -> bool:
    """Whether a folder is an adapter that a training exported."""
    return all((Path(folder) / name).is_file() for name in (LORA_FILE, CONFIG_FILE))


def needs_base(folder: str | os.PathLike) -> bool:
    """Whether a folder is a checkpoint or an adapter: a model together with the base that it was trained from."""
    return is_checkpoint(folder) or is_adapter(folder)


def read_state(checkpoint: str | os.PathLike) -> dict:
    """What state.json holds. OSError or ValueError where it is missing, unreadable or no checkpoint's."""
    state = json.loads((Path(checkpoint) / STATE_FILE).read_text(encoding="utf-8"))
    if not isinstance(state, dict) or not all(isinstance(state.get(name), kind) for name, kind in STATE_TYPES.items()):
        raise ValueError(f"{STATE_FILE} lacks one of {', '.join(STATE_TYPES)}")
    if not isinstance(state["flags"].get("pretrained_model_name_or_path"), str):
        raise ValueError(f"{STATE_FILE} names no base model")
    return state


def damage(checkpoint: str | os.PathLike) -> str | None:
    """What is wrong with a checkpoint, in a few words; None if every file has its size and, of tensors, its header."""
    from safetensors import SafetensorError, safe_open

    try:
        state = read_state(checkpoint)
    except (OSError, ValueError, RecursionError):
        return f"no readable {STATE_FILE}"
    files = state["files"]
    needed = NEEDED_FILES | {UNET_FILE if state["flags"].get("lora_rank") is None else ADAPTER_FILE}
    for name in [*files, *sorted(needed - files.keys())]:
        file = os.path.join(checkpoint, name)
        if not os.path.isfile(file):
            return f"{name} is missing"
        if (size := os.path.getsize(file)) != files.get(name):
            return f"{name} has {size} bytes instead of {files.get(name, 'a known number')}"
        if name.endswith(".safetensors"):
            try:
                with safe_open(file, "np"):
                    pass
            except (OSError, SafetensorError):
                return f"{name} holds no tensors"
    return None


def configuration(checkpoint: str | os.PathLike) -> SimpleNamespace:
    """The flags that a whole checkpoint or an adapter was trained with, for `models.sd` and `publishing`. OSError or
    ValueError where they are missing or unreadable."""
    from instruct_pix2pix.models import base_files

    if is_adapter(checkpoint):
        flags = json.loads((Path(checkpoint) / CONFIG_FILE).read_text(encoding="utf-8"))
        if not isinstance(flags, dict) or not isinstance(flags.get("pretrained_model_name_or_path"), str):
            raise ValueError(f"{CONFIG_FILE} names no base model")
    else:
        flags = read_state(checkpoint)["flags"]
    config = SimpleNamespace(**vars(base_files.configuration("")) | flags | {"hub_token": None})
    if config.cache_dir and not os.path.isdir(config.cache_dir):  # trained on another machine
        config.cache_dir = None
    return config


def load_unet(checkpoint: str | os.PathLike, **options) -> UNet2DConditionModel:
    """The UNet that training would export at a whole checkpoint: the average's weights where there is one; or that of
    an adapter. float32, with adapters where training had them. `options` are from_pretrained's."""
    from safetensors.torch import load_file

    from instruct_pix2pix.models import adapters, sd

    unet = sd.load_unet(configuration(checkpoint), Path(checkpoint), **options)
    average = Path(checkpoint) / EMA_FILE
    if average.is_file():
        adapters.fill(unet, load_file(average))
    return unet


def check_base(checkpoint: str | os.PathLike, flag: str) -> None:
    """Raise UserError where a checkpoint is damaged, or its or an adapter's base model cannot give what training did
    not change."""
    adapter = is_adapter(checkpoint)
    if not adapter and (damaged := damage(checkpoint)):
        raise UserError(f"{flag}: {checkpoint} is damaged ({damaged}); give another checkpoint or the trained pipeline")
    from instruct_pix2pix.models import sd

    try:
        sd.read_base_configs(configuration(checkpoint))
    except (UserError, OSError, ValueError) as error:
        raise UserError(
            f"{flag}: {checkpoint} needs its base model where training found it (go to the same folder, or correct"
            f" pretrained_model_name_or_path in its {CONFIG_FILE if adapter else STATE_FILE}): {error}"
        ) from error


def load_pipeline(checkpoint: str | os.PathLike, dtype: torch.dtype) -> StableDiffusionInstructPix2PixPipeline:
    """The pipeline that training would export at a checkpoint, or of an adapter, that passed `check_base`, on the
    CPU."""
    from instruct_pix2pix.models import adapters, sd

    config = configuration(checkpoint)
    tokenizer, *models = *sd.load_frozen(config), adapters.merged(load_unet(checkpoint))
    return sd.build_pipeline(sd.read_base_configs(config), tokenizer, *(model.to(dtype) for model in models))
