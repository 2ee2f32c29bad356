"""All settings of a training run."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from .data import DataSettings
from .flags import names
from .hub import HubSettings
from .loss import LossSettings
from .machine import MachineSettings
from .model import ModelSettings
from .optimization import OptimizationSettings
from .output import OutputSettings
from .validation import ValidationSettings

__all__ = ["Settings"]


@dataclass(frozen=True)
class Settings:
    """The settings of a run, grouped by subject: the result of `parse_args` and the argument of `train_reg.train`.

        Settings(DataSettings(train_data_dir="photos"), loss=LossSettings(("total_variation",), (0.05,)))

    `Settings()` has the defaults of the flags; `parse_args([])` has those of the demonstration on the embedded images.
    """

    data: DataSettings = field(default_factory=DataSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    loss: LossSettings = field(default_factory=LossSettings)
    optimization: OptimizationSettings = field(default_factory=OptimizationSettings)
    machine: MachineSettings = field(default_factory=MachineSettings)
    output: OutputSettings = field(default_factory=OutputSettings)
    hub: HubSettings = field(default_factory=HubSettings)
    validation: ValidationSettings = field(default_factory=ValidationSettings)

    def values(self) -> dict[str, Any]:
        """Returns all settings by the name of their flag."""
        return {name: value for section in fields(self) for name, value in vars(getattr(self, section.name)).items()}

    def mathematics(self) -> dict[str, Any]:
        """Returns the settings that affect the results of a run, by the name of their flag."""
        return self._declared("mathematics")

    def kept(self) -> dict[str, Any]:
        """Returns the settings for the settings file of a run, by the name of their flag; never a token."""
        return self._declared("kept")

    def _declared(self, attribute: str) -> dict[str, Any]:
        sections = [getattr(self, section.name) for section in fields(self)]
        return {name: getattr(section, name) for section in sections for name in names(type(section), attribute)}
