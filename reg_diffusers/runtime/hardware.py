"""Chooses CPU threads, memory use and precision for this machine."""

from __future__ import annotations

import ctypes
import os

import torch
from accelerate.utils import parse_flag_from_env

from .errors import UsageError

__all__ = ["allow_tf32", "choose_mixed_precision", "cpu_is_wanted", "frozen_precision", "is_left_to_timing"]
__all__ += ["keep_freed_memory", "precision_reason", "set_threads", "threads_reason"]

_MOST_THREADS_PER_CORE = 16
_SUPPORTED = "supported by the hardware"

# Parameters of mallopt, from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def set_threads(asked: int | None = None) -> int:
    """Uses all cores, divided among the processes of this machine, and returns the number of threads.

    `accelerate launch` sets OMP_NUM_THREADS=1 if the user did not set it, which leaves all other cores idle. So this
    overrides 1 and keeps any other number.

    Raises:
        UsageError: far more threads are asked for than there are cores, so that starting them takes minutes.
    """
    declared = _declared_threads()
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if asked and asked > _MOST_THREADS_PER_CORE * cores:
        raise UsageError(f"--num_threads {asked}: this process has {cores} cores: name at most that number")
    threads = asked or (declared if declared > 1 else max(cores // processes, 1))
    torch.set_num_threads(threads)
    return threads


def threads_reason(asked: int | None, processes: int) -> str:
    """Returns the reason for the choice of `set_threads`, in a few words."""
    if asked:
        return "as asked"
    if _declared_threads() > 1:
        return "OMP_NUM_THREADS"
    return "all cores" if processes == 1 else "the cores, shared"


def _declared_threads() -> int:
    return int(os.environ.get("OMP_NUM_THREADS", "1") or 1)


def keep_freed_memory(device: torch.device) -> bool:
    """Keeps freed memory in this process for the next step; returns whether it does so now.

    glibc returns large blocks to the system as soon as they are freed. The next step requests the same blocks again,
    and the system zeroes each page on first access: a hundred thousand page faults or more per step on a CPU. The peak
    memory use does not change; only the use between the peaks is higher. Applies to training on a CPU under Linux with
    glibc, and does nothing elsewhere. MALLOC_MMAP_MAX_, MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_ or
    GLIBC_TUNABLES in the environment take precedence.

    Args:
        device: the training device.
    """
    tuned = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")
    if device.type != "cpu" or any(os.environ.get(name) for name in tuned):
        return False
    try:
        is_glibc = bool(os.confstr("CS_GNU_LIBC_VERSION"))
        mallopt = ctypes.CDLL(None).mallopt if is_glibc else None
    except (AttributeError, OSError, ValueError):  # another C library, another system
        return False
    # Allocate blocks of any size from the heap, and never shrink it.
    return mallopt is not None and all([mallopt(_M_MMAP_MAX, 0), mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)])


def allow_tf32(device: torch.device, mixed_precision: str | None) -> bool:
    """Lets float32 products on a CUDA device use TF32, with 10 bits of mantissa; returns whether they do.

    Products that autocast leaves in float32 are several times faster in it. Does nothing on other devices, and with
    --mixed_precision no, which asks for float32.

    Args:
        device: the training device.
        mixed_precision: the flag, or None.
    """
    is_used = device.type == "cuda" and mixed_precision != "no"
    if is_used:
        torch.set_float32_matmul_precision("high")
    return is_used


def choose_mixed_precision(asked: str | None = None) -> str:
    """Returns "no", "fp16" or "bf16": the flag, else accelerate's configuration, else bf16 if the hardware has it.

    A CPU without hardware support emulates bf16, many times slower than float32.

    Raises:
        UsageError: for fp16 without a GPU.
    """
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        return "no"  # otherwise the network and its average would be in half precision
    on_cpu = cpu_is_wanted() or not torch.cuda.is_available()
    chosen = asked
    if chosen is None:
        configured = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        chosen = configured if configured != "no" else ("bf16" if _has_bf16(on_cpu) else "no")
    if chosen == "fp16" and on_cpu and not torch.backends.mps.is_available():
        raise UsageError("--mixed_precision fp16 needs a GPU: use bf16, or no")
    return chosen


def precision_reason(asked: str | None, chosen: str) -> str:
    """Returns the reason for the choice of `choose_mixed_precision`, in a few words."""
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        return "DeepSpeed would keep the network itself in half precision"
    if asked is not None:
        return "as asked"
    if os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no":
        return "accelerate's configuration"
    return _SUPPORTED if chosen == "bf16" else "the hardware does not support bf16"


def is_left_to_timing(asked: str | None) -> bool:
    """Whether bf16 was chosen only because a CPU names the instructions: some are slower in it than in float32."""
    on_cpu = cpu_is_wanted() or not torch.cuda.is_available()
    chosen = choose_mixed_precision(asked)
    return on_cpu and chosen == "bf16" and precision_reason(asked, chosen) == _SUPPORTED


def frozen_precision(asked: str | None) -> torch.dtype:
    """Returns the dtype of weights that are not trained: that of `choose_mixed_precision`, unless timing decides."""
    chosen = "no" if is_left_to_timing(asked) else choose_mixed_precision(asked)
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(chosen, torch.float32)


def cpu_is_wanted() -> bool:
    """Whether Accelerate is configured not to use GPUs."""
    return parse_flag_from_env("ACCELERATE_USE_CPU")


def _has_bf16(on_cpu: bool) -> bool:
    if not on_cpu:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capability = getattr(torch.backends.cpu, "get_cpu_capability", lambda: "")()
    flags = [
        getattr(torch.cpu, name, lambda: False) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    ]
    return capability != "AVX2" and any(flag() for flag in flags)
