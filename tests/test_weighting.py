"""Every weighting follows its closed form in the noise level and stays finite at both ends of the schedule."""

import math

import diffusers
import pytest
import torch

from reg_diffusers import weighting
from reg_diffusers.prediction import NoiseLevel, noise_level

pytestmark = pytest.mark.loss

PLAIN = [name for name in weighting.__all__ if not isinstance(getattr(weighting, name), type)]  # no own argument

INFINITY = math.inf
GATE_OPENS_AT = 10 / 7  # g = 1 / (1 + (10 / SNR)^2) = 0.02


def level_of(snr, denoising_weight=None):
    """A noise level with alpha^2 + sigma^2 = 1 and, by default, the denoising weight of noise prediction."""
    snr = torch.tensor(snr)
    sigma = (1 + snr).rsqrt()
    weight = snr if denoising_weight is None else torch.tensor(denoising_weight).expand_as(snr)
    return NoiseLevel(torch.arange(len(snr)).float(), (1 - sigma**2).sqrt(), sigma, snr, weight)


def test_constant_is_one():
    assert torch.equal(weighting.constant(level_of([0.0, 1.0, INFINITY])), torch.ones(3))


def test_snr_is_the_signal_to_noise_ratio():
    assert torch.equal(weighting.snr(level_of([0.0, 0.3, 7.0])), torch.tensor([0.0, 0.3, 7.0]))


def test_alpha_bar_is_the_schedules_table():
    scheduler = diffusers.DDPMScheduler()
    actual = weighting.alpha_bar(noise_level(scheduler, torch.arange(1000)))
    torch.testing.assert_close(actual, scheduler.alphas_cumprod)


def test_alpha_bar_depends_on_the_snr_only():
    """Euler's coordinates (1, sigma) and the circle's name one noise level."""
    timesteps = torch.arange(0, 1000, 37)
    preserving = weighting.alpha_bar(noise_level(diffusers.DDPMScheduler(), timesteps))
    exploding = weighting.alpha_bar(noise_level(diffusers.EulerDiscreteScheduler(), timesteps))
    torch.testing.assert_close(preserving, exploding)


def test_truncated_snr_is_at_least_its_floor():
    level = level_of([0.0, 0.9, 1.0, 5.0])
    assert torch.equal(weighting.truncated_snr(level), torch.tensor([1.0, 1.0, 1.0, 5.0]))
    assert torch.equal(weighting.truncated_snr(level, floor=2.0), torch.tensor([2.0, 2.0, 2.0, 5.0]))


def test_low_noise_keeps_the_timesteps_below_its_limit():
    level = noise_level(diffusers.DDPMScheduler(), [0, 199, 200, 999])
    assert torch.equal(weighting.low_noise(level), torch.tensor([1.0, 1.0, 0.0, 0.0]))
    assert torch.equal(weighting.low_noise(level, max_timestep=200.5), torch.tensor([1.0, 1.0, 1.0, 0.0]))


def test_matched_is_the_gated_denoising_weight():
    snr = torch.tensor([2.0, 5.0, 10.0, 20.0, 50.0])
    expected = snr * snr**2 / (snr**2 + 100)
    torch.testing.assert_close(weighting.matched(level_of(snr.tolist())), expected)
    assert weighting.matched(level_of([10.0])).item() == pytest.approx(5.0)  # the gate is 1/2 at snr0


def test_matched_has_its_three_parameters():
    actual = weighting.matched(level_of([4.0, 8.0]), snr0=4.0, cap=6.0, threshold=0.6)
    torch.testing.assert_close(actual, torch.tensor([0.0, 6.0 * 0.8]))  # gates 1/2 and 4/5


def test_matched_is_exactly_zero_where_the_gate_is_below_its_threshold():
    below, above = GATE_OPENS_AT * (1 - 1e-4), GATE_OPENS_AT * (1 + 1e-4)
    actual = weighting.matched(level_of([0.0, 0.1, below, above]))
    assert actual[:3].tolist() == [0, 0, 0]
    assert actual[3].item() == pytest.approx(0.02 * above, rel=1e-3)


def test_matched_is_capped_and_has_a_limit_at_infinite_snr():
    actual = weighting.matched(level_of([1e3, 1e6, INFINITY]))
    assert actual[0].item() == pytest.approx(100 / (1 + 1e-4))
    assert actual[1:].tolist() == pytest.approx([100, 100], rel=1e-6)
    assert weighting.matched(level_of([INFINITY], denoising_weight=1.0)).item() == 1  # sample prediction: w_d = 1


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_matched_never_outweighs_the_denoising_loss(kind):
    """So the displacement lambda / (2 w_d) grad L' is bounded by weight / 2 grad L' at every timestep."""
    level = noise_level(diffusers.DDPMScheduler(prediction_type=kind), torch.arange(1000))
    ratio = weighting.matched(level) / level.denoising_weight
    assert (ratio <= 1).all()
    assert ratio.max() > 0.7  # 100 / (1e4 + 1) at t = 0 of noise prediction is the cap; in between the gate opens
    assert (weighting.matched(level) <= 100).all()
    assert ((weighting.matched(level) == 0) == (level.snr < GATE_OPENS_AT)).all()


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.DDPMScheduler(),
        diffusers.DDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True),
        diffusers.EulerDiscreteScheduler(prediction_type="sample"),
        diffusers.FlowMatchEulerDiscreteScheduler(),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_weightings_of_a_whole_schedule_are_finite_float32_and_one_per_image(name, scheduler):
    timesteps = torch.arange(1, 1000)
    weights = getattr(weighting, name)(noise_level(scheduler, timesteps))
    assert weights.dtype == torch.float32
    assert weights.shape == (999,)
    assert weights.isfinite().all()
    assert (weights >= 0).all()


@pytest.mark.parametrize("name", PLAIN)
def test_weightings_fall_with_the_noise_level(name):
    level = noise_level(diffusers.DDPMScheduler(), torch.arange(1000))
    assert (getattr(weighting, name)(level).diff() <= 0).all()


@pytest.mark.parametrize("name", [name for name in PLAIN if name not in ("snr", "truncated_snr")])
def test_weightings_other_than_snr_are_finite_at_the_clean_end(name):
    """sigma = 0 is the last timestep of a flow-matching schedule."""
    level = noise_level(diffusers.FlowMatchEulerDiscreteScheduler(), [0.0, 1000.0])
    assert level.snr.tolist() == [INFINITY, 0]
    assert getattr(weighting, name)(level).isfinite().all()


def test_a_gate_is_flat_above_an_snr_and_exactly_0_below():
    scheduler = diffusers.DDPMScheduler()
    level = noise_level(scheduler, torch.arange(1000))
    found = weighting.gated(0.184)(level)
    assert torch.equal(found, (level.snr >= 0.184).float()) and found.dtype == torch.float32
    assert weighting.gated(0.0)(level).min() == 1 and weighting.gated(3.0) == weighting.gated(3)
    for wrong in (-1.0, math.nan, math.inf, "3"):
        with pytest.raises(ValueError, match="min_snr must be a finite number of at least 0"):
            weighting.gated(wrong)
