"""The exponential moving average of the weights, by diffusers' EMAModel."""

from __future__ import annotations

import torch
from accelerate import PartialState
from diffusers.training_utils import EMAModel

from ..settings.optimization import OptimizationSettings
from .sharded import is_sharded, sharded_like, whole
from .trained import trained_parameters

__all__ = ["build_ema"]


def build_ema(settings: OptimizationSettings, unet: torch.nn.Module) -> EMAModel | None:
    """Builds the average of --use_ema and its --ema_* flags; None without --use_ema.

    Args:
        settings: the settings with use_ema and ema_*, as in diffusers.
        unet: the network prepared by accelerate; if its weights are sharded, each process averages its shard.
    """
    if not settings.use_ema:
        return None
    return _Average(
        trained_parameters(unet),
        decay=settings.ema_max_decay,
        use_ema_warmup=True,
        inv_gamma=settings.ema_inv_gamma,
        power=settings.ema_power,
        foreach=True,
    )


class _Average(EMAModel):
    """An average that is saved unsharded and loaded into any sharding of the weights."""

    def state_dict(self) -> dict:
        """Returns the state; call it in all processes. With sharded weights, only the main process gets them."""
        state = super().state_dict()
        if any(map(is_sharded, self.shadow_params)):
            is_main_process = PartialState().is_main_process
            complete = (whole(parameter) for parameter in self.shadow_params)
            state["shadow_params"] = [tensor.cpu() for tensor in complete if is_main_process]
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        before = self.shadow_params
        super().load_state_dict(state_dict)
        pairs = zip(self.shadow_params, before, strict=True)
        self.shadow_params = [sharded_like(loaded, parameter) for loaded, parameter in pairs]
