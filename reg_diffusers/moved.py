"""Modules of version 0.3 under their names of today: an old import works, with a warning that names the new one."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from importlib.abc import Loader, MetaPathFinder

__all__ = ["MOVED", "watch"]

MOVED = {
    "evaluation.diagnosis": "diagnosis.diagnosis",
    "evaluation.diagnosis_result": "diagnosis.result",
    "evaluation.ideal_denoiser": "diagnosis.ideal_denoiser",
    "evaluation.response": "diagnosis.response",
    "evaluation.verdict": "diagnosis.verdict",
    "card": "hub.card",
    "samplers": "sampling.schedulers",
}
_PACKAGE = __name__.partition(".")[0]


class _Moved(Loader, MetaPathFinder):
    """Finds a module under its old name, and loads the one that has taken its place."""

    def find_spec(self, name: str, path=None, target=None):
        new = MOVED.get(name.removeprefix(f"{_PACKAGE}."))
        if not name.startswith(f"{_PACKAGE}.") or new is None:
            return None
        warnings.warn(f"{name} has moved: import {_PACKAGE}.{new}", FutureWarning, stacklevel=2)
        return importlib.util.spec_from_loader(name, self, origin=f"{_PACKAGE}.{new}")

    def create_module(self, spec):
        module = importlib.import_module(spec.origin)
        self._spec = module.__spec__
        return module

    def exec_module(self, module) -> None:
        module.__spec__ = self._spec  # which the import under the old name replaced


def watch() -> None:
    """Makes the old names importable; they are looked up only where no module has the name."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.append(_Moved())
