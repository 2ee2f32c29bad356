"""Finds the networks of a regularizer, among its attributes and the names that its functions use."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn

__all__ = ["checksums", "find_networks"]

_OBJECTS_LOOKED_AT = 10_000
_NOT_SEARCHED = ("torch", "numpy", "builtins", "functools")


def find_networks(regularizer: Callable) -> dict[str, nn.Module]:
    """Returns the networks that a call of the regularizer may use, by the names under which they were found.

    The search covers the regularizer itself, its attributes, arguments bound by `partial`, lists, tuples and
    dictionaries of these, and the global and nonlocal names of its functions and of the functions that they call.
    Submodules of a network are not listed separately.
    """
    found: dict[str, nn.Module] = {}
    parts: set[int] = set()
    seen: set[int] = set()
    waiting = [("", regularizer)]
    while waiting and len(seen) < _OBJECTS_LOOKED_AT:
        name, item = waiting.pop(0)
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, nn.Module) and id(item) not in parts:
            found[name or type(item).__name__] = item
            parts.update(map(id, item.modules()))
        waiting.extend(_inside(name, item))
    return found


def checksums(network: nn.Module) -> dict[str, tuple]:
    """Returns sums of each parameter and buffer, by name; they are cheap, and differ if a tensor has changed."""
    tensors = [*network.named_parameters(), *network.named_buffers()]
    return {name: _sums(tensor.detach()) for name, tensor in tensors if tensor.device.type != "meta"}


def _sums(tensor: torch.Tensor) -> tuple:
    if not tensor.dtype.is_floating_point:
        return (tensor.sum().item(),)
    flat = tensor.flatten()
    return flat.sum(dtype=torch.float64).item(), torch.linalg.vector_norm(flat, dtype=torch.float64).item()


def _inside(name: str, item) -> Iterator[tuple[str, object]]:
    """Yields the objects that an object refers to, with their names."""
    if isinstance(item, partial):
        yield from [(name, item.func), *((name, value) for value in item.args), *item.keywords.items()]
    elif isinstance(item, types.MethodType):
        yield from [(name, item.__self__), (name, item.__func__)]
    elif isinstance(item, types.FunctionType):
        yield from _names_of(item)
    elif isinstance(item, dict):
        yield from ((str(key), value) for key, value in list(item.items())[:100])
    elif isinstance(item, list | tuple | set):
        yield from ((name, value) for value in list(item)[:100])
    elif not isinstance(item, type | types.ModuleType) and _is_searched(type(item)):
        yield from getattr(item, "__dict__", {}).items()
        for kind in filter(_is_searched, type(item).__mro__):
            yield from ((name, value) for value in vars(kind).values() if isinstance(value, types.FunctionType))


def _names_of(function: types.FunctionType) -> Iterator[tuple[str, object]]:
    """Yields the global and nonlocal names of a function: networks, functions and objects that may hold networks."""
    if not _is_searched(function):
        return
    try:
        around = inspect.getclosurevars(function)
    except ValueError:  # a cell that is still empty
        return
    yield from around.nonlocals.items()
    yield from around.globals.items()
    if wrapped := getattr(function, "__wrapped__", None):
        yield function.__name__, wrapped


def _is_searched(item) -> bool:
    return (getattr(item, "__module__", None) or "").split(".")[0] not in _NOT_SEARCHED
