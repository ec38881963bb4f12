"""Where a model runs, and in what precision. PyTorch is imported where it is used: `--help` answers at once."""

import os

from instruct_pix2pix.cli import UserError


def add_device_flags(add) -> None:
    """Add --device and --dtype with a parser's or a group's `add_argument`."""
    devices, precisions = ("auto", "cuda", "mps", "cpu"), ("auto", "float32", "float16", "bfloat16")
    add("--device", choices=devices, default="auto", help="auto takes a GPU where there is one")
    add("--dtype", choices=precisions, default="auto", help="precision; auto is float16 on CUDA, float32 elsewhere")


def choose_device(device: str = "auto", dtype: str = "auto"):
    """The (torch.device, torch.dtype) that --device and --dtype mean on this machine; of a multi-GPU launch each
    process gets a GPU of its own. Raises UserError for a device that is not there."""
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = next(name for name in there if there[name]) if device == "auto" else device
    if not there.get(kind):
        raise UserError(f"--device: PyTorch finds no {device} here; give auto or cpu")
    precision = dtype if dtype != "auto" else "float16" if kind == "cuda" else "float32"
    if kind == "cuda" and (count := torch.cuda.device_count()):
        kind = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % count}"
    return torch.device(kind), getattr(torch, precision)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU's memory is what is missing: cuBLAS and cuDNN say it in words of their own."""
    import torch

    signs = ("out of memory", "ALLOC_FAILED", "unable to find an engine")
    told = isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
    return told or isinstance(error, torch.OutOfMemoryError)
