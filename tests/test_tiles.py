"""Large images in overlapping windows: nothing is left out, nothing shows, and what fits into one is as without."""

import contextlib

import numpy as np
import pytest
import torch
from PIL import Image

from instruct_pix2pix import editing
from tests.conftest import ROOT

TINY = ROOT / "assets/tiny-instruct-pix2pix"  # trained to make pictures gray; 4 pixels a latent, sizes in 16s
PHOTOS = sorted((ROOT / "assets/photos/test").glob("*.webp"))


@pytest.fixture(scope="module")
def pipeline():
    return editing.load_pipeline(str(TINY), device="cpu")


def photo(size: tuple[int, int], index: int = 0) -> Image.Image:
    return Image.open(PHOTOS[index]).convert("RGB").resize(size)


def edit(pipeline, image: Image.Image, tile: int = 0, **changes) -> np.ndarray:
    """(H, W, 3) float"""
    settings = {"steps": 2, "guidance_scale": 1.0, "image_guidance_scale": 1.0, "tile": tile} | changes
    [edited] = editing.edit(pipeline, ["make it gray"], [image], [1], **settings)
    return np.asarray(edited, float)


@contextlib.contextmanager
def seen(module, method: str):
    """The sizes of the tensors that a module's method is called with while this is open."""
    sizes, whole = [], getattr(module, method)

    def watch(sample, *args, **kwargs):
        sizes.append(tuple(sample.shape))
        return whole(sample, *args, **kwargs)

    setattr(module, method, watch)
    try:
        yield sizes
    finally:
        delattr(module, method)


@pytest.mark.parametrize("window", [8, 16, 24, 64])
def test_windows_cover_everything_and_overlap(window):
    for length in range(1, 200):
        starts = editing.window_starts(length, window)
        assert starts[0] == 0 and max(starts) == max(length - window, 0)
        steps = set(np.diff(starts))
        assert all(0 < step <= window * 0.75 for step in steps)
        assert len(steps) < 2 or max(steps) - min(steps) == 1  # evenly spread, but for rounding
        assert len(starts) == 1 or len(starts) - 1 < (length - window) / (window * 0.75) + 1  # none is needless


@pytest.mark.parametrize(("guidance", "image_guidance"), [(1.0, 1.0), (3.0, 1.5)])
def test_one_window_is_no_window_to_the_bit(pipeline, guidance, image_guidance):
    scales = {"guidance_scale": guidance, "image_guidance_scale": image_guidance}
    image = photo((90, 64))
    whole = edit(pipeline, image, **scales)
    assert whole.std() > 10
    for tile in (96, 81, 500):  # the image is padded to 96; a tile of 81 is widened to what the model takes
        assert np.array_equal(edit(pipeline, image, tile, **scales), whole)
    assert not np.array_equal(edit(pipeline, image, 64, **scales), whole)  # but a smaller one is at work


def test_windows_that_agree_leave_what_they_agree_on(pipeline, monkeypatch):
    """The weights of every latent sum to one: a network that looks at no neighbours says the same in windows."""

    def pointwise(sample, timestep, **_):
        return (sample[:, :4] * 0.5 - sample[:, 4:].tanh(),)

    monkeypatch.setattr(pipeline.unet, "forward", pointwise)
    for shape in [(3, 8, 40, 64), (2, 8, 16, 33), (1, 8, 70, 12)]:
        sample = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        with editing.in_windows(pipeline, 64):
            [said] = pipeline.unet(sample, 1)
        torch.testing.assert_close(said, pointwise(sample, 1)[0], rtol=1e-5, atol=1e-6)
    assert pipeline.unet.forward is pointwise  # what was put there before is there again


def test_no_network_sees_more_than_a_window(pipeline):
    image = photo((160, 112))
    with (
        seen(pipeline.unet, "forward") as unet,
        seen(pipeline.vae.encoder, "forward") as encoder,
        seen(pipeline.vae.decoder, "forward") as decoder,
    ):
        edit(pipeline, image, 64, steps=2, guidance_scale=3.0, image_guidance_scale=1.0)
    # 3 by 2 windows at each of two steps, and of three guidance branches the two that count.
    assert unet == [(2, 8, 16, 16)] * 12
    assert {size[2:] for size in encoder} <= {(a, b) for a in (64, 16) for b in (64, 16)} and len(encoder) > 1
    assert max(max(size[2:]) for size in decoder) == 16 and len(decoder) > 1
    with seen(pipeline.unet, "forward") as unet:  # of an image that is large in one direction
        edit(pipeline, photo((160, 48)), 64, steps=1)
    assert unet == [(1, 8, 12, 16)] * 3


def test_the_pipeline_is_its_own_again(pipeline):
    before = vars(pipeline.vae).copy()
    with pytest.raises(ZeroDivisionError), editing.in_windows(pipeline, 64):
        assert pipeline.vae.use_tiling and "forward" in vars(pipeline.unet)
        raise ZeroDivisionError
    assert "forward" not in vars(pipeline.unet) and vars(pipeline.vae) == before
    with editing.in_windows(pipeline, 0):
        assert "forward" not in vars(pipeline.unet) and not pipeline.vae.use_tiling


def seam(pixels: np.ndarray, window: int = 64, step: int = 48) -> float:
    """The mean difference of neighbours across the borders of windows and tiles, over that elsewhere: 1 is no seam."""
    ratios = []
    for picture in (pixels, pixels.swapaxes(0, 1)):
        energy = np.abs(np.diff(picture, axis=1)).mean((0, 2))
        starts = [4 * start for start in editing.window_starts(len(energy) // 4 + 1, window // 4)]
        borders = {*starts, *(start + window for start in starts), *range(0, len(energy), step)}
        across = np.isin(np.arange(len(energy)) + 1, list(borders))
        ratios.append(energy[across].mean() / energy[~across].mean())
    return float(np.mean(ratios))


def test_no_seam_shows(pipeline, monkeypatch):
    images = [photo((192, 192), index) for index in range(2)]
    whole, tiled = ([edit(pipeline, image, tile) for image in images] for tile in (0, 64))
    assert np.mean([np.abs(one - other).mean() for one, other in zip(whole, tiled, strict=True)]) < 5
    smooth = np.mean([seam(picture) for picture in tiled]) / np.mean([seam(picture) for picture in whole])
    assert smooth < 1.05
    # Windows side by side, without an overlap, do show: the measure would tell.
    monkeypatch.setattr(editing, "OVERLAP", 0)
    monkeypatch.setattr(pipeline.vae, "tile_overlap_factor", 0)
    cut = np.mean([seam(edit(pipeline, image, 64), step=64) for image in images])
    assert cut > 1.3 and cut > 1.3 * smooth
