"""What --compare says of two models: with intervals, in the words of `evaluate`, of the loss that was trained."""

import json
import math

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from reg_diffusers import Term, draw_timesteps
from reg_diffusers.evaluation.comparison import describe_change, difference, measure
from reg_diffusers.evaluation.judgement import change, judge_samples
from reg_diffusers.evaluation.measuring import denoising_losses
from reg_diffusers.objective import timesteps_of_training
from reg_diffusers.regularizers import total_variation
from reg_diffusers.runs.measurement import Measurement, read_comparison, write_comparison

pytestmark = pytest.mark.training

TERM = Term(total_variation, 1.0)


def pictures(seed, number=60, scale=1.0):
    return scale * torch.randn(number, 1, 6, 6, generator=torch.Generator().manual_seed(seed))


def test_a_comparison_and_an_evaluation_say_the_same_of_the_same_samples():
    data = pictures(0)
    for scale in (1.01, 1.3):
        plain, trained = pictures(1), pictures(2, scale=scale)
        rows = [measure(samples, data, [TERM], 0.1) for samples in (plain, trained)]
        judged = [judge_samples(samples, data, {"total_variation": total_variation}) for samples in (plain, trained)]
        said = describe_change(("without", "with"), *rows, difference(torch.zeros(9), torch.zeros(9)))
        assert (
            change("total_variation", judged[1].terms["total_variation"], judged[0].terms["total_variation"]) in said
        )
        name = "sliced Wasserstein"
        assert change(name, judged[1].distances[name], judged[0].distances[name]) in said
    assert "total_variation higher by" in said and said.startswith("with against without: ")


def test_a_comparison_of_too_few_images_says_so():
    rows = [measure(pictures(seed, 2), pictures(0, 2), [TERM], 0.1) for seed in (1, 2)]
    said = describe_change(("without", "with"), *rows, difference(torch.zeros(1), torch.ones(1)))
    assert "sliced Wasserstein" in said and "too few images for a confidence interval" in said


def test_a_small_cost_shows_because_both_models_see_the_same_noise():
    """The losses of single images spread ten times as much as the models differ."""
    before = torch.rand(256, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    after = before + 0.005 + 0.001 * torch.randn(256, generator=torch.Generator().manual_seed(1))
    cost = difference(after, before)
    assert cost.value == pytest.approx(0.005, abs=cost.half_width)
    assert cost.half_width < 0.0002
    rows = [Measurement(256, {}, {}, 0.1, losses.mean().item(), 0.01) for losses in (before, after)]
    assert "denoising loss higher by 0.00" in describe_change(("plain", "new"), *rows, cost)


@pytest.mark.parametrize(
    "scheduler",
    [DDPMScheduler(num_train_timesteps=50), FlowMatchEulerDiscreteScheduler(num_train_timesteps=50, shift=3.0)],
    ids=["DDPM", "flow"],
)
def test_the_comparison_is_at_the_timesteps_that_were_trained(scheduler):
    quantiles = (torch.arange(50) + 0.5) / 50
    drawn = draw_timesteps(scheduler, 10_000).unique()
    torch.testing.assert_close(timesteps_of_training(scheduler, quantiles).sort().values, drawn)
    seen = []

    def model(sample, timesteps):
        seen.append(timesteps)
        return sample

    denoising_losses(model, scheduler, pictures(0, 50), seed=0)
    seen = torch.cat(seen)
    assert (seen[:, None] - drawn).abs().min(1).values.max() < 1e-4
    torch.testing.assert_close(seen.unique(), drawn)


def test_the_comparison_has_the_weight_that_was_trained():
    """Min-SNR weighs an error of noise prediction by min(SNR, gamma) / SNR."""
    scheduler, original = DDPMScheduler(), pictures(0, 64)

    def losses(**options):
        return denoising_losses(lambda sample, t: torch.zeros_like(sample), scheduler, original, 0, **options)

    plain, weighted = losses(), losses(snr_gamma=5.0)
    assert (weighted <= plain * (1 + 1e-6)).all() and weighted.mean() < 0.95 * plain.mean()
    torch.testing.assert_close(losses(snr_gamma=1e12), plain, rtol=1e-5, atol=0)


def test_a_number_that_is_not_finite_is_null_and_comes_back(tmp_path):
    rows = {"samples": Measurement(2, {"a": math.nan}, {"a": math.inf}, math.nan, math.nan)}
    write_comparison(tmp_path / "comparison.json", rows, seed=0)
    text = (tmp_path / "comparison.json").read_text()
    assert "NaN" not in text and json.loads(text)["rows"]["samples"]["terms"] == {"a": None}
    found = read_comparison(tmp_path / "comparison.json")["samples"]
    assert math.isnan(found.distance) and math.isnan(found.terms["a"]) and found.denoising_loss is None
