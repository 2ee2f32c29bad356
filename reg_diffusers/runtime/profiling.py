"""Measures the time of each part of a step: a table, and a trace for a viewer."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator, ProfileKwargs

from .files import write_whole

__all__ = ["StepProfile"]

WARM_UP_STEPS = 3  # for memory allocation, compilation and the creation of the optimizer's state
_TRACED = ("cuda", "hpu", "mtia", "xpu")  # of the accelerators, those that torch's profiler can follow
SECTIONS = ("data", "forward", "auxiliary", "backward", "optimizer", "EMA")


class StepProfile:
    """Profiles some steps of the main process after a warm-up; has almost no cost before, after, and when off.

        with profile("forward"):
            ...
        for line in profile.step():  # at the end of each step
            print(line)

    The time of a section excludes nested sections. While profiling, each section synchronizes with an accelerator at
    both ends, so the work counts in the section that launches it; this makes the steps a little slower.

    Args:
        accelerator: the accelerator of the training.
        steps: the number of steps to profile; None to profile none.
        folder: the folder of trace.json, a file for chrome://tracing and ui.perfetto.dev.
    """

    def __init__(self, accelerator: Accelerator, steps: int | None, folder: Path):
        self._device = accelerator.device
        self._steps = steps if accelerator.is_main_process else None
        self._path = folder / "trace.json"
        self._done = -WARM_UP_STEPS
        self._profiler: torch.profiler.profile | None = None
        self._seconds: dict[str, float] = defaultdict(float)
        self._within: list[float] = []  # for each open section, the seconds of its nested sections

    def __call__(self, name: str) -> contextlib.AbstractContextManager:
        """Returns a context manager for a part of the step, one of `SECTIONS`."""
        return contextlib.nullcontext() if self._profiler is None else self._section(name)

    def around(self, name: str, function: Callable) -> Callable:
        """Wraps a function in a section; returns it unchanged if nothing is profiled."""
        if not self._steps:
            return function

        def section(*args, **kwargs):
            with self(name):
                return function(*args, **kwargs)

        return section

    def step(self) -> list[str]:
        """Ends a step; after the last profiled one, returns the table as lines of text."""
        if not self._steps:
            return []
        self._done += 1
        if self._done == 0:
            self._begin()
        return self.finish() if self._done == self._steps else []

    def finish(self) -> list[str]:
        """Ends a running profile, as at the end of a short training: writes the trace and returns the table."""
        if self._profiler is None or self._done <= 0:
            return []
        self._wait()
        seconds = time.perf_counter() - self._started
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        steps, self._steps = self._done, None
        write_whole(self._path, lambda temporary: profiler.export_chrome_trace(str(temporary)))
        parts = {name: self._seconds[name] for name in SECTIONS}
        parts["rest"] = seconds - sum(parts.values())
        return [
            f"profile    {steps} steps, {1000 * seconds / steps:.1f} ms each; {self._path}",
            *(f"  {name:<10}{part / seconds:6.1%}{1000 * part / steps:10.1f} ms" for name, part in parts.items()),
        ]

    def _begin(self) -> None:
        kinds = ["cpu", *([self._device.type] if self._device.type in _TRACED else [])]
        self._profiler = ProfileKwargs(activities=kinds).build()
        self._profiler.start()
        self._wait()
        self._started = time.perf_counter()

    @contextlib.contextmanager
    def _section(self, name: str):
        self._wait()
        start = time.perf_counter()
        self._within.append(0.0)
        with torch.profiler.record_function(name):
            yield
        self._wait()
        seconds = time.perf_counter() - start
        self._seconds[name] += seconds - self._within.pop()
        if self._within:
            self._within[-1] += seconds

    def _wait(self) -> None:
        if self._device.type != "cpu":
            torch.accelerator.synchronize()
