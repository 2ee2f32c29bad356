"""Measures the extra loss in loops of each kind of wiring, with a perfect network: its error, its share, its memory.

    python docs/benchmarks/hosts.py

For each loop: the lines that its page adds; the largest relative error of L'(x0_hat) against L'(x_0) over all images
that take part, on latents 4 x 8 x 8 in float32 and on the pictures 3 x 16 x 16 that a small autoencoder decodes; the
share of images that take part, for the loop's own draw of timesteps and the default weighting; and the bytes that the
extra loss keeps for the backward pass, per image that takes part. The result is printed and kept in hosts.txt beside
this file.
"""

from __future__ import annotations

import functools
import platform
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import diffusers
import torch
from diffusers import AutoencoderKL, EDMEulerScheduler, EulerDiscreteScheduler
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import host_loops as loops
import host_trainers as trainers

from reg_diffusers import LossOutput, Term, X0Regularization
from reg_diffusers.regularizers import total_variation
from reg_diffusers.views import DecodedImage

RESULT = Path(__file__).with_suffix(".txt")
PAGES = Path(__file__).parents[1] / "hosts"
LATENTS, VIDEO = (4, 8, 8), (4, 2, 8, 8)
DRAWN, DECODED = 2048, 64  # images for the error and the share; for decoding and for the bytes


@dataclass(frozen=True)
class Host:
    """A loop, the page that it belongs to, and the shape of its images."""

    kind: str
    loop: loops.Loop
    shape: tuple[int, ...] = field(default=LATENTS)


HOSTS = {
    "eps": Host("noise", loops.ddpm),
    "eps, min-SNR": Host("noise", functools.partial(loops.ddpm, snr_gamma=5.0)),
    "eps, noise offset": Host("noise", functools.partial(loops.ddpm, offset=0.1)),
    "v": Host("noise", functools.partial(loops.ddpm, kind="v_prediction")),
    "v, min-SNR": Host("noise", functools.partial(loops.ddpm, kind="v_prediction", snr_gamma=5.0)),
    "x0, SNR": Host("noise", functools.partial(loops.ddpm, kind="sample")),
    "Flux": Host("flow", loops.flow),
    "flow, shift 3, mode": Host("flow", functools.partial(loops.flow, shift=3.0, density="mode")),
    "flow, sigma^-2": Host("flow", functools.partial(loops.flow, density="none", weighting="sigma_sqrt")),
    "flow, cosmap": Host("flow", functools.partial(loops.flow, density="none", weighting="cosmap")),
    "flow, dynamic shift": Host("flow", loops.dynamic_flow),
    "SD3": Host("image", loops.preconditioned_flow),
    "SDXL, EDM style, Euler": Host("image", functools.partial(loops.edm_style, scheduler=EulerDiscreteScheduler())),
    "SDXL, EDM style, EDM": Host("image", functools.partial(loops.edm_style, scheduler=EDMEulerScheduler())),
    "CogVideoX": Host("image", loops.cogvideox, VIDEO),
    "Lumina2": Host("reversed", loops.lumina2),
    "Z-Image": Host("reversed", loops.negated),
    "HiDream": Host("reversed", functools.partial(loops.negated, divides=False)),
    "Ideogram": Host("reversed", loops.ideogram),
    "SiT linear, PBFM": Host("reversed", loops.interpolant),
    "SiT GVP": Host("reversed", functools.partial(loops.interpolant, path="GVP")),
    "SiT VP": Host("reversed", functools.partial(loops.interpolant, path="VP")),
    "EDM": Host("sigma", loops.edm),
    "k-diffusion": Host("sigma", loops.k_diffusion),
    "azula": Host("sigma", loops.azula),
    "GaussianDiffusion, eps": Host("hidden", trainers.gaussian_diffusion),
    "GaussianDiffusion, v": Host("hidden", functools.partial(trainers.gaussian_diffusion, kind="v_prediction")),
    "ElucidatedDiffusion": Host("hidden", trainers.elucidated),
    "azula, KarrasDenoiser": Host("hidden", trainers.karras_denoiser),
    "k-diffusion, Denoiser": Host("hidden", trainers.inner_denoiser),
    "SiT Transport": Host("hidden", trainers.transport),
    "prior preservation": Host("parts", trainers.prior_preservation),
    "dropped prompts": Host("parts", trainers.dropped_prompts),
    "calculate_loss": Host("trainers", trainers.loss_method),
    "call_dit, compute_loss": Host("trainers", trainers.two_methods),
}


