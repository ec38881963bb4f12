#!/usr/bin/env python
"""Time one update of this project's training loop, stage by stage, on random weights and without a download.

    python -m benchmarks.train_step --size small          # minutes on a CPU
    python -m benchmarks.train_step --size sd15           # Stable Diffusion v1.5's shapes, for a GPU

First whole updates are timed undisturbed, then as many under PyTorch's profiler, which tells the stages (on a GPU by
the time of their kernels) and with --operators the slowest operators. The floor is what the same arithmetic (counted)
and the optimizer's bytes would take at the rates of one matrix product and one copy, measured on this device. Seconds
from launch count from the start of the process, imports included; run twice, so that the cache is there the second
time. Further flags go to the training and win over those here: --train_batch_size 1, --no-cache_latents, --no-use_ema,
--compile, --max_micro_batch_size auto, --dataset_name DATASET. Prints every figure, then one JSON line.
"""

import argparse
import shutil
import statistics
import time
from pathlib import Path

from benchmarks import machine, models
from instruct_pix2pix import cli

# AdamW with the average, each tensor touched once: gradient read twice (the norm comes first), weight, two moments and
# average read and written, in float32.
BYTES_PER_PARAMETER = 40
STAGES = ("data", "encoders and noise", "UNet forward and backward", "clip, AdamW, EMA")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--size", choices=models.SIZES, default="small", help="Shapes of the model.")
    add("--updates", type=cli.whole_number(1), default=10, help="Updates timed, and again stage by stage.")
    add("--warmup", type=cli.whole_number(1), default=3, help="Updates before the clock starts.")
    add("--operators", type=int, default=0, help="Print so many of the slowest operators.")
    add("--folder", default="outputs/benchmarks", help="Where the model and the pairs are kept.")
    args, args.further = parser.parse_known_args(argv)
    return args


def training_flags(args, folder: Path, on_gpu: bool) -> list[str]:
    flags = models.common_flags(
        models.model_folder(args.size, folder),
        models.pairs_folder(folder),
        folder / "train_step",
        cache_dir=folder,
        resolution=models.RESOLUTIONS[args.size],
        image_geometry="squash",
        train_batch_size=8,
        max_train_steps=args.warmup + 2 * args.updates + 1,
        dataloader_num_workers=0,
        mixed_precision="bf16" if on_gpu else "no",
        learning_rate=5e-5,
        report_to="none",
    )
    return [*flags, "--random_flip", "--cache_latents", *args.further]


