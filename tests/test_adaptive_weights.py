"""AutoWeight and Target in anyone's loop: the weight of a term from gradients, by identity and in a short training."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from in_processes import in_processes
from torch import nn

from reg_diffusers import (
    AffineSchedule,
    AutoWeight,
    Ddim,
    Guidance,
    MonteCarlo,
    RegularizedLoss,
    Target,
    Term,
    X0Regularization,
    add_noise,
    diagnose,
    prediction_target,
    weighting,
)
from reg_diffusers.adaptive_weights import EVERY, MEASUREMENTS

pytestmark = pytest.mark.loss

SCHEDULERS = [
    DDPMScheduler(),
    DDPMScheduler(prediction_type="v_prediction"),
    FlowMatchEulerDiscreteScheduler(),
]


def energy(x0_hat, /):
    return x0_hat.square().flatten(1).mean(1)


def difference(x0_hat, /, *, original_samples):
    return energy(x0_hat - original_samples)


difference.needs = ("original_samples",)


def batch(scheduler, size=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x0, noise, output = torch.randn(3, size, 1, 4, 4, generator=generator)
    times = torch.randint(50, 900, (size,), generator=generator)
    return x0, noise, output.requires_grad_(), times, add_noise(scheduler, x0, noise, times)


def norm(loss, output):
    return torch.autograd.grad(loss, output, retain_graph=True)[0].norm()


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("estimator", [None, MonteCarlo(3)])
def test_the_gradient_of_the_term_is_the_wanted_share_of_the_loops_own(scheduler, estimator):
    x0, noise, output, times, x_t = batch(scheduler)
    options = {} if estimator is None else {"estimator": estimator}
    ours = X0Regularization(scheduler, [Term(energy, AutoWeight(0.2), weighting.constant, **options)])
    extra = ours(output, times, x_t, original_samples=x0)
    own = F.mse_loss(output, prediction_target(scheduler, x0, noise, times))
    torch.testing.assert_close(norm(extra.loss, output), 0.2 * norm(own, output), rtol=1e-4, atol=0)
    assert extra.metrics()["weight/energy"] == pytest.approx(float(extra.weights["energy"]))


def test_it_follows_the_weight_of_the_loops_loss():
    scheduler = SCHEDULERS[1]
    x0, noise, output, times, x_t = batch(scheduler)
    loss_weight = torch.tensor([1.0, 0.0, 3.0, 0.5])
    ours = X0Regularization(scheduler, [Term(energy, AutoWeight(0.5), weighting.constant)])
    extra = ours(output, times, x_t, original_samples=x0, loss_weight=loss_weight)
    target = prediction_target(scheduler, x0, noise, times)
    own = (loss_weight * (output - target).square().flatten(1).mean(1)).mean()
    torch.testing.assert_close(norm(extra.loss, output), 0.5 * norm(own, output), rtol=1e-4, atol=0)
    x0_hat = torch.randn_like(x0).requires_grad_()
    again = X0Regularization(scheduler, [Term(energy, AutoWeight(0.5), weighting.constant)])
    extra = again(None, times, x_t, x0_hat=x0_hat, original_samples=x0, loss_weight=loss_weight)
    own = (loss_weight * (x0_hat - x0).square().flatten(1).mean(1)).mean()
    torch.testing.assert_close(norm(extra.loss, x0_hat), 0.5 * norm(own, x0_hat), rtol=1e-4, atol=0)


def test_the_whole_objective_and_min_snr():
    scheduler = SCHEDULERS[1]
    x0, noise, output, times, _ = batch(scheduler)
    terms = [Term(energy, AutoWeight(0.1), weighting.constant)]
    found = RegularizedLoss(scheduler, terms, snr_gamma=5.0)(lambda x, t: output, x0, noise=noise, timesteps=times)
    extra = found.weights["energy"] * found.terms["energy"]
    expected = 0.1 * norm(found.terms["denoising"], output)
    torch.testing.assert_close(norm(extra, output), expected, rtol=1e-4, atol=0)


def test_it_is_measured_every_tenth_call_and_frozen():
    scheduler, weights = SCHEDULERS[2], []
    ours = X0Regularization(scheduler, [Term(energy, AutoWeight(0.1), weighting.constant)])
    for call in range(EVERY * (MEASUREMENTS + 3)):
        x0, _, output, times, x_t = batch(scheduler, seed=call)
        weights.append(float(ours(output, times, x_t, original_samples=x0).weights["energy"]))
    changes = [call for call in range(1, len(weights)) if weights[call] != weights[call - 1]]
    assert changes == list(range(EVERY, EVERY * MEASUREMENTS, EVERY))


class Pull(nn.Module):
    """A network of one number, by which the images are multiplied."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))


