"""What the inference scripts share: their flags, reading and writing images, and the sizes a model takes.

Nothing heavy is imported at the top, so that `--help` and a wrong flag answer at once.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import re
import sys
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from PIL import Image

# Without torchvision, which nothing here needs, importing transformers prints two warnings.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

URL_TIMEOUT_SECONDS = 30


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str:
        # A flag without a default says in its own words what leaving it out means.
        return action.help if action.default is None else super()._get_help_string(action)


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser that shows defaults and answers a mistake with one line and exit code 2."""

    def __init__(self, script: str, description: str):
        super().__init__(
            prog=Path(script).name,
            description=description,
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ")
        message = re.sub(r"^the following arguments are required: (.*)", r"\1: missing; see --help", message)
        message = re.sub(r"^unrecognized arguments: (.*)", r"\1: not understood; see --help", message)
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        sys.exit(2)

    def warn(self, message: str) -> None:
        print(f"{self.prog}: warning: {message}", file=sys.stderr)


def whole_number(minimum: int):
    """An argparse type: an integer of at least `minimum`."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{value} is too small; give {minimum} or more")
        return value

    return convert


def scale(text: str) -> float:
    """An argparse type: a finite number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not math.isfinite(value) or value < 0:
        raise argparse.ArgumentTypeError(f"{text} is not a guidance scale; give a number of at least 0")
    return value


def add_sampling_flags(parser: argparse.ArgumentParser, model_id: str | None) -> None:
    """The flags that every inference script takes. Without a default `model_id` the flag is required."""
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model_id",
        default=model_id,
        required=model_id is None,
        metavar="FOLDER_OR_ID",
        help="an InstructPix2Pix pipeline: a folder, or an id on the Hub",
    )
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--steps", type=whole_number(1), default=20, help="denoising steps")
    sampling.add_argument(
        "--image_guidance_scale",
        type=scale,
        default=1.5,
        help="how closely the output keeps to the input image; below 1 diffusers turns all guidance off",
    )
    sampling.add_argument(
        "--guidance_scale",
        type=scale,
        default=7.0,
        help="how closely the output follows the instruction; at 1 or below diffusers turns all guidance off",
    )
    sampling.add_argument("--seed", type=whole_number(0), default=0, help="seed of the initial noise")
    sampling.add_argument(
        "--resolution",
        type=whole_number(0),
        default=512,
        help="a longer short side is scaled down to this many pixels for the model, and the result back up; "
        "0 gives the model every image at its own size",
    )


def guidance_warning(guidance_scale: float, image_guidance_scale: float) -> str | None:
    """One line where diffusers ignores both scales; None where they count.

    The pipeline combines its three predictions (Brooks et al. 2023, equation 3) only if guidance_scale > 1
    and image_guidance_scale >= 1. Outside of that it uses the fully conditioned prediction alone.
    """
    if image_guidance_scale < 1:
        cause = f"--image_guidance_scale {image_guidance_scale:g} is below 1"
    elif guidance_scale <= 1:
        cause = f"--guidance_scale {guidance_scale:g} is not above 1"
    else:
        return None
    return f"{cause}: diffusers turns all guidance off, of the text and of the image"


def first_line(error: BaseException) -> str:
    """The first line of an exception's message that says something, or its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def check_model(model_id: str) -> None:
    """Raise ValueError, in one line, if `model_id` cannot be an InstructPix2Pix pipeline.

    Reads the UNet's configuration, a small JSON file: of a folder, or of an id on the Hub.
    """
    folder = Path(model_id).expanduser()
    if folder.exists():
        if not (folder / "model_index.json").is_file():
            raise ValueError(
                f"--model_id: {model_id} has no model_index.json; give a folder as save_pretrained writes it"
            )
        configuration = folder / "unet/config.json"
    else:
        configuration = Path(_fetch_unet_config(model_id))
    try:
        channels = json.loads(configuration.read_text())["in_channels"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--model_id: {model_id} has no usable unet/config.json ({first_line(error)}); save it again"
        ) from None
    if channels != 8:
        raise ValueError(
            f"--model_id: {model_id} has a UNet of {channels} input channels, and editing takes 8; "
            "train it first with train_instruct_pix2pix.py"
        )


def _fetch_unet_config(model_id: str) -> str:
    """The path of an id's unet/config.json, from the cache or the Hub; ValueError if neither has it."""
    import huggingface_hub

    missing = f"--model_id: {model_id} is no folder here, and "
    try:
        cached = huggingface_hub.try_to_load_from_cache(model_id, "unet/config.json")
        if isinstance(cached, str):
            return cached
        # Asked first because it answers at once; a download retries for half a minute without a network.
        if huggingface_hub.file_exists(model_id, "unet/config.json"):
            return huggingface_hub.hf_hub_download(model_id, "unet/config.json")
    except Exception as error:  # a name that is no id, no network, no access
        reason = f"the Hub does not give it ({type(error).__name__}); check the name, the network and HF_TOKEN"
        raise ValueError(missing + reason) from None
    raise ValueError(missing + "the Hub shows no such Stable Diffusion model; check the name and HF_TOKEN")


