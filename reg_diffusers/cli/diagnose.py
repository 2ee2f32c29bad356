"""The subcommand `diagnose`: whether a loss on the image makes sense, before anything is trained."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..files import write_whole
from ..training.arguments import add_objective_flags, complete
from ..training.flag_values import natural, positive_int
from .output import check_folder

__all__ = ["add_parser", "run"]

_IMAGES = 10_000


def add_parser(subparsers) -> argparse.ArgumentParser:
    """Adds the subcommand to those of `reg-diffusers`."""
    parser = subparsers.add_parser(
        "diagnose",
        help="does this loss make sense on these data? At which noise, with which weight, at what price?",
        description="Measures what a loss on the image would do to the best possible model of the data, without"
        " training one: does lowering it lead towards real images, at which noise levels, how much does it cost, which"
        " weight is affordable. Takes the flags of train_reg.py about data, model and regularization; each"
        " --regularizer gets a verdict, a table, a figure (PNG, SVG) and a JSON file.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--model",
        metavar="FOLDER_OR_ID",
        help="a trained pipeline whose own guesses are measured beside the best ones",
    )
    add(
        "--num_images",
        type=positive_int,
        default=_IMAGES,
        metavar="N",
        help="images used of a larger set (default: %(default)s)",
    )
    add(
        "--num_levels",
        type=positive_int,
        default=20,
        metavar="N",
        help="timesteps looked at, evenly in log SNR (default: %(default)s)",
    )
    add(
        "--seed",
        type=natural,
        default=0,
        metavar="N",
        help="of the choice of images and of the noise (default: %(default)s)",
    )
    add("--output", default="diagnosis", metavar="FOLDER", help="for figures and JSON (default: %(default)s)")
    add("--overwrite", action="store_true", help="replace the files of an earlier diagnosis")
    add_objective_flags(parser)
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> None:
    """Diagnoses each regularizer in turn; what cannot work gets that as its verdict.

    Raises:
        UsageError: data, model or settings that cannot be used, files that would be overwritten.
    """
    from ..term import TermError
    from ..training.checks import check_terms
    from ..training.errors import UsageError
    from ..training.model import build_noise_scheduler, load_given_model
    from ..training.terms import build_terms

    args = complete(args)
    if not args.regularizer:
        raise UsageError("--regularizer none leaves nothing to diagnose")
    if args.reg_target:
        raise UsageError("--reg_target: its weight is found in training only; drop the flag to see what weights buy")
    if args.streaming:
        raise UsageError("--streaming: a diagnosis reads --num_images images, and no more; drop the flag")
    if args.num_levels < 2:
        raise UsageError("--num_levels must be at least 2")
    terms = build_terms(args)
    output = Path(args.output)
    _check_output(output, [term.name for term in terms], args.overwrite)
    pipeline = _pipeline(args)
    given = load_given_model(args)
    data = _load_data(args, given, pipeline)
    scheduler = pipeline.scheduler if pipeline else build_noise_scheduler(args, given)
    images, context = _images(args, data)
    for term, weight in zip(terms, args.reg_weight, strict=True):
        try:
            check_terms((term,), scheduler, data)
        except UsageError as error:
            if error.show_cause:  # the user's own code raised, whose traceback helps
                raise
            _say_why_not(args, term.name, str(error), output)
            continue
        try:
            _diagnose(args, term, weight, scheduler, images, context, pipeline, output)
        except TermError as error:
            _say_why_not(args, term.name, str(error), output)


def _diagnose(args, term, weight, scheduler, images, context: dict, pipeline, output: Path) -> None:
    from dataclasses import replace

    from tqdm.auto import tqdm

    from ..evaluation import diagnose, judge
    from ..evaluation.diagnosis_figure import draw_diagnosis
    from ..evaluation.diagnosis_text import describe, write_json
    from ..term import TermError
    from ..training.errors import UsageError
    from ..training.weight_rules import AutoWeight

    settings = {
        "model": pipeline.unet if pipeline else None,
        "snr_gamma": args.snr_gamma,
        "num_levels": args.num_levels,
        "seed": args.seed,
        "progress": lambda levels: tqdm(levels, desc=term.name, unit="timestep", dynamic_ncols=True, leave=False),
    }
    try:
        if isinstance(weight, AutoWeight):
            share = diagnose(scheduler, replace(term, weight=1.0), images, **settings, **context).gradient_share()
            term = replace(term, weight=weight.share / share if share else 0.0)
            print(f"--reg_weight {weight} comes to about {term.weight:.3g} for {term.name}")
        diagnosis = diagnose(scheduler, term, images, **settings, **context)
    except TermError:
        raise
    except ValueError as error:
        raise UsageError(str(error)) from error
    verdict = judge(diagnosis)
    print(describe(diagnosis, verdict))
    for suffix in ("png", "svg"):
        write_whole(output / f"{term.name}.{suffix}", lambda path: draw_diagnosis(path, diagnosis, verdict))
    write_whole(output / f"{term.name}.json", lambda path: write_json(path, diagnosis, verdict, **_settings(args)))
    print(f"written: {output / term.name}.png, .svg, .json\n", flush=True)


def _say_why_not(args, name: str, reason: str, output: Path) -> None:
    from ..evaluation import Verdict
    from ..evaluation.diagnosis_text import describe_verdict, write_json

    verdict = Verdict("cannot work", (reason,))
    print(describe_verdict(name, verdict))
    for suffix in ("png", "svg"):  # those of an earlier diagnosis would contradict this one
        (output / f"{name}.{suffix}").unlink(missing_ok=True)
    path = output / f"{name}.json"
    write_whole(path, lambda path: write_json(path, None, verdict, **_settings(args)))
    print(f"written: {path}\n", flush=True)


def _settings(args) -> dict:
    return {"command": sys.argv[1:], "seed": args.seed, "model": args.model}


def _check_output(output: Path, names: list[str], overwrite: bool) -> None:
    from ..training.errors import UsageError

    check_folder(output)
    files = [output / f"{name}.{suffix}" for name in names for suffix in ("json", "png", "svg")]
    there = [file for file in files if file.exists()]
    if there and not overwrite:
        raise UsageError(f"--output {output} holds {there[0].name} already: name another folder, or --overwrite")


def _pipeline(args):
    if args.model is None:
        return None
    from .model import load_pipeline

    return load_pipeline(args.model, device="cpu")


def _load_data(args, given, pipeline):
    """The data at the size and with the channels of the model."""
    from ..training.data import Normalization, load_training_data
    from ..training.errors import UsageError

    channels, resolution, normalization = given.channels, given.resolution, given.normalization
    if pipeline is not None:
        config = pipeline.unet.config
        if config.num_class_embeds or config.in_channels != config.out_channels:
            raise UsageError(
                f"--model {args.model} is conditional: only unconditional models can be diagnosed, drop the flag"
            )
        side = config.sample_size
        resolution = side if isinstance(side, int) else side[0]
        if args.resolution not in (None, resolution):
            raise UsageError(f"--resolution {args.resolution}: --model {args.model} draws {resolution} x {resolution}")
        args.resolution, channels = resolution, config.out_channels
        if pipeline.config.normalization:
            offset, scale = (tuple(pipeline.config.normalization[name]) for name in ("offset", "scale"))
            normalization = Normalization(offset, scale)
    return load_training_data(args, channels, resolution, normalization, given.condition_channels)


def _images(args, data):
    """Images (M, C, H, W) in [-1, 1], spread over the data, and what regularizers may want beside them."""
    import numpy as np

    from ..training.preview import conditions_of

    number = min(args.num_images, len(data.examples))
    batch = data.examples.__getitems__(np.linspace(0, len(data.examples) - 1, number).astype(int).tolist())
    return data.normalization.normalize(batch["values"]), conditions_of(data, batch)
