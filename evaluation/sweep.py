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
import hashlib
import itertools
import json
import math
import statistics
import time
from collections import defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from instruct_pix2pix import editing
from instruct_pix2pix.cli import MemoryShortage, Parser, RowError, UserError, guidance, run, warn, whole_number
from instruct_pix2pix.data.sources import add_source_flags, source_of
from instruct_pix2pix.edit_folder import make_batches, model_fingerprint, noise_seed
from instruct_pix2pix.evaluation.settings import SCHEDULERS, SETTINGS_FILE, Setting, scheduler_name
from instruct_pix2pix.files import check_folder, fingerprint, for_others, naming, write_json_lines, written_whole

if TYPE_CHECKING:
    from PIL import Image

USUAL = Setting(editing.NUM_INFERENCE_STEPS, editing.IMAGE_GUIDANCE_SCALE, editing.GUIDANCE_SCALE)


class Row(NamedTuple):
    task: str
    instruction: str
    image: "Image.Image"  # (W, H), as `target`
    target: "Image.Image"


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
    if args.test_split == args.split:
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


def read_rows(
    args: argparse.Namespace, split: str, most: int, known: dict[str, dict] | None = None
) -> tuple[list[Row], dict[str, dict]]:
    """The first `most` rows of each task, with `known` instructions of it instead of their own, where given; and all of
    each task's own instructions, as keys in their order."""
    from instruct_pix2pix.data.triples import load_triples, open_pair

    triples = load_triples(replace(source_of(args, "--dataset"), split=split))
    rows, wordings = defaultdict(list), defaultdict(dict)
    for index, task in zip(triples.indices.tolist(), triples.tasks(), strict=True):
        if index in triples.bad:
            continue
        try:
            choice = triples.instructions(index)
            wordings[task] |= dict.fromkeys(choice)
            if len(rows[task]) < most:
                if known is not None and not (choice := list(known.get(task, ()))):
                    raise UserError(f"--wordings_from: {args.wordings_from} has no instruction for the task {task}")
                pair = (editing.fit_image(image, args.resolution, 1) for image in open_pair(triples, index)[1:])
                rows[task].append(Row(task, choice[index % len(choice)], *pair))
        except RowError as error:
            if args.on_bad_row == "error":
                raise
            triples.leave_out([(error.row, error.reason)])
    if most and not any(rows.values()):
        raise UserError(f"{triples.source}: none of {len(triples)} rows of {split} can be used; name another --split")
    return [row for task in rows.values() for row in task], wordings


def read_split(args: argparse.Namespace, known: dict[str, dict] | None) -> tuple[str, list[Row], dict[str, dict]]:
    """--split with what `read_rows` gives, or in place of a validation split that is not there, test or train."""
    others = ["test", "train"] if args.split == "validation" else []
    for split, other in itertools.pairwise([args.split, *(name for name in others if name != args.test_split), None]):
        try:
            return split, *read_rows(args, split, args.images_per_task, known)
        except RowError:
            raise
        except UserError as error:
            if other is None:
                raise
            warn(f"{error}; --split {other} is tried")


def scores(edited: "Image.Image", row: Row) -> dict[str, float]:
    """How close an edit is to its target, and to its input: the two axes of the trade-off. Similarities of CLIP, as in
    the paper's figure, belong here, with their names in TRADE_OFF."""
    import numpy as np

    from instruct_pix2pix.evaluation.metrics import psnr

    image, target, edited = map(np.asarray, (row.image, row.target, edited))
    return {"psnr": round(psnr(edited, target), 4), "psnr_to_input": round(psnr(edited, image), 4)}


TRADE_OFF = {"psnr": "PSNR to the target in dB: follows", "psnr_to_input": "PSNR to the input in dB: keeps"}


def append(path: Path, records: list[dict]) -> None:
    with naming(path), path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(record) + "\n" for record in records))


