"""What a run optimises, on which data and by which command, as plain data: reg_config.json."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from accelerate import PartialState

from .. import __version__
from ..card import CONFIG_FILE
from ..files import write_whole
from ..measurement import COMPARISON_FILE
from ..prediction import noise_level, prediction_type
from ..term import Term, checked_weights
from .data import TrainingData
from .launch import launch_command
from .terms import weight_rules

__all__ = ["record_weights", "write_record"]

_MEASUREMENTS = (COMPARISON_FILE, "comparison.png", "evaluation.png")
_PACKAGES = ("torch", "diffusers", "accelerate", "datasets", "transformers", "huggingface_hub")


def write_record(
    args: argparse.Namespace,
    argv: list[str] | None,
    state: PartialState,
    data: TrainingData,
    noise_scheduler,
    terms: tuple[Term, ...],
    mixed_precision: str,
    folder: Path,
) -> None:
    """Writes reg_config.json, from which the model card is made; it holds no token.

    Deletes measurements that an earlier start left: they are of the model as it was then.
    """
    for name in _MEASUREMENTS:
        (folder / name).unlink(missing_ok=True)
    source = args.dataset_name or args.train_data_dir
    rules = weight_rules(args, terms)
    given = zip(terms, args.regularizer, args.reg_weighting, strict=True)
    record = {
        "command": launch_command(argv, state),
        "seed": args.seed,
        "processes": state.num_processes,
        "device": state.device.type,
        "mixed_precision": mixed_precision,
        "base_model": _hub_id(args.pretrained_model_name_or_path),
        "fine_tuned": args.pretrained_model_name_or_path is not None,
        "data": {
            "name": Path(source).name if source and Path(source).exists() else source or "Fashion-MNIST (a part)",
            "hub_id": _hub_id(args.dataset_name),
            "images": data.number,
            "shape": list(data.shape),
            "classes": data.classes,
        },
        "objective": {
            "prediction_type": prediction_type(noise_scheduler),
            "snr_gamma": args.snr_gamma,
            "terms": [
                {
                    "name": term.name,
                    "regularizer": regularizer,
                    "weight": term.weight,
                    **({} if isinstance(rules[term.name], float) else {"weight_rule": str(rules[term.name])}),
                    "weighting": weighting,
                    "gate": _gate(term, noise_scheduler),
                }
                for term, regularizer, weighting in given
            ],
        },
        "versions": {"reg_diffusers": __version__, **_versions(), "Python": platform.python_version()},
        "commit": _commit(),
    }
    write_whole(folder / CONFIG_FILE, lambda path: path.write_text(json.dumps(record, indent=2) + "\n"))


def record_weights(terms: tuple[Term, ...], folder: Path) -> None:
    """Writes the weights that rules have come to into reg_config.json, which holds 0 until then."""
    path = folder / CONFIG_FILE
    record = json.loads(path.read_text())
    for entry, term in zip(record["objective"]["terms"], terms, strict=True):
        entry["weight"] = term.weight
    write_whole(path, lambda temporary: temporary.write_text(json.dumps(record, indent=2) + "\n"))


def _gate(term: Term, noise_scheduler) -> str:
    """The noise levels at which the weighting is not 0, in words."""
    steps = noise_scheduler.config.num_train_timesteps
    timesteps = torch.arange(1, steps + 1) if "shift" in noise_scheduler.config else torch.arange(steps)
    level = noise_level(noise_scheduler, timesteps)
    active = checked_weights(term, level) != 0
    if active.all():
        return "every noise level"
    if not active.any():
        return "no noise level"
    first, last = timesteps[active].min().item(), timesteps[active].max().item()
    return f"t = {first} to {last} of {steps} (SNR at least {level.snr[active].min().item():.3g})"


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    """The commit of the source tree that runs, marked where files differ from it; None outside of one."""
    git = ["git", "-C", str(Path(__file__).parents[2])]
    try:
        tracked = subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True, timeout=10)
        if tracked.returncode != 0:
            return None
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10).stdout.strip()
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True, timeout=10).returncode
    except (OSError, subprocess.TimeoutExpired):
        return None
    return f"{commit}{' with changes' if changed else ''}"


def _hub_id(name: str | None) -> str | None:
    return None if name is None or Path(name).exists() else name
