"""Save the trained tiny models in half precision, with model cards that say what was measured.

    python tools/save_tiny_base.py --work_dir outputs/tiny_base --output_dir outputs/tiny_models

Makes <output_dir>/tiny-stable-diffusion and <output_dir>/tiny-instruct-pix2pix from what recipes/tiny_base.sh left in
--work_dir: the stages, and what evaluate.py says of the last one, unguided and guided.
"""

import json
from pathlib import Path

from instruct_pix2pix.cli import Parser, UserError, run

KINDS = ("identity", "identity_through_vae", "vae_ceiling", "model")  # of evaluate.py
BASE_CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
tags: [stable-diffusion, tiny]
---
# Tiny Stable Diffusion

A complete `StableDiffusionPipeline` of 3.6 million parameters that stands in for Stable Diffusion v1.5 where no
checkpoint can be fetched: in tests and examples. Trained for minutes on 64-pixel tiles of photos, it has learned their
colours and soft shapes, not objects. Image sides must be multiples of 16. Words outside the small vocabulary are
spelled out.
"""
STAGES = """
## Figures

`recipes/tiny_base.sh` on a CPU. `photos`, `cartoons`: held out, of 128 pixels, encoded and decoded, PSNR in dB.
"""
EDITS = """
Edits of {images} held-out tiles of 128 pixels, mean PSNR against the target in dB, by `evaluation/evaluate.py`. `model`
is without guidance (both scales 1), `guided` with guidance 7.0 and 1.5 of the image.
"""


def table(rows: dict[str, dict], first: str) -> str:
    """A markdown table: a line for each key, named in the column `first`."""
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    lines = [[first, *columns], ["---", *("---:" for _ in columns)]]
    lines += [[name, *(row.get(key, "") for key in columns)] for name, row in rows.items()]
    return "\n" + "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--work_dir", type=Path, default=Path("outputs/tiny_base"), help="what training and evaluation left")
    add("--output_dir", type=Path, default=Path("outputs/tiny_models"), help="parent of the two new folders")
    args = parser.parse_args(argv)
    folders = {"base": args.output_dir / "tiny-stable-diffusion", "instruct": args.output_dir / "tiny-instruct-pix2pix"}
    measured = ["unguided/metrics.json", "guided/metrics.json"]
    files = ["vae.json", "base.json", "instruct/training_summary.json", *measured]
    for file in files:
        if not (args.work_dir / file).exists():
            raise UserError(f"--work_dir: {args.work_dir} has no {file}; run recipes/tiny_base.sh")
    for folder in folders.values():
        if folder.exists():
            raise UserError(f"--output_dir: {folder} exists; move it away first")
    vae, base, instruct, unguided, guided = (json.loads((args.work_dir / file).read_text()) for file in files)
    from diffusers import DiffusionPipeline

    from instruct_pix2pix.models.tiny import save_pipeline

    edits = {
        task: {kind: round(scores[f"psnr_{kind}_db"], 2) for kind in KINDS}
        | {"guided": round(guided["tasks"][task]["psnr_model_db"], 2)}
        for task, scores in unguided["tasks"].items()
    }
    instruct = {"updates": instruct["steps"], "seconds": round(instruct["train_seconds"])}
    figures = STAGES + table({"vae": vae, "base": base, "instruct": instruct}, "stage")
    exported = (args.work_dir / "instruct/README.md").read_text(encoding="utf-8")  # by training
    edited = EDITS.format(images=unguided["images"]) + table(edits, "edit")
    cards = {"base": BASE_CARD + figures, "instruct": exported + figures + edited}
    for stage, folder in folders.items():
        pipeline = DiffusionPipeline.from_pretrained(args.work_dir / stage, local_files_only=True)
        # The text encoder stays float32: transformers loads a model in the precision of its file, diffusers in float32,
        # and a pipeline loaded without a word on precision would not fit together.
        pipeline.vae.half(), pipeline.unet.half()
        save_pipeline(pipeline, folder, cards[stage])
        print(f"Saved {folder}")


if __name__ == "__main__":
    run(main)
