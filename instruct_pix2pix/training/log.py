"""What a run says while it goes: numbers and pictures to trackers and JSON-lines files; and trouble."""

import contextlib
import json
import logging
import math
import os
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import psutil
import torch
from accelerate.utils import gather_object
from PIL import Image
from tqdm.auto import tqdm

from instruct_pix2pix.cli import UserError, one_progress_bar
from instruct_pix2pix.files import read_json_lines, write_json_lines, write_text
from instruct_pix2pix.training.config import resolved
from instruct_pix2pix.training.ema import ema_decay
from instruct_pix2pix.training.loss import BANDS, sums_by_band, sums_by_group
from instruct_pix2pix.training.options import as_list, trackers

logger = logging.getLogger(__name__)

LOG_FILE = "training_log.jsonl"
RUN_ID_FILE = "tracker_run_id.txt"  # by which a resumed run goes on in the W&B run that it was
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
    one_progress_bar()


class Lines:
    """A file of a JSON object for each step, whose numbers the trackers get too, their names after `prefix`. What a
    resumed run makes again, the lines after its checkpoint, is dropped first. For the main process."""

    def __init__(self, run, file: str, prefix: str = ""):
        self.accelerator, self.path, self.prefix = run.accelerator, Path(run.config.output_dir) / file, prefix
        kept = [entry for entry in read_json_lines(self.path) if entry["step"] <= run.first_step]
        self.last = kept[-1]["step"] if kept else 0  # step that there is a line of
        write_json_lines(self.path, kept)

    def write(self, entries: list[dict]) -> None:
        entries = [entry for entry in entries if entry["step"] > self.last]
        with open(self.path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in entries)
        for entry in entries:
            self.last = entry["step"]
            values = {self.prefix + name: value for name, value in entry.items() if name != "step"}
            for tracker in _listening(self.accelerator, self.last):
                tracker.log(values, step=self.last)


class Log:
    """Collects each update's numbers on the device and writes them every LOG_EVERY updates."""

    def __init__(self, run):
        self.run = run
        self.lines = Lines(run, LOG_FILE) if run.accelerator.is_main_process else None
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

    def add(self, step: int, loss, grad_norm, losses, timesteps, members, learning_rate: float) -> None:
        """Of an update: tensors on the device, scalars and the samples' (W,); on the host the dataset each is of."""
        known = {"learning_rate": learning_rate}
        if self.run.ema is not None:
            known["ema_decay"] = ema_decay(self.run.ema.updates - 1, self.run.ema.decay)
        self.pending.append((step, torch.stack([loss, grad_norm.float()]), losses, timesteps, members, known))
        self.last_step = step
        self.progress.update(1)

    def flush(self, gather: bool = True) -> None:
        """Wait for the device once, average the losses over processes, and write. Called by all processes, unless
        `gather` is off. Raises Diverged where the last MOST_NOT_FINITE updates, or the very last, are not finite."""
        if not self.pending:
            return
        accelerator = self.run.accelerator
        steps, numbers, losses, timesteps, members, known = zip(*self.pending, strict=True)
        losses, mixed = torch.stack(losses), len(self.run.triples.told())
        bands = sums_by_band(losses, torch.stack(timesteps), len(self.run.make_inputs.alphas_cumprod))
        numbers = torch.cat([torch.stack(numbers), bands.flatten(1)], dim=1)  # (updates, 2 + 2 * BANDS)
        if mixed:
            parts = sums_by_group(losses, torch.stack(members).to(losses.device), mixed)
            numbers = torch.cat([numbers, parts.flatten(1)], dim=1)  # beside, 2 for each dataset
        numbers = (accelerator.reduce(numbers, "mean") if gather else numbers).tolist()
        on_gpu = accelerator.device.type == "cuda"  # the most that was held of it; else the process's size
        memory = torch.cuda.max_memory_reserved() if on_gpu else psutil.Process().memory_info().rss
        seconds = time.perf_counter() - self.clock
        images_per_second = len(self.pending) * self.run.images_per_update / seconds
        entries = [
            {
                "step": step,
                "loss": loss,
                **_means("loss_q", range(BANDS), sums[: 2 * BANDS]),
                **_means("loss_dataset", range(1, mixed + 1), sums[2 * BANDS :]),
                "grad_norm": norm,
                **others,
                "images_per_second": float(f"{images_per_second:.4g}"),
                "memory_gib": round(memory / 2**30, 2),
            }
            for step, (loss, norm, *sums), others in zip(steps, numbers, known, strict=True)
        ]
        self.pending = []
        self.restart_clock()
        if accelerator.is_main_process:
            self.lines.write(entries)
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

    def seconds(self) -> float:
        """What the updates took, those before a resume too, without checkpoints and validation."""
        entries = read_json_lines(Path(self.run.config.output_dir) / LOG_FILE)
        rates = [entry["images_per_second"] for entry in entries]  # which older logs round, down to 0 too
        return sum(self.run.images_per_update / rate for rate in rates if rate > 0)

    def is_finite(self) -> bool:
        """Whether the last update seen was a sound one, and its weights worth keeping."""
        return not self.not_finite


