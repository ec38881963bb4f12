#!/usr/bin/env python
"""Time edit_images.py against the README's snippet, image by image, on the same images with the same noise.

    python -m benchmarks.inference --size small   # minutes on a CPU
    python -m benchmarks.inference --size sd15    # Stable Diffusion v1.5's shapes, for a GPU

Both sides start from image files and a loaded model and end with PNG files, and take turns in one process: first the
snippet, which reads, edits and writes one image after another, then what edit_images.py does after it has loaded the
model. A first turn of each is not counted; of the others the median counts, and where a machine does other things
meanwhile, each side's fastest turn says more. Weights are random: the arithmetic is a real model's, the pictures are
not. Further flags go to edit_images.py, such as --batch_size 8 or --compile; the snippet gets its steps and scales.
Prints speeds and the largest difference, of 255, of every image's pixels, then one JSON line.
"""

import argparse
import shlex
import shutil
import statistics
import sys
from pathlib import Path

from benchmarks import machine, models
from instruct_pix2pix import cli

INSTRUCTION = "turn it into a cartoon"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--size", choices=models.SIZES, default="small", help="Shapes of the model.")
    add("--resolution", type=int, help="Side of the square images: 64 for small, 512 for sd15.")
    add("--images", type=cli.whole_number(1), default=16, help="Photographs to edit.")
    add("--repeats", type=cli.whole_number(1), default=3, help="Turns of each side that count.")
    add("--folder", default="outputs/benchmarks", help="Where the model and the images are kept.")
    args, args.further = parser.parse_known_args(argv)
    args.resolution = args.resolution or {"sd15": 512}.get(args.size) or models.RESOLUTIONS[args.size]
    if args.resolution < 64 or args.resolution % 64:
        raise cli.UserError(f"--resolution: {args.resolution} is not a multiple of 64, which needs no padding")
    if args.images > len(models.PHOTOGRAPHS):
        raise cli.UserError(f"--images: {args.images} is too many; assets/photos/train has {len(models.PHOTOGRAPHS)}")
    return args


def square_images(folder: Path, count: int, side: int) -> list[Path]:
    """`count` photographs as JPEG files of side x side pixels in a `folder` of their own."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for photo in models.PHOTOGRAPHS[:count]:
        models.fitted(photo, (side, side)).save(folder / f"{photo.stem}.jpg", quality=95)
    return sorted(folder.iterdir())


def edit_one_by_one(pipeline, flags, images: dict[Path, int], output_dir: Path) -> None:
    """The README's snippet, for {image: seed of its noise}, into files of the images' names."""
    import torch
    from diffusers.utils import load_image

    shutil.rmtree(output_dir, ignore_errors=True)
    output_dir.mkdir()
    for path, seed in images.items():
        edited = pipeline(
            INSTRUCTION,
            image=load_image(str(path)),
            num_inference_steps=flags.steps,
            image_guidance_scale=flags.image_guidance_scale,
            guidance_scale=flags.guidance_scale,
            generator=torch.Generator().manual_seed(seed),
        ).images[0]
        edited.save(output_dir / f"{path.stem}.png")


def largest_differences(first: Path, second: Path) -> dict[str, int]:
    """{name: largest difference of two pixels, of 255} of the PNG files of two folders."""
    import numpy as np
    from PIL import Image

    names = sorted(path.name for path in first.glob("*.png"))
    assert names == sorted(path.name for path in second.glob("*.png"))
    pixels = [[np.asarray(Image.open(folder / name)).astype(int) for name in names] for folder in (first, second)]
    return {name: int(abs(one - two).max()) for name, one, two in zip(names, *pixels, strict=True)}


def main(argv: list[str] | None = None) -> dict:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    from inference import edit_images
    from instruct_pix2pix import edit_folder, editing
    from instruct_pix2pix.files import file_sha256

    folder = Path(args.folder)
    model = models.model_folder(args.size, folder, in_channels=8)
    images = square_images(folder / "images", args.images, args.resolution)
    plain_dir, batch_dir = folder / "inference-plain", folder / "inference-batches"
    flags = [str(folder / "images"), f"--model_id={model}", f"--output_dir={batch_dir}"]
    flags += [f"--instruction={INSTRUCTION}", "--contact_sheet=0", f"--resolution={args.resolution}"]
    flags = edit_images.parse_args([*flags, *args.further])
    plain, ours = editing.load_pipeline(str(model)), edit_folder.load_model(flags)
    seeds = {path: edit_folder.noise_seed(flags.seed, file_sha256(path)) for path in images}

    def edit_in_batches() -> None:
        shutil.rmtree(batch_dir, ignore_errors=True)
        batch_dir.mkdir()
        settings, _, sizes, _, _ = edit_folder.look_through(flags, edit_folder.plan(flags))
        made, _ = edit_folder.edit_all(ours, flags, settings, sizes)
        assert len(made) == args.images

    sides = {"snippet": lambda: edit_one_by_one(plain, flags, seeds, plain_dir), "edit_images": edit_in_batches}
    seconds = machine.seconds_in_turns(sides, args.repeats)
    median = {side: statistics.median(times) for side, times in seconds.items()}
    result = {
        "command": f"python -m benchmarks.inference {shlex.join(argv)}".strip(),
        **{name: getattr(args, name) for name in ("size", "resolution", "images", "repeats")},
        **{name: getattr(flags, name) for name in ("steps", "guidance_scale", "image_guidance_scale", "batch_size")},
        "compile": flags.compile,
        "dtype": str(plain.dtype).removeprefix("torch."),
        **machine.describe(),
        "images_per_second": {side: round(args.images / value, 3) for side, value in median.items()},
        "ratio": round(median["snippet"] / median["edit_images"], 2),
        "ratio_of_fastest_turns": round(min(seconds["snippet"]) / min(seconds["edit_images"]), 2),
        "seconds": seconds,
        "largest_differences": largest_differences(plain_dir, batch_dir),
    }
    machine.report(result)
    return result


if __name__ == "__main__":
    cli.run(main)
