"""The check of a loop's wiring: never a right one refused, each wrong one under its name.

The loops are those of diffusers' own training scripts, with its schedulers and functions.
"""

import random
import warnings

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers.training_utils import compute_density_for_timestep_sampling

from reg_diffusers import Term, X0Regularization, weighting
from reg_diffusers.prediction import add_noise, noise_level, prediction_target, scale_model_input
from reg_diffusers.regularizers import total_variation
from reg_diffusers.wiring.check import check_noisy_samples, verify

pytestmark = pytest.mark.loss

FLOW = diffusers.FlowMatchEulerDiscreteScheduler()
SHIFTED = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
NOISE, IMAGE, VELOCITY = (
    diffusers.DDPMScheduler(prediction_type=kind) for kind in ("epsilon", "sample", "v_prediction")
)
EULER, EULER_V = (diffusers.EulerDiscreteScheduler(prediction_type=kind) for kind in ("epsilon", "v_prediction"))
EDM, EDM_V = (diffusers.EDMEulerScheduler(prediction_type=kind) for kind in ("epsilon", "v_prediction"))


def pictures(batch_size, generator, size=16):
    """Smooth colour pictures in [-1, 1] with edges, of every brightness."""
    coarse = torch.randn(batch_size, 3, 4, 4, generator=generator)
    smooth = F.interpolate(coarse, size=(size, size), mode="bicubic")
    edges = torch.where(smooth.roll(5, 3) > 0.5, 0.5, 0.0)
    brightness = torch.rand(batch_size, 1, 1, 1, generator=generator) - 0.5
    return (0.5 * smooth + edges + brightness).clamp(-1, 1)


def drawn(scheduler, batch_size, generator):
    """Timesteps as the scripts of diffusers draw them."""
    if scheduler in (EDM, EDM_V):
        sigma = (1.2 * torch.randn(batch_size, generator=generator) - 1.2).exp()
        return sigma.log() / 4
    if isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler):
        u = compute_density_for_timestep_sampling("logit_normal", batch_size, 0.0, 1.0, generator=generator)
        return scheduler.timesteps[(u * 1000).long()]
    return torch.randint(0, 1000, (batch_size,), generator=generator)


class Loop:
    """One batch of a right training loop."""

    def __init__(self, scheduler, seed, timesteps=None):
        generator = torch.Generator().manual_seed(seed)
        batch_size = random.Random(seed).randint(1, 8) if timesteps is None else len(timesteps)
        self.scheduler = scheduler
        self.x0 = pictures(batch_size, generator)
        self.noise = torch.randn(self.x0.shape, generator=generator)
        self.t = drawn(scheduler, batch_size, generator) if timesteps is None else timesteps
        self.x_t = add_noise(scheduler, self.x0, self.noise, self.t)
        self.target = prediction_target(scheduler, self.x0, self.noise, self.t)

    def level(self):
        level = noise_level(self.scheduler, self.t)
        return (part.reshape(-1, 1, 1, 1) for part in (level.alpha, level.sigma))

    def verify(self, output=None, t=None, x_t=None, x0=None, dtype=torch.float32, **options):
        output, t = self.target if output is None else output, self.t if t is None else t
        x_t, x0 = self.x_t if x_t is None else x_t, self.x0 if x0 is None else x0
        return quietly(verify, self.scheduler, output.to(dtype), t, x_t.to(dtype), x0.to(dtype), **options)


def quietly(function, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **options)


# Right


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    ("scheduler", "timesteps"),
    [
        *((scheduler, (1, 500, 999)) for scheduler in (NOISE, IMAGE, VELOCITY, EULER, EULER_V)),
        *((scheduler, (1.0, 500.0, 999.0, 1000.0)) for scheduler in (FLOW, SHIFTED)),
        *((scheduler, (-1.5, 0.0, 1.0)) for scheduler in (EDM, EDM_V)),
        (diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"), (1, 500, 999)),
        (diffusers.DDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True), (1, 500, 999)),
        (diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction"), (1, 500, 999)),
        (diffusers.DPMSolverMultistepScheduler(prediction_type="sample"), (1, 500, 999)),
        (
            diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
            (1, 500, 999),
        ),
        (diffusers.SCMScheduler(), (0.01, 0.7, 1.57)),
    ],
    ids=lambda value: str(value).split(" ")[0],
)
def test_a_right_loop_is_never_refused(scheduler, timesteps, dtype):
    limit = 1e-5 if dtype in (torch.float32, torch.float64) else 0.01
    for seed, t in enumerate(timesteps):
        for images in (1, 4):
            loop = Loop(scheduler, seed, torch.full((images,), t))
            assert loop.verify(dtype=dtype) < limit
            x_t, x0, noise = (part.to(dtype) for part in (loop.x_t, loop.x0, loop.noise))
            check_noisy_samples(scheduler, loop.t, x_t, x0, noise)
    assert Loop(scheduler, 0, torch.tensor(timesteps)).verify(dtype=dtype) < limit


