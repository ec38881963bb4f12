"""Which degraded image goes with which ground truth, and into which split, in every layout of the public sets."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from instruct_pix2pix.building.pairs import find_given_pairs, find_pairs
from instruct_pix2pix.building.plan import by_reason
from instruct_pix2pix.cli import UserError
from tests.data_scripts import checksums, pixels, plan_of, read_rows, run, skipped_of

SCRIPT = "build_low_level.py"
TRAIN, VALIDATION, TEST = "train", "validation", "test"


def touch(root: Path, *names: str) -> Path:
    """Files of these names; pairing opens none of them."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def triples(found) -> set[tuple[str, str, str]]:
    """(input, ground truth, split) of every pair, without the source's name."""
    return {(*(name.partition("/")[2] for name in (pair.input, pair.target)), pair.split) for pair in found.pairs}


# (set, layout) -> "input > ground truth" paths of each split; further files stand under "".
LAYOUTS = {
    ("gopro", "as downloaded, two kinds of blur"): {
        TRAIN: [
            "GOPRO_Large/train/GOPR0372_07_00/blur/000047.png > GOPRO_Large/train/GOPR0372_07_00/sharp/000047.png",
            "GOPRO_Large/train/GOPR0372_07_00/blur_gamma/000047.png > "
            "GOPRO_Large/train/GOPR0372_07_00/sharp/000047.png",
            # The same frame number in another clip is another frame.
            "GOPRO_Large/train/GOPR0372_07_01/blur/000047.png > GOPRO_Large/train/GOPR0372_07_01/sharp/000047.png",
        ],
        TEST: ["GOPRO_Large/test/GOPR0384_11_00/blur/000001.png > GOPRO_Large/test/GOPR0384_11_00/sharp/000001.png"],
    },
    ("gopro", "MPRNet, Restormer, InstructDiffusion"): {
        TRAIN: ["train/input/GOPR0372_07_00-000047.png > train/target/GOPR0372_07_00-000047.png"],
        TEST: ["test/input/GOPR0384_11_00-000001.png > test/target/GOPR0384_11_00-000001.png"],
    },
    ("gopro", "NAFNet"): {
        TRAIN: [
            "GoPro/train/blur_crops/GOPR0372_07_00-000047_s001.png > "
            "GoPro/train/sharp_crops/GOPR0372_07_00-000047_s001.png"
        ],
        TEST: ["GoPro/test/input/GOPR0384_11_00-000001.png > GoPro/test/target/GOPR0384_11_00-000001.png"],
    },
    ("hide", "as downloaded"): {
        TRAIN: ["HIDE_dataset/train/1.png > HIDE_dataset/GT/1.png"],
        TEST: [
            "HIDE_dataset/test/test-close-ups/2.png > HIDE_dataset/GT/2.png",
            "HIDE_dataset/test/test-long-shot/3.png > HIDE_dataset/GT/3.png",
            "HIDE_dataset/test/4.png > HIDE_dataset/GT/4.png",
        ],
    },
    ("hide", "MPRNet"): {TEST: ["HIDE/test/input/2.png > HIDE/test/target/2.png"]},
    ("hide", "Restormer"): {TEST: ["test/HIDE/input/2.png > test/HIDE/target/2.png"]},
    ("realblur", "MPRNet"): {
        TEST: [
            "RealBlur_J/test/input/scene004_blur_1.png > RealBlur_J/test/target/scene004_gt_1.png",
            "RealBlur_R/test/input/scene004_blur_1.png > RealBlur_R/test/target/scene004_gt_1.png",
        ]
    },
    ("realblur", "Restormer, one name for both"): {
        TRAIN: ["train/RealBlur_J/input/scene001-gt_12.png > train/RealBlur_J/target/scene001-gt_12.png"],
        TEST: ["test/RealBlur_J/input/scene004-gt_1.png > test/RealBlur_J/target/scene004-gt_1.png"],
    },
    ("lol", "version 1"): {
        TRAIN: ["our485/low/2.png > our485/high/2.png"],
        TEST: ["eval15/low/1.png > eval15/high/1.png"],
    },
    ("lol", "version 2"): {
        TRAIN: [
            "LOLv2/Real_captured/Train/Low/low00001.png > LOLv2/Real_captured/Train/Normal/normal00001.png",
            "LOLv2/Synthetic/Train/Low/r000da54ft.png > LOLv2/Synthetic/Train/Normal/r000da54ft.png",
        ],
        TEST: [
            "LOLv2/Real_captured/Test/Low/low00690.png > LOLv2/Real_captured/Test/Normal/normal00690.png",
            "LOLv2/Synthetic/Test/Low/r00816405t.png > LOLv2/Synthetic/Test/Normal/r00816405t.png",
        ],
    },
    ("lol", "Retinexformer"): {
        TRAIN: ["LOLv1/Train/input/100.png > LOLv1/Train/target/100.png"],
        TEST: [
            "LOLv1/Test/input/111.png > LOLv1/Test/target/111.png",
            "LOLv2/Real_captured/Test/Low/00690.png > LOLv2/Real_captured/Test/Normal/00690.png",
        ],
    },
    ("rain", "Rain100L and Rain100H as downloaded"): {
        TRAIN: [
            "Rain100L/rain_data_train_Light/rain/norain-1x2.png > Rain100L/rain_data_train_Light/norain/norain-1.png",
            "Rain100L/rain_data_train_Light/rain/norain-11x2.png > "
            "Rain100L/rain_data_train_Light/norain/norain-11.png",
        ],
        TEST: [
            "Rain100L/rain_data_test_Light/rain/X2/norain-1x2.png > Rain100L/rain_data_test_Light/norain/norain-1.png",
            "Rain100H/rain_data_test_Heavy/rain/X2/norain-1x2.png > Rain100H/rain_data_test_Heavy/norain/norain-1.png",
        ],
    },
    ("rain", "Rain100L and Rain100H as PReNet has them"): {
        TRAIN: [
            "train/RainTrainL/rain-1.png > train/RainTrainL/norain-1.png",
            "train/RainTrainL/rain-12.png > train/RainTrainL/norain-12.png",
            "train/RainTrainH/rain-1.png > train/RainTrainH/norain-1.png",
        ],
        TEST: ["test/Rain100H/rainy/rain-001.png > test/Rain100H/norain-001.png"],
    },
    ("rain", "Rain100L and Rain100H, input and target"): {
        TRAIN: ["Rain100L/train/input/1.png > Rain100L/train/target/1.png"],
        TEST: [
            "Rain100H/input/1.png > Rain100H/target/1.png",
            "Rain100L/test/input/1.png > Rain100L/test/target/1.png",
        ],
    },
    ("rain", "Rain800, both images in a file"): {
        TRAIN: ["rain/training/1.jpg [right half] > rain/training/1.jpg [left half]"],
        TEST: ["rain/test_syn/1.jpg [right half] > rain/test_syn/1.jpg [left half]"],
        "": ["rain/test_nature/1.jpg"],
    },
    ("rain", "Rain1400"): {
        TRAIN: [
            f"rainy_image_dataset/training/rainy_image/{number}_{i}.jpg > "
            f"rainy_image_dataset/training/ground_truth/{number}.jpg"
            for number in (1, 11)
            for i in range(1, 15)
        ],
        TEST: [
            f"rainy_image_dataset/testing/rainy_image/901_{i}.jpg > rainy_image_dataset/testing/ground_truth/901.jpg"
            for i in range(1, 15)
        ],
    },
    ("rain", "Outdoor-Rain"): {
        TRAIN: [
            f"train/in/im_000{number}_s{s}_a04.png > train/gt/im_000{number}.png"
            for number in (1, 2)
            for s in (80, 100)
        ],
        TEST: [
            "test_with_train_param_v5/in/im_0601_s80_a04.png > test_with_train_param_v5/gt/im_0601.png",
            "CVPR19RainTrain/test/data/im_0601_s80_a05.png > CVPR19RainTrain/test/gt/im_0601.png",
        ],
    },
    ("raindrop", "names told apart to the end"): {
        TRAIN: [
            "train/data/17_rain.png > train/gt/17_clean.png",
            "train/data/17_R_rain.png > train/gt/17_R_clean.png",
        ],
        TEST: ["test_b/data/17_rain.jpg > test_b/gt/17_clean.jpg"],
    },
    ("sidd", "small"): {
        "scene 001": [
            f"SIDD_Small_sRGB_Only/Data/{name}/NOISY_SRGB_010.PNG > SIDD_Small_sRGB_Only/Data/{name}/GT_SRGB_010.PNG"
            for name in ("0001_001_S6_00100_00060_3200_L", "0002_001_S6_00100_00020_3200_N")
        ],
        "scene 010": [
            "SIDD_Small_sRGB_Only/Data/0198_010_G4_00800_00640_3200_L/NOISY_SRGB_010.PNG > "
            "SIDD_Small_sRGB_Only/Data/0198_010_G4_00800_00640_3200_L/GT_SRGB_010.PNG"
        ],
    },
    ("sidd", "medium"): {
        "scene 001": [
            "Data/0001_001_S6_00100_00060_3200_L/0001_NOISY_SRGB_010.PNG > "
            "Data/0001_001_S6_00100_00060_3200_L/0001_GT_SRGB_010.PNG",
            "Data/0001_001_S6_00100_00060_3200_L/0001_NOISY_SRGB_011.PNG > "
            "Data/0001_001_S6_00100_00060_3200_L/0001_GT_SRGB_011.PNG",
        ]
    },
    ("sidd", "all in one folder"): {
        "scene 0001": ["0001_NOISY_SRGB_010.PNG > 0001_GT_SRGB_010.PNG"],
        "scene 0002": [
            "0002_NOISY_SRGB_010.PNG > 0002_GT_SRGB_010.PNG",
            "0002_NOISY_SRGB_011.PNG > 0002_GT_SRGB_011.PNG",
        ],
    },
    ("sidd", "a folder a side"): {
        "scene 0001": ["NOISY/0001_NOISY_SRGB_010.PNG > GT/0001_GT_SRGB_010.PNG"],
        "scene 0002": ["NOISY/0002_NOISY_SRGB_010.PNG > GT/0002_GT_SRGB_010.PNG"],
    },
    ("sidd", "NAFNet and BasicSR"): {
        TRAIN: ["SIDD/train/input_crops/0001_SRGB_010_s001.PNG > SIDD/train/gt_crops/0001_SRGB_010_s001.PNG"],
        VALIDATION: ["SIDD/val/input_crops/0001_SRGB_010_s001.PNG > SIDD/val/gt_crops/0001_SRGB_010_s001.PNG"],
    },
    ("sidd", "Restormer, the ground truth named after the noisy picture"): {
        TRAIN: [
            "train/SIDD/input_crops/0001_NOISY_SRGB_010-1.png > train/SIDD/target_crops/0001_NOISY_SRGB_010-1.png",
            "train/SIDD/input_crops/0002_NOISY_SRGB_010-1.png > train/SIDD/target_crops/0002_NOISY_SRGB_010-1.png",
        ],
        VALIDATION: ["val/SIDD/input_crops/a-1.png > val/SIDD/target_crops/a-1.png"],
    },
    ("sidd", "Restormer's download"): {
        TRAIN: [
            "Downloads/SIDD/train/0001_001_S6_00100_00060_3200_L/0001_NOISY_SRGB_010.PNG > "
            "Downloads/SIDD/train/0001_001_S6_00100_00060_3200_L/0001_GT_SRGB_010.PNG"
        ]
    },
    ("sidd", "MIRNet"): {
        "scene 1": [
            "SIDD_patches/input/1_1.png > SIDD_patches/groundtruth/1_1.png",
            "SIDD_patches/input/1_2.png > SIDD_patches/groundtruth/1_2.png",
        ],
        "scene 12": ["SIDD_patches/input/12_1.png > SIDD_patches/groundtruth/12_1.png"],
    },
    ("sidd", "MIRNet and MPRNet, train and val"): {
        TRAIN: ["train/input/1_1.png > train/groundtruth/1_1.png", "train/input/1_2.png > train/groundtruth/1_2.png"],
        VALIDATION: ["val/input/1_1.png > val/groundtruth/1_1.png"],
    },
    ("sidd", "InstructDiffusion"): {
        TRAIN: ["SIDD/train/input/0001_1.png > SIDD/train/gt/0001_1.png"],
        VALIDATION: ["SIDD/val/input/0001_1.png > SIDD/val/gt/0001_1.png"],
    },
}  # fmt: skip


