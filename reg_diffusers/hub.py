"""Uploads of a training run to the Hugging Face Hub, while it goes on or at its end."""

from __future__ import annotations

import argparse
import shlex
import shutil
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from .card import copy_evidence, merge_cards
from .repository import open_repository, remote_card
from .training.errors import UsageError
from .upload import Upload, reason

__all__ = ["Uploads", "check_upload", "hub_user"]

_NOT_UPLOADED = ("checkpoint-*", "plain/*", "profile/*", ".*")
_STAGING = ".upload"


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
    except HFValidationError as error:
        flag = f"--hub_model_id {name}" if args.hub_model_id else "--push_to_hub takes the name of --output_dir"
        fix = "" if args.hub_model_id else "; pass --hub_model_id"
        raise UsageError(f"{flag}: {' '.join(str(error).split())}{fix}") from None
    user = hub_user(args.hub_token)
    return name if "/" in name else f"{user}/{name}"


def hub_user(token: str | None) -> str:
    """The name of the user whom a token belongs to, as the Hub says; None for the stored token.

    Raises:
        UsageError: there is no token, the Hub does not know it, or there is no Hub in reach.
    """
    try:
        return HfApi(token=token).whoami()["name"]
    except LocalTokenNotFoundError:
        raise UsageError("--push_to_hub: no token: run `hf auth login`, or set HF_TOKEN") from None
    except Exception as error:  # what it raises without a network depends on its HTTP library
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
            status = error.response.status_code
            raise UsageError(
                f"--push_to_hub: the Hub does not accept the token ({status}): run `hf auth login`"
            ) from None
        raise UsageError(f"--push_to_hub: the Hub cannot be reached ({reason(error)})") from error


class Uploads:
    """All uploads of one run to one repository; makes the repository.

    No failure of the network ends the training: it is counted, and told at the end.

    Args:
        args: the settings of the run.
        repo_id: user/name.

    Attributes:
        old_card: the card that the repository had before.

    Raises:
        UsageError: the token may not write there; a licence that the Hub does not know; a card that cannot be read; a
            private repository is wanted, and it is public.
    """

    def __init__(self, args: argparse.Namespace, repo_id: str):
        self.repo_id = repo_id
        self._args = args
        self._api = HfApi(token=args.hub_token)
        self._ignored = [*_NOT_UPLOADED, f"{args.logging_dir}/*"]
        self._upload: Upload | None = None
        self._step = self._done = self._skipped = 0
        self._failures: list[str] = []
        flag = f"--hub_model_id {repo_id}"
        try:
            open_repository(self._api, repo_id, args.hub_private_repo or None)
            self.old_card = remote_card(self._api, repo_id)
        except ValueError as error:
            raise UsageError(f"{flag}: {error}") from error
        except Exception as error:
            refused = isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403)
            fix = ": the token needs the right to write there" if refused else ""
            raise UsageError(f"{flag}: the repository cannot be opened ({reason(error)}){fix}") from error
        self._check_license()

    def in_background(self, pipeline, output_dir: Path, step: int) -> None:
        """Uploads the pipeline as it is now, with samples and metrics so far, while the training goes on.

        Left out while the upload before is still under way. The files are copied first, so that later steps do not
        change them.
        """
        if self._upload is not None and self._upload.is_alive:
            self._skipped += 1
            return
        self._count()
        staging = output_dir / _STAGING
        try:
            shutil.rmtree(staging, ignore_errors=True)
            pipeline.save_pretrained(str(staging))
            copy_evidence(output_dir, staging)
            self._step, self._upload = step, self._start(staging, f"Upload step {step}")
        except Exception as error:  # whatever it is, the training is more important
            self._failures.append(f"step {step}: {reason(error)}")

    def finish(self, output_dir: Path, interrupted: bool = False) -> None:
        """Uploads the finished run, and prints where it is or why it is not, with the command that does it later.

        Args:
            output_dir: the folder of the run.
            interrupted: the run is to be gone on with: only end what is under way.
        """
        failure = "" if interrupted else self._upload_result(output_dir)
        if self._upload is not None:
            self._upload.stop()
        self._count()
        shutil.rmtree(output_dir / _STAGING, ignore_errors=True)
        if tried := self._done + len(self._failures):
            failed = f", {len(self._failures)} failed ({'; '.join(self._failures)})" if self._failures else ""
            skipped = f", {self._skipped} left out while another was under way" if self._skipped else ""
            print(f"uploads     {self._done} of {tried} during the training{failed}{skipped}")
        if failure:
            token = " (with the same token: HF_TOKEN, or hf auth login)" if self._args.hub_token else ""
            print(f"upload      failed ({failure}); upload it later{token} with: {self._command(output_dir)}")
        elif not interrupted:
            print(f"uploaded    {self._api.endpoint}/{self.repo_id}")

    def _upload_result(self, output_dir: Path) -> str:
        """Uploads the finished run; returns the reason of a failure, or ""."""
        final = None
        try:
            if self._upload is not None and self._upload.is_alive:
                print(f"waiting for the upload of step {self._step}", flush=True)
                self._upload.wait()
            final = self._start(output_dir, "Upload a training run", show_progress=True)
            return final.wait()
        except KeyboardInterrupt:
            if final is not None:
                final.stop()
            return "interrupted"
        except OSError as error:  # no process can be started
            return reason(error)

    def _start(self, folder: Path, message: str, show_progress: bool = False) -> Upload:
        license, token = self._args.hub_license, self._args.hub_token
        return Upload(folder, self.repo_id, message, self._ignored, license, token, show_progress)

    def _count(self) -> None:
        """Takes note of how the upload in the background ended, if there was one."""
        if self._upload is None:
            return
        failure = self._upload.wait()
        if failure:
            self._failures.append(f"step {self._step}: {failure}")
        else:
            self._done += 1
        self._upload = None

    def _command(self, output_dir: Path) -> str:
        excluded = [word for pattern in self._ignored for word in ("--exclude", pattern)]
        private = ["--private"] if self._args.hub_private_repo else []
        return shlex.join(["hf", "upload", self.repo_id, str(output_dir), *excluded, *private])

    def _check_license(self) -> None:
        """Asks the Hub, which refuses a card with a licence that it does not know."""
        license = self._args.hub_license
        if license is None:
            return
        card = ModelCard(f"---\n{ModelCardData(license=license, tags=[]).to_yaml()}\n---\n")
        try:
            merge_cards(card, self.old_card).validate()
        except ValueError as error:
            raise UsageError(f"--hub_license {license}: {' '.join(str(error).split())}") from error
        except Exception:  # it will be tried again with the first upload
            return
