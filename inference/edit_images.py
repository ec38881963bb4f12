#!/usr/bin/env python
"""Edit files, folders or globs of images by instruction, in batches, and go on where a run stopped.

    python inference/edit_images.py photos/ --instruction "Derain the image" --model_id MODEL --output_dir out
    python inference/edit_images.py a.jpg "b/**/*.png" --instructions_file lines.txt --model_id MODEL \\
        --output_dir out
    python inference/edit_images.py --instructions_file pairs.jsonl --model_id MODEL --output_dir out

Instructions: --instruction is one for every image. An --instructions_file that ends in .txt has one a line,
each for every image; one that ends in .jsonl or .csv names its images itself, in rows with "image" (a path,
relative to that file) and "instruction".

Outputs: each has its image's size, its name, and its place in the folder given. Several folders keep their
own names, an image's several instructions get a folder each, and a.jpg beside a.png becomes a-jpg.png. The
noise of an image depends on --seed and on its file's bytes alone, not on the batch, the order or the other
images. Sizes that the model cannot take are padded, and cropped again.

Speed: images of one size are edited together, while the next are read and the last are written. With
--image_guidance_scale 1, or equal to --guidance_scale, the model is asked for two predictions a step instead
of three: the third has no part in the result.

Resuming: OUTPUT_DIR/edits.jsonl says how every output was made, and the same command again makes what is
missing. An output made with other settings stops the run (--overwrite makes it again), and a file that this
script did not make is never overwritten. Images that cannot be read are left out and listed at the end.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
import time
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from instruct_pix2pix import edit_folder as planning
from instruct_pix2pix import editing
from instruct_pix2pix.edit_folder import Edit

if TYPE_CHECKING:
    from PIL import Image


def noise_seed(seed: int, input_sha256: str) -> int:
    """The seed of one image's noise, 32 bits of a hash of --seed and the image file's own hash.

    The snippets give the same output with `--seed` set to this number.
    """
    digest = hashlib.sha256(f"{seed} {input_sha256}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def upright_size(path: Path) -> tuple[int, int]:
    """(width, height) of an image turned upright; decodes it only where the format hides its orientation.

    Raises ValueError, in one line, if it cannot be read.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # the orientations that swap the sides
            return image.size[::-1] if turned else image.size
    except Exception as error:  # Pillow's readers raise almost anything on damaged bytes
        reason = "not an image" if isinstance(error, Image.UnidentifiedImageError) else editing.first_line(error)
        raise ValueError(f"{path}: cannot be read ({reason})") from None


def make_batches(sizes: dict[Edit, tuple[int, int]], multiple: int, batch_size: int) -> list[list[Edit]]:
    """Groups of at most `batch_size` edits whose images have one size (width, height) once padded.

    `sizes` are those inside the model, before padding to the `multiple`.
    """
    groups: dict[tuple[int, int], list[Edit]] = {}
    for edit, (width, height) in sizes.items():
        padded = (width + -width % multiple, height + -height % multiple)
        groups.setdefault(padded, []).append(edit)
    return [
        group[start : start + batch_size] for group in groups.values() for start in range(0, len(group), batch_size)
    ]


