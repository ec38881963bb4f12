"""What leaves the machine: the pipeline folder and its model card.

`config` is the training's configuration, `flags` the same as a dict, as it is written down: without the token.
"""

import contextlib
import filecmp
import json
import logging
import os
import re
import shutil
from pathlib import Path

import diffusers
import torch
from huggingface_hub import ModelCard, ModelCardData, hf_hub_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from instruct_pix2pix import editing, evidence
from instruct_pix2pix.cli import UserError
from instruct_pix2pix.evaluation.settings import SCHEDULERS, SETTINGS_FILE, Setting, choose_setting, read_settings
from instruct_pix2pix.files import (
    as_code,
    as_text,
    check_folder,
    code_block,
    flush,
    flush_tree,
    for_others,
    free_space,
    in_megabytes,
    write_json,
    write_text,
)
from instruct_pix2pix.models import adapters, base_files, decoder_skips, sd, single_file, trained
from instruct_pix2pix.models.decoder_skips import DecoderSkips
from instruct_pix2pix.models.trained import CONFIG_FILE

logger = logging.getLogger(__name__)

SUMMARY_FILE = "training_summary.json"
INDEX_FILE = "model_index.json"  # what makes a folder a pipeline
PIPELINE_FOLDERS = ("scheduler", "text_encoder", "tokenizer", "unet", "vae")
ADAPTER_FOLDER = "adapter"  # beside the pipeline, with --lora_rank
EXPORTED = ("README.md", evidence.IMAGES, *PIPELINE_FOLDERS, ADAPTER_FOLDER, decoder_skips.FOLDER)
MOST_METADATA = 1 << 18  # characters of a base model's card that are looked at
# Only these are uploaded: never checkpoints, caches, logs or trackers' files.
PUBLISHED = ["README.md", INDEX_FILE, CONFIG_FILE, SETTINGS_FILE, *(f"{folder}/*" for folder in EXPORTED[1:])]


class NotFinite(UserError):
    """Weights that no pipeline can be made of."""

    exit_code = 1


def begin(output_dir: str | os.PathLike, flags: dict) -> None:
    """Make --output_dir, finish an export that was killed in it, and write down the configuration."""
    output_dir = Path(output_dir)
    with _writable(output_dir, "the configuration"):
        output_dir.mkdir(parents=True, exist_ok=True)
        _finish_export(output_dir)
        write_json(output_dir / CONFIG_FILE, flags)


