"""The distance in the features of a frozen copy of the diffusion model."""

import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from losses import images, scheduler_of
from torch import nn

from reg_diffusers import AffineSchedule, Term, X0Regularization, noise_level, weighting
from reg_diffusers.regularizers import SelfPerceptual

pytestmark = pytest.mark.loss

SCHEDULER = DDPMScheduler()


@pytest.fixture
def pair():
    return images(2, 3, 1, 8, 8)


def of(loss, x0_hat, original, seed=0, **conditions):
    torch.manual_seed(seed)
    return loss(x0_hat, original_samples=original, **conditions)


@pytest.mark.parametrize("scheduler", [SCHEDULER, EulerDiscreteScheduler(), FlowMatchEulerDiscreteScheduler()])
def test_it_compares_the_middle_features_at_a_little_of_the_same_noise(tiny_unet, pair, scheduler):
    model = tiny_unet().double().eval()
    loss = SelfPerceptual(model, scheduler)
    level = noise_level(scheduler, loss.timestep)
    assert (level.sigma / (level.sigma + level.alpha)).item() == pytest.approx(0.05, rel=0.1)
    torch.manual_seed(0)
    noise = torch.randn_like(pair[0])
    seen = []
    model.mid_block.register_forward_hook(lambda block, inputs, output: seen.append(output))
    for image in pair:
        x_t = level.alpha.double() * image + level.sigma.double() * noise
        if isinstance(scheduler, EulerDiscreteScheduler):
            x_t = x_t / (1 + level.sigma.double() ** 2).sqrt()
        model(x_t, torch.full((3,), loss.timestep))
    expected = (seen[0] - seen[1]).square().mean((1, 2, 3))
    assert expected.min() > 1e-4
    torch.testing.assert_close(of(loss, *pair), expected, rtol=1e-5, atol=0)


def test_the_gradient_is_that_of_the_value(tiny_unet, pair):
    loss = SelfPerceptual(tiny_unet().double(), SCHEDULER)
    x0_hat, original = pair
    x0_hat.requires_grad_()
    (gradient,) = torch.autograd.grad(of(loss, x0_hat, original).sum(), x0_hat)
    direction, step = images(*x0_hat.shape, seed=1), 1e-5
    with torch.no_grad():
        ends = [of(loss, x0_hat + sign * step * direction, original) for sign in (1, -1)]
    along = (gradient * direction).flatten(1).sum(1)
    torch.testing.assert_close((ends[0] - ends[1]) / (2 * step), along, rtol=1e-6, atol=0)


def test_equal_images_have_distance_zero_and_images_do_not_affect_each_other(tiny_unet, pair):
    loss = SelfPerceptual(tiny_unet().double(), SCHEDULER)
    x0_hat, original = pair
    assert of(loss, original, original).tolist() == [0, 0, 0]
    whole = of(loss, x0_hat, original)
    changed = of(loss, torch.cat([x0_hat[:1], original[1:]]), original)
    torch.testing.assert_close(changed, torch.cat([whole[:1], torch.zeros(2).double()]))
    assert not torch.equal(whole, of(loss, x0_hat, original, seed=1))  # new noise


def test_the_model_is_copied_and_its_later_layers_are_not_run(tiny_unet, pair):
    model = tiny_unet().double().train()
    loss = SelfPerceptual(model, SCHEDULER)
    before = of(loss, *pair)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(2)
    torch.testing.assert_close(of(loss, *pair), before, rtol=0, atol=0)
    assert model.training and all(weight.requires_grad for weight in model.parameters())
    assert model(pair[0], 0).sample.shape == pair[0].shape  # the hook is on the copy only
    loss.model.up_blocks = nn.ModuleList([nn.Identity()])
    torch.testing.assert_close(of(loss, *pair), before, rtol=0, atol=0)


def test_conditions_are_passed_for_the_active_images(tiny_unet):
    model = tiny_unet(num_class_embeds=3)
    x0, noise, output = images(3, 4, 1, 8, 8, dtype=torch.float32)
    output.requires_grad_()
    term = Term(SelfPerceptual(model, SCHEDULER, conditions=("class_labels",)), 1.0, weighting.gated(0.184))
    ours = X0Regularization(scheduler_of("sample"), [term])
    assert set(ours.needs) == {"original_samples", "class_labels"}
    labels = torch.tensor([0, 1, 2, 0])
    found = ours(output, torch.tensor([0, 60, 300, 999]), noise, original_samples=x0, class_labels=labels)
    found.loss.backward()
    assert (output.grad.flatten(1).abs().amax(1) > 0).tolist() == [True, True, True, False]
    one, other = (of(term.regularizer, x0, noise, class_labels=labels * k) for k in (1, 0))
    assert torch.equal(one[::3], other[::3]) and not torch.isclose(one[1:3], other[1:3]).any()


def test_it_is_frozen_moved_and_not_saved(tiny_unet, pair):
    loss = SelfPerceptual(tiny_unet(), SCHEDULER)
    ours = X0Regularization(SCHEDULER, [Term(loss, 1.0)]).train()
    assert not ours.state_dict() and not list(ours.parameters()) and not loss.model.training
    assert not any(weight.requires_grad for weight in loss.model.parameters())
    assert of(loss, *(x.bfloat16() for x in pair)).dtype == torch.float32
    assert ours.to(torch.float64) and loss.model.dtype == torch.float64


def test_what_cannot_be_compared_is_refused(tiny_unet, pair):
    with pytest.raises(ValueError, match=r"UNet2DModel has no block 'middle', but .*mid_block.*: pass block="):
        SelfPerceptual(tiny_unet(), SCHEDULER, block="middle")
    with pytest.raises(ValueError, match=r"timestep=900 has an SNR of 0\.000\d+, .* at least 1"):
        SelfPerceptual(tiny_unet(), SCHEDULER, timestep=900)
    for scheduler in (EDMEulerScheduler(), AffineSchedule(lambda t: 1 - t, lambda t: t, "velocity")):
        with pytest.raises(ValueError, match=f"timestep must be passed for {type(scheduler).__name__}"):
            SelfPerceptual(tiny_unet(), scheduler)
    model = tiny_unet().double()
    model.unused = nn.Identity()
    with pytest.raises(ValueError, match="UNet2DModel did not run its block 'unused'"):
        of(SelfPerceptual(model, SCHEDULER, block="unused"), *pair)
