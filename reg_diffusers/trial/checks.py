"""Startup checks: tries each term of the loss on real images, before the first step and within a second.

It is an error if a regularizer makes the training wrong: no gradient, a shape other than (B,), non-finite values,
values that depend on other images of the batch, or networks that change. A possible fault is a warning, one line on
stderr.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from ..context import cut
from ..data.training_data import TrainingData
from ..estimators import Prediction, calls_model, one_step
from ..networks.conditions import Conditions
from ..objective import X0Regularization
from ..prediction import add_noise, prediction_target
from ..regularizers.contract import is_built_in
from ..runtime.errors import UsageError, warn
from ..shown import checked_estimate
from ..term import Term, TermError, checked_values, checked_weights, term_context, viewed
from .members import checksums, find_networks
from .tracing import Trace, line_of_error

__all__ = ["OnData", "check_terms", "random_numbers_as_before"]

_IMAGES_TRIED = 2
_IMAGES_MEASURED = 64
_IMAGES_AT_A_TIME = 16
_SECONDS = 0.4  # of measuring, in total for all terms: a large network sees fewer images
_TOLERANCE = 1e-3  # relative: the algorithm and order of summation may depend on the batch size


@dataclass(frozen=True)
class OnData:
    """L' of one term on images of the data set.

    Attributes:
        mean: mean over the images.
        standard_deviation: standard deviation over the images, 0 for a single one.
        images: number of images.
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
    """Tries each regularizer on real images and each weighting on the whole schedule; returns L' on the data, by name.

    The global random generators are left unchanged, because the training draws from them.

    Args:
        terms: terms of the loss.
        noise_scheduler: scheduler of the training.
        data: data with at least one image.
        device: device of the training; the networks of the regularizers are moved to it, as in the training.
        mixed_precision: precision of the training, "no", "fp16" or "bf16".

    Raises:
        UsageError: a regularizer raises, does not return a tensor (B,) with a gradient, is non-finite on the data,
            depends on other images of the batch, or contains a network that changes; or a weighting is non-finite.
    """
    device, dtype = torch.device(device), {"fp16": torch.float16, "bf16": torch.bfloat16}.get(mixed_precision)
    on_data = {}
    with random_numbers_as_before(device), torch.autocast(device.type, dtype, enabled=dtype is not None):
        for term in terms:
            try:
                trial = _Trial(term, noise_scheduler, data, device)
                on_data[term.name] = trial.run(_SECONDS / len(terms))
            except UsageError:  # an error in the data
                raise
            except TermError as error:
                raise UsageError(f"--regularizer {term.name}: {error}") from error
            except Exception as error:
                raise _own_error(term, error, data) from error
    return on_data


