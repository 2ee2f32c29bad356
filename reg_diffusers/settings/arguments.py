"""The command line of train_reg.py.

Names and meanings follow train_unconditional.py of diffusers, so its command lines work here; most new flags are about
the regularizers. A YAML file may come first: its entries act like flags, and flags override it.
"""

from __future__ import annotations

import argparse
import sys

from .. import __version__
from ..runtime.errors import UsageError, warn
from .config_file import flags_of_file, split_file
from .data import DataSettings
from .flag_values import auto
from .flags import add_flags, section_of
from .hub import HubSettings
from .loss import LossSettings
from .machine import MachineSettings
from .model import ModelSettings
from .optimization import OptimizationSettings
from .output import OutputSettings
from .parser import Parser
from .run import Settings
from .validation import ValidationSettings

__all__ = ["add_objective_flags", "as_flags", "build_parser", "complete", "parse_args"]

# For each attribute of `Settings`: the title in --help and the dataclass.
_SECTIONS = {
    "data": ("data (none given: 5,000 embedded Fashion-MNIST images)", DataSettings),
    "model": ("model", ModelSettings),
    "loss": ("regularization", LossSettings),
    "optimization": ("optimization", OptimizationSettings),
    "machine": ("machine", MachineSettings),
    "validation": ("validation", ValidationSettings),
    "output": ("output", OutputSettings),
    "hub": ("Hub", HubSettings),
}
# Without user data, the run is a demonstration that ends within minutes on two cores. Its loss and weight were chosen
# on its data (docs/benchmarks/first_picture.txt), so a loss that the user names has the usual default weight.
DEMO_LOSS_DEFAULTS = {"regularizer": ("near_background",), "reg_weight": (0.2,)}
DEMO_DEFAULTS = {
    "train_batch_size": 32,
    "max_train_steps": 600,
    "learning_rate": 2e-3,
    "lr_warmup_steps": 40,
    "preview_steps": 100,
    "ddpm_num_inference_steps": 25,
    "compare": True,
}
DEMO_MODEL_DEFAULTS = {"resolution": 16, "prediction_type": "v_prediction"}


def parse_args(argv: list[str] | None = None, program: str = "train_reg.py") -> Settings:
    """Parses the settings of a run: defaults, then the YAML file if there is one, then flags.

    Exits with status 2 and a one-line message for a setting that cannot work.

    Args:
        argv: the command line; None for that of this process.
        program: the name of the command in --help and in messages.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser(program)
    try:
        file, argv = split_file(argv)
        if file is not None:
            argv = flags_of_file(file, parser) + argv
        args = parser.parse_args(argv)
        if args.file is not None:
            raise UsageError(
                f"unexpected argument {args.file!r}: a YAML file must come before all flags, or be named by --config"
            )
        names_no_loss = args.regularizer is parser.get_default("regularizer")
        if _is_demonstration(args):
            parser.set_defaults(**_demonstration_defaults(args, names_no_loss))
            args = parser.parse_args(argv)
        settings = _settings(vars(args))
        if names_no_loss and not _is_demonstration(args):
            name, weight = args.regularizer[0], args.reg_weight[0]
            warn(f"no --regularizer: using {name} with --reg_weight {weight}; pass --regularizer none to disable it")
    except UsageError as error:
        parser.error(str(error))
    return settings


def build_parser(program: str = "train_reg.py") -> argparse.ArgumentParser:
    """Builds the parser of `parse_args` and of the documentation page on the flags."""
    command = "accelerate launch train_reg.py" if program == "train_reg.py" else program
    parser = Parser(
        prog=program,
        usage=f"{command} [config.yaml] [flags]",
        description="Train a diffusion model with L = ||o - target||^2 + sum_k weight_k lambda_k(t) L'_k(x0_hat):"
        " x0_hat is the image that the prediction implies, L' any loss on images. Without flags: a demonstration on"
        " embedded images, with and without near_background, in a few minutes.",
        epilog="Most flags are those of diffusers' train_unconditional.py. Flags override the YAML file.",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("file", nargs="?", metavar="config.yaml", help="the same as --config, before all flags")
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML file with flags as keys; other flags override it. A run writes its own, reg_settings.yaml",
    )
    parser.add_argument("--version", action="version", version=f"reg_diffusers {__version__}")
    for name in _SECTIONS:
        _add_section(parser, name)
    return parser


def add_objective_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of data, model and loss to another command, which must call `complete` on its arguments.

    The flags have no defaults there, because the defaults of a training depend on its data.
    """
    for name in ("data", "model", "loss"):
        _add_section(parser, name)
    parser.set_defaults(**dict.fromkeys((*DEMO_LOSS_DEFAULTS, *DEMO_DEFAULTS, *DEMO_MODEL_DEFAULTS)))


def complete(args: argparse.Namespace) -> Settings:
    """Returns the settings of a training with these flags, and the defaults of all others.

    Raises:
        UsageError: if a setting cannot work.
    """
    values = vars(build_parser().parse_args([]))
    if _is_demonstration(args):
        values |= _demonstration_defaults(args, args.regularizer is None)
    return _settings(values | {name: value for name, value in vars(args).items() if value is not None})


def as_flags(settings: Settings) -> list[str]:
    """Returns a command line that `parse_args` turns into these settings; names the losses, and omits defaults.

    No flag expresses a None that differs from the default of the demonstration, such as `max_train_steps` without user
    data; the command line then has the value of the demonstration.
    """
    values = settings.values()
    names = ("dataset_name", "train_data_dir", "pretrained_model_name_or_path", "regularizer")
    given = {name: values[name] for name in names} | {"regularizer": values["regularizer"] or ("none",)}
    base = complete(argparse.Namespace(**given)).values()
    flags = []
    for name, value in values.items():
        is_default = name not in names and value == base[name]
        if is_default or value is None or (name in ("reg_weight", "reg_weighting") and not value):
            continue
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, tuple):
            flags += [f"--{name}", *(map(str, value) if value else ["none"])]
        else:
            flags += [f"--{name}", str(value)]
    return flags


def _add_section(parser: argparse.ArgumentParser, name: str) -> None:
    title, section = _SECTIONS[name]
    group = parser.add_argument_group(title)
    add_flags(group, section)
    if name == "output":
        group.add_argument(
            "--resume",
            dest="resume_from_checkpoint",
            metavar="auto",
            type=auto,
            help="auto: continue from the newest intact checkpoint in --output_dir, or start if there is none; so the"
            " same command starts a run and continues it",
        )
        logger = next(action for action in group._group_actions if action.dest == "logger")
        group.add_argument("--report_to", dest="logger", choices=logger.choices, help="the same as --logger")


def _settings(values: dict) -> Settings:
    return Settings(**{name: section_of(section, values) for name, (_, section) in _SECTIONS.items()})


def _is_demonstration(args: argparse.Namespace) -> bool:
    return args.dataset_name is None and args.train_data_dir is None


def _demonstration_defaults(args: argparse.Namespace, names_no_loss: bool) -> dict:
    defaults = DEMO_DEFAULTS | (DEMO_LOSS_DEFAULTS if names_no_loss else {})
    return defaults | (DEMO_MODEL_DEFAULTS if args.pretrained_model_name_or_path is None else {})


class _HelpFormatter(argparse.HelpFormatter):
    """Adds the default of each flag to its help, unless the text mentions it or there is none."""

    def _get_help_string(self, action) -> str:
        silent = action.default in (None, False, argparse.SUPPRESS) or "default" in action.help
        shown = " ".join(map(str, action.default)) if isinstance(action.default, tuple) else action.default
        return action.help if silent else f"{action.help} (default: {shown})"
