"""FSDP2: each process holds a piece of every tensor, a DTensor. Here they are made whole, and whole ones cut.

What leaves the training (checkpoints, pictures, the pipeline) is whole, so a run may go on with any number of
processes, sharded or not, and every tool reads it.
"""

import os

import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils import str_to_bool
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from instruct_pix2pix.cli import UserError

CONFIGURATION = "recipes/accelerate/fsdp2.yaml"


def plugin(args, precision: str) -> FullyShardedDataParallelPlugin | None:
    """FSDP2 as the launcher's environment asks for it; None where it does not. Raises UserError for what cannot be
    sharded. `precision` is no, fp16 or bf16."""
    if str_to_bool(os.environ.get("ACCELERATE_USE_DEEPSPEED", "false")):
        raise UserError(
            "accelerate's distributed type DEEPSPEED is not supported; FSDP2 shards what ZeRO-2 and ZeRO-3 do:"
            f" accelerate launch --config_file {CONFIGURATION}"
        )
    if not str_to_bool(os.environ.get("ACCELERATE_USE_FSDP", "false")):
        return None
    if os.environ.get("FSDP_VERSION", "1") != "2":  # accelerate's default
        raise UserError(f"fsdp_version: 1 is not supported; use 2, as {CONFIGURATION} does")
    # Gradients are added up in float32 over the processes, as they are without sharding.
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if precision == "bf16" else None
    # Every process reads the weights: to leave that to one would empty the text encoder on the others.
    made = FullyShardedDataParallelPlugin(mixed_precision_policy=policy, cpu_ram_efficient_loading=False)
    refused = {
        "fsdp_offload_params: true is not supported; use false": isinstance(made.cpu_offload, CPUOffloadPolicy),
        "fsdp_activation_checkpointing: true is not supported; use --gradient_checkpointing": (
            made.activation_checkpointing
        ),
        "--mixed_precision: fp16 cannot be used with FSDP2; use bf16 or no": precision == "fp16",
        "--compile: cannot be used with FSDP2; leave it out": args.compile,
        f"--optimizer: {args.optimizer} cannot be used with FSDP2, whose tensors are in pieces; use adamw": (
            args.optimizer != "adamw"
        ),
        # One process that runs out of memory would leave the others waiting for its pieces.
        "--max_micro_batch_size: auto cannot be tried with FSDP2; give a number": args.max_micro_batch_size == "auto",
    }
    for mistake, made_it in refused.items():
        if made_it:
            raise UserError(mistake)
    return made


def is_sharded(model: torch.nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's piece, which shares the tensor's memory; of a tensor that is not sharded, all of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def cut(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A whole tensor laid out over the processes as `parameter` of the same shape is. Each process gives all of it."""
    if not isinstance(parameter, DTensor):
        return tensor
    return distribute_tensor(
        tensor.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )


def joined(piece: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """The tensor whose piece on this process is `piece`, laid out as `parameter` is."""
    if not isinstance(parameter, DTensor):
        return piece
    layout = (parameter.device_mesh, parameter.placements)
    whole = {"shape": parameter.shape, "stride": parameter.stride(), "run_check": False}
    return DTensor.from_local(piece.to(parameter.device), *layout, **whole)


def host_copy(tensor: torch.Tensor) -> torch.Tensor | None:
    """The whole tensor, in the host's memory. Of a sharded one all processes call this, and the main one gets it."""
    if not isinstance(tensor, DTensor):
        return tensor.to("cpu", copy=True)
    whole = tensor.full_tensor()
    return whole.to("cpu") if torch.distributed.get_rank() == 0 else None
