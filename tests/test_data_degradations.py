"""The degradations do what their formulas say: pure, seeded, in range, stronger with severity."""

import io

import numpy as np
import pytest
from PIL import Image

from instruct_pix2pix.building import degradations
from instruct_pix2pix.building.degradations import GAMMA, TASKS, degrade
from tests.data_scripts import PHOTOS


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return np.array(Image.open(PHOTOS[5]).convert("RGB").resize((160, 120)))


@pytest.mark.parametrize("task", TASKS)
def test_pure_seeded_and_stronger_with_severity(task, photo):
    before = photo.copy()
    first = degrade(photo, task, 0.5, seed=1)
    assert np.array_equal(photo, before)
    assert first.shape == photo.shape and first.dtype == np.uint8
    assert np.array_equal(first, degrade(photo, task, 0.5, seed=1))
    if task != "dejpeg":  # nothing in it is random
        assert not np.array_equal(first, degrade(photo, task, 0.5, seed=2))
    errors = [
        np.mean([np.mean((degrade(photo, task, severity, seed) - photo.astype(float)) ** 2) for seed in range(6)])
        for severity in (0.0, 0.5, 1.0)
    ]
    assert 0 < errors[0] < errors[1] < errors[2]


def test_blur_spreads_light_and_moves_nothing():
    point = np.zeros((101, 101, 3), np.float32)
    point[50, 50] = 1
    for function in (degradations.motion_blur, degradations.defocus_blur):
        for seed in range(5):
            light = function(point, 1.0, np.random.default_rng(seed))[..., 0].astype(float) ** GAMMA
            assert abs(light.sum() - 1) < 1e-3
            y, x = np.mgrid[:101, :101]
            assert abs((light * y).sum() - 50) < 0.05 and abs((light * x).sum() - 50) < 0.05
    flat = np.full((40, 40, 3), 0.3, np.float32)
    assert np.abs(degradations.motion_blur(flat, 0.7, np.random.default_rng(0)) - flat).max() < 1e-4


def test_noise_has_the_stated_variance():
    severity = 0.4
    a, b = 0.0005 * 40**severity, 0.000005 * 60**severity
    for light in (0.1, 0.3, 0.6):
        flat = np.full((300, 300, 3), light ** (1 / GAMMA), np.float32)
        noisy = degradations.sensor_noise(flat, severity, np.random.default_rng(0)).astype(float) ** GAMMA
        assert abs(noisy.mean() - light) < 1e-3
        assert noisy.var() == pytest.approx(a * light + b, rel=0.03)


def test_rain_only_adds_light(photo):
    image = photo.astype(np.float32) / 255
    rainy = degradations.rain_streaks(image, 0.5, np.random.default_rng(0))
    added = rainy - image
    assert added.min() > -1e-6
    assert 0.005 < (added.max(-1) > 0.05).mean() < 0.5
    dry = np.zeros((120, 160, 3), np.float32)
    streaks = degradations.rain_streaks(dry, 0.5, np.random.default_rng(0))
    assert np.array_equal(streaks[..., 0], streaks[..., 2])  # rain has no colour


def test_low_light_is_darker_everywhere_before_noise(photo, monkeypatch):
    monkeypatch.setattr(degradations, "sensor_noise", lambda image, severity, rng: image)
    image = photo.astype(np.float32) / 255
    for severity in (0.0, 1.0):
        dark = degradations.low_light(image, severity, np.random.default_rng(0))
        alpha = np.random.default_rng(0).uniform(0.9, 1)
        expected = (1 - 0.4 * severity) * (alpha * image) ** (1.5 + 1.5 * severity)
        assert np.abs(dark - expected).max() < 1e-6 and (dark <= image).all()


def test_jpeg_has_the_stated_quality(photo):
    coded = degradations.jpeg(photo.astype(np.float32) / 255, 0.5, None)
    buffer = io.BytesIO()
    Image.fromarray(photo).save(buffer, "JPEG", quality=29, subsampling="4:2:0")
    expected = np.asarray(Image.open(buffer)).astype(float)
    assert np.abs(coded * 255 - expected).mean() < 1.5  # another decoder's rounding and chroma interpolation
