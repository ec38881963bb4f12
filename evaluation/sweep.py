#!/usr/bin/env python
"""Find the guidance, steps and scheduler that a model edits best with, for each of its tasks.

    python evaluation/sweep.py --model MODEL --dataset DATASET --test_split test --output_dir outputs/sweep

Edits images of --split with every combination and keeps, per task and over all, the setting of the highest mean PSNR to
the targets: in MODEL/recommended_settings.json and in MODEL's card. edit_images.py and the other inference scripts then
edit by it, each instruction by its task's; flags win. What a setting is worth is measured on images that it was not
chosen on: --test_split.

results.jsonl holds a line for each setting and image; a sweep that was stopped goes on there. trade_off.png is the
figure of InstructPix2Pix (how much is edited against how much is kept), seconds.png shows what steps cost and give.
"""

import argparse
import itertools
import json
import math
import statistics
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from instruct_pix2pix import editing
from instruct_pix2pix.cli import (
    MemoryShortage,
    Parser,
    RowError,
    UserError,
    guidance,
    one_progress_bar,
    run,
    warn,
    whole_number,
)
from instruct_pix2pix.data.sources import add_source_flags, same_split, source_of
from instruct_pix2pix.devices import is_out_of_memory
from instruct_pix2pix.edit_folder import make_batches
from instruct_pix2pix.editing import USUAL
from instruct_pix2pix.evaluation.settings import SCHEDULERS, SETTINGS_FILE, Setting, scheduler_name
from instruct_pix2pix.files import (
    check_folder,
    fingerprint,
    for_others,
    naming,
    read_json_lines,
    write_json_lines,
    written_whole,
)
from instruct_pix2pix.records import model_fingerprint, noise_seed

if TYPE_CHECKING:
    import numpy as np

# The two axes of the trade-off. Similarities of CLIP, as in the paper's figure, belong here and in `scores`.
TRADE_OFF = {"psnr": "PSNR to the target in dB: follows", "psnr_to_input": "PSNR to the input in dB: keeps"}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument_group("model and data").add_argument
    add("--model", required=True, help="Folder or Hub id of an InstructPix2Pix pipeline, or a checkpoint of one.")
    add("--dataset", help="Triples: anything that training takes as --dataset_name.")
    data = parser.add_argument_group("rows", "A dataset without --split is swept on test, or on train.")
    add_source_flags(data, split="validation")
    data.add_argument("--test_split", help="Measure the settings found on this split too, which has no say in them.")
    words = (
        "Take each task's instructions from this split: the builders' test splits have wordings that no model has seen."
    )
    data.add_argument("--wordings_from", metavar="SPLIT", help=words)
    data.add_argument("--images_per_task", type=whole_number(1), default=16, help="Images of each task, of each split.")
    data.add_argument("--resolution", type=whole_number(0), default=512, help="Scale short sides down to; 0: do not.")
    add = parser.add_argument_group("grid").add_argument
    add("--guidance_scales", type=guidance, nargs="+", default=[1, 1.5, 3, 7], metavar="G", help="Of the instruction.")
    add("--image_guidance_scales", type=guidance, nargs="+", default=[1, 1.5], metavar="G", help="Of the image.")
    add("--steps", type=whole_number(1), nargs="+", default=[1, 2, 4, 8, 20], metavar="N", help="Denoising steps.")
    names = f"own (the pipeline's), {', '.join(SCHEDULERS)}; all of them when left out."
    add("--schedulers", type=scheduler_name, nargs="+", metavar="NAME", help=names)
    add = parser.add_argument_group("running").add_argument
    add("--batch_size", type=whole_number(1), default=8, help="Images of one size edited at a time.")
    add("--seed", type=whole_number(0), default=0, help="Seed; every image has noise of its own, whatever the setting.")
    add("--output_dir", default="outputs/sweep", help="Where results and plots go.")
    args = parser.parse_args(argv)
    source_of(args, "--dataset")
    if args.test_split and same_split(args.test_split, args.split):
        raise UserError(f"--test_split: {args.split} is what settings are chosen on; name another split")
    return args


