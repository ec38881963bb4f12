"""Train the tiny model for long and compare the first tenth with the last: memory, open files, seconds per update.

    python tests/long_run.py --work_dir outputs/long-run

Everything that comes back in a training is on: an average, checkpoints, validation pictures, loader processes. The
first tenth is counted after as many updates of warm-up. Exit code 1 where memory has grown by more than 2%, or the
number of open files has changed; the speed is only said, as a machine does other things too: by the clock, and as the
processor time of the training's own process.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil

from instruct_pix2pix.cli import Parser, UserError, run, whole_number
from instruct_pix2pix.files import check_folder

ROOT = Path(__file__).parent.parent
MOST_GROWTH = 0.02
EVERY = 0.05  # seconds between two looks at the process


def prepare(work_dir: Path) -> None:
    """A base model with random weights and a dataset of 64 pairs."""
    from instruct_pix2pix.models.tiny import build_tiny_pipeline, save_pipeline

    save_pipeline(build_tiny_pipeline(in_channels=8, seed=0), work_dir / "base")
    command = [ROOT / "data_preparation/build_generic_edits.py", "--photos", ROOT / "assets/photos/train"]
    command += ["--rows", "64", "--tile", "32", "--output_dir", work_dir / "pairs"]
    subprocess.run([sys.executable, *map(str, command)], check=True)


def train(work_dir: Path, updates: int) -> list[tuple[int, int, int, float]]:
    """Train; returns what was seen of the process meanwhile: (updates logged, bytes of memory, open files, processor
    seconds)."""
    flags = {
        "pretrained_model_name_or_path": work_dir / "base",
        "dataset_name": work_dir / "pairs",
        "output_dir": work_dir / "run",
        "cache_dir": work_dir / "cache",
        "resolution": 32,
        "train_batch_size": 2,
        "max_train_steps": updates,
        "checkpointing_steps": max(1, updates // 20),
        "checkpoints_total_limit": 2,
        "val_image_url": ROOT / "assets/photos/test/sea6.webp",
        "validation_prompt": "make it gray",
        "validation_steps": max(1, updates // 20),
        "num_validation_images": 1,
        "dataloader_num_workers": 1,
        "seed": 1,
        "report_to": "none",
    }
    command = [f"--{name}={value}" for name, value in flags.items()]
    command = [sys.executable, str(ROOT / "finetune_instruct_pix2pix.py"), "--use_ema", "--random_flip", *command]
    log, seen = work_dir / "run/training_log.jsonl", []
    with subprocess.Popen(command) as process:
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            time.sleep(EVERY)
            lines = log.read_bytes().count(b"\n") if log.exists() else 0  # one for each update
            try:
                spent = watched.cpu_times()
                seen.append((lines, watched.memory_info().rss, watched.num_fds(), spent.user + spent.system))
            except psutil.Error:  # it has just ended
                break
    if process.returncode:
        raise UserError(f"--work_dir: the training in {work_dir} ended with {process.returncode}")
    return seen


def compare(work_dir: Path, seen: list[tuple[int, int, int, float]], updates: int) -> dict[str, tuple[float, float]]:
    """Figure -> of the first tenth after warm-up, and of the last: medians, of the processor's time the mean."""
    tenth = updates // 10
    log = [json.loads(line) for line in (work_dir / "run/training_log.jsonl").read_text().splitlines()]
    figures = {"memory (MB)": [], "open files": [], "processor ms per update": [], "ms per update": []}
    for first in (tenth, updates - tenth):
        during = [sample for sample in seen if first <= sample[0] < first + tenth]
        figures["memory (MB)"].append(statistics.median(memory for _, memory, *_ in during) / 1e6)
        figures["open files"].append(statistics.median(files for _, _, files, _ in during))
        seconds = [2 / entry["images_per_second"] for entry in log if first < entry["step"] <= first + tenth]
        figures["ms per update"].append(1000 * statistics.median(seconds))
        spent = (during[-1][3] - during[0][3]) / (during[-1][0] - during[0][0])
        figures["processor ms per update"].append(1000 * spent)
    return {name: tuple(values) for name, values in figures.items()}


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--updates", type=whole_number(100), default=2000, help="updates in all")
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/long-run"), help="a new folder for what is made")
    args = parser.parse_args(argv)
    check_folder("--work_dir", args.work_dir)
    if args.work_dir.exists():
        raise UserError(f"--work_dir: {args.work_dir} exists already; remove it or name another folder")
    args.work_dir.mkdir(parents=True)
    prepare(args.work_dir)
    figures = compare(args.work_dir, train(args.work_dir, args.updates), args.updates)

    print(f"\n| {args.updates} updates | first tenth after warm-up | last tenth | change |\n|---|---:|---:|---:|")
    for name, (before, after) in figures.items():
        print(f"| {name} | {before:.1f} | {after:.1f} | {100 * (after / before - 1):+.2f}% |")
    (memory_before, memory_after), (files_before, files_after) = figures["memory (MB)"], figures["open files"]
    if memory_after > (1 + MOST_GROWTH) * memory_before or files_after != files_before:
        sys.exit(1)


if __name__ == "__main__":
    run(main, stopped="what was made is in --work_dir")
