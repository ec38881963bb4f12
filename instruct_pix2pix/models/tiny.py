"""A complete, tiny Stable Diffusion pipeline with random weights: text to image, or InstructPix2Pix.

The classes are those of Stable Diffusion v1.5 (AutoencoderKL, CLIPTextModel, CLIPTokenizer, UNet2DConditionModel,
DDPMScheduler) and so are their connections; only the widths are small: 3.6 million parameters instead of a billion.
Whatever loads or trains the real checkpoint therefore loads or trains this one, on a CPU, without a download.
"""

import json
import os
import tempfile
from pathlib import Path

from instruct_pix2pix.files import write_json, write_text

# Every word here becomes one token. Other text still encodes, as pieces of words down to single bytes.
VOCABULARY = """
a an the of in on at to it its this that these those them with without by and or not no as is are be been was from for
into onto over under up down out off all any every some more most less much very little bit few lot slightly strongly
please can you could would should i we my your their now just so too again still only also while than then if when what
like look looks looking looked appear seem seems become turn turns turned make makes made making give gives add adds
put apply use using get set keep leave let have has had do does don show change changes changed transform convert
create produce render rewrite redo treat edit edited restore recover repair fix improve enhance correct remove removed
removing take away clean clear rid reduce increase lower raise boost drop undo reverse invert flip swap replace image
images picture pictures photo photos photograph photographs photography scene view shot frame version pixel pixels copy
original input output exactly exact same identical unchanged untouched alone nothing anything everything color colors
colour colours coloured colored tone tones tint hue saturation saturated desaturate desaturated contrast brightness
exposure gamma light lights lighter lighten lighting dark darker darken darkness bright brighter brighten brightly dim
dimmer night evening day daylight daytime sunset sunlight sun moon shadow shadows highlight highlights black white gray
grey grayscale greyscale monochrome monochromatic red green blue yellow orange purple pink brown cyan magenta golden
gold silver sepia warm warmer warmth cool cooler cold colder hot vivid vibrant vintage old retro faded fade pale washed
rich dull neutral pastel neon negative positive blur blurred blurry blurring blurriness unblur deblur deblurred defocus
focus focused sharp sharper sharpen sharpness soft softer soften smooth smoother smoothing crisp fine detail details
detailed texture edge edges outline outlines contour contours sketch line lines noise noisy noiseless denoise denoised
denoising grain grainy grainless speckle artifact artifacts compression compressed jpeg pixelate pixelated pixelation
blocky mosaic low high resolution quality rain rainy raining raindrop raindrops drops droplets derain derained streak
streaks wet water weather haze hazy dehaze fog foggy mist misty snow snowy dust scratch scratches glass lens motion
shake shaky camera underexposed overexposed exposed enough poorly lit illuminate illumination illuminated visible
clearer clearly properly posterize posterized poster flat flatten flattened bands level levels limited threshold
solarize solarized emboss mirror mirrored left right upside horizontally vertically horizontal vertical rotate crop
zoom cartoon cartoons cartoonize cartoonized cartoonish animated animation animate anime manga comic comics drawing
drawings draw drawn illustration illustrated illustrate paint painted painting painter artist art artistic artwork
style styled stylize stylized stylise styling inspired filter effect feel book strip ghibli disney pixar simple
simplified simplify plain bold thick hand ink watercolor oil pencil crayon pop graphic vector caricature toon rendition
rendering representation depiction portrayal interpretation reimagine imagine resemble resembling film movie studio
kids children fun funny playful cel shading shaded animal animals bison chameleon crocodile dragon giraffe jaguar koala
lemur moose narwhal polar bear scarlet macaw hedgehog kangaroo panda pika crab farm cat dog duck chicken cow horse owl
pig sheep fish fishes goldfish bird birds kingfisher sea ocean beach island monument monuments egypt pyramid great
france castle cathedral palace tower bridge germany berlin gate india temple cave mosque usa memorial statue liberty
fort house wonder wonders wall china building buildings city street opera arc greece rome music orchestra africa italy
japan mexico musician instrument slate bucket baseball buffet bulb chair cup eraser erasers igloo knife pan pillow
plate spoon spoons ball volleyball weighing machine renewable energy dam geothermal solar panel panels windmill
windmills turbine wind power tool tools cutting hammer measuring tape multimeter nail cutter plier pliers scissors
screwdriver sickle spray tweezer tweezers wrench side person people man woman face child boy girl hands head eye eyes
hair hat table room kitchen window door car train boat ship road tree trees flower flowers leaf leaves grass garden
forest field mountain mountains hill river lake sky cloud clouds rock rocks stone sand ground floor roof wood wooden
metal food fruit object objects thing one two three four five six seven eight nine ten big small large tiny long short
new young beautiful nice good better best bad natural real realistic normal ordinary usual regular different , . ! ? '
- : ; 's
"""
START_OF_TEXT, END_OF_TEXT = "<|startoftext|>", "<|endoftext|>"


