r"""The meaning of a timestep for each noise scheduler: the (alpha, sigma) of x_t = alpha x_0 + sigma eps.

Schedulers use five different units of time, and their numbers look alike. Every timestep is therefore checked against
the range of its scheduler. If the value suggests another unit, the error names that unit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "FirstTimesteps",
    "alpha_sigma",
    "checked_timesteps",
    "has_fixed_levels",
    "is_affine",
    "is_edm",
    "is_variance_exploding",
    "prediction_type",
    "towards_image",
    "unit_of_time",
]

_PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "flow_prediction", "trigflow")
_EXACT_IN_BFLOAT16 = 256  # bfloat16 cannot represent every integer above this


def prediction_type(scheduler) -> str:
    """Returns what the network predicts: epsilon, sample, v_prediction, flow_prediction or trigflow, as in diffusers.

    Raises:
        ValueError: the scheduler's `prediction_type` is not supported, or the scheduler lacks the schedule for it.
    """
    declared = scheduler.config.get("prediction_type")
    if is_affine(scheduler):  # it has checked its own
        return declared
    if declared is None and hasattr(scheduler, "alphas_cumprod"):  # such as RePaint, which only predicts noise
        return "epsilon"
    if declared is None and "shift" in scheduler.config:  # flow-matching schedulers lack this entry
        return "flow_prediction"
    declared = {"original_sample": "sample"}.get(declared, declared)
    name = type(scheduler).__name__
    if declared not in _PREDICTION_TYPES:
        known = ", ".join(_PREDICTION_TYPES)
        raise ValueError(f"prediction_type={declared!r} of {name} is not supported; known: {known}")
    if declared == "flow_prediction" and not ("shift" in scheduler.config or scheduler.config.get("use_flow_sigmas")):
        raise ValueError(
            f"{name} has no flow-matching schedule: use FlowMatchEulerDiscreteScheduler, or use_flow_sigmas=True"
        )
    has_schedule = hasattr(scheduler, "alphas_cumprod") or is_edm(scheduler)
    if declared not in ("flow_prediction", "trigflow") and not has_schedule:
        raise ValueError(f"{name} is not supported: it has no alphas_cumprod")
    return declared


def checked_timesteps(scheduler, timesteps) -> Tensor:
    """Returns timesteps as a (B,) tensor after checking them against the scheduler's range.

    Values are checked on the CPU only: on an accelerator the check would have to wait for the device.

    Args:
        scheduler: a diffusers scheduler.
        timesteps: a number, a sequence, or a tensor of any shape.

    Raises:
        ValueError: the scheduler has no noise level for a timestep; the message names the likely cause.
    """
    timesteps = torch.as_tensor(timesteps)
    flat = timesteps if timesteps.ndim == 1 else timesteps.reshape(-1)
    if flat.dtype == torch.bool or flat.is_complex():
        raise ValueError(f"timesteps must be numbers, not {flat.dtype}")
    if flat.device.type != "cpu" or torch.compiler.is_compiling():
        return flat
    try:
        values = flat.tolist()
    except RuntimeError:  # values cannot be read under vmap
        return flat
    unit = unit_of_time(scheduler)
    low, high, is_whole = _range(scheduler, unit)
    if flat.is_floating_point():
        is_wrong = not all(low <= value <= high and not (is_whole and value % 1) for value in values)
        is_wrong = is_wrong or _is_fraction(flat, values, timesteps.ndim == 0, unit)
        is_wrong = is_wrong or (
            flat.dtype == torch.bfloat16 and is_whole and max(values, default=0) > _EXACT_IN_BFLOAT16
        )
    else:
        is_wrong = bool(values) and not (low <= min(values) and max(values) <= high)
    if is_wrong:
        _refuse(scheduler, flat, unit)
    return flat


class FirstTimesteps:
    """Checks the first timesteps of a run: one batch on an accelerator, divided ones on the CPU.

    On an accelerator a check waits for the device, and a timestep that a schedule lacks is a failed assertion of the
    device, which ends the process without naming it. So the first batch, and only that, is copied to the host.

    On the CPU all timesteps are checked; this detects those that were divided by the number of steps, across batches.
    A single timestep between 0 and 1 is valid in flow matching: about one in a thousand if sigma is drawn uniformly
    from [0, 1]. Two different ones before any timestep above 1 occur by chance in about one of a million runs, and are
    refused.
    """

    def __init__(self):
        self._done: set[str] = set()  # types of devices with nothing left to check
        self._fractions: set[float] = set()

    def check(self, scheduler, timesteps: Tensor) -> None:
        """Checks the timesteps of one batch: on an accelerator of the first, on the CPU until one is above 1.

        Raises:
            ValueError: on an accelerator, a timestep is out of the scheduler's range; on the CPU, this is the second
                different timestep between 0 and 1.
        """
        device = timesteps.device.type
        if device in self._done or torch.compiler.is_compiling():
            return
        if device != "cpu":
            if not (timesteps.is_meta or _is_captured(timesteps)):
                self._done.add(device)
                checked_timesteps(scheduler, timesteps.cpu())
            return
        unit = unit_of_time(scheduler)
        if unit not in ("flow", "interpolated") or (timesteps > 1).any():
            self._done.add(device)
            return
        self._fractions.update(value for value in timesteps.tolist() if 0 < value < 1)
        if len(self._fractions) > 1:
            _refuse(scheduler, torch.tensor(sorted(self._fractions), device="cpu"), unit)


def _is_captured(timesteps: Tensor) -> bool:
    """Whether operations are recorded in a CUDA graph, where copying to the host is an error."""
    return timesteps.is_cuda and torch.cuda.is_current_stream_capturing()


def alpha_sigma(scheduler, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (alpha, sigma), each (B,) on the device of `timesteps`, in the precision of the scheduler's tables."""
    if is_affine(scheduler):
        return scheduler.alpha_sigma(timesteps)
    kind = prediction_type(scheduler)
    if kind == "trigflow":  # in SCM, time is an angle: x_t = cos(t) x_0 + sin(t) eps
        angle = _real(timesteps)
        return angle.cos(), angle.sin()
    if is_edm(scheduler):  # timesteps are c_noise = log(sigma) / 4
        sigma = _scheduled_sigma(scheduler, timesteps, otherwise=(4 * _real(timesteps)).exp())
        return torch.ones_like(sigma), sigma
    if kind == "flow_prediction":
        sigma = _real(timesteps) / scheduler.config.num_train_timesteps
        if hasattr(scheduler, "alphas_cumprod"):  # DPM-Solver++ and UniPC round flow timesteps to integers
            sigma = _scheduled_sigma(scheduler, timesteps, otherwise=sigma)
        return 1 - sigma, sigma
    if hasattr(scheduler, "sigmas"):
        ratio = _scheduled_sigma(scheduler, timesteps, otherwise=_trained_sigma(scheduler, timesteps))
        if is_variance_exploding(scheduler):
            return torch.ones_like(ratio), ratio
        if getattr(scheduler, "num_inference_steps", None) is not None:
            alpha = 1 / (ratio**2 + 1) ** 0.5
            return alpha, ratio * alpha
    alpha_bar = _alpha_bar(scheduler, timesteps)
    return alpha_bar**0.5, (1 - alpha_bar) ** 0.5


