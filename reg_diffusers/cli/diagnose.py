"""The subcommand `diagnose`: tells whether a loss on the image makes sense, before any training."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from ..runtime.files import write_whole
from ..runtime.messages import bars_are_hidden, say
from ..settings.arguments import add_objective_flags, complete
from ..settings.data import DataSettings
from ..settings.flag_values import natural, positive_int
from .bench import data_flag
from .output import check_folder
from .recorded_data import recorded_data

__all__ = ["add_parser", "run"]

_IMAGES = 10_000


def add_parser(subparsers) -> argparse.ArgumentParser:
    """Adds the subcommand to those of `reg-diffusers`."""
    parser = subparsers.add_parser(
        "diagnose",
        help="does this loss make sense on these data? At which noise levels, with which weight, at what cost?",
        description="Measures what a loss on the image would do to the best possible model of the data, without"
        " training: whether lowering the loss leads towards real images, at which noise levels, at what cost, and"
        " which weight is affordable. Takes the data, model and regularization flags of reg-diffusers train. Prints a"
        " verdict and the recommended weights, and writes a figure (PNG, SVG) and a JSON file for each --regularizer.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--model",
        metavar="FOLDER_OR_ID",
        help="a trained pipeline; measures its own guesses, too, next to the best possible ones",
    )
    add(
        "--num_images",
        type=positive_int,
        default=_IMAGES,
        metavar="N",
        help="number of images to use from a larger data set (default: %(default)s)",
    )
    add(
        "--num_levels",
        type=positive_int,
        default=20,
        metavar="N",
        help="number of timesteps, evenly spaced in log SNR (default: %(default)s)",
    )
    add(
        "--seed",
        type=natural,
        default=0,
        metavar="N",
        help="seed of the choice of images and of the noise (default: %(default)s)",
    )
    add("--output", default="diagnosis", metavar="FOLDER", help="folder for figures and JSON (default: %(default)s)")
    add(
        "--overwrite",
        action="store_true",
        help="replace the files of a diagnosis by another command; those of the same command are replaced anyway",
    )
    add("--verbose", action="store_true", help="also print the table by timestep and the effect of each weighting")
    add_objective_flags(parser)
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> None:
    """Diagnoses each regularizer in turn; the verdict on a loss that raises is "cannot work".

    Raises:
        UsageError: if data, model or settings cannot be used, or if files would be overwritten.
    """
    from ..networks.build import load_given_model
    from ..networks.noise_schedule import build_noise_scheduler
    from ..runtime.errors import UsageError
    from ..term import TermError
    from ..training.terms import build_terms, in_units, wanted_columns
    from ..trial.checks import check_terms

    reason = _find_data(args)
    settings = complete(args)
    loss = settings.loss
    if not loss.regularizer:
        raise UsageError("--regularizer none leaves nothing to diagnose")
    if loss.reg_target:
        raise UsageError("--reg_target: only a training finds its weight; drop the flag to see the effect of weights")
    if settings.data.streaming:
        raise UsageError("--streaming: a diagnosis reads --num_images images only; drop the flag")
    if (loss.loss_weighting, loss.timestep_sampling) != ("none", "uniform"):
        raise UsageError("--loss_weighting, --timestep_sampling: a diagnosis supports --snr_gamma only; drop the flag")
    if args.num_levels < 2:
        raise UsageError("--num_levels must be at least 2")
    terms = build_terms(loss, settings.data)
    output = Path(args.output)
    _check_output(output, [term.name for term in terms], args)
    pipeline = _pipeline(args)
    _check_not_latent(settings)
    given = load_given_model(settings.model, settings.data.cache_dir)
    pictures = _load_data(settings.data, args.model, given, pipeline, wanted_columns(terms, settings.data))
    data, decoder = _in_latents(pictures, pipeline, settings.data.cache_dir)
    terms = in_units(terms, data, loss.reg_units, decoder)
    scheduler = pipeline.scheduler if pipeline else build_noise_scheduler(settings.model, given.scheduler)
    rows, images, context = _images(args.num_images, data)
    guessing = {} if pipeline is None else _guessing(pipeline, settings.data, pictures, rows, context)
    source = settings.data.source or "embedded Fashion-MNIST"
    say(
        f"data: {len(images):,} of {data.number:,} {'images' if data.is_picture else 'fields'} from {source}{reason}\n"
    )
    for term, weight in zip(terms, loss.reg_weight, strict=True):
        try:
            check_terms((term,), scheduler, data)
        except UsageError as error:
            if error.show_cause:  # the user's own code raised, and its traceback helps
                raise
            _report_unusable(args, term.name, str(error), output)
            continue
        try:
            _diagnose(args, loss.snr_gamma, term, weight, scheduler, images, context, guessing, output)
        except TermError as error:
            _report_unusable(args, term.name, str(error), output)


def _check_not_latent(settings) -> None:
    from ..hub.lookup import pipeline_index
    from ..networks.autoencoders import autoencoder_of
    from ..runtime.errors import UsageError

    base = settings.model.pretrained_model_name_or_path
    if settings.model.vae:
        raise UsageError("--vae: a diagnosis in latents is not supported: drop the flag")
    if base is None:
        return
    named = f"--pretrained_model_name_or_path {base}"
    if autoencoder_of(pipeline_index(base, named, settings.data.cache_dir)):
        raise UsageError(
            f"{named} works in latents, which a diagnosis does not support: drop the flag to diagnose the loss on the"
            " images themselves"
        )


def _find_data(args) -> str:
    """Falls back to the training data of --model if no data are named; returns a note about it."""
    if args.model is None or args.dataset_name or args.train_data_dir:
        return ""
    name, recorded = recorded_data([args.model], "--train_data_dir")
    setattr(args, data_flag(name).removeprefix("--"), name)
    for flag, value in vars(recorded).items():
        setattr(args, flag, getattr(args, flag) or value)
    return f", the training data of {args.model}"


def _diagnose(args, snr_gamma, term, weight, scheduler, images, context: dict, guessing: dict, output: Path) -> None:
    from tqdm.auto import tqdm

    from ..diagnosis import diagnose, judge
    from ..diagnosis.figure import draw_diagnosis
    from ..diagnosis.text import describe, write_json
    from ..runtime.errors import UsageError
    from ..term import TermError
    from ..weight_rules import rule_of

    settings = {
        **guessing,
        "snr_gamma": snr_gamma,
        "num_levels": args.num_levels,
        "seed": args.seed,
        "progress": lambda levels: tqdm(
            levels, desc=term.name, unit="timestep", dynamic_ncols=True, leave=False, disable=bars_are_hidden()
        ),
    }
    try:
        rule = rule_of(weight)
        if rule.is_measured:
            share = diagnose(scheduler, replace(term, weight=1.0), images, **settings, **context).gradient_share()
            term = replace(term, weight=rule.share / share if share else 0.0)
            say(f"--reg_weight {weight} is about {term.weight:.3g} for {term.name}")
        diagnosis = diagnose(scheduler, term, images, **settings, **context)
    except TermError:
        raise
    except ValueError as error:
        raise UsageError(str(error)) from error
    verdict = judge(diagnosis)
    print(describe(diagnosis, verdict, verbose=args.verbose))
    for suffix in ("png", "svg"):
        write_whole(output / f"{term.name}.{suffix}", lambda path: draw_diagnosis(path, diagnosis, verdict))
    write_whole(output / f"{term.name}.json", lambda path: write_json(path, diagnosis, verdict, **_settings(args)))
    print(f"written: {output / term.name}.png, .svg, .json\n", flush=True)


def _report_unusable(args, name: str, reason: str, output: Path) -> None:
    from ..diagnosis import Verdict
    from ..diagnosis.text import describe_verdict, write_json

    verdict = Verdict("cannot work", (reason,))
    print(describe_verdict(name, verdict))
    for suffix in ("png", "svg"):  # figures of an earlier diagnosis would contradict this one
        (output / f"{name}.{suffix}").unlink(missing_ok=True)
    path = output / f"{name}.json"
    write_whole(path, lambda path: write_json(path, None, verdict, **_settings(args)))
    print(f"written: {path}\n", flush=True)


def _settings(args) -> dict:
    return {"command": args.argv, "seed": args.seed, "model": args.model}


def _check_output(output: Path, names: list[str], args) -> None:
    """Raises `UsageError` for files that are not those of a diagnosis, or of one by another command."""
    from ..runtime.errors import UsageError

    check_folder(output)
    for flag in ("train_data_dir", "dataset_name"):
        folder = getattr(args, flag)
        if folder and Path(folder).is_dir() and output.resolve().is_relative_to(Path(folder).resolve()):
            raise UsageError(
                f"--output {output} lies in --{flag} {folder}, where a training would read the figures as images: name"
                " a folder outside"
            )
    for name in names:
        there = [file for suffix in ("json", "png", "svg") if (file := output / f"{name}.{suffix}").exists()]
        if not there:
            continue
        command = _command_of(output / f"{name}.json")
        if command is None:
            raise UsageError(f"--output {output} holds {there[0].name}, which no diagnosis wrote: name another folder")
        if command != _without_switches(args.argv) and not args.overwrite:
            raise UsageError(
                f"--output {output} already holds the diagnosis of {name} by another command: name another folder, or"
                " add --overwrite"
            )


def _command_of(file: Path) -> list[str] | None:
    """Returns the command that a diagnosis recorded; None if the file is not that of a diagnosis."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return _without_switches(found["settings"]["command"]) if "verdict" in found else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _without_switches(command: list[str]) -> list[str]:
    return [word for word in command if word not in ("--overwrite", "--quiet", "--verbose")]


