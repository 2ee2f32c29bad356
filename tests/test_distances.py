"""Distances between sets of features: closed forms, another implementation, and errors that are what they say."""

import math

import pytest
import torch
from devices import OnMps

from reg_diffusers.evaluation import distances
from reg_diffusers.evaluation.distances import frechet, jackknife, kernel, manifolds, mean_of, nearest

pytestmark = pytest.mark.training


@pytest.fixture(autouse=True)
def seed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def exactly(mean, covariance, number=200):
    """Points whose sample mean and covariance are these."""
    points = torch.randn(number, len(mean), dtype=torch.float64)
    points = points - points.mean(0)
    whitened = points @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(points.T))).T
    return whitened @ torch.linalg.cholesky(covariance).T + mean


def covariance_of(dimensions):
    root = torch.randn(dimensions, dimensions, dtype=torch.float64)
    return root @ root.T + 0.1 * torch.eye(dimensions)


def test_frechet_distance_of_gaussians_is_the_closed_form():
    import scipy.linalg

    means, covariances = torch.randn(2, 6, dtype=torch.float64), [covariance_of(6) for _ in range(2)]
    one, other = (exactly(mean, covariance) for mean, covariance in zip(means, covariances, strict=True))
    root = torch.from_numpy(scipy.linalg.sqrtm((covariances[0] @ covariances[1]).numpy()).real)
    expected = (means[0] - means[1]).square().sum() + (covariances[0] + covariances[1] - 2 * root).trace()
    assert frechet(one, other) == pytest.approx(expected.item(), rel=1e-9)
    assert frechet(other, one) == pytest.approx(expected.item(), rel=1e-9)
    assert frechet(one, one) == pytest.approx(0, abs=1e-9)
    assert frechet(one, one + 2) == pytest.approx(24)
    assert frechet(one[:, :1], 3 * one[:, :1]) == pytest.approx(
        4 * means[0, 0].item() ** 2 + 4 * covariances[0][0, 0].item()
    )


def test_frechet_distance_of_fewer_points_than_dimensions_is_that_of_another_implementation():
    fid = pytest.importorskip("torchmetrics.image.fid")
    samples, reference = torch.randn(30, 64), 1.5 * torch.randn(30, 64) + 0.2
    metric = fid.FrechetInceptionDistance(feature=features_as_they_are(64))
    metric.update(samples, real=False)
    metric.update(reference, real=True)
    assert frechet(samples, reference) == pytest.approx(metric.compute().item(), rel=1e-4)


def test_kernel_distance_is_that_of_another_implementation():
    kid = pytest.importorskip("torchmetrics.image.kid")
    samples, reference = torch.randn(40, 16), 1.5 * torch.randn(40, 16) + 0.2
    metric = kid.KernelInceptionDistance(feature=features_as_they_are(16), subsets=1, subset_size=40)
    metric.update(samples, real=False)
    metric.update(reference, real=True)
    assert kernel(samples, reference) == pytest.approx(metric.compute()[0].item(), rel=1e-4)


def features_as_they_are(dimensions):
    network = torch.nn.Identity()
    network.num_features = dimensions
    return network


def test_kernel_distance_of_equal_distributions_is_0_on_average():
    drawn = torch.tensor([kernel(torch.randn(20, 4), torch.randn(30, 4)) for _ in range(2000)])
    estimate = mean_of(drawn)
    assert abs(estimate.value) < 3 * estimate.standard_error < 0.05  # with the pairs (x, x) it would be about 0.7
    biased = torch.tensor([frechet(torch.randn(20, 4), torch.randn(30, 4)) for _ in range(20)])
    assert biased.min() > 0.05  # what is said about the Frechet distance


def test_large_sets_are_taken_in_parts(monkeypatch):
    samples, reference = torch.randn(50, 8), torch.randn(70, 8)
    whole = kernel(samples, reference), manifolds(samples, reference), nearest(samples, [reference])
    monkeypatch.setattr(distances, "_ELEMENTS_AT_A_TIME", 300)
    assert kernel(samples, reference) == pytest.approx(whole[0], rel=1e-9)
    assert manifolds(samples, reference) == pytest.approx(whole[1])
    for found, expected in zip(nearest(samples, reference.split(13)), whole[2], strict=True):
        torch.testing.assert_close(found, expected)


def test_no_more_points_are_compared_in_pairs_than_time_and_memory_allow():
    assert [distances.paired(number, 10) for number in (20, 5000, 50_000)] == [20, 5000, 5000]
    assert distances.paired(50_000, 2**18) * 2**18 * 4 == 2**30  # bytes
    assert distances.paired(50_000, 2**40) == 20  # a jackknife needs so many


