"""The launch files: parsed, run against stubs of srun, torchrun and hf, their commands read by the real parser."""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from accelerate import Accelerator

from instruct_pix2pix.training import checkpoint as checkpoints
from instruct_pix2pix.training.options import parse_args
from instruct_pix2pix.training.stopping import StopRequest
from tests.conftest import ROOT, to_argv
from tests.test_recipes import PUBLISHED

LAUNCH = ROOT / "recipes/launch"
TRAINING = ["finetune_instruct_pix2pix.py", "--config", "recipes/launch/run.yaml"]


def test_processes_leave_a_stop_together(small_run, monkeypatch, tmp_path):
    """A launcher ends the others once one is gone, and the main process may still be writing the checkpoint."""
    meet, write, met = Accelerator.wait_for_everyone, checkpoints._write, []

    def slow_write(*arguments):
        time.sleep(0.5)
        write(*arguments)

    def met_when(self):
        met.append((tmp_path / "run/checkpoint-1").is_dir())
        meet(self)

    monkeypatch.setattr(checkpoints, "_write", slow_write)
    monkeypatch.setattr(Accelerator, "wait_for_everyone", met_when)
    monkeypatch.setattr(StopRequest, "all_ranks_agree", lambda *_: True)
    with pytest.raises(KeyboardInterrupt):
        small_run()
    assert met[-1]


# ---- against stubs


@pytest.fixture
def stubs(tmp_path):
    """`stubs(srun="shell script", ...)` puts executables on a PATH and returns an environment with it."""

    def make(**scripts: str) -> dict[str, str]:
        (tmp_path / "bin").mkdir()
        for name, script in scripts.items():
            (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
            (tmp_path / "bin" / name).chmod(0o755)
        return os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "RECORD": str(tmp_path / "record")}

    return make


# The words that a stub was called with, and of its environment what a process of a training is told by.
RECORD = f"""exec {shlex.quote(sys.executable)} -c '
import json, os, sys
told = {{name: os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}}
with open(os.environ["RECORD"], "a") as file:
    file.write(json.dumps([sys.argv[1:], told]) + "\\n")
sys.exit(int(os.environ.get("CODE", "0")))
' """
# As Slurm's: a task for each GPU, told its number, and the highest exit code of all.
SRUN = """while [[ $1 == -* ]]; do shift; done
worst=0
for SLURM_PROCID in 0 1; do
  SLURM_PROCID=$SLURM_PROCID SLURM_LOCALID=$((SLURM_PROCID % 2)) SLURM_NTASKS=2 "$@" & tasks+=($!)
done
for task in "${tasks[@]}"; do
  wait "$task" || { code=$?; [ $code -le $worst ] || worst=$code; }
done
exit $worst"""
# More hosts than a pipe holds, so that a reader who leaves early is noticed.
SCONTROL = """case $1 in
  show) echo "$NODES"; seq -f node%g 3 20000 ;;
  requeue) echo "requeue $2" >> "$RECORD.requeued" ;;
esac"""
JOB = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_CPUS_PER_TASK": "2", "NODES": "node1\nnode2"}


def records(environment: dict) -> list:
    lines = Path(environment["RECORD"]).read_text().splitlines()
    return [json.loads(line) for line in lines]


def training_flags(words: list[str]):
    """What the real parser makes of a recorded training command."""
    assert (ROOT / words[0]).is_file() and words[0] in ("finetune_instruct_pix2pix.py", "train_instruct_pix2pix.py")
    return parse_args("", words[1:])


def torchrun(words: list[str]) -> tuple:
    """The settings and the command of recorded words behind `torchrun`, by PyTorch's own parser."""
    from torch.distributed.run import get_args_parser

    settings = get_args_parser().parse_args(words)
    return settings, [settings.training_script, *settings.training_script_args]


@pytest.mark.parametrize("file", ["slurm.sbatch", "hf_jobs.sh"])
def test_bash_parses_it(file):
    subprocess.run(["bash", "-n", LAUNCH / file], check=True)


