"""Loads the model of --model."""

from __future__ import annotations

__all__ = ["add_model_flag", "load_pipeline"]

_TYPICAL_BATCH = 64  # one value for all batch sizes, so that samples do not depend on the batch size


def add_model_flag(parser) -> None:
    """Adds --model."""
    parser.add_argument(
        "--model", default="reg-ddpm-model", metavar="FOLDER_OR_ID", help="a saved pipeline (default: %(default)s)"
    )


def load_pipeline(model: str, device=None, *, mixed_precision: str = "no"):
    """Loads a pipeline and freezes its network.

    Args:
        model: a folder or Hub id.
        device: the device to move it to; the accelerator, if there is one, by default.
        mixed_precision: "bf16" for sampling in bfloat16; it selects the fastest attention for that precision.

    Raises:
        UsageError: if there is no such pipeline.
    """
    from pathlib import Path

    import torch

    from ..networks.attention import prefers_explicit_attention, use_explicit_attention
    from ..pipeline import RegDDPMPipeline
    from ..runs.run_folder import LORA_FILE
    from ..runtime.errors import UsageError
    from ..runtime.hardware import keep_freed_memory

    if Path(model, LORA_FILE).is_file():
        raise UsageError(
            f"--model {model} holds LoRA weights, which this command does not read: load the pipeline that was"
            f" fine-tuned in diffusers, then pipeline.load_lora_weights({model!r})"
        )
    try:
        pipeline = RegDDPMPipeline.from_pretrained(model)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(
            f"--model {model}: no folder or Hub id with a pipeline (train_reg.py saves one): {reason}"
        ) from error
    if device is None:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    if pipeline.vqvae is not None:
        pipeline.vqvae.requires_grad_(False)
    pipeline.unet.requires_grad_(False)  # guidance needs the gradient of the image only
    device = torch.device(device)
    keep_freed_memory(device)
    if prefers_explicit_attention(pipeline.unet, _TYPICAL_BATCH, device.type, mixed_precision):
        use_explicit_attention(pipeline.unet)
    return pipeline.to(device)
