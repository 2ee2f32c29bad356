"""--reg_weight auto:, --reg_target, --reg_balance and the log of the parts, end to end and by identity."""

import json
import math
import shutil

import numpy as np
import PIL.Image
import PIL.ImageChops
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from devices import OnMps
from in_processes import feed, fill, run_script
from losses import images, mean_square, scheduler_of
from runs import differ, metrics, refusal, weights
from torch import nn

from reg_diffusers import LossOutput, RegularizedLoss, Term
from reg_diffusers.balancing import balance
from reg_diffusers.regularizers import total_variation
from reg_diffusers.settings.weights import NamedTarget, parse_target, parse_weight
from reg_diffusers.training import term_weights
from reg_diffusers.training.conflict_free import ConflictFree, combined
from reg_diffusers.training.loss_parts import LossParts
from reg_diffusers.training.preview import captioned_grid
from reg_diffusers.training.term_weights import TermWeights
from reg_diffusers.weight_rules import AutoWeight, Target
from reg_diffusers.weighting import constant, low_noise

pytestmark = pytest.mark.training


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state()
    return Accelerator(cpu=True)


@pytest.fixture
def soon(monkeypatch):
    """Units are frozen after 6 steps; to be asked for before `train`, which reads it."""
    monkeypatch.setattr(term_weights, "MEASURED_STEPS", 6)


class Pull:
    """A toy with a closed form: the output is o itself; denoising |o - 1|^2, L' = |o|^2. Unconstrained, o = 1."""

    def __init__(self):
        self.output = torch.zeros(4, 1, 2, 2, requires_grad=True)

    def step(self, weights, rate=0.05):
        output = balance(self.loss(), weights.current)
        output.loss.backward()
        with torch.no_grad():
            self.output -= rate * 4 * self.output.grad
            self.output.grad = None
        weights.update(output)
        return weights.compute()

    def loss(self):
        model_output = self.output * 1
        terms, per_image = {}, {}
        for name, center in (("denoising", 1.0), ("energy", 0.0)):
            values = (model_output - center).square().flatten(1).mean(1)
            terms[name], per_image[name] = values.mean(), values.detach()
        return LossOutput(terms["denoising"], terms, per_image, {"energy": torch.ones(4)}, None, model_output)


# The weight by a share of the gradient


def test_auto_is_the_share_of_the_gradient_and_is_frozen(accelerator):
    weights, told = TermWeights(accelerator, {"energy": AutoWeight(0.25)}, {}, 300), []
    toy = Pull()
    assert weights.current["energy"] == 0
    for _ in range(400):
        told += toy.step(weights)
        if len(told) == 0:
            estimate = float(weights.current["energy"])
    # At rest the two forces are equal: |g_d| = weight |g_k|, so that the share of a running estimate shrinks o.
    assert len(told) == 1 and "frozen at" in told[0] and f"{float(weights.current['energy']):.4g}" in told[0]
    assert float(weights.current["energy"]) == pytest.approx(estimate, rel=0.05)
    products = balance(toy.loss(), {"energy": 1.0}).products.sum(0)
    assert products[0, 0] > 0
    frozen = float(weights.current["energy"])
    toy.step(weights)
    assert float(weights.current["energy"]) == frozen


def test_auto_finds_the_ratio_of_the_norms(accelerator):
    """With gradients that never change, the estimate is exact from the second step on."""
    loss_fn = RegularizedLoss(scheduler_of("sample"), [Term(total_variation, 0.0, constant)])
    original, noise = images(2, 8, 1, 4, 4, dtype=torch.float32)
    drawn = {"noise": noise, "timesteps": torch.arange(0, 800, 100)}
    network = nn.Conv2d(1, 1, 3, padding=1)
    weights = TermWeights(accelerator, {"total_variation": AutoWeight(0.1)}, {}, 100)
    for _ in range(3):
        output = balance(loss_fn(lambda x, t: (network(x),), original, **drawn), weights.current)
        weights.update(output)
        weights.compute()
    share = weights.current["total_variation"] * output.gradients["total_variation"].norm()
    torch.testing.assert_close(share, 0.1 * output.gradients["denoising"].norm(), rtol=1e-5, atol=0)


