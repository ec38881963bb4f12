"""What a measurement depends on besides the code; sides that are timed in turns; how a result is printed."""

import datetime
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path


def describe() -> dict:
    """Date, commit, hardware and versions."""
    import torch

    return {
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu": f"{_cpu_name()}, {os.cpu_count()} cores",
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "diffusers", "transformers", "accelerate")},
    }


def _commit() -> str | None:
    """The checkout's commit, with + where files differ from it; None outside of git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


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

    def lines(figures: dict, indent: str) -> None:
        for name, value in figures.items():
            if isinstance(value, dict):
                print(indent + name)
                lines(value, indent + "  ")
            else:
                print(f"{indent + name:40s} {value}")

    lines(result, "")
    print(json.dumps(result))
