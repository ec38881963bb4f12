"""Save the trained tiny models in half precision, with what was measured in their model cards.

    python tools/save_tiny_base.py --work_dir outputs/tiny_base --output_dir outputs/tiny_models

Makes <output_dir>/tiny-stable-diffusion and <output_dir>/tiny-instruct-pix2pix from what recipes/tiny_base.sh left in
--work_dir: both pipelines, and what evaluate.py says of the second, unguided and guided.
"""

import json
from pathlib import Path

from instruct_pix2pix.cli import Parser, UserError, run

BASE, INSTRUCT = "tiny-stable-diffusion", "tiny-instruct-pix2pix"
FILES = (
    "vae.json",
    f"{BASE}.json",
    f"{INSTRUCT}/training_summary.json",
    "unguided/metrics.json",
    "guided/metrics.json",
)
EDITS = """

Edits of held-out tiles of 128 pixels by `evaluation/evaluate.py`, without guidance (both scales 1), then with guidance
7.0 and 1.5 of the image:

"""


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--work_dir", type=Path, default=Path("outputs/tiny_base"), help="what training and evaluation left")
    add("--output_dir", type=Path, default=Path("outputs/tiny_models"), help="parent of the two new folders")
    args = parser.parse_args(argv)
    for file in FILES:
        if not (args.work_dir / file).exists():
            raise UserError(f"--work_dir: {args.work_dir} has no {file}; run recipes/tiny_base.sh")
    for name in (BASE, INSTRUCT):
        if (args.output_dir / name).exists():
            raise UserError(f"--output_dir: {args.output_dir / name} exists; move it away first")
    vae, base, instruct, unguided, guided = (json.loads((args.work_dir / file).read_text()) for file in FILES)
    from diffusers import DiffusionPipeline

    from instruct_pix2pix.evaluation.summary import table
    from instruct_pix2pix.files import code_block
    from instruct_pix2pix.models.tiny import save_pipeline

    instruct = {"updates": instruct["steps"], "seconds": round(instruct["train_seconds"])}
    stages = code_block("json", json.dumps({"vae": vae, "base": base, "instruct": instruct}, indent=2))
    figures = {BASE: f"\n## Figures\n\n`recipes/tiny_base.sh` on a CPU:\n\n{stages}"}
    edits = "\n\n".join(code_block("text", "\n".join(table(metrics["models"]))) for metrics in (unguided, guided))
    figures[INSTRUCT] = figures[BASE] + EDITS + edits
    for name in (BASE, INSTRUCT):
        pipeline = DiffusionPipeline.from_pretrained(args.work_dir / name, local_files_only=True)
        # The text encoder stays float32: transformers loads a model in the precision of its file, diffusers in float32,
        # and a pipeline loaded without a word on precision would not fit together.
        pipeline.vae.half(), pipeline.unet.half()
        card = (args.work_dir / name / "README.md").read_text(encoding="utf-8") + figures[name]
        save_pipeline(pipeline, args.output_dir / name, card)
        (args.output_dir / name / "tokenizer/tokenizer.json").unlink()  # vocab.json and merges.txt say the same
        print(f"Saved {args.output_dir / name}")


if __name__ == "__main__":
    run(main)
