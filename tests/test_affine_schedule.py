"""A schedule given by alpha(t) and sigma(t): for loops without a diffusers scheduler."""

import math

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from reg_diffusers import (
    AffineSchedule,
    KnownNoise,
    RegularizedLoss,
    Term,
    X0Regularization,
    add_noise,
    draw_timesteps,
    noise_level,
    predict_original_sample,
    prediction_target,
)
from reg_diffusers.prediction import model_output_for, step_to
from reg_diffusers.regularizers import sparsity
from reg_diffusers.weighting import constant

pytestmark = pytest.mark.loss

KINDS = ["epsilon", "sample", "v_prediction", "flow_prediction", "velocity"]
# SiT's three paths; t = 1 is the image.
PATHS = {
    "linear": (lambda t: t, lambda t: 1 - t),
    "gvp": (lambda t: (math.pi / 2 * t).sin(), lambda t: (math.pi / 2 * t).cos()),
    "vp": (
        lambda t: (-0.25 * (1 - t) ** 2 * 19.9 - 0.05 * (1 - t)).exp(),
        lambda t: (1 - (-0.5 * (1 - t) ** 2 * 19.9 - 0.1 * (1 - t)).exp()).sqrt(),
    ),
}


def batch(seed=0, size=5):
    generator = torch.Generator().manual_seed(seed)
    x0, noise = torch.randn(2, size, 3, 4, 4, dtype=torch.float64, generator=generator)
    return x0, noise, torch.linspace(0.1, 0.9, size, dtype=torch.float64)


# v is defined for alpha^2 + sigma^2 = 1, and flow matching's output for alpha + sigma = 1.
FITTING = [(path, kind) for path in PATHS for kind in KINDS]
FITTING = [pair for pair in FITTING if pair[1] != ("v_prediction" if pair[0] == "linear" else "flow_prediction")]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("path, kind", FITTING)
def test_the_target_of_a_perfect_network_gives_back_the_image(path, kind, sign):
    schedule = AffineSchedule(*PATHS[path], kind, sign)
    x0, noise, t = batch()
    x_t = add_noise(schedule, x0, noise, t)
    target = prediction_target(schedule, x0, noise, t)
    torch.testing.assert_close(predict_original_sample(schedule, target, t, x_t), x0, atol=1e-11, rtol=0)
    torch.testing.assert_close(model_output_for(schedule, x0, t, x_t), target, atol=1e-11, rtol=0)


@pytest.mark.parametrize(
    "alpha", [lambda t: 1 - t.detach(), lambda t: 1 - t.numpy(), lambda t: torch.linspace(1, 0, 101)[(100 * t).long()]]
)
def test_a_velocity_without_derivatives_is_refused(alpha):
    x0, noise, t = batch()
    schedule = AffineSchedule(alpha, lambda t: t, "velocity")
    with pytest.raises(ValueError, match="derivatives of alpha and sigma are those of autograd, which found none"):
        predict_original_sample(schedule, noise - x0, t, x0)


def test_predicted_noise_without_a_signal_is_refused_unless_the_image_is_left_out():
    schedule = AffineSchedule(*PATHS["linear"], "epsilon")
    x0, noise, _ = batch(size=3)
    t = torch.tensor([0.0, 0.5, 1.0])
    x_t = add_noise(schedule, x0, noise, t)
    everywhere = X0Regularization(schedule, [Term(sparsity, 0.1, constant)])
    with pytest.raises(ValueError, match="cannot give x0_hat at timestep 0, where alpha is 0: leave such images out"):
        everywhere(noise, t, x_t)
    expected = 0.1 * sparsity(x0[1:].float()).sum() / 3
    matched = X0Regularization(schedule, [Term(sparsity, 0.1, lambda level: (level.snr > 0).to(level.snr))])
    torch.testing.assert_close(matched(noise, t, x_t).loss.float(), expected)
    left_out = everywhere(noise, t, x_t, image_mask=torch.tensor([False, True, True]))
    torch.testing.assert_close(left_out.loss.float(), 1.5 * expected)
    assert int(everywhere.nonfinite.dropped["sparsity"]) == 0


def test_another_number_of_values_than_timesteps_is_refused():
    _, _, t = batch()
    schedule = AffineSchedule(lambda t: torch.ones(3), lambda t: t, "sample")
    with pytest.raises(ValueError, match=r"one for each of the timesteps of shape \(5,\), not \(3,\)"):
        noise_level(schedule, t)


