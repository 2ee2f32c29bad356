"""For Gaussian data and a quadratic L' the trained network is the proximal point of L' at the ideal denoiser.

With w_d the weight of the denoising loss in x_0 units, lambda(t) the weighting and c the term's weight, the objective

    w_d(t) mean (x0_hat - x_0)^2 + c lambda(t) mean (A x0_hat)^2

has, with unlimited capacity, the minimiser

    x0_hat = (I + c lambda(t) / w_d(t) A^T A)^-1 D(x_t),        D(x_t) = E[x_0 | x_t] = a C (a^2 C + s^2 I)^-1 x_t,

where C is the covariance of x_0. The training set below has exactly the moments of x_0 and eps, so nothing is random
but the seed, and the network is one matrix per timestep, so capacity is not limited.
"""

import diffusers
import pytest
import torch
from torch import nn

from reg_diffusers import weighting
from reg_diffusers.objective import RegularizedLoss, Term
from reg_diffusers.prediction import noise_level

pytestmark = pytest.mark.loss

DIM = 4
STEPS = 6
MIXING = torch.tensor(
    [[1.0, 0.0, 0.0, 0.0], [0.5, 0.8, 0.0, 0.0], [0.0, 0.3, 0.6, 0.0], [0.2, 0.0, 0.4, 0.3]]
).double()
COVARIANCE = MIXING @ MIXING.T
PENALTY = torch.tensor([[1.0, -1.0, 0.0, 0.0], [0.0, 1.0, -1.0, 0.0], [0.0, 0.0, 1.0, -1.0], [0.3, 0.3, 0.3, 0.3]])


def quadratic(x0_hat):
    """mean (A x)^2"""
    return (x0_hat.flatten(1) @ PENALTY.to(x0_hat).T).square().mean(1)


class LinearDenoiser(nn.Module):
    """One matrix for each of a few timesteps."""

    def __init__(self, timesteps):
        super().__init__()
        self.timesteps = timesteps
        self.matrices = nn.Parameter(torch.zeros(len(timesteps), DIM, DIM, dtype=torch.float64))

    def forward(self, sample, t):
        place = (t[:, None] == self.timesteps).int().argmax(1)
        return (self.matrices[place] @ sample.flatten(1)[:, :, None]).reshape(sample.shape)


def moment_matched_pairs():
    """(x_0, eps), 2 DIM of each, whose second moments are exactly those of N(0, C) and an independent N(0, I)."""
    generator = torch.Generator().manual_seed(0)
    orthogonal, _ = torch.linalg.qr(torch.randn(2 * DIM, 2 * DIM, generator=generator, dtype=torch.float64))
    whitened = (2 * DIM) ** 0.5 * orthogonal
    return whitened[:, :DIM] @ MIXING.T, whitened[:, DIM:]


def make_scheduler(kind):
    """Few timesteps that span SNRs from about 30 to 0.1, so that the optimum is well conditioned."""
    if kind == "flow_prediction":
        return diffusers.FlowMatchEulerDiscreteScheduler(), torch.tensor([150.0, 200.0, 300.0, 400.0, 600.0, 750.0])
    betas = [0.03, 0.08, 0.2, 0.3, 0.5, 0.6]
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=STEPS, trained_betas=betas, prediction_type=kind)
    return scheduler, torch.arange(STEPS)


def train(loss_fn, model, timesteps):
    """Sets the matrices to the minimum of the loss over every pair at every timestep.

    The loss is quadratic in them and no matrix is shared between timesteps, so that gradients at 0 and at the unit
    matrices give the whole Hessian, and one Newton step is exact.
    """
    original, noise = moment_matched_pairs()
    batch = {
        "noise": noise.repeat(len(timesteps), 1).reshape(-1, 1, 2, 2),
        "timesteps": timesteps.repeat_interleave(len(noise)),
    }
    original = original.repeat(len(timesteps), 1).reshape(-1, 1, 2, 2)

    def gradient_at(matrices):
        with torch.no_grad():
            model.matrices.copy_(matrices)
        loss = loss_fn(model, original, **batch).loss
        return torch.autograd.grad(loss, model.matrices)[0].flatten(1)

    units = torch.eye(DIM**2, dtype=torch.float64).reshape(-1, 1, DIM, DIM)
    start = gradient_at(torch.zeros(DIM, DIM))
    hessian = torch.stack([gradient_at(unit) - start for unit in units], dim=2)
    minimum = torch.linalg.solve(hessian, -start).reshape(model.matrices.shape)
    assert gradient_at(minimum).abs().max() < 1e-13


def x0_hat_matrix(kind, output_matrix, alpha, sigma):
    """The matrix from x_t to x0_hat for the one from x_t to the network's output."""
    identity = torch.eye(DIM, dtype=torch.float64)
    return {
        "epsilon": (identity - sigma * output_matrix) / alpha,
        "sample": output_matrix,
        "v_prediction": alpha * identity - sigma * output_matrix,
        "flow_prediction": identity - sigma * output_matrix,
    }[kind]