@pytest.mark.parametrize("name, layout", LAYOUTS)
def test_every_layout(tmp_path, name, layout):
    parts = dict(LAYOUTS[name, layout])
    strange = parts.pop("", [])
    wanted = {(*pair.split(" > "), part) for part, pairs in parts.items() for pair in pairs}
    files = {file.partition(" [")[0] for *pair, _ in wanted for file in pair}
    found = find_pairs(name, touch(tmp_path / "set", *files, *strange))
    told = {(*pair[:2], pair[2] or source.group.removeprefix(f"{name}/")) for pair, source in together(found)}
    assert told == wanted and len(found.pairs) == len(wanted)
    assert [row["source"] for row in found.skipped] == [f"{name}/{file}" for file in strange]
    assert f"{len(wanted)} pairs" in found.report and "inputs without a partner: 0" in found.report


def together(found):
    return [(*triples(found._replace(pairs=[pair])), pair) for pair in found.pairs]


REALBLUR = "RealBlur-J_ECC_IMCORR_centroid_itensity_ref/scene{:03d}"


def realblur(root: Path) -> Path:
    for scene in (1, 4):
        for i in (1, 12):
            touch(root, *(f"{REALBLUR.format(scene)}/{side}/{side}_{i}.png" for side in ("blur", "gt")))
    for scene, part in ((1, "train"), (4, "test")):
        folder = REALBLUR.format(scene)
        lines = [f"{folder}/gt/gt_{i}.png {folder}/blur/blur_{i}.png\n" for i in (1, 12)]
        (root / f"RealBlur_J_{part}_list.txt").write_text("".join(lines))
    return root


