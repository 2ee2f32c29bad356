"""Chooses how to run a network on this machine: precision, attention, compilation."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..runtime.errors import UsageError
from ..runtime.hardware import choose_mixed_precision, is_left_to_timing, precision_reason
from ..settings.machine import MachineSettings
from .attention import attention_bytes, prefers_explicit_attention
from .timing import LEAST_BATCHES, time_precision

__all__ = ["Choice", "CompiledForBatches", "Computation", "choose_computation"]


# diffusers reads PyTorch's version by a cached function; the result never changes.
warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`-wrapped function")


@dataclass(frozen=True)
class Choice:
    """A choice for the computation of a run, and the reason for it in a few words."""

    value: str
    reason: str


@dataclass(frozen=True)
class Computation:
    """How a run computes its network.

    Attributes:
        mixed_precision: "no", "fp16" or "bf16".
        attention: "sdpa" or "explicit".
    """

    mixed_precision: Choice
    attention: Choice

    @property
    def recorded(self) -> dict[str, str]:
        """The choices by the flags that pin them, without the dashes."""
        return {"mixed_precision": self.mixed_precision.value, "attention": self.attention.value}


def choose_computation(
    machine: MachineSettings,
    unet: UNet2DModel,
    device: torch.device,
    *,
    batch_size: int,
    batches: int,
    earlier: Callable[[], str | None],
    call: Callable[[nn.Module, int], Tensor],
) -> Computation:
    """Chooses precision and attention: the flags, else what an earlier start of the run chose, else the machine's.

    bf16 on a CPU that computes in it is used only if real steps are faster, and only timed if the run is long enough.

    Args:
        machine: the settings.
        unet: the network of `build_unet`.
        device: the device of the training.
        batch_size: images per batch on this device.
        batches: the number of batches in the run.
        earlier: finds the precision at an earlier start of the run; returns None for a new run.
        call: calls a network on that number of images, and returns its output.

    Raises:
        UsageError: for fp16 without a GPU.
    """
    asked = machine.mixed_precision
    value = choose_mixed_precision(asked)
    precision = Choice(value, precision_reason(asked, value))
    attention = _attention(machine, unet, batch_size, device, value)
    if not is_left_to_timing(asked):
        return Computation(precision, attention)
    if (before := earlier()) in ("no", "bf16"):
        precision = Choice(before, "as at the start of this run")
    elif batches < LEAST_BATCHES:
        precision = Choice("no", f"bf16 is timed from {LEAST_BATCHES} batches on; --mixed_precision bf16 uses it")
    else:
        timing = time_precision(unet, call, dtype=torch.bfloat16, attention=attention.value, batch_size=batch_size)
        if timing is None:
            precision = Choice("no", "timing bf16 would take too long; --mixed_precision bf16 uses it")
        elif timing.is_worth_it:
            precision = Choice("bf16", f"{timing}; pinned by --mixed_precision bf16")
        else:
            precision = Choice("no", f"bf16 is only {timing}; pinned by --mixed_precision no")
    if precision.value == value:
        return Computation(precision, attention)
    return Computation(precision, _attention(machine, unet, batch_size, device, precision.value))


def _attention(
    machine: MachineSettings, unet: UNet2DModel, batch_size: int, device: torch.device, mixed_precision: str
) -> Choice:
    """Chooses by a fixed rule, so that a resumed run chooses the same."""
    if not isinstance(unet, UNet2DModel):
        if machine.attention == "explicit":
            raise UsageError("--attention explicit: only a UNet2DModel supports it; drop the flag")
        return Choice("sdpa", "PyTorch's own")
    if machine.enable_xformers_memory_efficient_attention:
        return Choice("sdpa", "replaced by xformers")
    if machine.attention is not None:
        return Choice(machine.attention, "as asked")
    if prefers_explicit_attention(unet, batch_size, device.type, mixed_precision):
        return Choice("explicit", "faster in bf16 on a CPU")
    if device.type != "cpu" or mixed_precision != "bf16":
        return Choice("sdpa", "PyTorch's own")
    return Choice("sdpa", f"explicit would keep {attention_bytes(unet, batch_size) / 2**20:.0f} MB a layer")


class CompiledForBatches:
    """Runs a compiled network for batches of one number of images, and the uncompiled network for all others.

    The network is compiled once for each size of images (one without --buckets), when it first has a full batch:
    another compilation for a last, shorter batch would take a minute.
    Grids of samples and the images of an evaluation have other shapes, too, but call the network itself. The module
    does not change, so its weights keep their names, and accelerate treats it like any other.

    Args:
        network: a `UNet2DModel` prepared by accelerate, called with return_dict=False.
        batch_size: number of images in a batch of each process.
        backend: the backend of torch.compile.
        sizes: number of sizes of images.
    """

    def __init__(self, network: nn.Module, batch_size: int, backend: str | Callable = "inductor", *, sizes: int = 1):
        self._network = network
        self._batch_size = batch_size
        self._limit = torch._dynamo.config.recompile_limit + sizes  # above it, PyTorch stops
        # Averaging the gradients of the processes breaks the graph. Any other break is an error, not a slow step.
        is_one_graph = not isinstance(network, DistributedDataParallel)
        self._compiled = torch.compile(network, dynamic=False, fullgraph=is_one_graph, backend=backend)

    def __call__(self, sample: Tensor, *args, **kwargs):
        if len(sample) != self._batch_size:
            return self._network(sample, *args, **kwargs)
        with torch._dynamo.config.patch(recompile_limit=self._limit):
            return self._compiled(sample, *args, **kwargs)
