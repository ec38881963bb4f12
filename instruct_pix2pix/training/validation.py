"""Edit an image, or held-out rows, during training, with the weights that would be exported, and show them."""

import contextlib
import logging
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from instruct_pix2pix import editing
from instruct_pix2pix.cli import UserError
from instruct_pix2pix.data.order import stream
from instruct_pix2pix.data.sources import Source
from instruct_pix2pix.data.triples import load_triples, open_pair
from instruct_pix2pix.files import write_bytes
from instruct_pix2pix.images import BadImage, contact_sheet, encode_image, is_url, read_image
from instruct_pix2pix.models.sd import build_pipeline
from instruct_pix2pix.training.log import log_images, log_sheet
from instruct_pix2pix.training.step import is_out_of_memory

logger = logging.getLogger(__name__)


def load_validation_image(config, multiple: int) -> Image.Image | None:
    """The image of --val_image_url, RGB, sides brought to a `multiple`, the short one at most twice the resolution.

    An address that cannot be reached is warned of and gives None: a network that is down must not stop a training.
    A local file that is no image is the user's mistake.
    """
    if config.val_image_url is None:
        return None
    try:
        image = read_image(config.val_image_url)
    except BadImage as error:
        if not is_url(config.val_image_url):
            raise UserError(f"--val_image_url: {config.val_image_url} is not a readable image ({error})") from error
        logger.warning("--val_image_url: %s cannot be read (%s); no validation", config.val_image_url, error)
        return None
    scale = min(1.0, 2 * config.resolution / min(image.size))
    size = tuple(max(multiple, int(side * scale) // multiple * multiple) for side in image.size)
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)


class HeldOut(NamedTuple):
    """A row that is not trained on."""

    instruction: str
    original: Image.Image
    edited: Image.Image


def load_held_out(config, source: Source) -> list[HeldOut]:
    """The first rows of --validation_split, none without it. Raises UserError for a split that cannot be read."""
    if config.validation_split is None:
        return []
    if config.validation_split == (source.split or "train"):
        raise UserError(f"--validation_split: {config.validation_split} is trained on; name a split that is held out")
    split = replace(source, flag="--validation_split", split=config.validation_split)
    triples = load_triples(split, max_rows=config.num_validation_images, show_progress=False)
    usable = [int(index) for index in triples.indices if int(index) not in triples.bad]
    pairs = [open_pair(triples, index) for index in usable]
    return [HeldOut(wordings[0], original, edited) for wordings, original, edited in pairs]


def validation_is_due(run, step: int) -> bool:
    """By updates where --validation_steps is given, else whenever so many epochs are complete; not at the end,
    where the exported weights are validated anyway."""
    config = run.config
    if (config.val_image_url is None and config.validation_split is None) or step == config.max_train_steps:
        return False
    if config.validation_steps is not None:
        return step % config.validation_steps == 0
    return int(run.epoch(step)) // config.validation_epochs > int(run.epoch(step - 1)) // config.validation_epochs


def validate(run, step: int, only_missing: bool = False) -> None:
    """Edit the validation image and the held-out rows, where there are any, with the weights that would be exported
    now; the other processes wait. With `only_missing`, not where this step's pictures are there already. Frozen models
    that rest on the CPU beside a latent cache work on the GPU meanwhile. What needs more memory than there is, is left
    out with a warning."""
    wanted = {"image": run.validation_image is not None, "rows": bool(run.validation_rows)}  # on the main process only
    missing = [_picture(run.config, step, what) for what, is_wanted in wanted.items() if is_wanted]
    if only_missing:
        missing = [picture for picture in missing if not picture.exists()]
    if missing:
        frozen = (run.text_encoder, run.vae)
        rested = [model.device for model in frozen]
        for model in frozen:
            model.to(run.accelerator.device)
        try:
            with run.ema.swapped_in() if run.ema is not None else contextlib.nullcontext():
                show_edits(run, step)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            logger.warning(
                "no validation: editing %d images at a time needs more memory; lower --num_validation_images",
                run.config.num_validation_images,
            )
        except UserError as error:  # pictures that are none must not end a training
            logger.warning("no validation: %s", error)
        for model, device in zip(frozen, rested, strict=True):
            model.to(device)
    run.accelerator.wait_for_everyone()


def show_edits(run, step: int) -> None:
    """Write output_dir/validation/step-<step>.png, the image and its --num_validation_images edits in one batch, and
    step-<step>-held-out.png, the held-out rows: input, edit, target.

    The models in memory are used as they are. The noise comes from a stream of its own, the same at every step, so that
    pictures can be compared and training never notices.
    """
    config, image = run.config, run.validation_image
    pipeline = build_pipeline(run.configs, run.tokenizer, run.text_encoder, run.vae, run.unet)
    count = config.num_validation_images
    seeds = [int(stream(config.seed, "validation", index).integers(2**31)) for index in range(count)]
    options = {
        "steps": editing.NUM_INFERENCE_STEPS,
        "guidance_scale": config.guidance_scale,
        "image_guidance_scale": config.image_guidance_scale,
    }
    _picture(config, step, "image").parent.mkdir(parents=True, exist_ok=True)
    was_training = run.unet.training
    run.unet.eval()
    try:
        with torch.no_grad(), run.accelerator.autocast():
            if image is not None:
                prompts, inputs = [config.validation_prompt] * count, [image] * count
                edited = editing.edit(pipeline, prompts, inputs, seeds, **options)
                sheet = contact_sheet([([image, *edited], [config.validation_prompt])], cell=max(image.size))
                write_bytes(_picture(config, step, "image"), encode_image(sheet, ".png"))
                log_images(run.accelerator, image, edited, config.validation_prompt, step)
            entries = []
            for row, seed in zip(run.validation_rows, seeds, strict=False):
                held = [row.instruction], [row.original], [seed]
                edited = editing.edit(pipeline, *held, resolution=config.resolution, **options)
                entries.append(([row.original, *edited, row.edited], [row.instruction]))
            if entries:
                sheet = contact_sheet(entries, columns=2, headings=("input", "edit", "target"))
                write_bytes(_picture(config, step, "rows"), encode_image(sheet, ".png"))
                log_sheet(run.accelerator, sheet, step)
    finally:
        run.unet.train(was_training)


def _picture(config, step: int, what: str) -> Path:
    ending = {"image": "", "rows": "-held-out"}[what]
    return Path(config.output_dir) / "validation" / f"step-{step:06d}{ending}.png"
