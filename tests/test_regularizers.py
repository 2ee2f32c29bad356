"""Every built-in regularizer is a batched, differentiable function with the null set and closed forms it states."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from reg_diffusers import needs_of, regularizers
from reg_diffusers.regularizers import (
    gradient_energy,
    high_frequency_energy,
    isotropic_total_variation,
    laplacian_energy,
    mean_intensity,
    near_background,
    out_of_range,
    regularizer_name,
    sparsity,
    symmetry,
    total_variation,
)

pytestmark = pytest.mark.loss

ALL = [name for name in regularizers.__all__ if not needs_of(getattr(regularizers, name))]  # from the image alone


def random_images(*shape, scale=1.0, seed=0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plane(slope_x, slope_y, height=6, width=9, offset=0.0):
    y, x = torch.meshgrid(torch.arange(height).double(), torch.arange(width).double(), indexing="ij")
    return (offset + slope_x * x + slope_y * y)[None, None]


def chequerboard(height=6, width=8):
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return (1.0 - 2.0 * ((x + y) % 2)).double()[None, None]


def constant(value, channels=2):
    return torch.full((1, channels, 4, 5), value, dtype=torch.float64)


def zero_mean():
    image = random_images(1, 2, 4, 5)
    return image - image.mean()


# Images that fulfil the wish exactly.
NULL_SET = {
    "gradient_energy": [constant(0.7)],
    "high_frequency_energy": [constant(0.7), torch.cos(2 * math.pi * plane(1 / 8, 0, width=8))],
    "isotropic_total_variation": [constant(0.7)],
    "laplacian_energy": [constant(0.7), plane(0.3, -0.2, offset=0.1)],
    "mean_intensity": [constant(0.0), zero_mean()],
    "near_background": [constant(-1.0), constant(-0.5), constant(2.0)],
    "out_of_range": [constant(1.0), constant(-1.0), random_images(1, 2, 4, 5).clamp(-1, 1)],
    "sparsity": [constant(0.0)],
    "symmetry": [constant(0.7), plane(0.0, 0.3), random_images(1, 2, 4, 3)[..., [0, 1, 2, 1, 0]]],
    "total_variation": [constant(0.7)],
}
# L'(c u) = c^degree L'(u), with the parameters that have the unit of a pixel value scaled along.
SCALING = {
    "gradient_energy": (2, lambda c: gradient_energy),
    "high_frequency_energy": (2, lambda c: high_frequency_energy),
    "isotropic_total_variation": (1, lambda c: partial(total_variation, isotropic=True, smoothing=1e-3 * c)),
    "laplacian_energy": (2, lambda c: laplacian_energy),
    "mean_intensity": (2, lambda c: mean_intensity),
    "near_background": (0, lambda c: partial(near_background, background=-c, gap=0.4 * c)),
    "out_of_range": (2, lambda c: partial(out_of_range, low=-c, high=c)),
    "sparsity": (1, lambda c: sparsity),
    "symmetry": (2, lambda c: symmetry),
    "total_variation": (1, lambda c: total_variation),
}
OF_PIXELS = ("mean_intensity", "near_background", "out_of_range", "sparsity")  # wherever the pixels are
NULL_CASES = [(name, index) for name in ALL for index in range(len(NULL_SET[name]))]


@pytest.mark.parametrize("name", ALL)
def test_gradients_are_those_of_the_value(name):
    image = random_images(2, 2, 4, 5, scale=2.0)  # beyond [-1, 1], where the range counts
    assert torch.autograd.gradcheck(getattr(regularizers, name), image.requires_grad_())


@pytest.mark.parametrize("name", ALL)
def test_an_images_value_does_not_depend_on_its_batch(name):
    function, images = getattr(regularizers, name), random_images(4, 3, 5, 6, scale=2.0)
    alone = torch.cat([function(image[None]) for image in images])
    torch.testing.assert_close(function(images), alone, rtol=1e-12, atol=0)
    torch.testing.assert_close(function(images.flip(0)), alone.flip(0), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("name", "index"), NULL_CASES)
def test_zero_with_zero_gradient_where_the_wish_is_fulfilled(name, index):
    image = NULL_SET[name][index].clone().requires_grad_()
    value = getattr(regularizers, name)(image)
    value.sum().backward()
    assert value.abs().max() < 1e-14
    assert image.grad.abs().max() < 1e-14


@pytest.mark.parametrize("name", ALL)
def test_positive_where_it_is_not(name):
    assert (getattr(regularizers, name)(random_images(5, 2, 6, 7, scale=2.0)) > 0).all()


@pytest.mark.parametrize("name", ALL)
def test_a_descent_step_lowers_the_value(name):
    image = random_images(1, 1, 6, 7, scale=2.0).requires_grad_()
    function = getattr(regularizers, name)
    before = function(image)
    (gradient,) = torch.autograd.grad(before.sum(), image)
    assert gradient.abs().max() > 1e-6
    assert function(image - 1e-4 * gradient) < before


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_any_number_of_channels_counts_as_their_mean(name, channels):
    function, image = getattr(regularizers, name), random_images(2, 1, 5, 4, scale=2.0)
    value = function(image.repeat(1, channels, 1, 1))
    assert value.shape == (2,)
    torch.testing.assert_close(value, function(image), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", [name for name in ALL if name != "mean_intensity"])
def test_channels_are_not_mixed(name):
    function, image = getattr(regularizers, name), random_images(1, 3, 5, 4, scale=2.0)
    per_channel = function(image.transpose(0, 1))
    torch.testing.assert_close(function(image), per_channel.mean(0, keepdim=True), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (5, 1), (2, 2), (2, 7)])
def test_tiny_images_have_finite_values_and_gradients(name, size):
    image = random_images(3, 2, *size, scale=2.0).requires_grad_()
    value = getattr(regularizers, name)(image)
    value.sum().backward()
    assert value.shape == (3,)
    assert value.isfinite().all()
    assert image.grad.isfinite().all()


@pytest.mark.parametrize("name", [name for name in ALL if name not in OF_PIXELS])
def test_a_single_pixel_has_no_spatial_structure(name):
    assert getattr(regularizers, name)(random_images(3, 2, 1, 1)).abs().max() == 0


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("factor", [0.25, 3.0])
def test_homogeneous_of_the_stated_degree(name, factor):
    degree, scaled = SCALING[name]
    image = random_images(3, 2, 5, 6, scale=2.0)
    torch.testing.assert_close(scaled(factor)(factor * image), factor**degree * scaled(1.0)(image), rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("value", [-1.0, 0.0, 0.3, 1.0, 5.0])
def test_gradients_on_constant_images_are_finite(name, value):
    image = constant(value).float().requires_grad_()
    getattr(regularizers, name)(image).sum().backward()
    assert image.grad.isfinite().all()


@pytest.mark.parametrize("name", [name for name in ALL if name != "isotropic_total_variation"])
@pytest.mark.parametrize("dim", [-1, -2])
def test_a_mirror_image_has_the_same_value(name, dim):
    function, image = getattr(regularizers, name), random_images(2, 2, 5, 6, scale=2.0)
    torch.testing.assert_close(function(image.flip(dim)), function(image), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ALL)
def test_single_precision_agrees_with_double(name):
    function, image = getattr(regularizers, name), random_images(3, 2, 8, 7, scale=2.0)
    value = function(image.float())
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), function(image), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("jump", [0.5, -2.0])
def test_total_variation_of_a_step_edge_is_its_height_per_column(jump):
    image = torch.zeros(1, 1, 6, 9).double()
    image[..., 4:] = jump
    torch.testing.assert_close(total_variation(image).item(), abs(jump) / 8)
    torch.testing.assert_close(total_variation(image.mT).item(), abs(jump) / 8)
    smooth = math.hypot(jump, 1e-3) - 1e-3
    torch.testing.assert_close(isotropic_total_variation(image).item(), smooth / 8)


def test_total_variation_does_not_mind_how_steep_a_slope_is_and_gradient_energy_does():
    sharp, ramp = torch.zeros(1, 1, 3, 9).double(), torch.zeros(1, 1, 3, 9).double()
    sharp[..., 4:] = 1
    ramp[:] = torch.linspace(0, 1, 9).double()
    torch.testing.assert_close(total_variation(sharp), total_variation(ramp))
    torch.testing.assert_close(gradient_energy(sharp), 8 * gradient_energy(ramp))


@pytest.mark.parametrize("angle", [0, 30, 45, 60, 90, 135])
def test_only_isotropic_total_variation_does_not_mind_the_direction_of_a_slope(angle):
    slope_x, slope_y = 0.1 * math.cos(math.radians(angle)), 0.1 * math.sin(math.radians(angle))
    image = plane(slope_x, slope_y)
    torch.testing.assert_close(isotropic_total_variation(image).item(), math.hypot(0.1, 1e-3) - 1e-3)
    torch.testing.assert_close(total_variation(image).item(), abs(slope_x) + abs(slope_y))


def test_isotropic_total_variation_measures_a_diagonal_edge_by_its_length():
    """An edge of height 1 at 45 degrees through n x n pixels is sqrt(2) n long; counted along the axes it is 2 n."""
    n = 9
    y, x = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
    edge = (x + y >= n - 1).double()[None, None]
    torch.testing.assert_close(total_variation(edge).item(), 2 * (n - 1) / (n * (n - 1)))
    torch.testing.assert_close(
        isotropic_total_variation(edge).item(), (math.sqrt(2 + 1e-6) - 1e-3) * (n - 1) / (n - 1) ** 2
    )


def test_gradient_energy_of_a_plane_is_its_squared_slope():
    torch.testing.assert_close(gradient_energy(plane(0.3, -0.2)).item(), 0.3**2 + 0.2**2)


def test_laplacian_energy_of_a_quadratic_is_its_squared_curvature():
    x, y = plane(1, 0), plane(0, 1)
    torch.testing.assert_close(laplacian_energy(0.3 * x**2 + 0.1 * y**2 + 5 * x * y + x).item(), 0.8**2)
    assert laplacian_energy(x**2 - y**2 + x * y).item() < 1e-20  # harmonic


@pytest.mark.parametrize(
    ("function", "value"),
    [
        (total_variation, 4),
        (isotropic_total_variation, math.sqrt(8 + 1e-6) - 1e-3),
        (gradient_energy, 8),
        (laplacian_energy, 64),
        (high_frequency_energy, 1),
        (partial(high_frequency_energy, cutoff=1.41), 1),
        (symmetry, 4),
    ],
)
def test_the_chequerboard_attains_the_stated_bounds(function, value):
    torch.testing.assert_close(function(chequerboard()).item(), float(value))


def test_high_frequency_energy_above_zero_is_the_variance():
    """Parseval: all of the spectrum is the mean square, all but the mean is the variance."""
    image = random_images(3, 2, 5, 8)
    variance = image.flatten(2).var(2, correction=0).mean(1)
    torch.testing.assert_close(high_frequency_energy(image, cutoff=0.0), variance, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("cycles", "kept"), [(1, False), (3, False), (4, False), (5, True), (7, True)])
def test_high_frequency_energy_of_a_wave_is_half_its_squared_amplitude_above_the_cutoff(cycles, kept):
    """On 16 pixels a wave of k cycles has the frequency k/8 of Nyquist's; the cutoff is 1/2."""
    wave = 0.6 * torch.cos(2 * math.pi * cycles * plane(1 / 16, 0, height=5, width=16) + 0.4)
    for image in (wave, wave.mT):
        assert high_frequency_energy(image).item() == pytest.approx(0.18 if kept else 0, abs=1e-14)


