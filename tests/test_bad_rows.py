"""Rows that cannot be used: another one stands in, always the same, they are listed, and nothing else changes."""

import json
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image

from evaluation import evaluate
from inference import edit_images
from instruct_pix2pix.cli import RowError, UserError
from instruct_pix2pix.data import latent_cache
from instruct_pix2pix.data.order import SampleOrder
from instruct_pix2pix.data.sources import Source
from instruct_pix2pix.data.triples import TripleDataset, load_triples
from tests.conftest import ROOT, assert_same_tensors, copy_tree, losses
from tests.test_dataset import options

UNET = "unet/diffusion_pytorch_model.safetensors"
CUT = {"row": 6, "reason": "column edited_image: cannot be decoded (cannot be read (image file is truncated"}


@pytest.fixture
def broken(pairs, tmp_path):
    """Ten pairs, of which number 6 has an edited image cut short, as only decoding finds out."""
    folder = copy_tree(pairs, tmp_path / "broken")
    file = folder / "edited" / "6.png"
    file.write_bytes(file.read_bytes()[:2000])
    return folder


def skipped(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]


def assert_only_row_6_is_listed(folder):
    [entry] = skipped(folder)
    assert entry["row"] == 6 and entry["reason"].startswith(CUT["reason"])


def test_another_row_stands_in_and_every_other_sample_stays_as_it_was(pairs, broken):
    args = options(train_data_dir=str(broken))
    bad, whole = (
        TripleDataset(load_triples(Source(str(folder), "--train_data_dir")), args, (4, 16, 16), 1000)
        for folder in (broken, pairs)
    )
    order, stand_ins = SampleOrder(10, args.seed), set()
    for position in range(60):
        ours, theirs = bad[position], whole[position]
        assert torch.equal(ours["noise"], theirs["noise"]) and ours["timestep"] == theirs["timestep"]
        if order.locate(position)[1] == 6:
            assert {row for row, _ in ours["skipped"]} == {6} and not torch.equal(ours["edited"], theirs["edited"])
            stand_ins.add(ours["edited"].numpy().tobytes())
        else:
            assert ours["skipped"] == [] and torch.equal(ours["edited"], theirs["edited"])
    assert len(stand_ins) == 6, "drawn for each position, not one row for all"


def test_a_run_lists_what_it_left_out_and_resumes_exactly(small_run, broken, tmp_path, caplog):
    flags = {"train_data_dir": broken, "checkpointing_steps": 3}
    whole = small_run(name="whole", max_train_steps=6, **flags)
    assert caplog.text.count("row 6 is left out: column edited_image: cannot be decoded") == 1
    assert_only_row_6_is_listed(whole)
    part = small_run(name="part", max_train_steps=3, **flags)
    (part / "model_index.json").unlink()
    part = small_run(name="part", max_train_steps=6, resume_from_checkpoint="latest", **flags)
    assert losses(part) == losses(whole)
    assert_same_tensors(part / UNET, whole / UNET)
    assert (part / "skipped.jsonl").read_bytes() == (whole / "skipped.jsonl").read_bytes()


@pytest.mark.parametrize("check_rows", ["sample", "all"])
def test_the_cache_knows_them_too_and_trains_the_same(check_rows, small_run, broken, tmp_path, monkeypatch):
    monkeypatch.setattr(latent_cache, "ROWS_PER_FILE", 4)
    flags = {"train_data_dir": broken, "center_crop": True, "max_train_steps": 6}
    live = losses(small_run(name="live", **{"no-cache_latents": True}, **flags))
    flags |= {"cache_latents": True, "cache_dir": tmp_path / "cache", "check_rows": check_rows}
    for name in ("built", "found"):
        run = small_run(name=name, **flags)
        assert losses(run) == pytest.approx(live, abs=1e-5)
        assert_only_row_6_is_listed(run)


def test_all_rows_are_decoded_up_front_when_asked(broken, small_run, capsys):
    source = Source(str(broken), "--train_data_dir")
    assert load_triples(source).bad == {}
    found = load_triples(Source(str(broken), "--train_data_dir", check_all=True)).bad
    assert list(found) == [6] and found[6].startswith(CUT["reason"])
    small_run(train_data_dir=broken, check_rows="all", dry_run=True)
    assert json.loads(capsys.readouterr().out)["dataset"]["rows_that_cannot_be_used"] == 1
    with pytest.raises(RowError, match="row 6, column edited_image: cannot be decoded"):
        small_run(train_data_dir=broken, check_rows="all", on_bad_row="error", dry_run=True)


def test_a_dataset_of_mostly_bad_rows_is_refused(broken, small_run):
    for number in range(6):
        (broken / "original" / f"{number}.png").write_bytes(b"no picture")
    with pytest.raises(
        UserError, match="row 0, column original_image: not a readable image.*6 of 10 rows cannot be used"
    ):
        small_run(train_data_dir=broken, dry_run=True)


def test_the_dry_run_counts_what_a_folder_holds(broken, small_run, capsys):
    (broken / "edited" / "3.png").unlink()
    (broken / "edited" / "notes.pdf").write_bytes(b"x")
    small_run(train_data_dir=broken, dry_run=True)
    dataset = json.loads(capsys.readouterr().out)["dataset"]
    assert dataset["rows"] == 9
    assert dataset["files"] == {
        "pairs": 9,
        "inputs without a partner": 1,
        "targets without a partner": 0,
        "other files": {".pdf": 1},
        "pairs without an instruction": 0,
    }


