#!/usr/bin/env python
"""Does instruction tuning generalise? The question of FLAN (arXiv 2109.01652, section 4.1) for image editing.

    python tools/flan.py --output_dir outputs/flan
    python tools/flan.py --held_out tint tone --num_tasks 1 0 --wordings 20 --seeds 0

Each run leaves a cluster of tasks (instruct_pix2pix/building/tasks.py) out and trains a tiny model on some tasks of the
other clusters, each in some wordings; updates and rows are the same in all runs. Then it edits held-out photos:

    trained on   by tasks that it was trained on, in their first wording
    reworded     the same in wordings that no training has
    held out     by tasks of the cluster that was left out (zero-shot)
    compound     by two tasks of the other clusters in one instruction

results.jsonl has a line for each run that has ended, and a run that is there is not made again; table.md and plot.png
are made of all of them. docs/generalisation.md says what was asked and found.
"""

import itertools
import math
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from instruct_pix2pix import editing
from instruct_pix2pix.building.generic_edits import cut_tile
from instruct_pix2pix.building.photos import decode_image, find_photos
from instruct_pix2pix.building.tasks import CLUSTERS, COMPOUNDS, TASKS, Task
from instruct_pix2pix.cli import Parser, UserError, run, whole_number
from instruct_pix2pix.evidence import code_commit
from instruct_pix2pix.files import check_folder, read_json_lines, unit_hash, write_json_lines, write_text, written_whole

RUN = "seed", "held_out", "num_tasks", "wordings"  # what tells one run of a folder from another
KINDS = TRAINED, REWORDED, HELD_OUT, COMPOUND = "trained on", "reworded", "held out", "compound"
MEASURES = {"gain": "dB above the image itself", "cost": "dB above the edit by another task's instruction"}
FIXED = "--center_crop --cache_latents --conditioning_dropout_prob=0 --guidance_scale=1 --image_guidance_scale=1"
FIXED += " --checkpointing_steps=1000 --checkpoints_total_limit=1 --resume_from_checkpoint=latest --report_to=none"
TRAINING = "--train_batch_size=32 --optimizer=muon --learning_rate=3e-3 --adam_beta2=0.99 --adam_weight_decay=1e-4"
TRAINING += " --lr_scheduler=cosine --lr_warmup_steps=30"
SAMPLING = {"steps": 4, "guidance_scale": 1.0, "image_guidance_scale": 1.0}  # see docs/sweep.md
MOST_ALIKE = 35  # dB between input and target from which on there is next to nothing to edit


def training_tasks(held_out: str, count: int, seed: int) -> list[Task]:
    """`count` tasks, 0 for all, of the other clusters. Fewer are always the first of more."""
    names = sorted(TASKS, key=lambda name: unit_hash("order", seed, name))
    return [TASKS[name] for name in names if TASKS[name].cluster != held_out][: count or None]


def train(tasks: list[Task], wordings: int, seed: int, folder: Path, args) -> None:
    """Build folder/dataset and train folder/model on it, or go on with that."""
    # fmt: off
    build = ["data_preparation/build_tasks.py", "--tasks", *(task.name for task in tasks), "--wordings", wordings,
             "--photos", args.photos / "train", "--rows", args.rows, "--tile", args.resolution, "--seed", seed,
             "--all_instructions", "--validation_fraction=0", "--test_fraction=0", "--output_dir", folder / "dataset"]
    train = ["train_instruct_pix2pix.py", f"--pretrained_model_name_or_path={args.base}",
             f"--dataset_name={folder / 'dataset'}", f"--resolution={args.resolution}", f"--seed={seed}",
             f"--max_train_steps={args.updates}", f"--output_dir={folder / 'model'}", *shlex.split(FIXED),
             *shlex.split(args.training)]
    # fmt: on
    for script, *flags in (build, train):
        if code := subprocess.call([sys.executable, script, *map(str, flags)]):
            sys.exit(code)  # it has said why


