"""Values and gradients of an extra loss that are not finite."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from devices import OnAccelerator
from losses import TIMESTEPS, images, loss_and_gradients, mean_square, scaled_square, scheduler_of

from reg_diffusers import weighting
from reg_diffusers.nonfinite import NonFiniteGuard
from reg_diffusers.objective import RegularizedLoss, Term, X0Regularization

pytestmark = pytest.mark.loss


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


def test_a_large_image_in_half_precision_is_finite():
    """Its sum, 88,474, is more than float16 can hold."""

    def in_half_precision(prediction):
        image = torch.full((1, 1, 1, 1), 0.9, dtype=torch.float16).expand(1, 3, 256, 128).clone()
        return image + 0 * prediction.model_output.half()

    def no_number(x0_hat, /):
        return x0_hat.flatten(1).mean(1) * torch.nan

    term = Term(no_number, 1.0, weighting.constant, estimator=in_half_precision)
    loss_fn = X0Regularization(scheduler_of(), [term])
    model_output = torch.zeros(1, 3, 256, 128, requires_grad=True)
    loss_fn(model_output, 10, torch.zeros(1, 3, 256, 128))
    assert loss_fn.nonfinite.dropped["no_number"] == 1


def step_at_the_original(loss_fn, exact, number):
    """The forward pass for `number` images, of which the first `exact` are the original itself, and its output."""
    original, noise, output = images(3, number, 1, 3, 2)
    output[:exact] = original[:exact]
    output.requires_grad_()
    timesteps = torch.full((number,), 100)
    return loss_fn(lambda sample, t: output, original, noise=noise, timesteps=timesteps).loss, output


def test_gradients_meet_the_images_of_their_own_call():
    """Two batches of different sizes, then one backward pass for both."""
    loss_fn = RegularizedLoss(scheduler_of("sample"), [Term(distance, 1.0, weighting.constant)])
    losses, outputs = zip(*(step_at_the_original(loss_fn, *sizes) for sizes in ((2, 4), (1, 3))), strict=True)
    torch.autograd.backward(losses)
    assert all(output.grad.isfinite().all() for output in outputs)
    assert loss_fn.regularization.nonfinite.dropped["distance"] == 3


def test_threads_share_a_loss():
    """Each thread goes on when both have evaluated L', so that every gradient finds that another came after it."""
    steps, sizes = 20, ((2, 4), (1, 3))
    loss_fn = RegularizedLoss(
        scheduler_of("sample"), [Term(distance, 1.0, weighting.constant)], max_nonfinite_steps=None
    )
    barrier = threading.Barrier(len(sizes), timeout=30)

    def train(exact, number):
        for _ in range(steps):
            loss, output = step_at_the_original(loss_fn, exact, number)
            barrier.wait()
            loss.backward()
            assert output.grad.isfinite().all()
            barrier.wait()

    with ThreadPoolExecutor(len(sizes)) as executor:
        for future in [executor.submit(train, *size) for size in sizes]:
            future.result()
    assert loss_fn.regularization.nonfinite.dropped["distance"] == 3 * steps


def test_steps_in_a_row_are_those_of_one_thread():
    """A thread with good steps does not hide one that has none."""
    terms = [Term(scaled_square, 1.0, weighting.constant)]
    loss_fn = RegularizedLoss(scheduler_of("sample"), terms, max_nonfinite_steps=3)
    with ThreadPoolExecutor(1) as executor, pytest.raises(FloatingPointError, match="3 steps in a row"):
        for _ in range(3):
            executor.submit(loss_and_gradients, loss_fn, factor=BAD).result()
            loss_and_gradients(loss_fn, factor=GOOD)


def test_a_loss_that_has_dropped_images_can_be_copied():
    loss_fn = RegularizedLoss(scheduler_of("sample"), [Term(scaled_square, 1.0, weighting.constant)])
    loss_and_gradients(loss_fn, factor=BAD)
    copied = copy.deepcopy(loss_fn)
    loss_and_gradients(copied, factor=BAD)
    dropped = [one.regularization.nonfinite.dropped["scaled_square"] for one in (loss_fn, copied)]
    assert dropped == [1, 2]


def test_no_step_waits_for_an_accelerator_but_every_hundredth():
    """Timesteps are on the CPU, as this package draws them; the counts are where the images are."""
    guard = NonFiniteGuard(10)
    call = guard.begin("term", torch.tensor([1, 2]))
    call.in_a_row = torch.tensor(1).as_subclass(OnAccelerator)
    for _ in range(99):
        guard.check()
    with pytest.raises(AssertionError, match="waits for the accelerator"):
        guard.check()


def test_the_error_names_the_timesteps_of_gradients_that_are_not_finite():
    # They are known after the backward pass of their step, so in the next step.
    def root(x0_hat):
        return (x0_hat - x0_hat.detach()).square().flatten(1).sum(1).sqrt()

    loss_fn = X0Regularization(scheduler_of(), [Term(root, 1.0, weighting.constant)], max_nonfinite_steps=2)
    output = images(3, 1, 4, 4).requires_grad_()
    with pytest.raises(FloatingPointError, match=r"2 steps in a row \(last at timesteps 10 to 30\), 6 images in all"):
        for _ in range(3):
            loss_fn(output, torch.tensor([10, 20, 30]), images(3, 1, 4, 4)).loss.backward()