def measure(pipeline, rows: list[Row], settings: list[Setting], path: Path, args) -> dict[Setting, list[dict]]:
    """The results of every setting, a list in the rows' order, each of them a line of `path`; what is there already is
    not made again. {"psnr": None} where the model's output was not a picture."""
    import torch
    from tqdm.auto import tqdm

    digests = [hashlib.sha256(row.image.tobytes() + row.target.tobytes()).hexdigest() for row in rows]
    seeds = [noise_seed(args.seed, hashlib.sha256(row.image.tobytes()).hexdigest()) for row in rows]
    instructions = [row.instruction for row in rows]
    sweep = fingerprint([model_fingerprint(args.model), args.seed, instructions, digests])
    multiple = editing.size_multiple(pipeline)
    batches = make_batches({number: row.image.size for number, row in enumerate(rows)}, multiple, args.batch_size)
    done = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
            done[Setting(*(record[name] for name in Setting._fields)), record["row"]] = record
        except ValueError:  # cut short by a kill
            continue
        if record["sweep"] != sweep:
            raise UserError(f"--output_dir: {path} is of another model, dataset or seed; name another folder")
    # Batches go through the model whole, as without a kill: in other company their last bits would differ.
    pieces = [(setting, batch) for setting in dict.fromkeys([*settings, *(s for s, _ in done)]) for batch in batches]
    whole = {(s, n) for s, batch in pieces if all((s, n) in done for n in batch) for n in batch}
    done = {key: record for key, record in done.items() if key in whole}
    write_json_lines(path, done.values())

    todo = [(setting, batch) for setting in settings for batch in batches if (setting, batch[0]) not in done]
    fitted = [editing.fit_image(row.image, 0, multiple) for row in rows]
    latents = {batch[0]: editing.encode_images(pipeline, [fitted[n] for n in batch]) for batch in batches}
    with tqdm(total=sum(s.steps * len(batch) for s, batch in todo), desc=path.stem, unit="step") as bar:
        for setting, batch in todo:
            bar.set_postfix_str(str(setting))
            texts, noise = ([values[n] for n in batch] for values in (instructions, seeds))
            started = time.perf_counter()
            try:
                edited = editing.edit_batch(pipeline, texts, latents[batch[0]], noise, **setting._asdict())
            except torch.OutOfMemoryError:
                raise MemoryShortage("--batch_size: too many images for the GPU's memory; lower it and go on") from None
            seconds = round((time.perf_counter() - started) / len(batch), 5)
            for n, image in zip(batch, edited, strict=True):
                row, values = rows[n], dict.fromkeys(TRADE_OFF)
                if not isinstance(image, str):
                    values = scores(editing.restore_image(image, row.image.size, 0), row)
                about = {"task": row.task, "instruction": row.instruction, "sweep": sweep}
                done[setting, n] = {"row": n} | setting._asdict() | values | about
            # No two runs take the same time: it has a file of its own.
            append(path.with_name("seconds.jsonl"), [setting._asdict() | {"seconds": seconds}])
            append(path, [done[setting, n] for n in batch])
            bar.update(setting.steps * len(batch))
    return {setting: [done[setting, n] for n in range(len(rows))] for setting in settings}


def mean(results: dict[Setting, list[dict]], setting: Setting, numbers: list[int], key: str = "psnr") -> float:
    """Over some of the rows; minus infinity where one of them became no picture."""
    values = [results[setting][n][key] for n in numbers]
    return -math.inf if None in values else statistics.fmean(values)


def members(rows: list[Row], task: str) -> list[int]:
    return [n for n, row in enumerate(rows) if task in ("all", row.task)]


def figures(results: dict[Setting, list[dict]], rows: list[Row], task: str, setting: Setting) -> dict:
    """What a setting is worth on the rows of a task, beside the usual one and the input itself."""
    numbers = members(rows, task)
    psnr, usual = (mean(results, s, numbers) for s in (setting, USUAL))
    unedited = statistics.fmean(scores(rows[n].image, rows[n])["psnr"] for n in numbers)
    values = {"psnr": psnr, "over_usual": psnr - usual, "over_input": psnr - unedited}
    return {"images": len(numbers)} | {key: round(value, 2) for key, value in values.items()}


def print_table(found: dict, key: str, split: str) -> None:
    print(f"\nsplit {split:30}images  setting{'':21}PSNR  over {USUAL}  over the input")
    for task, entry in {"all": found["all"], **found["tasks"]}.items():
        if values := entry.get(key):
            setting = Setting(*(entry[name] for name in Setting._fields))
            over = f"{values['over_usual']:+18.2f}{values['over_input']:+16.2f}"
            print(f"{task[:34]:34}{values['images']:8}  {setting!s:26}{values['psnr']:6.2f}{over}")


