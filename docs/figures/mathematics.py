"""The figures and numbers of docs/mathematics.md.

    python docs/figures/mathematics.py

What acts on the image (weightings.png), Jensen's gap (jensen_gap.png), the size of the gradient (gradient_factor.png),
which timesteps reach the sample (ddim_share.png), x0_hat of real images (x0_hat.png) and what the loss does to a
Gaussian (gaussian.png). No network is trained: every denoiser here is exact.
"""

import math

import torch
from diffusers import DDPMScheduler
from matplotlib import pyplot as plt
from shared import LINES, images, save, show

from reg_diffusers import noise_level, regularizers, weighting

LINEAR = DDPMScheduler()
COSINE = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
STABLE_DIFFUSION = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


def weightings() -> None:
    """lambda / w_d against SNR: how far the minimiser of the loss is pulled away from the data."""
    figure, axes = plt.subplots(1, 2, figsize=(7.4, 3.6), sharey=True)
    for axis, kind in zip(axes, ("epsilon", "v_prediction"), strict=True):
        level = noise_level(DDPMScheduler(prediction_type=kind), torch.arange(1000))
        for name, line in zip(("constant", "snr", "alpha_bar", "low_noise", "matched"), LINES, strict=True):
            ratio = getattr(weighting, name)(level) / level.denoising_weight
            ratio[ratio == 0] = math.nan
            marks = {"marker": "o", "markevery": (10, 25), "markersize": 5} if name == "low_noise" else {}
            axis.loglog(level.snr, ratio, label=name, **line, **marks)
        axis.set(title=kind, xlabel="SNR  (noise on the left, image on the right)", ylim=(1e-4, 1e5))
        axis.axvspan(1e-5, 10 / 7, color="0.9", zorder=0)
        axis.text(3e-5, 3e-4 if kind == "epsilon" else 1e3, "matched is 0 here")
        axis.set(xlim=(2e-5, 2e4), yticks=[10.0**power for power in range(-4, 6)])
        print(f"{kind}: lambda / w_d for constant, at t = 999: {1 / level.denoising_weight[-1]:.3g}")
    axes[0].set_ylabel(r"$\lambda(t)\,/\,w_d(t)$")
    axes[1].legend(loc="upper right")
    save(figure, "weightings")
    for name, scheduler in (("linear", LINEAR), ("squaredcos_cap_v2", COSINE), ("scaled_linear", STABLE_DIFFUSION)):
        level = noise_level(scheduler, torch.arange(1000))
        active = int((weighting.matched(level) > 0).sum())
        print(f"{name}: 1/SNR at t = 999 {1 / level.snr[-1]:.3g}, matched is not 0 for t < {active}")


def jensen_gap() -> None:
    """|x|^2 - 1 of the ideal denoiser for 2,000 points of the unit circle."""
    generator = torch.Generator().manual_seed(0)
    points = circle_points(2000)
    scheduler = DDPMScheduler(num_train_timesteps=100, beta_schedule="squaredcos_cap_v2")
    level = noise_level(scheduler, torch.arange(100))
    gap = []
    for alpha, sigma in zip(level.alpha.double(), level.sigma.double(), strict=True):
        noisy = alpha * points + sigma * torch.randn(points.shape, generator=generator, dtype=torch.float64)
        residual = (ideal_denoiser(noisy, points, alpha, sigma) ** 2).sum(1) - 1
        gap.append(residual.abs().mean())
    for t in (0, 20, 90):
        print(f"circle: mean | |D|^2 - 1 | at t = {t}: {gap[t]:.4f}")
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.4, 3.2), width_ratios=(1, 1.5))
    left.scatter(*points[::5].T, s=3, color="0.6", label=r"data $x_0$")
    for t, marker, line in ((20, "x", LINES[1]), (60, "^", LINES[2])):
        alpha, sigma = level.alpha[t].double(), level.sigma[t].double()
        noisy = alpha * points[::20] + sigma * torch.randn((100, 2), generator=generator, dtype=torch.float64)
        denoised = ideal_denoiser(noisy, points, alpha, sigma)
        left.scatter(*denoised.T, s=12, marker=marker, color=line["color"], label=rf"$D(x_t)$, t = {t}", linewidth=0.8)
    left.set(aspect="equal", xlim=(-1.2, 1.2), ylim=(-1.2, 1.9), yticks=[-1, 0, 1])
    left.legend(loc="upper center", ncols=1, handletextpad=0.2, borderpad=0.3)
    right.semilogy(gap, **LINES[1])
    for t in (0, 20, 90):
        right.plot(t, gap[t], "o", color="black", markersize=5)
        below = t == 90
        right.annotate(f"{gap[t]:.2g}", (t, gap[t]), (6, -14 if below else -4), textcoords="offset points", fontsize=9)
    right.set(xlabel="t of T = 100 (squaredcos_cap_v2)", ylabel=r"mean $|\,\|D(x_t)\|^2 - 1\,|$")
    save(figure, "jensen_gap")


