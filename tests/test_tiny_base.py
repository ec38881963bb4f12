"""The tiny stand-ins for Stable Diffusion: that they are complete, reproducible, usable at several sizes."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from safetensors import safe_open

from data_preparation import build_generic_edits
from instruct_pix2pix import editing
from instruct_pix2pix.building.cartoonizer import opencv_cartoonize
from instruct_pix2pix.building.generic_edits import EDITS, FUNCTIONS, RESTORATIONS, WORDINGS
from instruct_pix2pix.cli import UserError
from instruct_pix2pix.data.rows import find_rows
from instruct_pix2pix.data.sources import Source
from instruct_pix2pix.evaluation.metrics import psnr
from instruct_pix2pix.models.sd import widen_conv_in
from instruct_pix2pix.models.tiny import build_tiny_pipeline, build_tokenizer, save_pipeline
from instruct_pix2pix.training.tiny_base import optimise, standardise_latents, to_model
from tests.data_scripts import checksums, make_photos, pixels, plan_of, read_rows
from tools import make_tiny_words, save_tiny_base, train_tiny_base

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


def test_usual_words_are_one_token_each_and_other_text_survives():
    tokenizer = build_tokenizer()
    for word in "make it a cartoon derain grayscale posterize watercolor windmill jpeg".split():
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


def test_known_words_become_tokens_with_their_vectors(tmp_path):
    """Vectors of 80 numbers for a hundred words, the later the rarer: frequent ones are chosen, and those that are near
    a word of the instructions; the new text encoder has their principal components."""
    from transformers import CLIPTextModel, CLIPTokenizer

    rng = np.random.default_rng(0)
    others = ["".join(rng.choice(list("abcdefgh"), 6)) for _ in range(90)]
    words = [*dict.fromkeys(make_tiny_words.STANDS_FOR.values()), *others, "pour", "bath"]
    vectors = rng.standard_normal((len(words), 80))
    assert words[0] == "rain"
    vectors[-2] = vectors[0] + 0.1 * vectors[-2]  # as near to rain as can be
    content = {"words": words, "dimensions": 80, "vectors": dict(zip(words, vectors.tolist(), strict=True))}
    (tmp_path / "vectors.json").write_text(json.dumps(content))
    flags = ["--vectors", str(tmp_path / "vectors.json"), "--frequent", "90", "--near", "1"]
    make_tiny_words.main([*flags, "--output_dir", str(tmp_path / "words")])
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "words/tokenizer")
    found = {word: tokenizer(word).input_ids[1:-1] for word in [*words, "derain"]}
    assert all(len(found[word]) == 1 for word in [*words[:90], "pour", "derain"])
    assert len(found["bath"]) > 1
    weights = CLIPTextModel.from_pretrained(tmp_path / "words/text_encoder").get_input_embeddings().weight.detach()
    assert len(weights) == len(tokenizer)
    like = torch.cosine_similarity(
        weights[found["rain"][0]], weights[[found[word][0] for word in (*words[:90], "pour")]]
    )
    assert torch.equal(weights[found["derain"][0]], weights[found["rain"][0]])
    assert like.argsort(descending=True)[:2].tolist() == [0, 90]
    with pytest.raises(UserError, match="--output_dir: .* exists"):
        make_tiny_words.main([*flags, "--output_dir", str(tmp_path / "words")])


def test_the_seed_decides_the_weights_and_the_callers_random_state_is_kept():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = fingerprint(build_tiny_pipeline(seed=1))
    assert torch.equal(torch.rand(1), expected)
    assert fingerprint(build_tiny_pipeline(seed=1)) == first
    assert fingerprint(build_tiny_pipeline(seed=2)) != first


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
    # The layout of transformers 4, which 5 reads too.
    assert (folder / "tokenizer/vocab.json").is_file() and (folder / "tokenizer/merges.txt").is_file()
    with safe_open(folder / "text_encoder/model.safetensors", "pt") as weights:
        assert all(name.startswith("text_model.") for name in weights.keys())

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
    save_pipeline(loaded, tmp_path / "again")
    assert not [path for path in (tmp_path / "again").rglob("*.json") if str(tmp_path) in path.read_text()]


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


# --- how the kept models are trained ------------------------------------------------------------------


def photo_tiles(count: int = 6, size: int = 64) -> np.ndarray:
    tiles = []
    for path in sorted(PHOTOS.glob("train/*.webp"))[:count]:
        with Image.open(path) as photo:
            tiles.append(np.asarray(photo.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)))
    return np.stack(tiles)


@pytest.mark.parametrize("name", [*EDITS, *RESTORATIONS])
def test_every_edit_changes_the_photo_and_has_its_own_wordings(name):
    function, wordings = FUNCTIONS[name], WORDINGS[name]
    photo = photo_tiles(1)[0]
    kept = photo.copy()
    edited = function(photo, np.random.default_rng(0))
    assert edited.shape == photo.shape and edited.dtype == np.uint8
    assert np.array_equal(photo, kept), "the source was changed"
    assert np.array_equal(edited, function(photo, np.random.default_rng(0)))
    assert np.array_equal(edited, photo) == (name == "keep")
    others = {text for other, texts in WORDINGS.items() if other != name for text in texts}
    assert len(wordings) >= 3 and not others & set(wordings)
    assert not [text for text in wordings if "cartoon" in text]


def test_edits_go_the_way_they_say():
    photo = photo_tiles(1)[0]
    mean = {name: FUNCTIONS[name](photo, None).mean((0, 1)) for name in EDITS}
    assert np.ptp(mean["gray"]) < 1e-6
    assert mean["warm"][0] - mean["warm"][2] > mean["keep"][0] - mean["keep"][2]
    assert mean["cool"][0] - mean["cool"][2] < mean["keep"][0] - mean["keep"][2]
    assert mean["darker"].mean() < mean["keep"].mean() < mean["brighter"].mean()
    low_light = FUNCTIONS["low light"](photo, np.random.default_rng(0))
    assert low_light.mean() < 0.5 * photo.mean()


def test_standardised_latents_decode_to_the_same_image():
    torch.manual_seed(0)
    vae = build_tiny_pipeline().vae
    with torch.no_grad():
        # Latents that are far from standard, and not alike.
        vae.quant_conv.bias[:4] = torch.tensor([2.0, -1.0, 0.5, 3.0])
        vae.quant_conv.weight[:4] *= torch.tensor([5.0, 0.2, 1.0, 9.0])[:, None, None, None]
        images = to_model(photo_tiles())
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
    wide = build_tiny_pipeline(4).unet
    widen_conv_in(wide)
    noisy, source = torch.randn(2, 4, 16, 16), torch.randn(2, 4, 16, 16)
    text, times = torch.randn(2, 77, 64), torch.tensor([10, 900])
    with torch.no_grad():
        expected = unet(noisy, times, text).sample
        assert torch.allclose(wide(torch.cat([noisy, source], 1), times, text).sample, expected, atol=1e-5)


def test_a_stage_learns_and_its_seed_decides_what():
    def run(seed: int):
        torch.manual_seed(3)
        layer = torch.nn.Conv2d(4, 16, 3)

        def loss_at(generator):
            return (layer(torch.randn(2, 4, 6, 6, generator=generator)) - 1).square().mean()

        weight, bias = (parameter.detach().clone() for parameter in layer.parameters())  # Muon's and AdamW's
        start = loss_at(torch.Generator().manual_seed(9)).item()
        figures = optimise("toy", [layer], 200, loss_at, seed)
        assert figures["updates"] == 200 and loss_at(torch.Generator().manual_seed(9)).item() < 0.9 * start
        assert not torch.equal(layer.weight, weight) and not torch.equal(layer.bias, bias)
        return layer.weight

    first = run(0)
    assert torch.equal(run(0), first) and not torch.equal(run(1), first)


def test_scripts_say_in_one_line_what_is_missing(tmp_path):
    with pytest.raises(UserError, match="--photos: .* has no folder train"):
        train_tiny_base.main(["--photos", str(PHOTOS / "train"), "--work_dir", str(tmp_path / "work")])
    with pytest.raises(UserError, match="--work_dir: .* has no vae.json"):
        save_tiny_base.main(["--work_dir", str(tmp_path)])
    with pytest.raises(UserError, match="--vectors: .* cannot be read"):
        make_tiny_words.main(["--vectors", str(tmp_path / "none.json"), "--output_dir", str(tmp_path / "words")])
    with pytest.raises(UserError, match="--photos: missing"):
        build_generic_edits.main(["--output_dir", str(tmp_path / "edits")])
    with pytest.raises(UserError, match="--keep_share: 2.0 is not a share"):
        build_generic_edits.main(
            ["--output_dir", str(tmp_path / "edits"), "--photos", str(PHOTOS), "--keep_share", "2"]
        )


# --- the dataset of generic edits ---------------------------------------------------------------------


def build_edits(folder: Path, photos: Path, *flags: str) -> Path:
    build_generic_edits.main(["--photos", str(photos), "--output_dir", str(folder), "--rows", "120", *flags])
    return folder


def test_generic_edits_are_pairs_that_training_reads(tmp_path):
    whole = ("--validation_fraction", "0", "--test_fraction", "0", "--keep_share", "0.25")
    dataset = build_edits(tmp_path / "edits", make_photos(tmp_path / "photos", 8, side=96), *whole)
    found = find_rows(Source(str(dataset), "--dataset_name"))
    assert len(found.table) == 120
    assert found.columns == {name: name for name in ("original_image", "edit_prompt", "edited_image")}
    tasks = set()
    for row in read_rows(dataset, "train"):
        source, target = pixels(row["original_image"]), pixels(row["edited_image"])
        assert source.shape == target.shape == (64, 64, 3)
        assert row["edit_prompt"] in WORDINGS[row["task"]]
        assert np.array_equal(source, target) == (row["task"] == "keep")
        if row["task"] == "invert":
            assert np.array_equal(target, 255 - source)
        if row["task"] == "low light":
            assert source.mean() < 0.6 * target.mean()
        tasks.add(row["task"])
    assert tasks == set(WORDINGS)
    assert 0.1 < np.mean([row["task"] == "keep" for row in plan_of(dataset)]) < 0.4


def test_generic_edits_are_the_same_to_the_byte_after_a_kill_and_differ_by_seed(tmp_path):
    photos = make_photos(tmp_path / "photos", 8, side=96)
    flags = ("--rows_per_shard", "40")
    whole = build_edits(tmp_path / "whole", photos, *flags)
    parts = build_edits(tmp_path / "parts", photos, *flags)
    for name in ("README.md", "data/train-00001-of-00003.parquet"):  # as a kill might have left it
        (parts / name).unlink()
    build_edits(parts, photos, *flags)
    made = checksums(whole)
    # The card says which command made it.
    assert {**checksums(parts), "README.md": ""} == {**made, "README.md": ""}
    other = build_edits(tmp_path / "other", photos, *flags, "--seed", "1")
    assert checksums(other)["data/train-00000-of-00003.parquet"] != made["data/train-00000-of-00003.parquet"]


@pytest.mark.long
def test_recipe_runs_to_the_end(tmp_path):
    """Two updates of every stage: the models are there, whole and described."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "WORK_DIR": str(tmp_path / "work"),
        "OUTPUT_DIR": str(tmp_path / "models"),
        "STEPS": "2 2",
        "TILES": "50",
        "MAX_TRAIN_STEPS": "2",
        "EDITS_MEASURED": "25",
    }
    done = subprocess.run(["bash", ROOT / "recipes/tiny_base.sh"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("tiny-stable-diffusion", "tiny-instruct-pix2pix"):
        card = (tmp_path / "models" / name / "README.md").read_text()
        assert "## Figures" in card and '"vae": {\n    "updates": 2,' in card
    assert "derain, " in card
    assert json.loads((tmp_path / "models/tiny-instruct-pix2pix/unet/config.json").read_text())["in_channels"] == 8


# --- the models kept in assets/ -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def kept():
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(ASSETS / "tiny-instruct-pix2pix", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def held_out(count: int = 6) -> np.ndarray:
    """uint8 (count, 128, 128, 3): every fourth held-out photo, resized and cropped."""
    crops = []
    for path in sorted(PHOTOS.glob("test/*.webp"))[:: 24 // count]:
        with Image.open(path) as photo:
            crops.append(np.asarray(ImageOps.fit(photo.convert("RGB"), (128, 128), Image.Resampling.LANCZOS)))
    return np.stack(crops)


def decibels(images: np.ndarray, targets: np.ndarray) -> np.ndarray:
    return np.array([psnr(image, target) for image, target in zip(images, targets, strict=True)])


def round_trip(vae, images: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        decoded = vae.decode(vae.encode(to_model(images)).latent_dist.mode()).sample.clamp(-1, 1)
    return ((decoded + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def edit(pipeline, images: np.ndarray, instruction: str) -> np.ndarray:
    pictures, seeds = [Image.fromarray(image) for image in images], list(range(len(images)))
    scales = dict(guidance_scale=1.0, image_guidance_scale=1.0)
    edited = editing.edit(pipeline, [instruction] * len(images), pictures, seeds, steps=20, **scales)
    return np.stack([np.asarray(picture) for picture in edited])


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


def test_kept_base_knows_words_that_no_instruction_here_has():
    from transformers import CLIPTextModel

    tokenizer = build_tokenizer()
    pairs = "downpour rain", "crimson red", "downpour blur", "crimson noise"
    first, second = np.array([tokenizer(words).input_ids[1:3] for words in pairs]).T
    text_encoder = CLIPTextModel.from_pretrained(ASSETS / "tiny-stable-diffusion/text_encoder")
    vectors = text_encoder.get_input_embeddings().weight.detach()
    like = torch.cosine_similarity(vectors[first], vectors[second])
    assert like[:2].min() > 0.5 and like[2:].max() < 0.3


def test_kept_autoencoder_holds_held_out_photos_and_cartoons(kept):
    images = held_out(12)
    assert decibels(round_trip(kept.vae, images), images).mean() > 28
    cartoons = opencv_cartoonize(images)
    assert decibels(round_trip(kept.vae, cartoons), cartoons).mean() > 27
    latents = kept.vae.encode(to_model(images)).latent_dist.mode() * kept.vae.config.scaling_factor
    assert 0.7 < latents.std() < 1.3


def test_kept_model_keeps_the_image(kept):
    images = held_out()
    assert decibels(edit(kept, images, "keep the image"), round_trip(kept.vae, images)).mean() > 36


@pytest.mark.slow
def test_kept_model_reads_the_instruction(kept):
    """The same photo goes different ways, each the one that was asked for."""
    images = held_out(4)
    kept_as_is, brighter, darker = (
        edit(kept, images, text).mean((1, 2, 3)) for text in ("keep the image", "make it brighter", "make it darker")
    )
    assert (brighter > kept_as_is).all() and (darker < kept_as_is).all()
    inverted = edit(kept, images, "invert the colors")
    assert (decibels(inverted, 255 - images) > decibels(images, 255 - images) + 5).all()


def test_kept_model_lights_up_dark_photos(kept):
    images = held_out(4)
    rng = np.random.default_rng(0)
    dark = np.stack([FUNCTIONS["low light"](photo, rng) for photo in images])
    restored = edit(kept, dark, "enhance the low light image")
    assert decibels(restored, images).mean() > decibels(dark, images).mean() + 4
