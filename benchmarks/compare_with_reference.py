#!/usr/bin/env python
"""Time updates of diffusers' InstructPix2Pix example (your own copy) and of this project, in turn, on equal terms.

    python -m benchmarks.compare_with_reference --reference path/to/train_instruct_pix2pix.py --size small

Same random weights, same pairs, same number of images per update, learning rate, average and conditioning dropout.
identical            the same flags on both sides: one micro-batch, no gradient checkpointing, --center_crop
identical_uncached   the same, and this project's latent cache turned off
recipe               each side's own way to 8 images an update: there 2 x 4 with gradient checkpointing, as published;
                     here as recipes/ has it, 2 x 4 merged into what fits, from a cache of four crops of each pair;
                     --compile adds that flag here, for a GPU

A time is the mean over updates 11 and later of one run, by the wall clock; each side's is the median of its runs. Where
a machine does other things meanwhile, each side's fastest run says more, so the ratio of these is printed too. The
example needs torchvision. Prints every figure, then one JSON line.
"""

import argparse
import json
import shlex
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks import machine, models, reference
from instruct_pix2pix import cli

IMAGES = 8  # per update
AT_ONCE = ["--train_batch_size=8", "--center_crop"]
IN_PARTS = ["--train_batch_size=2", "--gradient_accumulation_steps=4", "--random_flip"]
COMPARISONS = {  # name: flags of the reference, flags of this project
    "identical": (AT_ONCE, AT_ONCE),
    "identical_uncached": (AT_ONCE, [*AT_ONCE, "--no-cache_latents"]),
    "recipe": (
        [*IN_PARTS, "--gradient_checkpointing"],
        [*IN_PARTS, "--max_micro_batch_size=auto", "--cached_crops=4"],
    ),
}
WARM_UP = 10  # updates before the clock counts; this project's log writes a line for every ten


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    what = parser.add_argument_group("what is compared")
    what.add_argument("--reference", type=reference.file, required=True, help="Your copy of the example.")
    what.add_argument("--comparisons", nargs="+", choices=COMPARISONS, default=list(COMPARISONS), help="Which ones.")
    what.add_argument("--size", choices=models.SIZES, default="small", help="Shapes of the model.")
    what.add_argument("--resolution", type=int, help="64 for small, 128 for unet, 256 for sd15.")
    what.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), default="no", help="Of both sides.")
    what.add_argument("--compile", action="store_true", help="This project's side of `recipe` with --compile.")
    how = parser.add_argument_group("how it is timed")
    how.add_argument("--updates", type=int, default=20, help="Updates of a run; the first ten do not count.")
    how.add_argument("--repeats", type=cli.whole_number(1), default=3, help="Runs of each side.")
    how.add_argument("--folder", default="outputs/benchmarks", help="Where the model, pairs and runs are kept.")
    args = parser.parse_args(argv)
    if args.updates < 2 * WARM_UP or args.updates % WARM_UP:
        raise cli.UserError(f"--updates: {args.updates} is not 20, 30, ...; ten warm up, the rest is timed in tens")
    args.resolution = args.resolution or models.RESOLUTIONS[args.size]
    return args


def output_of(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        said = " ".join(done.stderr.split())[-800:]
        raise cli.UserError(f"{shlex.join(command[:4])} ... ended with {done.returncode}: {said}")
    return done.stdout


def time_reference(args, flags: list[str]) -> float:
    """Seconds per update of one run of the reference."""
    printed = output_of([sys.executable, "-m", "benchmarks.reference", args.reference, *flags])
    clocks = json.loads(printed.splitlines()[-1])
    return (clocks[args.updates - 1] - clocks[WARM_UP - 1]) / (args.updates - WARM_UP)


def time_ours(flags: list[str], output_dir: Path) -> float:
    """Seconds per update of one run of this project, from its own log."""
    output_of([sys.executable, "train_instruct_pix2pix.py", *flags, "--report_to=none"])
    lines = (output_dir / "training_log.jsonl").read_text().splitlines()
    rates = [json.loads(line)["images_per_second"] for line in lines[WARM_UP:]]
    return statistics.mean(IMAGES / rate for rate in rates)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    from tqdm.auto import tqdm

    folder = Path(args.folder)
    shared = {
        "model": models.model_folder(args.size, folder),
        "data": models.pairs_folder(folder),
        "resolution": args.resolution,
        "max_train_steps": args.updates,
        "mixed_precision": args.mixed_precision,
        "conditioning_dropout_prob": 0.05,
        "learning_rate": 5e-5,
    }
    seconds = {name: {"reference": [], "ours": []} for name in args.comparisons}
    with tqdm(total=2 * args.repeats * len(seconds), unit="run") as progress:
        for _ in range(args.repeats):
            for name, times in seconds.items():
                for side, flags in zip(("reference", "ours"), COMPARISONS[name], strict=True):
                    output_dir = folder / f"compare-{side}"
                    shutil.rmtree(output_dir, ignore_errors=True)
                    flags = models.common_flags(**shared, output_dir=output_dir) + flags
                    if args.compile and (name, side) == ("recipe", "ours"):
                        flags.append("--compile")
                    timed = time_reference(args, flags) if side == "reference" else time_ours(flags, output_dir)
                    times[side].append(round(timed, 4))
                    tqdm.write(f"{name}, {side}: {timed:.3f} s", file=sys.stderr)  # kept where a later run is stopped
                    progress.update(1)
    result = {
        "command": f"python -m benchmarks.compare_with_reference {shlex.join(argv)}",
        "size": args.size,
        "resolution": args.resolution,
        "mixed_precision": args.mixed_precision,
        **machine.describe(),
        "comparisons": {},
    }
    for name, times in seconds.items():
        theirs, ours = statistics.median(times["reference"]), statistics.median(times["ours"])
        fastest = min(times["reference"]) / min(times["ours"])
        result["comparisons"][name] = {
            "reference_seconds": round(theirs, 4),
            "our_seconds": round(ours, 4),
            "ratio": round(theirs / ours, 2),
            "ratio_of_fastest_runs": round(fastest, 2),
            "all_runs": times,
        }
    machine.report(result)


if __name__ == "__main__":
    cli.run(main)
