"""What accelerate's configuration asks for, FSDP or DeepSpeed, as far as train_reg.py can do it."""

from __future__ import annotations

import argparse
import os

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from .errors import UsageError

__all__ = ["check_engine"]


def check_engine(args: argparse.Namespace, state: PartialState) -> None:
    """Refuses what accelerate would silently leave out, and engines whose weights nobody could sample from.

    Raises:
        UsageError: --compile with either; FSDP on CPUs or of version 1; DeepSpeed of stage 3, with weights in half
            precision, or clipping gradients at another norm.
    """
    divided = [name for name in ("FSDP", "DeepSpeed") if parse_flag_from_env(f"ACCELERATE_USE_{name.upper()}")]
    if args.compile and divided:
        raise UsageError(f"--compile is not supported with {divided[0]}: leave it out")
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        if state.device.type == "cpu":
            raise UsageError("FSDP needs GPUs, on CPUs accelerate leaves it out: launch without an FSDP configuration")
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise UsageError("FSDP version 1 is not supported: fsdp_version: 2, as in docs/accelerate/fsdp2.yaml")
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        if os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2") == "3":
            raise UsageError("DeepSpeed ZeRO stage 3 is not supported: zero_stage: 2, or docs/accelerate/fsdp2.yaml")
        if (args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")) != "no":
            raise UsageError(
                "with DeepSpeed, mixed precision keeps the network itself in half precision, which is not supported:"
                " --mixed_precision no, or docs/accelerate/fsdp2.yaml"
            )
        clipping = os.environ.get("ACCELERATE_GRADIENT_CLIPPING", "auto")
        norm = 1.0 if clipping == "auto" else float(clipping)  # as accelerate fills it in
        if norm != args.max_grad_norm:
            raise UsageError(
                f"--max_grad_norm {args.max_grad_norm:g}: DeepSpeed clips gradients by its own configuration, to"
                f" {norm:g}: write gradient_clipping: {args.max_grad_norm:g} there"
            )
