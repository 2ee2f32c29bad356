"""The judgement of a loss before training, of models after it."""

from .diagnosis import Diagnosis, diagnose
from .verdict import Verdict, judge

__all__ = ["Diagnosis", "Verdict", "diagnose", "judge"]
