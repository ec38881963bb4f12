"""Our pipelines with the libraries of requirements-old-libraries.txt: the same edit as with the newest.

Runs where OLD_LIBRARIES_PYTHON is an interpreter that has them: `make test-old-libraries`.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from instruct_pix2pix.models.tiny import build_tiny_pipeline
from tests.conftest import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("OLD_LIBRARIES_PYTHON" not in os.environ, reason="make test-old-libraries runs this"),
]

EDIT = """
import sys
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline
from PIL import Image

folder, photo, output = sys.argv[1:]
pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(folder)
edited = pipeline(
    "make it black and white",
    image=Image.open(photo).convert("RGB").resize((128, 128)),
    num_inference_steps=5,
    generator=torch.Generator().manual_seed(0),
).images[0]
edited.save(output)
"""


def edit(python: str, folder: Path, output: Path) -> np.ndarray:
    command = [python, "-c", EDIT, folder, ROOT / "assets/photos/test/sea6.webp", output]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "newly initialized" not in done.stderr, done.stderr
    return np.asarray(Image.open(output)).astype(int)


@pytest.mark.parametrize("pipeline", ["exported", "resumed", "committed"])
def test_old_libraries_make_the_same_edit(pipeline, small_run, tmp_path):
    if pipeline == "committed":
        folder = ROOT / "assets/tiny-instruct-pix2pix"
    elif pipeline == "exported":  # from a base that only the newest libraries read
        build_tiny_pipeline(in_channels=8, seed=0).save_pretrained(tmp_path / "base")
        folder = small_run(pretrained_model_name_or_path=tmp_path / "base")
    else:
        small_run(max_train_steps=2)
        folder = small_run(resume_from_checkpoint="latest")
    ours = edit(sys.executable, folder, tmp_path / "new.png")
    theirs = edit(os.environ["OLD_LIBRARIES_PYTHON"], folder, tmp_path / "old.png")
    assert np.abs(ours - theirs).max() <= 1
    assert ours.std() > 5  # an image, not a grey area
