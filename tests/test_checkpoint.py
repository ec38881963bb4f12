"""Checkpoints: whole or not there, written beside training, with any optimizer's state, and without local paths."""

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import types
from pathlib import Path

import psutil
import pytest
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline
from safetensors.torch import load_file, save_file
from torch.optim.optimizer import register_optimizer_step_post_hook

from instruct_pix2pix.cli import UserError
from instruct_pix2pix.models import sd
from instruct_pix2pix.training import checkpoint as checkpoints
from tests.conftest import ROOT, assert_same_tensors, copy_tree, losses, to_argv

UNET = "unet/diffusion_pytorch_model.safetensors"


def names(output_dir: Path) -> list[str]:
    return [path.name for path in checkpoints.list_checkpoints(output_dir)]


# ---- whole or not there


def test_only_the_newest_checkpoints_are_kept_and_stay_so_on_resume(small_run):
    output_dir = small_run(checkpointing_steps=1, checkpoints_total_limit=2)
    assert names(output_dir) == ["checkpoint-3", "checkpoint-4"]
    small_run(max_train_steps=6, checkpointing_steps=1, checkpoints_total_limit=2, resume_from_checkpoint="latest")
    assert names(output_dir) == ["checkpoint-5", "checkpoint-6"]


def test_a_failure_while_a_checkpoint_is_written_leaves_the_last_one_in_use(small_run, monkeypatch, tmp_path):
    real = checkpoints.write_json

    def fail_in_the_second(path, content):
        if path.parent.name == ".checkpoint-2.partial":
            raise OSError("No space left on device")
        real(path, content)

    monkeypatch.setattr(checkpoints, "write_json", fail_in_the_second)
    with pytest.raises(UserError, match="--output_dir: .*/checkpoint-2 cannot be written .No space.*needs .* MB, free"):
        small_run(checkpointing_steps=1, checkpoints_total_limit=1)
    monkeypatch.setattr(checkpoints, "write_json", real)
    output_dir = tmp_path / "run"
    assert names(output_dir) == ["checkpoint-1"]
    assert not list(output_dir.glob(".checkpoint-2.partial"))  # the disk is full already
    small_run(checkpointing_steps=1, checkpoints_total_limit=1, resume_from_checkpoint="latest")
    assert names(output_dir) == ["checkpoint-4"]
    assert not list(output_dir.glob(".*"))


