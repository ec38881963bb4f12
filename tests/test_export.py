"""The exported pipeline: whole whenever it stops, the base's own files, readable, without local paths."""

import contextlib
import itertools
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import PNDMScheduler, StableDiffusionInstructPix2PixPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from inference import edit_images
from instruct_pix2pix import editing, publishing
from instruct_pix2pix.cli import UserError
from instruct_pix2pix.edit_folder import model_fingerprint
from instruct_pix2pix.models import sd
from instruct_pix2pix.models.tiny import build_tiny_pipeline
from tests.conftest import copy_tree, run_script, small_photo
from tools import export_checkpoint

FROZEN = ("scheduler", "text_encoder", "tokenizer", "vae")


def export(base, output_dir, unet=None, **changes):
    """Export `unet`, or that of `base`, as a training with these flags does."""
    flags = {
        "pretrained_model_name_or_path": str(base),
        "revision": None,
        "non_ema_revision": None,
        "variant": None,
        "base_config": None,
        "lora_rank": None,
        "zero_terminal_snr": False,
        "cache_dir": None,
        "dataset_name": None,
        "train_data_dir": "pairs",
        "output_dir": str(output_dir),
        "guidance_scale": 4.0,
        "image_guidance_scale": 1.2,
    } | changes
    config = SimpleNamespace(hub_token=None, **flags)
    unet = sd.load_unet(config, None) if unet is None else unet
    publishing.begin(output_dir, flags)
    publishing.export(config, flags, unet, {"steps": 2}, None, "blur it")
    return output_dir


