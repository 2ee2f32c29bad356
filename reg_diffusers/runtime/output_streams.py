"""Keeps a run going when stdout or stderr closes, as with `| head -1`."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

__all__ = ["LastingStream", "lasting_output"]


class LastingStream:
    """A text stream that does not raise when it closes: further text goes to another stream, or is discarded.

    Args:
        stream: the stream to write to.
        name: the name of the stream, for the line that reports its loss.
        other: the stream for that line and for further text; None to discard both.

    Attributes:
        is_lost: whether a write has failed.
    """

    def __init__(self, stream, name: str, other: LastingStream | None = None):
        self.is_lost = False
        self._stream, self._name, self._other = stream, name, other
        self._unwritten = ""

    def write(self, text: str) -> int:
        if self.is_lost:
            self._pass_on(text)
            return len(text)
        self._unwritten += text
        try:
            self._stream.write(self._encodable(text))
        except (OSError, ValueError):  # the pipe, terminal or file is gone; ValueError: this process closed it
            self._lose()
        else:
            if "\n" in text:  # so that the reader of a pipe gets complete lines immediately
                self.flush()
        return len(text)

    def flush(self) -> None:
        if self.is_lost:
            return
        try:
            self._stream.flush()
            self._unwritten = ""
        except (OSError, ValueError):
            self._lose()

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def _encodable(self, text: str) -> str:
        encoding = getattr(self._stream, "encoding", None)
        return text.encode(encoding, "backslashreplace").decode(encoding) if encoding else text

    def _lose(self) -> None:
        self.is_lost = True
        # Closing the stream would write its buffer and fail again.
        with contextlib.suppress(OSError, ValueError, AttributeError), open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), self._stream.fileno())
        unwritten, self._unwritten = self._unwritten, ""
        self._pass_on(f"{self._name} was closed; the run continues, and its output follows here\n")
        self._pass_on(unwritten)

    def _pass_on(self, text: str) -> None:
        if self._other is not None:
            self._other.write(text)


@contextlib.contextmanager
def lasting_output() -> Iterator[list[LastingStream]]:
    """Context manager in which no write to stdout or stderr fails; yields both streams."""
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w") as nowhere:
        # A stream is None if it was closed from the start, for example by `2>&-`; that is no failure.
        stderr = LastingStream(sys.stderr or nowhere, "stderr")
        stdout = LastingStream(sys.stdout or nowhere, "stdout", stderr)
        sys.stdout, sys.stderr = stdout, stderr
        try:
            yield [stdout, stderr]
        finally:
            stdout.flush()
            stderr.flush()
            sys.stdout, sys.stderr = before
