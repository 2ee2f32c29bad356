"""Many small networks at once: stacked parameters, one batch, one objective of the library.

Member i of an ensemble of M has the rows i B to (i + 1) B of a batch of M B images. The mean of a loss over all rows,
times M, is the sum of the members' own losses, so each member gets the gradient of a training of its own. Adam works
value by value; gradients are clipped member by member.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reg_diffusers import LossOutput, NoiseLevel
from reg_diffusers.conflict_free import combined, operator_of


class PerMember:
    """A weighting with one factor and one weighting for each member.

    Args:
        weights: one factor per member.
        weightings: one weighting per member.
    """

    def __init__(self, weights: Sequence[float], weightings: Sequence[Callable[[NoiseLevel], Tensor]]):
        self.weights, self.weightings = torch.tensor(weights).float(), tuple(weightings)

    def __call__(self, level: NoiseLevel) -> Tensor:
        found = {weighting: weighting(level).reshape(len(self.weights), -1) for weighting in set(self.weightings)}
        rows = torch.stack([found[weighting][member] for member, weighting in enumerate(self.weightings)])
        return torch.where(self.weights[:, None] == 0, 0, self.weights[:, None] * rows).flatten()


class StackedLinear(nn.Module):
    """Linear layers of M members; with `timesteps`, each output has a learned factor by timestep.

    Initial weights are PyTorch's for nn.Linear. Members with one seed start alike.

    Args:
        seeds: seed of each member.
        generators: the random numbers of each seed.
        inputs: values per input.
        outputs: values per output.
        timesteps: number of timesteps; None: no factors.
    """

    def __init__(self, seeds: Sequence[int], generators, inputs: int, outputs: int, timesteps: int | None = None):
        super().__init__()
        bound, drawn = 1 / math.sqrt(inputs), {}
        for seed, generator in generators.items():
            weight = torch.empty(inputs, outputs).uniform_(-bound, bound, generator=generator)
            bias = torch.empty(1, outputs).uniform_(-bound, bound, generator=generator)
            drawn[seed] = weight, bias, torch.rand(timesteps or 0, outputs, generator=generator)
        weight, bias, factors = (torch.stack(parts) for parts in zip(*(drawn[seed] for seed in seeds), strict=True))
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.factors = nn.Parameter(factors) if timesteps else None

    def forward(self, x: Tensor, timesteps: Tensor | None = None) -> Tensor:
        """Maps (M, B, inputs) and timesteps (M, B) to (M, B, outputs)."""
        output = torch.baddbmm(self.bias, x, self.weight)
        if self.factors is None:
            return output
        rows = timesteps + self.factors.shape[1] * torch.arange(len(output))[:, None]
        return F.embedding(rows, self.factors.flatten(0, 1)) * output


class StackedMLP(nn.Module):
    """M networks `dim`-width-...-width-`dim` with a softplus after each hidden layer, conditioned on the timestep.

    This is the network of PIDM's toy problem, with any width and depth.
    """

    def __init__(self, seeds: Sequence[int], dim: int, width: int, timesteps: int, *, hidden: int = 2):
        super().__init__()
        generators = {seed: torch.Generator().manual_seed(seed) for seed in sorted(set(seeds))}
        self.hidden = nn.ModuleList(
            StackedLinear(seeds, generators, inputs, width, timesteps) for inputs in [dim] + [width] * (hidden - 1)
        )
        self.last = StackedLinear(seeds, generators, width, dim)
        self.members = len(seeds)

    def forward(self, sample: Tensor, timesteps: Tensor) -> Tensor:
        """Maps the batch (M B, ...) and timesteps (M B,) to outputs of its shape."""
        x = sample.reshape(self.members, -1, sample[0].numel())
        timesteps = timesteps.long().expand(len(sample)).reshape(self.members, -1)
        for layer in self.hidden:
            x = F.softplus(layer(x, timesteps))
        return self.last(x).reshape(sample.shape)


def clip_by_member(network: nn.Module, max_norm: float) -> None:
    """Limits the norm of the gradient of each member, as clip_grad_norm_ does for one network."""
    gradients = [parameter.grad for parameter in network.parameters()]
    norms = torch.stack([gradient.flatten(1).square().sum(1) for gradient in gradients]).sum(0).sqrt()
    factors = (max_norm / (norms + 1e-6)).clamp(max=1)
    for gradient in gradients:
        gradient *= factors.reshape(-1, *[1] * (gradient.ndim - 1))


def conflict_free_by_member(network: nn.Module, output: LossOutput) -> None:
    """Sets the gradients of each member to the ConFIG combination of those of its parts of the loss.

    This is `conflict_free.backward` for each network.
    """
    operator, parameters = operator_of("config"), list(network.parameters())
    parts = [output.terms["denoising"], output.weights["residual"] * output.terms["residual"]]
    rows = []
    for part in parts:
        gradients = torch.autograd.grad(network.members * part, parameters, retain_graph=part is not parts[-1])
        rows.append(torch.cat([gradient.flatten(1) for gradient in gradients], 1))
    found = torch.stack([combined(operator, torch.stack(of_member)) for of_member in zip(*rows, strict=True)])
    sizes = [parameter[0].numel() for parameter in parameters]
    for parameter, part in zip(parameters, found.split(sizes, dim=1), strict=True):
        parameter.grad = part.reshape(parameter.shape).contiguous()  # fused Adam reads it as one block of memory