def grid(args: argparse.Namespace, own: str) -> list[Setting]:
    """The usual setting and every combination, once each, where `own` is the class of the pipeline's scheduler."""
    settings = [USUAL]
    schedulers = args.schedulers or (None, *SCHEDULERS)
    for scales in itertools.product(args.guidance_scales, args.image_guidance_scales):
        off = editing.guidance_warning(*scales)  # diffusers ignores such scales: all are as 1 and 1
        guidance_scale, image_guidance_scale = (1.0, 1.0) if off else map(float, scales)
        for steps, name in itertools.product(args.steps, schedulers):
            name = None if SCHEDULERS.get(name) == own else name
            settings.append(Setting(steps, image_guidance_scale, guidance_scale, name))
    return list(dict.fromkeys(settings))


def read_split(args: argparse.Namespace, splits: list[str], known: dict | None) -> tuple[str, list[dict], dict]:
    """The first of the splits that is there, its rows as edits.read_rows gives them, and each task's instructions."""
    from instruct_pix2pix.data.triples import load_triples
    from instruct_pix2pix.evaluation import edits, protocols

    for split, other in itertools.pairwise([*splits, None]):
        try:
            triples = load_triples(replace(source_of(args, "--dataset"), split=split))
        except UserError as error:
            if other is None or isinstance(error, RowError):
                raise
            warn(f"{error}; --split {other} is tried")
        else:
            rows = list(edits.read_rows(triples, args, protocols.PLAIN, known, args.images_per_task))
            return split, rows, edits.wordings_by_task(triples)


def scores(edited: "np.ndarray", row: dict) -> dict[str, float]:
    """How close an edit is to its target, and to its input."""
    from instruct_pix2pix.evaluation.metrics import psnr

    return {"psnr": round(psnr(edited, row["target"]), 4), "psnr_to_input": round(psnr(edited, row["input"]), 4)}


def append(path: Path, records: list[dict]) -> None:
    with naming(path), path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(record) + "\n" for record in records))


def measure(pipeline, rows: list[dict], settings: list[Setting], path: Path, args) -> dict[Setting, dict]:
    """The scores of each setting, {setting: {key of TRADE_OFF: (N,), in the rows' order}}, a line of `path` for a row;
    what is there already is not made again. They are not a number where the model's output was not a picture."""
    import numpy as np
    from PIL import Image
    from tqdm.auto import tqdm

    images = [Image.fromarray(row["input"]) for row in rows]
    sweep = [[row[name] for name in ("instruction", "input_sha256", "target_sha256")] for row in rows]
    sweep = fingerprint([model_fingerprint(args.model), args.seed, sweep])
    multiple = editing.size_multiple(pipeline)
    batches = make_batches({number: image.size for number, image in enumerate(images)}, multiple, args.batch_size)
    done = {(Setting.of(record), record["row"]): record for record in read_json_lines(path)}
    if any(record["sweep"] != sweep for record in done.values()):
        raise UserError(f"--output_dir: {path} is of another model, dataset or seed; name another folder")
    todo = [
        (setting, batch) for setting in settings for batch in batches if any((setting, n) not in done for n in batch)
    ]
    # Batches go through the model whole, as without a kill: in other company their last bits would differ.
    again = {(setting, n) for setting, batch in todo for n in batch}
    write_json_lines(path, [record for key, record in done.items() if key not in again])

    fitted = [editing.fit_image(image, 0, multiple) for image in images]
    latents = {batch[0]: editing.encode_images(pipeline, [fitted[n] for n in batch]) for batch in batches}
    with tqdm(total=sum(s.steps * len(batch) for s, batch in todo), desc=path.stem, unit="step") as bar:
        for setting, batch in todo:
            bar.set_postfix_str(str(setting))
            texts = [rows[n]["instruction"] for n in batch]
            seeds = [noise_seed(args.seed, rows[n]["input_sha256"]) for n in batch]
            started = time.perf_counter()
            try:
                edited = editing.edit_batch(pipeline, texts, latents[batch[0]], seeds, **setting._asdict())
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                raise MemoryShortage("--batch_size: too many images for the GPU's memory; lower it and go on") from None
            seconds = round((time.perf_counter() - started) / len(batch), 5)
            for n, image in zip(batch, edited, strict=True):
                row, values = rows[n], dict.fromkeys(TRADE_OFF)
                if not isinstance(image, str):
                    values = scores(np.asarray(editing.restore_image(image, images[n].size, 0)), row)
                about = {"task": row["task"], "instruction": row["instruction"], "sweep": sweep}
                done[setting, n] = {"row": n} | setting._asdict() | values | about
            # No two runs take the same time: it has a file of its own.
            append(path.with_name("seconds.jsonl"), [setting._asdict() | {"seconds": seconds}])
            append(path, [done[setting, n] for n in batch])
            bar.update(setting.steps * len(batch))

    def column(setting: Setting, key: str) -> np.ndarray:
        return np.array([done[setting, n][key] for n in range(len(rows))], float)  # None becomes nan

    return {setting: {key: column(setting, key) for key in TRADE_OFF} for setting in settings}