def test_the_error_is_the_one_of_the_formula():
    loop = Loop(NOISE, 0, torch.tensor([3, 300, 900]))
    output = loop.target + 1e-4 * torch.randn(loop.target.shape, generator=torch.Generator().manual_seed(1))
    alpha, sigma = loop.level()
    x0_hat = (loop.x_t - sigma * output) / alpha
    errors = (alpha * (x0_hat - loop.x0)).flatten(1).norm(dim=1) / loop.x_t.flatten(1).norm(dim=1)
    assert loop.verify(output) == pytest.approx(errors[:2].max().item(), rel=1e-4)  # the SNR of the last is below 0.1


@pytest.mark.parametrize(("dtype", "small", "large"), [(torch.float32, 2e-4, 5e-3), (torch.bfloat16, 0.02, 0.2)])
def test_the_limit_is_that_of_the_precision(dtype, small, large):
    loop = Loop(FLOW, 0, torch.tensor([500.0, 500.0]))
    error = torch.randn(loop.target.shape, generator=torch.Generator().manual_seed(1))
    assert loop.verify(loop.target + small * error, dtype=dtype) > small / 4
    with pytest.raises(ValueError, match=r"limit (0\.001|0\.05)\)"):
        loop.verify(loop.target + large * error, dtype=dtype)


def test_a_batch_of_noise_alone_is_said_to_show_little():
    loop = Loop(NOISE, 0, torch.tensor([900, 999]))
    with pytest.warns(UserWarning, match=r"no image of this batch has an SNR of 0\.1 or more"):
        assert verify(NOISE, loop.target, loop.t, loop.x_t, loop.x0) < 1e-5
    with pytest.raises(ValueError, match="this is x0, not the noise"):
        loop.verify(loop.x0)


def test_the_loops_of_diffusers_scripts_are_right():
    generator = torch.Generator().manual_seed(0)
    x0 = pictures(4, generator)
    noise = torch.randn(x0.shape, generator=generator)

    # train_dreambooth_sd3.py, with and without --precondition_outputs
    u = compute_density_for_timestep_sampling("logit_normal", 4, 0.0, 1.0, generator=generator)
    timesteps = SHIFTED.timesteps[(u * 1000).long()]
    sigmas = torch.stack([SHIFTED.sigmas[(SHIFTED.timesteps == t).nonzero().item()] for t in timesteps])
    sigmas = sigmas.reshape(-1, 1, 1, 1)
    noisy = (1.0 - sigmas) * x0 + sigmas * noise
    assert verify(SHIFTED, noise - x0, timesteps, noisy, x0) < 1e-5
    perfect = (noise - x0) * (-sigmas) + noisy
    assert verify(SHIFTED, None, timesteps, noisy, x0, x0_hat=perfect) < 1e-5
    with pytest.raises(ValueError, match=r"this is x0, not the velocity: pass it as x0_hat="):
        verify(SHIFTED, perfect, timesteps, noisy, x0)

    # train_cogvideox_lora.py: get_velocity makes x0 of the output, and the target is the latents
    scheduler = diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction")
    timesteps = torch.randint(0, 1000, (4,), generator=generator)
    noisy = scheduler.add_noise(x0, noise, timesteps)
    velocity = scheduler.get_velocity(x0, noise, timesteps)
    assert verify(scheduler, velocity, timesteps, noisy, x0) < 1e-5
    perfect = scheduler.get_velocity(velocity, noisy, timesteps)
    assert verify(scheduler, None, timesteps, noisy, x0, x0_hat=perfect) < 1e-5
    with pytest.raises(ValueError, match="this is x0, not the velocity"):
        verify(scheduler, perfect, timesteps, noisy, x0)

    # train_dreambooth_lora_sdxl.py --do_edm_style_training with EDM and with Euler
    indices = torch.randint(0, 1000, (4,), generator=generator)
    scheduler = diffusers.EulerDiscreteScheduler()
    timesteps = scheduler.timesteps[indices]
    sigmas = scheduler.sigmas[:-1][indices].reshape(-1, 1, 1, 1)
    noisy = scheduler.add_noise(x0, noise, timesteps)
    assert verify(scheduler, noise, timesteps, noisy, x0) < 1e-5
    perfect = noise * (-sigmas) + noisy
    assert verify(scheduler, None, timesteps, noisy, x0, x0_hat=perfect) < 1e-5
    with pytest.raises(ValueError, match="this is x0, not the noise"):
        verify(scheduler, perfect, timesteps, noisy, x0)
    with pytest.raises(ValueError, match="x_t was already scaled for the network"):
        verify(scheduler, noise, timesteps, noisy / (sigmas**2 + 1) ** 0.5, x0)
    scheduler = diffusers.EDMEulerScheduler()
    indices = torch.randint(0, len(scheduler.timesteps), (4,), generator=generator)
    timesteps = scheduler.timesteps[indices]
    noisy = scheduler.add_noise(x0, noise, timesteps)
    sigmas = (4 * timesteps).exp().reshape(-1, 1, 1, 1)
    output = prediction_target(scheduler, x0, noise, timesteps)
    assert verify(scheduler, output, timesteps, noisy, x0) < 1e-5
    perfect = scheduler.precondition_outputs(noisy, output, sigmas)
    with pytest.raises(ValueError, match="this is x0, not the network's own output"):
        verify(scheduler, perfect, timesteps, noisy, x0)


