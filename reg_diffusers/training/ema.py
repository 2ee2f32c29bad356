"""The moving average of the weights, diffusers' EMAModel."""

from __future__ import annotations

import argparse

import torch
from accelerate import PartialState
from diffusers.training_utils import EMAModel

from .gathering import divided_like, is_divided, whole

__all__ = ["build_ema"]


def build_ema(args: argparse.Namespace, unet: torch.nn.Module) -> EMAModel | None:
    """The average of --use_ema and its --ema_* flags, or None.

    Args:
        args: the settings.
        unet: as prepared by accelerate: where each process holds a part of the weights, it averages that part.
    """
    if not args.use_ema:
        return None
    return _Average(
        unet.parameters(),
        decay=args.ema_max_decay,
        use_ema_warmup=True,
        inv_gamma=args.ema_inv_gamma,
        power=args.ema_power,
        foreach=True,
    )


class _Average(EMAModel):
    """Saved whole, and loaded to where it was, however the weights are divided among the processes."""

    def state_dict(self) -> dict:
        """To be called by all processes; where weights are divided, the main one gets all of them, others none."""
        state = super().state_dict()
        if any(map(is_divided, self.shadow_params)):
            is_main_process = PartialState().is_main_process
            complete = (whole(parameter) for parameter in self.shadow_params)
            state["shadow_params"] = [tensor.cpu() for tensor in complete if is_main_process]
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        before = self.shadow_params
        super().load_state_dict(state_dict)
        pairs = zip(self.shadow_params, before, strict=True)
        self.shadow_params = [divided_like(loaded, parameter) for loaded, parameter in pairs]