@pytest.mark.parametrize("inside", ["", "RealBlur-J_ECC_IMCORR_centroid_itensity_ref"])
def test_lists_split_realblur(tmp_path, inside):
    found = find_pairs("realblur", realblur(tmp_path / "RealBlur") / inside)
    wanted = {
        (f"{REALBLUR.format(scene)}/blur/blur_{i}.png", f"{REALBLUR.format(scene)}/gt/gt_{i}.png", split)
        for scene, split in ((1, TRAIN), (4, TEST))
        for i in (1, 12)
    }
    assert triples(found) == {tuple(part.removeprefix(f"{inside}/") for part in triple) for triple in wanted}


def test_realblur_without_its_lists_is_refused(tmp_path):
    root = realblur(tmp_path / "RealBlur")
    (root / "RealBlur_J_test_list.txt").unlink()
    with pytest.raises(UserError, match="scene004/blur/blur_1.png tells whether it is for training or for testing"):
        find_pairs("realblur", root)


@pytest.mark.parametrize(
    "name, root, inside",
    [
        ("gopro", "GoPro/test", "GOPR0384_11_00/{blur,sharp}/000001.png"),
        ("gopro", "GoPro/test/GOPR0384_11_00", "{blur,sharp}/000001.png"),
        ("lol", "LOL/eval15", "{low,high}/1.png"),
        ("rain13k", "Datasets/test/Test100", "{input,target}/1.png"),
        ("rain", "rain_data_test_Light", "{rain,norain}/norain-1.png"),
        ("hide", "Datasets/test/HIDE", "{input,target}/1.png"),
        ("raindrop", "test_a", "{data,gt}/1.png"),
        ("sidd", "Datasets/test/SIDD", "{input_crops,target_crops}/1.png"),
    ],
)
def test_the_test_part_alone_stays_test(tmp_path, name, root, inside):
    """The folder that is given may itself be the one that tells the split."""
    head, sides, tail = inside.replace("{", "}").split("}")
    touch(tmp_path / root, *(f"{head}{side}{tail}" for side in sides.split(",")))
    assert [pair.split for pair in find_pairs(name, tmp_path / root).pairs] == [TEST]


