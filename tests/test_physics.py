"""Residuals of differential equations, against exact solutions, and what makes regularizers of other functions."""

import itertools
import math
from functools import partial

import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn

from reg_diffusers import Term, X0Regularization, load_regularizer, needs_of, weighting
from reg_diffusers.prediction import add_noise
from reg_diffusers.regularizers import (
    equality,
    inequality,
    masked,
    physics,
    random_crop,
    resized,
    spectrum,
    threshold,
    total_variation,
)
from reg_diffusers.regularizers.stencils import difference, laplacian

pytestmark = pytest.mark.loss

ORDERS = (2, 4)
BOUNDARIES = ("periodic", "neumann", "dirichlet")
LAWS = {
    "divergence": physics.divergence,
    "normalized divergence": partial(physics.divergence, normalized=True, order=4),
    "curl": physics.curl,
    "normalized curl": partial(physics.curl, normalized=True, boundary="dirichlet"),
    "laplace": physics.laplace,
    "normalized laplace": partial(physics.laplace, normalized=True, boundary="neumann", order=4),
    "poisson": partial(physics.poisson, source=0.3),
    "darcy": partial(physics.darcy, source=0.3, boundary="neumann"),
    "heat": physics.heat,
    "normalized heat": partial(physics.heat, normalized=True),
    "conservation": partial(physics.conservation, total=2.0),
    "unit_norm": physics.unit_norm,
}


def random_fields(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def grid(size, boundary="periodic"):
    """x and y of (size, size) on which cos ("neumann") or sin ("dirichlet") fits in [0, pi], and the spacing."""
    spacing = {"periodic": 2 * math.pi / size, "neumann": math.pi / size, "dirichlet": math.pi / (size + 1)}[boundary]
    start = {"periodic": 0.0, "neumann": 0.5, "dirichlet": 1.0}[boundary]
    places = (torch.arange(size).double() + start) * spacing
    y, x = torch.meshgrid(places, places, indexing="ij")
    return x, y, spacing


def fitting(boundary, places, waves):
    """A wave that fulfils the boundary condition, its first and its second derivative."""
    if boundary == "dirichlet":
        return (waves * places).sin(), waves * (waves * places).cos(), -(waves**2) * (waves * places).sin()
    return (waves * places).cos(), -waves * (waves * places).sin(), -(waves**2) * (waves * places).cos()


def stacked(*channels):
    return torch.stack(channels)[None]


def orders_of(error, boundary):
    """Observed orders of convergence of an error as a function of the number of pixels, whose spacing halves twice."""
    errors = [error(size) for size in ((15, 31, 63) if boundary == "dirichlet" else (16, 32, 64))]
    return [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]


# Stencils


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_stencils_converge_with_their_order(boundary, order):
    def errors(size):
        x, y, spacing = grid(size, boundary)
        options = {"spacing": spacing, "boundary": boundary, "order": order}
        (f, f_x, f_xx), (g, g_y, g_yy) = fitting(boundary, x, 2), fitting(boundary, y, 1)
        return [
            (difference(f * g, -1, **options) - f_x * g).abs().max().item(),
            (difference(f * g, -2, **options) - f * g_y).abs().max().item(),
            (laplacian(f * g, **options) - f_xx * g - f * g_yy).abs().max().item(),
        ]

    for index in range(3):
        assert orders_of(lambda size, index=index: errors(size)[index], boundary) == pytest.approx(
            [order] * 2, abs=0.15
        )


@pytest.mark.parametrize("order", ORDERS)
def test_stencils_are_exact_for_polynomials_of_their_order_in_the_interior(order):
    x, y = (places.double() for places in torch.meshgrid(torch.arange(9), torch.arange(9), indexing="ij")[::-1])
    inner = (slice(2, -2), slice(2, -2))
    u, spacing = x**order + 3 * y**2 + x * y, 0.5
    u_x, expected = order * x ** (order - 1) + y, order * (order - 1) * x ** (order - 2) + 6
    torch.testing.assert_close(difference(u, -1, spacing=spacing, order=order)[inner] * spacing, u_x[inner])
    torch.testing.assert_close(laplacian(u, spacing=spacing, order=order)[inner] * spacing**2, expected[inner])


def test_boundaries_continue_the_field_as_stated():
    u = torch.tensor([[1.0, 2.0, 4.0]]).double()
    for boundary, first, last in (("periodic", 4, 1), ("neumann", 1, 4), ("dirichlet", 0, 0)):
        expected = torch.tensor([[(2 - first) / 2, (4 - 1) / 2, (last - 2) / 2]]).double()
        torch.testing.assert_close(difference(u, -1, boundary=boundary), expected)
    for boundary, (before, after) in {"periodic": ((2, 4), (1, 2)), "neumann": ((2, 1), (4, 2))}.items():
        long = torch.tensor([[*before, 1, 2, 4, *after]]).double()
        expected = difference(long, -1, order=4)[:, 2:-2]
        torch.testing.assert_close(difference(u, -1, boundary=boundary, order=4), expected)
    long = torch.tensor([[-1, 0, 1, 2, 4, 0, -4]]).double()
    expected = difference(long, -1, order=4)[:, 2:-2]
    torch.testing.assert_close(difference(u, -1, boundary="dirichlet", order=4), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": 3}, "order must be 2 or 4, not 3"),
        ({"boundary": "open"}, "boundary must be one of periodic, neumann, dirichlet, not 'open'"),
        ({"spacing": 0.0}, "spacing must be above 0"),
    ],
)
def test_wrong_grids_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        physics.divergence(random_fields(1, 2, 4, 4), **options)
    with pytest.raises(ValueError, match="order 4 needs at least 2 pixels along each dimension, not 1"):
        laplacian(random_fields(1, 1, 4), order=4)