def test_a_point_is_not_its_own_neighbour_in_any_block():
    points = torch.tensor([[0.0], [1.0], [3.0], [7.0], [12.0]])
    own = torch.tensor([3, -1, 0])  # the second is not among those searched
    for size in (1, 2, 5):
        found, indices = nearest(points[[3, 3, 0]], points.split(size), own)
        assert found.tolist() == [4, 0, 1] and indices.tolist() == [2, 3, 1]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_distances_of_what_is_not_finite_are_no_numbers(value):
    points = torch.randn(40, 3)
    broken = points.clone()
    broken[1, 2] = value
    for one, other in ((broken, points), (points, broken)):
        assert math.isnan(frechet(one, other)) and math.isnan(kernel(one, other))
        assert all(map(math.isnan, manifolds(one, other).values()))
    estimate = jackknife(lambda part: frechet(part, points), broken)
    assert math.isnan(estimate.value) and math.isnan(estimate.half_width)


def test_devices_without_64_bits_are_left_first():
    samples, reference = torch.randn(40, 3), torch.randn(40, 3)
    there = samples.as_subclass(OnMps), reference.as_subclass(OnMps)
    assert frechet(*there) == frechet(samples, reference)
    assert kernel(*there) == kernel(samples, reference)
    assert mean_of(there[0][:, 0]) == mean_of(samples[:, 0])


def test_manifolds_of_identical_and_of_disjoint_sets():
    points = torch.randn(60, 5)
    same = manifolds(points, points)
    assert same["precision"] == same["recall"] == same["coverage"] == 1 and same["density"] > 1
    assert manifolds(points + 1000, points) == {"precision": 0, "recall": 0, "density": 0, "coverage": 0}


def test_manifolds_tell_missing_variety_from_bad_samples():
    reference = torch.randn(400, 2)
    narrow = manifolds(0.1 * torch.randn(400, 2), reference)
    assert narrow["precision"] > 0.99 and narrow["recall"] < 0.3 and narrow["coverage"] < 0.3
    wide = manifolds(5 * torch.randn(400, 2), reference)
    assert wide["precision"] < 0.5 and wide["recall"] > 0.99
    equal = [manifolds(torch.randn(300, 4), torch.randn(300, 4)) for _ in range(20)]
    for name, expected in (("density", 1), ("coverage", 1 - 0.5**5)):
        estimate = mean_of(torch.tensor([found[name] for found in equal]))
        assert estimate.value == pytest.approx(expected, abs=4 * estimate.standard_error)


def test_manifolds_by_hand():
    reference = torch.tensor([[0.0], [1.0], [3.0]])  # radii 1, 1, 2 with one neighbour
    samples = torch.tensor([[0.5], [4.5], [9.0]])  # radii 4, 4, 4.5
    assert manifolds(samples, reference, neighbours=1) == pytest.approx(
        {"precision": 2 / 3, "recall": 1, "density": 3 / 3, "coverage": 1}
    )


def test_the_jackknifes_error_of_a_mean_is_the_textbooks():
    values = torch.randn(10, dtype=torch.float64)
    of_groups = jackknife(lambda part: part.mean().item(), values.repeat(2))
    assert of_groups.standard_error == pytest.approx(values.std().item() / math.sqrt(10), rel=1e-9)
    many = torch.randn(4000, dtype=torch.float64)
    errors = [
        jackknife(lambda part: {"mean": part.mean().item()}, many[torch.randperm(4000)])["mean"] for _ in range(50)
    ]
    expected = mean_of(many)
    assert errors[0].value == pytest.approx(expected.value) and expected.half_width == pytest.approx(
        1.96 * expected.standard_error
    )
    mean_square = sum(error.standard_error**2 for error in errors) / len(errors)
    assert math.sqrt(mean_square) == pytest.approx(expected.standard_error, rel=0.15)


def test_confidence_intervals_hold_the_truth_as_often_as_they_say():
    inside = 0
    for _ in range(400):
        estimate = jackknife(lambda part: part.mean().item(), torch.randn(40))
        inside += abs(estimate.value) <= estimate.half_width
    assert 0.92 <= inside / 400 <= 0.98


def test_the_jackknife_leaves_the_same_group_out_of_all_sets():
    samples = torch.randn(100, 2)
    estimate = jackknife(lambda one, other: (one - other).abs().max().item(), samples, samples + 3)
    assert estimate.value == pytest.approx(3) and estimate.standard_error < 1e-5
    with pytest.raises(ValueError, match=r"19 samples are too few .* use 20 or more"):
        jackknife(frechet, samples[:19])


def test_nearest_finds_copies_and_is_not_its_own_neighbour():
    searched = torch.randn(50, 300)
    found, indices = nearest(searched[[7, 3]] + torch.tensor([[0.0], [0.01]]), [searched])
    assert indices.tolist() == [7, 3] and found[0] == 0
    assert found[1].item() == pytest.approx(0.01 * math.sqrt(300), rel=1e-3)
    own, neighbours = nearest(searched, searched.split(7), torch.arange(len(searched)))
    assert own.min() > 1 and (neighbours != torch.arange(50)).all()
