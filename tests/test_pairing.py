"""Pairs by name: each file with its own partner, or a refusal that shows the names."""

import unicodedata
from collections import Counter

import pytest
from PIL import Image

from instruct_pix2pix.cli import UserError
from instruct_pix2pix.data.pairing import pair_by_keys, pair_by_name, stem
from instruct_pix2pix.images import find_images

COMPOSED = "café.png"
DECOMPOSED = unicodedata.normalize("NFD", COMPOSED)


@pytest.mark.parametrize(
    ("inputs", "targets", "expected", "alone"),
    [
        (["a.jpg", "b.png"], ["b.webp", "a.jpg"], [("a.jpg", "a.jpg"), ("b.png", "b.webp")], ([], [])),
        # two pictures of one stem: each takes the partner of its very name
        (["a.jpg", "a.png"], ["a.png", "a.jpg"], [("a.jpg", "a.jpg"), ("a.png", "a.png")], ([], [])),
        (["a.jpg", "a.png"], ["a.jpg"], [("a.jpg", "a.jpg")], (["a.png"], [])),
        (["x/a.jpg", "y/a.jpg"], ["y/a.png", "x/a.png"], [("x/a.jpg", "x/a.png"), ("y/a.jpg", "y/a.png")], ([], [])),
        (["a.1.png"], ["a.2.png"], [], (["a.1.png"], ["a.2.png"])),
        ([COMPOSED], [DECOMPOSED], [(COMPOSED, DECOMPOSED)], ([], [])),
        (
            [COMPOSED, DECOMPOSED],
            [DECOMPOSED, COMPOSED],
            [(DECOMPOSED, DECOMPOSED), (COMPOSED, COMPOSED)],
            ([], []),
        ),
    ],
)
def test_names_are_paired_rightly(inputs, targets, expected, alone):
    found = pair_by_name(inputs, targets, "--train_data_dir")
    assert sorted(found.pairs) == sorted(expected)
    assert (found.inputs_alone, found.targets_alone) == alone


@pytest.mark.parametrize(
    ("inputs", "targets"),
    [
        (["a.jpg", "a.png"], ["a.webp"]),
        (["a.webp"], ["a.jpg", "a.png"]),
        (["a.jpg", "a.png"], ["a.jpg", "a.webp"]),  # the first is sure, the rest is not
    ],
)
def test_names_that_could_belong_to_two_are_refused_and_shown(inputs, targets):
    with pytest.raises(UserError, match="--train_data_dir: a.jpg and a.(png|webp) could both belong to a.(webp|png)"):
        pair_by_name(inputs, targets, "--train_data_dir")


def test_several_inputs_may_share_a_target_where_a_set_is_like_that():
    inputs, targets = ["1_a.png", "1_b.png", "2_a.png", "9_a.png"], ["1.png", "2.png", "3.png"]
    found = pair_by_keys(inputs, targets, [lambda name: stem(name).split("_")[0]], "--set", several_inputs=True)
    assert found.pairs == [("1_a.png", "1.png"), ("1_b.png", "1.png"), ("2_a.png", "2.png")]
    assert (found.inputs_alone, found.targets_alone) == (["9_a.png"], ["3.png"])
    with pytest.raises(UserError, match="1_a.png and 1_b.png"):
        pair_by_keys(inputs, targets, [lambda name: stem(name).split("_")[0]], "--set")


def test_every_format_counts_and_what_does_not_is_counted(tmp_path):
    picture = Image.new("RGB", (20, 10), "red")
    for ending in ("avif", "jfif", "tiff", "bmp", "gif", "jp2", "PNG", "jpe", "tga"):
        picture.save(tmp_path / f"a.{ending}", {"jfif": "JPEG", "jpe": "JPEG"}.get(ending))
    for name in (".hidden.png", "._a.png", "Thumbs.db", "desktop.ini", "notes.txt", "a.pdf", "b.pdf", "README"):
        (tmp_path / name).write_bytes(b"x")
    for folder in (".ipynb_checkpoints", "__MACOSX", ".git"):
        (tmp_path / folder).mkdir()
        picture.save(tmp_path / folder / "b.png")
    images, others = find_images(tmp_path)
    assert images == sorted(f"a.{e}" for e in ("avif", "jfif", "tiff", "bmp", "gif", "jp2", "PNG", "jpe", "tga"))
    assert others == Counter({".pdf": 2, ".txt": 1, "no ending": 1})
