"""Both scripts from end to end on the tiny base: what they write, that they resume exactly, what they refuse."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import psutil
import pytest
import torch
from accelerate import DistributedType
from diffusers import StableDiffusionInstructPix2PixPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file

from instruct_pix2pix.cli import UserError
from instruct_pix2pix.training import checkpoint as checkpoints
from instruct_pix2pix.training import trainer
from tests.conftest import ROOT, assert_same_tensors, copy_tree, losses, to_argv

UNET = "unet/diffusion_pytorch_model.safetensors"


# ---- what a run leaves


@pytest.mark.parametrize("script", ["train", "finetune"])
def test_a_run_leaves_a_pipeline_that_loads_whole_and_edits(script, small_run, caplog):
    output_dir = small_run(script, use_ema=True, random_flip=True)
    model, report = None, None
    for part in ("unet", "vae", "text_encoder"):
        assert [p.suffix for p in (output_dir / part).iterdir() if p.name != "config.json"] == [".safetensors"]
    model, report = UNet2DConditionModel.from_pretrained(output_dir, subfolder="unet", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and model.config.in_channels == 8
    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(output_dir)
    pipeline.set_progress_bar_config(disable=True)
    photo = Image.open(ROOT / "assets/photos/test/sea6.webp").resize((64, 64))
    edited = pipeline("blur it", image=photo, num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    assert edited.images[0].size == (64, 64)
    config = json.loads((output_dir / "training_config.json").read_text())
    assert config["seed"] == 7 and config["use_ema"] is True and "hub_token" not in config
    summary = json.loads((output_dir / "training_summary.json").read_text())
    assert summary["steps"] == 4 and summary["train_seconds"] > 0 and summary["images_per_update"] == 4
    card = (output_dir / "README.md").read_text()
    assert re.search('"(blur it|make it blurry)",', card)
    published = card.partition("## Training")[2] + (output_dir / "training_config.json").read_text()
    assert "| `--output_dir` | `run` |" in published and str(output_dir.parent) not in published
    assert "tiny-" in card and "`--conditioning_dropout_prob` | `0.05`" in card and "from_pretrained" in card
    assert len(losses(output_dir)) == 4
    assert not list(output_dir.glob(".*"))


def test_the_export_holds_the_average_where_one_is_kept(small_run):
    output_dir = small_run(use_ema=True, checkpointing_steps=4)
    names = load_file(output_dir / UNET)
    average = load_file(output_dir / "checkpoint-4" / "ema.safetensors")
    live = load_file(output_dir / "checkpoint-4" / UNET)
    assert all(torch.equal(names[key], average[key]) for key in names)
    assert any(not torch.equal(live[key], average[key]) for key in names)


# ---- resuming


@pytest.mark.parametrize(
    ("batch", "accumulation", "steps"),
    [
        pytest.param(2, 2, 2, id="in the middle of the first epoch"),  # 8 of 10 rows seen
        pytest.param(3, 2, 3, id="an epoch ended inside an accumulation window"),  # rows 10 is inside update 2
    ],
)
def test_k_plus_k_updates_equal_2k_updates_bit_by_bit(batch, accumulation, steps, small_run, tmp_path):
    """Weights, average, optimizer state and losses, with flips, random crops, dropout and a warmed-up schedule."""
    flags = {
        "train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "max_train_steps": 2 * steps,
        "checkpointing_steps": steps,
        "use_ema": True,
        "random_flip": True,
        "conditioning_dropout_prob": 0.2,
        "embedding_noise": 1.0,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 2,
    }
    whole = small_run(name="whole", **flags)
    # What a run killed after its first checkpoint leaves behind.
    (tmp_path / "halved").mkdir()
    copy_tree(whole / f"checkpoint-{steps}", tmp_path / "halved" / f"checkpoint-{steps}")
    shutil.copy(whole / "training_log.jsonl", tmp_path / "halved")
    halved = small_run(name="halved", resume_from_checkpoint="latest", **flags)
    for file in (UNET, f"checkpoint-{2 * steps}/{UNET}", f"checkpoint-{2 * steps}/ema.safetensors"):
        assert_same_tensors(whole / file, halved / file)
    assert_same_tensors(
        whole / f"checkpoint-{2 * steps}/optimizer.safetensors",
        halved / f"checkpoint-{2 * steps}/optimizer.safetensors",
    )
    assert losses(whole) == losses(halved) and len(losses(whole)) == 2 * steps


def test_resuming_reads_no_sample_that_was_already_seen(small_run, monkeypatch, tmp_path):
    from instruct_pix2pix.data.triples import TripleDataset

    whole = small_run(name="whole", checkpointing_steps=2)
    (tmp_path / "halved").mkdir()
    copy_tree(whole / "checkpoint-2", tmp_path / "halved" / "checkpoint-2")
    positions = []
    original = TripleDataset.__getitem__
    monkeypatch.setattr(TripleDataset, "__getitem__", lambda self, p: positions.append(p) or original(self, p))
    small_run(name="halved", resume_from_checkpoint="checkpoint-2")
    assert sorted(positions) == list(range(8, 16))


def test_a_left_out_seed_is_drawn_written_down_and_kept_on_resume(small_run, tmp_path):
    first = small_run(name="a", seed=None, max_train_steps=2, checkpointing_steps=1)
    second = small_run(name="b", seed=None, max_train_steps=1)
    seeds = [json.loads((run / "training_config.json").read_text())["seed"] for run in (first, second)]
    assert seeds[0] != seeds[1]
    (tmp_path / "c").mkdir()
    copy_tree(first / "checkpoint-1", tmp_path / "c" / "checkpoint-1")
    resumed = small_run(name="c", seed=None, max_train_steps=2, resume_from_checkpoint="latest")
    assert json.loads((resumed / "training_config.json").read_text())["seed"] == seeds[0]
    assert_same_tensors(first / UNET, resumed / UNET)


def test_a_finished_run_asked_to_resume_only_exports_again(small_run):
    output_dir = small_run(checkpointing_steps=4)
    before, summary = load_file(output_dir / UNET), (output_dir / "training_summary.json").read_text()
    small_run(checkpointing_steps=4, resume_from_checkpoint="latest")
    after = load_file(output_dir / UNET)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (output_dir / "training_summary.json").read_text() == summary  # the time that training took, too
    with pytest.raises(UserError, match="--max_train_steps: 3, but .*checkpoint-4 is of update 4; give 4 or more"):
        small_run(checkpointing_steps=4, resume_from_checkpoint="latest", max_train_steps=3)


def test_flags_that_change_on_resume_are_named(small_run, caplog):
    small_run(max_train_steps=1, checkpointing_steps=1)
    small_run(max_train_steps=2, learning_rate=5e-4, resume_from_checkpoint="latest")
    assert "learning_rate 0.001 -> 0.0005" in caplog.text


# ---- output folders


def test_latest_starts_anew_where_there_is_no_checkpoint_yet(small_run):
    assert len(losses(small_run(resume_from_checkpoint="latest"))) == 4


def test_an_earlier_run_is_never_overwritten(small_run):
    small_run(max_train_steps=1, checkpointing_steps=1)
    with pytest.raises(UserError, match="--output_dir: .* holds checkpoint-1 of an earlier run"):
        small_run()
    other = small_run(name="other", max_train_steps=1)
    shutil.rmtree(other / "checkpoint-1")
    with pytest.raises(UserError, match="--output_dir: .* holds a trained pipeline already"):
        small_run(name="other")


def test_a_resumed_run_never_moves_into_the_folder_of_another(small_run):
    """It would write over the other's pipeline, and the limit would remove the other's checkpoints or its own."""
    first, other = small_run(name="first", checkpointing_steps=2), small_run(name="other", max_train_steps=6)
    for folder, reason in (
        (other, "holds checkpoint-6 of an earlier run"),
        (other, "holds a trained pipeline already"),
    ):
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        with pytest.raises(UserError, match=f"--output_dir: .* {reason}"):
            small_run(name="other", resume_from_checkpoint=first / "checkpoint-2", checkpoints_total_limit=1)
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
        shutil.rmtree(other / "checkpoint-6", ignore_errors=True)


def test_files_that_are_not_a_runs_are_never_overwritten(small_run, no_weights, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("my notes")
    with pytest.raises(UserError, match="--output_dir: .* holds README.md, which is not a run's"):
        small_run(name="mine")


def test_the_last_update_is_kept_even_where_the_pipeline_cannot_be_written(small_run, monkeypatch, tmp_path):
    def full(*_, **__):
        raise OSError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(UNet2DConditionModel, "save_pretrained", full)
        with pytest.raises(UserError, match="--output_dir: the pipeline cannot be written into .*No space left"):
            small_run(checkpointing_steps=3)
    kept = [path.name for path in checkpoints.list_checkpoints(tmp_path / "run")]
    assert kept == ["checkpoint-3", "checkpoint-4"] and not list((tmp_path / "run").glob(".*"))
    output_dir = small_run(checkpointing_steps=3, resume_from_checkpoint="latest")
    assert (output_dir / "model_index.json").exists() and len(losses(output_dir)) == 4


def test_a_checkpoint_under_another_name_or_on_another_disk_goes_on(small_run, tmp_path):
    output_dir = small_run(max_train_steps=2, checkpointing_steps=2)
    (output_dir / "checkpoint-2").rename(tmp_path / "elsewhere")
    (output_dir / "checkpoint-2").symlink_to(tmp_path / "elsewhere")
    small_run(max_train_steps=3, checkpointing_steps=9, resume_from_checkpoint="latest")
    (output_dir / "checkpoint-2").unlink()
    (output_dir / "checkpoint-3").rename(output_dir / "best")
    assert len(losses(small_run(resume_from_checkpoint="best"))) == 4


def test_an_older_checkpoint_does_not_branch_off_in_the_same_folder(small_run):
    output_dir = small_run(checkpointing_steps=2)
    with pytest.raises(UserError, match="--resume_from_checkpoint: checkpoint-2 is not the newest.*move checkpoint-4"):
        small_run(resume_from_checkpoint="checkpoint-2")
    branch = small_run(name="branch", resume_from_checkpoint=output_dir / "checkpoint-2", max_train_steps=4)
    assert_same_tensors(branch / UNET, output_dir / UNET)


def test_a_bad_row_met_in_training_keeps_the_updates_before_it(small_run, pairs, tmp_path, monkeypatch):
    folder = copy_tree(pairs, tmp_path / "damaged")
    content = (folder / "edited" / "3.png").read_bytes()
    (folder / "edited" / "3.png").write_bytes(content[: len(content) // 2])
    flags = {"gradient_accumulation_steps": 1, "train_batch_size": 1, "max_train_steps": 20}
    write, written = trainer.write_checkpoint, []
    monkeypatch.setattr(trainer, "write_checkpoint", lambda *state: written.append(state[1]) or write(*state))
    for name, every in (("often", 1), ("run", 500)):
        with pytest.raises(UserError, match="row 3, column edited_image: cannot be decoded"):
            small_run(name=name, train_data_dir=folder, on_bad_row="error", checkpointing_steps=every, **flags)
    kept = checkpoints.list_checkpoints(tmp_path / "run")
    assert len(kept) == 1
    last = int(kept[0].name.removeprefix("checkpoint-"))
    assert written == [*range(1, last + 1), last]  # what is there is not written again
    (folder / "edited" / "3.png").write_bytes(content)
    mended = small_run(train_data_dir=folder, resume_from_checkpoint="latest", **flags)
    whole = small_run(name="whole", **flags)
    assert losses(mended) == losses(whole)
    assert_same_tensors(mended / UNET, whole / UNET)


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGINT, 0), (signal.SIGTERM, 1)])
def test_a_run_that_is_stopped_keeps_the_update_it_was_at(number, workers, small_run, monkeypatch, tmp_path):
    """The signal comes in the middle of the third update, to loader processes too, as a terminal and a cluster do."""
    from instruct_pix2pix.training.inputs import WindowEncoder

    flags = {"use_ema": True, "max_train_steps": 5, "dataloader_num_workers": workers}
    encode, calls = WindowEncoder._encode, []

    def noted(*arguments):
        calls.append(None)
        if len(calls) == 3:
            for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
                process.send_signal(number)
        return encode(*arguments)

    monkeypatch.setattr(WindowEncoder, "_encode", noted)
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        small_run(**flags)
    assert signal.getsignal(number) == before
    assert [path.name for path in checkpoints.list_checkpoints(tmp_path / "run")] == ["checkpoint-3"]
    resumed = small_run(resume_from_checkpoint="latest", **flags)
    whole = small_run(name="whole", **flags)
    assert losses(resumed) == losses(whole)
    assert_same_tensors(resumed / UNET, whole / UNET)


def test_what_nobody_foresaw_ends_with_its_traceback_and_leaves_no_process(base_models, pairs, tmp_path):
    code = """
