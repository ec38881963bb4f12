"""Killed anywhere and run again, everything is as if nothing had happened: by chance, and what chance has found."""

import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT, copy_tree


@pytest.mark.long
def test_what_is_killed_and_run_again_makes_the_same_bytes(tmp_path):
    command = [sys.executable, "tests/soak.py", "--kills=8", "--seed=3", f"--work_dir={tmp_path / 'soak'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    table = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    kills = [list(map(int, kills.split(" / "))) for _, kills, *_ in table]
    assert len(table) == 8 and [sum(column) for column in zip(*kills, strict=True)] == [4, 4]
    for dealt, (_, _, resumed, files, _) in zip(kills, table, strict=True):
        assert int(resumed) == sum(dealt) and (int(files) > 0 or not sum(dealt))
    assert all(int(differing) == 0 for *_, differing in table)


def test_a_picture_that_a_kill_after_its_checkpoint_prevented_is_made_by_the_next_run(small_run, tmp_path):
    flags = {
        "checkpointing_steps": 2,
        "validation_steps": 2,
        "val_image_url": ROOT / "assets/photos/test/sea6.webp",
        "validation_prompt": "blur it",
        "num_validation_images": 1,
    }
    whole = small_run(name="whole", **flags)
    (tmp_path / "killed").mkdir()
    copy_tree(whole / "checkpoint-2", tmp_path / "killed" / "checkpoint-2")
    resumed = small_run(name="killed", resume_from_checkpoint="latest", **flags)
    picture = "validation/step-000002.png"
    assert (resumed / picture).read_bytes() == (whole / picture).read_bytes()


def test_a_checkpoint_that_a_kill_left_beside_the_last_one_goes(small_run):
    flags = {"max_train_steps": 2, "checkpointing_steps": 1}
    output_dir = small_run(checkpoints_total_limit=1, **flags)
    shutil.copytree(output_dir / "checkpoint-2", output_dir / "checkpoint-1")
    small_run(checkpoints_total_limit=1, resume_from_checkpoint="latest", **flags)
    assert [path.name for path in output_dir.glob("checkpoint-*")] == ["checkpoint-2"]
