"""Which x0_hat a term looks at: one step, a trajectory, known noise, draws around it."""

from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from torch import nn

from reg_diffusers import (
    AffineSchedule,
    Ddim,
    KnownNoise,
    MonteCarlo,
    Prediction,
    RegularizedLoss,
    Shared,
    Term,
    X0Regularization,
    add_noise,
    balance,
    load_estimator,
    noise_level,
    one_step,
    predict_original_sample,
    prediction_target,
    takes_condition,
    weighting,
)
from reg_diffusers.regularizers import gradient_energy, sparsity

pytestmark = pytest.mark.loss

FLOW = FlowMatchEulerDiscreteScheduler()
VELOCITY = DDPMScheduler(prediction_type="v_prediction")
SCHEDULERS = {
    "flow": FLOW,
    "epsilon": DDPMScheduler(),
    "sample": DDPMScheduler(prediction_type="sample"),
    "v": VELOCITY,
    "euler": EulerDiscreteScheduler(),
    "affine": AffineSchedule(lambda t: 1 - t / 1000, lambda t: t / 1000, "velocity"),
}


def energy(x0_hat, /):
    return x0_hat.square().flatten(1).mean(1)


def images(number, *shape, seed=0):
    return torch.randn(number, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "index, places",
    [
        (torch.tensor([True, False, True, False]), [0, 2]),
        (torch.tensor([3, 2, 1, 0]), [3, 2, 1, 0]),
        (torch.tensor([1, 1, 0, 0]), [1, 1, 0, 0]),
        (slice(1, 3), [1, 2]),
        (-1, [3]),
    ],
)
def test_a_part_of_a_prediction_is_what_a_tensor_gives(index, places):
    x_t, output, x0 = images(3, 4, 1, 2, 2)
    whole = Prediction(FLOW, output, torch.arange(4), x_t, model_kwargs={"prompt": list("abcd")}, original_samples=x0)
    part = whole[index]
    assert part.timesteps.tolist() == places and part.model_kwargs == {"prompt": ["abcd"[place] for place in places]}
    for name, value in {"model_output": output, "sample": x_t, "original_samples": x0}.items():
        assert torch.equal(getattr(part, name), value[places])