def ideal_denoiser(alpha, sigma):
    identity = torch.eye(DIM, dtype=torch.float64)
    return alpha * COVARIANCE @ torch.linalg.inv(alpha**2 * COVARIANCE + sigma**2 * identity)


def proximal_point(ratio):
    """The matrix of the proximal point of ratio * L': both losses are means over DIM numbers."""
    penalty = PENALTY.double()
    return torch.linalg.inv(torch.eye(DIM, dtype=torch.float64) + ratio * penalty.T @ penalty)


@pytest.mark.parametrize(("weighting_name", "weight"), [("constant", 0.3), ("matched", 0.5), ("snr", 0.5)])
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction", "flow_prediction"])
def test_training_converges_to_the_proximal_point_of_the_ideal_denoiser(kind, weighting_name, weight):
    scheduler, timesteps = make_scheduler(kind)
    weigh = getattr(weighting, weighting_name)
    model = LinearDenoiser(timesteps)
    train(RegularizedLoss(scheduler, [Term(quadratic, weight, weigh)]), model, timesteps)
    level = noise_level(scheduler, timesteps)
    data_weight = {
        "epsilon": level.snr,
        "sample": torch.ones(STEPS),
        "v_prediction": level.snr + 1,
        "flow_prediction": 1 / level.sigma**2,
    }[kind].double()
    factor = weigh(level).double()
    if weighting_name == "matched":
        assert set((factor == 0).tolist()) == {True, False}  # the gate is closed at some timesteps, open at others
    for i, (alpha, sigma) in enumerate(zip(level.alpha.double(), level.sigma.double(), strict=True)):
        actual = x0_hat_matrix(kind, model.matrices[i].detach(), alpha, sigma)
        expected = proximal_point(weight * factor[i] / data_weight[i]) @ ideal_denoiser(alpha, sigma)
        torch.testing.assert_close(actual, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_min_snr_changes_what_the_extra_loss_competes_with(kind):
    scheduler, timesteps = make_scheduler(kind)
    model, gamma, weight = LinearDenoiser(timesteps), 3.0, 0.4
    term = Term(quadratic, weight, weighting.constant)
    train(RegularizedLoss(scheduler, [term], snr_gamma=gamma), model, timesteps)
    level = noise_level(scheduler, timesteps)
    assert level.snr.min() < gamma < level.snr.max()
    for i, (alpha, sigma) in enumerate(zip(level.alpha.double(), level.sigma.double(), strict=True)):
        actual = x0_hat_matrix(kind, model.matrices[i].detach(), alpha, sigma)
        ratio = weight / min(float(alpha**2 / sigma**2), gamma)
        torch.testing.assert_close(actual, proximal_point(ratio) @ ideal_denoiser(alpha, sigma), rtol=0, atol=2e-6)


def test_to_first_order_the_image_moves_by_half_the_ratio_along_the_gradient():
    """x0_hat = D - lambda / (2 w_d) grad L'(D) + O(lambda^2): halving lambda quarters what is left."""
    kind = "epsilon"
    scheduler, timesteps = make_scheduler(kind)
    level = noise_level(scheduler, timesteps)
    alpha, sigma = level.alpha[2].double(), level.sigma[2].double()
    ideal = ideal_denoiser(alpha, sigma)
    gradient = 2 * PENALTY.double().T @ PENALTY.double() @ ideal  # of the sum; both means have the factor 1 / DIM
    left = []
    for weight in (0.04, 0.02):
        model = LinearDenoiser(timesteps)
        train(RegularizedLoss(scheduler, [Term(quadratic, weight, weighting.snr)]), model, timesteps)
        actual = x0_hat_matrix(kind, model.matrices[2].detach(), alpha, sigma)
        left.append((actual - ideal + weight / 2 * gradient).norm())
        assert left[-1] < 0.2 * (actual - ideal).norm()
    assert (left[0] / left[1]).item() == pytest.approx(4, rel=0.1)


def test_a_constant_weight_replaces_the_data_by_the_wish_at_high_noise():
    """lambda / SNR grows without bound, so x0_hat leaves the data; `matched` leaves the high noise levels alone."""
    scheduler, timesteps = make_scheduler("epsilon")
    level = noise_level(scheduler, timesteps)
    kept = {}
    for weigh in (weighting.constant, weighting.matched):
        model = LinearDenoiser(timesteps)
        train(RegularizedLoss(scheduler, [Term(quadratic, 1.0, weigh)]), model, timesteps)
        last = x0_hat_matrix(
            "epsilon", model.matrices[-1].detach(), level.alpha[-1].double(), level.sigma[-1].double()
        )
        ideal = ideal_denoiser(level.alpha[-1].double(), level.sigma[-1].double())
        kept[weigh.__name__] = (last.norm() / ideal.norm()).item()
    assert kept["matched"] == pytest.approx(1, abs=1e-6)
    assert kept["constant"] < 0.3
