"""The objective: its value term by term, which images reach L', and what a bad L' may and may not do."""

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers.utils import BaseOutput
from torch import nn

from reg_diffusers import weighting
from reg_diffusers.objective import RegularizedLoss, Term, X0Regularization
from reg_diffusers.prediction import (
    add_noise,
    noise_level,
    predict_original_sample,
    prediction_target,
    scale_model_input,
)
from reg_diffusers.regularizers import total_variation

TIMESTEPS = (0, 60, 300, 999)


def images(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def scheduler_of(kind="epsilon"):
    if kind == "flow_prediction":
        return diffusers.FlowMatchEulerDiscreteScheduler()
    return diffusers.DDPMScheduler(prediction_type=kind)


def mean_square(x0_hat):
    return x0_hat.square().flatten(1).mean(1)


def reconstruction(x0_hat, *, original_samples):
    return (x0_hat - original_samples).square().flatten(1).mean(1)


reconstruction.needs = ("original_samples",)


def scaled_square(x0_hat, *, factor):
    return factor * mean_square(x0_hat)


scaled_square.needs = ("factor",)


def loss_and_gradients(loss_fn, **context):
    """The loss of a batch of 4 and its gradient by the network's output, (4, 1, 3, 2)."""
    original, noise, output = images(3, 4, 1, 3, 2)
    output.requires_grad_()
    result = loss_fn(lambda sample, t: output, original, noise=noise, timesteps=torch.tensor(TIMESTEPS), **context)
    return result, torch.autograd.grad(result.loss, output)[0]


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
    term = Term(mean_square, 1.0, weighting.constant, estimator=lambda scheduler, output, timesteps, sample: sample)
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


# What a regularizer must be


@pytest.mark.parametrize(
    ("regularizer", "complaint"),
    [
        (lambda x: x.mean(), r"one value per image.*shape \(4,\).*shape \(\)"),
        (lambda x: x.mean((2, 3)), r"one value per image.*shape \(4, 1\)"),
        (lambda x: x.mean((1, 2, 3))[:2], r"one value per image.*shape \(2,\)"),
        (lambda x: 1.0, "one value per image.*float"),
        (lambda x: None, "one value per image.*NoneType"),
        (lambda x: mean_square(x).detach().numpy(), "one value per image.*ndarray"),
        (lambda x: mean_square(x).detach(), "detached"),
        (lambda x: torch.zeros(len(x)), "detached"),
    ],
)
def test_a_regularizer_that_returns_something_else_is_refused_by_name(regularizer, complaint):
    loss_fn = RegularizedLoss(scheduler_of(), [Term(regularizer, 1.0, weighting.constant, name="odd one")])
    with pytest.raises(ValueError, match=f"(?s)'odd one'.*{complaint}"):
        loss_and_gradients(loss_fn)


def test_without_gradients_nothing_is_detached():
    loss_fn = RegularizedLoss(scheduler_of(), [Term(mean_square, 1.0, weighting.constant)])
    with torch.no_grad():
        result = loss_fn(lambda sample, t: sample, images(4, 1, 3, 2))
    assert result.terms["mean_square"] > 0


def test_missing_context_is_named():
    def needy(x0_hat, *, mask, depth):
        return x0_hat.flatten(1).mean(1)

    needy.needs = ("original_samples", "mask", "depth")
    loss_fn = RegularizedLoss(scheduler_of(), [Term(needy, 1.0, weighting.constant)])
    with pytest.raises(ValueError, match=r"'needy' needs depth, but the loss was given .*mask"):
        loss_and_gradients(loss_fn, mask=torch.ones(4, 1, 3, 2))


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -1.0])
def test_a_weight_is_finite_and_not_negative(weight):
    with pytest.raises(ValueError, match="weight must be finite"):
        Term(total_variation, weight)


def test_a_term_needs_a_regularizer_and_a_weight_only():
    term = Term(total_variation, weight=0.1)
    assert (term.name, term.weighting) == ("total_variation", weighting.matched)
    assert Term(regularizer=mean_square, weight=1, weighting=weighting.snr, name="size").name == "size"


