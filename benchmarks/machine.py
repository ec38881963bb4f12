"""What a measurement depends on besides the code."""

import datetime
import os
import platform
import subprocess
from pathlib import Path


def describe() -> dict:
    """Date, commit, hardware and versions."""
    import accelerate
    import diffusers
    import torch
    import transformers

    cuda = torch.cuda.is_available()
    return {
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "cpu": f"{_cpu_name()}, {os.cpu_count()} cores",
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
    }


def _commit() -> str | None:
    """The checkout's commit, with + where files differ from it; None outside of git."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
