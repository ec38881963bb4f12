"""One way of saying that the user got something wrong."""

import os
import sys


class UserError(Exception):
    """Something the user can put right, said in one line: flag or file, value, remedy."""


class RowError(UserError):
    """A row of the dataset that cannot be used. Every process may meet its own, so every process says it."""


def run(main, argv=None) -> None:
    """Call `main(argv)`; what a user can do something about becomes one line on stderr.

    Exit codes: 2 for a UserError, 1 when memory ran out, 130 when interrupted. In a multi-process launch every rank
    meets the same mistake, so only rank 0 says it (a RowError excepted).
    """
    try:
        main(argv)
    except UserError as error:
        _say(f"error: {error}", everywhere=isinstance(error, RowError))
        sys.exit(2)
    except KeyboardInterrupt:
        _say("stopped; the same command with --resume_from_checkpoint latest goes on from the last checkpoint")
        sys.exit(130)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's; not imported here for its weight
            raise
        _say(
            "error: out of memory; lower --train_batch_size (and raise --gradient_accumulation_steps by as much), add"
            " --gradient_checkpointing, --offload_ema or --use_8bit_adam, or lower --resolution",
            everywhere=True,
        )
        sys.exit(1)


def _say(message: str, everywhere: bool = False) -> None:
    if everywhere or os.environ.get("RANK", "0") == "0":
        print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr)