# Each law


@pytest.mark.parametrize("name", LAWS)
def test_laws_keep_the_contract_of_a_regularizer(name):
    law, fields = LAWS[name], random_fields(3, 2, 5, 4)
    value = law(fields)
    assert value.shape == (3,) and (value > 0).all()
    torch.testing.assert_close(value, torch.cat([law(field[None]) for field in fields]), rtol=1e-12, atol=0)
    assert torch.autograd.gradcheck(law, fields[:2].clone().requires_grad_())
    half = fields.bfloat16().requires_grad_()
    assert law(half).dtype == torch.float32
    torch.testing.assert_close(law(half), law(half.detach().float()))
    law(half).sum().backward()
    assert half.grad.isfinite().all()


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_at_a_field_of_zeros_are_finite(name, dtype):
    zeros = torch.zeros(2, 2, 4, 4, dtype=dtype, requires_grad=True)
    LAWS[name](zeros).sum().backward()
    assert zeros.grad.isfinite().all()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_a_field_of_a_stream_function_has_no_divergence_and_a_gradient_no_curl(boundary, order):
    potential, options = random_fields(3, 8, 7), {"spacing": 0.3, "boundary": boundary, "order": order}
    along_x, along_y = (difference(potential, dim, **options) for dim in (-1, -2))
    rotating, gradient = torch.stack([along_y, -along_x], 1), torch.stack([along_x, along_y], 1)
    assert physics.divergence(rotating, **options).max() < 1e-20 < physics.curl(rotating, **options).min()
    assert physics.curl(gradient, **options).max() < 1e-20 < physics.divergence(gradient, **options).min()


def test_channel_0_is_along_the_width_and_channel_1_along_the_height():
    x, y, spacing = grid(64)
    zero = torch.zeros_like(x)
    options = {"spacing": spacing, "order": 4}
    for u, v, divergence, curl in (
        (x.sin(), zero, 0.5, 0),  # du/dx = cos x, with the mean square 1/2
        (y.sin(), zero, 0, 0.5),
        (zero, y.sin(), 0.5, 0),
        (zero, x.sin(), 0, 0.5),
    ):
        assert physics.divergence(stacked(u, v), **options).item() == pytest.approx(divergence, abs=1e-4)
        assert physics.curl(stacked(u, v), **options).item() == pytest.approx(curl, abs=1e-4)
    assert physics.curl(stacked(y.sin(), y.sin() + x.sin())).item() > 0
    shear, other = (
        stacked(-y.sin(), x.sin()),
        stacked(y.sin(), x.sin()),
    )  # dv/dx - du/dy = cos x + cos y, cos x - cos y
    for field in (shear, other):
        assert physics.curl(field, **options).item() == pytest.approx(1, abs=1e-4)
    diagonal = (x + y).sin()
    assert physics.curl(stacked(diagonal, diagonal), **options).item() == pytest.approx(0, abs=1e-12)
    assert physics.divergence(stacked(diagonal, diagonal), **options).item() == pytest.approx(2, abs=1e-3)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_residuals_of_exact_solutions_vanish_with_the_order(boundary, order):
    """The root of each L', for waves that fulfil the boundary condition."""

    def residuals(size):
        x, y, spacing = grid(size, boundary)
        options = {"spacing": spacing, "boundary": boundary, "order": order}
        (f, f_x, f_xx), (g, _, g_yy) = fitting(boundary, x, 1), fitting(boundary, y, 2)
        pressure, change = f * g, f_xx * g + f * g_yy
        k, k_x = 2 + (2 * x).cos(), -2 * (2 * x).sin()  # even at every wall
        source = -(k * change + k_x * f_x * g)
        values = [physics.poisson(pressure[None, None], source=change[None, None], **options)]
        if boundary != "dirichlet":
            values.append(physics.darcy(stacked(pressure, k), source=source[None], **options))
        if order == 2:
            step = spacing / 10
            decay = math.exp(-5 * 0.1 * step)
            heat = stacked(pressure, decay * pressure, decay**2 * pressure)
            values.append(physics.heat(heat, diffusivity=0.1, time_step=step, **options))
        return [value.sqrt().item() for value in values]

    for index in range(len(residuals(8))):
        assert orders_of(lambda size, index=index: residuals(size)[index], boundary) == pytest.approx(
            [order] * 2, abs=0.2
        )