class _Trial:
    """Tries one term on images of the data, and on the same with noise, which has no special values."""

    def __init__(self, term: Term, noise_scheduler, data: TrainingData, device: torch.device):
        # Only the regularizer is tried: another estimator may need the network, which is not trained yet.
        self._term, self._noise_scheduler = replace(term, estimator=one_step), noise_scheduler
        self._estimator = one_step if calls_model(term.estimator) else term.estimator
        self._data, self._device = data, device
        # Freezes and moves networks, as the training does.
        self._regularization = X0Regularization(noise_scheduler, [self._term]).to(device)
        self._networks = find_networks(term.regularizer)

    def run(self, seconds: float) -> OnData:
        checked_weights(self._term, self._regularization.noise_level(_schedule(self._noise_scheduler)))
        before = {name: checksums(network) for name, network in self._networks.items()}
        images, context = self._images(_spread(len(self._data.examples), _IMAGES_TRIED))
        noisy = images + torch.randn(images.shape, generator=torch.Generator().manual_seed(0)).to(images)
        checked_estimate(self._estimator, self._prediction(images))
        self._check_gradient(images, noisy, context)
        self._check_precision(noisy, context)
        if self._check_repetition(noisy, context):
            self._check_independence(noisy, context)
        on_data = self._measure(seconds)
        self._check_networks(before)
        return on_data

    def _check_gradient(self, images: Tensor, noisy: Tensor, context: dict) -> None:
        """Checks that the gradient reaches the output of a network, for exact and for noisy estimates of the image."""
        on_images, gradient_on_images = self._gradient(images, context)
        on_noisy, gradient_on_noisy = self._gradient(noisy, context)
        without = (
            "is not finite on {}; such images are trained without it: look for a root, logarithm or division at 0 or"
            " below"
        )
        if on_images.isfinite().all() and not gradient_on_images.isfinite().all():
            self._warn(f"its gradient {without.format('images of the data')}")
        elif not (on_noisy.isfinite().all() and gradient_on_noisy.isfinite().all()):
            self._warn(f"it or its gradient {without.format('noisy images')}")
        elif not (gradient_on_images.any() or gradient_on_noisy.any()):
            self._warn("its gradient is 0 on all images tried: the network cannot learn from it")

    def _gradient(self, x0_hat: Tensor, context: dict) -> tuple[Tensor, Tensor]:
        """Computes L' (B,), and its gradient (B, C, H, W) with respect to the model output that implies x0_hat."""
        prediction = self._prediction(x0_hat)
        model_output = prediction.model_output
        seen = viewed(self._term, one_step(prediction))
        try:
            values = checked_values(self._term, seen, context, compare=True)
        except TermError as error:
            raise TermError(f"{error}{self._cut(seen, context)}") from error
        values.sum().backward()
        gradient = torch.zeros_like(model_output) if model_output.grad is None else model_output.grad
        return values.detach(), gradient

    def _prediction(self, x0_hat: Tensor) -> Prediction:
        """Returns a prediction that implies x0_hat, (B, C, H, W); its model output is a leaf."""
        timesteps = torch.ones(len(x0_hat), dtype=torch.long)
        noise = torch.randn(x0_hat.shape, generator=torch.Generator().manual_seed(1)).to(x0_hat)
        sample = add_noise(self._noise_scheduler, x0_hat, noise, timesteps)
        model_output = prediction_target(self._noise_scheduler, x0_hat, noise, timesteps).clone().requires_grad_()
        return Prediction(self._noise_scheduler, model_output, timesteps, sample, noise=noise, original_samples=x0_hat)

    def _cut(self, seen: Tensor, context: dict) -> str:
        """Describes what cuts the gradient, if the result of the regularizer has none."""
        with Trace() as trace, torch.autocast(seen.device.type, enabled=False):
            values = self._term.regularizer(seen, **context)
        attached = isinstance(values, Tensor) and values.requires_grad
        return "" if attached or trace.cut is None else f". It is cut off by {trace.cut}"

    def _check_precision(self, x0_hat: Tensor, context: dict) -> None:
        seen = viewed(self._term, x0_hat)  # not traced: a decoder may compute in half precision
        with contextlib.suppress(Exception), Trace() as trace:  # code may fail only while it is traced
            checked_values(self._term, seen, context)
            if trace.half:
                self._warn(f"it computes in {trace.half}; compute L' and its gradient in float32")

    def _check_repetition(self, x0_hat: Tensor, context: dict) -> bool:
        """Checks that the same images have the same values again, without random numbers; returns whether they do."""
        _draw_one_of_each(self._device)  # earlier calls may have left the state of a fresh seed
        states, values = [_random_state(self._device)], []
        for _ in range(2):
            values.append(self._values(x0_hat, context))
            states.append(_random_state(self._device))
        draws, differs = not _same(states[0], states[2]), not _close(*values)
        if not (draws or differs):
            return True
        if draws and _same(states[1], states[2]):
            raise TermError(
                "it seeds the global random numbers, so every step would have the same noise and timesteps: draw from"
                " a torch.Generator of its own instead of calling torch.manual_seed"
            )
        reason = (
            "it draws random numbers"
            if draws
            else "it keeps a state, or draws random numbers from a generator of its own"
        )
        if random_layers := self._in_training_mode(nn.modules.dropout._DropoutNd):
            reason = f"it draws random numbers, because of {random_layers}: call .eval() on it"
        change = f": its values for the same images change from {_shown(values[0])} to {_shown(values[1])}"
        rest = "" if draws else "; a resumed run will differ from an uninterrupted one"
        self._warn(f"{reason}{change if differs else ''}{rest}")
        return False

    def _check_independence(self, x0_hat: Tensor, context: dict) -> None:
        together = self._values(x0_hat, context)
        alone = torch.cat(
            [self._values(x0_hat[i : i + 1], cut(context, torch.tensor([i]), len(x0_hat))) for i in range(len(x0_hat))]
        )
        if _close(together, alone):
            return
        layers = self._in_training_mode(nn.modules.batchnorm._BatchNorm)
        reason = f"because of {layers}: call .eval() on it" if layers else "average over all dimensions but the first"
        raise TermError(
            f"the value of an image depends on the other images of the batch: {_shown(alone)} alone,"
            f" {_shown(together)} together; {reason}"
        )

    def _measure(self, seconds: float) -> OnData:
        """Computes L' of images spread over the data; fewer images if that takes long."""
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
        """Checks that the networks have not changed, and warns of those that could change in the training."""
        for name, network in self._networks.items():
            now = checksums(network)
            if changed := [key for key, value in before[name].items() if now[key] != value]:
                raise TermError(
                    f"its network {_named(name, network)} changes when it is called ({', '.join(changed[:3])}): call"
                    " .eval() on it, and do not modify it in the loss"
                )
            missing = [".eval()"] if any(module.training for module in network.modules()) else []
            missing += [".requires_grad_(False)"] if any(p.requires_grad for p in network.parameters()) else []
            if missing:
                self._warn(f"its network {_named(name, network)} is not frozen: call {''.join(missing)} on it")

    def _in_training_mode(self, kind: type) -> str:
        """Names a network with a layer of a kind in training mode, and the type of the layer; "" if there is none."""
        for name, network in self._networks.items():
            for module in network.modules():
                if isinstance(module, kind) and module.training:
                    return f"{type(module).__name__} in training mode in its network {_named(name, network)}"
        return ""

    def _images(self, indices: list[int]) -> tuple[Tensor, dict]:
        """Returns images (n, C, H, W) in [-1, 1], and the arguments that the regularizer needs."""
        batch = send_to_device(self._data.examples.__getitems__(indices), self._device)
        original_samples = self._data.normalization.normalize(batch.pop("values"))
        conditions = Conditions.of_batch(self._data, batch)
        columns = batch.get("columns", {})
        original_images = columns.get("original_images")
        original_images = viewed(self._term, original_samples) if original_images is None else original_images
        seen = {"original_samples": original_images, "noise": torch.randn_like(original_samples)}
        seen["timesteps"] = torch.ones(len(original_samples), dtype=torch.long)
        return original_samples, term_context(self._term, {**batch, **conditions, **columns, **seen})

    def _values(self, x0_hat: Tensor, context: dict) -> Tensor:
        seen = viewed(self._term, x0_hat.detach().requires_grad_())
        return checked_values(self._term, seen, context).detach()

    def _warn(self, text: str) -> None:
        warn(f"--regularizer {self._term.name}: {text}")


