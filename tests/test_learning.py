"""Training must teach: gates on the tiny trained model in assets/, so that a change that breaks the mathematics
without breaking the code is caught by a number."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline
from PIL import Image

from instruct_pix2pix.building.cartoonizer import opencv_cartoonize
from instruct_pix2pix.evaluation.metrics import psnr
from tests.conftest import ROOT, run_script

pytestmark = pytest.mark.slow
BASE = ROOT / "assets/tiny-instruct-pix2pix"


def square(path, side: int = 64) -> Image.Image:
    image = Image.open(path).convert("RGB")
    scale = side / min(image.size)
    image = image.resize([max(side, round(length * scale)) for length in image.size], Image.Resampling.BICUBIC)
    left, top = ((length - side) // 2 for length in image.size)
    return image.crop((left, top, left + side, top + side))


def edit(model, images: list[Image.Image], instructions: list[str]) -> np.ndarray:
    """Edited images, uint8 (N, H, W, 3), without guidance: the tiny model follows instructions well enough, and its
    strongly guided edits overshoot (its card says so)."""
    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    edited = pipeline(
        instructions,
        image=images,
        num_inference_steps=20,
        image_guidance_scale=1.0,
        guidance_scale=1.0,
        generator=[torch.Generator().manual_seed(index) for index in range(len(images))],
        output_type="np",
    ).images
    return (edited * 255).round().astype(np.uint8)


@pytest.fixture(scope="module")
def eight_pairs(tmp_path_factory):
    """Eight photographs and their cartoons, 64 px, in original/ and edited/."""
    folder = tmp_path_factory.mktemp("eight")
    (folder / "original").mkdir()
    (folder / "edited").mkdir()
    for path in sorted((ROOT / "assets/photos/train").glob("animals_*.webp"))[:8]:
        photo = square(path)
        photo.save(folder / "original" / f"{path.stem}.png")
        cartoon = opencv_cartoonize(np.asarray(photo)[None])[0]
        Image.fromarray(cartoon).save(folder / "edited" / f"{path.stem}.png")
    (folder / "instructions.txt").write_text("cartoonize the image\n")
    return folder


def gain_over_identity(folder, output_dir, **flags) -> float:
    """Fine-tune on the eight pairs, edit the eight originals: mean PSNR above that of doing nothing, in dB."""
    run_script(
        "finetune",
        pretrained_model_name_or_path=BASE,
        train_data_dir=folder,
        output_dir=output_dir,
        resolution=64,
        center_crop=True,
        train_batch_size=8,
        max_train_steps=320,
        learning_rate=3e-3,
        lr_scheduler="cosine",
        lr_warmup_steps=10,
        use_ema=True,
        ema_decay=0.98,
        report_to="none",
        seed=1,
        **flags,
    )
    names = sorted(path.name for path in (folder / "original").iterdir())
    inputs = [Image.open(folder / "original" / name) for name in names]
    targets = [np.asarray(Image.open(folder / "edited" / name)) for name in names]
    edited = edit(output_dir, inputs, ["cartoonize the image"] * len(names))
    model = np.mean([psnr(image, target) for image, target in zip(edited, targets, strict=True)])
    return model - np.mean([psnr(np.asarray(i), target) for i, target in zip(inputs, targets, strict=True)])


def test_eight_pairs_are_learned(eight_pairs, tmp_path):
    assert gain_over_identity(eight_pairs, tmp_path / "model") > 2.0


def test_swapped_columns_do_not_pass_for_learning(eight_pairs, tmp_path):
    swapped = {"original_image_column": "edited_image", "edited_image_column": "original_image"}
    assert gain_over_identity(eight_pairs, tmp_path / "model", **swapped) < 0.5


def test_the_instruction_matters_and_no_instruction_keeps_the_image():
    names = ["kingfisher", "animals_panda", "farm_duck", "renewable_windmill5"]
    photos = [square(ROOT / f"assets/photos/test/{name}.webp") for name in names]
    instructions = ["make it gray", "make it warm", ""]
    edited = edit(BASE, photos * 3, [text for text in instructions for _ in names]).astype(float)
    gray, warm, kept = edited.reshape(3, len(names), 64, 64, 3)
    originals = np.stack([np.asarray(photo) for photo in photos]).astype(float)

    def saturation(images):
        return (images.max(-1) - images.min(-1)).mean()

    def warmth(images):
        return (images[..., 0] - images[..., 2]).mean()

    assert saturation(gray) < 0.8 * saturation(originals) and saturation(gray) < saturation(warm)
    assert warmth(warm) > warmth(originals) + 5 and warmth(warm) > warmth(gray)
    vae_limit = 20  # the autoencoder alone loses detail at this size
    assert (
        np.mean([psnr(k.astype(np.uint8), o.astype(np.uint8)) for k, o in zip(kept, originals, strict=True)])
        > vae_limit
    )
