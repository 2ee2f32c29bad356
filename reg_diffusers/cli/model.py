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
    """Loads a pipeline, or LoRA weights with the pipeline that they record as their base, and freezes its network.

    Args:
        model: a folder or Hub id.
        device: the device to move it to; the accelerator, if there is one, by default.
        mixed_precision: "bf16" for sampling in bfloat16; it selects the fastest attention for that precision.

    Raises:
        UsageError: if there is no such pipeline.
    """
    from pathlib import Path

    import torch
    from diffusers import UNet2DModel

    from ..networks.attention import prefers_explicit_attention, use_explicit_attention
    from ..networks.classes import check_pipeline, known_families
    from ..networks.dit import RegDiTPipeline
    from ..networks.families import FAMILIES, pipeline_name
    from ..networks.whole_pipeline import load_whole_pipeline
    from ..pipeline import RegDDPMPipeline
    from ..runs.run_folder import LORA_FILE
    from ..runtime.errors import UsageError
    from ..runtime.hardware import keep_freed_memory

    dtype = torch.bfloat16 if mixed_precision == "bf16" else torch.float32
    pipeline = _lora_pipeline(model, dtype) if Path(model, LORA_FILE).is_file() else None
    name = None if pipeline else pipeline_name(model)
    is_family = name in {family.pipeline for family in FAMILIES}
    if pipeline is None and not is_family and Path(model, "model_index.json").is_file():
        check_pipeline(model, f"--model {model}", or_else=f"one of {known_families()}")
    try:
        if is_family:
            pipeline = load_whole_pipeline(model, dtype=dtype)
        kind = RegDiTPipeline if name == "DiTPipeline" else RegDDPMPipeline
        pipeline = pipeline or kind.from_pretrained(model)
    except (OSError, ValueError) as error:
        pipeline = None if Path(model).exists() else _lora_pipeline(model, dtype, missing_ok=True)
        if pipeline is None:
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
    if isinstance(pipeline.unet, UNet2DModel) and prefers_explicit_attention(
        pipeline.unet, _TYPICAL_BATCH, device.type, mixed_precision
    ):
        use_explicit_attention(pipeline.unet)
    return pipeline.to(device)


def _lora_pipeline(model: str, dtype, *, missing_ok: bool = False):
    """Loads LoRA weights and their base; None if there are none and that is allowed.

    Raises:
        UsageError: they cannot be loaded.
    """
    from huggingface_hub.errors import HFValidationError

    from ..networks.lora_pipeline import load_lora_pipeline
    from ..runtime.errors import UsageError

    try:
        return load_lora_pipeline(model, dtype=dtype)
    except UsageError as error:
        raise UsageError(f"--model {model}: {error}") from error
    except Exception as error:  # of any type, because the files may be corrupt
        if missing_ok and isinstance(error, OSError | HFValidationError):  # neither a folder nor a Hub id
            return None
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"--model {model}: its LoRA weights cannot be loaded: {reason}") from error
