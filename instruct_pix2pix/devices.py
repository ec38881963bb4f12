"""Where a model runs, and in what precision. PyTorch is imported where it is used: `--help` answers at once."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from instruct_pix2pix.cli import UserError

if TYPE_CHECKING:
    import torch

DEVICES = ("auto", "cuda", "mps", "cpu")
DTYPES = ("auto", "float32", "float16", "bfloat16")


def add_device_flags(add) -> None:
    """Add --device and --dtype with a parser's or a group's `add_argument`."""
    add(
        "--device",
        type=_device,
        default="auto",
        metavar="{auto,cuda,mps,cpu}",
        help="auto takes a GPU where there is one; cuda:1 is the second of several",
    )
    add("--dtype", choices=DTYPES, default="auto", help="precision; auto is float16 on CUDA, float32 elsewhere")


def _device(text: str) -> str:
    if text.partition(":")[0] not in DEVICES:
        raise argparse.ArgumentTypeError(f"{text!r} is no device; give {', '.join(DEVICES)}")
    return text


def choose_device(device: str = "auto", dtype: str = "auto") -> tuple[torch.device, torch.dtype]:
    """What --device and --dtype mean on this machine. Raises UserError for a device that it does not have.

    Each process of a multi-GPU launch gets a GPU of its own.
    """
    import torch

    kind, _, number = device.partition(":")
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if kind == "auto":
        kind = next(name for name, there in found.items() if there)
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if not found[kind] or (number and not (number.isdecimal() and int(number) < count)):
        there = ", ".join(name for name in found if found[name])
        raise UserError(f"--device: PyTorch finds no {device} here; give auto, {there}")
    if kind == "cuda" and count and not number:
        number = str(int(os.environ.get("LOCAL_RANK", 0)) % count)
    if dtype == "auto":
        dtype = "float16" if kind == "cuda" else "float32"
    return torch.device(f"{kind}:{number}" if number else kind), getattr(torch, dtype)
