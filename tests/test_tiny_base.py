"""The tiny stand-ins for Stable Diffusion: that they are complete, reproducible, usable at several sizes."""

import argparse
import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from safetensors import safe_open

from instruct_pix2pix.building.cartoonizer import opencv_cartoonize
from instruct_pix2pix.models.tiny import VOCABULARY, build_tiny_pipeline, build_tokenizer, save_pipeline
from tools.generic_edits import EDITS, RESTORATIONS
from tools.train_tiny_base import (
    embed_linear,
    linear_decode,
    linear_encode,
    optimise,
    psnr,
    sample,
    standardise_latents,
    widen,
)

ROOT = Path(__file__).parent.parent
ASSETS = ROOT / "assets"
PHOTOS = ASSETS / "photos"
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


def run_script(*arguments, module: str = "build_tiny_base") -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", f"tools.{module}", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


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


# --- how the kept models are trained ------------------------------------------------------------------


def photo_tiles(count: int = 6, size: int = 64) -> np.ndarray:
    tiles = []
    for path in sorted(PHOTOS.glob("train/*.webp"))[:count]:
        with Image.open(path) as photo:
            tiles.append(np.asarray(photo.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)))
    return np.stack(tiles)


@pytest.mark.parametrize("name", [*EDITS, *RESTORATIONS])
def test_every_edit_changes_the_photo_and_has_its_own_wordings(name):
    function, wordings = EDITS.get(name) or RESTORATIONS[name]
    photo = photo_tiles(1)[0]
    kept = photo.copy()
    edited = function(photo, np.random.default_rng(0))
    assert edited.shape == photo.shape and edited.dtype == np.uint8
    assert np.array_equal(photo, kept), "the source was changed"
    assert np.array_equal(edited, function(photo, np.random.default_rng(0)))
    assert np.array_equal(edited, photo) == (name == "keep")
    others = {text for other, (_, texts) in {**EDITS, **RESTORATIONS}.items() if other != name for text in texts}
    assert len(wordings) >= 3 and not others & set(wordings)
    assert not [text for text in wordings if "cartoon" in text]


def test_edits_go_the_way_they_say():
    photo = photo_tiles(1)[0]
    mean = {name: EDITS[name][0](photo, None).mean((0, 1)) for name in EDITS}
    assert np.ptp(mean["gray"]) < 1e-6
    assert mean["warm"][0] - mean["warm"][2] > mean["keep"][0] - mean["keep"][2]
    assert mean["cool"][0] - mean["cool"][2] < mean["keep"][0] - mean["keep"][2]
    assert mean["darker"].mean() < mean["keep"].mean() < mean["brighter"].mean()
    low_light = RESTORATIONS["low light"][0](photo, np.random.default_rng(0))
    assert low_light.mean() < 0.5 * photo.mean()


def test_embedding_makes_the_network_linear():
    """After `embed_linear` the autoencoder computes the linear one, within a hundredth of its energy."""
    torch.manual_seed(0)
    vae = build_tiny_pipeline().vae
    images = torch.from_numpy(photo_tiles()).permute(0, 3, 1, 2).float() / 127.5 - 1
    # A step of training gives the linear path some meaning; the first weights decode to next to nothing.
    optimiser = torch.optim.Adam(vae.parameters(), lr=5e-3)
    for _ in range(30):
        loss = (linear_decode(vae, linear_encode(vae, images)) - images).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        expected = linear_decode(vae, linear_encode(vae, images))
        embed_linear(vae, images)
        latents = vae.encode(images).latent_dist.mode()
        computed = vae.decode(latents).sample
    assert expected.square().mean() > 0.1 * images.square().mean()
    assert (computed - expected).square().mean() < 0.01 * expected.square().mean()
    assert latents.mean((0, 2, 3)).abs().max() < 0.1
    assert (latents.std((0, 2, 3)) - 1).abs().max() < 0.1


def test_standardised_latents_decode_to_the_same_image():
    torch.manual_seed(0)
    vae = build_tiny_pipeline().vae
    with torch.no_grad():
        # Latents that are far from standard, and not alike.
        vae.quant_conv.bias[:4] = torch.tensor([2.0, -1.0, 0.5, 3.0])
        vae.quant_conv.weight[:4] *= torch.tensor([5.0, 0.2, 1.0, 9.0])[:, None, None, None]
        images = torch.from_numpy(photo_tiles()).permute(0, 3, 1, 2).float() / 127.5 - 1
        expected = vae.decode(vae.encode(images).latent_dist.mode()).sample
        standardise_latents(vae, images)
        posterior = vae.encode(images).latent_dist
        computed = vae.decode(posterior.mode()).sample
    assert torch.allclose(computed, expected, atol=1e-4)
    assert posterior.mean.mean((0, 2, 3)).abs().max() < 1e-3
    assert (posterior.mean.std((0, 2, 3)) - 1).abs().max() < 1e-3
    assert torch.allclose(posterior.std, torch.tensor(0.05))


def test_widened_unet_ignores_the_new_channels_at_first():
    unet = build_tiny_pipeline(4).unet
    wide = widen(unet).eval()
    noisy, source = torch.randn(2, 4, 16, 16), torch.randn(2, 4, 16, 16)
    text, times = torch.randn(2, 77, 64), torch.tensor([10, 900])
    with torch.no_grad():
        expected = unet(noisy, times, text).sample
        assert torch.allclose(wide(torch.cat([noisy, source], 1), times, text).sample, expected, atol=1e-5)