def trained(target, steps=900):
    """The mean of L' of x0_hat after a training that pulls to the images and leaves noise: 1 + 0.25 without a term."""
    scheduler, model = DDPMScheduler(prediction_type="sample"), Pull()
    ours = X0Regularization(scheduler, [Term(energy, target, weighting.constant)])
    optimizer, values = torch.optim.SGD(model.parameters(), lr=0.05), []
    for step in range(steps):
        x0, noise, _, times, x_t = batch(scheduler, size=32, seed=step)
        output = model.scale * x0 + 0.5 * noise
        extra = ours(output, times, x_t, original_samples=x0)
        (F.mse_loss(output, x0) + extra.loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(extra.per_image["energy"].mean())
    return torch.stack(values[-200:]).mean().item()


def test_a_target_is_met_absolutely_and_relative_to_the_data():
    assert trained(Target(0.5)) == pytest.approx(0.5, rel=0.1)
    assert trained(Target(0.6, relative=True)) == pytest.approx(0.6, rel=0.1)
    assert trained(Target(2.0), steps=400) == pytest.approx(1.25, rel=0.1)  # slack: its weight is 0


def test_the_state_goes_on_where_it_stopped():
    scheduler = SCHEDULERS[0]

    def loss():
        terms = [Term(energy, AutoWeight(0.1), weighting.constant), Term(energy, Target(0.5), name="bounded")]
        return X0Regularization(scheduler, terms)

    def run(ours, calls):
        found = []
        for call in calls:
            x0, _, output, times, x_t = batch(scheduler, seed=call)
            found.append(ours(output, times, x_t, original_samples=x0).loss.item())
        return found

    whole, first, second = loss(), loss(), loss()
    expected = run(whole, range(30))
    assert run(first, range(17)) == expected[:17]
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert run(second, range(17, 30)) == expected[17:]
    assert not X0Regularization(scheduler, [Term(energy, 0.1)]).state_dict()


@pytest.mark.parametrize("loss_weight", [None, torch.tensor([0.5, 1.0, 2.0, 3.0])])
def test_it_follows_the_weight_that_a_schedule_of_ones_own_gives_to_the_loop(loss_weight):
    # the loop of EDM: w |D - x_0|^2; an explicit loss_weight replaces the one of the schedule
    schedule = AffineSchedule(lambda s: 1.0, lambda s: s, "sample", denoising_weight=lambda s: 4 + 1 / s**2)
    x0, noise, output = torch.randn(3, 4, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.1, 0.2, 0.5, 1.0])
    ours = X0Regularization(schedule, [Term(energy, AutoWeight(0.1), weighting.constant)])
    output.requires_grad_()
    x_t = add_noise(schedule, x0, noise, sigma)
    extra = ours(output, sigma, x_t, original_samples=x0, loss_weight=loss_weight)
    weights = 4 + 1 / sigma**2 if loss_weight is None else loss_weight
    denoising = (weights.reshape(-1, 1, 1, 1) * (output - x0) ** 2).mean()
    expected = 0.1 * norm(denoising, output) / norm(extra.terms["energy"], output)
    torch.testing.assert_close(extra.weights["energy"], expected, rtol=1e-5, atol=0)


def test_the_state_belongs_to_the_names_of_the_terms():
    scheduler = SCHEDULERS[0]
    x0, _, output, times, x_t = batch(scheduler)

    def loss(*names):
        terms = {"energy": Term(energy, AutoWeight(0.1)), "twice": Term(lambda x: 2 * energy(x), AutoWeight(0.1))}
        return X0Regularization(scheduler, [replace(terms[name], name=name) for name in names])

    first, turned = loss("energy", "twice"), loss("twice", "energy")
    expected = first(output, times, x_t, original_samples=x0).weights
    turned.load_state_dict(first.state_dict())
    with torch.no_grad():
        found = turned(output, times, x_t).weights
    assert found["energy"] == expected["energy"] != found["twice"] == expected["twice"]
    for other in (loss("twice"), X0Regularization(scheduler, [Term(energy, AutoWeight(0.1), name="new")])):
        with pytest.raises(RuntimeError, match="is that of 2 terms with AutoWeight or Target whose names are not"):
            other.load_state_dict(first.state_dict())


