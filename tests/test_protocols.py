"""Published protocols: what they cut, what noise they add, what they print; by hand or by the authors' own recipe."""

import numpy as np
import pytest

from instruct_pix2pix.cli import UserError
from instruct_pix2pix.evaluation.protocols import NOISE, PLAIN, PROTOCOLS, WINDOWS, Y, find

RAMP = np.arange(35 * 50 * 3, dtype=np.int64).reshape(35, 50, 3).astype(np.uint8)
WHITE = np.full((64, 64, 3), 255, np.uint8)


def test_sides_are_cut_about_the_centre_to_multiples_of_16():
    source, target = find("promptir", "Rain100L").prepare(RAMP // 2, RAMP)
    assert np.array_equal(target, RAMP[1:33, 1:49])  # 3 rows too many: 1 above, 2 below; 2 columns: 1 and 1
    assert np.array_equal(source, RAMP[1:33, 1:49] // 2)
    for protocol in (PLAIN, find("restormer", "Rain100L"), find("restormer", "CBSD68_15")):
        assert np.array_equal(protocol.prepare(RAMP, RAMP)[1], RAMP)
    assert find("instructir", "lol").prepare(WHITE, WHITE)[1].shape == WHITE.shape


def test_unclipped_noise_is_the_authors_in_8_bits():
    """Restormer: the seed 0 set before every image, noise in [0, 1], float32; the input is kept with 8 bits."""
    source, target = find("restormer", "CBSD68_25").prepare(RAMP, RAMP)
    state = np.random.get_state()
    np.random.seed(0)
    noise = np.random.normal(0, 25 / 255, RAMP.shape)
    np.random.set_state(state)
    expected = np.float32(RAMP) / 255
    expected += noise
    assert source.dtype == np.uint8 and np.abs(source - expected.clip(0, 1) * 255).max() < 0.501
    assert "cut and rounded to 8 bits (the authors': float32, neither)" in "".join(
        find("restormer", "CBSD68_25").lines(68)
    )


def test_clipped_noise_is_whole_and_inside():
    protocol = find("promptir", "BSD68_50")
    for shade, mean in (
        (255, 255 - 50 * np.sqrt(1 / (2 * np.pi)) - 0.25),
        (128, 127.5),
    ):  # of a half bell; of truncation
        source, target = protocol.prepare(WHITE, np.full_like(WHITE, shade))
        assert source.dtype == np.uint8 and np.all(target == shade)
        assert source.mean() == pytest.approx(mean, abs=1.5)
    assert (source == 0).any() and (source == 255).any()


def test_noise_depends_on_the_image_alone():
    protocol = find("promptir", "BSD68_15")
    first, other = (protocol.prepare(image, image)[0].astype(int) for image in (WHITE - 128, WHITE - 129))
    assert np.array_equal(first, protocol.prepare(WHITE, WHITE - 128)[0])
    assert np.corrcoef(first.ravel(), other.ravel())[0, 1] < 0.1  # a stream of its own
    assert np.array_equal(find("instructir", "CBSD68_15").prepare(WHITE, RAMP)[0], WHITE)  # the files are noisy


def test_every_set_says_how_it_is_measured():
    assert len({(protocol.name, protocol.set_name) for protocol in PROTOCOLS}) == len(PROTOCOLS)
    for protocol in PROTOCOLS:
        assert find(protocol.name, protocol.set_name.upper()) is protocol
        text = "\n".join(protocol.lines(protocol.images))
        assert protocol.source in text and "NOT" not in text and f"{protocol.images} of the published" in text
        for rule in (WINDOWS[protocol.window], Y[protocol.y], NOISE[protocol.noise].format(protocol.sigma)):
            assert rule in text
        assert f"set {protocol.set_name} ({protocol.task})" in text and "border left out: 0 pixels" in text
        assert ("multiples of 16" if protocol.name in ("promptir", "instructir") else "whole image") in text
    assert "images: 7" in PLAIN.lines(7)


def test_another_number_of_images_is_not_the_published_set():
    lines = find("restormer", "Test100").lines(97)
    assert "images: 97 of the published 98: NOT the published set, do not compare" in lines
    assert "to compare: psnr_y, ssim_y" in lines


@pytest.mark.parametrize(
    "protocol, set_name, message",
    [
        ("mine", "SOTS", "--protocol: mine: no such protocol; give promptir, instructir, restormer, instructdiffusion"),
        ("promptir", "GoPro", "--set: GoPro: promptir has no such set; promptir has SOTS, Rain100L, BSD68_15, "),
        ("restormer", None, "--set: missing; restormer has GoPro, HIDE, SIDD, "),
    ],
)
def test_an_unknown_protocol_or_set_names_what_there_is(protocol, set_name, message):
    with pytest.raises(UserError) as error:
        find(protocol, set_name)
    assert str(error.value).startswith(message)