def _real(timesteps: Tensor) -> Tensor:
    """Returns timesteps in float32, or float64 where they are float64."""
    return timesteps.to(torch.promote_types(timesteps.dtype, torch.float32))


def _alpha_bar(scheduler, timesteps: Tensor) -> Tensor:
    table = scheduler.alphas_cumprod.to(timesteps.device)
    index = timesteps.long()
    steps = getattr(scheduler, "num_inference_steps", None)
    if type(scheduler).__name__ == "DDIMInverseScheduler" and steps is not None:
        # `step` moves from the previous noise level to t, so its input sample is one step less noisy than t.
        index = (index - scheduler.config.num_train_timesteps // steps).clamp(max=len(table) - 1)
        return torch.where(index < 0, scheduler.initial_alpha_cumprod.to(table), table[index.clamp(min=0)])
    return table[index]


def _trained_sigma(scheduler, timesteps: Tensor) -> Tensor:
    """Returns sigma / alpha of the training schedule, log-linear between its integer timesteps."""
    if scheduler.config.get("timestep_type") == "continuous" and prediction_type(scheduler) == "v_prediction":
        return (4 * _real(timesteps)).exp()  # then Euler uses EDM's unit
    alpha_bar = scheduler.alphas_cumprod.to(timesteps.device, torch.float32)
    sigma = ((1 - alpha_bar) / alpha_bar) ** 0.5
    low = timesteps.float().floor().clamp(0, len(sigma) - 1)
    fraction = timesteps.float() - low
    low = low.long()
    high = (low + 1).clamp(max=len(sigma) - 1)
    return torch.where(fraction == 0, sigma[low], sigma[low] ** (1 - fraction) * sigma[high] ** fraction)


def _scheduled_sigma(scheduler, timesteps: Tensor, otherwise: Tensor) -> Tensor:
    """Returns the entry of `scheduler.sigmas` for each timestep of the sampling schedule, else `otherwise`."""
    if getattr(scheduler, "num_inference_steps", None) is None:
        return otherwise
    # Second-order solvers have inner evaluations at odd positions, where `sigmas` lists a different value.
    places = slice(None, None, getattr(scheduler, "order", 1))
    schedule = scheduler.timesteps[places].to(timesteps.device)
    sigmas = scheduler.sigmas[: len(scheduler.timesteps)][places].to(timesteps.device, torch.float32)
    same = timesteps[:, None] == schedule
    return torch.where(same.any(1), sigmas[same.int().argmax(1)], otherwise)


def towards_image(scheduler, timesteps: Tensor, fraction: float) -> Tensor:
    """Returns the timesteps at a fraction of the way from the image to each timestep: 0 is the image, 1 the timestep.

    Time is divided evenly, except for EDM, where sigma is.

    Args:
        scheduler: a diffusers scheduler, or an `AffineSchedule`.
        timesteps: (B,).
        fraction: above 0, at most 1.

    Raises:
        ValueError: the time of the clean image is unknown.
    """
    unit = unit_of_time(scheduler)
    if unit == "own":
        return scheduler.end + fraction * (timesteps - scheduler.end)
    if unit == "c_noise":
        return timesteps + math.log(fraction) / 4
    scaled = fraction * _real(timesteps)
    return scaled.round().long() if unit == "index" else scaled


def unit_of_time(scheduler) -> str:
    """Returns the unit of time: index, interpolated (index), flow (T sigma), c_noise (log(sigma) / 4), angle or own.

    "own" is that of an `AffineSchedule`, which may be any.
    """
    if is_affine(scheduler):
        return "own"
    kind = prediction_type(scheduler)
    if kind == "trigflow":
        return "angle"
    if is_edm(scheduler) or (scheduler.config.get("timestep_type") == "continuous" and kind == "v_prediction"):
        return "c_noise"
    if kind == "flow_prediction":
        return "flow"
    has_sigmas = hasattr(scheduler, "sigmas")
    is_sampling = getattr(scheduler, "num_inference_steps", None) is not None
    return "interpolated" if has_sigmas and (is_sampling or is_variance_exploding(scheduler)) else "index"


def _range(scheduler, unit: str) -> tuple[float, float, bool]:
    """Returns the lowest and highest timestep, with a margin for rounding, and whether they are integers."""
    if unit == "angle":
        return 0, math.pi / 2 + 1e-3, False
    if unit == "c_noise":
        return -math.inf, 3, False  # sigma = e^12: far above any schedule, but below typical indices and sigmas
    if unit == "flow":
        return 0, scheduler.config.num_train_timesteps * (1 + 1e-4), False
    if unit == "own":
        return -math.inf, math.inf, False
    last = len(scheduler.alphas_cumprod) - 1
    return (0, last, True) if unit == "index" else (0, last * (1 + 1e-6), False)


def _is_fraction(timesteps: Tensor, values: list[float], is_scalar: bool, unit: str) -> bool:
    """Whether timesteps are likely fractions of the schedule: in [0, 1], and a scalar or at least three distinct
    values.

    Three such values occur by chance in about 1 of 1e9 batches.
    """
    if unit not in ("flow", "interpolated") or not all(0 <= value <= 1 for value in values):
        return False
    distinct = set(values)
    return any(0 < value < 1 for value in values) and (is_scalar or len(distinct) > 2)


def _refuse(scheduler, timesteps: Tensor, unit: str) -> None:
    """Raises ValueError with the likely cause, unless all timesteps are in the scheduler's sampling schedule."""
    if getattr(scheduler, "num_inference_steps", None) is not None or unit in ("flow", "c_noise"):
        listed = scheduler.timesteps.to(timesteps)
        timesteps = timesteps[~torch.isin(timesteps, listed)]
        if len(timesteps) == 0:
            return
    name, count = type(scheduler).__name__, scheduler.config.get("num_train_timesteps", 1)
    counted = {
        "own": "numbers",
        "index": f"integers from 0 to {count - 1}",
        "interpolated": f"from 0 to {count - 1}",
        "flow": f"sigma times {count}, from 0 to {count}",
        "c_noise": "log(sigma) / 4",
        "angle": "the angle of the noise, from 0 to pi/2",
    }[unit]
    low, high = timesteps.min().item(), timesteps.max().item()
    got = f"{low:g}" if low == high else f"{low:g} to {high:g}"
    raise ValueError(f"timesteps {_cause(timesteps.double(), unit, count)}: {name} expects {counted}, got {got}")


def _cause(timesteps: Tensor, unit: str, count: int) -> str:
    """Describes what invalid timesteps look like."""
    low, high = timesteps.min().item(), timesteps.max().item()
    fractional = bool((timesteps % 1 != 0).any())
    if not (math.isfinite(low) and math.isfinite(high)):
        return "are non-finite"
    if unit == "c_noise":
        return "look like sigmas or indices"
    if unit == "angle":
        return "look like indices or sigmas" if low >= 0 else "are negative"
    if fractional and low >= 0 and high <= 1:
        return f"look divided by {count} (or are sigmas; multiply by {count})"
    if low < 0:
        return "are negative, as log(sigma) is" if fractional else "are negative"
    if unit == "index" and fractional:
        return "look like sigmas, or lie between the integers of the table (round them)"
    if unit == "index" and high < count:
        return "are in bfloat16, which rounds integers above 256 (keep them in int64 or float32)"
    if high == count:
        return "are counted from 1"
    return "are beyond the schedule, as from one with more steps (num_train_timesteps)"


def is_variance_exploding(scheduler) -> bool:
    """Whether `step` works on x_0 + sigma eps (Euler, Heun, LMS, K-diffusion) instead of alpha x_0 + sigma eps."""
    has_own_scale = hasattr(scheduler, "alphas_cumprod") and hasattr(scheduler, "sigmas")
    return has_own_scale and float(scheduler.init_noise_sigma) != 1.0


def has_fixed_levels(scheduler) -> bool:
    """Whether the noise level of a timestep is its entry in alphas_cumprod, whatever the sampling schedule."""
    return (
        not is_affine(scheduler)
        and unit_of_time(scheduler) == "index"
        and not hasattr(scheduler, "sigmas")
        and type(scheduler).__name__ != "DDIMInverseScheduler"
        and scheduler.alphas_cumprod.dtype == torch.float32
    )


def is_affine(scheduler) -> bool:
    """Whether this is an `AffineSchedule`, whose alpha and sigma are functions of time."""
    return hasattr(type(scheduler), "alpha_sigma")  # of the type: diffusers' own lookup in objects is slow


def is_edm(scheduler) -> bool:
    """Whether the scheduler uses the preconditioning of EDM (Karras et al. 2022)."""
    return hasattr(type(scheduler), "precondition_outputs")
