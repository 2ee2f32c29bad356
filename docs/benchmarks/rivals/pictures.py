"""Cases E and F: pictures, a perceptual loss against each picture and total variation, judged by other networks.

A small network is trained without a loss, and then for some more steps: without, and with each loss, from the same
weights, batches, noise and timesteps. Rows are weightings and weights; seeds change everything. predictions.py has
what `diagnose` says of them.

E. Letters of 32 x 32 in the fonts of matplotlib; the network predicts the image, for flow matching with the loss of
the velocity. The loss compares features of EfficientNet-Lite0 (ImageNet); MobileNetV2 (ImageNet) is the judge.

F. The embedded Fashion-MNIST at 16 x 16, with velocity or noise prediction. The loss is total variation; a classifier
that is trained here, and that no loss has seen, is the judge.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from diffusers import DDPMScheduler
from kept import Kept
from picture_data import Pictures, clothes, letters, perceptual
from torch import Tensor, nn

from reg_diffusers import AffineSchedule, RegularizedLoss, Target, Term
from reg_diffusers.evaluation.distances import frechet, manifolds
from reg_diffusers.prediction import noise_level, predict_original_sample
from reg_diffusers.regularizers import total_variation
from reg_diffusers.weighting import constant, gated, low_noise, matched, snr

SAMPLING_STEPS, HELD_OUT = 20, 512
DATA = ("data", 0.0)


class Network(nn.Module):
    """A fully connected network for the whole picture, and convolutions for its details."""

    def __init__(self, side: int, width: int = 384, local: int = 12):
        super().__init__()
        self.first = nn.Linear(side**2 + 16, width)
        self.middle = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
            for _ in range(3)
        )
        self.last = nn.Sequential(nn.SiLU(), nn.Linear(width, side**2))
        self.scale = nn.Linear(16, local)
        self.details = nn.Conv2d(2, local, 3, padding=1)
        self.more_details = nn.Conv2d(local, local, 3, padding=1)
        self.joined = nn.Conv2d(local + 2, 1, 3, padding=1)

    def forward(self, sample: Tensor, timesteps: Tensor) -> Tensor:
        """Maps (B, 1, H, W) and timesteps (B,) from 0 to 1000 to an output of the shape of the sample."""
        angles = timesteps[:, None] / 1000 * math.pi * 2.0 ** torch.arange(-1, 7)
        when = torch.cat([angles.sin(), angles.cos()], 1)
        hidden = self.first(torch.cat([sample.flatten(1), when], 1))
        for block in self.middle:
            hidden = hidden + block(hidden)
        both = torch.cat([sample, self.last(hidden).reshape(sample.shape)], 1)
        details = nn.functional.silu(self.details(both)) * (1 + self.scale(when)[:, :, None, None])
        details = nn.functional.silu(self.more_details(details))
        return self.joined(torch.cat([details, both], 1))


def flow() -> AffineSchedule:
    """Flow matching with image prediction: sigma = t / 1000, the loss of the velocity with its usual bound."""
    bounded = partial(torch.clamp, min=0.05)
    return AffineSchedule(
        lambda t: 1 - t / 1000, lambda t: t / 1000, "sample", denoising_weight=lambda t: bounded(t / 1000) ** -2
    )


def diffusion(prediction: str) -> DDPMScheduler:
    return DDPMScheduler(prediction_type=prediction, clip_sample=False)


def times(schedule, u: Tensor) -> Tensor:
    """Timesteps at these shares of the schedule, from 0 for the picture to 1 for noise."""
    return (1000 * u).long().clamp(max=999) if isinstance(schedule, DDPMScheduler) else 1000 * u


@dataclass(frozen=True)
class Training:
    """Steps, pictures per step, and Adam's rate at the start; it falls to 0 along a cosine."""

    steps: int
    batch: int
    rate: float


@dataclass(frozen=True)
class Case:
    """What is trained, and how strong the losses are.

    Attributes:
        pictures: the data.
        schedule: () -> schedule of training.
        regularizer: () -> L'.
        rows: the weights of each weighting.
        diagnosed: number of pictures for the diagnosis of predictions.py.
        plain: the training without a loss.
        tuned: the training after it, with a loss.
        targets: bounds on L' of x0_hat, in shares of L' of the data, each for a row with `matched`.
        paired: whether L' compares x0_hat with its own picture. It is then measured on x0_hat of held-out pictures at
            SNR >= 0.184, else on samples.
    """

    pictures: Callable[[], Pictures]
    schedule: Callable
    regularizer: Callable
    rows: dict
    diagnosed: int
    plain: Training = Training(2000, 16, 1e-3)
    tuned: Training = Training(500, 16, 5e-4)
    targets: tuple[float, ...] = ()
    paired: bool = False


GATE = gated(0.184)  # PixelGen's
CASES = {
    "letters": Case(
        letters,
        flow,
        perceptual,
        {matched: (0.01, 0.05, 0.25), GATE: (0.1, 0.5, 2.5, 12.5), low_noise: (0.5, 2.5, 12.5)},
        100,
        plain=Training(1500, 64, 3e-3),
        paired=True,
    ),
    "clothes": Case(
        clothes,
        partial(diffusion, "v_prediction"),
        lambda: total_variation,
        {matched: (0.02, 0.1, 0.5), constant: (0.1, 0.5, 2.5), snr: (0.004, 0.02, 0.1)},
        2000,
    ),
    "clothes_noise": Case(
        clothes,
        partial(diffusion, "epsilon"),
        lambda: total_variation,
        {matched: (0.02, 0.1, 0.5), constant: (0.05, 0.25, 1.25), snr: (0.004, 0.02, 0.1)},
        2000,
        targets=(1.0, 0.8),
    ),
}


