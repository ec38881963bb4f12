"""Instruction-tuned Stable Diffusion: the library under the scripts. Training starts at training/trainer.py."""

import logging
import os

# The libraries read these when they are imported. Their chatter would bury this project's own messages.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def __getattr__(name: str):
    """`from instruct_pix2pix import Editor`, imported only where somebody asks for it."""
    if name != "Editor":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from instruct_pix2pix.editor import Editor

    return Editor