@pytest.mark.parametrize("scheduler", [NOISE, VELOCITY, EULER, FLOW], ids=lambda scheduler: type(scheduler).__name__)
def test_half_precision_is_seen_in_values_that_were_made_float32_again(scheduler):
    """The scripts work in bfloat16 and take the loss in float32."""
    for seed, t in enumerate((1, 20, 300)):
        loop = Loop(scheduler, seed, torch.full((2,), t))
        x0, noise = loop.x0.bfloat16(), loop.noise.bfloat16()
        x_t = add_noise(scheduler, x0, noise, loop.t).bfloat16().float()
        target = prediction_target(scheduler, x0, noise, loop.t).bfloat16().float()
        assert loop.verify(target, x_t=x_t, x0=x0.float()) < 0.01
        assert verify(scheduler, None, loop.t, x_t, x0.float(), x0_hat=x0.float()) < 0.01
        check_noisy_samples(scheduler, loop.t, x_t, x0.float(), noise.float())


# Wrong

REVERSED, DIVIDED, SIGMAS = "time reversed", "timesteps look divided by 1000", "timesteps are sigmas"
WRONG = {
    # what is handed over
    "x0 for flow": (FLOW, "this is x0, not the velocity", lambda loop: loop.verify(loop.x0)),
    "x0 for v": (VELOCITY, "this is x0, not the velocity", lambda loop: loop.verify(loop.x0)),
    "x0 for noise": (NOISE, "this is x0, not the noise", lambda loop: loop.verify(loop.x0)),
    "x0 for Euler": (EULER, "this is x0, not the noise", lambda loop: loop.verify(loop.x0)),
    "x0 for EDM": (EDM, "this is x0, not the network's own output", lambda loop: loop.verify(loop.x0)),
    "preconditioned": (
        SHIFTED,
        "this is x0, not the velocity",
        lambda loop: loop.verify(loop.x_t - (loop.t / 1000).reshape(-1, 1, 1, 1) * loop.target),
    ),
    "noise for flow": (FLOW, "this is the noise, not the velocity", lambda loop: loop.verify(loop.noise)),
    "noise for v": (VELOCITY, "this is the noise, not the velocity", lambda loop: loop.verify(loop.noise)),
    "noise for x0": (IMAGE, "this is the noise, not x0", lambda loop: loop.verify(loop.noise)),
    "noise for EDM": (EDM, "this is the noise, not the network's own", lambda loop: loop.verify(loop.noise)),
    "v for noise": (NOISE, "this is the velocity, not the noise", lambda loop: loop.verify(velocity_of(loop))),
    "v for x0": (IMAGE, "this is the velocity, not x0", lambda loop: loop.verify(velocity_of(loop))),
    "flow for v": (
        VELOCITY,
        "this is the velocity eps - x0, not the velocity alpha eps - sigma x0",
        lambda loop: loop.verify(loop.noise - loop.x0),
    ),
    "velocity as x0_hat": (
        FLOW,
        "this is the velocity, not x0",
        lambda loop: quietly(verify, FLOW, None, loop.t, loop.x_t, loop.x0, x0_hat=loop.target),
    ),
    # sign and time
    "sign": (FLOW, "^sign reversed: pass -model_output", lambda loop: loop.verify(-loop.target)),
    "sign of v": (VELOCITY, "^sign reversed", lambda loop: loop.verify(-loop.target)),
    "time": (FLOW, REVERSED, lambda loop: loop.verify(t=1000 - loop.t)),
    "time of noise": (NOISE, REVERSED, lambda loop: loop.verify(t=999 - loop.t)),
    "sign and time": (
        FLOW,
        "sign and time reversed",
        lambda loop: loop.verify(-loop.target, 1000 - loop.t),
    ),
    "sign, time and a division": (
        FLOW,
        "sign and time reversed and divided by 1000",
        lambda loop: loop.verify(-loop.target, 1 - loop.t / 1000),
    ),
    "divided": (FLOW, DIVIDED, lambda loop: loop.verify(t=loop.t / 1000)),
    "divided, noise": (NOISE, DIVIDED, lambda loop: loop.verify(t=loop.t / 1000)),
    "divided, v": (VELOCITY, DIVIDED, lambda loop: loop.verify(t=loop.t / 1000)),
    "divided, Euler": (EULER, DIVIDED, lambda loop: loop.verify(t=loop.t / 1000)),
    "places": (
        SHIFTED,
        r"timesteps are places in scheduler\.timesteps: pass scheduler\.timesteps\[timesteps\]",
        lambda loop: loop.verify(t=torch.stack([(SHIFTED.timesteps == t).nonzero()[0, 0] for t in loop.t])),
    ),
    "lacks the shift": (SHIFTED, "timesteps lack the shift of 3", lambda loop: loop.verify(t=unshifted(loop.t))),
    "sigmas, Euler": (EULER, SIGMAS, lambda loop: loop.verify(t=noise_level(EULER, loop.t).sigma)),
    "sigmas, EDM": (EDM, SIGMAS, lambda loop: loop.verify(t=(4 * loop.t).exp())),
    "sigmas, flow": (FLOW, r"sigmas|divided", lambda loop: loop.verify(t=loop.t / 1000)),
    # where an image is handed over, by the size of the noise
    "divided, x0": (IMAGE, DIVIDED, lambda loop: loop.verify(t=loop.t / 1000)),
    "divided, x0_hat": (
        FLOW,
        DIVIDED,
        lambda loop: quietly(verify, FLOW, None, loop.t / 1000, loop.x_t, loop.x0, x0_hat=loop.x0),
    ),
    "time, x0_hat": (
        FLOW,
        REVERSED,
        lambda loop: quietly(verify, FLOW, None, 1000 - far(loop).t, loop.x_t, loop.x0, x0_hat=loop.x0),
    ),
    # x_t and x_0
    "scaled, Euler": (
        EULER,
        "x_t was already scaled for the network",
        lambda loop: loop.verify(x_t=scale_model_input(EULER, loop.x_t, loop.t)),
    ),
    "scaled, Euler v": (
        EULER_V,
        "x_t was already scaled for the network",
        lambda loop: loop.verify(x_t=scale_model_input(EULER_V, loop.x_t, loop.t)),
    ),
    "scaled, EDM": (
        EDM,
        "x_t was already scaled for the network",
        lambda loop: loop.verify(x_t=scale_model_input(EDM, loop.x_t, loop.t)),
    ),
    "another scheduler": (
        NOISE,
        r"x_t is x0 \+ sigma eps, not alpha x0",
        lambda loop: loop.verify(x_t=add_noise(EULER, loop.x0, loop.noise, loop.t)),
    ),
    "scale of the images": (
        FLOW,
        r"another scale than x_t: pass 2 \* original_samples - 1",
        lambda loop: loop.verify(x0=loop.x0 / 2 + 0.5),
    ),
    "fresh noise": (
        FLOW,
        "model_output does not match the noise in x_t",
        lambda loop: loop.verify(torch.randn(loop.x0.shape, generator=torch.Generator().manual_seed(9)) - loop.x0),
    ),
}