def test_the_example_of_a_file_of_flags_is_the_published_run(monkeypatch):
    monkeypatch.chdir(ROOT)
    flags = vars(parse_args("", TRAINING[1:]))
    assert {name: flags[name] for name in PUBLISHED} == PUBLISHED
    assert flags["resume_from_checkpoint"] == "latest"


@pytest.mark.parametrize(("code", "queued_again"), [(0, False), (130, True), (1, False)])
def test_slurm_starts_a_process_for_each_task_and_queues_a_stopped_job_again(code, queued_again, stubs):
    environment = stubs(srun=SRUN, scontrol=SCONTROL, python=RECORD + '"$@"') | JOB | {"CODE": str(code)}
    command = ["bash", LAUNCH / "slurm.sbatch", *TRAINING, "--seed=1"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, "")
    queued = Path(environment["RECORD"] + ".requeued")
    assert queued.exists() == queued_again and (not queued_again or queued.read_text() == "requeue 4711\n")
    ranks = {}
    for words, told in records(environment):
        flags = training_flags(words)
        assert (flags.seed, flags.resume_from_checkpoint, flags.resolution) == (1, "latest", 256)
        assert (told["WORLD_SIZE"], told["MASTER_ADDR"], told["MASTER_PORT"]) == ("2", "node1", "24711")
        ranks[told["RANK"]] = told["LOCAL_RANK"]
    assert ranks == {"0": "0", "1": "1"}


def test_slurms_signal_comes_to_the_tasks_alone_and_in_time():
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    options = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in lines if line.startswith("#SBATCH"))
    commands = [number for number, line in enumerate(lines) if line and not line.startswith("#")]
    assert all(number < commands[0] for number, line in enumerate(lines) if line.startswith("#SBATCH"))
    assert re.fullmatch(r"TERM@\d+", options["signal"])  # with B: it would go to the script, and end it
    assert "requeue" in options and options["open-mode"] == "append"
    assert options["ntasks-per-node"] == options["gpus-per-node"]


def test_hf_jobs_keep_their_checkpoints_on_the_hub(stubs):
    environment = stubs(hf=RECORD + '"$@"') | {"IMAGE": "owner/image", "HUB_MODEL_ID": "owner/model"}
    command = ["bash", LAUNCH / "hf_jobs.sh", *TRAINING]
    subprocess.run(command, env=environment, cwd=ROOT, check=True)
    ((words, _),) = records(environment)
    hf = [sys.executable, "-c", "from huggingface_hub.cli.hf import main; main()"]
    real = [*hf, *words[:2], "--dry-run", *words[2:]]
    shown = subprocess.run(real, env=os.environ | {"HF_TOKEN": "hf_secret"}, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert "HF_TOKEN=***" in shown.stdout and "hf_secret" not in shown.stdout + " ".join(words)
    settings, training = torchrun(words[words.index("torchrun") + 1 :])
    assert settings.standalone and settings.nproc_per_node == "gpu"
    flags = training_flags(training)
    assert (flags.push_to_hub, flags.hub_model_id) == (True, "owner/model")
    assert (flags.hub_strategy, flags.resume_from_checkpoint) == ("checkpoint", "hub")
    del environment["HUB_MODEL_ID"]
    missing = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert missing.returncode != 0 and "HUB_MODEL_ID: name the repository" in missing.stderr


# The names of SkyPilot's task schema that the file uses; an unknown one is refused by it.
TASK = {"name", "workdir", "num_nodes", "resources", "envs", "secrets", "file_mounts", "setup", "run"}
RESOURCES = {"accelerators", "use_spot", "disk_size", "job_recovery"}


def test_skypilot_recovers_a_job_from_the_bucket(stubs):
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert task.keys() == TASK and task["resources"].keys() == RESOURCES
    assert task["resources"]["use_spot"] and task["resources"]["job_recovery"]["max_restarts_on_errors"] > 0
    assert task["secrets"] == {"HF_TOKEN": None}
    machine = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "8", "SKYPILOT_NODE_RANK": "1"}
    machine["SKYPILOT_NODE_IPS"] = "10.0.0.1\n10.0.0.2"
    environment = stubs(torchrun=RECORD + '"$@"', pip=RECORD + '"$@"') | task["envs"] | machine
    for part in ("setup", "run"):
        subprocess.run(["bash", "-euc", task[part]], env=environment, cwd=ROOT, check=True)
    (installed, _), (words, _) = records(environment)
    assert installed[:2] == ["install", "-r"] and (ROOT / installed[2]).is_file()
    settings, training = torchrun(words)
    assert (settings.nnodes, settings.nproc_per_node, settings.node_rank) == ("2", "8", 1)
    assert settings.master_addr == "10.0.0.1"
    flags = training_flags(training)
    (bucket,) = task["file_mounts"]
    assert flags.output_dir.startswith(f"{bucket}/") and task["file_mounts"][bucket]["mode"] == "MOUNT_CACHED"
    assert (flags.resume_from_checkpoint, flags.checkpoints_total_limit) == ("latest", 2)


