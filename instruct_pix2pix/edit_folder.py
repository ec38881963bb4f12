"""Editing folders of images: what is to do, what was done before, the edits in batches, the record of them.

Nothing heavy is imported at the top, and no model loads before everything else is known to be right.
"""

from __future__ import annotations

import contextlib
import csv
import glob
import hashlib
import io
import json
import os
import re
import shutil
import time
from collections import Counter
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from instruct_pix2pix import editing
from instruct_pix2pix.cli import MemoryShortage, RowError, UserError, first_line, warn
from instruct_pix2pix.data.sources import source_of
from instruct_pix2pix.files import (
    check_folder,
    file_sha256,
    flush,
    free_space,
    in_megabytes,
    write_bytes,
    write_json_lines,
)
from instruct_pix2pix.images import (
    BadImage,
    contact_sheet,
    describe_others,
    encode_image,
    find_images,
    image_size,
    is_junk,
    read_image,
    suffixes,
)
from instruct_pix2pix.models.trained import configuration, is_checkpoint

if TYPE_CHECKING:
    from diffusers import StableDiffusionInstructPix2PixPipeline
    from PIL import Image

CONTACT_SHEET = "contact_sheet.png"
RECORD = "edits.jsonl"
READY = ".ready"  # a folder: outputs that are written, and not yet all in their places
# Two outputs are the same edit if these fields of their records agree.
SETTINGS = "input_sha256 instruction model seed steps image_guidance_scale guidance_scale resolution".split()


@dataclass(frozen=True)
class Edit:
    """One image to edit: where it is, what to do, where the result goes (relative to the output folder)."""

    image: Path
    instruction: str
    output: str


# What to edit.


def read_instructions(path: str) -> list[tuple[str | None, str]]:
    """(image or None, instruction) for each line of a .txt, .jsonl or .csv file, without repetitions.

    Raises UserError for a missing or empty file, and for a row without image or instruction.
    """
    remedy = "give a .txt of instructions, or a .jsonl or .csv with image and instruction"
    if Path(path).suffix not in (".txt", ".jsonl", ".csv"):
        raise UserError(f"--instructions_file: {path} has an unknown ending; {remedy}")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--instructions_file: {path} cannot be read ({first_line(error)})") from None
    found: list[tuple[str | None, str]] = []
    if path.endswith(".txt"):
        lines = [line.strip() for line in text.splitlines()]
        found = [(None, line) for line in lines if line and not line.startswith("#")]
    else:
        lines = [line for line in text.splitlines() if line.strip()]
        try:
            rows = list(csv.DictReader(io.StringIO(text))) if path.endswith(".csv") else lines
        except csv.Error as error:
            raise UserError(f"--instructions_file: {path} cannot be read ({first_line(error)})") from None
        for number, row in enumerate(rows, start=1):
            try:
                row = json.loads(row) if isinstance(row, str) else row
                image, instruction = row["image"].strip(), row["instruction"].strip()
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                image = instruction = ""
            if not image or not instruction:
                raise UserError(
                    f"--instructions_file: {path}, row {number}, lacks a text for image or instruction; "
                    'write {"image": "a.png", "instruction": "..."} or the columns image,instruction'
                )
            found.append((image, instruction))
    if not found:
        raise UserError(f"--instructions_file: {path} holds no instruction; {remedy}")
    return list(dict.fromkeys(found))


def find_inputs(inputs: list[str], output_dir: Path) -> list[tuple[Path, str]]:
    """(path, relative name) of every image that files, folders and globs name, each image once.

    Folders are searched to any depth. Hidden files and other files than images do not count, nor does `output_dir`;
    how many other files there are is said.
    Raises UserError where an input does not exist or there is no image at all.
    """
    found: dict[Path, str] = {}
    others: Counter[str] = Counter()
    folders = sum(Path(name).expanduser().is_dir() for name in inputs)

    def add(path: Path, relative: Path) -> None:
        if output_dir.resolve() not in path.resolve().parents:
            found.setdefault(path.resolve(), relative.as_posix())

    for name in inputs:
        path = Path(name).expanduser()
        if path.is_file():
            add(path, Path(path.name))
            continue
        if path.is_dir():
            (names, left_out), root = find_images(path, without=output_dir), path
            others += left_out
        elif glob.has_magic(name):
            root = Path(*path.parts[: next(i for i, part in enumerate(path.parts) if glob.has_magic(part))])
            matches = [Path(match) for match in glob.glob(str(path), recursive=True)]
            names = [match.relative_to(root) for match in matches if match.suffix.lower() in suffixes()]
        else:
            raise UserError(f"{name}: does not exist; give files, folders or quoted globs")
        prefix = Path(path.resolve().name) if path.is_dir() and folders > 1 else Path()
        for relative in sorted(map(Path, names)):
            if (root / relative).is_file() and not any(map(is_junk, relative.parts)):
                add(root / relative, prefix / relative)
    if not found:
        only = f", only {describe_others(others)}" if others else ""
        raise UserError(f"{' '.join(inputs)}: no image found outside --output_dir{only}")
    if others:
        warn(f"left out what is no image: {describe_others(others)}")
    return list(found.items())


