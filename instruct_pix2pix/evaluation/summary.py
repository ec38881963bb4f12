"""From images to figures: every image's scores, their means with intervals, paired differences, the terminal's table.

Intervals are 95% percentile bootstrap intervals of the mean over images, drawn with a fixed seed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from instruct_pix2pix.editing import USUAL
from instruct_pix2pix.evaluation import perceptual
from instruct_pix2pix.evaluation.edits import IDENTITY, MODEL
from instruct_pix2pix.evaluation.metrics import METRICS, pixel_scores
from instruct_pix2pix.evaluation.settings import Setting
from instruct_pix2pix.images import read_image

if TYPE_CHECKING:
    from instruct_pix2pix.evaluation.edits import Sample
    from instruct_pix2pix.evaluation.protocols import Protocol

RESAMPLES = 2000
DIGITS = 6  # of a score in files
WIDTH = 120  # of the terminal's table


def score(
    output_dir: Path, samples: list[Sample], labels: Iterable[str], protocol: Protocol, device: str
) -> tuple[list[dict], dict[str, str]]:
    """Measure the PNG files of every row: one {"name", "task", "model", "instruction", <metric>: value} for an image of
    a row; and the metrics that cannot be had, each with the reason."""
    from tqdm import tqdm

    measures, skipped = perceptual.load(device)
    rows = []
    folders = ["input" if label == IDENTITY else label for label in labels]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for sample in tqdm(samples, "Measuring", unit="image", delay=2, leave=False):
            read = partial(pixels, output_dir, sample)
            source, target, *images = pool.map(read, ["input", "target", *folders])
            found = pool.map(lambda image, target=target: pixel_scores(image, target, protocol), images)
            for label, image, scores in zip(labels, images, found, strict=True):
                if measures:
                    scores = scores | perceptual.scores(measures, image, target, source, sample.instruction)
                about = {"name": sample.name, "task": sample.task, "model": label, "instruction": sample.instruction}
                rows.append(about | {name: round(value, DIGITS) for name, value in scores.items()})
    return rows, skipped


def add_fid(models: dict[str, dict], output_dir: Path, samples: list[Sample], device: str) -> None:
    """Add to the means over all of every row its FID, which is of all images together and has no interval."""
    for label, of in models.items():
        folders = ("input" if label == IDENTITY else label, "target")
        edits, targets = (map(partial(pixels, output_dir, folder=folder), samples) for folder in folders)
        value = perceptual.fid(edits, targets, device)
        of["all"]["fid"] = {"mean": round(value, DIGITS), "low": None, "high": None}


def pixels(output_dir: Path, sample: Sample, folder: str) -> np.ndarray:
    """An image of an evaluation, uint8 (H, W, 3)."""
    return np.asarray(read_image(output_dir / folder / f"{sample.name}.png"))


def interval(values: np.ndarray) -> dict | None:
    """{"mean", "low", "high"} of those of N values that are finite; without ends of one, and None of none."""
    from scipy.stats import bootstrap

    values = values[np.isfinite(values)]
    if not len(values):
        return None
    found = {"mean": values.mean(), "low": None, "high": None}
    if len(values) > 1:
        drawn = bootstrap((values,), np.mean, n_resamples=RESAMPLES, batch=100, method="percentile", rng=0)
        found |= {"low": drawn.confidence_interval.low, "high": drawn.confidence_interval.high}
    return {key: value if value is None else round(float(value), DIGITS) for key, value in found.items()}


def summarize(rows: list[dict], kinds: dict[str, str]) -> dict[str, dict]:
    """{label: {"kind": its kind, "all": {"images", <metric>: interval}, "tasks": {task: the same}}}; a model also with
    "minus": {label: the same of the differences image by image} from the input, and from the first model.

    `kinds` are the labels of `rows` with their kinds, in the order of the tables."""
    metrics = [name for name in METRICS if any(name in row for row in rows)]
    of = {label: [row for row in rows if row["model"] == label] for label in kinds}  # the same images for each
    task_of = np.array([row["task"] for row in of[IDENTITY]])
    tasks = ["all", *sorted(set(task_of) - {"all"})]

    def means(label: str, minus: str | None = None) -> dict:
        found = {}
        for task in tasks:
            chosen = (task_of == task) | (task == "all")
            found[task] = {"images": int(chosen.sum())}
            for metric in metrics:
                numbers, *others = ([row.get(metric, np.nan) for row in of[side]] for side in (label, minus) if side)
                if mean := interval(np.subtract(numbers, *others or [0])[chosen]):
                    found[task][metric] = mean
        return {"all": found.pop("all"), "tasks": found}

    models = [label for label, kind in kinds.items() if kind == MODEL]
    summary = {label: {"kind": kind} | means(label) for label, kind in kinds.items()}
    for label in models:
        others = [IDENTITY, models[0]] if label != models[0] else [IDENTITY]
        summary[label]["minus"] = {minus: means(label, minus) for minus in others}
    return summary


def by_task(models: dict[str, dict]) -> dict[str, list[tuple[str, str | None, dict]]]:
    """The lines of a table of what `summarize` gives, over all and for each task where there are several: (label, what
    is taken from it or None, {"images", <metric>: interval})."""
    tasks, groups = models[IDENTITY]["tasks"], {}
    for task in ["all", *(tasks if len(tasks) > 1 else ())]:
        lines = groups[task] = []
        for label, of in models.items():
            for minus, means in {None: of, **of.get("minus", {})}.items():
                lines.append((label, minus, means["all"] if task == "all" else means["tasks"][task]))
    return groups


def table(models: dict[str, dict]) -> list[str]:
    """The terminal's lines of what `summarize` gives: over all every metric, by task those that fit into WIDTH."""
    lines = []
    for task, group in by_task(models).items():
        shown = [metric for metric in METRICS.values() if any(metric.name in found for _, _, found in group)]
        count = group[0][2]["images"]
        rows = [[f"{task}, {count} image{'s' * (count != 1)}", *(metric.title for metric in shown)]]
        for label, minus, found in group:
            cells = (cell(found.get(metric.name), metric.decimals, "+" if minus else "") for metric in shown)
            rows.append([f"  minus {minus}" if minus else label, *cells])
        for block in aligned(rows)[: None if task == "all" else 1]:
            lines += ["", *block]
    return lines[1:]


