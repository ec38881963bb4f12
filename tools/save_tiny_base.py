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
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


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

    from instruct_pix2pix.models.tiny import save_pipeline

    instruct = {"updates": instruct["steps"], "seconds": round(instruct["train_seconds"])}

    def psnr(metrics: dict, row: str, task: str) -> float:
        return round(metrics["models"][row]["tasks"][task]["psnr"]["mean"], 2)

    rows = {kind: kind for kind in ("identity", "identity_through_vae", "vae_ceiling")} | {"model": INSTRUCT}
    edits, measured = {}, unguided["models"]["identity"]
    for task in measured["tasks"]:
        edits[task] = {column: psnr(unguided, row, task) for column, row in rows.items()}
        edits[task]["guided"] = psnr(guided, INSTRUCT, task)
    figures = {BASE: STAGES + table({"vae": vae, "base": base, "instruct": instruct}, "stage")}
    figures[INSTRUCT] = figures[BASE] + EDITS.format(images=measured["all"]["images"]) + table(edits, "edit")
    for name in (BASE, INSTRUCT):
        pipeline = DiffusionPipeline.from_pretrained(args.work_dir / name, local_files_only=True)
        # The text encoder stays float32: transformers loads a model in the precision of its file, diffusers in float32,
        # and a pipeline loaded without a word on precision would not fit together.
        pipeline.vae.half(), pipeline.unet.half()
        card = (args.work_dir / name / "README.md").read_text(encoding="utf-8") + figures[name]
        save_pipeline(pipeline, args.output_dir / name, card)
        print(f"Saved {args.output_dir / name}")


if __name__ == "__main__":
    run(main)
