"""Measures how a homogeneous residual shrinks samples, and what dividing by the amplitude changes.

    python docs/benchmarks/shrinking.py [--steps 600]

The data are divergence-free fields of 16 x 16 from random stream functions. A small network is trained for too few
steps to converge, without a regularizer, with `physics.divergence`, with `normalized=True`, and divided by the
amplitude as a constant (detached), each with two weightings. Weights are such that all have the same size at the
amplitude of the data. The result, of one seed, is printed and kept in shrinking.txt beside this file.
"""

import argparse
import math
from functools import partial
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import nn

from reg_diffusers import RegularizedLoss, Term, weighting
from reg_diffusers.evaluation.measuring import sliced_wasserstein
from reg_diffusers.regularizers.physics import difference, divergence

RESULT = Path(__file__).with_suffix(".txt")
SIZE, BATCH_SIZE, SAMPLES = 16, 32, 512
SCHEDULE = {"prediction_type": "sample", "clip_sample": False}


class Network(nn.Module):
    """A fully connected network, which must learn the law from the data."""

    def __init__(self, width=512):
        super().__init__()
        values = 2 * SIZE**2
        self.layers = nn.Sequential(
            *(nn.Linear(values + 16, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, values))
        )

    def forward(self, sample, timesteps):
        angles = timesteps[:, None] / 1000 * math.pi * torch.arange(8)
        known = torch.cat([sample.flatten(1), angles.sin(), angles.cos()], 1)
        return self.layers(known).reshape(sample.shape)


def detached(x0_hat, /):
    """The divergence divided by the mean square of the field as a constant."""
    return divergence(x0_hat) / x0_hat.detach().square().sum(1).flatten(1).mean(1)


def make_fields(number, seed):
    """Smooth fields without divergence, (N, 2, H, W), of standard deviation 0.5."""
    noise = torch.randn(number, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    f = torch.fft.fftfreq(SIZE, d=1 / SIZE)
    fall = 1 / (1 + (f[:, None] ** 2 + f**2) / 4) ** 1.5
    stream = torch.fft.ifft2(torch.fft.fft2(noise) * fall).real
    fields = torch.stack([difference(stream, -2), -difference(stream, -1)], 1)
    return fields / fields.std() / 2


def train(data, terms, steps):
    torch.manual_seed(0)
    model = Network()
    loss = RegularizedLoss(DDPMScheduler(**SCHEDULE), terms)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(steps):
        batch = data[torch.randint(len(data), (BATCH_SIZE,))]
        optimizer.zero_grad()
        loss(model, batch).loss.backward()
        optimizer.step()
    return model


@torch.no_grad()
def sample(model):
    scheduler = DDIMScheduler(**SCHEDULE)
    scheduler.set_timesteps(50)
    image = torch.randn(SAMPLES, 2, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    for timestep in scheduler.timesteps:
        image = scheduler.step(model(image, timestep.expand(len(image))), timestep, image).prev_sample
    return image


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=600)
    steps = parser.parse_args().steps
    data, held_out = make_fields(2000, 0), make_fields(SAMPLES, 1)
    rows = [("data", held_out)]
    normalized = partial(divergence, normalized=True)
    for name, regularizer, weight, gate in (
        ("none", None, 0, None),
        ("divergence, weight 10, constant", divergence, 10.0, weighting.constant),
        ("divergence, weight 10, matched", divergence, 10.0, weighting.matched),
        ("by a constant, weight 5, constant", detached, 5.0, weighting.constant),
        ("by a constant, weight 5, matched", detached, 5.0, weighting.matched),
        ("normalized, weight 5, constant", normalized, 5.0, weighting.constant),
        ("normalized, weight 5, matched", normalized, 5.0, weighting.matched),
    ):
        terms = [Term(regularizer, weight, gate, "divergence")] if regularizer else []
        rows.append((name, sample(train(data, terms, steps))))
    lines = [f"{'':34} root of L'   root of normalized L'   standard deviation   sliced Wasserstein"]
    for name, fields in rows:
        plain, relative = (divergence(fields, normalized=way).mean().sqrt().item() for way in (False, True))
        distance = sliced_wasserstein(fields, data[:SAMPLES])
        lines.append(f"{name:34} {plain:10.3f}   {relative:21.3f}   {fields.std().item():18.3f}   {distance:18.3f}")
    text = "\n".join([*lines, "", f"{steps} steps, batches of {BATCH_SIZE}, {SAMPLES} samples"]) + "\n"
    print(text, end="")
    RESULT.write_text(text)


if __name__ == "__main__":
    main()
