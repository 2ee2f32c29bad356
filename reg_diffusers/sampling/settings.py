"""The settings of samples, saved in a file next to them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from ..runtime.files import write_whole

__all__ = ["SampleSettings"]


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """The settings that determine sample i, up to float32 rounding.

    Attributes:
        model: the folder or Hub id, for information only: two samples of one model under different names are equal.
        model_sha256: see `sampler.model_sha256`.
        scheduler: a name from `schedulers.fitting_samplers`.
        num_inference_steps: network calls per sample.
        seed: the noise of sample i comes from `torch.Generator().manual_seed(seed + i)`.
        size: size of the images in pixels, see `settings.size`; None for that of the model.
        class_labels: sample i has the class `class_labels[i % n]`; empty for a network without classes.
        condition_sha256: a hash of the n conditioning images; sample i uses image i % n. "" without conditions.
        prompts: sample i has the text `prompts[i % n]`; empty for a network that takes no texts.
        negative_prompt: what classifier-free guidance leads away from; None for no text.
        guidance_scale: scale of classifier-free guidance; None for a network that is called once per step.
        guidance: losses that guide the sampler, as names for `specs.load_regularizer`.
        regularizer_scale: factor of all these losses, see `RegDDPMPipeline`.
        guidance_method: "mpgd", "dps" or "lgd".
        reg_units: "user" if the guidance sees fields in their own units, else "model"; older files mean "model".
        mixed_precision: "no", or "bf16" for a network that runs in bfloat16.
        output_type: "pt" for images in [0, 1] and fields in their units; "latent" for the unclipped input of L'.
    """

    model: str = field(default="", compare=False)
    model_sha256: str
    scheduler: str
    num_inference_steps: int
    seed: int = 0
    size: int | str | None = None
    class_labels: tuple[int, ...] = ()
    condition_sha256: str = ""
    prompts: tuple[str, ...] = ()
    negative_prompt: str | None = None
    guidance_scale: float | None = None
    guidance: tuple[str, ...] = ()
    regularizer_scale: float = 0.0
    guidance_method: str = "mpgd"
    reg_units: str = "model"
    mixed_precision: str = "no"
    output_type: str = "pt"

    def differences(self, other: SampleSettings) -> list[str]:
        """Describes each setting that differs from `other`; empty if both give the same samples."""
        compared = [entry.name for entry in fields(self) if entry.compare]
        return [
            f"{name} {_text(getattr(other, name))} instead of {_text(getattr(self, name))}"
            for name in compared
            if getattr(self, name) != getattr(other, name)
        ]

    def save(self, path: Path) -> None:
        """Writes the settings as JSON."""
        text = json.dumps(asdict(self), indent=2) + "\n"
        write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))

    @classmethod
    def load(cls, path: Path) -> SampleSettings:
        """Reads settings that `save` wrote.

        Raises:
            ValueError: if the file holds anything else.
        """
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            if "regularizer_scale" not in stored and "guidance_scale" in stored:  # its name up to version 0.3
                stored["regularizer_scale"] = stored.pop("guidance_scale")
            return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()})
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} does not hold the settings of samples") from error


def _text(value) -> str:
    text = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return (text if len(text) <= 40 else f"{text[:37]}...") or "none"
