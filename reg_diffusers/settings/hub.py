"""Settings of the Hub: whether, when and where to upload a model."""

from __future__ import annotations

from dataclasses import dataclass

from ..runtime.errors import UsageError
from .flags import flag

__all__ = ["HubSettings"]


@dataclass(frozen=True)
class HubSettings:
    """Uploads of the run to the Hugging Face Hub.

    `push_to_hub` and `hub_strategy` are not kept with a run: repeating the training must not repeat the upload.

    Raises:
        UsageError: for a strategy without uploads.
    """

    push_to_hub: bool = flag(
        False,
        "upload the pipeline with a card, samples and measurements; the token is checked before the training",
        mathematics=False,
        kept=False,
    )
    hub_strategy: str = flag(
        "end",
        "end: upload once, at the end; checkpoint: also at each checkpoint, in the background",
        choices=["end", "checkpoint"],
        mathematics=False,
        kept=False,
    )
    hub_token: str | None = flag(
        None, "token for the upload; default: the token stored by `hf auth login`", mathematics=False, kept=False
    )
    hub_model_id: str | None = flag(
        None, "repository to upload to; default: the name of the output folder", mathematics=False
    )
    hub_private_repo: bool = flag(False, "create the repository as private", mathematics=False)
    hub_license: str | None = flag(
        None,
        "licence in the card, such as apache-2.0 or mit; default: unknown",
        mathematics=False,
    )

    def __post_init__(self):
        if self.hub_strategy == "checkpoint" and not self.push_to_hub:
            raise UsageError("--hub_strategy checkpoint has no effect without --push_to_hub")
