"""Models with random weights and pairs made of the photographs in assets/: what the benchmarks run on, no download."""

import os
import shutil
from pathlib import Path

from instruct_pix2pix.images import read_image

PHOTOGRAPHS = sorted((Path(__file__).parent.parent / "assets/photos/train").glob("*.webp"))
PROMPTS = ("turn it into a cartoon", "make it look like a painting", "sharpen the picture", "remove the noise")
# Widths of UNet and VAE, width, layers and heads of the text encoder. `sd15` has the shapes of Stable Diffusion v1.5
# (but for the vocabulary), `small` its depth and connections at a fraction of the width. In `unet` the frozen encoders
# cost next to nothing: two levels, and a VAE that divides by 2 only, so that 128 px give latents of 64x64.
SIZES = {
    "small": {"unet": (64, 128, 256, 256), "vae": (32, 64, 128, 128), "text": (64, 12, 4)},
    "unet": {"unet": (96, 192), "vae": (32, 32), "text": (64, 2, 4)},
    "sd15": {"unet": (320, 640, 1280, 1280), "vae": (128, 256, 512, 512), "text": (768, 12, 12)},
}
RESOLUTIONS = {"small": 64, "unet": 128, "sd15": 256}  # that training is timed at


def model_folder(size: str, folder: Path, in_channels: int = 4) -> Path:
    """A complete pipeline of a size of SIZES, built once in `folder`.

    Stable Diffusion, in folder/<size>, for 4 channels; InstructPix2Pix, in folder/<size>-edit, for 8.
    """
    path = Path(folder) / {4: size, 8: f"{size}-edit"}[in_channels]
    if not path.is_dir():
        partial = path.with_name(f".{size}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        build_pipeline(**SIZES[size], in_channels=in_channels).save_pretrained(partial)
        os.replace(partial, path)
    return path


def build_pipeline(unet: tuple, vae: tuple, text: tuple, in_channels: int):
    """A pipeline with random, always equal weights, of 4 or 8 channels; the first arguments are a row of SIZES."""
    import torch
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from instruct_pix2pix.models.tiny import assemble, build_tokenizer

    tokenizer = build_tokenizer()
    width, layers, heads = text
    sizes = dict(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=heads)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    betas = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return assemble(
            vae=AutoencoderKL(
                block_out_channels=vae,
                down_block_types=("DownEncoderBlock2D",) * len(vae),
                up_block_types=("UpDecoderBlock2D",) * len(vae),
                layers_per_block=2,
            ),
            text_encoder=CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), **sizes, **ids)),
            tokenizer=tokenizer,
            unet=UNet2DConditionModel(
                in_channels=in_channels,
                block_out_channels=unet,
                down_block_types=("CrossAttnDownBlock2D",) * (len(unet) - 1) + ("DownBlock2D",),
                up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (len(unet) - 1),
                cross_attention_dim=width,
            ),
            scheduler=DDPMScheduler(**betas, clip_sample=False, steps_offset=1),
        )


def fitted(photograph: Path, size: tuple[int, int]):
    """A photograph as RGB, cut and scaled to `size` (width, height)."""
    from PIL import ImageOps

    return ImageOps.fit(read_image(photograph), size)


def pairs_folder(folder: Path, rows: int = 64, size: tuple[int, int] = (500, 375)) -> Path:
    """A dataset of `rows` pairs of `size` (width, height), made once: photographs and their posterized copies."""
    from PIL import ImageOps

    path = Path(folder) / f"photographs-{rows}-{size[0]}x{size[1]}"
    if not path.is_dir():
        originals = [fitted(PHOTOGRAPHS[i % len(PHOTOGRAPHS)], size) for i in range(rows)]
        edited = [ImageOps.posterize(image, 3) for image in originals]
        save_pairs(path, originals, [PROMPTS[i % len(PROMPTS)] for i in range(rows)], edited)
    return path


def save_pairs(folder: Path, originals: list, instructions: list[str], edited: list) -> None:
    """A dataset folder, images as PNG in a parquet file, in columns that both training scripts look for."""
    import datasets

    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "data").mkdir(parents=True)
    rows = datasets.Dataset.from_dict({"input_image": originals, "edit_prompt": instructions, "edited_image": edited})
    rows.to_parquet(partial / "data/train-00000-of-00001.parquet")
    os.replace(partial, folder)


def common_flags(model: Path, data: Path, output_dir: Path, **more) -> list[str]:
    """Flags that both training scripts know, and mean the same by; `more` are further ones."""
    flags = {
        "pretrained_model_name_or_path": model,
        "dataset_name": data,
        "output_dir": output_dir,
        "lr_warmup_steps": 0,
        "seed": 0,
        **more,
    }
    return [f"--{name}={value}" for name, value in flags.items()] + ["--use_ema"]
