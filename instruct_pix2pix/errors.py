"""One way of saying that the user got something wrong."""

import os
import sys


class UserError(Exception):
    """Something the user can put right, said in one line: flag or file, value, remedy."""


class RowError(UserError):
    """A row of the dataset that cannot be used. Every process may meet its own, so every process says it."""


def run(main, argv=None) -> None:
    """Call `main(argv)`; a UserError becomes one line on stderr and exit code 2.

    In a multi-process launch every rank meets the same mistake, so only rank 0 says it (a RowError excepted).
    """
    try:
        main(argv)
    except UserError as error:
        if isinstance(error, RowError) or os.environ.get("RANK", "0") == "0":
            print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr)
        sys.exit(2)
