"""Handling of images with an infinite or NaN extra loss."""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Mapping
from numbers import Integral

import torch
from torch import Tensor

from .context import cut
from .precision import full_precision

__all__ = ["GuardedCall", "NonFiniteGuard", "ViewGuard", "advice", "are_finite", "finite_images"]


_COUNTING = threading.Lock()  # global, because a guard with a lock could not be copied or pickled


class NonFiniteGuard:
    """Zeroes non-finite contributions of single images, counts them, and stops a run with too many in a row.

    Counts stay on the device of the images. They are read after every step if that is the CPU, else after every
    `check_interval` steps, because reading waits for the accelerator. Threads may share a guard: consecutive steps are
    counted per thread, images over all threads.

    Args:
        max_steps: consecutive steps with non-finite values or gradients of one term after which `check` raises. None:
            never.
        check_interval: number of steps between two readings if the images are on an accelerator.
        views: views of the terms by name. If one has a `nonfinite_advice`, messages about the term contain it.

    Attributes:
        dropped: by term, the number of images dropped so far, a scalar tensor on the device.
    """

    def __init__(self, max_steps: int | None, check_interval: int = 100, views: Mapping[str, Callable] | None = None):
        if max_steps is not None and not (isinstance(max_steps, Integral) and max_steps >= 1):
            raise ValueError(f"max_nonfinite_steps must be an integer of at least 1, or None, not {max_steps!r}")
        self.max_steps = max_steps
        self.check_interval = check_interval
        self._views = dict(views or {})
        self._warned: set[str] = set()
        self.dropped: dict[str, Tensor] = {}
        self._last: dict[tuple[int, str], GuardedCall] = {}  # by thread and term
        self._steps = 0

    def begin(self, name: str, timesteps: Tensor, places: Tensor | None = None) -> GuardedCall:
        """Returns the guard for the next evaluation of a term; called once per step and term.

        Args:
            name: name of the term.
            timesteps: (B,) timesteps of the batch, for the error message.
            places: (n,) positions of the images in the batch; None: all.
        """
        key = threading.get_ident(), name
        last = self._last.get(key)
        if last is None:
            self._count(name, torch.zeros((), dtype=torch.long, device="cpu"))
        before = 0 if last is None else last.in_a_row
        self._last[key] = call = GuardedCall(name, timesteps, places, before, self._count)
        call.earlier = None if last is None else last.dropped()
        return call

    def last_timesteps(self, name: str) -> list[float]:
        """Returns the timesteps of the images dropped in a term's last step. Waits for the accelerator."""
        calls = [call for (_, term), call in list(self._last.items()) if term == name]
        return [timestep for call in calls for timestep in call.dropped_timesteps()]

    def remedy(self, name: str) -> str:
        """Returns what to change in a term's view so that its images are finite; empty if nothing is known."""
        return getattr(self._views.get(name), "nonfinite_advice", "")

    def check(self) -> None:
        """Checks the number of consecutive non-finite steps of this thread.

        Warns once by term at the first non-finite step if its view suggests a remedy.

        Raises:
            FloatingPointError: a term was non-finite in `max_steps` steps in a row.
        """
        if self.max_steps is None:
            return
        self._steps += 1
        own = threading.get_ident()
        for (thread, name), call in list(self._last.items()):
            if thread != own or call.is_clean:
                continue
            if call.waits and self._steps % self.check_interval != 0:
                continue
            # Non-finite gradients of a step are known only in the next step.
            in_a_row = max(int(call.in_a_row), int(call.before))
            if in_a_row >= self.max_steps:
                images, timesteps = int(self.dropped[name]), self.last_timesteps(name)
                raise FloatingPointError(advice(name, self.max_steps, images, timesteps, self.remedy(name)))
            if in_a_row > 0 and name not in self._warned and (remedy := self.remedy(name)):
                self._warned.add(name)
                warnings.warn(f"an image without finite L' was left out of {name!r}; {remedy}", stacklevel=6)

    def _count(self, name: str, images: Tensor) -> None:
        with _COUNTING:
            self.dropped[name] = self.dropped.get(name, 0) + images


