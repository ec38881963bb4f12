"""A disk that is too small, full or read-only: said in one line with its path, and nothing finished is lost."""

import errno
import json
import os
import re
import subprocess
import sys

import pytest

from instruct_pix2pix import cli
from tests.conftest import ROOT

# Runs where `disk` is a small file system of its own, and prints the exit code and the last line of every command.
ON_A_SMALL_DISK = """
import contextlib, io, json, logging, os, shutil, subprocess, sys
from pathlib import Path
disk, base, pairs = map(Path, sys.argv[1:])
from data_preparation import build_cartoonization
from evaluation import evaluate
from inference import edit_images
from instruct_pix2pix import cli
from instruct_pix2pix.training import checkpoint
from tests.conftest import run_script
from tools import export_checkpoint
said = {}

def run(name, main, *argv):
    captured, code = io.StringIO(), 0
    with contextlib.redirect_stderr(captured), contextlib.redirect_stdout(io.StringIO()):
        try:
            cli.run(main, [str(argument) for argument in argv])
        except SystemExit as error:
            code = error.code
    said[name] = [code, captured.getvalue().replace(chr(13), chr(10)).strip().splitlines()[-1:]]
    assert "Traceback" not in captured.getvalue(), captured.getvalue()

def train(name, **flags):
    flags = {"pretrained_model_name_or_path": base, "train_data_dir": pairs, "output_dir": disk / "run", "seed": 7,
             "resolution": 64, "train_batch_size": 2, "max_train_steps": 3, "report_to": "none", **flags}
    run(name, lambda _: run_script("finetune", **flags))

def fill(leaving):
    free = shutil.disk_usage(disk).free - leaving
    (disk / "filler").write_bytes(bytes(free))

def mount(options):
    subprocess.run(["mount", "-o", f"remount,{options}", str(disk)], check=True)

train("dry run", dry_run=True, checkpointing_steps=1)
train("too small", checkpointing_steps=1)
assert not (disk / "run").exists()

mount("size=100m")
flush = checkpoint.flush
def then_fill(output_dir):
    flush(output_dir)
    fill(leaving=5_000_000)
checkpoint.flush = then_fill
train("full", checkpointing_steps=1, checkpoints_total_limit=1)
checkpoint.flush = flush
left = sorted(path.name for path in (disk / "run").glob("*checkpoint-*"))
said["left"] = [left, checkpoint.damage(disk / "run" / "checkpoint-1")]

usual = ["--instruction", "blur it", "--steps", 1, "--resolution", 64, "--model_id", base]
usual += ["--output_dir", disk / "edited", "--batch_size", 1]
one = disk / "run" / "checkpoint-1"
run("export", export_checkpoint.main, one, "--output_dir", disk / "pipeline")
run("evaluate", evaluate.main, "--model", base, "--dataset", pairs, "--output_dir", disk / "evaluation")
(disk / "filler").unlink()
fill(leaving=60_000)
run("edit", edit_images.main, pairs / "original", *usual)
run("build", build_cartoonization.main, "--photos", pairs / "original", "--cartoonizer", "opencv", "--output_dir",
    disk / "dataset")
said["edited"] = len(list((disk / "edited").glob("*.png")))
(disk / "filler").unlink()
shutil.rmtree(disk / "dataset")

train("again", checkpointing_steps=1, checkpoints_total_limit=1, resume_from_checkpoint="latest")
run("edit again", edit_images.main, pairs / "original", *usual)
mount("ro")
train("read-only", resume_from_checkpoint="latest", max_train_steps=4)
run("read-only evaluate", evaluate.main, "--model", base, "--dataset", pairs, "--output_dir", disk / "evaluation")
run("read-only edit", edit_images.main, pairs / "original", *usual)
run("read-only build", build_cartoonization.main, "--photos", pairs / "original", "--cartoonizer", "opencv",
    "--output_dir", disk / "dataset")
print(json.dumps(said))
"""


@pytest.mark.slow
def test_on_a_small_disk(base_models, pairs, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=20m tmpfs {disk}"
    if sys.platform != "linux" or subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here, which root or user namespaces would allow")
    command = [sys.executable, "-c", ON_A_SMALL_DISK, str(disk), str(base_models["finetune"]), str(pairs)]
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", f'{mount} && exec "$@"', "sh", *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])

    def check(name: str, code: int, pattern: str) -> None:
        assert said[name][0] == code and re.search(pattern, said[name][1][0]), (name, said[name])

    size = r"\d[\d,.]* MB"
    for name in ("dry run", "too small"):
        check(name, 2, f"error: --output_dir: {disk}/run has too little room: .* takes {size}, free are {size}; make")
    check("full", 2, f"--output_dir: {disk}/run/checkpoint-2 cannot be written .*it needs {size}, free are {size}")
    assert said["left"] == [["checkpoint-1"], None]
    check("export", 2, f"--output_dir: {disk}/pipeline has too little room: the pipeline takes {size}, free are")
    check("evaluate", 2, f"--output_dir: {disk}/evaluation has too little room: the report takes {size}")
    check("edit", 2, f"--output_dir: {disk}/edited cannot be written to .*where {size} are free")
    check("build", 1, f"error: {disk}/dataset/.*: No space left on device; {size} are free there; .*make room")
    assert 0 < said["edited"] < 10
    assert said["again"][0] == said["edit again"][0] == 0
    for name in ("read-only", "read-only evaluate", "read-only edit", "read-only build"):
        check(name, 2, rf"--output_dir: {disk}\S* is not writable; choose another folder")


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, r"No space left on device; [\d,.]+ MB are free there; .* make room and run it again"),
        (errno.EDQUOT, r"Disk quota exceeded; [\d,.]+ MB are free there; .* make room and run it again"),
        (errno.EROFS, "Read-only file system; .* change the rights or name another place"),
        (errno.EACCES, "Permission denied; .* change the rights or name another place"),
    ],
)
def test_what_a_disk_refuses_is_one_line(number, said, tmp_path, capsys):
    def main(_):
        raise OSError(number, os.strerror(number), str(tmp_path / "file"))

    with pytest.raises(SystemExit) as caught:
        cli.run(main)
    [line] = capsys.readouterr().err.splitlines()
    assert caught.value.code == 1 and re.search(f"error: {tmp_path}/file: {said}", line)


def test_a_denied_file_that_nobody_names_stays_a_traceback(capsys):
    def main(_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with pytest.raises(SystemExit):
        cli.run(main)
    assert "Traceback" in capsys.readouterr().err
