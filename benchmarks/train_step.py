#!/usr/bin/env python
"""Time one update of this project's training loop, stage by stage, on random weights and without a download.

    python -m benchmarks.train_step --size small          # minutes on a CPU
    python -m benchmarks.train_step --size sd15           # Stable Diffusion v1.5's shapes, for a GPU

First whole updates are timed undisturbed, then as many with a clock around every stage; a CUDA graph is one stage, and
the optimizer's pass in it is timed by itself as well. The floor is what the same arithmetic (counted) and the
optimizer's bytes would take at the rates of one matrix product and one copy, measured on this device. Seconds from
launch count from the start of the process, imports included; run twice, so that the cache is there the second time.
Prints a table, then one JSON line.
"""

import argparse
import gc
import json
import shutil
import statistics
import time
from pathlib import Path

from benchmarks import machine

# AdamW with the average in one pass: gradient read twice (the norm comes first), weight, two moments and average read
# and written; in half precision a smaller gradient, and a copy of the weight written.
BYTES_PER_PARAMETER = {"no": 40, "fp16": 38, "bf16": 38}

ONE_PASS = "clip, AdamW, EMA, copies"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = machine.Parser(__file__, __doc__)
    what = parser.add_argument_group("what is trained")
    what.add_argument("--size", choices=("small", "sd15"), default="small", help="Shapes of the model.")
    what.add_argument("--dataset", help="Folder or Hub id of a dataset of triples; photographs of assets/ otherwise.")
    what.add_argument("--resolution", type=int, help="64 for small, 256 for sd15.")
    what.add_argument("--batch_size", type=int, default=8, help="Images per micro-batch.")
    what.add_argument("--accumulation", type=int, default=1, help="Micro-batches per update.")
    what.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), help="bf16 on a GPU, no on a CPU.")
    what.add_argument("--gradient_checkpointing", action="store_true", help="As in training.")
    what.add_argument("--max_micro_batch_size", help="As in training: a number, or auto.")
    what.add_argument("--compile", action="store_true", help="As in training: compiled, channels_last, CUDA graph.")
    what.add_argument("--no_ema", action="store_true", help="Leave the average out.")
    what.add_argument("--no_cache", action="store_true", help="Decode images and run the frozen encoders.")
    what.add_argument("--num_workers", type=int, default=0, help="Processes that load data.")
    how = parser.add_argument_group("how it is timed")
    how.add_argument("--updates", type=int, default=10, help="Updates timed, and timed again stage by stage.")
    how.add_argument("--warmup", type=int, default=3, help="Updates before the clock starts.")
    how.add_argument("--folder", default="outputs/benchmarks", help="Where the model and the pairs are kept.")
    args = parser.parse_args(argv)
    machine.require_positive(args, "batch_size", "accumulation", "updates", "warmup")
    args.resolution = args.resolution or {"small": 64, "sd15": 256}[args.size]
    return args


def training_flags(args, model: Path, data, output_dir: Path, updates: int) -> list[str]:
    flags = [
        f"--pretrained_model_name_or_path={model}",
        f"--dataset_name={data}",
        f"--output_dir={output_dir}",
        f"--cache_dir={output_dir.parent}",
        f"--resolution={args.resolution}",
        "--image_geometry=squash",
        "--random_flip",
        f"--train_batch_size={args.batch_size}",
        f"--gradient_accumulation_steps={args.accumulation}",
        f"--max_train_steps={updates}",
        f"--dataloader_num_workers={args.num_workers}",
        f"--mixed_precision={args.mixed_precision}",
        "--learning_rate=5e-5",
        "--seed=0",
        "--report_to=none",
        "--no-cache_latents" if args.no_cache else "--cache_latents",
    ]
    if args.max_micro_batch_size is not None:
        flags += [f"--max_micro_batch_size={args.max_micro_batch_size}"]
    flags += [f"--{name}" for name in ("gradient_checkpointing", "compile") if getattr(args, name)]
    return flags + ([] if args.no_ema else ["--use_ema"])