def plan_outputs(wanted: list[tuple[Path, str, str]], suffix: str) -> list[Edit]:
    """Give every (image, relative name, instruction) an output name of its own; repetitions are dropped.

    The name is the relative one with `suffix`. If an image has several instructions, each instruction gets a
    folder. Outputs whose names still agree get the ending of their image (a.jpg: a-jpg.png), and at last
    eight digits of a SHA-256 of its path and instruction.
    """
    once = {(image, instruction): relative for image, relative, instruction in reversed(wanted)}
    wanted = [(image, relative, instruction) for (image, instruction), relative in reversed(once.items())]
    by_instruction = len({image for image, _, _ in wanted}) < len(wanted)
    names = []
    for _, relative, instruction in wanted:
        # A path of a row may climb out of its folder or be absolute: then its name alone counts.
        inside = not Path(relative).is_absolute() and ".." not in Path(relative).parts
        name = Path(relative if inside else Path(relative).name).with_suffix(suffix)
        names.append(Path(folder_name(instruction) if by_instruction else "", name))

    endings = [image.suffix[1:] for image, _, _ in wanted]
    hashes = [hashlib.sha256(f"{image} {text}".encode()).hexdigest()[:8] for image, _, text in wanted]
    for distinctions in (endings, hashes):
        # Compared without case: a.png and A.png are one file on some systems.
        count = Counter([str(name).casefold() for name in names] + [CONTACT_SHEET])
        for i, name in enumerate(names):
            if count[str(name).casefold()] > 1:
                names[i] = name.with_stem(f"{name.stem}-{distinctions[i]}")
    assert len(set(names)) == len(names)
    named = zip(wanted, names, strict=True)
    return [Edit(image, instruction, name.as_posix()) for (image, _, instruction), name in named]


def folder_name(instruction: str) -> str:
    """The words of an instruction, at most 60 characters of them, as the name of a folder."""
    return re.sub(r"[\W_]+", "-", instruction.lower()).strip("-")[:60].strip("-") or "instruction"


def plan(args) -> list[Edit]:
    """Every edit that the arguments ask for, in order."""
    output_dir = Path(args.output_dir)
    if args.dataset or args.original_dir:
        return plan_outputs(rows_to_edit(args), f".{args.format}")
    lines = [(None, args.instruction.strip())] if args.instruction else read_instructions(args.instructions_file)
    if lines[0][0] is not None:
        if args.inputs:
            raise UserError(f"{args.inputs[0]}: {args.instructions_file} names the images; give one or the other")
        folder = Path(args.instructions_file).parent
        wanted = [((folder / image).resolve(), image, instruction) for image, instruction in lines]
    elif not args.inputs:
        raise UserError("inputs: missing; give files, folders or quoted globs of images")
    else:
        images = find_inputs(args.inputs, output_dir)
        wanted = [(path, name, instruction) for _, instruction in lines for path, name in images]
    return plan_outputs(wanted, f".{args.format}")