import sys
from instruct_pix2pix.training.step import Update
import finetune_instruct_pix2pix
from instruct_pix2pix.cli import run

def broken(*_):
    raise RuntimeError("a kernel that does not work")

Update.run = broken
run(finetune_instruct_pix2pix.main, sys.argv[1:])
"""
    flags = {
        "pretrained_model_name_or_path": base_models["finetune"],
        "train_data_dir": pairs,
        "output_dir": tmp_path / "run",
        "resolution": 64,
        "max_train_steps": 2,
        "dataloader_num_workers": 1,
        "report_to": "none",
    }
    command = [sys.executable, "-c", code, *to_argv(flags)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("RuntimeError: a kernel that does not work")


def test_a_second_signal_does_not_wait():
    from instruct_pix2pix.training.stopping import StopRequest

    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.noted
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)


# ---- numbers that are none

DIVERGING = {
    "train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "max_train_steps": 40,
    "checkpointing_steps": 1,
    "checkpoints_total_limit": 1,
}


@pytest.fixture
def loss_goes_wrong(monkeypatch):
    """`loss_goes_wrong({3, 4})`: the losses of these updates of a run are no numbers."""
    from instruct_pix2pix.training import step

    def choose(updates: set[int]) -> None:
        real, calls = step.sample_losses, []

        def loss(*arguments):
            calls.append(None)
            return real(*arguments) * (float("nan") if len(calls) in updates else 1.0)

        monkeypatch.setattr(step, "sample_losses", loss)

    return choose


def test_training_that_diverges_stops_and_keeps_the_last_sound_checkpoint(small_run, loss_goes_wrong, tmp_path, capsys):
    from instruct_pix2pix.cli import run

    loss_goes_wrong({3})  # the weights are no numbers from then on, and so are all further losses
    with pytest.raises(SystemExit) as caught:
        run(lambda argv: small_run(**DIVERGING))
    assert caught.value.code == 1
    message = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(message) == 1 and "row of update 3" in message[0]
    assert re.search(r"rows \d+, timesteps \d+", message[0])
    (kept,) = checkpoints.list_checkpoints(tmp_path / "run")
    assert kept.name == "checkpoint-2"
    assert all(tensor.isfinite().all() for tensor in load_file(kept / UNET).values())
    assert not (tmp_path / "run" / "model_index.json").exists()
    assert len(losses(tmp_path / "run")) < 10


def test_a_run_whose_last_update_is_not_finite_exports_nothing(small_run, loss_goes_wrong, tmp_path):
    loss_goes_wrong({4})
    with pytest.raises(UserError, match="a row of update 4, makes training diverge"):
        small_run(**DIVERGING | {"max_train_steps": 4})
    assert [path.name for path in checkpoints.list_checkpoints(tmp_path / "run")] == ["checkpoint-3"]
    assert not (tmp_path / "run" / "model_index.json").exists()


def test_the_rows_and_timesteps_named_are_those_that_were_trained_on(small_run, monkeypatch):
    from instruct_pix2pix.data.triples import TripleDataset

    seen, described = [], {}
    sample, finish = TripleDataset.__getitem__, trainer.finish

    def noted(self, position):
        found = sample(self, position)
        _, index = self.order.locate(position)
        seen.append((int(self.triples.indices[index]), found["timestep"]))
        return found

    def describe(run, summary):
        described.update({step: run.describe_update(step) for step in (1, 4)})
        finish(run, summary)

    monkeypatch.setattr(TripleDataset, "__getitem__", noted)
    monkeypatch.setattr(trainer, "finish", describe)
    small_run()
    for step, text in described.items():
        rows, times = zip(*seen[4 * (step - 1) : 4 * step], strict=True)
        assert text == f"rows {' '.join(map(str, rows))}, timesteps {' '.join(map(str, times))}"


def test_a_skipped_update_of_a_loss_scale_is_no_divergence(tmp_path):
    from types import SimpleNamespace

    from instruct_pix2pix.training.log import Diverged, Log

    def watched(entries, scaler):
        config = SimpleNamespace(learning_rate=1.0, max_train_steps=100)
        accelerator = SimpleNamespace(scaler=scaler)
        log = SimpleNamespace(
            not_finite=[],
            run=SimpleNamespace(
                config=config, accelerator=accelerator, describe_update=lambda step: "rows 1, timesteps 2"
            ),
        )
        Log._watch(log, [{"step": i, "loss": a, "grad_norm": b} for i, (a, b) in enumerate(entries, start=1)])
        return log.not_finite

    inf, nan = float("inf"), float("nan")
    skipped = [(0.1, inf)] * 5
    assert watched(skipped, scaler="a loss scale") == []
    with pytest.raises(Diverged):
        watched(skipped, scaler=None)
    with pytest.raises(Diverged):
        watched([(nan, inf)] * 3, scaler="a loss scale")
    assert watched([(nan, 1.0), (0.1, 1.0), (nan, 1.0)], scaler=None) == [3]


# ---- validation and tracking


def test_validation_shows_pictures_and_changes_nothing(small_run):
    flags = {"use_ema": True, "conditioning_dropout_prob": 0.3, "random_flip": True}
    plain = small_run(name="plain", **flags)
    watched = small_run(
        name="watched",
        val_image_url=ROOT / "assets/photos/test/sea6.webp",
        validation_prompt="blur it",
        validation_steps=2,
        num_validation_images=2,
        report_to="tensorboard",
        **flags,
    )
    assert losses(plain) == losses(watched)
    assert_same_tensors(plain / UNET, watched / UNET)
    sheets = sorted((watched / "validation").iterdir())
    assert [sheet.name for sheet in sheets] == ["step-000002.png", "step-000004.png"]
    width, height = Image.open(sheets[0]).size
    assert height > 128 and width > 3 * 128  # three pictures, the instruction below
    events = next((watched / "logs").rglob("events.out.tfevents.*")).read_bytes()
    assert b"validation" in events and b"grad_norm" in events and b"images_per_second" in events


def test_validation_by_epochs_happens_when_an_epoch_is_complete(small_run):
    output_dir = small_run(
        max_train_steps=6,
        validation_epochs=1,
        num_validation_images=1,
        val_image_url=ROOT / "assets/photos/test/sea6.webp",
        validation_prompt="blur it",
    )
    # Ten rows, four a step: the first epoch is complete in update 3, the second in update 5; 6 is the end.
    names = sorted(path.name for path in (output_dir / "validation").iterdir())
    assert names == ["step-000003.png", "step-000005.png", "step-000006.png"]


def test_an_unreachable_validation_address_is_warned_of_and_training_goes_on(small_run, caplog):
    output_dir = small_run(
        max_train_steps=1, val_image_url="http://127.0.0.1:9/mountain.png", validation_prompt="blur it"
    )
    assert "--val_image_url: http://127.0.0.1:9/mountain.png cannot be read" in caplog.text
    assert (output_dir / "model_index.json").exists() and not (output_dir / "validation").exists()


def test_a_validation_that_needs_too_much_memory_is_left_out(small_run, monkeypatch, caplog):
    from instruct_pix2pix.training import validation

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(validation, "show_edits", full)
    photo = ROOT / "assets/photos/test/sea6.webp"
    output_dir = small_run(val_image_url=photo, validation_prompt="blur it", validation_steps=2)
    assert (output_dir / "model_index.json").exists() and len(losses(output_dir)) == 4
    assert caplog.text.count("lower --num_validation_images") == 2


@pytest.mark.slow
def test_wandb_records_offline_and_never_sees_the_token(base_models, pairs, tmp_path):
    token = "hf_averysecrettoken0123456789"
    flags = {
        "pretrained_model_name_or_path": base_models["finetune"],
        "train_data_dir": pairs,
        "output_dir": tmp_path / "run",
        "resolution": 64,
        "train_batch_size": 2,
        "max_train_steps": 2,
        "report_to": "wandb,tensorboard",
        "hub_token": token,
        "checkpointing_steps": 1,
        "val_image_url": ROOT / "assets/photos/test/sea6.webp",
        "validation_prompt": "blur it",
        "num_validation_images": 1,
    }
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment.update(HOME=str(tmp_path), NETRC=str(tmp_path / "none"))
    done = subprocess.run(
        [sys.executable, ROOT / "finetune_instruct_pix2pix.py", *to_argv(flags)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "recording offline" in done.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    recorded = [path for path in files if "wandb" in path.parts and path.suffix == ".wandb"]
    assert recorded and b"grad_norm" in recorded[0].read_bytes()
    assert any("table" in path.name or path.suffix == ".png" for path in files if "wandb" in path.parts)
    for path in files:
        assert token.encode() not in path.read_bytes(), path
    assert token not in done.stdout + done.stderr


# ---- several processes of the loader, see test_distributed.py for those of a training


def test_workers_do_not_change_what_is_trained(small_run):
    inline = small_run(name="inline", random_flip=True)
    workers = small_run(name="workers", random_flip=True, dataloader_num_workers=2)
    assert losses(inline) == losses(workers)


# ---- precision and attention


def test_gradient_checkpointing_is_bitwise_the_same(small_run):
    assert losses(small_run(name="a")) == losses(small_run(name="b", gradient_checkpointing=True))


def test_xformers_that_cannot_be_used_is_one_line_and_training_goes_on(small_run, caplog):
    small_run(max_train_steps=1, enable_xformers_memory_efficient_attention=True)
    lines = [record.getMessage() for record in caplog.records if "xformers cannot" in record.getMessage()]
    assert len(lines) == 1 and "scaled-dot-product" in lines[0] and "\n" not in lines[0]


@pytest.mark.slow
def test_bf16_trains_validates_and_exports_the_frozen_parts_unrounded(small_run, base_models, pairs):
    watched = {"val_image_url": pairs / "original/0.png", "validation_prompt": "blur it", "num_validation_images": 1}
    output_dir = small_run(max_train_steps=2, mixed_precision="bf16", train_batch_size=1, **watched)
    assert (output_dir / "validation" / "step-000002.png").exists()
    assert_same_tensors(
        output_dir / "vae/diffusion_pytorch_model.safetensors",
        base_models["finetune"] / "vae/diffusion_pytorch_model.safetensors",
    )
    assert all(tensor.dtype == torch.float32 for tensor in load_file(output_dir / UNET).values())


@pytest.mark.skipif(torch.accelerator.is_available(), reason="asks for fp16 where there is no GPU")
@pytest.mark.parametrize("how", ["flag", "launcher"])
def test_fp16_without_a_gpu_is_refused(how, small_run, monkeypatch):
    if how == "launcher":
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(UserError, match="--mixed_precision: fp16 needs a GPU.*bf16 or no"):
        small_run(mixed_precision="fp16" if how == "flag" else None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_fp16_trains_on_a_gpu_with_loss_scaling(small_run):
    output_dir = small_run(max_train_steps=4, mixed_precision="fp16", use_ema=True, checkpointing_steps=4)
    state = checkpoints.read_state(output_dir / "checkpoint-4")
    assert state["loss_scaler"]["scale"] > 1
    assert all(loss == loss for loss in losses(output_dir))


# ---- mistakes, before any weight is loaded


@pytest.fixture
def no_weights(monkeypatch):
    """Fails the test if a mistake is noticed only after weights were loaded."""
    from instruct_pix2pix.models import sd as components

    def loaded(*_):
        raise AssertionError("weights were loaded before the mistake was noticed")

    monkeypatch.setattr(components, "load_frozen", loaded)
    monkeypatch.setattr(components, "load_unet", loaded)


def test_each_script_names_the_other_for_the_wrong_kind_of_model(small_run, base_models, no_weights):
    with pytest.raises(UserError, match="4-channel UNet.*train_instruct_pix2pix.py"):
        small_run("finetune", pretrained_model_name_or_path=base_models["train"])
    with pytest.raises(UserError, match="8-channel UNet.*finetune_instruct_pix2pix.py"):
        small_run("train", pretrained_model_name_or_path=base_models["finetune"])


def test_models_that_cannot_be_used(small_run, base_models, no_weights, tmp_path):
    with pytest.raises(UserError, match="--pretrained_model_name_or_path: /no/such/folder is not a folder"):
        small_run(pretrained_model_name_or_path="/no/such/folder")
    with pytest.raises(UserError, match="cannot read unet of nobody/no-such-model"):
        small_run(pretrained_model_name_or_path="nobody/no-such-model")
    partial = copy_tree(base_models["finetune"], tmp_path / "partial")
    (partial / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match="unet holds no weights"):
        small_run(pretrained_model_name_or_path=partial)
    shutil.rmtree(partial / "vae")
    with pytest.raises(UserError, match="has no vae/config.json"):
        small_run(pretrained_model_name_or_path=partial)


def test_models_of_another_family_are_named(small_run, base_models, no_weights, tmp_path):
    other = copy_tree(base_models["train"], tmp_path / "xl")
    config = json.loads((other / "unet" / "config.json").read_text())
    (other / "unet" / "config.json").write_text(json.dumps(config | {"addition_embed_type": "text_time"}))
    with pytest.raises(UserError, match="addition_embed_type text_time, which .* as Stable Diffusion XL's does"):
        small_run("train", pretrained_model_name_or_path=other)


def test_processes_that_do_not_join_are_refused(small_run, no_weights, monkeypatch):
    from accelerate import Accelerator

    given = {}
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(Accelerator, "__init__", lambda self, **options: given.update(options))
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.NO)
    monkeypatch.setattr(Accelerator, "num_processes", 1)
    with pytest.raises(UserError, match="WORLD_SIZE: 2 processes were started, but accelerate joins 1"):
        small_run()
    # Processes that do join wait for the one that downloads, hashes or uploads: longer than NCCL's own ten minutes.
    (patience,) = (handler.timeout for handler in given["kwargs_handlers"])
    assert patience.total_seconds() > 6 * 3600


def test_broken_weights_are_one_line(small_run, base_models, tmp_path):
    broken = copy_tree(base_models["finetune"], tmp_path / "broken")
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot read unet of") as caught:
        small_run(pretrained_model_name_or_path=broken)
    assert "\n" not in str(caught.value)


def test_a_resolution_that_does_not_fit_names_its_neighbours(small_run, no_weights):
    with pytest.raises(UserError, match=r"--resolution: 70 is not a multiple of 16.*use 64 or 80"):
        small_run(resolution=70)


def test_a_wrong_column_is_noticed_before_weights_load(small_run, no_weights):
    with pytest.raises(UserError, match="--edit_prompt_column: words is not a column"):
        small_run(edit_prompt_column="words")


def test_a_local_validation_file_that_is_no_image(small_run, no_weights, tmp_path):
    (tmp_path / "note.png").write_text("not an image")
    with pytest.raises(UserError, match="--val_image_url: .*note.png is not a readable image"):
        small_run(val_image_url=tmp_path / "note.png", validation_prompt="blur it")


def test_dry_run_prints_the_resolved_configuration_and_loads_nothing(small_run, no_weights, capsys, tmp_path):
    small_run(dry_run=True, num_train_epochs=3, max_train_steps=None)
    printed = json.loads(capsys.readouterr().out)
    assert printed["updates"] == 8 and printed["images_per_update"] == 4 and printed["dataset"]["rows"] == 10
    assert printed["flags"]["conditioning_dropout_prob"] == 0.05 and printed["flags"]["max_train_steps"] == 8
    assert not (tmp_path / "run").exists()


def test_instructions_that_the_text_encoder_cuts_are_counted_once(small_run, pairs, tmp_path, capsys, caplog):
    folder = copy_tree(pairs, tmp_path / "wordy")
    (folder / "instructions.txt").write_text("blur it\n" + "make the image very blurry " * 20 + "\n")
    small_run(train_data_dir=folder, dry_run=True)
    assert json.loads(capsys.readouterr().out)["dataset"]["instructions_cut"] == 1
    assert caplog.text.count("1 instruction(s) are cut: the text encoder reads 77 tokens") == 1
    small_run(dry_run=True)
    assert json.loads(capsys.readouterr().out)["dataset"]["instructions_cut"] == 0


def test_a_warm_up_that_eats_the_run_is_said(small_run, caplog):
    small_run(dry_run=True, lr_scheduler="constant")
    assert "warm-up" not in caplog.text
    small_run(dry_run=True, lr_scheduler="cosine")
    assert "--lr_warmup_steps: 4 of the 4 updates are warm-up" in caplog.text


@pytest.mark.parametrize(
    ("flags", "rates"),
    [
        # Two cosines from 1 to 0, and (1 - progress) ** 2.
        ({"lr_scheduler": "cosine_with_restarts", "lr_num_cycles": 2}, [1.0, 0.5, 1.0, 0.5]),
        ({"lr_scheduler": "polynomial", "lr_power": 2.0}, [1.0, 0.5625, 0.25, 0.0625]),
    ],
)
def test_schedules_restart_and_bend_as_their_flags_say(flags, rates, small_run):
    output_dir = small_run(learning_rate=1e-3, lr_warmup_steps=0, **flags)
    log = (output_dir / "training_log.jsonl").read_text().splitlines()
    assert [json.loads(line)["learning_rate"] / 1e-3 for line in log] == pytest.approx(rates, abs=1e-3)


def test_scale_lr_multiplies_once(small_run, capsys):
    small_run(dry_run=True, scale_lr=True, learning_rate=1e-4)
    assert json.loads(capsys.readouterr().out)["flags"]["learning_rate"] == pytest.approx(4e-4)


def test_training_without_dropout_is_allowed_and_warned_about(small_run, caplog):
    small_run(dry_run=True, conditioning_dropout_prob=0)
    assert "guidance will not work" in caplog.text
