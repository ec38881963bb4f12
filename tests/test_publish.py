"""Publishing, against a Hub on loopback and with the real client: train, push, load by name, edit, resume."""

import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from instruct_pix2pix import hub as hub_module
from instruct_pix2pix.cli import UserError
from instruct_pix2pix.models import trained
from instruct_pix2pix.training import checkpoint as checkpoints
from instruct_pix2pix.training.options import HUB_STRATEGIES
from instruct_pix2pix.training.stopping import StopRequest
from tests.conftest import ROOT, assert_same_tensors, copy_tree, run_script, to_argv
from tests.loopback_hub import TOKEN, here, loopback_hub

PHOTO = ROOT / "assets/photos/test/sea6.webp"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
STATE = ("unet/diffusion_pytorch_model.safetensors", "ema.safetensors", "optimizer.safetensors")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub that this process speaks to, and that is asked again at once where a push fails."""
    with loopback_hub(tmp_path / "hub") as running:
        here(running, monkeypatch)
        monkeypatch.setattr(hub_module, "RETRY_AFTER", (0, 0))
        yield running


@pytest.fixture(scope="module")
def run(base_models, pairs, tmp_path_factory) -> Path:
    """A run of two updates with a checkpoint of each."""
    output_dir = tmp_path_factory.mktemp("trained") / "tiny-editor"
    flags = {"pretrained_model_name_or_path": base_models["finetune"], "train_data_dir": pairs, "resolution": 64}
    flags |= {"train_batch_size": 1, "max_train_steps": 2, "checkpointing_steps": 1, "seed": 7, "report_to": "none"}
    run_script("finetune", **flags, use_ema=True, output_dir=output_dir)
    return output_dir


def pushes_of(run: Path, strategy: str, **flags) -> hub_module.Pushes:
    """Those of a run that stands at its first checkpoint."""
    config = trained.configuration(run / "checkpoint-1")
    config.hub_strategy, config.hub_model_id = strategy, "tester/tiny-editor"
    vars(config).update(flags)
    return hub_module.Pushes(config, hub_module.prepare_repo(config))


def titles(hub) -> list[str]:
    return [commit.title for commit in hub.pushes("tester/tiny-editor")]


def assert_whole_checkpoint(hub, folder: str, step: int, revision: str = "main") -> None:
    """The repository holds one, of the right update, with the sizes that it notes."""
    tree = hub._commit("tester/tiny-editor", "model", revision).tree
    state = json.loads(hub.read("tester/tiny-editor", f"{folder}/state.json", revision=revision))
    assert state["step"] == step and len(state["files"]) == 4
    assert {file: tree[f"{folder}/{file}"].size for file in state["files"]} == state["files"]


def assert_nothing_private(hub, *paths: Path) -> None:
    """No file that was ever uploaded names a path of this machine or the token."""
    for blob in hub.blobs.iterdir():
        content = blob.read_bytes()
        for secret in (TOKEN, *map(str, paths)):
            assert secret.encode() not in content, content[:200]


# ---- while training goes on


@pytest.mark.slow
def test_training_never_waits_for_a_slow_hub_but_at_the_end(hub, small_run, tmp_path, monkeypatch, base_models, caplog):
    hub.hold("commit")
    seen, wait = [], hub_module.Pushes.wait

    def wait_at_last(pushes):
        seen.append([path.name for path in checkpoints.list_checkpoints(tmp_path / "tiny-editor")])
        assert titles(hub) == [] and (pushes.stage / "checkpoint-1" / "state.json").exists()
        hub.recover()
        wait(pushes)

    monkeypatch.setattr(hub_module.Pushes, "wait", wait_at_last)
    flags = {"checkpointing_steps": 1, "checkpoints_total_limit": 1, "use_ema": True, "push_to_hub": True}
    run = small_run(name="tiny-editor", hub_strategy="checkpoint", val_image_url=PHOTO, validation_prompt="blur it",
                    num_validation_images=1, hub_token=TOKEN, **flags)  # fmt: skip
    assert seen == [["checkpoint-4"]]  # all updates were done, and the pushed checkpoint was removed meanwhile
    assert titles(hub) == [
        "Add checkpoint-1, to resume from",
        "Training in progress, checkpoint-1",
        "Add checkpoint-4, to resume from",
        "Upload instruction-tuned Stable Diffusion pipeline",
    ]
    first, pipeline, *_ = hub.pushes("tester/tiny-editor")
    assert_whole_checkpoint(hub, "last-checkpoint", 1, first.oid)
    assert_whole_checkpoint(hub, "last-checkpoint", 4)
    assert "steps 1, images 4" in hub.read("tester/tiny-editor", "README.md", revision=pipeline.oid).decode()
    assert sum("is not pushed: the push before still goes on" in text for text in caplog.messages) == 2
    for name in (WEIGHTS, "README.md", "images/validation.webp"):
        assert hub.read("tester/tiny-editor", name) == (run / name).read_bytes()
    assert_nothing_private(hub, tmp_path, base_models["finetune"].parent)
    assert not list(run.glob(".*"))


def test_a_stopped_run_ends_when_its_push_has_ended(hub, small_run, monkeypatch):
    """Of which an interpreter that is leaving could start no part any more."""
    monkeypatch.setattr(StopRequest, "all_ranks_agree", lambda self, accelerator, step: step == 2)
    hub.hold("commit")
    later = threading.Timer(0.5, hub.recover)
    later.start()
    with pytest.raises(KeyboardInterrupt):
        small_run(name="tiny-editor", push_to_hub=True, hub_strategy="checkpoint", train_batch_size=1)
    assert titles(hub) == ["Add checkpoint-2, to resume from", "Training in progress, checkpoint-2"]
    later.join()


def test_what_each_strategy_pushes(hub, run, tmp_path):
    run, kept = copy_tree(run, tmp_path / "tiny-editor"), {}
    for strategy in HUB_STRATEGIES:
        pushes = pushes_of(run, strategy, output_dir=str(run))
        pushes.start(run / "checkpoint-1")
        pushes.wait()
        assert hub.exists("tester/tiny-editor") and not pushes.stage.exists()
        before = titles(hub)
        assert pushes.finish([run / "checkpoint-1", run / "checkpoint-2"]) is True
        files = hub.files("tester/tiny-editor")
        kept[strategy] = {file.split("/")[0] for file in files if "checkpoint" in file}
        assert (before == []) == (strategy == "end") and WEIGHTS in files
        assert hub.read("tester/tiny-editor", WEIGHTS) == (run / WEIGHTS).read_bytes()
        del hub.repositories["model", "tester/tiny-editor"]
    assert kept == {
        "end": set(),
        "every_save": set(),
        "checkpoint": {"last-checkpoint"},
        "all_checkpoints": {"checkpoint-1", "checkpoint-2"},
    }


@pytest.mark.parametrize(("stage", "status"), [("commit", 429), ("commit", 500), ("commit", 0), ("upload", 0)])
def test_trouble_that_passes_is_waited_for(hub, run, tmp_path, stage, status):
    pushes = pushes_of(run, "checkpoint", output_dir=str(tmp_path))
    hub.fail(stage, status, times=2)
    pushes.start(run / "checkpoint-1")
    pushes.wait()
    assert_whole_checkpoint(hub, "last-checkpoint", 1)
    assert len(titles(hub)) == 2


def test_a_push_that_fails_is_said_once_and_made_up_for(hub, run, tmp_path, caplog):
    run = copy_tree(run, tmp_path / "tiny-editor")
    pushes = pushes_of(run, "all_checkpoints", output_dir=str(run))
    hub.fail("commit", 403)
    pushes.start(run / "checkpoint-1")
    pushes.wait()
    [said] = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "checkpoint-1 is not pushed" in said.getMessage() and "the next save or the end" in said.getMessage()
    assert ("POST", "/api/models/tester/tiny-editor/commit/main", 403) in hub.requests and titles(hub) == []
    assert sum(status == 403 for *_, status in hub.requests) == 1  # a refusal is no trouble that passes
    hub.recover()
    assert pushes.finish([run / "checkpoint-1", run / "checkpoint-2"]) is True
    for step in (1, 2):
        assert_whole_checkpoint(hub, f"checkpoint-{step}", step)

    gone = pushes_of(run, "checkpoint", output_dir=str(run))
    gone.start(run / "checkpoint-77")  # nothing that happens to a push ends a training
    assert "checkpoint-77 is not pushed" in caplog.messages[-1] and gone.running is None


def test_a_file_system_without_links(hub, run, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    pushes = pushes_of(run, "checkpoint", output_dir=str(tmp_path))
    pushes.start(run / "checkpoint-1")
    pushes.wait()
    assert_whole_checkpoint(hub, "last-checkpoint", 1)


# ---- a checkpoint taken back


@pytest.mark.slow
def test_a_run_goes_on_from_the_hub_as_if_nothing_had_happened(hub, small_run, tmp_path, base_models, caplog):
    flags = {"use_ema": True, "hub_model_id": "tester/tiny-editor", "checkpointing_steps": 1}
    whole = small_run(name="whole", **flags | {"hub_model_id": None})
    small_run(name="machine", max_train_steps=2, push_to_hub=True, hub_strategy="checkpoint", **flags)
    shutil.rmtree(tmp_path / "machine")
    caplog.clear()
    flags |= {"resume_from_checkpoint": "hub"}
    resumed = small_run(name="other", push_to_hub=True, hub_strategy="all_checkpoints", **flags)
    assert not any("flags differ" in text for text in caplog.messages)
    for file in STATE:
        assert_same_tensors(whole / "checkpoint-4" / file, resumed / "checkpoint-4" / file)
    assert (whole / WEIGHTS).read_bytes() == (resumed / WEIGHTS).read_bytes()
    assert [path.name for path in checkpoints.list_checkpoints(resumed)] == [
        "checkpoint-2",
        "checkpoint-3",
        "checkpoint-4",
    ]

    # The newest of all that the repository holds; and what is there already counts.
    again = small_run(name="third", **flags)
    assert [path.name for path in checkpoints.list_checkpoints(again)] == ["checkpoint-4"]
    assert (again / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    downloads = len([path for _, path, _ in hub.requests if "/resolve/" in path and path.endswith(".safetensors")])
    small_run(name="third", **flags)
    assert downloads == len([path for _, path, _ in hub.requests if "/resolve/" in path and "tensors" in path])
    shutil.rmtree(resumed / "checkpoint-4")
    with pytest.raises(UserError, match="tester/tiny-editor holds update 4, .*other checkpoint-3; give latest"):
        small_run(name="other", **flags)
    shutil.rmtree(again / "checkpoint-4")
    with pytest.raises(UserError, match="third holds a trained pipeline already"):
        small_run(name="third", **flags)


def test_taking_back_what_is_not_there(hub, run, tmp_path, monkeypatch, caplog):
    config = trained.configuration(run / "checkpoint-1")
    config.hub_model_id, config.output_dir = "tester/none", str(tmp_path / "new")
    hub_module.fetch_checkpoint(config, [])
    assert "no newer checkpoint in tester/none" in caplog.messages[-1]
    hub.add("tester/none")
    hub_module.fetch_checkpoint(config, [])
    assert "no newer checkpoint in tester/none" in caplog.messages[-1] and not (tmp_path / "new").exists()
    hub.repositories["model", "tester/none"].private = True
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(UserError, match="--resume_from_checkpoint: cannot use tester/none: Invalid user token"):
        hub_module.fetch_checkpoint(config, [])


def test_a_download_that_breaks_off_goes_on(hub, run, tmp_path, monkeypatch):
    pushes = pushes_of(run, "checkpoint", output_dir=str(tmp_path / "staged"))
    pushes.start(run / "checkpoint-1")
    pushes.wait()
    config = SimpleNamespace(hub_model_id="tester/tiny-editor", hub_token=None, output_dir=str(tmp_path / "new"))
    optimizer = hub._commit("tester/tiny-editor", "model", "main").tree["last-checkpoint/optimizer.safetensors"]
    content = hub._blob(optimizer.sha256).read_bytes()
    hub._blob(optimizer.sha256).unlink()
    with pytest.raises(UserError, match="--resume_from_checkpoint: cannot use tester/tiny-editor"):
        hub_module.fetch_checkpoint(config, [])
    assert checkpoints.list_checkpoints(tmp_path / "new") == []
    hub._blob(optimizer.sha256).write_bytes(content)
    hub_module.fetch_checkpoint(config, [])
    assert trained.damage(tmp_path / "new" / "checkpoint-1") is None
    assert not list((tmp_path / "new").glob(".*"))


# ---- at the end


def train(hub, base_models, pairs, output_dir, **changes) -> subprocess.CompletedProcess:
    flags = {
        "pretrained_model_name_or_path": base_models["finetune"],
        "train_data_dir": pairs,
        "output_dir": output_dir,
        "resolution": 64,
        "train_batch_size": 1,
        "max_train_steps": 2,
        "checkpointing_steps": 1,
        "report_to": "tensorboard",
        "validation_prompt": "blur it",
        "val_image_url": PHOTO,
        "num_validation_images": 1,
        "push_to_hub": True,
        "seed": 1,
    }
    environment = hub.environment(OMP_NUM_THREADS="1")
    return subprocess.run(
        [sys.executable, ROOT / "finetune_instruct_pix2pix.py", *to_argv({**flags, **changes})],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_train_push_load_by_name_and_edit(base_models, pairs, tmp_path):
    with loopback_hub(tmp_path / "hub") as hub:
        done = train(hub, base_models, pairs, tmp_path / "tiny-editor")
        assert done.returncode == 0, done.stderr
        assert "uploaded to" in done.stderr and TOKEN not in done.stderr
        files = hub.files("tester/tiny-editor")
        assert {"README.md", "model_index.json", "training_config.json", "vae/config.json", WEIGHTS} <= set(files)
        folders = {file.split("/")[0] for file in files if "/" in file}
        assert folders == {"images", "scheduler", "text_encoder", "tokenizer", "unet", "vae"}
        assert len(hub.pushes("tester/tiny-editor")) == 1
        card = hub.read("tester/tiny-editor", "README.md").decode()
        assert hub.repositories["model", "tester/tiny-editor"].private is False
        assert "pipeline_tag: image-to-image" in card and 'model = "tester/tiny-editor"' in card
        assert_nothing_private(hub, tmp_path)

        environment = hub.environment(OMP_NUM_THREADS="1")
        snippet = [ROOT / "inference/cartoonize.py", "--model_id=tester/tiny-editor", f"--image={PHOTO}"]
        edited = subprocess.run(
            [sys.executable, *snippet, "--steps=2", "--resolution=64", f"--output={tmp_path / 'edited.png'}"],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert edited.returncode == 0 and (tmp_path / "edited.png").stat().st_size > 0, edited.stderr


def test_a_failed_push_loses_nothing_and_its_command_pushes_later(hub, small_run, caplog):
    hub.fail("commit", 500)
    flags = {"push_to_hub": True, "hub_model_id": "tester/named", "hub_private_repo": True, "max_train_steps": 1}
    with pytest.raises(SystemExit) as ended:
        small_run(hub_strategy="every_save", **flags)
    [said] = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    run = Path(re.search(r"the model is whole in (.*)\. Later", said).group(1))
    assert ended.value.code == 1 and "the upload failed" in said
    assert (run / "model_index.json").exists() and hub.pushes("tester/named") == []
    assert hub.repositories["model", "tester/named"].private is True
    hub.recover()
    program, *rest = shlex.split(re.search(r"Later: (hf upload .*)", said).group(1))
    assert program == "hf"
    later = subprocess.run(
        [sys.executable, "-c", "from huggingface_hub.cli.hf import main; main()", *rest],
        env=hub.environment(),
        capture_output=True,
        text=True,
    )
    assert later.returncode == 0, later.stderr
    files = hub.files("tester/named")
    assert WEIGHTS in files and "README.md" in files
    assert not [file for file in files if file.startswith(("checkpoint-", "logs", "validation"))]


def test_what_forbids_a_push_is_said_before_training(hub, small_run, tmp_path, monkeypatch):
    def refused(**flags) -> str:
        with pytest.raises(UserError) as caught:
            small_run(push_to_hub=True, **flags)
        assert not (tmp_path / "run").exists() and "\n" not in str(caught.value)
        return str(caught.value)

    with monkeypatch.context() as patch:
        patch.setenv("HF_TOKEN", "")
        assert "--push_to_hub: no Hub token" in refused()
    assert "--push_to_hub: cannot use run: Invalid user token" in refused(hub_token="hf_wrong")
    assert "--push_to_hub: cannot use tester/new: " in refused(hub_token="hf_wrong", hub_model_id="tester/new")
    assert "--push_to_hub: cannot use other/new: 403 Forbidden" in refused(hub_model_id="other/new")
    hub.add("other/model")  # which is not missing, and so needs no right to be made
    assert "--push_to_hub: cannot use other/model: 403 Forbidden" in refused(hub_model_id="other/model")
    assert "--hub_model_id: 'not a name'" in refused(hub_model_id="not a name")
    hub.fail("create", 403)
    assert "--push_to_hub: cannot use tester/run" in refused()


@pytest.mark.slow
def test_datasets_and_base_models_come_from_the_hub_by_name(base_models, photos, tmp_path):
    """MODEL_ID and DATASET_ID as Hub ids, as in the recipes."""
    push = """