@pytest.mark.parametrize("names", [("same", "same"), ("denoising",), ("one", "denoising")])
def test_names_must_differ_from_each_other_and_from_denoising(names):
    terms = [Term(mean_square, 1.0, name=name) for name in names]
    for refuse in (RegularizedLoss, X0Regularization):
        with pytest.raises(ValueError, match=r"different names, none .denoising."):
            refuse(scheduler_of(), terms)


# Values and gradients that are not finite


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_an_image_whose_value_is_not_finite_loses_its_extra_gradient_only(bad):
    factor = torch.tensor([1.0, 2.0, 3.0, 4.0]).double()
    loss_fn = RegularizedLoss(scheduler_of("sample"), [Term(scaled_square, 1.0, weighting.constant)])
    expected, expected_gradients = loss_and_gradients(loss_fn, factor=factor * torch.tensor([1, 0, 1, 1]))
    _, denoising_gradients = loss_and_gradients(RegularizedLoss(scheduler_of("sample")))
    assert loss_fn.regularization.nonfinite.dropped["scaled_square"] == 0
    result, gradients = loss_and_gradients(loss_fn, factor=factor + torch.tensor([0, bad, 0, 0]))
    assert torch.equal(result.loss, expected.loss)
    assert torch.equal(gradients, expected_gradients)
    assert torch.equal(gradients[1], denoising_gradients[1])
    assert not torch.equal(gradients[0], denoising_gradients[0])
    assert loss_fn.regularization.nonfinite.dropped["scaled_square"] == 1


def distance(x0_hat, *, original_samples):
    """Finite everywhere, but its gradient at distance 0 is 0 / 0."""
    return (x0_hat - original_samples).square().flatten(1).sum(1).sqrt()


distance.needs = ("original_samples",)


def loss_and_gradients_at_the_original(terms, exact):
    """As `loss_and_gradients`, for outputs of which some are the original image itself."""
    loss_fn = RegularizedLoss(scheduler_of("sample"), terms)
    original, noise, output = images(3, 4, 1, 3, 2)
    output[exact] = original[exact]
    output.requires_grad_()
    result = loss_fn(lambda sample, t: output, original, noise=noise, timesteps=torch.tensor(TIMESTEPS))
    (gradients,) = torch.autograd.grad(result.loss, output)
    return result, gradients, loss_fn.regularization.nonfinite


def test_an_image_whose_gradient_is_not_finite_loses_its_extra_gradient_only():
    term = Term(distance, 1.0, weighting.constant)
    result, gradients, nonfinite = loss_and_gradients_at_the_original([term], exact=[1, 3])
    _, plain_gradients, _ = loss_and_gradients_at_the_original([], exact=[1, 3])
    assert result.loss.isfinite()
    assert torch.equal(gradients[[1, 3]], plain_gradients[[1, 3]])
    _, undisturbed, _ = loss_and_gradients_at_the_original([term], exact=[])
    assert torch.equal(gradients[[0, 2]], undisturbed[[0, 2]])
    assert (gradients[0] - plain_gradients[0]).norm().item() == pytest.approx(1 / 4)  # a unit vector over the batch
    assert nonfinite.dropped["distance"] == 2


def test_one_bad_pixel_drops_the_whole_images_extra_gradient():
    def root_of_distance(x0_hat, *, original_samples):
        return (x0_hat - original_samples).abs().sqrt().flatten(1).mean(1)

    root_of_distance.needs = ("original_samples",)
    term = Term(root_of_distance, 1.0, weighting.constant)
    pixel = (2, 0, 1, 1)
    _, gradients, nonfinite = loss_and_gradients_at_the_original([term], pixel)
    _, plain_gradients, _ = loss_and_gradients_at_the_original([], pixel)
    changed = (gradients != plain_gradients).flatten(1).all(1)
    assert changed.tolist() == [True, True, False, True]
    assert torch.equal(gradients[2], plain_gradients[2])
    assert nonfinite.dropped["root_of_distance"] == 1


def test_a_bad_gradient_of_one_term_spares_the_others():
    good = Term(mean_square, 1.0, weighting.constant)
    _, gradients, nonfinite = loss_and_gradients_at_the_original([Term(distance, 1.0, weighting.constant), good], [1])
    _, alone, _ = loss_and_gradients_at_the_original([good], [1])
    assert torch.equal(gradients[1], alone[1])
    assert {name: int(count) for name, count in nonfinite.dropped.items()} == {"distance": 1, "mean_square": 0}