def _schedule(noise_scheduler) -> Tensor:
    steps = noise_scheduler.config.num_train_timesteps
    return torch.arange(1, steps + 1) if "shift" in noise_scheduler.config else torch.arange(steps)


def _spread(length: int, number: int) -> list[int]:
    """Returns at most `number` indices, evenly spaced over the data set."""
    return np.linspace(0, length - 1, min(number, length)).astype(int).tolist()


def _close(values: Tensor, others: Tensor) -> bool:
    """Returns whether values are equal up to rounding. Non-finite values are checked elsewhere."""
    scale = torch.maximum(values.abs(), others.abs()).nan_to_num(posinf=0).max().item()
    return torch.allclose(values, others, rtol=0, atol=_TOLERANCE * scale + 1e-6, equal_nan=True)


def _shown(values: Tensor) -> str:
    return " and ".join(f"{value:.4g}" for value in values.tolist())


def _named(name: str, network: nn.Module) -> str:
    kind = type(network).__name__
    return kind if name == kind else f"{name!r} ({kind})"


def _own_error(term: Term, error: Exception, data: TrainingData) -> UsageError:
    if isinstance(error, ValueError) and is_built_in(term.regularizer):
        return UsageError(f"--regularizer {term.name}: {error}")
    columns = [str(column) for column in data.columns if column.name in term.needs]
    usage_error = UsageError(
        f"--regularizer {term.name} raised {type(error).__name__} on a batch of images: {error}"
        f" ({line_of_error(error)}){'; the data give it ' if columns else ''}{'; '.join(columns)}"
    )
    usage_error.show_cause = True
    return usage_error


@contextlib.contextmanager
def random_numbers_as_before(device: torch.device) -> Iterator[None]:
    """Restores the global random generators at the end of the block."""
    state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else [], device_type=device.type):
        try:
            yield
        finally:
            random.setstate(state[0])
            np.random.set_state(state[1])


def _draw_one_of_each(device: torch.device) -> None:
    random.random(), np.random.rand(), torch.rand(1)
    if device.type == "cuda":
        torch.rand(1, device=device)


def _random_state(device: torch.device) -> list:
    """Returns the states of all global random generators, for comparison."""
    return [
        torch.get_rng_state(),
        *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else []),
        torch.from_numpy(np.random.get_state()[1].copy()),
        torch.tensor([np.random.get_state()[2]]),
        torch.tensor(random.getstate()[1]),
    ]


def _same(state: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(one, two) for one, two in zip(state, other, strict=True))