def test_laplace_of_a_wave_is_its_squared_eigenvalue():
    x, y, spacing = grid(64)
    wave = ((2 * x).cos() * y.sin())[None, None]  # Delta u = -5 u, and u has the mean square 1/4
    options = {"spacing": spacing, "order": 4}
    assert physics.laplace(wave, **options).item() == pytest.approx(25 / 4, rel=1e-3)
    assert physics.laplace(wave, normalized=True, **options).item() == pytest.approx(25, rel=1e-3)
    constant = torch.full((1, 3, 4, 4), 0.7).double()
    assert physics.laplace(constant).item() == physics.laplace(constant, boundary="neumann").item() == 0
    assert physics.laplace(constant, boundary="dirichlet").item() > 0


@pytest.mark.parametrize(("name", "derivatives"), [("divergence", 1), ("curl", 1), ("laplace", 2)])
def test_values_go_with_the_spacing_and_not_with_the_resolution(name, derivatives):
    law, fields = getattr(physics, name), random_fields(2, 2, 6, 6)
    torch.testing.assert_close(law(fields, spacing=0.5), 4**derivatives * law(fields))
    values = []
    for size in (32, 64):
        x, y, spacing = grid(size)
        values.append(law(stacked((x + y).sin(), (x - y).sin()), spacing=spacing).item())
    assert values[0] == pytest.approx(values[1], rel=0.02) and values[0] > 0.1


@pytest.mark.parametrize("name", ["divergence", "curl", "laplace", "heat"])
def test_shrinking_lowers_a_residual_and_not_the_normalized_one(name):
    """Fact: a gradient through the divisor has no part along the field; with a detached divisor it has."""
    law, fields = getattr(physics, name), random_fields(2, 2, 6, 6).requires_grad_()
    torch.testing.assert_close(law(0.5 * fields), law(fields) / 4)
    torch.testing.assert_close(law(0.5 * fields, normalized=True), law(fields, normalized=True))

    def along(value):
        return (torch.autograd.grad(value.sum(), fields)[0] * fields).flatten(1).sum(1)

    value = law(fields)
    detached = value / fields.detach().square().sum(1).flatten(1).mean(1)
    assert along(law(fields, normalized=True)).abs().max() < 1e-10
    torch.testing.assert_close(along(detached), 2 * detached.detach())
    mean_square = fields.square().flatten(1).mean(1) * (2 if name in ("divergence", "curl") else 1)
    torch.testing.assert_close(law(fields, normalized=True), value / mean_square)


def test_sources_and_totals_of_each_image():
    fields, source = random_fields(2, 2, 4, 4), random_fields(2, 1, 4, 4, seed=1)
    expected = (laplacian(fields) - source).square().flatten(1).mean(1)
    torch.testing.assert_close(physics.poisson(fields, source=source), expected)
    torch.testing.assert_close(physics.darcy(fields, source=source), physics.darcy(fields, source=source[:, 0]))
    totals = fields.sum((2, 3)) * 0.25
    assert physics.conservation(fields, total=totals, spacing=0.5).max() < 1e-20
    off = physics.conservation(fields[:, :1] + 0.1, total=totals[:, 0], spacing=0.5)
    torch.testing.assert_close(off, torch.full((2,), 0.01).double())
    for law, name in ((physics.poisson, "source"), (physics.darcy, "source"), (physics.conservation, "total")):
        assert needs_of(law) == (name,) and needs_of(partial(law, **{name: 1.0})) == ()


