"""Runs a reader's own copy of diffusers' examples/instruct_pix2pix/train_instruct_pix2pix.py and reads its steps.

The file is not part of this project. It is loaded as it is and its main() does everything; only names that it looks up
are replaced: the accelerator's log() notes the loss and the clock of every update.
"""

import argparse
import importlib.util
import json
import sys
import time
from pathlib import Path
from unittest.mock import patch

from instruct_pix2pix import cli


def file(path: str) -> str:
    """An argparse type: a file that is there."""
    if not Path(path).is_file():
        raise argparse.ArgumentTypeError(f"{path} is not a file")
    return path


def load(path: str):
    """The reference as a module. Raises UserError where it cannot be imported."""
    spec = importlib.util.spec_from_file_location("reference_train_instruct_pix2pix", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        reason = cli.first_line(error)
        raise cli.UserError(f"--reference: {path} cannot be imported ({reason}); install what it needs") from error
    return module


def run(module, flags: list[str]) -> list[dict]:
    """Call the reference's main() with `flags`; returns one {"loss", "clock"} per update, clock in seconds."""
    updates = []

    class Accelerator(module.Accelerator):
        def log(self, values, step=None, log_kwargs=None):
            updates.append({"loss": values["train_loss"], "clock": time.perf_counter()})

    module.Accelerator = Accelerator
    with patch.object(sys, "argv", [module.__file__, *flags]):
        module.main()
    return updates


def main(argv: list[str] | None = None) -> None:
    """python -m benchmarks.reference PATH FLAG... runs the reference and prints the clock of every update."""
    path, *flags = sys.argv[1:] if argv is None else argv
    print(json.dumps([update["clock"] for update in run(load(path), flags)]))


if __name__ == "__main__":
    cli.run(main)
