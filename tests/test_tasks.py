"""Tasks by clusters, datasets of them, and the experiment that leaves a cluster out."""

import hashlib
import json
import shutil

import numpy as np
import pytest

from data_preparation import build_generic_edits, build_tasks
from instruct_pix2pix.building import generic_edits, tasks
from instruct_pix2pix.building.photos import decode_image
from instruct_pix2pix.building.tasks import CLUSTERS, COMPOUNDS, TASKS, compound
from instruct_pix2pix.cli import UserError
from instruct_pix2pix.models.tiny import build_tokenizer
from tests.conftest import ROOT
from tests.data_scripts import checksums, make_photos, pixels, plan_of, read_rows
from tools import flan

WHOLE = ("--validation_fraction", "0", "--test_fraction", "0")


@pytest.fixture(scope="module")
def tile() -> np.ndarray:
    photo = decode_image((ROOT / "assets/photos/test/kingfisher.webp").read_bytes())
    return generic_edits.cut_tile(photo, 32, np.random.default_rng(0))


# --- tasks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*TASKS, *COMPOUNDS])
def test_a_task_changes_the_image_and_its_seed_decides_how(name, tile):
    before = tile.copy()
    source, target = tasks.make_pair(name, tile, np.random.default_rng(1))
    for side in (source, target):
        assert side.shape == tile.shape and side.dtype == np.uint8
    assert np.abs(source.astype(int) - target).mean() > 1
    assert np.array_equal(tile, before)
    again = tasks.make_pair(name, tile, np.random.default_rng(1))
    assert np.array_equal(source, again[0]) and np.array_equal(target, again[1])
    if name in TASKS:  # one side is the image itself
        assert np.array_equal(target if TASKS[name].cluster == "restoration" else source, tile)


def test_there_are_enough_tasks_with_wordings_of_which_no_training_has_the_held_out():
    assert len(CLUSTERS) >= 6 and len(TASKS) >= 24 and len(COMPOUNDS) == len(TASKS)
    training = [wording for task in TASKS.values() for wording in task.wordings]
    assert len(set(training)) == len(training)  # no two tasks are asked for in the same words
    for task in (*TASKS.values(), *COMPOUNDS.values()):
        assert task.wordings and task.held_out and not set(training) & set(task.held_out)
        assert len(task.wordings) == (tasks.MOST_WORDINGS if task.name in TASKS else 3)
    for task in COMPOUNDS.values():
        assert len({TASKS[part].cluster for part in task.parts}) == 2


def test_the_tiny_model_knows_the_words():
    tokenizer = build_tokenizer()
    words = {word for task in TASKS.values() for text in (*task.wordings, *task.held_out) for word in text.split()}
    # Held out, both: tools/make_tiny_words.py sees no held-out wording.
    assert {word for word in words if len(tokenizer(word).input_ids) > 3} == {"highlights", "mosaic"}


def test_a_compound_undoes_what_is_degraded_and_edits_what_is_edited(tile):
    foggy, _ = TASKS["dehaze"].pair(tile, np.random.default_rng(2))
    for pair in (("dehaze", "invert"), ("invert", "dehaze")):
        task = compound(*map(TASKS.get, pair))
        source, target = task.pair(tile, np.random.default_rng(2))
        assert np.array_equal(source, foggy) and np.array_equal(target, 255 - tile)
    assert task.wordings[0] == "invert the colors, then dehaze the image"


# --- datasets -------------------------------------------------------------------------------------------


def build(folder, photos, *flags):
    build_tasks.main(["--photos", str(photos), "--tile", "32", "--output_dir", str(folder), *map(str, flags)])
    return folder


def test_a_dataset_of_tasks_is_the_same_to_the_byte_after_a_kill(tmp_path):
    photos = make_photos(tmp_path / "photos", 8)
    flags = ("--tasks", "tint", "denoise", "compound", "--rows", 60, "--rows_per_shard", 20)
    whole, parts = (build(tmp_path / name, photos, *flags) for name in ("whole", "parts"))
    for name in ("README.md", "data/train-00001-of-00003.parquet"):  # as a kill might have left it
        (parts / name).unlink()
    build(parts, photos, *flags)
    assert {**checksums(parts), "README.md": ""} == {**checksums(whole), "README.md": ""}


def test_a_dataset_has_the_tasks_in_turn_in_so_many_wordings(tmp_path):
    photos = make_photos(tmp_path / "photos", 30)
    few = build(tmp_path / "few", photos, "--tasks", "tone", "gray", "--rows", 36, "--wordings", 2, *WHOLE)
    assert [row["task"] for row in plan_of(few)] == [*CLUSTERS["tone"], "gray"] * 6
    for row in read_rows(few, "train"):
        assert row["edit_prompt"] in TASKS[row["task"]].wordings[:2]
        assert not np.array_equal(pixels(row["original_image"]), pixels(row["edited_image"]))
    held_out = ("--test_fraction", "0.5", "--validation_fraction", "0", "--all_instructions")
    every = build(tmp_path / "every", photos, "--tasks", "gray", "--rows", 40, *held_out)
    assert {tuple(row["edit_prompt"]) for row in read_rows(every, "train")} == {tuple(TASKS["gray"].wordings)}
    assert {tuple(row["edit_prompt"]) for row in read_rows(every, "test")} == {tuple(TASKS["gray"].held_out)}


