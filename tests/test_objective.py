"""The objective: its value, what it asks of the model, which images take part."""

import weakref
from contextlib import contextmanager

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers.utils import BaseOutput
from losses import TIMESTEPS, images, loss_and_gradients, mean_square, reconstruction, scheduler_of
from torch import nn

from reg_diffusers import weighting
from reg_diffusers.estimators import one_step
from reg_diffusers.objective import RegularizedLoss, Term, X0Regularization, draw_timesteps
from reg_diffusers.prediction import (
    add_noise,
    noise_level,
    predict_original_sample,
    prediction_target,
    scale_model_input,
)
from reg_diffusers.regularizers import total_variation

pytestmark = pytest.mark.loss

# The value


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_without_terms_the_loss_is_mse_bit_for_bit(kind):
    torch.manual_seed(0)
    model = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    scheduler, timesteps = scheduler_of(kind), torch.tensor(TIMESTEPS)
    original, noise = images(2, 4, 1, 8, 8, dtype=torch.float32)
    noisy_samples = scheduler.add_noise(original, noise, timesteps)
    target = {
        "epsilon": lambda: noise,
        "v_prediction": lambda: scheduler.get_velocity(original, noise, timesteps),
        "sample": lambda: original,
    }[kind]()
    expected = F.mse_loss(model(noisy_samples, timesteps).sample, target)
    result = RegularizedLoss(scheduler)(model, original, noise=noise, timesteps=timesteps)
    assert torch.equal(result.loss, expected)
    assert list(result.terms) == ["denoising"]
    assert torch.equal(result.terms["denoising"], expected)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow_prediction"])
def test_reconstruction_weighted_by_the_denoising_weight_is_the_denoising_loss(kind):
    term = Term(reconstruction, 1.0, lambda level: level.denoising_weight)
    loss_fn = RegularizedLoss(scheduler_of(kind), [term])
    timesteps = torch.tensor((30, 60, 300, 1000) if kind == "flow_prediction" else TIMESTEPS)
    original, noise, output = images(3, 4, 1, 3, 2)
    terms = loss_fn(lambda sample, t: output, original, noise=noise, timesteps=timesteps).terms
    torch.testing.assert_close(terms["reconstruction"], terms["denoising"], rtol=2e-6, atol=0)


def test_reconstruction_weighted_by_the_snr_is_the_noise_prediction_loss():
    result, _ = loss_and_gradients(RegularizedLoss(scheduler_of(), [Term(reconstruction, 1.0, weighting.snr)]))
    torch.testing.assert_close(result.terms["reconstruction"], result.terms["denoising"], rtol=2e-6, atol=0)