def test_an_image_over_the_limit_is_told_with_the_flag_that_lifts_it(tmp_path, pairs, small_run, capsys):
    with pytest.raises(UserError) as caught:
        small_run(train_data_dir=pairs, max_image_pixels=100, dry_run=True)
    size = "x".join(map(str, Image.open(pairs / "original" / "0.png").size))
    assert f"{size} is more than 0.0001 million pixels; allow it with --max_image_pixels " in str(caught.value)
    small_run(train_data_dir=pairs, max_image_pixels=10**6, dry_run=True)


@pytest.mark.long
def test_processes_agree_on_the_rows_that_stand_in(base_models, broken, small_run, tmp_path):
    """Two processes of batch 1 are one of batch 2, and together they know all that was left out."""
    flags = ["--train_batch_size=1", "--gradient_accumulation_steps=2", "--max_train_steps=6", "--seed=7"]
    flags += [f"--train_data_dir={broken}", "--resolution=64", "--report_to=none", "--learning_rate=1e-3"]
    flags += [f"--pretrained_model_name_or_path={base_models['finetune']}", f"--output_dir={tmp_path / 'two'}"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    subprocess.run([*launch, "finetune_instruct_pix2pix.py", *flags], cwd=ROOT, env=environment, check=True)
    one = small_run(train_data_dir=broken, max_train_steps=6)
    assert losses(tmp_path / "two") == pytest.approx(losses(one), rel=1e-4)
    assert_only_row_6_is_listed(tmp_path / "two")


def test_evaluation_and_editing_leave_them_out_and_say_so(base_models, broken, tmp_path, capsys):
    model = str(base_models["finetune"])
    flags = ["--model", model, "--dataset", str(broken), "--split", "train", "--resolution", "64"]
    flags += ["--num_inference_steps", "1", "--output_dir", str(tmp_path / "evaluation")]
    evaluate.main(flags)
    found = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    assert found["models"]["identity"]["all"]["images"] == 9
    assert_only_row_6_is_listed(tmp_path / "evaluation")
    with pytest.raises(RowError, match="row 6"):
        evaluate.main([*flags, "--on_bad_row", "error"])


def test_editing_takes_a_dataset_of_triples(base_models, pairs, tmp_path, capsys):
    import datasets

    rows = {"input_image": [(pairs / "original" / f"{n}.png").read_bytes() for n in range(3)]}
    rows |= {"edit_prompt": [f"edit {n}" for n in range(3)], "edited_image": rows["input_image"]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "rows" / "test.parquet")
    flags = ["--model_id", str(base_models["finetune"]), "--steps", "1", "--resolution", "64"]
    out = tmp_path / "out"
    for expected in ("3 edited, 0 there before", "0 edited, 3 there before"):
        edit_images.main([*flags, "--dataset", str(tmp_path / "rows"), "--split", "test", "--output_dir", str(out)])
        assert expected in capsys.readouterr().out
    records = [json.loads(line) for line in (out / "edits.jsonl").read_text().splitlines()]
    assert sorted(r["instruction"] for r in records if "instruction" in r) == ["edit 0", "edit 1", "edit 2"]
    assert (out / "inputs" / "000001.png").read_bytes() == rows["input_image"][1]
    edit_images.main([*flags, "--dataset", str(pairs), "--instruction", "x", "--output_dir", str(tmp_path / "folders")])
    assert len(list((tmp_path / "folders").glob("0*.png"))) == 10
    with pytest.raises(UserError, match="--dataset: given beside a.png"):
        edit_images.main(["a.png", *flags, "--dataset", str(pairs), "--output_dir", str(out)])


def test_held_out_rows_are_shown_during_training(small_run, pairs, tmp_path):
    folder = copy_tree(pairs, tmp_path / "data" / "train").parent
    copy_tree(pairs, folder / "val")
    flags = {"train_data_dir": folder, "validation_split": "val", "num_validation_images": 3, "validation_steps": 2}
    run = small_run(name="shown", **flags)
    assert sorted(path.name for path in (run / "validation").iterdir()) == [
        "step-000002-held-out.png",
        "step-000004-held-out.png",
    ]
    assert losses(run) == losses(small_run(name="plain", train_data_dir=folder))
    with pytest.raises(UserError, match="--validation_split: train is trained on; name a split that is held out"):
        small_run(name="same", **flags | {"validation_split": "train"})
    with pytest.raises(UserError, match="--validation_split: .* has no split named test, only"):
        small_run(name="none", **flags | {"validation_split": "test"})


def test_squash_takes_each_image_by_itself(small_run, pairs, tmp_path, capsys):
    """Pairs of two aspect ratios: squashed alone, each as if there were no other."""
    folder = copy_tree(pairs, tmp_path / "aspects")
    for path in (folder / "edited").iterdir():
        Image.open(path).resize((90, 90)).save(path)
    with pytest.raises(UserError, match="a pair needs one aspect ratio"):
        small_run(train_data_dir=folder, dry_run=True)
    small_run(train_data_dir=folder, image_geometry="squash", dry_run=True)
    assert json.loads(capsys.readouterr().out)["dataset"]["rows_that_cannot_be_used"] == 0
    triples = load_triples(Source(str(folder), "--dataset"), geometry="squash")
    sample = TripleDataset(triples, options(image_geometry="squash", random_flip=False), (4, 8, 8), 1000)[0]
    number = SampleOrder(10, 1).locate(0)[1]
    for side in ("original", "edited"):
        squashed = Image.open(folder / side / f"{number}.png").convert("RGB").resize((64, 64), Image.Resampling.BICUBIC)
        assert sample[side].permute(1, 2, 0).numpy().tobytes() == squashed.tobytes()