def test_sidd_in_a_folder_called_test(tmp_path):
    instance = "Data/0001_001_S6_00100_00060_3200_L"
    root = touch(tmp_path / "test/SIDD", *(f"{instance}/{side}_SRGB_010.PNG" for side in ("NOISY", "GT")))
    assert [(pair.split, pair.group) for pair in find_pairs("sidd", root).pairs] == [("", "sidd/scene 001")]


@pytest.mark.parametrize("name", ["gopro", "lol", "rain13k", "rain", "hide", "realblur"])
def test_no_split_told(tmp_path, name):
    root = touch(tmp_path / "somewhere/set", "input/1.png", "target/1.png")
    with pytest.raises(UserError, match="no folder on the way to input/1.png tells whether"):
        find_pairs(name, root)


GOPRO = [f"train/GOPR0372_07_00/{side}/00000{i}.png" for side in ("blur", "blur_gamma", "sharp") for i in range(3)]


def test_gopro_given_as_reds(tmp_path):
    root = touch(tmp_path / "set", *GOPRO, *(name.replace("07_00", "07_01") for name in GOPRO))
    with pytest.raises(UserError, match=r"--reds: .*: no pair found; it looks like what --gopro reads; looked for"):
        find_pairs("reds", root)
    assert len(find_pairs("gopro", root).pairs) == 12


