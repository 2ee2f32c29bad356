"""Uploads a saved run to the Hub in a separate process, which neither slows a training nor delays its end.

`python -m reg_diffusers.hub.background_upload` reads its task from stdin, which other users cannot see, and prints the
reason of a failure to stdout.
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

from ..runtime.links import check_links
from .lora_card import write_card_of_run
from .repository import STALE, remote_card

__all__ = ["Upload", "reason"]

_WAITS = (1, 4, 10)
_PATIENCE = 20  # seconds after which a dead network needs no new try: the client itself retries for 23 s
_SILENCE = 300  # seconds without an answer; the client would wait forever
_PASSING = (408, 409, 412, 429)  # temporary client errors


class Upload:
    """A running upload.

    It first writes the card, and keeps the text that the owner of the repository has added in the meantime.

    Args:
        folder: the pipeline, with the evidence of its training.
        repo_id: user/name.
        message: the commit message.
        ignored: patterns of paths in the folder that are not uploaded.
        license: the licence for the card.
        token: the Hub token; None for the stored one.
        show_progress: whether to show progress bars on stderr; else nothing is written there.
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
            cwd=Path(__file__).parents[2],  # where this package is, even if it is not installed
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if show_progress else subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # so that Ctrl-C in the terminal only reaches the training
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
        """Waits for the end; returns the reason of a failure, or "" after success."""
        if self._failure is None:
            lines = self._process.stdout.read().strip().splitlines()
            failed = self._process.wait() != 0
            self._failure = (lines[-1] if lines else "cut off") if failed else ""
        return self._failure

    def stop(self) -> None:
        """Kills the upload."""
        self._process.kill()


def reason(error: BaseException) -> str:
    """Formats an error of the client in one line, without the URL of the request, which may grant access."""
    error = _root(error)
    is_answer = isinstance(error, HfHubHTTPError)
    text = error.server_message if is_answer else str(error)
    message = " ".join((text or "").split())[:200]
    status = f" {error.response.status_code}" if is_answer else ""
    return f"{type(error).__name__}{status}{f': {message}' if message else ''}"


def _root(error: BaseException) -> BaseException:
    """Returns the answer of the Hub that caused an error, or the first error in the chain of causes."""
    while error.__cause__ is not None and not isinstance(error, HfHubHTTPError):
        error = error.__cause__
    return error


def _tried(upload: Callable[[], None]) -> str:
    """Calls `upload`, with retries after temporary failures; returns the last reason of failure, or ""."""
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
        write_card_of_run(folder, repo_id, remote_card(api, repo_id), task["license"])
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            ignore_patterns=list(task["ignored"]),  # the client adds to it
            delete_patterns=list(STALE),
            commit_message=task["message"],
        )

    try:
        check_links(folder, ignored=task["ignored"])
    except ValueError as error:  # a retry would fail, too
        failure = str(error)
    else:
        failure = _tried(upload)
    print(failure)
    return 1 if failure else 0


if __name__ == "__main__":
    sys.exit(main())
