#!/usr/bin/env python
"""Time an update of training on few rows and on many, from a dataset on disk and from a stream of the same shards.

    python -m tests.many_rows --rows 1000 100000
    python -m tests.many_rows --rows 100000 --kinds stream       # alone: its memory

The tiny model of assets/ at 32 px, all trainings in one process, in turns of a few updates each, so that a busy moment
of the machine hits all alike; by the clock, and as processor time, which others' work changes less. Shards hold 10 row
groups of 100 pairs, so streams fetch while they are timed. Prints every figure, then one JSON line.
"""

import argparse
import shutil
import statistics
import time
from pathlib import Path

from benchmarks import machine, models
from instruct_pix2pix import cli

ROWS_PER_GROUP, ROWS_PER_SHARD = 100, 1000
PAIRS = 64  # of which the rows are made, in turn
IMAGES_PER_UPDATE = 4


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "--rows", type=cli.whole_number(1), nargs="+", default=[1000, 100_000], help="Rows of each dataset."
    )
    parser.add_argument(
        "--kinds", nargs="+", choices=("disk", "stream"), default=["disk", "stream"], help="How it is read."
    )
    parser.add_argument("--rounds", type=cli.whole_number(1), default=100, help="Rounds that are timed.")
    parser.add_argument("--updates", type=cli.whole_number(1), default=5, help="Updates of each training in a round.")
    parser.add_argument("--folder", type=Path, default=Path("outputs/benchmarks"), help="Where the shards are kept.")
    return parser.parse_args(argv)


def shards_folder(folder: Path, rows: int) -> Path:
    """A folder of parquet shards with so many pairs, made once: the same few pairs again and again."""
    import datasets
    import pyarrow.parquet as pq

    path = folder / f"shards-{rows}"
    if path.is_dir():
        return path
    table = datasets.load_dataset(str(models.pairs_folder(folder, PAIRS, (40, 32))), split="train")
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "data").mkdir(parents=True)
    for start in range(0, rows, ROWS_PER_SHARD):
        chosen = [row % PAIRS for row in range(start, min(rows, start + ROWS_PER_SHARD))]
        name = f"train-{start // ROWS_PER_SHARD:05d}-of-{-(-rows // ROWS_PER_SHARD):05d}.parquet"
        part = table.select(chosen).with_format("arrow")[:]
        pq.write_table(part, partial / "data" / name, row_group_size=ROWS_PER_GROUP)
    partial.rename(path)
    return path


def build(kind: str, rows: int, args):
    """A training that is ready to go."""
    from instruct_pix2pix.training import options, preparation

    flags = [
        f"--pretrained_model_name_or_path={Path(__file__).parent.parent / 'assets/tiny-instruct-pix2pix'}",
        f"--dataset_name={shards_folder(args.folder, rows)}",
        f"--output_dir={args.folder / 'rows'}",
        f"--cache_dir={args.folder / 'cache'}",
        "--resolution=32",
        "--random_flip",
        f"--train_batch_size={IMAGES_PER_UPDATE}",
        f"--max_train_steps={(args.rounds + 1) * args.updates}",
        "--seed=0",
        "--report_to=none",
        *(["--streaming"] if kind == "stream" else []),
    ]
    parsed = options.parse_args(__doc__, flags)
    return preparation.build(preparation.check(parsed, preparation.start_accelerator(parsed), 8))


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    import psutil

    runs = {f"{kind}, {rows} rows": build(kind, rows, args) for kind in args.kinds for rows in args.rows}
    clocks = {"ms_per_update": time.perf_counter, "processor_ms_per_update": time.process_time}
    spent = {clock: {name: [] for name in runs} for clock in clocks}
    for number in range(args.rounds + 1):
        for name, run in runs.items():
            before = {clock: now() for clock, now in clocks.items()}
            for _ in range(args.updates):
                run.update.run(run.make_inputs(next(run.windows)), 1e-5)
            for clock, now in clocks.items() if number else ():  # the first round warms up
                spent[clock][name].append(1000 * (now() - before[clock]) / args.updates)
    memory = psutil.Process().memory_info()
    result = {
        **machine.describe(),
        **{
            f"{how.__name__} {clock}": {name: round(how(times), 2) for name, times in by_name.items()}
            for clock, by_name in spent.items()
            for how in (statistics.median, statistics.mean)
        },
        "memory_mb": {"private": round((memory.rss - memory.shared) / 1e6), "resident": round(memory.rss / 1e6)},
    }
    machine.report(result)
    return result


if __name__ == "__main__":
    cli.run(main)
