"""Low-rank adapters of the UNet (LoRA, DoRA): made, saved, merged; and what one model learned, put onto another.

With adapters only a low-rank change of each projection of the attentions is trained, and `conv_in`, which takes the
source image, in full.
"""

import copy
from pathlib import Path

import torch
from diffusers import StableDiffusionInstructPix2PixPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from instruct_pix2pix.cli import UserError
from instruct_pix2pix.models.trained import ADAPTER_FILE, LORA_FILE, is_adapter

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")  # of the UNet's self- and cross-attentions
CONV_IN_FILE = "conv_in.safetensors"


def attach(unet: UNet2DConditionModel, config) -> None:
    """Freeze the UNet but for `conv_in`, and give its attentions adapters as --lora_rank, --lora_alpha and --use_dora
    say, drawn with --seed.

    A projection W becomes W + (alpha / rank) B A, B (out, rank), A (rank, in) (Hu et al. 2021, equation 3 and section
    4.1); with DoRA that, each row scaled to a trained length m (Liu et al. 2024, equation 5). B starts at zero and m at
    W's own lengths, so that the first prediction is the base's.
    """
    from peft import LoraConfig

    settings = {"r": config.lora_rank, "lora_alpha": config.lora_alpha, "use_dora": config.use_dora}
    settings |= {"target_modules": list(TARGETS), "init_lora_weights": "gaussian"}
    unet.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        unet.add_adapter(LoraConfig(**settings))
    unet.conv_in.requires_grad_(True)


def is_attached(unet: UNet2DConditionModel) -> bool:
    return hasattr(unet, "peft_config")


def trained_parameters(unet: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """What is trained, by name: every parameter, or with adapters theirs and conv_in's."""
    return {name: parameter for name, parameter in unet.named_parameters() if parameter.requires_grad}


def count_trained(unet_config: dict, config) -> int:
    """How many numbers are trained with adapters on an 8-channel UNet of this configuration; loads no weight."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(unet_config | {"in_channels": 8})
        attach(unet, config)
    return sum(parameter.numel() for parameter in trained_parameters(unet).values())


@torch.no_grad()
def fill(unet: UNet2DConditionModel, tensors: dict[str, torch.Tensor]) -> None:
    """Set what is trained to the tensors of these names."""
    for name, parameter in trained_parameters(unet).items():
        parameter.copy_(tensors[name])


def read(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors for `fill`, from a training's checkpoint or from what `save` wrote."""
    if not is_adapter(folder):
        return load_file(folder / ADAPTER_FILE)
    tensors = {f"conv_in.{name}": tensor for name, tensor in load_file(folder / CONV_IN_FILE).items()}
    for name, tensor in load_file(folder / LORA_FILE).items():  # to the names that peft gives them in a model
        tensors[f"{name.removeprefix('unet.').removesuffix('.weight')}.default.weight"] = tensor
    return tensors


def save(unet: UNet2DConditionModel, folder: Path) -> None:
    """Write the adapters as `load_lora_weights` of diffusers' pipelines reads them, and conv_in (docs/adapters.md)."""
    from peft import get_peft_model_state_dict

    settings = unet.peft_config["default"].to_dict()
    # A set has another order in every process, and equal adapters should be equal files.
    metadata = {name: sorted(value) if isinstance(value, set) else value for name, value in settings.items()}
    StableDiffusionInstructPix2PixPipeline.save_lora_weights(
        folder, get_peft_model_state_dict(unet), unet_lora_adapter_metadata=metadata
    )
    conv_in = {name: tensor.contiguous() for name, tensor in unet.conv_in.state_dict().items()}
    save_file(conv_in, folder / CONV_IN_FILE, {"format": "pt"})


@torch.no_grad()
def merged(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The UNet without adapters that predicts the same to rounding, with the tensors of the given one but for changed
    projections; one that has no adapters as it is."""
    if not is_attached(unet):
        return unet
    from peft.tuners.tuners_utils import BaseTunerLayer

    kept = {name: tensor for name, tensor in unet.state_dict().items() if ".lora_" not in name}
    tensors = {name.replace(".base_layer.", "."): tensor for name, tensor in kept.items()}
    for name, layer in unet.named_modules():
        if isinstance(layer, BaseTunerLayer):
            layer = copy.deepcopy(layer)
            layer.merge()
            tensors[f"{name}.weight"] = layer.get_base_layer().weight
    return _unet_of(unet.config, tensors)


def _unet_of(config: dict, tensors: dict[str, torch.Tensor]) -> UNet2DConditionModel:
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    unet.load_state_dict(tensors, assign=True)
    return unet.eval()


def transplant(ours: Path, base: Path, theirs: Path) -> UNet2DConditionModel:
    """The UNet ours - base + theirs, float32, of three UNets' safetensors files: what training changed in `base`, put
    onto another model that came of it. Onto the base itself it is ours, bit for bit.

    Where base or theirs have 4 input channels, the other 4 count as zero, as training widens them. The files are mapped
    into memory and read a tensor at a time. Raises UserError where they are not of one family.
    """
    result = {}
    with safe_open(ours, "pt") as mine, safe_open(base, "pt") as old, safe_open(theirs, "pt") as new:
        for name in sorted({*mine.keys(), *old.keys(), *new.keys()}):
            tensor, before, after = tensors = [_tensor(file, name) for file in (mine, old, new)]
            if len({tensor.shape for tensor in tensors}) > 1:
                shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors)
                raise UserError(f"OURS, BASE, THEIRS: {name} has the shapes {shapes}; give models of one family")
            # Where theirs is the base's, no sum can round or lose the sign of a zero.
            result[name] = torch.where(before == after, tensor, tensor + (after - before)).float()
    return _unet_of(UNet2DConditionModel.load_config(ours.parent), result)


def _tensor(file: safe_open, name: str) -> torch.Tensor:
    """A file's tensor in float64, conv_in widened to 8 channels; an empty one where it has none of that name."""
    tensor = file.get_tensor(name).double() if name in file.keys() else torch.empty(0)
    if name == "conv_in.weight" and tensor.dim() == 4 and tensor.shape[1] == 4:
        return torch.cat((tensor, torch.zeros_like(tensor)), dim=1)
    return tensor
