"""Each recipe is its paper's objective: the formula, written out in float64, gives the same loss and gradients."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from torch import nn

from reg_diffusers import RegularizedLoss, Term, add_noise, conflict_free
from reg_diffusers.recipes import (
    Draft,
    LastLayerRatio,
    controlnet_plus_plus,
    draw_sigma,
    edm,
    latent_perceptual,
    min_snr,
    pbfm,
    pidm,
    pixelgen,
    srpo,
    straight_path,
)
from reg_diffusers.recipes.draft import sampled
from reg_diffusers.recipes.lpl import DecoderFeatures, outlier_mask
from reg_diffusers.recipes.pidm import SampleEstimation, posterior_variance
from reg_diffusers.recipes.srpo import DirectAlign
from reg_diffusers.regularizers import Perceptual, Score
from reg_diffusers.weighting import constant, matched

pytestmark = pytest.mark.loss

CLOSE = {"rtol": 1e-5, "atol": 1e-7}  # schedules are float32


class Network(nn.Module):
    """A smooth network in float64 that depends on the time."""

    def __init__(self, scale=1000.0):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.7, -0.4, 0.2], dtype=torch.float64))
        self.scale = scale

    def forward(self, sample, timesteps):
        time = shaped(timesteps.to(sample) / self.scale, sample)
        return (self.weight[0] * sample + self.weight[1] * time).sin() + self.weight[2]


def images(number, *shape, seed=0):
    return torch.randn(number, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def shaped(value, like):
    return value.double().reshape(-1, *(1,) * (like.ndim - 1))


def mean(values):
    return values.flatten(1).mean(1)


def assert_same(found, expected, network):
    """Compares two losses and their gradients with respect to the weights of the network."""
    torch.testing.assert_close(found.double(), expected, **CLOSE)
    gradients = [torch.autograd.grad(loss, network.weight, retain_graph=True)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients, **CLOSE)
    assert gradients[1].abs().max() > 1e-4


def circle(points, /):
    return points.square().sum(1) - 1


# PIDM

COSINE = DDPMScheduler(100, beta_schedule="squaredcos_cap_v2", prediction_type="sample")
TIMES = torch.tensor([0, 1, 30, 99])


def pidm_tables():
    alpha_bar = COSINE.alphas_cumprod.double()
    before = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    beta = 1 - alpha_bar / before
    variance = (1 - before) / (1 - alpha_bar) * beta
    variance[0] = variance[1]
    return alpha_bar, variance


def test_the_posterior_variance_is_that_of_a_ddpm_step():
    _, variance = pidm_tables()
    torch.testing.assert_close(posterior_variance(COSINE), variance)
    for timestep in (5, 50, 99):
        of_step = COSINE._get_variance(timestep, timestep - 1).double()
        torch.testing.assert_close(variance[timestep], of_step, rtol=1e-3, atol=0)
    with pytest.raises(ValueError, match="no alphas_cumprod"):
        posterior_variance(FlowMatchEulerDiscreteScheduler())


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("largest", [math.inf, -math.log(1e-12)])
def test_pidm(sample, largest):
    network, c = Network(scale=100.0), 0.1
    points, noise = images(2, 4, 2)
    points = 0.4 * points
    alpha_bar, variance = pidm_tables()
    a, s = (shaped(part[TIMES].sqrt(), points) for part in (alpha_bar, 1 - alpha_bar))
    x_t = a * points + s * noise
    x0_hat = network(x_t, TIMES)
    estimate = x0_hat
    if sample:  # DDIM from t to the lowest noise level, then x0_hat there
        start = alpha_bar[0]
        x_start = start.sqrt() * x0_hat + ((1 - start) / shaped(1 - alpha_bar[TIMES], points)).sqrt() * (
            x_t - a * x0_hat
        )
        estimate = network(x_start, torch.zeros(4))
    data = ((alpha_bar / (1 - alpha_bar)).clamp(max=5)[TIMES] * mean((points - x0_hat) ** 2)).mean()
    likelihood = (circle(estimate) ** 2 / (2 * variance[TIMES])).clamp(max=largest)
    assert (largest == math.inf) or ((likelihood == largest).any() and (likelihood < largest).any())
    output = pidm(COSINE, circle, c, sample=sample, largest=largest)(network, points, noise=noise, timesteps=TIMES)
    assert_same(output.terms["denoising"], data, network)
    assert_same(c * output.terms["residual"], c * likelihood.mean(), network)
    assert_same(output.loss, data + c * likelihood.mean(), network)


def test_a_residual_of_pidm_may_need_context_and_have_several_values():
    def law(fields, /, *, source, timesteps):
        assert timesteps.tolist() == TIMES.tolist()
        return fields - source

    law.needs = ("source", "timesteps")
    fields, noise, source = images(3, 4, 1, 3, 3)
    _, variance = pidm_tables()
    loss_fn = pidm(COSINE, law, 0.5, largest=math.inf)
    found = loss_fn(lambda x, t: x, fields, noise=noise, timesteps=TIMES, source=source)
    x_t = add_noise(COSINE, fields, noise, TIMES)
    torch.testing.assert_close(
        found.terms["residual"], (mean((x_t - source) ** 2) / (2 * variance[TIMES])).mean(), **CLOSE
    )


def test_sample_estimation_visits_evenly_spread_timesteps():
    seen = []

    def model(sample, timesteps):
        seen.append(timesteps.tolist())
        return sample

    loss_fn = RegularizedLoss(COSINE, [Term(circle, 1.0, constant, estimator=SampleEstimation(3))])
    loss_fn(model, images(2, 4, 2)[0][:2], timesteps=torch.tensor([60, 10]))
    assert seen == [[60, 10], [40, 6], [20, 3], [0, 0]]


# PBFM


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("power", [1.0, 2.5])
def test_pbfm(steps, power):
    network, times = Network(scale=1.0), torch.tensor([0.05, 0.3, 0.7, 0.95], dtype=torch.float64)
    x1, x0 = images(2, 4, 2, 3, 3)
    t = shaped(times, x1)
    x_t = (1 - t) * x0 + t * x1
    velocity = network(x_t, times)
    end, now, dt = x_t + (1 - t) / steps * velocity, t, (1 - t) / steps
    for _ in range(1, steps):
        now = now + dt
        end = end + dt * network(end, now.flatten())
    data = mean((velocity - (x1 - x0)) ** 2).mean()
    residual = (times**power * mean(divergence(end) ** 2)).mean()
    loss_fn = pbfm(straight_path(), divergence, power=power, steps=steps)
    output = loss_fn(network, x1, noise=x0, timesteps=times)
    assert_same(output.terms["denoising"], data, network)
    assert_same(output.terms["residual"], residual, network)

    # ConFIG of two losses: the bisector of both directions, as long as the sum of both projections
    one, other = (torch.autograd.grad(loss, network.weight, retain_graph=True)[0] for loss in (data, residual))
    bisector = F.normalize(F.normalize(one, dim=0) + F.normalize(other, dim=0), dim=0)
    network.weight.grad = torch.ones(3, dtype=torch.float64)
    conflict_free.backward(output, network.parameters())
    torch.testing.assert_close(network.weight.grad, bisector * ((one + other) @ bisector), rtol=1e-4, atol=1e-6)


def divergence(fields, /):
    return fields[:, 0].diff(dim=-1)[:, :-1] + fields[:, 1].diff(dim=-2)[..., :-1]


def test_pbfm_is_the_same_with_the_scheduler_of_diffusers():
    """There the time is 1000 (1 - t), and the network returns the negative velocity."""
    network, times = Network(scale=1.0), torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    x1, x0 = images(2, 3, 2, 3, 3)
    scheduler = FlowMatchEulerDiscreteScheduler()

    def reversed_network(sample, timesteps):
        return -network(sample, 1 - timesteps / 1000)

    own = pbfm(straight_path(), divergence, steps=3)(network, x1, noise=x0, timesteps=times)
    theirs = pbfm(scheduler, divergence, steps=3)(reversed_network, x1, noise=x0, timesteps=1000 * (1 - times))
    for name in ("denoising", "residual"):
        torch.testing.assert_close(own.terms[name], theirs.terms[name], **CLOSE)


@pytest.mark.parametrize("method", conflict_free.METHODS)
def test_gradients_without_conflict_oppose_none_of_the_parts(method):
    network, times = Network(scale=1.0), torch.tensor([0.1, 0.9], dtype=torch.float64)
    x1, x0 = images(2, 2, 2, 3, 3)
    output = pbfm(straight_path(), lambda x: x - 5)(network, x1, noise=x0, timesteps=times)
    parts = [torch.autograd.grad(part, network.weight, retain_graph=True)[0] for part in output.terms.values()]
    assert parts[0] @ parts[1] < 0
    conflict_free.backward(output, network.parameters(), method)
    assert all(part @ network.weight.grad >= -1e-6 for part in parts)


def test_a_combined_gradient_has_the_strides_of_its_parameter():
    """A fused optimizer reads both as blocks of memory: with other strides it would move other weights."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, 3, 2, 2, generator=generator)
    one, other = (torch.nn.Parameter(values.clone(memory_format=torch.channels_last)) for _ in range(2))
    gradient = torch.randn(24, generator=generator)
    conflict_free.hand_out(gradient, [one])
    other.grad = gradient.view_as(values).clone()
    torch.optim.SGD([one], lr=1.0, fused=True).step()
    torch.optim.SGD([other], lr=1.0, foreach=False).step()
    torch.testing.assert_close(one, other)


