"""From images to figures: every image's scores, their means with intervals, paired differences, the terminal's table.

Intervals are 95% percentile bootstrap intervals of the mean over images, drawn with a fixed seed.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from instruct_pix2pix.evaluation import perceptual
from instruct_pix2pix.evaluation.edits import IDENTITY
from instruct_pix2pix.evaluation.metrics import METRICS, pixel_scores
from instruct_pix2pix.images import read_image

if TYPE_CHECKING:
    from instruct_pix2pix.evaluation.edits import Sample
    from instruct_pix2pix.evaluation.protocols import Protocol

RESAMPLES = 2000
DIGITS = 6  # of a score in files
WIDTH = 120  # of the terminal's table


def score(
    output_dir: Path, samples: list[Sample], labels: list[str], protocol: Protocol, device: str
) -> tuple[list[dict], dict[str, str]]:
    """Measure the PNG files of every row: one {"name", "task", "model", "instruction", <metric>: value} for an image of
    a row; and the metrics that cannot be had, each with the reason."""
    from tqdm import tqdm

    measures, skipped = perceptual.load(device)
    rows = []
    folders = ["input" if label == IDENTITY else label for label in labels]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for sample in tqdm(samples, "Measuring", unit="image", delay=2, leave=False):

            def read(folder: str, name: str = f"{sample.name}.png") -> np.ndarray:
                return np.asarray(read_image(output_dir / folder / name))

            source, target, *images = pool.map(read, ["input", "target", *folders])
            found = pool.map(lambda image, target=target: pixel_scores(image, target, protocol), images)
            for label, image, scores in zip(labels, images, found, strict=True):
                if measures:
                    scores = scores | perceptual.scores(measures, image, target, source, sample.instruction)
                about = {"name": sample.name, "task": sample.task, "model": label, "instruction": sample.instruction}
                rows.append(about | {name: round(value, DIGITS) for name, value in scores.items()})
    return rows, skipped


def add_fid(summary: dict, output_dir: Path, samples: list[Sample], device: str) -> None:
    """Add to the means over all of every row its FID, which is of all images together and has no interval."""

    def images(folder: str):
        return (np.asarray(read_image(output_dir / folder / f"{sample.name}.png")) for sample in samples)

    for label, of in summary["models"].items():
        value = perceptual.fid(images("input" if label == IDENTITY else label), images("target"), device)
        of["all"]["fid"] = {"mean": round(value, DIGITS), "low": None, "high": None}


def interval(values: np.ndarray) -> dict:
    """{"mean", "low", "high"} of N values; no ends where there is one value."""
    from scipy.stats import bootstrap

    found = {"mean": float(values.mean()), "low": None, "high": None}
    if len(values) > 1:
        drawn = bootstrap((values,), np.mean, n_resamples=RESAMPLES, batch=100, method="percentile", rng=0)
        found |= {"low": float(drawn.confidence_interval.low), "high": float(drawn.confidence_interval.high)}
    return {key: value if value is None else round(value, DIGITS) for key, value in found.items()}


def summarize(rows: list[dict], models: list[str]) -> dict:
    """{"models": every row's means, over all and by task; "differences": of each model from the input, and of each
    later one from the first, image by image}. `models` are the labels of `rows` that are models."""
    metrics = [name for name in METRICS if any(name in row for row in rows)]
    labels, tasks = (list(dict.fromkeys(row[key] for row in rows)) for key in ("model", "task"))
    tasks = ["all", *sorted(task for task in tasks if task != "all")]
    values = {}  # (task, label, metric) -> one value an image, the same images for every label
    for row in rows:
        for task in {"all", row["task"]}:
            for metric in metrics:
                values.setdefault((task, row["model"], metric), []).append(row.get(metric, np.nan))

    def mean(task: str, metric: str, label: str, minus: str | None = None) -> dict[str, dict]:
        """{metric: interval}, empty where no image has this metric."""
        numbers = np.array(values[task, label, metric])
        if minus is not None:
            numbers = numbers - values[task, minus, metric]
        numbers = numbers[np.isfinite(numbers)]
        return {metric: interval(numbers)} if len(numbers) else {}

    summary = {"models": {}, "differences": []}
    for label in labels:
        of = {}
        for task in tasks:
            of[task] = {"images": sum(row["model"] == label and task in ("all", row["task"]) for row in rows)}
            for metric in metrics:
                of[task] |= mean(task, metric, label)
        summary["models"][label] = {"all": of.pop("all"), "tasks": of}
    for place, label in enumerate(models):
        for minus in dict.fromkeys((IDENTITY, models[0]) if place else (IDENTITY,)):
            for task in tasks if label != IDENTITY else ():
                for metric in metrics:
                    for found in mean(task, metric, label, minus).values():
                        about = {"of": label, "minus": minus, "task": task, "metric": metric}
                        summary["differences"].append(about | found)
    return summary


def table(summary: dict) -> list[str]:
    """The lines of the terminal's table, WIDTH columns wide: over all every metric, by task those that fit beside each
    other."""
    models, lines = summary["models"], []
    for task in ("all", *next(iter(models.values()))["tasks"]):
        groups = {label: of["all"] if task == "all" else of["tasks"][task] for label, of in models.items()}
        cells = {}  # (label, what is taken from it) -> {metric: text}
        for label, group in groups.items():
            cells[label, ""] = {name: _cell(name, group[name]) for name in METRICS if name in group}
            for entry in summary["differences"]:
                if (entry["of"], entry["task"]) == (label, task):
                    cell = {entry["metric"]: _cell(entry["metric"], entry, "+")}
                    cells[label, entry["minus"]] = cells.get((label, entry["minus"]), {}) | cell
        titles = {key: _short(f"  minus {key[1]}" if key[1] else key[0]) for key in cells}
        count = next(iter(groups.values()))["images"]
        heading = _short(f"{task}, {count} image{'s' * (count != 1)}")
        first = max(map(len, [heading, *titles.values()]))
        blocks, room = [], 0  # of metrics beside each other, each with the width of its column
        for name in METRICS:
            texts = [_title(name), *(cell[name] for cell in cells.values() if name in cell)]
            if len(texts) > 1:
                width = max(map(len, texts)) + 2
                room -= width
                if room < 0:
                    blocks.append({})
                    room = WIDTH - first - width
                blocks[-1][name] = width
        for block in blocks if task == "all" else blocks[:1]:
            lines += ["", heading.ljust(first) + "".join(_title(name).rjust(width) for name, width in block.items())]
            for key, title in titles.items():
                texts = (cells[key].get(name, "").rjust(width) for name, width in block.items())
                lines.append((title.ljust(first) + "".join(texts)).rstrip())
    return lines[1:]


def _short(title: str) -> str:
    return title if len(title) <= 34 else f"{title[:33]}…"


def _title(name: str) -> str:
    metric = METRICS[name]
    return f"{metric.label}{f' {metric.unit}' if metric.unit else ''} {'↑' if metric.better == 'higher' else '↓'}"


def _cell(name: str, found: dict, sign: str = "") -> str:
    digits = METRICS[name].decimals
    ends = "" if found["low"] is None else f" [{found['low']:{sign}.{digits}f}, {found['high']:{sign}.{digits}f}]"
    return f"{found['mean']:{sign}.{digits}f}{ends}"
