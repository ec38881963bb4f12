"""An evaluation's images as PNG files in ImagenHub's layout: OUTPUT_DIR/{input,target,<row of the table>}/<name>.png.

OUTPUT_DIR/edits.jsonl says how each was made (see records.py): a killed evaluation goes on, and images that were made
otherwise stop it. Images are opened when they are needed, however many there are. Nothing heavy is imported at the top.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from instruct_pix2pix import editing
from instruct_pix2pix.building.cartoonization import WHITEBOX, make_cartoonizer
from instruct_pix2pix.cli import RowError, UserError
from instruct_pix2pix.data.geometry import scale_pair
from instruct_pix2pix.data.sources import source_of
from instruct_pix2pix.edit_folder import Edit, edit_all, make_batches
from instruct_pix2pix.evaluation.settings import Setting
from instruct_pix2pix.images import encode_image, read_image
from instruct_pix2pix.records import is_finished, keep, model_fingerprint, own_record, read_records

if TYPE_CHECKING:
    from instruct_pix2pix.data.triples import Triples
    from instruct_pix2pix.evaluation.protocols import Protocol

# The rows that are no model: the input as it is, the input and the target after the autoencoder's round trip.
KINDS = IDENTITY, THROUGH_VAE, CEILING = "identity", "identity_through_vae", "vae_ceiling"
MODEL = "model"  # the kind of the others
FILES_AT_A_TIME = 32  # of the dataset, written together
WEIGHTS = (".npz", ".safetensors", ".tflite")  # of White-box CartoonGAN


@dataclass(frozen=True)
class Sample:
    """A row of the dataset, which lies as <name>.png in input/ and target/."""

    name: str
    task: str
    instruction: str
    size: tuple[int, int]  # width, height
    input_sha256: str  # of the pixels, as are the files' records
    target_sha256: str


@dataclass(frozen=True)
class Model:
    """What --model named: `label` is its row and folder; `cartoonize` and the pixels it takes at most are a
    cartoonizer's, and None is a pipeline's."""

    label: str
    name: str
    fingerprint: str
    cartoonize: Callable | None = None
    max_pixels: float = math.inf


# Models.


def is_cartoonizer(name: str) -> bool:
    return name in ("opencv", "whitebox") or name.endswith(WEIGHTS) or (Path(name) / "saved_model.pb").is_file()


def find_models(names: list[str]) -> list[Model]:
    """The models that --model names, each with a label of its own, without identity, which is always a row. Raises
    UserError for what is none, before any pipeline loads."""
    names = [name for name in names if name != IDENTITY]
    for name in names:
        if not is_cartoonizer(name):
            editing.check_model(name, "--model")
    found, taken = [], {"input", "target", *KINDS}
    for name in names:
        path = Path(name).expanduser()
        path = path.resolve() if path.exists() else path
        label = path.stem if path.is_file() else path.name
        if label.casefold() in taken:
            label = f"{path.parent.name}-{label}"
        while label.casefold() in taken:
            label += "-again"
        taken.add(label.casefold())
        if not is_cartoonizer(name):
            found.append(Model(label, name, model_fingerprint(name)))
            continue
        kind, weights = ("opencv", None) if name == "opencv" else ("whitebox", WHITEBOX if name == "whitebox" else name)
        flags = argparse.Namespace(
            cartoonizer=kind, cartoonizer_weights=weights, batch_size=1, device="auto", dtype="auto"
        )
        cartoonize, max_pixels, settings = make_cartoonizer(flags, "--model")
        fingerprint = " ".join(str(settings[key]) for key in ("cartoonizer", "weights", "dtype") if key in settings)
        found.append(Model(label, name, fingerprint, cartoonize, max_pixels))
    return found


def sampling(args, model: Model, tasks: Iterable[str]) -> dict[str, Setting]:
    """How a model edits each task's images: by the flags, or with --recommended_settings as a sweep of it found best.
    Raises UserError where nothing is recommended."""
    if not args.recommended_settings:
        common = Setting(args.num_inference_steps, args.image_guidance_scale, args.guidance_scale, args.scheduler)
        return dict.fromkeys(tasks, common)
    found = editing.recommended_settings(model.name)
    if found is None:
        raise UserError(f"--recommended_settings: {model.name} has none; find them with evaluation/sweep.py")
    best = {task: found["tasks"].get(task, found["all"]) for task in tasks}
    return {task: Setting.of(entry) for task, entry in best.items()}


# The dataset.


def wordings_by_task(triples: Triples) -> dict[str, dict[str, None]]:
    """All instructions of each task's rows, as keys in their order."""
    found = defaultdict(dict)
    for index, task in zip(triples.indices.tolist(), triples.tasks(), strict=True):
        with suppress(RowError):  # is said where the row is opened
            found[task] |= dict.fromkeys(() if index in triples.bad else triples.instructions(index))
    return found


def known_wordings(args) -> dict[str, dict[str, None]] | None:
    """Those of the split --wordings_from; None without it."""
    from instruct_pix2pix.data.triples import load_triples

    if args.wordings_from:
        return wordings_by_task(load_triples(replace(source_of(args, "--dataset"), split=args.wordings_from)))


