"""The layout of Stable Diffusion's original code, all weights in one file, which ComfyUI and the web UIs open.

Here tensors get their names in it; models/base_files.py and models/sd.py read such files, by diffusers' converters.
"""

import json
import re

import torch
from diffusers.loaders import single_file_utils as original

from instruct_pix2pix.cli import UserError

# What ComfyUI and the web UIs take for granted of an InstructPix2Pix model: the file holds no configuration.
ASSUMED = {
    "unet": {"block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 768, "attention_head_dim": 8},
    "vae": {"block_out_channels": [128, 256, 512, 512], "scaling_factor": 0.18215},
    "scheduler": {"prediction_type": "epsilon", "beta_schedule": "scaled_linear", "rescale_betas_zero_snr": False},
}
BLOCK = re.compile(r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
UNET_RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3"}
UNET_RESNET |= {"time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}
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
    """The tensors of a "unet", "vae" and "text_encoder" under the original's names; none is copied. The text encoder's
    may have "text_model." before their names, as transformers before 5.6 has, or not; in the file they have. UserError
    where diffusers' own converters do not find a tensor again: it has no place in the original."""
    unet, vae, text = (weights[part] for part in ("unet", "vae", "text_encoder"))
    text = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in text.items()}
    layers, blocks = configs["unet"]["layers_per_block"], len(configs["vae"]["block_out_channels"])
    attending = {match[1] for name in unet if (match := re.match(r"up_blocks\.(\d+)\.attentions\.", name))}
    tensors = {original.LDM_UNET_KEY + _unet_name(name, layers, attending): tensor for name, tensor in unet.items()}
    for name, tensor in vae.items():
        renamed = original.LDM_VAE_KEYS[0] + _vae_name(name, blocks)
        linear = ".attn_1." in renamed and tensor.dim() == 2  # in the original a convolution of 1x1
        tensors[renamed] = tensor[..., None, None] if linear else tensor
    tensors |= {original.LDM_CLIP_PREFIX_TO_REMOVE[0] + name: tensor for name, tensor in text.items()}

    for part, own, read in (
        ("unet", unet, original.convert_ldm_unet_checkpoint(tensors, configs["unet"])),
        ("vae", vae, original.convert_ldm_vae_checkpoint(tensors, configs["vae"])),
        ("text_encoder", text, original.convert_ldm_clip_checkpoint(tensors)),
    ):
        for name, tensor in own.items():
            again = read.get(name)
            if again is None or again.shape != tensor.shape or again.data_ptr() != tensor.data_ptr():
                raise UserError(f"model: the original layout, of one file, has no place for its {part}'s {name}")
    return tensors


def differences(configs: dict[str, dict]) -> list[str]:
    """What ComfyUI and the web UIs would take wrongly for granted, as "unet.cross_attention_dim 64"."""
    found = []
    for part, assumed in ASSUMED.items():
        own = {name: configs[part].get(name, value) for name, value in assumed.items()}
        # as JSON, where a tuple is a list
        found += [f"{part}.{name} {own[name]}" for name in own if json.dumps(own[name]) != json.dumps(assumed[name])]
    return found
