"""Skips from the source image into the decoder: nothing until trained, tile to its own tile, kept where they help."""

import logging
import re

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline
from PIL import Image

from instruct_pix2pix import editing
from instruct_pix2pix.models import decoder_skips
from instruct_pix2pix.training import skips
from tests.conftest import ROOT, small_photo
from tests.data_scripts import checksums

TINY = ROOT / "assets/tiny-instruct-pix2pix"
SETTING = {"steps": 2, "guidance_scale": 1.0, "image_guidance_scale": 1.0}


@pytest.fixture
def pipeline():
    return editing.load_pipeline(str(TINY), device="cpu")


def trained_skips(pipeline) -> decoder_skips.DecoderSkips:
    """Skips that add something."""
    some = decoder_skips.build(pipeline.vae, seed=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for block in some.blocks:
            torch.nn.init.normal_(block[-1].weight, std=0.05)
    return some


def edit(pipeline, images: list[Image.Image] | torch.Tensor) -> np.ndarray:
    texts, seeds = ["make it gray", "keep it"], [1, 2]
    edits = editing.edit_batch(pipeline, texts[: len(images)], images, seeds[: len(images)], **SETTING)
    return np.stack([np.asarray(edited).astype(int) for edited in edits])


def test_untrained_skips_change_no_bit(pipeline):
    images = [small_photo(), small_photo().rotate(180)]
    plain = edit(pipeline, images)
    pipeline.decoder_skips = decoder_skips.build(pipeline.vae, seed=0)
    assert np.array_equal(edit(pipeline, images), plain)
    pipeline.decoder_skips = trained_skips(pipeline)
    assert np.abs(edit(pipeline, images) - plain).mean() > 1
    assert np.array_equal(edit(pipeline, images), edit(pipeline, images))  # nothing is left over from an edit


def test_each_image_and_each_tile_gets_its_own_source(pipeline):
    """A batch equals its images, and tiles equal the whole but at their borders."""
    pipeline.decoder_skips = trained_skips(pipeline)
    images = [small_photo(), small_photo().rotate(180)]
    both = edit(pipeline, images)
    assert np.abs(both[0] - edit(pipeline, images[:1])[0]).max() <= 1

    # The autoencoder alone, there and back, of a picture of six tiles whose halves differ as much as can be.
    pixels = torch.full((1, 3, 96, 160), -0.8)
    pixels[..., 80:] = 0.8
    pixels += 0.1 * torch.rand(pixels.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        results = {}
        for tile in (0, 64):
            with editing.in_windows(pipeline, tile), decoder_skips.in_use(pipeline.vae, pipeline.decoder_skips):
                latents = pipeline.vae.encode(pixels).latent_dist.mode()
                results[tile] = pipeline.vae.decode(latents).sample
    plain = (results[0] - results[64]).abs().mean()
    mixed_up = (results[0] - results[0].flip(-1)).abs().mean()
    assert plain < mixed_up / 10


@pytest.mark.parametrize("count", [2, 7, 10, 196])
def test_no_row_is_both_learned_from_and_held_back(count):
    rows = torch.from_numpy(np.random.default_rng(0).permuted(np.tile(np.arange(count), (8, 1)), axis=1).flatten())
    held_back = skips.hold_back(rows, seed=42)
    assert not set(rows[held_back].tolist()) & set(rows[~held_back].tolist())
    assert held_back.sum() == 8 * max(1, count // 8)
    assert torch.equal(held_back, skips.hold_back(rows, seed=42))
    assert skips.hold_back(torch.zeros(5), seed=42).all()


def test_trained_after_the_unet_exported_and_used(small_run, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    flags = {"pretrained_model_name_or_path": TINY, "max_train_steps": 12, "guidance_scale": 1.0}
    flags |= {"image_guidance_scale": 1.0, "use_ema": True, "resume_from_checkpoint": "latest"}
    run = small_run(**flags, train_decoder_skips=60)
    (said,) = [record.message for record in caplog.records if record.message.startswith("decoder skips: ")]
    # 48 samples of 10 pairs, one of which is held back: it was seen four or five times.
    assert re.fullmatch(r"decoder skips: \+[\d.]+ dB on [45] samples of rows held back, kept", said)
    assert said.removeprefix("decoder skips: ") in (run / "README.md").read_text()

    # The pipeline loads without them, and its weights are those of a run without the second stage.
    plain = StableDiffusionInstructPix2PixPipeline.from_pretrained(run)
    assert getattr(plain, "decoder_skips", None) is None
    other = small_run(**flags, name="other")
    for part in ("unet", "vae"):
        assert checksums(run / part) == checksums(other / part)
    assert not (other / "decoder_skips").exists()

    loaded = editing.load_pipeline(str(run))
    photo = [small_photo()]
    with_them = edit(loaded, photo)
    loaded.decoder_skips = None
    assert not np.array_equal(with_them, edit(loaded, photo))

    # Run again it ends with the same files; without the flag, what was there goes.
    before = checksums(run / "decoder_skips")
    small_run(**flags, train_decoder_skips=60)
    assert checksums(run / "decoder_skips") == before
    small_run(**flags)
    assert not (run / "decoder_skips").exists() and (run / "model_index.json").exists()


def test_a_model_with_skips_is_published_with_them(pipeline):
    from fnmatch import fnmatch

    from instruct_pix2pix.publishing import PUBLISHED

    assert all(any(fnmatch(file, pattern) for pattern in PUBLISHED) for file in decoder_skips.FILES)
    # A sweep edits an image many times, and the decoder needs the image each time.
    images = [small_photo()]
    assert torch.is_tensor(editing.encode_images(pipeline, images))
    pipeline.decoder_skips = trained_skips(pipeline)
    encoded = editing.encode_images(pipeline, images)
    assert np.array_equal(edit(pipeline, encoded), edit(pipeline, images))