def test_high_frequency_energy_measures_frequencies_radially():
    """3/8 of Nyquist's along both axes is 0.53 on the diagonal."""
    wave = torch.cos(2 * math.pi * 3 * plane(1 / 16, 1 / 16, height=16, width=16))
    assert high_frequency_energy(wave).item() == pytest.approx(0.5)
    assert high_frequency_energy(wave, cutoff=0.54).item() == pytest.approx(0, abs=1e-14)


def test_out_of_range_is_the_squared_excess():
    image = torch.tensor([[-3.0, -1.0, 0.5, 1.5]]).reshape(1, 1, 2, 2)
    assert out_of_range(image).item() == (4 + 0 + 0 + 0.25) / 4
    assert out_of_range(image, low=0.0, high=1.0).item() == (9 + 1 + 0 + 0.25) / 4


def test_near_background_counts_the_pixels_in_the_gap():
    def gradient(value, **parameters):
        image = constant(value).requires_grad_()
        near_background(image, **parameters).sum().backward()
        return image.grad.sum().item()

    halfway = torch.tensor([[-1.0, -0.8, -0.6, 0.9]]).reshape(1, 1, 2, 2)
    assert near_background(halfway).item() == pytest.approx(1 / 4)  # one pixel of four, in the middle of the gap
    assert near_background(-halfway, background=1.0, gap=-0.4).item() == pytest.approx(1 / 4)
    assert near_background(constant(-1.2)).item() == pytest.approx(4 * 0.5**2)
    assert gradient(-0.9) == pytest.approx(4 * (1 - 2 * 0.25) / 0.4)  # down to the background
    assert gradient(-0.7) == pytest.approx(4 * (1 - 2 * 0.75) / 0.4)  # up, out of the gap
    assert gradient(0.9, background=1.0, gap=-0.4) == pytest.approx(-gradient(-0.9))
    with pytest.raises(ValueError, match="gap is 0"):
        near_background(halfway, gap=0)


