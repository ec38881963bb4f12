"""Editing images: loads a pipeline, knows the sizes it takes and what guidance does, and edits.

Used by the inference scripts, the evaluation and the validation, so that all edit alike. Nothing heavy is imported at
the top: `--help` and a wrong flag answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from instruct_pix2pix.cli import Parser, UserError, first_line, guidance, warn, whole_number
from instruct_pix2pix.devices import add_device_flags, choose_device
from instruct_pix2pix.evaluation.settings import (
    SCHEDULERS,
    SETTINGS_FILE,
    Setting,
    choose_setting,
    read_settings,
    scheduler_name,
)
from instruct_pix2pix.images import BadImage, add_pixel_limit, read_image, to_rgb
from instruct_pix2pix.models import trained

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionInstructPix2PixPipeline
    from PIL import Image

# The published models' settings: blog post and README of instruction-tuned Stable Diffusion.
USUAL = Setting(steps=20, image_guidance_scale=1.5, guidance_scale=7.0)
MOST_SHOWN = 100  # characters of a text, in a message
OVERLAP = 0.25  # of a window's side with the next, at least; the autoencoder's tiles overlap by as much
ImageSource = "Image.Image | str | os.PathLike | bytes"  # a picture, its path or http(s) address, or its file's bytes


# Flags.


class Stated(argparse.Action):
    """Stores a flag's value, and in `stated` that it was given: what is left out may be recommended otherwise."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        setattr(namespace, self.dest, values)
        namespace.stated = {*namespace.stated, self.dest}


def add_guidance_flags(
    parser,
    guidance_scale: float = USUAL.guidance_scale,
    image_guidance_scale: float = USUAL.image_guidance_scale,
    action=None,
) -> None:
    """Add --image_guidance_scale and --guidance_scale to a parser or a group of one, with these defaults."""
    parser.add_argument(
        "--image_guidance_scale",
        action=action,
        type=guidance,
        default=image_guidance_scale,
        help="how closely the output keeps to the input image; below 1 diffusers turns all guidance off",
    )
    parser.add_argument(
        "--guidance_scale",
        action=action,
        type=guidance,
        default=guidance_scale,
        help="how closely the output follows the instruction; at 1 or below diffusers turns all guidance off",
    )


def usual_setting(flags: argparse.Namespace) -> Setting:
    """The two scales that `add_guidance_flags` gave, with the steps and the sampler of the published models."""
    return USUAL._replace(image_guidance_scale=flags.image_guidance_scale, guidance_scale=flags.guidance_scale)


def add_sampling_flags(parser: Parser, model_id: str | None = None, **guidance_scales: float) -> None:
    """Add the flags that every inference script takes. Without a default `model_id` the flag is required."""
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model_id",
        default=model_id,
        required=model_id is None,
        metavar="FOLDER_OR_ID",
        help="an InstructPix2Pix pipeline: a folder, an id on the Hub, or a training's checkpoint-N or adapter",
    )
    add_device_flags(model.add_argument)
    sampling = parser.add_argument_group(
        "sampling", f"Steps, scheduler and scales that are left out are those of the model's {SETTINGS_FILE}, if any."
    )
    parser.set_defaults(stated=set())
    steps = {"type": whole_number(1), "default": USUAL.steps}
    sampling.add_argument("--steps", action=Stated, **steps, help="denoising steps")
    names = f"own (the pipeline's, the default), {', '.join(SCHEDULERS)}"
    sampling.add_argument("--scheduler", action=Stated, type=scheduler_name, metavar="NAME", help=f"sampler: {names}")
    add_guidance_flags(sampling, **guidance_scales, action=Stated)
    sampling.add_argument("--negative_prompt", default="", metavar="TEXT", help="what guidance leads away from")
    sampling.add_argument("--seed", type=whole_number(0), default=0, help="seed of the initial noise")
    variations = "edits of each image, NAME-1, NAME-2, ...: number n is what a seed larger by n - 1 gives"
    sampling.add_argument("--num_variations", type=whole_number(1), default=1, metavar="N", help=variations)
    sampling.add_argument(
        "--resolution",
        type=whole_number(0),
        default=512,
        help="a longer short side is scaled down to this many pixels for the model, and the result back up; "
        "0 gives the model every image at its own size",
    )
    tile = "side of overlapping windows that a larger image is edited in, which bounds memory; 0 for none"
    sampling.add_argument("--tile", type=whole_number(0), default=0, metavar="PIXELS", help=tile)
    add_pixel_limit(sampling.add_argument)


