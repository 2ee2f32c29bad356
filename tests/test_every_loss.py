"""What every public loss has to satisfy, from one table: a new loss fails here until it has a line in it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import transformers
from diffusers import DDPMScheduler
from torch import nn

from reg_diffusers import needs_of, regularizers
from reg_diffusers.regularizers import (
    Perceptual,
    PromptSimilarity,
    RadialSpectrum,
    Score,
    SelfPerceptual,
    high_frequency_energy,
    physics,
)

pytestmark = pytest.mark.loss

ANY = (1, 2, 3, 5)


@dataclass(frozen=True)
class Loss:
    """How a loss is called, and what its documentation promises.

    Attributes:
        of: the height and number of channels of the images -> the loss.
        channels: some of the numbers of channels that it accepts.
        size: height and width of the small images.
        half: L' at half the resolution over L' of the same smooth image; None where the documentation says why it
            belongs to one size. A spacing is that of the grid.
    """

    of: Callable
    channels: tuple[int, ...] = ANY
    size: int = 6
    half: float | None = 1.0


def built_in(name, **options):
    return lambda size, channels: partial(getattr(regularizers, name), **options)


def law(name, **options):
    """A law on a domain of the width 8, whatever the number of pixels."""
    return lambda size, channels: partial(getattr(physics, name), **options, spacing=8 / size)


def features(channels, kept):
    """A small network without a size of its own."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(channels, kept, 3), nn.Tanh()).double()


def classifier(channels):
    return nn.Sequential(features(channels, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3).double())


class ImagesAndText(nn.Module):
    """What a CLIPModel has, for one text."""

    device = "cpu"
    config = SimpleNamespace(
        vision_config=SimpleNamespace(image_size=24), text_config=SimpleNamespace(max_position_embeddings=4)
    )

    def __init__(self):
        super().__init__()
        self.classifier = classifier(3)

    def get_image_features(self, pixel_values, interpolate_pos_encoding):
        return self.classifier(pixel_values)

    def get_text_features(self, input_ids):
        return torch.tensor([[0.1, -0.2, 0.3]])


def tokens(text, **options):
    return transformers.BatchEncoding({"input_ids": torch.ones(1, 3)})


class Denoiser(nn.Module):
    """The part of a diffusion model that its features need."""

    def __init__(self, channels):
        super().__init__()
        self.mid_block = features(channels, 4)

    def forward(self, sample, timesteps):
        return self.mid_block(sample)


def of_the_model(size, channels):
    return SelfPerceptual(Denoiser(channels), DDPMScheduler())


PREPARED = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "size": {"height": 24, "width": 24}}
LOSSES = {
    "gradient_energy": Loss(built_in("gradient_energy"), half=4.0),
    "high_frequency_energy": Loss(  # the cutoff is relative to the highest frequency, which doubles
        lambda size, channels: partial(high_frequency_energy, cutoff=6 / size), half=1.0
    ),
    "isotropic_total_variation": Loss(built_in("isotropic_total_variation"), half=2.0),
    "laplacian_energy": Loss(built_in("laplacian_energy"), half=16.0),
    "mean_intensity": Loss(built_in("mean_intensity", target=0.7)),
    "near_background": Loss(built_in("near_background", gap=0.9)),
    "out_of_range": Loss(built_in("out_of_range", low=-0.1, high=0.2)),
    "radial_spectrum": Loss(
        lambda size, channels: partial(regularizers.radial_spectrum, target=[0.1, 0.2]), half=None
    ),
    "sparsity": Loss(built_in("sparsity", background=-3.0)),
    "spectrum": Loss(built_in("spectrum"), half=2.0),
    "ssim": Loss(built_in("ssim", window=5), half=None),
    "symmetry": Loss(built_in("symmetry")),
    "total_variation": Loss(built_in("total_variation"), half=2.0),
    "wavelet": Loss(built_in("wavelet", levels=1)),
    "physics.conservation": Loss(law("conservation", total=30.0)),
    "physics.curl": Loss(law("curl"), (2, 3)),
    "physics.darcy": Loss(law("darcy", source=0.3), (2, 3)),
    "physics.divergence": Loss(law("divergence"), (2, 3)),
    "physics.heat": Loss(law("heat"), (2, 3, 5)),
    "physics.laplace": Loss(law("laplace")),
    "physics.poisson": Loss(law("poisson", source=0.3)),
    "physics.unit_norm": Loss(lambda size, channels: physics.unit_norm),
    "Perceptual": Loss(lambda size, channels: Perceptual(features(3, 4), PREPARED), (1, 3)),
    "PromptSimilarity": Loss(
        lambda size, channels: PromptSimilarity(ImagesAndText(), tokens, PREPARED, "a cat"), (1, 3)
    ),
    "RadialSpectrum": Loss(lambda size, channels: RadialSpectrum([0.1, 0.2]), half=None),
    "Score": Loss(lambda size, channels: Score(classifier(3), 1, processor=PREPARED), (1, 3)),
    "SelfPerceptual": Loss(of_the_model, half=None),
}


