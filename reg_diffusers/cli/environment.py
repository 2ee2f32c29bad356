"""The subcommand `env`: the versions and the hardware, for reports of errors."""

from __future__ import annotations

import argparse
import os
import platform
import re
from importlib import metadata

__all__ = ["add_parser", "environment", "run"]


def add_parser(subparsers) -> argparse.ArgumentParser:
    """Adds the subcommand to those of `reg-diffusers`."""
    parser = subparsers.add_parser(
        "env",
        help="print versions and hardware, for reports of errors",
        description="Prints the versions of the packages that reg_diffusers uses, and the hardware. It prints no paths"
        " and no tokens.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> None:
    """Prints one line per entry."""
    entries = environment()
    width = max(map(len, entries))
    for name, value in entries.items():
        print(f"{name:<{width}}  {value}")


def environment() -> dict[str, str]:
    """Returns the versions of the packages, required and optional, and the hardware."""
    from .. import __version__

    entries = {"reg_diffusers": __version__, "Python": platform.python_version(), "system": platform.platform()}
    return entries | _packages() | _hardware()


def _packages() -> dict[str, str]:
    """Returns the version of each package that setup.cfg names; optional ones only where they are installed."""
    try:
        requirements = metadata.requires("reg_diffusers") or []
    except metadata.PackageNotFoundError:
        requirements = ["torch", "diffusers", "accelerate"]
    found = {}
    for requirement in requirements:
        name, is_optional = re.split(r"[^\w.-]", requirement)[0], "extra ==" in requirement
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            if not is_optional:
                found[name] = "not installed"
    return found


def _hardware() -> dict[str, str]:
    import psutil
    import torch
    from accelerate.commands.config.config_args import default_config_file

    from ..runtime.hardware import choose_mixed_precision

    cores = f"{len(os.sched_getaffinity(0))} of " if hasattr(os, "sched_getaffinity") else ""
    cores += f"{os.cpu_count()} cores"
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {
        "processor": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {cores}",
        "memory": f"{psutil.virtual_memory().total / 2**30:.1f} GiB",
        "GPUs": ", ".join(gpus) or "none",
        "CUDA": torch.version.cuda or "none",
        "precision": f"{choose_mixed_precision()} by default",
        "accelerate's configuration": "present" if os.path.isfile(default_config_file) else "none",
    }
