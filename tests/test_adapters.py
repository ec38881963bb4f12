"""Adapters: the base until trained, small, resumed to the bit, merged, shared; a difference put onto another model."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from instruct_pix2pix import editing
from instruct_pix2pix.cli import UserError
from instruct_pix2pix.models import adapters, sd, trained
from instruct_pix2pix.models.tiny import build_tiny_pipeline, save_pipeline
from instruct_pix2pix.training.options import parse_args
from tests.conftest import ROOT, assert_same_tensors, copy_tree, losses, small_photo
from tools import export_checkpoint, merge_models

UNET = "unet/diffusion_pytorch_model.safetensors"
SETTING = {"steps": 3, "guidance_scale": 3.0, "image_guidance_scale": 1.5}


def flags(base: Path, **changes) -> SimpleNamespace:
    """A training's configuration, as far as loading a UNet goes by it."""
    named = dict.fromkeys(("revision", "non_ema_revision", "variant", "base_config", "cache_dir", "hub_token"))
    lora = {"seed": 3, "lora_rank": 4, "lora_alpha": 8.0, "use_dora": False}
    return SimpleNamespace(**named | lora | {"pretrained_model_name_or_path": str(base)} | changes)


def predict(unet, channels: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 8, 8, 8, generator=generator)[:, :channels]
    text = torch.randn(2, 5, unet.config.cross_attention_dim, generator=generator)
    with torch.no_grad():
        return unet(latents, torch.tensor([10, 700]), text).sample


def edit(pipeline) -> np.ndarray:
    [edited] = editing.edit(pipeline, ["blur it"], [small_photo()], [1], **SETTING)
    return np.asarray(edited).astype(int)


@pytest.mark.parametrize("use_dora", [False, True])
def test_step_0_is_the_base_and_only_adapters_and_conv_in_are_trained(use_dora, base_models):
    config = flags(base_models["train"], use_dora=use_dora)
    adapted = sd.load_unet(config, None)
    base = UNet2DConditionModel.from_pretrained(base_models["train"], subfolder="unet")
    assert torch.equal(predict(adapted), predict(base, channels=4))

    names = set(adapters.trained_parameters(adapted))
    other = names - {"conv_in.weight", "conv_in.bias"}
    assert len(names) - len(other) == 2
    assert all(re.search(r"\.attn[12]\.to_(q|k|v|out\.0)\.lora_", name) for name in other)
    attentions = sum(name.endswith(("attn1", "attn2")) for name, _ in adapted.named_modules())
    assert len(other) == attentions * 4 * (3 if use_dora else 2)
    again, another = sd.load_unet(config, None), sd.load_unet(flags(base_models["train"], seed=4), None)
    drawn = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.default.weight"
    assert torch.equal(again.get_parameter(drawn), adapted.get_parameter(drawn))
    assert not torch.equal(another.get_parameter(drawn), adapted.get_parameter(drawn))


@pytest.mark.parametrize("use_dora", [False, True])
def test_what_a_run_leaves_edits_alike_merged_unmerged_and_shared(use_dora, base_models, small_run, tmp_path):
    base = base_models["train"]
    run = small_run("train", lora_rank=4, use_dora=use_dora, use_ema=True, max_train_steps=3, learning_rate=1e-2)

    names = load_file(run / "checkpoint-3" / trained.ADAPTER_FILE).keys()
    assert names == load_file(run / "checkpoint-3" / trained.EMA_FILE).keys()
    assert all(".lora_" in name or name.startswith("conv_in.") for name in names)
    assert not (run / "checkpoint-3" / trained.UNET_FILE).exists()

    before, after = load_file(base / UNET), load_file(run / UNET)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    attended = {name for name in before if re.search(r"\.attn[12]\.to_(q|k|v|out\.0)\.weight$", name)}
    assert changed == attended | {"conv_in.weight", "conv_in.bias"}

    merged = edit(editing.load_pipeline(str(run)))
    assert np.array_equal(merged, edit(editing.load_pipeline(str(run / "checkpoint-3"))))

    # The folder to share names no path; where its base is found under that name, it edits.
    shared = shutil.copytree(run / "adapter", tmp_path / "shared")
    assert all(str(tmp_path.parent).encode() not in path.read_bytes() for path in shared.iterdir())
    with pytest.raises(UserError, match=r"--model_id: .*shared needs its base model .*training_config\.json"):
        editing.check_model(str(shared))
    config = json.loads((shared / trained.CONFIG_FILE).read_text())
    (shared / trained.CONFIG_FILE).write_text(json.dumps(config | {"pretrained_model_name_or_path": str(base)}))
    editing.check_model(str(shared))
    assert np.array_equal(merged, edit(editing.load_pipeline(str(shared))))

    # diffusers alone, as the documentation says.
    snippet = re.search(r"```python\n(.*?)```", (ROOT / "docs/adapters.md").read_text(), re.DOTALL)[1]
    snippet = snippet.replace("stable-diffusion-v1-5/stable-diffusion-v1-5", str(base)).replace("adapter", str(shared))
    exec(snippet, found := {})
    unmerged = found["pipeline"]
    unmerged.set_progress_bar_config(disable=True)
    assert np.abs(merged - edit(unmerged)).max() <= 1
    unmerged.disable_lora()
    assert np.abs(merged - edit(unmerged)).max() > 5
    unmerged.enable_lora()
    unmerged.fuse_lora()
    assert np.abs(merged - edit(unmerged)).max() <= 1


