"""Publishing, against a Hub on loopback and with the real client: train, push, load by name, edit."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, to_argv
from tests.loopback_hub import TOKEN, loopback_hub

pytestmark = pytest.mark.slow
PHOTO = ROOT / "assets/photos/test/sea6.webp"


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
    environment.update(changes.pop("environment", {}))
    return subprocess.run(
        [sys.executable, ROOT / "finetune_instruct_pix2pix.py", *to_argv({**flags, **changes})],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_train_push_load_by_name_and_edit(base_models, pairs, tmp_path):
    with loopback_hub(tmp_path / "hub") as hub:
        done = train(hub, base_models, pairs, tmp_path / "tiny-editor")
        assert done.returncode == 0, done.stderr
        assert "uploaded to" in done.stderr and TOKEN not in done.stderr
        files = hub.files("tester/tiny-editor")
        assert {"README.md", "model_index.json", "training_config.json", "vae/config.json"} <= set(files)
        assert "unet/diffusion_pytorch_model.safetensors" in files
        folders = {file.split("/")[0] for file in files if "/" in file}
        assert folders == {"scheduler", "text_encoder", "tokenizer", "unet", "vae"}
        assert len(hub.pushes("tester/tiny-editor")) == 1
        card = hub.read("tester/tiny-editor", "README.md").decode()
        assert hub.repositories["model", "tester/tiny-editor"].private is False
        assert str(tmp_path) not in card + hub.read("tester/tiny-editor", "training_config.json").decode()
        assert "pipeline_tag: image-to-image" in card and 'model = "tester/tiny-editor"' in card
        for file in files:
            assert TOKEN.encode() not in hub.read("tester/tiny-editor", file)

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


def test_a_failed_push_loses_nothing_and_its_command_pushes_later(base_models, pairs, tmp_path):
    with loopback_hub(tmp_path / "hub") as hub:
        hub.fail("commit", 500)
        done = train(hub, base_models, pairs, tmp_path / "run", hub_model_id="tester/named", val_image_url=None,
                     validation_prompt=None, hub_private_repo=True)  # fmt: skip
        assert done.returncode == 1 and "the upload failed" in done.stderr and "Traceback" not in done.stderr
        assert (tmp_path / "run" / "model_index.json").exists() and hub.pushes("tester/named") == []
        assert hub.repositories["model", "tester/named"].private is True
        hub.recover()
        command = re.search(r"Later: (hf upload .*)", done.stderr).group(1)
        program, *rest = shlex.split(command)
        later = subprocess.run(
            [shutil.which(program, path=Path(sys.executable).parent), *rest],
            env=hub.environment(),
            capture_output=True,
            text=True,
        )
        assert later.returncode == 0, later.stderr
        files = hub.files("tester/named")
        assert "unet/diffusion_pytorch_model.safetensors" in files
        assert not [file for file in files if file.startswith(("checkpoint-", "logs", "validation"))]


def test_a_missing_token_and_a_refused_repository_are_said_before_training(base_models, pairs, tmp_path):
    with loopback_hub(tmp_path / "hub") as hub:
        nobody = train(hub, base_models, pairs, tmp_path / "run", environment={"HF_TOKEN": ""})
        assert nobody.returncode == 2 and "--push_to_hub: no Hub token" in nobody.stderr
        hub.fail("create", 403)
        refused = train(hub, base_models, pairs, tmp_path / "run")
        assert refused.returncode == 2 and "--push_to_hub: cannot make or reach tester/run" in refused.stderr
        named = train(hub, base_models, pairs, tmp_path / "run", hub_model_id="not a name")
        assert named.returncode == 2 and "--hub_model_id: 'not a name'" in named.stderr
        for done in (nobody, refused, named):
            assert "Traceback" not in done.stderr
            assert len([line for line in done.stderr.splitlines() if "error:" in line]) == 1
        assert not (tmp_path / "run").exists()


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
