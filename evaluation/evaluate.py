#!/usr/bin/env python
"""Edit a dataset's held-out images with any number of models and measure how close each comes to the targets.

    python evaluation/evaluate.py --model MODEL [MODEL ...] --dataset DATASET --output_dir outputs/evaluation

Prints means with 95% bootstrap intervals, over all and by task, and differences image by image: of each model from the
input and from the first model. The models stand beside what explains them:
identity             the input itself against the target: what doing nothing scores
identity_through_vae the input after the autoencoder's round trip: what perfect copying scores
vae_ceiling          the target after that round trip: what no model over this autoencoder can pass

Writes report.html (a page to look at), metrics.json, per_image.csv, comparison.png (input | target | models) and every
image as OUTPUT_DIR/{input,target,ROW}/NAME.png, ImagenHub's layout, with dataset_lookup.json. The same command again
makes only what is missing; images that were made otherwise stop it (--overwrite makes them again). The noise of an
image depends on --seed and on its pixels alone, not on the batch, the order or the other images.
"""

import argparse
import csv
import io
import json
from importlib.metadata import version
from pathlib import Path

from instruct_pix2pix import editing
from instruct_pix2pix.cli import Parser, UserError, one_progress_bar, run, whole_number
from instruct_pix2pix.data.sources import add_source_flags, source_of
from instruct_pix2pix.evaluation.settings import SCHEDULERS, scheduler_name
from instruct_pix2pix.files import check_folder, for_others, write_bytes, write_json, write_json_lines, write_text

REPORT_BYTES = 10_000_000  # at most, of comparison.png above all; the images come to this
# What metrics.json and the page say about how the edits were made, besides the models; of paths their last part.
SETTINGS = (
    "dataset original_dir edited_dir split wordings_from protocol set resolution num_inference_steps"
    " image_guidance_scale guidance_scale scheduler recommended_settings seed"
).split()
LIBRARIES = ("torch", "diffusers", "transformers", "numpy", "scikit-image", "scipy")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    data = parser.add_argument_group("models and data")
    add = data.add_argument
    add(
        "--model",
        required=True,
        nargs="+",
        help="InstructPix2Pix pipelines: folders, Hub ids, checkpoints; also identity, opencv, whitebox (White-box"
        " CartoonGAN's weights on the Hub), and a file or SavedModel of its weights.",
    )
    add("--dataset", help="Triples: anything that training takes as --dataset_name.")
    add(
        "--wordings_from",
        metavar="SPLIT",
        help="Take each task's instructions from this split. The builders keep wordings for the test split that"
        " training never saw; with train, the same images are edited by the wordings it did see.",
    )
    add_source_flags(data, split="test")
    add("--max_samples", type=whole_number(1), help="Edit only the first so many rows.")
    add("--output_dir", default="outputs/evaluation", help="Where everything goes.")
    add("--overwrite", action="store_true", help="Make images again that were made otherwise.")
    measure = parser.add_argument_group("measuring")
    add = measure.add_argument
    add("--protocol", help="A published way of measuring, such as restormer; ours when left out. Needs --set.")
    add("--set", help="The test set of --protocol that --dataset holds, such as sidd.")
    add("--resolution", type=whole_number(0), default=0, help="A longer short side is scaled down to this; 0: none is.")
    edit = parser.add_argument_group("editing")
    add = edit.add_argument
    add("--num_inference_steps", type=whole_number(1), default=editing.USUAL.steps, help="Denoising steps.")
    editing.add_guidance_flags(edit)
    add(
        "--recommended_settings",
        action="store_true",
        help="Each model by the settings that a sweep found for it, task by task, instead of common ones.",
    )
    add(
        "--scheduler", type=scheduler_name, metavar="NAME", help=f"Sampler: own (the default), {', '.join(SCHEDULERS)}."
    )
    add("--batch_size", type=whole_number(1), default=8, help="Images of one size per pass.")
    add("--seed", type=whole_number(0), default=0, help="Seed; every image has a generator of its own.")
    args = parser.parse_args(argv)
    source_of(args, "--dataset")
    if args.set and not args.protocol:
        raise UserError("--protocol: missing; --set names one of its sets")
    if args.protocol and args.resolution:
        raise UserError(
            f"--resolution: {args.resolution} is given beside --protocol, which says what is cropped; drop one"
        )
    return args