# A target


@pytest.mark.parametrize("target", [0.25, 0.64])
def test_a_binding_target_is_met_at_the_optimum_of_the_constrained_problem(accelerator, target):
    weights, toy = TermWeights(accelerator, {"energy": Target(target)}, {}, 20), Pull()
    for _ in range(3000):
        toy.step(weights)
    assert toy.output.square().mean().item() == pytest.approx(target, rel=0.01)
    # Karush-Kuhn-Tucker: (1 - o) = weight * o with o = sqrt(target).
    assert float(weights.current["energy"]) == pytest.approx(1 / math.sqrt(target) - 1, rel=0.02)
    assert abs(weights.metrics()["constraint/energy"]) < 0.01


def test_the_multiplier_of_a_slack_target_is_exactly_zero(accelerator):
    """Also where it was not slack at first."""
    weights, toy = TermWeights(accelerator, {"energy": Target(1.5)}, {}, 20), Pull()
    with torch.no_grad():
        toy.output += 10
    largest = 0.0
    for _ in range(2000):
        toy.step(weights, rate=0.01)
        largest = max(largest, weights.metrics()["multiplier/energy"])
    assert largest > 0 and weights.metrics()["multiplier/energy"] == 0 and weights.current["energy"] == 0
    assert toy.output.mean().item() == pytest.approx(1, rel=1e-3)


