"""Measure the trained tiny models and save them as pipeline folders with model cards.

    python -m tools.save_tiny_base --work_dir outputs/tiny_base --output_dir assets

Makes <output_dir>/tiny-stable-diffusion (text to image) and <output_dir>/tiny-instruct-pix2pix from what
tools/train_tiny_base.py left in --work_dir. Takes some minutes on a CPU, nearly all of them for the figures,
which are also written to <work_dir>/figures.json.
"""

import argparse
import json
import os
import sys
from pathlib import Path

STAGES = ("linear", "vae", "base", "instruct")
NAMES = {"base": "tiny-stable-diffusion", "instruct": "tiny-instruct-pix2pix"}


def table(rows: dict[str, dict], first: str) -> list[str]:
    """Markdown lines of a table: one row for each key, named in the column `first`."""
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    lines = ["| " + " | ".join([first, *columns]) + " |", "|---|" + "---:|" * len(columns)]
    return lines + [
        "| " + " | ".join([name, *(str(row.get(key, "")) for key in columns)]) + " |" for name, row in rows.items()
    ]


def read_log(work_dir: Path, stage: str, rows: int = 8) -> dict[str, dict]:
    """About `rows` evenly spread lines of a stage's log, the last one among them, by step."""
    lines = [json.loads(line) for line in (work_dir / f"{stage}.log.jsonl").read_text().splitlines()]
    stride = max(1, len(lines) // rows)
    kept = lines[::-1][::stride][::-1]
    return {str(line.pop("step")): line for line in kept}


def model_card(stage: str, figures: dict, logs: dict) -> str:
    """The README.md of the model that ends with `stage`, "base" or "instruct"."""
    vae = figures["vae"]
    trained = STAGES if stage == "instruct" else STAGES[:3]
    times = {name: {"updates": figures[name]["steps"], "seconds": figures[name]["seconds"]} for name in trained}
    tags = "stable-diffusion, tiny" if stage == "base" else "instruct-pix2pix, image-editing, tiny"
    task = "text-to-image" if stage == "base" else "image-to-image"
    lines = [
        "---",
        "license: apache-2.0",
        "library_name: diffusers",
        f"pipeline_tag: {task}",
        f"tags: [{tags}]",
        "---",
    ]
    if stage == "base":
        lines += [
            "# Tiny Stable Diffusion",
            "",
            "A complete `StableDiffusionPipeline` of 3.6 million parameters that stands in for Stable",
            "Diffusion v1.5 where no checkpoint can be fetched: in tests and examples. Trained for minutes",
            "on 64-pixel tiles of photos, it has learned their colours and soft shapes, not objects.",
        ]
    else:
        lines += [
            "# Tiny InstructPix2Pix",
            "",
            "A complete `StableDiffusionInstructPix2PixPipeline` of 3.6 million parameters that stands in",
            "for timbrooks/instruct-pix2pix where no checkpoint can be fetched. It has learned to keep an",
            "image and to make some generic edits of it, at about 128 pixels. Cartoons are left for a",
            "fine-tune to learn: the VAE has seen some, the UNet none.",
        ]
    lines += [
        "",
        "Image sides must be multiples of 16. The VAE divides them by 4.",
        "The UNet predicts velocity. Words outside the small vocabulary are spelled out.",
        "",
        "## Training",
        "",
        f"`recipes/tiny_base.sh`, seed {figures['seed']}, float32 on {figures['device']}, from the",
        "photographs of `assets/photos/train` (public domain and CC0); `assets/photos/test` was held out. After",
        "the linear stage, weight matrices were trained with Muon and all else with AdamW.",
        "",
        *table(times, "stage"),
        "",
        "## Figures",
        "",
        "The VAE's ceiling, held-out photos encoded and decoded, PSNR in dB:",
        "",
        f"- whole photos at 128 pixels: {vae['photos dB']}",
        f"- parts of 128 pixels at twice the scale: {vae['photo details dB']}",
        f"- the first as cartoons, by `opencv_cartoonize` of `data_preparation/cartoonizer.py`: {vae['cartoons dB']}",
        "",
    ]
    if stage == "instruct":
        worse = [name for name, row in figures["unguided"].items() if row["model"] < row["identity"] and name != "keep"]
        lines += [
            "Edits come out better without guidance than with it (compare the two tables): strong guidance",
            "overshoots in a model this small. Even without it, doing nothing scores higher for: "
            + (", ".join(worse) or "none of the edits")
            + ".",
            "",
            f"Edits of {figures['images']} held-out photos at 128 pixels, 20 steps, PSNR in dB.",
            "`identity`: source against target. `through VAE`: source, encoded and decoded, against target.",
            "`ceiling`: target, encoded and decoded, against target. `model`: result against target.",
            "`in VAE`: result against the ceiling's image, which is the best that the model could give.",
            "",
            "Without guidance (both scales 1):",
            "",
            *table(figures["unguided"], "edit"),
            "",
            "Guidance 7.0, image guidance 1.5:",
            "",
            *table(figures["guided"], "edit"),
            "",
        ]
    lines += ["## Log", ""]
    for name in trained:
        lines += [f"`{name}`", "", *table(logs[name], "step"), ""]
    return "\n".join(lines)


class Parser(argparse.ArgumentParser):
    """Usage errors as one line: the flag, what is wrong, what to do."""

    def error(self, message: str):
        message = message.removeprefix("argument ")
        print(f"{Path(sys.argv[0]).name}: error: {message}; see --help", file=sys.stderr)
        raise SystemExit(2)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        pass

    parser = Parser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    files = parser.add_argument_group("files")
    files.add_argument("--work_dir", type=Path, default=Path("outputs/tiny_base"), help="what training left")
    files.add_argument("--output_dir", type=Path, default=Path("assets"), help="parent of the two new folders")
    files.add_argument("--held_out", type=Path, default=Path("assets/photos/test"), help=".webp to measure on")
    measuring = parser.add_argument_group("measuring")
    measuring.add_argument("--every", type=int, default=3, help="edit every n-th held-out photo")
    measuring.add_argument("--edits", nargs="+", help="names in generic_edits.py to measure; without it, all")
    measuring.add_argument("--seed", type=int, default=0, help="the seed of the training, for the cards")
    measuring.add_argument("--threads", type=int, default=0, help="CPU threads; 0: PyTorch's own choice")
    arguments = parser.parse_args(argv)
    for stage in STAGES:
        if not (arguments.work_dir / f"{stage}.json").exists():
            parser.error(f"--work_dir: {arguments.work_dir} has no finished stage {stage}; train it first")
    for name in NAMES.values():
        folder = arguments.output_dir / name
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            parser.error(f"--output_dir: {folder} exists; move it away first")
    if not any(arguments.held_out.glob("*.webp")):
        parser.error(f"--held_out: {arguments.held_out} holds no .webp photos; name a folder that does")
    if arguments.every <= 0:
        parser.error(f"--every: {arguments.every} is not above zero; give a positive number")
    return arguments


def main() -> None:
    arguments = parse_arguments()

    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    from instruct_pix2pix.models.tiny import assemble, build_scheduler, build_tokenizer, save_pipeline
    from tools.generic_edits import EDITS, RESTORATIONS
    from tools.train_tiny_base import centre_crops, edit_figures, load_photos

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    work_dir = arguments.work_dir
    figures = {stage: json.loads((work_dir / f"{stage}.json").read_text()) for stage in STAGES}
    figures |= {"seed": arguments.seed, "device": figures["instruct"]["device"]}
    logs = {stage: read_log(work_dir, stage) for stage in STAGES}
    for stage in ("instruct", "base"):
        # Through half precision and back: what is measured is what is saved.
        vae = AutoencoderKL.from_pretrained(work_dir / "vae" / "vae").half().float()
        unet = UNet2DConditionModel.from_pretrained(work_dir / stage / "unet").half().float()
        text_encoder = CLIPTextModel.from_pretrained(work_dir / stage / "text_encoder")
        pipeline = assemble(vae, text_encoder, build_tokenizer(), unet, build_scheduler())
        pipeline.set_progress_bar_config(disable=True)
        if stage == "instruct":
            crops = centre_crops(load_photos(arguments.held_out), 128)[:: arguments.every]
            names = arguments.edits or [*EDITS, *RESTORATIONS]
            figures["images"] = len(crops)
            figures["unguided"] = edit_figures(pipeline, crops, names, 1.0, 1.0, "cpu")
            figures["guided"] = edit_figures(pipeline, crops, names, 7.0, 1.5, "cpu")
            temporary = work_dir / "figures.json.partial"
            temporary.write_text(json.dumps(figures, indent=2) + "\n")
            os.replace(temporary, work_dir / "figures.json")
        # The text encoder stays float32: transformers loads a model in the precision of its file, diffusers
        # in float32, and a pipeline loaded without a word on precision would not fit together.
        vae.half(), unet.half()
        # One that has been used would write its last padding and truncation into its file.
        pipeline.register_modules(tokenizer=build_tokenizer())
        save_pipeline(pipeline, arguments.output_dir / NAMES[stage], model_card(stage, figures, logs))
        print(f"Saved {arguments.output_dir / NAMES[stage]}")


if __name__ == "__main__":
    main()