def test_a_part_without_gradient_leaves_the_others_as_they_are():
    network = Network()
    loss_fn = RegularizedLoss(DDPMScheduler(), [Term(lambda x: mean(x**2), 1.0)])
    output = loss_fn(network, images(2, 1, 3, 3), timesteps=torch.tensor([998, 999]))
    expected = torch.autograd.grad(output.terms["denoising"], network.weight, retain_graph=True)[0]
    conflict_free.backward(output, network.parameters())
    assert torch.equal(network.weight.grad, expected)
    with pytest.raises(ValueError, match="method must be one of config, pcgrad"):
        conflict_free.backward(output, network.parameters(), "mgda")


# ControlNet++


class Edges(nn.Module):
    """A network with weights that reads a condition from an image."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

    def forward(self, pictures):
        return self.weight * pictures.diff(dim=-1)


def test_controlnet_plus_plus():
    network, net, scheduler = Network(), Edges(), DDPMScheduler()
    times = torch.tensor([0, 200, 201, 900])
    x0, noise = images(2, 4, 1, 3, 3)
    condition = images(4, 1, 3, 2, seed=1)
    alpha_bar = shaped(scheduler.alphas_cumprod[times], x0)
    x_t = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise
    output = network(x_t, times)
    x0_hat = (x_t - (1 - alpha_bar).sqrt() * output) / alpha_bar.sqrt()
    reward = mean((0.5 * (2 * x0_hat).diff(dim=-1) - condition) ** 2)
    takes_part = (times <= 200).double()
    loss_fn = controlnet_plus_plus(scheduler, net, weight=0.5, view=lambda latents: 2 * latents)
    found = loss_fn(network, x0, noise=noise, timesteps=times, condition=condition)
    assert_same(found.terms["consistency"], (takes_part * reward).sum() / takes_part.sum(), network)
    assert_same(found.loss, mean((output - noise) ** 2).mean() + 0.5 * found.terms["consistency"], network)
    assert not net.weight.requires_grad
    none = loss_fn(network, x0, noise=noise, timesteps=torch.full((4,), 300), condition=condition)
    assert torch.equal(none.loss, none.terms["denoising"])


def test_a_segmentation_is_compared_by_cross_entropy():
    def logits(pictures):
        return torch.cat([pictures, -pictures], dim=1)

    net, labels = nn.Module(), torch.tensor([[[0, 1], [255, 1]]])
    net.forward = logits
    distance = partial(F.cross_entropy, reduction="none", ignore_index=255)
    pictures = images(1, 1, 2, 2)
    output = controlnet_plus_plus(DDPMScheduler(prediction_type="sample"), net, distance=distance)(
        lambda x, t: pictures, pictures, timesteps=torch.tensor([5]), condition=labels
    )
    chosen = (1 - 2 * labels.clamp(max=1)) * pictures[:, 0]
    expected = torch.where(labels == 255, 0, torch.log1p((-2 * chosen).exp())).mean()
    torch.testing.assert_close(output.terms["consistency"], expected, **CLOSE)


def test_a_condition_of_another_size_is_not_broadcast():
    loss_fn = controlnet_plus_plus(DDPMScheduler(), Edges())
    with pytest.raises(ValueError, match=r"condition of shape \(1, 1, 3, 2\), but \(1, 1, 1, 1\) was given"):
        condition = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
        loss_fn(Network(), images(1, 1, 3, 3), timesteps=torch.tensor([5]), condition=condition)


# LPL


def small_vae(**options):
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(4, 4, 8),
        layers_per_block=1,
        norm_num_groups=2,
        scaling_factor=0.3,
        **options,
    ).double()


def decoded_features(vae, latents):
    """The features of the decoder's blocks, by hooks in a whole decode."""
    kept, blocks = [], (vae.decoder.mid_block, *vae.decoder.up_blocks)
    hooks = [block.register_forward_hook(lambda module, given, result: kept.append(result)) for block in blocks]
    vae.decode(latents)
    for hook in hooks:
        hook.remove()
    return kept