@pytest.mark.slow
def test_a_resumed_run_is_the_same_to_the_bit(small_run, pairs, tmp_path):
    held_out = copy_tree(pairs, tmp_path / "held_out")
    options = {"lora_rank": 2, "use_dora": True, "use_ema": True, "keep_best": "loss"}
    options |= {"validation_dataset": held_out, "max_validation_samples": 2, "num_validation_images": 1}
    options |= {"checkpointing_steps": 2, "center_crop": True, "cache_latents": True}
    options |= {"guidance_scale": 1, "image_guidance_scale": 1}
    whole = small_run("train", "whole", **options)
    small_run("train", "parts", **options | {"max_train_steps": 2})
    parts = small_run("train", "parts", **options, resume_from_checkpoint="latest")
    assert losses(whole) == losses(parts)
    for name in (trained.ADAPTER_FILE, trained.EMA_FILE, "optimizer.safetensors"):
        assert_same_tensors(whole / "checkpoint-4" / name, parts / "checkpoint-4" / name)
    for name in (UNET, "adapter/pytorch_lora_weights.safetensors", "adapter/conv_in.safetensors"):
        assert_same_tensors(whole / name, parts / name)
    export_checkpoint.main([str(whole / "checkpoint-4"), "--output_dir", str(tmp_path / "exported")])
    assert (whole / UNET).read_bytes() == (tmp_path / "exported" / UNET).read_bytes()
    for path in (whole / "adapter").iterdir():
        again = tmp_path / "exported" / "adapter" / path.name
        if path.name != trained.LORA_FILE:
            assert path.read_bytes() == again.read_bytes()
            continue
        assert_same_tensors(path, again)  # safetensors writes the two entries beside them in any order
        with safe_open(path, "pt") as one, safe_open(again, "pt") as other:
            assert one.metadata() == other.metadata()
    assert all("validation" in trained.read_state(path) for path in whole.glob("checkpoint-*"))
    with pytest.raises(UserError, match="--lora_rank: the checkpoint was made with 2; give the flag"):
        small_run("train", "parts", **options | {"lora_rank": 4}, resume_from_checkpoint="latest")


@pytest.mark.parametrize("use_dora", [False, True])
def test_an_adapter_of_stable_diffusion_is_under_two_percent_of_it(use_dora):
    config, rank = {"cross_attention_dim": 768}, 64  # the rest of v1.5's shapes is diffusers' default
    with torch.device("meta"):
        whole = sum(p.numel() for p in UNet2DConditionModel.from_config(config).parameters())
    assert whole == 859_520_964

    blocks = [320] * 5 + [640] * 5 + [1280] * 6  # each with self- and cross-attention, the text 768 wide
    matrices = sum(rank * (14 * width + 2 * 768) for width in blocks)
    lengths = sum(8 * width for width in blocks) if use_dora else 0
    counted = adapters.count_trained(config, flags("none", lora_rank=rank, use_dora=use_dora))
    assert counted == matrices + lengths + 320 * (8 * 9 + 1) < 0.02 * whole


