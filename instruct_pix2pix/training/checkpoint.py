"""Checkpoints that are whole or not there: written under a temporary name, renamed, then the oldest removed.

Training waits only for a copy of the tensors in the host's memory; a thread writes it while training goes on. Sharded
tensors are made whole for it: all processes take part, and the main one keeps and writes them.

checkpoint-<step>/
    unet/                    diffusers folder, float32, without the path that the weights came from
    adapter.safetensors      instead of the UNet's weights, with --lora_rank: what is trained, by parameter name
    ema.safetensors          the average's tensors, by parameter name (with --use_ema, or a schedule-free optimizer)
    optimizer.safetensors    the optimizer's tensors, "<parameter>/<state>"
    state.json               step, samples seen, seed, loss scaler, flags, the rest of the optimizer's state, what a
                             validation for --keep_best found, and the size of every file
"""

import json
import logging
import math
import os
import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import psutil
import torch
from diffusers import UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from instruct_pix2pix.cli import UserError
from instruct_pix2pix.files import flush, flush_tree, free_space, in_megabytes, write_json
from instruct_pix2pix.models import adapters
from instruct_pix2pix.models.trained import ADAPTER_FILE, EMA_FILE, STATE_FILE, UNET_FILE, damage, read_state
from instruct_pix2pix.training import sharding
from instruct_pix2pix.training.ema import EMA, average_swapped_in
from instruct_pix2pix.training.options import KEEP_BEST

logger = logging.getLogger(__name__)

GROUPS = "param_groups"  # in state.json's "optimizer", beside "<parameter>/<state>"
SHARE_OF_MEMORY = 0.8  # of the free memory, that the copy of a checkpoint may take


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoint folders, the oldest first."""
    found = [p for p in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def find_checkpoint(resume_from: str | None, output_dir: Path) -> Path | None:
    """The folder to resume from, checked to be whole; None for `latest` and `hub` where there is none yet.

    `latest` passes over damaged ones, which is said, and is a UserError where all are damaged, as is a damaged
    checkpoint that was named.
    """
    if resume_from is None:
        return None
    if resume_from in ("latest", "hub"):  # what the Hub had is there by now
        return _newest_whole(output_dir)
    path = Path(resume_from)
    if not path.is_dir() and (Path(output_dir) / resume_from).is_dir():
        path = Path(output_dir) / resume_from
    if not path.is_dir():
        raise UserError(f"--resume_from_checkpoint: {resume_from} does not exist; give a checkpoint folder or latest")
    if damaged := damage(path):
        raise UserError(f"--resume_from_checkpoint: {path} is damaged ({damaged}); give another one or latest")
    return path


def _newest_whole(output_dir: Path) -> Path | None:
    damaged = []
    for path in reversed(list_checkpoints(output_dir)):
        if (reason := damage(path)) is None:
            if damaged:
                logger.warning("damaged: %s; going on from %s, the newest whole one", ", ".join(damaged), path)
            return path
        damaged.append(f"{path.name} ({reason})")
    if damaged:
        raise UserError(
            f"--resume_from_checkpoint: no whole checkpoint in {output_dir}: {', '.join(damaged)}; restore one, or name"
            " another --output_dir to start anew"
        )
    return None


class Writer:
    """Writes one checkpoint at a time in the background. A failure comes out of the next call."""

    def __init__(self):
        self.thread, self.pending = ThreadPoolExecutor(max_workers=1), None

    def save(
        self,
        output_dir: Path,
        state: dict,
        unet: UNet2DConditionModel,
        optimizer: torch.optim.Optimizer,
        ema: EMA | None,
        limit: int | None,
        keep_best: str | None = None,
    ) -> Future | None:
        """Start writing checkpoint-<state["step"]>, whole or not at all; then only those are kept that `remove_old`
        keeps of them. Callbacks of what is returned run before the next one is written.

        `state` is JSON-serialisable and holds "step"; `unet` is the unwrapped one, whose trained parameters `optimizer`
        and `ema` are over. Where it is sharded all processes call this; None on those that write nothing.
        """
        self.wait()
        parameters = adapters.trained_parameters(unet)
        optimizer_tensors, rest = flatten_optimizer(optimizer, parameters)
        tensors = {UNET_FILE: unet.state_dict()}
        if adapters.is_attached(unet):
            tensors = {ADAPTER_FILE: {name: parameter.detach() for name, parameter in parameters.items()}}
        tensors["optimizer.safetensors"] = optimizer_tensors
        state = {**state, "optimizer": rest}
        if ema is not None:
            shadows = zip(parameters.items(), ema.shadow, strict=True)
            tensors[EMA_FILE] = {name: sharding.joined(shadow, p) for (name, p), shadow in shadows}
            state["ema_updates"] = ema.updates
        elif hasattr(optimizer, "eval"):
            with average_swapped_in(None, optimizer):
                tensors[EMA_FILE] = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        size = sum(tensor.nbytes for group in tensors.values() for tensor in group.values())
        sharded = sharding.is_sharded(unet)
        copied = sharded or size < SHARE_OF_MEMORY * available_memory()
        if copied:
            tensors = {file: {n: sharding.host_copy(t) for n, t in group.items()} for file, group in tensors.items()}
        if sharded and torch.distributed.get_rank() != 0:
            return None
        config = json.loads(unet.to_json_string())
        config.pop("_name_or_path", None)  # a path of this machine, and after a resume another one
        config["_class_name"] = UNet2DConditionModel.__name__  # FSDP2 makes a class of its own of it
        written = self.thread.submit(_write, Path(output_dir), state, config, tensors, limit, keep_best)
        self.pending = written
        if not copied:
            logger.info("checkpoint-%d is written while training waits: too little memory for a copy", state["step"])
            self.wait()
        return written

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


def available_memory(root: str | os.PathLike = "/") -> int:
    """Bytes that can still be taken: what the host has left, or less where a container's limit is nearer.

    Limits are those of the process's control group (version 1 or 2) and of the groups above it. File cache that is not
    in use counts as free: it makes room before a limit is enforced. `root` is the root of the file system.
    """
    root, available = Path(root), psutil.virtual_memory().available
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return available
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers == "":
            mount, files = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            mount = root / "sys/fs/cgroup/memory"
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = mount / path.lstrip("/")  # in a container it may not be there: its own group is then the mount's root
        for folder in (group, *group.parents):
            available = min(available, _room_in_group(folder, *files))
            if folder == mount:
                break
    return max(0, int(available))


def _room_in_group(folder: Path, limit: str, usage: str, inactive: str) -> float:
    """Bytes below one control group's memory limit; infinity where it has none ("max", or no such file)."""
    try:
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        used = int((folder / usage).read_text()) - int(statistics[inactive])
        return int((folder / limit).read_text()) - used
    except (OSError, ValueError, KeyError):
        return math.inf


