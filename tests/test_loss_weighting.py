"""Weights of the denoising loss by noise level, and densities of the timesteps."""

import json

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from huggingface_hub import ModelCard
from runs import metrics, refusal

from reg_diffusers import RegularizedLoss, Term, draw_timesteps, noise_level
from reg_diffusers.loss_weighting import DENSITIES, LOSS_WEIGHTINGS, cosmap, logit_normal, mode, sigma_sqrt, velocity
from reg_diffusers.objective import timesteps_of_training
from reg_diffusers.weighting import constant, matched

pytestmark = pytest.mark.loss

FLOW = FlowMatchEulerDiscreteScheduler()
SCHEDULERS = {
    "epsilon": DDPMScheduler(),
    "sample": DDPMScheduler(prediction_type="sample"),
    "v_prediction": DDPMScheduler(prediction_type="v_prediction"),
    "flow": FLOW,
}
WEIGHTINGS = [LOSS_WEIGHTINGS[name] for name in ("sigma_sqrt", "cosmap", "v")]


def test_the_factors_of_flow_matching_are_those_of_diffusers_scripts():
    timesteps = torch.tensor([1.0, 50.0, 300.0, 999.0, 1000.0])
    level = noise_level(FLOW, timesteps)
    sigmas = timesteps / 1000
    for name, weighting in (("sigma_sqrt", sigma_sqrt), ("cosmap", cosmap)):
        torch.testing.assert_close(weighting(level), compute_loss_weighting_for_sd3(name, sigmas), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_v_is_the_squared_error_of_the_velocity_for_every_prediction(kind):
    scheduler = SCHEDULERS[kind]
    timesteps = torch.tensor([300.0, 500.0, 900.0] if kind == "flow" else [300, 500, 900])
    images, noise, output = torch.randn(3, 3, 1, 8, 8).unbind()
    level = noise_level(scheduler, timesteps)
    alpha, sigma = (part.reshape(-1, 1, 1, 1) for part in (level.alpha, level.sigma))
    x_t = alpha * images + sigma * noise
    x0_hat = {
        "epsilon": (x_t - sigma * output) / alpha,
        "sample": output,
        "v_prediction": alpha * x_t - sigma * output,
        "flow": x_t - sigma * output,
    }[kind]
    noise_hat = (x_t - alpha * x0_hat) / sigma
    if kind == "flow":
        error = F.mse_loss(noise_hat - x0_hat, noise - images)
    else:
        error = F.mse_loss(alpha * noise_hat - sigma * x0_hat, alpha * noise - sigma * images)
    loss = RegularizedLoss(scheduler, loss_weighting=velocity)(
        lambda x, t: output, images, noise=noise, timesteps=timesteps
    )
    torch.testing.assert_close(loss.loss, error, rtol=1e-4, atol=1e-5)


def paired(x0_hat, /, *, original_samples):
    return (x0_hat - original_samples).square().flatten(1).mean(1)


paired.needs = ("original_samples",)


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=lambda weighting: weighting.__name__)
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_lambda_over_w_d_is_the_ratio_of_the_gradients(kind, weighting):
    """L' = mean |x_0 - x0_hat|^2 has the direction of the denoising loss, so the ratio is that of the weights."""
    scheduler = SCHEDULERS[kind]
    timesteps = torch.tensor([20.0, 200.0] if kind == "flow" else [20, 80])
    images, noise, output = torch.randn(3, 2, 1, 8, 8).unbind()
    output.requires_grad_()
    call = {"noise": noise, "timesteps": timesteps}
    gradients = {}
    loss_fn = RegularizedLoss(scheduler, [Term(paired, 0.3, matched)], loss_weighting=weighting)
    parts = loss_fn(lambda x, t: output, images, **call)
    for name, weight in (("denoising", 1.0), ("paired", 0.3)):
        (gradients[name],) = torch.autograd.grad(weight * parts.terms[name], output, retain_graph=True)
    level = noise_level(scheduler, timesteps)
    w_d = level.denoising_weight * weighting(level)
    gate = 1 / (1 + (10 / level.snr) ** 2)
    expected = 0.3 * w_d.clamp(max=100) * gate * (gate >= 0.02) / w_d
    ratio = gradients["paired"].flatten(1).norm(dim=1) / gradients["denoising"].flatten(1).norm(dim=1)
    torch.testing.assert_close(ratio, expected, rtol=2e-3, atol=1e-6)
    plain = RegularizedLoss(scheduler, [Term(paired, 0.3, constant)], loss_weighting=weighting)
    torch.testing.assert_close(plain(lambda x, t: output, images, **call).terms["denoising"], parts.terms["denoising"])


