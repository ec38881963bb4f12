"""Triples from every kind of source, and one line for every kind of mistake."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import datasets
import pytest
import torch
from PIL import Image

from instruct_pix2pix.cli import RowError, UserError
from instruct_pix2pix.data.sources import COLUMN_NAMES, Source, find_columns, source_of
from instruct_pix2pix.data.triples import TripleDataset, Triples, collate, load_triples, open_pair


def options(**changes) -> SimpleNamespace:
    values = {
        "dataset_name": None,
        "timestep_bias_multiplier": 1.0,
        "embedding_noise": 0.0,
        "dataset_config_name": None,
        "train_data_dir": None,
        "original_dir": None,
        "edited_dir": None,
        "instruction": None,
        "split": None,
        "on_bad_row": "error",
        "check_rows": "sample",
        "original_image_column": None,
        "edit_prompt_column": None,
        "edited_image_column": None,
        "max_train_samples": None,
        "cache_dir": None,
        "hub_token": None,
        "seed": 1,
        "resolution": 64,
        "image_geometry": "resize_crop",
        "center_crop": False,
        "random_flip": True,
    }
    return SimpleNamespace(**{**values, **changes})


def triples_of(args) -> Triples:
    """What training reads with these flags."""
    where = {"cache_dir": args.cache_dir, "token": args.hub_token}
    source = source_of(args, "--dataset_name", "--train_data_dir", **where)
    return load_triples(source, args.seed, args.max_train_samples, geometry=args.image_geometry)


def samples_of(args, count: int = 4) -> list[dict]:
    dataset = TripleDataset(triples_of(args), args, latent_shape=(4, 16, 16), num_timesteps=1000)
    return [dataset[position] for position in range(count)]


@pytest.fixture
def cartoon_rows(photos) -> datasets.Dataset:
    """Rows in the published cartoonization layout, every cartoon here a posterized photograph."""
    return datasets.Dataset.from_dict(
        {
            "original_image": photos,
            "edit_prompt": [f"cartoonize photo {i}" for i in range(len(photos))],
            "cartoonized_image": [photo.quantize(8).convert("RGB") for photo in photos],
        },
        features=datasets.Features(
            {
                "original_image": datasets.Image(),
                "edit_prompt": datasets.Value("string"),
                "cartoonized_image": datasets.Image(),
            }
        ),
    )


def write_metadata(folder, photos, name="metadata.jsonl", suffix=""):
    folder.mkdir(parents=True)
    lines = []
    for index, photo in enumerate(photos):
        photo.save(folder / f"{index}-a.png")
        photo.convert("L").save(folder / f"{index}-b.png")
        lines.append(
            {
                f"input_image{suffix}": f"{index}-a.png",
                f"edited_image{suffix}": f"{index}-b.png",
                "edit_prompt": f"make it gray, {index}",
            }
        )
    if name.endswith(".csv"):
        rows = [",".join(lines[0])] + [",".join(f'"{value}"' for value in line.values()) for line in lines]
        (folder / name).write_text("\n".join(rows) + "\n")
    else:
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.parametrize(
    "source",
    ["parquet", "save_to_disk", "split_dict", "metadata.jsonl", "metadata.csv", "_file_name", "train/", "jsonl file"],
)
def test_every_local_source_gives_the_same_kind_of_sample(source, photos, cartoon_rows, tmp_path):
    folder = tmp_path / "data"
    if source == "parquet":
        (folder / "data").mkdir(parents=True)
        cartoon_rows.to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    elif source == "save_to_disk":
        cartoon_rows.save_to_disk(folder)
    elif source == "split_dict":
        datasets.DatasetDict({"train": cartoon_rows, "test": cartoon_rows.select([0])}).save_to_disk(folder)
    elif source == "_file_name":
        write_metadata(folder, photos, suffix="_file_name")
    elif source == "train/":
        write_metadata(folder / "train", photos)
    elif source == "jsonl file":
        folder = write_metadata(folder, photos, name="pairs.jsonl") / "pairs.jsonl"
    else:
        write_metadata(folder, photos, name=source)
    for sample in samples_of(options(dataset_name=str(folder))):
        assert sample["original"].shape == sample["edited"].shape == (3, 64, 64)
        assert sample["original"].dtype == torch.uint8 and sample["instruction"]
        assert sample["noise"].shape == (4, 16, 16) and 0 <= sample["timestep"] < 1000 and 0 <= sample["dropout"] < 1


@pytest.mark.parametrize("columns", [("before", "after"), ("file_name", "edited_file_name")])
def test_metadata_with_column_names_of_its_own(columns, photos, tmp_path):
    """Named by flags, or the image folder's own file_name; either way paths are relative to the file."""
    rows = []
    for index, photo in enumerate(photos[:4]):
        photo.save(tmp_path / f"{index}.png")
        rows.append({columns[0]: f"{index}.png", columns[1]: f"{index}.png", "words": "leave it"})
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    named = {"original_image_column": "before"} if columns[0] == "before" else {}
    edited = columns[1].removesuffix("_file_name")
    args = options(dataset_name=str(tmp_path), edit_prompt_column="words", edited_image_column=edited, **named)
    for sample in samples_of(args):
        assert torch.equal(sample["original"], sample["edited"])


