"""Finds where a user's loss cuts the gradient or loses precision, by tracing the torch functions that it calls."""

from __future__ import annotations

import linecache
import os
import sys
import traceback
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

__all__ = ["Trace", "line_of_error"]

_TORCH = os.path.dirname(torch.__file__)
_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# Calls that leave the graph, by the names that users know.
_LEAVING_TORCH = {"numpy": ".numpy()", "__array__": "numpy", "item": ".item()", "tolist": ".tolist()"}
_CUTTING = {"detach": ".detach()", "detach_": ".detach_()", "__float__": "float()", "__int__": "int()"}


class Trace(TorchFunctionMode):
    """Records which calls in its block cut the gradient or compute in half precision.

        with Trace() as trace:
            regularizer(x0_hat)
        print(trace.cut, trace.half)

    Attributes:
        half: first result in half precision, such as "bfloat16 in my_losses.py, line 3: ..."; None if there is none.
    """

    def __init__(self):
        super().__init__()
        self.half: str | None = None
        self._written: list[tuple[str, str]] = []  # (name, line) of calls that leave the graph
        self._other: list[tuple[str, str]] = []  # of functions without a gradient, such as a comparison

    @property
    def cut(self) -> str | None:
        """The first cut, such as "torch.no_grad in my_losses.py, line 3: return network(x).mean(1)", or None."""
        found = self._written or self._other
        if not found:
            return None
        _, first = found[0]
        names = dict.fromkeys(name for name, line in found if line == first)
        return f"{' and '.join(names)} in {first}"

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = ".data" if function == Tensor.data.__get__ else getattr(function, "__name__", "")
        half = [tensor.dtype for tensor in _floats(result) if tensor.dtype in (torch.float16, torch.bfloat16)]
        if half and self.half is None:
            self.half = f"{str(half[0]).removeprefix('torch.')} in {_line()}"
        if name in _LEAVING_TORCH:
            self._written.append((_LEAVING_TORCH[name], _line()))
        elif any(tensor.requires_grad for tensor in _floats((args, kwargs))):
            self._record_cut(name, result)
        return result

    def _record_cut(self, name: str, result) -> None:
        if name in _CUTTING:
            self._written.append((_CUTTING[name], _line()))
        elif any(tensor.requires_grad for tensor in _floats(result)):
            return
        elif name == ".data":
            self._written.append((name, _line()))
        elif _floats(result) and not torch.is_grad_enabled():
            name = "torch.inference_mode" if torch.is_inference_mode_enabled() else "torch.no_grad"
            self._written.append((name, _line()))
        elif any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            self._other.append((f"torch's {name!r}, which has no gradient,", _line()))


def line_of_error(error: BaseException) -> str:
    """Returns the innermost line of the user's code in a traceback, as "my_losses.py, line 3: return x / 0".

    Without a line of the user's below this package, returns the innermost line outside of torch.
    """
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)][::-1]
    outside_torch = [frame for frame in frames if not _is_in(frame[0], _TORCH)]
    return _shown(_users(frames) or (outside_torch or frames)[0])


def _line() -> str:
    """Returns the innermost line of the user's code that is running."""
    frames = ((frame.f_code.co_filename, line) for frame, line in traceback.walk_stack(sys._getframe()))
    place = _users(frame for frame in frames if frame[0] != __file__)
    return _shown(place) if place else "a compiled function"


def _users(frames: Iterable[tuple[str, int]]) -> tuple[str, int] | None:
    """Returns the first (file, line) of the user's code, innermost first; else the first outside of torch."""
    outside_torch = [frame for frame in _until_this_package(frames) if not _is_in(frame[0], _TORCH)]
    own = [frame for frame in outside_torch if "-packages" not in frame[0]]
    return next(iter(own or outside_torch), None)


def _shown(place: tuple[str, int]) -> str:
    file, number = place
    code = linecache.getline(file, number).strip()
    return f"{os.path.basename(file)}, line {number}{f': {code}' if code else ''}"


def _until_this_package(frames: Iterable[tuple[str, int]]) -> Iterator[tuple[str, int]]:
    for file, line in frames:
        if _is_in(file, _PACKAGE):
            return
        yield file, line


def _is_in(file: str, folder: str) -> bool:
    return file.startswith(folder + os.sep)


def _floats(values) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
