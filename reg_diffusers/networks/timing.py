"""Times a network in float32 and in another precision, because a processor that names bfloat16 may be slower in it."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn

from .attention import use_explicit_attention

__all__ = ["LEAST_BATCHES", "LEAST_GAIN", "PAIRS", "Timing", "time_precision"]

PAIRS = 5
LEAST_GAIN = 1.15  # below it, float32 stays: it needs no explanation
LEAST_BATCHES = 600  # a measurement costs about 12 batches: 2 % of so long a run
_LIMIT = 20.0  # seconds


@dataclass(frozen=True)
class Timing:
    """Times of a training step of the network, without the optimizer.

    Attributes:
        float32: median time in float32, in seconds.
        other: median time in the other precision, in seconds.
        gain: median over the pairs of float32's time divided by the other's.
        images: images per step.
    """

    float32: float
    other: float
    gain: float
    images: int

    @property
    def is_worth_it(self) -> bool:
        """Whether the other precision is at least `LEAST_GAIN` times as fast."""
        return self.gain >= LEAST_GAIN

    def __str__(self) -> str:
        times = f"{self.other:.3g} against {self.float32:.3g} s for {self.images} images"
        return f"{self.gain:.2f} x as fast as float32 in {PAIRS} interleaved pairs, {times}"


def time_precision(
    unet: nn.Module,
    call: Callable[[nn.Module, int], Tensor],
    *,
    dtype: torch.dtype,
    attention: str,
    batch_size: int,
    limit: float = _LIMIT,
) -> Timing | None:
    """Times forward and backward passes of copies of a network on the CPU, in float32 and in `dtype` by turns.

    Uses a batch as large as fits in the time, up to `batch_size`. The random state does not change.

    Args:
        unet: the network, in float32; it does not change.
        call: calls a network on that number of images, and returns its output.
        dtype: the other precision, by autocast.
        attention: the attention in that precision, "sdpa" or "explicit".
        batch_size: images per step of the training.
        limit: the longest time of the measurement, in seconds.

    Returns:
        The times; None if not even one image per step fits in the time.
    """
    start, random_state = time.perf_counter(), torch.get_rng_state()
    plain, other = copy.deepcopy(unet).train(), copy.deepcopy(unet).train()
    if attention == "explicit":
        use_explicit_attention(other)

    def pair(images: int) -> tuple[float, float]:
        return _time(plain, call, images, None), _time(other, call, images, dtype)

    try:
        pair(1)  # the first call of each builds its kernels
        left = limit - (time.perf_counter() - start)
        images = min(int(left / ((PAIRS + 1) * sum(pair(1)))), batch_size)
        if images < 1:
            return None
        pair(images)
        pairs = [pair(images) for _ in range(PAIRS)]
    finally:
        torch.set_rng_state(random_state)
    times = [median(column) for column in zip(*pairs, strict=True)]
    return Timing(*times, gain=median(one / another for one, another in pairs), images=images)


def _time(network: nn.Module, call: Callable[[nn.Module, int], Tensor], images: int, dtype: torch.dtype | None):
    network.zero_grad()
    start = time.perf_counter()
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        output = call(network, images)
    output.float().square().mean().backward()
    return time.perf_counter() - start
