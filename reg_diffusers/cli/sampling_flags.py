"""The flags of all commands that draw samples."""

from __future__ import annotations

import argparse

from ..training.flag_values import natural, positive_int

__all__ = ["add_machine_flags", "add_sampler_flags"]


def add_sampler_flags(parser: argparse.ArgumentParser) -> None:
    """Adds what decides the images: steps, scheduler, seed."""
    add = parser.add_argument
    add(
        "--num_inference_steps",
        type=positive_int,
        default=50,
        metavar="N",
        help="calls of the network for each image (default: %(default)s)",
    )
    add("--scheduler", metavar="NAME", help="DDIM, DDPM, Euler, DPM-Solver++ or UniPC (default: DDIM; Euler for flow)")
    add("--seed", type=natural, default=0, metavar="N", help="image i has the seed N + i (default: %(default)s)")


def add_machine_flags(parser: argparse.ArgumentParser) -> None:
    """Adds what the machine is asked for: precision, threads."""
    add = parser.add_argument
    add(
        "--mixed_precision",
        choices=["no", "bf16"],
        default="no",
        help="bf16: the network computes in bfloat16, on recent processors and GPUs faster (default: %(default)s)",
    )
    add(
        "--num_threads",
        type=positive_int,
        metavar="N",
        help="CPU threads per process (default: the cores, shared)",
    )