def print_few_steps(results: dict[Setting, list[dict]], rows: list[Row], best: Setting) -> None:
    """What fewer steps cost by each scheduler, each at its best scales."""
    means = {setting: mean(results, setting, members(rows, "all")) for setting in results}
    names = list(dict.fromkeys(setting.scheduler for setting in results))
    print(f"\ndB against {best}, each at its best scales\nsteps" + "".join(f"{name or 'own':>16}" for name in names))
    for steps in sorted({setting.steps for setting in results}):
        alike = [[means[s] for s in means if (s.steps, s.scheduler) == (steps, name)] for name in names]
        cells = [f"{max(values) - means[best]:+16.2f}" if values else f"{'':16}" for values in alike]
        print(f"{steps:5}" + "".join(cells))


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


def plot_all(results: dict[Setting, list[dict]], rows: list[Row], best: Setting, folder: Path) -> None:
    numbers, curves, costs, times = members(rows, "all"), defaultdict(list), defaultdict(list), defaultdict(list)
    most = max(setting.steps for setting in results if setting.scheduler == best.scheduler)
    for line in (folder / "seconds.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        times[Setting(*(record[name] for name in Setting._fields))].append(record["seconds"])
    for setting in sorted(results, key=lambda setting: setting[:3]):
        point = [mean(results, setting, numbers, key) for key in TRADE_OFF]
        if math.isfinite(min(point)):
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
    import datasets
    import diffusers
    import transformers

    from instruct_pix2pix import publishing

    datasets.disable_progress_bars()  # one bar at a time, ours
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    known = read_rows(args, args.wordings_from, 0)[1] if args.wordings_from else None
    split, rows, wordings = read_split(args, known)
    held_out, others = [], {}
    if args.test_split:
        held_out, others = read_rows(args, args.test_split, args.images_per_task, known)
    pipeline = editing.load_pipeline(args.model, "--model", safety_checker=None)
    output_dir.mkdir(parents=True, exist_ok=True)
    settings = grid(args, type(pipeline.scheduler).__name__)
    print(f"{len(settings)} settings, {len(rows)} images of {split}")
    results = measure(pipeline, rows, settings, output_dir / "results.jsonl", args)
    tasks = dict.fromkeys(["all", *(row.task for row in rows)])
    best, entries = {}, {}
    for task in tasks:
        ranked = [(mean(results, setting, members(rows, task)), -setting.steps, setting) for setting in settings]
        psnr, _, best[task] = max(ranked, key=lambda entry: entry[:2])  # among equals the fewest steps
        if not math.isfinite(psnr):
            raise UserError(
                f"--model: {args.model} gives no pictures; train with a lower --learning_rate, or with bf16"
            )
        entries[task] = best[task]._asdict() | {"chosen_on": figures(results, rows, task, best[task])}
        if task != "all":
            entries[task]["instructions"] = list(wordings[task] | others.get(task, {}) | (known or {}).get(task, {}))
    if held_out:
        chosen = list(dict.fromkeys([USUAL, *best.values()]))
        checked = measure(pipeline, held_out, chosen, output_dir / "held_out.jsonl", args)
        for task in filter(partial(members, held_out), tasks):
            entries[task]["held_out"] = figures(checked, held_out, task, best[task])
    found = {"all": entries.pop("all"), "tasks": entries, "metric": "psnr"}
    found |= {"dataset": for_others(source_of(args, "--dataset").name)}
    found |= {
        "split": split,
        "images": len(rows),
        "held_out_split": args.test_split,
        "wordings_from": args.wordings_from,
    }
    found |= {
        "resolution": args.resolution,
        "seed": args.seed,
        "device": pipeline.device.type,
        "dtype": str(pipeline.dtype).removeprefix("torch."),
    }
    publishing.recommend(folder, found)
    plot_all(results, rows, best["all"], output_dir)
    print_table(found, "chosen_on", split)
    print_few_steps(results, rows, best["all"])
    if held_out:
        print_table(found, "held_out", f"{args.test_split} (not chosen on)")
    print(f"\n{folder / SETTINGS_FILE}, {output_dir}/trade_off.png and {output_dir}/seconds.png written")


if __name__ == "__main__":
    run(main)
