"""What decides the samples, in the form in which it is kept beside them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from ..files import write_whole

__all__ = ["Settings"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides sample i: nothing else does, up to the rounding of float32.

    Attributes:
        model: folder or Hub id, for the reader: the same model may have another name tomorrow.
        model_sha256: see `sampler.fingerprint`.
        scheduler: one of the names of `samplers.fitting_samplers`.
        num_inference_steps: calls of the network for each sample.
        seed: sample i begins with `torch.Generator().manual_seed(seed + i)`.
        class_labels: sample i is of class `class_labels[i % n]`; empty for a network without classes.
        condition_sha256: of the conditioning images, of which sample i gets number i % n; "" without.
        guidance: losses that steer the sampler, by the names of `specs.load_regularizer`.
        guidance_scale: factor of them all, see `RegDDPMPipeline`.
        guidance_method: "mpgd", "dps" or "lgd".
        mixed_precision: "no", or "bf16" for a network that computes in bfloat16.
    """

    model: str = field(default="", compare=False)
    model_sha256: str
    scheduler: str
    num_inference_steps: int
    seed: int = 0
    class_labels: tuple[int, ...] = ()
    condition_sha256: str = ""
    guidance: tuple[str, ...] = ()
    guidance_scale: float = 0.0
    guidance_method: str = "mpgd"
    mixed_precision: str = "no"

    def differences(self, other: Settings) -> list[str]:
        """One text for each setting that draws other samples than those of `other`; empty if the samples are equal."""
        compared = [entry.name for entry in fields(self) if entry.compare]
        return [
            f"{name} {_text(getattr(other, name))} instead of {_text(getattr(self, name))}"
            for name in compared
            if getattr(self, name) != getattr(other, name)
        ]

    def save(self, path: Path) -> None:
        """Writes them as JSON."""
        text = json.dumps(asdict(self), indent=2) + "\n"
        write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))

    @classmethod
    def load(cls, path: Path) -> Settings:
        """Reads what `save` wrote.

        Raises:
            ValueError: it is something else.
        """
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()})
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} does not hold the settings of samples") from error


def _text(value) -> str:
    text = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return (text if len(text) <= 40 else f"{text[:37]}...") or "none"
