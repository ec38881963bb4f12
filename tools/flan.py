#!/usr/bin/env python
"""Does instruction tuning generalise? FLAN's experiment (arXiv 2109.01652, figures 1 and 6) for image editing.

    python tools/flan.py --output_dir outputs/flan
    python tools/flan.py --held_out tint tone --num_tasks 1 0 --wordings 20 --seeds 0

Each run leaves a cluster of tasks (instruct_pix2pix/building/tasks.py) out and trains a tiny model on some tasks of the
other clusters, each in some wordings; updates and rows are the same in all runs. Then it edits held-out photos:

    trained on   by tasks that it was trained on, in their first wording
    reworded     the same in wordings that no training has
    held out     by tasks of the cluster that was left out (zero-shot)
    compound     by two tasks of the other clusters in one instruction

results.jsonl has a line for each run that has ended, and a run that is there is not made again; table.md and plot.png
are made of all of them. docs/generalisation.md says what was found.
"""

import argparse
import itertools
import math
import shlex
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from instruct_pix2pix import editing
from instruct_pix2pix.cli import Parser, UserError, one_progress_bar, run, whole_number
from instruct_pix2pix.files import check_folder, read_json_lines, unit_hash, write_json_lines, write_text, written_whole

if TYPE_CHECKING:
    import numpy as np

    from instruct_pix2pix.building.tasks import Task

ROOT = Path(__file__).parents[1]
KINDS = TRAINED, REWORDED, HELD_OUT, COMPOUND = "trained on", "reworded", "held out", "compound"
# An edit has one right answer, so no guidance and few steps (docs/sweep.md).
SAMPLING = {"steps": 4, "guidance_scale": 1.0, "image_guidance_scale": 1.0}
TRAINING = (
    "--train_batch_size=16 --optimizer=schedulefree --no-use_ema --lr_scheduler=constant_with_warmup"
    " --lr_warmup_steps=50 --learning_rate=3e-3"
)
SETTINGS = "updates", "rows", "resolution", "images", "training"  # a folder's runs have them in common
MOST_ALIKE = 35  # dB between input and target from which on there is next to nothing to edit


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    # fmt: off
    parser = Parser(__doc__)
    add = parser.add_argument_group("runs: every combination").add_argument
    add("--held_out", nargs="+", metavar="CLUSTER", help="clusters to leave out, one at a time; left out, each of them")
    add("--num_tasks", nargs="+", type=whole_number(0), default=[1, 4, 12, 0], metavar="N",
        help="tasks to train on; 0: all of the other clusters")
    add("--wordings", nargs="+", type=whole_number(1), default=[1, 5, 20], metavar="N", help="wordings of each task")
    add("--seeds", nargs="+", type=whole_number(0), default=[0, 1, 2], metavar="N", help="of tasks, data and training")
    add = parser.add_argument_group("each run").add_argument
    add("--updates", type=whole_number(1), default=1500, help="updates of training")
    add("--rows", type=whole_number(1), default=4000, help="pairs to train on, of all tasks together")
    add("--resolution", type=whole_number(16), default=32, help="side of all images, in pixels, a multiple of 16")
    add("--images", type=whole_number(2), default=96, help="edits of each kind to measure")
    add("--training", default=TRAINING, metavar="FLAGS", help="further flags of train_instruct_pix2pix.py, in one word")
    add("--base", default=ROOT / "assets/tiny-stable-diffusion", metavar="FOLDER_OR_ID", help="the model to train")
    add("--photos", type=Path, default=ROOT / "assets/photos", metavar="DIR",
        help="its child train is trained on, its child test edited")
    add("--output_dir", type=Path, default=Path("outputs/flan"), help="where results go")
    add("--keep", action="store_true", help="keep each run's dataset and model in OUTPUT_DIR/runs")
    # fmt: on
    args = parser.parse_args(argv)
    check_folder("--output_dir", args.output_dir)
    if args.resolution % 16:
        raise UserError(f"--resolution: {args.resolution} is no multiple of 16; give one")
    return args


def training_tasks(held_out: str, count: int, seed: int) -> list[str]:
    """Names of `count` tasks, 0 for all, of the other clusters. Fewer are always the first of more."""
    from instruct_pix2pix.building.tasks import TASKS

    names = [name for name, task in TASKS.items() if task.cluster != held_out]
    return sorted(names, key=lambda name: unit_hash("order", seed, name))[: count or None]