def numbered(path: Path, count: int) -> list[Path]:
    """The files of an image's `count` variations: NAME-1, NAME-2 and so on, or the path itself for one."""
    return [path.with_stem(f"{path.stem}-{number}") for number in range(1, count + 1)] if count > 1 else [path]


def guidance_warning(guidance_scale: float, image_guidance_scale: float, negative_prompt: str = "") -> str | None:
    """One line where diffusers ignores the negative prompt, or both scales (unless they are 1, for no guidance).

    The pipeline combines its three predictions (Brooks et al. 2023, equation 3) only if guidance_scale > 1
    and image_guidance_scale >= 1. Outside of that it uses the fully conditioned prediction alone.
    """
    unused = "--negative_prompt is not used without guidance" if negative_prompt else ""
    if guidance_scale == image_guidance_scale == 1:
        return unused or None
    if image_guidance_scale < 1:
        cause = f"--image_guidance_scale {image_guidance_scale:g} is below 1"
    elif guidance_scale <= 1:
        cause = f"--guidance_scale {guidance_scale:g} is not above 1"
    else:
        return None
    off = f"{cause}: diffusers turns all guidance off, of the text and of the image"
    return f"{off}; {unused}" if unused else off


def warn_of_cut(pipeline, instructions: Iterable[str], negative_prompt: str) -> None:
    """Say what the text encoder will not see: CLIP reads 77 tokens, of which two mark start and end."""
    tokenizer, limit = pipeline.tokenizer, pipeline.tokenizer.model_max_length
    for flag, texts in {"--instruction": list(instructions), "--negative_prompt": [negative_prompt]}.items():
        lost = [tokenizer.decode(ids[limit - 1 : -1]) for ids in tokenizer(texts).input_ids if ids[limit:]]
        if lost:
            others = f", nor the end of {len(lost) - 1} others" if lost[1:] else ""
            text = lost[0] if len(lost[0]) <= MOST_SHOWN else f"{lost[0][:MOST_SHOWN]} ..."
            warn(f"{flag}: longer than the {limit} tokens that the model reads; it does not see {text!r}{others}")


# Models.


