"""The losses of the gallery in docs/regularizers.md: on which data, with which weight and gate.

Pictures are those that ship with the package, 16 x 16 in [-1, 1]. Fields are made here and satisfy their law exactly,
except for Darcy's, whose discrete equation has a solution up to its residual only. A network sees fields of standard
deviation 1, and a view restores the units.
"""

import functools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from reg_diffusers import regularizers, weighting
from reg_diffusers.data.training_data import load_training_data
from reg_diffusers.regularizers import Perceptual, RadialSpectrum, Score, SelfPerceptual, physics
from reg_diffusers.regularizers.stencils import difference, laplacian
from reg_diffusers.settings import DataSettings
from reg_diffusers.views import Affine

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
import real_weights

SIZE, FIELDS = 16, 2000
PAIRED = weighting.gated(0.2)


@dataclass(frozen=True)
class Data:
    """Images (N, C, 16, 16) as a network sees them, with what turns them into the units of the loss.

    `padding` is how they go on beyond their border, for a network.
    """

    samples: Tensor
    units: Affine | None = None
    padding: str = "zeros"
    labels: Tensor | None = None


@dataclass(frozen=True)
class Case:
    """A loss of the gallery.

    Attributes:
        data: name of a function of this module that returns `Data`.
        prediction: what the network predicts. Stopped this early, one that predicts the velocity makes noisy samples,
            and one that predicts the image makes blurred ones: the error that the loss is for.
        weight: lambda.
        make: data and plain model -> regularizer.
        gate: the weighting.
        diagnosed: number of images for the diagnosis, fewer for a large network.
        residual: images in the units of the loss -> map (N, H, W) to show beneath them; None for pictures.
    """

    data: str
    prediction: str
    weight: float
    make: Callable
    gate: Callable = weighting.matched
    diagnosed: int = 1000
    residual: Callable | None = None


# Data


@functools.cache
def pictures() -> Data:
    data = load_training_data(DataSettings(resolution=SIZE))
    found = data.examples.__getitems__(list(range(len(data))))
    labelled = load_training_data(DataSettings(resolution=SIZE, class_conditional=True))
    return Data(data.normalization.normalize(found["values"]), labels=labels_of(labelled))


def labels_of(data) -> Tensor:
    return torch.as_tensor(data.examples.__getitems__(list(range(len(data))))["class_labels"])