def _write(
    output_dir: Path,
    state: dict,
    config: dict,
    tensors: dict[str, dict[str, torch.Tensor]],
    limit: int | None,
    keep_best: str | None,
) -> None:
    """`config` is the UNet's; `tensors` are by file and name."""
    name = f"checkpoint-{state['step']}"
    try:
        _write_folder(output_dir / f".{name}.partial", state, config, tensors)
        if (output_dir / name).exists():  # damaged: from a whole one a run would have gone on
            shutil.rmtree(output_dir / name)
        os.replace(output_dir / f".{name}.partial", output_dir / name)
        flush(output_dir)
        remove_old(output_dir, limit, keep_best)
    except (OSError, SafetensorError) as error:  # most often a full disk
        shutil.rmtree(output_dir / f".{name}.partial", ignore_errors=True)
        needed = sum(tensor.nbytes for group in tensors.values() for tensor in group.values())
        raise UserError(
            f"--output_dir: {output_dir / name} cannot be written ({error}): it needs {in_megabytes(needed)}, free are"
            f" {in_megabytes(free_space(output_dir))}; the checkpoints before it are whole, make room and go on with"
            " --resume_from_checkpoint latest"
        ) from error


def _write_folder(folder: Path, state: dict, config: dict, tensors: dict[str, dict[str, torch.Tensor]]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "unet").mkdir(parents=True)
    write_json(folder / "unet" / "config.json", config)
    for file, group in tensors.items():
        save_file({name: t.cpu().contiguous() for name, t in group.items()}, folder / file, {"format": "pt"})
    files = {p.relative_to(folder).as_posix(): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    write_json(folder / STATE_FILE, {**state, "files": files})
    flush_tree(folder)


def remove_partial(output_dir: Path) -> None:
    """Sweep what a killed run left half-written."""
    for path in Path(output_dir).glob(".checkpoint-*.partial"):
        shutil.rmtree(path)


def remove_old(output_dir: Path, limit: int | None, keep_best: str | None = None) -> None:
    """Keep the newest `limit` checkpoints, and the best; a run killed before it did this leaves it to the next. A
    damaged one counts not: it must not outlive the last that is whole."""
    if limit is not None:
        best = best_checkpoint(output_dir, keep_best)
        for old in [path for path in list_checkpoints(output_dir) if damage(path) is None][:-limit]:
            if old == best:
                continue
            going = old.with_name(f".{old.name}.partial")  # killed at half, remove_partial ends it
            os.replace(old, going)
            shutil.rmtree(going)


def best_checkpoint(output_dir: Path, keep_best: str | None) -> Path | None:
    """The whole checkpoint with the best value of that measure, the first of equals; None where none has one."""
    values = {
        path: read_state(path).get("validation", {}).get(keep_best, math.nan)
        for path in list_checkpoints(output_dir)
        if keep_best is not None and damage(path) is None
    }
    sign = 1 if KEEP_BEST.get(keep_best) == "lower" else -1
    return min((path for path in values if math.isfinite(values[path])), key=lambda p: sign * values[p], default=None)


def load_training_state(
    checkpoint: Path, unet: UNet2DConditionModel, optimizer: torch.optim.Optimizer, ema: EMA | None
) -> dict:
    """Fill optimizer and EMA from a checkpoint (the UNet is loaded with the other components); returns its state."""
    state = read_state(checkpoint)
    parameters = adapters.trained_parameters(unet)
    if ema is not None and (Path(checkpoint) / EMA_FILE).is_file():
        stored = load_file(Path(checkpoint) / EMA_FILE)
        for (name, parameter), shadow in zip(parameters.items(), ema.shadow, strict=True):
            shadow.copy_(sharding.local(sharding.cut(stored[name], parameter)))
        ema.updates = state["ema_updates"]
    elif ema is not None:
        logger.warning("%s has no EMA; the average starts from its weights", checkpoint)
    stored = load_file(Path(checkpoint) / "optimizer.safetensors")
    restore_optimizer(optimizer, parameters, stored, state["optimizer"])
    return state


def flatten_optimizer(
    optimizer: torch.optim.Optimizer, parameters: dict[str, torch.nn.Parameter]
) -> tuple[dict[str, torch.Tensor], dict]:
    """Optimizer state as tensors named "<parameter>/<state>" and the JSON rest, so that nothing is pickled.

    A tensor that parameters share (bitsandbytes' quantisation maps) is there once; the rest names it for the others:
    {"same_as": name}. Read from `state`: in bitsandbytes' state_dict() tensors are nested in a dict of their own.
    What training has changed in a group (Prodigy's d, a schedule-free optimizer's weight_sum) is in rest[GROUPS].
    """
    tensors, rest, first_names = {}, {}, {}
    for parameter_name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            name = f"{parameter_name}/{key}"
            if not torch.is_tensor(value):
                rest[name] = value
            elif first_names.setdefault(id(value), name) == name:
                tensors[name] = value
            else:
                rest[name] = {"same_as": first_names[id(value)]}
    defaults = optimizer.defaults
    changed = [
        {k: v for k, v in g.items() if k in defaults and k != "lr" and v != defaults[k]} for g in optimizer.param_groups
    ]
    return tensors, rest | ({GROUPS: changed} if any(changed) else {})


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    parameters: dict[str, torch.nn.Parameter],
    tensors: dict[str, torch.Tensor],
    rest: dict,
) -> None:
    """What flatten_optimizer gave, on the parameters' device; what was shared is shared again."""
    in_order = [p for group in optimizer.param_groups for p in group["params"]]
    places = {parameter: index for index, parameter in enumerate(in_order)}
    placed, state, groups = {}, {}, optimizer.state_dict()["param_groups"]
    stored = {**tensors, **rest}  # tensors first: the rest refers to them
    changed = stored.pop(GROUPS, [{}] * len(groups))
    for name, value in stored.items():
        parameter_name, key = name.rsplit("/", 1)
        parameter = parameters[parameter_name]
        if torch.is_tensor(value):
            if value.shape == parameter.shape:  # fused kernels want a moment laid out in memory as its parameter is
                value = torch.empty_like(parameter, dtype=value.dtype).copy_(sharding.cut(value, parameter))
            placed[name] = value = value.to(parameter.device)
        elif isinstance(value, dict):
            value = placed[value["same_as"]]
        state.setdefault(places[parameter], {})[key] = value
    # Else the groups stay the flags' of this run: a changed learning rate is meant.
    groups = [group | kept for group, kept in zip(groups, changed, strict=True)]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
