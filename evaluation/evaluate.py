#!/usr/bin/env python
"""Edit a dataset's held-out images and measure how close the results come to their targets.

    python evaluation/evaluate.py --model MODEL --dataset DATASET --split test --output_dir outputs/evaluation

Writes metrics.json and comparison.png (input | target | model). The model stands beside what explains it:
identity            the input itself against the target: what doing nothing scores
identity_through_vae the input after the autoencoder's round trip: what perfect copying scores
vae_ceiling         the target after that round trip: what no model over this autoencoder can pass
"""

import argparse
import json
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from instruct_pix2pix import editing
from instruct_pix2pix.cli import Parser, RowError, UserError, run, whole_number
from instruct_pix2pix.data.sources import add_source_flags, source_of
from instruct_pix2pix.files import check_folder, write_bytes, write_json, write_json_lines

REPORT_BYTES = 10_000_000  # at most, of comparison.png above all
KINDS = ("identity", "identity_through_vae", "vae_ceiling", "model")
# What metrics.json says about how the edits were made.
SETTINGS = "split wordings_from resolution num_inference_steps image_guidance_scale guidance_scale seed".split()


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    data = parser.add_argument_group("model and data")
    add = data.add_argument
    add("--model", required=True, help="Folder or Hub id of an InstructPix2Pix pipeline, or a checkpoint of one.")
    add("--dataset", help="Triples: anything that training takes as --dataset_name.")
    add(
        "--wordings_from",
        metavar="SPLIT",
        help="Take each task's instructions from this split. The builders keep wordings for the test split that"
        " training never saw; with train, the same images are edited by the wordings it did see.",
    )
    add_source_flags(data, split="test")
    add("--max_samples", type=whole_number(1), help="Edit only the first so many rows.")
    add("--output_dir", default="outputs/evaluation", help="Where metrics.json and comparison.png go.")
    edit = parser.add_argument_group("editing")
    add = edit.add_argument
    add("--resolution", type=whole_number(1), default=256, help="Short side to this, then the square in the middle.")
    add("--num_inference_steps", type=whole_number(1), default=20, help="Denoising steps.")
    editing.add_guidance_flags(edit)
    add("--batch_size", type=whole_number(1), default=8, help="Images per pass.")
    add("--seed", type=whole_number(0), default=0, help="Seed; every image has a generator of its own.")
    args = parser.parse_args(argv)
    source_of(args, "--dataset")
    return args


def read_split(args) -> tuple[list[dict], list[dict]]:
    """Rows as {"input": (R, R, 3) uint8, "target": the same, "instruction": str, "task": str}, and what was left out.

    The pixels are those of a training with --center_crop and without --random_flip. Raises UserError.
    """
    import numpy as np

    from instruct_pix2pix.data.geometry import crop_pair
    from instruct_pix2pix.data.triples import load_triples, open_pair

    source = source_of(args, "--dataset")
    triples = load_triples(source, max_rows=args.max_samples)
    wordings = defaultdict(dict)  # of each task, in the order in which they come; a dict for want of an ordered set
    if args.wordings_from:
        others = load_triples(replace(source, split=args.wordings_from))
        for index, task in zip(others.indices.tolist(), others.tasks(), strict=True):
            if index not in others.bad:
                wordings[task].update(dict.fromkeys(others.instructions(index)))
    rows = []
    for index, task in zip(triples.indices.tolist(), triples.tasks(), strict=True):
        try:
            choice, *pair = open_pair(triples, index)
        except RowError as error:
            if args.on_bad_row == "error":
                raise
            triples.leave_out([(error.row, error.reason)])
            continue
        if args.wordings_from:
            choice = list(wordings[task])
            if not choice:
                raise UserError(f"--wordings_from: {args.wordings_from} has no instruction for the task {task}")
        unused = np.random.default_rng(0)  # nothing about this crop is drawn
        original, edited = crop_pair(*pair, args.resolution, "resize_crop", True, False, unused)
        rows.append({"input": original, "target": edited, "instruction": choice[index % len(choice)], "task": task})
    if not rows:
        raise UserError(f"{source}: none of {len(triples)} rows can be used; row {min(triples.bad.items())}")
    return rows, triples.skipped()


