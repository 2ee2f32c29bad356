"""The standard Frechet inception distance (FID), computed by torch-fidelity, an optional dependency."""

from __future__ import annotations

import torch
from torch import Tensor

from .images import Images

__all__ = ["check_inception", "inception_distance"]


def check_inception() -> None:
    """Checks that the Frechet inception distance can be computed on this machine.

    Raises:
        ImportError: if torch-fidelity or one of its dependencies is not installed; the message is one line.
    """
    try:
        import torch_fidelity  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"the Frechet inception distance needs torch-fidelity ({error}): pip install 'reg_diffusers[fid]' and"
            " the torchvision that matches your torch"
        ) from error


def inception_distance(samples: Tensor | Images, reference: Tensor | Images) -> float:
    """Computes the FID with the weights of the original TensorFlow network.

    torch-fidelity downloads the weights on first use. The FID is meant for thousands of photographs; on small or
    grayscale images it means little.

    Source: Heusel et al. 2017 (arXiv:1706.08500); Obukhov et al. 2020, torch-fidelity.

    Args:
        samples: (N, C, H, W) in [-1, 1], grayscale or RGB.
        reference: (M, C, H, W).

    Raises:
        ImportError: if torch-fidelity is not installed.
    """
    check_inception()
    import torch_fidelity

    found = torch_fidelity.calculate_metrics(
        input1=_Pictures(samples),
        input2=_Pictures(reference),
        cuda=samples[:1].is_cuda,
        fid=True,
        cache=False,
        verbose=False,
    )
    return float(found[torch_fidelity.KEY_METRIC_FID])


class _Pictures(torch.utils.data.Dataset):
    """Images in the format that torch-fidelity expects: (3, H, W) uint8."""

    def __init__(self, images: Tensor | Images):
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Tensor:
        image = ((self._images[index : index + 1][0].cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return image.expand(3, -1, -1) if len(image) == 1 else image
