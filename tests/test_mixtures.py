"""Mixtures: the order is arithmetic, each dataset is read its own way, and what is replayed is what the base does."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import ImageOps

from instruct_pix2pix.cli import UserError
from instruct_pix2pix.data.order import MixtureOrder, SampleOrder, mixing_counts
from tests.conftest import assert_same_tensors, copy_tree, losses
from tests.test_streaming import write_shards

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def mirrored(tmp_path_factory, photos):
    """Six pairs in a JSONL file with columns that have no known name: photographs and their mirror images."""
    folder = tmp_path_factory.mktemp("mirrored")
    rows = []
    for index, photo in enumerate(photos[:6]):
        photo.save(folder / f"before-{index}.png")
        ImageOps.mirror(photo).save(folder / f"after-{index}.png")
        rows.append({"before": f"before-{index}.png", "after": f"after-{index}.png"})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "wordings.txt").write_text("mirror it\n")
    return folder


@pytest.fixture
def mixed_run(small_run, pairs, mirrored, tmp_path):
    """`mixed_run(name, second={...}, first={...}, top="", **flags)` trains on ten blurred and six mirrored photos."""

    def run(name="run", second=None, first=None, top="", **flags):
        other = {
            "dataset_name": mirrored / "rows.jsonl",
            "original_image_column": "before",
            "edited_image_column": "after",
            "instruction": mirrored / "wordings.txt",
        }
        entries = [{"dataset_name": pairs} | (first or {}), other | (second or {})]
        lines = ["  - " + "\n    ".join(f"{key}: {value}" for key, value in entry.items()) for entry in entries]
        path = tmp_path / "mix.yaml"
        path.write_text(top + "datasets:\n" + "\n".join(lines) + "\n")
        return small_run(name=name, train_data_dir=None, dataset_name=None, dataset_mixture=path, **flags)

    return run


# ---- order


def samples_of(order, first: int, count: int) -> list[tuple[int, int]]:
    return [next(order.candidates(position)) for position in range(first, first + count)]


def test_each_dataset_has_its_share_of_every_epoch_and_goes_through_its_rows_in_turn():
    counts = np.array([6, 14])  # of 10 rows and 10 rows
    order = MixtureOrder([SampleOrder(10, 1), SampleOrder(10, 2)], counts, seed=1)
    epochs = [samples_of(order, 20 * epoch, 20) for epoch in range(5)]
    for rows in epochs:
        assert Counter(row >= 10 for _, row in rows) == {False: 6, True: 14}
    assert [row >= 10 for _, row in epochs[0]] != [row >= 10 for _, row in epochs[1]]
    firsts = [(epoch, row) for rows in epochs for epoch, row in rows if row < 10]
    assert firsts == [SampleOrder(10, 1).locate(position) for position in range(30)]  # its own order, wherever
    seconds = [(epoch, row - 10) for rows in epochs for epoch, row in rows if row >= 10]
    assert seconds == [SampleOrder(10, 2).locate(position) for position in range(70)]


def test_any_position_can_be_asked_for_first():
    def order():
        return MixtureOrder([SampleOrder(7, 1), SampleOrder(5, 2)], np.array([2, 10]), seed=3)

    whole = samples_of(order(), 0, 60)
    assert [samples_of(order(), position, 1)[0] for position in range(60)] == whole


def test_what_stands_in_for_a_row_is_of_its_dataset():
    order = MixtureOrder([SampleOrder(7, 1), SampleOrder(5, 2)], np.array([6, 6]), seed=3)
    for position in range(24):
        rows = [row for _, row in order.candidates(position)]
        assert len({row < 7 for row in rows}) == 1 and len(set(rows)) > 1


def test_a_mixture_of_one_is_the_dataset():
    one, alone = MixtureOrder([SampleOrder(7, 5)], np.array([7]), seed=5), SampleOrder(7, 5)
    for position in range(20):
        assert list(one.candidates(position)) == list(alone.candidates(position))


@pytest.mark.parametrize(
    ("rows", "weights", "caps", "temperature", "expected"),
    [
        ([600, 400], [1, 1], [np.inf, np.inf], 1, [600, 400]),  # in proportion: each row once
        ([600, 400], [1, 3], [np.inf, np.inf], 1, [333, 667]),
        ([900, 100], [1, 1], [100, 100], 1, [500, 500]),  # the cap of the T5 paper
        ([900, 100], [1, 1], [np.inf, np.inf], 2, [750, 250]),  # sqrt: 3 to 1
        ([900, 100], [1, 1], [np.inf, np.inf], 1e-3, [1000, 0]),  # the largest alone
        ([900, 100], [1e308, 1e308], [np.inf, np.inf], 1, [900, 100]),
        ([5, 5, 5], [1, 1, 1], [np.inf] * 3, 1, [5, 5, 5]),
        ([4, 4, 2], [1, 1, 1], [1, 1, 1], 1, [4, 3, 3]),  # nothing is lost to rounding
    ],
)
def test_shares(rows, weights, caps, temperature, expected):
    assert mixing_counts(*map(np.array, (rows, weights, caps)), temperature).tolist() == expected


# ---- training


def test_a_mixture_of_one_trains_as_the_dataset(small_run, pairs, tmp_path):
    (tmp_path / "one.yaml").write_text(f"datasets: [{{dataset_name: {pairs}}}]")
    alone = small_run(name="alone", max_train_steps=2)
    mixture = {"train_data_dir": None, "dataset_mixture": tmp_path / "one.yaml"}
    mixed = small_run(name="one", max_train_steps=2, **mixture)
    assert_same_tensors(alone / UNET, mixed / UNET)


def test_the_dry_run_the_log_and_the_card_name_datasets_and_shares(mixed_run, capsys, caplog):
    mixed_run(second={"weight": 5, "replay": "true"}, dry_run=True)
    told = json.loads(capsys.readouterr().out)["dataset"]
    assert told["rows"] == 16
    first, second = told["mixture"]
    assert (first["share"], second["share"], second["replay"]) == (0.25, 0.75, True)
    assert second["original_image_column"] == "before" and first["edit_prompt_column"] == "edit_prompt"
    assert "rows.jsonl: 6 rows, 12 of 16 samples of an epoch (75.0%), replayed" in caplog.text
    output_dir = mixed_run(second={"weight": 5}, max_train_steps=1)
    card = (output_dir / "README.md").read_text()
    assert "(25.0% of the samples) and `rows.jsonl` (75.0% of the samples)" in card
    assert "Each dataset has a licence of its own" in card and str(output_dir.parent) not in card


def test_each_dataset_is_read_and_cropped_its_own_way(mixed_run, monkeypatch):
    from instruct_pix2pix.data import triples

    seen, crop = [], triples.crop_pair
    monkeypatch.setattr(triples, "crop_pair", lambda *given: seen.append(given[3]) or crop(*given))
    mixed_run(second={"image_geometry": "squash"})
    assert Counter(seen) == {"resize_crop": 10, "squash": 6}


@pytest.mark.parametrize("flags", [{}, {"cached_crops": 2}, {"lora_rank": 2}])
def test_resuming_a_mixture_with_replay_is_exact(flags, mixed_run, tmp_path):
    flags |= {"checkpointing_steps": 2, "second": {"replay": "true"}}
    whole = mixed_run(name="whole", **flags)
    (tmp_path / "halved").mkdir()
    copy_tree(whole / "checkpoint-2", tmp_path / "halved" / "checkpoint-2")
    halved = mixed_run(name="halved", resume_from_checkpoint="latest", **flags)
    assert_same_tensors(whole / UNET, halved / UNET)


@pytest.mark.parametrize("flags", [{}, {"cached_crops": 1}])
def test_the_log_has_the_loss_of_each_dataset(flags, mixed_run, small_run):
    """Of the replayed one nothing in the first update, as the base has nothing to learn from itself."""
    output_dir = mixed_run(second={"replay": "true"}, max_train_steps=3, train_batch_size=8, **flags)
    entries = list(map(json.loads, (output_dir / "training_log.jsonl").read_text().splitlines()))
    assert entries[0]["loss_dataset1"] > 1e-3 and entries[0]["loss_dataset2"] < 1e-10
    share = 8 * entries[0]["loss"] / entries[0]["loss_dataset1"]  # samples of the first among the update's eight
    assert share == pytest.approx(round(share), abs=1e-4) and 0 < round(share) < 8
    alone = (small_run(name="alone", max_train_steps=1) / "training_log.jsonl").read_text()
    assert "loss_q" in alone and "loss_dataset" not in alone


def test_a_changed_mixture_is_said_when_a_run_goes_on(mixed_run, caplog):
    mixed_run(max_train_steps=1)
    mixed_run(max_train_steps=2, resume_from_checkpoint="latest")
    assert "mixture differs" not in caplog.text
    mixed_run(max_train_steps=3, resume_from_checkpoint="latest", first={"weight": 2})
    assert "the mixture differs from the checkpoint's" in caplog.text


def test_cached_training_is_uncached_training(mixed_run):
    flags = {"center_crop": True, "second": {"image_geometry": "crop", "replay": "true"}}
    live = losses(mixed_run(name="live", **{"no-cache_latents": True}, **flags))
    cached = losses(mixed_run(name="cached", cache_latents=True, **flags))
    assert cached == pytest.approx(live, abs=1e-5)


def test_what_is_replayed_has_the_base_s_prediction_for_a_target(mixed_run):
    """The base has nothing to learn from itself: no loss in the first update but for rounding."""
    replayed = {"replay": "true"}
    (nothing,) = losses(mixed_run(first=replayed, second=replayed, max_train_steps=1))
    assert nothing < 1e-10
    half = losses(mixed_run(name="half", second=replayed, max_train_steps=1))
    assert 0 < half[0] < losses(mixed_run(name="none", max_train_steps=1))[0]


def test_an_update_without_a_replayed_sample_is_trained_as_well(mixed_run):
    """One sample an update: most have none that is replayed."""
    flags = {"train_batch_size": 1, "gradient_accumulation_steps": 1, "max_train_steps": 8}
    output_dir = mixed_run(second={"replay": "true", "weight": 0.5}, **flags)
    entries = list(map(json.loads, (output_dir / "training_log.jsonl").read_text().splitlines()))
    assert 0 < sum("loss_dataset2" in entry for entry in entries) < 8


def test_the_base_is_asked_for_what_the_model_sees(monkeypatch, mixed_run):
    """Noise, instruction and image, dropped or not, in samples that are replayed and no others."""
    from instruct_pix2pix.training import inputs

    windows, encode = [], inputs.WindowEncoder._encode

    def watched(self, window):
        base, self.base = self.base, None
        plain = encode(self, {**window, "noise": window["noise"].clone()})
        self.base = base
        windows.append((window["replay"], plain, encode(self, window), base))
        return windows[-1][2]

    monkeypatch.setattr(inputs.WindowEncoder, "_encode", watched)
    mixed_run(second={"replay": "true"}, conditioning_dropout_prob=0.3)
    replayed = 0
    for marked, plain, made, base in windows:
        with torch.no_grad():
            asked = base(made["noisy"], made["timesteps"], made["text"]).sample
        expected = torch.where(marked[:, None, None, None], asked, plain.pop("target"))
        torch.testing.assert_close(made.pop("target"), expected, atol=1e-5, rtol=1e-4)
        assert all(torch.equal(made[name], tensor) for name, tensor in plain.items())
        replayed += int(marked.sum())
    assert replayed == 6  # of an epoch of 16 samples
    assert not any(parameter.requires_grad for parameter in base.parameters()) and not base.training


# ---- rows that cannot be used


def test_a_bad_row_is_named_by_its_dataset(mixed_run, mirrored, tmp_path):
    broken = copy_tree(mirrored, tmp_path / "broken")
    content = (broken / "after-2.png").read_bytes()
    (broken / "after-2.png").write_bytes(content[: len(content) // 2])
    second = {"dataset_name": broken / "rows.jsonl"}
    output_dir = mixed_run(second=second)
    (line,) = map(json.loads, (output_dir / "skipped.jsonl").read_text().splitlines())
    assert line["row"] == 12 and "row 2 of " in line["reason"] and "rows.jsonl: column after" in line["reason"]
    cached = mixed_run(name="cached", second=second, cached_crops=1)
    assert json.loads((cached / "skipped.jsonl").read_text()) == line
    with pytest.raises(UserError, match=r"row 2, column after: cannot be decoded"):
        mixed_run(name="strict", second=second, check_rows="all", on_bad_row="error")
    checked = mixed_run(name="checked", second=second, check_rows="all", max_train_steps=1)
    assert json.loads((checked / "skipped.jsonl").read_text()) == line


# ---- what the user got wrong


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("datasets: [{dataset_nam: x}]", "dataset 1: dataset_nam is no key; the nearest is dataset_name"),
        ("temprature: 2\ndatasets: [{dataset_name: x}]", "temprature is no key; the nearest is temperature"),
        ("datasets: [{dataset_name: x, weight: -1}]", "dataset 1: weight: -1 is out of range"),
        ("datasets: [{dataset_name: x, weight: much}]", "dataset 1: weight: 'much' is not a number"),
        ("datasets: [{dataset_name: x, cap: 0}]", "dataset 1: cap: 0 is too small"),
        ("datasets: [{dataset_name: x, replay: maybe}]", "dataset 1: replay: invalid choice"),
        ("datasets: [{dataset_name: [x]}]", "dataset 1: dataset_name takes one value"),
        ("datasets: [{split: train}]", "dataset 1: dataset_name: none given"),
        ("datasets: [{original_dir: x}]", "dataset 1: edited_dir: missing"),
        ("datasets: [x]", "dataset 1: 'x' is no dataset"),
        ("datasets: []", "has no list of `datasets`"),
        ("datasets: [", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_mistakes_in_the_file_are_one_line(content, message, small_run, tmp_path):
    if content is not None:
        (tmp_path / "mix.yaml").write_text(content)
    with pytest.raises(UserError) as caught:
        small_run(train_data_dir=None, dataset_mixture=tmp_path / "mix.yaml")
    text = str(caught.value)
    assert text.startswith(f"--dataset_mixture: {tmp_path / 'mix.yaml'}") and message in text and "\n" not in text


def test_mistakes_around_a_mixture(mixed_run, small_run, pairs, mirrored, tmp_path):
    (tmp_path / "mix.yaml").write_text(f"datasets: [{{dataset_name: {pairs}}}]")
    both = {"dataset_mixture": tmp_path / "mix.yaml"}
    with pytest.raises(UserError, match="--dataset_mixture: given beside --train_data_dir"):
        small_run(**both)
    with pytest.raises(UserError, match="--dataset_mixture: given beside --dataset_name"):
        small_run(dataset_name=pairs, **both)
    with pytest.raises(UserError, match="--validation_split: of a mixture"):
        mixed_run(validation_split="test")
    with pytest.raises(UserError, match="is trained on"):
        mixed_run(validation_dataset=pairs)
    with pytest.raises(UserError, match="dataset 2: original_image_column: no is not a column"):
        mixed_run(second={"original_image_column": "no"})
    with pytest.raises(UserError, match="dataset 2: dataset_name: /nowhere"):
        mixed_run(second={"dataset_name": "/nowhere"})
    with pytest.raises(UserError, match="dataset 2: of 16 samples none is its share"):
        mixed_run(second={"weight": 1e-6})
    with pytest.raises(UserError, match="dataset 2: image_geometry crop crops at random, and squash does not"):
        mixed_run(image_geometry="squash", second={"image_geometry": "crop"})
    with pytest.raises(UserError, match="edits no images yet"):
        mixed_run(script="train", second={"replay": "true"})


def test_held_out_rows_beside_a_mixture_are_read_by_the_command_line(mixed_run, mirrored):
    named = {"original_image_column": "before", "edited_image_column": "after"}
    held_out = {"validation_dataset": mirrored / "rows.jsonl", "instruction": "mirror it", **named}
    with pytest.raises(UserError, match="dataset 1: original_image_column: before is not a column"):
        mixed_run(**held_out)  # what a dataset leaves out is as the command line has it
    columns = {"original_image_column": "original_image", "edited_image_column": "edited_image"}
    second = {"dataset_name": mirrored}  # another name of the same rows
    output_dir = mixed_run(first=columns, second=second, num_validation_images=1, max_train_steps=1, **held_out)
    assert "loss" in json.loads((output_dir / "validation_log.jsonl").read_text())


def test_streams_are_mixed_as_the_same_rows_on_disk_are(small_run, tmp_path):
    """Of one row group each, so that both orders are the same."""
    for seed, name in enumerate(("first", "second")):
        write_shards(tmp_path / name, rows=5 + seed, group=10, shards=1)
    (tmp_path / "mix.yaml").write_text(
        f"datasets:\n  - dataset_name: {tmp_path}/first\n  - dataset_name: {tmp_path}/second\n    weight: 2\n"
    )
    flags = {"train_data_dir": None, "dataset_name": None, "dataset_mixture": tmp_path / "mix.yaml", "use_ema": True}
    flags |= {"cache_latents": False, "cache_dir": tmp_path / "cache"}
    disk = small_run(name="disk", **flags)
    assert losses(small_run(name="stream", streaming=True, **flags)) == losses(disk)
    assert_same_tensors(disk / UNET, tmp_path / "stream" / UNET)
