"""Cases C and D: fields that obey an equation, by networks of one size that are all trained for the same CPU time.

A problem (`heat`, `darcy`) gives the data, the residual of its equation and a judge without networks. Each row trains
one network per seed, all seeds at once as one ensemble with stacked parameters. Networks predict the image from x_t:

    plain, ours, PBFM   flow matching x_t = t x_0 + (1 - t) eps, loss |x_0 - x0_hat|^2 / max(1 - t, .05)^2
    PIDM                DDPM, 100 steps of the cosine schedule, min-SNR-5, as in the paper

The rate of learning falls to 0 along a cosine of the time spent, so that every row ends with a finished training.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from circle import STEPS, ancestral, cosine_betas
from diffusers import DDPMScheduler
from ensemble import StackedLinear, clip_by_member, conflict_free_by_member
from kept import Kept
from methods import MEAN, PBFM, Method
from torch import Tensor, nn

from reg_diffusers import AffineSchedule, RegularizedLoss, Term
from reg_diffusers.recipes import pbfm, pidm
from reg_diffusers.regularizers import equality

FIELDS, BATCH, SAMPLES = 10_000, 64, 512  # data, shared by the seeds; of each seed
CLOSEST, EULER = 0.05, 50  # least 1 - t in the loss; steps of sampling
FRESH = ("fresh data", 0.0)
UNROLLED = (1, 2, 3, 4)  # Euler steps of PBFM in each quarter of the training
FLOW = AffineSchedule(
    lambda t: t, lambda t: 1 - t, "sample", denoising_weight=lambda t: (1 - t).clamp(min=CLOSEST) ** -2
)


@dataclass(frozen=True)
class Problem:
    """A family of fields with a law.

    Attributes:
        fields: (number, seed) -> fields in the units of the network, (n, C, H, W).
        residual: fields (n, C, H, W) -> (n, ...), 0 where the law holds.
        judge: (samples, data) -> numbers by name.
        methods: rows of the table.
        width: of the hidden layers.
        rate: of Adam, at the start.
        seconds: CPU time of a row for each seed.
    """

    fields: Callable[[int, int], Tensor]
    residual: Callable[[Tensor], Tensor]
    judge: Callable[[Tensor, Tensor], dict[str, float]]
    methods: Sequence[Method]
    width: int
    rate: float
    seconds: float


def run(problem: Problem, seeds: Sequence[int], path: Path | None, *, quick: bool = False) -> dict:
    """Trains the rows that are not in the file yet one after the other; returns all rows."""
    number, budget, samples = (64, 0, 16) if quick else (FIELDS, problem.seconds * len(seeds), SAMPLES)
    length = f"{budget / len(seeds):.0f} s of one core for each network"
    kept = Kept(path, seeds, length, [*((method.name, method.weight) for method in problem.methods), FRESH])
    if not (missing := kept.missing):
        return kept.found
    data = problem.fields(number, 0)
    for method in problem.methods:
        if (method.name, method.weight) not in missing:
            continue
        network = Network(seeds, data[0].shape, problem.width)
        steps = train(network, method, problem, data, seeds, budget)
        row = {"method": method.name, "weight": method.weight, "steps": [steps] * len(seeds)}
        kept.add([row | judged(problem, sample(network, method, seeds, samples, data), data)])
        print(f"{method.name} {method.weight:g}: {steps} steps, {kept.found['seconds']} s", flush=True)
    if FRESH in missing:
        fresh = problem.fields(samples * len(seeds), 1).chunk(len(seeds))
        kept.add([{"method": FRESH[0], "weight": FRESH[1]} | judged(problem, fresh, data)])
    return kept.found


def judged(problem: Problem, samples: Sequence[Tensor], data: Tensor) -> dict[str, list[float]]:
    found = [problem.judge(of_seed, data) for of_seed in samples]
    return {name: [one[name] for one in found] for name in found[0]}


class Network(nn.Module):
    """Maps noisy fields and their noise level in [0, 1] to fields: a perceptron with residual layers, one per seed.

    Its output is a combination of `width` learned fields, so noise of the input cannot pass through.

    Args:
        seeds: seed of each member.
        shape: (C, H, W).
        width: of the hidden layers.
        layers: number of residual layers.
    """

    FREQUENCIES = 8

    def __init__(self, seeds: Sequence[int], shape, width: int, layers: int = 3):
        super().__init__()
        generators = {seed: torch.Generator().manual_seed(seed) for seed in seeds}
        self.members, self.shape, values = len(seeds), shape, math.prod(shape)
        self.first = StackedLinear(seeds, generators, values + 2 * self.FREQUENCIES, width)
        self.hidden = nn.ModuleList(StackedLinear(seeds, generators, width, width) for _ in range(layers))
        self.last = StackedLinear(seeds, generators, width, values)

    def forward(self, sample: Tensor, level: Tensor) -> Tensor:
        """Maps (M B, C, H, W) and (M B,) to (M B, C, H, W)."""
        angles = math.pi * level[:, None] * torch.arange(1, 1 + self.FREQUENCIES)
        x = torch.cat([sample.flatten(1), angles.cos(), angles.sin()], 1).unflatten(0, (self.members, -1))
        x = F.silu(self.first(x))
        for layer in self.hidden:
            x = x + F.silu(layer(x))
        return self.last(x).reshape(sample.shape)


def is_ddpm(method: Method) -> bool:
    return method.kind == MEAN


def model(network: Network, method: Method) -> Callable[[Tensor, Tensor], Tensor]:
    """The network as a function of the timesteps of its method."""
    if is_ddpm(method):
        return lambda sample, timesteps: network(sample, (timesteps + 1) / STEPS)
    return lambda sample, timesteps: network(sample, 1 - timesteps)


def losses(method: Method, residual: Callable[[Tensor], Tensor]) -> list[RegularizedLoss]:
    """The objective of a method, or those of equal parts of the training."""
    if is_ddpm(method):
        return [pidm(ddpm(), residual, method.weight, largest=math.inf)]  # as in the paper, without a limit
    if method.kind == PBFM:
        return [pbfm(FLOW, residual, steps=steps) for steps in UNROLLED]
    term = Term(equality(residual), float(method.weight), method.weighting, name="residual")
    return [RegularizedLoss(FLOW, [term] if method.weight else [])]


def ddpm() -> DDPMScheduler:
    return DDPMScheduler(STEPS, trained_betas=cosine_betas().numpy(), prediction_type="sample")


def train(network: Network, method: Method, problem: Problem, data: Tensor, seeds, budget: float) -> int:
    """Trains for `budget` seconds of CPU time, for 0 a step of each objective; returns the number of steps."""
    optimizer = torch.optim.Adam(network.parameters(), fused=True)
    streams = [torch.Generator().manual_seed(seed) for seed in seeds]
    parts, start, steps = losses(method, problem.residual), time.process_time(), 0
    while (spent := (time.process_time() - start) / budget if budget else steps / len(parts)) < 1:
        optimizer.param_groups[0]["lr"] = problem.rate * math.cos(math.pi / 2 * spent) ** 2
        fields, noise, times = draw(data, streams)
        timesteps = (times * STEPS).long() if is_ddpm(method) else times
        loss_fn = parts[min(int(spent * len(parts)), len(parts) - 1)]
        output = loss_fn(model(network, method), fields, noise=noise, timesteps=timesteps)
        if method.kind == PBFM:
            conflict_free_by_member(network, output)
        else:
            (network.members * output.loss).backward()
        clip_by_member(network, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
    return steps


def draw(data: Tensor, streams: Sequence[torch.Generator]) -> tuple[Tensor, Tensor, Tensor]:
    """One batch of each seed: fields (S b, C, H, W), noise, times (S b,) inside (0, 1)."""
    fields = torch.cat([data[torch.randint(len(data), (BATCH,), generator=stream)] for stream in streams])
    noise = torch.cat([torch.randn(BATCH, *data.shape[1:], generator=stream) for stream in streams])
    times = torch.cat([torch.rand(BATCH, generator=stream) for stream in streams])
    return fields, noise, times.clamp(1e-3, 1 - 1e-3)


def noises(seeds: Sequence[int], shape: tuple[int, ...]) -> Iterator[Tensor]:
    """The random numbers of a sampling, (S, n, C, H, W) at each call, equal for all methods."""
    generators = [torch.Generator().manual_seed(1000 + seed) for seed in seeds]
    while True:
        yield torch.stack([torch.randn(shape, generator=generator) for generator in generators])


@torch.no_grad()
def sample(network: Network, method: Method, seeds: Sequence[int], number: int, data: Tensor) -> Tensor:
    """Samples of each seed, (S, n, C, H, W): by Euler's method, or DDPM's steps for PIDM.

    x0_hat is clipped to the range of each channel of the data, as in DDPM.
    """
    noise = noises(seeds, (number, *network.shape))
    low, high = data.amin((0, 2, 3))[:, None, None], data.amax((0, 2, 3))[:, None, None]

    def predict(x: Tensor, level: float) -> Tensor:
        x0_hat = network(x.flatten(0, 1), torch.full((x.shape[0] * x.shape[1],), level))
        return x0_hat.reshape(x.shape).clamp(low, high)

    if is_ddpm(method):
        return ancestral(lambda x, t: predict(x, (t + 1) / STEPS), ddpm(), noise)
    x = next(noise)
    for step in range(EULER):
        level = 1 - step / EULER
        x = x + (predict(x, level) - x) / (EULER * level)
    return x
