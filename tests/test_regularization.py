"""The extra part in a loop of someone else: what it takes, what it refuses, what it says before the training."""

import warnings
from math import nan

import diffusers
import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from losses import TIMESTEPS, images, mean_square, reconstruction, scheduler_of
from torch import nn

from reg_diffusers import Prediction, RegularizedLoss, Shared, Term, TermError, X0Regularization, weighting
from reg_diffusers.balancing import balance
from reg_diffusers.prediction import add_noise, noise_level, predict_original_sample, prediction_target
from reg_diffusers.regularizers import total_variation

pytestmark = pytest.mark.loss

TIMES = torch.tensor(TIMESTEPS)

# An image in the place of the output


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow_prediction"])
def test_x0_hat_in_the_place_of_the_output_gives_the_same_loss(kind):
    scheduler, timesteps = scheduler_of(kind), torch.tensor([1, 60, 300, 999])
    output, sample = images(2, 4, 1, 3, 2)
    own = Term(mean_square, 0.5, weighting.constant, "own", lambda p: predict_original_sample(*_parts(p)))
    regularization = X0Regularization(scheduler, [Term(total_variation, 1.0, weighting.snr), own])
    x0_hat = predict_original_sample(scheduler, output, timesteps, sample)
    expected = regularization(output, timesteps, sample)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        actual = regularization(x0_hat=x0_hat, timesteps=timesteps, sample=sample)
    torch.testing.assert_close(actual.terms["total_variation"], expected.terms["total_variation"], rtol=1e-9, atol=0)
    torch.testing.assert_close(actual.terms["own"], expected.terms["own"], rtol=1e-5, atol=0)


def _parts(prediction):
    return prediction.scheduler, prediction.model_output, prediction.timesteps, prediction.sample


def test_x0_hat_needs_no_sample_and_half_precision_becomes_float32():
    seen = []

    def recording(x0_hat):
        seen.append(x0_hat.dtype)
        return mean_square(x0_hat)

    x0_hat = images(4, 1, 3, 2, dtype=torch.bfloat16)
    regularization = X0Regularization(scheduler_of(), [Term(recording, 1.0, weighting.constant)])
    loss = regularization(x0_hat=x0_hat, timesteps=TIMES, loss_weight=1.0).loss
    assert seen == [torch.float32]
    assert loss.dtype == torch.float32


