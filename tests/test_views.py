"""Views: what of x0_hat a regularizer sees."""

import pytest
import torch
from losses import images, mean_square, reconstruction, scheduler_of
from torch import nn

from reg_diffusers import Term, TermError, X0Regularization, weighting
from reg_diffusers.guidance import Guidance
from reg_diffusers.term import score
from reg_diffusers.views import Affine

pytestmark = pytest.mark.loss


def loss_of(term, output, **context):
    timesteps = torch.tensor([0, 60, 300, 999])
    return X0Regularization(scheduler_of("sample"), [term])(
        output, timesteps, torch.zeros_like(output), **context
    ).loss


def test_an_affine_view_is_the_users_units():
    output = images(4, 2, 3, 3)
    seen = Affine(scale=(2.0, 3.0), offset=(10.0, -1.0))
    expected = mean_square(torch.stack([2 * output[:, 0] + 10, 3 * output[:, 1] - 1], dim=1)).mean()
    actual = loss_of(Term(mean_square, 1.0, weighting.constant, view=seen), output)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("scale", ["a", None, float("nan"), (1.0, float("inf"))])
def test_an_affine_view_of_something_other_than_numbers_is_refused_by_name(scale):
    with pytest.raises(ValueError, match=r"views\.Affine: scale must be a finite number, or one per channel"):
        Affine(scale, 1.0)


def test_affine_views_of_equal_numbers_are_equal():
    assert Affine([2, 3], torch.tensor([1.0, 0.5])) == Affine((2.0, 3.0), (1.0, 0.5))
    with pytest.raises(ValueError, match="2 numbers for images of 3 channels"):
        Affine((1.0, 2.0))(images(1, 3, 2, 2))


def test_an_offset_that_float32_rounds_away_is_kept_in_float64():
    """Unix seconds: differences of half a second stand beside an offset of 1.7e9."""
    x = torch.tensor([[[[-1.0, 0.0, 1.0]]]])
    seconds = Affine(scale=0.5, offset=1.7e9)(x)
    assert seconds.dtype == torch.float64
    assert (seconds - 1.7e9).flatten().tolist() == [-0.5, 0.0, 0.5]
    assert Affine(scale=0.5, offset=100.0)(x).dtype == torch.float32


def test_the_loss_keeps_its_dtype_under_a_view_in_float64():
    output = images(4, 1, 3, 3, dtype=torch.float32).requires_grad_()
    loss = loss_of(Term(mean_square, 1.0, weighting.constant, view=Affine(0.5, 1e9)), output)
    assert loss.dtype == torch.float32
    loss.backward()
    assert output.grad.abs().max() > 0


def test_a_view_runs_once_for_all_terms_that_share_it_on_active_images_only():
    calls = []

    def doubled(x):
        calls.append(len(x))
        return 2 * x

    terms = [
        Term(mean_square, 1.0, lambda level: torch.tensor([1.0, 1.0, 0.0, 0.0]), "a", view=doubled),
        Term(mean_square, 1.0, lambda level: torch.tensor([0.0, 3.0, 3.0, 0.0]), "b", view=doubled),
        Term(mean_square, 1.0, lambda level: torch.tensor([0.0, 0.0, 0.0, 1.0]), "plain"),
    ]
    output = images(4, 1, 3, 3)
    found = X0Regularization(scheduler_of("sample"), terms)(output, 0, torch.zeros_like(output)).terms
    assert calls == [3]
    values = mean_square(output)
    torch.testing.assert_close(found["a"], 4 * values[:2].sum() / 4)
    torch.testing.assert_close(found["b"], 3 * 4 * values[1:3].sum() / 4)
    torch.testing.assert_close(found["plain"], values[3] / 4)


def test_a_paired_loss_sees_both_images_through_the_view():
    output, original = images(2, 4, 2, 3, 3)
    term = Term(reconstruction, 1.0, weighting.low_noise, view=Affine((2.0, 3.0), (1e3, 0.0)))
    difference = (output - original) * torch.tensor([2.0, 3.0]).double().reshape(2, 1, 1)
    expected = mean_square(difference)[:2].sum() / 4
    torch.testing.assert_close(loss_of(term, output, original_samples=original), expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(
        score(term, output, {"original_samples": original}).double(), mean_square(difference), rtol=1e-5, atol=0
    )


def test_guidance_moves_the_image_by_what_the_view_shows():
    """E = N/2 * L' and L' = mean (2 x)^2 have the gradient 4 x."""
    scheduler = scheduler_of("sample")
    output = images(1, 1, 3, 3, dtype=torch.float32)
    guidance = Guidance([Term(mean_square, 0.1, weighting.constant, view=Affine(2.0))])
    guided = guidance.model_output(lambda sample: output, scheduler, 500, torch.zeros_like(output))
    torch.testing.assert_close(guided, output - 0.1 * 4 * output)


@pytest.mark.parametrize(
    ("view", "complaint"),
    [
        (lambda x: x[:1], r"one image per image, \(4, ...\), not a tensor of shape \(1, 1, 3, 3\)"),
        (lambda x: "picture", "not str"),
        (lambda x: x.detach(), "detached from x0_hat"),
    ],
)
def test_a_view_of_another_form_is_refused_by_name(view, complaint):
    output = images(4, 1, 3, 3).requires_grad_()
    with pytest.raises(TermError, match=f"view of 'mean_square'.*{complaint}"):
        loss_of(Term(mean_square, 1.0, weighting.constant, view=view), output)


def test_a_network_as_view_or_estimator_is_frozen_and_moved():
    view, estimator = nn.Conv2d(1, 2, 1), Decoder()
    term = Term(mean_square, 1.0, weighting.constant, estimator=estimator, view=view)
    regularization = X0Regularization(scheduler_of("sample"), [term]).to(torch.float64)
    output = images(4, 1, 3, 3).requires_grad_()
    regularization(output, 0, torch.zeros_like(output)).loss.backward()
    assert output.grad.abs().max() > 0
    assert view.weight.dtype == estimator.layer.weight.dtype == torch.float64
    assert not any(weight.requires_grad for weight in regularization.parameters())
    regularization.train()
    assert not (view.training or estimator.training)


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 1)

    def forward(self, prediction):
        return self.layer(prediction.model_output)