@contextlib.contextmanager
def skip_needless_branch(unet, guidance_scale: float, image_guidance_scale: float):
    """While open, the UNet evaluates two of the pipeline's three guidance branches where the third cancels.

    The pipeline stacks a batch of 3 B, [instruction and image, image alone, neither], and combines what the UNet
    says of it (Brooks et al. 2023, equation 3):

        neither + guidance_scale * (instruction - image) + image_guidance_scale * (image - neither)

    With image_guidance_scale 1 that is without `neither`, with equal scales without `image`. The rows of that
    branch are cut out before the UNet, and the other of the two stands in for it behind the UNet: `image - neither`
    is then exactly zero, and the result is that of three branches but for rounding. Other scales change nothing,
    and where diffusers turns guidance off (see editing.guidance_warning) the batch is no stack.
    """
    import torch

    if guidance_scale <= 1 or image_guidance_scale not in (1, guidance_scale):
        yield
        return
    needed = 1 if image_guidance_scale == 1 else 2

    def cut(tensor):  # (3 B, ...) to (2 B, ...)
        branches = tensor.chunk(3)
        return torch.cat((branches[0], branches[needed]))

    def before(_, args, kwargs):
        latents, timestep = args
        return (cut(latents), timestep), kwargs | {"encoder_hidden_states": cut(kwargs["encoder_hidden_states"])}

    def after(_, __, output):
        instruction, other = output[0].chunk(2)
        return (torch.cat((instruction, other, other)),)

    hooks = [unet.register_forward_pre_hook(before, with_kwargs=True), unet.register_forward_hook(after)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def read_batch(batch: list[Edit], sizes: dict[Edit, tuple[int, int]], multiple: int, args):
    """Decode a batch and fit it to one size: ({edit: (upright RGB image as the model takes it, its own size)},
    {image: why it is left out}).
    """
    images: dict[Edit, tuple[Image.Image, tuple[int, int]]] = {}
    left_out: dict[str, str] = {}
    for edit in batch:
        try:
            image = editing.load_image(str(edit.image))
        except ValueError as error:
            left_out[str(edit.image)] = str(error)
            continue
        assert editing.inner_size(image.size, args.resolution) == sizes[edit], edit
        images[edit] = editing.fit_image(image, args.resolution, multiple), image.size
    return images, left_out


def edit_batch(pipeline, instructions: list[str], images: list[Image.Image], seeds: list[int], args, on_step):
    """Edit B RGB images of one size: (float32 [0, 1] (B, H, W, 3), which of them the safety checker withheld).

    Every image draws its noise from a generator of its own, on the CPU, so the draws do not depend on the
    batch or the device. What remains is rounding: another batch size may sum a matrix product in another
    order. In float32 the tests hold that to 1/255 a pixel; half precision on a GPU may differ by more.
    """
    import torch

    output = pipeline(
        instructions,
        image=images,
        num_inference_steps=args.steps,
        image_guidance_scale=args.image_guidance_scale,
        guidance_scale=args.guidance_scale,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="np",
        callback_on_step_end=on_step,
    )
    return output.images, output.nsfw_content_detected or [False] * len(images)


def write_batch(records: dict[Edit, dict], pixels, withheld: list[bool], args):
    """Write what `edit_batch` returned, each in its image's size, one after the other with its record.

    Returns (edits made, {image: why it has no output}). Raises OSError where the disk takes no more.
    """
    import numpy as np
    from PIL import Image

    made: list[Edit] = []
    left_out: dict[str, str] = {}
    for (edit, record), edited, hidden in zip(records.items(), pixels, withheld, strict=True):
        if hidden:
            left_out[str(edit.image)] = f"{edit.image}: the model's safety checker withheld the result"
        elif not np.isfinite(edited).all():
            left_out[str(edit.image)] = f"{edit.image}: the model's output is not a number"
        else:
            result = Image.fromarray((edited * 255).round().astype(np.uint8))
            result = editing.restore_image(result, (record["width"], record["height"]), args.resolution)
            content = editing.encode_image(result, f".{args.format}")
            planning.keep(Path(args.output_dir), edit.output, content, record)
            made.append(edit)
    return made, left_out


# Looking at it.


def contact_sheet(rows: list[tuple[Image.Image, Image.Image, str, str]], cell: int = 256) -> Image.Image:
    """Input and output side by side, with name and instruction below, in as many columns as make it squarish.

    `rows` hold (input, output, name, instruction). Images larger than `cell` pixels are scaled down.
    """
    from PIL import Image, ImageDraw, ImageFont

    font, gap, line = ImageFont.load_default(13), 8, 17
    columns = max(1, round((len(rows) / 2) ** 0.5))
    width = 2 * cell + 3 * gap
    sheet = Image.new("RGB", (columns * width, (cell + 2 * line + 3 * gap) * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)

    def write(x: int, y: int, text: str, color: str) -> None:
        text = " ".join(text.split())
        while draw.textlength(text, font) > 2 * cell:
            text = text.removesuffix("…")[:-1] + "…"
        draw.text((x, y), text, color, font)

    top = gap
    for start in range(0, len(rows), columns):
        shown = []
        for before, after, name, instruction in rows[start : start + columns]:
            pair = before.copy(), after.copy()
            for image in pair:
                image.thumbnail((cell, cell), Image.Resampling.LANCZOS)
            shown.append((pair, name, instruction))
        height = max(image.height for pair, _, _ in shown for image in pair)
        for column, (pair, name, instruction) in enumerate(shown):
            left = column * width + gap
            sheet.paste(pair[0], (left, top))
            sheet.paste(pair[1], (left + pair[0].width + gap, top))
            below = top + max(image.height for image in pair) + 2
            write(left, below, name, "black")
            write(left, below + line, instruction, "dimgray")
        top += height + 2 * line + 2 * gap
    return sheet.crop((0, 0, sheet.width, top))


def parse_arguments(argv: list[str] | None):
    parser = editing.OneLineParser(__file__, __doc__)
    what = parser.add_argument_group("images and instructions")
    what.add_argument("inputs", nargs="*", help="files, folders (searched to any depth) or quoted globs")
    what.add_argument("--instruction", help="one instruction for all images")
    what.add_argument("--instructions_file", help="several: a .txt, or a .jsonl or .csv that names its images")
    output = parser.add_argument_group("output")
    output.add_argument("--output_dir", required=True, help="folder for the edited images, made if missing")
    output.add_argument("--format", choices=("png", "jpg", "webp"), default="png", help="file type of the outputs")
    output.add_argument(
        "--contact_sheet",
        type=editing.whole_number(0),
        default=24,
        metavar="N",
        help=f"show N edits, evenly chosen, in OUTPUT_DIR/{planning.CONTACT_SHEET}; 0 for none",
    )
    output.add_argument(
        "--overwrite", action="store_true", help="make outputs again that were made with other settings"
    )
    editing.add_sampling_flags(parser, model_id=None)
    speed = parser.add_argument_group("speed")
    speed.add_argument(
        "--batch_size", type=editing.whole_number(1), default=4, help="images of one size edited at a time"
    )
    speed.add_argument(
        "--compile",
        action="store_true",
        help="compile the UNet's transformer blocks with torch.compile: costs up to minutes at the first batch and "
        "at few later ones of another size, so it is for many images; where the compiler fails, editing goes on "
        "without it",
    )
    args = parser.parse_intermixed_args(argv)

    if (args.instruction is None) == (args.instructions_file is None):
        parser.error("--instruction: give either --instruction or --instructions_file")
    if args.instruction is not None and not args.instruction.strip():
        parser.error("--instruction: the text is empty; say what to do with the images")
    return parser, args


def plan(args) -> list[Edit]:
    """Every edit that the arguments ask for, in order. Raises ValueError, in one line."""
    output_dir = Path(args.output_dir)
    if args.instruction is not None:
        lines = [(None, args.instruction.strip())]
    else:
        lines = planning.read_instructions(args.instructions_file)
    if lines[0][0] is not None:
        if args.inputs:
            raise ValueError(f"{args.inputs[0]}: {args.instructions_file} names the images; give one or the other")
        folder = Path(args.instructions_file).parent
        wanted = [((folder / image).resolve(), image, instruction) for image, instruction in lines]
    elif not args.inputs:
        raise ValueError("inputs: missing; give files, folders or quoted globs of images")
    else:
        images = planning.find_images(args.inputs, output_dir)
        wanted = [(path, name, instruction) for _, instruction in lines for path, name in images]
    return planning.plan_outputs(wanted, f".{args.format}")


def one_ahead(pool: Executor, function, items):
    """Yield function(item) for all `items` in order; while the caller works on one, `pool` computes the next."""
    following: Future | None = None
    for item in items:
        current, following = following, pool.submit(function, item)
        if current is not None:
            yield current.result()
    if following is not None:
        yield following.result()


def load_model(parser, args):
    """The pipeline, on CUDA in half precision or on the CPU in single precision, to be compiled if asked for."""
    import torch
    from diffusers import StableDiffusionInstructPix2PixPipeline

    device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
    try:
        pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(args.model_id, dtype=dtype)
    except Exception as error:  # a damaged folder fails in many ways
        parser.error(editing.model_error(args.model_id, error))
    pipeline.to(device).set_progress_bar_config(disable=True)
    if args.compile:
        try:
            # Blocks that are alike are compiled once. To compile the UNet in one piece takes several times as long.
            # Without `dynamic` the second size, and the first smaller batch, would compile them all again; and blocks
            # of every width count against one limit, above which nothing more is compiled.
            torch._dynamo.config.recompile_limit = 64
            pipeline.unet.compile_repeated_blocks(dynamic=True)
        except Exception as error:  # a UNet without such blocks, a platform without a compiler
            parser.warn(f"--compile: {compiler_error(error)}; editing goes on without it")
    return pipeline


def compiler_error(error: Exception) -> str:
    """What went wrong in a compiler, without what torch.compile wraps around it."""
    return editing.first_line(getattr(error, "inner_exception", error))


def edit_all(parser, pipeline, args, settings: dict[Edit, dict], sizes: dict[Edit, tuple[int, int]]):
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

    multiple = editing.size_multiple(pipeline)
    batches = make_batches(sizes, multiple, args.batch_size)
    writes: list[Future] = []
    with contextlib.ExitStack() as stack:
        background = stack.enter_context(ThreadPoolExecutor(2))
        stack.enter_context(bar)
        stack.enter_context(skip_needless_branch(pipeline.unet, args.guidance_scale, args.image_guidance_scale))

        def edit_with_fallback(*arguments):
            nonlocal compiled
            try:
                return edit_batch(pipeline, *arguments, args, show_progress)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # compilers fail in many ways, at the first batch or at a later size
                if not compiled:
                    raise
                compiled = False
                bar.clear()  # its line makes room for the warning's
                parser.warn(f"--compile: {compiler_error(error)}; editing goes on without it")
                stack.enter_context(torch.compiler.set_stance("force_eager"))
                return edit_batch(pipeline, *arguments, args, show_progress)

        read = partial(read_batch, sizes=sizes, multiple=multiple, args=args)
        for batch, (images, unreadable) in zip(batches, one_ahead(background, read, batches), strict=True):
            left_out |= unreadable
            bar.update(len(batch) - len(images))
            if not images:
                continue
            instructions = [edit.instruction for edit in images]
            seeds = [noise_seed(args.seed, settings[edit]["input_sha256"]) for edit in images]
            try:
                results = edit_with_fallback(instructions, [image for image, _ in images.values()], seeds)
            except torch.OutOfMemoryError:
                parser.error(
                    f"--batch_size: {len(images)} images at a time do not fit into the GPU's memory; "
                    "lower it or --resolution and run again: what is done is kept"
                )
            edited += len(images)
            bar.update(len(images))
            records = {
                edit: {"image": str(edit.image)}
                | settings[edit]
                | {"model_id": args.model_id, "noise_seed": seed}
                | {"width": width, "height": height, "device": pipeline.device.type}
                for (edit, (_, (width, height))), seed in zip(images.items(), seeds, strict=True)
            }
            if writes:
                writes[-1].result()  # one at a time, so that records stay in order and a full disk ends the run
            writes.append(background.submit(write_batch, records, *results, args))
        show_progress(None, args.steps - 1, None, None)
    for write in writes:
        finished, failed = write.result()
        made += finished
        left_out |= failed
    return made, left_out


def write_contact_sheet(edits: list[Edit], args, records: dict) -> None:
    """Show at most `args.contact_sheet` of the finished `edits`, evenly chosen, in their order."""
    count = min(args.contact_sheet, len(edits))
    rows = []
    for edit in [edits[i * len(edits) // count] for i in range(count)]:
        after = editing.load_image(str(Path(args.output_dir) / edit.output))
        rows.append((editing.load_image(str(edit.image)), after, edit.output, edit.instruction))
    content = editing.encode_image(contact_sheet(rows), ".png")
    record = planning.own_record(Path(args.output_dir), planning.CONTACT_SHEET, records)
    if record is None or record["output_sha256"] != hashlib.sha256(content).hexdigest():
        planning.keep(Path(args.output_dir), planning.CONTACT_SHEET, content, {})


def look_through(args, edits: list[Edit], output_dir: Path):
    """Every edit's image and earlier output, before weights load. Raises ValueError, in one line.

    Returns (settings of each edit that can be made, edits that are finished, inner sizes of those that are not,
    {image: why it is left out}, how many images the model will see scaled down).
    """
    from tqdm import tqdm

    settings: dict[Edit, dict] = {}
    finished: list[Edit] = []
    sizes: dict[Edit, tuple[int, int]] = {}
    left_out: dict[str, str] = {}
    scaled = 0
    model = planning.model_fingerprint(args.model_id)
    records = planning.read_records(output_dir)
    if args.contact_sheet:
        planning.own_record(output_dir, planning.CONTACT_SHEET, records)
    known: dict[Path, tuple[str, tuple[int, int]]] = {}  # SHA-256 and size of each image
    for edit in tqdm(edits, desc="looking through images", delay=2, leave=False):
        if str(edit.image) in left_out:
            continue
        try:
            if edit.image not in known:
                known[edit.image] = planning.file_sha256(edit.image), upright_size(edit.image)
        except OSError as error:
            left_out[str(edit.image)] = f"{edit.image}: cannot be read ({error.strerror})"
            continue
        except ValueError as error:
            left_out[str(edit.image)] = str(error)
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
        if planning.is_finished(output_dir, edit.output, settings[edit], records, args.overwrite):
            finished.append(edit)
        else:
            sizes[edit] = editing.inner_size(size, args.resolution)
            scaled += sizes[edit] != size
    return settings, finished, sizes, left_out, scaled


def main(argv: list[str] | None = None) -> None:
    parser, args = parse_arguments(argv)
    if warning := editing.guidance_warning(args.guidance_scale, args.image_guidance_scale):
        parser.warn(warning)
    output_dir = Path(args.output_dir)

    # 1. All that can be wrong before weights load: instructions, images, the model's folder, earlier outputs.
    try:
        edits = plan(args)
        editing.check_folder("--output_dir", output_dir)
        editing.check_model(args.model_id)
        settings, finished, sizes, left_out, scaled = look_through(args, edits, output_dir)
    except ValueError as error:
        parser.error(str(error))
    if not settings:
        parser.error(f"{next(iter(left_out.values()))}; none of {len(left_out)} images can be read")

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
            made, failed = edit_all(parser, load_model(parser, args), args, settings, sizes)
            left_out |= failed
        done = set(finished) | set(made)
        if args.contact_sheet and done:
            write_contact_sheet([edit for edit in edits if edit in done], args, planning.read_records(output_dir))
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: stopped; the same command goes on from here\n")
    except OSError as error:
        parser.error(f"--output_dir: {output_dir} cannot be written to ({editing.first_line(error)})")

    # 3. What came of it.
    for message in left_out.values():
        parser.warn(f"left out {message}")
    print(f"{len(made)} edited, {len(finished)} there before, {len(left_out)} images left out: {output_dir}")
    if not done:
        sys.exit(1)


if __name__ == "__main__":
    main()