def test_the_loss_is_denoising_plus_the_weighted_terms():
    first = Term(total_variation, weight=0.3)
    second = Term(mean_square, weight=2.0, weighting=weighting.constant, name="size")
    third = Term(mean_square, weight=0.0, weighting=weighting.alpha_bar, name="watched")
    result, _ = loss_and_gradients(RegularizedLoss(scheduler_of(), [first, second, third]))
    assert list(result.terms) == ["denoising", "total_variation", "size", "watched"]
    expected = result.terms["denoising"] + 0.3 * result.terms["total_variation"] + 2.0 * result.terms["size"]
    torch.testing.assert_close(result.loss, expected, rtol=1e-12, atol=0)
    assert result.terms["watched"] > 0


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_term_is_the_mean_over_the_batch_of_weighting_times_regularizer(kind):
    scheduler, timesteps = scheduler_of(kind), torch.tensor(TIMESTEPS)
    output, sample = images(2, 4, 1, 3, 2)
    regularization = X0Regularization(scheduler, [Term(total_variation, 0.7)])
    result = regularization(output, timesteps, sample)
    values = total_variation(predict_original_sample(scheduler, output, timesteps, sample))
    expected = (weighting.matched(noise_level(scheduler, timesteps)) * values).mean()
    torch.testing.assert_close(result.terms["total_variation"], expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(result.loss, 0.7 * expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_min_snr_weighs_the_denoising_loss_and_matched_follows(kind):
    scheduler, timesteps, gamma = scheduler_of(kind), torch.tensor(TIMESTEPS), 5.0
    alpha_bar = scheduler.alphas_cumprod[timesteps].double()
    snr = alpha_bar / (1 - alpha_bar)
    original, noise, output = images(3, 4, 1, 3, 2)
    loss_fn = RegularizedLoss(scheduler, [Term(mean_square, 1.0)], snr_gamma=gamma)
    terms = loss_fn(lambda sample, t: output, original, noise=noise, timesteps=timesteps).terms

    in_x0_units = {"epsilon": snr, "v_prediction": snr + 1}[kind]
    squared_error = (output - prediction_target(scheduler, original, noise, timesteps)).square().flatten(1).mean(1)
    denoising = (snr.clamp(max=gamma) / in_x0_units * squared_error).mean()
    torch.testing.assert_close(terms["denoising"], denoising, rtol=1e-6, atol=0)

    sample = add_noise(scheduler, original, noise, timesteps)
    gate = (snr**2 / (snr**2 + 100)).where(snr >= 10 / 7, 0)
    values = mean_square(predict_original_sample(scheduler, output, timesteps, sample))
    torch.testing.assert_close(terms["mean_square"], (snr.clamp(max=gamma) * gate * values).mean(), rtol=1e-6, atol=0)


def test_a_huge_gamma_leaves_noise_prediction_as_it_is():
    plain, _ = loss_and_gradients(RegularizedLoss(scheduler_of()))
    weighted, _ = loss_and_gradients(RegularizedLoss(scheduler_of(), snr_gamma=1e12))
    torch.testing.assert_close(weighted.loss, plain.loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize("snr_gamma", [None, 5.0])
@pytest.mark.parametrize(
    "scheduler",
    [
        scheduler_of("epsilon"),
        scheduler_of("v_prediction"),
        scheduler_of("flow_prediction"),
        diffusers.EulerDiscreteScheduler(),  # the one whose network is shown something else than x_t
    ],
    ids=["epsilon", "v_prediction", "flow_prediction", "euler"],
)
def test_the_additive_part_in_a_hand_written_loop_equals_the_whole_objective(scheduler, snr_gamma):
    timesteps = torch.tensor((30, 60, 300, 999))
    terms = [Term(total_variation, 0.1), Term(reconstruction, 0.5, weighting.alpha_bar)]
    original, noise = images(2, 4, 2, 5, 5)
    torch.manual_seed(0)
    model = nn.Conv2d(2, 2, 3, padding=1, dtype=torch.float64)
    whole = RegularizedLoss(scheduler, terms, snr_gamma=snr_gamma)
    expected = whole(lambda sample, t: model(sample), original, noise=noise, timesteps=timesteps)

    noisy_samples = add_noise(scheduler, original, noise, timesteps)
    model_output = model(scale_model_input(scheduler, noisy_samples, timesteps))
    additive = X0Regularization(scheduler, terms, snr_gamma=snr_gamma)
    extra = additive(model_output, timesteps, noisy_samples, original_samples=original)
    assert extra.terms == {name: value for name, value in expected.terms.items() if name != "denoising"}
    torch.testing.assert_close(expected.loss - expected.terms["denoising"], extra.loss)
    if snr_gamma is None:
        target = prediction_target(scheduler, original, noise, timesteps)
        loss = F.mse_loss(model_output, target) + extra.loss
        torch.testing.assert_close(loss, expected.loss, rtol=1e-12, atol=0)
        ours, theirs = (torch.autograd.grad(value, model.weight)[0] for value in (loss, expected.loss))
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_a_scalar_timestep_counts_for_the_whole_batch():
    output, sample = images(2, 4, 1, 3, 2)
    regularization = X0Regularization(scheduler_of(), [Term(total_variation, 1.0)])
    expected = regularization(output, torch.full((4,), 50), sample).loss
    assert expected > 0
    assert torch.equal(regularization(output, 50, sample).loss, expected)


def test_an_estimator_of_ones_own_gives_the_image():
    term = Term(mean_square, 1.0, weighting.constant, estimator=lambda prediction: prediction.sample)
    output, sample = images(2, 4, 1, 3, 2)
    actual = X0Regularization(scheduler_of(), [term])(output, torch.tensor(TIMESTEPS), sample).loss
    torch.testing.assert_close(actual, mean_square(sample).mean())


# The model


def test_tensors_tuples_and_diffusers_outputs_are_understood():
    original, noise = images(2, 4, 1, 3, 2)
    for wrap in (lambda x: x, lambda x: (x, "more"), lambda x: _Output(sample=x)):
        result = RegularizedLoss(scheduler_of())(
            lambda sample, t, wrap=wrap: wrap(sample), original, noise=noise, timesteps=torch.tensor(TIMESTEPS)
        )
        noisy_samples = add_noise(scheduler_of(), original, noise, torch.tensor(TIMESTEPS))
        torch.testing.assert_close(result.loss, F.mse_loss(noisy_samples, noise), rtol=1e-12, atol=0)


class _Output(BaseOutput):
    sample: torch.Tensor


def test_the_model_is_called_once_with_noisy_samples_timesteps_and_its_own_arguments():
    scheduler, timesteps, labels = diffusers.EulerDiscreteScheduler(), torch.tensor(TIMESTEPS), torch.arange(4)
    original, noise = images(2, 4, 1, 3, 2)
    calls = []

    def model(*args, **kwargs):
        calls.append((args, kwargs))
        return args[0]

    RegularizedLoss(scheduler, [Term(total_variation, 1.0), Term(mean_square, 1.0)])(
        model, original, noise=noise, timesteps=timesteps, model_kwargs={"class_labels": labels}
    )
    ((model_input, t), kwargs), *others = calls
    assert not others
    assert torch.equal(t, timesteps)
    assert kwargs == {"class_labels": labels}
    # Euler's input has the scale of DDPM's x_t, with the same schedule
    torch.testing.assert_close(
        model_input, add_noise(diffusers.DDPMScheduler(), original, noise, timesteps), rtol=1e-6, atol=1e-6
    )


def test_a_section_surrounds_the_extra_losses_and_not_the_network():
    seen, open_sections = [], []

    @contextmanager
    def section():
        open_sections.append("extra")
        yield
        open_sections.pop()

    def model(noisy_samples, timesteps):
        seen.append(("network", *open_sections))
        return noisy_samples

    def energy(x0_hat):
        seen.append(("regularizer", *open_sections))
        return mean_square(x0_hat)

    terms = [Term(energy, weight=0.1, weighting=weighting.constant)]
    loss_fn = RegularizedLoss(scheduler_of(), terms, section=section)
    loss_fn(model, images(4, 1, 3, 2), timesteps=torch.tensor(TIMESTEPS))
    assert seen == [("network",), ("regularizer", "extra")] and not open_sections


def test_flow_matching_end_to_end():
    scheduler, timesteps = diffusers.FlowMatchEulerDiscreteScheduler(), torch.tensor([20.0, 300.0, 700.0, 1000.0])
    original, noise, output = images(3, 4, 1, 3, 2)
    sigma = (timesteps.double() / 1000).reshape(-1, 1, 1, 1)
    seen = []

    def model(sample, t):
        seen.extend((sample, t))
        return output

    loss_fn = RegularizedLoss(scheduler, [Term(mean_square, 1.0, weighting.constant)])
    terms = loss_fn(model, original, noise=noise, timesteps=timesteps).terms
    noisy_samples = (1 - sigma) * original + sigma * noise
    torch.testing.assert_close(seen[0], noisy_samples, rtol=0, atol=1e-6)
    assert torch.equal(seen[1], timesteps)
    torch.testing.assert_close(terms["denoising"], F.mse_loss(output, noise - original), rtol=1e-12, atol=0)
    expected = mean_square(noisy_samples - sigma * output).mean()
    torch.testing.assert_close(terms["mean_square"], expected, rtol=1e-6, atol=0)


def drawn_timesteps(scheduler, batch_size):
    seen = []

    def model(sample, t):
        seen.append(t)
        return sample

    result = RegularizedLoss(scheduler)(model, torch.zeros(batch_size, 1, 1, 1))
    assert result.loss.isfinite()
    return seen[0]


def test_default_timesteps_are_uniform_over_the_training_schedule():
    torch.manual_seed(0)
    timesteps = drawn_timesteps(diffusers.DDPMScheduler(num_train_timesteps=50), 20_000)
    counts = torch.bincount(timesteps, minlength=50)
    assert not timesteps.is_floating_point()
    assert len(counts) == 50
    assert ((counts - 400).abs() < 6 * 20).all()  # six standard deviations


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_default_timesteps_of_flow_matching_are_those_of_its_training_schedule(shift):
    torch.manual_seed(0)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=50, shift=shift)
    timesteps = drawn_timesteps(scheduler, 20_000)
    place = (timesteps[:, None] - scheduler.timesteps).abs().min(1)
    assert place.values.max() < 1e-4
    assert ((torch.bincount(place.indices, minlength=50) - 400).abs() < 6 * 20).all()


@pytest.mark.parametrize(
    "scheduler", [diffusers.EDMEulerScheduler(), diffusers.SCMScheduler()], ids=["EDM", "TrigFlow"]
)
def test_schedulers_that_count_time_by_noise_ask_for_timesteps(scheduler):
    """EDM counts timesteps as log(sigma) / 4, TrigFlow as an angle: there is no training schedule to draw from."""
    with pytest.raises(ValueError, match="pass timesteps"):
        drawn_timesteps(scheduler, 10)


def test_default_noise_is_standard_normal_and_fresh():
    torch.manual_seed(0)
    seen = []
    original = torch.zeros(2, 1, 100, 100)
    for _ in range(2):
        RegularizedLoss(diffusers.DDPMScheduler())(
            lambda sample, t: seen.append(sample) or sample, original, timesteps=torch.tensor([999, 999])
        )
    noise = torch.stack(seen)
    assert noise.flatten(1).std(1).tolist() == pytest.approx([1, 1], abs=0.03)
    assert not torch.equal(noise[0], noise[1])
    assert not torch.equal(noise[0, 0], noise[0, 1])


# Which images reach L'


def test_images_of_zero_weight_are_left_out_before_the_regularizer_runs():
    seen = []

    def recording(x0_hat, *, original_samples, mask, label, scale):
        seen.append((x0_hat, original_samples, mask, label, scale))
        return (scale * mask * x0_hat**2).flatten(1).mean(1)

    recording.needs = ("original_samples", "mask", "label", "scale")
    scheduler = scheduler_of("sample")
    original, noise, output = images(3, 4, 1, 3, 2)
    context = {"mask": images(4, 1, 3, 2, seed=1), "label": "a name", "scale": torch.tensor(2.0)}
    result = RegularizedLoss(scheduler, [Term(recording, 1.0, weighting.low_noise)])(
        lambda sample, t: output, original, noise=noise, timesteps=torch.tensor([500, 0, 999, 199]), **context
    )
    ((x0_hat, *others),) = seen
    for value, whole in zip([x0_hat, *others[:2]], [output, original, context["mask"]], strict=True):
        assert torch.equal(value, whole[[1, 3]])
    assert others[2:] == [context["label"], context["scale"]]
    values = (2.0 * context["mask"] * output**2).flatten(1).mean(1)
    torch.testing.assert_close(result.terms["recording"], (values[1] + values[3]) / 4, rtol=1e-12, atol=0)


def test_a_batch_without_active_images_does_not_run_the_regularizer():
    def forbidden(x0_hat):
        raise AssertionError("called")

    loss_fn = RegularizedLoss(scheduler_of(), [Term(forbidden, 1.0, lambda level: torch.zeros_like(level.snr))])
    plain, expected = loss_and_gradients(RegularizedLoss(scheduler_of()))
    result, gradients = loss_and_gradients(loss_fn)
    assert result.terms["forbidden"] == 0
    assert torch.equal(result.loss, plain.loss)
    assert torch.equal(gradients, expected)


def test_inactive_images_get_the_denoising_gradient_only():
    _, plain = loss_and_gradients(RegularizedLoss(scheduler_of()))
    _, gradients = loss_and_gradients(RegularizedLoss(scheduler_of(), [Term(mean_square, 1.0, weighting.low_noise)]))
    changed = (gradients != plain).flatten(1).any(1)
    assert changed.tolist() == [t < 200 for t in TIMESTEPS]


def test_the_regularizer_sees_single_precision_outside_autocast():
    seen = []

    def recording(x0_hat):
        product = x0_hat.flatten(1) @ torch.ones(18, 18)
        seen.extend((x0_hat.dtype, product.dtype, torch.is_autocast_enabled("cpu")))
        return product.mean(1) ** 2

    model = nn.Conv2d(2, 2, 3, padding=1)
    original = images(4, 2, 3, 3, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(original).dtype == torch.bfloat16
        loss_fn = RegularizedLoss(scheduler_of(), [Term(recording, 1.0, weighting.constant)])
        result = loss_fn(lambda sample, t: model(sample), original, timesteps=torch.tensor(TIMESTEPS))
    assert seen == [torch.float32, torch.float32, False]
    assert result.loss.dtype == torch.float32
    result.loss.backward()
    assert model.weight.grad.abs().max() > 0


def test_terms_that_share_an_estimator_share_its_estimate():
    """A costly estimator, such as a decoder, runs once, on the images that any of its terms looks at."""
    calls = []

    def decoder(prediction):
        calls.append(len(prediction))
        return 2 * one_step(prediction)

    def first_two(level):
        return torch.tensor([1.0, 1.0, 0.0, 0.0])

    def middle(level):
        return torch.tensor([0.0, 3.0, 3.0, 0.0])

    output, original = images(4, 1, 3, 3).requires_grad_(), images(4, 1, 3, 3)
    terms = [
        Term(mean_square, 1.0, first_two, "a", decoder),
        Term(mean_square, 1.0, middle, "b", decoder),
        Term(mean_square, 1.0, first_two, "plain"),
    ]
    result = RegularizedLoss(scheduler_of("sample"), terms)(lambda sample, t: output, original)
    assert calls == [3]
    values = mean_square(output)
    torch.testing.assert_close(result.terms["a"], 4 * values[:2].sum() / 4)
    torch.testing.assert_close(result.terms["b"], 4 * 3 * values[1:3].sum() / 4)
    torch.testing.assert_close(result.terms["plain"], values[:2].sum() / 4)


def test_the_memory_of_the_extra_loss_is_free_before_the_network_goes_backward():
    """Else its peak would come on top of the network's."""

    class Kept:
        def __init__(self, tensor):
            self.tensor = tensor

    kept, alive = [], []

    def hungry(x0_hat, /):
        def keep(tensor):
            holder = Kept(tensor)
            kept.append(weakref.ref(holder))
            return holder

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda holder: holder.tensor):
            return x0_hat.exp().square().flatten(1).mean(1)

    weights = torch.ones((), requires_grad=True)

    def model(sample, timesteps):
        output = weights * sample
        output.register_hook(lambda gradient: alive.append(sum(holder() is not None for holder in kept)))
        return output

    output = RegularizedLoss(scheduler_of(), [Term(hungry, 1.0)])(
        model, images(1, 4, 1, 8, 8)[0], timesteps=[0, 1, 2, 3]
    )
    assert len(kept) >= 2 and all(holder() is not None for holder in kept)
    output.loss.backward()
    assert alive == [0] and weights.grad.isfinite()


def test_metrics_are_plain_numbers_with_the_raw_loss_among_them():
    original = images(4, 1, 3, 2)
    timesteps = torch.tensor([0, 10, 900, 990])  # `matched` leaves two of them out
    output = RegularizedLoss(scheduler_of(), [Term(mean_square, weight=0.1)])(
        lambda sample, t: sample, original, timesteps=timesteps
    )
    found = output.metrics()
    assert set(found) == {"loss", "denoising", "mean_square", "raw/mean_square", "weight/mean_square"}
    assert all(isinstance(value, float) for value in found.values())
    assert found["loss"] == pytest.approx(found["denoising"] + 0.1 * found["mean_square"])
    assert found["raw/mean_square"] == pytest.approx(output.per_image["mean_square"][:2].mean().item())
    named_loss = RegularizedLoss(scheduler_of(), [Term(mean_square, weight=0.1, name="loss")])
    output = named_loss(lambda sample, t: sample, original, timesteps=timesteps)
    assert output.metrics()["loss"] == output.loss.item() != output.terms["loss"].item()


@pytest.mark.parametrize(
    ("original_samples", "noise", "error", "message"),
    [
        (
            torch.zeros(2, 1, 4, 4, dtype=torch.uint8),
            None,
            TypeError,
            "original_samples must be a floating-point tensor",
        ),
        (lambda sample, timesteps: sample, None, TypeError, "original_samples must be .*, not function"),
        (torch.zeros(0, 1, 4, 4), None, ValueError, "a batch of 0 images"),
        (
            torch.zeros(2, 1, 4, 4),
            torch.zeros(1, 1, 4, 4),
            ValueError,
            r"noise has shape \(1, 1, 4, 4\), original_samp",
        ),
    ],
)
def test_images_and_noise_that_cannot_be_meant_are_refused_by_name(original_samples, noise, error, message):
    with pytest.raises(error, match=message):
        RegularizedLoss(scheduler_of())(lambda sample, timesteps: sample, original_samples, noise=noise)


@pytest.mark.parametrize("density", [lambda u: u - 2, lambda u: 1000 * u + 1.5, lambda u: u / 0 * 0])
def test_a_density_of_timesteps_that_leaves_the_schedule_is_refused(density):
    with pytest.raises(ValueError, match="density must map quantiles"):
        draw_timesteps(scheduler_of(), 4, density)
