"""Denoisers without training, and how far a loss moves their guesses, against closed forms."""

import numpy as np
import pytest
import torch

from reg_diffusers.diagnosis.ideal_denoiser import IdealDenoiser, LinearDenoiser, spread
from reg_diffusers.diagnosis.response import proximal_point, response

pytestmark = pytest.mark.loss

ALPHA, SIGMA = 0.8, 0.6


def gaussian_images(number, size, seed=0):
    """Images (N, 1, 1, size) of known mean and covariance."""
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(size, size, generator=torch.Generator().manual_seed(9), dtype=torch.float64) / size**0.5
    mean = torch.linspace(-0.5, 0.5, size, dtype=torch.float64)
    samples = mean + torch.randn(number, size, generator=generator, dtype=torch.float64) @ factor.T
    return samples.view(number, 1, 1, size), mean, factor @ factor.T


def gaussian_guess(noisy_samples, mean, covariance):
    gain = ALPHA * covariance @ torch.linalg.inv(ALPHA**2 * covariance + SIGMA**2 * torch.eye(len(mean)))
    return mean + (noisy_samples.flatten(1) - ALPHA * mean) @ gain.T


def test_the_guess_is_the_mean_of_the_posterior():
    images, noisy_samples = torch.randn(7, 1, 3, 2).double(), torch.randn(5, 1, 3, 2).double()
    squares = (noisy_samples[:, None] - ALPHA * images).flatten(2).square().sum(2)
    posterior = torch.exp(-squares / (2 * SIGMA**2))
    expected = (posterior / posterior.sum(1, keepdim=True)) @ images.flatten(1)
    found = IdealDenoiser(images)(noisy_samples, ALPHA, SIGMA)
    torch.testing.assert_close(found.flatten(1), expected)


def test_without_noise_the_guess_is_the_image_and_with_nothing_else_the_mean():
    images = torch.rand(50, 1, 4, 4) * 2 - 1
    denoiser = IdealDenoiser(images)
    torch.testing.assert_close(denoiser(images[:5], 1.0, 1e-4), images[:5])
    mean = images.double().mean(0).float().expand(5, 1, 4, 4)
    torch.testing.assert_close(denoiser(torch.randn(5, 1, 4, 4), 1e-9, 1.0), mean)


def test_it_is_exact_where_weights_of_single_precision_would_not_be():
    """Two images that differ by little in a large picture, at low noise: the exponents are of the order of 1e6."""
    image = torch.rand(1, 1, 64, 64) * 2 - 1
    images = torch.cat([image, image + 1e-3])
    found = IdealDenoiser(images)(images + 5e-4 * torch.tensor([1.0, -1.0]).view(2, 1, 1, 1) / 2, 1.0, 2e-3)
    excess = ((found - image) / 1e-3).mean((1, 2, 3))
    expected = torch.sigmoid(torch.tensor([-1.0, 1.0]) * 64**2 * (0.75**2 - 0.25**2) * 1e-6 / (2 * 4e-6))
    torch.testing.assert_close(excess, expected, atol=2e-3, rtol=0)


def test_both_find_the_best_guess_of_gaussian_data():
    images, mean, covariance = gaussian_images(40_000, 2)
    others, _, _ = gaussian_images(200, 2, seed=1)
    noisy_samples = ALPHA * others + SIGMA * torch.randn(others.shape, dtype=torch.float64)
    expected = gaussian_guess(noisy_samples, mean, covariance)
    for denoiser, tolerance in ((IdealDenoiser(images), 0.03), (LinearDenoiser(images, others), 0.01)):
        found = denoiser(noisy_samples, ALPHA, SIGMA).flatten(1)
        assert (found - expected).square().mean() < tolerance**2 * covariance.diagonal().mean()


def test_directions_that_no_image_spans_share_one_variance():
    images, _, _ = gaussian_images(10, 25)
    others, _, _ = gaussian_images(200, 25, seed=1)
    mean = images.flatten(1).mean(0)
    centred = images.flatten(1) - mean
    _, values, directions = torch.linalg.svd(centred)
    outside = (others.flatten(1) - mean) @ directions[9:].T
    variances = torch.cat([values[:9] ** 2 / 9, torch.full((16,), outside.square().mean().item())])
    noisy_samples = ALPHA * others + SIGMA * torch.randn(others.shape, dtype=torch.float64)
    expected = gaussian_guess(noisy_samples, mean, directions.T @ torch.diag(variances) @ directions)
    found = LinearDenoiser(images, others)(noisy_samples, ALPHA, SIGMA).flatten(1)
    torch.testing.assert_close(found, expected)


def test_spread_is_the_deviation_from_the_mean_image():
    assert spread(torch.tensor([[1.0, 5.0], [3.0, 5.0]])) == pytest.approx(0.5**0.5)


def quadratic(matrix):
    def evaluate(images):
        flat = images.flatten(1)
        return (flat @ matrix * flat).sum(1), (2 * flat @ matrix).reshape(images.shape)

    return evaluate


def absolute(images):
    return images.flatten(1).abs().sum(1), images.sign()


def test_the_proximal_point_of_a_quadratic_loss_solves_a_linear_system():
    factor = torch.randn(6, 6).double()
    matrix, guesses = factor @ factor.T / 6, torch.randn(20, 1, 2, 3).double()
    for tau in (0.01, 0.3, 2.0):
        expected = guesses.flatten(1) @ torch.linalg.inv(torch.eye(6) + 2 * tau * matrix)
        found, values = proximal_point(quadratic(matrix), guesses, tau, iterations=60)
        torch.testing.assert_close(found.flatten(1), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(values, (expected @ matrix * expected).sum(1), atol=1e-5, rtol=1e-4)


def test_the_proximal_point_of_absolute_values_is_the_soft_threshold():
    guesses = torch.randn(50, 1, 4, 4).double()
    found, _ = proximal_point(absolute, guesses, 0.2, iterations=200)
    expected = guesses.sign() * (guesses.abs() - 0.2).clamp(min=0)
    assert (found - expected).square().mean().sqrt() < 0.02


def test_the_path_starts_as_the_first_order_step_and_ends_at_the_minimum():
    guesses = torch.randn(20, 1, 2, 3).double()
    path = response(quadratic(torch.eye(6).double()), guesses, spread=1.0)
    squares = guesses.square().mean().item()
    shrink = 1 / (1 + 2 * path.tau)
    np.testing.assert_allclose(path.squared_displacement, squares * (1 - shrink) ** 2, rtol=1e-3)
    np.testing.assert_allclose(path.value, 6 * squares * shrink**2, rtol=1e-3)
    assert path.displacement_at(path.tau[0] / 10) == pytest.approx(path.squared_displacement[0] / 100)
    assert path.displacement_at(path.tau[3]) == pytest.approx(path.squared_displacement[3])
    assert path.value_at(path.tau[3]) == pytest.approx(path.value[3])
    assert (path.displacement_at(0), path.value_at(0)) == (0, path.start)
    assert not path.unbounded


def test_a_loss_without_end_is_found_out_and_one_without_gradient_moves_nothing():
    guesses = torch.randn(20, 1, 2, 3).double()
    assert response(quadratic(-torch.eye(6).double()), guesses, spread=1.0).unbounded
    still = response(lambda images: (images.new_ones(len(images)), torch.zeros_like(images)), guesses, spread=1.0)
    assert (still.displacement_at(1e9), still.value_at(1e9), still.unbounded) == (0, 1, False)
