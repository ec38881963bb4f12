"""Checkpoints that are whole or not there: written under a temporary name, renamed, then the oldest removed.

Training waits only for a copy of the tensors in the host's memory; a thread writes it while training goes on.

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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from instruct_pix2pix.cli import UserError
from instruct_pix2pix.files import flush, write_json

logger = logging.getLogger(__name__)

SHARE_OF_MEMORY = 0.8  # of the host's free memory, that the copy of a checkpoint may take


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


class Writer:
    """Writes one checkpoint at a time in the background. A failure comes out of the next call."""

    def __init__(self):
        self.thread, self.pending = ThreadPoolExecutor(max_workers=1), None

    def save(self, output_dir: Path, state: dict, unet, optimizer, ema, limit: int | None) -> None:
        """Start writing checkpoint-<state["step"]>, whole or not at all; then only the newest `limit` are kept.

        Args:
            state: JSON-serialisable; must hold "step".
            unet: the unwrapped UNet; `optimizer` the torch optimizer over its parameters; `ema` an EMA or None.
        """
        self.wait()
        tensors, rest = _collect(unet, optimizer, ema)
        state = {**state, "optimizer": rest} | ({"ema_updates": ema.updates} if ema is not None else {})
        size = sum(tensor.nbytes for group in tensors.values() for tensor in group.values())
        copied = size < SHARE_OF_MEMORY * psutil.virtual_memory().available
        if copied:
            tensors = {file: {n: t.to("cpu", copy=True) for n, t in group.items()} for file, group in tensors.items()}
        self.pending = self.thread.submit(_write, Path(output_dir), state, unet, tensors, limit)
        if not copied:
            logger.info("checkpoint-%d is written while training waits: too little memory for a copy", state["step"])
            self.wait()

    def wait(self) -> None:
        """Until the last checkpoint is there. Raises UserError where it cannot be written."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def raise_if_failed(self) -> None:
        """As wait(), but without waiting."""
        if self.pending is not None and self.pending.done():
            self.wait()

    def close(self) -> None:
        """Let the last checkpoint be finished, whatever else has happened."""
        self.thread.shutdown(wait=True)


def _collect(unet, optimizer, ema) -> tuple[dict[str, dict[str, torch.Tensor]], dict]:
    """File of a checkpoint -> its tensors, not copied; and the JSON rest of the optimizer's state."""
    names = [name for name, _ in unet.named_parameters()]
    optimizer_tensors, rest = _flatten_optimizer(optimizer, names)
    tensors = {"unet/diffusion_pytorch_model.safetensors": unet.state_dict()}
    if ema is not None:
        tensors["ema.safetensors"] = dict(zip(names, ema.shadow, strict=True))
    return tensors | {"optimizer.safetensors": optimizer_tensors}, rest


def _write(output_dir: Path, state: dict, unet, tensors: dict[str, dict[str, torch.Tensor]], limit: int | None) -> None:
    """Of the UNet only the configuration is used: its weights may have gone on."""
    name = f"checkpoint-{state['step']}"
    try:
        _write_folder(output_dir / f".{name}.partial", state, unet, tensors)
        _put_in_place(output_dir, name)
        for old in list_checkpoints(output_dir)[:-limit] if limit is not None else []:
            shutil.rmtree(old)
    except (OSError, SafetensorError) as error:  # most often a full disk
        shutil.rmtree(output_dir / f".{name}.partial", ignore_errors=True)
        raise UserError(
            f"--output_dir: {name} cannot be written ({error}); the checkpoints before it are whole, make room and go"
            " on with --resume_from_checkpoint latest"
        ) from error


def _write_folder(folder: Path, state: dict, unet, tensors: dict[str, dict[str, torch.Tensor]]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    unet.save_config(folder / "unet")
    for file, group in tensors.items():
        save_file({name: t.cpu().contiguous() for name, t in group.items()}, folder / file, {"format": "pt"})
    files = {p.relative_to(folder).as_posix(): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    write_json(folder / "state.json", {**state, "files": files})
    for path in folder.rglob("*"):
        flush(path)


def _put_in_place(output_dir: Path, name: str) -> None:
    """Rename the finished folder. One of the same name cannot be renamed over and steps aside first."""
    temporary, final = output_dir / f".{name}.partial", output_dir / name
    if final.exists():
        replaced = output_dir / f".{name}.replaced"
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(final, replaced)
        os.replace(temporary, final)
        shutil.rmtree(replaced)
    else:
        os.replace(temporary, final)
    flush(output_dir)


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
                tensors[f"{name}/{key}"] = value
            else:
                rest[f"{name}/{key}"] = value
    return tensors, rest


def _restore_optimizer(optimizer, names: list[str], tensors: dict[str, torch.Tensor], rest: dict) -> None:
    places = {name: index for index, name in enumerate(names)}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {}
    for entry, value in {**tensors, **rest}.items():
        name, key = entry.rsplit("/", 1)
        parameter = parameters[places[name]]
        if torch.is_tensor(value) and value.shape == parameter.shape:
            # Fused kernels want a moment laid out in memory as its parameter is.
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        state.setdefault(places[name], {})[key] = value
    # The groups stay the flags' of this run: a changed learning rate is meant.
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