def run(name: str, seeds, path: Path | None, *, quick: bool = False) -> dict:
    """Trains and judges the rows that are not in the file yet; returns all rows."""
    case = CASES[name]
    terms = [None, *weighted(case), *((matched, Target(share, relative=True)) for share in case.targets)]
    if quick:
        terms, case = terms[::4], replace(case, plain=Training(5, 16, 1e-3), tuned=Training(5, 16, 5e-4))
    length = f"{case.plain.steps} steps without a loss and {case.tuned.steps} with it"
    kept = Kept(path, seeds, length, [*map(named, terms), DATA])
    if not (missing := kept.missing):
        return kept.found
    pictures, schedule, regularizer = case.pictures(), case.schedule(), case.regularizer()
    beginnings = {seed: started(case, pictures, schedule, seed) for seed in seeds}
    print(f"{name}: trained without a loss", flush=True)
    for chosen in terms:
        if named(chosen) not in missing:
            continue
        term = Term(regularizer, chosen[1], chosen[0], "loss") if chosen else None
        row = dict(zip(("method", "weight"), named(chosen), strict=True))
        for seed, beginning in beginnings.items():
            network = deepcopy(beginning)
            train(network, pictures.known, schedule, term, case.tuned, seed + 1000)
            found = errors(network, pictures.held_out, schedule, regularizer if case.paired else None)
            found |= judged(sample(network, pictures.known[: len(pictures.held_out)], schedule, seed), pictures, case)
            for key, value in found.items():
                row.setdefault(key, []).append(value)
        kept.add([row])
        print(f"{name}: {row['method']} {row['weight']:g}, {kept.found['seconds']} s", flush=True)
    if DATA in missing:
        of_data = judged(pictures.known[: len(pictures.held_out)], pictures, case)
        kept.add([{"method": DATA[0], "weight": DATA[1]} | {key: [value] for key, value in of_data.items()}])
    return kept.found


def weighted(case: Case) -> list[tuple[Callable, float]]:
    """Weighting and weight of the rows with a fixed weight."""
    return [(weighting, weight) for weighting, weights in case.rows.items() for weight in weights]


def named(chosen: tuple[Callable, float | Target] | None) -> tuple[str, float]:
    """Method and weight of a row, from its weighting and weight; None: the plain one."""
    if chosen is None:
        return "plain", 0.0
    weighting, weight = chosen
    if isinstance(weight, Target):
        return "Target", weight.value
    return getattr(weighting, "__name__", str(weighting)).replace("min_snr=", ""), weight


def started(case: Case, pictures: Pictures, schedule, seed: int) -> Network:
    """A network that is trained without a loss."""
    torch.manual_seed(seed)
    network = Network(pictures.known.shape[-1])
    train(network, pictures.known, schedule, None, case.plain, seed)
    return network


def train(network: Network, images: Tensor, schedule, term: Term | None, training: Training, seed: int) -> None:
    """Trains in place; batches, noise and timesteps of a seed are the same for every term."""
    loss_fn = RegularizedLoss(schedule, [term] if term else [])
    optimizer = torch.optim.Adam(network.parameters(), lr=training.rate, fused=True)
    decay = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 50) * (1 + math.cos(math.pi * step / training.steps)) / 2
    )
    generator = torch.Generator().manual_seed(seed)
    for _ in range(training.steps):
        batch = images[torch.randint(len(images), (training.batch,), generator=generator)]
        noise = torch.randn(batch.shape, generator=generator)
        timesteps = times(schedule, torch.rand(training.batch, generator=generator))
        optimizer.zero_grad()
        loss_fn(network, batch, noise=noise, timesteps=timesteps).loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        decay.step()


@torch.no_grad()
def sample(network: Network, like: Tensor, schedule, seed: int) -> Tensor:
    """Deterministic samples, x' = alpha' x0_hat + sigma' eps_hat: DDIM's, and Euler's for flow matching."""
    grid = times(schedule, torch.linspace(1, 0, SAMPLING_STEPS + 1)[:-1])
    level = noise_level(schedule, grid)
    alphas, sigmas = torch.cat([level.alpha, torch.ones(1)]), torch.cat([level.sigma, torch.zeros(1)])
    x = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed + 2000))
    for index, timestep in enumerate(grid):
        timesteps = timestep.expand(len(x))
        x0_hat = predict_original_sample(schedule, network(x, timesteps), timesteps, x)
        noise = (x - alphas[index] * x0_hat) / sigmas[index]
        x = alphas[index + 1] * x0_hat + sigmas[index + 1] * noise
    return x


@torch.no_grad()
def errors(network: Network, images: Tensor, schedule, paired: Callable | None) -> dict[str, float]:
    """The denoising loss on held-out pictures, and a paired L' of their x0_hat, on equal noise for all networks."""
    images, generator = images[:HELD_OUT], torch.Generator().manual_seed(0)
    timesteps = times(schedule, (torch.randperm(len(images), generator=generator) + 0.5) / len(images))
    terms = [Term(paired, 1.0, GATE, "loss", normalize="active")] if paired else []
    noise = torch.randn(images.shape, generator=generator)
    output = RegularizedLoss(schedule, terms)(network, images, noise=noise, timesteps=timesteps)
    found = {"denoising": output.terms["denoising"].item()}
    return found | ({"loss": output.terms["loss"].item()} if paired else {})


@torch.no_grad()
def judged(images: Tensor, pictures: Pictures, case: Case) -> dict[str, float]:
    """The distance of pictures to held-out ones in the features of the judge, and L' of them if it is not paired."""
    found = pictures.features(images)
    numbers = {
        "FD": frechet(found, pictures.expected),
        **manifolds(found, pictures.expected),
        "std": images.std().item(),
    }
    return numbers if case.paired else {"loss": case.regularizer()(images).mean().item()} | numbers
