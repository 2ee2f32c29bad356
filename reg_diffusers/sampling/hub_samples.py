"""Uploads samples as a data set to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import DatasetCard, HfApi
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from ..hub.background_upload import reason
from ..hub.uploads import hub_user
from ..runtime.errors import UsageError
from ..runtime.links import check_links

if TYPE_CHECKING:
    from .settings import SampleSettings
    from .store import PictureFolder

__all__ = ["open_dataset", "upload_samples"]

_CARD_FILE = "README.md"
_BEGIN = "<!-- reg_diffusers: samples, written anew at each upload down to the mark at its end -->"
_END = "<!-- reg_diffusers: end of samples -->"


def open_dataset(name: str, token: str | None, private: bool) -> str:
    """Creates the repository of --push_to_hub or opens that of an earlier run; returns its full id, user/name.

    Raises:
        UsageError: if the name is invalid, the token lacks write access, the Hub is unreachable, or the repository
            holds another data set.
    """
    flag = f"--push_to_hub {name}"
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UsageError(f"{flag}: {' '.join(str(error).split())}") from None
    user = hub_user(token)
    repo_id = name if "/" in name else f"{user}/{name}"
    api = HfApi(token=token)
    try:
        try:
            files = {entry.rfilename for entry in api.dataset_info(repo_id).siblings}
        except RepositoryNotFoundError:
            files = set()
        is_ours = not files - {".gitattributes"} or _BEGIN in _remote_text(api, repo_id)
        api.create_repo(repo_id, repo_type="dataset", private=private or None, exist_ok=True)
    except Exception as error:  # without a network, the type depends on its HTTP library
        raise UsageError(f"{flag}: the repository cannot be opened ({reason(error)})") from error
    if not is_ours:
        raise UsageError(f"{flag}: holds another data set: name another repository")
    return repo_id


def upload_samples(
    repo_id: str, folder: PictureFolder, settings: SampleSettings, number: int, command: str, token: str | None
) -> str:
    """Uploads the first `number` images with their seeds, their class labels or texts, and a card.

    Args:
        repo_id: the result of `open_dataset`.
        folder: the folder of the images.
        settings: the settings of the samples.
        number: number of images.
        command: the command line that draws them, for the card.
        token: the Hub token; None for the stored one.

    Returns:
        The URL of the data set.

    Raises:
        ValueError: if an image is a link out of the folder.
        Exception: the exception of the client if the upload fails.
    """
    from datasets import Dataset, Features, Image, Value

    check_links(folder.path, (folder.file(index).name for index in range(number)))
    api = HfApi(token=token)
    card = DatasetCard(_remote_text(api, repo_id) or "---\n---\n")
    card.data.tags = list(dict.fromkeys(["reg_diffusers", "synthetic", *(card.data.to_dict().get("tags") or [])]))
    before, mark, rest = card.text.partition(_BEGIN)
    after = rest.partition(_END)[2] if mark else ""
    text = _card_text(repo_id, settings, number, command)
    card.text = "\n\n".join(part.strip() for part in (before, _BEGIN, text, _END, after) if part.strip())
    # The card comes first: if a later step fails, the next run recognizes the repository by it.
    api.upload_file(
        path_or_fileobj=str(card).encode(),
        path_in_repo=_CARD_FILE,
        repo_id=repo_id,
        repo_type="dataset",
        commit_message="Describe the samples",
    )
    columns = {
        "image": [str(folder.file(index)) for index in range(number)],
        "seed": [settings.seed + index for index in range(number)],
    }
    features = {"image": Image(), "seed": Value("int64")}
    if labels := settings.class_labels:
        columns["label"] = [labels[index % len(labels)] for index in range(number)]
        features["label"] = Value("int64")
    if texts := settings.prompts:
        columns["text"] = [texts[index % len(texts)] for index in range(number)]
        features["text"] = Value("string")
    table = Dataset.from_dict(columns, features=Features(features))
    table.push_to_hub(repo_id, token=token, commit_message=f"Upload {number} samples")
    return f"{api.endpoint}/datasets/{repo_id}"


def _remote_text(api: HfApi, repo_id: str) -> str:
    """Returns the README.md of the repository, or "" if it has none."""
    try:
        path = api.hf_hub_download(repo_id, _CARD_FILE, repo_type="dataset")
    except EntryNotFoundError:
        return ""
    return Path(path).read_text(encoding="utf-8")


def _card_text(repo_id: str, settings: SampleSettings, number: int, command: str) -> str:
    classes = ", each of the class `label`" if settings.class_labels else ""
    classes += ", each of the text `text`" if settings.prompts else ""
    rows = [
        ("model", f"`{settings.model}` (sha256 {settings.model_sha256[:16]})"),
        ("scheduler", f"{settings.scheduler}, {settings.num_inference_steps} steps"),
        ("seeds", f"{settings.seed} to {settings.seed + number - 1}"),
        ("guidance", _guidance(settings)),
        ("precision", {"no": "float32", "bf16": "bfloat16"}[settings.mixed_precision]),
    ]
    if settings.guidance_scale is not None:
        away = f", away from {settings.negative_prompt!r}" if settings.negative_prompt else ""
        rows.append(("classifier-free guidance", f"scale {settings.guidance_scale:g}{away}"))
    if settings.condition_sha256:
        rows.append(("condition", f"images (sha256 {settings.condition_sha256[:16]}), cycled through"))
    return "\n".join(
        [
            f"# {repo_id.split('/')[-1]}",
            "",
            f"{number:,} images sampled from a diffusion model{classes}. The initial noise of each row comes from"
            " `torch.Generator().manual_seed(seed)` on the CPU, with the `seed` of the row.",
            "",
            "|  |  |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in rows),
            "",
            "Drawn by reg_diffusers:",
            "",
            f"```bash\n{command}\n```",
        ]
    )


def _guidance(settings: SampleSettings) -> str:
    if not settings.guidance:
        return "none"
    names = ", ".join(f"`{name}`" for name in settings.guidance)
    return f"{names} ({settings.guidance_method}, scale {settings.regularizer_scale:g})"
