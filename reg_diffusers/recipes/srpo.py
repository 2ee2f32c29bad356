r"""Direct-Align of SRPO: a reward on the image that a network's step and the known noise give back, at any t.

    x_s = step of the network from x_t to s,        x0_hat = (x_s - sigma_s eps) / alpha_s,        L = mean L'(x0_hat)

x_t = alpha x_0 + sigma eps is made of the network's own sample x_0 and known noise, so that x0_hat is sharp at every
noise level: it is (1 - k) x_0 + k E[x_0 | x_t], with k = (t - s) / (t (1 - s)) for flow matching. With s < t the
network denoises. With s > t, "inversion", k is negative, so a step that raises L' is undone: the reward is penalized.

Source: Shen et al. 2025 (arXiv:2509.06942), sec. 3.1.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..estimators import Prediction, one_step
from ..prediction import noise_level, step_to
from ..regularization import X0Regularization
from ..regularizers import Regularizer
from ..term import Term
from ..weighting import constant

__all__ = ["DirectAlign", "srpo"]


def srpo(scheduler, regularizer: Regularizer, step: float) -> X0Regularization:
    """Returns the loss of Direct-Align, without a denoising loss.

        loss_fn = srpo(scheduler, Score(reward, kind="reward", threshold=0.7), step=100.0)
        noisy = add_noise(scheduler, sampled, noise, timesteps)
        output = model(noisy, timesteps)
        loss_fn(output, timesteps, noisy, noise=noise, original_samples=sampled).loss.backward()

    Args:
        scheduler: the noise scheduler of the network.
        regularizer: L', such as what a reward lacks to a threshold, max(threshold - r, 0).
        step: t - s in the scheduler's unit of time; negative for inversion.
    """
    return X0Regularization(scheduler, [Term(regularizer, 1.0, constant, estimator=DirectAlign(step))])


@dataclass(frozen=True)
class DirectAlign:
    """Estimates x_0 by one deterministic step of the network from t to s = t - step, and the known noise there.

    Unlike `KnownNoise`, whose kappa is the same at all noise levels, the length of the step is.

    Attributes:
        step: t - s in the scheduler's unit of time, not 0.

    Raises:
        ValueError: the step is 0; when called, noise is missing, or s is outside the schedule.
    """

    step: float

    def __post_init__(self):
        if not abs(self.step) > 0:
            raise ValueError(f"step must not be {self.step}: without a step, x0_hat does not depend on the network")

    def __call__(self, prediction: Prediction) -> Tensor:
        """Estimates the image, (n, C, ...)."""
        if prediction.noise is None:
            raise ValueError("DirectAlign needs the noise in x_t: pass noise= to the loss")
        scheduler, end = prediction.scheduler, prediction.timesteps - self.step
        x0_hat = one_step(prediction)
        sample = step_to(scheduler, x0_hat, prediction.timesteps, prediction.sample, end)
        level = noise_level(scheduler, end)
        shape = (-1, *(1,) * (sample.ndim - 1))
        alpha, sigma = (part.to(sample).reshape(shape) for part in (level.alpha, level.sigma))
        return (sample - sigma * prediction.noise.to(sample)) / alpha
