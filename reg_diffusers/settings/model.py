"""Settings of the model: the network and the noise schedule of a run."""

from __future__ import annotations

from dataclasses import dataclass

from ..runtime.errors import UsageError
from .flag_values import noise_levels, positive, positive_int, prediction_type
from .flags import flag

__all__ = ["ModelSettings"]


@dataclass(frozen=True)
class ModelSettings:
    """The network and its noise schedule, saved or new.

    Raises:
        UsageError: if settings contradict each other.
    """

    model_config_name_or_path: str | None = flag(
        None,
        "config of a UNet2DModel, or in latents of a DiTTransformer2DModel (folder, file or Hub id), to train from"
        " scratch; or 'large' for a larger network up to 64 pixels; default: depends on resolution, small up to 64"
        " pixels, above as in diffusers' training script",
    )
    pretrained_model_name_or_path: str | None = flag(
        None, "fine-tune this pipeline or network (folder or Hub id); it keeps its config and prediction type"
    )
    vae: str | None = flag(
        None,
        "train in the latents of this autoencoder (AutoencoderKL, AutoencoderTiny, VQModel, or a pipeline with one): a"
        " folder or Hub id. Images are encoded once, and L' sees decoded images",
        metavar="NAME_OR_FOLDER",
    )
    lora_rank: int | None = flag(
        None,
        "fine-tune a text-to-image pipeline by LoRA of this rank; 4 to 64 are usual. Needs pip install peft, and"
        " saves adapters only; without the flag, all weights are trained, and a complete pipeline is saved",
        parse=positive_int,
    )
    lora_alpha: float | None = flag(
        None, "the adapters are multiplied by lora_alpha / lora_rank; default: lora_rank", parse=positive
    )
    lora_target_modules: tuple[str, ...] | None = flag(
        None,
        "layers with adapters, by the end of their names; default: those of diffusers' script for this pipeline",
        metavar="NAME",
        many=True,
    )
    prediction_type: str | None = flag(
        None,
        "prediction of the network: noise (epsilon, the default), image (sample), velocity (v_prediction, in the"
        " demonstration), or the flow from image to noise (flow_prediction, FlowMatchEulerDiscreteScheduler)",
        choices=["epsilon", "sample", "v_prediction", "flow_prediction"],
        parse=prediction_type,
    )
    ddpm_num_steps: int | None = flag(
        None, "number of noise levels of the training schedule; default: 1000", parse=noise_levels
    )
    ddpm_beta_schedule: str | None = flag(
        None,
        "betas of the schedule; default: linear",
        choices=["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"],
    )
    rescale_betas_zero_snr: bool = flag(
        False,
        "end the schedule in pure noise (arXiv:2305.08891); needs --prediction_type v_prediction or sample",
    )

    def __post_init__(self):
        for name in ("lora_alpha", "lora_target_modules"):
            if getattr(self, name) is not None and self.lora_rank is None:
                raise UsageError(f"--{name} has no effect without --lora_rank")
        if self.lora_rank is not None and self.pretrained_model_name_or_path is None:
            raise UsageError("--lora_rank adapts a saved pipeline: name it by --pretrained_model_name_or_path")
        if self.pretrained_model_name_or_path and self.model_config_name_or_path:
            raise UsageError("--pretrained_model_name_or_path and --model_config_name_or_path are mutually exclusive")
        for name in ("ddpm_beta_schedule", "rescale_betas_zero_snr"):
            if self.prediction_type == "flow_prediction" and getattr(self, name):
                raise UsageError(f"--{name} changes the betas of a schedule, which flow matching lacks; drop the flag")
        if self.rescale_betas_zero_snr and self.prediction_type in (None, "epsilon"):
            raise UsageError(
                "--rescale_betas_zero_snr needs --prediction_type v_prediction or sample: at zero terminal SNR, the"
                " noise contains no information about the image"
            )
