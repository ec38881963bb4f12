"""Kill real work at random moments, run the same command again, compare what it made with an uninterrupted run.

    python tests/soak.py --kills 50 --seed 1 --work_dir outputs/soak

Works through JOBS in turn until so many kills were dealt, SIGKILL and SIGTERM alternately. A job is killed, run again
and killed again, at most three times, and then left to end; the moment of each kill is drawn uniformly over the time
that the uninterrupted run took. Every run is the script itself, in a process forked from this one, which has imported
the libraries already: an import writes nothing, and without it a run starts at once. Ends with a table, and with exit
code 1 where a byte differs.
"""

import multiprocessing
import os
import random
import re
import runpy
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # what the jobs need is here
os.environ.setdefault("OMP_NUM_THREADS", "1")  # equal bytes need equal sums

from instruct_pix2pix.cli import Parser, UserError, run, whole_number
from instruct_pix2pix.files import check_folder

ROOT = Path(__file__).parent.parent
PATIENCE = 600  # seconds after which a run that does not end counts as hanging
SIGNALS = (signal.SIGKILL, signal.SIGTERM)

# The only differences that are allowed: how long something took. Everything else in these files is compared.
TIMES = {
    "training_log.jsonl": r'"(images_per_second|memory_gib)": [\d.]+',  # of ten updates
    "training_summary.json": r'"train_seconds": [\d.]+',
    "README.md": r"train seconds [\d.]+",  # the same, on the model card
    # Evaluation's, and the model's.
    "edits.jsonl": r'"seconds": [\d.]+',
    "metrics.json": r'"edit_seconds_per_image": \{[^}]*\}|"train_seconds": [\d.]+',
    "report.html": r"(edit_seconds_per_image|train_seconds)</bdi></dt><dd><bdi>[\d.]+",
}


@dataclass(frozen=True)
class Job:
    """A command, run in a folder of its own inside the working folder; what it makes is that folder's out/."""

    name: str
    script: str
    flags: str
    start: str | None = None  # the job whose finished out/ is there at the start


TRAIN = (
    f"--pretrained_model_name_or_path={ROOT}/assets/tiny-instruct-pix2pix --resolution=64 --train_batch_size=1"
    " --gradient_accumulation_steps=2 --learning_rate=1e-3 --lr_scheduler=cosine --lr_warmup_steps=5 --random_flip"
    " --use_ema --seed=7 --report_to=none --checkpointing_steps=4 --checkpoints_total_limit=1"
    " --resume_from_checkpoint=latest --output_dir=out"
)
PHOTOS = f"--photos {ROOT}/assets/photos --max_short_side 72 --rows_per_shard 25 --output_dir out"
EDITING = "--guidance_scale 3 --image_guidance_scale 1.5 --seed 1"
JOBS = [
    Job("cartoons", "data_preparation/build_cartoonization.py", f"{PHOTOS} --max_num_samples 50 --cartoonizer opencv"),
    Job("low level", "data_preparation/build_low_level.py", f"{PHOTOS} --synthesize 150 --all_instructions"),
    Job(
        "training",
        "finetune_instruct_pix2pix.py",
        f"{TRAIN} --dataset_name=../../cartoons/whole/out --max_train_steps=16 --dataloader_num_workers=1"
        f" --val_image_url={ROOT}/assets/photos/test/sea6.webp --validation_steps=8 --num_validation_images=1"
        " --validation_prompt=cartoonize --guidance_scale=1 --image_guidance_scale=1"
        " --validation_dataset=../../cartoons/whole/out --validation_split=test --keep_best=psnr",
    ),
    Job(
        "latent cache",
        "finetune_instruct_pix2pix.py",
        f"{TRAIN} --dataset_name=../../low_level/whole/out --resolution=32 --max_train_steps=6 --cache_latents"
        " --cached_crops=1",
    ),
    Job(
        "streaming",
        "finetune_instruct_pix2pix.py",
        f"{TRAIN} --dataset_name=../../low_level/whole/out --resolution=32 --max_train_steps=16 --streaming"
        " --dataloader_num_workers=2",
    ),
    Job(
        "export",
        "finetune_instruct_pix2pix.py",
        f"{TRAIN} --dataset_name=../../cartoons/whole/out --max_train_steps=16",
        start="training",
    ),
    Job(
        "evaluation",
        "evaluation/evaluate.py",
        f"--model ../../training/whole/out opencv --dataset ../../cartoons/whole/out --split test --resolution 64"
        f" --num_inference_steps 3 --batch_size 4 {EDITING} --output_dir out",
    ),
    Job(
        "edited folder",
        "inference/edit_images.py",
        f"{ROOT}/assets/photos/test/[f]*.webp --instruction cartoonize --model_id ../../training/whole/out"
        f" --resolution 64 --steps 3 --batch_size 4 {EDITING} --output_dir out",
    ),
]