def _pipeline(args):
    if args.model is None:
        return None
    from .model import load_pipeline

    return load_pipeline(args.model, device="cpu")


def _load_data(settings: DataSettings, model: str | None, given, pipeline, wanted: list):
    """Loads the data at the size and with the channels of the model."""
    from ..data.training_data import Normalization, load_training_data
    from ..runtime.errors import UsageError
    from ..settings.size import shown, sides

    channels, size, normalization = given.channels, given.size, given.normalization
    if pipeline is not None:
        channels, *size = pipeline.image_shape
        if pipeline.condition_channels:
            raise UsageError(
                f"--model {model} is conditioned on images, which a diagnosis does not support: drop the flag"
            )
        if pipeline.num_classes and not settings.class_conditional:
            raise UsageError(f"--model {model} is class-conditional: add --class_conditional")
        if settings.resolution is not None and sides(settings.resolution) != tuple(size):
            raise UsageError(f"--resolution {settings.resolution}: --model {model} draws images {shown(size)}")
        if pipeline.config.normalization:
            offset, scale = (tuple(pipeline.config.normalization[name]) for name in ("offset", "scale"))
            normalization = Normalization(offset, scale)
    white = given.white if pipeline is None else pipeline.config.white
    of_model = channels, size, normalization, given.condition_channels
    return load_training_data(settings, *of_model, wanted=wanted, white=white)