def test_a_slack_target_is_the_plain_training(soon, train):
    slack = train("--reg_target", "near_background=50", "--max_train_steps", 10, output="slack")
    plain = train("--regularizer", "none", "--max_train_steps", 10, output="plain")
    assert not differ(weights(slack), weights(plain)) and metrics(slack)[-1]["constraint/near_background"] < 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_trained_network_meets_its_target(accelerator, kind):
    """A small network on Gaussian data, 2,000 steps: E[L'] on fresh batches is within 5 % of the target."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(9, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 8))

    def model(sample, timesteps):
        return (layers(torch.cat([sample.flatten(1), timesteps[:, None] / 1000], 1)).view_as(sample),)

    def data(number):
        return 0.1 + 0.7 * torch.randn(number, 1, 2, 4)

    loss_fn = RegularizedLoss(scheduler_of(kind), [Term(mean_square, 0.0)])
    optimizer = torch.optim.AdamW(layers.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2000)
    rules = {"mean_square": Target(0.8, relative=True)}
    weights = TermWeights(accelerator, rules, {"mean_square": 0.5}, 100)
    for _ in range(2000):
        output = balance(loss_fn(model, data(64)), weights.current)
        output.loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        weights.update(output)
        weights.compute()
    output = loss_fn(model, data(20000))
    values, lambdas = output.per_image["mean_square"], output.weightings["mean_square"]
    reached = (lambdas * values.nan_to_num()).sum() / (lambdas * ~values.isnan()).sum()
    assert reached.item() == pytest.approx(0.4, rel=0.05)


# The same on every process and after a pause


def state_of(weights):
    return {
        name: value.tolist() if isinstance(value, torch.Tensor) else value
        for name, value in weights.state_dict().items()
    }


def test_a_state_goes_on_where_it_was(accelerator):
    rules = {"energy": Target(0.5, relative=True)}
    whole, toy = TermWeights(accelerator, rules, {"energy": 1.0}, 20), Pull()
    for _ in range(50):
        toy.step(whole)
    other = TermWeights(accelerator, rules, {"energy": 0.9}, 20)  # measured on fewer images this time
    other.load_state_dict(whole.state_dict())
    assert state_of(other) == state_of(whole)
    changed = TermWeights(accelerator, {"energy": Target(0.3)}, {}, 20)
    changed.load_state_dict(whole.state_dict())
    assert changed.state_dict()["targets"] == {"energy": 0.3}


RULES = (
    "--regularizer total_variation sparsity out_of_range --reg_weight auto:0.1 0 0.1 --reg_target sparsity=0.9x"
).split()


def test_a_resumed_run_has_the_weights_and_the_log_of_an_undisturbed_one(soon, train, capsys):
    flags = (*RULES, "--max_train_steps", 12, "--checkpointing_steps", 4, "--train_batch_size", 16)
    part = train(*flags, output="part")
    whole = shutil.copytree(part, part.with_name("whole"))
    for step in (8, 12):
        shutil.rmtree(part / f"checkpoint-{step}")
    train(*flags, "--resume", "auto", output="part")
    assert metrics(whole) == metrics(part) and not differ(weights(whole), weights(part))
    assert "weight of total_variation: frozen at" in capsys.readouterr().out
    assert metrics(whole)[-1]["weight/total_variation"] > 0 and metrics(whole)[-1]["multiplier/sparsity"] > 0
    for name in json.loads((whole / "checkpoint-12" / "manifest.json").read_text())["files"]:
        assert (whole / "checkpoint-12" / name).read_bytes() == (part / "checkpoint-12" / name).read_bytes(), name


def fed(script):
    feed(script)
    term_weights.MEASURED_STEPS = 2


def test_what_a_rule_has_come_to_is_recorded(soon, train):
    out = train("--max_train_steps", 8, "--reg_weight", "auto:0.1", "--compare")
    (term,) = json.loads((out / "reg_config.json").read_text())["objective"]["terms"]
    assert term["weight_rule"] == "auto:0.1" and 0 < term["weight"] == metrics(out)[-1]["weight/near_background"]
    assert json.loads((out / "comparison.json").read_text())["terms"]["near_background"]["weight"] == term["weight"]
    assert f"{term['weight']:g} (by auto:0.1)" in (out / "README.md").read_text()


@pytest.mark.slow
def test_weights_and_log_do_not_depend_on_how_a_batch_is_divided(tmp_path):
    fill(tmp_path)
    found = {}
    for name, (number, batch_size, accumulation) in {"one": (1, 8, 1), "two": (2, 2, 2)}.items():
        flags = f"--output_dir {name} --train_batch_size {batch_size} --gradient_accumulation_steps {accumulation}"
        flags += " --max_train_steps 6 --learning_rate 1e-3 --reg_weighting constant"
        assert run_script(tmp_path, *flags.split(), *RULES, prepare=fed, number=number) == [0] * number
        found[name] = weights(tmp_path / name), metrics(tmp_path / name)[-1]
    (expected, said), (other, also_said) = found["one"], found["two"]
    for name, value in expected.items():
        torch.testing.assert_close(other[name], value, rtol=1e-7, atol=1e-9)
    assert set(said) == set(also_said) and said["weight/total_variation"] > 0 and said["multiplier/sparsity"] > 0
    for name, value in said.items():
        assert also_said[name] == pytest.approx(value, rel=1e-5), name


# No conflict


@pytest.mark.parametrize("method", ["config", "pcgrad"])
def test_the_combined_gradient_points_against_none_of_the_parts(accelerator, method):
    pytest.importorskip("conflictfree")
    operator = ConflictFree(accelerator, nn.Linear(1, 1), method)._operator
    parts = torch.tensor([[2.0, 0.0, 0.1], [-0.9, 0.2, 0.0]])
    assert parts[1] @ parts.sum(0) < 0  # the plain sum raises the second loss
    assert (parts @ combined(operator, parts) > 0).all()
    if method == "config":  # by its definition all fall at the same rate, measured by their lengths
        rates = parts / parts.norm(dim=1, keepdim=True) @ combined(operator, parts)
        torch.testing.assert_close(rates[0], rates[1], rtol=1e-5, atol=0)
    else:  # Yu et al. 2020, algorithm 1, by hand
        one, other = parts
        expected = one - one @ other / (other @ other) * other + other - one @ other / (one @ one) * one
        torch.testing.assert_close(combined(operator, parts), expected)
    alone = torch.stack([parts[0], torch.zeros(3)])
    torch.testing.assert_close(combined(operator, alone), parts[0])
    assert combined(operator, torch.stack([parts[0], parts[1] * torch.nan])).isnan().all()
    assert combined(operator, torch.stack([parts[0], parts[0]])).isfinite().all()


@pytest.mark.parametrize("method", ["config", "pcgrad"])
@pytest.mark.parametrize("number", [2, 3])
def test_the_combined_gradient_has_the_same_bits_each_time(accelerator, method, number):
    """So a run that is resumed ends where it would have. It is what the definitions give in float64."""
    pytest.importorskip("conflictfree")
    operator = ConflictFree(accelerator, nn.Linear(1, 1), method)._operator
    parts = torch.randn(number, 20_011, generator=torch.Generator().manual_seed(0))
    parts[1] -= 0.3 * parts[0]
    found, elsewhere = combined(operator, parts), []
    for size in range(300):
        elsewhere.append(torch.empty(1 + size % 37))  # so that the copy lies at another place
        assert torch.equal(combined(operator, parts.clone()), found)
    parts = parts.double()
    if method == "config":  # Liu et al. 2024, eqs. 3 and 4: the same rate for all, and the sum of the projections
        direction = torch.linalg.pinv(parts / parts.norm(dim=1, keepdim=True)).sum(1)
        direction /= direction.norm()
        expected = (parts @ direction).sum() * direction
    else:
        expected = torch.zeros_like(parts[0])
        for i, part in enumerate(parts):
            for other in [other for j, other in enumerate(parts) if j != i]:
                part = part - (part @ other).clamp(max=0) / (other @ other) * other
            expected += part
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["config", pytest.param("pcgrad", marks=pytest.mark.slow)])
def test_a_weight_of_zero_leaves_the_plain_training(train, method):
    """The path around accelerate's backward, with accumulation, clipping and the average, changes nothing else."""
    flags = "--max_train_steps 3 --gradient_accumulation_steps 2 --max_grad_norm 0.1".split()
    plain = train(*flags, "--regularizer", "none", output="plain")
    balanced = train(*flags, "--reg_weight", 0, "--reg_balance", method, output="balanced")
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(balanced)[name], value, rtol=1e-4, atol=1e-6)
    with_weight = train(*flags, "--reg_weight", 1, "--reg_balance", method, output="with_weight")
    assert differ(weights(balanced), weights(with_weight))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["config", "pcgrad"])