def slow_mask(channel, scale):
    """The mask of one channel, (h, w), by sorting and by windows cut out one by one."""
    values = channel.flatten().sort().values
    low, high = (values[max(int(len(values) * share), 1) - 1] for share in (0.02, 0.98))
    margin = 2 * channel.std()
    mask = (channel > low - margin) & (channel < high + margin)
    for side, over in ((3 if scale == 1 else 1, torch.any), (5 if scale == 1 else 3, torch.all)):
        rows, columns, half = *mask.shape, side // 2
        mask = torch.tensor(
            [
                [
                    bool(over(mask[max(i - half, 0) : i + half + 1, max(j - half, 0) : j + half + 1]))
                    for j in range(columns)
                ]
                for i in range(rows)
            ]
        )
    return mask


@pytest.mark.parametrize("shift", [None, 0.2])
def test_lpl(shift):
    vae, network, scheduler = small_vae(shift_factor=shift), Network(), DDPMScheduler()
    times = torch.tensor([10, 199, 200])
    x0, noise = images(2, 3, 4, 6, 6)
    x0[0, 0, 2, 2] = 60.0  # an outlier
    alpha_bar = shaped(scheduler.alphas_cumprod[times], x0)
    x_t = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise
    x0_hat = (x_t - (1 - alpha_bar).sqrt() * network(x_t, times)) / alpha_bar.sqrt()
    found, wanted = (decoded_features(vae, latents[:2] / 0.3 + (shift or 0)) for latents in (x0_hat, x0))
    layers, masked = [], 0
    for layer, (f, g) in enumerate(zip(found, wanted, strict=True)):
        mask = torch.ones_like(g)
        if layer >= 2:
            mask = torch.stack([slow_mask(c, 2 if layer == 2 else 1) for c in g.detach().flatten(0, 1)]).view_as(g)
            masked += int((~mask).sum())
        g = g.detach() * mask
        length = g.square().sum(1, keepdim=True).sqrt() + 1e-6
        by_channel = (mask * (f / length - g / length) ** 2).sum((2, 3)) / mask.sum((2, 3))
        layers.append(2.0**-layer * by_channel.mean(1))
    assert masked > 0
    output = latent_perceptual(scheduler, vae, 3.0)(network, x0, noise=noise, timesteps=times)
    expected = (sum(layers) / 4).mean()
    assert_same(output.terms["lpl"], expected, network)
    assert output.weights == {"lpl": 3.0}


