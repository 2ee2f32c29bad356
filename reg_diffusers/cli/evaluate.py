"""The subcommand `evaluate`: measures the effect of a loss on trained models and its cost, in numbers and images."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..runtime.messages import say
from .bench import load_models, open_bench
from .evaluation_files import write_evaluation
from .judged import judge_models
from .judging import (
    check_regularizers,
    choose_features,
    columns_of,
    describe_predicted,
    recorded_regularizers,
    recorded_units,
    regularizers_of,
)
from .judging_flags import add_judging_flags
from .model_samples import draw_samples_of, read_samples, samplers_of
from .output import check_folder, read_settings, write_settings
from .recorded_data import recorded_data
from .sampling_flags import add_units_flag

__all__ = ["add_parser", "run"]

_SETTINGS_FILE = "evaluation_settings.json"


def add_parser(subparsers) -> argparse.ArgumentParser:
    """Adds the subcommand to those of `reg-diffusers`."""
    parser = subparsers.add_parser(
        "evaluate",
        help="did the loss help, and what did it cost? Compares samples of trained models to the data",
        description="Draws samples from each model and measures two numbers together: the loss L' and the distance to"
        " the data, each with a 95 % confidence interval and next to the value of the data. Writes a table, a figure,"
        " JSON and a page that opens without a server. Run the same command again to continue after an interruption."
        " On several processes: accelerate launch -m reg_diffusers evaluate ...",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--model",
        action="extend",
        nargs="+",
        required=True,
        metavar="FOLDER_OR_ID",
        help="saved pipelines; all are compared to the first",
    )
    add(
        "--regularizer",
        nargs="+",
        metavar="NAME",
        help="losses to measure: built-in names or my_module:MyReg (default: the built-in losses that the models were"
        " trained with)",
    )
    add("--output", default="evaluation", metavar="FOLDER", help="folder for all results (default: %(default)s)")
    add(
        "--reuse",
        action="store_true",
        help="reuse the samples of an earlier evaluation in this folder, and replace its results",
    )
    add_judging_flags(parser)
    add_units_flag(parser, "as in the training of the models, else user")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> None:
    """Draws the missing samples in every process of a launch, and judges them in the main process.

    Raises:
        UsageError: if models, data or settings cannot work, or if the folder holds something else.
        SystemExit: with status 130 on Ctrl-C.
    """
    from ..runtime.hardware import set_threads
    from ..runtime.processes import in_turn, join_processes, leave_processes, on_main_process, together

    state = join_processes()
    set_threads(args.num_threads)
    output = Path(args.output)
    on_main_process(state, lambda: _check_output(output))
    models = together(state, lambda: load_models(args.model, state.device, mixed_precision=args.mixed_precision))
    together(state, lambda: _find_data(args))
    specs = args.regularizer or recorded_regularizers(args.model)
    regularizers = together(state, lambda: regularizers_of(specs))
    wanted = together(state, lambda: columns_of(regularizers, args, is_recorded=bool(args.data_reason)))
    bench = in_turn(state, lambda: open_bench(args, models, wanted))
    units = together(state, lambda: _find_units(args, bench))
    terms = together(state, lambda: check_regularizers(regularizers, bench, models, state.device, args.reg_units))
    on_main_process(state, lambda: _check_fid(args, bench))
    names = dict(zip(models, args.model, strict=True))
    samplers = together(state, lambda: samplers_of(args, models, names, bench, output / "samples"))
    if state.is_main_process:
        say(
            "\n".join(
                [f"data        {bench.description}{args.data_reason}", *units, *describe_predicted(terms, bench)]
            )
        )
    features = on_main_process(state, lambda: _features(args, bench, state.device))
    settings = _settings(args, samplers, bench, specs, features)
    on_main_process(state, lambda: _keep_settings(args, output, settings))
    try:
        draw_samples_of(args, samplers, state)
        leave_processes(state)
        if not state.is_main_process:
            return
        samples = read_samples(bench, samplers)
        judged = judge_models(args, models, samples, bench, features, terms, state.device)
        write_evaluation(args, output, judged, samples, bench, settings)
    except KeyboardInterrupt:
        if state.is_main_process:
            print(f"\ninterrupted: run the same command again to continue in {output}")
        sys.exit(130)


def _find_data(args: argparse.Namespace) -> None:
    """Falls back to the training data of the models, with their columns, if no data are named."""
    args.data_reason = ""
    if args.data is None:
        args.data, recorded = recorded_data(args.model, "--data")
        if args.prompt is not None or args.caption_column is not None:
            recorded.prompt = recorded.caption_column = None
        for name, value in vars(recorded).items():
            setattr(args, name, getattr(args, name) or value)
        args.data_reason = f", the training data of {args.model[0]}"


def _find_units(args: argparse.Namespace, bench) -> list[str]:
    """Falls back to the units of L' in the training of the models if none are named; returns a note for fields."""
    if bench.data.is_picture:
        return []
    why = "from the command line"
    if args.reg_units is None:
        units, model = recorded_units(args.model)
        args.reg_units, why = units or "user", f"as in the training of {model}" if model else "the default"
    seen = "the network's units, about -1 to 1" if args.reg_units == "model" else "the fields' own units"
    return [f"units       L' sees {seen}: --reg_units {args.reg_units}, {why}"]


