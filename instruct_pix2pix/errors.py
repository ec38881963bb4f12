"""One way of saying that the user got something wrong."""

import os
import sys
import traceback


class UserError(Exception):
    """Something the user can put right, said in one line: flag or file, value, remedy."""

    everywhere = False  # whether every process says its own, instead of the main one for all


class RowError(UserError):
    """A row of the dataset that cannot be used."""

    everywhere = True


class MemoryShortage(UserError):
    """A GPU that is too small for the flags."""

    everywhere = True


def run(main, argv=None) -> None:
    """Call `main(argv)`; what a user can do something about becomes one line on stderr.

    Exit codes: 2 for a UserError, 130 when interrupted, 1 for what nobody foresaw. In a multi-process launch every rank
    meets the same mistake, so only rank 0 says it, unless the error says otherwise.
    """
    try:
        main(argv)
    except UserError as error:
        _say(f"error: {error}", error.everywhere)
        sys.exit(2)
    except KeyboardInterrupt:
        _say("stopped; the same command with --resume_from_checkpoint latest goes on from the last checkpoint there is")
        sys.exit(130)
    except Exception:
        # Left to the interpreter, the error would keep what it passed through alive: loader processes, which leave
        # signals to the trainer and would be waited for without end.
        traceback.print_exc()
        sys.exit(1)


def _say(message: str, everywhere: bool = False) -> None:
    if everywhere or os.environ.get("RANK", "0") == "0":
        print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr)
