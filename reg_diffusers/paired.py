"""Regularizers that compare x0_hat with the original image by a distance such as LPIPS."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from .regularizers.contract import refuse_another_size

__all__ = ["Paired"]


class Paired(nn.Module):
    """Makes a regularizer from a distance between two images, such as `lpips.LPIPS`.

        term = Term(Paired(lpips.LPIPS(net="vgg")), weight=0.1, view=DecodedImage(vae))

    The loss freezes the network and moves it to its device. x0_hat and original_samples are passed through the view of
    the term.

    Args:
        net: function or network `(x0_hat, original_samples) -> distances`, with one value per image: (B,), (B, 1) or
            (B, 1, 1, 1).

    Raises:
        TypeError: `net` is not callable.
    """

    needs = ("original_samples",)

    def __init__(self, net: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        if not callable(net):
            raise TypeError(f"Paired needs a function of two images, such as lpips.LPIPS(), not {type(net).__name__}")
        self.net = net
        self.__name__ = getattr(net, "__name__", type(net).__name__)

    def forward(self, x0_hat: Tensor, /, *, original_samples: Tensor) -> Tensor:
        """Computes the distance of each image, (B,).

        Raises:
            ValueError: `net` does not return one value per image, or the images have another size than x0_hat.
        """
        refuse_another_size(x0_hat, original_samples)
        distances = self.net(x0_hat, original_samples)
        if distances.numel() != len(x0_hat):
            raise ValueError(
                f"{self.__name__} returned a tensor of shape {tuple(distances.shape)} for {len(x0_hat)} images: one"
                " value per image is needed (reduction='none', or spatial=False for LPIPS)"
            )
        return distances.reshape(len(x0_hat))
