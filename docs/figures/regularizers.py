"""The figure of docs/regularizers.md: what each regularizer makes of a noisy picture.

    python docs/figures/regularizers.py

Gradient descent x <- x - eta grad L'(x), without any data term: where the wish leads if nothing holds against it.
"""

from functools import partial

import torch
from matplotlib import pyplot as plt
from shared import images, save, show

from reg_diffusers import regularizers

# eta is in units of N = 28 x 28 pixels, because L' is a mean over them; it stays below 2 / curvature.
DESCENTS = {  # name: (loss, eta, steps)
    "total_variation": (regularizers.total_variation, 0.005, 150),
    "isotropic_\ntotal_variation": (regularizers.isotropic_total_variation, 0.005, 150),
    "gradient_energy": (regularizers.gradient_energy, 0.1, 20),
    "laplacian_energy": (regularizers.laplacian_energy, 0.01, 200),
    "out_of_range": (regularizers.out_of_range, 0.4, 20),
    "high_frequency_\nenergy": (regularizers.high_frequency_energy, 0.4, 20),
    "symmetry": (regularizers.symmetry, 0.1, 20),
    "mean_intensity\n(target=0)": (regularizers.mean_intensity, 0.4, 20),
    "near_\nbackground": (regularizers.near_background, 0.005, 60),
    "sparsity\n(background=-1)": (partial(regularizers.sparsity, background=-1.0), 0.01, 40),
}


def descend(regularizer, image: torch.Tensor, eta: float, steps: int) -> torch.Tensor:
    """The image after `steps` steps of gradient descent on N L'."""
    for _ in range(steps):
        image = image.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(regularizer(image).sum(), image)
        image = image - eta * image.numel() * gradient
    return image.detach()


def main() -> None:
    data, labels = images()
    clean = data[(labels == 9).nonzero()[3]]
    start = clean + 0.2 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    figure, axes = plt.subplots(2, 6, figsize=(8.4, 3.9))
    show(axes[0, 0], start, limit=1.5)
    axes[0, 0].set_title("start: picture\n+ noise of 0.2", fontsize=8)
    for axis, (name, (regularizer, eta, steps)) in zip(axes.flat[1:-1], DESCENTS.items(), strict=True):
        end = descend(regularizer, start, eta, steps)
        before, after = regularizer(start).item(), regularizer(end).item()
        show(axis, end, limit=1.5)
        axis.set_title(name, fontsize=8)
        axis.set_xlabel(f"L' {before:.2g} → {after:.2g}" if after > 1e-6 else f"L' {before:.2g} → 0")
        print(f"{name.replace(chr(10), '')}: L' {before:.3g} -> {after:.3g} in {steps} steps of {eta} N")
    axes.flat[-1].set_axis_off()
    figure.get_layout_engine().set(hspace=0.06)
    save(figure, "regularizers")


if __name__ == "__main__":
    main()