def test_unit_norm_is_that_of_each_pixel():
    fields = nn.functional.normalize(random_fields(2, 3, 4, 4), dim=1)
    assert physics.unit_norm(fields).max() < 1e-20
    torch.testing.assert_close(physics.unit_norm(2 * fields), torch.full((2,), 9.0).double())


def test_too_few_channels_are_refused():
    for law in (physics.divergence, physics.curl, physics.heat, partial(physics.darcy, source=1.0)):
        with pytest.raises(ValueError, match=r"needs a field \(B, C, H, W\) with at least 2 channels, not \(1, 1, 4"):
            law(random_fields(1, 1, 4, 4))


@pytest.mark.parametrize("name", physics.__all__)
def test_laws_are_known_on_the_command_line(name):
    assert load_regularizer(f"physics.{name}") is getattr(physics, name)


def test_arguments_come_from_the_command_line():
    fields = random_fields(2, 2, 4, 4)
    found = load_regularizer("physics.divergence(spacing=0.5, boundary='neumann', order=4, normalized=True)")
    expected = physics.divergence(fields, spacing=0.5, boundary="neumann", order=4, normalized=True)
    assert torch.equal(found(fields), expected) and Term(found, 0.1).name == "divergence"
    assert needs_of(load_regularizer("physics.poisson(source=1.0)")) == ()
    with pytest.raises(ValueError, match=r"no argument 'space': it is physics\.curl\(x0_hat.*, /, \*, spacing"):
        load_regularizer("physics.curl(space=1)")


def test_darcy_has_no_permeability_on_a_wall_of_given_pressure():
    with pytest.raises(ValueError, match="the permeability on a wall is unknown"):
        physics.darcy(random_fields(1, 2, 4, 4), source=1.0, boundary="dirichlet")


# Made from other functions


def helmholtz(u, /, *, wave_number=1.0):
    return physics.laplacian(u, spacing=2 * math.pi / u.shape[-1], order=4) + wave_number**2 * u


def test_an_own_equation():
    x, y, _ = grid(32)
    solution = ((3 * x).cos() + (3 * y).sin())[None, None]
    own = equality(partial(helmholtz, wave_number=3.0))
    assert own(solution).item() < 1e-3 < 1 < own(solution * (x + y).cos()).item()
    assert Term(own, 0.1).name == "helmholtz"


def test_an_inequality_counts_its_violation_alone():
    below_half = inequality(lambda u: u - 0.5)
    image = torch.tensor([0.0, 0.5, 0.7, 0.4]).reshape(1, 1, 2, 2)
    assert below_half(image).item() == pytest.approx(0.04 / 4)
    assert below_half(image.bfloat16()).dtype == torch.float32


def test_a_threshold_leaves_what_is_below_alone():
    images = random_fields(2, 1, 6, 6) * torch.tensor([0.1, 1.0]).reshape(2, 1, 1, 1)
    low, high = total_variation(images).tolist()
    ours = threshold(total_variation, level=(low + high) / 2)
    assert ours(images).tolist() == pytest.approx([0, (high - low) / 2])
    gradient = torch.autograd.grad(ours(images.requires_grad_()).sum(), images)[0]
    assert gradient[0].abs().max() == 0 < gradient[1].abs().max()


def test_images_and_originals_are_resized_and_cropped_alike():
    seen = []

    def both(x0_hat, /, *, original_samples, label):
        seen.append((x0_hat, original_samples, label))
        return (x0_hat - original_samples).square().flatten(1).mean(1)

    both.needs = ("original_samples", "label")
    images, label = random_fields(2, 1, 8, 6), torch.arange(2)
    for made, shape in ((resized(both, 4), (4, 4)), (resized(both, (2, 3)), (2, 3)), (random_crop(both, 5), (5, 5))):
        assert made.needs == both.needs and Term(made, 0.1).name == "both"
        assert made(images, original_samples=images, label=label).abs().max() == 0
        x0_hat, original, same = seen.pop()
        assert x0_hat.shape[2:] == shape and torch.equal(x0_hat, original) and same is label
    resized(both, (4, 3))(images, original_samples=images, label=label)
    torch.testing.assert_close(seen.pop()[0].mean((2, 3)), images.mean((2, 3)), rtol=0, atol=0.1)
    with pytest.raises(ValueError, match=r"random_crop of 7 x 7 from an image of \(8, 6\)"):
        random_crop(both, 7)(images, original_samples=images, label=label)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float64])
