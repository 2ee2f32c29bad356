"""Looks up a saved model by the name of a folder or Hub id, and says at once if there is none."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import (
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name

from ..runtime.errors import UsageError

__all__ = ["pipeline_index", "saved_file"]

_INDEX = "model_index.json"


def pipeline_index(name: str, named: str, cache_dir: str | None = None) -> dict | None:
    """Returns model_index.json of a pipeline; None if there is no such file. See `saved_file`.

    Raises:
        UsageError: nothing has this name, or the file cannot be read.
    """
    path = saved_file(name, _INDEX, named, cache_dir)
    if path is None:
        return None
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{named}: {_INDEX} cannot be read: {_reason(error)}") from error
    if not isinstance(index, dict):
        raise UsageError(f"{named}: {_INDEX} cannot be read: it holds no JSON object")
    return index


def saved_file(name: str, file: str, named: str, cache_dir: str | None = None) -> Path | None:
    """Returns a file of a saved model, downloaded if that is on the Hub; None if the model has no such file.

    Without a network, a model that was downloaded before has the files that were, and other names are refused without
    a wait.

    Args:
        name: folder or Hub id.
        file: path of the file in it.
        named: the flag and its value, for messages.
        cache_dir: folder of downloads.

    Raises:
        UsageError: the name is neither a folder nor that of a model on the Hub, or the Hub cannot be reached.
    """
    if Path(name).is_dir():
        path = Path(name, file)
        return path if path.is_file() else None
    if Path(name).exists():
        raise UsageError(f"{named}: is a file: name the folder of the model")
    try:
        if not isinstance(try_to_load_from_cache(name, file, cache_dir=cache_dir), str):
            _request(name, file)  # a download would try for 23 s to reach the Hub
        return Path(hf_hub_download(name, file, cache_dir=cache_dir))
    except GatedRepoError as error:
        raise UsageError(f"{named}: on the Hub, you have to accept its terms first: {_reason(error)}") from error
    except RepositoryNotFoundError as error:
        fix = "give the path of a local folder; for a private model, run `hf auth login` first"
        folder = Path(name).absolute()
        raise UsageError(f"{named}: neither {folder} nor a model on the Hub of this name exists: {fix}") from error
    except HFValidationError as error:
        raise UsageError(f"{named}: no such folder, and not a Hub id") from error
    except LocalEntryNotFoundError as error:
        raise _unreachable(name, named, error.__cause__ or error) from error
    except EntryNotFoundError:
        return None
    except HfHubHTTPError as error:
        raise UsageError(f"{named}: the Hub answers: {_reason(error)}") from error
    except Exception as error:  # without a network; their types differ between versions of the client
        if Path(cache_dir or constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="model")).is_dir():
            return None  # of a model that was downloaded before
        raise _unreachable(name, named, error) from error


def _request(name: str, file: str) -> None:
    """Asks once for a file, to learn whether the Hub and the model can be reached; the download reports the rest."""
    try:
        get_hf_file_metadata(hf_hub_url(name, file))
    except RepositoryNotFoundError:
        raise
    except HfHubHTTPError:
        pass


def _unreachable(name: str, named: str, error: BaseException) -> UsageError:
    folder = Path(name).absolute()
    if constants.HF_HUB_OFFLINE:
        reason = "HF_HUB_OFFLINE is set, so that the Hub is not asked"
    else:
        reason = f"the Hub cannot be reached ({_reason(error)})"
    return UsageError(f"{named}: {folder} does not exist, and {reason}: give the path of a local folder")


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
