"""A pipeline as one file in the original's layout: there and back, edited with, trained from, wired up for ComfyUI."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionInstructPix2PixPipeline, UNet2DConditionModel
from diffusers.loaders import single_file_utils as original
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from instruct_pix2pix import editing
from instruct_pix2pix.cli import UserError
from instruct_pix2pix.models import single_file
from tests.conftest import ROOT, copy_tree, small_photo
from tests.test_base_models import in_one_file
from tools import export_single_file

WORKFLOW = ROOT / "docs/comfyui_workflow.json"


def convert(*arguments) -> None:
    export_single_file.main([str(argument) for argument in arguments])


def pipeline_files(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def base(plain_bases) -> Path:
    return plain_bases["finetune"]


@pytest.fixture(scope="module")
def file(base, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("file") / "model.safetensors"
    convert(base, path)
    return path


# ---- there and back


def test_the_file_has_the_original_names_and_the_same_numbers(base, file):
    found, expected = load_file(file), in_one_file(base)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    assert original.infer_diffusers_model_type(found) == "instruct-pix2pix"


def test_there_and_back_is_the_same_folder(base, file, tmp_path):
    convert(file, tmp_path / "back", "--base_config", base)
    assert pipeline_files(tmp_path / "back") == pipeline_files(base)


def test_half_the_size_and_back(base, file, tmp_path, capsys):
    half = tmp_path / "new/half.safetensors"
    convert(base, half, "--half")
    whole, found = load_file(file), load_file(half)
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], tensor.half()) for name, tensor in whole.items())
    convert(half, tmp_path / "back", "--base_config", base)
    unet = "unet/diffusion_pytorch_model.safetensors"
    back, expected = load_file(tmp_path / "back" / unet), load_file(base / unet)
    assert all(torch.equal(back[name], tensor.half().float()) for name, tensor in expected.items())
    assert f"{half}: made of {base}" in capsys.readouterr().out


def test_numbers_that_float16_cannot_hold_are_not_written(base, tmp_path):
    large = copy_tree(base, tmp_path / "large")
    weights = large / "vae/diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["encoder.conv_in.bias"][0] = 1e6
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(UserError, match="--half: first_stage_model.encoder.conv_in.bias holds numbers that float16"):
        convert(large, tmp_path / "half.safetensors", "--half")
    assert [path.name for path in tmp_path.iterdir()] == ["large"]


def test_both_layouts_of_clip_give_the_one_that_uis_read(base):
    config = {"unet": UNet2DConditionModel.load_config(base, subfolder="unet")}
    config["vae"] = AutoencoderKL.load_config(base, subfolder="vae")
    flat = CLIPTextModel.from_pretrained(base, subfolder="text_encoder").state_dict()
    flat = {name.removeprefix("text_model."): tensor for name, tensor in flat.items()}
    nested = {f"text_model.{name}": tensor for name, tensor in flat.items()}
    one, other = (
        single_file.original_layout({"unet": {}, "vae": {}, "text_encoder": layout}, config)
        for layout in (flat, nested)
    )
    assert one.keys() == other.keys() and len(one) == len(flat)
    assert all(one[name] is other[name] for name in one)
    assert all(name.startswith("cond_stage_model.transformer.text_model.") for name in one)
    assert original.is_clip_model(one)


def test_a_file_that_was_written_by_others_becomes_a_folder(base, tmp_path):
    """With what real files have besides: an average, and CLIP's position ids."""
    tensors = in_one_file(base)
    tensors["model_ema.num_updates"] = torch.tensor(3)
    tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(tensors, tmp_path / "theirs.safetensors")
    convert(tmp_path / "theirs.safetensors", tmp_path / "back", "--base_config", base)
    assert pipeline_files(tmp_path / "back") == pipeline_files(base)


