"""Uploads a training run to the Hugging Face Hub, during the training or at its end."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from ..runs.run_folder import BEST_FOLDER, private_patterns
from ..runtime.errors import UsageError, warn
from ..runtime.links import check_links, linked_folders
from ..runtime.messages import say
from ..settings.hub import HubSettings
from ..settings.output import OutputSettings
from .background_upload import Upload, reason
from .card import copy_evidence, merge_cards
from .repository import check_kind, open_repository, remote_card

__all__ = ["Uploads", "check_upload", "hub_user"]

_STAGING = ".upload"


def check_upload(hub: HubSettings, output_dir: str) -> str | None:
    """Returns the full id of the repository of --push_to_hub; checks the token before the training, not after it.

    Raises:
        UsageError: if the token is missing or invalid, the Hub is unreachable, or the name is invalid.
    """
    if not hub.push_to_hub:
        return None
    name = hub.hub_model_id or Path(output_dir).resolve().name
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        flag = f"--hub_model_id {name}" if hub.hub_model_id else "--push_to_hub uses the name of --output_dir"
        fix = "" if hub.hub_model_id else "; pass --hub_model_id"
        raise UsageError(f"{flag}: {' '.join(str(error).split())}{fix}") from None
    user = hub_user(hub.hub_token)
    return name if "/" in name else f"{user}/{name}"


def hub_user(token: str | None) -> str:
    """Asks the Hub for the user name of a token; None for the stored token.

    Raises:
        UsageError: if there is no token, the Hub rejects it, or the Hub is unreachable.
    """
    try:
        return HfApi(token=token).whoami()["name"]
    except LocalTokenNotFoundError:
        raise UsageError("--push_to_hub: no token: run `hf auth login`, or set HF_TOKEN") from None
    except Exception as error:  # without a network, the type depends on its HTTP library
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
            status = error.response.status_code
            raise UsageError(
                f"--push_to_hub: the Hub does not accept the token ({status}): run `hf auth login`"
            ) from None
        raise UsageError(f"--push_to_hub: the Hub cannot be reached ({reason(error)})") from error


class Uploads:
    """Creates the repository of a run and uploads to it.

    A network failure does not end the training; it is counted and reported at the end.

    Args:
        hub: the settings of the uploads.
        repo_id: user/name.
        output: the settings of the output folder.
        is_adapter: whether LoRA weights are uploaded, and not a whole pipeline.

    Attributes:
        old_card: the previous card of the repository.

    Raises:
        UsageError: if a link leads out of the output folder, the token lacks write access, the Hub does not know the
            licence, the card cannot be read, a private repository is requested but it is public, or it holds the other
            kind of model.
    """

    def __init__(self, hub: HubSettings, repo_id: str, output: OutputSettings, *, is_adapter: bool = False):
        self.repo_id = repo_id
        self._hub = hub
        self._api = HfApi(token=hub.hub_token)
        self._ignored = private_patterns(output.logging_dir)
        self._upload: Upload | None = None
        self._step = self._done = self._skipped = 0
        self._failures: list[str] = []
        flag = f"--hub_model_id {repo_id}"
        try:
            check_links(output.output_dir, ignored=self._ignored)
        except ValueError as error:
            raise UsageError(f"--push_to_hub: {error}") from error
        try:
            open_repository(self._api, repo_id, hub.hub_private_repo or None)
            check_kind(self._api, repo_id, is_adapter=is_adapter)
            self.old_card = remote_card(self._api, repo_id)
        except ValueError as error:
            raise UsageError(f"{flag}: {error}") from error
        except Exception as error:
            refused = isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403)
            fix = ": the token needs write access" if refused else ""
            raise UsageError(f"{flag}: the repository cannot be opened ({reason(error)}){fix}") from error
        self._check_license()

    def in_background(self, pipeline, output_dir: Path, step: int) -> None:
        """Uploads the current pipeline with samples and metrics so far, while the training continues.

        Skipped if the previous upload is still running. The files are copied first, so later steps do not change them.
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
        except Exception as error:  # an upload must not end the training
            self._failures.append(f"step {step}: {reason(error)}")

    def finish(self, output_dir: Path, interrupted: bool = False) -> bool:
        """Uploads the finished run, and prints its URL, or the reason of a failure and a command to upload it later.

        Args:
            output_dir: the folder of the run.
            interrupted: whether the run will be resumed; then this only ends an upload in progress.

        Returns:
            False if the upload failed; a signal that ends it does not count as a failure.
        """
        failure = stopped = ""
        try:
            failure = "" if interrupted else self._upload_result(output_dir)
        except KeyboardInterrupt as signal:
            stopped = f"stopped by {signal}" if str(signal) else "stopped"
        if self._upload is not None:
            self._upload.stop()
        self._count()
        shutil.rmtree(output_dir / _STAGING, ignore_errors=True)
        if tried := self._done + len(self._failures):
            failed = f", {len(self._failures)} failed ({'; '.join(self._failures)})" if self._failures else ""
            skipped = f", {self._skipped} skipped while another was running" if self._skipped else ""
            print(f"uploads     {self._done} of {tried} during the training{failed}{skipped}")
        if failure or stopped:
            outcome = stopped or f"failed ({failure})"
            token = " (with the same token: HF_TOKEN, or hf auth login)" if self._hub.hub_token else ""
            print(f"upload      {outcome}; upload it later{token} with: {self._command(output_dir)}")
        elif not interrupted:
            if links := linked_folders(output_dir, self._ignored):
                warn(f"--push_to_hub: links to folders were not uploaded: {', '.join(links)}")
            print(f"uploaded    {self._api.endpoint}/{self.repo_id}")
            best = output_dir / BEST_FOLDER
            if best.is_dir():
                command = shlex.join(["hf", "upload", f"{self.repo_id}-best", str(best)])
                print(f"best model  not uploaded with the others; to a repository of its own: {command}")
        return not failure

    def _upload_result(self, output_dir: Path) -> str:
        """Uploads the finished run, until a signal; returns the reason of a failure, or ""."""
        final = None
        try:
            if self._upload is not None and self._upload.is_alive:
                say(f"waiting for the upload of step {self._step}")
                self._upload.wait()
            final = self._start(output_dir, "Upload a training run", show_progress=True)
            return final.wait()
        except KeyboardInterrupt:
            if final is not None:
                final.stop()
            raise
        except OSError as error:  # the upload process could not be started
            return reason(error)

    def _start(self, folder: Path, message: str, show_progress: bool = False) -> Upload:
        license, token = self._hub.hub_license, self._hub.hub_token
        return Upload(folder, self.repo_id, message, self._ignored, license, token, show_progress)

    def _count(self) -> None:
        """Records the result of the background upload, if there was one."""
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
        private = ["--private"] if self._hub.hub_private_repo else []
        return shlex.join(["hf", "upload", self.repo_id, str(output_dir), *excluded, *private])

    def _check_license(self) -> None:
        """Validates the licence on the Hub, which rejects a card with an unknown licence."""
        license = self._hub.hub_license
        if license is None:
            return
        card = ModelCard(f"---\n{ModelCardData(license=license, tags=[]).to_yaml()}\n---\n")
        try:
            merge_cards(card, self.old_card).validate()
        except ValueError as error:
            raise UsageError(f"--hub_license {license}: {' '.join(str(error).split())}") from error
        except Exception:  # the first upload will validate it again
            return