def test_an_image_that_is_bad_in_value_and_gradient_is_counted_once_a_step():
    factor = torch.tensor([1.0, float("nan"), 1.0, float("nan")]).double()
    loss_fn = RegularizedLoss(scheduler_of("sample"), [Term(scaled_square, 1.0, weighting.constant)])
    for step in (1, 2, 3):
        loss_and_gradients(loss_fn, factor=factor)
        assert loss_fn.regularization.nonfinite.dropped["scaled_square"] == 2 * step


GOOD, BAD = torch.ones(4).double(), torch.tensor([1, 1, float("nan"), 1]).double()


def test_too_many_bad_steps_in_a_row_stop_the_run_with_the_terms_name_and_timesteps():
    terms = [Term(mean_square, 1.0, weighting.constant), Term(scaled_square, 1.0, weighting.constant, name="culprit")]
    loss_fn = RegularizedLoss(scheduler_of("sample"), terms, max_nonfinite_steps=3)
    for _ in range(2):
        loss_and_gradients(loss_fn, factor=BAD)
    with pytest.raises(FloatingPointError, match=r"'culprit'.* 3 steps in a row .*timesteps 300 to 300"):
        loss_and_gradients(loss_fn, factor=BAD)


def test_the_message_names_the_range_of_timesteps_among_the_active_images():
    regularization = X0Regularization(
        scheduler_of(), [Term(scaled_square, 1.0, weighting.low_noise)], max_nonfinite_steps=1
    )
    output, sample = images(2, 4, 1, 3, 2)
    factor = torch.full((4,), float("inf"))
    with pytest.raises(FloatingPointError, match="timesteps 7 to 190"):
        regularization(output, torch.tensor([500, 190, 7, 60]), sample, factor=factor)


def test_a_good_step_ends_the_row():
    loss_fn = RegularizedLoss(
        scheduler_of("sample"), [Term(scaled_square, 1.0, weighting.constant)], max_nonfinite_steps=3
    )
    for factor in (BAD, BAD, GOOD, BAD, BAD, GOOD, BAD, BAD):
        loss_and_gradients(loss_fn, factor=factor)
    assert loss_fn.regularization.nonfinite.dropped["scaled_square"] == 6
    with pytest.raises(FloatingPointError):
        loss_and_gradients(loss_fn, factor=BAD)


def test_too_many_steps_with_bad_gradients_stop_the_run_too():
    """An image counts as bad for its gradient as it does for its value."""
    loss_fn = RegularizedLoss(scheduler_of("sample"), [Term(distance, 1.0, weighting.constant)], max_nonfinite_steps=3)
    original = images(4, 1, 3, 2)
    with pytest.raises(FloatingPointError, match="'distance'"):
        for _ in range(5):
            output = original.clone().requires_grad_()
            loss_fn(lambda sample, t, output=output: output, original).loss.backward()


# Networks inside regularizers


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Dropout(), nn.Flatten(), nn.Linear(3, 1))

    def forward(self, x0_hat):
        return self.layers(x0_hat).square().flatten(1).mean(1)


