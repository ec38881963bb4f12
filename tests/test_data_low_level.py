"""build_low_level.py as a user runs it: every set in the layouts in which it is downloaded, synthesis, mixtures."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data_scripts import (
    PHOTOS,
    SCRIPTS,
    make_photos,
    pixels,
    plan_of,
    read_rows,
    run,
    skipped_of,
)

SCRIPT = "build_low_level.py"
PUBLISHED = {
    "deblur": "deblur the blurry image",
    "derain": "derain the image",
    "denoise": "denoise the noisy image",
    "enhance": "enhance the low-light image",
}


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    """Small pictures, each another: the ground truths of the miniature sets."""
    cut = []
    for path in PHOTOS:
        photo = np.asarray(Image.open(path).convert("RGB").resize((160, 96)))
        cut += [photo[y : y + 32, x : x + 40] for y in (0, 32, 64) for x in (0, 40, 80, 120)]
    return [picture for picture in cut if picture.std() > 10]


class Tree:
    """Writes pairs. The input of every pair is the negative of its target, so that a wrong partner shows."""

    def __init__(self, root: Path, pictures: list[np.ndarray]):
        self.root, self.pictures = root, iter(pictures)

    def image(self, path: str, pixels: np.ndarray) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        quality = {"quality": 100, "subsampling": 0} if path.endswith("jpg") else {}
        Image.fromarray(pixels).save(self.root / path, **quality)

    def pair(self, degraded: str, target: str) -> None:
        picture = next(self.pictures)
        self.image(target, picture)
        self.image(degraded, 255 - picture)

    def pairs(self, degraded: str, target: str, names) -> None:
        for name in names:
            self.pair(degraded.format(name), target.format(name))


def frames(count: int) -> list[str]:
    return [f"{i:08d}" for i in range(count)]


def reds_zips(tree):  # the official archives, unpacked side by side
    for clip in ("000", "001"):
        tree.pairs(f"train_blur/{clip}/{{}}.png", f"train_sharp/{clip}/{{}}.png", frames(3))
    tree.pairs("val_blur/000/{}.png", "val_sharp/000/{}.png", frames(2))
    tree.image("train_sharp_bicubic/X4/000/00000000.png", np.zeros((8, 8, 3), np.uint8))  # another task's
    tree.image("train_blur_comp/000/00000000.png", np.zeros((32, 40, 3), np.uint8))


def reds_nested(tree):  # and unpacked each with its own folder on top; both kinds of blurred frames
    for clip in ("000", "239"):
        tree.pairs(f"train/train_blur/{clip}/{{}}.png", f"train/train_sharp/{clip}/{{}}.png", frames(3))
    tree.image("train/train_blur_jpeg/000/00000000.jpg", np.zeros((32, 40, 3), np.uint8))
    tree.pairs("val/val_blur/000/{}.png", "val/val_sharp/000/{}.png", frames(2))


def reds_hinet(tree):
    for clip in ("000", "001"):
        tree.pairs(f"train/train_blur_jpeg/{clip}/{{}}.jpg", f"train/train_sharp/{clip}/{{}}.png", frames(3))
    tree.pairs("val/val_blur_jpeg/000/{}.jpg", "val/val_sharp/000/{}.png", frames(2))


def reds_instruct_diffusion(tree):
    for clip in ("000", "001"):
        tree.pairs(f"REDS/train/blur/{clip}/{{}}.png", f"REDS/train/sharp/{clip}/{{}}.png", frames(3))
    tree.pairs("REDS/val/blur/000/{}.png", "REDS/val/sharp/000/{}.png", frames(2))


RAIN_TESTS = ("Test100", "Rain100H", "Rain100L", "Test2800", "Test1200")


def rain_hinet(tree):
    tree.pairs("train/input/{}.jpg", "train/target/{}.jpg", range(6))
    for name in RAIN_TESTS:
        tree.pairs(f"test/{name}/input/{{}}.png", f"test/{name}/target/{{}}.png", [1])


def rain_mprnet(tree):
    tree.pairs("Datasets/train/Rain13K/input/{}.png", "Datasets/train/Rain13K/target/{}.png", range(6))
    for name in RAIN_TESTS:
        tree.pairs(f"Datasets/test/{name}/input/{{}}.png", f"Datasets/test/{name}/target/{{}}.png", [1])


def rain_mprnet_readme(tree):
    tree.pairs("Synthetic_Rain_Datasets/train/input/{}.png", "Synthetic_Rain_Datasets/train/target/{}.png", range(6))
    for name in RAIN_TESTS:
        folder = f"Synthetic_Rain_Datasets/test/{name}"
        tree.pairs(f"{folder}/input/{{}}.png", f"{folder}/target/{{}}.png", [1])


# Scene 010 is the one of the ten whose hash holds it out.
INSTANCES = ("0001_001_S6_00100_00060_3200_L", "0002_001_S6_00100_00020_3200_N", "0198_010_G4_00800_00640_3200_L")


def sidd_small(tree):
    for instance in INSTANCES:
        tree.pair(f"Data/{instance}/NOISY_SRGB_010.PNG", f"Data/{instance}/GT_SRGB_010.PNG")
    (tree.root / "Scene_Instances.txt").write_text("\n".join(INSTANCES))


def sidd_medium(tree):
    for instance in INSTANCES:
        for number in ("010", "011"):
            name = f"SIDD_Medium_Srgb/Data/{instance}/{instance[:4]}_{{}}_SRGB_{number}.PNG"
            tree.pair(name.format("NOISY"), name.format("GT"))


def sidd_lower_case(tree):
    for instance in INSTANCES:
        tree.pair(f"data/{instance.lower()}/noisy_srgb_010.png", f"data/{instance.lower()}/gt_srgb_010.png")


def lol(tree):
    tree.pairs("our485/low/{}.png", "our485/high/{}.png", (2, 5, 6, 9))
    tree.pairs("eval15/low/{}.png", "eval15/high/{}.png", (1, 22))
    tree.image("__MACOSX/our485/low/2.png", np.zeros((8, 8, 3), np.uint8))
    (tree.root / "our485/low/._2.png").write_bytes(b"Mac OS X")


def lol_nested(tree):
    tree.pairs("LOLdataset/our485/low/{}.png", "LOLdataset/our485/high/{}.png", (2, 5, 6, 9))
    tree.pairs("LOLdataset/eval15/low/{}.png", "LOLdataset/eval15/high/{}.png", (1, 22))


def raindrop(tree):
    tree.pairs("train/data/{}_rain.png", "train/gt/{}_clean.png", range(12))
    tree.pairs("test_b/data/{}_rain.jpg", "test_b/gt/{}_clean.jpg", range(3))
    for side, name in (("data", "1_rain.jpg"), ("gt", "1_clean.jpg")):  # test_a is a part of test_b
        (tree.root / "test_a" / side).mkdir(parents=True)
        (tree.root / "test_a" / side / name).write_bytes((tree.root / "test_b" / side / name).read_bytes())


LAYOUTS = [
    {"reds": reds_zips, "rain13k": rain_hinet, "sidd": sidd_small, "lol": lol, "raindrop": raindrop},
    {"reds": reds_nested, "rain13k": rain_mprnet, "sidd": sidd_medium, "lol": lol_nested},
    {"reds": reds_hinet, "rain13k": rain_mprnet_readme, "sidd": sidd_lower_case},
    {"reds": reds_instruct_diffusion},
]
EXPECTED = {  # (train, test or validation)
    reds_zips: (6, 2), reds_nested: (6, 2), reds_hinet: (6, 2), reds_instruct_diffusion: (6, 2),
    rain_hinet: (6, 5), rain_mprnet: (6, 5), rain_mprnet_readme: (6, 5),
    sidd_small: (2, 1), sidd_medium: (4, 2), sidd_lower_case: (2, 1),
    lol: (4, 2), lol_nested: (4, 2), raindrop: (12, 3),
}  # fmt: skip
TASKS = {"reds": "deblur", "rain13k": "derain", "sidd": "denoise", "lol": "enhance", "raindrop": "deraindrop"}
HELD_OUT = {"reds": "validation", "rain13k": "test", "sidd": "test", "lol": "test", "raindrop": "test"}


@pytest.mark.parametrize("sets", LAYOUTS)
def test_sets_as_they_are_downloaded(tmp_path, pictures, sets):
    pictures = iter(pictures)
    arguments = []
    for name, layout in sets.items():
        (tmp_path / name).mkdir()
        layout(Tree(tmp_path / name, pictures))
        arguments += [f"--{name}", tmp_path / name]
    dataset = tmp_path / "dataset"
    run(SCRIPT, *arguments, "--output_dir", dataset)
    rows = {split: read_rows(dataset, split) for split in ("train", "validation", "test")}
    counts = Counter((row["task"], split) for split, part in rows.items() for row in part)
    expected = Counter()
    for name, layout in sets.items():
        expected[TASKS[name], "train"], expected[TASKS[name], HELD_OUT[name]] = EXPECTED[layout]
    assert counts == expected
    seen = set()
    for row in (row for part in rows.values() for row in part):
        degraded, target = pixels(row["input_image"]), pixels(row["ground_truth_image"])
        assert degraded.shape == target.shape
        assert np.abs(255 - degraded.astype(int) - target).mean() < 8  # each with its own partner
        seen.add(target.tobytes())
    assert len(seen) == sum(expected.values())
    card = (dataset / "README.md").read_text()
    for name, layout in sets.items():
        assert f"| {TASKS[name]} | {EXPECTED[layout][0]} |" in card
    if "raindrop" in sets:
        reasons = Counter(skipped_of(dataset).values())
        assert reasons == {"of no known layout": 2, "the same picture as raindrop/test_a/data/1_rain.jpg": 1}


def test_a_pair_in_two_splits_goes_to_the_held_out_one(tmp_path, pictures):
    lol(Tree(tmp_path / "lol", pictures))
    for side in ("low", "high"):
        (tmp_path / f"lol/eval15/{side}/1.png").write_bytes((tmp_path / f"lol/our485/{side}/2.png").read_bytes())
    run(SCRIPT, "--lol", tmp_path / "lol", "--output_dir", tmp_path / "dataset")
    splits = {row["input"]: row["split"] for row in plan_of(tmp_path / "dataset")}
    assert splits.pop("lol/our485/low/2.png") == "test" and len(splits) == 4
    assert skipped_of(tmp_path / "dataset") == {"lol/eval15/low/1.png": "the same picture as lol/our485/low/2.png"}


def test_counts_fraction_and_published_wording(tmp_path, pictures):
    """Numbers of training pairs, and the same share of what a set holds out; loadable; the published four tasks."""
    import datasets

    pictures = iter(pictures)
    for name, layout in (("reds", reds_zips), ("rain13k", rain_hinet), ("sidd", sidd_medium), ("lol", lol)):
        (tmp_path / name).mkdir()
        layout(Tree(tmp_path / name, pictures))
    sets = [item for name in ("reds", "rain13k", "sidd", "lol") for item in (f"--{name}", tmp_path / name)]
    plain = tmp_path / "instructions"
    plain.mkdir()
    for task, sentence in PUBLISHED.items():
        listed = (SCRIPTS / f"instructions/{task}.txt").read_text().splitlines()
        assert [line for line in listed if not line.startswith("#")][0] == sentence
        (plain / f"{task}.txt").write_text(sentence + "\n")
    numbers = ("--num_reds", 3, "--num_rain13k", 2, "--num_sidd", 1)
    run(SCRIPT, *sets, *numbers, "--fraction", 0.75, "--instructions", plain, "--output_dir", tmp_path / "dataset")
    dataset = datasets.load_dataset(str(tmp_path / "dataset"), cache_dir=str(tmp_path / "cache"))
    assert dataset["train"].column_names == ["instruction", "input_image", "ground_truth_image", "task"]
    assert Counter(dataset["train"]["task"]) == {"deblur": 3, "derain": 2, "denoise": 1, "enhance": 3}
    assert Counter(dataset["validation"]["task"]) == {"deblur": 1}
    assert Counter(dataset["test"]["task"]) == {"derain": 2, "enhance": 2, "denoise": 1}
    for rows in dataset.values():
        assert all(row["instruction"] == PUBLISHED[row["task"]] for row in rows)
    message = run(SCRIPT, *sets, "--num_lol", 5, "--output_dir", tmp_path / "more", fails=2)
    assert "--num_lol: 5 is more than its 4 training pairs" in message


def test_files_are_embedded_as_the_set_ships_them(tmp_path, pictures):
    lol(Tree(tmp_path / "lol", pictures))
    run(SCRIPT, "--lol", tmp_path / "lol", "--output_dir", tmp_path / "dataset")
    shipped = {path.read_bytes() for path in (tmp_path / "lol").rglob("*/low/?.png")}
    assert {row["input_image"]["bytes"] for row in read_rows(tmp_path / "dataset", "train")} <= shipped


def test_tiles_cover_a_large_image(tmp_path):
    picture = np.asarray(Image.open(PHOTOS[0]).convert("RGB").resize((200, 140)))
    tree = Tree(tmp_path / "lol", [picture, picture[:60, :60]])
    tree.pairs("our485/low/{}.png", "our485/high/{}.png", (1, 2))
    run(SCRIPT, "--lol", tmp_path / "lol", "--tile", 64, "--output_dir", tmp_path / "dataset")
    plan = plan_of(tmp_path / "dataset")
    assert len(plan) == 4 * 3 + 1
    canvas = np.zeros_like(picture)
    rows = [row for split in ("train", "validation", "test") for row in read_rows(tmp_path / "dataset", split)]
    tiles = {pixels(row["ground_truth_image"]).tobytes(): row for row in rows}
    for row in plan:
        box = np.s_[row["top"] : row["top"] + row["height"], row["left"] : row["left"] + row["width"]]
        if (row["height"], row["width"]) == (60, 60):
            continue
        assert (row["height"], row["width"]) == (64, 64)
        made = tiles[picture[box].tobytes()]
        assert np.array_equal(pixels(made["input_image"]), 255 - picture[box])
        canvas[box] = picture[box]
    assert np.array_equal(canvas, picture)


def test_weights_and_cap(tmp_path, pictures):
    pictures = iter(pictures)
    for name, layout in (("reds", reds_zips), ("sidd", sidd_medium)):
        (tmp_path / name).mkdir()
        layout(Tree(tmp_path / name, pictures))
    sets = ("--reds", tmp_path / "reds", "--sidd", tmp_path / "sidd")
    run(SCRIPT, *sets, "--weights", "deblur=0.5", "denoise=2.5", "--output_dir", tmp_path / "weighted")
    rows = read_rows(tmp_path / "weighted", "train")
    assert Counter(row["task"] for row in rows) == {"deblur": 3, "denoise": 10}
    repeats = Counter(row["ground_truth_image"]["bytes"] for row in rows if row["task"] == "denoise")
    assert sorted(repeats.values()) == [2, 2, 3, 3]
    assert len({row["instruction"] for row in rows if row["task"] == "denoise"}) > 4  # repeats are worded anew
    assert len(read_rows(tmp_path / "weighted", "test")) == 2  # held-out rows are not weighted

    run(SCRIPT, *sets, "--mixing_cap", 4, "--output_dir", tmp_path / "capped")
    counts = Counter(row["task"] for row in read_rows(tmp_path / "capped", "train"))
    assert counts == {"deblur": 4, "denoise": 4}


def test_partners_and_sizes_are_checked(tmp_path, pictures):
    tree = Tree(tmp_path / "lol", pictures)
    tree.pairs("our485/low/{}.png", "our485/high/{}.png", range(120))
    tree.image("our485/low/alone.png", np.zeros((32, 40, 3), np.uint8))
    tree.image("our485/high/3.png", np.zeros((32, 48, 3), np.uint8))
    damaged = tmp_path / "lol/our485/low/4.png"
    damaged.write_bytes(damaged.read_bytes()[:400])
    out = run(SCRIPT, "--lol", tmp_path / "lol", "--output_dir", tmp_path / "dataset")
    assert "118 rows" in out and "3 left out" in out
    reasons = skipped_of(tmp_path / "dataset")
    assert reasons["lol/our485/low/alone.png"] == "no partner"
    assert "differ in size: 40x32 and 48x32" in reasons["lol/our485/low/3.png"]
    assert "truncated" in reasons["lol/our485/low/4.png"] or "Error" in reasons["lol/our485/low/4.png"]
    tree.image("our485/low/lonely.png", np.zeros((32, 40, 3), np.uint8))  # now 2 of 122: more than 1%
    message = run(SCRIPT, "--lol", tmp_path / "lol", "--output_dir", tmp_path / "other", fails=2)
    assert "--lol" in message and "2 of 122 images have no partner" in message and "alone.png" in message


def test_synthesis(tmp_path):
    from instruct_pix2pix.building.photos import decode_image
    from instruct_pix2pix.data.geometry import whitebox_size

    photos = make_photos(tmp_path / "photos", 30, side=72)
    arguments = ("--photos", photos, "--synthesize", 70, "--max_short_side", 48, "--rows_per_shard", 12)
    dataset = tmp_path / "dataset"
    run(SCRIPT, *arguments, "--output_dir", dataset)
    plan = plan_of(dataset)
    assert len(plan) == 70
    counts = Counter(row["task"] for row in plan if row["split"] == "train")
    assert len(counts) == 7 and max(counts.values()) - min(counts.values()) <= 1
    by_photo: dict[str, set] = {}
    for row in plan:
        by_photo.setdefault(row["source"], set()).add(row["split"])
    assert len(by_photo) == 30 and all(len(splits) == 1 for splits in by_photo.values())
    assert {(row["width"], row["height"]) for row in plan} == {(48, 48), (53, 48)}  # scaled, not cut

    import cv2

    targets = {}
    for path in photos.iterdir():
        photo = decode_image(path.read_bytes())
        size = whitebox_size(photo.shape[1], photo.shape[0], 48)[0]
        targets[cv2.resize(photo, size, interpolation=cv2.INTER_AREA).tobytes()] = path.name
    for row in read_rows(dataset, "train"):
        degraded, target = pixels(row["input_image"]), pixels(row["ground_truth_image"])
        assert target.tobytes() in targets and degraded.shape == target.shape
        assert np.abs(degraded.astype(int) - target).mean() > 0.3


def test_a_few_tasks_and_severity(tmp_path):
    photos = make_photos(tmp_path / "photos", 12, side=64)
    errors = []
    for severity in (0.1, 0.9):
        dataset = tmp_path / str(severity)
        run(SCRIPT, "--photos", photos, "--synthesize", 24, "--tasks", "denoise", "dejpeg", "--severity", severity,
            severity, "--test_fraction", 0, "--validation_fraction", 0, "--output_dir", dataset)  # fmt: skip
        rows = read_rows(dataset, "train")
        assert Counter(row["task"] for row in rows) == {"denoise": 12, "dejpeg": 12}
        errors.append(
            np.mean([np.abs(pixels(r["input_image"]).astype(int) - pixels(r["ground_truth_image"])) for r in rows[:8]])
        )
    assert errors[1] > 2 * errors[0]


def test_instruction_lists():
    from instruct_pix2pix.building.degradations import TASKS as degradations
    from instruct_pix2pix.building.low_level import SYNTHETIC_TASKS
    from instruct_pix2pix.building.plan import read_instructions
    from instruct_pix2pix.building.restoration_sets import SETS

    assert list(degradations) == SYNTHETIC_TASKS
    everything = []
    for task in {*SYNTHETIC_TASKS, *(restoration_set.task for restoration_set in SETS.values())}:
        path = SCRIPTS / f"instructions/{task}.txt"
        training, held_out = read_instructions(path)
        assert len(training) >= 21 and not set(training) & set(held_out)
        assert len(held_out) == 3
        everything += training + held_out
    assert len(everything) == len(set(everything)) >= 200  # no sentence asks for two things


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], ["--synthesize", "no source"]),
        (["--photos", "."], ["--synthesize", "no source"]),
        (["--synthesize", "9"], ["--synthesize: 9", "--photos"]),
        (["--reds", "nowhere"], ["--reds: nowhere", "no such folder", "sharp"]),
        (["--rain13k", "empty"], ["--rain13k: empty", "no pair found", "Rain100H"]),
        (["--sidd", "empty"], ["--sidd: empty", "NOISY_SRGB_010"]),
        (["--lol", "empty"], ["--lol: empty", "our485"]),
        (["--raindrop", "empty"], ["--raindrop: empty", "test_a"]),
        (["--lol", "empty", "--num_reds", "5"], ["--num_reds", "--reds DIR"]),
        (["--lol", "empty", "--weights", "denoise"], ["--weights", "TASK=W"]),
        (["--lol", "empty", "--weights", "denoize=2"], ["denoize=2", "denoise"]),
        (["--lol", "empty", "--fraction", "1.5"], ["--fraction: 1.5"]),
        (["--lol", "empty", "--severity", "0.5", "0.2"], ["--severity"]),
        (["--lol", "empty", "--tile", "16"], ["--tile: 16"]),
    ],
)
def test_mistakes_are_one_line(tmp_path, arguments, words):
    (tmp_path / "empty").mkdir()
    message = run(SCRIPT, "--output_dir", "../dataset", *arguments, fails=2, cwd=tmp_path)
    assert all(word in message for word in words), message
