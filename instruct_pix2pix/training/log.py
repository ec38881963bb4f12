"""Numbers and pictures to TensorBoard and Weights & Biases, through accelerate; and a JSON-lines log for everybody."""

import json
import logging
import netrc
import os
import sys
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
from PIL import Image

from instruct_pix2pix.training.options import resolved, trackers

logger = logging.getLogger(__name__)

PROJECT_NAME = "instruct-pix2pix"
LOG_FILE = "training_log.jsonl"


def start_trackers(accelerator, args) -> None:
    """Start the trackers asked for, on the main process. Without a W&B account the run is recorded offline."""
    names = trackers(args)
    if not names or not accelerator.is_main_process:
        return
    _hide_token(args.hub_token)
    init_kwargs = {}
    if "wandb" in names:
        if "WANDB_MODE" not in os.environ and not _has_wandb_account():
            os.environ["WANDB_MODE"] = "offline"
            logger.warning("no W&B account on this machine: recording offline, `wandb sync` uploads it later")
        init_kwargs["wandb"] = {"dir": args.output_dir}
    # TensorBoard takes no None among its hyper-parameters.
    config = {name: str(value) if value is None else value for name, value in resolved(args).items()}
    accelerator.init_trackers(PROJECT_NAME, config=config, init_kwargs=init_kwargs)


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


class JsonLog:
    """`training_log.jsonl`: one line per update. Resuming drops the lines after the checkpoint's step."""

    def __init__(self, output_dir: Path, first_step: int):
        self.path = Path(output_dir) / LOG_FILE
        kept = []
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    if json.loads(line)["step"] <= first_step:
                        kept.append(line)
                except ValueError:  # the last line of a killed run
                    continue
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        os.replace(temporary, self.path)

    def write(self, entries: list[dict]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in entries)