def test_conflicts_are_resolved_between_averages_over_all_processes(tmp_path, method):
    fill(tmp_path)
    found = []
    for name, (number, batch_size, accumulation) in {"one": (1, 8, 1), "two": (2, 2, 2)}.items():
        flags = f"--output_dir {name} --train_batch_size {batch_size} --gradient_accumulation_steps {accumulation}"
        flags += f" --max_train_steps 4 --learning_rate 1e-3 --reg_weighting constant --reg_balance {method}"
        assert run_script(tmp_path, *flags.split(), prepare=feed, number=number) == [0] * number
        found.append(weights(tmp_path / name))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-6, atol=1e-8)


def test_a_step_that_is_not_finite_is_left_out_with_balance_too(train, tmp_path):
    data = np.random.default_rng(0).normal(size=(8, 1, 8, 8))
    np.save(tmp_path / "data.npy", data)
    flags = "--train_data_dir data.npy --max_train_steps 2 --reg_balance config --learning_rate 1e30".split()
    with pytest.raises(SystemExit):
        train(*flags, "--max_bad_steps", 1)
    assert metrics(tmp_path / "out")[-1]["bad_steps"] == 1


# The log


def test_the_parts_are_told_by_noise_level(accelerator):
    loss_fn = RegularizedLoss(scheduler_of("sample"), [Term(mean_square, 0.5, low_noise, "energy")])
    original, noise = images(2, 8, 1, 4, 4, dtype=torch.float32)
    timesteps = torch.tensor([0, 30, 100, 150, 300, 500, 700, 900])
    network = nn.Conv2d(1, 1, 3, padding=1)
    parts = LossParts(accelerator, ["energy"], {"energy": 0.2})
    raw = loss_fn(lambda x, t: (network(x),), original, noise=noise, timesteps=timesteps)
    output = balance(raw, {"energy": 0.5})
    parts.update(output)
    parts.update(output)
    found = parts.compute()
    low = timesteps < 200
    energy, denoising = output.per_image["energy"], output.per_image["denoising"]
    assert found["active/energy"] == 0.5
    assert found["raw/energy"] == pytest.approx(energy[low].mean().item())
    assert found["gap/energy"] == pytest.approx(found["raw/energy"] - 0.2)
    assert found["weighted/energy"] == pytest.approx(0.5 * output.terms["energy"].item())
    ratio = 0.5 * output.gradients["energy"].norm() / output.gradients["denoising"].norm()
    assert found["gradient_ratio/energy"] == pytest.approx(ratio.item(), rel=1e-5)
    flat = [gradient.flatten() for gradient in output.gradients.values()]
    cosine = torch.nn.functional.cosine_similarity(*flat, dim=0)
    assert found["gradient_cosine/energy"] == pytest.approx(cosine.item(), rel=1e-5)
    chosen = (output.snr > 1) & (output.snr <= 10)
    assert chosen.sum() == 2
    assert found["denoising/snr_1_to_10"] == pytest.approx(denoising[chosen].mean().item())
    assert found["raw/energy/snr_1_to_10"] == pytest.approx(energy[chosen & low].mean().item())
    assert "raw/energy/snr_below_0.01" not in found and "denoising/snr_below_0.01" in found
    assert not parts.compute()


