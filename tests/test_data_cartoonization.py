"""build_cartoonization.py as a user runs it: pairs, splits, instructions, restarts, bad images."""

import io
import os
import resource
import signal
import struct
import subprocess
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data_scripts import (
    PHOTOS,
    ROOT,
    checksums,
    command,
    environment,
    make_photos,
    pixels,
    plan_of,
    read_rows,
    run,
    skipped_of,
)

SCRIPT = "build_cartoonization.py"
OPENCV = ("--cartoonizer", "opencv")


@pytest.fixture(scope="module")
def many_photos(tmp_path_factory) -> Path:
    return make_photos(tmp_path_factory.mktemp("many") / "photos", 150)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, many_photos) -> Path:
    """A build of `many_photos` in several shards, never interrupted. Its command names no folder but its own."""
    return build_many(tmp_path_factory.mktemp("whole"), many_photos)


def many_command(folder: Path, photos: Path) -> list[str]:
    if not (folder / "photos").exists():
        (folder / "photos").symlink_to(photos)
    return command(SCRIPT, *OPENCV, "--photos", "photos", "--output_dir", "dataset", "--rows_per_shard", 45)


def build_many(folder: Path, photos: Path) -> Path:
    subprocess.run(many_command(folder, photos), cwd=folder, env=environment(), check=True, capture_output=True)
    return folder / "dataset"


def test_pairs_are_aligned_and_loadable(tmp_path):
    import datasets

    from instruct_pix2pix.building.cartoonizer import opencv_cartoonize
    from instruct_pix2pix.building.photos import decode_image
    from instruct_pix2pix.data.geometry import fit_photo

    for name in ("train", "test"):
        (tmp_path / "photos" / name / "nested").mkdir(parents=True)
        for path in sorted((ROOT / "assets/photos" / name).glob("*.webp"))[:6]:
            (tmp_path / "photos" / name / "nested" / path.name).write_bytes(path.read_bytes())
    folder = tmp_path / "dataset"
    out = run(SCRIPT, *OPENCV, "--photos", tmp_path / "photos", "--output_dir", folder, "--max_short_side", 100)
    assert "12 rows (6 train, 6 test)" in out

    dataset = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    assert {split: len(rows) for split, rows in dataset.items()} == {"train": 6, "test": 6}
    assert dataset["train"].column_names == ["original_image", "edit_prompt", "cartoonized_image"]
    # The saved original is, pixel by pixel, the scaled and cropped photo that the cartoonizer was given.
    photos = {}
    for row in plan_of(folder):
        photo = fit_photo(decode_image((tmp_path / "photos" / row["source"]).read_bytes()), 100)
        photos[photo.tobytes()] = row["split"]
    for split, rows in dataset.items():
        for row in rows:
            original, cartoon = np.asarray(row["original_image"]), np.asarray(row["cartoonized_image"])
            assert photos.pop(original.tobytes()) == split
            assert original.shape == cartoon.shape
            assert original.shape[0] % 8 == 0 and original.shape[1] % 8 == 0 and min(original.shape[:2]) <= 100
            assert np.array_equal(cartoon, opencv_cartoonize(original[None])[0])
            assert np.abs(original.astype(int) - cartoon).mean() > 2  # a cartoon differs from its photo
    assert not photos

    card = (folder / "README.md").read_text()
    assert "| cartoonize | 6 | 6 |" in card and "--photos photos" in card and str(tmp_path) not in card
    for name, digest in checksums(folder).items():
        assert not name.startswith("data/") or f"{digest}  {name}" in card
    assert Image.open(folder / "preview.png").width > 400