def test_the_image_is_made_of_files_that_are_there_and_of_the_requirements():
    text = (LAUNCH / "Dockerfile").read_text()
    lines = [shlex.split(line) for line in text.replace("\\\n", " ").splitlines() if line and not line.startswith("#")]
    copied = [word for line in lines if line[0] == "COPY" for word in line[1:-1]]
    assert all((ROOT / word).exists() for word in copied)
    folders = [line[1:] for line in lines if line[0] == "COPY" and len(line) == 3]
    assert all(source == target for source, target in folders)  # COPY of a folder leaves its name out
    default = next(line[1].partition("=")[2] for line in lines if line[0] == "ARG")
    (install,) = [line[1:] for line in lines if line[:3] == ["RUN", "pip", "install"]]
    assert install == ["pip", "install", "--no-cache-dir", "--requirement", "$REQUIREMENTS"]
    before = copied[: copied.index("instruct_pix2pix") + 1]
    for name in (default, "requirements-gpu.txt"):  # and what that reads in turn
        assert {name, "pyproject.toml", "README.md"} <= set(before)
        others = re.findall(r"^(?:-r|--requirement) (\S+)", (ROOT / name).read_text(), re.MULTILINE)
        assert set(others) <= set(before)
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    scripts = {path.split("/")[0] for path in tracked} - {"tests", "benchmarks"}
    assert not tracked or scripts <= set(copied)
    assert lines[-1][0] == "CMD"


# ---- and with real processes


@pytest.mark.long
def test_slurms_signal_stops_two_processes_in_a_checkpoint(stubs, base_models, pairs, tmp_path):
    """The stub of srun sends the signal once the training has begun; both tasks end, and the job is queued again."""
    started = tmp_path / "run/training_log.jsonl"
    send = f"(until [ -s {started} ]; do sleep 0.2; done; kill -TERM ${{tasks[@]}}) &\n"
    environment = stubs(srun=SRUN.replace("for task in", send + "for task in"), scontrol=SCONTROL) | JOB
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    flags = {
        "pretrained_model_name_or_path": base_models["finetune"],
        "train_data_dir": pairs,
        "output_dir": tmp_path / "run",
        "resolution": 64,
        "train_batch_size": 1,
        "max_train_steps": 2000,
        "seed": 7,
        "report_to": "none",
    }
    environment["NODES"] = "localhost"
    command = ["bash", LAUNCH / "slurm.sbatch", TRAINING[0], *to_argv(flags)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 130, done.stderr
    assert Path(environment["RECORD"] + ".requeued").read_text() == "requeue 4711\n"
    (kept,) = checkpoints.list_checkpoints(tmp_path / "run")
    state = json.loads((kept / "state.json").read_text())
    assert state["samples_seen"] == 2 * state["step"] and 0 < state["step"] < 2000