KILL_WHILE_WRITING = """
import os, signal, sys
from instruct_pix2pix.training import checkpoint
flush_tree = checkpoint.flush_tree
def kill_in_the_second_checkpoint(path):
    if ".checkpoint-2.partial" in str(path):
        os.kill(os.getpid(), signal.SIGKILL)
    flush_tree(path)
checkpoint.flush_tree = kill_in_the_second_checkpoint
from finetune_instruct_pix2pix import main
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_run_killed_while_writing_a_checkpoint_goes_on_from_the_one_before(base_models, pairs, small_run, tmp_path):
    output_dir = tmp_path / "run"
    flags = {
        "pretrained_model_name_or_path": base_models["finetune"],
        "train_data_dir": pairs,
        "output_dir": output_dir,
        "resolution": 64,
        "train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_train_steps": 4,
        "learning_rate": 1e-3,
        "seed": 7,
        "report_to": "none",
        "checkpointing_steps": 1,
    }
    done = subprocess.run(
        [sys.executable, "-c", KILL_WHILE_WRITING, *to_argv(flags)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert names(output_dir) == ["checkpoint-1"]
    small_run(checkpointing_steps=1, resume_from_checkpoint="latest")
    uninterrupted = small_run(name="uninterrupted")
    assert_same_tensors(output_dir / UNET, uninterrupted / UNET)


def test_a_kill_while_an_old_checkpoint_goes_leaves_nothing_of_it(small_run, monkeypatch):
    output_dir = small_run(max_train_steps=3, checkpointing_steps=1)

    def killed(folder):
        (folder / "state.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        checkpoints.remove_old(output_dir, 2)
    checkpoints.remove_partial(output_dir)
    checkpoints.remove_old(output_dir, 2)
    assert sorted(path.name for path in output_dir.glob("*checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]


def test_checkpoints_that_cannot_be_resumed_from(small_run, tmp_path):
    with pytest.raises(UserError, match="--resume_from_checkpoint: .*nowhere does not exist"):
        small_run(resume_from_checkpoint=str(tmp_path / "nowhere"))
    output_dir = small_run(max_train_steps=1, checkpointing_steps=1)
    optimizer = output_dir / "checkpoint-1" / "optimizer.safetensors"
    optimizer.write_bytes(optimizer.read_bytes()[:-10])
    with pytest.raises(UserError, match="no whole checkpoint in .*: checkpoint-1 .optimizer.safetensors has"):
        small_run(resume_from_checkpoint="latest")
    (output_dir / "checkpoint-1" / "state.json").unlink()
    with pytest.raises(UserError, match="checkpoint-1 is damaged .no readable state.json"):
        small_run(resume_from_checkpoint="checkpoint-1")


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def blank(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


DAMAGES = {
    "state.json is missing": ("state.json", Path.unlink, "no readable state.json"),
    "state.json is cut short": ("state.json", cut_short, "no readable state.json"),
    "state.json is another's": ("state.json", lambda file: file.write_text('{"step": 4}'), "no readable state.json"),
    "state.json is nested": ("state.json", lambda file: file.write_text("[" * 10**6), "no readable state.json"),
    "a file is missing": ("ema.safetensors", Path.unlink, "ema.safetensors is missing"),
    "a file is cut short": ("optimizer.safetensors", cut_short, "optimizer.safetensors has [0-9]+ bytes instead of"),
    "a power cut left zeros": (UNET, blank, f"{UNET} holds no tensors"),
}


@pytest.fixture(scope="module")
def four_updates(base_models, pairs, tmp_path_factory) -> Path:
    """checkpoint-1 to checkpoint-4 of a run with --use_ema."""
    from tests.conftest import run_script

    output_dir = tmp_path_factory.mktemp("four") / "run"
    flags = {"pretrained_model_name_or_path": base_models["finetune"], "train_data_dir": pairs, "resolution": 64}
    flags |= {"train_batch_size": 2, "gradient_accumulation_steps": 2, "max_train_steps": 4, "learning_rate": 1e-3}
    flags |= {"seed": 7, "report_to": "none", "use_ema": True, "checkpointing_steps": 1, "output_dir": output_dir}
    run_script("finetune", **flags)
    return output_dir


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(damage, four_updates, tmp_path, caplog):
    file, spoil, reason = DAMAGES[damage]
    output_dir = copy_tree(four_updates, tmp_path / "run")
    spoil(output_dir / "checkpoint-4" / file)
    assert checkpoints.find_checkpoint("latest", output_dir) == output_dir / "checkpoint-3"
    [line] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert re.fullmatch(f"damaged: checkpoint-4 .{reason}.*; going on from .*/checkpoint-3, the newest whole one", line)
    with pytest.raises(UserError, match=f"--resume_from_checkpoint: .*checkpoint-4 is damaged .{reason}"):
        checkpoints.find_checkpoint("checkpoint-4", output_dir)
    for step in (1, 2, 3):
        spoil(output_dir / f"checkpoint-{step}" / file)
    with pytest.raises(
        UserError, match=f"no whole checkpoint in .*: checkpoint-4 .{reason}.*, checkpoint-1 "
    ) as caught:
        checkpoints.find_checkpoint("latest", output_dir)
    assert "\n" not in str(caught.value)


def test_damaged_checkpoints_do_not_count_and_are_made_again(four_updates, small_run, tmp_path):
    """With a limit of one, and the two newest damaged: the last whole one stays until there is a newer whole one."""
    output_dir = copy_tree(four_updates, tmp_path / "run")
    for step in (3, 4):
        cut_short(output_dir / f"checkpoint-{step}" / UNET)
    flags = {
        "use_ema": True,
        "checkpointing_steps": 1,
        "checkpoints_total_limit": 1,
        "resume_from_checkpoint": "latest",
    }
    small_run(max_train_steps=3, **flags)
    assert names(output_dir) == ["checkpoint-3", "checkpoint-4"]
    assert [checkpoints.damage(path) is None for path in checkpoints.list_checkpoints(output_dir)] == [True, False]
    small_run(max_train_steps=4, **flags)
    assert names(output_dir) == ["checkpoint-4"] and checkpoints.damage(output_dir / "checkpoint-4") is None
    for file in (UNET, "ema.safetensors", "optimizer.safetensors"):
        assert_same_tensors(output_dir / "checkpoint-4" / file, four_updates / "checkpoint-4" / file)


# ---- what is in them


def test_8bit_adam_checkpoints_resumes_bit_by_bit_and_exports(small_run, base_models, tmp_path):
    flags = {"use_8bit_adam": True, "use_ema": True, "checkpointing_steps": 2, "conditioning_dropout_prob": 0.2}
    whole = small_run(name="whole", **flags)
    state = load_file(whole / "checkpoint-2" / "optimizer.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.uint8, torch.float32}  # small tensors stay whole
    maps = [name for name in state if name.rsplit("/", 1)[1].startswith("qmap")]
    assert len(maps) == 2  # which all parameters share

    copy_tree(whole / "checkpoint-2", tmp_path / "halved" / "checkpoint-2")
    shutil.copy(whole / "training_log.jsonl", tmp_path / "halved")
    halved = small_run(name="halved", resume_from_checkpoint="latest", **flags)
    assert losses(whole) == losses(halved) and len(losses(whole)) == 4
    for file in (UNET, *(f"checkpoint-4/{file}" for file in (UNET, "ema.safetensors", "optimizer.safetensors"))):
        assert_same_tensors(whole / file, halved / file)
    ends = [checkpoints.read_state(run / "checkpoint-4") for run in (whole, halved)]
    assert ends[0]["optimizer"] == ends[1]["optimizer"]

    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(halved)
    before = load_file(base_models["finetune"] / UNET)
    after = pipeline.unet.state_dict()
    assert all(tensor.isfinite().all() for tensor in after.values())
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_the_kind_of_adam_cannot_change_on_resume(small_run):
    small_run(max_train_steps=1)
    with pytest.raises(UserError, match="--optimizer: the checkpoint was made with adamw; give the flag as it was"):
        small_run(use_8bit_adam=True, resume_from_checkpoint="latest")


def test_moments_come_back_laid_out_as_their_parameters_are():
    """channels_last, which --compile uses on a GPU: kernels that fuse tensors want one layout."""

    def build(layout):
        model = torch.nn.Conv2d(4, 8, 3).to(memory_format=layout)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        model(torch.ones(1, 4, 5, 5)).sum().backward()
        optimizer.step()
        return dict(model.named_parameters()), optimizer

    parameters, optimizer = build(torch.contiguous_format)
    tensors, rest = checkpoints.flatten_optimizer(optimizer, parameters)
    parameters, optimizer = build(torch.channels_last)
    checkpoints.restore_optimizer(optimizer, parameters, tensors, rest)
    moment = optimizer.state[parameters["weight"]]["exp_avg"]
    assert moment.stride() == parameters["weight"].stride() and torch.equal(moment, tensors["weight/exp_avg"])


def test_weights_lie_in_memory_as_pytorch_lays_them(small_run):
    """Mapped from a file they begin at any address, on which the last bit of a product may depend: a training that goes
    on from its own file would leave the course of one that was never stopped."""
    flags = {"pretrained_model_name_or_path": None, "lora_rank": None}
    folder = small_run(max_train_steps=1) / "checkpoint-1"
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    for length in range(1, 9):  # the header's length is a multiple of 8, so this moves the tensors behind it
        save_file(load_file(file), file, {"format": "pt", "note": "." * 8 * length})
        unet = sd.load_unet(types.SimpleNamespace(**flags), folder)
        assert not any(parameter.data_ptr() % 64 for parameter in unet.parameters())


def test_a_checkpoint_names_no_path_of_this_machine(small_run, tmp_path):
    whole = small_run(name="whole", checkpointing_steps=2)
    copy_tree(whole / "checkpoint-2", tmp_path / "halved" / "checkpoint-2")
    halved = small_run(name="halved", checkpointing_steps=2, resume_from_checkpoint="latest")
    first, second = ((run / "checkpoint-4/unet/config.json").read_text() for run in (whole, halved))
    assert first == second and "_name_or_path" not in json.loads(first) and str(tmp_path) not in first


# ---- beside training


def test_training_goes_on_while_a_checkpoint_is_written(small_run, monkeypatch):
    """The checkpoint of update 2 is held up until update 3 is done, and still holds update 2."""
    flags = {"use_ema": True, "checkpointing_steps": 2}
    first = small_run(name="first", max_train_steps=2, **flags) / "checkpoint-2"
    write, steps, third_is_done = checkpoints._write, [], threading.Event()

    def note(*_):
        steps.append(None)
        if len(steps) == 3:
            third_is_done.set()

    def late_write(*arguments):
        assert third_is_done.wait(timeout=60)
        write(*arguments)

    monkeypatch.setattr(checkpoints, "_write", late_write)
    hook = register_optimizer_step_post_hook(note)
    try:
        late = small_run(name="late", max_train_steps=3, **flags) / "checkpoint-2"
    finally:
        hook.remove()
    for file in (UNET, "ema.safetensors", "optimizer.safetensors"):
        assert_same_tensors(first / file, late / file)


def test_a_checkpoint_that_cannot_be_copied_is_written_at_once(small_run, monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="instruct_pix2pix")
    flags = {"use_ema": True, "use_8bit_adam": True, "checkpointing_steps": 2}
    copied = small_run(name="copied", **flags)
    assert "written while training waits" not in caplog.text
    monkeypatch.setattr(checkpoints, "available_memory", lambda: 2**16)
    at_once = small_run(name="at_once", **flags)
    assert "checkpoint-2 is written while training waits" in caplog.text
    for file in (UNET, "ema.safetensors", "optimizer.safetensors"):
        for step in (2, 4):
            first, second = (run / f"checkpoint-{step}" / file for run in (at_once, copied))
            assert_same_tensors(first, second)


GIB = 2**30
VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
VERSION_2 = ("memory.max", "memory.current", "inactive_file")


@pytest.mark.parametrize(
    ("groups", "folders", "free"),
    [
        pytest.param(None, {}, 64, id="no groups, as on macOS"),
        pytest.param("0::/", {}, 64, id="a group without a limit"),
        pytest.param("0::/", {"sys/fs/cgroup": (VERSION_2, 16, 10, 3)}, 9, id="a container sees its group as the root"),
        pytest.param("0::/a", {"sys/fs/cgroup/a": (VERSION_2, "max", 10, 3)}, 64, id="no limit said in words"),
        pytest.param(
            "0::/a/b",
            {"sys/fs/cgroup/a": (VERSION_2, 16, 15, 1), "sys/fs/cgroup/a/b": (VERSION_2, 16, 4, 0)},
            2,
            id="the group above is nearly full",
        ),
        pytest.param("0::/a", {"sys/fs/cgroup/a": (VERSION_2, 500, 4, 0)}, 64, id="more than the host has"),
        pytest.param("0::/a", {"sys/fs/cgroup/a": (VERSION_2, 4, 5, 0)}, 0, id="over a limit that was lowered"),
        pytest.param("0::/../x", {"sys/fs/cgroup": (VERSION_2, 8, 2, 0)}, 6, id="a group outside what is mounted"),
        pytest.param(
            "5:devices:/a\n4:memory:/a\n0::/",
            {"sys/fs/cgroup/memory/a": (VERSION_1, 16, 12, 1), "sys/fs/cgroup/memory": (VERSION_1, 2**33, 12, 1)},
            5,
            id="version 1",
        ),
        pytest.param(
            "4:memory:/docker/0123", {"sys/fs/cgroup/memory": (VERSION_1, 16, 12, 1)}, 5, id="version 1 in a container"
        ),
    ],
)
def test_free_memory_is_the_containers(groups, folders, free, monkeypatch, tmp_path):
    """Sizes in GiB; the host has 64 to give."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: types.SimpleNamespace(available=64 * GIB))
    if groups is not None:
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text(groups + "\n")
    for folder, ((limit_file, usage_file, cache), limit, usage, inactive) in folders.items():
        os.makedirs(tmp_path / folder, exist_ok=True)
        (tmp_path / folder / limit_file).write_text(f"{limit if limit == 'max' else limit * GIB}\n")
        (tmp_path / folder / usage_file).write_text(f"{usage * GIB}\n")
        (tmp_path / folder / "memory.stat").write_text(f"anon 5\n{cache} {inactive * GIB}\nactive_file 7\n")
    assert checkpoints.available_memory(tmp_path) == free * GIB
