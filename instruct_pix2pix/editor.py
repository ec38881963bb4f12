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
from instruct_pix2pix.cli import MemoryShortage, Parser, UserError, warn
from instruct_pix2pix.devices import is_out_of_memory
from instruct_pix2pix.evaluation.settings import SCHEDULERS, Setting
from instruct_pix2pix.files import check_folder, write_bytes
from instruct_pix2pix.images import encode_image

if TYPE_CHECKING:
    from diffusers import StableDiffusionInstructPix2PixPipeline
    from PIL import Image


class Editor:
    """A model that edits images by instruction. Its weights load at the first edit, or in `from_pretrained`.

    `model_id` is what --model_id takes: a folder, an id on the Hub, or a training's checkpoint. What is left out of an
    edit is what the model's recommended_settings.json says, else `usual`. Raises UserError for what is no such model.
    """

    def __init__(self, model_id: str, device: str = "auto", dtype: str = "auto", usual: Setting = editing.USUAL):
        self.model_id, self.device, self.dtype, self.usual = os.path.expanduser(model_id), device, dtype, usual
        editing.check_model(self.model_id)
        self.recommended = editing.recommended_settings(self.model_id)

    @classmethod
    def from_pretrained(cls, model_id: str, device: str = "auto", dtype: str = "auto") -> Editor:
        """The editor with its weights loaded; `device` and `dtype` as --device and --dtype. Raises UserError."""
        editor = cls(model_id, device, dtype)
        _ = editor.pipeline
        return editor

    @functools.cached_property
    def pipeline(self) -> StableDiffusionInstructPix2PixPipeline:
        pipeline = editing.load_pipeline(self.model_id, device=self.device, dtype=self.dtype)
        pipeline.set_progress_bar_config(disable=None)  # a bar, where there is a terminal to show it
        return pipeline

    def __call__(
        self,
        image: editing.ImageSource,
        instruction: str,
        *,
        negative_prompt: str = "",
        steps: int | None = None,
        image_guidance_scale: float | None = None,
        guidance_scale: float | None = None,
        scheduler: str | None = None,
        seed: int = 0,
        num_variations: int = 1,
        mask: editing.ImageSource | None = None,
        resolution: int = 512,
        tile: int = 0,
        on_step=None,
    ) -> Image.Image | list[Image.Image]:
        """Edit an image; the RGB result has its size. A list of them where `num_variations` is above 1.

        Variation n is what `seed` + n - 1 gives alone. `scheduler` is a key of SCHEDULERS, or "own" for the pipeline's.
        Where the grey `mask` is black every pixel is the input's; white is edited. For `resolution` and `tile` see
        `editing.edit`. `on_step(done, of)` is called after every denoising step of all variations. Raises UserError,
        before weights load for what can be known then.
        """
        if scheduler not in (None, "own", *SCHEDULERS):
            raise UserError(f"--scheduler: {scheduler!r} is not a scheduler; give own, {', '.join(SCHEDULERS)}")
        given = zip(Setting._fields, (steps, image_guidance_scale, guidance_scale, scheduler), strict=True)
        given = {name: None if value == "own" else value for name, value in given if value is not None}
        flags = argparse.Namespace(**self.usual._asdict() | given, stated=given)
        setting, taken = editing.sampling_of(flags, self.recommended, instruction)
        if taken:
            print(taken)
        if warning := editing.guidance_warning(setting.guidance_scale, setting.image_guidance_scale, negative_prompt):
            warn(warning)
        picture = editing.open_image(image, "--image")
        inner = editing.inner_size(picture.size, resolution)
        if inner != picture.size:
            print("--resolution {}: scaled down to {}x{} for the model, and back up".format(resolution, *inner))
        if mask is not None:
            opened = editing.open_image(mask, "--mask")
            mask = editing.fit_mask(opened, picture.size)
            if mask.size != opened.size:
                print("--mask: {}x{} is scaled to the image's size".format(*opened.size))
        editing.warn_of_cut(self.pipeline, [instruction], negative_prompt)

        def report(_, step, __, tensors):
            if on_step:
                on_step(len(results) * setting.steps + step + 1, num_variations * setting.steps)
            return tensors

        results: list[Image.Image] = []
        options = {"negative_prompt": negative_prompt, "resolution": resolution, "tile": tile, "on_step": report}
        # One at a time: the first is to the bit what it is alone, and memory does not grow with their number.
        for number in range(seed, seed + num_variations):
            try:
                [edited] = editing.edit(
                    self.pipeline, [instruction], [picture], [number], **setting._asdict(), **options
                )
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                size = "{}x{}".format(*inner)
                raise MemoryShortage(
                    f"--resolution: {size} pixels do not fit into the GPU's memory; lower it, or give --tile"
                ) from None
            results.append(edited if mask is None else editing.keep_outside(picture, edited, mask))
        return results if num_variations > 1 else results[0]


def edit_one_image(argv: list[str] | None, description: str, *, instruction: str, output: str, **defaults) -> None:
    """What cartoonize.py and low_level_image_processing.py do: read an image, edit it, write the result.

    `description` is the script's docstring; `instruction` and `output` are its defaults, as are `defaults`, which
    `add_sampling_flags` takes. Raises UserError.
    """
    parser = Parser(description)
    group = parser.add_argument_group("image and instruction")
    group.add_argument("--image", required=True, help="path or URL of the image")
    group.add_argument("--instruction", default=instruction, help="what to do with it")
    group.add_argument("--mask", help="path or URL of a grey image: where it is black, nothing changes")
    group.add_argument("--output", default=output, help="file to write: .png, .jpg or .webp")
    editing.add_sampling_flags(parser, **defaults)
    args = parser.parse_args(argv)
    paths = editing.numbered(Path(args.output), args.num_variations)
    for path in paths:
        _check_output(path, args.image, args.mask or "")
    usual = Setting(*(getattr(args, name) for name in Setting._fields))
    editor = Editor(args.model_id, args.device, args.dtype, usual)
    names = {"negative_prompt", "seed", "num_variations", "mask", "resolution", "tile"} | args.stated
    given = {name: getattr(args, name) for name in names}
    if "scheduler" in given:
        given["scheduler"] = args.scheduler or "own"
    edited = editor(args.image, args.instruction, **given)
    for path, picture in zip(paths, edited if args.num_variations > 1 else [edited], strict=True):
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
