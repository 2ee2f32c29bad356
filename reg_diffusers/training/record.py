"""Writes reg_config.json: what a run optimizes, on which data and by which command."""

from __future__ import annotations

import json
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from accelerate import PartialState

from .. import __version__
from ..data.buckets import Buckets
from ..data.image_sizes import range_text
from ..prediction import noise_level, prediction_type
from ..runs.run_folder import CONFIG_FILE, files_left
from ..runtime.files import write_whole
from ..runtime.launch import launch_command
from ..settings.data import DataSettings
from ..settings.loss import LossSettings
from ..settings.machine import MachineSettings
from ..term import Term, checked_weights
from .loading import Loaded
from .terms import weight_rules

__all__ = ["record_of_data", "record_of_objective", "record_weights", "recorded_command", "write_record"]

_PROMPTS_RECORDED = 4
_PACKAGES = ("torch", "diffusers", "accelerate", "datasets", "transformers", "huggingface_hub", "peft")


def write_record(
    folder: Path,
    state: PartialState,
    *,
    command: str,
    seed: int,
    mixed_precision: str,
    base_model: str | None,
    vae: str | None,
    data: dict,
    objective: dict,
) -> None:
    """Writes reg_config.json, the source of the model card; it contains no token.

    Deletes measurements of an earlier start, because they belong to an earlier state of the model.

    Args:
        folder: output folder.
        state: processes of the launch.
        command: command that starts the run on any machine.
        seed: seed of the training.
        mixed_precision: precision of the training.
        base_model: folder or Hub id of the fine-tuned model; None for a new one.
        vae: folder or Hub id of the autoencoder of --vae; None without the flag.
        data: see `record_of_data`.
        objective: see `record_of_objective`.
    """
    for path in files_left(folder, lambda left: left.stale == "all"):
        path.unlink()
    record = {
        "command": command,
        "seed": seed,
        "processes": state.num_processes,
        "device": state.device.type,
        "mixed_precision": mixed_precision,
        "base_model": _hub_id(base_model),
        "fine_tuned": base_model is not None,
        **({} if vae is None else {"vae": _hub_id(vae)}),
        "data": data,
        "objective": objective,
        "versions": {"reg_diffusers": __version__, **_versions(), "Python": platform.python_version()},
        "commit": _commit(),
    }
    write_whole(folder / CONFIG_FILE, lambda path: path.write_text(json.dumps(record, indent=2) + "\n"))


def recorded_command(argv: list[str], state: PartialState, machine: MachineSettings, decided: dict[str, str]) -> str:
    """Returns the command with the choices made for this machine, because another machine may choose otherwise.

    Args:
        argv: flags as typed.
        state: processes of the launch.
        machine: settings of the machine.
        decided: value chosen for each setting that is None.
    """
    undeclared = {f"--{name}": value for name, value in decided.items() if getattr(machine, name) is None}
    return launch_command(argv, state, undeclared)


def record_of_data(settings: DataSettings, loaded: Loaded) -> dict:
    """Describes the data and their source, the images that are held out, and some of the texts."""
    data, held_out, prompts = loaded.images, loaded.held_out, loaded.prompts_shown
    source = settings.source
    return {
        "name": Path(source).name if source and Path(source).exists() else source or "Fashion-MNIST (a part)",
        "hub_id": _hub_id(settings.dataset_name),
        "images": data.number,
        "sha256": data.content,
        "shape": list(data.shape),
        **({} if data.white is None else {"white": data.white}),
        **({"sizes": data.numbers()} if isinstance(data, Buckets) else {}),
        **({"original_sizes": range_text(data.original_sizes)} if loaded.takes_sizes else {}),
        "classes": data.classes,
        **({"condition_dropout": settings.condition_dropout} if settings.condition_dropout else {}),
        **({"prompts": list(prompts[:_PROMPTS_RECORDED])} if prompts else {}),
        **({} if held_out is None else {"held_out": held_out.record()}),
    }


def record_of_objective(
    loss: LossSettings, terms: tuple[Term, ...], noise_scheduler, *, is_picture: bool, is_decoded: bool
) -> dict:
    """Describes the objective: the denoising loss, and each term with its weight, its weighting and what it sees."""
    units = "model" if is_picture else loss.reg_units
    rules = weight_rules(loss, terms)
    given = zip(terms, loss.regularizer, loss.reg_weighting, loss.estimators, loss.schedules, strict=True)
    return {
        "prediction_type": prediction_type(noise_scheduler),
        "snr_gamma": loss.snr_gamma,
        **({} if loss.loss_weighting == "none" else {"loss_weighting": loss.loss_weighting}),
        **({} if loss.timestep_sampling == "uniform" else {"timestep_sampling": loss.timestep_sampling}),
        "units": "decoded" if is_decoded else units,
        "terms": [
            {
                "name": term.name,
                "regularizer": regularizer,
                "weight": term.weight,
                **({"weight_rule": rules[term.name].spec(term.name)} if rules[term.name].is_measured else {}),
                "weighting": weighting,
                **({} if estimator == "one_step" else {"estimator": estimator}),
                **({} if schedule == "constant" else {"schedule": schedule}),
                "gate": _gate(term, noise_scheduler),
            }
            for term, regularizer, weighting, estimator, schedule in given
        ],
    }


def record_weights(terms: tuple[Term, ...], folder: Path) -> None:
    """Writes the weights that the rules determined to reg_config.json, which holds 0 until then."""
    path = folder / CONFIG_FILE
    record = json.loads(path.read_text())
    for entry, term in zip(record["objective"]["terms"], terms, strict=True):
        entry["weight"] = term.weight
    write_whole(path, lambda temporary: temporary.write_text(json.dumps(record, indent=2) + "\n"))


def _gate(term: Term, noise_scheduler) -> str:
    """Describes the noise levels with non-zero weighting."""
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


@cache
def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@cache  # of the code that runs, whatever happens to its files meanwhile
def _commit() -> str | None:
    """Returns the commit of the source tree, marked if files differ from it; None outside a source tree."""
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