def learn_merges(words: list[str], symbols: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, in order, after which every one of `words` is a single token ending in `</w>`.

    Each word, in the `symbols` of its bytes, is encoded with the merges so far; what remains of it is joined from the
    left. A merge added later ranks lower, so it cannot break up a word that was already whole.
    """
    rank: dict[tuple[str, str], int] = {}
    for word in words:
        pieces = [symbols[byte] for byte in word.encode()]
        pieces[-1] += "</w>"
        while len(pieces) > 1:
            known = [(rank[pair], i) for i, pair in enumerate(zip(pieces, pieces[1:], strict=False)) if pair in rank]
            position = min(known)[1] if known else 0
            pair = (pieces[position], pieces[position + 1])
            rank.setdefault(pair, len(rank))
            pieces[position : position + 2] = ["".join(pair)]
    return list(rank)


def build_tokenizer():
    """A `CLIPTokenizer` over `VOCABULARY`: lower-cased, byte-level, 77 tokens, ids laid out as in CLIP's own.

    Ids: 256 bytes, 256 bytes that end a word, the merges, start of text, end of text (which also pads).
    """
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    symbols = [symbol for _, symbol in sorted(bytes_to_unicode().items())]
    merges = learn_merges(VOCABULARY.split(), symbols)
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), *map("".join, merges), START_OF_TEXT, END_OF_TEXT]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)


def build_vae():
    """Images [-1, 1] (B, 3, H, W) to latents (B, 4, H/4, W/4) and back; 0.68 million parameters."""
    from diffusers import AutoencoderKL

    # A group of few channels normalises away the mean colour of the image, and its contrast with it.
    groups = dict(norm_num_groups=4, block_out_channels=(16, 32, 64), layers_per_block=1)
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3)
    # Training brings the latents to unit variance inside the model.
    return AutoencoderKL(**groups, **blocks, latent_channels=4, sample_size=128, scaling_factor=1.0)


def build_text_encoder(tokenizer):
    """Token ids (B, 77) to embeddings (B, 77, 64)."""
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, projection_dim=64)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    length = tokenizer.model_max_length
    return CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=length, **sizes, **ids))


def build_unet(in_channels: int):
    """Latents (B, in_channels, H, W), H and W multiples of 4, and text (B, 77, 64) to (B, 4, H, W).

    2.73 million parameters, cross-attention on the lower two of the three levels.
    """
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=32,
        in_channels=in_channels,
        block_out_channels=(32, 64, 96),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=4,  # the number of heads, as in Stable Diffusion's own configuration
        norm_num_groups=4,
        # Velocity mixes the noisy and the source latents in proportions that depend on the time step.
        resnet_time_scale_shift="scale_shift",
        # The pooled text joins the time step in every residual block: cross-attention alone, on the lower levels, takes
        # far longer to learn an edit of the colours.
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
    )


def build_scheduler():
    """The noise schedule of Stable Diffusion v1.5, predicting velocity (Salimans and Ho 2022, section 4)."""
    from diffusers import DDPMScheduler

    betas = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    steps = dict(steps_offset=1, clip_sample=False, timestep_spacing="trailing")
    return DDPMScheduler(**betas, **steps, prediction_type="v_prediction")


def assemble(vae, text_encoder, tokenizer, unet, scheduler):
    """The pipeline that fits the UNet's input: text-to-image for 4 channels, InstructPix2Pix for 8."""
    from diffusers import StableDiffusionInstructPix2PixPipeline, StableDiffusionPipeline

    pipeline_class = {4: StableDiffusionPipeline, 8: StableDiffusionInstructPix2PixPipeline}[unet.config.in_channels]
    parts = dict(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler)
    return pipeline_class(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def build_tiny_pipeline(in_channels: int = 4, seed: int = 0):
    """A complete tiny pipeline in evaluation mode, float32 on the CPU, its random weights fixed by `seed`.

    `in_channels` 4 gives a `StableDiffusionPipeline`, 8 a `StableDiffusionInstructPix2PixPipeline`; any other
    value raises ValueError. Image sides must be multiples of 16 pixels. The caller's random state is kept.
    """
    import torch

    if in_channels not in (4, 8):
        raise ValueError(f"in_channels: {in_channels} is neither 4 (text to image) nor 8 (InstructPix2Pix)")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = build_tokenizer()
        models = [build_vae(), build_text_encoder(tokenizer), build_unet(in_channels)]
    vae, text_encoder, unet = (model.eval() for model in models)
    return assemble(vae, text_encoder, tokenizer, unet, build_scheduler())


def save_pipeline(pipeline, folder: Path, card: str | None = None) -> None:
    """Write `pipeline`, and `card` as its README.md, to `folder`, whole or not at all, for old and new libraries alike
    and without this machine's paths. An existing non-empty `folder` raises FileExistsError and stays as it is.
    """
    from instruct_pix2pix.models.sd import make_readable

    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        made = Path(temporary) / "pipeline"
        pipeline.save_pretrained(made, safe_serialization=True)
        make_readable(made)
        for file in (made / "model_index.json", *made.glob("*/config.json")):
            content = json.loads(file.read_text(encoding="utf-8"))
            write_json(file, {key: value for key, value in content.items() if key != "_name_or_path"})
        if card is not None:
            write_text(made / "README.md", card)
        os.replace(made, folder)