def script(name: str, *words) -> None:
    done = subprocess.run([sys.executable, str(ROOT / name), *map(str, words)])
    if done.returncode:
        sys.exit(done.returncode)  # it has said why


def train(key: dict, names: list[str], args, folder: Path) -> None:
    """Build folder/dataset and train folder/model on it, or go on with that."""
    # fmt: off
    script("data_preparation/build_tasks.py", "--tasks", *names, "--photos", args.photos / "train", "--rows", args.rows,
           "--tile", args.resolution, "--wordings", key["wordings"], "--all_instructions", "--seed", key["seed"],
           "--validation_fraction=0", "--test_fraction=0", "--output_dir", folder / "dataset")
    script("train_instruct_pix2pix.py", f"--pretrained_model_name_or_path={args.base}",
           f"--dataset_name={folder / 'dataset'}", f"--resolution={args.resolution}", "--center_crop",
           "--cache_latents", "--conditioning_dropout_prob=0", "--guidance_scale=1", "--image_guidance_scale=1",
           f"--max_train_steps={args.updates}", "--checkpointing_steps=1000", "--checkpoints_total_limit=1",
           "--resume_from_checkpoint=latest", f"--seed={key['seed']}", "--report_to=none",
           f"--output_dir={folder / 'model'}", *shlex.split(args.training))
    # fmt: on


def measure(pipeline, kind: str, tasks: list["Task"], photos: list["np.ndarray"], args) -> dict[str, list[float]]:
    """Of `args.images` edits, the tasks in turn: by how many dB they are nearer to the target than the image itself
    ("gain"), and than the edit by another task's instruction ("cost"). The images are the same in every run."""
    import numpy as np
    from PIL import Image

    from instruct_pix2pix.building.generic_edits import cut_tile
    from instruct_pix2pix.building.tasks import TASKS
    from instruct_pix2pix.evaluation.metrics import psnr

    def say(task: "Task", rng) -> str:
        return rng.choice({TRAINED: task.wordings[:1], REWORDED: task.held_out}.get(kind, task.wordings)).item()

    pairs, texts, others = [], [], []
    for number in range(args.images):
        rng = np.random.default_rng([number, KINDS.index(kind)])
        task = tasks[number % len(tasks)]
        for _ in range(20):
            tile = cut_tile(photos[rng.integers(len(photos))], args.resolution, rng)
            pair = task.pair(tile, rng)
            if psnr(*pair) < MOST_ALIKE:
                break
        pairs.append(pair)
        texts.append(say(task, rng))
        alternatives = [other for other in (tasks if len(tasks) > 1 else TASKS.values()) if other.name != task.name]
        others.append(say(alternatives[rng.integers(len(alternatives))], rng))

    images = [Image.fromarray(source) for source, _ in pairs]

    def scores(instructions: list[str]) -> "np.ndarray":
        edited = editing.edit_batch(pipeline, instructions, images, range(args.images), **SAMPLING)
        results = zip(edited, pairs, strict=True)
        return np.array([math.nan if isinstance(e, str) else psnr(np.asarray(e), target) for e, (_, target) in results])

    own = scores(texts)
    gained = {"gain": own - [psnr(*pair) for pair in pairs], "cost": own - scores(others)}
    return {name: values.round(4).tolist() for name, values in gained.items()}


def make_run(key: dict, photos: list["np.ndarray"], args) -> dict:
    """Train and measure: the run's line of results.jsonl."""
    from instruct_pix2pix.building.tasks import COMPOUNDS, TASKS

    started, folder = time.perf_counter(), args.output_dir / "runs" / "-".join(map(str, key.values()))
    names = training_tasks(**{name: key[name] for name in ("held_out", "seed")}, count=key["num_tasks"])
    train(key, names, args, folder)
    trained = time.perf_counter()
    held_out = [task for task in TASKS.values() if task.cluster == key["held_out"]]
    apart = {task.name for task in held_out}
    tasks = {
        TRAINED: [TASKS[name] for name in names],
        REWORDED: [TASKS[name] for name in names],
        HELD_OUT: held_out,
        COMPOUND: [task for task in COMPOUNDS.values() if apart.isdisjoint(task.parts)],
    }
    pipeline = editing.load_pipeline(str(folder / "model"))
    measured = {kind: measure(pipeline, kind, tasks[kind], photos, args) for kind in KINDS}
    if not args.keep:
        shutil.rmtree(folder)
    seconds = {"training": round(trained - started, 1), "editing": round(time.perf_counter() - trained, 1)}
    return key | {"tasks": names, "measured": measured, "seconds": seconds}


