"""Diagnosis before training: whether an auxiliary loss makes sense on a data set, why, and with which weight."""

from .diagnosis import diagnose
from .result import Diagnosis
from .verdict import Verdict, judge

__all__ = ["Diagnosis", "Verdict", "diagnose", "judge"]