def rows_to_edit(args) -> list[tuple[Path, str, str]]:
    """(image, name, instruction) of each row of a dataset of triples; a row's own instruction is one of its wordings.

    Images that are kept inside a dataset's files are written to OUTPUT_DIR/inputs first. Rows that cannot be used are
    left out with a warning, or raise RowError, as --on_bad_row says.
    """
    from PIL import Image

    from instruct_pix2pix.data.triples import load_triples

    triples = load_triples(source_of(args, "--dataset"))
    inputs = Path(args.output_dir) / "inputs"
    wanted = []
    for index in triples.indices.tolist():
        if index in triples.bad:
            continue
        try:
            wordings = triples.instructions(index)
            image = triples.files.image(triples.rows[index][triples.original_image])
        except (RowError, BadImage) as error:
            if args.on_bad_row == "error":
                raise
            warn(f"left out row {index}: {error}")
            continue
        name = f"{index:06d}"
        if isinstance(image, bytes):
            with Image.open(io.BytesIO(image)) as opened:
                path = inputs / f"{name}.{opened.format.lower()}"
            if not path.is_file() or path.read_bytes() != image:
                inputs.mkdir(parents=True, exist_ok=True)
                write_bytes(path, image)
        else:
            path, name = Path(image).resolve(), f"{name}-{Path(image).stem}"
        wanted.append((path, name, wordings[index % len(wordings)]))
    return wanted


# What was done before.


def model_fingerprint(model_id: str) -> str:
    """What tells one model from another: the id on the Hub, or a hash over a folder's files, and of a checkpoint over
    its base model's as well.

    Of a large file the size and the first and last megabyte are hashed: quick, and retraining shows in them.
    """
    folder = Path(model_id).expanduser()
    if not folder.exists():
        return model_id
    digest, megabyte = hashlib.sha256(), 1 << 20
    for path in sorted(folder.rglob("*")) if folder.is_dir() else [folder]:
        if path == folder or (path.suffix in (".json", ".txt", ".safetensors", ".bin") and path.is_file()):
            size = path.stat().st_size
            digest.update(f"{path.relative_to(folder).as_posix()} {size} ".encode())
            with path.open("rb") as file:
                digest.update(file.read(megabyte))
                file.seek(max(size - megabyte, 0))
                digest.update(file.read(megabyte))
    if is_checkpoint(folder):
        digest.update(model_fingerprint(configuration(folder).pretrained_model_name_or_path).encode())
    return f"sha256:{digest.hexdigest()}"


def read_records(output_dir: Path) -> dict[str, list[dict]]:
    """The records of edits.jsonl by output name, oldest first. A line cut short by a crash is left out."""
    records: dict[str, list[dict]] = {}
    path = output_dir / RECORD
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
            records.setdefault(record["output"], []).append(record)
        except (ValueError, KeyError, TypeError):
            continue
    return records


def append_records(output_dir: Path, records: list[dict]) -> None:
    """Add lines to edits.jsonl and see them on the disk; starts a new line if the last one has no end."""
    with (output_dir / RECORD).open("ab+") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.writelines(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records)
        file.flush()
        os.fsync(file.fileno())


def own_record(output_dir: Path, output: str, records: dict) -> dict | None:
    """The record of a file as it lies there, None if there is no such file.

    Raises UserError for a file that has no record or differs from it: somebody else's, or
    changed since, and so not to be lost.
    """
    path = output_dir / output
    if not path.exists():
        return None
    content = file_sha256(path) if path.is_file() else "a folder"
    for record in reversed(records.get(output, [])):
        if record.get("output_sha256") == content:
            return record
    raise UserError(f"{path}: was not made by this script, or was changed since; move it away or change --output_dir")


def is_finished(output_dir: Path, output: str, settings: dict, records: dict, overwrite: bool) -> bool:
    """Whether `output` is there and of these `settings`; if of others, UserError unless `overwrite`."""
    record = own_record(output_dir, output, records)
    if record is None:
        return False
    for name in SETTINGS:
        if record.get(name) != settings[name]:
            if overwrite:
                return False
            before, now = str(record.get(name))[:40], str(settings[name])[:40]
            raise UserError(
                f"{output_dir / output}: was made with {name} {before}, now it is {now}; choose another "
                "--output_dir, or --overwrite to make it again"
            )
    return True


def keep(output_dir: Path, outputs: list[tuple[dict, bytes]]) -> None:
    """Write outputs, each a record that names the "output" and the bytes of the file: all of them, or none.

    What a killed run had ready, the next one puts in place. So a batch is never split, and those after it go through
    the model in the same company as without the kill: in another, their last bits would differ.
    """
    partial, records = output_dir / f"{READY}.partial", []
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for number, (record, content) in enumerate(outputs):
            (partial / str(number)).write_bytes(content)
            records.append(record | {"output_sha256": hashlib.sha256(content).hexdigest()})
        write_json_lines(partial / RECORD, records)
        for path in (*partial.iterdir(), partial):
            flush(path)
        os.replace(partial, output_dir / READY)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # there only where something went wrong, such as a full disk
    put_in_place(output_dir, {})