def test_equal_latents_have_no_perceptual_distance_and_other_autoencoders_are_refused():
    latents = images(2, 4, 5, 5)
    assert torch.equal(DecoderFeatures(small_vae())(latents, original_samples=latents), torch.zeros(2).double())
    with pytest.raises(ValueError, match="Linear has no decoder"):
        DecoderFeatures(nn.Linear(1, 1))


def test_values_without_outliers_have_a_full_mask():
    assert outlier_mask(images(2, 3, 16, 16)).float().mean() > 0.99
    assert outlier_mask(torch.zeros(1, 1, 4, 4)).sum() == 0  # no value lies strictly inside a margin of 0


# PixelGen


def patches(pictures):
    """Features of two layers of a vision network, (n, C, h, w)."""
    return F.avg_pool2d(torch.cat([pictures, pictures**2, pictures.abs()], dim=1), 2)


class Vision(nn.Module):
    def forward(self, pictures):
        return patches(pictures)


def absolute_error(one, other):
    return mean((one - other).abs())


def test_pixelgen():
    network, times = Network(scale=1.0), torch.tensor([0.1, 0.29, 0.3, 0.6, 0.99], dtype=torch.float64)
    x, noise = images(2, 5, 3, 4, 4)
    x = x.clamp(-1, 1)
    t = shaped(times, x)
    x_t = t * x + (1 - t) * noise
    predicted = network(x_t, times)
    velocity, target = ((image - x_t) / (1 - t).clamp(min=0.05) for image in (predicted, x))
    data = mean((velocity - target) ** 2).mean()
    takes_part = (times >= 0.3).double()
    cosine = F.cosine_similarity(patches(predicted), patches(x), dim=1)
    lpips, dino = (
        (takes_part * values).sum() / takes_part.sum() for values in (absolute_error(predicted, x), mean(1 - cosine))
    )
    loss_fn = pixelgen(absolute_error, Perceptual(Vision()))
    output = loss_fn(network, x, noise=noise, timesteps=times)
    assert_same(output.terms["denoising"], data, network)
    assert_same(output.terms["lpips"], lpips, network)
    assert_same(output.terms["p_dino"], dino, network)
    extra = 0.1 * lpips + 0.01 * dino
    assert_same(output.loss, data + extra, network)

    extra = 5 * lpips + 0.5 * dino
    output = pixelgen(absolute_error, Perceptual(Vision()), lpips_weight=5.0, dino_weight=0.5)(
        network, x, noise=noise, timesteps=times
    )
    norms = [torch.autograd.grad(part, network.weight, retain_graph=True)[0].norm() for part in (data, extra)]
    measured = norms[0] / (norms[1] + 1e-4)
    assert 1.1 < measured < 100
    ratio, once = LastLayerRatio(start=2, every=2), 0.8 + 0.2 * measured
    for weight in (1.0, 1.0, once, once, 0.8 * once + 0.2 * measured):
        assert_same(ratio(output, network.weight), data + weight * extra, network)
    resumed = LastLayerRatio(start=2, every=2)
    resumed.load_state_dict(ratio.state_dict())
    assert resumed.ratio == ratio.ratio and resumed.get_extra_state() == 5