def edit(pipeline, triples: list[dict], args) -> None:
    """Add "model", "identity_through_vae" and "vae_ceiling" to every triple, uint8 arrays like the rest."""
    import numpy as np
    import torch
    from PIL import Image
    from tqdm.auto import tqdm

    from instruct_pix2pix.data.triples import to_unit_range

    multiple = editing.size_multiple(pipeline)

    @torch.no_grad()
    def through_vae(images):
        padded = np.stack([editing.fit_image(image, 0, multiple) for image in images])
        pixels = to_unit_range(torch.from_numpy(padded).permute(0, 3, 1, 2)).to(pipeline.device, pipeline.vae.dtype)
        decoded = pipeline.vae.decode(pipeline.vae.encode(pixels).latent_dist.mode()).sample.float()
        decoded = ((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        return decoded[:, : args.resolution, : args.resolution]

    progress = tqdm(total=len(triples), desc="Editing", unit="image")
    for start in range(0, len(triples), args.batch_size):
        batch = triples[start : start + args.batch_size]
        inputs, targets = ([Image.fromarray(triple[kind]) for triple in batch] for kind in ("input", "target"))
        edited = editing.edit(
            pipeline,
            [triple["instruction"] for triple in batch],
            inputs,
            [args.seed + start + i for i in range(len(batch))],
            steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            image_guidance_scale=args.image_guidance_scale,
        )
        for triple, image, copy, ceiling in zip(batch, edited, through_vae(inputs), through_vae(targets), strict=True):
            triple |= {"model": np.asarray(image), "identity_through_vae": copy, "vae_ceiling": ceiling}
        progress.update(len(batch))
    progress.close()


def measure(triples: list[dict]) -> dict:
    """Mean PSNR and SSIM of each kind against the target: over all images, and per task where there are several."""
    from instruct_pix2pix.evaluation.metrics import psnr, ssim

    groups = defaultdict(list)
    for triple in triples:
        scores = {}
        for kind in KINDS:
            image = triple["input"] if kind == "identity" else triple[kind]
            scores[f"psnr_{kind}_db"] = psnr(image, triple["target"])
            scores[f"ssim_{kind}"] = ssim(image, triple["target"])
        groups["all"].append(scores)
        if triple["task"] != "all":
            groups[triple["task"]].append(scores)
    means = {
        task: {"images": len(rows)} | {key: round(sum(r[key] for r in rows) / len(rows), 4) for key in rows[0]}
        for task, rows in groups.items()
    }
    overall = means.pop("all")
    return overall | ({"tasks": means} if means else {})


def comparison(triples: list[dict], cell: int = 192, count: int = 12):
    """A sheet of input | target | model, two triples a row, evenly chosen, each with its instruction below."""
    from PIL import Image

    from instruct_pix2pix.images import contact_sheet

    def picture(pixels):
        return Image.fromarray(pixels).resize((cell, cell), Image.Resampling.LANCZOS)

    count = min(len(triples), count)
    chosen = [triples[i * len(triples) // count] for i in range(count)]
    kinds = ("input", "target", "model")
    entries = [([picture(triple[kind]) for kind in kinds], [triple["instruction"]]) for triple in chosen]
    return contact_sheet(entries, cell, columns=2, headings=kinds)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    check_folder("--output_dir", args.output_dir, REPORT_BYTES, "the report")
    editing.check_model(args.model, "--model")
    import datasets
    import diffusers
    import transformers

    from instruct_pix2pix.images import encode_image

    datasets.disable_progress_bars()  # one bar at a time, ours
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    triples, skipped = read_split(args)
    pipeline = editing.load_pipeline(args.model, "--model", safety_checker=None)

    started = time.perf_counter()
    edit(pipeline, triples, args)
    metrics = measure(triples)
    metrics["edit_seconds_per_image"] = round((time.perf_counter() - started) / len(triples), 3)
    summary = Path(args.model) / "training_summary.json"
    if summary.is_file():
        trained = json.loads(summary.read_text(encoding="utf-8"))
        metrics |= {key: trained[key] for key in ("steps", "train_seconds", "images_per_update") if key in trained}
    metrics["rows_left_out"] = len(skipped)
    metrics["settings"] = {key: getattr(args, key) for key in SETTINGS}

    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_bytes(output_dir / "comparison.png", encode_image(comparison(triples), ".png"))
    write_json(output_dir / "metrics.json", metrics)
    if skipped:
        write_json_lines(output_dir / "skipped.jsonl", skipped)
    print_table(metrics)
    print(f"{output_dir}/comparison.png and {output_dir}/metrics.json written")


def print_table(metrics: dict) -> None:
    groups = {"all": metrics} | metrics.get("tasks", {})
    print(f"\n{'':24}" + "".join(f"{name:>22}" for name in groups))
    for kind in KINDS:
        cells = [f"{group[f'psnr_{kind}_db']:.2f} dB  {group[f'ssim_{kind}']:.3f}" for group in groups.values()]
        print(f"{kind.replace('_', ' '):24}" + "".join(f"{cell:>22}" for cell in cells))
    print()


if __name__ == "__main__":
    run(main, stopped="nothing was written; run it again")