def far(loop):
    """The same images at a time that is another one when reversed."""
    loop.t = torch.where((loop.t - 500).abs() < 200, 900.0, loop.t)
    loop.x_t = add_noise(loop.scheduler, loop.x0, loop.noise, loop.t)
    return loop


def velocity_of(loop):
    alpha, sigma = loop.level()
    return alpha * loop.noise - sigma * loop.x0


def unshifted(timesteps):
    sigma = timesteps / 1000
    return 1000 * (sigma / 3) / (1 - sigma * 2 / 3)


@pytest.mark.parametrize("wrong", WRONG)
def test_each_wrong_wiring_is_refused_under_its_name_in_20_of_20_batches(wrong):
    scheduler, name, hand_over = WRONG[wrong]
    for seed in range(20):
        loop = Loop(scheduler, seed)
        with pytest.raises(ValueError, match=name) as error:
            hand_over(loop)
        assert "\n" not in str(error.value)


# What cannot be judged


def test_what_is_missing_or_of_another_shape_is_named():
    loop = Loop(FLOW, 0, torch.tensor([300.0, 600.0]))
    with pytest.raises(ValueError, match="original_samples are missing"):
        verify(FLOW, loop.target, loop.t, loop.x_t)
    with pytest.raises(ValueError, match="sample is missing"):
        verify(FLOW, None, loop.t, None, loop.x0, x0_hat=loop.x0)
    with pytest.raises(ValueError, match=r"original_samples has shape \(2, 3, 8, 8\), sample \(2, 3, 16, 16\)"):
        loop.verify(x0=loop.x0[..., :8, :8])
    with pytest.raises(ValueError, match=r"model_output has shape \(2, 6, 16, 16\), sample"):
        loop.verify(torch.cat([loop.target] * 2, dim=1))
    with pytest.raises(ValueError, match="sample has non-finite values"):
        loop.verify(x_t=loop.x_t / 0)
    with pytest.raises(ValueError, match=r"no usual mistake explains it: .*\(error .* at timestep"):
        loop.verify(torch.randn(loop.x0.shape), x_t=torch.randn(loop.x0.shape))
    scheduler = diffusers.DDPMScheduler(rescale_betas_zero_snr=True)
    noisy = add_noise(scheduler, loop.x0, loop.noise, loop.t.long())
    with pytest.raises(ValueError, match="cannot give x0_hat with zero terminal SNR"):
        verify(scheduler, loop.noise, loop.t.long(), noisy, loop.x0)
    with pytest.raises(ValueError, match="in another order than x_t"):
        loop.verify(x0=loop.x0.flip(0))
    with pytest.raises(ValueError, match=r"another noise level .* at timestep 300 it is 0\.2 x0 \+ 0\.8 model_output"):
        noisy = 0.2 * loop.x0 + 0.8 * loop.noise
        verify(NOISE, loop.noise, loop.t.long(), noisy, loop.x0)