@pytest.fixture
def models(base_models, tmp_path) -> dict[str, Path]:
    """What training made of the tiny base, the base, and another model of its family."""
    ours = copy_tree(base_models["finetune"], tmp_path / "ours")
    weights = load_file(ours / UNET)
    weights["conv_in.bias"][0] = -0.0
    save_file(weights, ours / UNET, {"format": "pt"})
    save_pipeline(build_tiny_pipeline(in_channels=4, seed=5), tmp_path / "theirs")
    return {"ours": ours, "base": base_models["train"], "theirs": tmp_path / "theirs"}


def merge(models, out, **changes) -> Path:
    merge_models.main([str(path) for path in (models | changes).values()] + [str(out)])
    return out


def test_a_difference_onto_its_own_base_is_the_model_to_the_bit(models, tmp_path):
    out = merge(models, tmp_path / "out", theirs=models["base"])
    ours, result = load_file(models["ours"] / UNET), load_file(out / UNET)
    assert ours.keys() == result.keys()
    assert all(torch.equal(ours[name].view(torch.int32), result[name].view(torch.int32)) for name in ours)
    assert np.array_equal(edit(editing.load_pipeline(str(models["ours"]))), edit(editing.load_pipeline(str(out))))


def test_a_difference_goes_onto_another_model(models, tmp_path):
    out = merge(models, tmp_path / "out")
    ours, base, theirs, result = (load_file(path / UNET) for path in (*models.values(), out))
    for tensors in (base, theirs):
        tensors["conv_in.weight"] = torch.nn.functional.pad(tensors["conv_in.weight"], (0, 0, 0, 0, 0, 4))
    for name, tensor in result.items():
        assert tensor.dtype == torch.float32
        assert torch.allclose(tensor, ours[name] - base[name] + theirs[name], atol=1e-6), name
    assert not torch.equal(result["conv_in.weight"], ours["conv_in.weight"])
    vae = "vae/diffusion_pytorch_model.safetensors"
    assert (out / vae).read_bytes() == (models["theirs"] / vae).read_bytes()
    edit(editing.load_pipeline(str(out)))


def test_models_of_two_families_are_not_mixed(models, tmp_path):
    def refuse(message, **changes):
        with pytest.raises(UserError, match=message):
            merge(models, tmp_path / "out", **changes)
        assert not (tmp_path / "out").exists()

    refuse("OURS: .*8 input channels", ours=models["base"])
    refuse("BASE: .*nowhere", base=tmp_path / "nowhere")
    weights = load_file(models["theirs"] / UNET)
    wide = {name: torch.cat((t, t)) if name == "conv_out.bias" else t for name, t in weights.items()}
    save_file(wide, models["theirs"] / UNET)
    refuse(r"THEIRS: conv_out.bias has the shapes \[4\], \[4\], \[8\];")
    save_file({name: t for name, t in weights.items() if name != "conv_out.bias"}, models["theirs"] / UNET)
    refuse(r"THEIRS: conv_out.bias has the shapes \[4\], \[4\], \[0\];")
    (models["theirs"] / UNET).write_bytes(b"cut")
    refuse("THEIRS: .*safetensors")
    scheduler = models["theirs"] / "scheduler/scheduler_config.json"
    own = json.loads(scheduler.read_text())
    save_file(weights, models["theirs"] / UNET)
    scheduler.write_text(json.dumps(own | {"rescale_betas_zero_snr": True}))
    refuse("THEIRS: its rescale_betas_zero_snr is True")
    scheduler.write_text(json.dumps(own | {"prediction_type": "epsilon"}))
    refuse("THEIRS: its prediction_type is epsilon")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").touch()
    with pytest.raises(UserError, match="OUT: .*not empty"):
        merge(models, tmp_path / "out")


@pytest.mark.parametrize("wrong", ["--lora_alpha=4", "--use_dora", "--lora_rank=0"])
def test_flags_that_make_no_adapter(wrong):
    with pytest.raises(UserError, match=wrong.split("=")[0]):
        parse_args("", ["--pretrained_model_name_or_path=model", "--dataset_name=data", wrong])
