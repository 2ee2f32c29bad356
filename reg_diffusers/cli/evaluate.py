"""The subcommand `evaluate`: what a loss did to trained models, against what it cost, in numbers and pictures."""

from __future__ import annotations

import argparse
import shlex
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
    recorded_regularizers,
    regularizers_of,
    samplers_of,
    write_settings,
)
from .judging_flags import add_judging_flags
from .output import check_folder

__all__ = ["add_parser", "run"]

_SETTINGS_FILE = "evaluation_settings.json"
_IMAGES_SHOWN = 25
_PAIRS_SHOWN = 6


def add_parser(subparsers) -> argparse.ArgumentParser:
    """Adds the subcommand to those of `reg-diffusers`."""
    parser = subparsers.add_parser(
        "evaluate",
        help="did the loss help, and what did it cost? Samples of trained models against the data",
        description="Draws samples of each model and measures them in pairs: the loss L', and the distance to the"
        " data, each with a 95 % confidence interval and beside the data themselves. Writes a table, a figure, JSON"
        " and a page that opens without a server. The same command again goes on where it was interrupted. On several"
        " processes: accelerate launch -m reg_diffusers evaluate ...",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--model",
        action="extend",
        nargs="+",
        required=True,
        metavar="FOLDER_OR_ID",
        help="a saved pipeline; several are compared with the first",
    )
    add(
        "--regularizer",
        nargs="+",
        metavar="NAME",
        help="losses to measure: built-in names or my_module:MyReg (default: the built-in ones that the models were"
        " trained with)",
    )
    add("--output", default="evaluation", metavar="FOLDER", help="for all results (default: %(default)s)")
    add(
        "--reuse",
        action="store_true",
        help="judge anew in the folder of another evaluation, by the samples there, and replace its results",
    )
    add_judging_flags(parser)
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> None:
    """Draws what is missing, in every process of a launch, and judges in the main process.

    Raises:
        UsageError: models, data or settings that cannot work, or a folder that holds something else.
        SystemExit: with status 130, interrupted by Ctrl-C.
    """
    from ..training.hardware import set_threads
    from ..training.processes import in_turn, join_processes, leave_processes, on_main_process, together

    state = join_processes()
    set_threads(args)
    output = Path(args.output)
    on_main_process(state, lambda: _check_output(output))
    models = together(state, lambda: load_models(args.model, state.device, mixed_precision=args.mixed_precision))
    specs = args.regularizer or recorded_regularizers(args.model)
    regularizers = together(state, lambda: regularizers_of(specs))
    bench = in_turn(state, lambda: open_bench(args, models))
    together(state, lambda: check_regularizers(regularizers, bench, models, state.device))
    on_main_process(state, lambda: _check_fid(args, bench))
    names = dict(zip(models, args.model, strict=True))
    samplers = together(state, lambda: samplers_of(args, models, names, bench, output / "samples"))
    features = on_main_process(state, lambda: _features(args, bench, state.device))
    settings = _settings(args, samplers, bench, specs, features)
    on_main_process(state, lambda: _keep_settings(args, output, settings))
    try:
        draw_samples_of(args, samplers, state)
        leave_processes(state)
        if not state.is_main_process:
            return
        samples = read_samples(bench, samplers)
        judged = judge_models(args, models, samples, bench, features, regularizers, state.device)
        _write(args, output, judged, samples, bench, settings)
    except KeyboardInterrupt:
        if state.is_main_process:
            print(f"\ninterrupted: the same command goes on with what is in {output}")
        sys.exit(130)


def _check_output(output: Path) -> None:
    from ..training.errors import UsageError

    check_folder(output)
    if output.is_dir() and any(output.iterdir()) and not (output / _SETTINGS_FILE).is_file():
        raise UsageError(f"--output {output} is there and holds no evaluation: name another")