def test_mistakes_are_said_in_one_line(tmp_path):
    with pytest.raises(UserError, match="--tasks: 'tints' is no task and no cluster; the nearest is 'tint'"):
        build(tmp_path / "tints", ROOT / "assets/photos", "--tasks", "tints")
    with pytest.raises(UserError, match="--photos: missing"):
        build_tasks.main(["--tasks", "tint", "--output_dir", str(tmp_path / "none")])


def test_generic_edits_are_still_the_rows_they_were(tmp_path):
    """Tasks, wordings and places of the tiles, as when the two builders had nothing in common."""
    photos = make_photos(tmp_path / "photos", 8)  # of the tile's size, or a little wider: nothing is resized
    folder = tmp_path / "edits"
    build_generic_edits.main(["--photos", str(photos), "--rows", "60", "--output_dir", str(folder), *WHOLE])
    digest = hashlib.sha256()
    for row in read_rows(folder, "train"):
        if row["task"] != "keep":
            clean = row["edited_image" if row["task"] in generic_edits.RESTORATIONS else "original_image"]
            digest.update(f"{row['task']}: {row['edit_prompt']}".encode() + pixels(clean).tobytes())
    assert digest.hexdigest() == "8a70afcbd47969951cc57569abe6c55c8ed62be9495dc010b6f9d2a684ca25b1"


# --- the experiment -------------------------------------------------------------------------------------


def test_fewer_tasks_are_the_first_of_more_and_none_is_of_the_cluster_left_out():
    for cluster in CLUSTERS:
        every = flan.training_tasks(cluster, 0, seed=1)
        assert {task.name for task in every} == set(TASKS) - set(CLUSTERS[cluster])
        assert flan.training_tasks(cluster, 4, seed=1) == every[:4] != flan.training_tasks(cluster, 4, seed=2)


@pytest.mark.long
def test_two_runs_end_to_end_and_the_second_call_goes_on(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(ROOT)
    for split in ("train", "test"):
        (tmp_path / "photos" / split).mkdir(parents=True)
        for path in sorted((ROOT / "assets/photos" / split).glob("*.webp"))[:4]:
            shutil.copy(path, tmp_path / "photos" / split)
    flags = f"--held_out tint --num_tasks 4 --wordings 2 --updates 2 --rows 16 --images 4 --photos {tmp_path}/photos"
    flags = [*flags.split(), "--keep", "--output_dir", str(tmp_path / "flan")]
    results = tmp_path / "flan/results.jsonl"
    flan.main([*flags, "--seeds", "0"])
    (first,) = results.read_text().splitlines()
    capfd.readouterr()
    flan.main([*flags, "--seeds", "0", "1"])
    lines = results.read_text().splitlines()
    assert lines[0] == first and len(lines) == 2
    said = capfd.readouterr().out
    assert "run 2 of 2: {'seed': 1, 'held_out': 'tint', 'num_tasks': 4, 'wordings': 2}" in said and "run 1" not in said
    for line in map(json.loads, lines):
        rows = read_rows(tmp_path / f"flan/runs/tint-4-2-{line['seed']}/dataset", "train")
        assert len(rows) == 16 and {row["task"] for row in rows} == set(line["tasks"])
        assert not set(line["tasks"]) & set(CLUSTERS["tint"])
        for row in rows:
            assert row["edit_prompt"] == TASKS[row["task"]].wordings[:2]
        for measured in line["measured"].values():
            assert len(measured["gain"]) == len(measured["cost"]) == 4 and np.isfinite(measured["gain"]).all()
    table = (tmp_path / "flan/table.md").read_text()
    assert table in said and "| 4 | 2 | " in table and (tmp_path / "flan/plot.png").stat().st_size > 10_000
    with pytest.raises(UserError, match="--output_dir: .*results.jsonl is of other settings"):
        flan.main([*flags, "--updates", "3"])


def test_the_tables_have_the_means_of_all_runs_fewest_tasks_first(tmp_path):
    def line(num_tasks: int, wordings: int, gains: list[float], seed: int = 0) -> dict:
        measured = dict.fromkeys(flan.KINDS, {"gain": gains, "cost": [1.0] * len(gains)})
        return dict(zip(flan.RUN, (seed, "tint", num_tasks, wordings), strict=True)) | {"measured": measured}

    lines = [line(0, 1, [5.0, 7.0]), line(12, 5, [-2.0, -2.0]), line(0, 1, [6.0, 6.0]), line(0, 1, [0.0] * 8, seed=1)]
    rows = [row for row in flan.report(lines, tmp_path).splitlines() if row.startswith(("| 12", "| all"))]
    assert [row[:28] for row in rows[:2]] == ["| 12 | 5 | 0 | -2.00 [-2.00,", "| all | 1 | 0 | +6.00 [+5.25"]
    assert rows[2].startswith("| all | 1 | 1 | +0.00") and rows[3].startswith("| all | 1 | all | +2.00")
    assert rows[5].startswith("| all | 1 | 0 | +1.00 [+1.00, +1.00]")
    # Of each run's edits, the cluster's tasks in turn: the first and the seventh are of the first of six.
    told = dict(row.split(" | ")[1:3] for row in (tmp_path / "table.md").read_text().splitlines() if "| tint |" in row)
    assert (
        told["warm"].startswith("+2.75 ") and told["cool"].startswith("+3.25 ") and told["yellow"].startswith("+0.00")
    )
    assert told["all of these"].startswith("+2.00 ") and "| color | gray |  |  |" in (tmp_path / "table.md").read_text()
