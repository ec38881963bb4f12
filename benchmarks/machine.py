"""What a measurement depends on besides the code; sides that are timed in turns; how a result is printed."""

import datetime
import json
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import yaml


def describe() -> dict:
    """Date, commit, hardware and versions."""
    import torch

    from instruct_pix2pix.evidence import code_commit

    return {
        "date": datetime.date.today().isoformat(),
        "commit": code_commit(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu": f"{_cpu_name()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "diffusers", "transformers", "accelerate")},
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")  # of Linux
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def seconds_in_turns(sides: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
    """Seconds that every side took in each round. They take turns, so that a busy moment of the machine hits all alike;
    a first round warms up and does not count."""
    seconds = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, function in sides.items():
            start = time.perf_counter()
            function()
            if number > 0:
                seconds[name].append(round(time.perf_counter() - start, 4))
    return seconds


def report(result: dict) -> None:
    """Print a benchmark's result: a line for every figure, then all of it as one line of JSON."""
    print(yaml.safe_dump(result, sort_keys=False, width=1000))
    print(json.dumps(result))
