"""The command line of every script: one parser, and one way of saying that the user got something wrong.

Imports nothing heavy, so that `--help` and a wrong flag answer at once.
"""

import argparse
import difflib
import errno
import itertools
import math
import os
import re
import shutil
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path


class UserError(Exception):
    """Something the user can put right, said in one line: flag or file, value, remedy."""

    exit_code = 2
    everywhere = False  # whether every process says its own, instead of the main one for all


class RowError(UserError):
    """A row of the dataset that cannot be used."""

    everywhere = True


class SourceLost(UserError):
    """A dataset that cannot be read any more: its server fails, or its files have changed."""

    everywhere = True


class MemoryShortage(UserError):
    """A GPU that is too small for the flags."""

    everywhere = True


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults behind every flag, the docstring's lines as they stand."""

    def _get_help_string(self, action: argparse.Action) -> str:
        # A flag without a default says in its own words what leaving it out means.
        return action.help if action.default is None else super()._get_help_string(action)


class _ReadBefore(argparse.Action):
    """--config, whose file `Parser` has read by the time that argparse comes to it; it leaves nothing behind."""

    def __call__(self, *_):
        pass


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose mistakes are UserErrors; `description` is the script's docstring.

    Every script takes --config FILE: flags by their names, as if they stood in front of those of the command line.
    """

    def __init__(self, description: str, **options):
        options = {"formatter_class": _HelpFormatter, "allow_abbrev": False} | options
        super().__init__(description=description, **options)
        self.add_argument(
            "--config",
            action=_ReadBefore,
            default=argparse.SUPPRESS,
            metavar="FILE",
            help="YAML or JSON of flags by their names without dashes; what the command line says wins.",
        )

    def parse_known_args(self, args=None, namespace=None):
        args = list(sys.argv[1:] if args is None else args)
        words = []
        for word, after in itertools.pairwise([*args, ""]):
            path = after if word == "--config" else word.removeprefix("--config=") if "--config=" in word[:9] else ""
            # The last word ends a flag of several values, which would take positional ones for its own.
            words += [*self._words(path), f"--config={path}"] if path else []
        return super().parse_known_args(words + args, namespace)

    def _words(self, path: str) -> list[str]:
        """What a file says as words of a command line, each value checked by the rules of its flag."""
        import yaml  # JSON is YAML

        try:
            root = yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise UserError(f"--config: {path} cannot be read ({' '.join(str(error).split())})") from error
        if not isinstance(root, yaml.MappingNode):
            raise UserError(f"--config: {path} holds no flags; write one a line, such as `resolution: 256`")
        given = {str(name.value): node for name, node in root.value}
        if isinstance(given.get("flags"), yaml.MappingNode):  # what --dry_run prints, or a checkpoint's state.json
            given = {str(name.value): node for name, node in given["flags"].value}
        known = {a.option_strings[0].removeprefix("--"): a for a in self._actions if a.option_strings}
        known = {name: a for name, a in known.items() if a.dest not in ("help", "config")}
        words = []
        for name, node in given.items():
            if name not in known:
                raise UserError(f"{path}: {name}: no such flag; the nearest is {nearest(name, known)}")
            try:
                words += self._words_of_flag(known[name], node)
            except argparse.ArgumentError as error:
                raise UserError(f"{path}: {name}: {error.message}") from error
        return words

    def _words_of_flag(self, action: argparse.Action, node) -> list[str]:
        """`node` is of YAML's tree, which has values as they are written: `no` may be a word, and 1e-4 is a number."""
        several = node.id == "sequence"
        values = [value.value for value in node.value] if several else [node.value]
        if not all(isinstance(value, str) for value in values):
            raise argparse.ArgumentError(action, "takes no mapping and no list of lists")
        if node.tag.endswith(":null"):
            return []  # a flag that is left out
        is_switch = node.tag.endswith(":bool")
        if action.nargs == 0 or (action.nargs == "?" and is_switch):
            if not is_switch:
                raise argparse.ArgumentError(action, "is a switch; give true or false")
            on = node.value.lower() in ("true", "yes", "on")
            return [flag for flag in action.option_strings if flag.startswith("--no-") != on]
        if action.nargs is None and len(values) != 1:
            raise argparse.ArgumentError(action, f"takes one value, not {len(values)}")
        self._get_values(action, list(values))
        flag = action.option_strings[0]
        return [flag, *values] if several and len(values) != 1 else [f"{flag}={values[0]}"]

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
    return _number(text, lambda value: value > 0, "is out of range; give a number above 0")


def guidance(text: str) -> float:
    """An argparse type: a guidance scale, a finite number of at least 0."""
    return _number(text, lambda value: value >= 0, "is not a guidance scale; give a number of at least 0")


def _number(text: str, fits: Callable[[float], bool], problem: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not (math.isfinite(value) and fits(value)):
        raise argparse.ArgumentTypeError(f"{text} {problem}")
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
