"""Editing one image: three lines in a notebook, the demo, and the scripts that take one --image.

    from instruct_pix2pix import Editor

    editor = Editor.from_pretrained("instruction-tuning-sd/low-level-img-proc")
    editor("photo.jpg", "derain the image").save("derained.png")

Messages name what is wrong as the scripts' flags do. Nothing heavy is imported at the top.
"""

from __future__ import annotations

import argparse
import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING

from instruct_pix2pix import editing
from instruct_pix2pix.cli import Parser, UserError, warn
from instruct_pix2pix.evaluation.settings import SCHEDULERS, Setting
from instruct_pix2pix.files import check_folder, write_bytes
from instruct_pix2pix.images import BadImage, encode_image, read_image, to_rgb

if TYPE_CHECKING:
    from diffusers import StableDiffusionInstructPix2PixPipeline
    from PIL import Image

ImageSource = "Image.Image | str | os.PathLike | bytes"  # a picture, its path or http(s) address, or its file's bytes


class Editor:
    """A model that edits images by instruction. Its weights load at the first edit, or in `from_pretrained`.

    `model_id` is what --model_id takes: a folder, an id on the Hub, or a training's checkpoint. What is left out of an
    edit is what the model's recommended_settings.json says, else `usual`. Raises UserError for what is no such model.
    """

    def __init__(self, model_id: str, device: str = "auto", dtype: str = "auto", usual: Setting = editing.USUAL):
        model_id = os.fspath(model_id)
        editing.check_model(model_id)
        self.model_id, self.device, self.dtype, self.usual = model_id, device, dtype, usual
        self.recommended = editing.recommended_settings(model_id)

    @classmethod
    def from_pretrained(cls, model_id: str, device: str = "auto", dtype: str = "auto") -> Editor:
        """The editor with its weights loaded. `device`: auto, cuda, mps or cpu; `dtype`: auto, float32, float16 or
        bfloat16. Raises UserError."""
        editor = cls(model_id, device, dtype)
        assert editor.pipeline
        return editor

    @functools.cached_property
    def pipeline(self) -> StableDiffusionInstructPix2PixPipeline:
        pipeline = editing.load_pipeline(self.model_id, device=self.device, dtype=self.dtype)
        pipeline.set_progress_bar_config(disable=None)  # a bar, where there is a terminal to show it
        return pipeline

    def __call__(
        self,
        image: ImageSource,
        instruction: str,
        *,
        negative_prompt: str = "",
        steps: int | None = None,
        image_guidance_scale: float | None = None,
        guidance_scale: float | None = None,
        scheduler: str | None = None,
        seed: int = 0,
        num_variations: int = 1,
        mask: ImageSource | None = None,
        resolution: int = 512,
        on_step=None,
    ) -> Image.Image | list[Image.Image]:
        """Edit an image; the RGB result has its size. A list of them where `num_variations` is above 1.

        Variation n is what `seed` + n - 1 gives alone. `scheduler` is a key of SCHEDULERS, or "own" for the
        pipeline's. Where the grayscale `mask` is black, every pixel is the input's; white is edited. A short side
        above `resolution` is scaled down for the model, and back up; 0 for no limit. `on_step(done, of)` is called
        after every denoising step of all variations. Raises UserError before weights load for what can be known then.
        """
        if scheduler not in (None, "own", *SCHEDULERS):
            raise UserError(f"--scheduler: {scheduler!r} is not a scheduler; give own, {', '.join(SCHEDULERS)}")
        given = {
            "steps": steps,
            "image_guidance_scale": image_guidance_scale,
            "guidance_scale": guidance_scale,
            "scheduler": scheduler,
        }
        given = {name: None if value == "own" else value for name, value in given.items() if value is not None}
        flags = argparse.Namespace(**self.usual._asdict() | given, stated=given)
        setting, taken = editing.sampling_of(flags, self.recommended, instruction)
        if taken:
            print(taken)
        if warning := editing.guidance_warning(setting.guidance_scale, setting.image_guidance_scale):
            warn(warning)
        picture = _open(image, "--image")
        if mask is not None:
            mask = editing.fit_mask(_open(mask, "--mask"), picture.size, "--mask")

        def report(_, step, __, tensors):
            if on_step:
                on_step(len(results) * setting.steps + step + 1, num_variations * setting.steps)
            return tensors

        results: list[Image.Image] = []
        # One at a time: the first is to the bit what it is alone, and memory does not grow with their number.
        for number in range(num_variations):
            [edited] = editing.edit(
                self.pipeline,
                [instruction],
                [picture],
                [seed + number],
                **setting._asdict(),
                negative_prompt=negative_prompt,
                resolution=resolution,
                on_step=report,
            )
            results.append(edited if mask is None else editing.keep_outside(picture, edited, mask))
        return results if num_variations > 1 else results[0]


def _open(source: ImageSource, flag: str) -> Image.Image:
    """An upright RGB picture. Raises UserError."""
    if not isinstance(source, (str, os.PathLike, bytes)):
        return to_rgb(source)
    try:
        return read_image(source)
    except BadImage as error:
        name = "its bytes" if isinstance(source, bytes) else source
        raise UserError(f"{flag}: {name}: {error}; give the path or the URL of a whole image file") from None


def edit_one_image(argv: list[str] | None, description: str, *, instruction: str, output: str, **defaults) -> None:
    """What cartoonize.py and low_level_image_processing.py do: read an image, edit it, write the result.

    `description` is the script's docstring; `instruction` and `output` are its defaults, as are `defaults`, which
    `add_sampling_flags` takes. Raises UserError.
    """
    parser = Parser(description)
    group = parser.add_argument_group("image and instruction")
    group.add_argument("--image", required=True, help="path or URL of the image")
    group.add_argument("--instruction", default=instruction, help="what to do with it")
    group.add_argument("--mask", help="path or URL of a grayscale image: where it is black, nothing changes")
    group.add_argument("--output", default=output, help="file to write: .png, .jpg or .webp")
    editing.add_sampling_flags(parser, **defaults)
    args = parser.parse_args(argv)
    paths = [Path(args.output)]
    if args.num_variations > 1:
        paths = [paths[0].with_stem(f"{paths[0].stem}-{number}") for number in range(1, args.num_variations + 1)]
    for path in paths:
        _check_output(path, args.image, args.mask or "")
    usual = Setting(*(getattr(args, name) for name in Setting._fields))
    editor = Editor(args.model_id, args.device, args.dtype, usual)
    edited = editor(
        args.image,
        args.instruction,
        negative_prompt=args.negative_prompt,
        # Given as None, the scheduler is the pipeline's own, whatever is recommended.
        **{name: "own" if getattr(args, name) is None else getattr(args, name) for name in args.stated},
        seed=args.seed,
        num_variations=args.num_variations,
        mask=args.mask,
        resolution=args.resolution,
    )
    for path, picture in zip(paths, edited if len(paths) > 1 else [edited], strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, encode_image(picture, path.suffix))
        print(f"wrote {path}")


def _check_output(path: Path, *inputs: str) -> None:
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"--output: {path} has no ending for an image; use .png, .jpg or .webp")
    if path.is_dir():
        raise UserError(f"--output: {path} is a folder; give the name of a file")
    if path.exists() and any(Path(name).is_file() and path.samefile(name) for name in inputs):
        raise UserError(f"--output: {path} is an input image itself; give another name")
    check_folder("--output", path.parent)