def gradient_factor() -> None:
    """|d x0_hat / d output| over t."""
    figure, axes = plt.subplots(1, 2, figsize=(7.4, 3.2), sharey=True)
    for axis, scheduler, name in zip(axes, (LINEAR, COSINE), ("linear", "squaredcos_cap_v2"), strict=True):
        level = noise_level(scheduler, torch.arange(1000))
        factors = {
            r"epsilon: $\sigma/\alpha$": level.sigma / level.alpha,
            r"v_prediction: $\sigma$": level.sigma,
            "sample: 1": torch.ones(1000),
        }
        for (label, factor), line in zip(factors.items(), LINES, strict=False):
            axis.semilogy(factor, label=label, **line)
        axis.set(title=name, xlabel="t")
        axis.annotate(
            f"{factors[next(iter(factors))][-1]:.3g}",
            (999, factors[next(iter(factors))][-1]),
            (-6, 0),
            textcoords="offset points",
            ha="right",
            va="center",
        )
    axes[0].set_ylabel(r"factor on $\nabla L'$")
    axes[0].legend(loc="upper left")
    save(figure, "gradient_factor")


def ddim_share() -> None:
    """The part of the DDIM sum that falls on timesteps below t."""
    figure, axis = plt.subplots(figsize=(5.6, 3.4))
    for (name, scheduler), line in zip(
        {"scaled_linear (Stable Diffusion)": STABLE_DIFFUSION, "linear": LINEAR, "squaredcos_cap_v2": COSINE}.items(),
        LINES,
        strict=False,
    ):
        root = noise_level(scheduler, torch.arange(1000)).snr.sqrt()
        share = (root[0] - root) / (root[0] - root[-1])
        print(f"{name}: share of t < 200: {share[200]:.3f}")
        axis.plot(share, label=name, **line)
    level = noise_level(STABLE_DIFFUSION, torch.arange(1000)).snr.sqrt()
    at_200 = float((level[0] - level[200]) / (level[0] - level[-1]))
    axis.axvline(200, color="0.4", linewidth=1)
    axis.plot(200, at_200, "o", color="black", markersize=5)
    axis.annotate(f"t < 200: {at_200:.0%}", (200, at_200), (10, -18), textcoords="offset points")
    axis.set(xlabel="t", ylabel="share of the timesteps below t", ylim=(0, 1.05))
    axis.legend(loc="lower right")
    save(figure, "ddim_share")