@pytest.mark.parametrize("matrix_rate", [0.0, 1e-2], ids=["AdamW", "with Muon"])
def test_a_stopped_stage_goes_on_where_it_was(tmp_path, matrix_rate):
    """Two updates and two more leave the same weights as four at once."""

    def state(folder: Path):
        with safe_open(folder / "toy.state.safetensors", "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()["step"]

    def run(folder: Path, stop_after: int | None):
        torch.manual_seed(3)
        layer = torch.nn.Conv2d(4, 16, 3)
        calls = []

        def loss(step, generator):
            if stop_after is not None and len(calls) == stop_after:
                raise KeyboardInterrupt
            calls.append(step)
            return (layer(torch.randn(2, 4, 6, 6, generator=generator)) - 1).square().mean()

        settings = dict(work_dir=folder, steps=4, device="cpu", seed=0, ema=0.9, log_every=1)
        settings |= dict(learning_rate=1e-2, matrix_learning_rate=matrix_rate)
        folder.mkdir(exist_ok=True)
        optimise("toy", {"layer": layer}, loss, dict, argparse.Namespace(**settings))
        return calls

    run(tmp_path / "whole", None)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", 2)
    assert run(tmp_path / "parts", None) == [2, 3]
    whole, parts = state(tmp_path / "whole"), state(tmp_path / "parts")
    # Muon keeps a momentum of the convolution's weight alone; the bias is AdamW's in either case.
    assert ("momentum_buffer.layer.weight" in whole[0]) == (matrix_rate > 0)
    assert "exp_avg_sq.layer.bias" in whole[0]
    assert whole[1] == parts[1] == "4" and whole[0].keys() == parts[0].keys()
    for key, value in whole[0].items():
        assert torch.equal(value, parts[0][key]), key


def test_training_scripts_say_in_one_line_what_is_missing(tmp_path):
    wrong = run_script("--stage", "instruct", "--work_dir", tmp_path, module="train_tiny_base")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and "--stage" in wrong.stderr
    wrong = run_script("--work_dir", tmp_path, "--output_dir", tmp_path, module="save_tiny_base")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and "linear" in wrong.stderr


# --- the models kept in assets/ -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def kept():
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(ASSETS / "tiny-instruct-pix2pix", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def held_out(count: int = 6) -> torch.Tensor:
    """(count, 3, 128, 128) in [-1, 1]: every fourth held-out photo, resized and cropped."""
    crops = []
    for path in sorted(PHOTOS.glob("test/*.webp"))[:: 24 // count]:
        with Image.open(path) as photo:
            crops.append(np.asarray(ImageOps.fit(photo.convert("RGB"), (128, 128), Image.Resampling.LANCZOS)))
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 127.5 - 1


def round_trip(vae, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return vae.decode(vae.encode(images).latent_dist.mode()).sample.clamp(-1, 1)


def edit(pipeline, images: torch.Tensor, instruction: str) -> torch.Tensor:
    return sample(pipeline, images, [instruction] * len(images), 1.0, 1.0, "cpu")


def test_kept_models_are_small_whole_and_described():
    from diffusers import DiffusionPipeline

    total = 0
    for name in ("tiny-stable-diffusion", "tiny-instruct-pix2pix"):
        files = [path for path in (ASSETS / name).rglob("*") if path.is_file()]
        total += sum(path.stat().st_size for path in files)
        assert {path.suffix for path in files} <= {".json", ".md", ".safetensors", ".txt"}
        assert "## Figures" in (ASSETS / name / "README.md").read_text()
        pipeline = DiffusionPipeline.from_pretrained(ASSETS / name, local_files_only=True)
        assert {getattr(pipeline, component).dtype for component in COMPONENTS} == {torch.float32}
    assert total < 24e6


def test_kept_autoencoder_holds_held_out_photos_and_cartoons(kept):
    images = held_out(12)
    assert psnr(round_trip(kept.vae, images), images).mean() > 28
    photos = ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    cartoons = torch.from_numpy(opencv_cartoonize(photos)).permute(0, 3, 1, 2).float() / 127.5 - 1
    assert psnr(round_trip(kept.vae, cartoons), cartoons).mean() > 27
    latents = kept.vae.encode(images).latent_dist.mode() * kept.vae.config.scaling_factor
    assert 0.7 < latents.std() < 1.3


def test_kept_model_keeps_the_image(kept):
    images = held_out()
    assert psnr(edit(kept, images, "keep the image"), round_trip(kept.vae, images)).mean() > 36


@pytest.mark.slow
def test_kept_model_reads_the_instruction(kept):
    """The same photo goes different ways, each the one that was asked for."""
    images = held_out(4)
    kept_as_is, brighter, darker = (
        edit(kept, images, text).mean((1, 2, 3)) for text in ("keep the image", "make it brighter", "make it darker")
    )
    assert (brighter > kept_as_is).all() and (darker < kept_as_is).all()
    inverted = edit(kept, images, "invert the colors")
    assert (psnr(inverted, -images) > psnr(images, -images) + 5).all()


def test_kept_model_lights_up_dark_photos(kept):
    images = held_out(4)
    rng = np.random.default_rng(0)
    photos = ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    dark = np.stack([RESTORATIONS["low light"][0](photo, rng) for photo in photos])
    dark = torch.from_numpy(dark).permute(0, 3, 1, 2).float() / 127.5 - 1
    restored = edit(kept, dark, "enhance the low light image")
    assert psnr(restored, images).mean() > psnr(dark, images).mean() + 4
