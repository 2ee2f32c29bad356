"""Opens a model repository on the Hub for writing, reads its card and evidence, and uploads a pipeline."""

from __future__ import annotations

import filecmp
import hashlib
import shlex
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

from ..runs.run_folder import CARD_FILE, CONFIG_FILE, EVIDENCE, LORA_FILE, evidence_patterns
from ..runtime.links import check_links
from .card import copy_evidence, read_card, write_card

__all__ = [
    "STALE",
    "check_kind",
    "check_source",
    "fetch_evidence",
    "open_repository",
    "remote_card",
    "upload_pipeline",
]

_INDEX = "model_index.json"

# Evidence of the previous model, which an upload deletes if the new model has no file of that name.
_NETWORKS = ("unet", "transformer")
STALE = tuple(pattern for pattern in evidence_patterns() if pattern != CARD_FILE)


def check_source(source: str | None) -> None:
    """Checks the folder that a pipeline was loaded from for links out of it, before any upload.

    Raises:
        ValueError: if there is such a link.
    """
    if source and Path(source).is_dir():
        check_links(source, (*EVIDENCE, "model_index.json", *_NETWORKS, "scheduler"))


def open_repository(api: HfApi, repo_id: str, private: bool | None = None, write: bool = True) -> str:
    """Creates the repository if it does not exist, and returns its full id, user/name.

    Args:
        api: the client, with the token.
        repo_id: user/name, or the name of a repository of the token's user.
        private: whether it must be private.
        write: whether the token needs write access; a pull request does not need it.

    Raises:
        ValueError: if a private repository is requested, but it exists and is public.
        HfHubHTTPError: if the token may not create it or write to it.
    """
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if write:  # for an existing repository, create_repo accepts a read-only token
        _check_write(api, repo_id)
    if private and not api.model_info(repo_id).private:
        raise ValueError(f"{repo_id} already exists and is public: make it private in its settings on the Hub")
    return repo_id


def check_kind(api: HfApi, repo_id: str, *, is_adapter: bool) -> None:
    """Checks that a repository does not hold the other kind of model, which an upload would leave beside the new one.

    Args:
        api: the client.
        repo_id: user/name.
        is_adapter: whether LoRA weights are uploaded, and not a whole pipeline.

    Raises:
        ValueError: it holds that kind, and not this one.
    """
    own, other = (LORA_FILE, _INDEX) if is_adapter else (_INDEX, LORA_FILE)
    if not api.file_exists(repo_id, other) or api.file_exists(repo_id, own):
        return
    files = api.list_repo_files(repo_id)
    folders = {name.split("/")[0] for name in files if name.endswith(("/config.json", "/scheduler_config.json"))}
    parts = [other, *(["pipeline.py"] if "pipeline.py" in files else []), *(f"{name}/*" for name in sorted(folders))]
    command = shlex.join(["hf", "repos", "delete-files", repo_id, *([other] if other == LORA_FILE else parts)])
    kinds = ("a whole pipeline", "LoRA weights") if is_adapter else ("LoRA weights", "this pipeline")
    raise ValueError(
        f"{repo_id} holds {kinds[0]}, which would stay there beside {kinds[1]}: name another repository, or delete the"
        f" old files first: {command}"
    )


def _check_write(api: HfApi, repo_id: str) -> None:
    try:
        api.auth_check(repo_id, write=True)
    except TypeError:  # this version of the client cannot check write access
        return
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise


def remote_card(api: HfApi, repo_id: str) -> ModelCard | None:
    """Returns the card of a repository, or None.

    Raises:
        ValueError: if its metadata cannot be read.
    """
    try:
        path = api.hf_hub_download(repo_id, CARD_FILE, force_download=True)  # the cache may be outdated
    except EntryNotFoundError:
        return None
    return read_card(Path(path))


def fetch_evidence(api: HfApi, source: str, folder: Path) -> None:
    """Copies the evidence of a run, including its card, from `source` to the folder of a saved pipeline.

    Only copies it if the weights are equal: measurements of other weights would be wrong.

    Args:
        api: the client, with the token.
        source: the folder or the repository that the pipeline was loaded from.
        folder: the folder of the saved pipeline.
    """
    network = next(name for name in _NETWORKS if (folder / name).is_dir())
    names = [f"{network}/{path.name}" for path in (folder / network).iterdir() if path.suffix != ".json"]
    if Path(source).is_dir():
        found = Path(source)
        same = all((found / name).is_file() and filecmp.cmp(found / name, folder / name, False) for name in names)
    else:
        try:
            known = {entry.path: entry for entry in api.get_paths_info(source, [CONFIG_FILE, *names])}
            same = len(known) == 1 + len(names) and all(_is_copy(known[name], folder / name) for name in names)
            if same:
                patterns = [*EVIDENCE, *(f"{name}/*" for name in EVIDENCE)]
                found = Path(api.snapshot_download(source, allow_patterns=patterns))
        except (HfHubHTTPError, HFValidationError):  # not on this Hub, or not accessible with this token
            return
    if same:
        copy_evidence(found, folder)


def _is_copy(entry, path: Path) -> bool:
    """Whether a file of a repository, by its entry on the Hub, is equal to a file on disk."""
    return entry.lfs is not None and entry.lfs.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def upload_pipeline(
    save: Callable[[Path], None],
    source: str | None,
    repo_id: str,
    commit_message: str,
    private: bool | None,
    token: str | None,
    *,
    create_pr: bool,
    subfolder: str | None,
) -> str:
    """Uploads a pipeline with its card and evidence; returns the URL of the commit.

    Args:
        save: saves the pipeline to a folder.
        source: folder or repository that it was loaded from.
        repo_id, commit_message, private, token, create_pr, subfolder: see `RegDDPMPipeline.push_to_hub`.
    """
    api = HfApi(token=token)
    check_source(source)
    repo_id = open_repository(api, repo_id, private, write=not create_pr)
    if subfolder is None:
        check_kind(api, repo_id, is_adapter=False)
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save(folder)
        if source:
            fetch_evidence(api, source, folder)
        if subfolder is None:
            write_card(folder, repo_id, remote_card(api, repo_id))
        else:
            (folder / CARD_FILE).unlink(missing_ok=True)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            path_in_repo=subfolder,
            commit_message=commit_message,
            create_pr=create_pr,
            delete_patterns=list(STALE),
        )
