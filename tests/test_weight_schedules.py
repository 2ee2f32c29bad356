"""Schedules of a weight: their formulas, the loss in anyone's loop, and --reg_schedule of train_reg.py."""

import copy
import json
import re

import pytest
import torch
import yaml
from losses import images, mean_square, scheduler_of
from runs import differ, metrics, refusal, weights

from reg_diffusers import (
    AutoWeight,
    RegularizedLoss,
    Target,
    Term,
    TermError,
    X0Regularization,
    balance,
    term_values,
)
from reg_diffusers.adaptive_weights import EVERY
from reg_diffusers.specs import load_schedule
from reg_diffusers.weight_schedules import every, linear_decay, warmup
from reg_diffusers.weighting import constant

SCHEDULER = scheduler_of("sample")
TIMES = torch.tensor([10, 20, 30, 40])


def of_batch(*terms, seed=0, **more):
    """The loss of a batch of 4 whose output is x0_hat itself, and the output."""
    original, noise, output = images(3, 4, 1, 3, 2, seed=seed)
    output.requires_grad_()
    loss_fn = terms[0] if isinstance(terms[0], RegularizedLoss) else RegularizedLoss(SCHEDULER, terms)
    return loss_fn(lambda x, t: output, original, noise=noise, timesteps=TIMES, **more), output


# Formulas


@pytest.mark.loss
def test_the_formulas():
    assert [warmup(4)(step) for step in (0, 1, 2, 3, 4, 5)] == [0, 0.25, 0.5, 0.75, 1, 1]
    assert [linear_decay(2, 4)(step) for step in (0, 2, 3, 4, 5)] == [1, 1, 0.5, 0, 0]
    assert [every(3)(step) for step in range(7)] == [1, 0, 0, 1, 0, 0, 1]
    product = warmup(4) * every(2) * linear_decay(4, 8)
    assert [product(step) for step in (0, 1, 2, 4, 6, 8)] == [0, 0, 0.5, 1, 0.5, 0]
    assert product == warmup(4) * every(2) * linear_decay(4, 8) != warmup(4) * every(2)


@pytest.mark.loss
@pytest.mark.parametrize(
    "wrong", [lambda: warmup(0), lambda: every(-1), lambda: every(2.5), lambda: every("4"), lambda: warmup(None)]
)
def test_a_number_of_steps_below_one_is_refused(wrong):
    with pytest.raises(ValueError, match="steps must be an integer of at least 1, not"):
        wrong()


@pytest.mark.loss
def test_a_decay_that_ends_before_it_starts_is_refused():
    with pytest.raises(ValueError, match="end must be an integer of at least 6, not 5"):
        linear_decay(5, 5)


@pytest.mark.loss
def test_specs_are_schedules_and_wrong_ones_list_the_signatures():
    assert load_schedule("constant") is None
    assert load_schedule("linear_decay(start=2, end=4)") == linear_decay(2, 4)
    assert [load_schedule("warmup(4) *every(2)")(step) for step in range(4)] == [0, 0, 0.5, 0]
    known = re.escape("known: warmup(steps), linear_decay(start, end), every(steps); your own: module:attribute")
    for wrong in ("warm(4)", "warmup(4) * nothing", "constant * warmup(4)", ""):
        with pytest.raises(ValueError, match=f"unknown schedule .*{known}"):
            load_schedule(wrong)
    with pytest.raises(ValueError, match=r"needs end: it is linear_decay\(start.*end"):
        load_schedule("linear_decay(4)")
    with pytest.raises(ValueError, match="the arguments must be numbers"):
        load_schedule("every(len('four'))")


# In anyone's loop


@pytest.mark.loss
@pytest.mark.parametrize("step, factor", [(1, 0.25), (torch.tensor(3), 0.75), (9, 1.0)])
def test_a_factor_multiplies_the_weight(step, factor):
    scheduled, output = of_batch(Term(mean_square, 0.5, constant, schedule=warmup(4)), training_step=step)
    plain, same_output = of_batch(Term(mean_square, 0.5 * factor, constant))
    assert scheduled.loss == plain.loss and scheduled.weights == plain.weights
    assert scheduled.metrics() == plain.metrics()
    assert torch.equal(torch.autograd.grad(scheduled.loss, output)[0], torch.autograd.grad(plain.loss, same_output)[0])


@pytest.mark.loss
def test_balance_keeps_the_factor():
    (scheduled, output) = of_batch(Term(mean_square, 9.0, constant, schedule=warmup(4)), training_step=1)
    (plain, same_output) = of_batch(Term(mean_square, 9.0, constant))
    ours, expected = balance(scheduled, {"mean_square": 2.0}), balance(plain, {"mean_square": 0.5})
    assert ours.loss == expected.loss and ours.weights == {"mean_square": 0.5}
    assert torch.equal(torch.autograd.grad(ours.loss, output)[0], torch.autograd.grad(expected.loss, same_output)[0])