def test_a_device_without_64_bits_is_left_before_the_parts_are_read(accelerator):
    parts = LossParts(accelerator, ["energy"], {})
    parts._sums = (parts._sums + 1).as_subclass(OnMps)
    assert parts.compute()["active/energy"] == 1


def test_a_batch_that_is_not_finite_does_not_count(accelerator):
    loss_fn = RegularizedLoss(scheduler_of("sample"), [Term(mean_square, 0.5, constant, "energy")])
    original, noise = images(2, 4, 1, 4, 4, dtype=torch.float32)
    drawn = {"noise": noise, "timesteps": torch.tensor([0, 200, 500, 900])}
    network = nn.Conv2d(1, 1, 3, padding=1)
    parts = LossParts(accelerator, ["energy"], {})
    weights = TermWeights(accelerator, {"energy": AutoWeight(0.1)}, {}, 10)
    for factor in (1, torch.nan):
        output = balance(loss_fn(lambda x, t: (network(x),), original * factor, **drawn), {"energy": 0.5})
        parts.update(output)
        weights.update(output)
        weights.compute()
    assert all(math.isfinite(value) for value in parts.compute().values())
    assert 0 < float(weights.current["energy"]) < math.inf


def test_names_are_those_of_the_log_in_tensorboard_too(train):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = train("--max_train_steps", 2, "--logger", "tensorboard", "--reg_weight", "auto:0.1")
    (file,) = (out / "logs" / "train_reg").glob("events.out.tfevents.*")
    events = EventAccumulator(str(file)).Reload()
    assert set(events.Tags()["scalars"]) == set(metrics(out)[-1]) - {"step"}
    assert {"raw/near_background", "gradient_ratio/near_background", "denoising/snr_0.1_to_1"} <= set(metrics(out)[-1])


# Previews


def test_previews_say_the_loss_of_each_picture_and_change_nothing(train, tmp_path):
    """Read back from the picture itself: other values, other ink under the pictures, and nothing else."""
    samples = images(3, 1, 8, 8, dtype=torch.float32).clamp(-1, 1)
    one, other = (captioned_grid(samples, {"a": [0.1, value, 0.3]}, "step 1", {"a": 0.2}) for value in (0.2, 0.5))
    changed = PIL.ImageChops.difference(one, other).convert("L").point(lambda level: 255 * (level > 0))
    left, top, right, _ = changed.crop((0, 60, *one.size)).getbbox()
    assert one.size == other.size and 136 < left < right < 248 and 60 + top > 172  # under the second picture
    plain = train("--regularizer", "none", "--max_train_steps", 2, output="plain")
    (tmp_path / "drawing.py").write_text(
        "import torch\ndef loss(x):\n    return (x * torch.rand(1)).square().flatten(1).mean(1)\n"
    )
    seldom, often = (
        train("--regularizer", "drawing:loss", "--max_train_steps", 4, "--preview_steps", steps, output=f"p{steps}")
        for steps in (4, 1)
    )
    assert not differ(weights(seldom), weights(often)) and len(list((often / "samples").iterdir())) == 4
    without, picture = (next((folder / "samples").iterdir()) for folder in (plain, often))
    without, picture = PIL.Image.open(without), PIL.Image.open(picture)
    assert without.size == (136, 136) and picture.size[0] >= 2 * 112 and picture.size[1] > picture.size[0]


