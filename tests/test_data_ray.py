"""The builders on Ray and onto an object storage (moto's server on loopback): the same bytes as the local builder's."""

import os
import runpy
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from PIL import Image

from instruct_pix2pix.cli import UserError
from tests.data_scripts import PHOTOS, SCRIPTS, checksums, make_photos, skipped_of

OPENCV = ("build_cartoonization.py", "--cartoonizer", "opencv")


def build(script: str, *arguments) -> None:
    """Run a build script in this process. The cards show one command, whatever the flags that must not matter."""
    main = runpy.run_path(str(SCRIPTS / script), run_name="script")["main"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script])
        main([*map(str, arguments)])


@pytest.fixture(scope="module")
def cluster(storage):
    """One Ray for this file's tests, as --ray starts it."""
    import ray

    from instruct_pix2pix.building.on_ray import connect

    connect("local")
    yield ray
    ray.shutdown()


def kill_actors(times: int, dataset: Path, killed: list[int]) -> None:
    """SIGKILL an actor each time that another shard has appeared."""
    for wanted in range(1, times + 1):
        while len(list(dataset.glob("data/*.parquet"))) < wanted or not (found := find_actors()):
            time.sleep(0.01)
        if not (dataset / "README.md").exists():
            found[0].kill()
            killed.append(found[0].pid)


def find_actors() -> list[psutil.Process]:
    actors = []
    for process in psutil.Process().children(recursive=True):
        try:
            if any("ShardMaker" in word for word in process.cmdline()):
                actors.append(process)
        except psutil.Error:  # one that has just ended
            pass
    return actors


@pytest.mark.long
def test_same_bytes_with_workers_killed_and_a_bad_image(tmp_path, cluster):
    """Of 41 pictures one is cut short, which costs its row; two of the actors are killed while they work."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for path in PHOTOS[:40]:
        Image.open(path).convert("RGB").resize((320, 240)).save(photos / f"{path.stem}.png")
    whole = (photos / f"{PHOTOS[0].stem}.png").read_bytes()
    (photos / "short.png").write_bytes(whole[: len(whole) // 2])
    arguments = (*OPENCV, "--photos", photos, "--rows_per_shard", 2)
    build(*arguments, "--output_dir", tmp_path / "local")

    killed: list[int] = []
    dataset = tmp_path / "ray"
    killer = threading.Thread(target=kill_actors, args=(2, dataset, killed), daemon=True)
    killer.start()
    build(*arguments, "--output_dir", dataset, "--ray", "--ray_actors", 2)
    killer.join(60)
    assert len(set(killed)) == 2, "finished before they could be killed: give it more photos"
    assert not any(psutil.pid_exists(pid) for pid in killed)
    assert checksums(dataset) == checksums(tmp_path / "local")
    assert list(skipped_of(dataset)) == ["short.png"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, flags",
    [
        ("build_low_level.py", ("--synthesize", 30, "--tile", 64)),
        pytest.param("build_generic_edits.py", ("--rows", 30, "--tile", 32), marks=pytest.mark.long),
        pytest.param(
            "build_tasks.py", ("--tasks", "style", "compound", "--rows", 30, "--tile", 32), marks=pytest.mark.long
        ),
    ],
)
def test_every_builder(tmp_path, cluster, monkeypatch, script, flags):
    """Relative paths mean to the actors what they mean in the command."""
    make_photos(tmp_path / "photos", 12)
    monkeypatch.chdir(tmp_path)
    arguments = (script, "--photos", "photos", *flags, "--rows_per_shard", 10, "--output_dir")
    build(*arguments, "local")
    build(*arguments, "ray", "--ray")
    assert checksums(tmp_path / "ray") == checksums(tmp_path / "local")


@pytest.mark.long
def test_whitebox_settings_come_from_where_the_shards_are_made(tmp_path, cluster):
    import numpy as np

    from instruct_pix2pix.building.on_ray import gpus_of_an_actor
    from instruct_pix2pix.building.whitebox_weights import SHAPES

    rng = np.random.default_rng(0)
    weights = {name: rng.normal(0, 0.05, shape).astype(np.float32) for name, shape in SHAPES.items()}
    np.savez(tmp_path / "weights.npz", **weights)
    photos = make_photos(tmp_path / "photos", 4, side=32)
    script, *_ = OPENCV
    arguments = (script, "--cartoonizer_weights", tmp_path / "weights.npz", "--photos", photos, "--device", "cpu")
    build(*arguments, "--output_dir", tmp_path / "local")
    build(*arguments, "--output_dir", tmp_path / "ray", "--ray")
    assert checksums(tmp_path / "ray") == checksums(tmp_path / "local")
    (tmp_path / "weights.npz").write_bytes(b"no weights")
    with pytest.raises(UserError, match="--cartoonizer_weights: .*weights.npz"):
        build(*arguments, "--output_dir", tmp_path / "again", "--ray")

    class Flags:
        ray, ray_gpus = "", None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster, "cluster_resources", lambda: {"CPU": 2.0, "GPU": 1.0})
        assert [gpus_of_an_actor(Flags, on_gpu) for on_gpu in (False, True)] == [0, 1]
        Flags.ray_gpus = 0.25
        assert gpus_of_an_actor(Flags, True) == 0.25


@pytest.mark.long
def test_object_storage(tmp_path, cluster, storage):
    """Onto s3://, by this process and by actors; run again, only what is missing or damaged is made and sent."""
    photos = make_photos(tmp_path / "photos", 40)
    arguments = (*OPENCV, "--photos", photos, "--rows_per_shard", 10, "--output_dir")
    build(*arguments, tmp_path / "local")
    build(*arguments, "s3://datasets/plain")
    build(*arguments, "s3://datasets/ray", "--ray")
    wanted = {name: (tmp_path / "local" / name).read_bytes() for name in checksums(tmp_path / "local")}
    for place in ("datasets/plain", "datasets/ray"):
        assert {path.removeprefix(f"{place}/"): storage.cat(path) for path in storage.find(place)} == wanted

    first, second, *others = (f"datasets/ray/{name}" for name in wanted if name.startswith("data/"))
    storage.rm(first)
    storage.pipe(second, storage.cat(second)[:-100])
    before = {path: storage.info(path)["LastModified"] for path in others}
    for path in others:  # moto counts in seconds: a copy that is sent again would be newer than this
        storage.setxattr(path, kept="yes")
    build(*arguments, "s3://datasets/ray", "--ray")
    assert {path.removeprefix("datasets/ray/"): storage.cat(path) for path in storage.find("datasets/ray")} == wanted
    assert before and all(storage.getxattr(path, "kept") == "yes" for path in others)
    assert storage.getxattr(first, "kept") is None


