"""The logger of --logger; the training continues if it fails."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
from accelerate import Accelerator

from ..runs.run_folder import PLAIN_FOLDER, TENSORBOARD_FOLDER
from ..runtime.errors import UsageError
from ..runtime.processes import together
from .ending import Ending

__all__ = ["Trackers"]

_FIX = "metrics.jsonl has the same numbers: leave --logger out or repair it"


class Trackers:
    """Passes numbers and pictures to the logger until that fails; then the training continues without it.

    Its run has the name of the output folder; that of the plain model of a comparison ends in "plain".

    Args:
        accelerator: accelerator made with `log_with`.
        logger: name of the logger; None: no logger.
        ending: ending of the run.
        output_dir: folder of the training.
        project: project of the logger; TensorBoard has folders in its place.
        hyperparameters: settings of the run, by name; without a token.

    Raises:
        UsageError: the logger cannot be started.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        logger: str | None,
        ending: Ending,
        *,
        output_dir: Path,
        project: str,
        hyperparameters: dict,
    ):
        self._accelerator = accelerator
        self._ending = ending
        self._name = f"--logger {logger}"
        self._project = TENSORBOARD_FOLDER if logger == "tensorboard" else project
        self._run_name = _run_name(output_dir)
        self._hyperparameters = {name: _scalar(value) for name, value in hyperparameters.items()}
        self._is_available = logger is not None
        self._step = 0  # the last one logged
        if self._is_available:
            together(accelerator.state, self._start)

    def log(self, values: dict[str, float], step: int) -> None:
        """Logs the numbers of a step."""
        if self._is_available:
            self._step = step
            what = f"{self._name} at step {step}"
            self._is_available = self._ending.attempt(what, _FIX, lambda: self._accelerator.log(values, step=step))

    def log_picture(self, name: str, picture: PIL.Image.Image, step: int) -> None:
        """Logs a picture of a step; call it in the main process."""
        if self._is_available:
            what = f"{self._name} at step {step}"
            pixels = np.asarray(picture.convert("RGB"))
            fix = "the picture is in the output folder: leave --logger out or repair it"
            self._is_available = self._ending.attempt(what, fix, lambda: self._log_picture(name, pixels, step))

    def log_picture_afterwards(self, name: str, picture: PIL.Image.Image) -> None:
        """Logs a picture to the finished run, which is opened again for it; call it in the main process."""
        if self._is_available:
            what, fix = f"{self._name} after the training", "the picture is in the output folder"
            self._is_available = self._ending.attempt(what, fix, self._start_again)
        self.log_picture(name, picture, self._step)
        self.finish()

    def finish(self) -> None:
        """Makes the logger write its remaining numbers."""
        for tracker in self._accelerator.trackers if self._is_available else ():
            self._ending.attempt(f"the end of {self._name}", _FIX, tracker.finish)

    def _start(self) -> None:
        names = {logger: {"name": self._run_name} for logger in ("wandb", "trackio")}
        try:
            self._accelerator.init_trackers(self._project, self._hyperparameters, names)
        except Exception as error:  # of any kind, because each logger is another package
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UsageError(f"{self._name} cannot be started: {reason}: leave it out or repair it") from error

    def _start_again(self) -> None:
        for tracker in self._accelerator.trackers:
            if tracker.name == "wandb":
                tracker.init_kwargs |= {"id": tracker.tracker.id, "resume": "allow"}
            elif tracker.name == "trackio":  # finds the run by its name
                tracker.init_kwargs |= {"resume": "allow"}
            tracker.start()

    def _log_picture(self, name: str, pixels: np.ndarray, step: int) -> None:
        for tracker in self._accelerator.trackers:
            if tracker.name == "trackio":  # accelerate 1.15 cannot log pictures there
                import trackio

                tracker.log({name: trackio.Image(pixels)}, step=step)
            elif tracker.name == "tensorboard":
                tracker.log_images({name: pixels[None]}, step=step, dataformats="NHWC")
            else:
                tracker.log_images({name: [pixels]}, step=step)


def _run_name(output_dir: Path) -> str:
    folder = output_dir.absolute()
    return f"{folder.parent.name} {PLAIN_FOLDER}" if folder.name == PLAIN_FOLDER else folder.name


def _scalar(value) -> bool | int | float | str:
    """Returns a setting as a value that every logger takes."""
    if isinstance(value, tuple | list):
        return ", ".join(map(str, value))
    return value if isinstance(value, bool | int | float | str) else str(value)
