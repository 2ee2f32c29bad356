"""Settings of the validation: the images that are held out, when they are measured, and whether the best is kept."""

from __future__ import annotations

from dataclasses import dataclass

from ..runtime.errors import UsageError
from .flag_values import positive_int, share
from .flags import flag

__all__ = ["ValidationSettings"]


@dataclass(frozen=True)
class ValidationSettings:
    """The held-out images of a run; without them, nothing is measured.

    Raises:
        UsageError: if settings contradict each other.
    """

    validation_split: float | None = flag(
        None,
        "share of the images that is held out from the training, chosen by --seed, such as 0.05; on them the losses"
        " are measured, with the same noise each time",
        metavar="SHARE",
        parse=share,
    )
    validation_data_dir: str | None = flag(
        None, "folder of other images (or .npy/.npz file of fields) to measure the losses on", metavar="FOLDER"
    )
    validation_steps: int | None = flag(
        None,
        "steps between measurements on the held-out images, besides the last step; default: --checkpointing_steps",
        parse=positive_int,
        mathematics=False,
    )
    keep_best: bool = flag(
        False,
        "keep the pipeline with the lowest denoising loss on the held-out images, in OUTPUT_DIR/best",
        mathematics=False,
    )

    def __post_init__(self):
        if self.validation_split is not None and self.validation_data_dir is not None:
            raise UsageError("--validation_split and --validation_data_dir are mutually exclusive")
        given = {"--validation_steps": self.validation_steps, "--keep_best": self.keep_best}
        for name, value in given.items():
            if value and not self.is_wanted:
                raise UsageError(
                    f"{name} needs held-out images: pass --validation_split 0.05, or --validation_data_dir"
                )

    @property
    def is_wanted(self) -> bool:
        """Whether images are held out."""
        return self.validation_data_dir is not None or self.validation_split is not None
