"""How settings and inputs that cannot work are told to the user."""

from __future__ import annotations

import errno
import functools
import os
import sys
import traceback

__all__ = ["DataError", "UsageError", "exit_on_usage_error", "warn"]


class UsageError(ValueError):
    """A setting or input that cannot work; the message is one line that names the flag and the fix.

    Attributes:
        show_cause: whether the traceback of the error behind it helps: it lies in the user's own code.
    """

    show_cause = False


class DataError(UsageError):
    """Something in the data that one process may meet alone, in the middle of a run."""


def exit_on_usage_error(main):
    """Decorates a script's `main`: a `UsageError` or a full disk becomes one line on stderr and exit status 2."""

    @functools.wraps(main)
    def guarded(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except UsageError as error:
            # The other processes would say the same, unless it is about data that only one has seen.
            if os.environ.get("LOCAL_RANK", "0") == "0" or isinstance(error, DataError):
                if error.show_cause:
                    traceback.print_exception(error.__cause__)
                print(f"{os.path.basename(sys.argv[0])}: error: {_line(error)}", file=sys.stderr)
            sys.exit(2)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            where = f" ({error.filename})" if error.filename else ""
            print(f"{os.path.basename(sys.argv[0])}: error: {error.strerror}{where}: make room", file=sys.stderr)
            sys.exit(2)

    return guarded


def _line(error: UsageError) -> str:
    """The message; of an error in a worker of a DataLoader the last line, because its traceback comes with it."""
    lines = str(error).strip().splitlines() or [""]
    return lines[-1].removeprefix(f"{type(error).__module__}.{type(error).__qualname__}: ")


def warn(message: str) -> None:
    """One line on stderr, from one process of each machine."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"{os.path.basename(sys.argv[0])}: warning: {message}", file=sys.stderr, flush=True)