def put_in_place(output_dir: Path, known: dict[str, list[dict]]) -> None:
    """Move what is ready to where it belongs, after its records: an output without one would look like somebody else's.
    Those that are `known` are there already."""
    ready = output_dir / READY
    records = [json.loads(line) for line in (ready / RECORD).read_text(encoding="utf-8").splitlines()]
    append_records(output_dir, [record for record in records if record not in known.get(record["output"], [])])
    for number, record in enumerate(records):
        if (ready / str(number)).exists():
            path = output_dir / record["output"]
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(ready / str(number), path)
    os.replace(ready, ready.with_suffix(".partial"))
    shutil.rmtree(ready.with_suffix(".partial"))


def finish_writes(output_dir: Path) -> None:
    """After a kill: sweep up what was half written, and put in place what was ready. Raises UserError where another
    file has come to lie there."""
    shutil.rmtree(output_dir / f"{READY}.partial", ignore_errors=True)
    record_file, ready = output_dir / RECORD, output_dir / READY
    content = record_file.read_bytes() if record_file.exists() else b""
    last_line = content.rpartition(b"\n")[2]
    if last_line and not last_line.endswith(b"}"):
        os.truncate(record_file, len(content) - len(last_line))
    if ready.exists():
        known = read_records(output_dir)
        for line in (ready / RECORD).read_text(encoding="utf-8").splitlines():
            own_record(output_dir, json.loads(line)["output"], known)
        put_in_place(output_dir, known)


def look_through(args, edits: list[Edit]):
    """Every edit's image and earlier output, before weights load.

    Returns (settings of each edit that can be made, edits that are finished, inner sizes of those that are not,
    {image: why it is left out}, how many images the model will see scaled down).
    """
    from tqdm import tqdm

    output_dir = Path(args.output_dir)
    settings: dict[Edit, dict] = {}
    finished: list[Edit] = []
    sizes: dict[Edit, tuple[int, int]] = {}
    left_out: dict[str, str] = {}
    scaled = 0
    model = model_fingerprint(args.model_id)
    records = read_records(output_dir)
    if args.contact_sheet:
        own_record(output_dir, CONTACT_SHEET, records)
    known: dict[Path, tuple[str, tuple[int, int]]] = {}  # SHA-256 and size of each image
    for edit in tqdm(edits, desc="looking through images", delay=2, leave=False):
        if str(edit.image) in left_out:
            continue
        try:
            if edit.image not in known:
                known[edit.image] = file_sha256(edit.image), image_size(edit.image)
        except (OSError, BadImage) as error:
            reason = error if isinstance(error, BadImage) else f"cannot be read ({error.strerror})"
            left_out[str(edit.image)] = f"{edit.image}: {reason}"
            continue
        sha256, size = known[edit.image]
        settings[edit] = {
            "input_sha256": sha256,
            "instruction": edit.instruction,
            "model": model,
            "seed": args.seed,
            "steps": args.steps,
            "image_guidance_scale": args.image_guidance_scale,
            "guidance_scale": args.guidance_scale,
            "resolution": args.resolution,
        }
        if is_finished(output_dir, edit.output, settings[edit], records, args.overwrite):
            finished.append(edit)
        else:
            sizes[edit] = editing.inner_size(size, args.resolution)
            scaled += sizes[edit] != size
    return settings, finished, sizes, left_out, scaled


# Making what is missing.


