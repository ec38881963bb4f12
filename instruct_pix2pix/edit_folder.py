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
import re
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from instruct_pix2pix import editing
from instruct_pix2pix.cli import MemoryShortage, RowError, UserError, first_line, warn
from instruct_pix2pix.data.sources import source_of
from instruct_pix2pix.devices import is_out_of_memory
from instruct_pix2pix.evaluation.settings import Setting
from instruct_pix2pix.files import check_folder, file_sha256, free_space, in_megabytes, write_bytes
from instruct_pix2pix.images import (
    BadImage,
    contact_sheet,
    describe_others,
    encode_image,
    find_images,
    image_size,
    is_junk,
    ordered_map,
    read_image,
    suffixes,
)
from instruct_pix2pix.records import (
    finish_writes,
    is_finished,
    keep,
    model_fingerprint,
    noise_seed,
    own_record,
    read_records,
)

if TYPE_CHECKING:
    from diffusers import StableDiffusionInstructPix2PixPipeline
    from PIL import Image

CONTACT_SHEET = "contact_sheet.png"


@dataclass(frozen=True)
class Edit:
    """One image to edit: where it is, what to do, where the result goes in the output folder, which variation, mask."""

    image: Path
    instruction: str
    output: str
    variation: int = 1
    mask: Path | None = None


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
        lines = [line for line in text.split("\n") if line.strip()]
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
            if not Path(image).name or not instruction:
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


def find_masks(source: str | None, names: list[str]) -> list[Path | None]:
    """The masks of images of these relative names: the file `source`, or those of the same names in that folder,
    whatever their endings. Raises UserError where there is none."""
    root = source and Path(source).expanduser()
    if root is None or root.is_file():
        return [root] * len(names)
    masks = {Path(name).with_suffix(""): root / name for name in find_images(root)[0]}
    if missing := [name for name in names if Path(name).with_suffix("") not in masks]:
        raise UserError(f"--mask: {source} has no mask for {missing[0]}; give one image, or a folder of one for each")
    return [masks[Path(name).with_suffix("")] for name in names]


def plan_outputs(
    wanted: list[tuple[Path, str, str]], suffix: str, variations: int = 1, mask: str | None = None
) -> list[Edit]:
    """Give every (image, relative name, instruction) an output name of its own; repetitions are dropped. Each gets its
    mask, and becomes as many edits as there are `variations`.

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
    hashes = [
        hashlib.sha256(f"{image} {text}".encode("utf-8", "surrogateescape")).hexdigest()[:8]
        for image, _, text in wanted
    ]
    for distinctions in (endings, hashes):
        # Compared without case: a.png and A.png are one file on some systems.
        count = Counter([str(name).casefold() for name in names] + [CONTACT_SHEET])
        for i, name in enumerate(names):
            if count[str(name).casefold()] > 1:
                names[i] = name.with_stem(f"{name.stem}-{distinctions[i]}")
    assert len(set(names)) == len(names)
    masks = find_masks(mask, [relative for _, relative, _ in wanted])
    return [
        Edit(image, instruction, path.as_posix(), number, mask)
        for (image, _, instruction), name, mask in zip(wanted, names, masks, strict=True)
        for number, path in enumerate(editing.numbered(name, variations), start=1)
    ]


def folder_name(instruction: str) -> str:
    """The words of an instruction, at most 60 characters of them, as the name of a folder."""
    return re.sub(r"[\W_]+", "-", instruction.lower()).strip("-")[:60].strip("-") or "instruction"


def plan(args) -> list[Edit]:
    """Every edit that the arguments ask for, in order."""
    output_dir, how = Path(args.output_dir), (f".{args.format}", args.num_variations, args.mask)
    if args.dataset or args.original_dir:
        return plan_outputs(rows_to_edit(args), *how)
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
    return plan_outputs(wanted, *how)


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
            if isinstance(image, bytes):
                image_size(image)  # rows beyond those that were checked
        except (RowError, BadImage) as error:
            if args.on_bad_row == "error":
                column = triples.original_image
                raise error if isinstance(error, RowError) else triples.row_error(index, column, str(error)) from None
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
    found = editing.recommended_settings(args.model_id)
    sampling = {text: editing.sampling_of(args, found, text) for text in dict.fromkeys(e.instruction for e in edits)}
    for line in dict.fromkeys(line for _, line in sampling.values() if line):
        print(line)
    scales = {(setting.guidance_scale, setting.image_guidance_scale) for setting, _ in sampling.values()}
    for warning in filter(None, (editing.guidance_warning(*pair, args.negative_prompt) for pair in sorted(scales))):
        warn(warning)
    known: dict[Path, tuple[str, tuple[int, int]]] = {}  # SHA-256 and size of each image and mask
    fitted: dict[tuple[Path, tuple[int, int]], bool] = {}  # whether a mask has to be scaled for an image's size
    for edit in tqdm(edits, desc="looking through images", delay=2, leave=False):
        if str(edit.image) in left_out:
            continue
        try:
            for path in {edit.image, edit.mask or edit.image} - known.keys():
                known[path] = file_sha256(path), image_size(path)
        except (OSError, BadImage) as error:
            reason = error if isinstance(error, BadImage) else f"cannot be read ({error.strerror})"
            left_out[str(edit.image)] = f"{path}: {reason}"
            continue
        sha256, size = known[edit.image]
        settings[edit] = {
            "input_sha256": sha256,
            "instruction": edit.instruction,
            "model": model,
            "seed": args.seed,
            **sampling[edit.instruction][0]._asdict(),
            "resolution": args.resolution,
            "negative_prompt": args.negative_prompt,
            "variation": edit.variation,
            "mask_sha256": edit.mask and known[edit.mask][0],
            "tile": args.tile,
        }
        if args.dtype != "auto":  # which takes what is there, of whatever device
            settings[edit]["dtype"] = args.dtype
        if is_finished(output_dir, edit.output, settings[edit], records, args.overwrite):
            finished.append(edit)
        else:
            sizes[edit] = editing.inner_size(size, args.resolution)
            scaled += sizes[edit] != size
            if edit.mask and (edit.mask, size) not in fitted:
                editing.fit_mask(editing.open_image(edit.mask, "--mask"), size, f"--mask: {edit.mask}")
                fitted[edit.mask, size] = known[edit.mask][1] != size
    if count := sum(fitted.values()):
        print(f"--mask: {count} of {len(fitted)} are scaled to their images' sizes")
    return settings, finished, sizes, left_out, scaled


# Making what is missing.


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


def load_model(args) -> StableDiffusionInstructPix2PixPipeline:
    """The pipeline of --model_id, its UNet's blocks to be compiled if --compile asks for it."""
    pipeline = editing.load_pipeline(args.model_id, device=args.device, dtype=args.dtype)
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
        if edit.mask:
            mask = editing.fit_mask(read_image(edit.mask), result.size)
            result = editing.keep_outside(read_image(edit.image), result, mask)
        outputs[edit] = {"output": edit.output} | record, encode_image(result, f".{args.format}")
    if outputs:
        keep(Path(args.output_dir), list(outputs.values()))
    return list(outputs), left_out