def test_instruction_depends_on_image_and_seed_alone(tmp_path, whole, many_photos):
    """Fewer photos under other names and in another order: the same sentence and split for the same picture."""
    some = tmp_path / "some"
    some.mkdir()
    for i, path in enumerate(sorted(many_photos.iterdir(), reverse=True)[::2]):
        (some / f"renamed{i:03d}.png").write_bytes(path.read_bytes())
    run(SCRIPT, *OPENCV, "--photos", some, "--output_dir", tmp_path / "dataset")
    prompts = {
        pixels(row["original_image"]).tobytes(): (row["edit_prompt"], split)
        for split in ("train", "validation", "test")
        for row in read_rows(whole, split)
    }
    found = 0
    for split in ("train", "validation", "test"):
        for row in read_rows(tmp_path / "dataset", split):
            assert prompts[pixels(row["original_image"]).tobytes()] == (row["edit_prompt"], split)
            found += 1
    assert found == 75
    assert len({prompt for prompt, _ in prompts.values()}) > 30  # drawn, not one for all


def test_held_out_wordings_are_for_the_test_split(whole, tmp_path):
    from instruct_pix2pix.building.plan import read_instructions

    (tmp_path / "windows.txt").write_text("held-out: a\r\n# b\r\nc  d\r\n", encoding="utf-8-sig")
    assert read_instructions(tmp_path / "windows.txt") == (["c d"], ["a"])
    training, held_out = read_instructions(ROOT / "data_preparation/instructions/cartoonize.txt")
    assert len(training) >= 50 and len(held_out) >= 5 and not set(training) & set(held_out)
    for split in ("train", "validation", "test"):
        prompts = {row["edit_prompt"] for row in read_rows(whole, split)}
        assert prompts and prompts <= set(held_out if split == "test" else training)


def test_all_instructions_seed_and_max_num_samples(tmp_path, many_photos):
    import datasets

    chosen = {}
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        run(SCRIPT, *OPENCV, "--photos", many_photos, "--output_dir", folder, "--all_instructions", "--seed", seed,
            "--max_num_samples", 20, "--validation_fraction", 0, "--test_fraction", 0)  # fmt: skip
        chosen[seed] = {row["source"] for row in plan_of(folder)}
        assert len(chosen[seed]) == 20
    assert chosen[0] != chosen[1]
    rows = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"), split="train")
    assert all(isinstance(row["edit_prompt"], list) and len(set(row["edit_prompt"])) >= 50 for row in rows)


def test_killed_at_any_moment_and_run_again(tmp_path, many_photos, whole):
    """Killed three times; in between the photos of all finished shards are destroyed: they must not be needed again."""
    from instruct_pix2pix.building.build import name_shards
    from instruct_pix2pix.building.plan import Row

    photos = tmp_path / "copy"
    photos.mkdir()
    for path in many_photos.iterdir():
        (photos / path.name).write_bytes(path.read_bytes())
    dataset = tmp_path / "dataset"
    for wanted in ("plan.jsonl", "data/.*.partial", "data/*.parquet"):
        before = set(dataset.glob(wanted))
        process = subprocess.Popen(
            many_command(tmp_path, photos), cwd=tmp_path, env=environment(), stderr=subprocess.DEVNULL
        )
        while set(dataset.glob(wanted)) <= before and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "finished before it could be killed: give it more photos"
        shards = name_shards([Row(**row) for row in plan_of(dataset)], 45)
        for name, rows in shards.items():
            if (dataset / "data" / name).exists():
                for row in rows:
                    path = photos / row.source
                    path.write_bytes(bytes(path.stat().st_size))
    kept = {path: path.stat().st_mtime_ns for path in dataset.glob("data/*.parquet")}
    assert kept and not (dataset / "README.md").exists()
    build_many(tmp_path, photos)
    assert checksums(dataset) == checksums(whole)
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())


