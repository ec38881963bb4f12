"""A pipeline as one file, in the layout of Stable Diffusion's original code, which ComfyUI and the web UIs open.

Here the file is made. models/base_files.py and models/sd.py read it, by diffusers' own converters.
"""

import re
from pathlib import Path

import torch
from diffusers.loaders import single_file_utils as original
from safetensors import SafetensorError
from safetensors.torch import save_file

from instruct_pix2pix.cli import UserError
from instruct_pix2pix.files import check_folder, written_whole
from instruct_pix2pix.models import base_files, sd, trained

# What ComfyUI and the web UIs take for granted of an InstructPix2Pix model, as the file has no place for it.
ASSUMED = {
    "unet": {
        "block_out_channels": [320, 640, 1280, 1280],
        "layers_per_block": 2,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
        "use_linear_projection": False,
        "resnet_time_scale_shift": "default",
    },
    "vae": {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "scaling_factor": 0.18215},
    "scheduler": {
        "prediction_type": "epsilon",
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "rescale_betas_zero_snr": False,
    },
}
BLOCK = re.compile(r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def _unet_name(name: str, layers: int, attending: set[str]) -> str:
    """The original's name of a UNet's tensor, for `layers` a block; `attending` are the up blocks with attention."""
    match = BLOCK.fullmatch(name)
    if match is None:
        return original.DIFFUSERS_TO_LDM_MAPPING["unet"]["layers"].get(name, name)
    side, block, kind, layer, rest = match.groups()
    module, _, parameter = rest.rpartition(".")
    if kind == "resnets":
        rest = f"{UNET_RESNET.get(module, module)}.{parameter}"
    if side == "mid":  # residual, attention, residual
        return f"middle_block.{2 * int(layer) + (kind == 'attentions')}.{rest}"
    first, place = int(block) * (layers + 1), 1 if kind == "attentions" else 0
    if kind == "downsamplers":
        return f"input_blocks.{first + layers + 1}.0.op.{parameter}"
    if kind == "upsamplers":  # behind what else the block's last layer has
        return f"output_blocks.{first + layers}.{2 if block in attending else 1}.{rest}"
    if side == "down":  # behind conv_in
        return f"input_blocks.{first + 1 + int(layer)}.{place}.{rest}"
    return f"output_blocks.{first + int(layer)}.{place}.{rest}"


def _vae_name(name: str, blocks: int) -> str:
    """The original's name of a VAE's tensor, for so many blocks on each side."""
    coder, _, inner = name.partition(".")
    match = BLOCK.fullmatch(inner)
    if match is None:
        return original.DIFFUSERS_TO_LDM_MAPPING["vae"].get(name, name)
    side, block, kind, layer, rest = match.groups()
    module, _, parameter = rest.rpartition(".")
    if kind == "attentions":
        return f"{coder}.mid.attn_1.{VAE_ATTENTION.get(module, module)}.{parameter}"
    rest = rest.replace("conv_shortcut", "nin_shortcut")
    if side == "mid":
        return f"{coder}.mid.block_{int(layer) + 1}.{rest}"
    number = blocks - 1 - int(block) if side == "up" else int(block)  # the original counts from the image's side
    place = f"block.{layer}" if kind == "resnets" else kind.removesuffix("rs")
    return f"{coder}.{side}.{number}.{place}.{rest}"


def original_layout(weights: dict[str, dict[str, torch.Tensor]], configs: dict[str, dict]) -> dict[str, torch.Tensor]:
    """The tensors of a "unet", "vae" and "text_encoder" under the original's names; none is copied.

    The text encoder's may have "text_model." before their names, as transformers before 5.6 has, or not; in the file
    they have. Diffusers' own converters have to find every tensor again: UserError where one has no place.
    """
    unet, vae, text = (weights[part] for part in ("unet", "vae", "text_encoder"))
    attending = {match[1] for name in unet if (match := re.match(r"up_blocks\.(\d+)\.attentions\.", name))}
    tensors = {}
    for name, tensor in unet.items():
        tensors[original.LDM_UNET_KEY + _unet_name(name, configs["unet"]["layers_per_block"], attending)] = tensor
    for name, tensor in vae.items():
        renamed = _vae_name(name, len(configs["vae"]["block_out_channels"]))
        convolution = ".attn_1." in renamed and tensor.dim() == 2  # there, a linear layer is one of 1x1
        tensors[original.LDM_VAE_KEYS[0] + renamed] = tensor[..., None, None] if convolution else tensor
    for name, tensor in text.items():
        tensors[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = tensor

    found = {
        "unet": original.convert_ldm_unet_checkpoint(tensors, configs["unet"]),
        "vae": original.convert_ldm_vae_checkpoint(tensors, configs["vae"]),
        "text_encoder": original.convert_ldm_clip_checkpoint(tensors),
    }
    for part, parameters in weights.items():
        for name, tensor in parameters.items():
            prefix = "text_model." if part == "text_encoder" and not name.startswith("text_model.") else ""
            again = found[part].get(prefix + name)
            if again is None or again.shape != tensor.shape or again.data_ptr() != tensor.data_ptr():
                raise UserError(
                    f"model: the original layout has no place for {name} of the {part}; only models built as Stable"
                    " Diffusion is can be one file"
                )
    return tensors


def differences(configs: dict[str, dict]) -> list[str]:
    """What ComfyUI and the web UIs would take wrongly for granted, as "unet.cross_attention_dim 64"."""
    found = []
    for part, assumed in ASSUMED.items():
        for name, value in assumed.items():
            own = configs[part].get(name, value)
            if (list(own) if isinstance(own, tuple) else own) != value:
                found.append(f"{part}.{name} {own}")
    return found


def export(model: str, file: Path, half: bool) -> list[str]:
    """Write the UNet, VAE and text encoder of a model that passed `editing.check_model` as one safetensors file, in
    float32 or float16; says the `differences` that keep a UI from opening it. UserError where that cannot be."""
    folder = Path(model).expanduser()
    checkpoint = folder if trained.is_checkpoint(folder) else None
    config = trained.configuration(folder) if checkpoint else base_files.configuration(str(model))
    configs = sd.read_base_configs(config)
    size = (2 if half else 4) * sum(sd.count_parameters(configs).values())
    check_folder("output", file.parent, size, "the file")

    unet = trained.load_unet(folder) if checkpoint else sd.load_unet(config, None)
    models = {"unet": unet, "vae": sd.load_model(config, "vae"), "text_encoder": sd.load_model(config, "text_encoder")}
    configs |= {"unet": dict(unet.config), "vae": dict(models["vae"].config)}
    tensors = original_layout({part: model.state_dict() for part, model in models.items()}, configs)
    for name in tensors if half else ():
        tensors[name] = tensors[name].half()
        if not tensors[name].isfinite().all():
            raise UserError(f"--half: {name} holds numbers that float16 cannot; leave --half out")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(file) as temporary:
            save_file(tensors, temporary, {"format": "pt"})
    except SafetensorError as error:
        raise UserError(f"output: {file} cannot be written ({error}); make room or name another") from error
    return differences(configs)
