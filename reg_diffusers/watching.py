"""Captures the input and output of a network that another object calls, such as a loss that computes x_t itself."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .prediction import tensor_of

__all__ = ["Watched", "watched"]

_SAMPLES = ("sample", "hidden_states", "x", "x_t", "noisy_samples", "latents", "input")
_TIMES = ("timestep", "timesteps", "t", "time", "sigma", "noise_labels", "noise_cond")


@dataclass(frozen=True)
class _Call:
    model_output: Tensor
    timesteps: Tensor
    sample: Tensor


class Watched:
    """The output and input of a network inside `X0Regularization.watch`, in the order of `scheduler.step`.

    Unpacks to (model_output, timesteps, sample), the arguments of the loss.

    Attributes:
        model_output: output of the network, with its graph, (B, C, ...).
        timesteps: timesteps, as the network received them.
        sample: input x_t, as the network received it, (B, C, ...).
    """

    def __init__(self, name: str, call: int):
        self._name, self._takes_last = name, call == -1
        self._call: _Call | None = None
        self._is_open = True

    @property
    def model_output(self) -> Tensor:
        return self._seen().model_output

    @property
    def timesteps(self) -> Tensor:
        return self._seen().timesteps

    @property
    def sample(self) -> Tensor:
        return self._seen().sample

    def __iter__(self) -> Iterator[Tensor]:
        seen = self._seen()
        return iter((seen.model_output, seen.timesteps, seen.sample))

    def record(self, module: nn.Module, args: tuple, kwargs: dict, output) -> None:
        """Records one call of the network, as its forward hook."""
        if torch._C._current_graph_task_id() != -1:  # checkpointing recomputes the forward pass in the backward pass
            return
        if self._call is not None and not self._takes_last:
            raise ValueError(
                f"watch: {self._name} was called a second time: watch(model, call=-1) takes the last call, as for"
                " self-conditioning"
            )
        self._call = _Call(tensor_of(output), *_input_of(module, args, kwargs))

    def close(self) -> None:
        """Releases the tensors."""
        self._call, self._is_open = None, False

    def _seen(self) -> _Call:
        if not self._is_open:
            raise ValueError("watch releases the tensors at the end of its block: compute the loss inside it")
        if self._call is None:
            raise ValueError(
                f"watch: {self._name} has not been called in the block: watch the module that your loop calls, for"
                " example the wrapped or compiled one"
            )
        return self._call


@contextmanager
def watched(model: nn.Module, call: int) -> Iterator[Watched]:
    """Watches a network in a block; see `X0Regularization.watch`.

    Raises:
        TypeError: the network is not a module.
        ValueError: `call` is neither 0 nor -1.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"watch needs the network, an nn.Module, not {type(model).__name__}")
    if call not in (0, -1):
        raise ValueError(f"call must be 0, the only call, or -1, the last of several, not {call!r}")
    seen = Watched(type(model).__name__, call)
    handle = model.register_forward_hook(seen.record, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()
        seen.close()


def _input_of(model: nn.Module, args: tuple, kwargs: dict) -> tuple[Tensor, Tensor]:
    """Returns the timesteps and x_t among the arguments of a call: by their usual names, or else the first two."""
    named = _by_name(model, args, kwargs)
    sample = named.get(_first(named, _SAMPLES), args[0] if args else None)
    timesteps = named.get(_first(named, _TIMES), args[1] if len(args) > 1 else None)
    if not isinstance(sample, Tensor) or timesteps is None:
        missing = "timesteps" if isinstance(sample, Tensor) else "x_t"
        raise ValueError(
            f"watch: no {missing} among the arguments of {type(model).__name__}, {len(args)} by position and"
            f" {', '.join(kwargs) or 'none'} by name: pass model_output, timesteps and x_t to the loss in the loop"
        )
    return torch.as_tensor(timesteps), sample


def _by_name(model: nn.Module, args: tuple, kwargs: dict) -> dict:
    """Returns the arguments of a call by the names that `forward` gives them; those of a wrapper may have none."""
    try:
        signature = inspect.signature(model.forward)
        named = signature.bind_partial(*args, **kwargs).arguments
    except (TypeError, ValueError):
        return kwargs
    whole = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)  # *args, **kwargs
    return {name: value for name, value in named.items() if signature.parameters[name].kind not in whole} | kwargs


def _first(named: dict, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in named), None)
