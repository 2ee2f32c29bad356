"""The structural similarity of x0_hat and its own image."""

from __future__ import annotations

from torch import Tensor

from .contract import at_least_float32

__all__ = ["ssim"]


def ssim(x0_hat: Tensor, /, *, original_samples: Tensor, window: int = 11) -> Tensor:
    r"""Structural dissimilarity: 1 - SSIM(x0_hat, original_samples). Paired.

    SSIM compares mean, variance and covariance within a Gaussian window of standard deviation 1.5, for images mapped
    from [-1, 1] to [0, 1], and averages over windows and channels. Zero only for the image itself. It weighs
    contrast and structure in flat regions more than a squared difference does. The windows have a fixed size in
    pixels, so at a higher resolution it looks at finer detail.

    Computed by pytorch-msssim. Gates as for `spectrum`.

    Source: Wang, Bovik, Sheikh & Simoncelli 2004.

    Args:
        x0_hat: (B, C, H, W) in about [-1, 1]; half precision is computed in float32.
        original_samples: (B, C, H, W), its own images.
        window: width of the window, odd and at most H and W.

    Returns:
        (B,), from 0 to 2, without unit.

    Raises:
        ValueError: the window is even or larger than the image.
    """
    from pytorch_msssim import ssim as similarity

    if window % 2 == 0 or window > min(x0_hat.shape[-2:]):
        raise ValueError(
            f"window must be odd and at most the size of the image, {min(x0_hat.shape[-2:])}, not {window}"
        )
    ours, theirs = ((at_least_float32(image) + 1) / 2 for image in (x0_hat, original_samples))
    return 1 - similarity(ours, theirs, data_range=1.0, size_average=False, win_size=window)


ssim.needs = ("original_samples",)