def test_a_network_is_frozen_and_passes_the_gradient_on():
    torch.manual_seed(0)
    network, model = Classifier(), nn.Conv2d(1, 1, 3, padding=1)
    loss_fn = RegularizedLoss(scheduler_of(), [Term(network, 1.0, weighting.constant)])
    before = {name: value.clone() for name, value in network.state_dict().items()}
    terms = loss_fn(lambda sample, t: model(sample), images(4, 1, 3, 3, dtype=torch.float32)).terms
    terms["Classifier"].backward()
    assert model.weight.grad.abs().max() > 0
    assert all(not p.requires_grad and p.grad is None for p in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not [p for p in loss_fn.parameters() if p.requires_grad]


def test_a_network_stays_in_evaluation_mode():
    loss_fn = RegularizedLoss(scheduler_of(), [Term(Classifier(), 1.0), Term(total_variation, 1.0)])
    for module in (loss_fn, loss_fn.regularization, nn.Sequential(loss_fn)):
        module.train()
        assert loss_fn.training
        assert not any(m.training for m in loss_fn.regularization.networks.modules())
    loss_fn.eval()
    assert not loss_fn.training


def test_a_network_moves_with_the_loss():
    network = Classifier()
    loss_fn = RegularizedLoss(scheduler_of(), [Term(network, 1.0, weighting.constant)]).to(torch.float64)
    assert network.layers[0].weight.dtype == torch.float64
    result = loss_fn(lambda sample, t: sample.clone().requires_grad_(), images(4, 1, 3, 3))
    assert result.loss.dtype == torch.float64


def test_the_model_is_never_a_member_of_the_loss():
    model = nn.Conv2d(1, 1, 1)
    loss_fn = RegularizedLoss(scheduler_of(), [Term(total_variation, 1.0)])
    loss_fn(lambda sample, t: model(sample), images(4, 1, 3, 3, dtype=torch.float32))
    assert not list(loss_fn.parameters())


# Terms that break their contract


@pytest.mark.parametrize(
    "returned, message",
    [
        (torch.tensor(1.0), r"one value per image, \(4,\), not \(\)"),
        (torch.ones(4, 1), r"not \(4, 1\)"),
        (1.0, "not float"),
        (torch.full((4,), float("nan")), "not finite at timesteps"),
        (torch.full((4,), float("inf")), "not finite at timesteps"),
    ],
)
def test_a_weighting_of_another_form_is_refused_by_name(returned, message):
    loss_fn = RegularizedLoss(scheduler_of(), [Term(mean_square, 1.0, lambda level: returned)])
    with pytest.raises(ValueError, match=f"'mean_square'.*{message}"):
        loss_fn(lambda sample, t: sample, images(4, 1, 3, 3))


def test_a_regularizer_may_take_gradients_of_its_own():
    """L' = |grad of mean u^2|^2 = |2 u / n|^2 has a closed form."""

    def slope(x0_hat):
        (gradient,) = torch.autograd.grad(x0_hat.square().flatten(1).mean(1).sum(), x0_hat, create_graph=True)
        return gradient.square().flatten(1).sum(1)

    output = images(4, 1, 3, 3).requires_grad_()
    loss_fn = RegularizedLoss(scheduler_of("sample"), [Term(slope, 1.0, weighting.constant)])
    result = loss_fn(lambda sample, t: output, torch.zeros(4, 1, 3, 3, dtype=output.dtype))
    (gradient,) = torch.autograd.grad(result.terms["slope"], output)
    torch.testing.assert_close(result.terms["slope"], 4 / 81 * output.square().flatten(1).sum(1).mean())
    torch.testing.assert_close(gradient, 8 / 81 * output / 4)


@pytest.mark.parametrize("channels", [1, 6])
def test_a_model_of_other_channels_is_refused(channels):
    with pytest.raises(ValueError, match="model_output has shape"):
        RegularizedLoss(scheduler_of())(
            lambda sample, t: sample[:, :1].expand(-1, channels, -1, -1), images(2, 3, 4, 4)
        )


def test_flow_prediction_needs_a_flow_schedule():
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler"):
        RegularizedLoss(diffusers.DDPMScheduler(prediction_type="flow_prediction"))(
            lambda sample, t: sample, images(2, 1, 4, 4)
        )


def test_min_snr_with_zero_terminal_snr_and_predicted_noise_is_refused():
    with pytest.raises(ValueError, match="v_prediction"):
        RegularizedLoss(diffusers.DDPMScheduler(rescale_betas_zero_snr=True), snr_gamma=5.0)


def test_strings_and_single_terms_are_refused():
    with pytest.raises(TypeError, match="load_regularizer"):
        Term("total_variation", 0.1)
    with pytest.raises(TypeError, match=r"\[Term"):
        RegularizedLoss(scheduler_of(), Term(mean_square, 0.1))


def test_terms_that_share_an_estimator_share_its_estimate():
    """A costly estimator, such as a decoder, runs once, on the images that any of its terms looks at."""
    calls = []

    def decoder(scheduler, model_output, timesteps, sample):
        calls.append(len(sample))
        return 2 * predict_original_sample(scheduler, model_output, timesteps, sample)

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
