"""The subcommand `sweep`: which weight? One short training for each, measured by loss and distance."""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from pathlib import Path

from .bench import load_models, open_bench
from .judging import (
    check_regularizers,
    choose_features,
    draw_samples_of,
    judge_models,
    read_samples,
    read_settings,
    regularizers_of,
    samplers_of,
    write_settings,
)
from .judging_flags import DATA_FLAGS, add_measuring_flags
from .output import check_folder

__all__ = ["add_parser", "run"]

_SETTINGS_FILE = "sweep_settings.json"
_OWN_FLAGS = ("output_dir", "reg_weight", "reg_weighting", "compare", "no-compare", "resume", "overwrite_output_dir")
_OWN_FLAGS += ("resume_from_checkpoint", "push_to_hub", "reg_target")
_DECIDED = "after --: the sweep decides it (--reg_weights, --reg_weightings, --output)"
_NOT_OVERRIDDEN = ("reg_target", "push_to_hub", "overwrite_output_dir")  # by the flags that a run is given


def add_parser(subparsers) -> argparse.ArgumentParser:
    """Adds the subcommand to those of `reg-diffusers`."""
    parser = subparsers.add_parser(
        "sweep",
        help="which weight? The same short training for several weights and weightings, and the Pareto front",
        description="Runs train_reg.py once for each weight and weighting (weight 0 once), measures the loss L' and"
        " the distance to the data of each, and draws which of them no other beats in both. The same command again"
        " goes on where it was interrupted; more weights can be added to it later.",
        usage="reg-diffusers sweep [flags] -- [flags of train_reg.py]",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--reg_weights", nargs="+", type=_weight, default=[0.0, 0.1, 1.0], metavar="W", help="default: 0 0.1 1")
    add(
        "--reg_weightings",
        nargs="+",
        default=["matched", "constant"],
        metavar="NAME",
        help="built-in names or my_module:my_weighting (default: matched constant)",
    )
    add("--output", default="sweep", metavar="FOLDER", help="for trainings and results (default: %(default)s)")
    add("--script", default="train_reg.py", metavar="FILE", help="the training script (default: ./train_reg.py)")
    add_measuring_flags(parser)
    add("training", nargs="*", metavar="-- FLAG", help="flags of train_reg.py, the same for all runs")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> None:
    """Trains what is missing, then measures all.

    Raises:
        UsageError: settings that cannot work, a training that failed, a folder of another sweep.
        SystemExit: with status 130, interrupted by Ctrl-C.
    """
    from accelerate import PartialState

    from ..training.arguments import parse_args
    from ..training.hardware import cpu_is_wanted, set_threads

    output = Path(args.output)
    _check(args)
    training = parse_args(args.training)
    _check_training(training)
    regularizers = regularizers_of(training.regularizer)
    runs = _runs(args)
    settings = _settings(args)
    _keep_settings(output, settings)
    for number, (title, weighting, weight) in enumerate(runs, 1):
        folder = output / "runs" / _name(title)
        if _is_finished(folder):
            print(f"run {number} of {len(runs)}  {title}: was there", flush=True)
            continue
        print(f"run {number} of {len(runs)}  {title}", flush=True)
        _train(args, folder, weighting, weight)
    set_threads(args)
    state = PartialState(cpu=cpu_is_wanted())
    names = {title: str(output / "runs" / _name(title)) for title, *_ in runs}
    models = load_models(list(names.values()), state.device, list(names), mixed_precision=args.mixed_precision)
    args.data = training.dataset_name or training.train_data_dir
    for name in DATA_FLAGS:
        setattr(args, name, getattr(training, name))
    bench = open_bench(args, models)
    check_regularizers(regularizers, bench, models, state.device)
    samplers = samplers_of(args, models, names, bench, output / "samples")
    features, why = choose_features(args, bench, state.device)
    if why:
        print(f"features    {why}", flush=True)
    try:
        draw_samples_of(args, samplers, state)
        samples = read_samples(bench, samplers)
        judged = judge_models(
            args, models, samples, bench, features, regularizers, state.device, with_denoising_loss=True
        )
        _write(output, judged.rows, runs, {**settings, "features": features.description, "num_images": bench.number})
    except KeyboardInterrupt:
        _stop(output)


def _weight(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return value


def _check(args: argparse.Namespace) -> None:
    from ..specs import load_weighting
    from ..training.errors import UsageError

    for word in args.training:
        name = word.partition("=")[0].removeprefix("--")
        if word.startswith("--") and name in _OWN_FLAGS:
            raise UsageError(f"--{name} {_DECIDED}")
    if not Path(args.script).is_file():
        raise UsageError(f"--script {args.script}: no such file; name the path of train_reg.py")
    try:
        for name in args.reg_weightings:
            load_weighting(name)
    except ValueError as error:
        raise UsageError(f"--reg_weightings: {error}") from error


def _check_training(training: argparse.Namespace) -> None:
    """About the settings as a training will have them, those of a YAML file among them."""
    from ..training.errors import UsageError

    for name in _NOT_OVERRIDDEN:
        if getattr(training, name):
            raise UsageError(f"--{name} {_DECIDED}; take it out of the YAML file")
    if not training.regularizer:
        raise UsageError("--regularizer none leaves nothing to weight: name the loss after --")


def _runs(args: argparse.Namespace) -> list[tuple[str, str, float]]:
    """(title, weighting, weight) of each training; without weight the weighting says nothing."""
    weightings, weights = list(dict.fromkeys(args.reg_weightings)), list(dict.fromkeys(args.reg_weights))
    plain = [("weight 0", weightings[0], 0.0)] if 0 in weights else []
    return plain + [(f"{name} {weight:g}", name, weight) for name in weightings for weight in weights if weight]


def _name(title: str) -> str:
    return title.replace(" ", "-").replace(":", ".")


def _settings(args: argparse.Namespace) -> dict:
    return {
        "training": args.training,
        "num_inference_steps": args.num_inference_steps,
        "scheduler": args.scheduler,
        "seed": args.seed,
        "mixed_precision": args.mixed_precision,
    }


def _keep_settings(output: Path, settings: dict) -> None:
    """Refuses a folder of another sweep; weights may be added."""
    from ..training.errors import UsageError

    check_folder(output)
    if (before := read_settings(output, _SETTINGS_FILE)) is not None:
        if before != settings:
            raise UsageError(f"--output {output} holds a sweep of other trainings or samples: name another folder")
    elif output.is_dir() and any(output.iterdir()):
        raise UsageError(f"--output {output} is there and holds no sweep: name another")
    write_settings(output, _SETTINGS_FILE, settings)


def _is_finished(folder: Path) -> bool:
    """The card is the last thing that a training writes."""
    from ..card import CARD_FILE

    return (folder / CARD_FILE).is_file() and (folder / "model_index.json").is_file()


def _train(args: argparse.Namespace, folder: Path, weighting: str, weight: float) -> None:
    from ..training.errors import UsageError

    command = [sys.executable, args.script, *args.training, "--reg_weight", str(weight), "--reg_weighting", weighting]
    command += ["--no-compare", "--output_dir", str(folder), "--resume", "auto"]
    process = subprocess.Popen(command)
    try:
        status = process.wait()
    except KeyboardInterrupt:
        process.wait()  # it got the signal too, and saves a checkpoint
        _stop(Path(args.output))
    if status:
        raise UsageError(f"the training in {folder} failed with status {status}, as is said above")
    if not _is_finished(folder):
        _stop(Path(args.output))


def _stop(output: Path) -> None:
    print(f"\ninterrupted: the same command goes on with what is in {output}")
    sys.exit(130)


def _write(output: Path, rows: dict, runs: list, settings: dict) -> None:
    from ..evaluation.judgement import tell_not_finite, write_rows
    from ..evaluation.pareto import draw_pareto, pareto_front
    from ..evaluation.trade_off import Point
    from ..files import write_whole

    some = rows["data"]
    distance = some.distance[0]
    panels, fronts, titles_on_front = {}, {}, {}
    labels = {"data": "data", **{title: f"{weight:g}" for title, _, weight in runs}}
    for name in some.terms:
        panels[name] = [
            Point(
                labels[title],
                row.distances[distance].value,
                row.terms[name].value,
                row.distances[distance].half_width,
                row.terms[name].half_width,
            )
            for title, row in rows.items()
        ]
        front = pareto_front([(point.x, point.y) for point in panels[name][1:]])
        fronts[name] = [panels[name][1 + index] for index in front]
        titles_on_front[name] = [runs[index][0] for index in front]
    groups = ["", *(weighting if weight else "" for _, weighting, weight in runs)]
    axes = f"{distance} to the data (left is closer)", f"loss: mean over {some.images} samples"
    for suffix in ("png", "svg"):
        write_whole(output / f"sweep.{suffix}", lambda path: draw_pareto([path], panels, fronts, groups, *axes))
    write_whole(output / "sweep.json", lambda path: write_rows(path, rows, pareto=titles_on_front, settings=settings))
    text = _table(rows, titles_on_front)
    write_whole(output / "sweep.txt", lambda path: path.write_text(f"{text}\n", encoding="utf-8"))
    print("", text, "", *tell_not_finite(rows), sep="\n")
    print("* no other run is better in both, loss and distance; ± is half of a 95 % confidence interval")
    print(f"written     {output / 'sweep.png'}, .svg, .json, .txt", flush=True)


def _table(rows: dict, fronts: dict[str, list[str]]) -> str:
    """A line for each run: L', distances that matter, denoising loss; marked where it is on the front of a loss."""
    from ..evaluation.judgement import SLICED, table_cells

    some = rows["data"]
    shown = [*some.terms, some.distance[0], "recall", SLICED, "denoising loss"]
    columns = {line[0]: line[1:] for line in table_cells(rows)}
    on_front = {title for front in fronts.values() for title in front}
    cells = [["", "", *(name for name in dict.fromkeys(shown) if name in columns)]]
    for place, title in enumerate(rows):
        mark = "*" if title in on_front else ""
        cells.append([mark, title, *(columns[name][place] for name in cells[0][2:])])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), line[1].ljust(widths[1]), *map(str.rjust, line[2:], widths[2:])]).rstrip()
        for line in cells
    )