def edit_all(pipeline, args, settings: dict[Edit, dict], sizes: dict[Edit, tuple[int, int]], timed: bool = False):
    """Make the outputs of all `sizes`: (those made, {image: why it was left out}). If `timed`, a record also tells its
    share of the seconds that the batch took.

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
        bar.set_postfix_str(f"step {step + 1}/{steps}, {rate:.2f} images/s")
        return tensors

    def sampling(edit: Edit) -> Setting:
        return Setting.of(settings[edit])

    multiple = editing.size_multiple(pipeline)
    batches = []  # each of one setting
    for setting in dict.fromkeys(map(sampling, settings)):
        alike = {edit: size for edit, size in sizes.items() if sampling(edit) == setting}
        batches += make_batches(alike, multiple, args.batch_size)
    writes: list[Future] = []
    with contextlib.ExitStack() as stack:
        background = stack.enter_context(ThreadPoolExecutor(2))
        stack.enter_context(bar)

        def edit_with_fallback(*arguments):
            nonlocal compiled
            try:
                how = sampling(batch[0])._asdict() | {"negative_prompt": args.negative_prompt, "tile": args.tile}
                return editing.edit_batch(pipeline, *arguments, **how, on_step=show_progress)
            except Exception as error:
                if is_out_of_memory(error):
                    raise MemoryShortage(
                        f"--batch_size: {len(arguments[0])} images at a time do not fit into the GPU's memory; "
                        "lower it or --resolution, or give --tile, and run again: what is done is kept"
                    ) from None
                if not compiled:  # compilers fail in many ways, at the first batch or at a later size
                    raise
                compiled = False
                bar.clear()  # its line makes room for the warning's
                warn(_not_compiled(error))
                stack.enter_context(torch.compiler.set_stance("force_eager"))
                return edit_with_fallback(*arguments)

        read = partial(read_batch, multiple=multiple, args=args)
        for batch, (images, unreadable) in zip(batches, ordered_map(background, read, batches, 2), strict=True):
            left_out |= unreadable
            steps = sampling(batch[0]).steps
            bar.update(len(batch) - len(images))
            records, results = {}, []
            # Again by size: what turns an image may stand at its file's end, where `image_size` does not look.
            for group in make_batches({edit: image.size for edit, (image, _) in images.items()}, 1, args.batch_size):
                seeds = [noise_seed(args.seed + e.variation - 1, settings[e]["input_sha256"]) for e in group]
                began = time.perf_counter()
                results += edit_with_fallback([e.instruction for e in group], [images[e][0] for e in group], seeds)
                edited += len(group)
                bar.update(len(group))
                seconds = {"seconds": round((time.perf_counter() - began) / len(group), 4)} if timed else {}
                for edit, seed in zip(group, seeds, strict=True):
                    width, height = images[edit][1]
                    records[edit] = {"image": str(edit.image)} | settings[edit]
                    records[edit] |= {"model_id": args.model_id, "noise_seed": seed}
                    records[edit] |= {"width": width, "height": height, "device": pipeline.device.type}
                    records[edit] |= {"dtype": str(pipeline.unet.dtype).removeprefix("torch.")} | seconds
            if writes:
                writes[-1].result()  # one at a time, so that records stay in order and a full disk ends the run
            writes.append(background.submit(write_batch, records, results, args))
        show_progress(None, steps - 1, None, None)
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
            pipeline = load_model(args)
            editing.warn_of_cut(pipeline, dict.fromkeys(edit.instruction for edit in sizes), args.negative_prompt)
            made, failed = edit_all(pipeline, args, settings, sizes)
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