def test_reds_given_as_gopro(tmp_path):
    root = touch(tmp_path / "set", "train/blur/000/00000000.png", "train/sharp/000/00000000.png")
    with pytest.raises(UserError, match=r"it looks like what --reds reads"):
        find_pairs("gopro", root)


def test_gopro_beside_reds_is_told(tmp_path):
    reds = [f"REDS/train/train_{side}/000/0000000{i}.png" for side in ("blur", "sharp") for i in range(2)]
    found = find_pairs("reds", touch(tmp_path / "set", *reds, *GOPRO))
    assert triples(found) == {(reds[i], reds[i + 2], TRAIN) for i in range(2)}
    assert "9 of no known layout" in found.report and len(found.skipped) == 9


def test_a_frame_in_two_formats(tmp_path):
    """Of REDS the lossless frame counts; the other is told, and counts where it is alone."""
    root = touch(
        tmp_path,
        "train/train_sharp/000/00000000.png",
        "train/train_sharp/000/00000001.png",
        "train/train_blur/000/00000000.png",
        "train/train_blur_jpeg/000/00000000.jpg",
        "train/train_blur_jpeg/000/00000001.jpg",
    )
    found = find_pairs("reds", root)
    assert {pair[0] for pair in triples(found)} == {
        "train/train_blur/000/00000000.png",
        "train/train_blur_jpeg/000/00000001.jpg",
    }
    reason = "the same frame as reds/train/train_blur/000/00000000.png"
    assert found.skipped == [{"source": "reds/train/train_blur_jpeg/000/00000000.jpg", "reason": reason}]


