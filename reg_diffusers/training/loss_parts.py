"""What each part of the loss does while a model learns, in all and by noise level.

Sums over images are kept on the device, for each decade of the signal-to-noise ratio, and read only when they are
logged; all numbers are quotients of such sums, so that they do not depend on how images are divided.
"""

from __future__ import annotations

import itertools
import math

import torch
from accelerate import Accelerator
from torch import Tensor

from ..balancing import BalancedLoss

__all__ = ["SNR_EDGES", "LossParts"]

SNR_EDGES = (0.01, 0.1, 1.0, 10.0, 100.0)
_OF_DENOISING = ("images", "denoising", "squared_gradient")
_OF_TERM = ("active", "value", "weighted", "squared_gradient", "squared_weighted_gradient", "product")


class LossParts:
    """Means over the images since the last reading, over all processes.

    Args:
        accelerator: of the training.
        names: of the terms.
        means_on_data: of L' by the names of the terms.
    """

    def __init__(self, accelerator: Accelerator, names: list[str], means_on_data: dict[str, float]):
        self._accelerator = accelerator
        self._names = names
        self._means_on_data = dict(means_on_data)
        self._columns = [("", what) for what in _OF_DENOISING] + [(name, what) for name in names for what in _OF_TERM]
        self._sums = self._nothing()

    def add(self, output: BalancedLoss) -> None:
        """Adds a batch; one whose loss is not finite does not count. No step waits if its timesteps are on the CPU."""
        denoising = output.per_image["denoising"]
        products, places = output.products, {name: place for place, name in enumerate(output.gradients)}
        columns = [torch.ones_like(denoising), denoising, products[:, 0, 0]]
        for name in self._names:
            place, weight, values = places[name], output.weights[name], output.per_image[name]
            lambdas = output.weightings[name].to(values, non_blocking=True)
            active, squared = ~values.isnan(), products[:, place, place]
            columns += [active, torch.where(active, values, 0), torch.where(active, weight * lambdas * values, 0)]
            columns += [squared, weight**2 * squared, products[:, 0, place]]
        columns = torch.stack([column.to(self._sums) for column in columns], dim=1)
        columns = torch.where(output.loss.detach().isfinite(), columns, 0)
        edges = torch.tensor(SNR_EDGES, dtype=output.snr.dtype, device=output.snr.device)
        bins = torch.bucketize(output.snr, edges)
        members = torch.nn.functional.one_hot(bins, len(SNR_EDGES) + 1).to(columns, non_blocking=True)
        self._sums += members.T @ columns  # not index_add, whose order of summation differs from run to run

    def read(self) -> dict[str, float]:
        """The numbers by name, such as "raw/total_variation" and "raw/total_variation/snr_1_to_10"; starts anew.

        What has no image to speak of is left out. To be called by all processes.
        """
        sums = self._accelerator.reduce(self._sums, "sum").cpu().double()
        self._sums = self._nothing()
        found = {}
        for bin_name, row in zip(["", *_bin_names()], [sums.sum(0), *sums], strict=True):
            sums_of = dict(zip(self._columns, row.tolist(), strict=True))
            if not sums_of["", "images"]:
                continue
            if bin_name:
                found[f"denoising/{bin_name}"] = sums_of["", "denoising"] / sums_of["", "images"]
            for name in self._names:
                values = self._of_term(name, sums_of)
                if bin_name:
                    del values["active"]  # follows from the weighting
                found |= {"/".join(filter(None, (what, name, bin_name))): value for what, value in values.items()}
        return found

    def _of_term(self, name: str, sums_of: dict[tuple[str, str], float]) -> dict[str, float]:
        images, of_denoising = sums_of["", "images"], sums_of["", "squared_gradient"]
        active, value, weighted, squared, squared_weighted, product = (sums_of[name, what] for what in _OF_TERM)
        found = {"active": active / images}
        if active:
            found |= {"raw": value / active, "weighted": weighted / images}
            if name in self._means_on_data:
                found["gap"] = value / active - self._means_on_data[name]
        if of_denoising and active:
            found["gradient_ratio"] = math.sqrt(squared_weighted / of_denoising)
            if squared:
                found["gradient_cosine"] = product / math.sqrt(squared * of_denoising)
        return found

    def _nothing(self) -> Tensor:
        return torch.zeros(len(SNR_EDGES) + 1, len(self._columns), device=self._accelerator.device)

    def state_dict(self) -> dict:
        return {"columns": self._columns, "sums": self._sums.tolist(), "means_on_data": self._means_on_data}

    def load_state_dict(self, state: dict) -> None:
        """Goes on from a state; one of other terms is left out.

        The means on the data stay those of the start, which measured as many images as time allowed.
        """
        if [tuple(column) for column in state["columns"]] == self._columns:
            self._sums = torch.tensor(state["sums"], device=self._accelerator.device)
            self._means_on_data = state["means_on_data"]


def _bin_names() -> list[str]:
    edges = [f"{edge:g}" for edge in SNR_EDGES]
    between = [f"snr_{low}_to_{high}" for low, high in itertools.pairwise(edges)]
    return [f"snr_below_{edges[0]}", *between, f"snr_above_{edges[-1]}"]