class Network(nn.Module):
    """A smooth network that depends on the time and counts the images of each call."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.7, -0.4], dtype=torch.float64))
        self.calls = []

    def forward(self, sample, timesteps, shift=None):
        self.calls.append(len(sample))
        time = timesteps.to(sample).reshape(-1, *(1,) * (sample.ndim - 1)) / 1000
        output = (self.weight[0] * sample + self.weight[1] * time).sin()
        return output if shift is None else output + shift.reshape(time.shape)


def handed(scheduler, model, timesteps):
    x0, noise = images(2, len(timesteps), 2, 3, 3)
    sample = add_noise(scheduler, x0, noise, timesteps)
    output = model(sample, timesteps)
    return Prediction(scheduler, output, timesteps, sample, model, None, noise, x0)


# Ddim


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_on_a_flow_schedule_it_is_eulers_method(steps):
    model, times = Network(), torch.tensor([1000.0, 640.0, 100.0], dtype=torch.float64)
    prediction = handed(FLOW, model, times)
    x, sigma = prediction.sample, (times / 1000).reshape(-1, 1, 1, 1)
    for step in range(steps + 1):
        now = sigma * (1 - step / (steps + 1))
        x = x - sigma / (steps + 1) * model(x, 1000 * now.flatten())
    for gradient in ("last", "all"):
        torch.testing.assert_close(Ddim(steps, gradient)(prediction), x, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_perfect_network_stays_on_its_trajectory(name):
    """With the true noise of each image the end is the image, whatever the number of steps."""
    scheduler = SCHEDULERS[name]
    times = torch.tensor([900, 400, 30, 1])
    x0, noise = images(2, 4, 1, 3, 3)
    sample = add_noise(scheduler, x0, noise, times)

    def perfect(_, timesteps):
        return prediction_target(scheduler, x0, noise, timesteps)

    prediction = Prediction(scheduler, perfect(sample, times), times, sample, perfect)
    for steps in (1, 4):
        torch.testing.assert_close(Ddim(steps)(prediction), x0, atol=1e-4, rtol=0)


def test_its_gradient_is_that_of_the_last_call_or_of_all():
    model, times = Network(), torch.tensor([800.0, 300.0], dtype=torch.float64)

    def slope(gradient):
        prediction = handed(FLOW, model, times)
        return torch.autograd.grad(Ddim(2, gradient)(prediction).sum(), [model.weight])[0]

    def numerically(place):
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                model.weight[place] += step
                values.append(Ddim(2)(handed(FLOW, model, times)).sum())
                model.weight[place] -= step
        return (values[0] - values[1]) / 2e-5

    torch.testing.assert_close(slope("all"), torch.stack([numerically(0), numerically(1)]), rtol=1e-6, atol=1e-8)
    assert not torch.allclose(slope("last"), slope("all"), rtol=1e-2)


@pytest.mark.parametrize("gradient", ["last", "all"])
def test_it_asks_about_the_chosen_images_only_and_its_loss_reaches_the_parameters(gradient):
    model = Network()
    term = Term(energy, 1.0, weighting.gated(1.0), estimator=Ddim(2, gradient))
    loss_fn = RegularizedLoss(FLOW, [term])
    x0, noise = images(2, 4, 1, 3, 3)
    times = torch.tensor([900.0, 100.0, 700.0, 200.0])
    shift = torch.tensor([0.1, 0.2, 0.3, 0.4])
    output = loss_fn(model, x0, noise=noise, timesteps=times, model_kwargs={"shift": shift})
    assert model.calls == [4, 2, 2]
    chosen = torch.tensor([1, 3])
    sample = add_noise(FLOW, x0, noise, times)[chosen]
    prediction = Prediction(FLOW, model(sample, times[chosen], shift[chosen]), times[chosen], sample, model)
    prediction = replace(prediction, model_kwargs={"shift": shift[chosen]})
    torch.testing.assert_close(output.terms["energy"], energy(Ddim(2)(prediction)).sum() / 4)
    (expected,) = torch.autograd.grad(energy(term.estimator(prediction)).sum() / 4, [model.weight])
    (found,) = torch.autograd.grad(output.terms["energy"], [model.weight])
    torch.testing.assert_close(found, expected)
    assert found.abs().min() > 1e-4


def test_nothing_is_asked_where_no_image_takes_part():
    model = Network()
    loss_fn = RegularizedLoss(FLOW, [Term(energy, 1.0, weighting.gated(1.0), estimator=Ddim(3))])
    output = loss_fn(model, images(2, 1, 3, 3), timesteps=torch.tensor([900.0, 800.0]))
    output.loss.backward()
    assert model.calls == [2] and output.terms["energy"] == 0


def test_conditions_of_any_kind_follow_the_images():
    seen = {}

    def model(sample, timesteps, added_cond_kwargs, table):
        seen[len(sample)] = (added_cond_kwargs["time_ids"].tolist(), len(table))
        return sample

    kwargs = {"added_cond_kwargs": {"time_ids": torch.arange(4)}, "table": Shared(torch.zeros(4, 4))}
    regularization = X0Regularization(FLOW, [Term(energy, 1.0, weighting.gated(1.0), estimator=Ddim(1))])
    x_t = images(4, 1, 3, 3)
    regularization(x_t, torch.tensor([900.0, 100.0, 800.0, 50.0]), x_t, model=model, model_kwargs=kwargs)
    assert seen == {2: ([1, 3], 4)}


def test_a_conditioning_image_follows_the_images():
    shapes = []

    def network(sample, timesteps):
        shapes.append(tuple(sample.shape))
        return sample[:, :1]

    loss_fn = RegularizedLoss(FLOW, [Term(energy, 1.0, weighting.gated(1.0), estimator=Ddim(1))])
    x0, condition, times = images(4, 1, 3, 3), images(4, 2, 3, 3), torch.tensor([900.0, 100.0, 800.0, 50.0])
    loss_fn(takes_condition(network), x0, timesteps=times, model_kwargs={"condition": condition})
    assert shapes == [(4, 3, 3, 3), (2, 3, 3, 3)]


def test_the_network_is_called_in_its_own_precision(tiny_unet):
    unet = tiny_unet().to(torch.bfloat16)
    loss_fn = RegularizedLoss(FLOW, [Term(energy, 1.0, weighting.constant, estimator=Ddim(1))])
    output = loss_fn(unet, torch.rand(2, 1, 8, 8), timesteps=torch.tensor([900.0, 100.0]))
    output.loss.backward()
    assert output.terms["energy"] > 0 and unet.conv_in.weight.grad.abs().sum() > 0


# Its backward


@pytest.mark.parametrize("gradient", ["last", "all"])
def test_balance_leaves_it_the_whole_gradient(gradient):
    model, x0, noise = Network(), *images(2, 4, 1, 3, 3)
    times = torch.tensor([900.0, 100.0, 700.0, 200.0])
    terms = [Term(energy, 0.3, weighting.constant, estimator=Ddim(1, gradient)), Term(sparsity, 0.2)]
    loss_fn = RegularizedLoss(FLOW, terms)
    output = loss_fn(model, x0, noise=noise, timesteps=times)
    (expected,) = torch.autograd.grad(output.loss, [model.weight], retain_graph=True)
    balanced = balance(output, {"energy": 0.3, "sparsity": 0.2})
    torch.testing.assert_close(balanced.loss, output.loss)
    assert list(balanced.gradients) == ["denoising", "sparsity"] and balanced.separate == ("energy",)
    torch.testing.assert_close(torch.autograd.grad(balanced.loss, [model.weight])[0], expected)


# KnownNoise


@pytest.mark.parametrize("later", [0.0, 0.1, 0.35])
def test_known_noise_is_the_construction_in_two_steps(later):
    """To a lower noise level with the predicted velocity, and from there with the noise that is in x_t."""
    model, time = Network(), torch.tensor([700.0, 400.0], dtype=torch.float64)
    prediction = handed(FLOW, model, time)
    sigma = (time / 1000).reshape(-1, 1, 1, 1)
    moved = prediction.sample + (later * sigma - sigma) * prediction.model_output
    expected = (moved - later * sigma * prediction.noise) / (1 - later * sigma)
    kappas = (1 - later) / (1 - later * sigma)
    for index, kappa in enumerate(kappas.flatten().tolist()):
        found = KnownNoise(kappa)(prediction)[index]
        torch.testing.assert_close(found, expected[index], atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_kappa_is_one_minus_the_root_of_the_ratio_of_snrs(name):
    scheduler = SCHEDULERS[name]
    time, later = torch.tensor([800]), torch.tensor([300])
    x0, noise, output = images(3, 1, 1, 3, 3)
    sample = add_noise(scheduler, x0, noise, time)
    there = predict_original_sample(scheduler, output, time, sample)
    now, then = noise_level(scheduler, time), noise_level(scheduler, later)
    eps_hat = (sample - now.alpha * there) / now.sigma
    expected = (then.alpha * there + then.sigma * eps_hat - then.sigma * noise) / then.alpha
    kappa = 1 - (now.snr / then.snr).sqrt().item()
    found = KnownNoise(kappa)(Prediction(scheduler, output, time, sample, noise=noise, original_samples=x0))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_its_gradient_is_kappa_times_the_plain_one():
    output, x0, noise = images(3, 2, 1, 3, 3)
    time = torch.tensor([700, 200])
    sample, output = add_noise(VELOCITY, x0, noise, time), output.requires_grad_()
    prediction = Prediction(VELOCITY, output, time, sample, noise=noise, original_samples=x0)
    (plain,) = torch.autograd.grad(one_step(prediction).sum(), output)
    (ours,) = torch.autograd.grad(KnownNoise(0.3)(prediction).sum(), output)
    torch.testing.assert_close(ours, 0.3 * plain)


def test_what_known_noise_lacks_is_named():
    regularization = X0Regularization(VELOCITY, [Term(energy, 1.0, weighting.constant, estimator=KnownNoise(0.5))])
    x0, noise = images(2, 2, 1, 3, 3)
    time = torch.tensor([10, 20])
    x_t = add_noise(VELOCITY, x0, noise, time)
    with pytest.raises(ValueError, match="KnownNoise needs noise and original_samples: pass noise= to the loss"):
        regularization(noise, time, x_t)
    with pytest.raises(ValueError, match="KnownNoise needs original_samples"):
        regularization(noise, time, x_t, noise=noise)
    with pytest.raises(ValueError, match="sample is not alpha original_samples"):
        regularization(noise, time, x_t, noise=noise.flip(0), original_samples=x0)


# MonteCarlo


def test_its_mean_is_that_of_a_gaussian_around_the_estimate():
    """E |x + r z|^2 = |x|^2 + r^2, with the r of LGD."""
    x0, noise = images(2, 3, 1, 16, 16)
    time = torch.tensor([900, 300, 20])
    x_t, target = add_noise(VELOCITY, x0, noise, time), prediction_target(VELOCITY, x0, noise, time)
    torch.manual_seed(0)
    term = Term(energy, 1.0, weighting.constant, estimator=MonteCarlo(200))
    output = X0Regularization(VELOCITY, [term])(target, time, x_t)
    expected = energy(x0) + 1 / (1 + noise_level(VELOCITY, time).snr.double())
    torch.testing.assert_close(output.per_image["energy"], expected, rtol=0.02, atol=0)
    assert output.counts["energy"] == 3


def test_draws_are_averaged_per_image_and_drawn_for_active_images_only():
    seen = []

    def first(x0_hat, /, *, original_samples, mark, kernel):
        seen.append((tuple(x0_hat.shape), mark.tolist(), tuple(kernel.shape), original_samples[:, 0, 0, 0].tolist()))
        return x0_hat[:, 0, 0, 0] * mark

    first.needs = ("original_samples", "mark", "kernel")
    output, x_t = images(2, 4, 1, 2, 2)
    x0 = torch.arange(4.0).reshape(-1, 1, 1, 1).expand(4, 1, 2, 2).double()
    time = torch.tensor([900, 10, 800, 20])
    mark, kernel = torch.tensor([1.0, 2.0, 3.0, 4.0]), Shared(torch.zeros(2, 2))
    term = Term(first, 1.0, weighting.gated(1.0), estimator=MonteCarlo(3))
    other = Term(energy, 1.0, weighting.constant, estimator=MonteCarlo(3))
    context = {"original_samples": x0, "mark": mark, "kernel": kernel}
    torch.manual_seed(1)
    alone = X0Regularization(VELOCITY, [term])(output, time, x_t, **context)
    assert seen[0] == ((6, 1, 2, 2), [2.0, 4.0] * 3, (2, 2), [1.0, 3.0] * 3)
    torch.manual_seed(1)
    chosen = torch.tensor([1, 3])
    drawn = MonteCarlo(3)(Prediction(VELOCITY, output, time, x_t)[chosen]).unflatten(0, (3, 2))
    expected = drawn[:, :, 0, 0, 0].mean(0) * mark[chosen]
    torch.testing.assert_close(alone.per_image["first"][chosen], expected)
    assert alone.per_image["first"][[0, 2]].isnan().all()
    both = X0Regularization(VELOCITY, [term, other])(output, time, x_t, **context)  # draws shared, images chosen
    assert seen[-1][:2] == ((6, 1, 2, 2), [2.0, 4.0] * 3) and both.per_image["energy"].isfinite().all()


def test_an_image_with_one_bad_draw_is_dropped_with_all_its_draws():
    def bad_in_its_last_draw(x0_hat, /):
        values = energy(x0_hat)
        return torch.cat([values[:5], (values[5:] - values[5:].detach()).sqrt()])

    output = images(2, 1, 3, 3).requires_grad_()
    term = Term(bad_in_its_last_draw, 1.0, weighting.constant, estimator=MonteCarlo(3))
    regularization = X0Regularization(VELOCITY, [term])
    regularization(output, torch.tensor([100, 200]), images(2, 1, 3, 3, seed=1)).loss.backward()
    assert output.grad[0].abs().sum() > 0 and output.grad[1].abs().sum() == 0
    assert regularization.nonfinite.dropped["bad_in_its_last_draw"] == 1


def test_equal_estimators_share_their_work():
    model, terms = Network(), []
    for number, loss in enumerate((energy, sparsity, gradient_energy)):
        terms.append(Term(loss, 1.0, weighting.constant, str(number), estimator=Ddim(2)))
    RegularizedLoss(FLOW, terms)(model, images(2, 1, 4, 4), timesteps=torch.tensor([900.0, 100.0]))
    assert model.calls == [2, 2, 2]


# Names


def test_names_of_the_command_line():
    assert load_estimator("one_step") is one_step
    assert load_estimator("ddim(1)") == Ddim(1) and load_estimator("ddim(2, gradient='all')") == Ddim(2, "all")
    assert load_estimator("known_noise(kappa=0.5)") == KnownNoise(0.5)
    assert load_estimator("monte_carlo(4)") == MonteCarlo(4)


@pytest.mark.parametrize(
    "spec, message",
    [
        ("ddim", "needs steps"),
        ("ddim(0)", "at least 1, not 0; 0 would be one_step"),
        ("ddim(1.5)", "whole number"),
        ("ddim(1, 'first')", "'last' or 'all'"),
        ("known_noise(0)", "above 0 and at most 1"),
        ("known_noise('x')", "kappa must be a number, not 'x'"),
        ("monte_carlo(0)", "at least 1"),
        ("two_step", r"unknown estimator 'two_step'; known: one_step, ddim\(steps, .*monte_carlo\(samples\)"),
    ],
)
def test_other_names_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        load_estimator(spec)


def test_an_estimator_that_returns_another_number_is_refused():
    term = Term(energy, 1.0, weighting.constant, estimator=lambda prediction: one_step(prediction).repeat(2, 1, 1, 1))
    with pytest.raises(ValueError, match=r"one x0_hat per image and draw, \(2, C, ...\), not a tensor of shape \(4,"):
        X0Regularization(VELOCITY, [term])(images(2, 1, 3, 3), torch.tensor([10, 20]), images(2, 1, 3, 3))
