"""What a run says while it goes: numbers and pictures to TensorBoard, W&B and a JSON-lines file; and trouble."""

import contextlib
import json
import logging
import math
import netrc
import os
import sys
import time
from pathlib import Path
from urllib.parse import urlparse

import datasets
import diffusers
import numpy as np
import torch
import transformers
from accelerate.utils import gather_object
from PIL import Image
from tqdm.auto import tqdm

from instruct_pix2pix.cli import UserError
from instruct_pix2pix.files import write_json_lines, written_whole
from instruct_pix2pix.training.config import resolved
from instruct_pix2pix.training.options import trackers

logger = logging.getLogger(__name__)

PROJECT_NAME = "instruct-pix2pix"
LOG_FILE = "training_log.jsonl"
SKIPPED_FILE = "skipped.jsonl"  # what was left out of the dataset, and why
# Updates between two looks at the device: each look waits for it, so the numbers are collected there meanwhile.
LOG_EVERY = 10
MOST_NOT_FINITE = 3  # updates in a row without a finite loss and gradient, after which a run stops


class Diverged(UserError):
    """Training that computes infinities or no numbers at all."""

    exit_code = 1


def set_up_logging() -> None:
    """Our own messages on the main process, errors everywhere; one progress bar, ours."""
    main = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING if main else logging.ERROR)
    logging.getLogger("instruct_pix2pix").setLevel(logging.INFO if main else logging.ERROR)
    datasets.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


