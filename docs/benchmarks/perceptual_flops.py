"""Counts the floating point operations that a perceptual loss adds to a training step, by noise level gate.

    python docs/benchmarks/perceptual_flops.py

The denoising network is that of diffusers' train_unconditional.py, 113.7M parameters, at 3 x 64 x 64; the loss sees
the images at 224 x 224 through a ViT-S/16, 21.8M parameters. One step of 1000 images has each timestep of the schedule
once, which is the mean over uniform timesteps. The step itself runs, forward and backward, on the meta device, which
has no values; torch.utils.flop_counter counts the operations of matrix products, attention and convolutions. The
result is printed and kept in perceptual_flops.txt beside this file.
"""

from pathlib import Path

import torch
import transformers
from diffusers import DDPMScheduler, UNet2DModel
from torch.utils.flop_counter import FlopCounterMode

from reg_diffusers import RegularizedLoss, Term
from reg_diffusers.regularizers import Perceptual
from reg_diffusers.weighting import constant, gated, matched

RESULT = Path(__file__).with_suffix(".txt")
STEPS = 1000  # of the noise schedule
GATES = {"matched (default)": matched, "gated(3)": gated(3), "gated(0.184)": gated(0.184), "constant": constant}
PROCESSOR = {"size": {"height": 224, "width": 224}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def denoiser() -> UNet2DModel:
    """The network of diffusers' train_unconditional.py for 64 x 64 images."""
    return UNet2DModel(
        sample_size=64,
        in_channels=3,
        out_channels=3,
        layers_per_block=2,
        block_out_channels=(128, 128, 256, 256, 512, 512),
        down_block_types=("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
    )


def networks() -> tuple[UNet2DModel, transformers.ViTModel]:
    """The denoising network and the ViT-S, without values."""
    with torch.device("meta"):
        config = transformers.ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536)
        return denoiser(), transformers.ViTModel(config)


def operations(unet: UNet2DModel, terms: tuple[Term, ...] = ()) -> float:
    """Operations per image of a step with these terms, forward and backward, at uniform timesteps."""
    images = torch.empty(STEPS, 3, 64, 64, device="meta")
    loss_fn = RegularizedLoss(DDPMScheduler(num_train_timesteps=STEPS), terms)
    with FlopCounterMode(display=False) as counter:
        loss_fn(unet, images, noise=torch.empty_like(images), timesteps=torch.arange(STEPS)).loss.backward()
    return counter.get_total_flops() / STEPS


def main() -> None:
    unet, net = networks()
    plain = operations(unet)
    lines = [
        f"UNet2DModel, {unet.num_parameters() / 1e6:.1f}M parameters, 3 x 64 x 64: {plain / 1e9:.1f} GFLOP per image"
        " and step",
        f"Perceptual, ViT-S/16, {net.num_parameters() / 1e6:.1f}M parameters, 224 x 224:",
        "",
        f"{'weighting':<20}{'GFLOP per image':>16}{'of a step':>12}",
    ]
    for name, weighting in GATES.items():
        extra = operations(unet, (Term(Perceptual(net, PROCESSOR), 0.1, weighting),)) - plain
        lines.append(f"{name:<20}{extra / 1e9:>16.2f}{extra / plain:>12.1%}")
    RESULT.write_text("\n".join(lines) + "\n")
    print(RESULT.read_text(), end="")


if __name__ == "__main__":
    main()
