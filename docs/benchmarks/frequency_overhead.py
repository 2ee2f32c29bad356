"""Measures what spectrum and wavelet add to a training step of the network of diffusers' train_unconditional.py.

    python docs/benchmarks/frequency_overhead.py [--rounds 5]

The network has 113.7M parameters and sees 3 x 64 x 64, in train_reg.py's precision. All images take part (weighting
constant), which no gate exceeds. Each round takes one step of each kind, in an order drawn anew, so that a drift of
the machine's speed meets all; the figures are medians of the ratios within a round. The loss alone, forward and
backward, is timed between these steps, because it is below the noise of whole steps. The result is printed and kept
in frequency_overhead.txt beside this file.
"""

import argparse
import platform
import random
import statistics
import time
from functools import partial
from pathlib import Path

import diffusers
import torch
from diffusers import DDPMScheduler
from perceptual_flops import denoiser

from reg_diffusers import RegularizedLoss, Term
from reg_diffusers.regularizers import spectrum, wavelet
from reg_diffusers.runtime.hardware import choose_mixed_precision, keep_freed_memory
from reg_diffusers.weighting import constant

RESULT = Path(__file__).with_suffix(".txt")
BATCH_SIZE = 4
PLAIN = "plain"
LOSSES = {
    "spectrum": spectrum,
    "spectrum, focal=1": partial(spectrum, focal=1.0),
    "wavelet": wavelet,
}
REPEATS = 20  # of the loss alone, in each round


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds, after one that warms up")
    rounds = parser.parse_args().rounds

    torch.manual_seed(0)
    keep_freed_memory(torch.device("cpu"))
    precision = choose_mixed_precision()
    unet = denoiser()
    optimizer = torch.optim.AdamW(unet.parameters(), fused=True)
    loss_fns = {name: RegularizedLoss(DDPMScheduler(), [Term(loss, 0.1, constant)]) for name, loss in LOSSES.items()}
    loss_fns[PLAIN] = RegularizedLoss(DDPMScheduler())
    original_samples = torch.rand(BATCH_SIZE, 3, 64, 64) * 2 - 1

    def model(sample, timesteps):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            return unet(sample, timesteps, return_dict=False)[0].float()

    def step(name: str) -> float:
        start = time.perf_counter()
        loss_fns[name](model, original_samples).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start

    def alone(name: str) -> float:
        output = torch.randn_like(original_samples, requires_grad=True)
        timesteps = torch.randint(0, 1000, (BATCH_SIZE,))
        start = time.perf_counter()
        regularization = loss_fns[name].regularization
        regularization(output, timesteps, original_samples, original_samples=original_samples).loss.backward()
        return time.perf_counter() - start

    steps, losses = [], {name: [] for name in LOSSES}
    for _ in range(rounds + 1):
        steps.append({name: step(name) for name in random.sample(list(loss_fns), len(loss_fns))})
        for name in REPEATS * list(LOSSES):
            losses[name].append(alone(name))
    steps = steps[1:]
    plain = statistics.median(found[PLAIN] for found in steps)
    lines = [
        f"UNet2DModel, {unet.num_parameters() / 1e6:.1f}M parameters, 3 x 64 x 64, batch {BATCH_SIZE},"
        f" {'bfloat16' if precision == 'bf16' else 'float32'}, AdamW",
        f"torch {torch.__version__}, diffusers {diffusers.__version__}, {platform.machine()},"
        f" {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        f"plain step, median of {rounds}: {1000 * plain:.1f} ms",
        "",
        f"{'':<22}{'step / plain step':>18}{'quartiles':>18}{'alone, ms':>12}{'of a step':>11}",
    ]
    for name in LOSSES:
        ratios = [found[name] / found[PLAIN] for found in steps]
        low, _, high = statistics.quantiles(ratios, n=4)
        loss = statistics.median(losses[name][REPEATS:])
        lines.append(
            f"{name:<22}{statistics.median(ratios):>18.4f}{f'{low:.4f} to {high:.4f}':>18}{1000 * loss:>12.2f}"
            f"{loss / plain:>11.2%}"
        )
    RESULT.write_text("\n".join(lines) + "\n")
    print(RESULT.read_text(), end="")


if __name__ == "__main__":
    main()
