r"""PixelGen: a network that predicts the image, with the loss of the velocity and two perceptual losses.

    L = |x_0 - x0_hat|^2 / max(1 - t, 0.05)^2  +  r (0.1 mean_{t >= 0.3} LPIPS + 0.01 mean_{t >= 0.3} P-DINO)

x_t = t x_0 + (1 - t) eps: the first term is the squared error of the velocity (x0_hat - x_t) / (1 - t), and t >= 0.3
means SNR >= (0.3 / 0.7)^2 = 0.184. Means are over the images that take part. P-DINO is 1 - cosine, averaged over the
patches of a frozen network. r is 1, or found by `LastLayerRatio`.

Source: Ma et al. 2026 (arXiv:2602.02493), sec. 3; r is in the authors' code only. Their trainer also aligns inner
features with those of DINOv2 (REPA, weight 0.5), which is a loss on the network and not on x0_hat: it is left out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..affine_schedule import AffineSchedule
from ..loss_output import LossOutput
from ..objective import RegularizedLoss
from ..paired import Paired
from ..term import Term
from ..weighting import gated

__all__ = ["LastLayerRatio", "pixelgen"]

_SMALLEST_TIME = 0.05  # of 1 - t in the velocity
_GATE = (0.3 / 0.7) ** 2


def pixelgen(
    lpips: Callable[[Tensor, Tensor], Tensor],
    dino: Callable[..., Tensor],
    *,
    lpips_weight: float = 0.1,
    dino_weight: float = 0.01,
    min_snr: float = _GATE,
) -> RegularizedLoss:
    """Returns the objective of PixelGen with r = 1.

        loss_fn = pixelgen(lpips.LPIPS(net="vgg"), Perceptual.from_pretrained("facebook/dinov2-base"))
        times = torch.sigmoid(0.8 * torch.randn(len(images)) - 0.8)
        loss_fn(model, images, timesteps=times).loss.backward()

    Args:
        lpips: distance of two batches of images in [-1, 1], -> one value per image.
        dino: a paired regularizer, mean over patches of 1 - cosine, such as `Perceptual`.
        lpips_weight: factor of the first.
        dino_weight: factor of the second.
        min_snr: the smallest SNR with perceptual losses.
    """
    schedule = AffineSchedule(
        lambda t: t, lambda t: 1 - t, "sample", denoising_weight=lambda t: (1 - t).clamp(min=_SMALLEST_TIME) ** -2
    )
    gate = gated(min_snr)
    terms = [
        Term(Paired(lpips), lpips_weight, gate, "lpips", normalize="active"),
        Term(dino, dino_weight, gate, "p_dino", normalize="active"),
    ]
    return RegularizedLoss(schedule, terms)


class LastLayerRatio(nn.Module):
    """Balances the denoising loss and the terms by their gradients with respect to one weight, the last layer's.

        ratio = LastLayerRatio(start=400_000)
        ratio(loss_fn(model, images, timesteps=times), model.final_layer.linear.weight).backward()

    r starts at 1. From call `start` on, at every 50th call, with d and g the gradients of the denoising loss and of
    the weighted sum of the terms,

        r <- 0.8 r + 0.2 min(|d| / (|g| + 1e-4), 100).

    A measurement costs two backward passes as far as that weight; a non-finite one is ignored. Each process measures
    its own batch. r and the number of calls are in the state_dict.

    Args:
        start: first call with a measurement.
        every: calls between measurements.
    """

    def __init__(self, start: int = 400_000, every: int = 50):
        super().__init__()
        self.start, self.every = start, every
        self.register_buffer("ratio", torch.ones(()))
        self._calls = 0

    def forward(self, output: LossOutput, last_layer: Tensor) -> Tensor:
        """Returns the loss, a scalar to call `backward` on: denoising + r sum of weight * term."""
        denoising = output.terms["denoising"]
        extra = sum(output.weights[name] * term for name, term in output.terms.items() if name != "denoising")
        if self.training and extra.requires_grad:
            if self._calls >= self.start and self._calls % self.every == 0:
                norms = [_norm_of_gradient(part, last_layer) for part in (denoising, extra)]
                measured = (norms[0] / (norms[1] + 1e-4)).clamp(max=100).to(self.ratio)
                self.ratio.copy_(torch.where(measured.isfinite(), self.ratio.lerp(measured, 0.2), self.ratio))
            self._calls += 1
        return denoising + self.ratio.clone() * extra

    def get_extra_state(self) -> int:
        return self._calls

    def set_extra_state(self, state: int) -> None:
        self._calls = state


def _norm_of_gradient(part: Tensor, weight: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(part, weight, retain_graph=True)
    return gradient.norm()
