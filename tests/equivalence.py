#!/usr/bin/env python
"""Check that an update here is the reference's update, in float32 on the CPU.

    python -m tests.equivalence
    python -m tests.equivalence --reference path/to/diffusers/examples/instruct_pix2pix/train_instruct_pix2pix.py

This project's training loop runs for some updates and is compared with the update written out plainly below, with
diffusers' and PyTorch's own parts (two VAE passes, DDPMScheduler.add_noise, AdamW one tensor at a time, EMAModel), and,
with --reference, with your own copy of diffusers' example. All sides get the same weights, pixels, noise, timesteps and
dropout draws; the example's widened convolution also gets the base model's bias, which it leaves at random. Printed are
the largest absolute differences of losses, weights and averaged weights, then one JSON line. Further flags go to all
trainings, such as --train_batch_size 4, --conditioning_dropout_prob 0.25 or --seed 1.
"""

import argparse
import tempfile
import types
from pathlib import Path

from benchmarks import machine, models, reference
from instruct_pix2pix import cli


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    parser.add_argument("--reference", type=reference.file, help="Your copy of the example; needs torchvision.")
    parser.add_argument("--updates", type=cli.whole_number(1), default=20, help="Updates to compare.")
    args, args.further = parser.parse_known_args(argv)
    return args


def run_ours(flags: list[str]):
    """This project's loop; returns losses, UNet weights, averaged weights, the batches it was fed, the bias that its
    first convolution began with, and the flags by name."""
    from accelerate.state import AcceleratorState, GradientState

    from instruct_pix2pix.training.options import parse_args
    from instruct_pix2pix.training.preparation import build, check, start_accelerator

    # The other sides need the pixels, so the cache stays off; tests/test_latent_cache.py compares it with the live run.
    options = parse_args("", [*flags, "--image_geometry=squash", "--no-cache_latents", "--report_to=none"])
    run = build(check(options, start_accelerator(options), expected_in_channels=4))
    conv_in_bias = run.unet.conv_in.bias.detach().clone()
    losses, batches = [], []  # batches: of the sides that are compared, one per micro-batch
    for step in range(1, options.max_train_steps + 1):
        window = next(run.windows)
        for start in range(0, len(window["dropout"]), options.train_batch_size):
            part = slice(start, start + options.train_batch_size)
            batches.append({name: values[part] for name, values in window.items()})
        losses.append(run.update.run(run.make_inputs(window), run.learning_rate(step))[0].item())
    # accelerate keeps its state for the life of a process; the next side starts afresh.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    weights = {name: p.detach().clone() for name, p in run.unet.named_parameters()}
    return losses, weights, dict(zip(weights, run.ema.shadow, strict=True)), batches, conv_in_bias, options


