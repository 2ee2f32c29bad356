"""Messages on the way to a result: through `logging`, above the progress bars, hidden by --quiet, more by --verbose.

The results themselves, such as a table or the command that continues a run, are printed and never hidden.

In a program of your own, `logging.getLogger("reg_diffusers")` has these messages.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm

__all__ = ["bars_are_hidden", "detail", "errors_only", "say", "show_messages", "warn"]

_OF_DATASETS = "HF_DATASETS_DISABLE_PROGRESS_BARS"
_logger = logging.getLogger("reg_diffusers")


class _AboveBars(logging.Handler):
    """Writes warnings to stderr and other messages to stdout, whatever these are at that time."""

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        tqdm.write(self.format(record), file=stream)
        stream.flush()


def show_messages(*, quiet: bool = False, verbose: bool = False) -> None:
    """Shows the messages of the package on stdout and stderr from now on.

    Args:
        quiet: whether to show warnings only, and no progress bars.
        verbose: whether to show details.
    """
    _add_handler()
    # diffusers passes it for each config that it reads from the Hub, with its default value.
    warnings.filterwarnings("ignore", "The `local_dir_use_symlinks` argument is deprecated", UserWarning)
    _logger.setLevel(logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO)
    if quiet:
        os.environ.setdefault(_OF_DATASETS, "1")  # for a later import
        _hide_bars_of_diffusers()
    if "datasets" in sys.modules:
        datasets = sys.modules["datasets"]
        if quiet:
            datasets.disable_progress_bars()
        elif not datasets.config.HF_DATASETS_DISABLE_PROGRESS_BARS:
            datasets.enable_progress_bars()


def _hide_bars_of_diffusers() -> None:
    """Hides "Loading pipeline components" of diffusers, and the bars of transformers and of the client of the Hub."""
    import diffusers.utils.logging
    import huggingface_hub.utils

    huggingface_hub.utils.disable_progress_bars()
    diffusers.utils.logging.disable_progress_bar()
    if "transformers" in sys.modules:  # imported later, it asks the client of the Hub
        sys.modules["transformers"].utils.logging.disable_progress_bar()


def say(message: str) -> None:
    """Says what happens."""
    _logger.info(message)


@contextmanager
def errors_only(*libraries: str) -> Iterator[None]:
    """Hides the messages of other libraries, except errors, in a block whose own message says the same."""
    loggers = [logging.getLogger(name) for name in libraries]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def detail(message: str) -> None:
    """Says what is of interest with --verbose only."""
    _logger.debug(message)


def warn(message: str) -> None:
    """Warns in one line, in one process of each machine."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        _add_handler()
        _logger.warning(f"{os.path.basename(sys.argv[0])}: warning: {message}")


def _add_handler() -> None:
    if not _logger.handlers:
        _logger.addHandler(_AboveBars())


def bars_are_hidden() -> bool:
    """Whether --quiet hides progress bars, too."""
    return _logger.level >= logging.WARNING