def test_paired_folders_draw_a_wording_per_pair_and_epoch(pairs):
    args = options(train_data_dir=str(pairs))
    dataset = TripleDataset(triples_of(args), args, (4, 16, 16), 1000)
    first = [dataset[i]["instruction"] for i in range(10)]
    later = [dataset[i]["instruction"] for i in range(10, 60)]
    assert {"blur it", "make it blurry"} == set(first) == set(later)
    assert first == [dataset[i]["instruction"] for i in range(10)]


def test_paired_folders_with_a_metadata_file_give_each_pair_its_own_instruction(pairs, tmp_path):
    folder = tmp_path / "pairs"
    shutil.copytree(pairs, folder)
    (folder / "instructions.txt").unlink()
    rows = [{"file_name": f"{i}.png", "instruction": f"blur number {i}"} for i in range(10)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = options(train_data_dir=str(folder))
    assert {s["instruction"] for s in samples_of(args, 10)} == {row["instruction"] for row in rows}


def test_a_sample_does_not_depend_on_what_was_read_before(pairs):
    args = options(train_data_dir=str(pairs))
    forwards = samples_of(args, 12)
    dataset = TripleDataset(triples_of(args), args, (4, 16, 16), 1000)
    for position in reversed(range(12)):
        for key, value in dataset[position].items():
            same = (
                torch.equal(value, forwards[position][key])
                if torch.is_tensor(value)
                else (value == forwards[position][key])
            )
            assert same, (position, key)


def test_flips_are_drawn_per_pair_and_shared_by_both_images(tmp_path, photos):
    folder = write_metadata(tmp_path / "data", [photos[0]] * 16)
    args = options(dataset_name=str(folder), center_crop=True)
    samples = samples_of(args, 16)
    mirrored = [torch.equal(s["original"], samples[0]["original"].flip(-1)) for s in samples]
    assert 2 < sum(mirrored) < 14
    gray = [s["original"].float().mean(0) for s in samples]
    for original, sample in zip(gray, samples, strict=True):
        there, mirror = sample["edited"][0].float(), sample["edited"][0].float().flip(-1)
        assert (original - there).abs().mean() < (original - mirror).abs().mean()


def test_the_published_pairing_of_uncut_photo_and_cut_cartoon_is_aligned(tmp_path, photos):
    """The published cartoons are cut to multiples of 8, their originals are not: the original is cut likewise."""
    photo = photos[0].resize((93, 77))
    cartoon = photo.crop((0, 0, 88, 72))
    rows = datasets.Dataset.from_dict(
        {"original_image": [photo], "edit_prompt": ["cartoonize"], "cartoonized_image": [cartoon]},
        features=datasets.Features(
            {
                "original_image": datasets.Image(),
                "edit_prompt": datasets.Value("string"),
                "cartoonized_image": datasets.Image(),
            }
        ),
    )
    rows.save_to_disk(tmp_path / "data")
    for geometry in ("resize_crop", "crop", "squash"):
        args = options(dataset_name=str(tmp_path / "data"), image_geometry=geometry)
        sample = samples_of(args, 1)[0]
        assert torch.equal(sample["original"], sample["edited"])


def test_max_train_samples_takes_a_seeded_subset(pairs):
    chosen = {
        tuple(triples_of(options(train_data_dir=str(pairs), max_train_samples=4, seed=s)).indices) for s in range(5)
    }
    assert all(len(c) == 4 for c in chosen) and len(chosen) > 1
    assert load_triples(Source(str(pairs), "--dataset"), max_rows=4).indices.tolist() == [0, 1, 2, 3]


SOURCE = Source("x", "--dataset_name")


@pytest.mark.parametrize(
    "columns",
    [
        ("original_image", "edit_prompt", "cartoonized_image"),
        ("input_image", "instruction", "ground_truth_image"),
        ("input_image", "edit_prompt", "edited_image"),
        ("source_img", "instruction", "target_img"),
        ("image", "text", "output"),
    ],
)
def test_columns_are_found_by_name(columns):
    found = find_columns(["id", "task", *columns, "original_prompt"], SOURCE)
    assert tuple(found.values()) == columns


def test_unknown_and_ambiguous_columns_list_what_there_is():
    with pytest.raises(UserError, match="--edited_image_column.*no column.*photo, words"):
        find_columns(["input_image", "edit_prompt", "photo", "words"], SOURCE)
    with pytest.raises(UserError, match=r"--original_image_column.*several.*input_image, original_image"):
        find_columns(["input_image", "original_image", "edit_prompt", "edited_image"], SOURCE)
    with pytest.raises(UserError, match="--edit_prompt_column: caption is not a column; there are a, b"):
        find_columns(["a", "b"], replace(SOURCE, original_image_column="a", edit_prompt_column="caption"))
    assert set(COLUMN_NAMES) == {"original_image", "edit_prompt", "edited_image"}


def test_one_column_may_be_both_source_and_target(cartoon_rows, tmp_path):
    """What a control run trains on: nothing to learn but copying."""
    cartoon_rows.to_parquet(tmp_path / "data" / "train.parquet")
    names = dict(original_image_column="original_image", edited_image_column="original_image")
    sample = samples_of(options(dataset_name=str(tmp_path / "data"), **names), count=1)[0]
    assert torch.equal(sample["original"], sample["edited"])


CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*.parquet
---
"""


@pytest.mark.parametrize("layout", ["built", "split_dict", "saved split", "original/edited", "metadata.csv"])
def test_any_split_is_read_and_a_missing_one_named(layout, photos, pairs, cartoon_rows, tmp_path):
    """Three rows in the split test, the first of them the second photo."""
    folder, expected = tmp_path / "data", cartoon_rows.select(range(1, 4))
    if layout == "built":
        cartoon_rows.to_parquet(folder / "data" / "train-00000-of-00001.parquet")
        expected.to_parquet(folder / "data" / "test-00000-of-00001.parquet")
        (folder / "README.md").write_text(CARD[:-4] + "  - split: test\n    path: data/test-*.parquet\n---\n")
    elif layout == "split_dict":
        datasets.DatasetDict({"train": cartoon_rows, "test": expected}).save_to_disk(folder)
    elif layout == "saved split":
        expected.to_parquet(tmp_path / "files" / "test.parquet")
        datasets.load_dataset(str(tmp_path / "files"), split="test").save_to_disk(folder)
    elif layout == "original/edited":
        shutil.copytree(pairs, folder)  # its own pairs are train
        shutil.copytree(pairs, folder / "test")
        for side in ("original", "edited"):
            for number in (0, *range(4, 10)):
                (folder / "test" / side / f"{number}.png").unlink()
    else:
        write_metadata(folder / "train", photos, layout)
        write_metadata(folder / "test", photos[1:4], layout)
    source = Source(str(folder), "FOLDER", split="test")
    triples = load_triples(source)
    assert len(triples) == 3 and open_pair(triples, 0)[1].tobytes() == photos[1].tobytes()
    assert len(load_triples(replace(source, split="train"))) == (3 if layout == "saved split" else 10)
    with pytest.raises(UserError, match="FOLDER: .*data has no split named held_out, only .*train"):
        load_triples(replace(source, split="held_out"))


def test_a_folder_of_pairs_without_splits_is_the_split_train(pairs):
    with pytest.raises(UserError, match="has no split named test, only train"):
        load_triples(Source(str(pairs), "--dataset", split="test"))


def test_tasks_are_those_of_the_rows_in_use(cartoon_rows, tmp_path):
    rows = cartoon_rows.add_column("task", [f"task {number}" for number in range(9)] + [None])
    rows.save_to_disk(tmp_path / "tasks")
    cartoon_rows.save_to_disk(tmp_path / "none")
    assert load_triples(Source(str(tmp_path / "none"), "--dataset"), max_rows=2).tasks() == ["all", "all"]
    triples = load_triples(Source(str(tmp_path / "tasks"), "--dataset"), seed=1, max_rows=4)
    assert triples.tasks() == [f"task {i}" if i < 9 else "all" for i in triples.indices]
    assert load_triples(Source(str(tmp_path / "tasks"), "--dataset")).tasks()[-1] == "all"


def test_folders_of_one_name_and_card_are_not_mistaken_for_each_other(cartoon_rows, tmp_path):
    def build(place: str, number: int) -> str:
        folder = tmp_path / place / "dataset"
        cartoon_rows.select(range(number)).to_parquet(folder / "data" / "train-00000-of-00001.parquet")
        (folder / "README.md").write_text(CARD)
        return str(folder)

    def length(folder: str) -> int:
        return len(triples_of(options(dataset_name=folder, cache_dir=str(tmp_path / "cache"))).rows)

    first, second = build("first", 2), build("second", 3)
    assert [length(first), length(second), length(first)] == [2, 3, 2]
    build("first", 4)
    assert length(first) == 4, "rows of the folder as it was before"


def error_of(**changes) -> str:
    with pytest.raises(UserError) as caught:
        triples_of(options(**changes))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_sources_that_cannot_be_used(tmp_path, photos, pairs, cartoon_rows):
    assert "is not a folder" in error_of(dataset_name=str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    assert "--dataset_name" in error_of(dataset_name=str(tmp_path / "empty"))
    assert "cannot be loaded" in error_of(dataset_name="nobody/nothing-of-the-kind")

    others = datasets.DatasetDict({"FreeForm_0": cartoon_rows, "FreeForm_1": cartoon_rows})
    others.save_to_disk(tmp_path / "no-train")
    message = error_of(dataset_name=str(tmp_path / "no-train"))
    assert "no split named train, only FreeForm_0, FreeForm_1; choose one with --split" in message
    (tmp_path / "no-rows").mkdir()
    cartoon_rows.select([]).to_parquet(tmp_path / "no-rows" / "train.parquet")
    assert "is empty" in error_of(dataset_name=str(tmp_path / "no-rows"))

    lonely = tmp_path / "lonely"
    shutil.copytree(pairs, lonely)
    (lonely / "edited" / "3.png").unlink()
    assert "original/3" in error_of(train_data_dir=str(lonely))
    shutil.rmtree(lonely / "edited")
    assert "no folder edited/" in error_of(train_data_dir=str(lonely))

    silent = tmp_path / "silent"
    shutil.copytree(pairs, silent)
    (silent / "instructions.txt").write_text("\n \n")
    assert "instructions.txt is empty" in error_of(train_data_dir=str(silent))
    (silent / "instructions.txt").unlink()
    assert "no instructions" in error_of(train_data_dir=str(silent))

    (silent / "instructions.txt").write_bytes("entschärfen\n".encode("latin-1"))
    assert "instructions.txt cannot be read" in error_of(train_data_dir=str(silent))
    (silent / "metadata.jsonl").write_text('{"file_name": null, "edit_prompt": "blur it"}\n')
    assert "metadata.jsonl needs file_name and edit_prompt in every row" in error_of(train_data_dir=str(silent))

    commas = tmp_path / "commas.csv"
    commas.write_text("original_image,edit_prompt,edited_image\na.png,blur it, please,b.png\n")
    assert "row 1 of commas.csv has more values than there are columns" in error_of(dataset_name=str(commas))
    both = tmp_path / "both.jsonl"
    both.write_text('{"file_name": "a.png", "image": "b.png"}\n')
    assert "both.jsonl has both file_name and image" in error_of(dataset_name=str(both))

    broken = write_metadata(tmp_path / "broken", photos[:2])
    (broken / "metadata.jsonl").write_text("{not json\n")
    assert "metadata.jsonl cannot be read" in error_of(dataset_name=str(broken))
    (broken / "metadata.jsonl").write_text("")
    assert "is empty" in error_of(dataset_name=str(broken))


def test_rows_that_cannot_be_used_are_named(tmp_path, photos):
    folder = write_metadata(tmp_path / "data", photos)
    lines = (folder / "metadata.jsonl").read_text().splitlines()

    def with_row(number: int, **changes) -> str:
        changed = [json.loads(line) for line in lines]
        changed[number].update(changes)
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed))
        return error_of(dataset_name=str(folder))

    assert "row 2, column edit_prompt: None" in with_row(2, edit_prompt=None)
    (folder / "broken.png").write_bytes(b"not an image")
    assert "row 4, column input_image: not a readable image" in with_row(4, input_image="broken.png")
    assert "row 5, column edited_image: not a readable image" in with_row(5, edited_image="missing.png")
    photos[3].resize((90, 30)).save(folder / "wide.png")
    assert "row 3, column edited_image" in (message := with_row(3, edited_image="wide.png"))
    assert "90x30" in message and "aspect" in message

    numbers = datasets.Dataset.from_dict(
        {"input_image": [[1], [2]], "edit_prompt": ["a", "b"], "edited_image": ["x.png", "y.png"]}
    )
    numbers.save_to_disk(tmp_path / "numbers")
    assert "--original_image_column: input_image holds" in error_of(dataset_name=str(tmp_path / "numbers"))
    numbers = numbers.rename_column("input_image", "n").add_column("input_image", ["x.png", "y.png"])
    numbers = numbers.remove_columns("edit_prompt").rename_column("n", "edit_prompt")
    numbers.save_to_disk(tmp_path / "no-strings")
    assert "row 0, column edit_prompt: [1] is not an instruction" in error_of(dataset_name=str(tmp_path / "no-strings"))


def test_a_truncated_image_is_named_when_it_is_decoded_and_takes_its_batchs_place(tmp_path, photos):
    folder = write_metadata(tmp_path / "data", photos[:3])
    content = (folder / "1-b.png").read_bytes()
    (folder / "1-b.png").write_bytes(content[: len(content) // 2])
    args = options(dataset_name=str(folder))
    samples = samples_of(args, 3)
    bad = [sample for sample in samples if isinstance(sample, RowError)]
    assert len(bad) == 1 and "row 1, column edited_image: cannot be decoded" in str(bad[0])
    assert collate(samples) is bad[0]


def test_batches_have_the_documented_shapes(pairs):
    batch = collate(samples_of(options(train_data_dir=str(pairs)), 3))
    assert batch["original"].shape == (3, 3, 64, 64) and batch["posterior_noise"].shape == (3, 4, 16, 16)
    assert batch["timesteps"].dtype == torch.int64 and batch["dropout"].shape == (3,)
    assert len(batch["instructions"]) == 3
    assert not torch.equal(batch["noise"], batch["posterior_noise"])


def test_exif_rotation_counts_when_sizes_are_compared(tmp_path, photos):
    photo = photos[0].resize((100, 60))
    folder = write_metadata(tmp_path / "data", [photo])
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.transpose(Image.Transpose.ROTATE_90).save(folder / "0-a.png", exif=exif)
    sample = samples_of(options(dataset_name=str(folder), center_crop=True, random_flip=False), 1)[0]
    luma = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    difference = (sample["original"] * luma).sum(0) - sample["edited"][0]
    assert difference.abs().mean() < 2