def model_error(model_id: str, error: BaseException) -> str:
    """One line about a pipeline that passed `check_model` and that `from_pretrained` could not load."""
    reason = f"{type(error).__name__}: {first_line(error)}"
    return f"--model_id: {model_id} cannot be loaded ({reason}); save or download it again"


def load_image(source: str) -> Image.Image:
    """Read an image from a path or an http(s) URL: RGB, turned upright as its EXIF orientation says.

    Transparent areas come out white, and 16-bit grey is reduced to 8 bits. Raises ValueError, in one line,
    for what cannot be fetched, is no image, or is damaged.
    """
    from PIL import Image

    try:
        if re.match(r"https?://", source):
            request = urllib.request.Request(source, headers={"User-Agent": "Mozilla/5.0"})
            with urllib.request.urlopen(request, timeout=URL_TIMEOUT_SECONDS) as response:
                content = response.read()
        else:
            content = Path(source).expanduser().read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{source}: does not exist; give the path or the URL of an image") from None
    except Exception as error:  # a malformed URL, a refused connection, a folder, a file without read permission
        raise ValueError(f"{source}: cannot be read ({first_line(error)})") from None
    try:
        with Image.open(io.BytesIO(content)) as image:
            return to_upright_rgb(image)
    except Exception as error:  # Pillow's decoders raise almost anything on damaged bytes
        reason = "not an image" if isinstance(error, Image.UnidentifiedImageError) else first_line(error)
        raise ValueError(f"{source}: cannot be decoded ({reason}); give a whole PNG, JPEG or WebP file") from None


def to_upright_rgb(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation, put transparency on white, and convert to 8-bit RGB."""
    import numpy as np
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey, which convert("RGB") would clip at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


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


def check_folder(flag: str, folder: str | os.PathLike) -> None:
    """Raise ValueError, in one line, if files cannot be written into `folder`, which need not exist yet."""
    path = Path(folder).absolute()
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    if not existing.is_dir():
        raise ValueError(f"{flag}: {existing} is a file; give a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"{flag}: {existing} is not writable; choose another folder")


def check_output(path: str, image: str) -> None:
    """Raise ValueError, in one line, if the edited `image` cannot be written to `path`."""
    if Path(path).suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise ValueError(f"--output: {path} has no ending for an image; use .png, .jpg or .webp")
    if Path(path).is_dir():
        raise ValueError(f"--output: {path} is a folder; give the name of a file")
    if Path(path).exists() and Path(image).exists() and Path(path).samefile(image):
        raise ValueError(f"--output: {path} is the input image itself; give another name")
    check_folder("--output", Path(path).parent)


def encode_image(image: Image.Image, suffix: str) -> bytes:
    """The bytes of an image file: lossless for .png and .webp, quality 95 for .jpg and .jpeg."""
    buffer = io.BytesIO()
    if suffix.lower() == ".webp":
        image.save(buffer, "WEBP", lossless=True)
    elif suffix.lower() in (".jpg", ".jpeg"):
        image.save(buffer, "JPEG", quality=95, subsampling=0)
    else:
        image.save(buffer, "PNG")
    return buffer.getvalue()


def save_image(image: Image.Image, path: str) -> None:
    """Write an image, whole or not at all; the ending decides the format."""
    write_atomically(Path(path), encode_image(image, Path(path).suffix))


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is either there whole or, as before, not there (or the old one)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