# What is said and refused


@pytest.mark.parametrize("text, value", [("0.1", 0.1), ("auto:0.1", AutoWeight(0.1)), ("0", 0.0)])
def test_weights_are_read_as_they_are_said(text, value):
    assert parse_weight(text) == value and parse_weight(str(value)) == value


@pytest.mark.parametrize(
    "text, value",
    [("a=0.08", NamedTarget("a", Target(0.08))), ("a=0.9x", NamedTarget("a", Target(0.9, relative=True)))],
)
def test_targets_are_read_as_they_are_said(text, value):
    assert parse_target(text) == value and str(value) == text


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--reg_weight auto:", "'auto:' is not auto:SHARE with a share above 0, such as auto:0.1"),
        ("--reg_weight auto:-1", "'auto:-1' is not auto:SHARE"),
        ("--reg_weight auto", "'auto' is not auto:SHARE"),
        ("--reg_weight heavy", "'heavy' is neither a number of at least 0 nor auto:SHARE, such as auto:0.1"),
        ("--reg_target near_background=0", "'near_background=0' is not NAME=VALUE with a value above 0"),
        ("--reg_target near_background", "'near_background' is not NAME=VALUE"),
        ("--reg_target sparsity=0.1", "sparsity=0.1: no regularizer has this name; available: near_background"),
        ("--reg_target near_background=1 near_background=2", "near_background already has another target"),
        ("--regularizer out_of_range --reg_target out_of_range=0.9x", "of the data is 0, which gives no scale"),
        ("--regularizer none --reg_target sparsity=0.1", "needs a regularizer, but none is given"),
        ("--regularizer none --reg_balance pcgrad", "it needs a --regularizer"),
        ("--compile --reg_balance config", "for each loss, but --compile supports only one"),
    ],
)  # fmt: skip
def test_a_rule_that_cannot_work_is_one_line(train, capsys, tmp_path, flags, message):
    assert message in refusal(train, capsys, *flags.split())
    assert not (tmp_path / "out").exists()


def test_a_training_that_is_too_short_for_a_rule_says_so(train, capsys):
    flags = "--regularizer total_variation sparsity --reg_weight auto:0.1 1 --reg_target sparsity=0.5".split()
    out = train("--max_train_steps", 2, *flags)
    told = capsys.readouterr().err
    assert "--reg_weight auto:0.1: the weight of total_variation is not frozen until step 100" in told
    assert (
        "--reg_target sparsity=0.5: gradients are measured until step 100" in told and "sparsity has weight 0" in told
    )
    assert metrics(out)[-1]["weight/sparsity"] == 0 < metrics(out)[-1]["weight/total_variation"]


def test_balance_without_its_package_is_one_line(train, capsys, monkeypatch):
    monkeypatch.setattr("reg_diffusers.training.conflict_free.find_spec", lambda name: None)
    assert "pip install conflictfree" in refusal(train, capsys, "--reg_balance", "config")


def test_a_run_with_balanced_gradients_that_is_resumed_ends_where_it_would_have(train):
    pytest.importorskip("conflictfree")
    flags = (
        "--regularizer total_variation sparsity --reg_weight 1 --reg_weighting constant --reg_balance config".split()
    )
    flags += "--lr_scheduler constant --learning_rate 1e-3 --checkpointing_steps 3".split()
    whole = train(*flags, "--max_train_steps", 6, output="whole")
    train(*flags, "--max_train_steps", 3, output="parts")
    resumed = train(*flags, "--max_train_steps", 6, "--resume", "auto", output="parts")
    assert not differ(weights(whole), weights(resumed))