def figures(results: dict[Setting, dict], rows: list[dict], task: str, setting: Setting) -> dict:
    """What a setting is worth on the rows of a task that became pictures, also beside the usual one and the input
    itself: means over images with their intervals."""
    import numpy as np

    from instruct_pix2pix.evaluation.summary import interval

    chosen = members(rows, task)
    psnr, usual = results[setting]["psnr"][chosen], results[USUAL]["psnr"][chosen]
    unedited = np.array([scores(rows[n]["input"], rows[n])["psnr"] for n in chosen])
    values = {"psnr": psnr, "over_usual": psnr - usual, "over_input": psnr - unedited}
    return {"images": int(np.isfinite(psnr).sum())} | {key: interval(value) for key, value in values.items()}


def members(rows: list[dict], task: str) -> list[int]:
    return [n for n, row in enumerate(rows) if task in ("all", row["task"])]


def few_steps(means: dict[Setting, float], best: Setting) -> list[list[str]]:
    """What fewer steps cost by each scheduler, each at its best scales."""
    names = list(dict.fromkeys(setting.scheduler for setting in means))
    lines = [["steps", *(name or "own" for name in names)]]
    for steps in sorted({setting.steps for setting in means}):
        alike = [[means[s] for s in means if (s.steps, s.scheduler) == (steps, name)] for name in names]
        lines.append([str(steps), *(f"{max(values) - means[best]:+.2f}" if values else "" for values in alike)])
    return lines


