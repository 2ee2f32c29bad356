"""The figure of docs/mathematics.md that sets trained networks beside the formula of fact 2.

    python docs/figures/trained.py

Case B of docs/benchmarks/rivals, points in two modes of a circle. Trained: its results, a network of 128 hidden values
after 401 epochs. Formula: the exact denoiser of the same points, moved to the proximal point of fact 2 at each noise
level, and sampled with the same random numbers. Nothing is trained here.
"""

import json
import statistics
import sys
from pathlib import Path

import torch
from diffusers import DDPMScheduler
from matplotlib import pyplot as plt
from shared import LINES, save

from reg_diffusers import RegularizedLoss
from reg_diffusers.runtime.hardware import keep_freed_memory

RIVALS = Path(__file__).parents[1] / "benchmarks" / "rivals"
sys.path.insert(0, str(RIVALS))
import circle  # noqa: E402
from methods import METHODS  # noqa: E402

SHOWN = (("plain", 0), ("matched", 1), ("matched", 5), ("gated(3)", 1), ("constant", 1))
HALVINGS = 40


def moved(length, strength):
    """The minimizer over z of (z - length)^2 / 2 + strength (z^2 - 1)^2, from `length` on, by bisection."""
    low, high = torch.minimum(length, torch.ones_like(length)), torch.maximum(length, torch.ones_like(length))
    for _ in range(HALVINGS):  # the derivative is negative at the lower end and positive at the upper one
        middle = (low + high) / 2
        below = middle - length + 4 * strength * middle * (middle.square() - 1) < 0
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def with_loss(exact, ratios):
    """A denoiser that returns the proximal point at the exact one; on a circle, only the length changes."""

    def predict(x, t):
        guess = exact(x, t)
        length = guess.norm(dim=-1, keepdim=True)
        return guess / length * moved(length, ratios[t])

    return predict


@torch.no_grad()
def formula(seeds, rows):
    """Residual, mass and shift of the best network with each weighting, by seed."""
    scheduler = DDPMScheduler(circle.STEPS, trained_betas=circle.cosine_betas().numpy(), prediction_type="sample")
    streams = [torch.Generator().manual_seed(seed) for seed in seeds]
    data = torch.stack([torch.stack([angle.cos(), angle.sin()], 1) for angle in map(circle.weighted, streams)])
    exact = circle.ideal(data, scheduler)
    level = RegularizedLoss(scheduler, [], snr_gamma=circle.GAMMA).regularization.noise_level(
        torch.arange(circle.STEPS)
    )
    found = []
    for method in rows:
        # Fact 2 with N = 2 values: x0_hat minimizes |z - D|^2 / 2 + weight lambda N / (2 w_d) (|z|^2 - 1)^2.
        ratios = method.weight * method.weighting(level) / level.denoising_weight
        predict = with_loss(exact, ratios)
        samples = circle.ancestral(predict, scheduler, circle.noises(seeds, 401, 1))
        numbers = circle.judge(samples, data)
        found.append({**numbers, "denoiser error": shifts(predict, exact, scheduler, data)})
    return found


def shifts(predict, exact, scheduler, data):
    """Mean distance from the exact denoiser over the noise levels of the benchmark, by seed."""
    generator, found = torch.Generator().manual_seed(0), []
    for t in range(5, circle.STEPS, 10):
        alpha_bar = float(scheduler.alphas_cumprod[t])
        points = data[:, torch.randperm(circle.POINTS, generator=generator)[:100]]
        x = alpha_bar**0.5 * points + (1 - alpha_bar) ** 0.5 * torch.randn(points.shape, generator=generator)
        found.append((predict(x, t) - exact(x, t)).norm(dim=-1).mean(1))
    return torch.stack(found).mean(0).tolist()


def main():
    found = json.loads((RIVALS / "results" / "weighted_circle.json").read_text())
    trained = {(row["method"], row["weight"]): row for row in found["rows"]}
    rows = [method for method in METHODS if (method.name, method.weight) in SHOWN]
    trained = [trained[method.name, method.weight] for method in rows]
    best = formula(found["seeds"], rows)
    titles = [method.name + (f", {method.weight:g}" if method.weight else "") for method in rows]
    figure, axes = plt.subplots(1, 3, figsize=(8.2, 2.9), sharey=True)
    shown = {
        "residual": "residual, mean of | |x|² - 1 |",
        "mass": "mass of the small mode",
        "denoiser error": "distance from $D(x_t)$",
    }
    for axis, (key, label) in zip(axes, shown.items(), strict=True):
        for name, numbers, offset, style in (
            ("trained", trained, 0.12, {"color": LINES[1]["color"], "marker": "o"}),
            ("formula", best, -0.12, {"color": LINES[2]["color"], "marker": "D", "fillstyle": "none"}),
        ):
            for place, row in enumerate(numbers):
                values = row[key]
                axis.plot(values, [place + offset] * len(values), linestyle="", markersize=3, alpha=0.4, **style)
                label_once = {"label": name} if place == 0 else {}
                axis.plot(statistics.mean(values), place + offset, linestyle="", markersize=8, **style, **label_once)
        axis.set_xlabel(label)
    axes[0].set_xscale("log")
    axes[0].set_yticks(range(len(titles)), titles)
    axes[0].invert_yaxis()
    axes[1].axvline(statistics.mean(best[0]["mass"]), color="0.5", linewidth=1, linestyle="--")
    axes[2].legend(loc="center right")
    save(figure, "trained")
    for title, one, other in zip(titles, trained, best, strict=True):
        pairs = (f"{key} {statistics.mean(one[key]):.4f} / {statistics.mean(other[key]):.4f}" for key in shown)
        print(f"{title}, trained / formula: {', '.join(pairs)}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    keep_freed_memory(torch.device("cpu"))
    main()
