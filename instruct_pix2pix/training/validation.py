"""Hold a model against rows that it is not trained on, and show its edits, with the weights that would be exported."""

import argparse
import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from instruct_pix2pix import editing
from instruct_pix2pix.cli import RowError, UserError
from instruct_pix2pix.data.geometry import crop_pair
from instruct_pix2pix.data.order import stream
from instruct_pix2pix.data.sources import Source, same_split, source_of
from instruct_pix2pix.data.triples import Triples, load_triples, open_pair
from instruct_pix2pix.devices import is_out_of_memory
from instruct_pix2pix.evaluation.metrics import psnr, ssim
from instruct_pix2pix.evidence import PICTURES, validation_picture
from instruct_pix2pix.files import write_bytes
from instruct_pix2pix.images import BadImage, contact_sheet, encode_image, is_url, read_image
from instruct_pix2pix.models.sd import build_pipeline
from instruct_pix2pix.training.ema import unet_to_export
from instruct_pix2pix.training.log import Lines, log_pictures
from instruct_pix2pix.training.loss import BANDS, sample_losses
from instruct_pix2pix.training.options import as_list

logger = logging.getLogger(__name__)

LOG_FILE = "validation_log.jsonl"
ANY_RUN = 0  # seed of the held-out rows, their noise and timesteps, so that runs can be compared
ROWS_PER_PASS = 16  # that are decoded and encoded at a time


