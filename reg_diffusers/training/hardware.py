"""What the machine offers: CPU threads, memory, number formats."""

from __future__ import annotations

import argparse
import ctypes
import os

import torch
from accelerate.utils import parse_flag_from_env

from .errors import UsageError

__all__ = ["choose_mixed_precision", "cpu_is_wanted", "keep_freed_memory", "precision_reason", "set_threads"]
__all__ += ["threads_reason"]

# Parameters of mallopt, from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def set_threads(args: argparse.Namespace) -> int:
    """Uses all cores, shared by the processes of this machine, and returns the number of threads.

    `accelerate launch` sets OMP_NUM_THREADS=1 where the user has not set it, which leaves all other cores idle; so 1
    is overruled, and any other number is kept.
    """
    declared = _declared_threads()
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = args.num_threads or (declared if declared > 1 else max(cores // processes, 1))
    torch.set_num_threads(threads)
    return threads


def threads_reason(args: argparse.Namespace, processes: int) -> str:
    """Why `set_threads` has chosen so, in a few words."""
    if args.num_threads:
        return "as asked"
    if _declared_threads() > 1:
        return "OMP_NUM_THREADS"
    return "all cores" if processes == 1 else "the cores, shared"


def _declared_threads() -> int:
    return int(os.environ.get("OMP_NUM_THREADS", "1") or 1)


def keep_freed_memory(device: torch.device) -> bool:
    """Has this process keep the memory that a step frees for the next one; returns whether it now does.

    glibc gives large blocks back to the system as soon as they are freed. The next step asks for the same blocks
    again, and the system fills each page with zeros when it is first touched: a hundred thousand page faults or more
    in a step on a CPU. The peak of what is in use stays what it was; only between the peaks less
    is given back. So it is where glibc allocates, on Linux, for a training on a CPU; elsewhere nothing is done.
    MALLOC_MMAP_MAX_, MALLOC_TRIM_THRESHOLD_ or GLIBC_TUNABLES in the environment are the user's own choice, and kept.

    Args:
        device: that is trained on.
    """
    tuned = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")
    if device.type != "cpu" or any(os.environ.get(name) for name in tuned):
        return False
    try:
        is_glibc = bool(os.confstr("CS_GNU_LIBC_VERSION"))
        mallopt = ctypes.CDLL(None).mallopt if is_glibc else None
    except (AttributeError, OSError, ValueError):  # another C library, another system
        return False
    # Blocks of any size from the heap, which is never made shorter.
    return mallopt is not None and all([mallopt(_M_MMAP_MAX, 0), mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)])


def choose_mixed_precision(args: argparse.Namespace) -> str:
    """ "no", "fp16" or "bf16": the flag, else accelerate's configuration, else bf16 where the hardware computes in it.

    Without hardware support bf16 on a CPU is emulated, many times slower than float32.

    Raises:
        UsageError: fp16 without a GPU.
    """
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        return "no"  # else the network itself would be in half precision, and its average too
    on_cpu = cpu_is_wanted() or not torch.cuda.is_available()
    chosen = args.mixed_precision
    if chosen is None:
        configured = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        chosen = configured if configured != "no" else ("bf16" if _has_bf16(on_cpu) else "no")
    if chosen == "fp16" and on_cpu and not torch.backends.mps.is_available():
        raise UsageError("--mixed_precision fp16 needs a GPU: use bf16, or no")
    return chosen


def precision_reason(args: argparse.Namespace, chosen: str) -> str:
    """Why `choose_mixed_precision` has chosen so, in a few words."""
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        return "DeepSpeed would keep the network itself in half precision"
    if args.mixed_precision is not None:
        return "as asked"
    if os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no":
        return "accelerate's configuration"
    return "the hardware computes in it" if chosen == "bf16" else "the hardware does not compute in bf16"


def cpu_is_wanted() -> bool:
    """Whether accelerate was told to leave GPUs alone."""
    return parse_flag_from_env("ACCELERATE_USE_CPU")


def _has_bf16(on_cpu: bool) -> bool:
    if not on_cpu:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capability = getattr(torch.backends.cpu, "get_cpu_capability", lambda: "")()
    flags = [
        getattr(torch.cpu, name, lambda: False) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    ]
    return capability != "AVX2" and any(flag() for flag in flags)
