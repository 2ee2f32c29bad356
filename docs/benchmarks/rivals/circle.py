"""Cases A and B: points on a circle, uniform or in two modes, to the letter of PIDM's toy problem.

10,000 points, T = 100 steps of the cosine schedule, x0-prediction with min-SNR-5 weights, an MLP 2-128-128-2 with
softplus and factors by timestep, Adam 5e-4, batches of 128, 401 epochs, gradients clipped to 1, antithetic timesteps;
ancestral sampling with the variance beta_t. The residual is |x|^2 - 1.

All methods and seeds train at once. Methods with one seed share initial weights, batches, timesteps and noise.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch
from diffusers import DDPMScheduler
from ensemble import StackedMLP, clip_by_member
from kept import Kept
from methods import METHODS, groups
from torch import Tensor

from reg_diffusers.evaluation.measuring import sliced_wasserstein

POINTS, STEPS, BATCH, GAMMA, EPOCHS = 10_000, 100, 128, 5.0, 401
EXACT = ("exact denoiser", 0.0)
EVALUATIONS, EVERY, SAMPLES = 7, 10, 1000  # the last evaluations, epochs between them, samples of each


def uniform(generator: torch.Generator) -> Tensor:
    """Angles of case A, (POINTS,)."""
    return 2 * math.pi * torch.rand(POINTS, generator=generator)


def weighted(generator: torch.Generator) -> Tensor:
    """Angles of case B: .7 von Mises(0, 4) + .3 von Mises(2.5, 8), by inverting the distribution function."""
    grid = torch.linspace(-math.pi, math.pi, 100_001, dtype=torch.float64)
    cumulative = density(grid).cumsum(0)
    place = torch.searchsorted(cumulative / cumulative[-1], torch.rand(POINTS, generator=generator).double())
    return grid[place.clamp(max=len(grid) - 1)].float()


def density(angle: Tensor) -> Tensor:
    modes = ((0.7, 0.0, 4.0), (0.3, 2.5, 8.0))
    return sum(
        share * (kappa * (angle - centre).cos()).exp() / (2 * math.pi * torch.special.i0(torch.tensor(kappa).double()))
        for share, centre, kappa in modes
    )


def small_mode() -> tuple[float, float]:
    """The arc of the small mode, between the two minima of the density, counted upwards from the first."""
    grid = torch.linspace(0, 2 * math.pi, 100_001, dtype=torch.float64)
    values = density(grid)
    before = grid[values[(grid < 2.5)].argmin()]
    after = grid[(grid > 2.5).nonzero()[0] + values[grid > 2.5].argmin()]
    return float(before), float(after)


def residual(points: Tensor) -> Tensor:
    return points.square().sum(1, keepdim=True) - 1


def run(angles, seeds, path: Path | None, *, quick: bool = False) -> dict:
    """Trains the methods that are not in the file yet on points with these angles; returns all rows."""
    start, epochs = time.perf_counter(), 1 if quick else EPOCHS
    kept = Kept(path, seeds, f"{epochs} epochs", [*((method.name, method.weight) for method in METHODS), EXACT])
    missing = kept.missing
    methods = [method for method in METHODS if (method.name, method.weight) in missing]
    if not missing:
        return kept.found
    scheduler = DDPMScheduler(STEPS, trained_betas=cosine_betas().numpy(), prediction_type="sample")
    streams = [torch.Generator().manual_seed(seed) for seed in seeds]
    data = torch.stack([torch.stack([angle.cos(), angle.sin()], 1) for angle in map(angles, streams)])
    trained = []
    for loss_fn, chosen in groups(methods, seeds, scheduler, residual, GAMMA):
        members = list(seeds) * len(chosen)
        network = StackedMLP(members, 2, 128, STEPS)
        optimizer = torch.optim.Adam(network.parameters(), lr=5e-4, fused=True)
        trained.append((loss_fn, chosen, network, optimizer))
    wanted = [epochs - 1 - EVERY * place for place in range(min(EVALUATIONS, 1 + (epochs - 1) // EVERY))]
    found = {}
    for epoch in range(epochs if methods else 0):
        orders = torch.stack([torch.randperm(POINTS, generator=stream) for stream in streams])
        for batch in orders.split(BATCH, dim=1):
            drawn = draw(data, batch, streams)
            for loss_fn, chosen, network, optimizer in trained:
                points, noise, timesteps = (part.repeat(len(chosen), *[1] * (part.ndim - 1)) for part in drawn)
                output = loss_fn(network, points, noise=noise, timesteps=timesteps)
                (network.members * output.loss).backward()
                clip_by_member(network, 1.0)
                optimizer.step()
                optimizer.zero_grad()
        if epoch in wanted:
            for _, chosen, network, _ in trained:
                samples = ancestral(network_at(network), scheduler, noises(seeds, epoch, len(chosen)))
                for method, points in zip(chosen, samples.unflatten(0, (len(chosen), -1)), strict=True):
                    found.setdefault((method.name, method.weight), []).append(points)
        if epoch % 20 == 0:
            print(f"epoch {epoch + 1} of {epochs}, {time.perf_counter() - start:.0f} s", flush=True)
    rows = {name: judge(torch.cat(points, 1), data) for name, points in found.items()}
    for _, chosen, network, _ in trained:
        errors = denoiser_errors(network, scheduler, data, len(chosen))
        for method, error in zip(chosen, errors, strict=True):
            rows[method.name, method.weight]["denoiser error"] = error
    if EXACT in missing:
        exact = ancestral(ideal(data, scheduler), scheduler, noises(seeds, epochs, 1))
        rows[EXACT] = judge(exact, data) | {"denoiser error": [0.0] * len(seeds)}
    kept.add({"method": name, "weight": weight, **numbers} for (name, weight), numbers in rows.items())
    return kept.found


def cosine_betas() -> Tensor:
    """The cosine schedule of Nichol & Dhariwal 2021 with s = .008, betas at most .999."""
    levels = torch.cos((torch.linspace(0, 1, STEPS + 1, dtype=torch.float64) + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - levels[1:] / levels[:-1]).clamp(max=0.999)


def draw(data: Tensor, batch: Tensor, streams) -> tuple[Tensor, Tensor, Tensor]:
    """One batch of each seed: points (S b, 2), noise (S b, 2), timesteps (S b,), half of them mirrored."""
    number = batch.shape[1]
    points = torch.cat([of_seed[indices] for of_seed, indices in zip(data, batch, strict=True)])
    noise = torch.cat([torch.randn(number, 2, generator=stream) for stream in streams])
    halves = [torch.randint(STEPS, (number // 2 + 1,), generator=stream) for stream in streams]
    return points, noise, torch.cat([torch.cat([half, STEPS - 1 - half])[:number] for half in halves])


def noises(seeds, epoch: int, copies: int):
    """The random numbers of a sampling, (copies S, SAMPLES, 2) at each call, equal for all methods."""
    generators = [torch.Generator().manual_seed(1000 * seed + epoch) for seed in seeds]
    while True:
        yield torch.stack([torch.randn(SAMPLES, 2, generator=generator) for generator in generators]).repeat(
            copies, 1, 1
        )


@torch.no_grad()
def ancestral(predict, scheduler, noise) -> Tensor:
    """Samples of DDPM with variance beta_t, without noise in the last step: (M, SAMPLES, 2)."""
    alpha_bar = scheduler.alphas_cumprod.tolist()
    x = next(noise)
    for t in reversed(range(STEPS)):
        before, beta = alpha_bar[t - 1] if t else 1.0, float(scheduler.betas[t])
        of_image = beta * math.sqrt(before) / (1 - alpha_bar[t])
        of_sample = (1 - before) * math.sqrt(1 - beta) / (1 - alpha_bar[t])
        x = of_image * predict(x, t) + of_sample * x + (math.sqrt(beta) * next(noise) if t else 0)
    return x


def network_at(network):
    return lambda x, t: network(x.flatten(0, 1), torch.tensor(t)).reshape(x.shape)


def ideal(data: Tensor, scheduler):
    """The exact E[x0 | x_t] of the points of each seed, (S, n, 2) -> (S, n, 2)."""

    def predict(x, t):
        alpha_bar = float(scheduler.alphas_cumprod[t])
        distances = torch.cdist(x, math.sqrt(alpha_bar) * data)
        return (-distances.square() / (2 * (1 - alpha_bar))).softmax(-1) @ data

    return predict


@torch.no_grad()
def denoiser_errors(network, scheduler, data: Tensor, methods: int) -> list[list[float]]:
    """Mean distance of the network from E[x0 | x_t] over ten noise levels, by method and seed."""
    generator, errors = torch.Generator().manual_seed(0), []
    for t in range(5, STEPS, 10):
        alpha_bar = float(scheduler.alphas_cumprod[t])
        points = data[:, torch.randperm(POINTS, generator=generator)[:100]]
        x = math.sqrt(alpha_bar) * points + math.sqrt(1 - alpha_bar) * torch.randn(points.shape, generator=generator)
        expected = ideal(data, scheduler)(x, t).repeat(methods, 1, 1)
        errors.append((network_at(network)(x.repeat(methods, 1, 1), t) - expected).norm(dim=-1).mean(1))
    return torch.stack(errors).mean(0).reshape(methods, -1).tolist()


def judge(points: Tensor, data: Tensor) -> dict[str, list[float]]:
    """Residual, share of the small mode's arc, and distance to the data, by seed."""
    low, high = small_mode()
    angles = torch.atan2(points[..., 1], points[..., 0]) % (2 * math.pi)
    number = min(points.shape[1], POINTS)
    pairs = zip(points, data, strict=True)
    return {
        "residual": [residual(of_seed).abs().mean().item() for of_seed in points],
        "mass": ((angles > low) & (angles < high)).float().mean(1).tolist(),
        "distance": [sliced_wasserstein(one[:number], other[:number], directions=64) for one, other in pairs],
    }
