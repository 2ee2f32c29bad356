"""What the machine offers: CPU threads, number formats."""

from __future__ import annotations

import argparse
import os

import torch
from accelerate.utils import parse_flag_from_env

from .errors import UsageError

__all__ = ["choose_mixed_precision", "cpu_is_wanted", "set_threads"]


def set_threads(args: argparse.Namespace) -> int:
    """Uses all cores, shared by the processes of this machine, and returns the number of threads.

    `accelerate launch` sets OMP_NUM_THREADS=1 where the user has not set it, which leaves all other cores idle; so 1
    is overruled, and any other number is kept.
    """
    declared = int(os.environ.get("OMP_NUM_THREADS", "1") or 1)
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = args.num_threads or (declared if declared > 1 else max(cores // processes, 1))
    torch.set_num_threads(threads)
    return threads


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
