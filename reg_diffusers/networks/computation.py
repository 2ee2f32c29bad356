"""Chooses how to run a network on this machine: precision, threads, memory, attention."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..runtime.hardware import choose_mixed_precision, keep_freed_memory, set_threads
from ..settings.machine import MachineSettings
from .attention import attention_bytes, prefers_explicit_attention

__all__ = ["CompiledForBatches", "Computation", "choose_attention", "choose_computation"]


# diffusers reads PyTorch's version by a cached function; the result never changes.
warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`-wrapped function")


@dataclass(frozen=True)
class Computation:
    """The choices for this run, from the settings or for this machine.

    Attributes:
        mixed_precision: "no", "fp16" or "bf16".
        threads: number of CPU threads in this process.
        keeps_memory: whether memory freed by a step is kept for the next one.
    """

    mixed_precision: str
    threads: int
    keeps_memory: bool


def choose_computation(machine: MachineSettings, device: torch.device) -> Computation:
    """Chooses precision, threads and use of memory, and sets the latter two for this process.

    Raises:
        UsageError: for fp16 without a GPU.
    """
    return Computation(
        choose_mixed_precision(machine.mixed_precision),
        set_threads(machine.num_threads),
        keep_freed_memory(device),
    )


def choose_attention(
    machine: MachineSettings, unet: UNet2DModel, batch_size: int, device: torch.device, mixed_precision: str
) -> tuple[str, str]:
    """Returns "explicit" or "sdpa", and the reason; by a fixed rule, so that a resumed run chooses the same.

    Args:
        machine: the settings.
        unet: the network of `build_unet`.
        batch_size: the batch size of the training.
        device: the device of the training.
        mixed_precision: the precision of the training.
    """
    if machine.enable_xformers_memory_efficient_attention:
        return "sdpa", "replaced by xformers"
    if machine.attention is not None:
        return machine.attention, "as asked"
    if prefers_explicit_attention(unet, batch_size, device.type, mixed_precision):
        return "explicit", "faster in bf16 on a CPU"
    if device.type != "cpu" or mixed_precision != "bf16":
        return "sdpa", "PyTorch's own"
    return "sdpa", f"explicit would keep {attention_bytes(unet, batch_size) / 2**20:.0f} MB a layer"


class CompiledForBatches:
    """Runs a compiled network for batches of one size, and the uncompiled network for all others.

    The network is compiled once, for one shape: another compilation for a last, shorter batch would take a minute.
    Grids of samples and the images of an evaluation have other shapes, too, but call the network itself. The module
    does not change, so its weights keep their names, and accelerate treats it like any other.

    Args:
        network: a `UNet2DModel` prepared by accelerate, called with return_dict=False.
        batch_size: number of images in a batch of each process.
        backend: the backend of torch.compile.
    """

    def __init__(self, network: nn.Module, batch_size: int, backend: str | Callable = "inductor"):
        self._network = network
        self._batch_size = batch_size
        # Averaging the gradients of the processes breaks the graph. Any other break is an error, not a slow step.
        is_one_graph = not isinstance(network, DistributedDataParallel)
        self._compiled = torch.compile(network, dynamic=False, fullgraph=is_one_graph, backend=backend)

    def __call__(self, sample: Tensor, *args, **kwargs):
        network = self._compiled if len(sample) == self._batch_size else self._network
        return network(sample, *args, **kwargs)