def test_a_pipeline_as_older_libraries_saved_it_gives_the_same_file(base, file, tmp_path):
    """Stable Diffusion v1.5's own: other names in the VAE's attention, and CLIP's position ids among the weights."""
    old = copy_tree(base, tmp_path / "old")
    vae, text = old / "vae/diffusion_pytorch_model.safetensors", old / "text_encoder/model.safetensors"
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, tensor in load_file(vae).items():
        for new, before in names.items():
            name = name.replace(f"attentions.0.{new}", f"attentions.0.{before}")
        tensors[name] = tensor
    assert "encoder.mid_block.attentions.0.proj_attn.bias" in tensors
    save_file(tensors, vae, {"format": "pt"})
    ids = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    save_file(load_file(text) | ids, text, {"format": "pt"})
    convert(old, tmp_path / "new.safetensors")
    assert (tmp_path / "new.safetensors").read_bytes() == file.read_bytes()


def test_at_stable_diffusions_shapes_every_bit_comes_back():
    """1.07 billion random numbers, as windows of one buffer, through our names and diffusers' converters."""
    with torch.device("meta"):
        models = {
            "unet": UNet2DConditionModel(in_channels=8, cross_attention_dim=768),
            "vae": AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=2,
            ),
            "text_encoder": CLIPTextModel(
                CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
            ),
        }
    buffer, weights = torch.randn(40_000_000, generator=torch.Generator().manual_seed(0)), {}
    starts = iter(range(0, len(buffer), 7))
    for part, model in models.items():
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        weights[part] = {name: buffer[next(starts) :][: shape.numel()].view(shape) for name, shape in shapes.items()}
    assert sum(tensor.numel() for part in weights.values() for tensor in part.values()) == 1_066_246_827
    configs = {part: models[part].config for part in ("unet", "vae")}
    tensors = single_file.original_layout(weights, configs)
    assert tensors["model.diffusion_model.input_blocks.0.0.weight"].shape == (320, 8, 3, 3)
    assert tensors["first_stage_model.encoder.mid.attn_1.q.weight"].shape == (512, 512, 1, 1)
    assert original.infer_diffusers_model_type(tensors) == "instruct-pix2pix"
    known = """
        model.diffusion_model.output_blocks.2.1.conv.weight model.diffusion_model.output_blocks.5.2.conv.weight
        model.diffusion_model.output_blocks.8.2.conv.bias model.diffusion_model.input_blocks.9.0.op.weight
        model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias first_stage_model.quant_conv.bias
        model.diffusion_model.middle_block.2.out_layers.3.weight first_stage_model.decoder.up.3.upsample.conv.weight
        first_stage_model.decoder.up.0.block.0.nin_shortcut.bias first_stage_model.encoder.down.2.downsample.conv.bias
        cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc2.bias
    """
    assert len(tensors) == 1130 and tensors.keys() >= set(known.split())
    back = {
        "unet": original.convert_ldm_unet_checkpoint(tensors, configs["unet"]),
        "vae": original.convert_ldm_vae_checkpoint(tensors, configs["vae"]),
    }
    text = original.convert_ldm_clip_checkpoint(tensors)
    back["text_encoder"] = {name.removeprefix("text_model."): tensor for name, tensor in text.items()}
    for part, expected in weights.items():
        assert back[part].keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(back[part][name], tensor), name


# ---- what uses the file


def test_diffusers_edits_with_the_file_as_with_the_folder(base, file):
    def edit(pipeline) -> np.ndarray:
        pipeline.set_progress_bar_config(disable=True)
        scales = {"guidance_scale": 7.0, "image_guidance_scale": 1.5}
        [image] = editing.edit(pipeline, ["blur it"], [small_photo()], [0], steps=3, **scales)
        return np.asarray(image)

    folder = StableDiffusionInstructPix2PixPipeline.from_pretrained(base)
    one = StableDiffusionInstructPix2PixPipeline.from_single_file(file, config=str(base), local_files_only=True)
    assert np.array_equal(edit(one), edit(folder))