def test_an_image_without_the_loops_weight_is_warned_of_once():
    x0_hat = images(4, 1, 3, 2)
    regularization = X0Regularization(scheduler_of(), [Term(mean_square, 1.0)])
    with pytest.warns(UserWarning, match="loss_weight=1.0 if it is that of x0_hat"):
        regularization(x0_hat=x0_hat, timesteps=TIMES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        regularization(x0_hat=x0_hat, timesteps=TIMES)


# The loop's own weight


def test_lambda_over_w_d_stays_below_the_weight_whatever_the_loop_weighs_by():
    """SD3 has the squared error of x_0, a hundredth of what flow prediction has at sigma 0.1."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    timesteps, loss_weight = torch.linspace(20, 1000, 50), torch.linspace(0.1, 3.0, 50)
    regularization = X0Regularization(scheduler, [Term(mean_square, 1.0)])
    for is_image in (False, True):
        given = {"x0_hat" if is_image else "model_output": images(50, 1, 2, 2), "sample": images(50, 1, 2, 2, seed=1)}
        lambdas = regularization(timesteps=timesteps, loss_weight=loss_weight, **given).weightings["mean_square"]
        data_weight = loss_weight if is_image else loss_weight / (timesteps / 1000) ** 2
        snr = noise_level(scheduler, timesteps).snr
        gate = 1 / (1 + (10 / snr) ** 2)
        torch.testing.assert_close(lambdas, torch.where(gate < 0.02, 0, data_weight.clamp(max=100) * gate))
        assert (lambdas <= data_weight * 1.0001).all()


def test_a_loss_weight_of_one_is_the_default_and_shapes_of_scripts_are_understood():
    output, sample = images(2, 4, 1, 3, 2)
    regularization = X0Regularization(scheduler_of(), [Term(mean_square, 1.0)])
    expected = regularization(output, TIMES, sample).loss
    for one in (1.0, torch.ones(4), torch.ones(4, 1, 1, 1), torch.ones(())):
        assert torch.equal(regularization(output, TIMES, sample, loss_weight=one).loss, expected)
    for odd in (torch.ones(3), -1.0, float("nan")):
        with pytest.raises(ValueError, match="loss_weight must be"):
            regularization(output, TIMES, sample, loss_weight=odd)
    with pytest.raises(ValueError, match="loss_weight and snr_gamma"):
        X0Regularization(scheduler_of(), [Term(mean_square, 1.0)], snr_gamma=5.0)(
            output, TIMES, sample, loss_weight=1.0
        )


def test_describe_says_who_takes_part_before_the_training():
    regularization = X0Regularization(
        scheduler_of(), [Term(mean_square, 0.5), Term(total_variation, 0.2, weighting.low_noise)]
    )
    timesteps = torch.arange(1000)
    level = noise_level(scheduler_of(), timesteps)
    share = (weighting.matched(level) > 0).float().mean().item()
    first, second = regularization.describe(timesteps).splitlines()
    assert first.startswith(
        f"mean_square: {share:.1%} of the images take part, none in {1 - share:.1%} of the steps of 1"
    )
    assert "weight * lambda / w_d from" in first
    assert second.startswith("total_variation: 20.0% of the images take part, none in 80.0%")
    by_batch = regularization.describe(timesteps.reshape(10, 100)).splitlines()
    assert by_batch[1].startswith("total_variation: 20.0% of the images take part, none in 80.0% of the steps of 100")
    # also where the loop's loss has a hundredth of the usual weight, the ratio stays below the term's
    ratio = float(regularization.describe(timesteps, loss_weight=0.01).splitlines()[0].rpartition(" to ")[2])
    assert ratio <= 0.5001


# Which images take part


def test_image_mask_takes_the_mean_over_those_that_take_part():
    """Prior preservation: the second half of the batch are images of the class, which the wish is not about."""
    seen = []

    def recording(x0_hat):
        seen.append(len(x0_hat))
        return mean_square(x0_hat)

    output, sample = images(2, 4, 1, 3, 2)
    regularization = X0Regularization(scheduler_of("sample"), [Term(recording, 2.0, weighting.constant)])
    mask = torch.tensor([True, True, False, False])
    masked = regularization(output, TIMES, sample, image_mask=mask)
    half = regularization(output[:2], TIMES[:2], sample[:2])
    assert torch.equal(masked.loss, half.loss)
    assert seen == [2, 2]
    assert masked.per_image["recording"].isnan().tolist() == [False, False, True, True]
    assert masked.weightings["recording"].tolist() == [1, 1, 0, 0]
    nothing = regularization(output.requires_grad_(), TIMES, sample, image_mask=torch.zeros(4, dtype=torch.bool))
    assert nothing.loss == 0
    assert regularization(output[:0], TIMES[:0], sample[:0]).loss == 0
    for odd in (torch.ones(4), torch.ones(3, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"image_mask must be bool of shape \(4,\)"):
            regularization(output, TIMES, sample, image_mask=odd)


def test_the_whole_objective_denoises_all_images_and_regularizes_those_of_the_mask():
    output, original, noise = images(3, 4, 1, 3, 2)
    loss_fn = RegularizedLoss(scheduler_of("sample"), [Term(mean_square, 1.0, weighting.constant)])
    mask = torch.tensor([True, False, False, True])
    result = loss_fn(lambda sample, t: output, original, noise=noise, timesteps=TIMES, image_mask=mask)
    torch.testing.assert_close(result.terms["denoising"], (output - original).square().mean())
    torch.testing.assert_close(result.terms["mean_square"], mean_square(output)[mask].mean())


def test_a_mean_over_active_images_does_not_fade_where_few_take_part():
    output, sample = images(2, 4, 1, 3, 2)
    term = Term(mean_square, 1.0, weighting.low_noise, normalize="active")
    regularization = X0Regularization(scheduler_of("sample"), [term])
    torch.testing.assert_close(regularization(output, TIMES, sample).loss, mean_square(output)[:2].mean())
    assert regularization(output, 999, sample).loss == 0
    with pytest.raises(ValueError, match="normalize must be one of batch, active, not 'all'"):
        Term(mean_square, 1.0, normalize="all")


def test_products_of_gradients_are_those_of_each_image_whatever_the_mean_is_over():
    output, original, noise = images(3, 4, 1, 3, 2)
    products = {}
    for normalize in ("batch", "active"):
        term = Term(mean_square, 1.0, weighting.low_noise, normalize=normalize)
        leaf = output.clone().requires_grad_()
        result = RegularizedLoss(scheduler_of("sample"), [term])(
            lambda sample, t, leaf=leaf: leaf, original, noise=noise, timesteps=TIMES
        )
        products[normalize] = balance(result, {"mean_square": 1.0}).products
    torch.testing.assert_close(products["active"], products["batch"])


def test_without_active_images_the_loss_is_a_zero_in_float32_that_can_be_backpropagated():
    output = torch.full((4, 1, 3, 2), torch.inf, dtype=torch.bfloat16, requires_grad=True)
    sample = images(4, 1, 3, 2, dtype=torch.bfloat16)
    loss = X0Regularization(scheduler_of(), [Term(mean_square, 1.0, weighting.low_noise)])(output, 999, sample).loss
    assert loss == 0
    assert loss.dtype == torch.float32
    loss.backward()
    assert torch.equal(output.grad, torch.zeros_like(output))


# What is handed over


def test_batches_that_differ_are_refused():
    """Prior preservation cuts the output in two: its first image would meet the x_t of another."""
    output, sample = images(2, 4, 1, 3, 2)
    regularization = X0Regularization(scheduler_of(), [Term(mean_square, 1.0)])
    with pytest.raises(ValueError, match=r"model_output has 2 images, sample 4.*image_mask"):
        regularization(output[:2], TIMES, sample)
    with pytest.raises(ValueError, match=r"timesteps of shape \(4,\) for a batch of 2"):
        regularization(output[:2], TIMES, sample[:2])
    with pytest.raises(ValueError, match="original_samples has 4 entries for a batch of 2"):
        X0Regularization(scheduler_of(), [Term(reconstruction, 1.0)])(
            output[:2], TIMES[:2], sample[:2], original_samples=output
        )


def test_what_is_missing_or_given_twice_is_said():
    output, sample = images(2, 4, 1, 3, 2)
    regularization = X0Regularization(scheduler_of(), [Term(mean_square, 1.0)])
    for given, complaint in [
        ({"timesteps": TIMES, "sample": sample}, "either model_output"),
        ({"model_output": output, "x0_hat": output, "timesteps": TIMES, "sample": sample}, "either model_output"),
        ({"model_output": output, "sample": sample}, "timesteps are missing"),
        ({"model_output": output, "timesteps": TIMES}, "sample is missing"),
    ]:
        with pytest.raises(ValueError, match=complaint):
            regularization(**given)


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 1, 1, 1)])
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x, "more"), lambda x: [x], UNet2DOutput])
def test_shapes_of_timesteps_and_kinds_of_output_are_understood(shape, wrap):
    output, sample = images(2, 4, 1, 3, 2)
    regularization = X0Regularization(scheduler_of(), [Term(total_variation, 1.0, weighting.constant)])
    expected = regularization(output, TIMES, sample).loss
    assert torch.equal(regularization(wrap(output), TIMES.reshape(shape), sample).loss, expected)


@pytest.mark.parametrize("odd", ["output", {"sample": 1}, (), [1.0]])
def test_an_output_without_a_tensor_is_one_clear_line(odd):
    regularization = X0Regularization(scheduler_of(), [Term(mean_square, 1.0)])
    with pytest.raises(TypeError, match="model_output must be a tensor, a tuple with one first"):
        regularization(odd, TIMES, images(4, 1, 3, 2))


def test_regularizers_without_a_term_around_them_are_named():
    with pytest.raises(TypeError, match=r"Term\(total_variation, weight=0.1\)"):
        X0Regularization(scheduler_of(), [total_variation])


# What a regularizer must not do


def test_a_regularizer_that_works_in_place_is_refused_before_others_see_it():
    def clamped(x0_hat):
        return mean_square(x0_hat.clamp_(-0.1, 0.1))

    def paired(x0_hat, *, original_samples):
        return mean_square(x0_hat - original_samples.mul_(2))

    def behind_autograd(x0_hat):
        x0_hat.data.clamp_(-0.1, 0.1)
        return mean_square(x0_hat)

    def by_numpy(x0_hat):
        x0_hat.detach().numpy()[:] = 0
        return mean_square(x0_hat)

    paired.needs = ("original_samples",)
    for regularizer in (clamped, paired, behind_autograd, by_numpy):
        output, sample, original = images(3, 4, 1, 3, 2)
        terms = [Term(regularizer, 0.0, weighting.constant), Term(total_variation, 1.0)]
        with pytest.raises(TermError, match=f"'{regularizer.__name__}' modifies its arguments in place.*clamp_"):
            X0Regularization(scheduler_of("sample"), terms)(output, TIMES, sample, original_samples=original)


def test_a_regularizer_that_seeds_is_refused_and_one_that_draws_is_not():
    def seeding(x0_hat):
        torch.manual_seed(7)
        return mean_square(x0_hat + torch.randn_like(x0_hat))

    def drawing(x0_hat):
        return mean_square(x0_hat + torch.randn_like(x0_hat))

    original = images(4, 1, 3, 2)
    for seed in (0, 7):  # the training's own seed may be the same
        torch.manual_seed(seed)
        loss_fn = RegularizedLoss(scheduler_of(), [Term(seeding, 1.0, weighting.constant)])
        with pytest.raises(TermError, match="'seeding' seeds the global random numbers"):
            for _ in range(2):
                loss_fn(lambda sample, t: sample, original)
    for first in (4, 5):  # one that begins later
        calls = iter([drawing] * first + [seeding] * 2)
        term = Term(lambda x0_hat, calls=calls: next(calls)(x0_hat), 1.0, name="late")
        loss_fn = RegularizedLoss(scheduler_of(), [term])
        torch.manual_seed(3)
        for _ in range(first + 1):
            loss_fn(lambda sample, t: sample, original, timesteps=torch.tensor([5]))
        with pytest.raises(TermError, match="'late' seeds the global random numbers"):
            loss_fn(lambda sample, t: sample, original, timesteps=torch.tensor([5]))
    loss_fn = RegularizedLoss(scheduler_of(), [Term(drawing, 1.0, weighting.constant)])
    for _ in range(5):
        torch.manual_seed(3)  # a caller may seed as it likes
        loss_fn(lambda sample, t: sample, original)


# Estimators


def test_an_estimator_of_the_old_form_is_refused_with_the_new_one():
    with pytest.raises(TypeError, match=r"takes one Prediction p, not \(scheduler, model_output, timesteps, sample\)"):
        Term(mean_square, 1.0, estimator=predict_original_sample)


def test_an_estimator_may_ask_the_network_again_about_the_chosen_images():
    calls = []

    class Again:
        calls_model = True

        def __call__(self, prediction):
            later = prediction.timesteps // 2
            return prediction.predict(prediction.sample, later)

    def model(sample, timesteps, scale, labels, table):
        calls.append((len(sample), timesteps.tolist(), labels.tolist(), len(table)))
        return torch.cat([scale * sample, torch.zeros_like(sample)], dim=1)

    scheduler = diffusers.DDPMScheduler(prediction_type="sample", variance_type="learned")
    term = Term(mean_square, 1.0, weighting.low_noise, estimator=Again())
    output, sample = images(2, 4, 1, 3, 2)
    kwargs = {"scale": 3.0, "labels": torch.arange(4), "table": Shared(torch.zeros(7, 3))}
    regularization = X0Regularization(scheduler, [term, Term(mean_square, 0.0, name="plain")])
    loss = regularization(output, TIMES, sample, model=model, model_kwargs=kwargs).loss
    assert calls == [(2, [0, 30], [0, 1], 7)]
    torch.testing.assert_close(loss, mean_square(3 * sample)[:2].sum() / 4)
    with pytest.raises(ValueError, match="calls the network again"):
        regularization(output, TIMES, sample)


def test_a_part_of_a_prediction_is_that_of_the_images():
    output, sample, noise = images(3, 4, 1, 3, 2)
    part = Prediction(scheduler_of(), output, TIMES, sample, noise=noise)[torch.tensor([1, 3])]
    assert len(part) == 2
    assert torch.equal(part.noise, noise[[1, 3]])
    assert part.original_samples is None


# The network and the scheduler


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_network_in_half_precision_is_trained(dtype):
    torch.manual_seed(0)
    model = nn.Conv2d(1, 1, 3, padding=1).to(dtype)
    original, noise = images(2, 4, 1, 3, 3, dtype=torch.float32)
    loss_fn = RegularizedLoss(scheduler_of(), [Term(total_variation, 0.1)])
    for samples in (original, original.to(dtype)):
        model.zero_grad()
        loss = loss_fn(_Network(model), samples, noise=noise.to(samples.dtype), timesteps=TIMES).loss
        assert loss.dtype == torch.float32
        loss.backward()
        assert model.weight.grad.abs().max() > 0


class _Network(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, sample, timesteps):
        return self.layer(sample)


def test_a_scheduler_that_adds_noise_in_its_own_way_is_refused():
    class OffsetNoise(diffusers.DDPMScheduler):
        def add_noise(self, original_samples, noise, timesteps):
            return super().add_noise(original_samples, noise + 0.1, timesteps)

    with pytest.raises(ValueError, match=r"OffsetNoise has its own add_noise.*X0Regularization in your own loop"):
        RegularizedLoss(OffsetNoise())


def test_a_perfect_network_has_the_loss_of_the_data_in_any_form_it_is_handed_over():
    scheduler = scheduler_of("v_prediction")
    original, noise = images(2, 4, 1, 5, 5)
    sample = add_noise(scheduler, original, noise, TIMES)
    target = prediction_target(scheduler, original, noise, TIMES)
    regularization = X0Regularization(scheduler, [Term(total_variation, 1.0, weighting.constant)])
    expected = total_variation(original).mean()
    torch.testing.assert_close(regularization(target, TIMES, sample).loss, expected, rtol=1e-5, atol=0)
    actual = regularization(x0_hat=original, timesteps=TIMES, loss_weight=1.0).loss
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("of", [X0Regularization, RegularizedLoss])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        *[
            ({"snr_gamma": wrong}, ValueError, "snr_gamma must be a finite number above 0")
            for wrong in (0, -1, nan, "5")
        ],
        *[
            ({"max_nonfinite_steps": wrong}, ValueError, "max_nonfinite_steps must be an integer")
            for wrong in (0, 1.5)
        ],
        *[({"scheduler": wrong}, TypeError, "scheduler must be") for wrong in (None, "ddpm", diffusers.DDPMScheduler)],
    ],
)
def test_arguments_of_the_loss_that_cannot_be_meant_are_refused_by_name(of, change, error, message):
    with pytest.raises(error, match=message):
        of(**({"scheduler": scheduler_of(), "terms": [Term(mean_square, 1.0)]} | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample": images(2, 1, 4, 4).numpy()}, "sample must be a tensor"),
        ({"model_output": None, "x0_hat": images(2, 1, 4, 4).numpy()}, "x0_hat must be a tensor"),
        ({"time_steps": torch.tensor([1, 2])}, "did you mean 'timesteps'"),
    ],
)
def test_an_argument_that_is_no_tensor_is_refused_by_its_name(change, message):
    given = {"model_output": images(2, 1, 4, 4), "timesteps": torch.tensor([1, 2]), "sample": images(2, 1, 4, 4)}
    with pytest.raises(TypeError, match=message):
        X0Regularization(scheduler_of(), [Term(mean_square, 1.0)])(**(given | change))