def load_validation_images(config, multiple: int) -> list[tuple[Image.Image, str]]:
    """The images of --val_image_url, each with its instruction: RGB, sides brought to a `multiple`, the short one at
    most twice the resolution.

    An address that cannot be reached is warned of and left out: a network that is down must not stop a training.
    A local file that is no image is the user's mistake.
    """
    sources, prompts, loaded = as_list(config.val_image_url), as_list(config.validation_prompt), []
    for source, prompt in zip(sources, prompts * (len(sources) if len(prompts) == 1 else 1), strict=False):
        try:
            image = read_image(source)
        except BadImage as error:
            if not is_url(source):
                raise UserError(f"--val_image_url: {source} is not a readable image ({error})") from error
            logger.warning("--val_image_url: %s cannot be read (%s); it is not edited", source, error)
            continue
        scale = min(1.0, 2 * config.resolution / min(image.size))
        size = tuple(max(multiple, int(side * scale) // multiple * multiple) for side in image.size)
        loaded.append((image if image.size == size else image.resize(size, Image.Resampling.LANCZOS), prompt))
    return loaded


def load_held_out(config, sources: list[Source]) -> Triples | None:
    """The rows of --validation_dataset or of --validation_split of the training set, `sources`, which is one then; None
    without both. Beside a mixture they are read by the command line's flags, not by those of its datasets. Raises
    UserError for what cannot be read, or is trained on."""
    other, split = config.validation_dataset, config.validation_split
    if not other and not split:
        return None
    flag = "--validation_dataset" if other else "--validation_split"
    for source in sources:
        same = other is None or Path(other).expanduser().resolve() == Path(source.name).expanduser().resolve()
        if same and same_split(split, source.split):
            raise UserError(f"{flag}: {other or split} is trained on; name a split that is held out")
    if config.dataset_mixture:
        source = source_of(argparse.Namespace(**{**vars(config), "dataset_name": other}), "--dataset_name")
    else:
        (source,) = sources
    held_out = replace(source, flag=flag, split=split, cache_dir=config.cache_dir, token=config.hub_token)
    held_out = replace(held_out, stream_cache=config.stream_cache_gb * 1e9)
    if other:
        held_out = replace(held_out, name=other, edited_dir=None, config_name=None, streaming="://" in other)
    return load_triples(held_out, ANY_RUN, config.max_validation_samples, False, config.image_geometry)


class HeldOut:
    """The held-out rows, cropped in the middle and encoded once, for the main process. Only what the UNet takes is kept
    of most, in the host's memory."""

    def __init__(self, plan, encoder):
        """`encoder` is an inputs.WindowEncoder, its models on the device. Raises RowError for a row that cannot be
        used, where that is an error."""
        self.plan, self.encoder, self.triples = plan, encoder, plan.held_out_triples
        self.shape = (encoder.vae.config.latent_channels, plan.latent_side, plan.latent_side)
        self.rows, self.tasks, encoded = [], [], []
        named = list(zip(map(int, self.triples.indices), self.triples.tasks(), strict=True))
        for start in range(0, len(named), ROWS_PER_PASS):
            crops = []
            for row, task in named[start : start + ROWS_PER_PASS]:
                try:
                    crops.append(self._crop(row))
                except RowError as error:
                    if self.triples.on_bad_row == "error":
                        raise
                    self.triples.leave_out([(row, error.reason)])
                    continue
                self.rows.append(row)
                self.tasks.append(task)
            if crops:
                instructions, *sides = zip(*crops, strict=True)
                original, edited = (torch.from_numpy(np.stack(side)).permute(0, 3, 1, 2) for side in sides)
                noise = torch.stack([self._noise(row, 0)[1] for row in self.rows[-len(crops) :]])
                window = {"original": original, "edited": edited, "posterior_noise": noise}
                encoded.append((encoder.embed(list(instructions)), *encoder.encode_pairs(window)))
        if not encoded:
            raise UserError(f"{self.triples.source}: none of its rows can be used")
        # Text embeddings (N, L, D), latents of the originals and of the edited images (N, C, h, w).
        self.encoded = [torch.cat(tensors).cpu() for tensors in zip(*encoded, strict=True)]
        shown = np.linspace(0, len(self.rows) - 1, min(len(self.rows), plan.config.num_validation_images))
        self.shown = [self._crop(self.rows[place]) for place in shown.astype(int)]

    @cached_property
    def log(self) -> Lines:
        return Lines(self.plan, LOG_FILE, "validation/")

    def _crop(self, row: int) -> tuple[str, np.ndarray, np.ndarray]:
        """Instruction, original and edited image, (R, R, 3) uint8. Raises RowError."""
        config, (wordings, *pair) = self.plan.config, open_pair(self.triples, row)
        rng = stream(ANY_RUN, "augmentation", row)  # of which nothing comes into a fixed crop
        return wordings[0], *crop_pair(*pair, config.resolution, config.image_geometry, True, False, rng)

    def _noise(self, row: int, number: int) -> tuple[float, torch.Tensor]:
        """A number in [0, 1) and normal noise (C, h, w): 0 is for the VAE's posterior, 1 to BANDS for the bands."""
        rng = stream(ANY_RUN, "validation", row, number)
        return float(rng.random()), torch.from_numpy(rng.standard_normal(self.shape, dtype=np.float32))

    @torch.no_grad()
    def measure(self, unet) -> dict[str, float]:
        """The loss over all, by band of timesteps and by task, where rows name one: the unweighted error without
        dropout, each row at one timestep of each band."""
        device, size, losses = self.encoder.device, self.plan.config.train_batch_size, []
        steps = len(self.encoder.alphas_cumprod) / BANDS
        for start in range(0, len(self.rows), size):
            part = slice(start, start + size)
            clean = [tensor[part].to(device) for tensor in self.encoded]
            for band in range(BANDS):
                places, noise = zip(*(self._noise(row, 1 + band) for row in self.rows[part]), strict=True)
                timesteps = torch.tensor([int((band + place) * steps) for place in places], device=device)
                inputs = self.encoder.add_noise(*clean, torch.stack(noise).to(device), timesteps)
                prediction = unet(inputs["noisy"], timesteps, inputs["text"], return_dict=False)[0]
                losses.append(sample_losses(prediction, inputs["target"]).cpu())
        passes = [torch.stack(losses[first : first + BANDS]) for first in range(0, len(losses), BANDS)]
        losses = torch.cat(passes, dim=1).double()  # (BANDS, N)
        found = {"loss": losses.mean().item()} | {f"loss_q{n}": band.mean().item() for n, band in enumerate(losses)}
        for task in sorted(set(self.tasks) - {"all"}):
            found[f"loss/{task}"] = losses[:, [name == task for name in self.tasks]].mean().item()
        return found


def validation_is_due(run, step: int) -> bool:
    """By updates where --validation_steps is given, else whenever so many epochs are complete; not at the end,
    where the exported weights are validated anyway."""
    config = run.config
    wanted = config.val_image_url or config.validation_dataset or config.validation_split
    if not wanted or step == config.max_train_steps:
        return False
    if config.validation_steps is not None:
        return step % config.validation_steps == 0
    return int(run.epoch(step)) // config.validation_epochs > int(run.epoch(step - 1)) // config.validation_epochs


def validate(run, step: int, only_missing: bool = False) -> dict[str, float]:
    """Measure the held-out rows and edit images, where there are any, with the weights that would be exported now; the
    other processes wait. Returns what was measured, on the main process. With `only_missing`, not where all of this
    step is there already. Frozen models that rest on the CPU beside a latent cache work on the GPU meanwhile. What
    needs more memory than there is, is left out with a warning."""
    config, held_out, found = run.config, run.held_out, {}  # both kinds are on the main process only
    kinds = zip(PICTURES, (run.validation_images, held_out), strict=True)
    missing = [validation_picture(config.output_dir, step, kind) for kind, of in kinds if of]
    if only_missing and (held_out is None or held_out.log.last >= step):
        missing = [picture for picture in missing if not picture.exists()]
    frozen = (run.text_encoder, run.vae)
    rested, was_training = [model.device for model in frozen], run.unet.training
    try:
        with unet_to_export(run, bool(missing)) as unet:
            if missing:
                for model in (*frozen, unet):
                    model.to(run.accelerator.device)
                unet.eval()
                with torch.no_grad(), run.accelerator.autocast():
                    if held_out is not None:
                        found |= held_out.measure(unet)
                    found |= show_edits(run, step, unet)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        count = config.num_validation_images
        logger.warning("no validation: %d images at a time need more memory; lower --num_validation_images", count)
    except UserError as error:  # pictures that are none must not end a training
        logger.warning("no validation: %s", error)
    finally:
        run.unet.train(was_training)
        for model, device in zip(frozen, rested, strict=True):
            model.to(device)
    if found:
        held_out.log.write([{"step": step, **found}])
    run.accelerator.wait_for_everyone()
    return found


def show_edits(run, step: int, unet) -> dict[str, float]:
    """Write output_dir/validation/step-<step>.png, each image with its --num_validation_images edits, and
    step-<step>-held-out.png, as many held-out rows: input, edit, target. Returns the rows' mean PSNR and SSIM.

    `unet` and the other models in memory are used as they are. The noise comes from a stream of its own, the same at
    every step, so that pictures can be compared and training never notices.
    """
    config, entries, rows = run.config, [], []
    pipeline = build_pipeline(run.configs, run.tokenizer, run.text_encoder, run.vae, unet)
    streams = [stream(config.seed, "validation", index) for index in range(config.num_validation_images)]
    seeds = [int(rng.integers(2**31)) for rng in streams]
    for image, prompt in run.validation_images:
        edits = _edit(run, pipeline, [prompt] * len(seeds), [image] * len(seeds), seeds)
        entries.append(([image, *edits], [prompt]))
        rows += [{"original_image": image, "edited_image": edit, "edit_prompt": prompt} for edit in edits]
    if entries:
        cell = max(max(image.size) for image, _ in run.validation_images)
        _show(run, step, "", contact_sheet(entries, cell=cell, columns=1), rows)
    if run.held_out is None:
        return {}
    prompts, originals, targets = zip(*run.held_out.shown, strict=True)
    images = [Image.fromarray(original) for original in originals]
    edits = _edit(run, pipeline, prompts, images, seeds)
    entries, rows = [], []
    for prompt, image, edit, target in zip(prompts, images, edits, targets, strict=True):
        pixels = np.asarray(edit)
        scores = {"psnr": psnr(pixels, target), "ssim": ssim(pixels, target)}
        target = Image.fromarray(target)
        entries.append(([image, edit, target], [prompt, "{psnr:.2f} dB, SSIM {ssim:.3f}".format(**scores)]))
        rows.append({"input": image, "edit": edit, "target": target, "instruction": prompt, **scores})
    _show(run, step, "-held-out", contact_sheet(entries, columns=2, headings=("input", "edit", "target")), rows)
    return {name: float(np.mean([row[name] for row in rows])) for name in ("psnr", "ssim")}


def _edit(run, pipeline, prompts: Sequence[str], images: list[Image.Image], seeds: list[int]) -> list[Image.Image]:
    """Edits by the scales that were given, else what is recommended for an instruction, else the defaults."""
    flags = argparse.Namespace(**editing.usual_setting(run.config)._asdict(), stated=run.config.stated)
    settings = [editing.sampling_of(flags, run.recommended, prompt)[0] for prompt in prompts]
    edits = {}
    for setting in dict.fromkeys(settings):  # a batch has one
        places = [place for place, its in enumerate(settings) if its == setting]
        part = ([values[place] for place in places] for values in (prompts, images, seeds))
        edits |= zip(places, editing.edit(pipeline, *part, **setting._asdict()), strict=True)
    return [edits[place] for place in range(len(images))]


def _show(run, step: int, kind: str, sheet: Image.Image, rows: list[dict]) -> None:
    path = validation_picture(run.config.output_dir, step, kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, encode_image(sheet, ".png"))
    log_pictures(run.accelerator, "held_out" if kind else "validation", sheet, rows, step)
