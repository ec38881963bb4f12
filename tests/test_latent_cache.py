"""The latent cache: the same training, a build that can be stopped, and a folder that is never mistaken."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file

from instruct_pix2pix.cli import RowError, UserError
from instruct_pix2pix.data import latent_cache
from tests.conftest import ROOT, assert_same_tensors, copy_tree, losses, to_argv

UNET = "unet/diffusion_pytorch_model.safetensors"
LIVE = {"no-cache_latents": True}
FIXED = {"center_crop": True, "random_flip": True}  # one crop, two orientations


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    """Several files of each kind, although there are ten rows and two instructions."""
    monkeypatch.setattr(latent_cache, "ROWS_PER_FILE", 4)
    monkeypatch.setattr(latent_cache, "TEXTS_PER_FILE", 1)


@pytest.fixture
def built(monkeypatch) -> list[str]:
    """Names of the cache's files as they are written."""
    names, write = [], latent_cache._write
    monkeypatch.setattr(latent_cache, "_write", lambda path, *content: names.append(path.name) or write(path, *content))
    return names


def only_cache(folder):
    (found,) = folder.glob("latent-cache-*")
    return found


# ---- what is trained


@pytest.mark.parametrize(("workers", "embedding_noise"), [(0, 0), (2, 0), (0, 2)])
def test_cached_training_is_uncached_training(workers, embedding_noise, small_run, built):
    """Flips, dropout, two wordings, 24 samples of 10 rows: the same losses to rounding, over two epochs."""
    dropout = {"conditioning_dropout_prob": 0.2, "embedding_noise": embedding_noise}
    flags = {"max_train_steps": 6, **dropout, **FIXED}
    live = losses(small_run(name="live", **LIVE, **flags))
    cached = losses(small_run(name="cached", dataloader_num_workers=workers, cache_latents=True, **flags))
    assert cached == pytest.approx(live, abs=1e-5)
    assert sorted(built) == [
        *(f"moments-0000{n}.safetensors" for n in range(3)),
        *(f"text-0000{n}.safetensors" for n in range(2)),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("geometry", ["resize_crop", "crop"])
def test_cached_crops_are_those_of_the_first_epochs_in_turn(geometry, small_run):
    flags = {"max_train_steps": 5, "image_geometry": geometry, "random_flip": True}  # 20 samples: two epochs
    live = losses(small_run(name="live", **LIVE, **flags))
    assert losses(small_run(name="two", cached_crops=2, **flags)) == pytest.approx(live, abs=1e-5)
    one = losses(small_run(name="one", cached_crops=1, **flags))  # the second epoch sees the first one's crops again
    assert one[:2] == pytest.approx(live[:2], abs=1e-5) and one[3:] != pytest.approx(live[3:], abs=1e-5)


def test_mirrored_pictures_are_encoded_not_latents_mirrored(small_run):
    file = load_file(
        only_cache(small_run(max_train_steps=1, cache_latents=True, **FIXED)) / "moments-00000.safetensors"
    )
    plain, mirrored = file["original_mean"].unbind(dim=1)
    assert (plain.flip(-1) - mirrored).abs().max() > 0.01 * plain.std()


def test_resuming_from_the_cache_is_exact(small_run, tmp_path, built):
    flags = {"use_ema": True, "checkpointing_steps": 2, "cached_crops": 2, "random_flip": True}
    whole = small_run(name="whole", **flags)
    (tmp_path / "halved").mkdir()
    copy_tree(whole / "checkpoint-2", tmp_path / "halved" / "checkpoint-2")
    copy_tree(only_cache(whole), tmp_path / "halved" / only_cache(whole).name)
    built.clear()
    halved = small_run(name="halved", resume_from_checkpoint="latest", **flags)
    assert not built
    assert_same_tensors(whole / UNET, halved / UNET)
    assert_same_tensors(whole / "checkpoint-4/ema.safetensors", halved / "checkpoint-4/ema.safetensors")


def test_validation_and_export_work_while_the_frozen_models_rest(small_run, base_models):
    photo = ROOT / "assets/photos/test/sea6.webp"
    flags = {"val_image_url": photo, "validation_prompt": "blur it", "num_validation_images": 1, "validation_steps": 2}
    output_dir = small_run(cache_latents=True, **FIXED, **flags)
    assert len(list((output_dir / "validation").glob("*.png"))) == 2
    for part in ("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        assert_same_tensors(output_dir / part, base_models["finetune"] / part)


@pytest.mark.slow
def test_two_processes_build_and_train_what_one_does(base_models, pairs, small_run, tmp_path):
    flags = {
        "pretrained_model_name_or_path": base_models["finetune"],
        "train_data_dir": pairs,
        "output_dir": tmp_path / "two",
        "resolution": 64,
        "train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "max_train_steps": 2,
        "learning_rate": 1e-3,
        "seed": 7,
        "report_to": "none",
        "cache_latents": True,
        **FIXED,
    }
    code = (
        "import sys; from instruct_pix2pix.data import latent_cache as c; c.ROWS_PER_FILE, c.TEXTS_PER_FILE = 4, 1;"
        " from finetune_instruct_pix2pix import main; main(sys.argv[1:])"
    )
    (tmp_path / "launched.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", tmp_path / "launched.py"]
        + to_argv(flags),
        cwd=ROOT,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    one = small_run(name="one", max_train_steps=2, cache_latents=True, **FIXED)
    assert losses(tmp_path / "two") == pytest.approx(losses(one), rel=1e-4)
    files = sorted(only_cache(one).glob("*.safetensors"))
    assert only_cache(one).name == only_cache(tmp_path / "two").name and len(files) == 5
    for file in files:
        assert_same_tensors(file, only_cache(tmp_path / "two") / file.name)


# ---- when it is on


@pytest.mark.parametrize(
    ("flags", "on"),
    [
        ({"center_crop": True, "max_train_steps": 3}, True),  # 12 samples of 10 rows
        ({"center_crop": True, "max_train_steps": 2}, False),  # 8: encoding all ten would be more work
        ({"image_geometry": "squash", "random_flip": True, "max_train_steps": 4}, False),  # 16 of 20 variants
        ({"image_geometry": "squash", "random_flip": True, "max_train_steps": 5}, True),
        ({"max_train_steps": 100}, False),  # every epoch cuts elsewhere
        ({"max_train_steps": 1, "cached_crops": 3}, True),
        ({"max_train_steps": 100, "cached_crops": 3, "no-cache_latents": True}, False),
    ],
)
def test_it_is_on_where_the_crop_is_fixed_or_counted(flags, on, small_run, capsys):
    small_run(dry_run=True, **flags)
    assert json.loads(capsys.readouterr().out)["flags"]["cache_latents"] is on


def test_flags_that_contradict_each_other(small_run):
    with pytest.raises(UserError, match="--cache_latents: the crop is random.*--cached_crops"):
        small_run(cache_latents=True)
    with pytest.raises(UserError, match="--cached_crops: 4 of a crop that is always the same"):
        small_run(center_crop=True, cached_crops=4)


# ---- the folder


KILLED = """
import os, signal, sys
from instruct_pix2pix.data import latent_cache
latent_cache.ROWS_PER_FILE, latent_cache.TEXTS_PER_FILE = 4, 1
from instruct_pix2pix import files
flush = files.flush
def kill_before_the_second_is_whole(path):
    if "moments-00001" in str(path):
        os.kill(os.getpid(), signal.SIGKILL)
    flush(path)
files.flush = kill_before_the_second_is_whole
from finetune_instruct_pix2pix import main
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_build_that_was_killed_goes_on(base_models, pairs, small_run, tmp_path, built, caplog):
    flags = {
        "pretrained_model_name_or_path": base_models["finetune"],
        "train_data_dir": pairs,
        "output_dir": tmp_path / "run",
        "resolution": 64,
        "train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_train_steps": 2,
        "learning_rate": 1e-3,
        "seed": 7,
        "report_to": "none",
        "cache_latents": True,
        **FIXED,
    }
    done = subprocess.run([sys.executable, "-c", KILLED, *to_argv(flags)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    small_run(max_train_steps=2, cache_latents=True, **FIXED)
    assert sorted(built) == ["moments-00001.safetensors", "moments-00002.safetensors"]
    assert "going on with it" in caplog.text
    whole = small_run(name="whole", max_train_steps=2, cache_latents=True, **FIXED)
    assert losses(tmp_path / "run") == losses(whole)
    assert not list(only_cache(tmp_path / "run").glob(".*"))


def test_a_file_cut_short_is_built_again(small_run, built, tmp_path):
    flags = {"max_train_steps": 1, "cache_latents": True, "cache_dir": tmp_path / "shared", **FIXED}
    first = small_run(name="a", **flags)
    file = only_cache(tmp_path / "shared") / "moments-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    built.clear()
    assert losses(small_run(name="b", **flags)) == losses(first)
    assert built == ["moments-00002.safetensors"] and not list(first.glob("latent-cache-*"))


@pytest.mark.slow
def test_any_changed_input_gives_another_cache(small_run, pairs, base_models, tmp_path, built, caplog):
    def changed(name, **flags):
        built.clear()
        caplog.clear()
        small_run(**{"name": name, "max_train_steps": 1, "cache_latents": True, "cache_dir": shared, **FIXED, **flags})
        return len(built) > 0

    shared = tmp_path / "shared"
    assert changed("first") and not changed("again") and not changed("batch", train_batch_size=1, seed=8)
    assert changed("resolution", resolution=80) and "was made with other geometry" in caplog.text
    assert changed("no flip", random_flip=False)

    image = copy_tree(pairs, tmp_path / "image")
    ImageOps.mirror(Image.open(image / "edited" / "3.png")).save(image / "edited" / "3.png")
    assert changed("image", train_data_dir=image) and "was made with other images: not" in caplog.text
    text = copy_tree(pairs, tmp_path / "text")
    (text / "instructions.txt").write_text("blur it\nmake it very blurry\n")
    assert changed("text", train_data_dir=text) and "was made with other instructions: not" in caplog.text
    assert not changed("same pictures elsewhere", train_data_dir=copy_tree(pairs, tmp_path / "elsewhere"))

    for part, file in (("vae", "diffusion_pytorch_model"), ("text_encoder", "model")):
        model = copy_tree(base_models["finetune"], tmp_path / part)
        weights = load_file(model / part / f"{file}.safetensors")
        weights[sorted(weights)[0]].add_(0.01)
        from safetensors.torch import save_file

        save_file(weights, model / part / f"{file}.safetensors", metadata={"format": "pt"})
        assert changed(f"other {part}", pretrained_model_name_or_path=model), part


def test_a_folder_that_holds_something_else_is_refused(small_run, tmp_path):
    flags = {"max_train_steps": 1, "cache_latents": True, "cache_dir": tmp_path / "shared", **FIXED}
    small_run(name="a", **flags)
    manifest = only_cache(tmp_path / "shared") / "cache.json"
    manifest.write_text(manifest.read_text().replace('"layout": 2', '"layout": 0'))
    with pytest.raises(UserError, match="latent-cache-.* is not the cache its name says; move or delete it"):
        small_run(name="b", **flags)


def test_a_disk_that_is_too_small_is_noticed_before_the_build(small_run, tmp_path, monkeypatch, built):
    place = tmp_path / "small disk"
    monkeypatch.setattr(latent_cache, "free_space", lambda path: 100_000 if path == place else 10**9)
    with pytest.raises(UserError, match=r"the cache needs 0\.3 MB in .*disk, where 0\.1 MB are free; name another"):
        small_run(cache_latents=True, cache_dir=place, **FIXED)
    assert not built


def test_a_row_that_cannot_be_used_is_named_by_the_build(small_run, pairs, tmp_path):
    broken = copy_tree(pairs, tmp_path / "broken")
    file = broken / "edited" / "6.png"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(RowError, match="row 6, column edited_image: cannot be decoded"):
        small_run(train_data_dir=broken, cache_latents=True, on_bad_row="error", **FIXED)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.gpu
def test_on_a_gpu_the_tables_stay_there_and_the_encoders_leave(small_run, monkeypatch):
    seen = {}
    original = latent_cache.LatentCache.look_up

    def noted(self, batch, device):
        seen["tables"] = {table.device.type for tables in self.files.values() for table in tables}
        return original(self, batch, device)

    monkeypatch.setattr(latent_cache.LatentCache, "look_up", noted)
    flags = {"max_train_steps": 5, "mixed_precision": "bf16", **FIXED}
    cached = losses(small_run(name="cached", cache_latents=True, **flags))
    assert seen["tables"] == {"cuda"}
    assert cached == pytest.approx(losses(small_run(name="live", **LIVE, **flags)), rel=2e-2)