class Stages:
    """Clocks around the callables of an update; on a GPU device events, so that nothing waits."""

    def __init__(self, cuda: bool):
        self.cuda, self.spans = cuda, {}

    def now(self):
        import torch

        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def note(self, stage: str, start) -> None:
        self.spans.setdefault(stage, []).append((start, self.now()))

    def around(self, owner, name: str, stage: str) -> None:
        """Replace a callable attribute by itself with a clock around it."""
        function = getattr(owner, name)

        def timed(*args, **kwargs):
            start = self.now()
            result = function(*args, **kwargs)
            self.note(stage, start)
            return result

        setattr(owner, name, timed)

    def around_next(self, iterator, stage: str):
        """The iterator with a clock around each next()."""
        while True:
            start = self.now()
            item = next(iterator, None)
            if item is None:
                return
            self.note(stage, start)
            yield item

    def around_forward(self, model, stage: str) -> None:
        starts = []
        model.register_forward_pre_hook(lambda *_: starts.append(self.now()))
        model.register_forward_hook(lambda *_: self.note(stage, starts.pop()))

    def milliseconds(self, updates: int) -> dict[str, float]:
        """Time per update of every stage."""

        def length(start, end) -> float:
            return start.elapsed_time(end) if self.cuda else 1000 * (end - start)

        return {stage: sum(length(*span) for span in spans) / updates for stage, spans in self.spans.items()}


