"""Trainings of several processes, sharded (FSDP2) or not, on a CPU: they train what one process does, and go on."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from instruct_pix2pix.cli import UserError
from tests.conftest import ROOT, assert_same_tensors, losses, run_script

UNET = "unet/diffusion_pytorch_model.safetensors"


def train_in_process(script: str, flags: dict, environment: dict, killed_at: int | None) -> None:
    """One process of a training. Of the first start, rank 1 is killed in update `killed_at`. What noise a rank sees in
    the first update goes into noise-<rank>.pt beside the output folder."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    from instruct_pix2pix.training import step
    from instruct_pix2pix.training.inputs import WindowEncoder

    rank, first_start = int(os.environ["RANK"]), os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    encode, run, updates = WindowEncoder.__call__, step.Update.run, []

    def encode_and_tell(self, window):
        if not updates:
            torch.save(window["noise"], Path(flags["output_dir"]).parent / f"noise-{rank}.pt")
        return encode(self, window)

    def run_or_die(self, *arguments):
        updates.append(None)
        if len(updates) == killed_at and rank == 1 and first_start:
            os.kill(os.getpid(), signal.SIGKILL)
        return run(self, *arguments)

    WindowEncoder.__call__, step.Update.run = encode_and_tell, run_or_die
    run_script(script, **flags)


@pytest.fixture
def launched(base_models, pairs, tmp_path):
    """`launched(processes, name, script=..., ...)` trains as conftest.small_run does, in processes that torchrun's own
    engine starts and, after a kill, starts again; they are forked from one that has imported all. `sharded` takes
    recipes/accelerate/fsdp2.yaml. Returns the output folder."""
    import multiprocessing

    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

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


def test_it(launched, small_run):
    import time
    t=time.time()
    a = launched(2, "a", use_ema=True)
    print("ddp", time.time()-t); t=time.time()
    b = launched(2, "b", use_ema=True, sharded=True)
    print("fsdp", time.time()-t); t=time.time()
    one = small_run("train", name="one", train_batch_size=4, gradient_accumulation_steps=1, use_ema=True)
    print("one", time.time()-t); t=time.time()
    print(losses(a), losses(b), losses(one))
