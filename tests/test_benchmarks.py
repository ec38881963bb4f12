"""The benchmarks, where they need neither a GPU nor another project's files.

REFERENCE_SCRIPT, if set, is a copy of diffusers' examples/instruct_pix2pix/train_instruct_pix2pix.py.
"""

import importlib
import json
import os
import re

import pytest

from instruct_pix2pix.cli import UserError
from tests.equivalence import main

REFERENCE = os.environ.get("REFERENCE_SCRIPT")


def equivalence(capsys, *flags) -> dict:
    main(["--conditioning_dropout_prob=0.25", *flags])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.slow
def test_an_update_is_the_update_written_plainly(capsys):
    """Losses, weights and averaged weights, over accumulation, clipping and conditioning dropout."""
    found = equivalence(capsys, "--updates=6")["plain"]
    assert found["loss"] < 1e-5 and found["weights"] < 1e-5 and found["averaged_weights"] < 1e-5


@pytest.mark.slow
@pytest.mark.skipif(REFERENCE is None, reason="REFERENCE_SCRIPT names no copy of diffusers' example")
def test_an_update_is_the_references_update(capsys):
    pytest.importorskip("torchvision")
    found = equivalence(capsys, "--updates=20", f"--reference={REFERENCE}")["reference"]
    assert found["loss"] < 1e-5 and found["weights"] < 1e-5 and found["averaged_weights"] < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("cached", [True, False])
def test_every_stage_of_an_update_is_timed(cached, tmp_path, capsys, monkeypatch):
    """On a model as small as can be, for the test's time; nothing is asserted about the times themselves."""
    from accelerate.state import AcceleratorState, GradientState

    from benchmarks import models, train_step

    tiny = {"unet": (32, 32, 32, 32), "vae": (32, 32, 32, 32), "text": (32, 1, 4)}
    monkeypatch.setitem(models.SIZES, "small", tiny)
    monkeypatch.setattr(models, "pairs_folder", lambda folder, make=models.pairs_folder: make(folder, 4, (80, 64)))
    try:
        flags = ["--updates=1", "--warmup=2", "--train_batch_size=2", "--gradient_accumulation_steps=2"]
        flags.append(f"--folder={tmp_path}")
        result = train_step.main(flags if cached else [*flags, "--no-cache_latents"])
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    out = capsys.readouterr().out
    assert json.loads(out.splitlines()[-1]) == result and result["cached"] is cached
    assert list(result["stages_ms"]) == list(train_step.STAGES)
    assert all(f"  {stage}: " in out and result["stages_ms"][stage] > 0 for stage in train_step.STAGES)
    assert result["images_per_update"] == 4 and result["teraflop_per_update"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("image_guidance", [1.5, 1.0])
def test_batches_are_timed_against_the_snippet(image_guidance, tmp_path, capsys, monkeypatch):
    from benchmarks import inference, models

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)  # half precision would not hold what is held here
    tiny = {"unet": (32, 32, 32, 32), "vae": (32, 32, 32, 32), "text": (32, 1, 4)}
    monkeypatch.setitem(models.SIZES, "small", tiny)
    flags = ["--images=3", "--batch_size=2", "--steps=2", "--repeats=1", f"--image_guidance_scale={image_guidance}"]
    result = inference.main([*flags, f"--folder={tmp_path}"])
    out = capsys.readouterr().out
    assert json.loads(out.splitlines()[-1]) == result
    assert len(result["largest_differences"]) == 3 and max(result["largest_differences"].values()) <= 1
    assert all(len(times) == 1 for times in result["seconds"].values())
    for line in ("snippet", "edit_images", *result["largest_differences"]):
        assert f"  {line}:" in out


@pytest.mark.parametrize(
    ("module", "flags", "message"),
    [
        ("tests.equivalence", ["--reference=/no/such/file.py"], "--reference: /no/such/file.py is not a file"),
        ("tests.equivalence", ["--updates=0"], "--updates: 0 is too small"),
        ("benchmarks.train_step", ["--size=huge"], "--size: invalid choice: 'huge'"),
        ("benchmarks.inference", ["--resolution=100"], "--resolution: 100 is not a multiple of 64"),
        ("benchmarks.inference", ["--images=0"], "--images: 0 is too small"),
        ("benchmarks.inference", ["--images=9999"], "--images: 9999 is too many"),
        (
            "benchmarks.compare_with_reference",
            ["--reference=/no/such/file.py"],
            "--reference: /no/such/file.py is not a file",
        ),
        (
            "benchmarks.compare_with_reference",
            [f"--reference={__file__}", "--updates=25"],
            "--updates: 25 is not 20, 30, ...",
        ),
    ],
)
def test_mistakes_are_one_line(module, flags, message):
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        importlib.import_module(module).parse_args(flags)
    assert "\n" not in str(caught.value)
