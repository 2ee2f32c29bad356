"""The subcommand `sweep`: finds a weight by one short training per weight, measured by loss and distance."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from ..runtime.files import file_name
from ..runtime.messages import say
from ..settings import Settings
from .bench import check_num_images, load_models, open_bench
from .judged import judge_models
from .judging import axis_of, check_regularizers, choose_features, columns_of, describe_predicted, regularizers_of
from .judging_flags import DATA_FLAGS, add_measuring_flags
from .model_samples import draw_samples_of, read_samples, samplers_of
from .output import check_folder, read_settings, write_settings

__all__ = ["add_parser", "run"]

_SETTINGS_FILE = "sweep_settings.json"
_OWN_FLAGS = ("output_dir", "reg_weight", "reg_weighting", "compare", "no-compare", "resume", "overwrite_output_dir")
_OWN_FLAGS += ("resume_from_checkpoint", "push_to_hub", "reg_target")
_DECIDED = "after --: the sweep decides it (--reg_weights, --reg_weightings, --output)"
_NOT_OVERRIDDEN = ("reg_target", "push_to_hub", "overwrite_output_dir")  # by the flags of a run


def add_parser(subparsers) -> argparse.ArgumentParser:
    """Adds the subcommand to those of `reg-diffusers`."""
    parser = subparsers.add_parser(
        "sweep",
        help="which weight? Runs the same short training for several weights and weightings, draws the Pareto front",
        description="Trains once per weight and weighting (weight 0 once), measures the loss L' and the"
        " distance to the data of each run, and draws the runs that no other run beats in both. Run the same command"
        " again to continue after an interruption, or with more weights to add them.",
        usage="reg-diffusers sweep [flags] -- [flags of reg-diffusers train]",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--reg_weights",
        nargs="+",
        type=_weight,
        default=[0.0, 0.1, 1.0],
        metavar="W",
        help="weights to try (default: 0 0.1 1)",
    )
    add(
        "--reg_weightings",
        nargs="+",
        default=["matched", "constant"],
        metavar="NAME",
        help="weightings to try: built-in names or my_module:my_weighting (default: matched constant)",
    )
    add("--output", default="sweep", metavar="FOLDER", help="folder for runs and results (default: %(default)s)")
    add("--script", metavar="FILE", help="a training script of your own (default: the installed train_reg.py)")
    add_measuring_flags(parser)
    add("training", nargs="*", metavar="-- FLAG", help="flags of reg-diffusers train, equal for all runs")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> None:
    """Trains the missing runs, then measures all.

    Raises:
        UsageError: if settings cannot work, a training fails, or the folder holds another sweep.
        SystemExit: with status 130 on Ctrl-C.
    """
    from accelerate import PartialState

    from ..runtime.hardware import cpu_is_wanted, set_threads
    from ..settings.arguments import parse_args

    output = Path(args.output)
    _check(args)
    training = parse_args(args.training)
    _check_training(training)
    regularizers = regularizers_of(list(training.loss.regularizer))
    runs = _runs(args)
    settings = _settings(args) | _units(training)
    _keep_settings(output, settings)
    for number, (title, weighting, weight) in enumerate(runs, 1):
        folder = output / "runs" / _name(title)
        if _is_finished(folder):
            say(f"run {number} of {len(runs)}  {title}: complete already")
            continue
        say(f"run {number} of {len(runs)}  {title}")
        _train(args, folder, weighting, weight)
    set_threads(args.num_threads)
    state = PartialState(cpu=cpu_is_wanted())
    names = {title: str(output / "runs" / _name(title)) for title, *_ in runs}
    models = load_models(list(names.values()), state.device, list(names), mixed_precision=args.mixed_precision)
    args.data = training.data.source
    for name in (*DATA_FLAGS, "snr_gamma", "loss_weighting", "timestep_sampling"):
        setattr(args, name, training.values()[name])
    bench = open_bench(args, models, columns_of(regularizers, args))
    terms = check_regularizers(regularizers, bench, models, state.device, training.loss.reg_units)
    for line in describe_predicted(terms, bench):
        say(line)
    samplers = samplers_of(args, models, names, bench, output / "samples")
    features, why = choose_features(args, bench, state.device)
    if why:
        say(f"features    {why}")
    try:
        draw_samples_of(args, samplers, state)
        samples = read_samples(bench, samplers)
        judged = judge_models(args, models, samples, bench, features, terms, state.device, with_denoising_loss=True)
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
    from ..runtime.errors import UsageError
    from ..specs import load_weighting

    check_num_images(args.num_images)
    for word in args.training:
        name = word.partition("=")[0].removeprefix("--")
        if word.startswith("--") and name in _OWN_FLAGS:
            raise UsageError(f"--{name} {_DECIDED}")
    if args.script is not None and not Path(args.script).is_file():
        raise UsageError(f"--script {args.script}: no such file; drop the flag to use the installed train_reg.py")
    try:
        for name in args.reg_weightings:
            load_weighting(name)
    except ValueError as error:
        raise UsageError(f"--reg_weightings: {error}") from error


def _check_training(training: Settings) -> None:
    """Checks the settings of the training, including those of a YAML file."""
    from ..runtime.errors import UsageError

    for name in _NOT_OVERRIDDEN:
        if training.values()[name]:
            raise UsageError(f"--{name} {_DECIDED}; remove it from the YAML file")
    if not training.loss.regularizer:
        raise UsageError("--regularizer none leaves nothing to weight: name a loss after --")


def _runs(args: argparse.Namespace) -> list[tuple[str, str, float]]:
    """Returns (title, weighting, weight) of each run; weight 0 runs once, because its weighting has no effect."""
    weightings, weights = list(dict.fromkeys(args.reg_weightings)), list(dict.fromkeys(args.reg_weights))
    plain = [("weight 0", weightings[0], 0.0)] if 0 in weights else []
    return plain + [(f"{name} {weight:g}", name, weight) for name in weightings for weight in weights if weight]


def _name(title: str) -> str:
    return file_name(title.replace(" ", "-").replace(":", "."))


def _settings(args: argparse.Namespace) -> dict:
    return {
        "training": args.training,
        "num_inference_steps": args.num_inference_steps,
        "scheduler": args.scheduler,
        **({} if args.guidance_scale is None else {"guidance_scale": args.guidance_scale}),
        "seed": args.seed,
        "mixed_precision": args.mixed_precision,
    }


def _units(training: Settings) -> dict:
    """Returns the units of fields in L'; empty for images."""
    from ..data.fields import field_file

    return {"reg_units": training.loss.reg_units} if field_file(training.data.source) else {}


