"""The subcommand `demo`: shows the effect of guidance on a model, in the browser."""

from __future__ import annotations

import argparse
import socket

from ..runtime.messages import say
from ..settings.flag_values import port
from .bench import load_data
from .judging_flags import DATA_FLAGS
from .model import add_model_flag, load_pipeline
from .recorded_data import recorded_data

__all__ = ["add_parser", "run"]

_IMAGES_OF_DATA = 256
_DEFAULT_REGULARIZER = "total_variation"


def add_parser(subparsers) -> argparse.ArgumentParser:
    """Adds the subcommand to those of `reg-diffusers`."""
    parser = subparsers.add_parser(
        "demo",
        help="sample in the browser, with and without guidance",
        description="Serves a page on this machine only, unless --host names another address. It samples from a model"
        ' with and without guidance by a loss on x0_hat. Needs gradio: pip install "reg_diffusers[demo]".',
        allow_abbrev=False,
    )
    add_model_flag(parser)
    parser.add_argument(
        "--regularizer",
        nargs="+",
        default=[_DEFAULT_REGULARIZER],
        metavar="NAME",
        help="losses to list first: built-in names or my_module:MyReg; the other built-in losses follow"
        f" (default: {_DEFAULT_REGULARIZER})",
    )
    parser.add_argument(
        "--data",
        metavar="FOLDER_FILE_OR_ID",
        help="data whose L' is shown as a reference (default: the training data that the model records)",
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address to serve the page at; 0.0.0.0 opens it to a phone, and to everybody else in the network"
        " (default: %(default)s, this machine only)",
    )
    parser.add_argument("--port", type=port, help="port of the page (default: the first free port from 7860)")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> None:
    """Serves the page until Ctrl-C.

    Raises:
        UsageError: if gradio, the model or a regularizer is missing, or if the port is in use.
    """
    from ..demo import build_demo
    from ..runtime.errors import UsageError, warn

    regularizers = _regularizers(args.regularizer)
    pipeline = load_pipeline(args.model)
    means = _means_on_data(args, pipeline, regularizers)
    try:
        page = build_demo(pipeline, regularizers, means, _first_text(args.model))
        from ..demo.guard import LOCAL, guarded, is_everywhere
    except ImportError as error:
        raise UsageError(str(error)) from error
    except ValueError as error:
        raise UsageError(f"--model {args.model}: {error}") from error
    try:
        _, url, _ = page.launch(
            server_port=args.port,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            ssr_mode=False,
            run_history=False,
            footer_links=[],
            **guarded(args.host),
        )
    except OSError as error:
        if args.host != LOCAL:
            raise UsageError(f"--host {args.host}: not an address of this machine, or --port is not free") from error
        raise UsageError(
            f"--port {args.port}: not free; drop the flag to use the first free port from 7860"
        ) from error
    if args.host != LOCAL:
        warn(
            f"--host {args.host}: the page has no password, so everybody who can reach this address can use it and the"
            " processors of this machine"
        )
    if is_everywhere(args.host):
        url = f"http://{_own_address()}:{page.server_port}/"
    print(f"{url} shows {args.model}; press Ctrl-C to stop", flush=True)
    page.block_thread()


def _first_text(model: str) -> str:
    """Returns the first text that a training recorded; "" without any, or if the record is damaged."""
    from pathlib import Path

    from ..hub.card import read_json
    from ..runs.run_folder import CONFIG_FILE

    try:
        return str(read_json(Path(model, CONFIG_FILE))["data"]["prompts"][0])
    except (OSError, ValueError, LookupError, TypeError):
        return ""


def _own_address() -> str:
    """Returns the address of this machine in its network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # an address for documentation; nothing is sent
        except OSError:  # no network
            return "127.0.0.1"
        return probe.getsockname()[0]


def _means_on_data(args: argparse.Namespace, pipeline, regularizers: dict) -> dict[str, float]:
    """Returns the mean of each loss over some images of the data; empty, with a message, if the data are unknown."""
    import torch

    from ..runtime.errors import UsageError
    from ..term import Term, TermError, score

    name, columns = args.data, argparse.Namespace(**dict.fromkeys(DATA_FLAGS))
    try:
        if name is None:
            name, columns = recorded_data([args.model], "--data")
        given = argparse.Namespace(**vars(columns), data=name, features="")
        data = load_data(given, args.model, pipeline, pipeline.num_classes is not None)
    except UsageError as error:
        if args.data is not None:
            raise
        say(f"data        no reference for L': {error}")
        return {}
    chosen = torch.linspace(0, len(data) - 1, min(len(data), _IMAGES_OF_DATA)).long().tolist()
    batch = data.__getitems__(chosen)
    images = data.normalization.normalize(batch["values"]).to(pipeline.device)
    context = {name: batch[name].to(pipeline.device) for name in ("class_labels",) if name in batch}
    found = {}
    for name, regularizer in regularizers.items():
        try:
            found[name] = score(Term(regularizer, 1.0), images, context).mean().item()
        except (TermError, ValueError):  # the page says why when the loss is chosen
            continue
    say(f"data        L' of {len(chosen)} images is the reference")
    return found


def _regularizers(names: list[str]) -> dict:
    """Returns the named regularizers, followed by the other built-in ones that need only the image."""
    from .. import regularizers, specs
    from ..runtime.errors import UsageError
    from ..term import needs_of

    others = [name for name in regularizers.__all__ if not needs_of(getattr(regularizers, name))]
    try:
        return {name: specs.load_regularizer(name) for name in dict.fromkeys([*names, *others])}
    except ValueError as error:
        raise UsageError(f"--regularizer: {error}") from error