import sys, datasets, huggingface_hub
from PIL import Image
photos = [Image.open(path).convert("RGB").resize((80, 64)) for path in sys.argv[2:]]
image = datasets.Image()
text = datasets.Value("string")
features = datasets.Features({"input_image": image, "instruction": text, "ground_truth_image": image})
rows = {"input_image": photos, "instruction": ["denoise the noisy image"] * len(photos), "ground_truth_image": photos}
datasets.Dataset.from_dict(rows, features=features).push_to_hub("tester/low-level")
huggingface_hub.create_repo("tester/base")
huggingface_hub.upload_folder(repo_id="tester/base", folder_path=sys.argv[1])
"""
    with loopback_hub(tmp_path / "hub") as hub:
        environment = hub.environment(OMP_NUM_THREADS="1")
        paths = sorted((ROOT / "assets/photos/train").glob("*.webp"))[:4]
        pushed = subprocess.run(
            [sys.executable, "-c", push, base_models["train"], *paths], env=environment, capture_output=True, text=True
        )
        assert pushed.returncode == 0, pushed.stderr
        flags = {
            "pretrained_model_name_or_path": "tester/base",
            "dataset_name": "tester/low-level",
            "output_dir": tmp_path / "run",
            "resolution": 64,
            "train_batch_size": 1,
            "max_train_steps": 1,
            "report_to": "none",
            "image_geometry": "crop",
        }
        done = subprocess.run(
            [sys.executable, ROOT / "train_instruct_pix2pix.py", *to_argv(flags)],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        card = (tmp_path / "run" / "README.md").read_text()
        assert "base_model: tester/base" in card and "- tester/low-level" in card
        assert json.loads((tmp_path / "run" / "training_summary.json").read_text())["steps"] == 1
        for file in ("tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json", "text_encoder/config.json",
                     "vae/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"):  # fmt: skip
            assert (tmp_path / "run" / file).read_bytes() == (base_models["train"] / file).read_bytes()
        assert {"config.json", "diffusion_pytorch_model.safetensors"} == set(os.listdir(tmp_path / "run" / "unet"))