class Log:
    """Collects each update's numbers on the device and writes them every LOG_EVERY updates."""

    def __init__(self, run):
        self.run = run
        self.path = Path(run.config.output_dir) / LOG_FILE
        if run.accelerator.is_main_process:
            _keep_lines_until(self.path, run.first_step)
        self.progress = tqdm(
            total=run.config.max_train_steps,
            initial=run.first_step,
            desc="Training",
            unit="update",
            disable=not run.accelerator.is_local_main_process,
        )
        self.pending, self.last_step = [], run.first_step
        self.not_finite = []  # the last updates, as long as none of them was finite
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave out what was not training: a checkpoint or a validation just written."""
        self.clock = time.perf_counter()

    def add(self, step: int, loss: torch.Tensor, grad_norm: torch.Tensor, learning_rate: float) -> None:
        self.pending.append((step, loss, grad_norm, learning_rate))
        self.last_step = step
        self.progress.update(1)

    def flush(self, gather: bool = True) -> None:
        """Wait for the device once, average the losses over processes, and write. Called by all processes, unless
        `gather` is off. Raises Diverged where the last MOST_NOT_FINITE updates, or the very last, are not finite."""
        if not self.pending:
            return
        accelerator = self.run.accelerator
        numbers = torch.stack([torch.stack([loss, norm.float()]) for _, loss, norm, _ in self.pending])
        numbers = (accelerator.reduce(numbers, "mean") if gather else numbers).tolist()
        seconds = time.perf_counter() - self.clock
        images_per_second = len(self.pending) * self.run.images_per_update / seconds
        entries = [
            {
                "step": step,
                "loss": loss,
                "learning_rate": learning_rate,
                "grad_norm": norm,
                "images_per_second": round(images_per_second, 2),
            }
            for (step, _, _, learning_rate), (loss, norm) in zip(self.pending, numbers, strict=True)
        ]
        self.pending = []
        self.restart_clock()
        if accelerator.is_main_process:
            with open(self.path, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(entry) + "\n" for entry in entries)
            for entry in entries:
                accelerator.log({key: value for key, value in entry.items() if key != "step"}, entry["step"])
            self.progress.set_postfix(loss=f"{entries[-1]['loss']:.4f}", images_s=f"{images_per_second:.1f}")
        self._watch(entries)

    def _watch(self, entries: list[dict]) -> None:
        # Under a loss scale an infinite gradient is no trouble: the update is skipped and the scale lowered.
        scaled = self.run.accelerator.scaler is not None
        for entry in entries:
            finite = math.isfinite(entry["loss"]) and (scaled or math.isfinite(entry["grad_norm"]))
            self.not_finite = [] if finite else [*self.not_finite, entry["step"]]
            if len(self.not_finite) == MOST_NOT_FINITE:
                break
        if len(self.not_finite) == MOST_NOT_FINITE or self.run.config.max_train_steps in self.not_finite:
            first, rate = self.not_finite[0], self.run.config.learning_rate
            raise Diverged(
                f"--learning_rate: {rate:g}, or a row of update {first}, makes training diverge: loss or gradient are"
                f" not finite from there on ({self.run.describe_update(first)}); lower it, or train with bf16, and go"
                " on with --resume_from_checkpoint latest"
            )

    def is_finite(self) -> bool:
        """Whether the last update seen was a sound one, and its weights worth keeping."""
        return not self.not_finite


def _keep_lines_until(path: Path, step: int) -> None:
    """Drop the lines after the checkpoint that is resumed from."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:  # the last line of a killed run
            continue
    with written_whole(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")


def write_skipped(run, gather: bool = True) -> None:
    """Write the list of what was left out so far, before a resumed run's start too. Called by all processes, unless
    `gather` is off, since each of them sees other rows."""
    if gather:
        for bad in gather_object([run.triples.bad]):
            run.triples.bad |= bad
    path = Path(run.config.output_dir) / SKIPPED_FILE
    if not run.accelerator.is_main_process or not (run.triples.skipped() or path.exists()):
        return
    earlier = {}
    for line in path.read_text(encoding="utf-8").splitlines() if run.first_step and path.exists() else []:
        with contextlib.suppress(ValueError, TypeError, KeyError):
            entry = json.loads(line)
            earlier[entry["row"]] = entry["reason"]
    bad = earlier | run.triples.bad
    entries = run.triples.left_out + [{"row": row, "reason": bad[row]} for row in sorted(bad)]
    write_json_lines(path, entries)


# ---- trackers


def start_trackers(accelerator, config) -> None:
    """Start the trackers asked for, on the main process. Without a W&B account the run is recorded offline."""
    names = trackers(config)
    if not names or not accelerator.is_main_process:
        return
    _hide_token(config.hub_token)
    init_kwargs = {}
    if "wandb" in names:
        if "WANDB_MODE" not in os.environ and not _has_wandb_account():
            os.environ["WANDB_MODE"] = "offline"
            logger.warning("no W&B account on this machine: recording offline, `wandb sync` uploads it later")
        init_kwargs["wandb"] = {"dir": config.output_dir}
    # TensorBoard takes no None among its hyper-parameters.
    flags = {name: str(value) if value is None else value for name, value in resolved(config).items()}
    accelerator.init_trackers(PROJECT_NAME, config=flags, init_kwargs=init_kwargs)


def _hide_token(token: str | None) -> None:
    """W&B records the command line; a token given as a flag must not be on it."""
    if token:
        sys.argv = [word.replace(token, "***") for word in sys.argv]


def _has_wandb_account() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def log_images(accelerator, original: Image.Image, edited: list[Image.Image], prompt: str, step: int) -> None:
    """A validation's pictures: a table row each in W&B, an image grid in TensorBoard."""
    for tracker in accelerator.trackers:
        if tracker.name == "wandb":
            import wandb

            table = wandb.Table(columns=["original_image", "edited_image", "edit_prompt"])
            for image in edited:
                table.add_data(wandb.Image(original), wandb.Image(image), prompt)
            tracker.log({"validation": table}, step=step)
        elif tracker.name == "tensorboard":
            pictures = np.stack([np.asarray(image.resize(edited[0].size)) for image in (original, *edited)])
            tracker.writer.add_images("validation", pictures, step, dataformats="NHWC")


def log_sheet(accelerator, sheet: Image.Image, step: int) -> None:
    """The sheet of held-out edits, as one picture."""
    for tracker in accelerator.trackers:
        if tracker.name == "wandb":
            import wandb

            tracker.log({"held_out": wandb.Image(sheet)}, step=step)
        elif tracker.name == "tensorboard":
            tracker.writer.add_image("held_out", np.asarray(sheet), step, dataformats="HWC")
