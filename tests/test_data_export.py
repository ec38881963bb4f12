"""export_to_hub.py against a Hub on loopback, and datasets on that Hub as the source of photos."""

import json
import subprocess
import sys

import pytest

from tests.conftest import copy_tree
from tests.data_scripts import ROOT, checksums, make_photos, plan_of, run
from tests.loopback_hub import loopback_hub

SCRIPT = "export_to_hub.py"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("built")
    photos = make_photos(folder / "photos", 24)
    run("build_cartoonization.py", "--cartoonizer", "opencv", "--photos", photos, "--output_dir", folder / "dataset",
        "--rows_per_shard", 10)  # fmt: skip
    return folder / "dataset"


def in_a_client(hub, code: str, *arguments: str):
    """Run code in an interpreter that knows the loopback Hub; what it prints last is JSON."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], env=hub.environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_pushed_folder_is_loaded_from_the_hub(tmp_path, dataset):
    with loopback_hub(tmp_path / "hub") as hub:
        out = run(SCRIPT, dataset, "tester/cartoons", "--private", env=hub.environment())
        assert "tester/cartoons" in out and hub.url in out
        sent = [name for name in checksums(dataset) if name != "plan.jsonl"]
        assert set(hub.files("tester/cartoons", "dataset")) - {".gitattributes"} == set(sent)
        code = (
            "import datasets, json, sys; d = datasets.load_dataset('tester/cartoons'); "
            "print(json.dumps([{s: len(rows) for s, rows in d.items()}, d['train'][0]['original_image'].size]))"
        )
        counts, size = in_a_client(hub, code)
        splits = [row["split"] for row in plan_of(dataset)]
        assert counts == {split: splits.count(split) for split in set(splits)} and min(size) == 64

        # Again: nothing to upload. After a rebuild with other shards: the old ones go.
        pushes = len(hub.pushes("tester/cartoons", "dataset"))
        run(SCRIPT, dataset, "tester/cartoons", env=hub.environment())
        run("build_cartoonization.py", "--cartoonizer", "opencv", "--photos", dataset.parent / "photos", "--output_dir",
            tmp_path / "rebuilt")  # fmt: skip
        run(SCRIPT, tmp_path / "rebuilt", "tester/cartoons", env=hub.environment())
        names = hub.files("tester/cartoons", "dataset")
        assert {name for name in names if name.startswith("data/")} == {
            name for name in checksums(tmp_path / "rebuilt") if name.startswith("data/")
        }
        assert len(hub.pushes("tester/cartoons", "dataset")) <= pushes + 2


@pytest.mark.slow
def test_photos_from_a_dataset_on_the_hub(tmp_path, dataset):
    """As Imagenette is kept: a script, and the Hub's conversion of it beside; once more without the Hub."""
    code = """
import sys
from huggingface_hub import HfApi
api = HfApi()
api.create_repo("tester/imagenette", repo_type="dataset")
where = dict(repo_id="tester/imagenette", repo_type="dataset")
api.upload_file(path_or_fileobj=b"raise SystemExit", path_in_repo="imagenette.py", **where)
api.create_branch(branch="refs/convert/parquet", **where)
for config in ("160px", "320px"):
    for split, path in (("train", sys.argv[1]), ("validation", sys.argv[2])):
        api.upload_file(path_or_fileobj=path, path_in_repo=f"{config}/{split}/0000.parquet",
                        revision="refs/convert/parquet", **where)
print("null")
"""
    shards = sorted(dataset.glob("data/train-*.parquet"))[:2]
    arguments = ("--cartoonizer", "opencv", "--dataset", "tester/imagenette", "--image_column", "original_image",
                 "--max_short_side", 32)  # fmt: skip
    with loopback_hub(tmp_path / "hub") as hub:
        in_a_client(hub, code, *shards)
        build = "build_cartoonization.py"
        message = run(build, *arguments, "--output_dir", tmp_path / "no", env=hub.environment(), fails=2)
        assert "--dataset_config: tester/imagenette has 160px, 320px" in message
        arguments += ("--dataset_config", "320px")
        run(build, *arguments, "--output_dir", tmp_path / "one", env=hub.environment())
        splits = [row["split"] for row in plan_of(tmp_path / "one")]
        assert splits.count("train") == 10 and splits.count("validation") == 10
        message = run(build, "--cartoonizer", "opencv", "--dataset", "tester/none", "--output_dir", tmp_path / "no",
                      env=hub.environment(), fails=2)  # fmt: skip
        assert "--dataset: tester/none" in message
        offline = hub.environment(HF_HUB_OFFLINE="1")
    run(build, *arguments, "--output_dir", tmp_path / "two", env=offline)
    assert checksums(tmp_path / "one")["plan.jsonl"] == checksums(tmp_path / "two")["plan.jsonl"]


def test_a_row_that_cannot_be_used_is_named_before_anything_is_uploaded(tmp_path, dataset):
    import pyarrow.parquet as pq

    folder = copy_tree(dataset, tmp_path / "damaged")
    shard = sorted(folder.glob("data/test-*.parquet"))[0]
    table = pq.read_table(shard)
    rows = table.to_pylist()
    rows[0]["cartoonized_image"]["bytes"] = b"not an image"
    pq.write_table(table.from_pylist(rows, schema=table.schema), shard)
    with loopback_hub(tmp_path / "hub") as hub:
        message = run(SCRIPT, folder, "tester/damaged", env=hub.environment(), fails=2)
        assert f"FOLDER: {folder}: row 0, column cartoonized_image: not a readable image" in message
        assert not hub.exists("tester/damaged", "dataset")


def test_mistakes_are_one_line(tmp_path, dataset):
    assert "FOLDER" in run(SCRIPT, tmp_path / "gone", "tester/x", fails=2)
    assert "no finished dataset" in run(SCRIPT, ROOT, "tester/x", fails=2)
    with loopback_hub(tmp_path / "hub") as hub:
        message = run(SCRIPT, dataset, "not a name", env=hub.environment(), fails=2)
        assert "REPO_ID: not a name" in message and "USER/NAME" in message
        message = run(SCRIPT, dataset, "tester/x", env=hub.environment() | {"HF_TOKEN": "hf_wrong"}, fails=2)
        assert "token" in message
        nobody = {name: value for name, value in hub.environment().items()} | {"HF_TOKEN": ""}
        assert "token" in run(SCRIPT, dataset, "tester/x", env=nobody, fails=2)
    message = run(SCRIPT, dataset, "tester/x", env=hub.environment(), fails=2)  # the Hub is gone by now
    assert "REPO_ID: tester/x" in message
