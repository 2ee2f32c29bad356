"""Uploads of a training run to the Hugging Face Hub, while it goes on or at its end."""

from __future__ import annotations

import argparse
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars, validate_repo_id

from .card import copy_evidence, remote_card, write_card
from .training.errors import UsageError

__all__ = ["Uploads", "check_upload"]

_NOT_UPLOADED = ("checkpoint-*", "plain/*", ".*")
# The client itself repeats a request that finds no server, for 23 s; an upload that fails sooner is begun anew.
_WAITS = (1, 4, 10)
_PATIENCE = 20


def check_upload(args: argparse.Namespace) -> str | None:
    """The full id of the repository of --push_to_hub; asks the Hub who we are, before the training and not after it.

    Raises:
        UsageError: --push_to_hub without a token that the Hub knows, without a Hub in reach, or with a bad name.
    """
    if not args.push_to_hub:
        return None
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    try:
        validate_repo_id(name)
        user = HfApi(token=args.hub_token).whoami()["name"]
    except HFValidationError as error:
        raise UsageError(f"--hub_model_id: {error}") from None
    except LocalTokenNotFoundError:
        raise UsageError("--push_to_hub: no token: run `hf auth login`, or set HF_TOKEN") from None
    except HfHubHTTPError as error:
        raise UsageError(
            f"--push_to_hub: the Hub does not accept the token ({_status(error)}): run `hf auth login`"
        ) from None
    except Exception as error:  # what it raises without a network depends on its HTTP library
        raise UsageError(f"--push_to_hub: the Hub cannot be reached ({type(error).__name__})") from error
    return name if "/" in name else f"{user}/{name}"


class Uploads:
    """All uploads of one run to one repository; makes the repository.

    No failure of the network ends the training: it is counted, and told by `finish`.

    Args:
        args: the settings of the run.
        repo_id: user/name.

    Attributes:
        old_card: the card that the repository had before.

    Raises:
        UsageError: the token may not write there.
    """

    def __init__(self, args: argparse.Namespace, repo_id: str):
        self.repo_id = repo_id
        self._license = args.hub_license
        self._api = HfApi(token=args.hub_token)
        self._ignored = [*_NOT_UPLOADED, f"{args.logging_dir}/*"]
        self._thread: threading.Thread | None = None
        self._failures: list[str] = []
        self._done = self._skipped = 0
        try:
            self._api.create_repo(repo_id, private=args.hub_private_repo or None, exist_ok=True)
            self.old_card = remote_card(self._api, repo_id)
        except Exception as error:
            reason = _status(error) if isinstance(error, HfHubHTTPError) else type(error).__name__
            raise UsageError(
                f"--hub_model_id {repo_id}: the repository cannot be opened ({reason}): the token needs the right to"
                " write there"
            ) from error

    def in_background(self, pipeline, output_dir: Path, step: int) -> None:
        """Uploads the pipeline as it is now, with samples and metrics so far, while the training goes on.

        Left out while the upload before is still under way. The files are copied first, so that later steps do not
        change them.
        """
        if self._thread is not None and self._thread.is_alive():
            self._skipped += 1
            return
        staging = output_dir / ".upload"
        shutil.rmtree(staging, ignore_errors=True)
        pipeline.save_pretrained(str(staging))
        copy_evidence(output_dir, staging)
        write_card(staging, self.repo_id, self.old_card, self._license)
        disable_progress_bars()  # they would write over the bar of the training
        self._thread = threading.Thread(target=self._upload_staged, args=(staging, step), daemon=True)
        self._thread.start()

    def finish(self, output_dir: Path) -> str:
        """Uploads the finished run and returns what to tell the user, with the command that does it later."""
        if self._thread is not None:
            self._thread.join()
        shutil.rmtree(output_dir / ".upload", ignore_errors=True)
        enable_progress_bars()
        told = self._told()
        error = _tried(lambda: self._upload(output_dir, "Upload a training run"))
        if error is not None:
            excluded = " ".join(f"--exclude '{pattern}'" for pattern in self._ignored)
            command = f"hf upload {self.repo_id} {output_dir} {excluded}"
            return f"{told}upload      failed ({_reason(error)}); upload it later with: {command}"
        return f"{told}uploaded    {self._api.endpoint}/{self.repo_id}"

    def _upload(self, folder: Path, message: str) -> None:
        self._api.upload_folder(
            repo_id=self.repo_id,
            folder_path=folder,
            ignore_patterns=list(self._ignored),  # the client adds to it
            commit_message=message,
        )

    def _upload_staged(self, staging: Path, step: int) -> None:
        error = _tried(lambda: self._upload(staging, f"Upload step {step}"))
        if error is None:
            self._done += 1
        else:
            self._failures.append(f"step {step}: {_reason(error)}")

    def _told(self) -> str:
        """A line on the uploads during the training, if there were any."""
        tried = self._done + len(self._failures)
        if not tried:
            return ""
        failed = f", {len(self._failures)} failed ({'; '.join(self._failures)})" if self._failures else ""
        skipped = f", {self._skipped} left out while another was under way" if self._skipped else ""
        return f"uploads     {self._done} of {tried} during the training{failed}{skipped}\n"


def _tried(upload: Callable[[], None]) -> Exception | None:
    """Calls `upload`, again after a while if it fails for a reason that may pass; returns the last error, if any."""
    started = time.monotonic()
    for wait in (*_WAITS, None):
        try:
            upload()
        except Exception as error:  # whatever it is, the trained model is more important
            refused = isinstance(error, HfHubHTTPError) and 400 <= (_status(error) or 500) < 500
            if wait is None or refused or time.monotonic() - started > _PATIENCE:
                return error
            time.sleep(wait)
        else:
            return None


def _status(error: HfHubHTTPError) -> int | None:
    return getattr(error.response, "status_code", None)


def _reason(error: Exception) -> str:
    status = _status(error) if isinstance(error, HfHubHTTPError) else None
    return f"{type(error).__name__}{f' {status}' if status else ''}"