def test_training_takes_the_file_and_a_checkpoint_of_it_becomes_one(base, file, small_run, tmp_path):
    flags = {"use_ema": True, "max_train_steps": 1, "checkpointing_steps": 1}
    run = small_run("finetune", pretrained_model_name_or_path=file, base_config=base, **flags)
    expected = small_run("finetune", "expected", pretrained_model_name_or_path=base, **flags)
    convert(run, tmp_path / "run.safetensors")
    convert(run / "checkpoint-1", tmp_path / "checkpoint.safetensors")
    convert(expected, tmp_path / "expected.safetensors")
    made = {name: (tmp_path / f"{name}.safetensors").read_bytes() for name in ("run", "checkpoint", "expected")}
    assert made["run"] == made["checkpoint"] == made["expected"] != file.read_bytes()


# ---- what is refused, and what is said


def test_what_cannot_be_converted_is_said_in_a_line(base, file, base_models, plain_bases, tmp_path):
    def refuse(said: str, *arguments) -> None:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(UserError, match=said) as caught:
            convert(*arguments)
        assert "\n" not in str(caught.value) and "--pretrained" not in str(caught.value)
        assert sorted(tmp_path.rglob("*")) == before

    new, folder = tmp_path / "new.safetensors", tmp_path / "new"
    refuse("^model: the original layout, .* has no place for its unet's add_embedding", base_models["finetune"], new)
    refuse("^model: .* UNet of 4 input channels, and editing takes 8", plain_bases["train"], new)
    refuse("^model: .*nowhere is no folder here, and", tmp_path / "nowhere", new)
    refuse("^output: .*new is none; name a new .safetensors file", base, folder)
    refuse("^output: .*new.safetensors is none; name a new folder", file, new)
    refuse("^--half: has no meaning for a folder", file, folder, "--half")
    refuse("^--base_config: has no meaning for a .safetensors file", base, new, "--base_config", base)
    refuse("^--base_config: missing, and .* of timbrooks/instruct-pix2pix, .* cannot be had", file, folder)
    refuse("^output: .* exists; name a new .safetensors file", base, file)
    refuse("^output: .* exists; name a new folder", file, base)
    plain = tmp_path / "plain.safetensors"
    save_file(in_one_file(plain_bases["train"]), plain)
    refuse("^model: .*plain.safetensors has a 4-channel UNet", plain, folder, "--base_config", base)
    (tmp_path / "cut.safetensors").write_bytes(plain.read_bytes()[:-5])
    refuse("^model: cannot read .*cut.safetensors", tmp_path / "cut.safetensors", folder, "--base_config", base)
    with pytest.raises(UserError, match="is a file; make a pipeline of it with tools/export_single_file.py"):
        editing.check_model(str(file))


def test_no_room_is_said_before_weights_load(base, tmp_path, monkeypatch):
    monkeypatch.setattr("instruct_pix2pix.files.free_space", lambda path: 1000)
    monkeypatch.setattr("instruct_pix2pix.models.sd.load_model", None)
    with pytest.raises(UserError, match="output: .* has too little room: the file takes .* MB"):
        convert(base, tmp_path / "new.safetensors")


def test_what_uis_would_take_wrongly_for_granted_is_said(base, tmp_path, capsys):
    like = {"unet": {"cross_attention_dim": 768, "block_out_channels": (320, 640, 1280, 1280)}, "vae": {}}
    assert single_file.differences(like | {"scheduler": {"prediction_type": "epsilon"}}) == []
    other = {"unet": {"cross_attention_dim": 1024}, "scheduler": {"prediction_type": "v_prediction"}}
    said = ["unet.cross_attention_dim 1024", "scheduler.prediction_type v_prediction"]
    assert single_file.differences(like | other) == said
    convert(base, tmp_path / "new.safetensors")
    assert re.search("take other values for granted than .*cross_attention_dim 64", capsys.readouterr().err)


# ---- the workflow for ComfyUI

