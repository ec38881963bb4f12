"""The stages by which the tiny Stable Diffusion in assets/ was made; the library's own training needs none of this.

vae     The autoencoder, on 64-pixel tiles of photos, cartoons and other edited photos. The squared error alone, no
        perceptual or adversarial loss: what counts is the ceiling, in dB, that it sets (evaluate.py's vae_ceiling).
base    The 4-channel text-to-image UNet and its text encoder, on latents of photos captioned by their file names, half
        of them edited: "a photo of a windmill", "a photo of a windmill, make it gray". The words' vectors are known.
"""

import math
import re
import shutil
import time
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.optimization import get_cosine_schedule_with_warmup
from torch import nn
from tqdm import tqdm
from transformers import CLIPTextModel
from transformers.models.clip.modeling_clip import CLIPMLP, CLIPAttention

from instruct_pix2pix.building.cartoonizer import opencv_cartoonize
from instruct_pix2pix.building.generic_edits import FUNCTIONS, WORDINGS, cut_tile, make_pair
from instruct_pix2pix.building.photos import decode_image
from instruct_pix2pix.data.triples import to_unit_range
from instruct_pix2pix.files import write_json
from instruct_pix2pix.models.sd import tokenize
from instruct_pix2pix.models.tiny import CONFIGURATION, build_tiny_pipeline, build_tokenizer, build_vae, save_pipeline
from instruct_pix2pix.training.ema import EMA
from instruct_pix2pix.training.loss import add_noise, prediction_target, sample_losses
from instruct_pix2pix.training.optimizers import MuonAndAdamW

TILE = 64  # pixels; 16 x 16 latents
POSTERIOR_DEVIATION = 0.05  # of latents whose variance is 1
CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
tags: [stable-diffusion, tiny]
---
# Tiny Stable Diffusion