def read_rows(
    triples: Triples, args, protocol: Protocol, known: dict | None = None, images_per_task: float = math.inf
) -> Iterator[dict]:
    """{"name", "task", "instruction", "input", "target"} of rows, the first ones of each task; the images (H, W, 3)
    uint8, read by and by, with their hashes as "input_sha256" and "target_sha256".

    The pixels are training's, whole. Which of several wordings edits an image depends on its pixels, not on its place;
    they are the row's own, or its task's of those that are `known`. Rows that cannot be used are noted in `triples`, or
    raise RowError, as --on_bad_row says. Raises UserError, also where no row is left.
    """
    import numpy as np

    from instruct_pix2pix.data.triples import open_pair

    counts = Counter()
    for index, task in zip(triples.indices.tolist(), triples.tasks(), strict=True):
        if counts[task] >= images_per_task:
            continue
        try:
            choice, *pair = open_pair(triples, index)
        except RowError as error:
            if args.on_bad_row == "error":
                raise
            triples.leave_out([(error.row, error.reason)])
            continue
        if known is not None and not (choice := sorted(known.get(task, ()))):
            raise UserError(f"--wordings_from: {args.wordings_from} has no instruction for the task {task}")
        pair = protocol.prepare(*map(np.asarray, scale_pair(*pair, args.resolution)))
        row = dict(zip(("input", "target"), pair, strict=True))
        row |= {f"{side}_sha256": hashlib.sha256(pixels.tobytes()).hexdigest() for side, pixels in row.items()}
        counts[task] += 1
        instruction = choice[int(row["input_sha256"], 16) % len(choice)]
        yield {"name": f"{index:06d}", "task": task, "instruction": instruction} | row
    if not counts:
        raise UserError(f"{triples.source}: none of {len(triples)} rows can be used; row {min(triples.bad.items())}")


def keep_dataset(triples: Triples, args, protocol: Protocol) -> list[Sample]:
    """Write what `read_rows` gives to input/ and target/, if it is not there. Raises UserError where other pixels are
    there."""
    from PIL import Image
    from tqdm import tqdm

    output_dir, records = Path(args.output_dir), read_records(Path(args.output_dir))
    samples, files = [], []
    rows = read_rows(triples, args, protocol, known_wordings(args))
    for row in tqdm(rows, "Reading", len(triples), unit="row", delay=2, leave=False):
        for side in ("input", "target"):
            output, how = f"{side}/{row['name']}.png", {"pixels_sha256": row[f"{side}_sha256"]}
            if not is_finished(output_dir, output, how, records, args.overwrite):
                files.append(({"output": output} | how, encode_image(Image.fromarray(row[side]), ".png", fast=True)))
        size, hashes = row["input"].shape[1::-1], (row["input_sha256"], row["target_sha256"])
        samples.append(Sample(row["name"], row["task"], row["instruction"], size, *hashes))
        if len(files) >= FILES_AT_A_TIME:
            keep(output_dir, files)
            files = []
    if files:
        keep(output_dir, files)
    return samples


# The rows of the table.

# How each image is made, and the (width, height) of those that are missing.
Row = tuple[dict[Edit, dict], dict[Edit, tuple[int, int]]]


def look_at(label: str, samples: list[Sample], args, how: Callable[[Sample], dict], side: str = "input") -> Row:
    """A row whose images are made of `side` as `how` says. Raises UserError where one was made otherwise."""
    output_dir, records = Path(args.output_dir), read_records(Path(args.output_dir))
    settings, missing = {}, {}
    if (output_dir / label).exists() and not any(output.startswith(f"{label}/") for output in records):
        raise UserError(f"--output_dir: {output_dir / label} is a folder of something else; give another --output_dir")
    for sample in samples:
        edit = Edit(output_dir / side / f"{sample.name}.png", sample.instruction, f"{label}/{sample.name}.png")
        settings[edit] = {"input_sha256": getattr(sample, f"{side}_sha256")} | how(sample)
        if not is_finished(output_dir, edit.output, settings[edit], records, args.overwrite):
            missing[edit] = sample.size
    if 0 < len(missing) < len(samples):
        print(f"{label}: {len(samples) - len(missing)} of {len(samples)} images are there already")
    return settings, missing


def make_rows(models: list[Model], samples: list[Sample], args) -> dict[str, str]:
    """Make the images that are missing. Returns the rows, each with its kind: identity, each autoencoder's two, models.

    What an earlier run made otherwise is said before weights load. Raises UserError, also where a model's output is
    not finite.
    """

    def how(sample: Sample, model: Model, by_task: dict[str, Setting] | None) -> dict:
        made = {"model": model.fingerprint}
        if by_task:
            made |= {"seed": args.seed, "resolution": 0} | by_task[sample.task]._asdict()
            made |= {"instruction": sample.instruction}
        return made

    rows, tasks = {}, dict.fromkeys(sample.task for sample in samples)
    for model in models:
        by_task = None if model.cartoonize else sampling(args, model, tasks)
        rows[model] = look_at(model.label, samples, args, partial(how, model=model, by_task=by_task))
    autoencoders: dict[str, list[str]] = {}  # hash of the weights -> the labels of its rows
    for model, row in rows.items():
        if model.cartoonize:
            make_images(model.label, model.cartoonize, row, 1 if model.name == "opencv" else 4, model.max_pixels, args)
        else:
            edit_by_pipeline(model, row, samples, args, autoencoders)
    kinds = {IDENTITY: IDENTITY}
    for bounds in autoencoders.values():
        kinds |= zip(bounds, (THROUGH_VAE, CEILING), strict=True)
    return kinds | {model.label: MODEL for model in rows}


