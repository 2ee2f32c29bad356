"""Startup checks: each term of the loss is tried on real images, before the first step and within a second.

What makes a training wrong is an error: no gradient, another shape than (B,), values that are no numbers, values that
depend on the other images of the batch, networks that change. What makes it doubtful is a warning, one line on stderr.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..objective import X0Regularization
from ..prediction import add_noise, noise_level, prediction_target
from ..term import Term, TermError, checked_values, checked_weights, term_context
from .data import TrainingData
from .errors import UsageError, warn
from .networks import find_networks, fingerprint
from .tracing import Trace, line_of_error

__all__ = ["OnData", "check_terms", "random_numbers_as_before"]

_IMAGES_TRIED = 2
_IMAGES_MEASURED = 64
_IMAGES_AT_A_TIME = 16
_SECONDS = 0.4  # of measuring, for all terms together: a large network sees fewer images
_TOLERANCE = 1e-3  # relative: another batch size may mean another algorithm and order of summation


@dataclass(frozen=True)
class OnData:
    """L' of one term on images of the data set.

    Attributes:
        mean: over the images.
        standard_deviation: of one image, 0 for a single one.
        images: how many.
    """

    mean: float
    standard_deviation: float
    images: int

    def __str__(self) -> str:
        if self.images == 1:
            return f"{self.mean:.3g} (1 image)"
        error = self.standard_deviation / self.images**0.5
        return (
            f"{self.mean:.3g} ± {error:.1g} (standard deviation {self.standard_deviation:.2g}, {self.images} images)"
        )


def check_terms(
    terms: tuple[Term, ...],
    noise_scheduler,
    data: TrainingData,
    device: torch.device | str = "cpu",
    mixed_precision: str = "no",
) -> dict[str, OnData]:
    """Tries each regularizer on real images, and its weighting on the whole schedule; returns L' on the data, by name.

    The global random numbers, which the training draws from, are left as they were.

    Args:
        terms: of the loss.
        noise_scheduler: of the training.
        data: with at least one image.
        device: of the training; networks among the regularizers are moved there, as the training would.
        mixed_precision: of the training, "no", "fp16" or "bf16".

    Raises:
        UsageError: a regularizer raises, returns anything but an attached (B,), is not finite on the data, depends on
            the other images of the batch, or holds a network that changes; a weighting is anything but finite.
    """
    device, dtype = torch.device(device), {"fp16": torch.float16, "bf16": torch.bfloat16}.get(mixed_precision)
    on_data = {}
    with random_numbers_as_before(device), torch.autocast(device.type, dtype, enabled=dtype is not None):
        for term in terms:
            try:
                trial = _Trial(term, noise_scheduler, data, device)
                on_data[term.name] = trial.run(_SECONDS / len(terms))
            except UsageError:  # about the data
                raise
            except TermError as error:
                raise UsageError(f"--regularizer {term.name}: {error}") from error
            except Exception as error:
                raise _own_error(term, error) from error
    return on_data


class _Trial:
    """One term, tried on images of the data, and on the same with noise, where it meets nothing special."""

    def __init__(self, term: Term, noise_scheduler, data: TrainingData, device: torch.device):
        self._term, self._noise_scheduler, self._data, self._device = term, noise_scheduler, data, device
        X0Regularization(noise_scheduler, [term]).to(device)  # freezes and moves a network, as the training will
        self._networks = find_networks(term.regularizer)

    def run(self, seconds: float) -> OnData:
        checked_weights(self._term, noise_level(self._noise_scheduler, _schedule(self._noise_scheduler)))
        before = {name: fingerprint(network) for name, network in self._networks.items()}
        images, context = self._images(_spread(len(self._data.examples), _IMAGES_TRIED))
        noisy = images + torch.randn(images.shape, generator=torch.Generator().manual_seed(0)).to(images)
        self._check_gradient(images, noisy, context)
        self._check_precision(noisy, context)
        if self._check_repetition(noisy, context):
            self._check_independence(noisy, context)
        on_data = self._measure(seconds)
        self._check_networks(before)
        return on_data

    def _check_gradient(self, images: Tensor, noisy: Tensor, context: dict) -> None:
        """Whether the gradient reaches the output of a network, one that finds the image and one that does not."""
        on_images, gradient_on_images = self._gradient(images, context)
        on_noisy, gradient_on_noisy = self._gradient(noisy, context)
        without = (
            "is not finite on {}; such images go without it: look for a root, a logarithm or a quotient at 0 or below"
        )
        if on_images.isfinite().all() and not gradient_on_images.isfinite().all():
            self._warn(f"its gradient {without.format('images of the data')}")
        elif not (on_noisy.isfinite().all() and gradient_on_noisy.isfinite().all()):
            self._warn(f"it or its gradient {without.format('noisy images')}")
        elif not (gradient_on_images.any() or gradient_on_noisy.any()):
            self._warn("its gradient is 0 wherever it was tried: nothing can be learned from it")

    def _gradient(self, x0_hat: Tensor, context: dict) -> tuple[Tensor, Tensor]:
        """L' (B,), and its gradient by a model_output that implies x0_hat, (B, C, H, W)."""
        timesteps = torch.ones(len(x0_hat), dtype=torch.long)
        noise = torch.randn(x0_hat.shape, generator=torch.Generator().manual_seed(1)).to(x0_hat)
        sample = add_noise(self._noise_scheduler, x0_hat, noise, timesteps)
        model_output = prediction_target(self._noise_scheduler, x0_hat, noise, timesteps).clone().requires_grad_()
        estimate = self._term.estimator(self._noise_scheduler, model_output, timesteps, sample)
        try:
            values = checked_values(self._term, estimate, context)
        except TermError as error:
            raise TermError(f"{error}{self._cut(estimate, context)}") from error
        values.sum().backward()
        gradient = torch.zeros_like(model_output) if model_output.grad is None else model_output.grad
        return values.detach(), gradient

    def _cut(self, x0_hat: Tensor, context: dict) -> str:
        """What cuts the gradient, if the regularizer returns something without one."""
        with Trace() as trace, torch.autocast(x0_hat.device.type, enabled=False):
            values = self._term.regularizer(x0_hat, **context)
        attached = isinstance(values, Tensor) and values.requires_grad
        return "" if attached or trace.cut is None else f". It is cut off by {trace.cut}"

    def _check_precision(self, x0_hat: Tensor, context: dict) -> None:
        with contextlib.suppress(Exception), Trace() as trace:  # what runs without being watched need not run so
            checked_values(self._term, x0_hat, context)
            if trace.half:
                self._warn(f"it computes in {trace.half}; L' is meant to be float32, and its gradient more so")

    def _check_repetition(self, x0_hat: Tensor, context: dict) -> bool:
        """Whether the same images have the same values again, with nothing drawn at random."""
        state = _random_state(self._device)
        values, again = (self._values(x0_hat, context) for _ in range(2))
        draws, differs = not _same(state, _random_state(self._device)), not _close(values, again)
        if not (draws or differs):
            return True
        reason = "it draws random numbers" if draws else "it keeps a state, or draws random numbers by itself"
        if random_layers := self._in_training_mode(nn.modules.dropout._DropoutNd):
            reason = f"it draws random numbers, for {random_layers}: call .eval() on it"
        change = f": its values for the same images, {_said(values)}, are {_said(again)} the next time"
        rest = "" if draws else "; a run that is resumed will differ from one that is not"
        self._warn(f"{reason}{change if differs else ''}{rest}")
        return False

    def _check_independence(self, x0_hat: Tensor, context: dict) -> None:
        together = self._values(x0_hat, context)
        alone = torch.cat(
            [self._values(x0_hat[i : i + 1], _select(context, i, len(x0_hat))) for i in range(len(x0_hat))]
        )
        if _close(together, alone):
            return
        layers = self._in_training_mode(nn.modules.batchnorm._BatchNorm)
        reason = f"because of {layers}: call .eval() on it" if layers else "average over all dimensions but the first"
        raise TermError(
            f"the value of an image depends on the other images of the batch: {_said(alone)} alone,"
            f" {_said(together)} together; {reason}"
        )

    def _measure(self, seconds: float) -> OnData:
        """L' of images spread over the data; fewer of them where that takes long."""
        chosen = _spread(len(self._data.examples), _IMAGES_MEASURED)
        values, end = [], time.monotonic() + seconds
        for start in range(0, len(chosen), _IMAGES_AT_A_TIME):
            if values and time.monotonic() > end:
                break
            images, context = self._images(chosen[start : start + _IMAGES_AT_A_TIME])
            values.append(self._values(images, context))
        values = torch.cat(values).double().cpu()
        if bad := (~values.isfinite()).sum().item():
            raise TermError(
                f"it is not finite for {bad} of {len(values)} images of the data: look for a root, a logarithm or a"
                " quotient at 0"
            )
        return OnData(values.mean().item(), values.std().item() if len(values) > 1 else 0.0, len(values))

    def _check_networks(self, before: dict[str, dict]) -> None:
        """They must not have changed by what was done so far, nor be about to."""
        for name, network in self._networks.items():
            now = fingerprint(network)
            if changed := [key for key, value in before[name].items() if now[key] != value]:
                raise TermError(
                    f"its network {_named(name, network)} changes when it is called ({', '.join(changed[:3])}): call"
                    " .eval() on it, and change nothing in it by hand"
                )
            missing = [".eval()"] if any(module.training for module in network.modules()) else []
            missing += [".requires_grad_(False)"] if any(p.requires_grad for p in network.parameters()) else []
            if missing:
                self._warn(f"its network {_named(name, network)} is not frozen: call {''.join(missing)} on it")

    def _in_training_mode(self, kind: type) -> str:
        """Names a network that has layers of a kind in training mode, and the kind."""
        for name, network in self._networks.items():
            for module in network.modules():
                if isinstance(module, kind) and module.training:
                    return f"{type(module).__name__} in training mode in its network {_named(name, network)}"
        return ""

    def _images(self, indices: list[int]) -> tuple[Tensor, dict]:
        """Samples (n, C, H, W) in [-1, 1], and what the regularizer wants beside them."""
        batch = {name: tensor.to(self._device) for name, tensor in self._data.examples.__getitems__(indices).items()}
        original_samples = self._data.normalization.normalize(batch.pop("values"))
        if "condition" in batch:
            batch["condition"] = self._data.normalization.normalize(batch["condition"])
        return original_samples, term_context(self._term, {**batch, "original_samples": original_samples})

    def _values(self, x0_hat: Tensor, context: dict) -> Tensor:
        return checked_values(self._term, x0_hat.detach().requires_grad_(), context).detach()

    def _warn(self, text: str) -> None:
        warn(f"--regularizer {self._term.name}: {text}")