@pytest.mark.parametrize(
    "name, files, words",
    [
        ("lol", "our485/low/1.png our485/high/1.png our485/high/1.jpg", ("high/1.jpg", "high/1.png", "low/1.png")),
        ("lol", "our485/low/1.png our485/low/1.jpg our485/high/1.png", ("low/1.jpg", "low/1.png")),
        ("rain", "test/in/1_s80_a04.png test/gt/1.png test/gt/1.jpg", ("gt/1.jpg", "gt/1.png", "1_s80_a04")),
        ("reds", "a/train/blur/0/1.png a/train/sharp/0/1.png b/train/sharp/0/1.png", ("a/train", "b/train")),
        ("sidd", "0001_NOISY_SRGB_010.PNG 0001_NOISY_SRGB_010.jpg 0001_GT_SRGB_010.PNG", (".jpg", ".PNG")),
    ],
)
def test_what_could_be_paired_in_two_ways_is_refused(tmp_path, name, files, words):
    with pytest.raises(UserError, match="could both belong to") as error:
        find_pairs(name, touch(tmp_path, *files.split()))
    assert all(word in str(error.value) for word in words)


def test_sidd_never_borrows_a_ground_truth(tmp_path):
    files = [f"{i:04d}_{side}_SRGB_010.PNG" for side in ("NOISY", "GT") for i in range(1, 7)]
    files.remove("0001_GT_SRGB_010.PNG")
    found = find_pairs("sidd", touch(tmp_path, *files))
    assert {pair[:2] for pair in triples(found)} == {
        (f"{i:04d}_NOISY_SRGB_010.PNG", f"{i:04d}_GT_SRGB_010.PNG") for i in range(2, 7)
    }
    assert found.skipped == [{"source": "sidd/0001_NOISY_SRGB_010.PNG", "reason": "no partner"}]
    assert "5 pairs" in found.report and "inputs without a partner: 1; targets without a partner: 0" in found.report


def given(root: Path, degraded: list[str], clean: list[str], folders=("hazy", "clear")):
    touch(root / folders[0], *degraded)
    touch(root / folders[1], *clean)
    return find_given_pairs(0, "dehaze", root / folders[0], root / folders[1])


def test_given_folders_by_name(tmp_path):
    found = given(
        tmp_path, ["train/1.jpg", "val/2.jpg", "Testing/3.png", "b.png"], ["train/1.png", "val/2.jpg", "b.png"]
    )
    assert triples(found) == {
        ("train/1.jpg", "train/1.png", TRAIN),
        ("val/2.jpg", "val/2.jpg", VALIDATION),
        ("b.png", "b.png", ""),
    }
    assert found.skipped == [{"source": "pairs0-degraded/Testing/3.png", "reason": "no partner"}]
    assert found.report.startswith("--pairs: dehaze: 3 pairs (1 train, 1 validation, 1 still to be split)")
    assert found.roots == {"pairs0-degraded": tmp_path / "hazy", "pairs0-clean": tmp_path / "clear"}


def test_given_folders_inside_a_split(tmp_path):
    found = given(tmp_path, ["1.png"], ["1.png"], folders=("train/hazy", "train/clear"))
    assert triples(found) == {("1.png", "1.png", TRAIN)}
    found = given(tmp_path, ["1.png"], ["1.png"], folders=("train/hazy", "test/clear"))  # never into train
    assert triples(found) == {("1.png", "1.png", TEST)}


def test_several_given_inputs_of_one_target(tmp_path):
    found = given(
        tmp_path, ["1_a.png", "1_b.jpg", "2-0.9.png", "3_1_x.png", "9_a.png"], ["1.png", "2.png", "3.png", "3_1.png"]
    )
    # 3_1_x may be of 3 or of 3_1, and there is no 9.
    assert triples(found) == {("1_a.png", "1.png", ""), ("1_b.jpg", "1.png", ""), ("2-0.9.png", "2.png", "")}
    assert {row["source"] for row in found.skipped} == {
        "pairs0-degraded/3_1_x.png", "pairs0-degraded/9_a.png", "pairs0-clean/3.png", "pairs0-clean/3_1.png",
    }  # fmt: skip
    # The inputs of one ground truth stay in one split.
    assert len({pair.group for pair in found.pairs if "/1_" in pair.input}) == 1


