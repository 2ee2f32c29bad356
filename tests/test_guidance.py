"""Guidance: closed forms of each method, one path for every scheduler, and what the pipeline does with it."""

import inspect
import math
from functools import partial

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from reg_diffusers import Ddim, KnownNoise, MonteCarlo, RegDDPMPipeline, Term, one_step
from reg_diffusers.guidance import Guidance
from reg_diffusers.prediction import model_output_for, noise_level, predict_original_sample
from reg_diffusers.regularizers import mean_intensity, total_variation
from reg_diffusers.term import TermError
from reg_diffusers.weighting import constant, low_noise, matched

pytestmark = pytest.mark.sampling

# One of each class that can sample by itself, in each parameterization that it has.
SCHEDULERS = [
    *(
        (name, {"prediction_type": kind})
        for name in (
            *(
                "DDPMScheduler",
                "DDPMParallelScheduler",
                "DDIMScheduler",
                "DDIMParallelScheduler",
                "EulerDiscreteScheduler",
            ),
            *("CogVideoXDDIMScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler", "PNDMScheduler"),
            *("DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"),
        )
        for kind in ("epsilon", "v_prediction")
    ),
    ("DDIMScheduler", {"prediction_type": "sample"}),
    ("UniPCMultistepScheduler", {"prediction_type": "sample"}),
    ("UnCLIPScheduler", {"prediction_type": "epsilon"}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("KDPM2DiscreteScheduler", {"num_train_timesteps": 100}),
    ("KDPM2AncestralDiscreteScheduler", {"num_train_timesteps": 100}),
    ("DPMSolverSinglestepScheduler", {}),
    ("SASolverScheduler", {}),
    ("LCMScheduler", {}),
    ("TCDScheduler", {}),
    ("EDMEulerScheduler", {}),
    ("EDMDPMSolverMultistepScheduler", {}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    ("FlowMatchHeunDiscreteScheduler", {}),
    ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
]


def images(pipeline, steps=6, batch_size=2, **kwargs):
    pipeline.set_progress_bar_config(disable=True)
    kwargs.setdefault("output_type", "latent")
    generator = torch.Generator().manual_seed(0)
    return pipeline(batch_size=batch_size, num_inference_steps=steps, generator=generator, **kwargs)


def sample_by_hand(unet, scheduler, displace, steps=6):
    """diffusers' sampling loop with displace(x0_hat) for x0_hat, through the affine map of its model output."""
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, 1, 8, 8, generator=generator, dtype=unet.dtype)
    scheduler.set_timesteps(steps)
    sample = sample * getattr(scheduler, "init_noise_sigma", 1.0)
    accepted = inspect.signature(scheduler.step).parameters
    kwargs = {name: value for name, value in (("generator", generator), ("eta", 0.0)) if name in accepted}
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(sample, t) if hasattr(scheduler, "scale_model_input") else sample
        output = unet(scaled, t).sample
        at_zero, at_one, x0_hat = (
            predict_original_sample(scheduler, value, t, sample)
            for value in (torch.zeros_like(output), torch.ones_like(output), output)
        )
        output = (displace(x0_hat) - at_zero) / (at_one - at_zero)
        sample = scheduler.step(output, t, sample, **kwargs).prev_sample
    return sample


@torch.no_grad()
@pytest.mark.parametrize(("name", "options"), SCHEDULERS, ids=str)
def test_with_every_scheduler_it_samples_with_another_denoiser(tiny_unet, name, options):
    """N / 2 grad (mean - target)^2 = mean - target in every pixel: mpgd's displacement, by hand."""
    factor, target = 0.4, 0.3
    scheduler = getattr(diffusers, name)(**options)
    unet = tiny_unet().double()
    term = Term(partial(mean_intensity, target=target), 2 * factor, weighting=constant)
    guided = images(RegDDPMPipeline(unet, scheduler), guidance=[term], regularizer_scale=0.5).images

    def displace(x0_hat):
        return x0_hat - factor * (x0_hat.mean((1, 2, 3), keepdim=True) - target)

    torch.testing.assert_close(guided, sample_by_hand(unet, scheduler, displace), rtol=1e-4, atol=1e-4)
    plain = sample_by_hand(unet, scheduler, lambda x0_hat: x0_hat)
    assert (plain - guided).abs().max() > 1e-2


class IdealGaussian:
    """x0_hat, and the network that implies it, for data N(mu, tau^2) in every pixel."""

    def __init__(self, scheduler, timestep, mu=0.3, tau=0.5):
        self.level = noise_level(scheduler, timestep)
        self.alpha, self.sigma = self.level.alpha.item(), self.level.sigma.item()
        self.mu, self.gain = mu, self.alpha * tau**2 / (self.alpha**2 * tau**2 + self.sigma**2)
        self.covariance = tau**2 * self.sigma**2 / (self.alpha**2 * tau**2 + self.sigma**2)
        self.scheduler, self.timestep = scheduler, timestep

    def x0_hat(self, sample):
        return self.mu + self.gain * (sample - self.alpha * self.mu)

    def network(self, sample):
        return model_output_for(self.scheduler, self.x0_hat(sample), self.timestep, sample)


FAMILIES = [
    DDPMScheduler(),
    DDPMScheduler(prediction_type="v_prediction"),
    DDIMScheduler(prediction_type="sample"),
    diffusers.EulerDiscreteScheduler(),
    diffusers.EDMEulerScheduler(),
    FlowMatchEulerDiscreteScheduler(),
]


def guided_x0_hat(guidance, scheduler, sample, at=5, mu=0.3, tau=0.5, **kwargs):
    """(ideal network, x0_hat of the guided model output) at one step of a sampling schedule."""
    scheduler.set_timesteps(8)
    timestep = scheduler.timesteps[at]
    ideal = IdealGaussian(scheduler, timestep, mu, tau)
    model_output = guidance.model_output(ideal.network, scheduler, timestep, sample, **kwargs)
    return ideal, predict_original_sample(scheduler, model_output, timestep, sample)


def noise(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mean_square(x0_hat, /):
    """N / 2 times its gradient is the image itself."""
    return (x0_hat**2).flatten(1).mean(1)


@pytest.mark.parametrize("scheduler", FAMILIES, ids=lambda scheduler: type(scheduler).__name__)
def test_mpgd_takes_the_gradient_at_x0_hat(scheduler):
    sample = noise(3, 2, 4, 4)
    guidance = Guidance([Term(mean_square, 0.5, constant)], scale=0.7)
    ideal, x0_hat = guided_x0_hat(guidance, scheduler, sample)
    torch.testing.assert_close(x0_hat, (1 - 0.7 * 0.5) * ideal.x0_hat(sample), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scheduler", FAMILIES, ids=lambda scheduler: type(scheduler).__name__)
def test_dps_has_the_covariance_of_the_posterior_before_the_gradient(scheduler):
    sample = noise(3, 2, 4, 4)
    guidance = Guidance([Term(mean_square, 0.5, constant)], scale=0.7, method="dps")
    ideal, x0_hat = guided_x0_hat(guidance, scheduler, sample)
    displaced = (1 - 0.7 * 0.5 * ideal.covariance) * ideal.x0_hat(sample)
    torch.testing.assert_close(x0_hat, displaced, rtol=1e-5, atol=1e-6)


def test_lgd_is_dps_for_the_energy_smoothed_by_the_posterior_width():
    """For E = c |x|^2 / 2 the smoothed energy is c |x|^2 / (2 (1 + c r^2)) + const: a Gaussian integral."""
    scheduler, strength = DDPMScheduler(), 3.0
    sample = noise(20, 1, 1, 1)
    guidance = Guidance([Term(mean_square, strength, constant)], method="lgd", samples=40_000)
    generator = torch.Generator().manual_seed(0)
    ideal, x0_hat = guided_x0_hat(guidance, scheduler, sample, generator=generator)
    r2 = ideal.sigma**2 / (ideal.alpha**2 + ideal.sigma**2)
    assert strength * r2 > 0.5  # so that it differs from dps
    displaced = (1 - ideal.covariance * strength / (1 + strength * r2)) * ideal.x0_hat(sample)
    torch.testing.assert_close(x0_hat, displaced, rtol=0, atol=0.01)


def test_lgd_with_one_sample_per_generator_does_not_depend_on_the_batch():
    scheduler, sample = DDPMScheduler(), noise(2, 1, 4, 4)
    guidance = Guidance([Term(total_variation, 1.0, constant)], method="lgd")
    both = guided_x0_hat(
        guidance, scheduler, sample, generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)]
    )
    second = guided_x0_hat(guidance, scheduler, sample[1:], generator=[torch.Generator().manual_seed(2)])
    torch.testing.assert_close(both[1][1:], second[1])


@pytest.mark.parametrize("method", ["mpgd", "dps", "lgd"])
def test_terms_add_up_and_the_weighting_is_that_of_the_timestep(method):
    scheduler, sample = DDPMScheduler(), noise(2, 1, 4, 4)

    def displacement(*terms):
        guidance = Guidance(terms, method=method, samples=1)
        ideal, x0_hat = guided_x0_hat(guidance, scheduler, sample, at=6, generator=torch.Generator().manual_seed(0))
        return ideal, x0_hat - ideal.x0_hat(sample)

    ideal, first = displacement(Term(mean_square, 0.3, constant))
    _, second = displacement(Term(total_variation, 0.2, constant))
    _, both = displacement(Term(mean_square, 0.3, constant), Term(total_variation, 0.2, constant))
    torch.testing.assert_close(first + second, both, rtol=1e-4, atol=1e-6)
    _, gated = displacement(Term(mean_square, 0.3, matched))
    gate = 1 / (1 + (10 / ideal.level.snr.item()) ** 2)  # matched with w_d = 1
    assert 0.02 < gate < 0.9
    torch.testing.assert_close(gated, gate * first, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_the_effect_does_not_grow_with_the_number_of_steps(tiny_unet):
    """Twice the scale moves the samples twice as far, four times the steps do not."""
    scheduler = DDIMScheduler(clip_sample=False, prediction_type="sample")
    pipeline = RegDDPMPipeline(tiny_unet(), scheduler)
    term = Term(partial(mean_intensity, target=5.0), 0.05, constant)

    def moved(steps, scale):
        plain, guided = (images(pipeline, steps, guidance=[term], regularizer_scale=s).images for s in (0.0, scale))
        return (guided - plain).mean().item()

    base = moved(50, 1.0)
    assert base > 0.1
    assert moved(200, 1.0) == pytest.approx(base, rel=0.2)
    assert moved(50, 2.0) == pytest.approx(2 * base, rel=0.2)


@pytest.mark.parametrize("method", ["mpgd", "dps", "lgd"])
def test_it_stops_where_the_weighting_is_zero(tiny_unet, method):
    seen = []

    def watched(x0_hat, /):
        seen.append(x0_hat.requires_grad)
        return mean_square(x0_hat)

    unet, scheduler = tiny_unet(), DDIMScheduler()
    pipeline = RegDDPMPipeline(unet, scheduler)
    samples = []

    def callback(pipeline, index, t, tensors):
        samples.append((int(t), tensors["latents"]))

    images(pipeline, 20, callback_on_step_end=callback)
    plain = dict(samples)
    term = Term(watched, 1.0, partial(low_noise, max_timestep=300))
    images(pipeline, 20, guidance=[term], guidance_method=method, callback_on_step_end=callback)
    for t, sample in samples[20:]:
        assert torch.equal(sample, plain[t]) == (t >= 300)
    assert seen == [True] * 6  # t = 250, 200, ..., 0


def test_scale_zero_is_no_guidance_bit_for_bit(tiny_unet):
    pipeline = RegDDPMPipeline(tiny_unet(), DDPMScheduler())
    zero = images(pipeline, guidance=[Term(total_variation, 1.0)], regularizer_scale=0.0).images
    assert torch.equal(zero, images(pipeline).images)


@pytest.mark.parametrize("method", ["mpgd", "dps", "lgd"])
def test_a_gradient_that_is_not_finite_leaves_its_image_alone(method):
    def root(x0_hat, /):  # infinite gradient where an image is exactly 0, nan below
        return x0_hat.flatten(1).mean(1).sqrt()

    scheduler, sample = DDPMScheduler(), torch.stack([noise(1, 4, 4).abs(), -noise(1, 4, 4).abs()])
    guidance = Guidance([Term(root, 0.1, constant)], method=method, samples=2)
    ideal, x0_hat = guided_x0_hat(
        guidance, scheduler, sample, at=7, mu=0.0, generator=torch.Generator().manual_seed(0)
    )
    moved = (x0_hat - ideal.x0_hat(sample)).abs().amax((1, 2, 3))
    assert moved[1] < 1e-7 and (moved[0] > 1e-6 or method == "lgd") and x0_hat.isfinite().all()


def test_a_learned_variance_passes_through():
    scheduler, sample = DDPMScheduler(variance_type="learned_range"), noise(2, 1, 4, 4)
    scheduler.set_timesteps(8)
    t = scheduler.timesteps[5]
    variance = noise(2, 1, 4, 4, seed=2)
    guided = Guidance([Term(mean_square, 0.5, constant)]).model_output(
        lambda x: torch.cat([x, variance], 1), scheduler, t, sample
    )
    assert torch.equal(guided[:, 1:], variance) and not torch.allclose(guided[:, :1], sample)


def test_the_network_may_compute_in_bfloat16(tiny_unet):
    pipeline = RegDDPMPipeline(tiny_unet().bfloat16(), DDIMScheduler())
    for method in ("mpgd", "dps", "lgd"):
        output = images(pipeline, guidance=[mean_square], guidance_method=method, guidance_samples=2)
        assert output.images.dtype == torch.bfloat16 and output.images.isfinite().all()


class GaussianNetwork(torch.nn.Module):
    """The ideal network for N(mu, tau^2) in every pixel, as the pipeline calls it."""

    config = type("Config", (), {"sample_size": 8, "in_channels": 1, "out_channels": 1, "num_class_embeds": None})
    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, scheduler):
        super().__init__()
        self.scheduler = scheduler

    def forward(self, x, t, class_labels=None):
        return type("Output", (), {"sample": IdealGaussian(self.scheduler, t).network(x)})


@pytest.mark.parametrize("method", ["mpgd", "dps", "lgd"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_guidance_lowers_the_loss_of_samples_more_with_a_larger_scale(kind, method):
    scheduler = DDIMScheduler(clip_sample=False, prediction_type=kind)
    pipeline = RegDDPMPipeline(GaussianNetwork(scheduler), scheduler)
    scores = [
        images(
            *(pipeline, 20, 4),
            guidance=[Term(mean_square, 0.5, constant)],
            regularizer_scale=scale,
            guidance_method=method,
            regularizers={"energy": mean_square},
        ).scores["energy"]
        for scale in (0.0, 0.5, 1.0)
    ]
    assert (scores[2] < scores[1]).all() and (scores[1] < scores[0]).all()


def test_labels_and_condition_reach_network_and_regularizer(tiny_unet):
    unet = tiny_unet(num_class_embeds=2)
    conditional = diffusers.UNet2DModel.from_config({**unet.config, "in_channels": 3})
    pipeline = RegDDPMPipeline(conditional.eval(), DDIMScheduler(prediction_type="sample"))
    seen = {}

    def near(x0_hat, /, *, condition, class_labels):
        seen[len(x0_hat)] = class_labels.tolist()
        return ((x0_hat - condition[:, :1]) ** 2).flatten(1).mean(1)

    near.needs = ("condition", "class_labels")
    condition = torch.stack([torch.zeros(2, 8, 8), torch.ones(2, 8, 8)])
    common = {"class_labels": [0, 1], "condition": condition, "regularizers": [near]}
    plain = images(pipeline, **common)
    assert not torch.equal(plain.images, images(pipeline, **{**common, "condition": -condition}).images)
    for method in ("mpgd", "lgd"):
        term = Term(near, 1.0, constant)
        guided = images(pipeline, **common, guidance=[term], guidance_method=method, guidance_samples=3)
        assert (guided.scores["near"] < plain.scores["near"]).all()
    assert seen == {2: [0, 1], 6: [0, 1] * 3}


def test_what_cannot_work_is_refused(tiny_unet):
    pipeline = RegDDPMPipeline(tiny_unet(), DDIMScheduler())
    masked = partial(mean_intensity)
    masked.needs = ("mask",)
    other = Term(mean_square, 1.0, estimator=lambda prediction: prediction.sample)
    again = Term(mean_square, 1.0, estimator=Ddim(1))
    for message, kwargs in {
        "mpgd, dps, lgd, not 'cfg'": {"guidance_method": "cfg"},
        "regularizer_scale must be finite": {"regularizer_scale": math.nan},
        "regularizer_scale must be finite and at least 0, not -1": {"regularizer_scale": -1.0},
        "guidance_samples": {"guidance_samples": 0},
        "guidance calls the network once per step, and the estimator of 'mean_square'": {"guidance": [again]},
        "images that do not depend on x0_hat": {"guidance": [other]},
        "needs mask": {"guidance": [masked]},
        "one value per image": {"guidance": [lambda x: x]},
    }.items():
        with pytest.raises(ValueError, match=message):
            images(pipeline, **kwargs)
    with pytest.raises(TypeError, match="must be a sequence"):
        images(pipeline, guidance=Term(mean_square, 1.0))
    with pytest.raises(TermError, match="detached"):
        images(pipeline, guidance=[Term(lambda x: mean_square(x.detach()), 1.0)])


def test_an_estimator_without_a_further_call_is_what_guidance_sees(tiny_unet):
    """Linear in the image, so that draws around it have the same gradient in the mean, and half noise half of it."""
    scheduler = DDIMScheduler(prediction_type="sample")
    sample, x0, noise = torch.randn(3, 2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    scheduler.set_timesteps(4)

    def moved(estimator):
        term = Term(lambda x: x.flatten(1).mean(1), 1.0, constant, "mean", estimator=estimator)
        context = {"original_samples": x0, "noise": noise}
        step = (lambda x: 0.5 * x, scheduler, torch.tensor(500), sample)
        return Guidance([term]).model_output(*step, context=context) - 0.5 * sample

    torch.testing.assert_close(moved(MonteCarlo(3)), moved(one_step), atol=1e-5, rtol=0)
    torch.testing.assert_close(moved(KnownNoise(0.5)), 0.5 * moved(one_step), atol=1e-5, rtol=0)
