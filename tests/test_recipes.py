"""The recipes run to the end, as written but for their environment variables, on the tiny base."""

import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from conftest import ROOT, losses

pytestmark = pytest.mark.slow

RECIPES = {
    "cartoonizer_from_scratch": ("train", ("original_image", "edit_prompt", "cartoonized_image")),
    "cartoonizer_finetuned": ("finetune", ("original_image", "edit_prompt", "cartoonized_image")),
    "low_level_from_scratch": ("train", ("input_image", "instruction", "ground_truth_image")),
    "low_level_finetuned": ("finetune", ("input_image", "instruction", "ground_truth_image")),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_runs_to_the_end(recipe, base_models, photos, tmp_path):
    script, (source, text, target) = RECIPES[recipe]
    image = datasets.Image()
    rows = datasets.Dataset.from_dict(
        {source: photos, text: ["edit it"] * len(photos), target: [photo.transpose(0) for photo in photos]},
        features=datasets.Features({source: image, text: datasets.Value("string"), target: image}),
    )
    rows.to_parquet(tmp_path / "dataset" / "train.parquet")
    photos[0].resize((64, 64)).save(tmp_path / "validation.png")
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "MODEL_ID": str(base_models[script]),
        "DATASET_ID": str(tmp_path / "dataset"),
        "OUTPUT_DIR": str(tmp_path / "out"),
        "MAX_TRAIN_STEPS": "2",
        "MIXED_PRECISION": "no",
        "REPORT_TO": "wandb",
        "WANDB_MODE": "offline",
        "VAL_IMAGE_URL": str(tmp_path / "validation.png"),
    }
    # 256 px is the recipe's; 64 px spares the test's time. A flag behind the recipe's own wins.
    done = subprocess.run(
        ["bash", ROOT / "recipes" / f"{recipe}.sh", "--resolution=64", "--num_validation_images=1"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert len(losses(tmp_path / "out")) == 2
    assert (tmp_path / "out" / "model_index.json").exists()
    assert (tmp_path / "out" / "validation" / "step-000002.png").exists()
