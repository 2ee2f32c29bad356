r"""Physics-based flow matching: the residual of a law at the end of the trajectory, without a weight to tune.

    L = |o - (x_0 - eps)|^2  and  t^p |R(x1)|^2,        t = 1 - sigma,

where x1 is the end of Euler's method with n steps from x_t. The gradients of both losses are combined by ConFIG.

Source: Baldan et al. 2025 (arXiv:2506.08604), sec. 3. Squares are means over values, as in the authors' code.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..affine_schedule import AffineSchedule
from ..estimators import Ddim, one_step
from ..objective import RegularizedLoss
from ..regularizers import equality
from ..term import Term
from ..weighting import signal_power

__all__ = ["pbfm", "straight_path"]


def pbfm(scheduler, residual: Callable[..., Tensor], *, power: float = 1.0, steps: int = 1) -> RegularizedLoss:
    """Returns the two losses of PBFM. `conflict_free.backward` combines their gradients.

        loss_fn = pbfm(straight_path(), residual, steps=4)
        output = loss_fn(model, fields, timesteps=torch.rand(len(fields)))
        conflict_free.backward(output, model.parameters())

    Args:
        scheduler: a flow-matching scheduler of diffusers, or `straight_path()`.
        residual: R, fields (n, C, ...) -> (n, ...), 0 where the law holds; in the units of the data.
        power: p in t^p.
        steps: number n of Euler steps, one network call each. The paper raises it from 1 to 4 during training.

    Raises:
        ValueError: steps is below 1.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    estimator = one_step if steps == 1 else Ddim(steps - 1, gradient="all")
    term = Term(equality(residual), 1.0, signal_power(power), name="residual", estimator=estimator)
    return RegularizedLoss(scheduler, [term])


def straight_path() -> AffineSchedule:
    """Returns x_t = t x_0 + (1 - t) eps with the velocity x_0 - eps as output: time 1 is the image, as in PBFM."""
    return AffineSchedule(lambda t: t, lambda t: 1 - t, "flow_prediction", sign=-1)
