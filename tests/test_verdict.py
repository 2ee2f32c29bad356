"""The verdict goes by effect: closed forms of the best step, and wishes whose opposites cannot both make sense."""

import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler

from reg_diffusers import Term, diagnose, judge, regularizers
from reg_diffusers.data.training_data import load_training_data
from reg_diffusers.diagnosis.effect import effect
from reg_diffusers.diagnosis.text import describe, write_json
from reg_diffusers.diagnosis.verdict import SMALLEST_EFFECT
from reg_diffusers.settings.arguments import parse_args

pytestmark = pytest.mark.loss

VELOCITY = DDPMScheduler(prediction_type="v_prediction")
WISHES = Path(__file__).parents[1] / "docs" / "benchmarks"


@pytest.fixture(scope="module")
def wishes():
    sys.path.insert(0, str(WISHES))
    try:
        import wishes
    finally:
        sys.path.remove(str(WISHES))
    return wishes


@pytest.fixture(scope="module")
def embedded():
    data = load_training_data(parse_args(["--resolution", "16"]).data)
    return data.normalization.normalize(data.examples.__getitems__(list(range(400)))["values"])


@pytest.fixture(scope="module")
def digits():
    datasets = pytest.importorskip("sklearn.datasets", reason="the digits come with scikit-learn")
    return torch.tensor(datasets.load_digits().images, dtype=torch.float32)[:, None] / 8 - 1


@pytest.mark.parametrize(
    "pictures, weights",
    [
        pytest.param("embedded", (0.05, 0.1, 0.5), marks=pytest.mark.slow),
        pytest.param("digits", (0.05, 0.5), marks=pytest.mark.slow),
        ("digits", (0.1,)),
    ],
)
def test_a_wish_and_its_opposite_never_both_make_sense(pictures, weights, wishes, request):
    images, both, some = request.getfixturevalue(pictures)[:120], [], 0
    assert len(wishes.PAIRS) >= 10
    for pair, regularizers_of_pair in wishes.PAIRS.items():
        for weight in weights:
            answers = [answer(regularizer, weight, images) for regularizer in regularizers_of_pair]
            helps = [said.startswith("makes sense") for said in answers]
            both += [(pair, weight, answers)] if all(helps) else []
            some += any(helps)
    assert not both
    assert some >= 3  # a judge that refuses everything is no judge


def answer(regularizer, weight, images):
    return judge(diagnose(VELOCITY, Term(regularizer, weight), images, num_levels=2)).answer


def test_a_white_border_on_dark_borders_is_named(digits, wishes):
    """Its cosine is positive, as that of every convex loss, and beyond two standard errors."""
    found = diagnose(VELOCITY, Term(partial(wishes.border, target=1.0), 0.5), digits, num_levels=4)
    assert found.data.agreement > 2 * found.data.agreement_error
    verdict = judge(found)
    assert verdict.answer == "contradicts the data"
    assert verdict.reasons[0].startswith("Your data do not satisfy this")
    assert f"threshold {SMALLEST_EFFECT:.0%}" in verdict.reasons[0]
    assert describe(found, verdict).startswith("Verdict: border contradicts the data.\n  - Your data do not satisfy")
    short = describe(found, verdict, verbose=False).splitlines()
    trades = [line for line in short if line.startswith("Not recommended: ")]
    assert [line.split()[2] for line in trades] == ["1%", "5%"]
    for line, costs in zip(trades, found.affordable.values(), strict=True):
        own = next(cost for cost in costs if cost.weighting == "matched")
        assert f"{own.fall:.1%} (--reg_weighting matched --reg_weight {own.weight:.2g})" in line
    assert not any("shift" in line for line in short)


def test_a_wish_that_the_data_fulfil_about_too_few_pixels_has_no_effect():
    """One of 256 pixels: of white noise at most 1/256 can be removed, and the data are not contradicted."""
    images = torch.rand(2000, 1, 16, 16, generator=torch.Generator().manual_seed(0)) - 0.5
    images[..., 0, 0] = -1

    def corner(images, /):
        return (images[:, :, 0, 0] + 1).square().mean(1)

    found = diagnose(VELOCITY, Term(corner, 1.0), images, num_levels=4)
    assert found.data.effect.removed == pytest.approx(1 / 256, rel=3 * (2 / found.held_out) ** 0.5)
    assert found.data.effect.moved == 0
    verdict = judge(found)
    assert verdict.answer == "has no effect"
    assert verdict.recommended is None


def test_the_effect_of_a_quadratic_loss_has_a_closed_form():
    """L' = |x - m|^2 / 2 with white noise of variance v: removed v / (v + b), b = E|x_0 - m|^2 / N; moved b of it."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(2000, 1, 8, 8, generator=generator)  # b = 1
    noise = 0.5 * torch.randn(2000, 1, 8, 8, generator=generator)  # v = 1/4
    found = effect(clean + noise, clean, noise)
    assert found.removed == pytest.approx(0.2, rel=0.02)
    assert found.clean_pull == pytest.approx(0.8, rel=0.02)
    assert found.moved == pytest.approx(0.16, rel=0.02)
    assert found.net == pytest.approx(found.removed - found.moved, abs=1e-12)
    # no step of any other length removes more
    for factor in (0.8, 1.2):
        left = noise - factor * 0.2 * (clean + noise)
        assert 1 - left.square().mean() / noise.square().mean() < found.removed


def test_a_loss_that_adds_to_the_error_is_given_no_step():
    noise = torch.randn(50, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    found = effect(-noise, torch.zeros_like(noise), noise)
    assert (found.removed, found.moved, found.net) == (0, 0, 0)


def test_the_numbers_that_decide_are_in_the_json(tmp_path, embedded):
    found = diagnose(VELOCITY, Term(regularizers.total_variation, 0.02), embedded, num_levels=3)
    verdict = judge(found)
    assert verdict.answer.startswith("makes sense")
    write_json(tmp_path / "found.json", found, verdict)
    written = json.loads((tmp_path / "found.json").read_text())
    assert set(written["data"]["effect"]) == {"removed", "moved", "net", "net_error", "clean_pull"}
    assert written["data"]["effect"]["net"] > written["verdict"]["smallest_effect"] == SMALLEST_EFFECT