@dataclass
class Outcome:
    """What came of one job: a line of the table."""

    seconds: float = 0  # of the uninterrupted run
    kills: dict[int, int] = field(default_factory=lambda: dict.fromkeys(SIGNALS, 0))
    resumed: int = 0
    files: int = 0
    differing: int = 0


def import_libraries() -> None:
    """What the scripts import, once for all runs."""
    import diffusers
    import skimage.metrics  # noqa: F401
    import transformers
    from torch.utils.tensorboard import SummaryWriter  # noqa: F401

    import instruct_pix2pix.building.cartoonization
    import instruct_pix2pix.building.low_level
    import instruct_pix2pix.edit_folder
    import instruct_pix2pix.evaluation.report
    import instruct_pix2pix.evaluation.summary
    import instruct_pix2pix.training.trainer  # noqa: F401

    # Both libraries import a class when it is first asked for.
    _ = diffusers.StableDiffusionInstructPix2PixPipeline, diffusers.UNet2DConditionModel, diffusers.AutoencoderKL
    _ = diffusers.DDPMScheduler, transformers.CLIPTextModel, transformers.CLIPTokenizer


def run_job(job: Job, folder: Path) -> None:
    """In a process of its own: the script as `python SCRIPT FLAGS` runs it, in `folder`, its words in log.txt."""
    import datasets

    os.chdir(folder)
    log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    datasets.config.HF_DATASETS_CACHE = str(folder / "datasets")  # killed and resumed too
    sys.argv = [str(ROOT / job.script), *job.flags.split()]
    sys.path[0] = str((ROOT / job.script).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


def start(job: Job, folder: Path) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=run_job, args=(job, folder))
    process.start()
    return process


def check_end(job: Job, folder: Path, process: multiprocessing.Process, allowed: tuple[int, ...]) -> None:
    """Wait for the end. Raises UserError where a run hangs, or ends with another exit code than is `allowed`."""
    process.join(PATIENCE)
    if process.is_alive():
        process.kill()
        raise UserError(f"{job.name}: hangs after {PATIENCE} seconds; see {folder}/log.txt")
    if process.exitcode not in allowed:
        raise UserError(f"{job.name}: ended with {process.exitcode}; see {folder}/log.txt")


def prepare(work_dir: Path, job: Job, name: str) -> Path:
    """A folder for one chain of runs of a job."""
    folder = work_dir / job.name.replace(" ", "_") / name
    folder.mkdir(parents=True)
    if job.start:
        shutil.copytree(work_dir / job.start / "whole/out", folder / "out")
    return folder


def without_times(path: Path) -> bytes:
    content = path.read_bytes()
    return re.sub(TIMES[path.name].encode(), b"", content) if path.name in TIMES else content


