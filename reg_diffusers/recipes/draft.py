r"""DRaFT-K and AlignProp: L' of the network's own samples, with the gradient of the last K sampling steps.

    L = weight mean L'(x_0),        x_0 = S_1(...S_N(x_T))

where S_i is one step of a sampler with the network, and x_T is noise. Steps before the last K run without gradient.

| method     | K                                                          |
|------------|------------------------------------------------------------|
| DRaFT      | all steps                                                  |
| DRaFT-K    | fixed, 1 in most experiments                               |
| AlignProp  | drawn anew at every step                                   |

Source: Clark et al. 2024 (arXiv:2309.17400), algorithm 1; Prabhudesai et al. 2023 (arXiv:2310.03739), sec. 4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..context import unwrap
from ..estimators import one_step
from ..loss_output import LossOutput
from ..precision import input_dtype
from ..prediction import output_for_step, scale_model_input, tensor_of
from ..regularization import X0Regularization
from ..term import Term
from ..weighting import constant

__all__ = ["Draft", "sampled"]


class Draft(nn.Module):
    """Samples with the network and returns L' of the samples; there is no denoising loss.

        loss_fn = Draft(DDIMScheduler(clip_sample=False), [Term(reward_loss, weight=1.0)], steps=50)
        loss_fn(unet, torch.randn(4, 3, 64, 64), last=1).loss.backward()

    The terms act on finished samples: their weighting and estimator are not used. Checks, non-finite images and views
    are handled as in `X0Regularization`.

    Args:
        sampler: a diffusers scheduler of its own for sampling. DDIM and others clip by default, which has no gradient
            outside [-1, 1]: set clip_sample=False.
        terms: the losses.
        steps: number N of sampling steps.
    """

    def __init__(self, sampler, terms: Iterable[Term], *, steps: int = 50):
        super().__init__()
        self.sampler, self.steps = sampler, steps
        self.regularization = X0Regularization(
            sampler, [replace(term, weighting=constant, estimator=one_step) for term in terms]
        )

    def forward(
        self,
        model: Callable,
        noise: Tensor,
        *,
        last: int = 1,
        model_kwargs: dict | None = None,
        generator: torch.Generator | None = None,
        **context,
    ) -> LossOutput:
        """Computes the loss of new samples.

        Args:
            model: the network, `(sample, timesteps, **model_kwargs)`; its own gradient checkpointing reduces the
                memory of `last` calls to about one.
            noise: (B, C, ...) x_T, standard normal.
            last: number K of steps with gradient.
            model_kwargs: further arguments of the network.
            generator: random generator of a stochastic sampler.
            **context: arguments in the regularizers' `needs`.

        Raises:
            ValueError: `last` is not between 1 and the number of steps.
        """
        if not 1 <= last <= self.steps:
            raise ValueError(f"last must be between 1 and the {self.steps} steps, not {last}")
        images = sampled(
            self.sampler, model, noise, self.steps, last=last, model_kwargs=model_kwargs, generator=generator
        )
        timesteps = self.sampler.timesteps[-1:].expand(len(images))
        return self.regularization(x0_hat=images, timesteps=timesteps, loss_weight=1.0, **context)


def sampled(
    sampler,
    model: Callable,
    noise: Tensor,
    steps: int,
    *,
    last: int = 0,
    model_kwargs: dict | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Samples with the network; the last `last` steps keep their graph.

    Args:
        sampler, model, noise, model_kwargs, generator: as for `Draft`.
        steps: number of sampling steps.
        last: number of steps with gradient; 0: none.

    Returns:
        (B, C, ...) samples, at least float32.
    """
    sampler.set_timesteps(steps)
    timesteps, options = sampler.timesteps, {} if generator is None else {"generator": generator}
    sample = noise.to(torch.promote_types(noise.dtype, torch.float32)) * getattr(sampler, "init_noise_sigma", 1.0)
    for place, timestep in enumerate(timesteps):
        is_last = place >= len(timesteps) - last
        with torch.set_grad_enabled(torch.is_grad_enabled() and is_last):
            model_input = scale_model_input(sampler, sample, timestep).to(input_dtype(model, sample))
            each = timestep.to(sample.device).expand(len(sample))
            output = tensor_of(model(model_input, each, **unwrap(model_kwargs or {}))).to(sample.dtype)
            sample = sampler.step(output_for_step(sampler, output, sample), timestep, sample, **options).prev_sample
    return sample
