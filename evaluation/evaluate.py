#!/usr/bin/env python
"""Edit a dataset's held-out images and measure how close the results come to their targets.

    python evaluation/evaluate.py --model MODEL --dataset DATASET --split test --output_dir outputs/evaluation

Writes metrics.json and comparison.png (input | target | model). The model stands beside what explains it:
identity            the input itself against the target: what doing nothing scores
identity_through_vae the input after the autoencoder's round trip: what perfect copying scores
vae_ceiling         the target after that round trip: what no model over this autoencoder can pass
"""

import argparse
import hashlib
import json
import os
import sys
import time
from collections import defaultdict
from pathlib import Path

# Column names of the published datasets: source, instruction, target.
LAYOUTS = (
    ("original_image", "edit_prompt", "cartoonized_image"),
    ("input_image", "instruction", "ground_truth_image"),
    ("input_image", "edit_prompt", "edited_image"),
    ("original_image", "edit_prompt", "edited_image"),
)
KINDS = ("identity", "identity_through_vae", "vae_ceiling", "model")


def fail(message: str):
    print(f"evaluate.py: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        pass

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter, allow_abbrev=False)
    parser.error = lambda message: fail(f"{message} (see --help)")
    data = parser.add_argument_group("model and data")
    data.add_argument("--model", required=True, help="Folder or Hub id of an InstructPix2Pix pipeline.")
    data.add_argument("--dataset", required=True, help="Folder or Hub id of a dataset of triples.")
    data.add_argument("--split", default="test", help="Split to edit.")
    data.add_argument(
        "--wordings_from",
        metavar="SPLIT",
        help="Take each task's instructions from this split. The builders keep wordings for the test split that"
        " training never saw; with train, the same images are edited by the wordings it did see.",
    )
    for role in ("original_image", "edit_prompt", "edited_image"):
        data.add_argument(f"--{role}_column", help="As in training; columns of the usual names are found without it.")
    data.add_argument("--max_samples", type=int, help="Edit only the first so many rows.")
    data.add_argument("--output_dir", default="outputs/evaluation", help="Where metrics.json and comparison.png go.")
    edit = parser.add_argument_group("editing")
    edit.add_argument("--resolution", type=int, default=256, help="Short side to this, then the square in the middle.")
    edit.add_argument("--num_inference_steps", type=int, default=20, help="Denoising steps.")
    edit.add_argument("--image_guidance_scale", type=float, default=1.5, help="How closely to keep to the input.")
    edit.add_argument("--guidance_scale", type=float, default=7.0, help="How closely to follow the instruction.")
    edit.add_argument("--batch_size", type=int, default=8, help="Images per pass.")
    edit.add_argument("--seed", type=int, default=0, help="Seed; every image has a generator of its own.")
    args = parser.parse_args(argv)
    for name in ("resolution", "num_inference_steps", "batch_size", "max_samples"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            fail(f"--{name}: {getattr(args, name)} is too small; give 1 or more")
    for name in ("model", "dataset"):
        value = getattr(args, name)
        if value.startswith((".", "/", "~")) and not Path(value).is_dir():
            fail(f"--{name}: {value} is not a folder")
    return args


def folder_cache(folder: Path) -> str:
    """Where `datasets` keeps its copy of a local folder: a place for this folder with these files.

    Where a card lists the data files, `datasets` 5 tells folders apart by their name and card alone: another folder,
    or the same one built anew, would be answered with the old rows.
    """
    import datasets

    files = sorted(path for path in folder.rglob("*") if path.is_file())
    state = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    digest = hashlib.sha256(repr(state).encode()).hexdigest()[:16]
    return os.path.join(datasets.config.HF_DATASETS_CACHE, f"folder-{digest}")


def find_columns(available: list[str], args) -> tuple[str, str, str]:
    """Source, instruction and target: the flags' columns, or those of a published dataset's layout."""
    given = {role: getattr(args, f"{role}_column") for role in ("original_image", "edit_prompt", "edited_image")}
    for role, name in given.items():
        if name is not None and name not in available:
            fail(f"--{role}_column: {name} is not a column; there are {', '.join(available)}")
    for layout in (*LAYOUTS, tuple(given.values())):
        columns = tuple(name or usual for name, usual in zip(given.values(), layout, strict=True))
        if set(columns) <= set(available):
            return columns
    fail(
        f"--dataset: {args.dataset} has the columns {', '.join(available)}; name source, instruction and target with"
        " --original_image_column, --edit_prompt_column and --edited_image_column"
    )


def aligned(source, target):
    """The source image as the target shows it, in the target's size: what training does, see geometry.py there.

    The published cartoons were scaled to a short side of at most 720 and lost what exceeds multiples of 8 at the right
    and the bottom; other sources are scaled. Raises ValueError where the aspect ratios differ by more than 2%.
    """
    import cv2
    import numpy as np
    from PIL import Image

    if source.size == target.size:
        return source
    width, height = source.size
    shrink = 720 / min(width, height)
    if shrink < 1:
        width, height = (720, int(720 * height / width)) if height > width else (int(720 * width / height), 720)
    cut = (width // 8 * 8, height // 8 * 8)
    if target.size == cut:
        pixels = np.asarray(source)
        if shrink < 1:
            pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
        return Image.fromarray(pixels[: cut[1], : cut[0]])
    ratio = source.width / source.height / (target.width / target.height)
    if max(ratio, 1 / ratio) > 1.02:
        raise ValueError(
            f"the source is {source.width}x{source.height} and the target {target.width}x{target.height}; a pair needs"
            " one aspect ratio (within 2%)"
        )
    return source.resize(target.size, Image.Resampling.BICUBIC)


def load_triples(args) -> list[dict]:
    """Rows as {"input": (R, R, 3) uint8, "target": the same, "instruction": str, "task": str}."""
    import datasets
    import numpy as np
    from PIL import Image, ImageOps

    datasets.disable_progress_bars()
    cache_dir = folder_cache(Path(args.dataset)) if Path(args.dataset).is_dir() else None

    def load(split):
        try:
            return datasets.load_dataset(args.dataset, split=split, cache_dir=cache_dir)
        except Exception as error:  # datasets raises a dozen kinds for what is wrong with a source
            fail(f"--dataset: {args.dataset} cannot be loaded: {' '.join(str(error).split())[:200]}")

    rows = load(args.split)
    columns = find_columns(rows.column_names, args)
    if len(rows) == 0:
        fail(f"--split: {args.split} of {args.dataset} is empty")
    if args.max_samples:
        rows = rows.select(range(min(args.max_samples, len(rows))))
    source, text, target = columns

    def task_of(row) -> str:
        return row.get("task") or "all"

    def wordings_of(row) -> list[str]:
        return row[text] if isinstance(row[text], list) else [row[text]]

    wordings = {}
    if args.wordings_from:
        others = load(args.wordings_from)
        for row in others.select_columns([name for name in (text, "task") if name in others.column_names]):
            wordings.setdefault(task_of(row), {}).update(dict.fromkeys(wordings_of(row)))

    def square(image) -> np.ndarray:
        scale = args.resolution / min(image.size)
        size = [max(args.resolution, round(side * scale)) for side in image.size]
        if image.size != tuple(size):
            image = image.resize(size, 3)  # bicubic, as in training
        left, top = ((side - args.resolution) // 2 for side in size)
        return np.asarray(image.crop((left, top, left + args.resolution, top + args.resolution)))

    triples = []
    for index, row in enumerate(rows):
        if args.wordings_from and task_of(row) not in wordings:
            fail(f"--wordings_from: {args.wordings_from} has no instruction for the task {task_of(row)}")
        choice = list(wordings[task_of(row)]) if wordings else wordings_of(row)
        if not choice or not all(isinstance(wording, str) for wording in choice):
            fail(f"--dataset: row {index} of {args.dataset}: column {text} holds {row[text]!r}, not an instruction")
        for column in (source, target):
            if not isinstance(row[column], Image.Image):
                fail(f"--dataset: row {index} of {args.dataset}: column {column} holds no image")
        images = [ImageOps.exif_transpose(row[column]).convert("RGB") for column in (source, target)]
        try:
            images[0] = aligned(*images)
        except ValueError as error:
            fail(f"--dataset: row {index} of {args.dataset}: {error}")
        triples.append(
            {
                "input": square(images[0]),
                "target": square(images[1]),
                "instruction": choice[index % len(choice)],
                "task": task_of(row),
            }
        )
    return triples


def edit(pipeline, triples: list[dict], args) -> None:
    """Add "model", "identity_through_vae" and "vae_ceiling" to every triple, uint8 arrays like the rest."""
    import numpy as np
    import torch
    from tqdm.auto import tqdm

    def to_tensor(images):
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
        return pixels.to(pipeline.device, pipeline.vae.dtype)

    @torch.no_grad()
    def through_vae(images):
        decoded = pipeline.vae.decode(pipeline.vae.encode(to_tensor(images)).latent_dist.mode()).sample
        return ((decoded.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()

    progress = tqdm(total=len(triples), desc="Editing", unit="image")
    for start in range(0, len(triples), args.batch_size):
        batch = triples[start : start + args.batch_size]
        inputs = [triple["input"] for triple in batch]
        edited = pipeline(
            [triple["instruction"] for triple in batch],
            image=(to_tensor(inputs) + 1) / 2,
            num_inference_steps=args.num_inference_steps,
            image_guidance_scale=args.image_guidance_scale,
            guidance_scale=args.guidance_scale,
            generator=[torch.Generator().manual_seed(args.seed + start + i) for i in range(len(batch))],
            output_type="np",
        ).images
        copies, ceilings = through_vae(inputs), through_vae([triple["target"] for triple in batch])
        for triple, image, copy, ceiling in zip(batch, edited, copies, ceilings, strict=True):
            triple["model"] = (image * 255).round().astype(np.uint8)
            triple["identity_through_vae"], triple["vae_ceiling"] = copy, ceiling
        progress.update(len(batch))
    progress.close()


def measure(triples: list[dict]) -> dict:
    """Mean PSNR and SSIM of each kind against the target: over all images, and per task where there are several."""
    from instruct_pix2pix.metrics import psnr, ssim

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


def comparison(triples: list[dict], cell: int = 192, rows: int = 6):
    """A sheet of input | target | model, two triples a row, evenly chosen, each with its instruction below."""
    from PIL import Image, ImageDraw, ImageFont

    chosen = [triples[i * len(triples) // min(len(triples), 2 * rows)] for i in range(min(len(triples), 2 * rows))]
    font, gap, caption, head = ImageFont.load_default(14), 6, 26, 24
    block = 3 * (cell + gap)
    across = min(2, len(chosen))
    down = (len(chosen) + across - 1) // across
    sheet = Image.new("RGB", (across * block + (across - 1) * 18 + gap, head + down * (cell + caption)), "white")
    draw = ImageDraw.Draw(sheet)
    for index, triple in enumerate(chosen):
        left, top = gap + (index % across) * (block + 18), head + index // across * (cell + caption)
        for number, kind in enumerate(("input", "target", "model")):
            picture = Image.fromarray(triple[kind]).resize((cell, cell), Image.Resampling.LANCZOS)
            sheet.paste(picture, (left + number * (cell + gap), top))
            if index < across:
                draw.text((left + number * (cell + gap) + cell / 2, 4), kind, fill="black", font=font, anchor="ma")
        text = triple["instruction"]
        while draw.textlength(text, font=font) > block - gap:
            text = text[:-2].rstrip(" .…") + "…"
        draw.text((left, top + cell + 4), text, fill="#555555", font=font)
    return sheet


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read when transformers is imported
    triples = load_triples(args)
    import diffusers
    import torch
    import transformers
    from diffusers import StableDiffusionInstructPix2PixPipeline

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    try:
        pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(args.model, dtype=dtype, safety_checker=None)
    except (OSError, ValueError) as error:
        fail(f"--model: {args.model} cannot be loaded: {' '.join(str(error).split())[:200]}")
    pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)

    started = time.perf_counter()
    edit(pipeline, triples, args)
    metrics = measure(triples)
    metrics["edit_seconds_per_image"] = round((time.perf_counter() - started) / len(triples), 3)
    summary = Path(args.model) / "training_summary.json"
    if summary.is_file():
        trained = json.loads(summary.read_text(encoding="utf-8"))
        metrics |= {key: trained[key] for key in ("steps", "train_seconds", "images_per_update") if key in trained}
    metrics["settings"] = {
        key: getattr(args, key)
        for key in (
            "split",
            "wordings_from",
            "resolution",
            "num_inference_steps",
            "image_guidance_scale",
            "guidance_scale",
            "seed",
        )
    }

    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    comparison(triples).save(output_dir / "comparison.tmp.png")
    os.replace(output_dir / "comparison.tmp.png", output_dir / "comparison.png")
    (output_dir / "metrics.json.tmp").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    os.replace(output_dir / "metrics.json.tmp", output_dir / "metrics.json")
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
    main()
