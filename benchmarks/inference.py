#!/usr/bin/env python
"""Time edit_images.py against the README's snippet, image by image, on the same images with the same noise.

    python -m benchmarks.inference --size small   # minutes on a CPU
    python -m benchmarks.inference --size sd15    # Stable Diffusion v1.5's shapes, for a GPU

Both sides start from image files and a loaded model and end with PNG files, and take turns in one process: first the
snippet, which reads, edits and writes one image after another, then what edit_images.py does after it has loaded the
model. A first turn of each is not counted; of the others the median counts, and where a machine does other things
meanwhile, each side's fastest turn says more. Weights are random: the arithmetic is a real model's, the pictures are
not. Prints speeds and the largest difference, of 255, of every image's pixels, then one JSON line.
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
    what = parser.add_argument_group("what is edited")
    what.add_argument("--size", choices=models.SIZES, default="small", help="Shapes of the model.")
    what.add_argument("--resolution", type=int, help="Side of the square images: 64 for small, 512 for sd15.")
    what.add_argument("--images", type=cli.whole_number(1), default=16, help="Photographs to edit.")
    what.add_argument("--steps", type=cli.whole_number(1), default=20, help="Denoising steps.")
    what.add_argument("--guidance_scale", type=float, default=7.0, help="Of both sides.")
    what.add_argument("--image_guidance_scale", type=float, default=1.5, help="Of both sides.")
    ours = parser.add_argument_group("how edit_images.py does it")
    ours.add_argument("--batch_size", type=cli.whole_number(1), default=4, help="Images edited at a time.")
    ours.add_argument("--compile", action="store_true", help="Compile the UNet's blocks, before the clock starts.")
    how = parser.add_argument_group("how it is timed")
    how.add_argument("--repeats", type=cli.whole_number(1), default=3, help="Turns of each side that count.")
    how.add_argument("--folder", default="outputs/benchmarks", help="Where the model and the images are kept.")
    args = parser.parse_args(argv)
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


def edit_one_by_one(pipeline, args, images: dict[Path, int], output_dir: Path) -> None:
    """The README's snippet, for {image: seed of its noise}, into files of the images' names."""
    import torch
    from diffusers.utils import load_image

    shutil.rmtree(output_dir, ignore_errors=True)
    output_dir.mkdir()
    for path, seed in images.items():
        edited = pipeline(
            INSTRUCTION,
            image=load_image(str(path)),
            num_inference_steps=args.steps,
            image_guidance_scale=args.image_guidance_scale,
            guidance_scale=args.guidance_scale,
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
    flags += [f"--instruction={INSTRUCTION}", "--contact_sheet=0"]
    for name in ("resolution", "steps", "guidance_scale", "image_guidance_scale", "batch_size"):
        flags.append(f"--{name}={getattr(args, name)}")
    ours_args = edit_images.parse_args([*flags, "--compile"] if args.compile else flags)
    plain, ours = editing.load_pipeline(str(model)), edit_folder.load_model(ours_args)
    seeds = {path: edit_folder.noise_seed(ours_args.seed, file_sha256(path)) for path in images}

    def edit_in_batches() -> None:
        shutil.rmtree(batch_dir, ignore_errors=True)
        batch_dir.mkdir()
        settings, _, sizes, _, _ = edit_folder.look_through(ours_args, edit_folder.plan(ours_args))
        made, _ = edit_folder.edit_all(ours, ours_args, settings, sizes)
        assert len(made) == args.images

    sides = {"snippet": lambda: edit_one_by_one(plain, args, seeds, plain_dir), "edit_images": edit_in_batches}
    seconds = machine.seconds_in_turns(sides, args.repeats)
    median = {side: statistics.median(times) for side, times in seconds.items()}
    result = {
        "command": f"python -m benchmarks.inference {shlex.join(argv)}".strip(),
        **{name: value for name, value in vars(args).items() if name != "folder"},
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
