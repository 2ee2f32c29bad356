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
        UsageError: if there is no such pipeline, or if it cannot be loaded.
    """
    from pathlib import Path

    import torch
    from diffusers import UNet2DModel

    from ..hub.lookup import pipeline_index, saved_file
    from ..networks.attention import prefers_explicit_attention, use_explicit_attention
    from ..networks.classes import known_families, network_folder
    from ..networks.dit import RegDiTPipeline
    from ..networks.families import family_of
    from ..networks.lora_pipeline import load_lora_pipeline
    from ..networks.whole_pipeline import load_whole_pipeline
    from ..pipeline import RegDDPMPipeline
    from ..runs.run_folder import LORA_FILE
    from ..runtime.errors import UsageError
    from ..runtime.hardware import keep_freed_memory

    dtype = torch.bfloat16 if mixed_precision == "bf16" else torch.float32
    named = f"--model {model}"
    index = None if Path(model, LORA_FILE).is_file() else pipeline_index(model, named)
    if index is None and saved_file(model, LORA_FILE, named) is None:
        raise UsageError(f"{named}: holds no pipeline; `reg-diffusers train` saves one in its output folder")
    is_family = family_of(index) is not None
    if index is not None and not is_family:
        network_folder(index, model, named, or_else=f"one of {known_families()}")
    try:
        if index is None:
            pipeline = load_lora_pipeline(model, dtype=dtype)
        elif is_family:
            pipeline = load_whole_pipeline(model, dtype=dtype)
        else:
            is_dit = index.get("_class_name") == "DiTPipeline"
            pipeline = (RegDiTPipeline if is_dit else RegDDPMPipeline).from_pretrained(model)
    except UsageError as error:
        raise UsageError(f"{named}: {error}") from error
    except Exception as error:  # of any type, because the files may be corrupt
        reason = " ".join(str(error).split()) or type(error).__name__
        what = "its LoRA weights" if index is None else "the pipeline"
        raise UsageError(f"{named}: {what} cannot be loaded: {reason}") from error
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