def test_a_weight_of_one_is_the_plain_loss():
    images, noise, output = torch.randn(3, 4, 1, 8, 8).unbind()
    call = {"noise": noise, "timesteps": torch.tensor([1, 200, 500, 999])}
    ones = RegularizedLoss(DDPMScheduler(), loss_weighting=lambda level: torch.ones_like(level.snr))
    plain = RegularizedLoss(DDPMScheduler())
    one, other = (loss_fn(lambda x, t: output, images, **call) for loss_fn in (ones, plain))
    torch.testing.assert_close(one.loss, other.loss)
    with pytest.raises(ValueError, match="snr_gamma and loss_weighting both set the weight"):
        RegularizedLoss(DDPMScheduler(), snr_gamma=5.0, loss_weighting=cosmap)


# Densities


def test_the_densities_are_those_of_diffusers_scripts():
    drawn = compute_density_for_timestep_sampling("mode", 1000, mode_scale=1.29, generator=torch.manual_seed(0))
    quantiles = torch.rand(1000, generator=torch.manual_seed(0))
    torch.testing.assert_close(mode(quantiles).float(), drawn, rtol=1e-4, atol=1e-5)
    spread = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    logits = torch.logit(logit_normal(spread))
    assert abs(logits.mean()) < 1e-6 and abs(logits.std() - 1) < 1e-3


@pytest.mark.parametrize("name", ["logit_normal", "mode"])
@pytest.mark.parametrize("kind", ["epsilon", "flow"])
def test_timesteps_are_drawn_inside_the_schedule_and_more_in_its_middle(kind, name):
    scheduler, density = SCHEDULERS[kind], DENSITIES[name]
    torch.manual_seed(0)
    timesteps = draw_timesteps(scheduler, 20_000, density).double()
    low, high = (1, 1000) if kind == "flow" else (0, 999)
    assert timesteps.min() >= low and timesteps.max() <= high
    middle = ((timesteps > 250) & (timesteps <= 750)).double().mean()
    quantile = torch.linspace(0, 1, 100_001, dtype=torch.float64)[1:-1]
    places = density(quantile)
    expected = ((places > 0.25) & (places < 0.75)).double().mean()
    assert expected > 0.55 and abs(middle - expected) < 0.02
    ends = timesteps_of_training(scheduler, torch.tensor([0.0, 1.0]), density)
    assert ends.tolist() == [low, high] or ends.tolist() == [high, low]


# By the command line


@pytest.mark.training
def test_the_flags_reach_training_record_card_and_comparison(train):
    flags = (
        "--prediction_type sample --loss_weighting v --timestep_sampling logit_normal --max_train_steps 3 --compare"
    )
    out = train(*flags.split(), "--num_threads", 1)
    objective = json.loads((out / "reg_config.json").read_text())["objective"]
    assert objective["loss_weighting"] == "v" and objective["timestep_sampling"] == "logit_normal"
    text = ModelCard((out / "README.md").read_text()).text
    assert "L = w(t) * ||x_0 - model(x_t, t)||^2" in text and "drawn by the logit_normal density" in text
    plain = train(*"--prediction_type sample --max_train_steps 3".split(), "--num_threads", 1, output="plain_loss")
    assert metrics(out)[-1]["denoising"] != metrics(plain)[-1]["denoising"]


@pytest.mark.training
def test_two_weights_of_one_loss_are_refused(train, capsys):
    error = refusal(train, capsys, "--snr_gamma", 5, "--loss_weighting", "cosmap")
    assert error.endswith("--snr_gamma and --loss_weighting both weight the denoising loss: pass only one")