def test_symmetry_is_four_times_the_squared_distance_to_the_symmetric_part():
    image = random_images(2, 2, 5, 6)
    for dim in (-1, -2):
        nearest = (image + image.flip(dim)) / 2
        expected = 4 * (image - nearest).square().flatten(1).mean(1)
        torch.testing.assert_close(symmetry(image, dim=dim), expected)
    assert symmetry(plane(0.3, 0.0)).item() > 0.1
    assert symmetry(plane(0.3, 0.0), dim=-2).item() == 0


def test_mean_intensity_and_sparsity_of_a_constant_image():
    image = constant(0.75)
    assert mean_intensity(image).item() == 0.75**2
    assert mean_intensity(image, target=0.5).item() == 0.25**2
    assert sparsity(-image).item() == 0.75
    assert sparsity(image, background=-1.0).item() == 1.75


def test_mean_intensity_pulls_every_pixel_alike():
    image = random_images(1, 2, 3, 4).requires_grad_()
    mean_intensity(image, target=0.2).backward()
    expected = 2 * (image.mean() - 0.2) / image.numel()
    torch.testing.assert_close(image.grad, expected.detach().expand_as(image))


def test_names_are_those_of_functions_and_classes():
    class Classifier(nn.Module):
        pass

    assert regularizer_name(total_variation) == "total_variation"
    assert regularizer_name(partial(partial(mean_intensity, target=0.1))) == "mean_intensity"
    assert regularizer_name(Classifier()) == "Classifier"


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("total_variation", {"isotropic": True, "smoothing": -1.0}, "smoothing must be at least 0"),
        ("out_of_range", {"low": 1.0, "high": -1.0}, "low must be at most high, not 1.0 with high -1.0"),
        ("high_frequency_energy", {"cutoff": 5.0}, "cutoff must be at least 0 and below"),
        ("high_frequency_energy", {"cutoff": -1.0}, "cutoff must be at least 0 and below"),
        ("symmetry", {"dim": 0}, "dim must be a dimension of each image, such as -1 or -2, not 0"),
        ("symmetry", {"dim": 9}, "dim must be a dimension of each image"),
    ],
)
def test_arguments_that_switch_a_loss_off_or_change_its_meaning_are_refused(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        getattr(regularizers, name)(torch.zeros(2, 1, 8, 8), **arguments)
