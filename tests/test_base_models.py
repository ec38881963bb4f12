"""Base models as people have them: in half precision alone, pickled, in one file as first published."""

import json
import logging
import os
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from instruct_pix2pix import editing
from instruct_pix2pix.cli import UserError
from tests.conftest import copy_tree

LIGHTNING = "pytorch_lightning.callbacks.model_checkpoint"
UNET = "unet/diffusion_pytorch_model.safetensors"


def only_half(base: Path) -> Path:
    """Rename every part's weights to the fp16 variant and make them that."""
    for file in base.glob("*/*.safetensors"):
        tensors = {name: tensor.half() for name, tensor in load_file(file).items()}
        save_file(tensors, file.with_name(f"{file.stem}.fp16.safetensors"), {"format": "pt"})
        file.unlink()
    return base


# ---- variants


def test_weights_in_half_precision_alone_are_found_and_said(base_models, small_run, tmp_path, caplog, capsys):
    caplog.set_level(logging.INFO, logger="instruct_pix2pix")
    base = only_half(copy_tree(base_models["finetune"], tmp_path / "base"))
    small_run(dry_run=True, pretrained_model_name_or_path=base)
    said = "text_encoder, unet, vae of .*base: only fp16 weights are there, and used"
    assert len([r for r in caplog.records if re.fullmatch(said, r.getMessage())]) == 1
    capsys.readouterr()
    found = small_run(name="found", max_train_steps=1, pretrained_model_name_or_path=base)
    named = small_run(name="named", max_train_steps=1, pretrained_model_name_or_path=base, variant="fp16")
    for file in (UNET, "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        assert (found / file).read_bytes() == (named / file).read_bytes()


def test_a_variant_that_is_not_there_is_refused_in_the_dry_run(base_models, small_run, tmp_path):
    base = copy_tree(base_models["finetune"], tmp_path / "base")
    with pytest.raises(UserError, match="--variant: bf16, and .*/unet has no bf16 weights; use no --variant"):
        small_run(dry_run=True, pretrained_model_name_or_path=base, variant="bf16")
    (base / UNET).rename(base / "unet/diffusion_pytorch_model.non_ema.safetensors")
    with pytest.raises(UserError, match="--variant: not given, and .* no plain weights; use --variant non_ema"):
        small_run(dry_run=True, pretrained_model_name_or_path=base)
    (base / "unet/diffusion_pytorch_model.non_ema.safetensors").unlink()
    with pytest.raises(UserError, match="base/unet holds no weights"):
        small_run(dry_run=True, pretrained_model_name_or_path=base)


# ---- pickled weights


class RunsCode:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize(
    ("file", "old_format"),
    [
        ("unet/diffusion_pytorch_model.bin", False),
        ("text_encoder/pytorch_model.bin", True),
        ("vae/diffusion_pytorch_model.bin", False),
        ("whole.ckpt", False),
        ("whole.pt", True),
    ],
)
def test_a_file_that_would_run_code_is_refused_before_any_weight_loads(
    file, old_format, base_models, small_run, tmp_path
):
    marker, base = tmp_path / "marker", copy_tree(base_models["finetune"], tmp_path / "base")
    for weights in (base / file).parent.glob("*.safetensors"):
        weights.unlink()
    content = {"a": torch.ones(3), "b": RunsCode(marker)}
    torch.save(content, base / file, _use_new_zipfile_serialization=not old_format)
    torch.load(base / file, weights_only=False)
    marker.rmdir()  # it would have
    name = base if "/" in file else base / file
    with pytest.raises(UserError, match=rf"{file} would run code when opened .posix.mkdir.*\.safetensors") as caught:
        small_run(dry_run=True, pretrained_model_name_or_path=name, base_config=base)
    assert not marker.exists() and "\n" not in str(caught.value)
    (base / file).write_bytes(b"no pickle")
    with pytest.raises(UserError, match=f"{file} is damaged, or holds more than weights"):
        small_run(dry_run=True, pretrained_model_name_or_path=name, base_config=base)


# ---- one file


def in_one_file(pipeline_folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a pipeline under the names of Stable Diffusion's original code."""

    def renamed(name: str, pairs: dict[str, str]) -> str:
        for new, old in pairs.items():
            name = name.replace(new, old)
        return name

    resnet = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3"}
    resnet |= {"time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}
    single = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
    single |= {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    single |= {"mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1"}
    single |= {"mid_block.resnets.1": "middle_block.2"}

    def unet(name: str) -> str:
        side, *path = name.split(".")
        if side not in ("down_blocks", "up_blocks"):
            name = renamed(name, single)
            return renamed(name, resnet) if name.startswith(("middle_block.0", "middle_block.2")) else name
        block, kind, layer, *rest = path
        layers = 2 if side == "down_blocks" else 3  # to a block: one more than layers_per_block, and upwards two
        first, rest = 1 + 2 * int(block) if side == "down_blocks" else 2 * int(block), ".".join(rest)
        blocks = "input_blocks" if side == "down_blocks" else "output_blocks"
        if kind == "downsamplers":
            return f"input_blocks.{first + layers - 1}.0.op.{rest.removeprefix('conv.')}"
        if kind == "upsamplers":
            return f"output_blocks.{first + 1}.{2 if int(block) < 2 else 1}.{rest}"
        number = first + int(layer)
        return (
            f"{blocks}.{number}.{0 if kind == 'resnets' else 1}.{renamed(rest, resnet) if kind == 'resnets' else rest}"
        )

    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    middle = {"mid_block.attentions.0": "mid.attn_1", "mid_block.resnets.0": "mid.block_1"}
    middle |= {"mid_block.resnets.1": "mid.block_2", "conv_norm_out": "norm_out"}

    def vae(name: str) -> str:
        side, *path = name.split(".")
        if path[0] in ("down_blocks", "up_blocks"):
            _, block, kind, layer, *rest = path
            down = path[0] == "down_blocks"
            place = f"{side}.{f'down.{block}' if down else f'up.{2 - int(block)}'}"
            if kind == "resnets":
                return f"{place}.block.{layer}.{'.'.join(rest).replace('conv_shortcut', 'nin_shortcut')}"
            return f"{place}.{'downsample' if down else 'upsample'}.{'.'.join(rest)}"
        return renamed(renamed(name, middle), attention if "attentions" in name else {})

    tensors = {}
    for name, tensor in UNet2DConditionModel.from_pretrained(pipeline_folder, subfolder="unet").state_dict().items():
        tensors[f"model.diffusion_model.{unet(name)}"] = tensor
    for name, tensor in AutoencoderKL.from_pretrained(pipeline_folder, subfolder="vae").state_dict().items():
        convolution = "attentions" in name and name.endswith("weight") and tensor.dim() == 2
        tensors[f"first_stage_model.{vae(name)}"] = tensor[..., None, None] if convolution else tensor
    for name, tensor in CLIPTextModel.from_pretrained(pipeline_folder, subfolder="text_encoder").state_dict().items():
        tensors[f"cond_stage_model.transformer.text_model.{name}"] = tensor
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


@pytest.mark.parametrize(("script", "ending"), [("train", ".safetensors"), ("finetune", ".ckpt")])
def test_training_from_one_file_is_training_from_its_pipeline(
    script, ending, plain_bases, small_run, tmp_path, monkeypatch
):
    """A file of 4 input channels and one of 8 as Lightning writes it, both configured by the 4-channel pipeline."""
    base, file = plain_bases[script], tmp_path / f"model{ending}"
    tensors = in_one_file(base)
    if ending == ".safetensors":
        save_file(tensors, file)
    else:  # its callbacks by their classes, which need not be there to read it
        with monkeypatch.context() as patched:
            for name in ("pytorch_lightning", "pytorch_lightning.callbacks", LIGHTNING):
                patched.setitem(sys.modules, name, types.ModuleType(name))
            callback = type("ModelCheckpoint", (), {"__module__": LIGHTNING})
            sys.modules[LIGHTNING].ModelCheckpoint = callback
            torch.save({"epoch": 3, "state_dict": tensors, "callbacks": {callback: {"best": None}}}, file)
    config = copy_tree(plain_bases["train"], tmp_path / "config")
    for weights in config.glob("*/*.safetensors"):
        weights.unlink()
    flags = {"use_ema": True, "max_train_steps": 2, "checkpointing_steps": 1}
    expected = small_run(script, "expected", pretrained_model_name_or_path=base, **flags)
    found = small_run(script, "found", pretrained_model_name_or_path=file, base_config=config, **flags)
    for weights in (UNET, "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        one, other = load_file(found / weights), load_file(expected / weights)
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one), weights
    for part in ("scheduler/scheduler_config.json", "tokenizer/vocab.json", "text_encoder/config.json"):
        assert (found / part).read_bytes() == (expected / part).read_bytes()
    assert json.loads((found / "unet/config.json").read_text())["in_channels"] == 8


def test_what_one_file_may_lack_is_said_in_the_dry_run(plain_bases, small_run, tmp_path):
    base, tensors = plain_bases["train"], in_one_file(plain_bases["train"])

    def refuse(tensors: dict, said: str, script: str = "train", **flags) -> None:
        file = tmp_path / f"{len(os.listdir(tmp_path))}.safetensors"
        save_file(tensors, file)
        with pytest.raises(UserError, match=said) as caught:
            small_run(script, dry_run=True, pretrained_model_name_or_path=file, **flags)
        assert "\n" not in str(caught.value)

    def without(prefix: str) -> dict:
        return {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}

    refuse(tensors, "--base_config: missing, and .* of stable-diffusion-v1-5/.*, by which .* cannot be had .*folder")
    refuse(tensors, "4-channel UNet, plain Stable Diffusion; use train_instruct", "finetune", base_config=base)
    refuse(without("first_stage_model."), "has no autoencoder under the names of a Stable Diffusion", base_config=base)
    refuse({"lora.up": torch.ones(2)}, "has no UNet under the names of a Stable Diffusion", base_config=base)
    second = {"cond_stage_model.model.token_embedding.weight": torch.ones(2)} | without("cond_stage_model.")
    refuse(second, "--base_config: missing; .* does not say what its scheduler is; name the folder or Hub id")
    refuse(tensors, "--base_config: .*nowhere is not a folder", base_config=tmp_path / "nowhere")
    wide = copy_tree(base, tmp_path / "wide")
    config = json.loads((wide / "vae/config.json").read_text())
    (wide / "vae/config.json").write_text(json.dumps(config | {"block_out_channels": [16, 32, 48]}))
    with pytest.raises(UserError, match="the weights of .*0.safetensors do not fit the vae of .*wide .*--base_config"):
        small_run("train", pretrained_model_name_or_path=tmp_path / "0.safetensors", base_config=wide)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((tmp_path / "0.safetensors").read_bytes()[:-5])
    with pytest.raises(UserError, match="--pretrained_model_name_or_path: cannot read .*cut.safetensors"):
        small_run("train", dry_run=True, pretrained_model_name_or_path=cut, base_config=base)


def test_a_tokenizer_without_its_words_is_refused(base_models, small_run, tmp_path):
    """transformers makes one that knows no word, without a complaint: every instruction would be the same."""
    base = copy_tree(base_models["finetune"], tmp_path / "base")
    for name in ("vocab.json", "merges.txt", "tokenizer.json"):
        (base / "tokenizer" / name).unlink(missing_ok=True)
    with pytest.raises(UserError, match="--pretrained_model_name_or_path: cannot read tokenizer of .*vocab.json"):
        small_run(pretrained_model_name_or_path=base)
    with pytest.raises(UserError, match="--model_id: .* cannot be loaded .*vocab.json is missing"):
        editing.load_pipeline(str(base), device="cpu")
