"""Held-out rows during training: what is measured and shown, what is kept of it, and what trackers are told."""

import json
import logging
import os
import re
import socket
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionInstructPix2PixPipeline
from PIL import Image

from instruct_pix2pix import editing, publishing
from instruct_pix2pix.cli import UserError
from instruct_pix2pix.data.order import stream
from instruct_pix2pix.data.sources import Source
from instruct_pix2pix.data.triples import load_triples, open_pair
from instruct_pix2pix.evaluation.metrics import psnr
from instruct_pix2pix.evaluation.settings import SETTINGS_FILE
from instruct_pix2pix.models import sd, trained
from instruct_pix2pix.training import checkpoint as checkpoints
from instruct_pix2pix.training.loss import sample_losses, sums_by_band
from tests.conftest import ROOT, assert_same_tensors, copy_tree, losses

UNET = "unet/diffusion_pytorch_model.safetensors"
PHOTO = ROOT / "assets/photos/test/sea6.webp"
# No guidance: one prediction a step instead of three.
QUICK = {"guidance_scale": 1, "image_guidance_scale": 1, "num_validation_images": 2}


def lines(output_dir: Path, name: str = "validation_log.jsonl") -> list[dict]:
    return [json.loads(line) for line in (output_dir / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, pairs) -> Path:
    """A dataset with a split test: six of the pairs, of two tasks."""
    rows = {
        column: [(pairs / side / f"{n}.png").read_bytes() for n in range(6)]
        for side, column in (("original", "input_image"), ("edited", "edited_image"))
    }
    rows |= {"edit_prompt": [f"blur it {n}" for n in range(6)], "task": ["deblur"] * 4 + ["derain"] * 2}
    folder = tmp_path_factory.mktemp("tasks")
    datasets.Dataset.from_dict(rows).to_parquet(folder / "test.parquet")
    return folder


# ---- what is measured


def test_the_loss_of_held_out_rows_is_the_exported_models_and_training_never_notices(small_run, tasks, tmp_path):
    """By hand: VAE, noise schedule and UNet of the exported pipeline, in the middle of the pictures."""
    flags = {"use_ema": True, "conditioning_dropout_prob": 0.3, "random_flip": True, "snr_gamma": 5.0}
    watched = QUICK | {"validation_dataset": tasks, "validation_split": "test", "validation_steps": 2}
    plain = small_run(name="plain", **flags)
    run = small_run(name="watched", checkpointing_steps=2, **flags, **watched)
    assert losses(plain) == losses(run)
    for file in (UNET, "checkpoint-4/ema.safetensors", "checkpoint-4/optimizer.safetensors"):
        assert_same_tensors(plain / file, run / file)

    found = lines(run)
    assert [line["step"] for line in found] == [2, 4]
    names = ["loss_q0", "loss_q1", "loss_q2", "loss_q3", "loss/deblur", "loss/derain", "psnr", "ssim"]
    assert list(found[1]) == ["step", "loss", *names]
    assert sorted(path.name for path in (run / "validation").iterdir()) == [
        "step-000002-held-out.png",
        "step-000004-held-out.png",
    ]

    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(run)
    schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
    triples, expected = load_triples(Source(str(tasks), "--dataset", split="test")), []
    for row in range(6):
        [text], *pair = open_pair(triples, row)
        size = [max(64, round(side * 64 / min(pair[0].size))) for side in pair[0].size]
        box = [(size[0] - 64 + 1) // 2, (size[1] - 64 + 1) // 2]
        box += [box[0] + 64, box[1] + 64]
        cut = [np.asarray(image.resize(size, Image.Resampling.BICUBIC).crop(box)) for image in pair]
        pixels = torch.from_numpy(np.stack(cut)).permute(0, 3, 1, 2) / 127.5 - 1
        draws = stream(0, "validation", row, 0)
        draws.random()
        noise = torch.from_numpy(draws.standard_normal((1, 4, 16, 16), dtype=np.float32))
        with torch.no_grad():
            original, edited = sd.encode_pair(pipeline.vae, pixels[:1], pixels[1:], noise)
            ids = sd.tokenize(pipeline.tokenizer, [text])
            for band in range(4):
                draws = stream(0, "validation", row, band + 1)
                timestep = torch.tensor([int(250 * (band + draws.random()))])
                noise = torch.from_numpy(draws.standard_normal((1, 4, 16, 16), dtype=np.float32))
                noisy = torch.cat([schedule.add_noise(edited, noise, timestep), original], dim=1)
                said = pipeline.unet(noisy, timestep, sd.encode_text(pipeline.text_encoder, ids)).sample
                velocity = schedule.get_velocity(edited, noise, timestep)  # which the tiny models predict
                expected.append(torch.nn.functional.mse_loss(said, velocity).item())
    expected = np.array(expected).reshape(6, 4)
    assert found[1]["loss"] == pytest.approx(expected.mean(), rel=1e-4)
    assert [found[1][f"loss_q{band}"] for band in range(4)] == pytest.approx(expected.mean(0), rel=1e-4)
    assert found[1]["loss/derain"] == pytest.approx(expected[4:].mean(), rel=1e-4)

    # What a run leaves that was killed after its checkpoint, in the middle of a line.
    copy_tree(run / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    whole = (run / "validation_log.jsonl").read_bytes()
    (tmp_path / "resumed" / "validation_log.jsonl").write_bytes(whole[:-9])
    resumed = small_run(name="resumed", checkpointing_steps=2, resume_from_checkpoint="latest", **flags, **watched)
    assert (resumed / "validation_log.jsonl").read_bytes() == whole
    picture = "validation/step-000004-held-out.png"
    assert (resumed / picture).read_bytes() == (run / picture).read_bytes()
    small_run(name="resumed", checkpointing_steps=2, resume_from_checkpoint="latest", **flags, **watched)
    assert (resumed / "validation_log.jsonl").read_bytes() == whole  # where all was done already


def test_psnr_is_that_of_the_edits_and_no_more_rows_are_used_than_asked_for(small_run, tasks, monkeypatch):
    from instruct_pix2pix.training import validation

    shown = []
    monkeypatch.setattr(validation, "log_pictures", lambda *arguments: shown.extend(arguments[3]))
    run = small_run(max_train_steps=1, validation_dataset=tasks, max_validation_samples=3, **QUICK)
    assert len({row["instruction"] for row in shown}) == 2 and shown[0]["edit"].size == (64, 64)
    expected = [psnr(np.asarray(row["edit"]), np.asarray(row["target"])) for row in shown]
    assert lines(run)[0]["psnr"] == pytest.approx(np.mean(expected))
    drawn = small_run(name="other", max_train_steps=1, seed=8, validation_dataset=tasks, max_validation_samples=3,
                      **QUICK | {"num_validation_images": 3})  # fmt: skip
    assert {row["instruction"] for row in shown[:2]} < {row["instruction"] for row in shown[2:]}
    assert lines(drawn)[0]["loss"] == pytest.approx(lines(run)[0]["loss"], rel=0.1)


def test_the_loss_of_held_out_rows_rises_when_eight_pairs_are_overfitted(small_run, tmp_path):
    """Each photo is to become another one: what eight pairs teach of that is of no use for others."""
    photos = sorted((ROOT / "assets/photos/train").glob("*.webp"))
    for folder, rows in (("train", range(8)), ("held_out", range(16, 20))):
        for side, offset in (("original", 0), ("edited", 8)):
            (tmp_path / folder / side).mkdir(parents=True)
            for row in rows:
                image = Image.open(photos[row + offset]).convert("RGB").resize((32, 32))
                image.save(tmp_path / folder / side / f"{row}.png")
        (tmp_path / folder / "instructions.txt").write_text("go there\n")
    run = small_run(
        pretrained_model_name_or_path=ROOT / "assets/tiny-instruct-pix2pix",
        train_data_dir=tmp_path / "train",
        validation_dataset=tmp_path / "held_out",
        validation_steps=10,
        max_train_steps=40,
        train_batch_size=8,
        gradient_accumulation_steps=1,
        learning_rate=2e-3,
        conditioning_dropout_prob=0,
        resolution=32,
        center_crop=True,
        **QUICK | {"num_validation_images": 1},
    )
    held_out, trained_on = [line["loss"] for line in lines(run)], losses(run)
    assert held_out[0] < held_out[1] < held_out[3] and held_out[3] > 1.2 * held_out[0]
    assert np.mean(trained_on[30:]) < 0.8 * np.mean(trained_on[:10])


def test_bands_are_quarters_of_the_timesteps_and_average_to_the_loss(small_run):
    given = torch.tensor([[1.0, 2.0, 4.0, 8.0]]), torch.tensor([[0, 249, 250, 999]])
    assert sums_by_band(*given, 1000).tolist() == [[[3.0, 4.0, 0.0, 8.0], [2.0, 1.0, 0.0, 1.0]]]
    prediction, target = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    weighted = sample_losses(prediction, target, torch.tensor([1.0, 2.0, 0.0]))
    assert weighted[1] == 2 * torch.nn.functional.mse_loss(prediction[1], target[1]) and weighted[2] == 0

    run = small_run(use_ema=True, snr_gamma=5.0)
    entries = lines(run, "training_log.jsonl")
    for entry in entries:
        bands = [value for name, value in entry.items() if name.startswith("loss_q")]
        assert min(bands) <= entry["loss"] <= max(bands) and entry["memory_gib"] > 0.1
    assert [entry["ema_decay"] for entry in entries] == [0.0, 2 / 11, 3 / 12, 4 / 13]


# ---- what is kept


def test_the_best_checkpoint_is_kept_beside_the_newest_whatever_happens(small_run, pairs, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="instruct_pix2pix")
    flags = {"validation_dataset": copy_tree(pairs, tmp_path / "held_out"), "validation_steps": 100, "use_ema": True}
    flags |= {"checkpointing_steps": 1, "checkpoints_total_limit": 1, "keep_best": "loss", "learning_rate": 1e-2}
    flags["pretrained_model_name_or_path"] = ROOT / "assets/tiny-instruct-pix2pix"
    flags |= QUICK | {"gradient_accumulation_steps": 1, "resolution": 32, "num_validation_images": 1}
    run = small_run(name="whole", **flags)
    found = lines(run)
    best = min(found, key=lambda line: line["loss"])
    assert [line["step"] for line in found] == [1, 2, 3, 4] and best["step"] < 4
    kept = {path.name: path for path in checkpoints.list_checkpoints(run)}
    assert list(kept) == [f"checkpoint-{best['step']}", "checkpoint-4"]
    value = checkpoints.read_state(run / f"checkpoint-{best['step']}")["validation"]
    assert {"step": best["step"], **value} == best
    said = [record.getMessage() for record in caplog.records if "best by loss" in record.getMessage()]
    assert len(said) == 1 and f"export_checkpoint.py {run}/checkpoint-{best['step']} --output_dir" in said[0]

    # Resumed twice, the first time where nothing has gone yet.
    halved = tmp_path / "halved"
    for steps, limit in ((2, None), (3, 1), (4, 1)):
        limited = flags | {"checkpoints_total_limit": limit, "max_train_steps": steps}
        small_run(name="halved", resume_from_checkpoint="latest", **limited)
    assert [path.name for path in checkpoints.list_checkpoints(halved)] == list(kept)
    assert (halved / "validation_log.jsonl").read_bytes() == (run / "validation_log.jsonl").read_bytes()
    for name in kept:
        for file in (UNET, "ema.safetensors", "optimizer.safetensors"):
            assert_same_tensors(halved / name / file, run / name / file)
    higher = max(kept, key=lambda name: checkpoints.read_state(run / name)["validation"]["psnr"])
    assert checkpoints.best_checkpoint(halved, "psnr") == halved / higher
    assert checkpoints.best_checkpoint(halved, None) is None


def test_a_stopped_run_validates_only_the_checkpoints_it_would_have_anyway(small_run, pairs, tmp_path, monkeypatch):
    from instruct_pix2pix.training.stopping import StopRequest

    monkeypatch.setattr(StopRequest, "all_ranks_agree", lambda self, accelerator, step: step == 3)
    held_out = copy_tree(pairs, tmp_path / "held_out")
    with pytest.raises(KeyboardInterrupt):
        small_run(validation_dataset=held_out, keep_best="loss", checkpointing_steps=2, **QUICK)
    states = [checkpoints.read_state(path) for path in checkpoints.list_checkpoints(tmp_path / "run")]
    assert [(state["step"], "validation" in state) for state in states] == [(2, True), (3, False)]


# ---- what is shown, and told to trackers


def test_several_images_each_with_its_instruction(small_run, tmp_path):
    photo = tmp_path / "wide.png"
    Image.open(PHOTO).convert("RGB").resize((96, 64)).save(photo)
    several = {"val_image_url": [PHOTO, photo], "validation_prompt": ["blur it", "make it blue"]}
    run = small_run(max_train_steps=1, **several, **QUICK)
    sheet = Image.open(run / "validation" / "step-000001.png")
    assert sheet.height > 128 + 64 and sheet.width > 3 * 96
    state = trained.read_state(run / "checkpoint-1")
    assert state["flags"]["validation_prompt"] == ["blur it", "make it blue"]
    card = (run / "README.md").read_text()
    assert "'wide.png'" in card and str(tmp_path) not in card
    publishing.export_checkpoint(run / "checkpoint-1", tmp_path / "exported")
    exported = (tmp_path / "exported" / "README.md").read_text()
    assert re.search('"(blur it|make it blurry)",', exported)
    assert exported.replace('"exported"', '"run"').replace("# exported", "# run") == card


def test_edits_are_made_as_the_base_edits_best_unless_flags_say_otherwise(
    small_run, base_models, tasks, tmp_path, monkeypatch
):
    base, asked = copy_tree(base_models["finetune"], tmp_path / "base"), []
    best = {"steps": 3, "image_guidance_scale": 1.0, "guidance_scale": 1.0, "scheduler": None}
    gray = best | {"steps": 2, "scheduler": "ddim", "instructions": ["Blur it 5"]}
    (base / SETTINGS_FILE).write_text(json.dumps({"all": best, "tasks": {"gray": gray}}))

    def watch(pipeline, prompts, images, seeds, **setting):
        asked.append((prompts, setting))
        return edit(pipeline, prompts, images, seeds, **setting)

    edit = editing.edit
    monkeypatch.setattr(editing, "edit", watch)
    flags = {"pretrained_model_name_or_path": base, "max_train_steps": 1, "num_validation_images": 6}
    flags |= {"validation_dataset": tasks, "validation_split": "test"}
    run = small_run(**flags)
    ddim = {"steps": 2, "image_guidance_scale": 1.0, "guidance_scale": 1.0, "scheduler": "ddim"}
    assert asked == [([f"blur it {n}" for n in range(5)], best), (["blur it 5"], ddim)]
    pictures = Image.open(run / "validation" / "step-000001-held-out.png")
    asked.clear()
    assert (
        Image.open(small_run(name="own", **flags, guidance_scale=4.0) / "validation" / "step-000001-held-out.png")
        != pictures
    )
    assert asked == [
        ([f"blur it {n}" for n in range(5)], best | {"guidance_scale": 4.0}),
        (["blur it 5"], ddim | {"guidance_scale": 4.0}),
    ]
    asked.clear()
    small_run(
        "train",
        name="other",
        **flags | {"pretrained_model_name_or_path": copy_tree(base_models["train"], tmp_path / "four")},
    )
    assert [setting for _, setting in asked] == [editing.USUAL._asdict()]


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """Flags of a run that shows a picture and held-out rows, and trackio's store, in a folder of the tests' own."""
    store = tmp_path_factory.mktemp("trackio")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(store))  # read when trackio is imported
        import trackio  # noqa: F401
    return store


def test_trackers_are_told_all_and_a_resumed_run_goes_on_in_them(small_run, watched, pairs, tmp_path, monkeypatch):
    """TensorBoard and trackio, read back; neither asks the network nor serves."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from trackio.sqlite_storage import SQLiteStorage

    connected = []
    for call in ("connect", "connect_ex", "bind"):
        monkeypatch.setattr(socket.socket, call, lambda self, address: connected.append(address))
    flags = {"validation_dataset": copy_tree(pairs, tmp_path / "held_out"), "validation_steps": 2, "use_ema": True}
    flags |= {"val_image_url": PHOTO, "validation_prompt": "blur it", "tracker_project_name": "editors"}
    flags |= QUICK | {"report_to": "tensorboard,trackio", "checkpointing_steps": 2, "resolution": 32}
    run = small_run(max_train_steps=3, **flags)
    # Killed after update 3, before its checkpoint.
    checkpoints.shutil.rmtree(run / "checkpoint-3")
    small_run(max_train_steps=4, resume_from_checkpoint="latest", **flags)
    assert connected == []

    events = EventAccumulator(str(run / "logs" / "editors"), {"scalars": 0, "images": 0}).Reload()
    quarters = {f"loss_q{n}" for n in range(4)}
    expected = {"loss", "learning_rate", "grad_norm", "ema_decay", "images_per_second", "memory_gib"}
    validation = {f"validation/{name}" for name in {"loss", "psnr", "ssim"} | quarters}
    assert set(events.Tags()["scalars"]) >= expected | validation
    assert set(events.Tags()["images"]) == {"validation", "held_out"}
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses(run))
    assert events.Scalars("validation/loss")[0].value == pytest.approx(lines(run)[0]["loss"])

    [name] = SQLiteStorage.get_runs("editors")
    assert name == f"run-{(run / 'tracker_run_id.txt').read_text()}"
    logged = SQLiteStorage.get_logs("editors", name)
    by_step = [(entry["step"], entry["loss"]) for entry in logged if "loss" in entry]
    assert by_step == list(enumerate(losses(run), start=1))
    measured = [(entry["step"], entry["validation/psnr"]) for entry in logged if "validation/psnr" in entry]
    assert measured == [(2, lines(run)[0]["psnr"]), (3, measured[1][1]), (4, lines(run)[1]["psnr"])]
    pictures = [entry["held_out"]["file_path"] for entry in logged if "held_out" in entry]
    assert len(pictures) == 3 and all((watched / "media" / path).is_file() for path in pictures)
    assert SQLiteStorage.get_run_config("editors", name)["use_ema"] is True


def wandb_records(path: Path) -> list:
    """What a .wandb file holds: protobuf messages in LevelDB's log format, after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    content, at, found, pending = path.read_bytes(), 7, [], b""
    while at + 7 <= len(content):
        if (left := 2**15 - at % 2**15) < 7:  # the end of a block
            at += left
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        pending += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last of several parts
            found.append(wandb_internal_pb2.Record.FromString(pending))
            pending = b""
    return found


@pytest.mark.slow
def test_wandb_keeps_its_run_and_gets_tables(small_run, pairs, tmp_path, monkeypatch):
    """Offline; the records of what W&B would upload are read back."""
    import wandb

    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    flags = {"validation_dataset": copy_tree(pairs, tmp_path / "held_out"), "validation_steps": 2, "tags": "tiny"}
    flags |= QUICK | {"report_to": "wandb", "checkpointing_steps": 2, "run_name": "first", "wandb_entity": "us"}
    run = small_run(max_train_steps=2, tracker_project_name="editors", **flags)
    small_run(max_train_steps=4, tracker_project_name="editors", resume_from_checkpoint="latest", **flags)
    wandb.teardown()  # its service has written all then
    run_id, told = (run / "tracker_run_id.txt").read_text(), []
    recorded = sorted((run / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)
    assert len(recorded) == 2 and all(path.stem == f"run-{run_id}" for path in recorded)
    for path in recorded:
        for record in wandb_records(path):
            if record.HasField("run"):
                begun = record.run
                assert (begun.run_id, begun.project, begun.entity) == (run_id, "editors", "us")
                assert begun.display_name == "first" and list(begun.tags) == ["tiny"]
            if record.HasField("history"):
                values = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                told.append({name: json.loads(value) for name, value in values.items()})
    by_step = [(entry["_step"], entry["loss"]) for entry in told if "loss" in entry]
    assert by_step == list(enumerate(losses(run), start=1))
    assert [entry["validation/loss"] for entry in told if "validation/loss" in entry] == [
        line["loss"] for line in lines(run)
    ]
    assert [entry["held_out/_type"] for entry in told if "held_out/_type" in entry] == ["table-file"] * 2


# ---- mistakes


def test_held_out_rows_that_are_trained_on_or_not_there(small_run, pairs):
    for same in (pairs, f"{pairs}/", pairs.parent / "x" / ".." / pairs.name):
        with pytest.raises(UserError, match="--validation_dataset: .* is trained on; name a split that is held out"):
            small_run(validation_dataset=same, dry_run=True)
    with pytest.raises(UserError, match="--validation_dataset: no/such-dataset"):
        small_run(validation_dataset="no/such-dataset", dry_run=True)


def test_a_held_out_row_that_cannot_be_used(small_run, pairs, tmp_path, caplog):
    folder = copy_tree(pairs, tmp_path / "damaged")
    content = (folder / "edited" / "3.png").read_bytes()
    (folder / "edited" / "3.png").write_bytes(content[: len(content) // 2])
    run = small_run(max_train_steps=1, validation_dataset=folder, **QUICK)
    assert "row 3 is left out" in caplog.text and lines(run)[0]["loss"] > 0
    with pytest.raises(UserError, match="--validation_dataset: .*row 3, column edited_image: cannot be decoded"):
        small_run(name="strict", validation_dataset=folder, on_bad_row="error", **QUICK)
    assert not (tmp_path / "strict" / "checkpoint-4").exists()