def differing_bytes(first: Path, second: Path) -> Iterator[tuple[str, int]]:
    """(file, how many of its bytes differ, length included) for every file below two folders, hidden ones too."""
    names = {path.relative_to(side).as_posix() for side in (first, second) for path in side.rglob("*")}
    for name in sorted(names):
        paths = first / name, second / name
        if paths[0].is_dir() and paths[1].is_dir():
            continue
        one, other = (without_times(path) if path.is_file() else b"" for path in paths)
        count = 0
        if one != other:
            count = sum(a != b for a, b in zip(one, other, strict=False)) + abs(len(one) - len(other))
        yield name, count or int(paths[0].exists() != paths[1].exists())


def kill_until_it_ends(job: Job, folder: Path, outcome: Outcome, most: int, rng: random.Random, number: int) -> int:
    """One chain of runs: at most `most` kills, then to the end. Returns how many kills were dealt in all so far,
    `number` of them before."""
    killed = 0
    while True:
        process = start(job, folder)
        outcome.resumed += killed > 0
        if killed < most:
            process.join(rng.uniform(0, outcome.seconds))
        if killed == most or not process.is_alive():
            check_end(job, folder, process, (0,))
            return number
        sent = SIGNALS[number % 2]
        os.kill(process.pid, sent)
        # 130: training finishes its update first. 0: it was at its very end.
        check_end(job, folder, process, (-sent, 0) if sent == signal.SIGKILL else (-sent, 130, 0))
        if process.exitcode == 0:
            return number
        outcome.kills[sent] += 1
        killed, number = killed + 1, number + 1


def soak(work_dir: Path, kills: int, seed: int) -> dict[str, Outcome]:
    """All jobs uninterrupted, then `kills` kills; returns what came of each job. Says every difference."""
    rng, outcomes = random.Random(seed), {}
    for job in JOBS:
        started, folder = time.monotonic(), prepare(work_dir, job, "whole")
        check_end(job, folder, start(job, folder), (0,))
        outcomes[job.name] = Outcome(seconds=time.monotonic() - started)
        print(f"{job.name}: {outcomes[job.name].seconds:.1f} s uninterrupted", flush=True)
    number, turn = 0, 0
    while number < kills:
        job = JOBS[turn % len(JOBS)]
        outcome, folder = outcomes[job.name], prepare(work_dir, job, f"killed-{turn}")
        before, most = number, min(3, -(-kills // len(JOBS)), kills - number)
        number = kill_until_it_ends(job, folder, outcome, most, rng, number)
        for name, count in differing_bytes(folder.parent / "whole/out", folder / "out"):
            outcome.files, outcome.differing = outcome.files + 1, outcome.differing + count
            if count:
                print(f"{job.name}: {folder}/out/{name}: {count} bytes differ", flush=True)
        print(f"{job.name}: killed {number - before} times, {number} of {kills} kills", flush=True)
        turn += 1
    return outcomes


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--kills", type=whole_number(1), default=50, help="how many kills in all")
    parser.add_argument("--seed", type=whole_number(0), help="decides the moments; drawn and printed when left out")
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/soak"), help="a new folder for all that is made")
    args = parser.parse_args(argv)
    check_folder("--work_dir", args.work_dir)
    if args.work_dir.exists():
        raise UserError(f"--work_dir: {args.work_dir} exists already; remove it or name another folder")
    seed = random.randrange(2**32) if args.seed is None else args.seed
    print(f"seed {seed}", flush=True)
    import_libraries()
    outcomes = soak(args.work_dir.resolve(), args.kills, seed)

    print("\n| job | kills (SIGKILL / SIGTERM) | runs that resumed | files compared | bytes that differ |")
    print("|---|---:|---:|---:|---:|")
    for name, outcome in outcomes.items():
        kills = f"{outcome.kills[signal.SIGKILL]} / {outcome.kills[signal.SIGTERM]}"
        print(f"| {name} | {kills} | {outcome.resumed} | {outcome.files} | {outcome.differing} |")
    if any(outcome.differing for outcome in outcomes.values()):
        sys.exit(1)


if __name__ == "__main__":
    run(main, stopped="what was made is in --work_dir")