def test_a_mask_is_where_a_loss_sees_and_changes_x0_hat(dtype):
    x0_hat, original = random_fields(2, 3, 2, 6, 5)
    area = torch.zeros(3, 1, 6, 5)
    area[:, :, 1:4, 2:] = 1
    area[2] = 0
    mask = (255 * area if dtype == torch.uint8 else area).to(dtype)

    def difference_of(x0_hat, /, *, original_samples):
        return (x0_hat - original_samples).square().flatten(1).mean(1)

    difference_of.needs = ("original_samples",)
    ours = masked(difference_of, "where")
    assert ours.needs == ("original_samples", "where") and Term(ours, 0.1).name == "difference_of"
    found = ours(x0_hat.requires_grad_(), original_samples=original, where=mask)
    inside = (area * (x0_hat - original).square()).sum((1, 2, 3)) / (2 * 9)
    torch.testing.assert_close(found, inside.double() * 9 / 30)
    variation = masked(total_variation)(x0_hat, original_samples=original, mask=mask)
    shown = torch.where(area.bool(), x0_hat, original)
    torch.testing.assert_close(variation, total_variation(shown))
    for value in (found, variation):
        gradient = torch.autograd.grad(value.sum(), x0_hat)[0]
        assert gradient[~area.bool().expand_as(gradient)].abs().max() == 0 < gradient[:2, :, 1:4, 2:].abs().max()


def test_a_soft_mask_blends_and_is_cropped_with_the_image():
    x0_hat, original, mask = random_fields(3, 2, 1, 6, 6)
    mask = mask.sigmoid()
    context = {"original_samples": original, "mask": mask}
    mean = masked(lambda x: x.flatten(1).mean(1))
    torch.testing.assert_close(mean(x0_hat, **context), (mask * x0_hat + (1 - mask) * original).mean((1, 2, 3)))
    cropped = random_crop(mean, 6)
    assert cropped.needs == ("original_samples", "mask")
    torch.testing.assert_close(cropped(x0_hat, **context), mean(x0_hat, **context))
    assert random_crop(mean, 3)(x0_hat, **context).shape == (2,)


@pytest.mark.parametrize(
    "mask, message",
    [
        (torch.ones(2, 6, 6), r"mask must have shape \(2, 1, 6, 6\), not \(2, 6, 6\)"),
        (torch.ones(2, 1, 3, 3), r"mask must have shape \(2, 1, 6, 6\), not \(2, 1, 3, 3\)"),
        (2 * torch.eye(6).expand(2, 1, 6, 6) - 1, "mask must have values from 0 to 1, not from -1 to 1"),
        (torch.full((2, 1, 6, 6), torch.nan), "mask must have values from 0 to 1, not from nan"),
    ],
)
def test_what_is_no_mask_is_refused(mask, message):
    images = random_fields(2, 1, 6, 6)
    with pytest.raises(ValueError, match=message):
        masked(total_variation)(images, original_samples=images, mask=mask)


def test_a_random_crop_reaches_every_pixel():
    image = torch.zeros(1, 1, 5, 6, requires_grad=True)
    crop = random_crop(lambda u: u.flatten(1).sum(1), 4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(60):
            crop(image).sum().backward()
    assert image.grad.sum() == 60 * 16 and image.grad.min() > 0


def test_a_network_inside_is_frozen_and_moved():
    net = nn.Sequential(nn.Conv2d(1, 1, 3), nn.Flatten(), nn.LazyLinear(1), nn.Flatten(0))
    net(torch.zeros(1, 1, 6, 6))
    scheduler = DDPMScheduler(prediction_type="v_prediction")
    terms = [
        Term(threshold(resized(net, 6), -100.0), 0.1, weighting.constant, "net"),
        Term(resized(spectrum, 4), 0.1, weighting.constant),
    ]
    ours = X0Regularization(scheduler, terms)
    assert not any(weight.requires_grad for weight in net.parameters()) and not net.training
    x0, noise, output = random_fields(3, 2, 1, 8, 8).float()
    times = torch.tensor([10, 300])
    found = ours(output.requires_grad_(), times, add_noise(scheduler, x0, noise, times), original_samples=x0)
    found.loss.backward()
    assert output.grad.isfinite().all() and set(found.terms) == {"net", "spectrum"}


def test_what_is_not_a_function_is_refused():
    with pytest.raises(TypeError, match="a function of the image is needed, not str"):
        threshold("total_variation", 0.1)