def _check_output(output: Path) -> None:
    from ..runtime.errors import UsageError

    check_folder(output)
    if output.is_dir() and any(output.iterdir()) and not (output / _SETTINGS_FILE).is_file():
        raise UsageError(f"--output {output} exists and holds no evaluation: name another folder")


def _check_fid(args: argparse.Namespace, bench) -> None:
    from ..evaluation.inception import check_inception
    from ..runtime.errors import UsageError

    if not args.fid:
        return
    if bench.data.shape[0] not in (1, 3):
        raise UsageError("--fid needs images of 1 or 3 channels")
    try:
        check_inception()
    except ImportError as error:
        raise UsageError(f"--fid: {error}") from error


def _features(args: argparse.Namespace, bench, device):
    features, why = choose_features(args, bench, device)
    if why:
        say(f"features    {why}")
    return features


def _settings(args: argparse.Namespace, samplers: dict, bench, specs: list[str], features) -> dict:
    """Returns the settings that determine the results, as plain data."""
    return {
        "models": {
            title: {
                "model_sha256": sampler.settings.model_sha256,
                "scheduler": sampler.settings.scheduler,
                "num_inference_steps": sampler.settings.num_inference_steps,
                **_guidance_scale(sampler),
            }
            for title, (sampler, *_) in samplers.items()
        },
        "regularizers": list(specs),
        **({} if bench.data.is_picture else {"reg_units": args.reg_units}),
        "data": bench.source,
        "data_sha256": bench.sha256,
        "num_images": bench.number,
        "seed": args.seed,
        "mixed_precision": args.mixed_precision,
        "features": features.description if features else "",
        "fid": args.fid,
    }


def _guidance_scale(sampler) -> dict:
    scale = sampler.settings.guidance_scale
    return {} if scale is None else {"guidance_scale": scale}


def _keep_settings(args: argparse.Namespace, output: Path, settings: dict) -> None:
    """Raises if the folder holds another evaluation; else writes the settings there, before the first sample."""
    from ..runtime.errors import UsageError

    if not args.reuse and (before := read_settings(output, _SETTINGS_FILE)) is not None:
        differing = [name for name in settings if before.get(name) != settings[name] and name != "data"]
        if differing:
            raise UsageError(
                f"--output {output} holds another evaluation (it differs in {', '.join(differing)}): name another"
                " folder, or add --reuse to reuse its samples and replace its results"
            )
    write_settings(output, _SETTINGS_FILE, settings)