def _check_fid(args: argparse.Namespace, bench) -> None:
    from ..evaluation.inception import check_inception
    from ..training.errors import UsageError

    if not args.fid:
        return
    if bench.reference.shape[1] not in (1, 3):
        raise UsageError("--fid is for pictures of 1 or 3 channels")
    try:
        check_inception()
    except ImportError as error:
        raise UsageError(f"--fid: {error}") from error


def _features(args: argparse.Namespace, bench, device):
    features, why = choose_features(args, bench, device)
    if why:
        print(f"features    {why}", flush=True)
    return features


def _settings(args: argparse.Namespace, samplers: dict, bench, specs: list[str], features) -> dict:
    """What decides the results, as plain data."""
    return {
        "models": {
            title: {
                "model_sha256": sampler.settings.model_sha256,
                "scheduler": sampler.settings.scheduler,
                "num_inference_steps": sampler.settings.num_inference_steps,
            }
            for title, (sampler, *_) in samplers.items()
        },
        "regularizers": list(specs),
        "data": bench.source,
        "data_sha256": bench.fingerprint,
        "num_images": bench.number,
        "seed": args.seed,
        "mixed_precision": args.mixed_precision,
        "features": features.description if features else "",
        "fid": args.fid,
    }


def _keep_settings(args: argparse.Namespace, output: Path, settings: dict) -> None:
    """Refuses a folder of another evaluation; else keeps the settings there, before the first sample."""
    from ..training.errors import UsageError

    if not args.reuse and (before := read_settings(output, _SETTINGS_FILE)) is not None:
        differing = [name for name in settings if before.get(name) != settings[name] and name != "data"]
        if differing:
            raise UsageError(
                f"--output {output} holds another evaluation (of other {', '.join(differing)}): name another folder,"
                " or --reuse its samples and replace its results"
            )
    write_settings(output, _SETTINGS_FILE, settings)


def _write(args: argparse.Namespace, output: Path, judged, samples: dict, bench, settings: dict) -> None:
    from ..evaluation.judgement import compare_rows, describe_rows, table_cells, write_rows
    from ..evaluation.page import page
    from ..evaluation.trade_off import draw_trade_off
    from ..files import write_whole

    rows = judged.rows
    said = compare_rows(rows)
    for suffix in ("png", "svg"):
        write_whole(
            output / f"evaluation.{suffix}",
            lambda path: draw_trade_off([path], *_figure(rows)),
        )
    command = _command(args)
    kept = {"verdict": said, "settings": settings, "command": command}
    write_whole(output / "evaluation.json", lambda path: write_rows(path, rows, **kept))
    text = describe_rows(rows)
    write_whole(output / "evaluation.txt", lambda path: path.write_text(f"{text}\n", encoding="utf-8"))
    html = page(
        "Did the loss help?",
        said,
        table_cells(rows),
        _explanations(rows, bench),
        _parts(judged, samples, bench),
        _said_settings(settings, command),
        output / "evaluation.png",
    )
    write_whole(output / "index.html", lambda path: path.write_text(html, encoding="utf-8"))
    print("", text, "", *said, "", sep="\n")
    print(f"± is half of a 95 % confidence interval; {bench.number:,} images in each column")
    print(f"written     {output / 'index.html'}, evaluation.png, .svg, .json, .txt", flush=True)


def _figure(rows: dict) -> tuple:
    from ..evaluation.trade_off import Point

    some = next(iter(rows.values()))
    distance = some.distance[0]
    panels = {
        name: [
            Point(
                title,
                row.distances[distance].value,
                row.terms[name].value,
                row.distances[distance].half_width,
                row.terms[name].half_width,
            )
            for title, row in rows.items()
        ]
        for name in some.terms
    }
    return (
        panels,
        f"{distance} to the data (left is closer)",
        f"loss: mean over {some.images} samples",
    )


