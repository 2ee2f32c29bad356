"""Writes the results of `reg-diffusers evaluate`: a figure, JSON, a text and a page."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from .explanations import explanations
from .judging import axis_of

__all__ = ["write_evaluation"]

_IMAGES_SHOWN = 25
_PAIRS_SHOWN = 6


def write_evaluation(args: argparse.Namespace, output: Path, judged, samples: dict, bench, settings: dict) -> None:
    """Writes and prints the results of an evaluation.

    Args:
        args: the flags.
        output: the folder.
        judged: the results, see `judge_models`.
        samples: the samples of each model, by title.
        bench: the data.
        settings: the settings that determine the results.
    """
    from ..evaluation.html_report import page
    from ..evaluation.judgement import compare_rows, describe_rows, table_cells, write_rows
    from ..evaluation.trade_off import draw_trade_off
    from ..runtime.files import write_whole

    rows = judged.rows
    sentences = compare_rows(rows)
    for suffix in ("png", "svg"):
        write_whole(
            output / f"evaluation.{suffix}",
            lambda path: draw_trade_off([path], *_figure(rows)),
        )
    command = _command(args)
    kept = {"verdict": sentences, "settings": settings, "compared_in_pairs": judged.compared, "command": command}
    write_whole(output / "evaluation.json", lambda path: write_rows(path, rows, **kept))
    text = describe_rows(rows)
    write_whole(output / "evaluation.txt", lambda path: path.write_text(f"{text}\n", encoding="utf-8"))
    html = page(
        "Did the loss help?",
        sentences,
        table_cells(rows),
        explanations(rows, bench),
        _parts(judged, samples, bench),
        _settings_shown(settings, judged.note, command),
        output / "evaluation.png",
    )
    write_whole(output / "index.html", lambda path: path.write_text(html, encoding="utf-8"))
    print("", text, "", *sentences, "", sep="\n")
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
        axis_of(some),
    )


def _parts(judged, samples: dict, bench) -> list:
    from ..evaluation.html_report import Part
    from ..training.preview import grid

    parts = [Part(f"the data, {len(bench.order):,} images", grid(bench.other[:_IMAGES_SHOWN]))]
    for title, drawn in samples.items():
        copies = judged.copies[title]
        share, expected = copies.share, judged.rows["data"].near_copies
        compared = len(copies.distances)
        first = f" first {compared:,}" if compared < len(drawn) else ""
        text = (
            f"{100 * share.value:.1f} ± {100 * share.half_width:.1f} % of the{first} samples are within"
            f" {copies.limit:.3g} of an image of the data. For the data this share is 5 %, or more if they have"
            f" duplicates; for the half of the data that is compared it is {100 * expected.value:.1f} %. Distances are"
            f" in {_short(judged.features.description)}."
        )
        nearest = copies.distances.argsort()[:_PAIRS_SHOWN].tolist()
        parts.append(
            Part(
                title,
                grid(drawn[:_IMAGES_SHOWN]),
                text,
                [_pair(copies, drawn, bench, index) for index in nearest],
                [_pair(copies, drawn, bench, index) for index in range(min(_PAIRS_SHOWN, compared))],
            )
        )
    return parts


def _short(description: str) -> str:
    name = description.partition(",")[0]
    return name if name == "pixels" else f"the features of {name}"


def _pair(copies, drawn, bench, index: int):
    from ..evaluation.html_report import Pair
    from ..training.preview import grid

    place = int(copies.indices[index])
    return Pair(
        grid(drawn[index : index + 1]),
        grid(bench.images(range(place, place + 1))),
        float(copies.distances[index]),
        bool(copies.near[index]),
    )


def _settings_shown(settings: dict, note: str, command: str) -> list[tuple[str, str]]:
    from .. import __version__

    models = "; ".join(
        f"{title} ({model['scheduler']}, {model['num_inference_steps']} steps{_scaled(model)})"
        for title, model in settings["models"].items()
    )
    return [
        ("models", models),
        ("data", settings["data"]),
        ("images in each column", f"{settings['num_images']:,}"),
        ("features", settings["features"]),
        *([("pairs", note)] if note else []),
        *([("units of fields in L'", settings["reg_units"])] if "reg_units" in settings else []),
        ("seed", str(settings["seed"])),
        ("command", command),
        ("reg_diffusers", __version__),
    ]


def _scaled(model: dict) -> str:
    return f", guidance scale {model['guidance_scale']:g}" if "guidance_scale" in model else ""


def _command(args: argparse.Namespace) -> str:
    """Returns the command line that reproduces the results."""
    words = ["reg-diffusers", "evaluate"]
    names = ("model", "regularizer", "data", "dataset_config_name", "image_column", "label_column")
    names += ("conditioning_image_column", "caption_column", "prompt", "reg_columns", "num_images", "features")
    names += ("num_inference_steps", "guidance_scale", "scheduler", "seed", "mixed_precision", "reg_units")
    for name in names:
        value = getattr(args, name)
        if value not in (None, []):
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join([*words, *(["--fid"] if args.fid else []), "--output", args.output])
