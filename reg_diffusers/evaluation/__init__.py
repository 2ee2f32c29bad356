"""Evaluation after training: the effect of an auxiliary loss on the samples of a model, and its cost."""

import warnings
from importlib import import_module

_IN_DIAGNOSIS = ("Diagnosis", "Verdict", "diagnose", "judge")  # where version 0.3 had them


def __getattr__(name: str):
    if name not in _IN_DIAGNOSIS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"{name} has moved: import it from reg_diffusers.diagnosis", FutureWarning, stacklevel=2)
    return getattr(import_module("..diagnosis", __name__), name)
