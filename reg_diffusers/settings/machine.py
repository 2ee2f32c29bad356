"""Settings of the machine: precision, attention, compilation, memory, threads."""

from __future__ import annotations

from dataclasses import dataclass

from ..runtime.errors import UsageError
from .flag_values import positive_int
from .flags import flag

__all__ = ["MachineSettings"]


@dataclass(frozen=True)
class MachineSettings:
    """How to run the network.

    Raises:
        UsageError: for two kinds of attention at once.
    """

    mixed_precision: str | None = flag(
        None,
        "precision of the network; default: the configuration of accelerate, else bf16 on a GPU that supports it. On a"
        " CPU that supports it, a run of at least 600 batches times both at its start and takes bf16 if that is 1.15 x"
        " as fast; a shorter run uses float32. L' always runs in float32",
        choices=["no", "fp16", "bf16"],
    )
    attention: str | None = flag(
        None,
        "attention by PyTorch's fused kernel (sdpa) or by explicit matrix products; default: explicit in bf16 on a CPU"
        " if the matrix of a batch takes at most 128 MB per layer, else sdpa",
        choices=["sdpa", "explicit"],
    )
    compile: bool = flag(
        False,
        "compile the network for the training (torch.compile), which takes minutes at the start; no gain measured on a"
        " CPU, not tested on a GPU",
    )
    gradient_checkpointing: bool = flag(
        False,
        "keep fewer activations and recompute them in the backward pass: less memory, longer steps",
        mathematics=False,
    )
    num_threads: int | None = flag(
        None, "CPU threads per process; default: all cores, shared evenly", parse=positive_int, mathematics=False
    )
    local_rank: int | None = flag(None, "ignored; set by Accelerate", parse=int, mathematics=False, kept=False)
    enable_xformers_memory_efficient_attention: bool = flag(
        False, "use xformers' attention on a GPU", mathematics=False
    )

    def __post_init__(self):
        if self.enable_xformers_memory_efficient_attention and self.attention is not None:
            raise UsageError("--enable_xformers_memory_efficient_attention and --attention are mutually exclusive")