def test_given_folders_one_inside_the_other(tmp_path):
    touch(tmp_path / "hazy", "1.png", "clear/1.png")
    found = find_given_pairs(0, "dehaze", tmp_path / "hazy", tmp_path / "hazy/clear")
    assert triples(found) == {("1.png", "1.png", "")} and not found.skipped
    with pytest.raises(UserError, match="hazy is given twice"):
        find_given_pairs(0, "dehaze", tmp_path / "hazy", tmp_path / "hazy")


def test_whole_names_rule_out_suffixes(tmp_path):
    """Where names are the same on both sides, 1_2 is a picture of its own and not another of 1."""
    found = given(tmp_path, ["1.png", "1_2.png"], ["1.png"])
    assert triples(found) == {("1.png", "1.png", "")}


@pytest.mark.parametrize(
    "degraded, clean, words",
    [
        (["a.png"], ["b.png"], "no name is in both folders .a.png, b.png."),
        (["a.png"], ["notes.txt"], "clear: no image at any depth"),
        (["a.webp"], ["a.jpg", "a.png"], "a.jpg and a.png could both belong to a.webp"),
    ],
)
def test_given_folders_that_cannot_be_paired(tmp_path, degraded, clean, words):
    with pytest.raises(UserError, match=words):
        given(tmp_path, degraded, clean)


def test_reasons_are_counted_without_what_is_said_of_one_image():
    reasons = [
        "no partner",
        "the same picture as lol/our485/low/2.png",
        "the same picture as lol/our485/low/3.png",
        "20000x6000 is more than 100 million pixels; allow it with --max_image_pixels 120000000",
        "20000x7000 is more than 100 million pixels; allow it with --max_image_pixels 140000000",
        "input and ground truth differ in size: 40x32 and 48x32",
        "cannot be read (image file is truncated)",
        "8x64 is too small: sides must be 16 or more",
    ]
    assert by_reason([{"reason": reason} for reason in reasons]) == (
        "2 the same picture, 2 more than 100 million pixels, 1 no partner, 1 input and ground truth differ in size, "
        "1 cannot be read, 1 too small"
    )


def picture(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 255, (32, 40, 3)).astype(np.uint8)


