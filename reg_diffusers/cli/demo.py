"""The subcommand `demo`: a page that shows what guidance does to a model."""

from __future__ import annotations

import argparse

from .model import add_model_flag, load_pipeline

__all__ = ["add_parser", "run"]

_DEFAULT_REGULARIZER = "total_variation"


def add_parser(subparsers) -> argparse.ArgumentParser:
    """Adds the subcommand to those of `reg-diffusers`."""
    parser = subparsers.add_parser(
        "demo",
        help="sample in the browser, with and without guidance",
        description="Serves a page, to this machine only, that samples from a model with and without guidance by a"
        ' loss on x0_hat. Needs gradio: pip install "reg_diffusers[demo]".',
    )
    add_model_flag(parser)
    parser.add_argument(
        "--regularizer",
        nargs="+",
        default=[_DEFAULT_REGULARIZER],
        metavar="NAME",
        help="the losses to begin the list with: built-in names or my_module:MyReg; the other built-in ones follow"
        f" (default: {_DEFAULT_REGULARIZER})",
    )
    parser.add_argument("--port", type=int, help="of the page (default: the first free one from 7860)")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> None:
    """Serves the page until Ctrl-C.

    Raises:
        UsageError: gradio, the model or a regularizer is missing, or the port is in use.
    """
    from ..demo import build_demo
    from ..training.errors import UsageError

    regularizers = _regularizers(args.regularizer)
    pipeline = load_pipeline(args.model)
    try:
        page = build_demo(pipeline, regularizers)
    except ImportError as error:
        raise UsageError(str(error)) from error
    except ValueError as error:
        raise UsageError(f"--model {args.model}: {error}") from error
    try:
        _, url, _ = page.launch(
            server_name="127.0.0.1",
            server_port=args.port,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            ssr_mode=False,
            run_history=False,
            footer_links=[],
        )
    except OSError as error:
        raise UsageError(
            f"--port {args.port}: not free; without the flag it is the first free one from 7860"
        ) from error
    print(f"{url} shows {args.model}; Ctrl-C ends it", flush=True)
    page.block_thread()


def _regularizers(names: list[str]) -> dict:
    """Those named, then the other built-in ones."""
    from .. import regularizers, specs
    from ..training.errors import UsageError

    try:
        return {name: specs.load_regularizer(name) for name in dict.fromkeys([*names, *regularizers.__all__])}
    except ValueError as error:
        raise UsageError(f"--regularizer: {error}") from error
