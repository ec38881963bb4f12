"""A dataset of a thousand rows that holds every fault once: what is used has the right pixels, all else is named."""

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from instruct_pix2pix.cli import RowError
from instruct_pix2pix.data.geometry import crop_pair
from instruct_pix2pix.data.sources import Source
from instruct_pix2pix.data.triples import TripleDataset, Triples, load_triples, open_pair
from tests.test_dataset import options

ROWS, EVERY = 1000, 50  # a fault in every fiftieth row
WIDTH, HEIGHT = 32, 48
LONG = "make it blue, " * 8000
WORLD = "👩‍🎨 اجعلها زرقاء \u202eהפוך לכחול é"


def corners(size: tuple[int, int] = (WIDTH, HEIGHT)) -> Image.Image:
    """Red above left, green above right, blue below left, white below right: a turn or another size shows."""
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    down, right = size[1] // 2, size[0] // 2
    pixels[:down, :right], pixels[:down, right:] = (255, 0, 0), (0, 255, 0)
    pixels[down:, :right], pixels[down:, right:] = (0, 0, 255), (255, 255, 255)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned_by_exif() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    return encoded(corners().transpose(Image.Transpose.ROTATE_90), "JPEG", quality=95, subsampling=0, exif=exif)


def bomb() -> bytes:
    """A PNG file of a few bytes whose header claims 60,000 by 60,000 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(bytes(1000))
    chunks = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (header, data, b"IEND")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def deep() -> Image.Image:
    """16 bits a pixel, each row one grey."""
    return Image.fromarray(np.repeat(np.arange(HEIGHT, dtype=np.uint16)[:, None] * 1285, WIDTH, 1))


def animated() -> bytes:
    frames = [corners().quantize(4), Image.new("RGB", (WIDTH, HEIGHT), "black").quantize(4)]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


def jpeg(image: Image.Image) -> bytes:
    return encoded(image, "JPEG", quality=95, subsampling=0)


# fault -> what its row has instead of the good pair's: files by column, or values.
FAULTS = {
    "truncated": {"edited_image": jpeg(corners((300, 450)))[:-2000]},
    "zero bytes": {"original_image": b""},
    "1x1": {side: encoded(corners((1, 1)), "PNG") for side in ("original_image", "edited_image")},
    "30000x2": {side: encoded(corners((30_000, 2)), "PNG") for side in ("original_image", "edited_image")},
    "cmyk": {"edited_image": encoded(corners().convert("CMYK"), "JPEG", quality=95)},
    "16 bit": {"edited_image": encoded(deep(), "PNG")},
    "animated": {"original_image": animated()},
    "exif": {"original_image": turned_by_exif()},
    "bomb": {"edited_image": bomb()},
    "missing": {"edited_image": "nowhere.png"},
    "none": {"original_image": None},
    "empty instruction": {"edit_prompt": ""},
    "no instruction": {"edit_prompt": None},
    "long instruction": {"edit_prompt": LONG},
    "emoji": {"edit_prompt": WORLD},
    "mismatched": {"edited_image": encoded(corners((HEIGHT, WIDTH)), "PNG")},
}
ROW_OF = {fault: EVERY * (number + 1) for number, fault in enumerate(FAULTS)}


def build(folder: Path) -> Path:
    """ROWS rows in metadata.jsonl, a good pair each but for those of ROW_OF."""
    corners().save(folder / "good.png")
    good = {"original_image": "good.png", "edit_prompt": "leave it", "edited_image": "good.png"}
    rows = [dict(good) for _ in range(ROWS)]
    for fault, changes in FAULTS.items():
        for column, value in changes.items():
            if isinstance(value, bytes):
                name = f"{fault}-{column}"
                (folder / f"{name}.jpg").write_bytes(value)  # the content counts, not the ending
                value = f"{name}.jpg"
            rows[ROW_OF[fault]][column] = value
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def triples(tmp_path_factory) -> Triples:
    """All rows, every image decoded."""
    found = load_triples(Source(str(build(tmp_path_factory.mktemp("faults"))), "--dataset_name", check_all=True))
    assert len(found) == ROWS
    return found


UNUSABLE = [
    ("truncated", "edited_image", "truncated"),
    ("zero bytes", "original_image", "not an image"),
    (
        "bomb",
        "edited_image",
        "60000x60000 is more than 100 million pixels; allow it with --max_image_pixels",
    ),
    ("missing", "edited_image", "does not exist"),
    ("none", "original_image", "no image"),
    ("empty instruction", "edit_prompt", "the instruction is empty"),
    ("no instruction", "edit_prompt", "None is not an instruction"),
    ("mismatched", "edited_image", "the original is 32x48 and the edited image 48x32"),
]


@pytest.mark.parametrize(("fault", "column", "reason"), UNUSABLE)
def test_a_row_that_cannot_be_used_is_named_with_its_column_and_the_reason(fault, column, reason, triples):
    with pytest.raises(RowError) as caught:
        open_pair(triples, ROW_OF[fault])
    message = str(caught.value)
    assert message.startswith(f"{triples.source}: row {ROW_OF[fault]}, column {column}: ")
    assert reason in message and "\n" not in message


def test_these_rows_and_no_others_are_left_out_with_their_reasons(triples):
    expected = {ROW_OF[fault]: (column, reason) for fault, column, reason in UNUSABLE}
    assert triples.bad.keys() == expected.keys()
    for row, (column, reason) in expected.items():
        assert triples.bad[row].startswith(f"column {column}: ") and reason in triples.bad[row]
    assert [entry["row"] for entry in triples.skipped()] == sorted(expected)
    # A sample of headers finds all of them but the one that only decoding shows.
    assert load_triples(Source(triples.source.split(": ")[1], "--dataset_name")).bad.keys() == expected.keys() - {
        ROW_OF["truncated"]
    }


def test_an_epoch_passes_over_them(triples):
    args = options(resolution=32, center_crop=True, random_flip=False, image_geometry="resize_crop")
    dataset = TripleDataset(triples, args, latent_shape=(4, 4, 4), num_timesteps=1000)
    left_out = {row for position in range(ROWS) for row, _ in dataset[position]["skipped"]}
    assert left_out == triples.bad.keys()


def test_rows_beside_them_are_used(triples):
    for row in (0, 1, ROWS - 1, *(row + 1 for row in ROW_OF.values())):
        wordings, *pair = open_pair(triples, row)
        assert wordings == ["leave it"] and all(image == corners() for image in pair)


@pytest.mark.parametrize("fault", ["cmyk", "animated", "exif"])
def test_what_is_stored_in_another_way_gives_the_same_picture(fault, triples):
    _, *pair = open_pair(triples, ROW_OF[fault])
    for image in pair:
        assert image.mode == "RGB" and image.size == (WIDTH, HEIGHT)
        for place in ((4, 4), (28, 4), (4, 44), (28, 44)):  # JPEG keeps colours to a few levels
            assert np.abs(np.subtract(image.getpixel(place), corners().getpixel(place))).max() <= 4


def test_sixteen_bits_are_scaled_to_eight(triples):
    _, _, edited = open_pair(triples, ROW_OF["16 bit"])
    levels = np.asarray(edited)
    assert levels.shape == (HEIGHT, WIDTH, 3)
    assert np.array_equal(levels, np.broadcast_to(np.arange(HEIGHT)[:, None, None] * 5, levels.shape))


def test_one_pixel_is_enlarged(triples):
    _, *pair = open_pair(triples, ROW_OF["1x1"])
    crops = crop_pair(*pair, 32, "resize_crop", True, False, np.random.default_rng(0))
    assert all(np.array_equal(crop, np.full((32, 32, 3), 255)) for crop in crops)


@pytest.mark.parametrize("geometry", ["resize_crop", "crop", "squash"])
def test_a_thread_of_a_picture_is_cropped_within_little_memory(geometry, triples):
    """30,000 x 2 brought to 512 on its short side would be 7.7 million by 512: 12 GB."""
    _, *pair = open_pair(triples, ROW_OF["30000x2"])
    middle = crop_pair(*pair, 512, geometry, True, False, np.random.default_rng(0))
    for crop in middle:
        for place, colour in (((100, 10), "red"), ((100, 500), "green"), ((410, 10), "blue"), ((410, 500), "white")):
            expected = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}[colour]
            assert np.abs(crop[place].astype(int) - expected).max() <= 40


@pytest.mark.parametrize(("fault", "text"), [("long instruction", LONG), ("emoji", WORLD)], ids=lambda text: text[:20])
def test_an_instruction_is_taken_as_it_is(fault, text, triples):
    wordings, *_ = open_pair(triples, ROW_OF[fault])
    assert wordings == [text]
