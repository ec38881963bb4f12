"""Skips from the encoder's features of the source image into the decoder: detail that the latents do not hold.

The idea is pix2pix-turbo's (Parmar et al. 2024, section 3.3). Theirs add a convolution of the encoder's features; these
see the decoder's features too, since what is right to keep of the source image depends on the edit.
"""

from collections import deque
from contextlib import contextmanager

import torch
from diffusers import AutoencoderKL, ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from instruct_pix2pix.models.trained import SKIPS_FOLDER as FOLDER

FILES = (f"{FOLDER}/config.json", f"{FOLDER}/diffusion_pytorch_model.safetensors")


class DecoderSkips(ModelMixin, ConfigMixin):
    """What is added to the input of each of the decoder's up blocks, made of that and of the input of the encoder's
    down block of the same size. Zero until trained."""

    @register_to_config
    def __init__(self, encoder_channels: list[int], decoder_channels: list[int]):
        super().__init__()
        self.blocks = nn.ModuleList()
        for encoder, decoder in zip(encoder_channels, decoder_channels, strict=True):
            first, second = (nn.Conv2d(channels, decoder, 3, padding=1) for channels in (encoder + decoder, decoder))
            last = nn.Conv2d(decoder, decoder, 1)
            nn.init.zeros_(last.weight), nn.init.zeros_(last.bias)
            self.blocks.append(nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), last))

    def forward(self, number: int, decoded: torch.Tensor, encoded: torch.Tensor) -> torch.Tensor:
        """The new input of up block `number`, (B, C, h, w), from both blocks' inputs."""
        return decoded + self.blocks[number](torch.cat([decoded, encoded.to(decoded)], dim=1))


def build(vae: AutoencoderKL, seed: int) -> DecoderSkips:
    """Skips for a VAE of this configuration, drawn with `seed`."""
    down = [block.resnets[0].in_channels for block in vae.encoder.down_blocks]
    up = [block.resnets[0].in_channels for block in vae.decoder.up_blocks]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DecoderSkips(down[::-1], up)


def load(model_id: str, dtype: torch.dtype, device: torch.device) -> DecoderSkips:
    """The skips of a pipeline's folder or Hub id that has them."""
    return DecoderSkips.from_pretrained(model_id, subfolder=FOLDER, torch_dtype=dtype).to(device).eval()


@contextmanager
def in_use(vae: AutoencoderKL, skips: DecoderSkips | None):
    """While open, each pass of the decoder gets the features of the encoder's pass that has waited longest: encode a
    source image, then decode its edit, tile by tile or whole. None changes nothing."""
    if skips is None:
        yield
        return
    waiting: deque[list[torch.Tensor]] = deque()
    last = len(vae.encoder.down_blocks) - 1

    def keep(number: int):
        def hook(_, args):
            if number == 0:
                waiting.append([])
            waiting[-1].append(args[0])

        return hook

    def add(number: int):
        def hook(_, args):
            features = waiting[0]
            if number == last:
                waiting.popleft()
            return (skips(number, args[0], features[last - number]), *args[1:])

        return hook

    hooks = [block.register_forward_pre_hook(keep(number)) for number, block in enumerate(vae.encoder.down_blocks)]
    hooks += [block.register_forward_pre_hook(add(number)) for number, block in enumerate(vae.decoder.up_blocks)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