def test_the_ratio_is_limited_and_waits_for_a_term_with_images():
    network, x = Network(scale=1.0), images(2, 3, 4, 4).clamp(-1, 1)
    loss_fn = pixelgen(lambda a, b: 1e-9 * absolute_error(a, b), Perceptual(Vision()), dino_weight=0.0)
    ratio = LastLayerRatio(start=0, every=1)
    early = loss_fn(network, x, timesteps=torch.tensor([0.1, 0.2], dtype=torch.float64))
    assert ratio(early, network.weight) == early.terms["denoising"] and ratio.get_extra_state() == 0
    ratio(loss_fn(network, x, timesteps=torch.tensor([0.9, 0.95], dtype=torch.float64)), network.weight)
    assert ratio.ratio == pytest.approx(0.8 + 0.2 * 100)


# SRPO


@pytest.mark.parametrize("step", [0.2, -0.1])
def test_direct_align_of_srpo(step):
    """With the flow of the paper: x_s = x_t + (s - t) v, then the known noise is removed."""
    network, times = Network(), torch.tensor([0.4, 0.8], dtype=torch.float64)
    x0, noise = images(2, 2, 1, 3, 3)
    t, s = shaped(times, x0), shaped(times - step, x0)
    x_t = (1 - t) * x0 + t * noise
    velocity = network(x_t, 1000 * times)
    recovered = (x_t + (s - t) * velocity - s * noise) / (1 - s)
    expected = F.relu(0.7 - mean(recovered)).mean()
    reward = nn.Module()
    reward.forward = mean
    loss_fn = srpo(FlowMatchEulerDiscreteScheduler(), Score(reward, kind="reward", threshold=0.7), 1000 * step)
    found = loss_fn(velocity, 1000 * times, x_t, noise=noise, original_samples=x0)
    assert_same(found.loss, expected, network)
    k = (t - s) / (t * (1 - s))
    torch.testing.assert_close(recovered, (1 - k) * x0 + k * (x_t - t * velocity), **CLOSE)


