"""Checkpoints that are whole or not there: written under a temporary name, renamed, then the oldest removed.

checkpoint-<step>/
    unet/                    diffusers folder, float32
    ema.safetensors          the average's tensors, by parameter name (with --use_ema)
    optimizer.safetensors    the optimizer's tensors, "<parameter>/<state>"
    state.json               step, samples seen, seed, scheduler, loss scaler, flags, and the size of every file
"""

import json
import logging
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from instruct_pix2pix.errors import UserError
from instruct_pix2pix.options import write_json

logger = logging.getLogger(__name__)


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoint folders, the oldest first."""
    found = [p for p in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def find_checkpoint(resume_from: str | None, output_dir: Path) -> Path | None:
    """The folder to resume from, checked to be whole; None for `latest` where there is none yet."""
    if resume_from is None:
        return None
    if resume_from == "latest":
        found = list_checkpoints(output_dir)
        if not found:
            return None
        path = found[-1]
    else:
        path = Path(resume_from)
        if not path.is_dir() and (Path(output_dir) / resume_from).is_dir():
            path = Path(output_dir) / resume_from
    if not path.is_dir():
        raise UserError(f"--resume_from_checkpoint: {resume_from} does not exist; give a checkpoint folder or latest")
    try:
        files = read_state(path)["files"]
    except (OSError, ValueError, KeyError):
        raise UserError(f"--resume_from_checkpoint: {path} is incomplete (no readable state.json)") from None
    for name, size in files.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size:
            raise UserError(f"--resume_from_checkpoint: {path} is incomplete ({name} is missing or cut short)")
    return path


def read_state(checkpoint: Path) -> dict:
    with open(Path(checkpoint) / "state.json", encoding="utf-8") as file:
        return json.load(file)


def save_checkpoint(output_dir: Path, state: dict, unet, optimizer, ema, limit: int | None) -> Path:
    """Write checkpoint-<state["step"]> whole or not at all, then keep only the newest `limit`.

    Args:
        state: JSON-serialisable; must hold "step".
        unet: the unwrapped UNet; `optimizer` the torch optimizer over its parameters; `ema` an EMA or None.
    """
    final = Path(output_dir) / f"checkpoint-{state['step']}"
    temporary = Path(output_dir) / f".{final.name}.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    unet.save_pretrained(temporary / "unet", safe_serialization=True)
    names = [name for name, _ in unet.named_parameters()]
    if ema is not None:
        save_file(dict(zip(names, ema.shadow, strict=True)), temporary / "ema.safetensors")
        state = {**state, "ema_updates": ema.updates}
    tensors, rest = _flatten_optimizer(optimizer, names)
    save_file(tensors, temporary / "optimizer.safetensors")
    files = {p.relative_to(temporary).as_posix(): p.stat().st_size for p in temporary.rglob("*") if p.is_file()}
    write_json(temporary / "state.json", {**state, "optimizer": rest, "files": files})
    for path in temporary.rglob("*"):
        _flush(path)
    # A folder cannot be renamed over another; a checkpoint of the same step steps aside first.
    if final.exists():
        replaced = Path(output_dir) / f".{final.name}.replaced"
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(final, replaced)
        os.replace(temporary, final)
        shutil.rmtree(replaced)
    else:
        os.replace(temporary, final)
    _flush(Path(output_dir))
    if limit is not None:
        for old in list_checkpoints(output_dir)[:-limit]:
            shutil.rmtree(old)
    return final


def remove_partial(output_dir: Path) -> None:
    """Sweep what a killed run left half-written; a checkpoint that was stepping aside comes back."""
    for path in Path(output_dir).glob(".checkpoint-*.replaced"):
        final = path.with_name(path.name.removeprefix(".").removesuffix(".replaced"))
        if final.exists():
            shutil.rmtree(path)
        else:
            os.replace(path, final)
    for path in Path(output_dir).glob(".checkpoint-*.partial"):
        shutil.rmtree(path)


def load_training_state(checkpoint: Path, unet, optimizer, ema) -> dict:
    """Fill optimizer and EMA from a checkpoint (the UNet is loaded with the other components); returns its state."""
    state = read_state(checkpoint)
    names = [name for name, _ in unet.named_parameters()]
    if ema is not None and (Path(checkpoint) / "ema.safetensors").is_file():
        stored = load_file(Path(checkpoint) / "ema.safetensors")
        for name, shadow in zip(names, ema.shadow, strict=True):
            shadow.copy_(stored[name])
        ema.updates = state["ema_updates"]
    elif ema is not None:
        logger.warning("%s has no EMA; the average starts from its weights", checkpoint)
    _restore_optimizer(optimizer, names, load_file(Path(checkpoint) / "optimizer.safetensors"), state["optimizer"])
    return state


def _flatten_optimizer(optimizer, names: list[str]) -> tuple[dict[str, torch.Tensor], dict]:
    """Optimizer state as named tensors and the JSON rest, so that nothing is pickled."""
    state = optimizer.state_dict()["state"]
    tensors, rest = {}, {}
    for index, name in enumerate(names):
        for key, value in state.get(index, {}).items():
            if torch.is_tensor(value):
                tensors[f"{name}/{key}"] = value.contiguous()
            else:
                rest[f"{name}/{key}"] = value
    return tensors, rest


def _restore_optimizer(optimizer, names: list[str], tensors: dict[str, torch.Tensor], rest: dict) -> None:
    state = {}
    for entry, value in {**tensors, **rest}.items():
        name, key = entry.rsplit("/", 1)
        state.setdefault(names.index(name), {})[key] = value
    # The groups stay the flags' of this run: a changed learning rate is meant.
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _flush(path: Path) -> None:
    """Make a file or folder survive a power cut before the rename that declares it whole."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