@pytest.mark.loss
def test_nothing_of_a_term_runs_in_a_step_with_factor_zero():
    def fail(*args, **kwargs):
        raise AssertionError("this ran")

    scheduled = Term(fail, 1.0, fail, "off", estimator=fail, view=fail, schedule=every(2))
    output, _ = of_batch(scheduled, Term(mean_square, 0.5, constant), training_step=3)
    plain, _ = of_batch(Term(mean_square, 0.5, constant))
    assert output.loss == plain.loss and output.terms["off"] == 0 and output.per_image["off"].isnan().all()
    with pytest.raises(AssertionError, match="this ran"):
        of_batch(scheduled, training_step=4)


@pytest.mark.loss
def test_the_description_of_a_loss_names_a_schedule():
    terms = [Term(mean_square, 1.0, constant, schedule=every(2)), Term(mean_square, 1.0, constant, "always")]
    scheduled, always = X0Regularization(SCHEDULER, terms).describe(TIMES).splitlines()
    assert scheduled.endswith(", times the factor of its schedule") and not always.endswith("schedule")


@pytest.mark.loss
def test_an_off_step_still_supports_backward():
    output = torch.randn(2, 1, 2, 2, requires_grad=True)
    ours = X0Regularization(SCHEDULER, [Term(mean_square, 1.0, constant, schedule=every(2))])
    ours(output, torch.tensor([1, 2]), torch.randn(2, 1, 2, 2), training_step=1).loss.backward()
    assert not output.grad.any()


@pytest.mark.loss
@pytest.mark.parametrize("returned", [-1.0, float("nan"), float("inf"), "1", None, torch.ones(2)])
def test_something_else_than_a_factor_is_refused(returned):
    with pytest.raises(TermError, match="schedule of 'mean_square' must return a finite number of at least 0"):
        of_batch(Term(mean_square, 1.0, constant, schedule=lambda step: returned), training_step=0)


@pytest.mark.loss
def test_what_a_loop_forgets_is_named():
    with pytest.raises(ValueError, match=r"'mean_square' has a schedule: pass training_step="):
        of_batch(Term(mean_square, 1.0, constant, schedule=every(2)))
    with pytest.raises(TypeError, match="did you mean 'training_step'"):
        of_batch(Term(mean_square, 1.0, constant, schedule=every(2)), train_step=3)
    with pytest.raises(TypeError, match="schedule must be callable, step -> factor"):
        Term(mean_square, 1.0, schedule=0.5)
    with pytest.raises(ValueError, match=r"Target\(value=1.0, .* sets the weight from L' in every step"):
        Term(mean_square, Target(1.0), schedule=every(2))


@pytest.mark.loss
@pytest.mark.parametrize("schedule", [every(3), every(EVERY), lambda step: float(step > 57)])
def test_a_share_is_measured_in_the_steps_in_which_a_term_runs(schedule):
    """With equal batches the unit is exact at once, so the weight is share * unit * factor in each of these steps."""
    ours = RegularizedLoss(SCHEDULER, [Term(mean_square, AutoWeight(0.1), constant, schedule=schedule)])
    plain = RegularizedLoss(SCHEDULER, [Term(mean_square, AutoWeight(0.1), constant)])
    expected = of_batch(plain)[0].weights["mean_square"]
    assert expected > 0
    for step in range(1, 64):
        weight = of_batch(ours, training_step=step)[0].weights["mean_square"]
        torch.testing.assert_close(torch.as_tensor(weight), expected * schedule(step), rtol=1e-6, atol=0)


@pytest.mark.loss
def test_the_state_of_a_share_continues_bit_for_bit():
    def loss():
        rules = [
            Term(mean_square, AutoWeight(0.1), constant, schedule=every(3)),
            Term(mean_square, Target(0.5), name="b"),
        ]
        return RegularizedLoss(SCHEDULER, rules)

    def run(ours, steps):
        return [of_batch(ours, seed=step, training_step=step)[0].loss.item() for step in steps]

    whole, first, second = loss(), loss(), loss()
    expected = run(whole, range(80))
    assert run(first, range(47)) == expected[:47]
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert run(second, range(47, 80)) == expected[47:]


# The command line

FLAGS = ("--max_train_steps", 10, "--regularizer", "total_variation", "--reg_weighting", "constant")
FLAGS += ("--reg_weight", 0.5)