def save(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def test_rows_of_new_sources(tmp_path):
    """Two inputs of one frame, both images in one file, and folders of one's own with a task of one's own."""
    for clip, part in enumerate(("train/GOPR0372_07_00", "test/GOPR0384_11_00")):
        save(tmp_path / f"gopro/{part}/sharp/000001.png", picture(clip))
        save(tmp_path / f"gopro/{part}/blur/000001.png", 255 - picture(clip))
        save(tmp_path / f"gopro/{part}/blur_gamma/000001.png", picture(clip) // 2)
    for number, part in ((10, "training"), (11, "test_syn")):
        both = np.concatenate([picture(number), 255 - picture(number)], axis=1)  # the ground truth is on the left
        save(tmp_path / f"rain/{part}/1.png", both)
    save(tmp_path / "rain/training/odd.png", picture(12)[:, :39])
    for number in range(20, 23):
        save(tmp_path / f"hazy/{number}.png", 255 - picture(number))
        save(tmp_path / f"clear/{number}.png", picture(number))
    save(tmp_path / "hazy/alone.png", picture(30))
    instructions = tmp_path / "instructions"
    instructions.mkdir()
    for task in ("deblur", "derain", "dehaze"):
        (instructions / f"{task}.txt").write_text(f"{task} it\n")
    arguments = (
        "--gopro", tmp_path / "gopro", "--rain", tmp_path / "rain", "--instructions", instructions,
        "--pairs", f"dehaze={tmp_path}/hazy:{tmp_path}/clear", "--validation_fraction", 0, "--test_fraction", 0,
        "--weights", "dehaze=2", "--output_dir", tmp_path / "dataset",
    )  # fmt: skip
    counted = run(SCRIPT, *arguments, "--dry_run")
    assert not (tmp_path / "dataset").exists()
    reports = (
        "--gopro: 4 pairs (2 train, 2 test); inputs without a partner: 0; targets without a partner: 0",
        "--rain: 3 pairs (2 train, 1 test); inputs without a partner: 0; targets without a partner: 0",
        "--pairs: dehaze: 3 pairs (3 still to be split); inputs without a partner: 1; targets without a partner: 0",
    )
    assert counted.splitlines() == list(reports)

    out = run(SCRIPT, *arguments)
    assert out.startswith(counted) and "2 left out (1 cannot hold two images side by side, 1 no partner)" in out
    rows = {split: read_rows(tmp_path / "dataset", split) for split in (TRAIN, TEST)}
    made = {
        (
            split,
            row["task"],
            row["instruction"],
            pixels(row["input_image"]).tobytes(),
            pixels(row["ground_truth_image"]).tobytes(),
        )
        for split, part in rows.items()
        for row in part
    }
    wanted = set()
    for clip, split in enumerate((TRAIN, TEST)):
        for degraded in (255 - picture(clip), picture(clip) // 2):
            wanted.add((split, "deblur", "deblur it", degraded.tobytes(), picture(clip).tobytes()))
    for number, split, task in (
        (10, TRAIN, "derain"),
        (11, TEST, "derain"),
        *((n, TRAIN, "dehaze") for n in (20, 21, 22)),
    ):
        wanted.add((split, task, f"{task} it", (255 - picture(number)).tobytes(), picture(number).tobytes()))
    assert made == wanted
    assert sum(row["task"] == "dehaze" for row in rows[TRAIN]) == 6  # --weights knows the task
    assert skipped_of(tmp_path / "dataset")["pairs0-degraded/alone.png"] == "no partner"
    assert all(row["split"] == TEST for row in plan_of(tmp_path / "dataset") if "/test" in row["input"])
    card = (tmp_path / "dataset/README.md").read_text()
    assert all(report.replace(": ", "`: ", 1) in card for report in reports)
    assert "Left out: 2 (`skipped.jsonl` says which and why): 1 cannot hold" in card
    assert str(tmp_path) not in card  # no path of this machine

    before = checksums(tmp_path / "dataset")
    next((tmp_path / "dataset/data").iterdir()).unlink()
    run(SCRIPT, *arguments)
    assert checksums(tmp_path / "dataset") == before


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--pairs", "dehaze=hazy:clear"], ["--pairs: dehaze", "write", "dehaze.txt"]),
        (["--pairs", "derain=hazy"], ["--pairs: derain=hazy", "not TASK=DEGRADED_DIR:CLEAN_DIR"]),
        (["--pairs", "hazy:clear"], ["--pairs: hazy:clear", "not TASK=DEGRADED_DIR:CLEAN_DIR"]),
        (["--pairs", "derain=hazy:nowhere"], ["--pairs: derain=hazy:nowhere: nowhere: no such folder"]),
        (["--pairs", "derain=hazy:clear", "--weights", "dehaze=2"], ["--weights: dehaze=2", "no such task", "derain"]),
        (["--pairs", "derain=hazy:clear", "--output_dir", "hazy/out"], ["hazy/out lies inside --pairs"]),
        (["--num_gopro", "5", "--pairs", "derain=hazy:clear"], ["--num_gopro", "--gopro DIR"]),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, arguments, words):
    from data_preparation.build_low_level import main

    touch(tmp_path, "hazy/1.png", "clear/1.png")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        main(["--output_dir", "dataset", *arguments])
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)
