"""The subcommand `sample`: draws many images, on any number of processes."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from pathlib import Path

from ..runtime.messages import say
from ..settings.flag_values import positive_int
from ..settings.size import resolution, sides
from .model import add_model_flag, load_pipeline
from .sampling_flags import add_machine_flags, add_sampler_flags, add_units_flag

__all__ = ["add_parser", "run"]

# With the gradient through the network, the same effect needs a larger scale.
_GUIDANCE_SCALES = {"mpgd": 0.05, "dps": 2.0, "lgd": 2.0}
_OF_THE_PICTURES = (
    *("model", "num_images", "num_inference_steps", "scheduler", "seed", "class_labels", "condition_dir", "guidance"),
    *("size", "prompts", "negative_prompt"),
    *("regularizer_scale", "guidance_method", "guidance_scale", "reg_units", "mixed_precision"),
)


def add_parser(subparsers) -> argparse.ArgumentParser:
    """Adds the subcommand to those of `reg-diffusers`."""
    parser = subparsers.add_parser(
        "sample",
        help="draw many images, on all processes, into a folder, an array file or a data set on the Hub",
        description="Draws images 0, 1, ... from a model. Each image has its own seed, so the images depend neither on"
        " --batch_size nor on the number of processes. Run the same command again to continue after an interruption."
        " On several processes: accelerate launch -m reg_diffusers sample ...",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add_model_flag(parser)
    add("--num_images", type=positive_int, default=64, metavar="N", help="number of images (default: %(default)s)")
    add(
        "--batch_size",
        type=positive_int,
        metavar="N",
        help="images per batch in each process (default: 64; 1 for a text-to-image model)",
    )
    add(
        "--output",
        default="samples",
        metavar="PATH",
        help="a folder, for 000000.png and so on, or an .npz file (default: %(default)s)",
    )
    add(
        "--size",
        type=resolution,
        metavar="SIZE",
        help="size of the images, a side or WIDTHxHEIGHT such as 256x192 (default: that of the training)",
    )
    add_sampler_flags(parser)
    add(
        "--class_labels",
        nargs="+",
        metavar="LABEL",
        help="classes to cycle through, by name or number, for a class-conditional model (default: all classes)",
    )
    add("--prompts", nargs="+", metavar="TEXT", help="texts to cycle through, for a text-to-image model")
    add("--negative_prompt", metavar="TEXT", help="what classifier-free guidance leads away from (default: no text)")
    add(
        "--condition_dir",
        metavar="FOLDER",
        help="folder of images to cycle through in the order of their names, for an image-conditioned model",
    )
    add(
        "--guidance",
        nargs="+",
        default=[],
        metavar="NAME",
        help="losses on x0_hat that steer the sampler: built-in names or my_module:MyReg",
    )
    scales = ", ".join(f"{scale:g} for {method}" for method, scale in _GUIDANCE_SCALES.items())
    add("--regularizer_scale", type=float, metavar="SCALE", help=f"strength of the guidance (default: {scales})")
    add(
        "--guidance_method",
        choices=list(_GUIDANCE_SCALES),
        help="gradient of the guidance: not through the network (mpgd), through it (dps), through it and averaged over"
        " noise (lgd) (default: mpgd)",
    )
    add_units_flag(parser)
    add_machine_flags(parser)
    add("--push_to_hub", metavar="DATASET_ID", help="upload the complete folder as a data set")
    add("--hub_private_repo", action="store_true", help="create the data set as private")
    add("--hub_token", metavar="TOKEN", help="token for the upload (default: the token stored by `hf auth login`)")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> None:
    """Draws the missing images; runs in every process of a launch.

    Raises:
        UsageError: if settings do not fit the model, each other or the images already there.
        SystemExit: with status 130 on Ctrl-C.
    """
    from ..runtime.hardware import set_threads
    from ..runtime.processes import join_processes, leave_processes, on_main_process

    _check(args)
    state = join_processes()
    set_threads(args.num_threads)
    repo_id = on_main_process(state, lambda: _open_dataset(args)) if args.push_to_hub else None
    pipeline = load_pipeline(args.model, state.device, mixed_precision=args.mixed_precision)
    sampler = _sampler(args, pipeline)
    store = _store(args, sampler)
    missing = _missing(args, sampler, store)
    if state.is_main_process and 0 < len(missing) < args.num_images:
        say(f"continuing: {args.num_images - len(missing):,} of {args.num_images:,} are in {store.path}")
    try:
        started = time.monotonic()
        if missing:
            _draw(args, sampler, store, missing, state)
        seconds = time.monotonic() - started
        leave_processes(state)
        if not state.is_main_process:
            return
        _finish(args, store)
        pace = f", {seconds / len(missing):.3g} s each" if missing else ", all complete already"
        print(f"samples     {args.num_images:,} in {store.path}{pace}", flush=True)
        if repo_id is not None:
            _upload(args, sampler.settings, store, repo_id)
    except KeyboardInterrupt:
        if state.is_main_process:
            present = len(store.present() & set(range(args.num_images)))
            print(
                f"\ninterrupted: {present:,} of {args.num_images:,} are in {store.path}; run the same command again to"
                " continue"
            )
        sys.exit(130)


def _check(args: argparse.Namespace) -> None:
    from ..runtime.errors import UsageError

    for flag in ("regularizer_scale", "guidance_method"):
        if getattr(args, flag) is not None and not args.guidance:
            raise UsageError(f"--{flag} has no effect without --guidance")
    if args.regularizer_scale is not None and not 0 <= args.regularizer_scale < float("inf"):
        raise UsageError(f"--regularizer_scale {args.regularizer_scale:g}: must be finite and at least 0")
    if args.push_to_hub and _is_array_file(args):
        raise UsageError("--push_to_hub uploads image files: name a folder by --output")


def _is_array_file(args: argparse.Namespace) -> bool:
    return args.output.endswith(".npz")


def _sampler(args: argparse.Namespace, pipeline):
    from ..runtime.errors import UsageError
    from ..sampling.sampler import Sampler, model_sha256
    from ..sampling.schedulers import fitting_samplers
    from ..sampling.settings import SampleSettings

    conditions = _conditions(args, pipeline)
    method = args.guidance_method or "mpgd"
    scale = _GUIDANCE_SCALES[method] if args.regularizer_scale is None else args.regularizer_scale
    labels = range(pipeline.num_classes or 0) if args.class_labels is None else _labels(args.class_labels, pipeline)
    settings = SampleSettings(
        model=args.model,
        model_sha256=model_sha256(pipeline),
        scheduler=args.scheduler or next(iter(fitting_samplers(pipeline))),
        num_inference_steps=args.num_inference_steps,
        seed=args.seed,
        size=args.size,
        class_labels=tuple(labels),
        prompts=tuple(args.prompts or ()),
        negative_prompt=args.negative_prompt,
        guidance_scale=pipeline.default_guidance_scale if args.guidance_scale is None else args.guidance_scale,
        condition_sha256=conditions.sha256 if conditions is not None else "",
        guidance=tuple(args.guidance),
        regularizer_scale=scale if args.guidance else 0.0,
        reg_units=(args.reg_units or "user") if args.guidance and pipeline.config.normalization else "model",
        guidance_method=method,
        mixed_precision=args.mixed_precision,
    )
    try:
        return Sampler(pipeline, settings, conditions)
    except ValueError as error:  # its message begins with the name of a setting, which is also the name of the flag
        raise UsageError(f"--{error}") from error


def _labels(given: list[str], pipeline) -> list[int]:
    """Converts names and numbers of classes to labels; a class that is named like a number is meant by its name."""
    from ..runtime.errors import UsageError, warn
    from ..sampling.class_names import label_of

    names, labels = pipeline.config.class_names, []
    if pipeline.num_classes is None:
        raise UsageError("--class_labels are given, but the model has no classes")
    for text in given:
        is_number = text.isdecimal()
        if is_number and text not in (names or ()):
            labels.append(int(text))
            continue
        try:
            labels.append(label_of(text, names))
        except ValueError as error:
            raise UsageError(f"--class_labels {text}: {error}") from None
        if is_number and labels[-1] != int(text):
            warn(f"--class_labels {text}: the class of this name, which has the label {labels[-1]}")
    return labels


def _conditions(args: argparse.Namespace, pipeline):
    from ..runtime.errors import UsageError
    from .conditions import ConditionFolder

    channels = pipeline.condition_channels
    if not channels and args.condition_dir:
        raise UsageError("--condition_dir: the model is not conditioned on images; drop the flag")
    if not channels:
        return None
    if not args.condition_dir:
        raise UsageError(f"--model {args.model} is conditioned on images: name a folder by --condition_dir")
    if channels not in (1, 3):
        raise UsageError(
            f"--condition_dir supports images of 1 or 3 channels, but the condition of this model has {channels}: use"
            " RegDDPMPipeline in Python"
        )
    size = pipeline.image_shape[1:] if args.size is None else sides(args.size)
    return ConditionFolder(Path(args.condition_dir), size, channels)


def _store(args: argparse.Namespace, sampler):
    from ..runtime.errors import UsageError
    from ..sampling.store import ArrayFile, PictureFolder

    path = Path(args.output)
    try:
        if _is_array_file(args):
            return ArrayFile(path, sampler.is_field, sampler.settings.class_labels, sampler.white)
        if not sampler.is_picture:
            raise ValueError(f"{path}: samples of this model are not images: name a file, such as {path}.npz")
        return PictureFolder(path, sampler.white)
    except ValueError as error:
        raise UsageError(f"--output {error}") from error


def _missing(args: argparse.Namespace, sampler, store) -> list[int]:
    from ..runtime.errors import UsageError
    from ..sampling.drawing import find_missing

    try:
        return find_missing(store, sampler.settings, args.num_images)
    except ValueError as error:
        raise UsageError(f"--output {error}") from error


def _draw(args: argparse.Namespace, sampler, store, missing: list[int], state) -> None:
    import torch

    from ..runtime.errors import UsageError
    from ..sampling.drawing import draw_missing
    from ..term import TermError

    batch_size = args.batch_size or sampler.typical_batch
    try:
        draw_missing(sampler, store, missing, batch_size, state)
    except TermError as error:
        raise UsageError(f"--guidance: {error}") from error
    except torch.OutOfMemoryError as error:
        raise UsageError(f"--batch_size {batch_size}: too large for the memory of {state.device}") from error
    except PermissionError as error:
        raise UsageError(f"--output {args.output} cannot be written: {error.strerror}") from error


def _finish(args: argparse.Namespace, store) -> None:
    from ..runtime.errors import UsageError

    if lacking := set(range(args.num_images)) - store.present():
        raise UsageError(
            f"--output {store.path}: {len(lacking):,} images drawn by other processes are missing: name a folder that"
            " all machines share"
        )
    store.finish(args.num_images)


def _open_dataset(args: argparse.Namespace) -> str:
    from ..sampling.hub_samples import open_dataset

    return open_dataset(args.push_to_hub, args.hub_token, args.hub_private_repo)


def _upload(args: argparse.Namespace, settings, store, repo_id: str) -> None:
    from ..hub.background_upload import reason
    from ..runtime.errors import UsageError
    from ..sampling.hub_samples import upload_samples

    try:
        address = upload_samples(repo_id, store, settings, args.num_images, _command(args), args.hub_token)
    except Exception as error:  # without a network, the type depends on its HTTP library
        raise UsageError(
            f"--push_to_hub {repo_id}: failed ({reason(error)}); the images are in {store.path}: run the same command"
            " again to upload them"
        ) from error
    print(f"uploaded    {address}")


def _command(args: argparse.Namespace) -> str:
    """Returns the command line that draws the same images."""
    words = ["reg-diffusers", "sample"]
    for name in _OF_THE_PICTURES:
        value = getattr(args, name)
        if value not in (None, []):
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)
