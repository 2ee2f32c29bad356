"""The judgement of a loss before training, of models after it."""

from .diagnosis import diagnose
from .diagnosis_result import Diagnosis
from .verdict import Verdict, judge

__all__ = ["Diagnosis", "Verdict", "diagnose", "judge"]
