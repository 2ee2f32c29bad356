"""How settings and inputs that cannot work are told to the user."""

from __future__ import annotations

import errno
import functools
import os
import sys
import traceback

__all__ = ["UsageError", "exit_on_usage_error", "warn"]


class UsageError(ValueError):
    """A setting or input that cannot work; the message is one line that names the flag and the fix.

    Attributes:
        show_cause: whether the traceback of the error behind it helps: it lies in the user's own code.
    """

    show_cause = False


def exit_on_usage_error(main):
    """Decorates a script's `main`: a `UsageError` or a full disk becomes one line on stderr and exit status 2."""

    @functools.wraps(main)
    def guarded(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except UsageError as error:
            if os.environ.get("LOCAL_RANK", "0") == "0":  # the other processes would say the same
                if error.show_cause:
                    traceback.print_exception(error.__cause__)
                print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr)
            sys.exit(2)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            where = f" ({error.filename})" if error.filename else ""
            print(f"{os.path.basename(sys.argv[0])}: error: {error.strerror}{where}: make room", file=sys.stderr)
            sys.exit(2)

    return guarded


def warn(message: str) -> None:
    """One line on stderr, from one process of each machine."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"{os.path.basename(sys.argv[0])}: warning: {message}", file=sys.stderr, flush=True)