class GuardedCall:
    """Guards one evaluation of a term: its values, and later its gradients, independent of evaluations in between.

    Args:
        name: name of the term.
        timesteps: (B,) timesteps of the batch.
        places: (n,) positions of the images in the batch; None: all.
        before: number of consecutive non-finite steps before this one, a number or a scalar tensor.
        count: `count(name, images)`, called with the number of dropped images, a scalar tensor.

    Attributes:
        timesteps: as given.
        places: as given.
        before: as given.
        in_a_row: number of consecutive non-finite steps including this one, as far as known.
        earlier: what `dropped` returned for the step before, whose gradients are known only now.
    """

    def __init__(
        self,
        name: str,
        timesteps: Tensor,
        places: Tensor | None,
        before: Tensor | int,
        count: Callable[[str, Tensor], None],
    ):
        self.timesteps = timesteps
        self.places = places
        self.before = before
        self.in_a_row = before
        self.earlier: tuple[Tensor, Tensor] | None = None
        self._name = name
        self._count = count
        self._given: Tensor | None = None  # (n,) whether the input of L' was finite; None if all was
        self._find_given: Callable[[], Tensor | None] | None = None  # computes it when it is needed
        self._dropped: Tensor | None = None  # (n,) whether L' made it non-finite

    @property
    def is_clean(self) -> bool:
        """Whether this step and the one before are known to have dropped nothing: counts are tensors if not."""
        return isinstance(self.in_a_row, int) and isinstance(self.before, int)

    @property
    def waits(self) -> bool:
        """Whether reading the counts waits for an accelerator."""
        return _is_elsewhere(self.in_a_row) or _is_elsewhere(self.before)

    def drop_values(self, values: Tensor, given: Callable[[], Tensor | None]) -> tuple[Tensor, Tensor]:
        """Replaces non-finite values of L', (n,): by 0, and in a second, detached tensor by nan.

        An image whose x0_hat was non-finite is dropped but not counted, because the network is the cause.

        Args:
            values: (n,) L' of each image.
            given: computes whether x0_hat was finite, (n,), before the view; None if all were. Called at most once, if
                L' or its gradient may be non-finite.
        """
        self._find_given = given
        detached = values.detach()
        if _are_known_finite(detached):
            self.in_a_row = 0
            return values, detached
        bad = ~detached.isfinite()
        self._drop(self._caused(bad))
        return torch.where(bad, 0, values), detached.masked_fill(bad, torch.nan)

    def drop_gradients(self, gradients: Tensor) -> Tensor:
        """Sets the gradients of L', (n, C, H, W), to 0 for every image with a non-finite gradient.

        Zeroing the value is not enough, because its gradient is 0 times an infinite derivative. An image that was
        dropped for its value is not counted again.
        """
        if _are_known_finite(gradients):
            return gradients
        bad = ~are_finite(gradients)
        self._drop(self._caused(bad))
        return torch.where(bad.reshape(-1, *(1,) * (gradients.ndim - 1)), 0, gradients)

    def drop_images(self, images: Tensor) -> None:
        """Counts images whose gradients the view has made non-finite, (n,) bool."""
        self._drop(self._caused(images))

    def dropped(self) -> tuple[Tensor, Tensor] | None:
        """Returns the timesteps of the images, (n,), and whether each was dropped, (n,); None if none was so far."""
        if self._dropped is None:
            return None
        return self.timesteps if self.places is None else self.timesteps[self.places], self._dropped

    def dropped_timesteps(self) -> list[float]:
        """Returns the timesteps of the dropped images, else those of the step before. Waits for the accelerator."""
        found = self.dropped() or self.earlier
        return [] if found is None else found[0][found[1].to(found[0].device)].tolist()

    def _caused(self, bad: Tensor) -> Tensor:
        """Selects bad images whose x0_hat was finite, (n,) bool."""
        if self._find_given is not None:
            self._given, self._find_given = self._find_given(), None
        return bad if self._given is None else bad & self._given

    def _drop(self, images: Tensor) -> None:
        already = torch.zeros_like(images) if self._dropped is None else self._dropped
        self._count(self._name, (images & ~already).sum())
        self._dropped = images | already
        self.in_a_row = (self.before + 1) * self._dropped.any()


class ViewGuard:
    """Zeroes the gradients of images for which a view passes back non-finite ones, for all terms that look through it.

    The derivative of a view may be infinite where the gradient of L' is finite or 0, as after an overflow in a
    half-precision decoder.

    Args:
        x0_hat: (n, C, ...) input of the view, used for nothing else.
        images: (n, C', ...) its output.
    """

    def __init__(self, x0_hat: Tensor, images: Tensor):
        self._x0_hat = x0_hat.detach()
        self._calls: list[tuple[GuardedCall, Tensor | None]] = []
        if images.requires_grad and x0_hat.requires_grad:
            x0_hat.register_hook(self._drop)

    def report_to(self, call: GuardedCall, among: Tensor | None) -> None:
        """Also counts dropped images in the call of a term.

        Args:
            call: of the term.
            among: positions of the term's images in x0_hat; None: all.
        """
        self._calls.append((call, among))

    def given(self, among: Tensor | None) -> Tensor | None:
        """Whether x0_hat of the images at these positions is finite, (n,); None if all are known to be."""
        found = finite_images(self._x0_hat)
        return found if among is None or found is None else cut(found, among, len(found))

    def _drop(self, gradients: Tensor) -> Tensor:
        if _are_known_finite(gradients):
            return gradients
        bad = ~are_finite(gradients)
        for call, among in self._calls:
            call.drop_images(bad if among is None else cut(bad, among, len(bad)))
        return torch.where(bad.reshape(-1, *(1,) * (gradients.ndim - 1)), 0, gradients)


def finite_images(images: Tensor) -> Tensor | None:
    """Whether all values of each image are finite, (n,); None if that is known of all, at once and without waiting."""
    return None if _are_known_finite(images) else are_finite(images)


def _is_elsewhere(count: Tensor | int) -> bool:
    return isinstance(count, Tensor) and count.device.type != "cpu"


def _are_known_finite(values: Tensor) -> bool:
    """Whether all values are finite, as far as one sum shows without waiting for an accelerator."""
    if values.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    try:
        return math.isfinite(values.sum().item())
    except RuntimeError:  # values cannot be read under vmap
        return False


def are_finite(images: Tensor) -> Tensor:
    """Whether all values of each image are finite, (n,), from their sum in one pass.

    A sum that overflows float32 counts as infinite: for N values, magnitudes above about 3e38 / N.
    """
    return images.flatten(1).sum(1, dtype=full_precision(images.dtype)).isfinite()


def advice(name: str, steps: int, images: int, timesteps: list[float], remedy: str = "") -> str:
    """Returns the message for a term that is repeatedly non-finite, with suggestions.

    Args:
        name: name of the term.
        steps: number of consecutive steps.
        images: number of images dropped in total.
        timesteps: timesteps of the images dropped last.
        remedy: what to change in the view, see `NonFiniteGuard.remedy`.
    """
    span = f" (last at timesteps {min(timesteps):g} to {max(timesteps):g})" if timesteps else ""
    return (
        f"regularizer {name!r} was not finite for {steps} steps in a row{span}, {images} images in all. Look for a"
        " division, logarithm or root of values that can be 0, or use a weighting that leaves these noise levels out"
        f"{remedy and f'; {remedy}'}"
    )
