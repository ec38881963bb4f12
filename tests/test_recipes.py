"""The recipes run to the end, as written but for their environment variables, on the tiny base."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from tests.conftest import ROOT, losses

pytestmark = pytest.mark.slow

RECIPES = {
    "cartoonizer_from_scratch": ("train", ("original_image", "edit_prompt", "cartoonized_image")),
    "cartoonizer_finetuned": ("finetune", ("original_image", "edit_prompt", "cartoonized_image")),
    "low_level_from_scratch": ("train", ("input_image", "instruction", "ground_truth_image")),
    "low_level_finetuned": ("finetune", ("input_image", "instruction", "ground_truth_image")),
}


PUBLISHED = {  # the original project's commands; what differs on purpose is in the README
    "resolution": 256,
    "max_train_steps": 15000,
    "train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "learning_rate": 5e-5,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 0,
    "random_flip": True,
    "use_ema": True,
    "ema_decay": 0.9999,
    "seed": 42,
}


@pytest.fixture
def environment(recipe, base_models, photos, tmp_path) -> dict:
    """The recipe's variables: a tiny base, ten rows in its dataset's columns, float32, nothing sent anywhere."""
    script, (source, text, target) = RECIPES[recipe]
    image = datasets.Image()
    rows = datasets.Dataset.from_dict(
        {source: photos, text: ["edit it"] * len(photos), target: [photo.transpose(0) for photo in photos]},
        features=datasets.Features({source: image, text: datasets.Value("string"), target: image}),
    )
    rows.to_parquet(tmp_path / "dataset" / "train.parquet")
    photos[0].resize((64, 64)).save(tmp_path / "validation.png")
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "MODEL_ID": str(base_models[script]),
        "DATASET_ID": str(tmp_path / "dataset"),
        "OUTPUT_DIR": str(tmp_path / "out"),
        "MIXED_PRECISION": "no",
        "REPORT_TO": "wandb",
        "WANDB_MODE": "offline",
        "VAL_IMAGE_URL": str(tmp_path / "validation.png"),
    }


def run(recipe, environment, *flags) -> subprocess.CompletedProcess:
    command = ["bash", ROOT / "recipes" / f"{recipe}.sh", *flags]
    return subprocess.run(
        command, env=environment, cwd=Path(environment["OUTPUT_DIR"]).parent, capture_output=True, text=True
    )


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_has_the_published_settings_and_says_a_mistake_in_one_line(recipe, environment):
    done = run(recipe, environment, "--dry_run")
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert printed["images_per_update"] == 8
    assert {name: printed["flags"][name] for name in PUBLISHED} == PUBLISHED
    assert printed["flags"]["conditioning_dropout_prob"] == 0.05
    # A restoration has one right answer, which guidance overshoots.
    scales = printed["flags"]["guidance_scale"], printed["flags"]["image_guidance_scale"]
    assert scales == ((1.0, 1.0) if recipe.startswith("low_level") else (7.0, 1.5))
    mistaken = run(recipe, environment, "--dry_run", "--resolution=100")
    assert mistaken.returncode != 0
    (line,) = mistaken.stderr.splitlines()
    assert "error: --resolution: 100 is not a multiple of" in line


@pytest.mark.parametrize("recipe", ["cartoonizer_finetuned"])
def test_several_processes_are_one_training_whatever_accelerate_has_saved(recipe, environment, tmp_path):
    (tmp_path / "hf" / "accelerate").mkdir(parents=True)
    saved = "compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nnum_processes: 1\nuse_cpu: false\n"
    (tmp_path / "hf" / "accelerate" / "default_config.yaml").write_text(saved)
    environment |= {"NUM_PROCESSES": "2", "HF_HOME": str(tmp_path / "hf")}
    done = run(recipe, environment, "--dry_run")
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert printed["processes"] == 2 and printed["images_per_update"] == 16


@pytest.mark.parametrize("recipe", ["low_level_finetuned"])
def test_sigterm_to_the_recipe_reaches_the_launcher(recipe, environment, tmp_path):
    """In a container the recipe is process 1: `exec` makes it the launcher itself, so that no signal stops at bash."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "accelerate").write_text("#!/bin/sh\necho $$\n")
    (tmp_path / "bin" / "accelerate").chmod(0o755)
    environment["PATH"] = f"{tmp_path / 'bin'}:{environment['PATH']}"
    with subprocess.Popen(
        ["bash", ROOT / "recipes" / f"{recipe}.sh"], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert int(process.stdout.read()) == process.pid


@pytest.mark.parametrize(
    "recipe",
    [
        "cartoonizer_from_scratch",
        "low_level_finetuned",
        pytest.param("cartoonizer_finetuned", marks=pytest.mark.long),
        pytest.param("low_level_from_scratch", marks=pytest.mark.long),
    ],
)
def test_recipe_runs_to_the_end(recipe, environment, tmp_path):
    # 256 px is the recipe's; 64 px spares the test's time. A flag behind the recipe's own wins.
    flags = ("--resolution=64", "--num_validation_images=1")
    done = run(recipe, environment | {"MAX_TRAIN_STEPS": "2"}, *flags)
    assert done.returncode == 0, done.stderr
    assert len(losses(tmp_path / "out")) == 2
    assert (tmp_path / "out" / "model_index.json").exists()
    assert (tmp_path / "out" / "validation" / "step-000002.png").exists()