def test_a_velocity_is_converted_in_inference_mode():
    x0, noise, t = batch()
    schedule = AffineSchedule(*PATHS["gvp"], "velocity")
    expected = predict_original_sample(schedule, noise, t, x0)
    with torch.inference_mode():
        torch.testing.assert_close(predict_original_sample(schedule, noise, 1 * t, x0), expected)


@pytest.mark.parametrize("signs", [(-1, 1), (1, -1), (-1, -1)])
def test_alpha_and_sigma_may_be_negative(signs):
    schedule = AffineSchedule(lambda t: signs[0] * (1 - t), lambda t: signs[1] * t, "velocity")
    x0, noise, t = batch()
    x_t, target = add_noise(schedule, x0, noise, t), prediction_target(schedule, x0, noise, t)
    ours = X0Regularization(schedule, [Term(sparsity, 0.1)])
    assert 0 <= ours.verify(target, t, x_t, x0) < 1e-9
    with pytest.raises(ValueError, match="sign reversed"):
        ours.verify(-target, t, x_t, x0)
    torch.testing.assert_close(step_to(schedule, x0, t, x_t, t / 2), add_noise(schedule, x0, noise, t / 2))


def test_an_image_without_noise_keeps_a_finite_estimate():
    schedule, (x0, noise, t) = AffineSchedule(lambda t: 1 - t, lambda t: t, "flow_prediction"), batch()
    t[0] = 0
    x_t, x0_hat = add_noise(schedule, x0, noise, t), 0.5 * x0
    ours = X0Regularization(schedule, [Term(sparsity, 0.1, constant, estimator=KnownNoise(0.5))])
    found = ours(None, t, x_t, x0_hat=x0_hat, noise=noise, original_samples=x0, loss_weight=1.0)
    assert found.per_image["sparsity"].isfinite().all()


@pytest.mark.parametrize("path", PATHS)
def test_the_velocity_is_the_derivative_of_the_path(path):
    schedule = AffineSchedule(*PATHS[path], "velocity")
    x0, noise, t = batch()
    slope = (add_noise(schedule, x0, noise, t + 1e-6) - add_noise(schedule, x0, noise, t - 1e-6)) / 2e-6
    torch.testing.assert_close(prediction_target(schedule, x0, noise, t), slope, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_the_default_weight_is_that_of_the_squared_error_in_units_of_x0(kind):
    schedule = AffineSchedule(*PATHS["gvp" if kind == "v_prediction" else "linear"], kind, -1)
    x0, noise, t = batch()
    x_t, target = add_noise(schedule, x0, noise, t), prediction_target(schedule, x0, noise, t)
    moved = predict_original_sample(schedule, target + 0.1, t, x_t) - x0
    expected = (0.01 / moved.square().flatten(1).mean(1)).float()
    torch.testing.assert_close(noise_level(schedule, t).denoising_weight, expected, rtol=1e-4, atol=0)
    own = AffineSchedule(schedule.alpha, schedule.sigma, kind, denoising_weight=lambda t: 3 * t)
    torch.testing.assert_close(noise_level(own, t).denoising_weight, (3 * t).float())


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_it_is_the_schedule_of_ddpm(kind):
    scheduler = DDPMScheduler(prediction_type=kind)
    table = scheduler.alphas_cumprod
    own = AffineSchedule(lambda t: table[t.long()] ** 0.5, lambda t: (1 - table[t.long()]) ** 0.5, kind)
    x0, noise, _ = batch()
    t = torch.tensor([0, 10, 500, 900, 999])
    for function in (add_noise, prediction_target):
        torch.testing.assert_close(function(own, x0, noise, t), function(scheduler, x0, noise, t), atol=1e-6, rtol=0)
    for ours, theirs in zip(vars(noise_level(own, t)).values(), vars(noise_level(scheduler, t)).values(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_reversed_velocity_of_the_linear_path_is_that_of_flow_matching():
    flow, own = FlowMatchEulerDiscreteScheduler(), AffineSchedule(*PATHS["linear"], "velocity", sign=-1)
    x0, noise, t = batch()
    x_t = add_noise(own, x0, noise, t)
    torch.testing.assert_close(x_t, add_noise(flow, x0, noise, 1000 * (1 - t)), atol=1e-12, rtol=0)
    output = torch.randn_like(x0)
    expected = predict_original_sample(flow, output, 1000 * (1 - t), x_t)
    torch.testing.assert_close(predict_original_sample(own, output, t, x_t), expected, atol=1e-12, rtol=0)


def test_a_constant_alpha_may_be_a_number():
    exploding = AffineSchedule(lambda t: 1.0, lambda t: t, "velocity")
    x0, noise, t = batch()
    torch.testing.assert_close(prediction_target(exploding, x0, noise, t), noise)
    x_t = add_noise(exploding, x0, noise, t)
    torch.testing.assert_close(predict_original_sample(exploding, noise, t, x_t), x0)


def test_a_step_along_the_path_lands_on_it():
    schedule = AffineSchedule(*PATHS["vp"], "velocity")
    x0, noise, t = batch()
    end = t + 0.05
    there = step_to(schedule, x0, t, add_noise(schedule, x0, noise, t), end)
    torch.testing.assert_close(there, add_noise(schedule, x0, noise, end), atol=1e-12, rtol=0)


def test_it_serves_the_losses_and_the_check_of_the_wiring():
    schedule = AffineSchedule(*PATHS["linear"], "velocity")
    x0, noise, t = (part.float() for part in batch())
    regularization = X0Regularization(schedule, [Term(sparsity, 0.1)])
    x_t, target = add_noise(schedule, x0, noise, t), prediction_target(schedule, x0, noise, t)
    assert regularization.verify(target, t, x_t, x0) < 1e-5
    output = regularization(target, t, x_t)
    assert output.loss > 0 and output.weightings["sparsity"][-1] > 0
    whole = RegularizedLoss(schedule, [Term(sparsity, 0.1)])
    exact = whole(lambda x, times: target, x0, noise=noise, timesteps=t)
    assert exact.terms["denoising"] < 1e-10
    torch.testing.assert_close(exact.terms["sparsity"], output.terms["sparsity"])
    with pytest.raises(ValueError, match="AffineSchedule has no training schedule to draw timesteps from"):
        draw_timesteps(schedule, 4)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda target, t, x_t, x0: (-target, t, x_t, x0), "sign reversed: pass -model_output"),
        (lambda target, t, x_t, x0: (x0, t, x_t, x0), "this is x0, not the velocity"),
        (lambda target, t, x_t, x0: (x0 - (x_t - t.reshape(-1, 1, 1, 1) * x0), t, x_t, x0), "another noise level"),
        (lambda target, t, x_t, x0: (target, t, x_t, x0[[1, 0, 2, 3, 4]]), "in another order"),
        (lambda target, t, x_t, x0: (target, t * torch.nan, x_t, x0), "timesteps are non-finite"),
    ],
)
def test_wrong_wiring_is_named(change, message):
    schedule = AffineSchedule(*PATHS["linear"], "velocity")
    x0, noise, t = batch()
    x_t, target = add_noise(schedule, x0, noise, t), prediction_target(schedule, x0, noise, t)
    with pytest.raises(ValueError, match=message):
        X0Regularization(schedule, [Term(sparsity, 0.1)]).verify(*change(target, t, x_t, x0))