def _keep_settings(output: Path, settings: dict) -> None:
    """Raises if the folder holds another sweep, where added weights do not count; else writes the settings."""
    from ..runtime.errors import UsageError

    check_folder(output)
    if (before := read_settings(output, _SETTINGS_FILE)) is not None:
        if before != settings:
            raise UsageError(f"--output {output} holds a sweep with other settings: name another folder")
    elif output.is_dir() and any(output.iterdir()):
        raise UsageError(f"--output {output} exists and holds no sweep: name another folder")
    write_settings(output, _SETTINGS_FILE, settings)


def _is_finished(folder: Path) -> bool:
    """Whether the training finished: the card is the last file that it writes."""
    from ..runs.run_folder import CARD_FILE, LORA_FILE

    return (folder / CARD_FILE).is_file() and any(
        (folder / name).is_file() for name in ("model_index.json", LORA_FILE)
    )


def _train(args: argparse.Namespace, folder: Path, weighting: str, weight: float) -> None:
    from ..runtime.child import run_to_its_end
    from ..runtime.errors import UsageError
    from ..runtime.interruption import SIGNALS

    script = ["-m", "train_reg"] if args.script is None else [args.script]
    command = [sys.executable, *script, *args.training, "--reg_weight", str(weight), "--reg_weighting", weighting]
    command += ["--no-compare", "--output_dir", str(folder), "--resume", "auto"]
    command += ["--quiet"] if args.quiet else []
    status = run_to_its_end(command)
    if status - 128 in SIGNALS:  # before the training could save
        _stop(Path(args.output))
    if status:
        raise UsageError(f"the training in {folder} failed with exit status {status}; see its message above")
    if not _is_finished(folder):
        _stop(Path(args.output))


def _stop(output: Path) -> None:
    print(f"\ninterrupted: run the same command again to continue in {output}")
    sys.exit(130)


def _write(output: Path, rows: dict, runs: list, settings: dict) -> None:
    from ..evaluation.judgement import describe_nonfinite, write_rows
    from ..evaluation.pareto import draw_pareto, pareto_front
    from ..evaluation.trade_off import Point
    from ..runtime.files import write_whole

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
    axes = f"{distance} to the data (left is closer)", axis_of(some)
    for suffix in ("png", "svg"):
        write_whole(output / f"sweep.{suffix}", lambda path: draw_pareto([path], panels, fronts, groups, *axes))
    write_whole(output / "sweep.json", lambda path: write_rows(path, rows, pareto=titles_on_front, settings=settings))
    text = _table(rows, titles_on_front)
    write_whole(output / "sweep.txt", lambda path: path.write_text(f"{text}\n", encoding="utf-8"))
    print("", text, "", *describe_nonfinite(rows), sep="\n")
    print("* no other run is better in both loss and distance; ± is half of a 95 % confidence interval")
    print(f"written     {output / 'sweep.png'}, .svg, .json, .txt", flush=True)


def _table(rows: dict, fronts: dict[str, list[str]]) -> str:
    """Formats one line per run: L', the main distances, the denoising loss, and a * on the front of a loss."""
    from ..evaluation.judgement import table_cells
    from ..evaluation.measuring import SLICED

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