def measure(pipeline, kind: str, tasks: list[Task], photos: list[np.ndarray], args) -> dict[str, list[float]]:
    """Of `args.images` edits, the tasks in turn: by how many dB they are nearer to the target than the image itself is
    ("gain"), and than the edit by another task's instruction ("cost"). Given the tasks, the images are the same in
    every run."""
    from instruct_pix2pix.evaluation.metrics import psnr

    def say(task: Task) -> str:
        return rng.choice({TRAINED: task.wordings[:1], REWORDED: task.held_out}.get(kind, task.wordings)).item()

    def scores(instructions: tuple[str, ...]) -> np.ndarray:
        images = [Image.fromarray(source) for source, _ in pairs]
        edited = editing.edit_batch(pipeline, list(instructions), images, range(len(pairs)), **SAMPLING)
        results = zip(edited, pairs, strict=True)
        return np.array([math.nan if isinstance(e, str) else psnr(np.asarray(e), target) for e, (_, target) in results])

    pairs, texts = [], []
    for number in range(args.images):
        rng = np.random.default_rng([number, KINDS.index(kind)])
        task = tasks[number % len(tasks)]
        for _ in range(20):
            pair = task.pair(cut_tile(photos[rng.integers(len(photos))], args.resolution, rng), rng)
            if psnr(*pair) < MOST_ALIKE:
                break
        others = [other for other in (tasks if len(tasks) > 1 else TASKS.values()) if other.name != task.name]
        pairs.append(pair)
        texts.append((say(task), say(others[rng.integers(len(others))])))
    own, others = map(scores, zip(*texts, strict=True))
    gain = own - [psnr(*pair) for pair in pairs]
    return {"gain": gain.round(3).tolist(), "cost": (own - others).round(3).tolist()}


def make_run(seed: int, held_out: str, num_tasks: int, wordings: int, photos: list[np.ndarray], args) -> dict:
    """Train and measure: what results.jsonl says of a run."""
    started, tasks = time.perf_counter(), training_tasks(held_out, num_tasks, seed)
    folder = args.output_dir / "runs" / f"{held_out}-{num_tasks}-{wordings}-{seed}"
    train(tasks, wordings, seed, folder, args)
    compounds = [task for task in COMPOUNDS.values() if CLUSTERS[held_out].keys().isdisjoint(task.parts)]
    pipeline = editing.load_pipeline(str(folder / "model"))
    by_kind = zip(KINDS, (tasks, tasks, [TASKS[name] for name in CLUSTERS[held_out]], compounds), strict=True)
    measured = {kind: measure(pipeline, kind, chosen, photos, args) for kind, chosen in by_kind}
    if not args.keep:
        shutil.rmtree(folder)
    about = {"tasks": [task.name for task in tasks], "seconds": round(time.perf_counter() - started, 1)}
    about["commit"] = code_commit()
    return about | {"measured": measured}


def mean(runs: list[dict], kind: str, name: str = "gain", places: slice = slice(None)) -> dict | None:
    """Of these edits of each run, as evaluation.summary.interval has it."""
    from instruct_pix2pix.evaluation.summary import interval

    return interval(np.array([value for line in runs for value in line["measured"][kind][name][places]], float))


def report(lines: list[dict], folder: Path) -> str:
    """Write table.md and plot.png of all runs -> the table."""
    lines = sorted(lines, key=lambda line: (line["num_tasks"] or math.inf, line["wordings"], line["seed"]))
    groups = {}
    for line in lines:
        groups.setdefault((str(line["num_tasks"] or "all"), str(line["wordings"])), []).append(line)
    text = f"{len(lines)} runs: means over the images, with 95% intervals.\n" + tables(groups)
    write_text(folder / "table.md", text)
    with written_whole(folder / "plot.png") as temporary:
        draw(groups, temporary)
    return text


def tables(groups: dict[tuple[str, str], list[dict]]) -> str:
    """Each measure by tasks, wordings and seed; then the last group's by what was left out, task by task."""
    from instruct_pix2pix.evaluation.summary import cell

    def row(*values: str) -> str:
        return f"| {' | '.join(values)} |\n"

    by_seed = {}
    for label, runs in groups.items():
        for line in runs:
            by_seed.setdefault((*label, str(line["seed"])), []).append(line)
    by_seed |= {(*label, "all"): runs for label, runs in groups.items() if runs[0]["seed"] != runs[-1]["seed"]}
    text = ""
    for name, title in MEASURES.items():
        text += f"\n{title}:\n\n{row('tasks', 'wordings', 'seed', *KINDS)}|---:|---:|---:|{'---|' * len(KINDS)}\n"
        for label, runs in by_seed.items():
            text += row(*label, *(cell(mean(runs, kind, name), 2, "+") for kind in KINDS))
    (tasks, wordings), runs = list(groups.items())[-1]
    text += f"\nBy what was left out, {tasks} tasks, {wordings} wordings, all seeds:\n\n"
    text += row("left out", "edits", *MEASURES.values()) + "|---|---|---|---|\n"
    for cluster, members in CLUSTERS.items():
        without = [line for line in runs if line["held_out"] == cluster]
        shown = {task: (HELD_OUT, slice(place, None, len(members))) for place, task in enumerate(members)}
        shown |= {"all of these": (HELD_OUT, slice(None)), "compounds of others": (COMPOUND, slice(None))}
        for edits, (kind, places) in shown.items():
            text += row(cluster, edits, *(cell(mean(without, kind, name, places), 2, "+") for name in MEASURES))
    return text