def measured_rates(device) -> tuple[float, float]:
    """(FLOP/s of a large matrix product, bytes/s read and written by a large copy) of a device."""
    import torch
    from torch.utils.benchmark import Timer

    cuda = device.type == "cuda"
    side, dtype = (8192, torch.bfloat16) if cuda else (1024, torch.float32)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    source = torch.zeros((2**30 if cuda else 2**27) // 4, device=device)
    names = {"a": a, "b": b, "source": source, "target": torch.empty_like(source)}

    def fastest(statement: str) -> float:
        timer = Timer(statement, globals=names, num_threads=torch.get_num_threads())  # warms up and waits for the GPU
        return min(timer.timeit(1).times[0] for _ in range(5))

    return 2 * side**3 / fastest("a @ b"), 2 * source.nbytes / fastest("target.copy_(source)")


def wait(device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def profile(run, updates: int, first_step: int, operators: int) -> tuple[dict[str, float], str]:
    """Milliseconds per update of every stage, and the profiler's table of operators."""
    import torch
    from torch.profiler import ProfilerActivity, record_function

    cuda = run.accelerator.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        for step in range(first_step, first_step + updates):
            with record_function(STAGES[0]):
                window = next(run.windows)
            with record_function(STAGES[1]):
                inputs = run.make_inputs(window)
            with record_function(STAGES[2]):
                run.update.forward_backward(inputs)
            with record_function(STAGES[3]):
                run.update.clip_and_step(run.learning_rate(step))
                run.update.drop_gradients()
        wait(run.accelerator.device)
    averages = profiler.key_averages()
    total = "device_time_total" if cuda else "cpu_time_total"
    found = {event.key: getattr(event, total) / updates / 1000 for event in averages if event.key in STAGES}
    table = averages.table(sort_by=f"self_{total}", row_limit=max(1, operators))
    return {name: found[name] for name in STAGES}, table


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    import psutil
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from instruct_pix2pix.training import options, preparation
    from instruct_pix2pix.training import step as steps
    from instruct_pix2pix.training.log import set_up_logging

    folder = Path(args.folder)
    shutil.rmtree(folder / "train_step", ignore_errors=True)

    set_up_logging()
    launched = psutil.Process().create_time()
    flags = options.parse_args("", training_flags(args, folder, torch.cuda.is_available()))
    accelerator = preparation.start_accelerator(flags)
    device, cuda = accelerator.device, accelerator.device.type == "cuda"
    run = preparation.build(preparation.check(flags, accelerator, expected_in_channels=4))
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds_from_launch = {"ready": round(time.time() - launched, 1)}
    step = 0

    def update() -> None:
        nonlocal step
        step += 1
        run.update.run(run.make_inputs(next(run.windows)), run.learning_rate(step))

    def clocked(count: int) -> float:
        """Milliseconds of `count` updates; undisturbed, so that the host may run ahead of a GPU."""
        wait(device)
        start = time.perf_counter()
        for _ in range(count):
            update()
        wait(device)
        return 1000 * (time.perf_counter() - start)

    clocked(1)
    seconds_from_launch["first update"] = round(time.time() - launched, 1)
    clocked(args.warmup - 1)
    total = clocked(args.updates) / args.updates if cuda else statistics.median(clocked(1) for _ in range(args.updates))
    peak = round(torch.cuda.max_memory_reserved() / 2**30, 2) if cuda else None
    stages, table = profile(run, args.updates, step + 1, args.operators)
    # Operations are counted as they are dispatched, which a compiled update does not do.
    parts = (run.update.accelerator, accelerator.unwrap_model(run.unet), run.update.optimizer, run.ema)
    plain = steps.Update(run.config, *parts, run.update.micro_batch_size)
    with FlopCounterMode(display=False) as counted:
        plain.run(run.make_inputs(next(run.windows)), 0.0)

    parameters = sum(parameter.numel() for parameter in run.unet.parameters())
    flops_rate, bytes_rate = measured_rates(device)
    optimizer_bytes = BYTES_PER_PARAMETER * parameters
    floor = 1000 * (counted.get_total_flops() / flops_rate + optimizer_bytes / bytes_rate)
    result = {
        "size": args.size,
        "resolution": flags.resolution,
        "images_per_update": run.images_per_update,
        "micro_batch_size": run.update.micro_batch_size,
        "compiled": hasattr(run.update.model, "_orig_mod"),
        "gradient_checkpointing": flags.gradient_checkpointing,
        "mixed_precision": flags.mixed_precision,
        "cached": run.config.cache_latents,
        **machine.describe(),
        "parameters": parameters,
        "ms_per_update": round(total, 2),
        "images_per_second": round(1000 * run.images_per_update / total, 2),
        "stages_ms": {stage: round(value, 2) for stage, value in stages.items()},
        "stages_share": {stage: round(value / sum(stages.values()), 3) for stage, value in stages.items()},
        "seconds_from_launch": seconds_from_launch,
        "teraflop_per_update": round(counted.get_total_flops() / 1e12, 6),
        "measured_teraflops": round(flops_rate / 1e12, 3),
        "measured_gigabytes_per_second": round(bytes_rate / 1e9, 1),
        "floor_ms": round(floor, 2),
        "floor_share": round(floor / total, 3),
        "peak_memory_gib": peak,
    }
    if args.operators:
        print(table)
    machine.report(result)
    return result


if __name__ == "__main__":
    cli.run(main)