def _in_latents(pictures, pipeline, cache_dir: str | None):
    """Returns the data as the model sees them, and the view that decodes them; the same data for a model of images."""
    from functools import partial

    from ..autoencoder import encoded
    from ..data.latents import latents_of
    from ..data.training_data import cache_folder
    from ..networks.autoencoders import autoencoder_sha256, decoded_view

    vae = None if pipeline is None else pipeline.vqvae
    if vae is None:
        return pictures, None
    key, folder = autoencoder_sha256(vae), cache_folder(cache_dir)
    latents = latents_of(pictures, partial(encoded, vae), key, folder, vae.device, mirrored=False)
    return latents, decoded_view(vae, "no")


def _guessing(pipeline, settings: DataSettings, pictures, rows: list[int], context) -> dict:
    """Returns the network whose guesses are measured, and its arguments for each image, as arguments of `diagnose`.

    Raises:
        UsageError: the model needs texts, or has other classes than the data.
    """
    import torch

    from ..runtime.errors import UsageError

    network = pipeline.as_in_loss()
    if pipeline.num_classes:
        if len(pictures.classes) != pipeline.num_classes:
            raise UsageError(
                f"the model has {pipeline.num_classes} classes, but the data have {len(pictures.classes)}"
            )
        return {"model": network, "model_kwargs": {"class_labels": context["class_labels"]}}
    if not pipeline.takes_prompts:
        return {"model": network}
    if settings.prompt is None and settings.caption_column is None:
        raise UsageError("--model is conditioned on texts: name their column by --caption_column, or give --prompt")
    texts = [settings.prompt] * len(pictures) if settings.caption_column is None else pictures.captions

    def with_texts(samples, timesteps, *, rows):
        return network(samples, timesteps, **pipeline.embeddings([texts[row] or "" for row in rows.tolist()]))

    return {"model": with_texts, "model_kwargs": {"rows": torch.tensor(rows)}}


def _images(wanted: int, data):
    """Returns the rows of evenly spaced images, these (M, C, H, W) in [-1, 1], and what losses may need of them."""
    import numpy as np

    from ..networks.conditions import Conditions

    number = min(wanted, len(data.examples))
    rows = np.linspace(0, len(data.examples) - 1, number).astype(int).tolist()
    batch = data.examples.__getitems__(rows)
    context = {**Conditions.of_batch(data, batch), **batch.get("columns", {})}
    return rows, data.normalization.normalize(batch["values"]), context
