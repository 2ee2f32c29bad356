"""Measures what total_variation adds to a training step of the default 32 x 32 model, in train_reg.py's precision.

    python docs/benchmarks/auxiliary_overhead.py [--pairs 15]

Steps with and without the term alternate, so that a drift of the machine's speed meets both; the figure is the median
of the pairwise ratios. The result is printed and kept in auxiliary_overhead.txt beside this file.
"""

import argparse
import platform
import statistics
import time
from pathlib import Path

import diffusers
import torch
from diffusers import DDPMScheduler, UNet2DModel

from reg_diffusers import RegularizedLoss, Term
from reg_diffusers.networks.attention import prefers_explicit_attention, use_explicit_attention
from reg_diffusers.networks.build import new_unet_config
from reg_diffusers.regularizers import total_variation
from reg_diffusers.runtime.hardware import choose_mixed_precision, keep_freed_memory

RESULT = Path(__file__).with_suffix(".txt")
BATCH_SIZE = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=15, help="measured pairs of steps, after two that warm up")
    pairs = parser.parse_args().pairs

    torch.manual_seed(0)
    keep_freed_memory(torch.device("cpu"))
    precision = choose_mixed_precision()
    unet = UNet2DModel(sample_size=32, in_channels=3, out_channels=3, **new_unet_config(32, is_large=True))
    if prefers_explicit_attention(unet, BATCH_SIZE, "cpu", precision):
        use_explicit_attention(unet)
    optimizer = torch.optim.AdamW(unet.parameters(), fused=True)
    scheduler = DDPMScheduler()
    plain, regularized = RegularizedLoss(scheduler), RegularizedLoss(scheduler, [Term(total_variation, weight=0.1)])
    original_samples = torch.rand(BATCH_SIZE, 3, 32, 32) * 2 - 1

    def model(sample, timesteps):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            return unet(sample, timesteps, return_dict=False)[0].float()

    def seconds(loss_fn) -> float:
        start = time.perf_counter()
        loss_fn(model, original_samples).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start

    times = [(seconds(plain), seconds(regularized)) for _ in range(pairs + 2)][2:]
    ratios = [with_term / without for without, with_term in times]
    quartiles = statistics.quantiles(ratios, n=4)

    # The term alone, forward and backward, on the same tensors: below the noise of whole steps.
    model_output = torch.randn_like(original_samples, requires_grad=True)
    term_times = []
    for _ in range(200):
        timesteps = torch.randint(0, 1000, (BATCH_SIZE,))
        start = time.perf_counter()
        output = regularized.regularization(model_output, timesteps, original_samples)
        if output.loss.requires_grad:
            output.loss.backward()
        term_times.append(time.perf_counter() - start)
    step, term = statistics.median(without for without, _ in times), statistics.median(term_times)
    lines = [
        f"UNet2DModel {unet.config.block_out_channels}, {unet.num_parameters() / 1e6:.2f}M parameters,"
        f" 3 x 32 x 32, batch {BATCH_SIZE}, {'bfloat16' if precision == 'bf16' else 'float32'}, AdamW",
        f"torch {torch.__version__}, diffusers {diffusers.__version__}, {platform.machine()},"
        f" {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        f"step without total_variation, median          {1000 * step:8.1f} ms",
        f"step with / without, median of {pairs:3} pairs       {statistics.median(ratios):8.4f}"
        f"    quartiles {quartiles[0]:.4f} to {quartiles[2]:.4f}",
        f"the term alone, forward and backward, median  {1000 * term:8.2f} ms    {term / step:.2%} of a step",
    ]
    RESULT.write_text("\n".join(lines) + "\n")
    print(RESULT.read_text(), end="")


if __name__ == "__main__":
    main()