def plot(path: Path, title: str, axes: tuple[str, str], lines: dict[str, list[tuple[float, float, str]]]) -> None:
    """Lines of (x, y, what stands beside the point)."""
    from matplotlib.figure import Figure

    figure = Figure((8, 6), layout="constrained")
    plane = figure.add_subplot(title=title, xlabel=axes[0], ylabel=axes[1])
    for label, points in lines.items():
        plane.plot([x for x, _, _ in points], [y for _, y, _ in points], "o-", label=label)
        for x, y, text in points:
            plane.annotate(text, (x, y), xytext=(3, 3), textcoords="offset points", fontsize=7)
    plane.legend()
    plane.grid(alpha=0.3)
    with written_whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def plot_all(results: dict[Setting, dict], best: Setting, folder: Path) -> None:
    curves, costs, times = defaultdict(list), defaultdict(list), defaultdict(list)
    most = max(setting.steps for setting in results if setting.scheduler == best.scheduler)
    for record in read_json_lines(folder / "seconds.jsonl"):
        times[Setting.of(record)].append(record["seconds"])
    for setting in sorted(results, key=lambda setting: setting[:3]):
        point = [float(results[setting][key].mean()) for key in TRADE_OFF]
        if not math.isfinite(sum(point)):  # not all became pictures
            continue
        if (setting.steps, setting.scheduler) == (most, best.scheduler):
            curves[f"guidance {setting.guidance_scale:g}"].append((*point, f"{setting.image_guidance_scale:g}"))
        if setting[1:3] == best[1:3]:
            seconds = statistics.median(times[setting])
            costs[setting.scheduler or "own"].append((seconds, point[0], str(setting.steps)))
    about = f"{most} steps, scheduler {best.scheduler or 'own'}; beside each point its image guidance"
    plot(folder / "trade_off.png", about, tuple(TRADE_OFF.values()), curves)
    about = f"guidance {best.guidance_scale:g} / {best.image_guidance_scale:g}; beside each point its steps"
    plot(folder / "seconds.png", about, ("seconds per image, without encoding it", TRADE_OFF["psnr"]), costs)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    output_dir, model = Path(args.output_dir), Path(args.model).expanduser()
    folder = model if (model / "model_index.json").is_file() else output_dir
    for flag, place in (("--output_dir", output_dir), ("--model", folder)):
        check_folder(flag, place)
    editing.check_model(args.model, "--model")
    from instruct_pix2pix import publishing
    from instruct_pix2pix.evaluation import edits
    from instruct_pix2pix.evaluation.summary import aligned, sweep_table

    one_progress_bar()
    known = edits.known_wordings(args)
    others = ("test", "train") if same_split(args.split, "validation") else ()
    others = [name for name in others if not args.test_split or not same_split(name, args.test_split)]
    split, rows, wordings = read_split(args, [args.split, *others], known)
    _, held_out, held_out_wordings = read_split(args, [args.test_split], known) if args.test_split else ("", [], {})
    pipeline = editing.load_pipeline(args.model, "--model", safety_checker=None)
    output_dir.mkdir(parents=True, exist_ok=True)
    settings = grid(args, type(pipeline.scheduler).__name__)
    print(f"{len(settings)} settings, {len(rows)} images of {split}")
    results = measure(pipeline, rows, settings, output_dir / "results.jsonl", args)
    tasks, best, means = dict.fromkeys(["all", *(row["task"] for row in rows)]), {}, {}
    for task in tasks:
        of_task = {setting: float(results[setting]["psnr"][members(rows, task)].mean()) for setting in settings}
        means[task] = {setting: mean for setting, mean in of_task.items() if math.isfinite(mean)}
        if not means[task]:
            raise UserError(
                f"--model: {args.model} gives no pictures; train with a lower --learning_rate, or with bf16"
            )
        best[task] = max(means[task], key=lambda setting: (means[task][setting], -setting.steps))
    checked = {}
    if held_out:
        chosen = list(dict.fromkeys([USUAL, *best.values()]))
        checked = measure(pipeline, held_out, chosen, output_dir / "held_out.jsonl", args)
    entries = {}
    for task in tasks:
        entry = entries[task] = best[task]._asdict() | {"chosen_on": figures(results, rows, task, best[task])}
        if members(held_out, task):
            entry["held_out"] = figures(checked, held_out, task, best[task])
        if task != "all":
            texts = wordings[task] | held_out_wordings.get(task, {}) | (known or {}).get(task, {})
            entry["instructions"] = list(texts)
    found = {
        "all": entries.pop("all"),
        "tasks": entries,
        "metric": "psnr",
        "dataset": for_others(source_of(args, "--dataset").name),
        "split": split,
        "images": len(rows),
        "held_out_split": args.test_split,
        "wordings_from": args.wordings_from,
        "resolution": args.resolution,
        "seed": args.seed,
        "device": pipeline.device.type,
        "dtype": str(pipeline.dtype).removeprefix("torch."),
    }
    publishing.recommend(folder, found)
    plot_all(results, best["all"], output_dir)
    tables = {f"split {split}": sweep_table(found, "chosen_on")}
    tables[f"dB against {best['all']}, each at its best scales"] = few_steps(means["all"], best["all"])
    if held_out:
        tables[f"split {args.test_split}, which nothing was chosen on"] = sweep_table(found, "held_out")
    for title, cells in tables.items():
        print("", title, *(line for block in aligned(cells) for line in block), sep="\n")
    print(f"\n{folder / SETTINGS_FILE}, {output_dir}/trade_off.png and {output_dir}/seconds.png written")


if __name__ == "__main__":
    run(main)
