"""What leaves the machine: the pipeline folder, its model card, and the upload."""

import contextlib
import json
import logging
import os
import re
import shlex
import shutil
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, ModelCardData, get_token
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError

from instruct_pix2pix.cli import UserError
from instruct_pix2pix.files import write_json
from instruct_pix2pix.training.config import resolved

logger = logging.getLogger(__name__)

CONFIG_FILE = "training_config.json"
PIPELINE_FOLDERS = ("scheduler", "text_encoder", "tokenizer", "unet", "vae")
EXPORTED = ("README.md", *PIPELINE_FOLDERS)
# Only these are uploaded: never checkpoints, caches, logs or trackers' files.
PUBLISHED = ["README.md", "model_index.json", CONFIG_FILE, *(f"{folder}/*" for folder in PIPELINE_FOLDERS)]


def prepare_repo(args) -> str:
    """Make the repository if it is missing, before hours of training; returns its full id."""
    token = args.hub_token or get_token()
    if not token:
        raise UserError("--push_to_hub: no Hub token; run `hf auth login`, set HF_TOKEN, or give --hub_token")
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    try:
        validate_repo_id(name)
        api = HfApi(token=token)
        if "/" not in name:
            name = f"{api.whoami()['name']}/{name}"
        return api.create_repo(name, exist_ok=True, private=args.hub_private_repo).repo_id
    except ValueError as error:
        raise UserError(f"--hub_model_id: {name!r} is not a repository name ({error})") from error
    except (HfHubHTTPError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--push_to_hub: cannot make or reach {name}: {reason}") from error


def begin(args) -> None:
    """Make --output_dir, without what a killed run left half-written, and write down the configuration."""
    output_dir = Path(args.output_dir)
    with _writable(output_dir, "the configuration"):
        output_dir.mkdir(parents=True, exist_ok=True)
        write_json(output_dir / CONFIG_FILE, resolved(args))


@contextlib.contextmanager
def _writable(output_dir: Path, what: str):
    """Most often it is a full disk that stops a writer."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"--output_dir: {what} cannot be written into {output_dir} ({error}); make room and go on with"
            " --resume_from_checkpoint latest"
        ) from error


def export(pipeline, args, summary: dict, repo_id: str | None, instruction: str) -> None:
    """Write the pipeline in safetensors with its card and the resolved configuration into --output_dir. The card's
    snippet edits by `instruction`.

    Everything is written beside its place first, so that an interrupted export never leaves a mixture.
    """
    output_dir = Path(args.output_dir)
    temporary = output_dir / ".export.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with _writable(output_dir, "the pipeline"):
            pipeline.save_pretrained(temporary, safe_serialization=True)
            write_json(temporary / CONFIG_FILE, _for_others(resolved(args)))
            (temporary / "README.md").write_text(model_card(args, summary, repo_id, instruction), encoding="utf-8")
            for item in sorted(temporary.iterdir(), key=lambda path: path.name == "model_index.json"):
                target = output_dir / item.name
                if target.is_dir():
                    shutil.rmtree(target)
                os.replace(item, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def push(args, repo_id: str) -> bool:
    """Upload pipeline and card in one commit. A failure loses nothing: it is said, with the command for later."""
    try:
        url = HfApi(token=args.hub_token or get_token()).upload_folder(
            repo_id=repo_id,
            folder_path=args.output_dir,
            allow_patterns=PUBLISHED,
            commit_message="Upload instruction-tuned Stable Diffusion pipeline",
        )
    except Exception as error:  # whatever goes wrong on the way to the Hub, the model on disk is whole
        includes = " ".join(f"--include {shlex.quote(pattern)}" for pattern in PUBLISHED)
        logger.error(
            "the upload failed (%s); the model is whole in %s. Later: hf upload %s %s . %s",
            " ".join(str(error).split())[:200],
            args.output_dir,
            repo_id,
            shlex.quote(str(args.output_dir)),
            includes,
        )
        return False
    logger.info("uploaded to %s", url)
    return True


def _hub_id(name: str | None) -> str | None:
    """The name if it is a Hub id rather than a path of this machine."""
    if name and not os.path.exists(name) and re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return name
    return None


def base_licence(name: str) -> str | None:
    """The licence the base model's own card states, where that card can be read."""
    try:
        path = Path(name) / "README.md"
        if os.path.isdir(name):
            return ModelCard(path.read_text(encoding="utf-8")).data.license
        return ModelCard.load(name).data.license
    except Exception:  # no card, no metadata, no network: the licence is then unknown, which the card says
        return None


def _for_others(flags: dict) -> dict:
    """Flags as they are published: of a path on this machine its last part only."""
    local = {name: value for name, value in flags.items() if isinstance(value, str) and os.path.exists(value)}
    return flags | {name: Path(value).resolve().name for name, value in local.items()}


def model_card(args, summary: dict, repo_id: str | None, instruction: str) -> str:
    """The card's text: base model, data, licence, a snippet that runs, the settings and what training took."""
    base, data = args.pretrained_model_name_or_path, args.dataset_name or args.train_data_dir
    base_id, data_id = _hub_id(base), _hub_id(data)
    licence = base_licence(base)
    metadata = ModelCardData(
        license=licence or "other",
        base_model=base_id,
        datasets=[data_id] if data_id else None,
        library_name="diffusers",
        pipeline_tag="image-to-image",
        tags=["instruct-pix2pix", "stable-diffusion", "diffusers", "instruction-tuning"],
    )
    name = repo_id or str(args.output_dir)
    lines = [f"| `--{flag}` | `{value}` |" for flag, value in _for_others(resolved(args)).items() if value is not None]
    took = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in summary.items() if value is not None)
    return f"""---
{metadata.to_yaml()}
---

# {Path(name).name}

A Stable Diffusion model that edits images by instruction. Its UNet was trained with the InstructPix2Pix objective
([Brooks et al. 2023](https://arxiv.org/abs/2211.09800)), starting from `{base_id or Path(base).name}`, on
`{data_id or Path(data).name}`. Its licence follows the base model's: {licence or "not stated there, so unknown"}.
The dataset has a licence of its own.

## Use

```python
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline
from diffusers.utils import load_image

model = "{name}"
pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(model, torch_dtype=torch.float16).to("cuda")
image = load_image("photo.png")
edited = pipeline(
    {json.dumps(instruction, ensure_ascii=False)},
    image=image,
    num_inference_steps=20,
    image_guidance_scale=1.5,
    guidance_scale=7.0,
).images[0]
edited.save("edited.png")
```

## Training

{took}.

| flag | value |
|---|---|
{chr(10).join(lines)}
"""