def contents(folder: Path) -> dict[str, bytes]:
    """Every file that belongs to a pipeline, by its path in the folder."""
    names = (*publishing.EXPORTED, publishing.INDEX_FILE)
    files = [path for name in names for path in [folder / name, *(folder / name).rglob("*")] if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture
def base_model(base_models) -> Path:
    return base_models["finetune"]


@pytest.fixture
def other_base(base_model, tmp_path) -> Path:
    """One that differs from `base_model` in every part, and in the scheduler's class."""
    folder = copy_tree(base_model, tmp_path / "other-base")
    for part in ("text_encoder", "unet", "vae"):
        [file] = (folder / part).glob("*.safetensors")
        save_file({name: tensor + 0.5 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    PNDMScheduler(skip_prk_steps=True).save_pretrained(folder / "scheduler")
    (folder / "tokenizer" / "added.txt").write_text("the other's")
    return folder


def edit(folder: Path) -> np.ndarray:
    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return np.asarray(pipeline("blur it", image=small_photo(), num_inference_steps=2, generator=generator).images[0])


# ---- whole, whenever it stops


class Killed(BaseException):
    pass


def test_a_kill_between_any_two_steps_leaves_no_mixture_and_loses_nothing(base_model, other_base, tmp_path):
    unets = [UNet2DConditionModel.from_pretrained(base, subfolder="unet") for base in (base_model, other_base)]
    old, new = export(base_model, tmp_path / "old", unets[0]), export(other_base, tmp_path / "new", unets[1])
    before, after = contents(old), contents(new)

    def is_whole(folder: Path) -> bool:
        now = contents(folder)
        return now == before or now | {"README.md": after["README.md"]} == after  # the card names its folder

    step, killed = 0, True
    while killed:
        step, killed = step + 1, False
        output_dir = copy_tree(old, tmp_path / f"run-{step}")
        done = []

        def until_killed(function, done=done, step=step):
            def call(*arguments, **options):
                done.append(arguments)
                if len(done) == step:
                    raise Killed
                return function(*arguments, **options)

            return call

        with pytest.MonkeyPatch.context() as patched:
            for module, name in ((os, "replace"), (shutil, "rmtree")):
                patched.setattr(module, name, until_killed(getattr(module, name)))
            try:
                export(other_base, output_dir, unets[1])
            except Killed:
                killed = True
        if (output_dir / "model_index.json").exists():
            assert is_whole(output_dir), done[-1]
        else:
            held = {path.read_bytes() for path in output_dir.rglob("*") if path.is_file()}
            assert {content for content in before.values()} <= held, done[-1]
            assert {content for name, content in after.items() if name != "README.md"} <= held, done[-1]
        publishing.begin(output_dir, {})  # as the next run in this folder does
        assert is_whole(output_dir) and not list(output_dir.glob(".*")), done[-1]
        shutil.rmtree(output_dir)
    assert step > 20


def test_a_disk_that_fills_up_leaves_the_old_pipeline(base_model, other_base, tmp_path, monkeypatch):
    output_dir = export(base_model, tmp_path / "run")
    before = contents(output_dir)

    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(UNet2DConditionModel, "save_pretrained", full)
    with pytest.raises(publishing.UserError, match="--output_dir: the pipeline cannot be written into .*No space"):
        export(other_base, output_dir)
    assert contents(output_dir) == before and not list(output_dir.glob(".*"))


def test_weights_that_are_not_finite_are_never_exported(base_model, tmp_path):
    output_dir = export(base_model, tmp_path / "run")
    before = contents(output_dir)
    unet = UNet2DConditionModel.from_pretrained(base_model, subfolder="unet")
    for value in (float("nan"), float("-inf")):
        with torch.no_grad():
            unet.mid_block.resnets[0].conv1.bias[3] = value
        with pytest.raises(publishing.NotFinite, match="mid_block.resnets.0.conv1.bias is not finite") as caught:
            export(base_model, output_dir, unet)
        assert caught.value.exit_code == 1
    assert contents(output_dir) == before


# ---- the base model's own files


def test_what_training_does_not_change_is_the_bases_file_by_file(base_model, other_base, tmp_path):
    for base, scheduler in ((base_model, "DDPMScheduler"), (other_base, "PNDMScheduler")):
        output_dir = export(base, tmp_path / base.name)
        exported, own = contents(output_dir), contents(base)
        frozen = [name for name in own if name.startswith(FROZEN)]
        assert len(frozen) >= 8 and {name: exported[name] for name in frozen} == {name: own[name] for name in frozen}
        assert {name for name in exported if name.startswith(FROZEN)} == set(frozen)
        index = json.loads(exported["model_index.json"])
        reference = json.loads(own["model_index.json"]) | {"scheduler": ["diffusers", scheduler]}
        assert index == reference
        pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(output_dir)
        assert type(pipeline.scheduler).__name__ == scheduler


def test_a_variant_is_exported_under_the_plain_name_and_loads_without_a_word(base_model, tmp_path):
    base = copy_tree(base_model, tmp_path / "base")
    half = StableDiffusionInstructPix2PixPipeline.from_pretrained(base).to(torch.float16)
    half.save_pretrained(base, variant="fp16")  # beside the float32 files
    output_dir = export(base, tmp_path / "run", variant="fp16")
    for name in ("vae/diffusion_pytorch_model", "text_encoder/model"):
        assert (output_dir / f"{name}.safetensors").read_bytes() == (base / f"{name}.fp16.safetensors").read_bytes()
    assert len(list(output_dir.glob("*/*.safetensors"))) == 3
    edit(output_dir)  # all parts in float32


def test_pickled_weights_are_saved_as_safetensors_unless_there_are_both(base_model, tmp_path):
    base = copy_tree(base_model, tmp_path / "base")
    for file in (base / "vae/diffusion_pytorch_model.safetensors", base / "text_encoder/model.safetensors"):
        pickled = file.with_name(
            {"vae": "diffusion_pytorch_model.bin", "text_encoder": "pytorch_model.bin"}[file.parent.name]
        )
        torch.save({name: tensor + 1 for name, tensor in load_file(file).items()}, pickled)
    expected = contents(base_model)
    both = contents(export(base, tmp_path / "both"))
    assert {name: both[name] for name in expected if name.startswith(FROZEN)} == {
        name: expected[name] for name in expected if name.startswith(FROZEN)
    }
    for file in (base / "vae").glob("*.safetensors"), (base / "text_encoder").glob("*.safetensors"):
        own = load_file(found := next(file))
        found.unlink()
        exported = load_file(export(base, tmp_path / found.parent.name) / found.parent.name / found.name)
        assert exported.keys() == own.keys()
        assert all(torch.equal(exported[name], tensor + 1) for name, tensor in own.items())
    assert not list(tmp_path.glob("*/*/*.index.json")) and not list((tmp_path / "vae").glob("*/*.bin"))


# ---- readable


def test_a_base_in_the_newest_layout_is_exported_in_one_that_older_libraries_read(tmp_path):
    base = tmp_path / "base"
    build_tiny_pipeline(in_channels=8, seed=0).save_pretrained(base)
    output_dir = export(base, tmp_path / "run")
    vocabulary = json.loads((output_dir / "tokenizer/vocab.json").read_text())
    merges = (output_dir / "tokenizer/merges.txt").read_text().splitlines()
    model = json.loads((base / "tokenizer/tokenizer.json").read_text())["model"]
    assert vocabulary == model["vocab"] and merges[0].startswith("#version")
    assert [line.split(" ") for line in merges[1:]] == model["merges"]
    flat, named = (
        load_file(base / "text_encoder/model.safetensors"),
        load_file(output_dir / "text_encoder/model.safetensors"),
    )
    assert named.keys() == {f"text_model.{name}" for name in flat}
    (output_dir / "tokenizer/tokenizer.json").unlink()  # without which the newer libraries read the other two
    texts = ["blur it", "Make it 30% SHARPER, don't", "naïve 🦊", "", "rain " * 200]
    read = []
    for folder in (base, output_dir):
        pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(folder)
        ids = sd.tokenize(pipeline.tokenizer, texts)
        read.append((ids, sd.encode_text(pipeline.text_encoder, ids)))
    assert all(torch.equal(one, other) for one, other in zip(*read, strict=True))
    assert np.array_equal(edit(base), edit(output_dir))


# ---- checkpoints


@pytest.fixture(scope="module")
def trained(base_models, pairs, tmp_path_factory) -> Path:
    """A run of four updates with --use_ema, checkpoint-2 and checkpoint-4 in it."""
    output_dir = tmp_path_factory.mktemp("trained") / "run"
    flags = {"pretrained_model_name_or_path": base_models["finetune"], "train_data_dir": pairs, "resolution": 64}
    flags |= {"train_batch_size": 2, "max_train_steps": 4, "checkpointing_steps": 2, "learning_rate": 1e-2, "seed": 7}
    run_script("finetune", **flags, report_to="none", use_ema=True, output_dir=output_dir)
    return output_dir


def test_a_checkpoint_is_exported_file_by_file_as_training_would_have(trained, small_run, tmp_path):
    def exported(step: int, folder: Path) -> dict[str, bytes]:
        export_checkpoint.main([str(trained / f"checkpoint-{step}"), "--output_dir", str(folder)])
        assert {path.name for path in folder.iterdir()} == {
            "README.md",
            *publishing.PIPELINE_FOLDERS,
            "model_index.json",
            publishing.CONFIG_FILE,
        }
        assert not list(folder.parent.glob(".*"))
        return contents(folder) | {"flags": (folder / publishing.CONFIG_FILE).read_bytes()}

    (tmp_path / ".run.partial" / "unet").mkdir(parents=True)  # of a killed export
    last = exported(4, tmp_path / "run")
    assert last == contents(trained) | {"flags": (trained / publishing.CONFIG_FILE).read_bytes()}
    before = contents(trained)
    flags = {"train_batch_size": 2, "gradient_accumulation_steps": 1, "learning_rate": 1e-2, "use_ema": True}
    shorter = contents(small_run(name="shorter", max_train_steps=2, **flags))
    second = exported(2, tmp_path / "new" / "second")
    parts = [name for name in shorter if name != "README.md"]
    assert {name: second[name] for name in parts} == {name: shorter[name] for name in parts}
    card = second["README.md"].decode()
    assert "steps 2, images 4, device " in card and 'model = "second"' in card
    assert contents(trained) == before

    with pytest.raises(UserError, match="--output_dir: .*run is not empty; name a new folder"):
        exported(4, tmp_path / "run")
    with pytest.raises(UserError, match="is no checkpoint of a training; give OUTPUT_DIR/checkpoint-N"):
        export_checkpoint.main([str(trained), "--output_dir", str(tmp_path / "other")])


def test_others_may_read_what_a_run_leaves_as_the_umask_says(small_run, tmp_path):
    run = small_run(max_train_steps=1, lora_rank=2)
    files = list(run.rglob("*.safetensors"))
    assert {path.parent.name for path in files} >= {"unet", "vae", "text_encoder", "adapter", "checkpoint-1"}
    (plain := tmp_path / "plain").touch()
    assert {oct(path.stat().st_mode) for path in files} == {oct(plain.stat().st_mode)}


def test_a_checkpoint_edits_as_its_export_does(trained, tmp_path):
    def edited(model: Path, name: str) -> bytes:
        photo = tmp_path / "photo.png"
        small_photo().save(photo)
        usual = ["--instruction", "blur it", "--steps", "2", "--resolution", "64", "--output_dir", str(tmp_path / name)]
        edit_images.main([str(photo), "--model_id", str(model), *usual])
        return (tmp_path / name / "photo.png").read_bytes()

    four = edited(trained / "checkpoint-4", "four")
    assert four == edited(trained, "export") and four != edited(trained / "checkpoint-2", "two")
    plain = copy_tree(trained / "checkpoint-4", tmp_path / "plain" / "checkpoint-4")
    state = json.loads((plain / "state.json").read_text())
    del state["files"]["ema.safetensors"]
    (plain / "state.json").write_text(json.dumps(state))
    (plain / "ema.safetensors").unlink()
    assert edited(plain, "without-the-average") != four


def test_what_tells_checkpoints_apart(trained, base_models, tmp_path):
    prints = {model_fingerprint(str(trained / f"checkpoint-{step}")) for step in (2, 4)}
    moved = copy_tree(trained / "checkpoint-4", tmp_path / "elsewhere")
    assert len(prints) == 2 and model_fingerprint(str(moved)) in prints
    base = copy_tree(base_models["finetune"], tmp_path / "base")
    state = json.loads((moved / "state.json").read_text())
    state["flags"]["pretrained_model_name_or_path"] = str(base)
    (moved / "state.json").write_text(json.dumps(state))
    before = model_fingerprint(str(moved))
    (base / "vae" / "config.json").write_text("{}")
    assert model_fingerprint(str(moved)) != before


def test_a_checkpoint_that_is_damaged_or_has_lost_its_base_is_refused(trained, base_model, tmp_path):
    checkpoint = copy_tree(trained / "checkpoint-4", tmp_path / "checkpoint-4")
    state = json.loads((checkpoint / "state.json").read_text())
    state["flags"]["pretrained_model_name_or_path"] = str(tmp_path / "gone")
    (checkpoint / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match="--model_id: .*checkpoint-4 needs its base model.*gone is not a folder"):
        editing.check_model(str(checkpoint))
    weights = checkpoint / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(UserError, match="--model: .*checkpoint-4 is damaged .unet/.* bytes instead of"):
        editing.check_model(str(checkpoint), "--model")
    with pytest.raises(UserError, match="checkpoint: .*checkpoint-4 is damaged"):
        export_checkpoint.main([str(checkpoint), "--output_dir", str(tmp_path / "export")])
    assert not (tmp_path / "export").exists()


# ---- without paths of this machine


def test_configurations_are_equal_after_a_resume_and_name_no_path(small_run, base_models, tmp_path):
    fresh = small_run(name="fresh", checkpointing_steps=2)
    resumed = small_run(name="resumed", max_train_steps=2)
    small_run(name="resumed", resume_from_checkpoint="latest")
    one, other = contents(fresh), contents(resumed)
    assert one.keys() == other.keys()
    assert {name: one[name] for name in one if name != "README.md"} == {
        name: other[name] for name in other if name != "README.md"
    }
    for folder in (fresh, resumed):
        published = contents(folder) | {"flags": (folder / "training_config.json").read_bytes()}
        for name, content in published.items():
            assert (
                str(tmp_path).encode() not in content and str(base_models["finetune"].parent).encode() not in content
            ), name


def test_a_path_in_the_bases_configuration_is_hidden(base_model, tmp_path):
    base = copy_tree(base_model, tmp_path / "base")
    for name in ("vae/config.json", "tokenizer/tokenizer_config.json", "unet/config.json"):
        config = json.loads((base / name).read_text())
        (base / name).write_text(json.dumps(config | {"_name_or_path": str(base), "name": "/home/somebody/model"}))
    exported = contents(export(base, tmp_path / "run"))
    for name, content in exported.items():
        assert str(tmp_path).encode() not in content and b"/home/somebody" not in content, name
    assert json.loads(exported["vae/config.json"])["_name_or_path"] == "base"


def test_the_card_edits_with_the_runs_own_guidance(base_model, tmp_path):
    card = (
        export(base_model, tmp_path / "run", guidance_scale=3.5, image_guidance_scale=1.0) / "README.md"
    ).read_text()
    snippet, text = card.partition("```python")[2].partition("```")[0], card.partition("```python")[0]
    assert " guidance_scale=3.5," in snippet and "image_guidance_scale=1.0," in snippet and '"blur it",' in snippet
    assert "guidance 3.5 for the instruction and 1.0 for the image" in text
    compile(snippet, "snippet", "exec")
    assert str(tmp_path) not in card


@pytest.mark.parametrize("old", [(), ("adapter", "decoder_skips")])
@pytest.mark.parametrize("new", [(), ("decoder_skips", "adapter")])
def test_an_export_killed_at_any_two_moves_is_whole_in_the_end(old, new, tmp_path, monkeypatch):
    parts, place, replace = ("unet", "vae", "model_index.json", "README.md"), publishing._put_in_place, os.replace

    def make(folder: Path, content: str, further: tuple[str, ...]) -> dict[str, str]:
        for name in (*parts, *further):
            (folder / name).mkdir(parents=True)
            (folder / name / "file").write_text(content)
        return dict.fromkeys((*parts, *further), content)

    def kill_at(number: int, finish, folder: Path) -> None:
        left = iter(range(number))
        monkeypatch.setattr(os, "replace", lambda *paths: replace(*paths) if next(left, None) is not None else 1 / 0)
        with contextlib.suppress(ZeroDivisionError):
            finish(folder)
        monkeypatch.setattr(os, "replace", replace)

    for first, second in itertools.product(range(14), (0, 4, 9)):
        run = tmp_path / f"{first}-{second}"
        make(run, "old", old)
        expected = make(run / ".export.partial", "new", new)
        kill_at(first, place, run)
        kill_at(second, publishing._finish_export, run)
        publishing._finish_export(run)
        assert {path.name: (path / "file").read_text() for path in run.iterdir()} == expected