def test_direct_align_in_the_coordinates_of_ddpm():
    """k = 1 - sqrt(SNR_t / SNR_s); with the true noise the image itself is found, at any noise level."""
    scheduler, times = DDPMScheduler(), torch.tensor([300, 900])
    x0, noise, output = images(3, 2, 1, 3, 3)
    x_t = add_noise(scheduler, x0, noise, times)
    alpha_bar = scheduler.alphas_cumprod.double()
    snr = alpha_bar / (1 - alpha_bar)
    k = shaped(1 - (snr[times] / snr[times - 100]).sqrt(), x0)
    a, s = (shaped(part[times].sqrt(), x0) for part in (alpha_bar, 1 - alpha_bar))
    seen = []
    loss_fn = srpo(scheduler, lambda x: seen.append(x.clone()) or mean(x), 100)
    loss_fn(output, times, x_t, noise=noise, original_samples=x0)
    loss_fn(noise, times, x_t, noise=noise, original_samples=x0)
    torch.testing.assert_close(seen[0], (1 - k) * x0 + k * (x_t - s * output) / a, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen[-1], x0, rtol=1e-3, atol=1e-4)


def test_direct_align_names_what_is_missing():
    with pytest.raises(ValueError, match="step must not be 0"):
        DirectAlign(0)
    x0, noise = images(2, 2, 1, 3, 3)
    times = torch.tensor([100, 300])
    with pytest.raises(ValueError, match="pass noise= to the loss"):
        srpo(DDPMScheduler(), mean, 50)(noise, times, x0)
    with pytest.raises(ValueError, match="timesteps are negative"):
        srpo(DDPMScheduler(), mean, 200)(noise, times, x0, noise=noise)


# DRaFT and AlignProp


def chain(network, noise, alpha_bars, last, detach_output=False):
    """DDIM by its formula, with the gradient cut before the last steps: of the sample, or of the network's outputs."""
    sample = noise
    for place, (timestep, now, after) in enumerate(alpha_bars):
        is_cut = place < len(alpha_bars) - last
        output = network(sample, torch.full((len(noise),), timestep))
        output = output.detach() if is_cut else output
        x0_hat = (sample - (1 - now).sqrt() * output) / now.sqrt()
        sample = after.sqrt() * x0_hat + (1 - after).sqrt() * output
        sample = sample.detach() if is_cut and not detach_output else sample
    return sample


@pytest.mark.parametrize("last", [1, 3, 5])
def test_draft_and_alignprop(last):
    network, noise = Network(), images(3, 1, 4, 4)
    sampler = DDIMScheduler(clip_sample=False, set_alpha_to_one=True)
    places = [800, 600, 400, 200, 0]
    table = sampler.alphas_cumprod.double()
    after = [*table[places[1:]], torch.tensor(1.0, dtype=torch.float64)]
    alpha_bars = list(zip(places, table[places], after, strict=True))
    loss_fn = Draft(sampler, [Term(lambda x: mean((x - 0.3) ** 2), 2.0, matched, "reward")], steps=5)
    output = loss_fn(network, noise, last=last)
    for detach_output in (False, True):  # DRaFT-K cuts the sample, AlignProp the outputs: the same gradient
        expected = 2 * mean((chain(network, noise, alpha_bars, last, detach_output) - 0.3) ** 2).mean()
        torch.testing.assert_close(output.loss, expected, rtol=1e-4, atol=0)
        gradients = [
            torch.autograd.grad(loss, network.weight, retain_graph=True)[0] for loss in (output.loss, expected)
        ]
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)
    assert output.metrics()["raw/reward"] == pytest.approx(output.loss.item() / 2)


