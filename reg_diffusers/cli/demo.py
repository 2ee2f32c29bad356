"""The subcommand `demo`: shows the effect of guidance on a model, in the browser."""

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
        description="Serves a page on this machine only, which samples from a model with and without guidance by a"
        ' loss on x0_hat. Needs gradio: pip install "reg_diffusers[demo]".',
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
    parser.add_argument("--port", type=int, help="port of the page (default: the first free port from 7860)")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> None:
    """Serves the page until Ctrl-C.

    Raises:
        UsageError: if gradio, the model or a regularizer is missing, or if the port is in use.
    """
    from ..demo import build_demo
    from ..runtime.errors import UsageError

    regularizers = _regularizers(args.regularizer)
    pipeline = load_pipeline(args.model)
    try:
        page = build_demo(pipeline, regularizers)
        from ..demo.guard import LOCAL_ONLY
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
            **LOCAL_ONLY,
        )
    except OSError as error:
        raise UsageError(
            f"--port {args.port}: not free; drop the flag to use the first free port from 7860"
        ) from error
    print(f"{url} shows {args.model}; press Ctrl-C to stop", flush=True)
    page.block_thread()


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
