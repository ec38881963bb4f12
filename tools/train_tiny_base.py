"""Train the tiny Stable Diffusion and the tiny InstructPix2Pix kept under assets/.

    python -m tools.train_tiny_base --stage linear   --work_dir outputs/tiny_base
    python -m tools.train_tiny_base --stage vae      --work_dir outputs/tiny_base
    python -m tools.train_tiny_base --stage base     --work_dir outputs/tiny_base
    python -m tools.train_tiny_base --stage instruct --work_dir outputs/tiny_base

Run from the repository's root; recipes/tiny_base.sh does it all. Each stage starts from what the one before it
made. Every stage writes its state to --work_dir now and then, and the same command again goes on from there. A
stage that has ended stays. tools/save_tiny_base.py then measures the models and makes pipeline folders of them.

linear    The best *linear* convolutional autoencoder of the VAE's shape, found in minutes on 64-pixel tiles
          of photos, cartoons and other edited photos, and then embedded in the VAE.
vae       Encoder and decoder together, as the non-linear networks they are, from there. The squared error
          alone, no perceptual or adversarial loss: what counts here is the ceiling, in dB, that it sets.
base      The 4-channel text-to-image UNet and its text encoder, on latents of photos captioned by their file
          names, some of them edited: "a photo of a windmill", "a gray photo of a windmill".
instruct  The 8-channel InstructPix2Pix (Brooks et al. 2023) on the edits and restorations of
          generic_edits.py, from the base UNet with its input widened by zeros (section 3.2), with 5 % each of
          no text, no image and neither (section 3.2.1). In the first quarter of its steps half of the
          pairs keep the image: copying comes first.

A CUDA device is used where there is one. All is float32: bfloat16 is many times slower on most CPUs.
"""

import argparse
import json
import math
import os
import random
import re
import sys
import time
from pathlib import Path

TILE = 64  # pixels; 16 x 16 latents
SCALES = (96, 128, 160, 192, 256)  # pixels of the photo's shorter side from which tiles are cut
POSTERIOR_DEVIATION = 0.05  # of latents whose variance is 1


# --- photos --------------------------------------------------------------------------


def resize_shorter_side(image, side: int):
    """uint8 (H, W, 3) with its shorter side scaled to `side` pixels, the other in proportion."""
    import cv2

    height, width = image.shape[:2]
    factor = side / min(height, width)
    size = (max(side, round(width * factor)), max(side, round(height * factor)))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC)


def load_photos(folder: Path) -> dict:
    """Every .webp of `folder` by its file stem, in order of name: uint8 (H, W, 3) RGB."""
    import cv2

    return {path.stem: cv2.imread(str(path), cv2.IMREAD_COLOR)[..., ::-1] for path in sorted(folder.glob("*.webp"))}


def cut_tiles(photos: dict, count: int, seed: int):
    """(tiles uint8 (count, TILE, TILE, 3), the photo's stem of each): the photos in turn, at random scales.

    A photo is enlarged by a fifth at most. Every other tile is mirrored.
    """
    import numpy as np

    rng = random.Random(seed)
    pyramids = [
        [resize_shorter_side(photo, side) for side in SCALES if side <= 1.2 * min(photo.shape[:2])]
        for photo in photos.values()
    ]
    tiles, stems = [], []
    for number in range(count):
        level = rng.choice(pyramids[number % len(pyramids)])
        top, left = (rng.randrange(size - TILE + 1) for size in level.shape[:2])
        tile = level[top : top + TILE, left : left + TILE]
        tiles.append(tile[:, ::-1] if rng.random() < 0.5 else tile)
        stems.append(list(photos)[number % len(photos)])
    return np.stack(tiles), stems


def centre_crops(photos: dict, shorter_side: int, size: int = 128):
    """uint8 (N, size, size, 3): the middle of every photo after scaling its shorter side."""
    import numpy as np

    crops = []
    for photo in photos.values():
        image = resize_shorter_side(photo, shorter_side)
        top, left = ((side - size) // 2 for side in image.shape[:2])
        crops.append(image[top : top + size, left : left + size])
    return np.stack(crops)


def to_model(images, device):
    """uint8 (N, H, W, 3) array to float32 (N, 3, H, W) tensor in [-1, 1]."""
    import torch

    return torch.from_numpy(images.copy()).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def caption(stem: str) -> str:
    """The file stem renewable_windmill12 gives "a photo of a windmill": no number, no name of the group."""
    words = stem.split("_")
    words = (
        words[1:] if words[0] in {"animals", "farm", "fishes", "monuments", "others", "renewable", "tools"} else words
    )
    subject = re.sub(r"\d+", "", " ".join(words)).strip()
    return f"a photo of a {subject}"


def psnr(image, reference):
    """Peak signal-to-noise ratio in dB of each image: (N, 3, H, W) in [-1, 1], whose range is 2."""
    error = (image.clamp(-1, 1) - reference).square().flatten(1).mean(1)
    return 10 * (4 / error).log10()


# --- one loop for every stage --------------------------------------------------------


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up over `warmup` steps, then half a cosine down to zero at `steps`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def save_tensors(tensors: dict, path: Path, **metadata: str) -> None:
    """Write a safetensors file under a temporary name, then rename it over `path`."""
    from safetensors.torch import save_file

    temporary = path.with_name(path.name + ".partial")
    save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, temporary, metadata)
    os.replace(temporary, path)