def images(number, channels, size, seed=0):
    """Images in about [-1, 1], none of them on a kink of a loss."""
    return torch.randn(number, channels, size, size, generator=torch.Generator().manual_seed(seed)).double() / 2


def context(loss, originals):
    return {"original_samples": originals} if "original_samples" in needs_of(loss) else {}


def value(loss, x0_hat, originals):
    """L' with the same random numbers each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return loss(x0_hat, **context(loss, originals))


@pytest.fixture(params=LOSSES)
def case(request):
    return LOSSES[request.param]


def small(case, channels=None, number=2):
    channels = case.channels[-1] if channels is None else channels
    loss = case.of(case.size, channels)
    return loss, images(number, channels, case.size), images(number, channels, case.size, seed=1)


def test_the_table_has_every_loss():
    classes = {name for name in vars(regularizers) if isinstance(getattr(regularizers, name), type)}
    modules = classes - {"Regularizer", "Classifier"}  # the losses of a classifier are Perceptual and Score
    assert set(LOSSES) == {*regularizers.__all__, *(f"physics.{name}" for name in physics.__all__), *modules}


def test_its_gradient_in_double_precision_is_that_of_its_value(case):
    loss, x0_hat, originals = small(case, case.channels[0])
    assert torch.autograd.gradcheck(lambda x: value(loss, x, originals), x0_hat.requires_grad_())


def test_images_of_a_batch_do_not_meet(case):
    loss, x0_hat, originals = small(case, number=3)
    together = value(loss, x0_hat.requires_grad_(), originals)
    assert together.shape == (3,)
    for index in range(3):
        (gradient,) = torch.autograd.grad(together[index], x0_hat, retain_graph=True)
        assert gradient.flatten(1).abs().amax(1).bool().tolist() == [one == index for one in range(3)]
    changed = torch.cat([x0_hat[:1], images(2, x0_hat.shape[1], case.size, seed=2)])
    torch.testing.assert_close(value(loss, changed, originals)[0], together[0], rtol=1e-12, atol=0)


def test_it_takes_its_numbers_of_channels(case):
    for channels in case.channels:
        loss, x0_hat, originals = small(case, channels)
        (gradient,) = torch.autograd.grad(value(loss, x0_hat.requires_grad_(), originals).sum(), x0_hat)
        assert gradient.isfinite().all() and gradient.abs().sum() > 0


def test_half_precision_is_computed_in_single_precision(case):
    loss, x0_hat, originals = small(case)
    if isinstance(loss, nn.Module):
        loss.float()
    half = x0_hat.bfloat16().requires_grad_()
    found = value(loss, half, originals.bfloat16())
    (gradient,) = torch.autograd.grad(found.sum(), half)
    assert found.dtype == torch.float32 and gradient.dtype == torch.bfloat16 and gradient.isfinite().all()
    torch.testing.assert_close(found, value(loss, half.detach().float(), originals.bfloat16().float()))


@pytest.mark.parametrize("name", [name for name, case in LOSSES.items() if case.half is not None])
def test_a_finer_image_of_the_same_has_the_stated_value(name):
    case, channels = LOSSES[name], LOSSES[name].channels[-1]
    coarse, fine = (
        value(case.of(size, channels), smooth(size, channels), smooth(size, channels, phase=1.0)).item()
        for size in (48, 96)
    )
    assert coarse / fine == pytest.approx(case.half, rel=0.1)


def smooth(size, channels, phase=0.0):
    """The same periodic picture at any size: a slow wave and a faster one, shifted by channel; a mean of 0.3."""
    places = 2 * math.pi * (torch.arange(size).double() + 0.5) / size
    y, x = torch.meshgrid(places, places, indexing="ij")
    waves = [(x + phase + k).sin() / 3 + (4 * y + 3 * x + k).cos() / 5 + 0.3 for k in range(channels)]
    return torch.stack(waves)[None]