def measured_rates(device) -> tuple[float, float]:
    """(FLOP/s of a large matrix product, bytes/s read and written by a large copy) of a device, the best of five."""
    import torch

    cuda = device.type == "cuda"
    side, dtype = (8192, torch.bfloat16) if cuda else (1024, torch.float32)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    source = torch.zeros((2**30 if cuda else 2**27) // 4, device=device)
    target = torch.empty_like(source)

    def best(function) -> float:
        times = []
        for _ in range(6):
            wait(device)
            start = time.perf_counter()
            function()
            wait(device)
            times.append(time.perf_counter() - start)
        return min(times[1:])

    return 2 * side**3 / best(lambda: a @ b), 2 * source.nbytes / best(lambda: target.copy_(source))


def time_one_pass(one_pass, repeats: int = 20) -> float:
    """Milliseconds of clipping, AdamW, average and copies, recorded by themselves, on gradients of zeros."""
    import torch

    for leaf in one_pass.leaves:
        leaf.grad = torch.zeros_like(leaf)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        one_pass.step(recording=True)
    one_pass.finish_recording()
    graph.replay()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        graph.replay()
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / repeats
    one_pass.recorded = []
    for leaf in one_pass.leaves:
        leaf.grad = None
    return 1000 * seconds


def wait(device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    import psutil
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks import models
    from instruct_pix2pix.models import sd as components
    from instruct_pix2pix.training import options, preparation, trainer
    from instruct_pix2pix.training import step as speed

    if args.mixed_precision is None:
        args.mixed_precision = "bf16" if torch.cuda.is_available() else "no"
    folder = Path(args.folder)
    model = models.model_folder(args.size, folder)
    data = args.dataset or models.pairs_folder(folder)
    output_dir = folder / "train_step"
    shutil.rmtree(output_dir, ignore_errors=True)

    trainer._set_up_logging()
    updates = args.warmup + 2 * args.updates + 1
    launched = psutil.Process().create_time()
    flags = options.parse_args("", training_flags(args, model, data, output_dir, updates))
    accelerator = preparation.start_accelerator(flags)
    device = accelerator.device
    plan = preparation.check(flags, accelerator, expected_in_channels=4)
    training = preparation.build(flags, accelerator, plan)
    speed.settle(flags, accelerator, plan, training, trainer.forward_backward)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds_from_launch = {"ready": round(time.time() - launched, 1)}
    step = 0

    def run(count: int) -> list[float]:
        nonlocal step
        seconds = []
        for _ in range(count):
            step += 1
            start = time.perf_counter()
            trainer.update(flags, accelerator, plan, training, step)
            wait(device)
            seconds.append(time.perf_counter() - start)
        return seconds

    run(1)
    seconds_from_launch["first update"] = round(time.time() - launched, 1)
    run(args.warmup - 1)
    if device.type == "cuda":
        # Undisturbed also means that the host may run ahead.
        wait(device)
        start = time.perf_counter()
        for _ in range(args.updates):
            step += 1
            trainer.update(flags, accelerator, plan, training, step)
        wait(device)
        total = 1000 * (time.perf_counter() - start) / args.updates
    else:
        total = 1000 * statistics.median(run(args.updates))
    stages = Stages(device.type == "cuda")
    training.windows = stages.around_next(training.windows, "data")
    if training.cache is not None:
        stages.around(training.cache, "look_up", "look-up in the cache")
    stages.around(components, "tokenize", "tokenizer and text encoder")
    stages.around(components, "encode_text", "tokenizer and text encoder")
    stages.around(components, "encode_pair", "VAE")
    if training.graph is not None:
        stages.around(training.graph, "replay", "CUDA graph: UNet, AdamW, EMA")
    elif training.predict is not training.eager:
        stages.around(training, "predict", "UNet forward")
    else:
        stages.around_forward(training.eager, "UNet forward")
    if training.graph is None:
        stages.around(accelerator, "backward", "backward")
    if training.one_pass is None:
        stages.around(trainer, "clip_gradients", "clip")
        stages.around(training.optimizer, "step", "AdamW")
        if training.ema is not None:
            stages.around(training.ema, "update", "EMA")
    elif training.graph is None:
        stages.around(training.one_pass, "step", ONE_PASS)
    staged_total = 1000 * sum(run(args.updates)) / args.updates
    stage_ms = stages.milliseconds(args.updates)
    stage_ms["rest"] = staged_total - sum(stage_ms.values())
    peak = round(torch.cuda.max_memory_reserved() / 2**30, 2) if device.type == "cuda" else None
    compiled, graphed = training.predict is not training.eager, training.graph is not None
    # Operations are counted as they are dispatched. A graph's memory is given back first.
    training.graph, training.predict = None, training.eager
    if graphed:
        stage_ms[f"  in the graph: {ONE_PASS}"] = time_one_pass(training.one_pass)
        gc.collect()
        torch.cuda.empty_cache()
    with FlopCounterMode(display=False) as counted:
        run(1)

    parameters = sum(parameter.numel() for parameter in training.bare_unet.parameters())
    flops_rate, bytes_rate = measured_rates(device)
    optimizer_bytes = BYTES_PER_PARAMETER[flags.mixed_precision] * parameters
    floor = 1000 * (counted.get_total_flops() / flops_rate + optimizer_bytes / bytes_rate)
    result = {
        "size": args.size,
        "resolution": args.resolution,
        "images_per_update": plan.effective_batch,
        "micro_batch_size": training.micro_batch_size,
        "compiled": compiled,
        "one_pass_optimizer": training.one_pass is not None,
        "cuda_graph": graphed,
        "gradient_checkpointing": args.gradient_checkpointing,
        "mixed_precision": args.mixed_precision,
        "cached": training.cache is not None,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        **machine.describe(),
        "parameters": parameters,
        "ms_per_update": round(total, 2),
        "images_per_second": round(1000 * plan.effective_batch / total, 2),
        "stages_ms": {stage: round(value, 2) for stage, value in stage_ms.items()},
        "seconds_from_launch": seconds_from_launch,
        "teraflop_per_update": round(counted.get_total_flops() / 1e12, 6),
        "measured_teraflops": round(flops_rate / 1e12, 3),
        "measured_gigabytes_per_second": round(bytes_rate / 1e9, 1),
        "floor_ms": round(floor, 2),
        "peak_memory_gib": peak,
    }
    print_table(result, staged_total)
    print(json.dumps(result))
    return result


def print_table(result: dict, staged_total: float) -> None:
    print(f"\n{result['size']}, {result['resolution']} px, {result['images_per_update']} images, {result['device']}")
    for stage, value in result["stages_ms"].items():
        print(f"  {stage:50s}{value:10.2f} ms {100 * value / staged_total:6.1f} %")
    print(f"  {'sum, with the clocks':50s}{staged_total:10.2f} ms")
    total, floor = result["ms_per_update"], result["floor_ms"]
    print(f"  {'update, undisturbed':50s}{total:10.2f} ms, {result['images_per_second']} images/s")
    print(f"  {'floor of this device':50s}{floor:10.2f} ms, {100 * floor / total:.0f} % of the update")
    if result["peak_memory_gib"] is not None:
        print(f"  {'peak memory':50s}{result['peak_memory_gib']:10.2f} GiB")
    for what, seconds in result["seconds_from_launch"].items():
        print(f"  {'from launch: ' + what:50s}{seconds:10.1f} s")


if __name__ == "__main__":
    main()