def test_storage_that_takes_nothing_is_one_line(tmp_path, storage):
    photos = make_photos(tmp_path / "photos", 2)
    with pytest.raises(UserError, match="s3://gone/x/skipped.jsonl: .*bucket does not exist.*run the command again"):
        build(*OPENCV, "--photos", photos, "--output_dir", "s3://gone/x")
    with pytest.raises(UserError, match="--output_dir: nowhere://x: .*give a storage that answers"):
        build(*OPENCV, "--photos", photos, "--output_dir", "nowhere://x")
    storage.pipe("datasets/mine/README.md", b"my notes")
    with pytest.raises(UserError, match="--output_dir: s3://datasets/mine holds something else"):
        build(*OPENCV, "--photos", photos, "--output_dir", "s3://datasets/mine")
    assert storage.find("datasets/mine") == ["datasets/mine/README.md"]


@pytest.mark.slow
def test_a_photo_that_changed_since_the_plan_is_named(tmp_path, cluster):
    photos = make_photos(tmp_path / "photos", 3)
    arguments = (*OPENCV, "--photos", photos, "--output_dir", tmp_path / "dataset", "--test_fraction", 0,
                 "--validation_fraction", 0)  # fmt: skip
    build(*arguments)
    next((tmp_path / "dataset/data").iterdir()).unlink()
    photo = photos / "photo0001.png"
    photo.write_bytes(bytes(photo.stat().st_size))
    with pytest.raises(UserError, match="--output_dir: photo0001.png has changed since the build began"):
        build(*arguments, "--ray")


def test_mistakes_are_one_line(tmp_path, monkeypatch):
    photos = make_photos(tmp_path / "photos", 2)
    arguments = (*OPENCV, "--photos", photos, "--output_dir", tmp_path / "dataset")
    with pytest.raises(UserError, match="--ray_actors: without --ray"):
        build(*arguments, "--ray_actors", 2)
    with pytest.raises(UserError, match="--ray_gpus: -1.0 is less than none"):
        build(*arguments, "--ray", "--ray_gpus", -1)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match="^--ray: .*; pip install -r requirements-ray.txt"):
        build(*arguments, "--ray")
    assert not os.path.exists(tmp_path / "dataset")
