"""Reports invalid settings and inputs in one line that names the flag and the fix."""

from __future__ import annotations

import errno
import functools
import os
import sys
import traceback

from .messages import warn

__all__ = ["DataError", "UsageError", "exit_on_usage_error", "warn"]


class UsageError(ValueError):
    """Raised for a setting or input that cannot work; the message is one line with the flag and the fix.

    Attributes:
        show_cause: whether to print the traceback of its cause, which lies in the user's own code.
    """

    show_cause = False


class DataError(UsageError):
    """Raised for an error in the data, which a single process may encounter in the middle of a run."""


def exit_on_usage_error(main):
    """Decorates a script's `main`: a `UsageError`, full memory or a full disk becomes one line and exit status 2."""

    @functools.wraps(main)
    def guarded(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except UsageError as error:
            # All processes raise the same error, except for data that only one of them reads.
            if os.environ.get("LOCAL_RANK", "0") == "0" or isinstance(error, DataError):
                if error.show_cause:
                    traceback.print_exception(error.__cause__)
                print(f"{os.path.basename(sys.argv[0])}: error: {_line(error)}", file=sys.stderr)
            sys.exit(2)
        except MemoryError as error:
            needed = f" ({error})" if str(error) else ""
            print(
                f"{os.path.basename(sys.argv[0])}: error: not enough memory{needed}: use smaller or fewer images, or"
                " smaller batches",
                file=sys.stderr,
            )
            sys.exit(2)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            where = f" ({error.filename})" if error.filename else ""
            print(f"{os.path.basename(sys.argv[0])}: error: {error.strerror}{where}: free space", file=sys.stderr)
            sys.exit(2)

    return guarded


def _line(error: UsageError) -> str:
    """Returns the message; for an error in a DataLoader worker its last line, which follows the traceback."""
    lines = str(error).strip().splitlines() or [""]
    return lines[-1].removeprefix(f"{type(error).__module__}.{type(error).__qualname__}: ")