def _explanations(rows: dict, bench) -> list[tuple[str, str]]:
    """What each number of the table is."""
    from ..evaluation.judgement import SLICED

    some = next(iter(rows.values()))
    named = {
        SLICED: "distance of the pixels' distributions along random directions, in pixel values from -1 to 1; it sees"
        " brightness and contrast before shapes.",
        "precision": "share of samples that lie among the data: low where samples are bad.",
        "recall": "share of the data that lie among the samples: low where variety is missing.",
        "density": "how many images of the data have a sample as a near neighbour, 1 for the data themselves.",
        "coverage": "share of the data that have a sample near them: low where variety is missing.",
        "Inception FID": "the Frechet distance of the literature; compare it only at the same number of images.",
    }
    said = [(name, "the loss L' on finished samples, before they are clipped to a picture.") for name in some.terms]
    for name in some.distances:
        if name in named:
            said.append((name, named[name]))
        elif name.startswith("KD") or name.endswith("KD"):
            said.append((name, "kernel distance of the same features, unbiased: 0 on average for a perfect model."))
        else:
            said.append(
                (
                    name,
                    f"Frechet distance of features. It falls with the number of images, here {bench.number:,} for"
                    " every column: never compare it with a number of another size or other features.",
                )
            )
    said.append(
        (
            "near copies",
            "share of samples that are as near to an image of the data as 5 % of the data are to each other, or"
            " nearer; about 5 % for the data, more if they have duplicates. Looked for among"
            f" {bench.searched:,} of {len(bench.order):,} images.",
        )
    )
    return said


def _parts(judged, samples: dict, bench) -> list:
    from ..evaluation.page import Part
    from ..training.preview import grid

    parts = [Part(f"the data, {len(bench.order):,} images", grid(bench.other[:_IMAGES_SHOWN]))]
    for title, drawn in samples.items():
        copies = judged.copies[title]
        share, expected = copies.share, judged.rows["data"].near_copies
        text = (
            f"{100 * share.value:.1f} ± {100 * share.half_width:.1f} % of the samples are within {copies.limit:.3g} of"
            " an image of the data, as 5 % of the data are, or more if they have duplicates; of the half of the data"
            " that is compared,"
            f" {100 * expected.value:.1f} %. Distances are those of {_short(judged.features.description)}."
        )
        nearest = copies.distances.argsort()[:_PAIRS_SHOWN].tolist()
        parts.append(
            Part(
                title,
                grid(drawn[:_IMAGES_SHOWN]),
                text,
                [_pair(copies, drawn, bench, index) for index in nearest],
                [_pair(copies, drawn, bench, index) for index in range(_PAIRS_SHOWN)],
            )
        )
    return parts


def _short(description: str) -> str:
    name = description.partition(",")[0]
    return name if name == "pixels" else f"the features of {name}"


def _pair(copies, drawn, bench, index: int):
    from ..evaluation.page import Pair
    from ..training.preview import grid

    place = int(copies.indices[index])
    return Pair(
        grid(drawn[index][None]),
        grid(bench.images(range(place, place + 1))),
        float(copies.distances[index]),
        bool(copies.near[index]),
    )


def _said_settings(settings: dict, command: str) -> list[tuple[str, str]]:
    from .. import __version__

    models = "; ".join(
        f"{title} ({model['scheduler']}, {model['num_inference_steps']} steps)"
        for title, model in settings["models"].items()
    )
    return [
        ("models", models),
        ("data", settings["data"]),
        ("images in each column", f"{settings['num_images']:,}"),
        ("features", settings["features"]),
        ("seed", str(settings["seed"])),
        ("command", command),
        ("reg_diffusers", __version__),
    ]


def _command(args: argparse.Namespace) -> str:
    """The command line that gives the same results, in a folder of that name."""
    words = ["reg-diffusers", "evaluate"]
    names = ("model", "regularizer", "data", "dataset_config_name", "image_column", "label_column")
    names += ("conditioning_image_column", "num_images", "features", "num_inference_steps", "scheduler", "seed")
    for name in names:
        value = getattr(args, name)
        if value not in (None, []):
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join([*words, *(["--fid"] if args.fid else []), "--output", args.output])