A complete `StableDiffusionPipeline` of 3.6 million parameters, and vectors of 5,600 words, that stands in for Stable
Diffusion v1.5 where no checkpoint can be fetched: in tests and examples. Trained for minutes on 64-pixel tiles of
photos, it has learned their colours and soft shapes, not objects. Image sides must be multiples of 16.
"""


def train(photos, args) -> None:
    """Run the stages that `args.work_dir` does not hold yet. `photos`: building.photos.Photos with a split train."""
    splits = zip(photos.names, photos.splits, strict=True)
    pixels = {Path(name).stem: decode_image(photos.read(name)) for name, split in splits if split == "train"}
    stages = ("vae", train_vae), ("tiny-stable-diffusion", train_base)
    for (name, stage), steps in zip(stages, args.steps, strict=True):
        done = args.work_dir / f"{name}.json"
        if not done.exists():
            shutil.rmtree(args.work_dir / name, ignore_errors=True)
            write_json(done, stage(pixels, steps, args, args.work_dir / name))
        print(f"{name}: {done.read_text()}")


def cut_tiles(photos: dict, count: int, rng: np.random.Generator) -> list[np.ndarray]:
    """`count` tiles, uint8 (TILE, TILE, 3), of the photos in turn."""
    return [cut_tile(photo, TILE, rng) for photo in islice(cycle(photos.values()), count)]


def to_model(images) -> torch.Tensor:
    """N uint8 images (H, W, 3) to float32 (N, 3, H, W) in [-1, 1]."""
    return to_unit_range(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))


def optimise(name: str, modules: list[nn.Module], steps: int, loss_at, seed: int) -> dict:
    """Minimise `loss_at(generator)` over the modules' parameters and leave their moving average in them.

    The rate is Muon's, a third of it AdamW's. Returns the number of updates, the seconds, the last hundred's mean loss.
    """
    parameters = [each for module in modules for each in module.parameters() if each.requires_grad]
    optimizer = MuonAndAdamW(parameters, {"lr": 3e-3, "betas": (0.9, 0.99), "weight_decay": 1e-4})
    optimizer.param_groups[1]["lr"] /= 3
    schedule = get_cosine_schedule_with_warmup(optimizer, min(200, steps // 10), steps)
    average, losses, generator = EMA(parameters, 0.995), [], torch.Generator().manual_seed(seed)
    started = time.perf_counter()
    for _ in tqdm(range(steps), desc=name, mininterval=5):
        optimizer.zero_grad()
        loss = loss_at(generator)
        loss.backward()
        losses.append(loss.item())
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        average.update()
    for parameter, mean in zip(parameters, average.shadow, strict=True):
        parameter.data = mean
    seconds = round(time.perf_counter() - started)
    return {"updates": steps, "seconds": seconds, "loss": round(float(np.mean(losses[-100:])), 5)}


def zero_residual_branches(model: nn.Module) -> None:
    """Make every residual block, attention and MLP the identity (or its shortcut) to start with."""
    last = {ResnetBlock2D: "conv2", Attention: "to_out.0", CLIPAttention: "out_proj", CLIPMLP: "fc2"}
    for module in model.modules():
        if type(module) in last:
            for parameter in module.get_submodule(last[type(module)]).parameters():
                nn.init.zeros_(parameter)


@torch.no_grad()
def standardise_latents(vae: AutoencoderKL, images: torch.Tensor) -> None:
    """Bring the latents of `images`, (B, 3, H, W) in [-1, 1], to zero mean and unit variance in each channel.

    The 1x1 convolution behind the encoder does it and the one before the decoder undoes it: what is decoded stays the
    same. The posterior's standard deviation becomes POSTERIOR_DEVIATION everywhere.
    """
    latents = torch.cat([vae.encode(part).latent_dist.mean for part in images.split(64)])
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    before, after = vae.quant_conv, vae.post_quant_conv
    before.weight[:4] /= deviation[:, None, None, None]
    before.bias[:4] = (before.bias[:4] - mean) / deviation
    before.weight[4:].zero_(), before.bias[4:].fill_(2 * math.log(POSTERIOR_DEVIATION))
    after.bias += after.weight[..., 0, 0] @ mean
    after.weight *= deviation[None, :, None, None]


def autoencoder_batches(photos: dict, args):
    """A function from a generator and a size B to training images, float32 (B, 3, TILE, TILE) in [-1, 1].

    Half of the tiles are photos, the others stand for the pictures that edits make, which the latents have to hold as
    well: cartoons above all.
    """
    rng = np.random.default_rng(args.seed)
    tiles = cut_tiles(photos, args.tiles, rng)
    for number in range(0, len(tiles), 2):
        name = rng.choice(["cartoon", "posterize", "vivid", "more contrast", "gray", "invert"], p=[0.5] + [0.1] * 5)
        change = FUNCTIONS.get(name, lambda tile, rng: opencv_cartoonize(tile[None])[0])
        tiles[number] = change(tiles[number], rng)
    return lambda generator, size: to_model([tiles[i] for i in torch.randint(len(tiles), (size,), generator=generator)])


def train_vae(photos: dict, steps: int, args, folder: Path) -> dict:
    """Train encoder and decoder together and save the VAE to `folder`. Returns the figures.

    The latents that are decoded carry noise in proportion to their own spread in the batch. So neighbouring latents
    decode alike, and nothing is gained by larger latents, as it would be with noise of a fixed size.
    """
    batch = autoencoder_batches(photos, args)
    torch.manual_seed(args.seed)
    vae = build_vae()
    zero_residual_branches(vae)

    def loss_at(generator):
        images = batch(generator, 8)
        latents = vae.encode(images).latent_dist.mean
        noise = torch.randn(latents.shape, generator=generator) * latents.std((0, 2, 3), keepdim=True)
        return (vae.decode(latents + POSTERIOR_DEVIATION * noise).sample - images).square().mean()

    figures = optimise("vae", [vae], steps, loss_at, args.seed)
    standardise_latents(vae, batch(torch.Generator().manual_seed(args.seed), 1024))
    vae.save_pretrained(folder)
    return figures


def caption(stem: str) -> str:
    """The file stem renewable_windmill12 gives "a photo of a windmill": no number, no name of the group."""
    stem = re.sub(r"^(animals|farm|fishes|monuments|others|renewable|tools)_", "", stem)
    return f"a photo of a {re.sub(r'[0-9]+', '', stem.replace('_', ' ')).strip()}"


def prepare_text_encoder(text_encoder: CLIPTextModel) -> None:
    """Start as the vectors of the words in assets/ (tools/make_tiny_words.py), which stay as they are."""
    known = CLIPTextModel.from_pretrained(CONFIGURATION, subfolder="text_encoder")
    text_encoder.get_input_embeddings().weight = known.get_input_embeddings().weight.requires_grad_(False)
    zero_residual_branches(text_encoder)


@torch.no_grad()
def prepare_unet(unet: nn.Module) -> None:
    """Start from zero residual branches and a zero output, as Dhariwal and Nichol (2021) do.

    Two channels of each group before the output start as constants of opposite sign, so that the normalisation there
    does not take away the mean of the image, which a copy has to keep.
    """
    zero_residual_branches(unet)
    per_group = unet.config.block_out_channels[0] // unet.config.norm_num_groups
    shortcut = unet.up_blocks[-1].resnets[-1].conv_shortcut
    for offset, constant in ((0, 2.0), (1, -2.0)):
        shortcut.weight[offset::per_group], shortcut.bias[offset::per_group] = 0, constant
    for layer in (unet.conv_out, unet.add_embedding.norm2):  # the pooled text, too, starts at zero
        nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)


def train_base(photos: dict, steps: int, args, folder: Path) -> dict:
    """Train the 4-channel UNet with its text encoder and save the whole pipeline to `folder`. Returns the figures."""
    pipeline, tokenizer = build_tiny_pipeline(4, args.seed), build_tokenizer()  # a used one saves its last padding
    pipeline.register_modules(vae=AutoencoderKL.from_pretrained(args.work_dir / "vae"))
    prepare_unet(pipeline.unet)
    prepare_text_encoder(pipeline.text_encoder)
    rng = np.random.default_rng(args.seed)
    tiles = cut_tiles(photos, args.tiles, rng)
    captions = [caption(stem) for stem in islice(cycle(photos), args.tiles)]
    for number in np.flatnonzero(rng.random(args.tiles) < 0.5):
        task = rng.choice(list(WORDINGS))
        tiles[number] = make_pair(task, tiles[number], rng)[1]
        captions[number] += f", {rng.choice(WORDINGS[task])}"
    tokens, nothing = tokenize(tokenizer, captions), tokenize(tokenizer, [""])
    with torch.no_grad():
        parts = to_model(tiles).split(64)
        latents = torch.cat([pipeline.vae.encode(part).latent_dist.mode() for part in parts])
    alphas = pipeline.scheduler.alphas_cumprod

    def loss_at(generator):
        """Squared error of the velocity (Salimans and Ho 2022) at random time steps.

        That of the clean latents times SNR + 1, a factor that is clipped at 5, so that nearly clean latents do not
        outweigh all others. Min-SNR weights (Hang et al. 2023) would silence the noisiest steps too.
        """
        chosen = torch.randint(len(latents), (16,), generator=generator)
        clean, noise = latents[chosen], torch.randn(latents[chosen].shape, generator=generator)
        times = torch.randint(len(alphas), (16,), generator=generator)
        named = torch.rand(16, 1, generator=generator) >= 0.1
        text = pipeline.text_encoder(torch.where(named, tokens[chosen], nothing)).last_hidden_state
        predicted = pipeline.unet(add_noise(clean, noise, times, alphas), times, text).sample
        target = prediction_target(clean, noise, times, alphas, "v_prediction")
        return sample_losses(predicted, target, (5 * (1 - alphas[times])).clamp(max=1)).mean()

    figures = optimise("base", [pipeline.text_encoder, pipeline.unet], steps, loss_at, args.seed)
    save_pipeline(pipeline, folder, CARD)
    return figures