def test_run_again_when_finished_or_damaged(tmp_path, many_photos, whole):
    dataset = build_many(tmp_path, many_photos)
    shard = sorted(dataset.glob("data/*.parquet"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    build_many(tmp_path, many_photos)
    assert checksums(dataset) == checksums(whole)


@pytest.mark.parametrize("content", [b"", b"not a picture", None])
def test_a_photo_that_changed_since_the_plan_is_named(tmp_path, content):
    """Gone, damaged or another picture of as many bytes: the digest of names and sizes does not tell."""
    photos = make_photos(tmp_path / "photos", 3)
    arguments = (SCRIPT, *OPENCV, "--photos", photos, "--output_dir", tmp_path / "dataset", "--test_fraction", 0,
                 "--validation_fraction", 0)  # fmt: skip
    run(*arguments)
    next((tmp_path / "dataset/data").iterdir()).unlink()
    photo = photos / "photo0001.png"
    size = photo.stat().st_size
    if content is None:
        Image.new("RGB", (8, 8)).save(photo)
        content = photo.read_bytes()
    photo.write_bytes(content.ljust(size, b"\0"))
    message = run(*arguments, fails=2)
    assert "--output_dir: photo0001.png has changed since the build began" in message


def test_other_settings_in_the_same_folder_are_refused(tmp_path, many_photos, whole):
    before = checksums(whole)
    message = run(SCRIPT, *OPENCV, "--photos", many_photos, "--output_dir", whole, "--rows_per_shard", 45, "--seed", 5,
                  fails=2)  # fmt: skip
    assert "--output_dir" in message and "another seed (0, now 5)" in message
    more = tmp_path / "more"
    more.mkdir()
    for path in [*many_photos.iterdir(), PHOTOS[0]]:
        (more / path.name).write_bytes(path.read_bytes())
    message = run(SCRIPT, *OPENCV, "--photos", more, "--output_dir", whole, "--rows_per_shard", 45, fails=2)
    assert "another photos" in message
    assert checksums(whole) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/README.md").write_text("my notes")
    message = run(SCRIPT, *OPENCV, "--photos", many_photos, "--output_dir", tmp_path / "mine", fails=2)
    assert "holds something else" in message and (tmp_path / "mine/README.md").read_text() == "my notes"
    (tmp_path / "run").mkdir()
    for name in ("skipped.jsonl", "training_log.jsonl"):  # a training's folder
        (tmp_path / "run" / name).write_text("{}\n")
    message = run(SCRIPT, *OPENCV, "--photos", many_photos, "--output_dir", tmp_path / "run", fails=2)
    assert "holds something else" in message and (tmp_path / "run/skipped.jsonl").read_text() == "{}\n"


def test_full_disk_leaves_what_is_finished(tmp_path, many_photos, whole):
    """A limit on the size of one file stands in for a full disk: the system refuses the write the same way."""

    def limit():
        # The plan fits and no row group does: the two images of a row take about 12 kB.
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = subprocess.run(
        many_command(tmp_path, many_photos), cwd=tmp_path, env=environment(), preexec_fn=limit, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 1
    last = done.stderr.replace("\r", "\n").strip().splitlines()[-1]
    assert last.startswith(f"{SCRIPT}: error: ") and "make room and run it again" in last
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "dataset/data").iterdir())
    build_many(tmp_path, many_photos)
    assert checksums(tmp_path / "dataset") == checksums(whole)


def test_images_of_every_kind(tmp_path):
    """What can be read is read right; what cannot be is listed with its reason; the rest goes on."""
    from instruct_pix2pix.building.photos import decode_image

    folder = tmp_path / "photos"
    folder.mkdir()
    photo = Image.open(PHOTOS[3]).convert("RGB").resize((96, 64))
    upright = np.asarray(photo)
    photo.save(folder / "plain.png")
    photo.convert("L").save(folder / "grey.png")
    photo.quantize(32).save(folder / "palette.png")
    photo.convert("CMYK").save(folder / "cmyk.tif")
    alpha = photo.copy()
    alpha.putalpha(Image.new("L", photo.size, 0))
    alpha.save(folder / "alpha.png")  # all transparent: white
    ramp = np.linspace(0, 65535, 96 * 64).reshape(64, 96).astype(np.uint16)
    Image.fromarray(ramp).save(folder / "deep.png")  # 16 bits
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees to view
    photo.transpose(Image.Transpose.ROTATE_90).save(folder / "rotated.png", exif=exif)
    photo.save(folder / "twin.bmp")  # the same pixels as plain.png
    Image.new("RGB", (5, 400)).save(folder / "narrow.png")
    (folder / "truncated.jpg").write_bytes(jpeg_bytes(photo)[:1200])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.png").write_text("not a picture")
    header = bytearray((folder / "plain.png").read_bytes())
    header[16:24] = struct.pack(">II", 60000, 60000)  # claims 3.6 gigapixels
    header[29:33] = struct.pack(">I", zlib.crc32(bytes(header[12:29])))
    (folder / "bomb.png").write_bytes(header)
    (folder / "notes.txt").write_text("ignored")
    photo.rotate(180).save(folder / "exif.png", exif=b"Exif\0\0of no kind")

    run(SCRIPT, *OPENCV, "--photos", folder, "--output_dir", tmp_path / "dataset", "--test_fraction", 0,
        "--validation_fraction", 0)  # fmt: skip
    made = {row["source"] for row in plan_of(tmp_path / "dataset")}
    skipped = skipped_of(tmp_path / "dataset")
    assert made | set(skipped) == {path.name for path in folder.iterdir()} - {"notes.txt"}
    # Pixel for pixel the same picture four times, the rotated one too, once upright. One of them is made.
    same = {"plain.png", "twin.bmp", "rotated.png", "cmyk.tif"}
    assert len(made & same) == 1
    assert all("the same picture as" in skipped[name] for name in same - made)
    reasons = {name: reason for name, reason in skipped.items() if name not in same}
    assert reasons.keys() == {"narrow.png", "truncated.jpg", "empty.jpg", "text.png", "bomb.png"}
    assert "too small" in reasons["narrow.png"] and "million pixels" in reasons["bomb.png"]
    assert "truncated" in reasons["truncated.jpg"]

    assert np.array_equal(decode_image((folder / "rotated.png").read_bytes()), upright)
    assert (decode_image((folder / "alpha.png").read_bytes()) == 255).all()
    deep = decode_image((folder / "deep.png").read_bytes())
    assert np.abs(deep[..., 0].astype(float) - ramp / 257).max() <= 0.5
    grey = decode_image((folder / "grey.png").read_bytes())
    assert grey.shape == (64, 96, 3) and np.array_equal(grey[..., 0], np.asarray(photo.convert("L")))
    assert np.abs(decode_image((folder / "cmyk.tif").read_bytes()).astype(int) - upright).max() <= 1


def jpeg_bytes(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG")
    return buffer.getvalue()


def test_a_photo_in_two_splits_goes_to_the_held_out_one(tmp_path):
    photos = make_photos(tmp_path / "photos/train", 4).parent
    (photos / "val").mkdir()
    (photos / "val/copy.png").write_bytes((photos / "train/photo0001.png").read_bytes())
    run(SCRIPT, *OPENCV, "--photos", photos, "--output_dir", tmp_path / "dataset")
    assert [row["split"] for row in plan_of(tmp_path / "dataset")] == ["train"] * 3 + ["validation"]


def test_rows_of_a_dataset_without_an_image_are_left_out(tmp_path):
    import datasets

    cells = [{"bytes": PHOTOS[0].read_bytes(), "path": None}, None, {"bytes": None, "path": None}]
    (tmp_path / "photos").mkdir()
    features = datasets.Features({"image": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}})
    rows = datasets.Dataset.from_dict({"image": cells}, features=features)
    rows.to_parquet(tmp_path / "photos/train.parquet")
    out = run(SCRIPT, *OPENCV, "--dataset", tmp_path / "photos", "--output_dir", tmp_path / "dataset",
              "--test_fraction", 0, "--validation_fraction", 0)  # fmt: skip
    assert "1 rows (1 train)" in out
    assert set(skipped_of(tmp_path / "dataset").values()) == {"no image"}


def test_imagenette_as_unpacked_and_a_single_split(tmp_path):
    root = tmp_path / "data"
    for part, count in (("train", 12), ("val", 4)):
        photos = make_photos(tmp_path / part, count + 2 * (part == "val"))
        for i, path in enumerate(sorted(photos.iterdir())[2 * (part == "val") :]):
            synset = root / "imagenette2-160" / part / ("n01440764", "n03888257")[i % 2]
            synset.mkdir(parents=True, exist_ok=True)
            Image.open(path).transpose(i % 7).save(synset / f"{part}_{i}.JPEG")
    (root / "imagenette2-160/noisy_imagenette.csv").write_text("path\n")
    run(SCRIPT, *OPENCV, "--photos", root, "--output_dir", tmp_path / "both")
    assert [row["split"] for row in plan_of(tmp_path / "both")] == ["train"] * 12 + ["validation"] * 4
    run(SCRIPT, *OPENCV, "--photos", root, "--output_dir", tmp_path / "one", "--split", "train",
        "--validation_fraction", 0.3, "--test_fraction", 0.3)  # fmt: skip
    rows = plan_of(tmp_path / "one")
    assert len(rows) == 12 and len({row["split"] for row in rows}) > 1
    assert "val/" not in "".join(row["source"] for row in rows)


def test_a_dataset_as_the_source(tmp_path, whole):
    """The parquet files of one dataset are the photos of the next; its splits are kept."""
    run(SCRIPT, *OPENCV, "--dataset", whole, "--image_column", "original_image", "--output_dir", tmp_path / "again",
        "--max_num_samples", 0, "--max_short_side", 32)  # fmt: skip
    for split in ("train", "validation", "test"):
        assert len(read_rows(tmp_path / "again", split)) == len(read_rows(whole, split))
    message = run(SCRIPT, *OPENCV, "--dataset", whole, "--output_dir", tmp_path / "wrong", fails=2)
    assert "--image_column" in message and "original_image" in message
    message = run(SCRIPT, *OPENCV, "--dataset", tmp_path, "--dataset_config", "320px", "--output_dir", tmp_path / "no",
                  fails=2)  # fmt: skip
    assert "no parquet file" in message and "320px" in message


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--photos", "nowhere"], ["--photos: nowhere", "no such folder"]),
        (["--photos", "."], ["--photos: .", "no image"]),
        (["--photos", ".", "--output_dir", "./inside"], ["--output_dir", "inside --photos"]),
        (["--photos", "nowhere", "--max_short_side", "4"], ["--max_short_side: 4"]),
        (["--photos", "nowhere", "--test_fraction", "0.99"], ["--validation_fraction", "0.99"]),
        (["--photos", "nowhere", "--instructions", "empty.txt"], ["empty.txt: no instruction"]),
        (["--photos", "nowhere", "--instructions", "gone.txt"], ["--instructions: gone.txt cannot be read"]),
        (["--photos", "nowhere", "--cartoonizer", "none"], ["--cartoonizer", "whitebox"]),
        (["--photos", "bad"], ["no image can be used", "bad.png"]),
    ],
)
def test_mistakes_are_one_line(tmp_path, arguments, words):
    (tmp_path / "empty.txt").write_text("# nothing but a remark\n\n")
    if "bad" in arguments:
        (tmp_path / "bad").mkdir()
        (tmp_path / "bad/bad.png").write_text("not a picture")
    message = run(SCRIPT, *OPENCV, "--output_dir", "../dataset", *arguments, fails=2, cwd=tmp_path)
    assert all(word in message for word in words), message


def test_stopping_by_hand_is_one_line(tmp_path, many_photos):
    process = subprocess.Popen(
        many_command(tmp_path, many_photos),
        cwd=tmp_path,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        # A test run that was itself started in the background ignores Ctrl-C, and its children would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not (tmp_path / "dataset/data").exists():
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGINT)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "the same command goes on from here" in errors and "Traceback" not in errors
