"""Loads the model that --model names."""

from __future__ import annotations

__all__ = ["add_model_flag", "load_pipeline"]

_TYPICAL_BATCH = 64  # one number for all batches, so that no sample depends on how many are drawn at a time


def add_model_flag(parser) -> None:
    """Adds --model."""
    parser.add_argument(
        "--model", default="reg-ddpm-model", metavar="FOLDER_OR_ID", help="a saved pipeline (default: %(default)s)"
    )


def load_pipeline(model: str, device=None, *, mixed_precision: str = "no"):
    """The pipeline, its network frozen.

    Args:
        model: folder or Hub id.
        device: to bring it to; default: the accelerator if there is one.
        mixed_precision: "bf16" for samples in bfloat16, whose attention is computed in the way that is fastest here.

    Raises:
        UsageError: there is no such pipeline.
    """
    import torch

    from ..attention import prefers_explicit_attention, use_explicit_attention
    from ..pipeline import RegDDPMPipeline
    from ..training.errors import UsageError
    from ..training.hardware import keep_freed_memory

    try:
        pipeline = RegDDPMPipeline.from_pretrained(model)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(
            f"--model {model}: no such folder or Hub id with a pipeline (train_reg.py makes one): {reason}"
        ) from error
    if device is None:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    pipeline.unet.requires_grad_(False)  # guidance asks for gradients of the image only
    device = torch.device(device)
    keep_freed_memory(device)
    if prefers_explicit_attention(pipeline.unet, _TYPICAL_BATCH, device.type, mixed_precision):
        use_explicit_attention(pipeline.unet)
    return pipeline.to(device)