def matrix_views(modules: dict, parameters: dict) -> dict:
    """Those of the named `parameters` that Muon updates, as views (rows, columns) under the same names.

    The weights of convolutions and linear layers, unless they have too few channels to speak of a matrix.
    """
    import torch

    layers = [layer for module in modules.values() for layer in module.modules()]
    weights = {id(layer.weight) for layer in layers if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear)}
    return {
        key: torch.nn.Parameter(value.detach().flatten(1))
        for key, value in parameters.items()
        if id(value) in weights and len(value) >= 8 and value[0].numel() >= 16
    }


def optimise(name: str, modules: dict, loss_at, evaluate, arguments) -> float:
    """Minimise `loss_at(step, generator)` over the modules' parameters; leave their EMA in them.

    The weights of convolutions and linear layers, as matrices with a row for each output channel, are updated
    by Muon (Jordan et al. 2024) with `arguments.matrix_learning_rate`, all else by AdamW. A rate of zero
    leaves everything to AdamW.

    The generator of a step is seeded by the run's seed and the step, so a resumed run sees the same batches
    as an uninterrupted one. State goes to `<work_dir>/<name>.state.safetensors` and figures, one JSON object
    a line, to `<work_dir>/<name>.log.jsonl`. `evaluate()` returns a dictionary of figures and is called with
    the EMA in place. Returns the seconds of training spent in all.
    """
    import torch
    from safetensors import safe_open
    from tqdm import tqdm

    work_dir, steps = arguments.work_dir, arguments.steps
    state_file = work_dir / f"{name}.state.safetensors"
    parameters = {f"{m}.{p}": v for m, module in modules.items() for p, v in module.named_parameters()}
    matrices = matrix_views(modules, parameters) if arguments.matrix_learning_rate else {}
    others = {key: value for key, value in parameters.items() if key not in matrices}
    optimisers = [
        (arguments.learning_rate, torch.optim.AdamW(others.values(), betas=(0.9, 0.99), weight_decay=1e-4), others)
    ]
    if matrices:
        # With this adjustment an update is as large as one of AdamW at the same rate.
        muon = torch.optim.Muon(matrices.values(), weight_decay=1e-4, adjust_lr_fn="match_rms_adamw")
        optimisers.append((arguments.matrix_learning_rate, muon, matrices))
    average = {key: value.detach().clone() for key, value in parameters.items()}
    first, spent = 0, 0.0
    if state_file.exists():
        with safe_open(state_file, "pt", device=str(arguments.device)) as state, torch.no_grad():
            first, spent = int(state.metadata()["step"]), float(state.metadata()["seconds"])
            for key, value in parameters.items():
                value.copy_(state.get_tensor(f"weight.{key}"))
                average[key].copy_(state.get_tensor(f"average.{key}"))
            for _, optimiser, values in optimisers:
                for entry in state.keys():
                    kind, key = entry.split(".", 1)
                    if key in values and kind not in ("weight", "average"):
                        optimiser.state[values[key]][kind] = state.get_tensor(entry)

    def swap():
        with torch.no_grad():
            for key, value in parameters.items():
                held = value.detach().clone()
                value.copy_(average[key])
                average[key].copy_(held)

    def save(step: int):
        tensors = {}
        for key, value in parameters.items():
            tensors |= {f"weight.{key}": value, f"average.{key}": average[key]}
        for _, optimiser, values in optimisers:
            for key, value in values.items():
                tensors |= {f"{kind}.{key}": tensor for kind, tensor in optimiser.state[value].items()}
        save_tensors(tensors, state_file, step=str(step), seconds=str(spent))

    bar = tqdm(range(first, steps), desc=name, initial=first, total=steps, mininterval=5)
    running = None
    for step in bar:
        started = time.perf_counter()
        generator = torch.Generator().manual_seed(arguments.seed * 1_000_003 + step)
        torch.manual_seed(arguments.seed * 1_000_003 + step)
        loss = loss_at(step, generator)
        for value in parameters.values():
            value.grad = None
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        for key, matrix in matrices.items():
            matrix.grad = parameters[key].grad.flatten(1)
        for peak, optimiser, _ in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(step, steps, peak, warmup=min(200, steps // 10))
            optimiser.step()
        decay = min(arguments.ema, (step + 1) / (step + 10))
        with torch.no_grad():
            for key, value in parameters.items():
                average[key].lerp_(value, 1 - decay)
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        spent += time.perf_counter() - started
        last = step + 1 == steps
        if last or (step + 1) % arguments.log_every == 0:
            swap()
            figures = {"step": step + 1, "seconds": round(spent), "loss": round(running, 5), **evaluate()}
            swap()
            with open(work_dir / f"{name}.log.jsonl", "a") as log:
                log.write(json.dumps(figures) + "\n")
            tqdm.write(f"{name} {json.dumps(figures)}")
            save(step + 1)
    swap()
    return spent


# --- the autoencoder -----------------------------------------------------------------


def zero_residual_branches(model) -> None:
    """Make every residual block and attention the identity (or its linear shortcut) to start with."""
    import torch
    from diffusers.models.attention_processor import Attention
    from diffusers.models.resnet import ResnetBlock2D

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, ResnetBlock2D):
                module.conv2.weight.zero_(), module.conv2.bias.zero_()
            elif isinstance(module, Attention):
                module.to_out[0].weight.zero_(), module.to_out[0].bias.zero_()


def linear_encode(vae, images):
    """The encoder without its residual branches, normalisations and non-linearities: (B, 4, H/4, W/4).

    Only every fourth channel of the last level is used; `embed_linear` gives the other three their meaning.
    """
    import torch.nn.functional as F

    encoder = vae.encoder
    hidden = encoder.conv_in(images)
    for block in encoder.down_blocks:
        shortcut = block.resnets[0].conv_shortcut
        hidden = hidden if shortcut is None else shortcut(hidden)
        if block.downsamplers:
            hidden = block.downsamplers[0](hidden)
    return F.conv2d(hidden[:, ::4], encoder.conv_out.weight[:4, ::4], encoder.conv_out.bias[:4], padding=1)


def linear_decode(vae, latents):
    """The decoder's counterpart of `linear_encode`: latents (B, 4, h, w) to images (B, 3, 4h, 4w)."""
    import torch.nn.functional as F

    decoder = vae.decoder
    hidden = decoder.conv_in(latents)
    for block in decoder.up_blocks:
        shortcut = block.resnets[0].conv_shortcut
        hidden = hidden if shortcut is None else shortcut(hidden)
        if block.upsamplers:
            hidden = block.upsamplers[0](hidden)
    return F.conv2d(hidden[:, ::4], decoder.conv_out.weight[:, ::4], decoder.conv_out.bias, padding=1)


def embed_linear(vae, images) -> None:
    """Make the whole autoencoder compute what `linear_encode` and `linear_decode` do, almost exactly.

    Before each output convolution stand a group normalisation and SiLU. Channels in fours (x, -x, K, -K) pass
    both: with K well above x the normalisation divides by nearly a constant, which its gain undoes, and
    silu(x) - silu(-x) = x. The latents are then brought to zero mean and unit variance by the two 1x1
    convolutions between encoder and decoder, and the posterior's deviation to POSTERIOR_DEVIATION.
    `images`, (B, 3, H, W) in [-1, 1], are what the scales are measured on.
    """
    import torch

    zero_residual_branches(vae)
    with torch.no_grad():
        latents = linear_encode(vae, images)
        mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
        vae.quant_conv.weight.zero_(), vae.quant_conv.bias.zero_()
        vae.quant_conv.weight[:4, :4, 0, 0] = torch.diag(1 / deviation)
        vae.quant_conv.bias[:4] = -mean / deviation
        vae.quant_conv.bias[4:] = 2 * math.log(POSTERIOR_DEVIATION)
        vae.post_quant_conv.weight[..., 0, 0] = torch.diag(deviation)
        vae.post_quant_conv.bias.copy_(mean)

        halves = (
            (vae.encoder, vae.encoder.down_blocks, lambda: linear_encode(vae, images)),
            (vae.decoder, vae.decoder.up_blocks, lambda: linear_decode(vae, latents)),
        )
        for half, blocks, run in halves:
            shortcut, norm, out = blocks[-1].resnets[0].conv_shortcut, half.conv_norm_out, half.conv_out
            captured = []
            hook = shortcut.register_forward_hook(lambda module, inputs, output, to=captured: to.append(output))
            run()
            hook.remove()
            size = captured[0][:, ::4].square().mean().sqrt()
            constant = 10 * size
            for offset, sign in ((1, -1.0), (2, 0.0), (3, 0.0)):
                shortcut.weight[offset::4] = sign * shortcut.weight[::4]
                shortcut.bias[offset::4] = sign * shortcut.bias[::4]
                out.weight[:, offset::4] = sign * out.weight[:, ::4]
            shortcut.bias[2::4], shortcut.bias[3::4] = constant, -constant
            norm.weight.fill_(((size**2 + constant**2) / 2).sqrt())
            norm.bias.zero_()


def autoencoder_data(arguments, photos: dict, held_out: dict):
    """(batch, probes): a function from a generator to training images, and the held-out images by name.

    All are float32 (B, 3, H, W) in [-1, 1]. Half of the training tiles are photos, the others stand for the
    pictures that edits make, which the latents have to hold as well: cartoons above all.
    """
    import numpy as np
    import torch
    from tqdm import tqdm

    from instruct_pix2pix.building.cartoonizer import opencv_cartoonize
    from tools.generic_edits import flat_colours, gray, invert, more_contrast, posterize, vivid

    def cartoon(image, rng):
        return opencv_cartoonize(image[None])[0]

    tiles, _ = cut_tiles(photos, arguments.tiles, arguments.seed)
    rng = np.random.default_rng(arguments.seed)
    changes = (cartoon, flat_colours, cartoon, posterize, cartoon, vivid, cartoon, more_contrast, gray, invert)
    for number in tqdm(range(0, len(tiles), 2), desc="edited tiles", mininterval=5):
        tiles[number] = changes[number // 2 % len(changes)](np.ascontiguousarray(tiles[number]), rng)

    probes = {"photos": centre_crops(held_out, 128), "photo details": centre_crops(held_out, 256)}
    probes["cartoons"] = opencv_cartoonize(probes["photos"])
    probes = {name: to_model(images, arguments.device) for name, images in probes.items()}

    def batch(generator, size: int = arguments.batch_size):
        chosen = torch.randint(len(tiles), (size,), generator=generator)
        return to_model(tiles[chosen.numpy()], arguments.device)

    return batch, probes


def ceiling(encode, decode, probes: dict) -> dict:
    """PSNR in dB of each set of probes against itself encoded and decoded, mean over its images."""
    import torch

    with torch.no_grad():
        decibels = {name: psnr(decode(encode(images)), images).mean() for name, images in probes.items()}
    return {f"{name} dB": round(value.item(), 2) for name, value in decibels.items()}


def vae_ceiling(vae, probes: dict) -> dict:
    return ceiling(lambda x: vae.encode(x).latent_dist.mode(), lambda z: vae.decode(z).sample, probes)


def train_linear(arguments, photos: dict, held_out: dict) -> None:
    """Train the linear autoencoder, embed it in the VAE and save that to `<work_dir>/linear`."""
    import torch

    from instruct_pix2pix.models.tiny import build_vae

    batch, probes = autoencoder_data(arguments, photos, held_out)
    torch.manual_seed(arguments.seed)
    vae = build_vae().to(arguments.device)
    for module in (vae.encoder, vae.decoder):
        for layer in module.modules():
            if isinstance(layer, torch.nn.Conv2d):
                torch.nn.init.orthogonal_(layer.weight), torch.nn.init.zeros_(layer.bias)

    def loss(step, generator):
        images = batch(generator)
        return (linear_decode(vae, linear_encode(vae, images)) - images).square().mean()

    def evaluate() -> dict:
        return ceiling(lambda x: linear_encode(vae, x), lambda z: linear_decode(vae, z), probes)

    modules = {"linear": torch.nn.ModuleList(used_convolutions(vae))}
    seconds = optimise("linear", modules, loss, evaluate, arguments)
    figures = {"seconds": round(seconds), "steps": arguments.steps, "before embedding": evaluate()}
    embed_linear(vae, batch(torch.Generator().manual_seed(arguments.seed), 1024))
    finish(arguments.work_dir, "linear", {"vae": vae}, figures | vae_ceiling(vae, probes))


def train_vae(arguments, photos: dict, held_out: dict) -> None:
    """Train encoder and decoder together, from the linear solution; save the VAE to `<work_dir>/vae`.

    The latents that are decoded carry noise in proportion to their own spread in the batch. So neighbouring
    latents decode alike, and nothing is gained by larger latents, as it would be with noise of a fixed size.
    """
    import torch
    from diffusers import AutoencoderKL

    batch, probes = autoencoder_data(arguments, photos, held_out)
    vae = AutoencoderKL.from_pretrained(arguments.work_dir / "linear" / "vae").to(arguments.device)
    start = vae_ceiling(vae, probes)

    def loss(step, generator):
        images = batch(generator)
        latents = vae.encode(images).latent_dist.mean
        noise = torch.randn(latents.shape, generator=generator).to(arguments.device)
        spread = latents.std((0, 2, 3), keepdim=True)
        return (vae.decode(latents + POSTERIOR_DEVIATION * spread * noise).sample - images).square().mean()

    seconds = optimise("vae", {"vae": vae}, loss, lambda: vae_ceiling(vae, probes), arguments)
    standardise_latents(vae, batch(torch.Generator().manual_seed(arguments.seed), 1024))
    figures = {"seconds": round(seconds), "steps": arguments.steps, "start": start, **vae_ceiling(vae, probes)}
    finish(arguments.work_dir, "vae", {"vae": vae}, figures)


def standardise_latents(vae, images) -> None:
    """Bring the latents of `images`, (B, 3, H, W) in [-1, 1], to zero mean and unit variance in each channel.

    The 1x1 convolution behind the encoder does it and the one before the decoder undoes it: what is decoded
    stays the same. The posterior's standard deviation becomes POSTERIOR_DEVIATION everywhere.
    """
    import torch

    with torch.no_grad():
        latents = torch.cat([vae.encode(part).latent_dist.mean for part in images.split(64)])
        mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
        before, after = vae.quant_conv, vae.post_quant_conv
        before.weight[:4] /= deviation[:, None, None, None]
        before.bias[:4] = (before.bias[:4] - mean) / deviation
        before.weight[4:].zero_(), before.bias[4:].fill_(2 * math.log(POSTERIOR_DEVIATION))
        after.bias += after.weight[..., 0, 0] @ mean
        after.weight *= deviation[None, :, None, None]


def used_convolutions(vae) -> list:
    """The convolutions that `linear_encode` and `linear_decode` run through."""
    layers = [vae.encoder.conv_in, vae.encoder.conv_out, vae.decoder.conv_in, vae.decoder.conv_out]
    for block in (*vae.encoder.down_blocks, *vae.decoder.up_blocks):
        shortcut = block.resnets[0].conv_shortcut
        layers += [shortcut] if shortcut is not None else []
    layers += [block.downsamplers[0].conv for block in vae.encoder.down_blocks if block.downsamplers]
    layers += [block.upsamplers[0].conv for block in vae.decoder.up_blocks if block.upsamplers]
    return layers


def finish(work_dir: Path, stage: str, models: dict, figures: dict) -> None:
    """Save each model to `<work_dir>/<stage>/<name>`, then the figures, whose file marks its end."""
    import torch

    for name, model in models.items():
        model.save_pretrained(work_dir / stage / name, safe_serialization=True)
    device = next(next(iter(models.values())).parameters()).device.type
    figures["device"] = device if device != "cpu" else f"cpu, {torch.get_num_threads()} thread(s)"
    temporary = work_dir / f"{stage}.json.partial"
    temporary.write_text(json.dumps(figures, indent=2) + "\n")
    os.replace(temporary, work_dir / f"{stage}.json")
    print(f"{stage}: {json.dumps(figures)}")


# --- the UNets -----------------------------------------------------------------------

# Captions of edited photos in the base stage, so that its text encoder learns words that change a picture.
ADJECTIVES = {
    "gray": ("gray", "black and white"),
    "warm": ("warm",),
    "cool": ("cool", "cold blue"),
    "sepia": ("sepia", "vintage"),
    "darker": ("dark",),
    "brighter": ("bright",),
    "vivid": ("vivid", "colorful"),
    "pale": ("pale", "faded"),
    "blur": ("blurry", "soft"),
    "sharpen": ("sharp",),
    "invert": ("negative",),
    "posterize": ("posterized",),
    "green": ("green",),
}


def encode_all(vae, images, device, batch_size: int = 64):
    """Latents (N, 4, h, w), float16 on the CPU, of uint8 images (N, H, W, 3): the mode of the posterior."""
    import torch
    from tqdm import tqdm

    chunks = []
    with torch.no_grad():
        for start in tqdm(range(0, len(images), batch_size), desc="latents", mininterval=5):
            latents = vae.encode(to_model(images[start : start + batch_size], device)).latent_dist.mode()
            chunks.append(latents.half().cpu())
    return torch.cat(chunks)


def cached(path: Path, make):
    """The tensors of the safetensors file `path`, made by `make()` and saved there the first time."""
    from safetensors.torch import load_file

    if not path.exists():
        save_tensors(make(), path)
    return load_file(path)


def prepare_unet(unet) -> None:
    """Start from zero residual branches and a zero output, as Dhariwal and Nichol (2021) do.

    Two channels of each group before the output start as constants of opposite sign, so that the
    normalisation there does not take away the mean of the image, which a copy has to keep.
    """
    import torch

    zero_residual_branches(unet)
    per_group = unet.config.block_out_channels[0] // unet.config.norm_num_groups
    with torch.no_grad():
        shortcut = unet.up_blocks[-1].resnets[-1].conv_shortcut
        for offset, constant in ((0, 2.0), (1, -2.0)):
            shortcut.weight[offset::per_group] = 0
            shortcut.bias[offset::per_group] = constant
        unet.conv_out.weight.zero_(), unet.conv_out.bias.zero_()
        # The pooled text starts at zero beside the time step's embedding.
        unet.add_embedding.norm2.weight.zero_(), unet.add_embedding.norm2.bias.zero_()


def velocity_loss(unet, scheduler, target, source, embeddings, generator):
    """Weighted squared error of the velocity (Salimans and Ho 2022, section 4) at random time steps.

    The squared error of the velocity is that of the clean latents times SNR + 1. That factor is clipped at 5,
    as Hang et al. (2023, section 3.4) clip the SNR, so that nearly clean latents do not outweigh all others.
    Clipping the SNR itself would silence the noisiest steps too, the only ones at which an edit is decided.

    `target`: latents (B, 4, h, w) to be denoised; `source`: latents of the same shape, joined to the UNet's
    input, or None; `embeddings`: text (B, 77, 64).
    """
    import torch

    noise = torch.randn(target.shape, generator=generator).to(target)
    times = torch.randint(scheduler.config.num_train_timesteps, (len(target),), generator=generator).to(target.device)
    noisy = scheduler.add_noise(target, noise, times)
    inputs = noisy if source is None else torch.cat([noisy, source], dim=1)
    predicted = unet(inputs, times, embeddings).sample
    signal = scheduler.alphas_cumprod.to(target.device)[times]
    ratio = signal / (1 - signal)
    weight = (5 / (ratio + 1)).clamp(max=1)[:, None, None, None]
    return (weight * (predicted - scheduler.get_velocity(target, noise, times)).square()).mean()


def tokenise(tokenizer, sentences: list[str], device):
    """Token ids (N, 77), padded as the pipelines pad them."""
    encoded = tokenizer(sentences, padding="max_length", truncation=True, return_tensors="pt")
    return encoded.input_ids.to(device)


def train_base(arguments, photos: dict, held_out: dict) -> None:
    """Train the 4-channel UNet with its text encoder and save both to `<work_dir>/base`."""
    import numpy as np
    import torch
    from diffusers import AutoencoderKL

    from instruct_pix2pix.models.tiny import build_scheduler, build_text_encoder, build_tokenizer, build_unet
    from tools.generic_edits import EDITS

    device = arguments.device
    vae = AutoencoderKL.from_pretrained(arguments.work_dir / "vae" / "vae").to(device)
    tokenizer, scheduler = build_tokenizer(), build_scheduler()
    captions: dict[str, int] = {"": 0}

    def number_of(sentence: str) -> int:
        return captions.setdefault(sentence, len(captions))

    tiles, stems = cut_tiles(photos, arguments.tiles, arguments.seed + 1)
    rng = np.random.default_rng(arguments.seed)
    sentences = np.zeros(len(tiles), dtype=np.int64)
    for number, stem in enumerate(stems):
        plain = caption(stem)
        # Stems repeat every len(photos) tiles: half of each photo's tiles are edited, and captioned so.
        turn = number // len(photos)
        if turn % 2:
            name = list(ADJECTIVES)[(turn // 2 + number) % len(ADJECTIVES)]
            tiles[number] = EDITS[name][0](np.ascontiguousarray(tiles[number]), rng)
            plain = plain.replace("a photo", f"a {rng.choice(ADJECTIVES[name])} photo", 1)
        sentences[number] = number_of(plain)
    latents = cached(
        arguments.work_dir / "base.latents.safetensors",
        lambda: {"photos": encode_all(vae, tiles, device)},
    )["photos"]
    tokens = tokenise(tokenizer, list(captions), device)
    sentences = torch.from_numpy(sentences)
    held_out_tiles, held_out_stems = cut_tiles(held_out, 96, arguments.seed)
    probe = encode_all(vae, held_out_tiles, device).float().to(device)
    probe_tokens = tokenise(tokenizer, [caption(stem) for stem in held_out_stems], device)

    torch.manual_seed(arguments.seed)
    text_encoder, unet = build_text_encoder(tokenizer).to(device), build_unet(4).to(device)
    prepare_unet(unet)

    def loss(step, generator):
        chosen = torch.randint(len(latents), (arguments.batch_size,), generator=generator)
        named = sentences[chosen] * (torch.rand(len(chosen), generator=generator) >= 0.1)
        embeddings = text_encoder(tokens[named.to(device)]).last_hidden_state
        return velocity_loss(unet, scheduler, latents[chosen].float().to(device), None, embeddings, generator)

    def evaluate() -> dict:
        with torch.no_grad():
            embeddings = text_encoder(probe_tokens).last_hidden_state
            held = velocity_loss(unet, scheduler, probe, None, embeddings, torch.Generator().manual_seed(0))
        return {"held-out loss": round(held.item(), 5)}

    modules = {"text_encoder": text_encoder, "unet": unet}
    seconds = optimise("base", modules, loss, evaluate, arguments)
    figures = {"seconds": round(seconds), "steps": arguments.steps, **evaluate()}
    finish(arguments.work_dir, "base", modules, figures)


def make_pairs(name: str, tiles, rng):
    """(source, target) tiles of one edit or restoration of generic_edits.py: uint8 (N, H, W, 3) each."""
    import numpy as np

    from tools.generic_edits import EDITS, RESTORATIONS

    function = (EDITS.get(name) or RESTORATIONS[name])[0]
    changed = np.stack([function(np.ascontiguousarray(tile), rng) for tile in tiles])
    return (tiles, changed) if name in EDITS else (changed, tiles)


def widen(unet, in_channels: int = 8):
    """The same UNet taking 4 more input channels, ignored at first: their weights are zero (section 3.2)."""
    import torch
    from diffusers import UNet2DConditionModel

    wide = UNet2DConditionModel.from_config({**unet.config, "in_channels": in_channels})
    weights = dict(unet.state_dict())
    grown = torch.zeros_like(wide.conv_in.weight)
    grown[:, : unet.config.in_channels] = weights["conv_in.weight"]
    wide.load_state_dict(weights | {"conv_in.weight": grown})
    return wide


def sample(pipeline, images, prompts: list[str], guidance: float, image_guidance: float, device):
    """Edited images (N, 3, H, W) in [-1, 1], 20 steps, of `images` in the same range; the noise is fixed.

    Both guidance scales at 1 turn guidance off.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    edited = pipeline(
        prompts,
        image=(images + 1) / 2,
        num_inference_steps=20,
        guidance_scale=guidance,
        image_guidance_scale=image_guidance,
        generator=generator,
        output_type="pt",
    ).images
    return edited.float().to(device) * 2 - 1


def edit_figures(pipeline, crops, names: list[str], guidance: float, image_guidance: float, device) -> dict:
    """PSNR in dB, mean over `crops` (uint8 (N, H, W, 3)), of each edit named, with its first wording.

    identity: source against target; through VAE: the source encoded and decoded, against target; ceiling: the
    target encoded and decoded, against target; model: the edited source against target; in VAE: the edited
    source against the encoded and decoded target, which is the best that the model could give.
    """
    import numpy as np
    import torch
    from tqdm import tqdm

    from tools.generic_edits import EDITS, RESTORATIONS

    figures = {}
    for name in tqdm(names, desc=f"edits, guidance {guidance:g}", leave=False):
        wording = (EDITS.get(name) or RESTORATIONS[name])[1][0]
        pair = make_pairs(name, crops, np.random.default_rng(0))
        source, target = (to_model(images, device) for images in pair)
        with torch.no_grad():
            source_back, target_back = (
                pipeline.vae.decode(pipeline.vae.encode(images).latent_dist.mode()).sample.clamp(-1, 1)
                for images in (source, target)
            )
        edited = sample(pipeline, source, [wording] * len(crops), guidance, image_guidance, device)
        figures[name] = {
            "identity": psnr(source, target).clamp(max=99).mean().item(),
            "through VAE": psnr(source_back, target).mean().item(),
            "ceiling": psnr(target_back, target).mean().item(),
            "model": psnr(edited, target).mean().item(),
            "in VAE": psnr(edited, target_back).mean().item(),
        }
        figures[name] = {key: round(value, 2) for key, value in figures[name].items()}
    return figures


def train_instruct(arguments, photos: dict, held_out: dict) -> None:
    """Train the 8-channel UNet with its text encoder and save both to `<work_dir>/instruct`."""
    import numpy as np
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    from instruct_pix2pix.models.tiny import assemble, build_scheduler, build_tokenizer
    from tools.generic_edits import EDITS, RESTORATIONS

    device, work_dir = arguments.device, arguments.work_dir
    vae = AutoencoderKL.from_pretrained(work_dir / "vae" / "vae").to(device)
    tokenizer, scheduler = build_tokenizer(), build_scheduler()
    names = [name for name in (*EDITS, *RESTORATIONS) if name != "keep"]

    # Each task takes its own stretch of the tiles, which hold every photo in turn.
    count = min(arguments.tiles, 1200)
    stretches = [(number * count // 2 + np.arange(count)) % arguments.tiles for number in range(len(names))]

    def make_latents() -> dict:
        tiles, _ = cut_tiles(photos, arguments.tiles, arguments.seed + 2)
        rng = np.random.default_rng(arguments.seed)
        tensors = {"photos": encode_all(vae, tiles, device)}
        for name, stretch in zip(names, stretches, strict=True):
            source, target = make_pairs(name, tiles[stretch], rng)
            tensors[name] = encode_all(vae, target if name in EDITS else source, device)
        return tensors

    latents = cached(work_dir / "instruct.latents.safetensors", make_latents)
    clean = torch.stack([latents["photos"][stretch] for stretch in stretches])  # (tasks, pairs, 4, h, w)
    changed = torch.stack([latents[name] for name in names])
    restores = torch.tensor([name in RESTORATIONS for name in names])
    wordings = {name: (EDITS.get(name) or RESTORATIONS[name])[1] for name in ("keep", *names)}
    sentences = ["", *(sentence for name in wordings for sentence in wordings[name])]
    tokens = tokenise(tokenizer, sentences, device)
    first_of = torch.tensor([sentences.index(wordings[name][0]) for name in wordings])
    count_of = torch.tensor([len(wordings[name]) for name in wordings])
    weights = torch.tensor([2.0 if name in RESTORATIONS else 1.0 for name in names])

    text_encoder = CLIPTextModel.from_pretrained(work_dir / "base" / "text_encoder").to(device)
    unet = widen(UNet2DConditionModel.from_pretrained(work_dir / "base" / "unet")).to(device)

    def loss(step, generator):
        size = arguments.batch_size

        def uniform():
            return torch.rand(size, generator=generator)

        task = torch.multinomial(weights, size, replacement=True, generator=generator)
        pair = (uniform() * count).long()
        photo, edited = clean[task, pair].float().to(device), changed[task, pair].float().to(device)
        backwards = restores[task][:, None, None, None].to(device)
        source, target = torch.where(backwards, edited, photo), torch.where(backwards, photo, edited)
        keep = uniform() < (0.5 if step < arguments.steps / 4 else 0.1)
        # What is kept is any source or any target, so that every kind of picture is copied.
        kept = torch.where((uniform() < 0.5)[:, None, None, None].to(device), source, target)
        keep_here = keep[:, None, None, None].to(device)
        source, target = torch.where(keep_here, kept, source), torch.where(keep_here, kept, target)
        row = torch.where(keep, 0, task + 1)
        sentence = first_of[row] + (uniform() * count_of[row]).long()

        draw = uniform()  # 5 % no text, 5 % neither, 5 % no image
        sentence = torch.where(draw < 0.10, 0, sentence)
        has_image = ((draw < 0.05) | (draw >= 0.15)).float().to(device)
        embeddings = text_encoder(tokens[sentence.to(device)]).last_hidden_state
        source = source * has_image[:, None, None, None]
        return velocity_loss(unet, scheduler, target, source, embeddings, generator)

    crops = centre_crops(held_out, 128)[::6]
    pipeline = assemble(vae, text_encoder, tokenizer, unet, scheduler)
    pipeline.set_progress_bar_config(disable=True)

    def evaluate() -> dict:
        figures = edit_figures(pipeline, crops, ["keep", "gray", "posterize", "denoise"], 1.0, 1.0, device)
        return {f"{name} in VAE dB": values["in VAE"] for name, values in figures.items()}

    modules = {"text_encoder": text_encoder, "unet": unet}
    seconds = optimise("instruct", modules, loss, evaluate, arguments)
    figures = {"seconds": round(seconds), "steps": arguments.steps, **evaluate()}
    finish(work_dir, "instruct", modules, figures)


# --- command line --------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Usage errors as one line: the flag, what is wrong, what to do."""

    def error(self, message: str):
        print(
            f"{Path(sys.argv[0]).name}: error: {message.removeprefix('argument ')}; see --help",
            file=sys.stderr,
        )
        raise SystemExit(2)


STAGE_DEFAULTS = {  # steps, batch size, peak learning rates of AdamW and Muon
    "linear": (1500, 16, 2e-3, 0.0),
    "vae": (5000, 8, 1e-3, 3e-3),
    "base": (1000, 16, 1e-3, 3e-3),
    "instruct": (4500, 16, 1e-3, 3e-3),
}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        pass

    parser = Parser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    task = parser.add_argument_group("what to do")
    task.add_argument("--stage", choices=tuple(STAGE_DEFAULTS), required=True, help="what to train")
    task.add_argument("--work_dir", type=Path, default=Path("outputs/tiny_base"), help="states, logs and models")
    data = parser.add_argument_group("data")
    data.add_argument("--photos", type=Path, default=Path("assets/photos/train"), help="folder of .webp to learn from")
    data.add_argument(
        "--held_out",
        type=Path,
        default=Path("assets/photos/test"),
        help=".webp for the figures only",
    )
    data.add_argument("--tiles", type=int, default=12000, help="64-pixel tiles cut from the photos")
    training = parser.add_argument_group("training")
    listed = {
        name: ", ".join(f"{stage} {values[column]:g}" for stage, values in STAGE_DEFAULTS.items())
        for column, name in enumerate(("steps", "batch_size", "learning_rate", "matrix_learning_rate"))
    }
    training.add_argument("--steps", type=int, help=f"updates; else: {listed['steps']}")
    training.add_argument("--batch_size", type=int, help=f"tiles an update; else: {listed['batch_size']}")
    training.add_argument("--learning_rate", type=float, help=f"peak; else: {listed['learning_rate']}")
    training.add_argument(
        "--matrix_learning_rate",
        type=float,
        help=f"peak of Muon's, for the matrices; 0: AdamW's for all; else: {listed['matrix_learning_rate']}",
    )
    training.add_argument("--ema", type=float, default=0.995, help="decay of the moving average that is kept")
    training.add_argument("--seed", type=int, default=0, help="fixes the weights, the tiles and the batches")
    training.add_argument("--log_every", type=int, default=200, help="updates between saved states")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--threads", type=int, default=0, help="CPU threads; 0: PyTorch's own choice")
    machine.add_argument("--device", default="auto", help="auto, cpu or cuda")
    arguments = parser.parse_args(argv)

    for name, value in zip(listed, STAGE_DEFAULTS[arguments.stage], strict=True):
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    for flag in ("steps", "batch_size", "tiles", "log_every", "learning_rate"):
        if getattr(arguments, flag) <= 0:
            parser.error(f"--{flag}: {getattr(arguments, flag)} is not above zero; give a positive number")
    if arguments.matrix_learning_rate < 0:
        parser.error(f"--matrix_learning_rate: {arguments.matrix_learning_rate} is below zero; give 0 or more")
    for flag in ("photos", "held_out"):
        folder = getattr(arguments, flag)
        if not any(folder.glob("*.webp")):
            parser.error(f"--{flag}: {folder} holds no .webp photos; name a folder that does")
    needed = {"linear": None, "vae": "linear", "base": "vae", "instruct": "base"}[arguments.stage]
    if needed and not (arguments.work_dir / f"{needed}.json").exists():
        parser.error(f"--stage: {arguments.stage} needs {arguments.work_dir}/{needed}; run --stage {needed} first")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    if (arguments.work_dir / f"{arguments.stage}.json").exists():
        print(f"{arguments.work_dir / arguments.stage} is complete; remove {arguments.stage}.* to train anew")
        return

    import torch

    if arguments.device == "auto":
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    arguments.work_dir.mkdir(parents=True, exist_ok=True)
    photos, held_out = load_photos(arguments.photos), load_photos(arguments.held_out)
    stages = {
        "linear": train_linear,
        "vae": train_vae,
        "base": train_base,
        "instruct": train_instruct,
    }
    stages[arguments.stage](arguments, photos, held_out)


if __name__ == "__main__":
    main()
