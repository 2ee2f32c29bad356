"""A user's own distance of two images as a loss."""

import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn

from reg_diffusers import Paired, Term, X0Regularization, weighting
from reg_diffusers.prediction import add_noise, predict_original_sample
from reg_diffusers.regularizers import spectrum, wavelet

pytestmark = pytest.mark.loss

SCHEDULER = DDPMScheduler(prediction_type="v_prediction")


class Perceptual(nn.Module):
    """A distance as LPIPS has it: a network, and one value per image of shape (B, 1, 1, 1)."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(1, 3, 3)

    def forward(self, one, other):
        return (self.layer(one) - self.layer(other)).square().mean((1, 2, 3), keepdim=True)


@pytest.fixture
def step():
    x0, noise, output = torch.randn(3, 3, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    times = torch.tensor([10, 300, 900])
    return output.requires_grad_(), times, add_noise(SCHEDULER, x0, noise, times), x0


def test_it_is_the_distance_of_x0_hat_and_its_own_image(step):
    output, times, x_t, x0 = step
    net = Perceptual()
    ours = X0Regularization(SCHEDULER, [Term(Paired(net), 0.5, weighting.constant)])
    found = ours(output, times, x_t, original_samples=x0)
    expected = net(predict_original_sample(SCHEDULER, output, times, x_t), x0).flatten()
    torch.testing.assert_close(found.per_image["Perceptual"], expected)
    found.loss.backward()
    assert output.grad.abs().sum() > 0


def test_its_network_is_frozen_and_moved_and_not_saved():
    ours = X0Regularization(SCHEDULER, [Term(Paired(net := Perceptual()), 0.5)])
    assert not any(weight.requires_grad for weight in net.parameters()) and not net.training
    assert ours.to(torch.float64) and net.layer.weight.dtype == torch.float64
    assert not ours.state_dict()


def test_a_function_will_do_and_gives_its_name(step):
    def difference(one, other):
        return (one - other).abs().flatten(1).mean(1)

    output, times, x_t, x0 = step
    ours = X0Regularization(SCHEDULER, [Term(Paired(difference), 0.5, weighting.constant)])
    assert ours.needs == ("original_samples",)
    assert ours(output, times, x_t, original_samples=x0).terms["difference"] > 0


def test_what_is_no_distance_of_images_is_refused(step):
    output, times, x_t, x0 = step
    with pytest.raises(TypeError, match="a function of two images"):
        Paired("vgg")
    for net, shape in ((lambda one, other: one - other, r"\(3, 1, 6, 6\)"), (nn.MSELoss(), r"\(\)")):
        ours = X0Regularization(SCHEDULER, [Term(Paired(net), 0.5, weighting.constant)])
        with pytest.raises(ValueError, match=f"of shape {shape} for 3 images: one value per image"):
            ours(output, times, x_t, original_samples=x0)


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (2, 3, 1, 8), (2, 3, 8, 1), (2, 3, 4, 4)])
@pytest.mark.parametrize("distance", [Paired(lambda x, y: (x - y).square().mean((1, 2, 3))), spectrum, wavelet])
def test_images_of_another_size_are_refused_instead_of_repeated(distance, shape):
    with pytest.raises(ValueError, match=r"original_samples have the size .*, x0_hat \(3, 8, 8\)"):
        distance(torch.zeros(2, 3, 8, 8), original_samples=torch.zeros(shape))