def smooth(*shape: int, seed: int = 0, roughness: float = 2.0) -> Tensor:
    """Random periodic fields with a spectrum that falls, of standard deviation 1, without a mean."""
    noise = torch.randn(*shape, SIZE, SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    f = torch.fft.fftfreq(SIZE, d=1 / SIZE)
    fall = 1 / (1 + (f[:, None] ** 2 + f**2) / roughness**2) ** 1.5
    fall[0, 0] = 0
    fields = torch.fft.ifft2(torch.fft.fft2(noise) * fall).real
    return fields / fields.std()


def in_units(fields: Tensor, padding: str = "circular") -> Data:
    """Fields in their own units, scaled by channel for the network."""
    scale, offset = fields.std((0, 2, 3)), fields.mean((0, 2, 3))
    samples = (fields - offset[:, None, None]) / scale[:, None, None]
    return Data(samples.float(), Affine(tuple(scale.tolist()), tuple(offset.tolist())), padding)


@functools.cache
def flow() -> Data:
    """Fields without divergence, from a stream function."""
    stream = smooth(FIELDS)
    return in_units(torch.stack([difference(stream, -2), -difference(stream, -1)], 1))


@functools.cache
def gradient_flow() -> Data:
    """Fields without curl, from a potential."""
    potential = smooth(FIELDS)
    return in_units(torch.stack([difference(potential, -1), difference(potential, -2)], 1))


@functools.cache
def potentials() -> Data:
    return in_units(smooth(FIELDS, 1))


@functools.cache
def potentials_and_sources() -> Data:
    potential = smooth(FIELDS, 1)
    return in_units(torch.cat([potential, laplacian(potential)], 1))


WELLS = torch.zeros(SIZE, SIZE)  # inflow in one corner, outflow in the opposite one
WELLS[1:4, 1:4], WELLS[-4:-1, -4:-1] = 0.1, -0.1


@functools.cache
def pressures_and_permeabilities() -> Data:
    """Pressure between two wells in a random ground, with no flow through the walls."""
    permeability = (0.7 * smooth(FIELDS, seed=1)).exp()
    units = torch.eye(SIZE**2, dtype=torch.float64).reshape(-1, SIZE, SIZE)  # the operator's columns, one by one
    grid = {"boundary": "neumann"}
    bends, slopes = laplacian(units, **grid), [difference(units, dim, **grid) for dim in (-1, -2)]
    found = []
    for ground in permeability:
        columns = ground * bends
        for dim, slope in zip((-1, -2), slopes, strict=True):
            columns = columns + difference(ground, dim, **grid) * slope
        matrix = torch.cat([columns.flatten(1).T, torch.ones(1, SIZE**2)])  # the last row: a mean of 0
        right = torch.cat([-WELLS.double().flatten(), torch.zeros(1)])
        found.append(torch.linalg.lstsq(matrix, right[:, None]).solution.reshape(SIZE, SIZE))
    return in_units(torch.stack([torch.stack(found), permeability], 1), "replicate")


DIFFUSIVITY = 0.5


@functools.cache
def cooling() -> Data:
    """Temperatures at three times, each the Crank-Nicolson step of the one before."""
    f = torch.fft.fftfreq(SIZE, d=1 / SIZE)
    eigenvalue = DIFFUSIVITY * (2 * torch.cos(2 * math.pi * f / SIZE) - 2)
    eigenvalue = eigenvalue[:, None] + eigenvalue
    times = [smooth(FIELDS, seed=2, roughness=4.0)]
    for _ in range(2):
        step = torch.fft.fft2(times[-1]) * (1 + eigenvalue / 2) / (1 - eigenvalue / 2)
        times.append(torch.fft.ifft2(step).real)
    scale = times[0].std()  # the same for all times
    return Data((torch.stack(times, 1) / scale).float(), Affine(scale.item(), 0.0), "circular")


@functools.cache
def densities() -> Data:
    """Positive fields with the same total, 256."""
    density = (0.7 * smooth(FIELDS, 1, seed=3)).exp()
    return in_units(density / density.mean((2, 3), keepdim=True))


@functools.cache
def directions() -> Data:
    angle = math.pi / 2 * smooth(FIELDS, seed=4)
    return in_units(torch.stack([angle.cos(), angle.sin()], 1))


# Losses


def poisson(x0_hat, /):
    """Poisson's equation between channel 0, the potential, and channel 1, its source."""
    return physics.poisson(x0_hat[:, :1], source=x0_hat[:, 1:])


def darcy_residual(fields):
    pressure, ground = fields.unbind(1)
    flow = ground * laplacian(pressure, boundary="neumann")
    for dim in (-1, -2):
        flow = flow + difference(ground, dim, boundary="neumann") * difference(pressure, dim, boundary="neumann")
    return flow + WELLS


def heat_residual(fields):
    change, middle = fields.diff(dim=1), (fields[:, 1:] + fields[:, :-1]) / 2
    return (change - DIFFUSIVITY * laplacian(middle)).square().mean(1).sqrt()


def classifier(data: Data):
    """A small network that knows the classes of the pictures."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 16, 3, stride=2), torch.nn.SiLU(), torch.nn.Flatten(), torch.nn.Linear(16 * 49, 10)
    )
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    for _ in range(600):
        chosen = torch.randint(len(data.samples), (64,))
        loss = torch.nn.functional.cross_entropy(net(data.samples[chosen]), data.labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net


def efficientnet():
    """EfficientNet-Lite0 with ImageNet's weights, up to its fifth block, and the numbers of its processor."""
    net = real_weights.efficientnet()
    net._blocks = net._blocks[:5]
    return net, real_weights.PROCESSOR


def simple(function, **options):
    """A built-in loss without a network."""
    return lambda data, model, scheduler: partial(function, **options) if options else function


NOISY, BLURRED = "v_prediction", "sample"
CASES = {
    "total_variation": Case("pictures", NOISY, 0.2, simple(regularizers.total_variation)),
    "isotropic_total_variation": Case("pictures", NOISY, 0.2, simple(regularizers.isotropic_total_variation)),
    "gradient_energy": Case("pictures", NOISY, 0.2, simple(regularizers.gradient_energy)),
    "laplacian_energy": Case("pictures", NOISY, 0.04, simple(regularizers.laplacian_energy)),
    "out_of_range": Case("pictures", NOISY, 3.0, simple(regularizers.out_of_range)),
    "high_frequency_energy": Case("pictures", NOISY, 1.0, simple(regularizers.high_frequency_energy)),
    "symmetry": Case("pictures", BLURRED, 1.0, simple(regularizers.symmetry)),
    "mean_intensity": Case("pictures", BLURRED, 3.0, simple(regularizers.mean_intensity, target=-0.45)),
    "sparsity": Case("pictures", NOISY, 0.3, simple(regularizers.sparsity, background=-1.0)),
    "near_background": Case("pictures", BLURRED, 0.2, lambda *_: regularizers.near_background),
    "spectrum": Case("pictures", BLURRED, 3.0, simple(regularizers.spectrum, kind="amplitude"), PAIRED),
    "wavelet": Case("pictures", BLURRED, 3.0, simple(regularizers.wavelet, weights=(0, 1, 1)), PAIRED),
    "radial_spectrum": Case("pictures", BLURRED, 0.03, lambda data, *_: RadialSpectrum.of(data.samples)),
    "ssim": Case("pictures", BLURRED, 3.0, simple(regularizers.ssim), PAIRED),
    "perceptual": Case(
        "pictures", BLURRED, 3.0, lambda *_: Perceptual(*efficientnet(), layers=(2, 4), size=32), PAIRED, 120
    ),
    "self_perceptual": Case(
        "pictures",
        BLURRED,
        1.0,
        lambda data, model, scheduler: SelfPerceptual(model, scheduler, block="middle.0"),
        PAIRED,
    ),
    "score": Case("pictures", NOISY, 0.2, lambda data, *_: Score(classifier(data))),
    "divergence": Case(
        "flow",
        NOISY,
        40.0,
        simple(physics.divergence),
        residual=lambda x: difference(x[:, 0], -1) + difference(x[:, 1], -2),
    ),
    "curl": Case(
        "gradient_flow",
        NOISY,
        40.0,
        simple(physics.curl),
        residual=lambda x: difference(x[:, 1], -1) - difference(x[:, 0], -2),
    ),
    "laplace": Case("potentials", NOISY, 0.1, simple(physics.laplace), residual=lambda x: laplacian(x[:, 0])),
    "poisson": Case(
        "potentials_and_sources",
        NOISY,
        1.0,
        lambda *_: poisson,
        residual=lambda x: laplacian(x[:, 0]) - x[:, 1],
    ),
    "darcy": Case(
        "pressures_and_permeabilities",
        NOISY,
        0.2,
        simple(physics.darcy, source=WELLS, boundary="neumann"),
        residual=darcy_residual,
    ),
    "heat": Case("cooling", NOISY, 3.0, simple(physics.heat, diffusivity=DIFFUSIVITY), residual=heat_residual),
    "conservation": Case(
        "densities",
        NOISY,
        3.0,
        simple(physics.conservation, total=float(SIZE**2)),
        weighting.constant,
        residual=lambda x: (x.mean((2, 3), keepdim=True) - 1)[:, 0].expand(-1, SIZE, SIZE),
    ),
    "unit_norm": Case("directions", NOISY, 5.0, simple(physics.unit_norm), residual=lambda x: x.square().sum(1) - 1),
}