def noise_seed(seed: int, input_sha256: str) -> int:
    """The seed of one image's noise, 32 bits of a hash of --seed and the image file's own hash.

    The snippets give the same output with `--seed` set to this number.
    """
    digest = hashlib.sha256(f"{seed} {input_sha256}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def make_batches(sizes: dict[Edit, tuple[int, int]], multiple: int, batch_size: int) -> list[list[Edit]]:
    """Groups of at most `batch_size` edits whose images have one size (width, height) once padded: wide ones first, an
    order that does not depend on which edits are done already.

    `sizes` are those inside the model, before padding to the `multiple`.
    """
    groups: dict[tuple[int, int], list[Edit]] = {}
    for edit, (width, height) in sizes.items():
        padded = (width + -width % multiple, height + -height % multiple)
        groups.setdefault(padded, []).append(edit)
    in_order = [group for _, group in sorted(groups.items(), reverse=True)]
    return [group[start : start + batch_size] for group in in_order for start in range(0, len(group), batch_size)]


def one_ahead(pool: Executor, function, items):
    """Yield function(item) for all `items` in order; while the caller works on one, `pool` computes the next."""
    following: Future | None = None
    for item in items:
        current, following = following, pool.submit(function, item)
        if current is not None:
            yield current.result()
    if following is not None:
        yield following.result()


def load_model(args) -> StableDiffusionInstructPix2PixPipeline:
    """The pipeline of --model_id, its UNet's blocks to be compiled if --compile asks for it."""
    pipeline = editing.load_pipeline(args.model_id)
    if args.compile:
        import torch

        try:
            # Blocks that are alike are compiled once. To compile the UNet in one piece takes several times as long.
            # Without `dynamic` the second size, and the first smaller batch, would compile them all again; and blocks
            # of every width count against one limit, above which nothing more is compiled.
            torch._dynamo.config.recompile_limit = 64
            pipeline.unet.compile_repeated_blocks(dynamic=True)
        except Exception as error:  # a UNet without such blocks, a platform without a compiler
            warn(_not_compiled(error))
    return pipeline


def _not_compiled(error: Exception) -> str:
    # What went wrong in a compiler, without what torch.compile wraps around it.
    return f"--compile: {first_line(getattr(error, 'inner_exception', error))}; editing goes on without it"


def read_batch(batch: list[Edit], multiple: int, args):
    """Decode a batch: ({edit: (RGB image as the model takes it, its own size)}, {image: why it is left out})."""
    images: dict[Edit, tuple[Image.Image, tuple[int, int]]] = {}
    left_out: dict[str, str] = {}
    for edit in batch:
        try:
            image = read_image(edit.image)
        except BadImage as error:
            left_out[str(edit.image)] = f"{edit.image}: {error}"
            continue
        images[edit] = editing.fit_image(image, args.resolution, multiple), image.size
    return images, left_out


def write_batch(records: dict[Edit, dict], results: list[Image.Image | str], args):
    """Write what `editing.edit_batch` returned, each in its image's size, with its record.

    Returns (edits made, {image: why it has no output}). Raises OSError where the disk takes no more.
    """
    outputs: dict[Edit, tuple[dict, bytes]] = {}
    left_out: dict[str, str] = {}
    for (edit, record), result in zip(records.items(), results, strict=True):
        if isinstance(result, str):
            left_out[str(edit.image)] = f"{edit.image}: {result}"
            continue
        result = editing.restore_image(result, (record["width"], record["height"]), args.resolution)
        outputs[edit] = {"output": edit.output} | record, encode_image(result, f".{args.format}")
    if outputs:
        keep(Path(args.output_dir), list(outputs.values()))
    return list(outputs), left_out


def edit_all(pipeline, args, settings: dict[Edit, dict], sizes: dict[Edit, tuple[int, int]]):
    """Make the outputs of all `sizes`: (those made, {image: why it was left out}).

    While the model edits a batch, one thread reads the next and one writes the last. Leaving this function, by
    Ctrl-C or an error too, waits until what is being written is there.
    """
    import torch
    from tqdm import tqdm

    made: list[Edit] = []
    left_out: dict[str, str] = {}
    compiled, edited = args.compile, 0
    bar = tqdm(
        total=len(sizes),
        desc="editing",
        bar_format="{desc}: {n}/{total} images |{bar}| {elapsed}<{remaining}{postfix}",
    )
    started = time.perf_counter()

    def show_progress(_, step, __, tensors):
        rate = edited / (time.perf_counter() - started)
        bar.set_postfix_str(f"step {step + 1}/{args.steps}, {rate:.2f} images/s")
        return tensors

    edit_batch = partial(
        editing.edit_batch,
        pipeline,
        steps=args.steps,
        guidance_scale=args.guidance_scale,
        image_guidance_scale=args.image_guidance_scale,
        on_step=show_progress,
    )
    multiple = editing.size_multiple(pipeline)
    batches = make_batches(sizes, multiple, args.batch_size)
    writes: list[Future] = []
    with contextlib.ExitStack() as stack:
        background = stack.enter_context(ThreadPoolExecutor(2))
        stack.enter_context(bar)

        def edit_with_fallback(*arguments):
            nonlocal compiled
            try:
                return edit_batch(*arguments)
            except torch.OutOfMemoryError:
                raise MemoryShortage(
                    f"--batch_size: {len(arguments[0])} images at a time do not fit into the GPU's memory; "
                    "lower it or --resolution and run again: what is done is kept"
                ) from None
            except Exception as error:  # compilers fail in many ways, at the first batch or at a later size
                if not compiled:
                    raise
                compiled = False
                bar.clear()  # its line makes room for the warning's
                warn(_not_compiled(error))
                stack.enter_context(torch.compiler.set_stance("force_eager"))
                return edit_with_fallback(*arguments)

        read = partial(read_batch, multiple=multiple, args=args)
        for batch, (images, unreadable) in zip(batches, one_ahead(background, read, batches), strict=True):
            left_out |= unreadable
            bar.update(len(batch) - len(images))
            records, results = {}, []
            # Again by size: what turns an image may stand at its file's end, where `image_size` does not look.
            for group in make_batches({edit: image.size for edit, (image, _) in images.items()}, 1, args.batch_size):
                seeds = [noise_seed(args.seed, settings[edit]["input_sha256"]) for edit in group]
                results += edit_with_fallback([e.instruction for e in group], [images[e][0] for e in group], seeds)
                edited += len(group)
                bar.update(len(group))
                for edit, seed in zip(group, seeds, strict=True):
                    width, height = images[edit][1]
                    records[edit] = {"image": str(edit.image)} | settings[edit]
                    records[edit] |= {"model_id": args.model_id, "noise_seed": seed}
                    records[edit] |= {"width": width, "height": height, "device": pipeline.device.type}
            if writes:
                writes[-1].result()  # one at a time, so that records stay in order and a full disk ends the run
            writes.append(background.submit(write_batch, records, results, args))
        show_progress(None, args.steps - 1, None, None)
    for write in writes:
        finished, failed = write.result()
        made += finished
        left_out |= failed
    return made, left_out


def write_contact_sheet(edits: list[Edit], args, records: dict) -> None:
    """Show at most `args.contact_sheet` of the finished `edits`, evenly chosen, in their order."""
    output_dir, count = Path(args.output_dir), min(args.contact_sheet, len(edits))
    entries = []
    for edit in [edits[i * len(edits) // count] for i in range(count)]:
        pair = [read_image(edit.image), read_image(output_dir / edit.output)]
        entries.append((pair, [edit.output, edit.instruction]))
    content = encode_image(contact_sheet(entries, cell=256), ".png")
    record = own_record(output_dir, CONTACT_SHEET, records)
    if record is None or record["output_sha256"] != hashlib.sha256(content).hexdigest():
        keep(output_dir, [({"output": CONTACT_SHEET}, content)])


def edit_folder(args) -> bool:
    """Do what edit_images.py was asked for and say what came of it; False if there is not one output."""
    output_dir = Path(args.output_dir)

    # 1. All that can be wrong before weights load: instructions, images, the model's folder, earlier outputs.
    edits = plan(args)
    check_folder("--output_dir", output_dir)
    editing.check_model(args.model_id)
    try:
        finish_writes(output_dir)
    except OSError as error:
        raise UserError(f"--output_dir: {output_dir} cannot be written to ({first_line(error)})") from None
    settings, finished, sizes, left_out, scaled = look_through(args, edits)
    if not settings:
        raise UserError(f"{next(iter(left_out.values()))}; none of {len(left_out)} images can be read")

    # 2. The edits that are missing.
    made: list[Edit] = []
    if finished:
        print(f"{len(finished)} of {len(settings)} outputs are there already")
    if scaled:
        print(
            f"{scaled} of {len(sizes)} images have a short side above --resolution {args.resolution}: "
            "scaled down for the model, and back up"
        )
    try:
        if sizes:
            made, failed = edit_all(load_model(args), args, settings, sizes)
            left_out |= failed
        done = set(finished) | set(made)
        if args.contact_sheet and done:
            write_contact_sheet([edit for edit in edits if edit in done], args, read_records(output_dir))
    except OSError as error:
        room = in_megabytes(free_space(output_dir))
        raise UserError(
            f"--output_dir: {output_dir} cannot be written to ({first_line(error)}), where {room} are free; what is"
            " done is kept: make room and run it again"
        ) from None

    # 3. What came of it.
    for message in left_out.values():
        warn(f"left out {message}")
    print(f"{len(made)} edited, {len(finished)} there before, {len(left_out)} images left out: {output_dir}")
    return bool(done)