def draw(groups: dict[tuple[str, str], list[dict]], path: Path) -> None:
    """A plot of each kind of edit over the number of tasks, a line for each number of wordings."""
    from matplotlib.figure import Figure

    figure = Figure((14, 4), layout="constrained")
    counts, amounts = (list(dict.fromkeys(each)) for each in zip(*groups, strict=True))
    for kind, plane in zip(KINDS, figure.subplots(1, len(KINDS), sharey=True), strict=True):
        plane.axhline(0, color="gray", linewidth=1)
        for shift, amount in enumerate(sorted(amounts, key=int)):
            found = {tasks: mean(runs, kind) for (tasks, of), runs in groups.items() if of == amount}
            ends = [[(of or {}).get(end) for end in ("mean", "low", "high")] for of in found.values()]
            middle, low, high = np.array(ends, float).T  # not a number where no edit became a picture
            places = [counts.index(tasks) + 0.08 * shift for tasks in found]
            plane.errorbar(places, middle, [middle - low, high - middle], fmt="o-", capsize=3, label=amount)
        plane.set(title=kind, xlabel="tasks trained on", xticks=range(len(counts)), xticklabels=counts)
        plane.margins(x=0.15)
    figure.axes[0].set(ylabel=MEASURES["gain"])
    plane.legend(title="wordings of each")
    figure.savefig(path, format="png", dpi=120)


def main(argv: list[str] | None = None) -> None:
    # fmt: off
    parser = Parser(__doc__)
    add = parser.add_argument_group("runs", "Every combination of these.").add_argument
    add("--held_out", nargs="+", choices=CLUSTERS, default=list(CLUSTERS), metavar="CLUSTER", help="what is left out")
    add("--num_tasks", nargs="+", type=whole_number(0), default=[1, 4, 12, 0], metavar="N",
        help="tasks to train on; 0: all of the other clusters")
    add("--wordings", nargs="+", type=whole_number(1), default=[1, 5, 20], metavar="N", help="wordings of each task")
    add("--seeds", nargs="+", type=whole_number(0), default=[0, 1, 2], metavar="N", help="of tasks, data and training")
    add = parser.add_argument_group("each run").add_argument
    add("--updates", type=whole_number(1), default=1600, help="updates of training")
    add("--rows", type=whole_number(1), default=4000, help="pairs to train on, of all tasks together")
    add("--resolution", type=whole_number(16), default=32, help="side of all images in pixels, a multiple of 16")
    add("--images", type=whole_number(2), default=96, help="edits of each kind to measure")
    add("--training", default=TRAINING, metavar="FLAGS", help="further flags of train_instruct_pix2pix.py, in one word")
    add("--base", default="assets/tiny-stable-diffusion", metavar="FOLDER_OR_ID", help="the model to train")
    add("--photos", type=Path, default=Path("assets/photos"), metavar="DIR",
        help="its child train is trained on, its child test edited")
    add("--output_dir", type=Path, default=Path("outputs/flan"), help="where results go")
    add("--keep", action="store_true", help="keep each run's dataset and model in OUTPUT_DIR/runs")
    # fmt: on
    args = parser.parse_args(argv)
    check_folder("--output_dir", args.output_dir)
    found = find_photos(args.photos / "test")
    photos = [decode_image(found.read(name)) for name in found.names]
    chosen = {"held_out", "num_tasks", "wordings", "seeds", "output_dir", "keep"}  # all else is alike in all runs
    settings = {name: str(value) for name, value in vars(args).items() if name not in chosen}
    args.output_dir.mkdir(parents=True, exist_ok=True)
    path = args.output_dir / "results.jsonl"
    lines = read_json_lines(path)
    if any(line["settings"] != settings for line in lines):
        raise UserError(f"--output_dir: {path} is of other settings; name another folder")
    wanted = list(itertools.product(args.seeds, args.held_out, args.num_tasks, args.wordings))
    for number, values in enumerate(wanted, 1):
        key = dict(zip(RUN, values, strict=True))
        if any(values == tuple(line[name] for name in RUN) for line in lines):
            continue
        print(f"run {number} of {len(wanted)}: {key}", flush=True)
        lines.append(key | make_run(**key, photos=photos, args=args) | {"settings": settings})
        write_json_lines(path, lines)
    print(report(lines, args.output_dir), f"{args.output_dir}/table.md and plot.png written", sep="\n")


if __name__ == "__main__":
    run(main)
