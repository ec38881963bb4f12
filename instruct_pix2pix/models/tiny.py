"""Complete, tiny Stable Diffusion pipelines with random weights: text to image, or InstructPix2Pix.

Their configurations and their tokenizer are those of assets/tiny-stable-diffusion. The classes are Stable Diffusion
v1.5's and so are their connections; only the widths are small: 3.6 million parameters, and the vectors of words,
instead of a billion. Whatever loads or trains the real checkpoint therefore loads or trains this one, on a CPU, without
a download. What differs:

VAE             Groups of 4 channels: a group of few normalises away an image's mean colour, and its contrast with it.
                The scaling factor is 1: training brings the latents to unit variance inside the model.
UNet            Velocity mixes the noisy and the source latents in proportions that depend on the time step, hence
                resnet_time_scale_shift "scale_shift". The pooled text joins the time step in every residual block
                (addition_embed_type): cross-attention alone, on the lower two of three levels, takes far longer to
                learn an edit of the colours. attention_head_dim is the number of heads, as in the real configuration.
tokenizer       Lower-cased and byte-level; 5,600 words are one token each, other text is spelled out. Ids as in CLIP's:
                bytes, bytes that end a word, merges, start of text, end of text. tools/make_tiny_words.py made it, and
                the vectors of the words that the trained models have.
"""

import json
from pathlib import Path

from instruct_pix2pix.files import write_json, write_text

CONFIGURATION = Path(__file__).parents[2] / "assets/tiny-stable-diffusion"


def build_tokenizer():
    """The `CLIPTokenizer` of 77 tokens as new: one that was used saves its last padding."""
    from transformers import CLIPTokenizer

    files = (str(CONFIGURATION / "tokenizer" / name) for name in ("vocab.json", "merges.txt"))
    return CLIPTokenizer(*files, model_max_length=77)


def build_vae():
    """Images [-1, 1] (B, 3, H, W) to latents (B, 4, H/4, W/4) and back; 0.68 million parameters."""
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_config(AutoencoderKL.load_config(CONFIGURATION, subfolder="vae"))


def assemble(vae, text_encoder, tokenizer, unet, scheduler):
    """The pipeline that fits the UNet's input: text-to-image for 4 channels, InstructPix2Pix for 8."""
    from diffusers import StableDiffusionInstructPix2PixPipeline, StableDiffusionPipeline

    pipeline_class = {4: StableDiffusionPipeline, 8: StableDiffusionInstructPix2PixPipeline}[unet.config.in_channels]
    parts = dict(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler)
    return pipeline_class(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def build_tiny_pipeline(in_channels: int = 4, seed: int = 0):
    """A complete tiny pipeline in evaluation mode, float32 on the CPU, its random weights fixed by `seed`.

    `in_channels` 4 gives a `StableDiffusionPipeline`, 8 a `StableDiffusionInstructPix2PixPipeline`. The UNet takes
    text (B, 77, 64). Image sides must be multiples of 16 pixels. The caller's random state is kept.
    """
    import torch
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    of_text = CLIPTextConfig.from_pretrained(CONFIGURATION, subfolder="text_encoder")
    of_unet = UNet2DConditionModel.load_config(CONFIGURATION, subfolder="unet")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        models = [
            build_vae(),
            CLIPTextModel(of_text),
            UNet2DConditionModel.from_config(of_unet, in_channels=in_channels),
        ]
    vae, text_encoder, unet = (model.eval() for model in models)
    scheduler = DDPMScheduler.from_pretrained(CONFIGURATION, subfolder="scheduler")  # predicts velocity
    return assemble(vae, text_encoder, build_tokenizer(), unet, scheduler)


def save_pipeline(pipeline, folder: Path, card: str | None = None) -> None:
    """Write `pipeline`, and `card` as its README.md, to a new `folder`, for old and new libraries alike and without
    this machine's paths. A `folder` that exists raises FileExistsError and stays as it is.
    """
    from instruct_pix2pix.models.sd import make_readable

    folder.mkdir(parents=True)
    pipeline.save_pretrained(folder)
    make_readable(folder)
    for file in (folder / "model_index.json", *folder.glob("*/config.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        write_json(file, {key: value for key, value in content.items() if key != "_name_or_path"})
    if card is not None:
        write_text(folder / "README.md", card)