def values(lines: list[dict], kind: str, name: str, held_out: str | None = None) -> "np.ndarray":
    """What was measured of all images of some runs, or of those that left one cluster out."""
    import numpy as np

    chosen = [line["measured"][kind][name] for line in lines if held_out in (None, line["held_out"])]
    return np.concatenate(chosen) if chosen else np.array([])


def report(lines: list[dict], folder: Path) -> str:
    """Write table.md and plot.png of all runs -> the table."""
    from matplotlib.figure import Figure

    from instruct_pix2pix.evaluation.summary import cell, interval

    groups = defaultdict(list)
    for line in sorted(lines, key=lambda line: (line["num_tasks"] or math.inf, line["wordings"])):
        groups[str(line["num_tasks"] or "all"), str(line["wordings"])].append(line)
    clusters = dict.fromkeys(line["held_out"] for line in lines)
    tables = {
        "dB above the image itself": {kind: partial(values, kind=kind, name="gain") for kind in KINDS},
        "dB above the edit by another task's instruction": {
            kind: partial(values, kind=kind, name="cost") for kind in KINDS
        },
        "Held out, by cluster: dB above the image itself": {
            cluster: partial(values, kind=HELD_OUT, name="gain", held_out=cluster) for cluster in clusters
        },
    }
    text = f"{len(lines)} runs. Means over all their images, with 95% intervals.\n"
    for title, columns in tables.items():
        text += f"\n{title}:\n\n| tasks | wordings | {' | '.join(columns)} |\n|---:|---:|{'---|' * len(columns)}\n"
        for label, group in groups.items():
            cells = (cell(interval(of(group)), 2, "+") for of in columns.values())
            text += f"| {' | '.join((*label, *cells))} |\n"
    write_text(folder / "table.md", text)

    figure = Figure((14, 4), layout="constrained")
    for kind, plane in zip(KINDS, figure.subplots(1, len(KINDS)), strict=True):
        for wordings in dict.fromkeys(wordings for _, wordings in groups):
            found = {
                tasks: interval(values(group, kind, "gain")) for (tasks, w), group in groups.items() if w == wordings
            }
            found = {tasks: of for tasks, of in found.items() if of}
            mean = [of["mean"] for of in found.values()]
            ends = [[of["mean"] - of["low"], of["high"] - of["mean"]] for of in found.values()]
            plane.errorbar(list(found), mean, list(zip(*ends, strict=True)), fmt="o-", capsize=3, label=wordings)
        plane.axhline(0, color="black", linewidth=0.5)
        plane.set(title=kind, xlabel="tasks trained on", ylabel="dB above the image itself")
        plane.legend(title="wordings")
    with written_whole(folder / "plot.png") as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return text


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    from instruct_pix2pix.building.photos import decode_image, find_photos
    from instruct_pix2pix.building.tasks import CLUSTERS

    one_progress_bar()
    for cluster in args.held_out or ():
        if cluster not in CLUSTERS:
            raise UserError(f"--held_out: {cluster} is no cluster; give some of {', '.join(CLUSTERS)}")
    path = args.output_dir / "results.jsonl"
    args.output_dir.mkdir(parents=True, exist_ok=True)
    settings = {name: getattr(args, name) for name in SETTINGS} | {"base": str(args.base)}
    lines = read_json_lines(path)
    if any(line["settings"] != settings for line in lines):
        raise UserError(f"--output_dir: {path} is of other settings; name another folder")
    found = find_photos(args.photos / "test")
    photos = [decode_image(found.read(name)) for name in found.names]
    wanted = itertools.product(args.seeds, args.held_out or CLUSTERS, args.num_tasks, args.wordings)
    keys = [dict(zip(("seed", "held_out", "num_tasks", "wordings"), each, strict=True)) for each in wanted]
    for number, key in enumerate(keys, 1):
        if not any(key.items() <= {name: line[name] for name in key}.items() for line in lines):
            print(f"{number} of {len(keys)}: {key}", flush=True)
            lines.append(make_run(key, photos, args) | {"settings": settings})
            write_json_lines(path, lines)
    print(report(lines, args.output_dir))
    print(f"{args.output_dir}/table.md and plot.png written")


if __name__ == "__main__":
    run(main)
