"""The second stage that --train_decoder_skips asks for: the UNet rests, and skips of the decoder learn from its edits.

Training rows are edited by the UNet, and the decoder with skips is trained to make of the edits' latents what the rows
say. It is deterministic, and done again where it was stopped.
"""

import logging

import torch
import torch.nn.functional as F
from diffusers.optimization import get_cosine_schedule_with_warmup
from PIL import Image
from tqdm import tqdm

from instruct_pix2pix import editing
from instruct_pix2pix.cli import UserError
from instruct_pix2pix.data.order import stream
from instruct_pix2pix.data.triples import TripleDataset, collate, to_unit_range
from instruct_pix2pix.models import decoder_skips, sd
from instruct_pix2pix.training.optimizers import MuonAndAdamW

logger = logging.getLogger(__name__)

MOST_PAIRS = 2048  # that are edited: as many images of 256 pixels take 800 MB of the host's memory
HELD_BACK = 8  # of so many rows one is not learned from: do the skips help?
STEPS = 8  # of sampling: as good as 20 (docs/sweep.md); 1 where training was for few
LEARNING_RATE = 3e-3
SMALLEST_ERROR = 1e-5  # mean squared, in [-1, 1]: 56 dB


def train(run, unet) -> tuple[decoder_skips.DecoderSkips | None, dict]:
    """Skips for `unet`, of the weights that are exported, and what to say of them; None where they do not help rows
    that were held back. For the main process."""
    config, device = run.config, run.accelerator.device
    samples, latents = edit_rows(run, unet)
    vae = sd.load_model(config, "vae").requires_grad_(False).eval().to(device)  # float32, whatever trained
    skips = decoder_skips.build(vae, config.seed).to(device)

    def error(places: torch.Tensor, used: decoder_skips.DecoderSkips | None) -> torch.Tensor:
        """Mean squared error of the decoded edits in [-1, 1], (B,)."""
        source, target = (to_unit_range(samples[name][places].to(device)) for name in ("original", "edited"))
        with decoder_skips.in_use(vae, used):
            with torch.no_grad():
                vae.encode(source)
            decoded = vae.decode(latents[places].to(device), return_dict=False)[0]
        return F.mse_loss(decoded, target, reduction="none").mean((1, 2, 3))

    held = hold_back(samples["row"], config.seed)
    held_back = held.nonzero().flatten()
    learned = held_back if held.all() else (~held).nonzero().flatten()
    settings = {"lr": LEARNING_RATE, "betas": (0.9, 0.99), "weight_decay": 1e-4}
    optimizer = MuonAndAdamW(skips.parameters(), settings)
    updates = config.train_decoder_skips
    schedule = get_cosine_schedule_with_warmup(optimizer, min(20, updates // 10), updates)
    rng = stream(config.seed, "decoder_skips")
    for _ in tqdm(range(updates), desc="decoder skips", unit="update", mininterval=1):
        batch = learned[torch.from_numpy(rng.integers(len(learned), size=config.train_batch_size))]
        # What PSNR averages (NAFNet's loss): a pair that is hard for all would outweigh one that is nearly right.
        loss = (error(batch, skips) + SMALLEST_ERROR).log().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(skips.parameters(), config.max_grad_norm)
        optimizer.step()
        schedule.step()

    with torch.no_grad():
        parts = held_back.split(config.train_batch_size)
        without, with_them = (torch.cat([error(part, used) for part in parts]).log10() for used in (None, skips))
    gain = 10 * (without - with_them).mean().item()
    told = f"{gain:+.2f} dB on {len(held_back)} samples of rows held back, {'kept' if gain > 0 else 'not kept'}"
    logger.info("decoder skips: %s", told)
    return (skips if gain > 0 else None), {"decoder_skips": told}


def hold_back(rows: torch.Tensor, seed: int) -> torch.Tensor:
    """Which samples, of these rows, are held back: whole rows, as training sees most of them many times. All of them
    where there is one row alone."""
    distinct = rows.unique()
    chosen = stream(seed, "held_back").permutation(len(distinct))[: max(1, len(distinct) // HELD_BACK)]
    return torch.isin(rows, distinct[torch.from_numpy(chosen)])


@torch.no_grad()
def edit_rows(run, unet) -> tuple[dict, torch.Tensor]:
    """The first training samples as `collate` gives them, no more than training has seen, and what the UNet makes of
    them with the guidance of the flags: latents (N, C, h, w) that the decoder takes, on the CPU."""
    config, frozen = run.config, (run.text_encoder, run.vae)
    rows = TripleDataset(run.triples, config, (1, 1, 1), len(run.make_inputs.alphas_cumprod))
    count = min(MOST_PAIRS, run.samples_seen(config.max_train_steps))
    pipeline = sd.build_pipeline(run.configs, run.tokenizer, run.text_encoder, run.vae, unet)
    steps = STEPS if config.timestep_bias_multiplier <= 1 else 1
    setting = editing.usual_setting(config)._replace(steps=steps)._asdict()
    samples, latents, rested = [], [], [model.device for model in frozen]
    pipeline.to(run.accelerator.device)
    for start in tqdm(range(0, count, config.train_batch_size), desc="edits for decoder skips", mininterval=1):
        positions = range(start, min(start + config.train_batch_size, count))
        batch = collate([rows[position] for position in positions])
        if isinstance(batch, UserError):
            raise batch
        images = [Image.fromarray(pixels.permute(1, 2, 0).numpy()) for pixels in batch["original"]]
        seeds = [int(stream(config.seed, "decoder_skips", position).integers(2**31)) for position in positions]
        with run.accelerator.autocast():
            edited = editing.edit_batch(pipeline, batch["instructions"], images, seeds, latents=True, **setting)
        samples.append({name: batch[name] for name in ("original", "edited", "row")})
        latents.append((edited / run.vae.config.scaling_factor).float().cpu())
    for model, device in zip(frozen, rested, strict=True):
        model.to(device)
    return {name: torch.cat([part[name] for part in samples]) for name in samples[0]}, torch.cat(latents)