def x0_hat() -> None:
    """Two exact denoisers on pictures: for a Gaussian of the same mean and covariance, and for the data set itself."""
    data, labels = images()
    rows = [int((labels == label).nonzero()[3]) for label in (9, 1)]
    timesteps = torch.tensor([20, 100, 250, 500, 700, 900])
    level = noise_level(LINEAR, timesteps)
    shape, flat = data.shape[1:], data.flatten(1).double()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn((len(rows), *flat.shape[1:]), generator=generator, dtype=torch.float64)
    mean = flat.mean(0)
    eigenvalues, eigenvectors = torch.linalg.eigh(torch.cov(flat.T))
    figure, axes = plt.subplots(3 * len(rows), len(timesteps) + 1, figsize=(7.4, 7.4))
    for row, index in enumerate(rows):
        block = axes[3 * row : 3 * row + 3]
        show(block[0, 0], data[index])
        block[0, 0].set_title(f"$x_0$\nTV {regularizers.total_variation(data[index : index + 1]).item():.2f}")
        block[1, 0].axis("off")
        block[2, 0].axis("off")
        for column, (t, alpha, sigma, snr) in enumerate(
            zip(timesteps, level.alpha.double(), level.sigma.double(), level.snr, strict=True), start=1
        ):
            noisy = alpha * flat[index] + sigma * noise[row]
            gain = alpha * eigenvalues / (alpha**2 * eigenvalues + sigma**2)
            gaussian = mean + eigenvectors @ (gain * (eigenvectors.T @ (noisy - alpha * mean)))
            finite = ideal_denoiser(noisy[None], flat, alpha, sigma)[0]
            show(block[0, column], noisy.reshape(shape), limit=2)
            for line, denoised in ((1, gaussian), (2, finite)):
                picture = denoised.reshape(1, *shape)
                show(block[line, column], picture)
                block[line, column].set_xlabel(f"TV {regularizers.total_variation(picture).item():.2f}", labelpad=2)
            if row == 0:
                block[0, column].set_title(f"t = {int(t)}\nSNR {snr:.3g}")
        for line, label in enumerate(("$x_t$", "$D$, Gaussian", "$D$, data set")):
            block[line, 1].set_ylabel(label)
    save(figure, "x0_hat")


def gaussian() -> None:
    """Standard deviation of DDIM samples: data N(0, 0.5^2), L' = mean x^2, for the exact minimiser of the loss."""
    deviation, timesteps = 0.5, torch.arange(999, -1, -1)
    level = noise_level(LINEAR, timesteps)
    alpha, sigma = level.alpha.double(), level.sigma.double()
    denoiser = alpha * deviation**2 / (alpha**2 * deviation**2 + sigma**2)
    next_alpha, next_sigma = torch.cat([alpha[1:], torch.ones(1)]), torch.cat([sigma[1:], torch.zeros(1)])
    weights = torch.logspace(-5, 1, 61)
    figure, axis = plt.subplots(figsize=(5.6, 3.4))
    for name, line in zip(("constant", "snr", "alpha_bar", "low_noise", "matched"), LINES, strict=True):
        ratio = (getattr(weighting, name)(level) / level.denoising_weight).double()
        samples = []
        for weight in weights.double():
            x0 = denoiser / (1 + weight * ratio)  # x0_hat = x0 * x_t
            step = next_alpha * x0 + next_sigma / sigma * (1 - alpha * x0)
            samples.append(step.abs().log().sum().exp())
        curve = torch.stack(samples)
        axis.semilogx(weights, curve, label=name, **line)
        shown = ", ".join(f"{weight:g}: {curve[(weights - weight).abs().argmin()]:.3f}" for weight in (1e-5, 1e-2, 1))
        print(f"Gaussian, {name}: standard deviation of the samples by weight: {shown}")
    axis.axhline(deviation, color="0.4", linewidth=1)
    axis.set(xlabel=r"weight $\lambda$", ylabel="standard deviation of the samples", ylim=(0, 0.55))
    axis.annotate("data", (weights[-1], deviation), (0, 3), textcoords="offset points", ha="right")
    axis.legend(loc="lower left")
    save(figure, "gaussian")


def circle_points(count: int) -> torch.Tensor:
    """Points spread evenly over the unit circle, (count, 2)."""
    angle = torch.arange(count, dtype=torch.float64) * (2 * math.pi / count)
    return torch.stack([angle.cos(), angle.sin()], dim=1)


def ideal_denoiser(noisy: torch.Tensor, data: torch.Tensor, alpha, sigma) -> torch.Tensor:
    """E[x_0 | x_t] for a finite data set: sum_i softmax_i( -||x_t - alpha x_i||^2 / (2 sigma^2) ) x_i."""
    distance = torch.cdist(noisy, alpha * data, compute_mode="donot_use_mm_for_euclid_dist") ** 2
    return torch.softmax(-distance / (2 * sigma**2), dim=1) @ data


if __name__ == "__main__":
    for draw in (weightings, jensen_gap, gradient_factor, ddim_share, x0_hat, gaussian):
        draw()