def _schedule(noise_scheduler) -> Tensor:
    steps = noise_scheduler.config.num_train_timesteps
    return torch.arange(1, steps + 1) if "shift" in noise_scheduler.config else torch.arange(steps)


def _spread(length: int, number: int) -> list[int]:
    """At most `number` indices, evenly from the whole data set."""
    return np.linspace(0, length - 1, min(number, length)).astype(int).tolist()


def _select(context: dict, index: int, batch_size: int) -> dict:
    """The context of one image."""
    return {
        name: value[index : index + 1] if isinstance(value, Tensor) and len(value) == batch_size else value
        for name, value in context.items()
    }


def _close(values: Tensor, others: Tensor) -> bool:
    """Equal but for rounding; what is not finite is judged elsewhere."""
    scale = torch.maximum(values.abs(), others.abs()).nan_to_num(posinf=0).max().item()
    return torch.allclose(values, others, rtol=0, atol=_TOLERANCE * scale + 1e-6, equal_nan=True)


def _said(values: Tensor) -> str:
    return " and ".join(f"{value:.4g}" for value in values.tolist())


def _named(name: str, network: nn.Module) -> str:
    kind = type(network).__name__
    return kind if name == kind else f"{name!r} ({kind})"


def _own_error(term: Term, error: Exception) -> UsageError:
    usage_error = UsageError(
        f"--regularizer {term.name} raised {type(error).__name__} on a batch of images: {error}"
        f" ({line_of_error(error)})"
    )
    usage_error.show_cause = True
    return usage_error


@contextlib.contextmanager
def random_numbers_as_before(device: torch.device) -> Iterator[None]:
    """Inside, random numbers may be drawn; afterwards the global generators are as they were."""
    state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else [], device_type=device.type):
        try:
            yield
        finally:
            random.setstate(state[0])
            np.random.set_state(state[1])


def _random_state(device: torch.device) -> list:
    """The states of all global generators, to be compared."""
    return [
        torch.get_rng_state(),
        *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else []),
        torch.from_numpy(np.random.get_state()[1].copy()),
        torch.tensor([np.random.get_state()[2]]),
        torch.tensor(random.getstate()[1]),
    ]


def _same(state: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(one, two) for one, two in zip(state, other, strict=True))
