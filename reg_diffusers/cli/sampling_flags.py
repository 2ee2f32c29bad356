"""Flags that all commands with sampling share."""

from __future__ import annotations

import argparse

from ..settings.flag_values import positive_int, seed

__all__ = ["add_machine_flags", "add_sampler_flags", "add_units_flag"]


def add_sampler_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that determine the images: steps, scheduler, classifier-free guidance, seed."""
    add = parser.add_argument
    add(
        "--num_inference_steps",
        type=positive_int,
        default=50,
        metavar="N",
        help="network calls per image (default: %(default)s)",
    )
    add("--scheduler", metavar="NAME", help="DDIM, DDPM, Euler, DPM-Solver++ or UniPC (default: DDIM; Euler for flow)")
    add(
        "--guidance_scale",
        type=float,
        metavar="SCALE",
        help="scale of classifier-free guidance, for a model that was also trained without its condition; 1: none"
        " (default: 1 by class; for texts, that of its pipeline in diffusers)",
    )
    add("--seed", type=seed, default=0, metavar="N", help="image i has the seed N + i (default: %(default)s)")


def add_units_flag(parser: argparse.ArgumentParser, default: str = "user") -> None:
    """Adds the flag for the units of fields in the losses."""
    parser.add_argument(
        "--reg_units",
        choices=["user", "model"],
        help="units of fields in the losses: their own (user), or those of the network, about -1 to 1 (default:"
        f" {default})",
    )


def add_machine_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags about the machine: precision, threads."""
    add = parser.add_argument
    add(
        "--mixed_precision",
        choices=["no", "bf16"],
        default="no",
        help="bf16: run the network in bfloat16, faster on recent CPUs and GPUs (default: %(default)s, float32; never"
        " chosen by timing as in a training, so that a seed gives the same samples)",
    )
    add(
        "--num_threads",
        type=positive_int,
        metavar="N",
        help="CPU threads per process (default: all cores, divided among the processes)",
    )