def _means(prefix: str, numbers: range, sums: list[float]) -> dict[str, float]:
    """The mean loss of each group that there was a sample of, by its number; `sums` are loss.sums_by_group's."""
    half = len(numbers)
    groups = zip(numbers, sums[:half], sums[half:], strict=True)
    return {f"{prefix}{number}": total / count for number, total, count in groups if count}


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
    for entry in read_json_lines(path) if run.first_step else []:
        with contextlib.suppress(TypeError, KeyError):
            earlier[entry["row"]] = entry["reason"]
    bad = earlier | run.triples.bad
    entries = run.triples.left_out + [{"row": row, "reason": bad[row]} for row in sorted(bad)]
    write_json_lines(path, entries)


# ---- trackers


def start_trackers(run) -> None:
    """Start the trackers asked for, on the main process; a resumed run goes on in the runs of W&B and trackio that it
    was. Without a W&B account the run is recorded offline."""
    config, accelerator = run.config, run.accelerator
    names = trackers(config)
    if not names or not accelerator.is_main_process:
        return
    if config.hub_token:  # given as a flag, it must not be on the command line that W&B records
        sys.argv = [word.replace(config.hub_token, "***") for word in sys.argv]
    if "wandb" in names and "WANDB_MODE" not in os.environ and not _has_wandb_account():
        os.environ["WANDB_MODE"] = "offline"
        logger.warning("no W&B account on this machine: recording offline, `wandb sync` uploads it later")
    output_dir = Path(config.output_dir)
    if resumed := run.first_step > 0 and (output_dir / RUN_ID_FILE).exists():
        run_id = (output_dir / RUN_ID_FILE).read_text(encoding="utf-8").strip()
    else:
        write_text(output_dir / RUN_ID_FILE, run_id := os.urandom(4).hex())
    name = config.run_name or f"{output_dir.resolve().name}-{run_id}"
    init_kwargs = {
        "tensorboard": {"purge_step": run.first_step + 1},  # hides what is made again
        "wandb": {"dir": config.output_dir, "id": run_id, "name": name, "resume": "allow" if resumed else None}
        | {"entity": config.wandb_entity, "tags": as_list(config.tags)},
        "trackio": {"name": name, "resume": "allow" if resumed else "never", "embed": False}
        | {"auto_log_cpu": False, "auto_log_gpu": False},
    }
    # TensorBoard takes numbers and text among its hyper-parameters.
    flags = {n: v if isinstance(v, (int, float, str)) else str(v) for n, v in resolved(config).items()}
    accelerator.init_trackers(config.tracker_project_name, config=flags, init_kwargs=init_kwargs)
    told = max((entry["step"] for entry in read_json_lines(output_dir / LOG_FILE)), default=0) if resumed else 0
    for tracker in accelerator.trackers:
        # W&B takes no step twice, trackio shows it twice: what a killed run has told them stays.
        tracker.told_until = 0 if tracker.name == "tensorboard" else told


def _listening(accelerator, step: int) -> list:
    """The trackers that do not know of this step yet."""
    return [tracker for tracker in accelerator.trackers if step > tracker.told_until]


def _has_wandb_account() -> bool:
    from requests.utils import get_netrc_auth  # where `wandb login` writes it

    address = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    return bool(os.environ.get("WANDB_API_KEY") or get_netrc_auth(address))


def log_pictures(accelerator, name: str, sheet: Image.Image, rows: list[dict], step: int) -> None:
    """A validation's pictures: for W&B a table of `rows`, column -> image, text or number; for others the sheet."""
    for tracker in _listening(accelerator, step):
        if tracker.name == "wandb":
            import wandb

            data = [[wandb.Image(v) if isinstance(v, Image.Image) else v for v in row.values()] for row in rows]
            tracker.log({name: wandb.Table(columns=list(rows[0]), data=data)}, step=step)
        elif tracker.name == "trackio":
            import trackio

            tracker.log({name: trackio.Image(sheet)}, step=step)
        elif tracker.name == "tensorboard":
            tracker.writer.add_image(name, np.asarray(sheet), step, dataformats="HWC")
