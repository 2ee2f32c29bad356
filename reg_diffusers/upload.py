"""Uploads a saved run to the Hub in a process of its own, which neither slows a training nor keeps it from ending.

`python -m reg_diffusers.upload` reads its task from stdin, which no other user can see, and tells on stdout why it
failed, if it did.
"""

from __future__ import annotations

import atexit
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import get_session

from .card import write_card
from .repository import STALE, remote_card

__all__ = ["Upload", "reason"]

_WAITS = (1, 4, 10)
_PATIENCE = 20  # seconds after which a network that is down has been waited for: the client repeats a request for 23 s
_SILENCE = 300  # seconds without an answer; the client would wait for ever
_PASSING = (408, 409, 412, 429)  # refusals that may be over a little later


class Upload:
    """An upload that has begun.

    The card is written first, and keeps what the owner of the repository has written there by now.

    Args:
        folder: the pipeline, with the evidence of its training.
        repo_id: user/name.
        message: of the commit.
        ignored: patterns of paths in the folder that are not uploaded.
        license: for the card.
        token: of the Hub; None for the stored one.
        show_progress: draw bars on stderr; else nothing is written there.
    """

    def __init__(
        self,
        folder: Path,
        repo_id: str,
        message: str,
        ignored: Sequence[str],
        license: str | None = None,
        token: str | None = None,
        show_progress: bool = False,
    ):
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
        task = {"folder": str(folder.resolve()), "repo_id": repo_id, "message": message, "ignored": list(ignored)}
        self._process.stdin.write(json.dumps({**task, "license": license, "token": token}))
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
    """An error of the client in one line, without the address of the request, which may grant a right."""
    error = _root(error)
    is_answer = isinstance(error, HfHubHTTPError)
    text = error.server_message if is_answer else str(error)
    told = " ".join((text or "").split())[:200]
    status = f" {error.response.status_code}" if is_answer else ""
    return f"{type(error).__name__}{status}{f': {told}' if told else ''}"


def _root(error: BaseException) -> BaseException:
    """The answer of the Hub, or else the first error, that was the cause of an error."""
    while error.__cause__ is not None and not isinstance(error, HfHubHTTPError):
        error = error.__cause__
    return error


def _tried(upload: Callable[[], None]) -> str:
    """Calls `upload`, again after a while if it fails for a reason that may pass; returns the last reason, or ""."""
    for wait in (*_WAITS, None):
        started = time.monotonic()
        try:
            upload()
        except Exception as error:
            root = _root(error)
            if isinstance(root, HfHubHTTPError):
                status = root.response.status_code
                is_hopeless = 400 <= status < 500 and status not in _PASSING
            else:
                is_hopeless = time.monotonic() - started > _PATIENCE
            if wait is None or is_hopeless:
                return reason(error)
            time.sleep(wait)
        else:
            return ""


def main() -> int:
    task = json.load(sys.stdin)
    folder, repo_id = Path(task["folder"]), task["repo_id"]
    api = HfApi(token=task["token"])

    def upload() -> None:
        get_session().timeout = _SILENCE
        write_card(folder, repo_id, remote_card(api, repo_id), task["license"])
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            ignore_patterns=list(task["ignored"]),  # the client adds to it
            delete_patterns=list(STALE),
            commit_message=task["message"],
        )

    failure = _tried(upload)
    print(failure)
    return 1 if failure else 0


if __name__ == "__main__":
    sys.exit(main())