def test_time_that_runs_the_other_way_is_named():
    schedule = AffineSchedule(*PATHS["linear"], "epsilon")
    x0, noise, t = batch()
    x_t = add_noise(schedule, x0, noise, t)
    with pytest.raises(ValueError, match="time reversed: pass 1 - timesteps"):
        X0Regularization(schedule, [Term(sparsity, 0.1)]).verify(noise, 1 - t, x_t, x0)
    with pytest.raises(ValueError, match="timesteps look multiplied by 1000: pass timesteps / 1000"):
        X0Regularization(schedule, [Term(sparsity, 0.1)]).verify(noise, 1000 * t, x_t, x0)


@pytest.mark.parametrize(
    "arguments, error",
    [
        (("velocity", "other", "velocity"), TypeError),
        ((lambda t: t, lambda t: 1 - t, "noise"), ValueError),
        ((lambda t: t, lambda t: 1 - t, "velocity", 2), ValueError),
        ((lambda t: t, lambda t: 1 - t, "velocity", 1, 0.5), TypeError),
    ],
)
def test_what_it_cannot_be_is_refused(arguments, error):
    with pytest.raises(error):
        AffineSchedule(*arguments)


def test_the_whole_objective_has_the_weight_of_the_schedule():
    schedule = AffineSchedule(*PATHS["linear"], "velocity", denoising_weight=lambda t: 1 + 2 * t)
    x0, noise, t = (part.float() for part in batch())
    output = torch.randn_like(x0)
    found = RegularizedLoss(schedule)(lambda x, times: output, x0, noise=noise, timesteps=t)
    x0_hat = predict_original_sample(schedule, output, t, add_noise(schedule, x0, noise, t))
    expected = (1 + 2 * t) * (x0_hat - x0).square().flatten(1).mean(1)
    torch.testing.assert_close(found.per_image["denoising"], expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.loss, expected.mean(), rtol=1e-4, atol=1e-6)
