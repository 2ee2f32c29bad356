"""Builds the Accelerator of a training, and rejects configurations that train_reg.py does not support."""

from __future__ import annotations

import os
from pathlib import Path

from accelerate import Accelerator, PartialState
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin, parse_flag_from_env

from .errors import UsageError

__all__ = ["build_accelerator", "check_engine"]


def build_accelerator(
    mixed_precision: str, gradient_accumulation_steps: int, seed: int, logger: str | None, logging_dir: Path
) -> Accelerator:
    """Builds the accelerator of one training.

    Args:
        mixed_precision: "no", "fp16" or "bf16".
        gradient_accumulation_steps: batches per optimizer step.
        seed: the seed of the data order.
        logger: the name of a tracker, or None.
        logging_dir: the folder of the tracker's files.
    """
    return Accelerator(
        mixed_precision=mixed_precision,
        # A step spans a fixed number of batches, even across the end of an epoch: as with one larger batch.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=gradient_accumulation_steps, sync_with_dataloader=False
        ),
        log_with=logger,
        project_dir=logging_dir,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=seed, non_blocking=True),
    )


def check_engine(state: PartialState, mixed_precision: str | None, is_compiled: bool, max_grad_norm: float) -> None:
    """Rejects flags that Accelerate would silently ignore, and engines with weights that cannot be sampled from.

    Raises:
        UsageError: for --compile with FSDP or DeepSpeed, FSDP on CPUs or version 1, and DeepSpeed with stage 3, with
            weights in half precision, or with another gradient clipping norm.
    """
    sharded = [name for name in ("FSDP", "DeepSpeed") if parse_flag_from_env(f"ACCELERATE_USE_{name.upper()}")]
    if is_compiled and sharded:
        raise UsageError(f"--compile is not supported with {sharded[0]}: drop the flag")
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        if state.device.type == "cpu":
            raise UsageError("FSDP needs GPUs, accelerate ignores it on CPUs: launch without an FSDP configuration")
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise UsageError("FSDP version 1 is not supported: set fsdp_version: 2, see docs/accelerate/fsdp2.yaml")
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        if os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2") == "3":
            raise UsageError(
                "DeepSpeed ZeRO stage 3 is not supported: set zero_stage: 2, or use docs/accelerate/fsdp2.yaml"
            )
        if (mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")) != "no":
            raise UsageError(
                "with DeepSpeed, mixed precision keeps the network itself in half precision, which is not supported:"
                " use --mixed_precision no, or docs/accelerate/fsdp2.yaml"
            )
        clipping = os.environ.get("ACCELERATE_GRADIENT_CLIPPING", "auto")
        norm = 1.0 if clipping == "auto" else float(clipping)  # accelerate replaces "auto" by 1
        if norm != max_grad_norm:
            raise UsageError(
                f"--max_grad_norm {max_grad_norm:g}: DeepSpeed clips gradients to {norm:g}, from its own"
                f" configuration: set gradient_clipping: {max_grad_norm:g} there"
            )
