"""Steps that are no number: left out on all processes together, told with their images, and few of them."""

import json
import math

import pytest
import torch
from accelerate import Accelerator, debug_launcher
from accelerate.state import AcceleratorState, GradientState, PartialState
from runs import differ, metrics, weights

from reg_diffusers.training.bad_steps import BadSteps, TooManyBadSteps

pytestmark = pytest.mark.reliability

TIMESTEPS, IDS = torch.tensor([5, 900]), torch.tensor([3, 17])


@pytest.fixture(autouse=True)
def no_launch_before():
    """What accelerate remembers of an earlier test would be taken for the launch."""
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


def prepared(accelerator, tmp_path, limit=3):
    """A network of one weight, its optimizer, and what watches over it."""
    torch.manual_seed(0)
    model = torch.nn.Linear(1, 1, bias=False)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True))
    return model, optimizer, BadSteps(accelerator, tmp_path / "bad_steps.jsonl", limit)


def step(accelerator, model, optimizer, bad_steps, number, factor=1.0):
    """One step of |factor * output|; returns the weight and the state of the optimizer after it."""
    loss = (factor * model(torch.ones(1, 1))).abs().sum()
    accelerator.backward(bad_steps.guard(loss, TIMESTEPS, IDS))
    bad_steps.update(number, optimizer, accelerator.clip_grad_norm_(model.parameters(), 1.0))
    optimizer.step()
    optimizer.zero_grad()
    (parameter,) = model.parameters()
    state = optimizer.optimizer.state[parameter]
    return [value.item() for value in (parameter, state["step"], state["exp_avg"], state["exp_avg_sq"])]


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_bad_step_changes_neither_weights_nor_moments(tmp_path, factor):
    accelerator = Accelerator(cpu=True)
    run = (accelerator, *prepared(accelerator, tmp_path))
    before = step(*run, 1)
    assert step(*run, 2, factor) == before
    after = step(*run, 3)
    fresh = (accelerator, *prepared(accelerator, tmp_path))
    step(*fresh, 1)
    assert after == step(*fresh, 2) != before


def test_an_infinite_loss_is_bad_although_its_gradient_is_finite(tmp_path):
    accelerator = Accelerator(cpu=True)
    model, _, bad_steps = prepared(accelerator, tmp_path)
    loss = model(torch.ones(1, 1)).sum() + math.inf
    accelerator.backward(bad_steps.guard(loss, TIMESTEPS, IDS))
    assert not next(model.parameters()).grad.isfinite().any()


def test_a_good_step_is_as_it_would_be_without(tmp_path):
    accelerator = Accelerator(cpu=True)
    watched = step(accelerator, *prepared(accelerator, tmp_path), 1, factor=3.0)
    torch.manual_seed(0)
    model = torch.nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    (3.0 * model(torch.ones(1, 1))).abs().sum().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    assert watched[0] == model.weight.item()


def test_bad_steps_are_counted_in_a_row_and_told_with_their_images(tmp_path):
    accelerator = Accelerator(cpu=True)
    run = (accelerator, *prepared(accelerator, tmp_path))
    bad_steps = run[-1]
    for number, factor in enumerate((1, math.nan, math.nan, 1, math.nan), start=1):
        step(*run, number, factor)
    said = bad_steps.compute()
    assert [line.split(" is skipped")[0] for line in said] == ["step 2", "step 3", "step 5"]
    assert bad_steps.count == 3 and bad_steps.in_a_row == 1
    assert bad_steps.problem() is None and bad_steps.compute() == []
    lines = [json.loads(line) for line in (tmp_path / "bad_steps.jsonl").read_text().splitlines()]
    assert lines[0] == {"step": 2, "process": 0, "loss_is_finite": False, "timesteps": [5, 900], "images": [3, 17]}

    resumed = BadSteps(accelerator, tmp_path / "bad_steps.jsonl", 3)
    resumed.load_state_dict(json.loads(json.dumps(bad_steps.state_dict())))
    resumed.forget_later_than(3)
    assert [json.loads(line)["step"] for line in (tmp_path / "bad_steps.jsonl").read_text().splitlines()] == [2, 3]
    for number in (6, 7):
        step(*run[:-1], resumed, number, math.nan)
    resumed.compute()
    problem = resumed.problem()
    assert isinstance(problem, TooManyBadSteps) and (problem.steps, problem.limit) == (3, 3)
    assert str(problem).startswith("3 steps in a row") and "--learning_rate" in str(problem)


def test_an_overflow_of_the_gradient_scaler_is_not_counted(tmp_path):
    """With a scaler gradients may be infinite while it looks for its scale; the loss may not."""
    accelerator = Accelerator(cpu=True)
    model, optimizer, bad_steps = prepared(accelerator, tmp_path)
    accelerator.scaler = torch.amp.GradScaler("cpu")
    loss = model(torch.ones(1, 1)).sum()
    for number, (value, norm) in enumerate(((loss, math.inf), (loss * math.nan, math.nan)), start=1):
        bad_steps.guard(value, TIMESTEPS, IDS)
        bad_steps.update(number, optimizer, torch.tensor(norm))
    bad_steps.compute()
    assert bad_steps.count == 1 and not hasattr(optimizer.optimizer, "found_inf")


def one_process_of_two(folder):
    accelerator = Accelerator(cpu=True)
    run = (accelerator, *prepared(accelerator, folder))
    first = step(*run, 1)
    # The loss of one process only is no number.
    second = step(*run, 2, math.nan if accelerator.process_index == 1 else 1.0)
    bad_steps = run[-1]
    said = bad_steps.compute()
    assert second == first and bad_steps.count == bad_steps.in_a_row == 1
    assert len(said) == (1 if accelerator.is_main_process else 0)
    accelerator.end_training()


def test_what_is_bad_on_one_process_is_left_out_by_both(tmp_path):
    debug_launcher(one_process_of_two, (tmp_path,), num_processes=2)
    lines = [json.loads(line) for line in (tmp_path / "bad_steps.jsonl").read_text().splitlines()]
    assert {line["process"]: line["loss_is_finite"] for line in lines} == {0: True, 1: False}


def test_a_picture_that_makes_the_loss_infinite_is_named_and_the_others_are_learned(
    train,
    tmp_path,
    tiny_unet,
):
    """The network is fine; the data of one step are not."""
    import numpy as np

    fields = np.random.default_rng(0).normal(size=(16, 1, 8, 8)).astype(np.float32)
    np.save("fields.npy", fields)
    flags = (
        "--train_data_dir",
        "fields.npy",
        "--max_train_steps",
        10,
        "--train_batch_size",
        4,
        "--regularizer",
        "none",
    )
    good = train(*flags, output="good")
    assert metrics(good)[-1]["bad_steps"] == 0 and not (good / "bad_steps.jsonl").exists()

    import reg_diffusers.data.training_data as data

    at = 11
    original = data.FieldData.__getitems__

    def damaged(self, indices):
        batch = original(self, indices)
        batch["values"][[index == at for index in indices]] = math.nan
        return batch

    data.FieldData.__getitems__ = damaged
    try:
        bad = train(*flags, output="bad")
    finally:
        data.FieldData.__getitems__ = original
    lines = [json.loads(line) for line in (bad / "bad_steps.jsonl").read_text().splitlines()]
    assert lines and all(at in line["images"] for line in lines)
    assert metrics(bad)[-1]["bad_steps"] == len(lines) < 10
    assert all(value.isfinite().all() for value in weights(bad).values()) and differ(weights(good), weights(bad))
    assert math.isfinite(metrics(bad)[-1]["denoising"])