def sweep_table(found: dict, *keys: str) -> list[list[str]]:
    """The cells of what a sweep found, see settings.read_settings, heading first: of each task what it was measured on
    by the first of `keys` that it has."""
    rows = [["task", "images", "setting", "PSNR", f"over {USUAL}", "over the input"]]
    for task, entry in {"all": found["all"], **found["tasks"]}.items():
        for of in [entry[key] for key in keys if key in entry][:1]:
            cells = cell(of["psnr"], 2), cell(of["over_usual"], 2, "+"), cell(of["over_input"], 2, "+")
            rows.append([task, str(of["images"]), str(Setting.of(entry)), *cells])
    return rows


def aligned(rows: list[list[str]]) -> list[list[str]]:
    """A table's rows as lines, the first column to the left, in blocks of the columns that WIDTH has room for."""
    rows = [[first if len(first) <= 34 else f"{first[:33]}…", *others] for first, *others in rows]
    first, *widths = (max(map(len, column)) + 2 for column in zip(*rows, strict=True))
    blocks, room = [], 0
    for column, width in enumerate(widths, 1):
        if width > room:
            blocks.append([row[0].ljust(first) for row in rows])
            room = WIDTH - first
        blocks[-1] = [line + row[column].rjust(width) for line, row in zip(blocks[-1], rows, strict=True)]
        room -= width
    return [[line.rstrip() for line in block] for block in blocks]


def cell(found: dict | None, digits: int, sign: str = "") -> str:
    """An `interval` as text, empty where there is none."""
    ends = ("mean", "low", "high") if found else ()
    mean, *ends = [f"{found[end]:{sign}.{digits}f}" for end in ends if found[end] is not None] or [""]
    return f"{mean} [{', '.join(ends)}]" if ends else mean