def test_the_first_steps_keep_no_graph_and_samples_are_those_of_the_pipeline():
    calls = []

    def model(sample, timesteps):
        calls.append(torch.is_grad_enabled())
        return network(sample, timesteps)

    network, noise = Network(), images(2, 1, 4, 4)
    Draft(DDIMScheduler(clip_sample=False), [Term(mean, 1.0)], steps=6)(model, noise, last=2)
    assert calls == [False] * 4 + [True] * 2
    for sampler in (DDPMScheduler(), FlowMatchEulerDiscreteScheduler()):
        drawn = [
            sampled(sampler, network, noise, 4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
        ]
        assert torch.equal(drawn[0], drawn[1])
        assert torch.equal(drawn[0], drawn[2]) == isinstance(sampler, FlowMatchEulerDiscreteScheduler)


@pytest.mark.parametrize("last", [0, 7])
def test_the_number_of_steps_with_gradient_is_checked(last):
    loss_fn = Draft(DDIMScheduler(clip_sample=False), [Term(mean, 1.0)], steps=6)
    with pytest.raises(ValueError, match=f"last must be between 1 and the 6 steps, not {last}"):
        loss_fn(Network(), images(1, 1, 2, 2), last=last)


# Weights of the data


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_min_snr(kind):
    network, scheduler = Network(), DDPMScheduler(prediction_type=kind)
    times = torch.tensor([3, 200, 600, 990])
    x0, noise = images(2, 4, 1, 3, 3)
    alpha_bar = shaped(scheduler.alphas_cumprod[times], x0)
    a, s = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    x_t = a * x0 + s * noise
    o = network(x_t, times)
    x0_hat = {"epsilon": (x_t - s * o) / a, "sample": o, "v_prediction": a * x_t - s * o}[kind]
    weights = (alpha_bar / (1 - alpha_bar)).flatten().clamp(max=5)
    expected = (weights * mean((x0 - x0_hat) ** 2)).mean()
    assert_same(min_snr(scheduler)(network, x0, noise=noise, timesteps=times).loss, expected, network)


def test_edm():
    network, sigma = Network(scale=1.0), torch.tensor([0.02, 0.5, 3.0], dtype=torch.float64)
    x0, noise = images(2, 3, 1, 3, 3)
    denoised = network(x0 + shaped(sigma, x0) * noise, sigma)
    weights = (sigma**2 + 0.25) / (0.5 * sigma) ** 2
    expected = (weights * mean((denoised - x0) ** 2)).mean()
    term = Term(lambda x: mean(x**2), 0.1, matched, "energy")
    output = edm([term])(network, x0, noise=noise, timesteps=sigma)
    assert_same(output.terms["denoising"], expected, network)
    gate = 1 / (1 + (10 * sigma**2) ** 2)
    torch.testing.assert_close(output.weightings["energy"], (weights.clamp(max=100) * gate).float() * (gate > 0.02))
    drawn = draw_sigma(100_000).log()
    assert drawn.mean() == pytest.approx(-1.2, abs=0.02) and drawn.std() == pytest.approx(1.2, abs=0.02)


def test_the_scheduler_of_diffusers_has_the_weight_of_edm_already():
    """For F inside D = c_skip x + c_out F, the unweighted loss is that of EDM: 1 / c_out^2 in units of D."""
    scheduler, sigma = EDMEulerScheduler(), torch.tensor([0.1, 2.0])
    loss_fn, (x0, noise) = RegularizedLoss(scheduler), images(2, 2, 1, 3, 3)
    output = images(2, 1, 3, 3, seed=2)
    variance, at = shaped(sigma, x0) ** 2 + 0.25, shaped(sigma, x0)
    denoised = 0.25 / variance * (x0 + at * noise) + at * 0.5 / variance.sqrt() * output
    found = loss_fn(lambda x, t: output, x0, noise=noise, timesteps=sigma.log() / 4).loss
    expected = edm()(lambda x, t: denoised, x0, noise=noise, timesteps=sigma).loss
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
