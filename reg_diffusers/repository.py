"""A model repository on the Hub: opened for writing, with the card and the evidence that it has."""

from __future__ import annotations

import filecmp
import hashlib
from pathlib import Path

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

from .card import CARD_FILE, CONFIG_FILE, EVIDENCE, copy_evidence, read_card

__all__ = ["STALE", "fetch_evidence", "open_repository", "remote_card"]

# Evidence of the model before, which an upload deletes where the new model has none of that name.
STALE = (*(name for name in EVIDENCE if name != "samples"), "samples/step-*.png")


def open_repository(api: HfApi, repo_id: str, private: bool | None = None, write: bool = True) -> str:
    """Makes the repository if it is not there, and returns its full id, user/name.

    Args:
        api: with the token.
        repo_id: user/name, or a name of the token's user.
        private: whether nobody else may see it.
        write: whether the token must be allowed to commit there; a pull request needs no right.

    Raises:
        ValueError: a private one is wanted, and it is there and public.
        HfHubHTTPError: the token may not make it, or not write there.
    """
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if write:  # of a repository that is there, the client forgives a token that may only read it
        _check_write(api, repo_id)
    if private and not api.model_info(repo_id).private:
        raise ValueError(f"{repo_id} is there already, and public: make it private in its settings on the Hub")
    return repo_id


def _check_write(api: HfApi, repo_id: str) -> None:
    try:
        api.auth_check(repo_id, write=True)
    except TypeError:  # a client that cannot ask for the right to write
        return
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise


def remote_card(api: HfApi, repo_id: str) -> ModelCard | None:
    """The card that a repository has, if it has one.

    Raises:
        ValueError: its metadata cannot be read.
    """
    try:
        path = api.hf_hub_download(repo_id, CARD_FILE, force_download=True)  # not the one in the cache
    except EntryNotFoundError:
        return None
    return read_card(Path(path))


def fetch_evidence(api: HfApi, source: str, folder: Path) -> None:
    """Copies into a folder with a saved pipeline what a run left at `source`, the card included.

    Only where the weights are the same: measurements of other weights would be wrong.

    Args:
        api: with the token.
        source: the folder or the repository that the pipeline was loaded from.
        folder: the pipeline, saved.
    """
    weights = [path for path in (folder / "unet").iterdir() if path.suffix != ".json"]
    names = [f"unet/{path.name}" for path in weights]
    if Path(source).is_dir():
        found = Path(source)
        same = all((found / name).is_file() and filecmp.cmp(found / name, folder / name, False) for name in names)
    else:
        try:
            known = {entry.path: entry for entry in api.get_paths_info(source, [CONFIG_FILE, *names])}
            same = len(known) == 1 + len(names) and all(_is_copy(known[name], folder / name) for name in names)
            if same:
                patterns = [*EVIDENCE, "samples/*", CARD_FILE]
                found = Path(api.snapshot_download(source, allow_patterns=patterns))
        except (HfHubHTTPError, HFValidationError):  # not on this Hub, or not for this token
            return
    if same:
        copy_evidence(found, folder)


def _is_copy(entry, path: Path) -> bool:
    """Whether a file of a repository, as the Hub lists it, is equal to one on disk."""
    return entry.lfs is not None and entry.lfs.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
