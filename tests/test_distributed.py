"""Trainings of several processes, sharded (FSDP2) or not, on a CPU: they train what one process does, and go on."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from instruct_pix2pix.cli import UserError
from tests.conftest import ROOT, assert_same_tensors, copy_tree, losses, run_script, to_argv

UNET = "unet/diffusion_pytorch_model.safetensors"


def close(first: Path, second: Path, atol: float = 2e-4) -> None:
    """Two safetensors files hold the same tensors, to rounding."""
    one, other = load_file(first), load_file(second)
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=atol, msg=name)


def train_in_process(script: str, flags: dict, environment: dict, killed_at: int | None) -> None:
    """One process of a training. Of the first start, rank 1 is killed in update `killed_at`. What noise a rank sees in
    the first update goes into noise-<rank>.safetensors beside the output folder."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    from instruct_pix2pix.training import step
    from instruct_pix2pix.training.inputs import WindowEncoder

    rank, first_start = int(os.environ["RANK"]), os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    encode, run, updates = WindowEncoder.__call__, step.Update.run, []

    def encode_and_tell(self, window):
        if not updates:
            save_file({"noise": window["noise"]}, Path(flags["output_dir"]).parent / f"noise-{rank}.safetensors")
        return encode(self, window)

    def run_or_die(self, *arguments):
        updates.append(None)
        if len(updates) == killed_at and rank == 1 and first_start:
            os.kill(os.getpid(), signal.SIGKILL)
        return run(self, *arguments)

    WindowEncoder.__call__, step.Update.run = encode_and_tell, run_or_die
    run_script(script, **flags)


@pytest.fixture
def launched(base_models, pairs, tmp_path, monkeypatch):
    """`launched(processes, name, script=..., ...)` trains as conftest.small_run does, in processes that torchrun's own
    engine starts and, after a kill, starts again; they are forked from one that has imported all. `sharded` takes
    recipes/accelerate/fsdp2.yaml. Returns the output folder."""
    import multiprocessing

    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # docs/training.md: else no restart joins
    multiprocessing.set_forkserver_preload(["tests.test_distributed", "instruct_pix2pix.training.trainer"])

    def launch(processes, name="run", script="train", sharded=False, killed_at=None, **flags) -> Path:
        defaults = {
            "pretrained_model_name_or_path": base_models[script],
            "train_data_dir": pairs,
            "output_dir": tmp_path / name,
            "resolution": 64,
            "train_batch_size": 4 // processes,
            "gradient_accumulation_steps": 1,
            "max_train_steps": 4,
            "learning_rate": 1e-3,
            "seed": 7,
            "report_to": "none",
        }
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=name,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=1 if killed_at else 0,
            start_method="forkserver",
            monitor_interval=0.1,
            logs_specs=DefaultLogsSpecs(log_dir=str(tmp_path / "logs"), redirects=Std.ALL),
        )
        environment = {"CUDA_VISIBLE_DEVICES": ""} | (fsdp_environment() if sharded else {})
        elastic_launch(config, train_in_process)(script, {**defaults, **flags}, environment, killed_at)
        return tmp_path / name

    return launch