def run_plainly(options, batches: list[dict]):
    """The reference's update in so many words; returns losses, UNet weights and averaged weights."""
    import torch
    import torch.nn.functional as F
    from diffusers import StableDiffusionPipeline
    from diffusers.training_utils import EMAModel

    pipe = StableDiffusionPipeline.from_pretrained(options.pretrained_model_name_or_path, safety_checker=None)
    unet, vae, tokenizer, text_encoder = pipe.unet, pipe.vae, pipe.tokenizer, pipe.text_encoder
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)

    narrow = unet.conv_in
    unet.conv_in = torch.nn.Conv2d(8, narrow.out_channels, narrow.kernel_size, narrow.stride, narrow.padding)
    extra = torch.zeros_like(narrow.weight)
    unet.conv_in.weight.data = torch.cat([narrow.weight.data, extra], dim=1)
    unet.conv_in.bias.data = narrow.bias.data.clone()
    unet.train()

    def embed(texts):
        ids = tokenizer(texts, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
        with torch.no_grad():
            return text_encoder(ids).last_hidden_state

    def encode(pixels):
        with torch.no_grad():
            return vae.encode(pixels.float() / 255 * 2 - 1).latent_dist

    average = EMAModel(unet.parameters())  # decay 0.9999
    optimizer = torch.optim.AdamW(
        unet.parameters(), lr=options.learning_rate, betas=(0.9, 0.999), weight_decay=0.01, eps=1e-8, foreach=False
    )
    losses, p, accumulation = [], options.conditioning_dropout_prob, options.gradient_accumulation_steps
    for start in range(0, len(batches), accumulation):
        optimizer.zero_grad()
        window = []
        for batch in batches[start : start + accumulation]:
            posterior = encode(batch["edited"])
            latents = (posterior.mean + posterior.std * batch["posterior_noise"]) * vae.config.scaling_factor
            noisy = scheduler.add_noise(latents, batch["noise"], batch["timesteps"])
            text = embed(batch["instructions"])
            source = encode(batch["original"]).mode()
            for i, u in enumerate(batch["dropout"].tolist()):
                if u < 2 * p:
                    text[i] = embed([""])[0]
                if p <= u < 3 * p:
                    source[i] = 0
            predicted = unet(torch.cat([noisy, source], dim=1), batch["timesteps"], text).sample
            target = batch["noise"]
            if scheduler.config.prediction_type == "v_prediction":
                target = scheduler.get_velocity(latents, batch["noise"], batch["timesteps"])
            loss = F.mse_loss(predicted, target)
            (loss / accumulation).backward()
            window.append(loss.item())
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        average.step(unet.parameters())
        losses.append(sum(window) / len(window))
    weights = {name: parameter.detach() for name, parameter in unet.named_parameters()}
    return losses, weights, dict(zip(weights, average.shadow_params, strict=True))


def run_reference(args, flags: dict, folder: Path, batches: list[dict], conv_in_bias):
    """The reader's copy on the very pixels and draws of `batches`; returns losses, weights, averaged weights."""
    from PIL import Image

    def as_images(key):
        return [Image.fromarray(pixels.permute(1, 2, 0).numpy()) for batch in batches for pixels in batch[key]]

    instructions = [text for batch in batches for text in batch["instructions"]]
    models.save_pairs(folder / "as_fed", as_images("original"), instructions, as_images("edited"))
    module = reference.load(args.reference)
    hand_in_draws(module, batches, conv_in_bias)
    steps, output_dir = flags["max_train_steps"], folder / "reference"
    flags |= {"data": folder / "as_fed", "output_dir": output_dir, "checkpointing_steps": steps}
    updates = reference.run(module, models.common_flags(**flags) + args.further)
    return [update["loss"] for update in updates], *final_weights(output_dir, steps)


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


def compare(ours, theirs) -> dict:
    """Largest absolute differences of (losses, weights, averaged weights)."""

    def largest(ours: dict, theirs: dict) -> float:
        assert ours.keys() == theirs.keys()
        return max((ours[name] - theirs[name]).abs().max().item() for name in ours)

    return {
        "loss": max(abs(a - b) for a, b in zip(ours[0], theirs[0], strict=True)),
        "weights": largest(ours[1], theirs[1]),
        "averaged_weights": largest(ours[2], theirs[2]),
    }


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    import datasets

    from instruct_pix2pix.models.tiny import build_tiny_pipeline

    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        model = folder / "model"
        build_tiny_pipeline().save_pretrained(model)
        flags = {
            "model": model,
            "data": models.pairs_folder(folder, rows=24, size=(96, 72)),
            "output_dir": folder / "ours",
            "resolution": 64,
            "train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "max_train_steps": args.updates,
            "learning_rate": 1e-4,
            "conditioning_dropout_prob": 0.1,
            "mixed_precision": "no",
        }
        *ours, batches, conv_in_bias, options = run_ours(models.common_flags(**flags) + args.further)
        print(f"largest differences over {args.updates} updates (losses from {min(ours[0]):.3f} to {max(ours[0]):.3f})")
        result = {"updates": args.updates, **machine.describe()}
        result["plain"] = compare(ours, run_plainly(options, batches))
        if args.reference is not None:
            theirs = run_reference(args, flags, folder, batches, conv_in_bias)
            result["reference"] = compare(ours, theirs)
    machine.report(result)


if __name__ == "__main__":
    cli.run(main)
