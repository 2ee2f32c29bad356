"""Measures each part of the loss during a training, in total and by noise level.

Sums over images stay on the device, one per decade of the signal-to-noise ratio, and are read only for logging. Each
logged number is a quotient of such sums, so it does not depend on how the images are divided into batches.
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
    """Computes means over the images of all processes since the last `compute`.

    Args:
        accelerator: accelerator of the training.
        names: names of the terms.
        means_on_data: mean of L' on the data, by the names of the terms.
    """

    def __init__(self, accelerator: Accelerator, names: list[str], means_on_data: dict[str, float]):
        self._accelerator = accelerator
        self._names = names
        self._means_on_data = dict(means_on_data)
        self._columns = [("", what) for what in _OF_DENOISING] + [(name, what) for name in names for what in _OF_TERM]
        self._separate: tuple[str, ...] = ()  # terms without a gradient at the network's output alone
        self._sums = self._nothing()

    def update(self, output: BalancedLoss) -> None:
        """Adds a batch, unless its loss is non-finite. Does not wait for the device with timesteps on the CPU."""
        denoising = output.per_image["denoising"]
        self._separate = output.separate
        products, places = output.products, {name: place for place, name in enumerate(output.gradients)}
        columns = [torch.ones_like(denoising), denoising, products[:, 0, 0]]
        nothing = torch.zeros_like(denoising)
        for name in self._names:
            weight, values = output.weights[name], output.per_image[name]
            lambdas = output.weightings[name].to(values, non_blocking=True)
            active, squared, product = ~values.isnan(), nothing, nothing
            if name not in self._separate:
                squared, product = products[:, places[name], places[name]], products[:, 0, places[name]]
            columns += [active, torch.where(active, values, 0), torch.where(active, weight * lambdas * values, 0)]
            columns += [squared, weight**2 * squared, product]
        columns = torch.stack([column.to(self._sums) for column in columns], dim=1)
        columns = torch.where(output.loss.detach().isfinite(), columns, 0)
        edges = torch.tensor(SNR_EDGES, dtype=output.snr.dtype, device=output.snr.device)
        bins = torch.bucketize(output.snr, edges)
        members = torch.nn.functional.one_hot(bins, len(SNR_EDGES) + 1).to(columns, non_blocking=True)
        self._sums += members.T @ columns  # not index_add: its order of summation differs from run to run

    def compute(self) -> dict[str, float]:
        """Returns means by name, such as "raw/total_variation" and "raw/total_variation/snr_1_to_10"; resets the sums.

        A mean over no images is omitted. All processes must call it.
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
        if of_denoising and active and name not in self._separate:
            found["gradient_ratio"] = math.sqrt(squared_weighted / of_denoising)
            if squared:
                found["gradient_cosine"] = product / math.sqrt(squared * of_denoising)
        return found

    def _nothing(self) -> Tensor:
        return torch.zeros(len(SNR_EDGES) + 1, len(self._columns), device=self._accelerator.device)

    def state_dict(self) -> dict:
        return {"columns": self._columns, "sums": self._sums.tolist(), "means_on_data": self._means_on_data}

    def load_state_dict(self, state: dict) -> None:
        """Continues from a state; a state of other terms is ignored.

        The means on the data remain those of the first start, because each start measures as many images as time
        allows.
        """
        if [tuple(column) for column in state["columns"]] == self._columns:
            self._sums = torch.tensor(state["sums"], device=self._accelerator.device)
            self._means_on_data = state["means_on_data"]


def _bin_names() -> list[str]:
    edges = [f"{edge:g}" for edge in SNR_EDGES]
    between = [f"snr_{low}_to_{high}" for low, high in itertools.pairwise(edges)]
    return [f"snr_below_{edges[0]}", *between, f"snr_above_{edges[-1]}"]
