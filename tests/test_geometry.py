"""Pairs of any size become aligned square crops, by one decision for both images."""

import numpy as np
import pytest
from PIL import Image

from instruct_pix2pix.data.geometry import align_original, alignment, crop_pair, whitebox_size
from instruct_pix2pix.images import image_size, read_image, to_rgb


def coordinates(width: int, height: int) -> Image.Image:
    """A picture whose red is the column and whose green is the row: where a crop came from can be read off."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x, y, np.zeros_like(x)], axis=-1).astype(np.uint8))


@pytest.mark.parametrize("geometry", ["resize_crop", "crop", "squash"])
def test_both_images_get_the_same_place_and_mirroring(geometry):
    image = coordinates(200, 120)
    seen = set()
    for seed in range(20):
        original, edited = crop_pair(image, image, 64, geometry, False, True, np.random.default_rng(seed))
        assert original.shape == (64, 64, 3) and original.dtype == np.uint8
        assert np.array_equal(original, edited)
        seen.add((bool(original[0, 0, 0] > original[0, -1, 0]), int(original[32, 32, 0])))
    mirrored = {flag for flag, _ in seen}
    assert mirrored == {True, False}
    assert len(seen) > (2 if geometry == "squash" else 6) - 1


def test_crop_keeps_native_pixels_and_enlarges_only_what_is_too_small():
    image = coordinates(200, 120)
    original, _ = crop_pair(image, image, 64, "crop", True, False, np.random.default_rng(0))
    assert np.array_equal(original, np.asarray(image)[28 : 28 + 64, 68 : 68 + 64])
    small = coordinates(100, 32)
    original, _ = crop_pair(small, small, 64, "crop", True, False, np.random.default_rng(0))
    assert original[-1, 0, 1] - original[0, 0, 1] == pytest.approx(31, abs=2)  # 32 rows over 64 pixels


def test_resize_crop_keeps_the_aspect_ratio_and_squash_does_not():
    image = coordinates(240, 120)
    original, _ = crop_pair(image, image, 60, "resize_crop", True, False, np.random.default_rng(0))
    red, green = original[..., 0].astype(int), original[..., 1].astype(int)
    assert red.max() - red.min() == pytest.approx(120, abs=4) == green.max() - green.min()
    original, _ = crop_pair(image, image, 60, "squash", True, False, np.random.default_rng(0))
    assert int(original[..., 0].max()) - int(original[..., 0].min()) == pytest.approx(236, abs=4)


def test_random_crops_reach_both_borders():
    image = coordinates(66, 64)
    left = {crop_pair(image, image, 64, "crop", False, False, np.random.default_rng(s))[0][0, 0, 0] for s in range(60)}
    assert left == {0, 1, 2}


@pytest.mark.parametrize(
    ("size", "scaled", "cropped"),
    [
        ((500, 375), (500, 375), (496, 368)),
        ((1600, 900), (1280, 720), (1280, 720)),
        ((901, 1333), (720, 1065), (720, 1064)),
    ],
)
def test_whitebox_sizes(size, scaled, cropped):
    assert whitebox_size(*size) == (scaled, cropped)


def test_a_cartoon_cut_at_right_and_bottom_gets_its_original_cut_the_same_way():
    original = coordinates(205, 123)
    assert alignment(original.size, (200, 120)) == "whitebox"
    aligned = align_original(original, (200, 120))
    assert np.array_equal(np.asarray(aligned), np.asarray(original)[:120, :200])


def test_a_scaled_partner_is_brought_to_the_edited_images_size():
    assert align_original(coordinates(100, 50), (201, 100)).size == (201, 100)
    assert alignment((100, 50), (201, 100)) == "resized"


def test_a_partner_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="100x50.*100x80.*aspect"):
        align_original(coordinates(100, 50), (100, 80))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "I", "F"])
def test_every_mode_becomes_rgb_with_the_picture_kept(mode, photos):
    gray = np.asarray(photos[0].convert("L"))
    expected = gray.astype(float)
    if mode.startswith("I"):
        image = Image.fromarray(gray.astype(np.uint16) * 257)
        image = image if mode == "I;16" else image.convert("I")
    elif mode == "F":
        image = Image.fromarray(gray.astype(np.float32) / 255)
    elif mode == "1":
        expected = np.where(gray > 127, 255.0, 0.0)
        image = Image.fromarray(expected.astype(np.uint8)).convert("1")
    else:
        image = photos[0].quantize(256) if mode == "P" else photos[0].convert(mode)
    rgb = to_rgb(image)
    assert rgb.mode == "RGB" and rgb.size == photos[0].size
    assert np.abs(np.asarray(rgb.convert("L")).astype(float) - expected).mean() < (4 if mode == "P" else 1)


def test_transparency_goes_on_white_and_exif_rotation_is_applied(photos, tmp_path):
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert to_rgb(clear).getpixel((0, 0)) == (255, 255, 255)
    exif = Image.Exif()
    exif[0x0112] = 6
    photos[0].save(tmp_path / "broken.png", exif=b"Exif\0\0of no kind")
    assert image_size(tmp_path / "broken.png") == read_image(tmp_path / "broken.png").size == photos[0].size
    photos[0].save(tmp_path / "turned.jpg", exif=exif)
    assert to_rgb(Image.open(tmp_path / "turned.jpg")).size == photos[0].size[::-1]
