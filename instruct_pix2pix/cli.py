"""The command line of every script: one parser, and one way of saying that the user got something wrong.

Imports nothing heavy, so that `--help` and a wrong flag answer at once.
"""

import argparse
import difflib
import errno
import math
import os
import re
import shutil
import sys
import traceback
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can put right, said in one line: flag or file, value, remedy."""

    exit_code = 2
    everywhere = False  # whether every process says its own, instead of the main one for all


class RowError(UserError):
    """A row of the dataset that cannot be used."""

    everywhere = True


class MemoryShortage(UserError):
    """A GPU that is too small for the flags."""

    everywhere = True


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults behind every flag, the docstring's lines as they stand."""

    def _get_help_string(self, action: argparse.Action) -> str:
        # A flag without a default says in its own words what leaving it out means.
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose mistakes are UserErrors; `description` is the script's docstring."""

    def __init__(self, description: str, **options):
        options = {"formatter_class": _HelpFormatter, "allow_abbrev": False} | options
        super().__init__(description=description, **options)

    def error(self, message: str):
        message = message.removeprefix("argument ")
        message = re.sub(r"^the following arguments are required: (.*)", r"\1: missing", message)
        message = re.sub(r"^unrecognized arguments: (.*)", r"\1: not understood", message)
        raise UserError(f"{message}; see --help")


def whole_number(least: int):
    """An argparse type: an integer of at least `least`."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is too small; give {least} or more")
        return value

    return convert


def above_zero(text: str) -> float:
    """An argparse type: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"{text} is out of range; give a number above 0")
    return value


def guidance(text: str) -> float:
    """An argparse type: a guidance scale, a finite number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not math.isfinite(value) or value < 0:
        raise argparse.ArgumentTypeError(f"{text} is not a guidance scale; give a number of at least 0")
    return value


def run(main, argv: list[str] | None = None, stopped: str = "the same command goes on from here") -> None:
    """Call `main(argv)`; what a user can do something about becomes one line on stderr.

    Exit codes: 2 for a UserError (unless it says otherwise), 130 when interrupted, 1 for a disk that takes
    no more, a file without the right to it, and for what nobody foresaw. In a multi-process launch every rank meets the
    same mistake, so only rank 0 says it, unless the error says otherwise. `stopped` tells how to go on after an
    interrupt.
    """
    try:
        main(argv)
    except UserError as error:
        _say(f"error: {error}", error.everywhere)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        _say(f"stopped; {stopped}")
        sys.exit(130)
    except OSError as error:
        where = error.filename or "--output_dir"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            remedy = f"{_room(where)}what is finished is kept: make room and run it again"
        elif error.filename and error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            remedy = "what is finished is kept: change the rights or name another place"
        else:
            traceback.print_exc()
            sys.exit(1)
        _say(f"error: {where}: {os.strerror(error.errno)}; {remedy}", True)
        sys.exit(1)
    except Exception:
        # Left to the interpreter, the error would keep what it passed through alive: loader processes, which leave
        # signals to the trainer and would be waited for without end.
        traceback.print_exc()
        sys.exit(1)


def nearest(name: str, known: Iterable[str]) -> str:
    """Of the known names the one that a mistaken `name` is most like."""
    return difflib.get_close_matches(name, known, n=1, cutoff=0)[0]


def _room(path: str) -> str:
    try:
        return f"{shutil.disk_usage(os.path.dirname(os.path.abspath(path))).free / 1e6:,.1f} MB are free there; "
    except OSError:
        return ""


def warn(message: str) -> None:
    _say(f"warning: {message}")


def _say(message: str, everywhere: bool = False) -> None:
    if everywhere or os.environ.get("RANK", "0") == "0":
        print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr)


def first_line(error: BaseException) -> str:
    """The first line of an error's text that says something, or its type; for use inside a one-line message."""
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200]


def one_progress_bar() -> None:
    """Ours; those of the libraries go."""
    import datasets
    import diffusers
    import transformers

    datasets.disable_progress_bars()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