def comparison(output_dir: Path, samples: list, models: list[str], cell: int = 192, count: int = 12):
    """A sheet of input | target | models, two triples a row, evenly chosen, each with its instruction below."""
    from PIL import Image

    from instruct_pix2pix.images import contact_sheet, read_image

    def picture(folder: str, name: str):
        image = read_image(output_dir / folder / f"{name}.png")
        scale = cell / max(image.size)
        return image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)

    count = min(len(samples), count)
    chosen = [samples[i * len(samples) // count] for i in range(count)]
    folders = ["input", "target", *models]
    entries = [([picture(folder, one.name) for folder in folders], [one.instruction]) for one in chosen]
    return contact_sheet(entries, cell, columns=2 if len(models) < 3 else 1, headings=folders)


def training_figures(model: str) -> dict:
    """What a training noted beside a model of its own."""
    summary = Path(model).expanduser() / "training_summary.json"
    trained = json.loads(summary.read_text(encoding="utf-8")) if summary.is_file() else {}
    return {key: trained[key] for key in ("steps", "train_seconds", "images_per_update") if key in trained}


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    output_dir = Path(args.output_dir)
    check_folder("--output_dir", output_dir, REPORT_BYTES, "the report")
    from instruct_pix2pix.evaluation import edits, protocols

    protocol = protocols.find(args.protocol, args.set) if args.protocol else protocols.PLAIN
    models = edits.find_models(args.model)
    from instruct_pix2pix.data.triples import load_triples
    from instruct_pix2pix.images import encode_image
    from instruct_pix2pix.records import finish_writes

    one_progress_bar()
    triples = load_triples(source_of(args, "--dataset"), max_rows=args.max_samples)
    output_dir.mkdir(parents=True, exist_ok=True)
    finish_writes(output_dir)
    samples = edits.keep_dataset(triples, args, protocol)
    kinds = edits.make_rows(models, samples, args)

    import torch

    from instruct_pix2pix.evaluation import report, summary

    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows, skipped_metrics = summary.score(output_dir, samples, kinds, protocol, device)
    labels = [model.label for model in models]
    seconds, environment = edits.how_made(output_dir, labels, samples)
    settings = {key: getattr(args, key) for key in SETTINGS if getattr(args, key) is not None}
    metrics = {
        "models": summary.summarize(rows, kinds),
        "protocol": protocol.lines(len(samples)),
        "settings": {"models": {model.label: for_others(model.name) for model in models}}
        | {key: for_others(value) if isinstance(value, str) else value for key, value in settings.items()},
        "environment": environment | {name: version(name) for name in LIBRARIES},
        "skipped_metrics": skipped_metrics,
        "rows_left_out": len(triples.skipped()),
        "edit_seconds_per_image": seconds,
    }
    if "fid" not in skipped_metrics and len(samples) > 1:
        summary.add_fid(metrics["models"], output_dir, samples, device)
    for model in models:
        metrics["models"][model.label]["training"] = training_figures(model.name)

    lookup = {f"{one.name}.png": {"task": one.task, "instruction": one.instruction} for one in samples}
    write_json(output_dir / "dataset_lookup.json", lookup)  # of ImagenHub, which shows it below the images
    sheet = comparison(output_dir, samples, labels)
    write_bytes(output_dir / "comparison.png", encode_image(sheet, ".png"))
    lines = io.StringIO()
    writer = csv.DictWriter(lines, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(output_dir / "per_image.csv", lines.getvalue())
    if triples.skipped():
        write_json_lines(output_dir / "skipped.jsonl", triples.skipped())
    write_json(output_dir / "metrics.json", metrics)
    report.write_report(output_dir, metrics, rows)
    print("", *summary.table(metrics["models"]), "", *metrics["protocol"], sep="\n")
    facts = environment | {"seconds an image": ", ".join(f"{label} {value:g}" for label, value in seconds.items())}
    print(*(f"{name}: {fact}" for name, fact in facts.items() if fact), sep="\n")
    if edits.CEILING not in kinds:
        print(f"without {edits.THROUGH_VAE} and {edits.CEILING}: no model has an autoencoder")
    for reason in dict.fromkeys(skipped_metrics.values()):
        print(f"without {', '.join(name for name in skipped_metrics if skipped_metrics[name] == reason)}: {reason}")
    print(f"\n{output_dir}/report.html, metrics.json, per_image.csv and comparison.png written")


if __name__ == "__main__":
    run(main)
