"""The tiny stand-ins for Stable Diffusion: that they are complete, reproducible, usable at several sizes."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tools.build_tiny_base import VOCABULARY, build_tiny_pipeline, build_tokenizer, save_pipeline

COMPONENTS = ("vae", "text_encoder", "unet")


def fingerprint(pipeline) -> str:
    digest = hashlib.sha256()
    for name in COMPONENTS:
        for key, value in sorted(getattr(pipeline, name).state_dict().items()):
            digest.update(key.encode() + value.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def test_every_listed_word_is_one_token_and_other_text_survives():
    tokenizer = build_tokenizer()
    for word in VOCABULARY.split():
        ids = tokenizer(word).input_ids
        assert len(ids) == 3, word
        assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    text = "cartoonize the façade, zürich 2024"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True).replace(" ,", ",") == (
        "cartoonize the façade, zürich 2 0 2 4"
    )
    padded = tokenizer("keep it", padding="max_length", truncation=True).input_ids
    assert len(padded) == 77 and padded[-1] == tokenizer.pad_token_id
    assert max(tokenizer.get_vocab().values()) + 1 == len(tokenizer)


def test_the_seed_decides_the_weights_and_the_callers_random_state_is_kept():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = fingerprint(build_tiny_pipeline(seed=1))
    assert torch.equal(torch.rand(1), expected)
    assert fingerprint(build_tiny_pipeline(seed=1)) == first
    assert fingerprint(build_tiny_pipeline(seed=2)) != first


def test_other_channel_counts_are_refused():
    with pytest.raises(ValueError, match="in_channels: 5"):
        build_tiny_pipeline(in_channels=5)


@pytest.mark.parametrize("in_channels", [4, 8])
def test_saved_pipeline_loads_back_whole(tmp_path, in_channels):
    from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    pipeline = build_tiny_pipeline(in_channels)
    folder = tmp_path / "tiny"
    save_pipeline(pipeline, folder)
    with pytest.raises(FileExistsError):
        save_pipeline(pipeline, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
    assert not [path for path in folder.rglob("*") if path.suffix in {".bin", ".pt", ".ckpt", ".pkl"}]

    for name, model_class in (
        ("vae", AutoencoderKL),
        ("unet", UNet2DConditionModel),
        ("text_encoder", CLIPTextModel),
    ):
        model, report = model_class.from_pretrained(
            folder, subfolder=name, local_files_only=True, output_loading_info=True
        )
        assert not any(report.values()), (name, report)
        for key, value in getattr(pipeline, name).state_dict().items():
            assert torch.equal(model.state_dict()[key], value), (name, key)
    tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer", local_files_only=True)
    sentence = "Make it gray, please: unbelievable!"
    assert tokenizer(sentence).input_ids == pipeline.tokenizer(sentence).input_ids
    assert tokenizer.model_max_length == 77

    loaded = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    assert type(loaded) is type(pipeline)
    assert loaded.scheduler.config.prediction_type == "v_prediction"
    assert fingerprint(loaded) == fingerprint(pipeline)


@pytest.mark.parametrize("side", [64, 96, 128])
def test_both_pipelines_run_at_several_sizes(side):
    common = dict(num_inference_steps=2, output_type="pt", generator=torch.Generator().manual_seed(0))
    text_to_image = build_tiny_pipeline(4)
    text_to_image.set_progress_bar_config(disable=True)
    image = text_to_image("a photo of a windmill", height=side, width=side, **common).images
    assert image.shape == (1, 3, side, side) and torch.isfinite(image).all()

    edit = build_tiny_pipeline(8)
    edit.set_progress_bar_config(disable=True)
    edited = edit("make it gray", image=image, image_guidance_scale=1.5, guidance_scale=7.0, **common).images
    assert edited.shape == (1, 3, side, side) and torch.isfinite(edited).all()


def run_script(*arguments) -> subprocess.CompletedProcess:
    script = Path(__file__).parent.parent / "tools" / "build_tiny_base.py"
    return subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)


def test_the_script_says_in_one_line_what_is_wrong(tmp_path):
    (tmp_path / "kept.txt").write_text("mine")
    taken = run_script("--output_dir", tmp_path)
    assert taken.returncode == 2
    assert taken.stderr.count("\n") == 1 and "--output_dir" in taken.stderr and "another" in taken.stderr
    assert (tmp_path / "kept.txt").read_text() == "mine"
    wrong = run_script("--output_dir", tmp_path / "new", "--in_channels", "3")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and "--in_channels" in wrong.stderr


def test_the_script_saves_a_pipeline(tmp_path):
    folder = tmp_path / "tiny"
    done = run_script("--output_dir", folder, "--in_channels", "8")
    assert done.returncode == 0, done.stderr
    assert (folder / "model_index.json").is_file()
    assert (folder / "unet" / "diffusion_pytorch_model.safetensors").is_file()