def edit_by_pipeline(model: Model, row: Row, samples: list[Sample], args, autoencoders: dict[str, list[str]]) -> None:
    """Make what is missing of a pipeline's row and, if no model before it had its autoencoder, of this one's two. The
    pipeline loads only if something is missing."""
    output_dir, pipeline, (settings, missing) = Path(args.output_dir), None, row
    if missing:
        pipeline = editing.load_pipeline(model.name, "--model", safety_checker=None)
        vae = weights_sha256(pipeline.vae)
        for how in settings.values():
            how |= {"vae": vae}
        flags = {"model_id": model.name, "format": "png", "compile": False}
        flags = argparse.Namespace(**vars(args) | flags | {"resolution": 0, "negative_prompt": "", "tile": 0})
        _, left_out = edit_all(pipeline, flags, settings, missing, timed=True)
        if left_out:
            raise UserError(
                f"--model: {model.name}: {next(iter(left_out.values()))}; evaluate without it, or seed anew"
            )
    else:
        vae = own_record(output_dir, next(iter(settings)).output, read_records(output_dir))["vae"]
    if vae in autoencoders:
        return
    autoencoders[vae] = [kind + (f"-{model.label}" if autoencoders else "") for kind in (THROUGH_VAE, CEILING)]
    for label, side in zip(autoencoders[vae], ("input", "target"), strict=True):
        copies = look_at(label, samples, args, lambda _: {"model": vae}, side)
        if copies[1]:
            pipeline = pipeline or editing.load_pipeline(model.name, "--model", safety_checker=None)
            multiple = editing.size_multiple(pipeline)
            make_images(label, partial(through_vae, pipeline), copies, multiple, math.inf, args)


def weights_sha256(module) -> str:
    """A hash of a network's weights in half precision, in which a GPU's and a CPU's are alike."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode() + tensor.half().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def through_vae(pipeline, images):
    """(B, H, W, 3) uint8, sides multiples of the autoencoder's factor -> the same, encoded and decoded."""
    import torch

    from instruct_pix2pix.data.triples import to_unit_range

    with torch.no_grad():
        pixels = to_unit_range(torch.from_numpy(images).permute(0, 3, 1, 2)).to(pipeline.device, pipeline.vae.dtype)
        decoded = pipeline.vae.decode(pipeline.vae.encode(pixels).latent_dist.mode()).sample.float()
        return ((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def make_images(label: str, function: Callable, row: Row, multiple: int, max_pixels: float, args) -> None:
    """Make what is missing of a row with a function from (B, H, W, 3) uint8 to the same, whose sides are padded to the
    multiple: of one size at a time, at most --batch_size and `max_pixels` together, but at least one."""
    import numpy as np
    from PIL import Image
    from tqdm import tqdm

    settings, missing = row
    bar = tqdm(total=len(missing), desc=label, unit="image", delay=2, leave=False)
    for group in make_batches(missing, multiple, len(missing)):  # of one size once padded
        size = int(max(1, min(args.batch_size, max_pixels / math.prod(missing[group[0]]))))
        for batch in (group[start : start + size] for start in range(0, len(group), size)):
            images = [read_image(edit.image) for edit in batch]
            began = time.perf_counter()
            made = function(np.stack([np.asarray(editing.fit_image(image, 0, multiple)) for image in images]))
            seconds = {"seconds": round((time.perf_counter() - began) / len(batch), 4)}
            files = []
            for edit, image, pixels in zip(batch, images, made, strict=True):
                content = encode_image(editing.restore_image(Image.fromarray(pixels), image.size, 0), ".png", fast=True)
                files.append(({"output": edit.output} | settings[edit] | seconds, content))
            keep(Path(args.output_dir), files)
            bar.update(len(batch))
    bar.close()


def how_made(output_dir: Path, labels: list[str], samples: list[Sample]) -> tuple[dict[str, float], dict[str, str]]:
    """Of the images as they lie there: seconds for one, by label (the median: the first of a run take longer), and the
    devices and precisions."""
    records = read_records(output_dir)
    found = {label: [records[f"{label}/{sample.name}.png"][-1] for sample in samples] for label in labels}
    seconds = {label: round(median(record["seconds"] for record in rows), 3) for label, rows in found.items()}
    kinds = {
        key: ", ".join(sorted({record[key] for rows in found.values() for record in rows if key in record}))
        for key in ("device", "dtype")
    }
    return seconds, kinds
