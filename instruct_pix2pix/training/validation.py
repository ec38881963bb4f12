"""Edit one image during training, with the weights that would be exported, and show it."""

import logging
from pathlib import Path

import torch
from PIL import Image

from instruct_pix2pix.cli import UserError
from instruct_pix2pix.data.order import stream
from instruct_pix2pix.images import BadImage, is_url, read_image
from instruct_pix2pix.models.sd import build_pipeline
from instruct_pix2pix.training.log import log_images

logger = logging.getLogger(__name__)

# The published models' settings: blog post and README of instruction-tuned Stable Diffusion.
NUM_INFERENCE_STEPS = 20
IMAGE_GUIDANCE_SCALE = 1.5
GUIDANCE_SCALE = 7.0


def load_validation_image(args, multiple: int) -> Image.Image | None:
    """The image of --val_image_url, RGB, sides brought to a `multiple`, the short one at most twice the resolution.

    An address that cannot be reached is warned of and gives None: a network that is down must not stop a training.
    A local file that is no image is the user's mistake.
    """
    if args.val_image_url is None:
        return None
    if is_url(args.val_image_url):
        try:
            image = read_image(args.val_image_url)
        except BadImage as error:
            logger.warning("--val_image_url: %s %s; no validation", args.val_image_url, error)
            return None
    else:
        try:
            image = read_image(args.val_image_url)
        except BadImage as error:
            raise UserError(f"--val_image_url: {args.val_image_url} is not a readable image ({error})") from error
    scale = min(1.0, 2 * args.resolution / min(image.size))
    size = [max(multiple, int(side * scale) // multiple * multiple) for side in image.size]
    return image if list(image.size) == size else image.resize(size, Image.Resampling.LANCZOS)


@torch.no_grad()
def validate(accelerator, args, configs, tokenizer, text_encoder, vae, unet, image: Image.Image, step: int) -> None:
    """Edit `image` --num_validation_images times and write output_dir/validation/step-<step>.png (input, then edits).

    The models in memory are used as they are, in one batch. The noise comes from a stream of its own, the same at
    every step, so that pictures can be compared and training never notices.
    """
    pipeline = build_pipeline(configs, tokenizer, text_encoder, vae, unet)
    count = args.num_validation_images
    seeds = [int(stream(args.seed, "validation", index).integers(2**31)) for index in range(count)]
    was_training = unet.training
    unet.eval()
    try:
        with accelerator.autocast():
            edited = pipeline(
                [args.validation_prompt] * count,
                image=[image] * count,
                num_inference_steps=NUM_INFERENCE_STEPS,
                image_guidance_scale=IMAGE_GUIDANCE_SCALE,
                guidance_scale=GUIDANCE_SCALE,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            ).images
    finally:
        unet.train(was_training)
    folder = Path(args.output_dir) / "validation"
    folder.mkdir(parents=True, exist_ok=True)
    side_by_side([image, *edited]).save(folder / f"step-{step:06d}.png")
    log_images(accelerator, image, edited, args.validation_prompt, step)


def side_by_side(images: list[Image.Image], gap: int = 4) -> Image.Image:
    """Images of one height in a row, on white."""
    sheet = Image.new("RGB", (sum(i.width + gap for i in images) - gap, max(i.height for i in images)), "white")
    left = 0
    for image in images:
        sheet.paste(image, (left, 0))
        left += image.width + gap
    return sheet
