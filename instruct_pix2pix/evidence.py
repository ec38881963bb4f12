"""What a run shows of itself on its model card: its curve, its pictures, its evaluation, the code that trained it."""

import contextlib
import functools
import json
import logging
import math
import subprocess
from pathlib import Path

from huggingface_hub import EvalResult
from PIL import Image

from instruct_pix2pix.evaluation.metrics import METRICS
from instruct_pix2pix.files import code_block, for_others, read_json_lines

logger = logging.getLogger(__name__)

IMAGES = "images"  # the folder of pictures beside a card
LEAST_UPDATES = 10  # that make a curve
SIDE = 1600  # of a published picture, at most, in pixels
PICTURES = {  # the end of a picture's name -> what it shows
    "": "input, then edits of it that differ in their noise",
    "-held-out": "rows that were not trained on: input, edit, target",
}


@functools.cache
def code_commit() -> str | None:
    """The commit of this code, with -dirty where files differ from it; None where it is no clone."""
    root = Path(__file__).resolve().parents[1]
    command = ["git", "-C", root, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):  # no git, or one that does not trust the folder
        if (root / ".git").exists():
            return subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True).strip()
    return None


def validation_picture(run_folder: str | Path, step: int, ending: str) -> Path:
    """Where a run keeps a picture of a validation; `ending` is a key of PICTURES."""
    return Path(run_folder) / "validation" / f"step-{step:06d}{ending}.png"


def gather(run_folder: Path, step: int, folder: Path) -> tuple[list[str], list[EvalResult]]:
    """What a run has to show at update `step`: as Markdown, its pictures in `folder`/images, and for metadata."""
    shown, (figures, results) = [], _evaluation(run_folder, step)
    (folder / IMAGES).mkdir()
    trained, held_out = (_losses(run_folder / f"{kind}_log.jsonl", step) for kind in ("training", "validation"))
    if len(trained) >= LEAST_UPDATES:
        _plot(trained, held_out, folder / IMAGES / "loss.png")
        shown.append(f"![The loss]({IMAGES}/loss.png)")
    for ending, caption in PICTURES.items():
        of_updates = ((update, validation_picture(run_folder, update, ending)) for update in range(step, 0, -1))
        if newest := next((found for found in of_updates if found[1].is_file()), None):
            sheet, name = Image.open(newest[1]).convert("RGB"), f"{IMAGES}/validation{ending}.webp"
            sheet.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
            sheet.save(folder / name, quality=90)
            shown.append(f"After update {newest[0]}, {caption}.\n\n![{caption}]({name})")
    with contextlib.suppress(OSError):  # it holds something
        (folder / IMAGES).rmdir()
    return shown + figures, results


def _losses(file: Path, step: int) -> list[tuple[int, float]]:
    """(update, loss) up to `step`, where it is finite."""
    losses = [(line["step"], line.get("loss", math.nan)) for line in read_json_lines(file) if line["step"] <= step]
    return [(update, loss) for update, loss in losses if math.isfinite(loss)]


def _plot(trained: list[tuple[int, float]], held_out: list[tuple[int, float]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure((8, 4), layout="constrained")
    plane = figure.add_subplot(xlabel="update", ylabel="loss")
    updates, losses = zip(*trained, strict=True)
    plane.plot(updates, losses, alpha=0.3, label="training")
    width = -(-len(losses) // 50)
    means = [math.fsum(losses[end - width : end]) / width for end in range(width, len(losses) + 1)]
    plane.plot(updates[width - 1 :], means, label=f"mean of {width}")
    if held_out:
        plane.plot(*zip(*held_out, strict=True), "o-", label="held-out rows, nothing dropped")
    plane.legend()
    figure.savefig(path, format="png", dpi=100)


def _evaluation(run_folder: Path, step: int) -> tuple[list[str], list[EvalResult]]:
    """What evaluation/evaluate.py left in `run_folder`/evaluation, where it is of the pipeline of update `step`."""
    file = run_folder / "evaluation" / "metrics.json"
    if not file.is_file():
        return [], []
    from instruct_pix2pix.evaluation.summary import table

    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        settings = found["settings"]
        names, data, split = settings["models"], settings.get("dataset") or settings["original_dir"], settings["split"]
        here = [label for label, name in names.items() if name == run_folder.resolve().name]  # of a path its last part
        [means] = [found["models"][label] for label in here if found["models"][label]["training"]["steps"] == step]
        about = {"dataset_type": for_others(data), "dataset_name": Path(data).name, "dataset_split": split}
        results = [
            EvalResult("image-to-image", metric_type=name, metric_value=means["all"][name]["mean"], **about)
            for name in METRICS
            if name in means["all"]
        ]
        return [code_block("", "\n".join(table(found["models"])))], results
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        logger.warning("%s is not of this pipeline and does not go into its card; evaluate again", file)
        return [], []