@pytest.fixture
def evaluations(monkeypatch):
    """The number of times that L' runs in training; the checks before it have an import of their own."""
    found, original = [], term_values.checked_values

    def counted(term, *args, **kwargs):
        found.append(term.name)
        return original(term, *args, **kwargs)

    monkeypatch.setattr(term_values, "checked_values", counted)
    return found


@pytest.mark.slow
@pytest.mark.training
def test_every_fourth_step_is_that_in_the_log_the_record_and_the_calls(train, evaluations, capsys, image_folder):
    run = train(*FLAGS, "--reg_schedule", "every(4)", "--compare", "--train_data_dir", image_folder())
    assert evaluations == ["total_variation"] * 3  # in steps 0, 4 and 8
    (line,) = metrics(run)
    assert line["weight/total_variation"] == pytest.approx(0.5 * 0.3) and line["active/total_variation"] == 0.3
    assert line["weighted/total_variation"] == pytest.approx(0.5 * line["total_variation"], rel=1e-5)
    assert "every(4) * 0.5 * constant * total_variation" in capsys.readouterr().out
    (recorded,) = json.loads((run / "reg_config.json").read_text())["objective"]["terms"]
    assert recorded["schedule"] == "every(4)" and recorded["weight"] == 0.5
    compared = json.loads((run / "comparison.json").read_text())["terms"]["total_variation"]
    assert compared["schedule"] == "every(4)" and compared["weight"] == 0.5
    assert "times `every(4)`" in (run / "README.md").read_text()
    assert yaml.safe_load((run / "reg_settings.yaml").read_text())["reg_schedule"] == ["every(4)"]


@pytest.mark.slow
@pytest.mark.training
def test_schedules_bound_the_training_by_those_with_and_without_the_loss(train, capsys):
    """With factor 1 in all steps the weights are those without a schedule; with factor 0, those of a plain model."""
    constant, plain = train(*FLAGS, output="constant"), train("--regularizer", "none", *FLAGS[:2], output="plain")
    capsys.readouterr()
    one = train(*FLAGS, "--reg_schedule", "linear_decay(20, 30)", output="one")
    assert "its factor is 1 in all of the 10 steps" in capsys.readouterr().err
    assert not differ(weights(one), weights(constant)) and metrics(one) == metrics(constant)
    warm = train(*FLAGS, "--reg_schedule", "warmup(20)", output="warm")
    assert "its factor is at most 0.45 in 10 steps" in capsys.readouterr().err
    assert differ(weights(warm), weights(constant)) and differ(weights(warm), weights(plain))
    assert metrics(warm)[0]["weight/total_variation"] == pytest.approx(0.5 * sum(range(10)) / 10 / 20)
    (warm.parent / "no_step.py").write_text("def never(step):\n    return 0.0\n")
    assert not differ(weights(train(*FLAGS, "--reg_schedule", "no_step:never", output="off")), weights(plain))


@pytest.mark.slow
@pytest.mark.training
def test_each_regularizer_has_its_own_schedule_and_steps_are_those_of_the_optimizer(train, evaluations):
    given = ("--regularizer", "total_variation", "sparsity", "--reg_schedule", "constant", "every(5)")
    train(*FLAGS, *given, "--gradient_accumulation_steps", 2)
    assert evaluations.count("total_variation") == 20 and evaluations.count("sparsity") == 4


@pytest.mark.training
@pytest.mark.parametrize(
    "flags, message",
    [
        (
            "--reg_schedule warm(5)",
            "--reg_schedule: unknown schedule 'warm'; known: warmup(steps), linear_decay(start",
        ),
        ("--reg_schedule linear_decay(9)", "needs end: it is linear_decay"),
        ("--reg_schedule every(0)", "--reg_schedule: steps must be an integer of at least 1, not 0"),
        ("--regularizer none --reg_schedule every(2)", "--reg_schedule every(2) needs a regularizer"),
        ("--reg_schedule every(2) every(3)", "--reg_schedule has 2 entries for 1 regularizers"),
        (
            "--reg_schedule every(2) --reg_target total_variation=1",
            "--reg_target total_variation=1 sets the weight of",
        ),
        ("--reg_schedule broken:negative", "schedule of 'total_variation' must return a finite number of at least 0"),
        ("--reg_schedule broken:late --reg_weight auto:0.1", "does not run in the first 100 steps, in which"),
    ],
)
def test_a_schedule_that_cannot_work_is_refused(train, tmp_path, capsys, flags, message):
    (tmp_path / "broken.py").write_text(
        "def negative(step):\n    return -1\n\n\ndef late(step):\n    return float(step >= 100)\n"
    )
    assert (
        message in refusal(train, capsys, "--regularizer", "total_variation", *flags.split())
        and not (tmp_path / "out").exists()
    )