@contextlib.contextmanager
def _writable(output_dir: Path, what: str):
    """Most often it is a full disk that stops a writer."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"--output_dir: {what} cannot be written into {output_dir} ({error}), where"
            f" {in_megabytes(free_space(output_dir))} are free; make room and go on with"
            " --resume_from_checkpoint latest"
        ) from error


# ---- the pipeline


def check_finite(unet: torch.nn.Module) -> None:
    """Raise NotFinite, which exits with 1, if a weight is not a number or infinite."""
    for name, tensor in unet.state_dict().items():
        if not tensor.isfinite().all():
            raise NotFinite(
                f"--output_dir: no pipeline is written, as the UNet's {name} is not finite; go on from a checkpoint"
                " before that with a lower --learning_rate, or train with bf16"
            )


def export(
    config, flags: dict, unet, summary: dict, repo_id: str | None, instruction: str, skips: DecoderSkips | None = None
) -> None:
    """Write the trained `unet`, the base model's other parts, and decoder `skips` if there are any, as a pipeline into
    --output_dir, with the configuration and a model card whose snippet edits by `instruction`.

    At any moment the folder holds the pipeline from before, the new one, or no model_index.json and both in pieces,
    which `begin` puts together. Raises NotFinite, and UserError where the folder cannot be written.
    """
    check_finite(unet)
    output_dir = Path(config.output_dir)
    new = output_dir / ".export.partial"
    with _writable(output_dir, "the pipeline"):
        _finish_export(output_dir)
        try:
            _write_export(new, config, flags, unet, summary, repo_id, instruction, skips)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise
        _keep_settings(output_dir, new)
        _put_in_place(output_dir)


def _keep_settings(output_dir: Path, new: Path) -> None:
    """What a sweep found for the pipeline of before is true of the `new` one only if the weights are the same."""
    weights, path = "unet/diffusion_pytorch_model.safetensors", output_dir / SETTINGS_FILE
    if path.is_file() and (output_dir / weights).is_file():
        if filecmp.cmp(output_dir / weights, new / weights, shallow=False):
            try:
                recommend(new, read_settings(path))
            except (UserError, LookupError, TypeError, ValueError) as error:  # written by hand
                logger.warning("%s does not go into the card (%s)", path, error)
        else:
            logger.warning("%s was found for other weights and goes with them; sweep again", path)
            path.unlink()


def export_checkpoint(checkpoint: str | os.PathLike, output_dir: Path, name: str | None = None, config=None) -> None:
    """Write a whole checkpoint as the pipeline that training would have exported there, into a new folder that is there
    whole or not at all. Raises NotFinite, and UserError where the base model or the disk does not give what it needs.

    The card calls the model `name`, or as the folder is called. `config` is the run's own, while it goes on.
    """
    state = trained.read_state(checkpoint)
    if config is None:
        config = trained.configuration(checkpoint)
        config.output_dir = Path(checkpoint).resolve().parent  # the run may have been moved
    size = 4 * sum(sd.count_parameters(sd.read_base_configs(config)).values())
    check_folder("--output_dir", output_dir, size, "the pipeline")
    # The other way of loading gives every module built meanwhile, in any thread, empty weights.
    unet = trained.load_unet(checkpoint, low_cpu_mem_usage=False)
    check_finite(unet)
    flags = state["flags"]
    summary = {"steps": state["step"], "images": state["samples_seen"]}
    summary |= {name: state.get(name) for name in ("device", "commit", "mixture")}
    with contextlib.suppress(OSError, ValueError):  # the run's own, where this was its last update
        run = json.loads((Path(config.output_dir) / SUMMARY_FILE).read_text(encoding="utf-8"))
        summary = run if run["steps"] == state["step"] else summary
    prompt = config.validation_prompt
    instruction = prompt if isinstance(prompt, str) else state.get("instruction", "...")
    with _made_whole("--output_dir", output_dir) as new:
        _write_export(new, config, flags, unet, summary, name or output_dir.name, instruction)


def export_single_file(model: str, file: Path, half: bool) -> list[str]:
    """Write the weights of a model that passed `editing.check_model` as one safetensors file, in float32 or float16.
    Returns what keeps a UI from opening it (`single_file.differences`). UserError where it cannot be written."""
    folder = Path(model).expanduser()
    trained_here = trained.needs_base(folder)
    config = trained.configuration(folder) if trained_here else base_files.configuration(model)
    configs = sd.read_base_configs(config)
    check_folder("output", file.parent, (2 if half else 4) * sum(sd.count_parameters(configs).values()), "the file")
    models = {part: sd.load_model(config, part) for part in ("vae", "text_encoder")}
    models["unet"] = adapters.merged(trained.load_unet(folder)) if trained_here else sd.load_model(config, "unet")
    configs |= {part: models[part].config for part in ("unet", "vae")}
    tensors = single_file.original_layout({part: models[part].state_dict() for part in models}, configs)
    for name in tensors if half else ():
        tensors[name] = tensors[name].half()
        if not tensors[name].isfinite().all():
            raise UserError(f"--half: {name} holds numbers that float16 cannot; leave --half out")
    with _made_whole("output", file) as new:
        save_file(tensors, new, {"format": "pt"})
    return single_file.differences(configs)


def unpack_single_file(file: str, base_config: str | None, output_dir: Path) -> None:
    """Write an InstructPix2Pix model in one file as a pipeline, in float32, into a new folder. Configurations and
    tokenizer are those of `base_config`, see `base_files.source_of`. UserError where that cannot be."""
    config = base_files.configuration(file, base_config)
    configs = sd.read_base_configs(config)
    sd.check_channels(configs, 8, file)
    sd.load_tokenizer(config)  # from the Hub it is fetched by being loaded
    check_folder("output", output_dir, 4 * sum(sd.count_parameters(configs).values()), "the pipeline")
    with _made_whole("output", output_dir) as new:
        _write_pipeline(new, config, sd.load_model(config, "unet"))


def export_transplant(models: dict[str, str], output_dir: Path) -> None:
    """Write `adapters.transplant` of the pipelines {"OURS": folder, "BASE": folder, "THEIRS": folder} as one with the
    other parts of THEIRS, into a new folder. Raises NotFinite, and UserError for models that cannot be read or are not
    of one family, and a disk without room."""
    configs, files = {}, []
    for name, folder in models.items():
        config = base_files.configuration(folder)
        try:
            configs[name] = sd.read_base_configs(config)
            files.append(base_files.weights(config, Path(folder) / "unet", "diffusion_pytorch_model"))
            safe_open(files[-1], "pt")
        except (UserError, OSError, SafetensorError) as error:
            reason = str(error).removeprefix("--pretrained_model_name_or_path: ")
            raise UserError(f"{name}: {reason}; give a pipeline's folder with weights in safetensors") from error
    if configs["OURS"]["unet"]["in_channels"] != 8:
        raise UserError(f"OURS: {models['OURS']} edits no images, its UNet has no 8 input channels; give a trained one")
    if sd.prediction_type(configs["OURS"]) != (kind := sd.prediction_type(configs["THEIRS"])):
        raise UserError(f"THEIRS: its prediction_type is {kind}, another than OURS; give models of one family")
    ours, theirs = (bool(configs[name]["scheduler"].get("rescale_betas_zero_snr")) for name in ("OURS", "THEIRS"))
    if ours != theirs:
        raise UserError(f"THEIRS: its rescale_betas_zero_snr is {theirs}, another than OURS; give models of one family")
    check_folder("OUT", output_dir, 4 * sum(sd.count_parameters(configs["OURS"]).values()), "the pipeline")
    unet = adapters.transplant(*files)
    check_finite(unet)
    with _made_whole("OUT", output_dir) as new:
        _write_pipeline(new, config, unet)  # that of THEIRS, the last


@contextlib.contextmanager
def _made_whole(flag: str, output: Path):
    """Gives a path beside `output`, for a file or folder that takes its place when the block ends well."""
    new = output.with_name(f".{output.name}.partial")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        yield new
        flush_tree(new)
        os.replace(new, output)
        flush(output.parent)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{flag}: {output} cannot be written ({error}); make room or name another") from error
    finally:
        new.unlink(missing_ok=True) if new.is_file() else shutil.rmtree(new, ignore_errors=True)


def _write_export(
    folder: Path, config, flags: dict, unet, summary: dict, name: str | None, instruction: str, skips=None
) -> None:
    """All that an export holds, whole on the disk; the card calls the model `name`, or as --output_dir is called."""
    _write_pipeline(folder, config, unet)
    write_json(folder / CONFIG_FILE, hide_paths(flags))
    if adapters.is_attached(unet):
        adapters.save(unet, folder / ADAPTER_FOLDER)
        write_json(folder / ADAPTER_FOLDER / CONFIG_FILE, hide_paths(flags))
    if skips is not None:
        skips.save_pretrained(folder / decoder_skips.FOLDER)
    shown = evidence.gather(Path(config.output_dir), summary["steps"], folder)
    write_text(folder / "README.md", model_card(config, flags, summary, name, instruction, *shown))
    flush_tree(folder)


def _put_in_place(output_dir: Path) -> None:
    """Exchange what .export.partial holds for what is there. Killed anywhere, it can be called again."""
    new, old = output_dir / ".export.partial", output_dir / ".export.replaced"
    old.mkdir(exist_ok=True)  # from here on .export.partial is known to be whole
    # The index leaves first and comes last. The UNet comes first: where it waits, nothing new is in its place yet, and
    # what the new pipeline may lack leaves too.
    items = sorted((path.name for path in new.iterdir()), key=lambda name: (name != INDEX_FILE, name == "unet"))
    gone = (ADAPTER_FOLDER, decoder_skips.FOLDER) if "unet" in items else ()
    for name in (*items, *gone):
        if (output_dir / name).exists():
            os.replace(output_dir / name, old / name)
    for name in reversed(items):
        os.replace(new / name, output_dir / name)
    flush(output_dir)
    shutil.rmtree(new)
    shutil.rmtree(old)


def _finish_export(output_dir: Path) -> None:
    """After a kill: put the new pipeline in place if it was whole, else sweep it away."""
    new, old = output_dir / ".export.partial", output_dir / ".export.replaced"
    if old.exists() and (new / INDEX_FILE).exists():
        _put_in_place(output_dir)
    for folder in (new, old):
        if folder.exists():
            shutil.rmtree(folder)


def _write_pipeline(folder: Path, config, unet) -> None:
    """The base model's own files, the UNet in float32, and the index that names the parts."""
    shutil.rmtree(folder, ignore_errors=True)
    base = base_files.base_folder(config)
    for part in ("scheduler", "tokenizer"):
        for file in sorted((base / part).iterdir()):
            if file.is_file() and not file.name.startswith("."):
                _copy(file, folder / part / file.name)
    _copy_model(config, base / "text_encoder", "model", folder / "text_encoder")
    _copy_model(config, base / "vae", "diffusion_pytorch_model", folder / "vae")
    sd.make_readable(folder)

    adapters.merged(unet).save_pretrained(folder / "unet")
    unet_config = json.loads((folder / "unet/config.json").read_text(encoding="utf-8"))
    unet_config.pop("_name_or_path", None)  # where this run took it from: the base model or a checkpoint
    write_json(folder / "unet/config.json", hide_paths(unet_config))

    scheduler_file = folder / "scheduler/scheduler_config.json"
    base_config = json.loads(scheduler_file.read_text(encoding="utf-8"))
    scheduler_config = sd.with_zero_terminal_snr(base_config, config.zero_terminal_snr)
    if scheduler_config != base_config:
        write_json(scheduler_file, scheduler_config)
    write_json(
        folder / INDEX_FILE,
        {
            "_class_name": "StableDiffusionInstructPix2PixPipeline",
            "_diffusers_version": diffusers.__version__,
            "feature_extractor": [None, None],
            "image_encoder": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            "scheduler": ["diffusers", sd.scheduler_class(scheduler_config)],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
    )


def _copy_model(config, source: Path, stem: str, target: Path) -> None:
    """Copy a model that training did not change; a variant's weights get the plain name. What is not one safetensors
    file (pickled, in several, or with the other parts) is loaded and saved as one."""
    weights = base_files.weights(config, source, stem)
    if weights.is_file() and not base_files.single_file(config):
        _copy(weights, target / f"{stem}.safetensors")
    else:
        sd.load_model(config, source.name).save_pretrained(target, max_shard_size="100GB")
    _copy(source / "config.json", target / "config.json")


def _copy(source: Path, target: Path) -> None:
    """Byte by byte, unless it is a configuration that names a path of this machine."""
    target.parent.mkdir(parents=True, exist_ok=True)
    content = json.loads(source.read_text(encoding="utf-8")) if source.name.endswith("config.json") else {}
    if hide_paths(content) == content:
        shutil.copyfile(source, target)
    else:
        write_json(target, hide_paths(content))


def hide_paths(flags: dict) -> dict:
    """Of a path on this machine its last part only."""

    def shown(value):
        if isinstance(value, list):
            return [shown(one) for one in value]
        return for_others(value) if isinstance(value, str) else value

    return {name: shown(value) for name, value in flags.items()}


# ---- the model card


def _hub_id(name: str | None) -> str | None:
    """The name if it is a Hub id rather than a path of this machine."""
    if name and not os.path.exists(name) and re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return name
    return None


def card_licence(name: str, kind: str = "model") -> str | None:
    """The licence that the card of a model, or of a dataset by its `kind`, states, where that can be read."""
    try:
        path = Path(name) / "README.md" if os.path.exists(name) else hf_hub_download(name, "README.md", repo_type=kind)
        with open(path, encoding="utf-8") as file:
            beginning = re.sub(r"[\r\n]+", "\n", file.read(MOST_METADATA))  # the parser is slow at empty lines
        licence = ModelCard(beginning).data.license
    except Exception:  # no card, no metadata, no network: the licence is then unknown, which the card says
        return None
    return licence if isinstance(licence, str) else None


def _told_of_data(config, mixture: list[dict]) -> tuple[list[str], str, str]:
    """Hub ids, names and licences, as the card has them, of the data: one dataset, two folders, or what a `mixture`
    says of its datasets."""
    data = config.dataset_name or config.train_data_dir
    names = [told["dataset"] for told in mixture] or ([data] if data else [config.original_dir, config.edited_dir])
    shown = [as_code(for_others(name)) for name in names]
    licences = [card_licence(name, "dataset") if mixture or data else None for name in names]
    licences = [as_text(licence or "not stated there, so unknown") for licence in licences]
    if not mixture:
        return list(filter(None, [_hub_id(data)])), " and ".join(shown), licences[0]
    shares = [f"({told['share']:.1%} of the samples{', replayed' if told['replay'] else ''})" for told in mixture]
    facts = zip(shown, shares, licences, strict=True)
    told, licences = zip(*((f"{name} {share}", f"{licence} ({name})") for name, share, licence in facts), strict=True)
    return list(filter(None, map(_hub_id, names))), " and ".join(told), ", ".join(licences)


def model_card(config, flags: dict, summary: dict, repo_id: str | None, instruction: str, shown=(), results=()) -> str:
    """The card's text: base model, data, licences, a snippet that runs, the settings, `shown` and `results`, which are
    what `evidence.gather` gives, limits and what training took."""
    base = config.pretrained_model_name_or_path
    data_ids, trained_on, data_licence = _told_of_data(config, summary.get("mixture") or [])
    base_id, licence = _hub_id(base), card_licence(base)
    name = repo_id or for_others(config.output_dir)
    metadata = ModelCardData(
        license=licence if licence and re.fullmatch(r"[a-z0-9.+-]+", licence) else "other",
        base_model=base_id,
        datasets=data_ids or None,
        library_name="diffusers",
        pipeline_tag="image-to-image",
        tags=["instruct-pix2pix", "stable-diffusion", "diffusers", "instruction-tuning"],
        model_name=Path(name).name if results else None,
        eval_results=results or None,
    )
    values = {
        flag: as_code(value).replace("|", r"\|") for flag, value in hide_paths(flags).items() if value is not None
    }
    lines = [f"| `--{flag}` | {value} |" for flag, value in values.items()]
    took = ", ".join(
        f"{name.replace('_', ' ')} {value}"
        for name, value in summary.items()
        if value is not None and name != "mixture"
    )
    setting = editing.usual_setting(config)
    return f"""---
{metadata.to_yaml()}
---

# {as_text(Path(name).name)}

A Stable Diffusion model that edits images by instruction. Its UNet was trained with the InstructPix2Pix objective
([Brooks et al. 2023](https://arxiv.org/abs/2211.09800)), starting from {as_code(for_others(base))}, on
{trained_on}. Its licence follows the base model's: {as_text(licence or "not stated there, so unknown")}.
{"Each" if summary.get("mixture") else "The"} dataset has a licence of its own: {data_licence}.

## Use

{_recommendation([name, instruction], setting)}

{chr(10).join(f"{part}{chr(10)}" for part in ("## Results", *shown)) if shown else ""}
## Limits

- It follows instructions like those it was trained on, at sizes near its training's.
- Every edit passes through an autoencoder, which changes small faces, letters and fine texture, wanted or not.
- What it adds is invented to look likely: a restored photograph is no evidence of what was there.
- It has what biases its base model and its data have, and no safety checker.

## Training

{took}.

| flag | value |
|---|---|
{chr(10).join(lines)}
"""


def _snippet(model: str, instruction: str, setting: Setting) -> str:
    """Python that edits by a setting as `editing.edit_batch` does."""
    kind, sampler = SCHEDULERS.get(setting.scheduler), ""
    if kind:
        sampler = f"""
config = {{"clip_sample": False, **pipeline.scheduler.config, "_use_default_values": []}}
pipeline.scheduler = {kind}.from_config(config)"""
    return f"""import torch
from diffusers import {kind + ", " if kind else ""}StableDiffusionInstructPix2PixPipeline
from diffusers.utils import load_image

model = {json.dumps(model, ensure_ascii=False)}
pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(model, torch_dtype=torch.float16).to("cuda"){sampler}
image = load_image("photo.png")
edited = pipeline(
    {json.dumps(instruction, ensure_ascii=False)},
    image=image,
    num_inference_steps={setting.steps},
    image_guidance_scale={setting.image_guidance_scale},
    guidance_scale={setting.guidance_scale},
).images[0]
edited.save("edited.png")"""


# ---- settings that a sweep found

# They stand between these lines of a card; the first goes on with what the snippet is made of, as JSON.
_BEGIN, _END = "<!-- evaluation/sweep.py writes from here: ", "<!-- to here -->"


def _recommendation(names: list[str], setting: Setting, table: str = "") -> str:
    """The part of a card that a sweep writes anew: its table, and of [model, instruction] advice and a snippet."""
    parts = [_BEGIN + json.dumps(names).replace(">", r"\u003e") + " -->"]
    if names:
        text, image = setting.guidance_scale, setting.image_guidance_scale
        parts += [f"Recommended: guidance {text} for the instruction and {image} for the image."]
        parts += [code_block("python", _snippet(*names, setting))]
    return "\n\n".join([*parts, *filter(None, [table]), _END])


def recommend(folder: Path, found: dict) -> None:
    """Write what a sweep found, see `read_settings`, into a pipeline's folder, and where that has a card, a table into
    it, and its setting into the snippet that training wrote. What else the card says stays."""
    write_json(folder / SETTINGS_FILE, found)
    if (folder / "README.md").is_file():
        card = (folder / "README.md").read_text(encoding="utf-8")
        write_text(folder / "README.md", _with_settings(card, found))


def _with_settings(card: str, found: dict) -> str:
    from instruct_pix2pix.evaluation.summary import sweep_table

    heading, *rows = (f"| {' | '.join(map(as_text, cells))} |" for cells in sweep_table(found, "held_out", "chosen_on"))
    table = f"""## Settings

Found for {found["images"]} images of {as_text(found["dataset"])}, split {as_text(found["split"])}; PSNR in dB on the
split {as_text(found.get("held_out_split") or found["split"])}, means with 95% bootstrap intervals. A setting is the
instruction's guidance / the image's / steps, and the scheduler.

{heading}
|---|---|---|---|---|---|
{chr(10).join(rows)}"""
    before, end, after = card.rpartition(_END)
    before, begin, part = before.rpartition(_BEGIN)
    if begin and end:
        names = json.loads(part.partition(" -->")[0])
    else:  # somebody's own card
        names, (before, heading, after) = [], card.partition("## Training\n")
        before, after = before.rstrip() + "\n\n", "\n" + ("\n" + heading + after if heading else "")
    return before + _recommendation(names, choose_setting(found, names[-1] if names else "")[1], table) + after