def check_model(model_id: str, flag: str = "--model_id") -> None:
    """Raise UserError unless `model_id` may be an InstructPix2Pix pipeline, in a folder or on the Hub, or is a whole
    checkpoint or an adapter of a training.

    Reads the UNet's configuration, a small JSON file, so that a mistake is said before any weights load.
    """
    folder = Path(model_id).expanduser()
    if trained.needs_base(folder):
        return trained.check_base(folder, flag)
    if folder.is_file():
        raise UserError(f"{flag}: {model_id} is a file; make a pipeline of it with tools/export_single_file.py")
    if folder.exists():
        if not (folder / "model_index.json").is_file():
            raise UserError(f"{flag}: {model_id} has no model_index.json; give a folder as save_pretrained writes it")
        configuration = folder / "unet/config.json"
    else:
        missing = f"{flag}: {model_id} is no folder here, and "
        try:
            fetched = _fetch(model_id, "unet/config.json")
        except Exception as error:  # a name that is no id, no network, no access
            reason = f"the Hub does not give it ({type(error).__name__}); check the name, the network and HF_TOKEN"
            raise UserError(missing + reason) from None
        if fetched is None:
            raise UserError(missing + "the Hub shows no such Stable Diffusion model; check the name and HF_TOKEN")
        configuration = Path(fetched)
    try:
        channels = json.loads(configuration.read_text())["in_channels"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = first_line(error)
        raise UserError(f"{flag}: {model_id} has no usable unet/config.json ({reason}); save it again") from None
    if channels != 8:
        raise UserError(
            f"{flag}: {model_id} has a UNet of {channels} input channels, and editing takes 8; "
            "train it first with train_instruct_pix2pix.py"
        )


def _fetch(model_id: str, name: str) -> str | None:
    """The path of a small file of an id, from the cache or the Hub; None where the Hub has none."""
    import huggingface_hub

    cached = huggingface_hub.try_to_load_from_cache(model_id, name)
    if isinstance(cached, str):
        return cached
    # Asked first because it answers at once; a download retries for half a minute without a network.
    if huggingface_hub.file_exists(model_id, name):
        return huggingface_hub.hf_hub_download(model_id, name)
    return None


def recommended_settings(model_id: str) -> dict | None:
    """What the model's recommended_settings.json holds, see `read_settings`; None where it has none, or, with a
    warning, where the Hub cannot be asked. Raises UserError for a file that is damaged."""
    path = _beside(model_id, SETTINGS_FILE)
    return read_settings(path) if path else None


def _beside(model_id: str, name: str) -> Path | None:
    """The path of a file that a model may have beside its parts; None where it has none, or, with a warning, where the
    Hub cannot be asked."""
    folder = Path(model_id).expanduser()
    path = folder / name
    if not folder.exists():
        try:
            path = Path(_fetch(model_id, name) or path)
        except Exception as error:
            warn(f"{model_id}: the Hub cannot be asked for {name} ({type(error).__name__})")
    return path if path.is_file() else None


def sampling_of(args: argparse.Namespace, found: dict | None, instruction: str) -> tuple[Setting, str]:
    """The setting to edit by an instruction with: flags that were given, then what is recommended for it, then the
    flags' defaults. And a line that says what was taken from `found`, "" for nothing."""
    values = {name: getattr(args, name) for name in Setting._fields}
    taken, task = {}, ""
    if found:
        task, best = choose_setting(found, instruction)
        taken = {name: value for name, value in best._asdict().items() if name not in args.stated}
    named = ", ".join(f"{name} {'own' if value is None else value}" for name, value in taken.items())
    return Setting(**values | taken), f"{SETTINGS_FILE}, {task}: {named}" if taken else ""


def load_pipeline(
    model_id: str, flag: str = "--model_id", device: str = "auto", dtype: str = "auto", **options
) -> StableDiffusionInstructPix2PixPipeline:
    """A model that passed `check_model`, where and in the precision that `choose_device` says; no progress bar.

    A checkpoint edits with its average's weights, where it has one, as the pipeline exported there would. What the
    model has of decoder skips is the pipeline's `decoder_skips`. `options` go to a pipeline's `from_pretrained`. Raises
    UserError where a file is missing or damaged.
    """
    from diffusers import StableDiffusionInstructPix2PixPipeline

    from instruct_pix2pix.models import decoder_skips, sd

    place, precision = choose_device(device, dtype)
    try:
        if trained.needs_base(folder := Path(model_id).expanduser()):
            pipeline = trained.load_pipeline(folder, precision)
        else:
            pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(model_id, dtype=precision, **options)
            if all(_beside(model_id, file) for file in decoder_skips.FILES):
                pipeline.decoder_skips = decoder_skips.load(model_id, precision, place)
        sd.check_vocabulary(pipeline.tokenizer)
        pipeline.to(place)
    except UserError:
        raise
    except Exception as error:  # a damaged folder fails in many ways
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{flag}: {model_id} cannot be loaded ({reason}); save or download it again") from None
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# Images, sizes, masks.


def open_image(source: ImageSource, flag: str) -> Image.Image:
    """An upright RGB picture. Raises UserError, which names the flag."""
    if not isinstance(source, (str, os.PathLike, bytes)):
        return to_rgb(source)
    try:
        return read_image(source)
    except BadImage as error:
        name = "its bytes" if isinstance(source, bytes) else source
        raise UserError(f"{flag}: {name}: {error}; give the path or the URL of a whole image file") from None


def size_multiple(pipeline) -> int:
    """The pixels that width and height must be a multiple of: VAE factor times the UNet's downsampling."""
    return pipeline.vae_scale_factor * 2 ** (len(pipeline.unet.config.block_out_channels) - 1)


def inner_size(size: tuple[int, int], resolution: int) -> tuple[int, int]:
    """The (width, height) an image has inside the model: its own, or with its short side at `resolution`."""
    short = min(size)
    if resolution == 0 or short <= resolution:
        return size
    return round(size[0] * resolution / short), round(size[1] * resolution / short)


def fit_image(image: Image.Image, resolution: int, multiple: int) -> Image.Image:
    """Scale an image down to `resolution` if it is larger, then pad it at right and bottom to the multiple.

    The padding mirrors the image and is cropped off again by `restore_image`, so that every pixel stays where
    it is: stretching to the next multiple would resample the image twice and cost detail.
    """
    import numpy as np
    from PIL import Image

    width, height = inner_size(image.size, resolution)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    padding = ((0, -height % multiple), (0, -width % multiple), (0, 0))
    return Image.fromarray(np.pad(np.asarray(image), padding, mode="reflect"))


def restore_image(edited: Image.Image, size: tuple[int, int], resolution: int) -> Image.Image:
    """Undo `fit_image`: crop the padding off an edited image and scale it back to `size` (width, height)."""
    from PIL import Image

    inner = inner_size(size, resolution)
    edited = edited.crop((0, 0, *inner))
    return edited if inner == size else edited.resize(size, Image.Resampling.LANCZOS)


def fit_mask(mask: Image.Image, size: tuple[int, int], name: str = "--mask") -> Image.Image:
    """A mask as 8-bit grey of an image's `size` (width, height), scaled where only its scale differs.

    Raises UserError, which calls it `name`, where its shape is another or it leaves nothing to edit.
    """
    from PIL import Image

    mask, (width, height) = mask.convert("L"), size
    # The same shape, if the sides of the smaller one may have been rounded.
    if abs(mask.height * width - mask.width * height) > max(mask.width, width):
        of = f"{mask.width}x{mask.height} for an image of {width}x{height}"
        raise UserError(f"{name}: {of}, another shape; give a mask of the image's size")
    if mask.getextrema()[1] < 128:
        raise UserError(f"{name}: nowhere brighter than mid-grey; paint white what is to be edited")
    return mask.resize(size, Image.Resampling.BILINEAR)


def keep_outside(image: Image.Image, edited: Image.Image, mask: Image.Image) -> Image.Image:
    """The edited image where the mask is white and, bit for bit, the image where it is black; all of one size.

    Inside of the white the edit comes in softly, over 1/64 of the short side; grey is a mixture.
    """
    import cv2
    import numpy as np
    from PIL import Image

    grey = np.asarray(mask)
    depth = cv2.distanceTransform((grey > 0).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    share = (np.minimum(depth * 64 / min(mask.size), 1) * (grey / 255))[..., None]
    before, after = np.asarray(image, float), np.asarray(edited, float)
    return Image.fromarray((before + share * (after - before)).round().astype(np.uint8))


# Editing.


@contextlib.contextmanager
def skip_needless_branch(unet, guidance_scale: float, image_guidance_scale: float):
    """While open, the UNet evaluates two of the pipeline's three guidance branches where the third cancels.

    The pipeline stacks a batch of 3 B, [instruction and image, image alone, neither], and combines what the UNet
    says of it (Brooks et al. 2023, equation 3):

        neither + guidance_scale * (instruction - image) + image_guidance_scale * (image - neither)

    With image_guidance_scale 1 that is without `neither`, with equal scales without `image`. The rows of that
    branch are cut out before the UNet, and the other of the two stands in for it behind the UNet: `image - neither`
    is then exactly zero, and the result is that of three branches but for rounding. Other scales change nothing,
    and where diffusers turns guidance off (see `guidance_warning`) the batch is no stack.
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


@contextlib.contextmanager
def sample_with(pipeline, name: str | None):
    """While open, the pipeline samples with one of SCHEDULERS, on the noise schedule, prediction type and spacing of
    its own; None leaves its own."""
    import diffusers

    own = pipeline.scheduler
    if name is not None:
        # What the pipeline's own scheduler takes by default stays too. Only DDIM clips latents unless told otherwise.
        config = {"clip_sample": False, **own.config, "_use_default_values": []}
        pipeline.scheduler = getattr(diffusers, SCHEDULERS[name]).from_config(config)
    try:
        yield
    finally:
        pipeline.scheduler = own


@contextlib.contextmanager
def in_windows(pipeline, side: int):
    """While open, no network of the pipeline sees more than `side` by `side` pixels at a time; 0 changes nothing.

    `side` is a multiple of `size_multiple`. Larger latents go through the UNet in overlapping windows, one after
    another, and a pixel gets the mean of the windows' predictions, weighted by a bell over each: the least-squares
    answer of MultiDiffusion (Bar-Tal et al. 2023, section 3), since a sampler's step is linear in the prediction. The
    autoencoder works in diffusers' tiles. What fits into one window passes through as it is.
    """
    if not side:
        yield
        return
    import torch

    unet, vae, window = pipeline.unet, pipeline.vae, side // pipeline.vae_scale_factor

    def bell(length: int):  # above 0 everywhere, and highest in the middle
        return torch.sin(torch.pi * (torch.arange(length, device=unet.device) + 0.5) / length) ** 2

    def forward(sample, *args, **kwargs):  # (B, 8, h, w) -> [(B, 4, h, w)]
        height, width = sample.shape[-2:]
        if max(height, width) <= window:
            return predict(sample, *args, **kwargs)
        weight = bell(min(window, height))[:, None] * bell(min(window, width))
        total = torch.zeros_like(sample[:, : unet.config.out_channels], dtype=torch.float32)
        weights = torch.zeros_like(total[0, 0])
        for top, left in itertools.product(window_starts(height, window), window_starts(width, window)):
            place = (..., slice(top, top + window), slice(left, left + window))
            total[place] += weight * predict(sample[place], *args, **kwargs)[0]
            weights[place] += weight
        return ((total / weights).to(sample.dtype),)

    predict, patched = unet.forward, unet.__dict__.get("forward")
    tiling = {name: getattr(vae, name) for name in ("use_tiling", "tile_sample_min_size", "tile_latent_min_size")}
    unet.forward = forward
    vae.enable_tiling()
    vae.tile_sample_min_size, vae.tile_latent_min_size = side, window
    try:
        yield
    finally:
        del unet.forward
        if patched:
            unet.forward = patched
        for name, value in tiling.items():
            setattr(vae, name, value)


def window_starts(length: int, window: int) -> list[int]:
    """Where windows begin that cover `length` evenly, each overlapping the next by at least OVERLAP of itself."""
    rest = max(length - window, 0)
    count = math.ceil(rest / (window * (1 - OVERLAP)))
    return [round(rest * number / max(count, 1)) for number in range(count + 1)]


def encode_images(pipeline, images: list[Image.Image]) -> torch.Tensor | list[Image.Image]:
    """B RGB images of one size that the model takes to latents (B, 4, h, w), for many calls of `edit_batch`; the images
    themselves where the decoder needs them too."""
    import torch

    if getattr(pipeline, "decoder_skips", None):
        return images
    with torch.no_grad():
        pixels = pipeline.image_processor.preprocess(images).to(pipeline.device, pipeline.vae.dtype)
        return pipeline.vae.encode(pixels).latent_dist.mode()


def edit_batch(
    pipeline,
    instructions: list[str],
    images: list[Image.Image] | torch.Tensor,
    seeds: list[int],
    *,
    steps: int,
    guidance_scale: float,
    image_guidance_scale: float,
    scheduler: str | None = None,
    negative_prompt: str = "",
    tile: int = 0,
    on_step=None,
    latents: bool = False,
) -> list[Image.Image | str] | torch.Tensor:
    """Edit B RGB images of one size, which `fit_image` gave: B images of that size, or why there is none. They may come
    as what `encode_images` made of them. `scheduler` is a key of SCHEDULERS, None for the pipeline's own.

    Every image draws its noise from a generator of its own, on the CPU, so the draws do not depend on the
    batch or the device. What remains is rounding: another batch size may sum a matrix product in another
    order. In float32 the tests hold that to 1/255 a pixel; half precision on a GPU may differ by more.

    Guidance leads away from the `negative_prompt`, which equation 3 leaves empty. What is larger than `tile` pixels is
    edited `in_windows` of that side, or the next that the model takes. `on_step` is diffusers' callback_on_step_end.
    With `latents` the edits stay what the UNet made, (B, C, h, w), times the VAE's scaling factor.
    """
    import numpy as np
    import torch
    from PIL import Image

    from instruct_pix2pix.models import decoder_skips

    branches = skip_needless_branch(pipeline.unet, guidance_scale, image_guidance_scale)
    skips = decoder_skips.in_use(pipeline.vae, getattr(pipeline, "decoder_skips", None))
    side = tile + -tile % size_multiple(pipeline)
    with branches, skips, sample_with(pipeline, scheduler), in_windows(pipeline, side):
        output = pipeline(
            instructions,
            image=images,
            num_inference_steps=steps,
            image_guidance_scale=image_guidance_scale,
            guidance_scale=guidance_scale,
            negative_prompt=[negative_prompt] * len(instructions),
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="latent" if latents else "np",
            callback_on_step_end=on_step,
        )
    if latents:
        return output.images
    results: list[Image.Image | str] = []
    for pixels, hidden in zip(output.images, output.nsfw_content_detected or [False] * len(images), strict=True):
        if hidden:
            results.append("the model's safety checker withheld the result")
        elif not np.isfinite(pixels).all():
            results.append("the model's output is not a number")
        else:
            results.append(Image.fromarray((pixels * 255).round().astype(np.uint8)))
    return results


def edit(
    pipeline, instructions: list[str], images: list[Image.Image], seeds: list[int], *, resolution: int = 0, **options
) -> list[Image.Image]:
    """Edit B upright RGB images whose sizes agree once padded: B images of the sizes they had.

    A short side above `resolution` is scaled down for the model, 0 for no limit. The noise of an image depends on its
    seed alone, see `edit_batch`, which takes the `options`. Raises UserError if an output is not finite, or was
    withheld by a safety checker.
    """
    fitted = [fit_image(image, resolution, size_multiple(pipeline)) for image in images]
    results = edit_batch(pipeline, instructions, fitted, seeds, **options)
    for result in results:
        if isinstance(result, str):
            raise UserError(f"{pipeline.name_or_path or 'editing'}: {result}; try another seed or another model")
    return [restore_image(result, image.size, resolution) for result, image in zip(results, images, strict=True)]
