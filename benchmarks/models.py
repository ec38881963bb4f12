"""Models with random weights and pairs made of the photographs in assets/: what the benchmarks run on, no download."""

import os
import shutil
from pathlib import Path

ROOT = Path(__file__).parent.parent
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
    if path.is_dir():
        return path
    partial = path.with_name(f".{size}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    build_pipeline(**SIZES[size], in_channels=in_channels).save_pretrained(partial)
    os.replace(partial, path)
    return path


def build_pipeline(unet: tuple, vae: tuple, text: tuple, in_channels: int = 4, seed: int = 0):
    """A pipeline with random weights fixed by `seed`, of 4 or 8 channels; the first arguments are a row of SIZES."""
    import torch
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from instruct_pix2pix.models.tiny import assemble, build_tokenizer

    tokenizer = build_tokenizer()
    width, layers, heads = text
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return assemble(
            vae=AutoencoderKL(
                block_out_channels=vae,
                down_block_types=("DownEncoderBlock2D",) * len(vae),
                up_block_types=("UpDecoderBlock2D",) * len(vae),
                layers_per_block=2,
                latent_channels=4,
            ),
            text_encoder=CLIPTextModel(
                CLIPTextConfig(
                    vocab_size=len(tokenizer),
                    hidden_size=width,
                    intermediate_size=4 * width,
                    num_hidden_layers=layers,
                    num_attention_heads=heads,
                    bos_token_id=tokenizer.bos_token_id,
                    eos_token_id=tokenizer.eos_token_id,
                    pad_token_id=tokenizer.pad_token_id,
                )
            ),
            tokenizer=tokenizer,
            unet=UNet2DConditionModel(
                in_channels=in_channels,
                block_out_channels=unet,
                down_block_types=("CrossAttnDownBlock2D",) * (len(unet) - 1) + ("DownBlock2D",),
                up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (len(unet) - 1),
                cross_attention_dim=width,
            ),
            scheduler=DDPMScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
            ),
        )


def pairs_folder(folder: Path, rows: int = 64, size: tuple[int, int] = (500, 375)) -> Path:
    """A dataset folder of `rows` pairs as PNG in a parquet file, built once: photographs and their posterized copies.

    Columns original_image, edit_prompt, edited_image; images of `size` (width, height).
    """
    import datasets
    from PIL import Image, ImageOps

    path = Path(folder) / f"pairs-{rows}-{size[0]}x{size[1]}"
    file = path / "data" / "train-00000-of-00001.parquet"
    if file.is_file():
        return path
    photos = sorted((ROOT / "assets/photos/train").glob("*.webp"))
    originals = [ImageOps.fit(Image.open(photos[i % len(photos)]).convert("RGB"), size) for i in range(rows)]
    columns = {
        "original_image": originals,
        "edit_prompt": [PROMPTS[i % len(PROMPTS)] for i in range(rows)],
        "edited_image": [ImageOps.posterize(image, 3) for image in originals],
    }
    features = datasets.Features(
        {
            "original_image": datasets.Image(),
            "edit_prompt": datasets.Value("string"),
            "edited_image": datasets.Image(),
        }
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    datasets.Dataset.from_dict(columns, features=features).to_parquet(partial)
    os.replace(partial, file)
    return path