def small_vae() -> AutoencoderKL:
    """Builds a random autoencoder that doubles the side of its latents."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        latent_channels=4,
    )


def images_of(host: Host, count: int) -> Tensor:
    """Draws smooth latents of the host's shape, of about unit variance."""
    return torch.randn(count, *host.shape).cumsum(-1).div(2)


def step_of(name: str, count: int = 64, seed: int = 0) -> loops.Step:
    """Runs one step of a loop with a perfect network."""
    torch.manual_seed(seed)
    return HOSTS[name].loop(images_of(HOSTS[name], count))


def regularized(step: loops.Step, view=None) -> LossOutput:
    """Computes the extra loss of a step as the pages do."""
    return X0Regularization(step.scheduler, [Term(total_variation, weight=0.1, view=view)])(**step.arguments)


def error_of(step: loops.Step, view=None) -> float:
    """Computes the largest relative error of L'(x0_hat) against L'(x_0) over the images that take part."""
    found = regularized(step, view).per_image["total_variation"]
    active = ~found.isnan()
    x0 = step.original_samples[active].float()
    with torch.no_grad():
        expected = total_variation(x0 if view is None else view(x0))
    return ((found[active] - expected) / expected).abs().max().item()


def bytes_kept(step: loops.Step, view=None) -> float:
    """Counts what the extra loss saves for the backward pass, per image that takes part, without the autoencoder."""
    name = "x0_hat" if "x0_hat" in step.arguments else "model_output"
    output = step.arguments[name].detach().requires_grad_()
    arguments = {**step.arguments, name: output}
    vae = () if view is None else view.vae.parameters()
    known = {tensor.untyped_storage().data_ptr() for tensor in (output, *vae)}
    sizes = {}

    def keep(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    loss = X0Regularization(step.scheduler, [Term(total_variation, weight=0.1, view=view)])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = loss(**arguments)
    active = (result.weightings["total_variation"] != 0).sum().item()
    return sum(size for place, size in sizes.items() if place not in known) / max(active, 1)


def lines_added(kind: str) -> int:
    """Counts the marked lines in the first loop of a page."""
    text = (PAGES / f"{kind}.md").read_text(encoding="utf-8")
    loop = next(code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "# 1" in code)
    return len(re.findall(r"# \d$", loop, re.MULTILINE))


def main() -> None:
    torch.manual_seed(0)
    view = DecodedImage(small_vae())
    header = f"{'loop':<24}{'page':<10}{'lines':>6}{'error':>10}{'decoded':>10}{'active':>9}{'bytes':>9}{'decoded':>9}"
    rows = [header]
    for name, host in HOSTS.items():
        step, decoded = (host.loop(images_of(host, count)) for count in (DRAWN, DECODED))
        active = (regularized(step).weightings["total_variation"] != 0).float().mean().item()
        errors = f"{error_of(step):>10.1e}{error_of(decoded, view):>10.1e}"
        kept = f"{bytes_kept(decoded):>9,.0f}{bytes_kept(decoded, view):>9,.0f}"
        rows.append(f"{name:<24}{host.kind:<10}{lines_added(host.kind):>6}{errors}{active:>9.1%}{kept}")
    versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}, {platform.machine()}, float32"
    text = "\n".join([*rows, "", versions, ""])
    print(text)
    RESULT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
