"""Losses with a network that was trained on ImageNet: they see what people see in a photograph."""

import matplotlib
import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from real_weights import PROCESSOR, efficientnet

from reg_diffusers.regularizers import Perceptual, Score

pytestmark = pytest.mark.loss

MILITARY_UNIFORM = 652  # class of ImageNet


@pytest.fixture(scope="module")
def photograph():
    """Grace Hopper in her uniform, (1, 3, 224, 224) in [-1, 1]; comes with matplotlib."""
    with PIL.Image.open(f"{matplotlib.get_data_path()}/sample_data/grace_hopper.jpg") as picture:
        pixels = np.array(picture.convert("RGB").resize((224, 224), PIL.Image.Resampling.BICUBIC))
    return torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)[None].float()


def test_a_photograph_is_recognised_and_a_blurred_one_less(photograph):
    score = Score(efficientnet(classifies=True), MILITARY_UNIFORM, processor=PROCESSOR)
    values = [score(blurred(photograph, radius)).item() for radius in (0, 4, 16)]
    assert values[0] < 1 and values[0] + 0.5 < values[1] < values[2]


def test_blur_is_further_away_than_another_brightness_of_the_same_error(photograph):
    x = blurred(photograph, 2)
    error = (x - photograph).square().mean().sqrt()
    brighter = photograph + error
    assert (brighter - photograph).square().mean().sqrt().item() == pytest.approx(error.item(), rel=1e-4)
    loss = Perceptual(efficientnet(), PROCESSOR, layers=(2, 4, 7, 10))
    distances = [loss(image, original_samples=photograph).item() for image in (x, brighter)]
    assert distances == pytest.approx([0.196, 0.0068], rel=0.05)  # the numbers in docs/regularizers.md


def test_its_gradient_sharpens(photograph):
    """Steps along the gradient of the loss bring a blurred picture closer to the photograph, also in pixels."""
    loss = Perceptual(efficientnet(), PROCESSOR, layers=(2, 4))
    x = blurred(photograph, 1)
    before = (x - photograph).square().mean()
    for _ in range(5):
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(x, original_samples=photograph).sum(), x)
        x = x - 0.5 * (x - photograph).square().sum().sqrt().detach() / 10 * gradient / gradient.norm()
    assert (x - photograph).square().mean() < before


def blurred(images, radius):
    if radius == 0:
        return images
    padded = F.pad(images, (radius,) * 4, mode="replicate")
    return F.avg_pool2d(padded, 2 * radius + 1, stride=1)