# By itself, at the first call


def first_call(regularization, loop, dtype=torch.float32, **changed):
    parts = {"sample": loop.x_t, "noise": loop.noise, "original_samples": loop.x0, "timesteps": loop.t, **changed}
    timesteps = parts.pop("timesteps")
    sample, noise, original_samples = (parts[name].to(dtype) for name in ("sample", "noise", "original_samples"))
    output = loop.target.to(dtype).clone().requires_grad_()
    result = regularization(output, timesteps, sample, noise=noise, original_samples=original_samples)
    return torch.autograd.grad(result.loss, output)[0]


def with_term(scheduler):
    return X0Regularization(scheduler, [Term(total_variation, 1.0, weighting.constant)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "scheduler", [NOISE, IMAGE, VELOCITY, EULER, EDM, FLOW, SHIFTED], ids=lambda s: type(s).__name__
)
def test_the_first_call_refuses_no_right_loop_and_changes_nothing(scheduler, dtype):
    for seed in range(3):
        loop, regularization = Loop(scheduler, seed), with_term(scheduler)
        random_state = torch.get_rng_state()
        gradients = [first_call(regularization, loop, dtype) for _ in range(2)]
        assert torch.equal(*gradients)  # the second call checks nothing
        assert torch.equal(torch.get_rng_state(), random_state)
        assert regularization.state_dict() == {}


@pytest.mark.parametrize(
    ("scheduler", "message", "changed"),
    [
        (FLOW, "timesteps look divided by 1000", lambda loop: {"timesteps": loop.t[:1] / 1000}),
        (FLOW, "time reversed", lambda loop: {"timesteps": 1000 - loop.t}),
        (EULER, "x_t was already scaled", lambda loop: {"sample": scale_model_input(EULER, loop.x_t, loop.t)}),
        (VELOCITY, "noise does not match the noise in x_t", lambda loop: {"noise": loop.noise.flip(-1)}),
        (VELOCITY, "this is x0, not the noise", lambda loop: {"noise": loop.x0}),
        (VELOCITY, "original_samples are on another scale", lambda loop: {"original_samples": loop.x0 / 0.18215}),
    ],
)
def test_the_first_call_refuses_noisy_images_that_are_not_made_of_what_was_given(scheduler, message, changed):
    t = torch.tensor([300.0, 200.0]) if scheduler is FLOW else torch.tensor([300, 200])
    loop = Loop(scheduler, 0, t)
    wrong = changed(loop)
    if len(wrong.get("timesteps", t)) < len(t):
        loop = Loop(scheduler, 0, t[:1])
    regularization = with_term(scheduler)
    with pytest.raises(ValueError, match=message) as error:
        first_call(regularization, loop, **wrong)
    assert str(error.value).startswith("sample is not alpha original_samples + sigma noise: ")
    with pytest.raises(ValueError, match=message):  # and again, where the loop goes on
        first_call(regularization, loop, **wrong)


def test_the_check_of_the_first_call_waits_for_an_image_that_shows_something():
    regularization = with_term(NOISE)
    noisy, clear = Loop(NOISE, 0, torch.tensor([950, 999])), Loop(NOISE, 1, torch.tensor([300, 200]))
    first_call(regularization, noisy, noise=noisy.noise.flip(-1))
    with pytest.raises(ValueError, match="noise does not match the noise in x_t"):
        first_call(regularization, clear, noise=clear.noise.flip(-1))
    first_call(with_term(NOISE), clear, sample=clear.x_t * torch.nan)  # a broken batch is not of this check
    first_call(regularization, clear)
    first_call(regularization, clear, noise=clear.noise.flip(-1))  # checked once


def test_images_that_are_masked_out_or_of_another_kind_are_not_checked():
    loop = Loop(NOISE, 0, torch.tensor([300, 200]))
    sample = torch.stack([loop.x_t[0], torch.zeros_like(loop.x_t[1])])
    mask = torch.tensor([True, False])
    with_term(NOISE)(loop.target, loop.t, sample, noise=loop.noise, original_samples=loop.x0, image_mask=mask)
    larger = torch.zeros(2, 3, 64, 64)  # pictures beside latents
    with_term(NOISE)(loop.target, loop.t, loop.x_t, noise=loop.noise, original_samples=larger)


def test_black_and_white_images_are_not_taken_for_rounded_ones():
    # Half precision holds -1 and 1 exactly. Taken for rounding, it hid timesteps that are off by one.
    loop = Loop(NOISE, seed=0, timesteps=torch.tensor([2, 50, 200]))
    x0 = loop.x0.sign()
    sample = add_noise(NOISE, x0, loop.noise, loop.t)
    assert verify(NOISE, loop.noise, loop.t, sample, x0) < 1e-6
    with pytest.raises(ValueError, match="timesteps are too large by 1"):
        verify(NOISE, loop.noise, loop.t + 1, sample, x0)


def test_noise_of_another_shape_than_the_noisy_images_is_refused():
    loop = Loop(NOISE, seed=0, timesteps=torch.tensor([2, 50, 200]))
    sample = add_noise(NOISE, loop.x0, loop.noise, loop.t)
    loss = X0Regularization(NOISE, [Term(total_variation, 0.1)])
    with pytest.raises(ValueError, match=r"noise has shape \(1, 3, 16, 16\), sample \(3, 3, 16, 16\)"):
        loss(loop.noise, loop.t, sample, noise=loop.noise[:1], original_samples=loop.x0)
