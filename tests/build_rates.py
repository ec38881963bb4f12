"""Build datasets of several sizes on this machine, and print images per second and memory for each.

    python tests/build_rates.py --work_dir outputs/build-rates --side 64 --rows 1000 10000 --actors 0 1 2

0 actors is the builder without Ray. Photos are cut out of those in assets/, all of one size; cartoons are drawn by
`--cartoonizer opencv`. Images per second count from the first finished shard to the last, so that starting does not;
`plan` is images looked at per second before. Memory is the largest that was seen of a process, without what it shares
with others (libraries, Ray's store): of the process that builds, of an actor, and of all that Ray runs besides.
"""

import shutil
import subprocess
import sys
import time
from itertools import cycle, islice
from pathlib import Path

import psutil
from PIL import Image

from instruct_pix2pix.cli import Parser, UserError, run, whole_number
from instruct_pix2pix.files import check_folder

ROOT = Path(__file__).parent.parent
EVERY = 0.2  # seconds between two looks at the processes
MIB = 2**20


def make_photos(folder: Path, count: int, side: int) -> None:
    """`count` different pictures of `side` pixels."""
    folder.mkdir(parents=True)
    room = side + 128
    photos = [Image.open(path).convert("RGB") for path in sorted((ROOT / "assets/photos/train").glob("*.webp"))]
    photos = [photo.resize((room, room)) for photo in photos]
    for number, photo in enumerate(islice(cycle(photos), count)):
        left, top = divmod(7 * (number // len(photos)), 128)
        photo.crop((left, top, left + side, top + side)).save(folder / f"{number:06d}.png")


def own_memory(process: psutil.Process) -> int:
    memory = process.memory_info()
    return memory.rss - memory.shared


def measure(photos: Path, dataset: Path, rows: int, actors: int, rows_per_shard: int) -> dict[str, float]:
    """Build `rows` rows with so many actors; what was seen meanwhile."""
    shutil.rmtree(dataset, ignore_errors=True)
    command = [sys.executable, str(ROOT / "data_preparation/build_cartoonization.py"), "--cartoonizer", "opencv"]
    command += ["--photos", str(photos), "--output_dir", str(dataset), "--max_num_samples", str(rows)]
    command += ["--rows_per_shard", str(rows_per_shard)]
    if actors:
        command += ["--ray=local", "--ray_actors", str(actors)]
    seen = {"builder": 0, "actor": 0, "rest of Ray": 0}
    started = None
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        builder = psutil.Process(process.pid)
        while process.poll() is None:
            time.sleep(EVERY)
            if started is None and (dataset / "data").exists():
                started = time.time()
            now = {"builder": 0, "actor": 0, "rest of Ray": 0}
            try:
                now["builder"] = own_memory(builder)
                for child in builder.children(recursive=True):
                    actor = any("ShardMaker" in word for word in child.cmdline())
                    name = "actor" if actor else "rest of Ray"
                    now[name] = max(now[name], own_memory(child)) if actor else now[name] + own_memory(child)
            except psutil.Error:  # one that has just ended
                pass
            seen = {name: max(value, now[name]) for name, value in seen.items()}
    if process.returncode:
        raise UserError(f"--work_dir: the build in {dataset} ended with {process.returncode}")
    import pyarrow.parquet as pq

    shards = sorted((path.stat().st_mtime, pq.read_metadata(path).num_rows) for path in dataset.glob("data/*"))
    first, last = shards[0][0], shards[-1][0]
    planned = (dataset / "plan.jsonl").stat().st_mtime
    rate = sum(count for _, count in shards[1:]) / (last - first)
    return {"rate": rate, "plan": rows / (planned - started), **{name: value / MIB for name, value in seen.items()}}


def main(argv: list[str] | None = None) -> None:
    # fmt: off
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--work_dir", type=Path, required=True, metavar="DIR", help="a folder for photos and datasets, made anew")
    add("--side", type=whole_number(16), default=64, metavar="PIXELS", help="of the photos")
    add("--rows", type=whole_number(1), nargs="+", default=[1000, 10000], metavar="N", help="sizes of the datasets")
    add("--actors", type=whole_number(0), nargs="+", default=[0, 1, 2], metavar="N", help="0 is without Ray")
    add("--rows_per_shard", type=whole_number(1), default=100, metavar="N", help="as of the builder")
    # fmt: on
    args = parser.parse_args(argv)
    check_folder("--work_dir", args.work_dir)
    shutil.rmtree(args.work_dir, ignore_errors=True)
    make_photos(args.work_dir / "photos", max(args.rows), args.side)
    print("| actors | rows | images/s | plan, images/s | builder, MiB | an actor, MiB | rest of Ray, MiB |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    for actors in args.actors:
        for rows in args.rows:
            seen = measure(args.work_dir / "photos", args.work_dir / "dataset", rows, actors, args.rows_per_shard)
            figures = " | ".join(f"{value:.1f}" for value in seen.values())
            print(f"| {actors or 'without Ray'} | {rows:,} | {figures} |", flush=True)


if __name__ == "__main__":
    run(main)
