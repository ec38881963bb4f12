"""The flags of a training run, resolved once: what depends on data, machine or checkpoint is filled in here."""

import argparse
import math
import os

from instruct_pix2pix.data import latent_cache

NOT_WRITTEN_DOWN = {"hub_token", "local_rank", "dry_run", "stated"}


class Config(argparse.Namespace):
    """The flags by name, as the run uses them. Nothing assigns to them any more."""

    def __init__(self, flags: dict):
        self.__dict__.update(flags)

    def __setattr__(self, name, value):
        raise AttributeError(f"{name}: the configuration is resolved and stays as it is")


def resolved(config: argparse.Namespace) -> dict:
    """The flags as they are written down, tracked and compared on resume: everything but the token."""
    return {name: value for name, value in sorted(vars(config).items()) if name not in NOT_WRITTEN_DOWN}


def resolve(args: argparse.Namespace, accelerator, seed: int, rows: int) -> Config:
    """Fill in what the flags left open, for `rows` pairs and the processes of `accelerator`."""
    flags = dict(vars(args))
    images_per_update = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    steps = args.max_train_steps or math.ceil(args.num_train_epochs * rows / images_per_update)
    cached = not args.streaming and latent_cache.is_worth_it(args, rows, samples=steps * images_per_update)
    flags |= {
        "seed": seed,
        "mixed_precision": accelerator.mixed_precision,
        "non_ema_revision": args.non_ema_revision or args.revision,
        "max_train_steps": steps,
        "lora_alpha": args.lora_alpha or args.lora_rank,
        "cache_latents": cached if args.cache_latents is None else args.cache_latents,
    }
    if args.scale_lr:
        # Written down as resolved: a resumed run must not multiply twice.
        flags |= {"learning_rate": args.learning_rate * images_per_update, "scale_lr": False}
    if args.dataloader_num_workers is None:
        flags["dataloader_num_workers"] = _default_workers(flags["cache_latents"], accelerator)
    return Config(flags)


def _default_workers(cache_latents: bool, accelerator) -> int:
    """A GPU should not wait for pictures, nor for the drawing of noise; a CPU has no time to spare for it."""
    if accelerator.device.type == "cpu":
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return 1 if cache_latents else max(1, min(8, cores // accelerator.num_processes - 1))