# Inputs that are linked, outputs and widgets of its nodes, as ComfyUI's source says: nodes.py, and in comfy_extras
# nodes_ip2p.py, nodes_custom_sampler.py and nodes_post_processing.py. A seed's widget is followed by what happens to it
# after a run, that of an image to load by the upload button.
NODES = {
    "CheckpointLoaderSimple": ({}, ["MODEL", "CLIP", "VAE"], [str]),
    "LoadImage": ({}, ["IMAGE", "MASK"], [str, str]),
    "ImageScaleToTotalPixels": ({"image": "IMAGE"}, ["IMAGE"], [str, float, int]),
    "CLIPTextEncode": ({"clip": "CLIP"}, ["CONDITIONING"], [str]),
    "InstructPixToPixConditioning": (
        {"positive": "CONDITIONING", "negative": "CONDITIONING", "vae": "VAE", "pixels": "IMAGE"},
        ["CONDITIONING", "CONDITIONING", "LATENT"],
        [],
    ),
    "DualCFGGuider": (
        {"model": "MODEL", "cond1": "CONDITIONING", "cond2": "CONDITIONING", "negative": "CONDITIONING"},
        ["GUIDER"],
        [float, float, str],
    ),
    "RandomNoise": ({}, ["NOISE"], [int, str]),
    "KSamplerSelect": ({}, ["SAMPLER"], [str]),
    "BasicScheduler": ({"model": "MODEL"}, ["SIGMAS"], [str, int, float]),
    "SamplerCustomAdvanced": (
        {"noise": "NOISE", "guider": "GUIDER", "sampler": "SAMPLER", "sigmas": "SIGMAS", "latent_image": "LATENT"},
        ["LATENT", "LATENT"],
        [],
    ),
    "VAEDecode": ({"samples": "LATENT", "vae": "VAE"}, ["IMAGE"], []),
    "SaveImage": ({"images": "IMAGE"}, [], [str]),
}


@pytest.fixture(scope="module")
def workflow() -> dict:
    return json.loads(WORKFLOW.read_text(encoding="utf-8"))


def test_every_link_of_the_workflow_joins_what_is_there(workflow):
    nodes = {node["id"]: node for node in workflow["nodes"]}
    assert len(nodes) == len(workflow["nodes"]) and {node["type"] for node in nodes.values()} == NODES.keys()
    assert max(nodes) == workflow["last_node_id"]
    for node in nodes.values():
        inputs, outputs, widgets = NODES[node["type"]]
        assert {slot["name"]: slot["type"] for slot in node["inputs"]} == inputs
        assert [slot["type"] for slot in node["outputs"]] == outputs
        assert [type(value) for value in node["widgets_values"]] == widgets
        assert all(slot["link"] is not None for slot in node["inputs"]), "an input that is required"
    numbers = [link[0] for link in workflow["links"]]
    assert len(numbers) == len(set(numbers)) and max(numbers) == workflow["last_link_id"]
    for number, source, output, target, slot, kind in workflow["links"]:
        assert nodes[source]["outputs"][output]["type"] == nodes[target]["inputs"][slot]["type"] == kind
        assert number in nodes[source]["outputs"][output]["links"] and nodes[target]["inputs"][slot]["link"] == number
    named = [slot["link"] for node in nodes.values() for slot in node["inputs"]]
    named_as_sources = [link for node in nodes.values() for slot in node["outputs"] for link in slot["links"]]
    assert sorted(named) == sorted(named_as_sources) == sorted(numbers)


def guider_of(workflow: dict) -> tuple[dict[str, tuple[str, bool]], list]:
    """What the guider's inputs stand for, (instruction, whether with the image), and its widgets."""
    nodes = {node["id"]: node for node in workflow["nodes"]}
    links = {link[0]: link for link in workflow["links"]}

    def source(node: dict, name: str) -> tuple[dict, int]:
        [number] = [slot["link"] for slot in node["inputs"] if slot["name"] == name]
        return nodes[links[number][1]], links[number][2]

    def meaning(node: dict, output: int) -> tuple[str, bool]:
        if node["type"] == "CLIPTextEncode":
            return node["widgets_values"][0], False
        assert node["type"] == "InstructPixToPixConditioning"
        return meaning(*source(node, ("positive", "negative")[output]))[0], True

    [sampler] = [node for node in nodes.values() if node["type"] == "SamplerCustomAdvanced"]
    guider, _ = source(sampler, "guider")
    found = {name: meaning(*source(guider, name)) for name in ("cond1", "cond2", "negative")}
    return found, guider["widgets_values"]


