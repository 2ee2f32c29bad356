"""Uploads a folder to the Hub in a process of its own, which neither slows a training down nor keeps it from ending.

`python -m reg_diffusers.upload` reads its task from stdin, which no other user can see, and tells on stdout why it
failed, if it did.
"""

from __future__ import annotations

import atexit
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

__all__ = ["Upload", "reason"]

# The client itself repeats a request that finds no server, for 23 s; an upload that fails sooner is begun anew.
_WAITS = (1, 4, 10)
_PATIENCE = 20
_SILENCE = 300  # seconds without an answer; the client would wait for ever
_PASSING = (408, 409, 412, 429)  # refusals that may be over a little later


class Upload:
    """An upload that has begun.

    Args:
        token: of the Hub; None for the stored one.
        show_progress: draw bars on stderr; else nothing is written there.
        **arguments: of `HfApi.upload_folder`, paths as strings.
    """

    def __init__(self, token: str | None, show_progress: bool, **arguments):
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            cwd=Path(__file__).parents[1],  # where this package is, even if it is not installed
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if show_progress else subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # Ctrl-C in the terminal is for the training
        )
        self._failure: str | None = None
        atexit.register(self._process.kill)
        self._process.stdin.write(json.dumps({"token": token, "arguments": arguments}))
        self._process.stdin.close()

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def wait(self) -> str:
        """Waits for the end; returns the reason of a failure, "" after a success."""
        if self._failure is None:
            told = self._process.stdout.read().strip().splitlines()
            failed = self._process.wait() != 0
            self._failure = (told[-1] if told else "cut off") if failed else ""
        return self._failure

    def stop(self) -> None:
        """Ends it, whatever it is doing."""
        self._process.kill()


def reason(error: BaseException) -> str:
    """An error of the client in one line, which holds no address that a token is part of."""
    while error.__cause__ is not None:
        error = error.__cause__
    status = _status(error)
    text = getattr(error, "server_message", None) if status else str(error)
    text = " ".join((text or "").split())[:200]
    return f"{type(error).__name__}{f' {status}' if status else ''}{f': {text}' if text else ''}"


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _tried(upload: Callable[[], None]) -> str:
    """Calls `upload`, again after a while if it fails for a reason that may pass; returns the last reason, or ""."""
    started = time.monotonic()
    for wait in (*_WAITS, None):
        try:
            upload()
        except Exception as error:
            status = _status(error) or 0
            refused = 400 <= status < 500 and status not in _PASSING
            if wait is None or refused or time.monotonic() - started > _PATIENCE:
                return reason(error)
            time.sleep(wait)
        else:
            return ""


def main() -> int:
    from huggingface_hub import HfApi
    from huggingface_hub.utils import get_session

    task = json.load(sys.stdin)
    api = HfApi(token=task["token"])

    def upload() -> None:
        get_session().timeout = _SILENCE
        api.upload_folder(**task["arguments"])

    failure = _tried(upload)
    print(failure)
    return 1 if failure else 0


if __name__ == "__main__":
    sys.exit(main())
