"""Runs a reader's own copy of diffusers' examples/instruct_pix2pix/train_instruct_pix2pix.py and reads its steps.

The file is not part of this project. It is loaded as it is and its main() does everything; only names that it looks up
are replaced: the accelerator's log() notes the loss and the clock of every update, and where the two sides are to
compute the same numbers, the random draws are handed in.
"""

import argparse
import importlib.util
import json
import sys
import time
import types
from pathlib import Path
from unittest.mock import patch

from instruct_pix2pix import cli


def file(path: str) -> str:
    """An argparse type: a file that is there."""
    if not Path(path).is_file():
        raise argparse.ArgumentTypeError(f"{path} is not a file")
    return path


def load(path: str):
    """The reference as a module. Raises UserError where it cannot be imported."""
    spec = importlib.util.spec_from_file_location("reference_train_instruct_pix2pix", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        reason = cli.first_line(error)
        raise cli.UserError(f"--reference: {path} cannot be imported ({reason}); install what it needs") from error
    return module


def run(module, flags: list[str]) -> list[dict]:
    """Call the reference's main() with `flags`; returns one {"loss", "clock"} per update, clock in seconds."""
    updates = []

    class Accelerator(module.Accelerator):
        def log(self, values, step=None, log_kwargs=None):
            updates.append({"loss": values["train_loss"], "clock": time.perf_counter()})

    module.Accelerator = Accelerator
    with patch.object(sys, "argv", [module.__file__, *flags]):
        module.main()
    return updates


def _instead(original: types.ModuleType, **replaced) -> types.ModuleType:
    """A copy of a module with some names replaced, for one reader of it."""
    copy = types.ModuleType(original.__name__)
    copy.__dict__.update(vars(original) | replaced)
    return copy


def hand_in_draws(module, batches: list[dict], conv_in_bias) -> None:
    """Make the reference draw the numbers of `batches`, in their order, and keep its rows in order.

    Args:
        batches: one per micro-batch, with posterior_noise and noise (B, C, h, w), timesteps (B,), dropout (B,).
        conv_in_bias: (channels,); the reference leaves its widened convolution's bias at random.
    """
    import torch
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    names = "posterior_noise", "noise", "timesteps", "dropout"
    draws = {name: iter([batch[name] for batch in batches]) for name in names}

    def in_order(*args, **kwargs):
        return torch.utils.data.DataLoader(*args, **{**kwargs, "shuffle": False})

    def conv2d(*args, **kwargs):
        layer = torch.nn.Conv2d(*args, **kwargs)
        layer.bias.data.copy_(conv_in_bias)
        return layer

    def sample(posterior, generator=None):
        noise = next(draws["posterior_noise"])
        return posterior.mean + posterior.std * noise.to(posterior.mean)

    module.torch = _instead(
        torch,
        utils=_instead(torch.utils, data=_instead(torch.utils.data, DataLoader=in_order)),
        randn_like=lambda tensor: next(draws["noise"]).to(tensor),
        randint=lambda *args, device=None, **kwargs: next(draws["timesteps"]).to(device),
        rand=lambda *args, device=None, **kwargs: next(draws["dropout"]).to(device),
    )
    module.nn = _instead(torch.nn, Conv2d=conv2d)
    DiagonalGaussianDistribution.sample = sample


def final_weights(output_dir: Path, step: int) -> tuple[dict, dict]:
    """The UNet's weights and their average in checkpoint-<step>, name -> tensor (the average's by the same name)."""
    from safetensors.torch import load_file

    folder = Path(output_dir) / f"checkpoint-{step}"
    name = "diffusion_pytorch_model.safetensors"
    return load_file(folder / "unet" / name), load_file(folder / "unet_ema" / name)


def main(argv: list[str] | None = None) -> None:
    """python -m benchmarks.reference PATH FLAG... runs the reference and prints the clock of every update."""
    path, *flags = sys.argv[1:] if argv is None else argv
    print(json.dumps([update["clock"] for update in run(load(path), flags)]))


if __name__ == "__main__":
    cli.run(main)
