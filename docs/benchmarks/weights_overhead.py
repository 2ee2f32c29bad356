"""Measures what setting weights, a target and conflict-free updates add to a training step of a small model.

    python docs/benchmarks/weights_overhead.py [--rounds 60]

Each round takes one step of each kind, in an order drawn anew, so that a drift of the machine's speed meets all; the
figures are medians of the ratios within a round. The result is printed and kept in weights_overhead.txt beside this
file.
"""

import argparse
import platform
import random
import statistics
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DModel

from reg_diffusers import RegularizedLoss, Term
from reg_diffusers.balancing import balance
from reg_diffusers.networks.build import new_unet_config
from reg_diffusers.regularizers import total_variation
from reg_diffusers.training.conflict_free import ConflictFree
from reg_diffusers.training.loss_parts import LossParts
from reg_diffusers.training.term_weights import TermWeights
from reg_diffusers.weight_rules import AutoWeight, Target

RESULT = Path(__file__).with_suffix(".txt")
BATCH_SIZE = 16
NAME = "total_variation"
PLAIN = "loss.backward() alone"
KINDS = {  # the rule of the weight, and how gradients are combined
    "--reg_weight 0.1": (0.1, None),
    "--reg_weight auto:0.1": (AutoWeight(0.1), None),
    "--reg_target ...=0.9x": (Target(NAME, 0.9, is_relative=True), None),
    "--reg_balance config": (0.1, "config"),
    "--reg_balance pcgrad": (0.1, "pcgrad"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60, help="measured rounds, after two that warm up")
    rounds = parser.parse_args().rounds

    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    unet = UNet2DModel(sample_size=16, in_channels=1, out_channels=1, **new_unet_config(16))
    optimizer = torch.optim.AdamW(unet.parameters(), fused=True)
    loss_fn = RegularizedLoss(DDPMScheduler(), [Term(total_variation, weight=0.1)])
    original_samples = torch.rand(BATCH_SIZE, 1, 16, 16) * 2 - 1
    parts = LossParts(accelerator, [NAME], {NAME: 0.2})
    weights = {kind: TermWeights(accelerator, {NAME: rule}, {NAME: 0.2}, 5) for kind, (rule, _) in KINDS.items()}
    combining = {kind: ConflictFree(accelerator, unet, method) for kind, (_, method) in KINDS.items() if method}

    def step(kind: str, timesteps: torch.Tensor) -> float:
        start = time.perf_counter()
        output = loss_fn(unet, original_samples, timesteps=timesteps)
        if kind == PLAIN:
            output.loss.backward()
        else:
            output = balance(output, weights[kind].current)
            if kind in combining:
                combining[kind].backward(output.loss, output)
            else:
                output.loss.backward()
            parts.update(output)
            weights[kind].update(output)
            weights[kind].compute()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start

    times = []
    for _ in range(rounds + 2):
        timesteps = torch.randint(0, 1000, (BATCH_SIZE,))  # which images take part is the same for all
        order = random.sample((PLAIN, *KINDS), len(KINDS) + 1)
        times.append({kind: step(kind, timesteps) for kind in order})
    times = times[2:]
    milliseconds = 1000 * statistics.median(found[PLAIN] for found in times)
    lines = [
        f"UNet2DModel {new_unet_config(16)['block_out_channels']}, {unet.num_parameters() / 1e6:.2f}M parameters,"
        f" 1 x 16 x 16, batch {BATCH_SIZE}, float32, AdamW, {NAME}",
        f"torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads",
        f"{PLAIN:<24}{milliseconds:8.1f} ms, median of {rounds}",
    ]
    for kind in KINDS:
        ratios = [found[kind] / found[PLAIN] for found in times]
        quartiles = statistics.quantiles(ratios, n=4)
        lines.append(
            f"{kind:<24}{statistics.median(ratios):8.3f} x    quartiles {quartiles[0]:.3f} to {quartiles[2]:.3f}"
        )
    lines.append(f"{'what is measured alone':<24}{alone(loss_fn, original_samples, parts):8.2f} ms")
    RESULT.write_text("\n".join(lines) + "\n")
    print(RESULT.read_text(), end="")


def alone(loss_fn: RegularizedLoss, original_samples: torch.Tensor, parts: LossParts) -> float:
    """What `balance` and the log take beyond the backward of the loss itself, without a network, in milliseconds."""
    differences = []
    for _ in range(200):
        timesteps = torch.randint(0, 1000, (BATCH_SIZE,))
        seconds = {}
        for is_balanced in (False, True):
            model_output = torch.randn_like(original_samples, requires_grad=True)
            start = time.perf_counter()
            output = loss_fn(lambda sample, t, o=model_output: (o,), original_samples, timesteps=timesteps)
            if is_balanced:
                output = balance(output, {NAME: 0.1})
            output.loss.backward()
            if is_balanced:
                parts.update(output)
            seconds[is_balanced] = time.perf_counter() - start
        differences.append(seconds[True] - seconds[False])
    return 1000 * statistics.median(differences)


if __name__ == "__main__":
    main()