def fsdp_environment(*flags: str) -> dict[str, str]:
    """What `accelerate launch --config_file recipes/accelerate/fsdp2.yaml` sets for its processes."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    command = ["--config_file", str(ROOT / "recipes/accelerate/fsdp2.yaml"), *flags, "train_instruct_pix2pix.py"]
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(command))
    assert args.use_fsdp
    found = prepare_multi_gpu_env(args)
    return {name: value for name, value in found.items() if name.startswith(("FSDP_", "ACCELERATE_"))}


def read_all(name: str) -> str:
    return "\n".join(path.read_text(errors="replace") for path in sorted(Path(name).rglob("stderr.log")))


@pytest.mark.long
@pytest.mark.parametrize("sharded", [False, True], ids=["replicas", "sharded"])
def test_two_processes_train_what_one_does_and_go_on_by_themselves_when_one_is_killed(
    sharded, launched, small_run, pairs, tmp_path
):
    """conv_in is widened on both, noise differs, the sum is the same update, checkpoints and validation do not hang;
    after a kill in the fourth update both start again, and the end is the same to the bit."""
    flags = {
        "checkpointing_steps": 2,
        "use_ema": True,
        "conditioning_dropout_prob": 0.2,
        "validation_dataset": copy_tree(pairs, tmp_path / "held_out"),
        "validation_steps": 3,
        "num_validation_images": 1,
        "keep_best": "loss",
        "resume_from_checkpoint": "latest",
    }
    one = small_run("train", name="one", train_batch_size=4, gradient_accumulation_steps=1, **flags)
    two = launched(2, "two", sharded=sharded, **flags)
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    for file in ("unet/diffusion_pytorch_model.safetensors", "ema.safetensors"):
        close(one / "checkpoint-4" / file, two / "checkpoint-4" / file)
    close(one / UNET, two / UNET)
    assert_same_tensors(two / UNET, two / "checkpoint-4/ema.safetensors")  # what is exported is the average
    for file in ("unet/config.json", "checkpoint-4/unet/config.json"):
        assert (two / file).read_bytes() == (one / file).read_bytes()
    noise = [load_file(tmp_path / f"noise-{rank}.safetensors")["noise"] for rank in (0, 1)]
    assert noise[0].shape == noise[1].shape and not torch.isclose(noise[0], noise[1]).any(dim=0).all()
    measured = [[json.loads(line) for line in (run / "validation_log.jsonl").open()] for run in (two, one)]
    assert [line["step"] for line in measured[0]] == [2, 3, 4]
    assert [line["loss"] for line in measured[0]] == pytest.approx([line["loss"] for line in measured[1]], rel=1e-4)

    killed = launched(2, "killed", sharded=sharded, killed_at=4, **flags)
    assert "training 2 updates of 4 images, 2 process(es) on cpu" in read_all(tmp_path / "logs")  # from checkpoint-2
    assert losses(killed) == losses(two)
    for file in (UNET, *(f"checkpoint-4/{name}" for name in (UNET, "ema.safetensors", "optimizer.safetensors"))):
        assert_same_tensors(killed / file, two / file)


@pytest.mark.slow
def test_four_processes_train_what_one_does(launched, small_run):
    batch = {"gradient_accumulation_steps": 2, "max_train_steps": 3, "use_ema": True}
    four = launched(4, "four", **batch)
    one = small_run("train", name="one", train_batch_size=4, **batch)
    assert losses(four) == pytest.approx(losses(one), rel=1e-5)
    close(one / UNET, four / UNET)


@pytest.mark.slow
def test_a_run_goes_on_with_any_number_of_processes_sharded_or_not(launched, small_run):
    """1 -> 3 sharded -> 2 -> 1, with the effective batch of the one that ran through. Three have pieces of unequal
    size, and none of some tensors."""
    flags = {"gradient_accumulation_steps": 1, "use_ema": True, "resume_from_checkpoint": "latest"}
    one = small_run("train", name="one", train_batch_size=6, max_train_steps=5, **flags)
    changing = small_run("train", name="changing", train_batch_size=6, max_train_steps=1, **flags)
    launched(3, "changing", sharded=True, train_batch_size=2, max_train_steps=3, **flags)
    launched(2, "changing", train_batch_size=3, max_train_steps=4, **flags)
    small_run("train", name="changing", train_batch_size=6, max_train_steps=5, **flags)
    assert losses(changing) == pytest.approx(losses(one), rel=1e-5)
    for file in (UNET, f"checkpoint-5/{UNET}", "checkpoint-5/ema.safetensors"):
        close(one / file, changing / file)


@pytest.mark.slow
def test_adapters_are_sharded_in_bf16_too(launched, small_run, pairs):
    flags = {"lora_rank": 4, "gradient_checkpointing": True, "max_micro_batch_size": 2}
    flags |= {
        "gradient_accumulation_steps": 2,
        "mixed_precision": "bf16",
        "max_train_steps": 3,
        "use_ema": True,
        "offload_ema": True,
    }
    two = launched(2, "two", sharded=True, **flags)
    one = small_run("train", name="one", train_batch_size=4, **flags)
    assert losses(two) == pytest.approx(losses(one), rel=1e-2)
    close(one / "checkpoint-3/adapter.safetensors", two / "checkpoint-3/adapter.safetensors", atol=1e-2)
    close(one / UNET, two / UNET, atol=1e-2)


@pytest.mark.parametrize(
    ("environment", "flags", "message"),
    [
        (
            {"ACCELERATE_USE_DEEPSPEED": "true"},
            {},
            "type DEEPSPEED is not supported; FSDP2 shards what ZeRO-2 and ZeRO-3",
        ),
        ({"FSDP_VERSION": "1"}, {}, "fsdp_version: 1 is not supported; use 2, as recipes/accelerate/fsdp2.yaml does"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, {}, "fsdp_offload_params: true is not supported; use false"),
        (
            {"FSDP_ACTIVATION_CHECKPOINTING": "true"},
            {},
            "fsdp_activation_checkpointing: .* use --gradient_checkpointing",
        ),
        ({}, {"mixed_precision": "fp16"}, "--mixed_precision: fp16"),
        ({}, {"compile": True}, "--compile: cannot be used with FSDP2; leave it out"),
        ({}, {"use_8bit_adam": True}, "--optimizer: adamw8bit cannot be used with FSDP2"),
        (
            {},
            {"max_micro_batch_size": "auto"},
            "--max_micro_batch_size: auto cannot be tried with FSDP2; give a number",
        ),
    ],
)
def test_what_cannot_be_sharded_is_one_line(environment, flags, message, small_run, monkeypatch):
    for name, value in (fsdp_environment() | environment).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        small_run(**flags)


def test_one_process_has_nothing_to_shard(small_run, monkeypatch):
    plain = small_run(name="plain", max_train_steps=1)
    for name, value in fsdp_environment().items():
        monkeypatch.setenv(name, value)
    assert_same_tensors(plain / UNET, small_run(max_train_steps=1) / UNET)


def test_restarts_that_would_fail_are_warned_of(small_run, monkeypatch, caplog):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    small_run(dry_run=True)
    assert "--max-restarts: 3; processes that are started again may not find each other" in caplog.text
    caplog.clear()
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    small_run(dry_run=True)
    assert "--max-restarts" not in caplog.text


# ---- the commands themselves, which import everything anew in each process: make test-long


@pytest.fixture
def command(base_models, pairs, tmp_path):
    """`command(launcher, **flags)`: the Popen arguments of a training on CPUs whose messages go to tmp_path/log."""

    def arguments(*launcher: str, **flags) -> dict:
        defaults = {
            "pretrained_model_name_or_path": base_models["finetune"],
            "train_data_dir": pairs,
            "output_dir": tmp_path / "run",
            "resolution": 64,
            "train_batch_size": 1,
            "seed": 7,
            "report_to": "none",
        }
        program = [Path(sys.executable).with_name("python"), "-m", *launcher, "finetune_instruct_pix2pix.py"]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        log = open(tmp_path / "log", "w")  # noqa: SIM115
        return {"args": [*program, *to_argv({**defaults, **flags})], "cwd": ROOT, "env": environment, "stderr": log}

    return arguments


@pytest.mark.long
def test_the_command_of_the_configuration(command, tmp_path):
    launcher = ("accelerate.commands.launch", "--config_file", "recipes/accelerate/fsdp2.yaml", "--num_processes", "2")
    done = subprocess.run(**command(*launcher, max_train_steps=2), timeout=300)
    assert done.returncode == 0, (tmp_path / "log").read_text()
    assert "2 process(es) on cpu, sharded" in (tmp_path / "log").read_text()
    assert (tmp_path / "run" / "model_index.json").exists()


@pytest.mark.long
@pytest.mark.parametrize("sharded", [False, True], ids=["replicas", "sharded"])
def test_torchrun_starts_a_killed_run_again(sharded, command, tmp_path, monkeypatch):
    for name, value in fsdp_environment().items() if sharded else ():
        monkeypatch.setenv(name, value)
    launcher = ("torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1")
    flags = {"max_train_steps": 60, "checkpointing_steps": 5, "resume_from_checkpoint": "latest"}
    with subprocess.Popen(**command(*launcher, **flags)) as process:
        deadline = time.monotonic() + 200
        while not (tmp_path / "run" / "checkpoint-5").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        psutil.Process(process.pid).children()[1].kill()
        process.wait(timeout=300)
    log = (tmp_path / "log").read_text()
    assert process.returncode == 0, log
    starts = [int(number) for number in re.findall(r"training (\d+) updates of 2 images", log)]
    assert starts[0] == 60 and len(starts) == 2 and starts[1] < 60 and starts[1] % 5 == 0
    assert len(losses(tmp_path / "run")) == 60 and (tmp_path / "run" / "model_index.json").exists()