def dual_cfg(cond1, cond2, negative, cfg_conds: float, cfg_cond2_negative: float):
    """What ComfyUI's DualCFGGuider makes of its three predictions in the style "regular"."""
    return negative + cfg_cond2_negative * (cond2 - negative) + cfg_conds * (cond1 - cond2)


def web_ui(out_cond, out_image, out_neither, cfg: float, image_cfg: float):
    """What the web UI makes of its three predictions for an InstructPix2Pix model."""
    return out_neither + cfg * (out_cond - out_image) + image_cfg * (out_image - out_neither)


def test_the_workflow_guides_as_the_pipeline_does(workflow, base, monkeypatch):
    """Its three conditionings are the pipeline's three branches, and both scales weigh what they weigh there."""
    meanings, (cfg_conds, cfg_cond2_negative, style) = guider_of(workflow)
    assert style == "regular"
    assert (cfg_conds, cfg_cond2_negative) == (editing.USUAL.guidance_scale, editing.USUAL.image_guidance_scale)
    instruction = meanings["cond1"][0]
    assert instruction

    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(base)
    pipeline.set_progress_bar_config(disable=True)
    seen, step = [], pipeline.scheduler.step

    def before(_, args, kwargs):
        seen.append({"latents": args[0], "text": kwargs["encoder_hidden_states"]})

    def recording(prediction, *args, **kwargs):
        seen[-1]["guided"] = prediction
        return step(prediction, *args, **kwargs)

    pipeline.unet.register_forward_pre_hook(before, with_kwargs=True)
    pipeline.unet.register_forward_hook(lambda _, __, output: seen[-1].update(predictions=output[0]))
    monkeypatch.setattr(pipeline.scheduler, "step", recording)
    scales = {"guidance_scale": cfg_conds, "image_guidance_scale": cfg_cond2_negative}
    editing.edit(pipeline, [instruction], [small_photo()], [0], steps=2, **scales)

    def encoded(text: str) -> torch.Tensor:
        ids = pipeline.tokenizer(text, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
        with torch.no_grad():
            return pipeline.text_encoder(ids.input_ids)[0]

    assert len(seen) == 2
    for made in seen:
        branches = zip(*(made[name].chunk(3) for name in ("latents", "text", "predictions")), strict=True)
        predictions = {}
        for latents, text, prediction in branches:
            [words] = [words for words in (instruction, "") if torch.allclose(text, encoded(words), atol=1e-5)]
            predictions[words, bool(latents[:, 4:].any())] = prediction
        given = [predictions[meanings[name]] for name in ("cond1", "cond2", "negative")]
        guided = dual_cfg(*given, cfg_conds, cfg_cond2_negative)
        assert torch.allclose(guided, made["guided"], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(dual_cfg(*given, cfg_cond2_negative, cfg_conds), made["guided"], atol=1e-3)


@pytest.mark.parametrize(("guidance_scale", "image_guidance_scale"), [(7.0, 1.5), (4.0, 1.0), (1.0, 2.5), (3.0, 3.0)])
def test_the_uis_formulas_are_the_papers(guidance_scale, image_guidance_scale):
    """Brooks et al. 2023, equation 3, of noise; the UIs combine denoised images x - sigma * noise, with one result."""
    instruction, image, neither, x = np.random.default_rng(0).standard_normal((4, 2, 4, 8, 8))
    paper = neither + image_guidance_scale * (image - neither) + guidance_scale * (instruction - image)
    sigma = 3.7
    denoised = [x - sigma * noise for noise in (instruction, image, neither)]
    for formula in (dual_cfg, web_ui):
        guided = formula(*denoised, guidance_scale, image_guidance_scale)
        np.testing.assert_allclose((x - guided) / sigma, paper, atol=1e-12)
    if image_guidance_scale == 1:  # then both UIs leave out the third prediction
        np.testing.assert_allclose(image + guidance_scale * (instruction - image), paper, atol=1e-12)