def test_a_float16_output_of_many_values_is_measured():
    scheduler = SCHEDULERS[0]
    x0, noise = torch.randn(2, 4, 1, 512, 512, generator=torch.Generator().manual_seed(0))
    times = torch.tensor([50, 100, 200, 300])
    output = (0.99 * noise).half()

    def weight_of(output):
        ours = X0Regularization(scheduler, [Term(lambda x: 1e-3 * energy(x), AutoWeight(0.1), name="energy")])
        x_t = add_noise(scheduler, x0, noise, times)
        return ours(output.requires_grad_(), times, x_t, original_samples=x0).weights["energy"]

    torch.testing.assert_close(weight_of(output), weight_of(output.float()), rtol=1e-5, atol=0)


def measured(folder):
    torch.distributed.init_process_group("gloo")
    rank, scheduler = torch.distributed.get_rank(), SCHEDULERS[2]
    x0, _, output, times, x_t = batch(scheduler, size=8)
    own = slice(4 * rank, 4 * rank + 4)
    output = output.detach()[own].requires_grad_()
    ours = X0Regularization(scheduler, [Term(energy, AutoWeight(0.1), weighting.constant)])
    extra = ours(output, times[own], x_t[own], original_samples=x0[own])
    torch.save(extra.weights["energy"].detach(), folder / f"weight-{rank}")
    torch.distributed.destroy_process_group()


def test_all_processes_have_the_weight_of_the_whole_batch(tmp_path):
    in_processes(measured, tmp_path)
    x0, _, output, times, x_t = batch(SCHEDULERS[2], size=8)
    ours = X0Regularization(SCHEDULERS[2], [Term(energy, AutoWeight(0.1), weighting.constant)])
    expected = ours(output, times, x_t, original_samples=x0).weights["energy"].detach()
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"weight-{rank}"), expected)


def test_without_gradients_nothing_is_measured():
    ours = X0Regularization(SCHEDULERS[0], [Term(energy, AutoWeight(0.1), weighting.constant)])
    _, _, output, times, x_t = batch(SCHEDULERS[0])
    with torch.no_grad():
        assert ours(output, times, x_t).weights["energy"] == 0
    ours.eval()
    assert ours(output, times, x_t).weights["energy"] == 0


def test_what_cannot_work_is_refused():
    scheduler = SCHEDULERS[0]
    x0, _, output, times, x_t = batch(scheduler)
    ours = X0Regularization(scheduler, [Term(energy, AutoWeight(0.1), weighting.constant)])
    with pytest.raises(ValueError, match="energy follows from gradients: pass original_samples= to the loss"):
        ours(output, times, x_t)
    with pytest.raises(ValueError, match=r"calls the network again: give the weight as a number"):
        X0Regularization(scheduler, [Term(energy, AutoWeight(0.1), estimator=Ddim(1))])
    for wrong in (0, -1, float("nan"), "auto"):
        with pytest.raises(ValueError, match="share must be a finite number above 0"):
            AutoWeight(wrong)
    with pytest.raises(ValueError, match="value must be a finite number above 0"):
        Target(0.0)
    term = Term(energy, Target(1.0))
    with pytest.raises(ValueError, match="guidance needs a number as its weight"):
        Guidance([term])
    with pytest.raises(ValueError, match="diagnose needs a number as its weight"):
        diagnose(scheduler, term, torch.randn(20, 1, 4, 4))
    zero = X0Regularization(scheduler, [Term(difference, Target(0.5, relative=True))])
    with pytest.raises(ValueError, match=r"L' of the data is 0, which gives Target\(relative=True\) no scale"):
        zero(output, times, x_t, original_samples=x0)


def test_describe_names_no_weight_that_is_not_known():
    ours = X0Regularization(SCHEDULERS[0], [Term(energy, AutoWeight(0.1))])
    line = ours.describe(torch.arange(0, 1000, 10))
    assert "; lambda / w_d from" in line and "weight *" not in line
