"""The affine map between model output and image agrees with diffusers and with its own algebra.

The oracle is diffusers itself, image by image and one timestep at a time: `step` for the schedulers that return
`pred_original_sample`, the stored data predictions of the multistep solvers for the others.
"""

import pickle
from functools import partial

import diffusers
import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DOutput

from reg_diffusers.prediction import (
    add_noise,
    noise_level,
    predict_original_sample,
    prediction_target,
    prediction_type,
    scale_model_input,
)

pytestmark = pytest.mark.loss

THREE_TYPES = ("epsilon", "sample", "v_prediction")
NO_CLIPPING = {"clip_sample": False}
KARRAS = {"use_karras_sigmas": True}
SHORT = {"num_train_timesteps": 100}  # for schedulers that are slow to make
ZERO_SNR = {"rescale_betas_zero_snr": True}

VARIANCE_PRESERVING = [
    *(("DDPMScheduler", {**NO_CLIPPING, "prediction_type": kind}) for kind in THREE_TYPES),
    *(("DDPMParallelScheduler", {**NO_CLIPPING, "prediction_type": kind}) for kind in THREE_TYPES),
    *(("DDIMScheduler", {**NO_CLIPPING, "prediction_type": kind}) for kind in THREE_TYPES),
    *(("DDIMParallelScheduler", {**NO_CLIPPING, "prediction_type": kind}) for kind in THREE_TYPES),
    *(("DDIMInverseScheduler", {**NO_CLIPPING, "prediction_type": kind}) for kind in THREE_TYPES),
    *(("CogVideoXDDIMScheduler", {**NO_CLIPPING, "prediction_type": kind}) for kind in THREE_TYPES),
    *(("UnCLIPScheduler", {**NO_CLIPPING, "prediction_type": kind}) for kind in ("epsilon", "sample")),
    ("RePaintScheduler", NO_CLIPPING),
    ("DDPMScheduler", {**NO_CLIPPING, **ZERO_SNR, "prediction_type": "v_prediction"}),
    ("DDIMScheduler", {**NO_CLIPPING, **ZERO_SNR, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}),
    ("DDIMInverseScheduler", {**NO_CLIPPING, "set_alpha_to_one": False}),
    ("DDPMScheduler", {**NO_CLIPPING, "beta_schedule": "squaredcos_cap_v2", "steps_offset": 1}),
]
SIGMA_BASED = [
    *(("EulerDiscreteScheduler", {"prediction_type": kind}) for kind in THREE_TYPES),
    *(("EulerAncestralDiscreteScheduler", {"prediction_type": kind}) for kind in ("epsilon", "v_prediction")),
    *(("HeunDiscreteScheduler", {"prediction_type": kind}) for kind in THREE_TYPES),
    *(("LMSDiscreteScheduler", {"prediction_type": kind}) for kind in THREE_TYPES),
    *(("KDPM2DiscreteScheduler", {**SHORT, "prediction_type": kind}) for kind in ("epsilon", "v_prediction")),
    *(("KDPM2AncestralDiscreteScheduler", {**SHORT, "prediction_type": kind}) for kind in ("epsilon", "v_prediction")),
    *(("EDMEulerScheduler", {"prediction_type": kind}) for kind in ("epsilon", "v_prediction")),
    ("EulerDiscreteScheduler", KARRAS),
    ("EulerDiscreteScheduler", {**KARRAS, "prediction_type": "v_prediction", "timestep_type": "continuous"}),
    ("EulerDiscreteScheduler", {**ZERO_SNR, "timestep_spacing": "trailing"}),
    ("EulerDiscreteScheduler", {"use_exponential_sigmas": True, "timestep_spacing": "leading"}),
    ("HeunDiscreteScheduler", KARRAS),
    ("LMSDiscreteScheduler", KARRAS),
    ("KDPM2DiscreteScheduler", {**SHORT, **KARRAS}),
    ("KDPM2AncestralDiscreteScheduler", {**SHORT, **KARRAS}),
    ("EDMEulerScheduler", {"sigma_schedule": "exponential", "sigma_data": 1.0}),
    ("SCMScheduler", {}),
]
MULTISTEP = [
    (name, {**options, "prediction_type": kind})
    for name in ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler")
    for kind in THREE_TYPES
    for options in ({}, KARRAS)
] + [
    (
        "DPMSolverMultistepScheduler",
        {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0},
    ),
    ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}),
    ("DPMSolverSinglestepScheduler", {"prediction_type": "v_prediction"}),
    ("SASolverScheduler", {"prediction_type": "epsilon"}),
]
# One scheduler of each family and parameterization as it is used in training, with timesteps from end to end.
INTEGER_TIMESTEPS = (0, 1, 420, 999)
TRAINING = [
    *(("DDPMScheduler", {"prediction_type": kind}, INTEGER_TIMESTEPS) for kind in THREE_TYPES),
    *(("EulerDiscreteScheduler", {"prediction_type": kind}, INTEGER_TIMESTEPS) for kind in THREE_TYPES),
    ("CogVideoXDDIMScheduler", {"prediction_type": "v_prediction"}, INTEGER_TIMESTEPS),
    ("UniPCMultistepScheduler", {"prediction_type": "epsilon"}, INTEGER_TIMESTEPS),
    ("DPMSolverMultistepScheduler", {"prediction_type": "v_prediction"}, INTEGER_TIMESTEPS),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, (50.0, 117.5, 500.0, 1000.0)),
    *(
        ("EDMEulerScheduler", {"prediction_type": kind}, (-1.5, -0.2, 0.0, 1.0))
        for kind in ("epsilon", "v_prediction")
    ),
    ("SCMScheduler", {}, (0.01, 0.5, 1.3, 1.57)),
]


def make(name, options):
    return getattr(diffusers, name)(**options)


def schedule(scheduler):
    """Sets a short sampling schedule and returns the timesteps at which `step` may be called."""
    if isinstance(scheduler, diffusers.RePaintScheduler):
        scheduler.set_timesteps(6, jump_length=2, jump_n_sample=2)
    else:
        scheduler.set_timesteps(2 if isinstance(scheduler, diffusers.SCMScheduler) else 8)
    return scheduler.timesteps[:-1] if isinstance(scheduler, diffusers.SCMScheduler) else scheduler.timesteps


def random_images(*shape, seed=0, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def steps_one_by_one(scheduler, timesteps, model_output, sample):
    """x0_hat by the scheduler's own `step`: a loop over images with one timestep each."""
    step = scheduler.step
    if isinstance(scheduler, diffusers.RePaintScheduler):
        step = partial(step, original_image=sample[:1], mask=torch.ones_like(sample[:1]))
    results = []
    for i, t in enumerate(timesteps):
        if hasattr(scheduler, "scale_model_input"):  # without it Euler's `step` warns
            scheduler.scale_model_input(sample[i : i + 1], t)
        results.append(step(model_output[i : i + 1], t, sample[i : i + 1]).pred_original_sample)
    return torch.cat(results)


def assert_close_per_image(actual, expected, tolerance):
    error = (actual - expected).flatten(1).abs().amax(1)
    size = expected.flatten(1).abs().amax(1)
    assert expected.isfinite().all()
    assert (error <= tolerance * size).all(), (error / size).tolist()


@pytest.mark.parametrize(("name", "options"), VARIANCE_PRESERVING, ids=str)
def test_a_batch_equals_step_image_by_image_for_variance_preserving_schedulers(name, options):
    scheduler = make(name, options)
    timesteps = schedule(scheduler)
    assert len(timesteps.unique()) >= 5
    model_output, sample = random_images(2, len(timesteps), 2, 3, 4, scale=3)
    expected = steps_one_by_one(scheduler, timesteps, model_output, sample)
    actual = predict_original_sample(scheduler, model_output, timesteps, sample)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "options"), SIGMA_BASED, ids=str)
def test_a_batch_equals_step_image_by_image_for_sigma_based_schedulers(name, options):
    scheduler = make(name, options)
    timesteps = schedule(scheduler)
    model_output, sample = random_images(2, len(timesteps), 2, 3, 4, scale=3)
    expected = steps_one_by_one(scheduler, timesteps, model_output, sample)
    actual = predict_original_sample(scheduler, model_output, timesteps, sample)
    assert_close_per_image(actual, expected.double(), 1e-6)  # their `step` works in float32


@pytest.mark.parametrize(("name", "options"), MULTISTEP, ids=str)
def test_a_batch_equals_the_data_prediction_of_multistep_solvers(name, options):
    scheduler = make(name, options)
    timesteps = schedule(scheduler)
    assert len(timesteps.unique()) == len(timesteps)
    model_output, sample = random_images(2, len(timesteps), 2, 3, 4, scale=3)
    expected = []
    for i, t in enumerate(timesteps):
        scheduler.step(model_output[i : i + 1], t, sample[i : i + 1])
        expected.append(scheduler.model_outputs[-1])  # what convert_model_output made of it
    actual = predict_original_sample(scheduler, model_output, timesteps, sample)
    assert_close_per_image(actual, torch.cat(expected).double(), 1e-6)


def test_a_batch_equals_step_for_the_cogvideox_solver():
    scheduler = diffusers.CogVideoXDPMScheduler(prediction_type="v_prediction", clip_sample=False)
    timesteps = schedule(scheduler)
    model_output, sample = random_images(2, len(timesteps), 2, 3, 4, scale=3)
    expected = [scheduler.step(model_output[i], None, int(t), None, sample[i])[1] for i, t in enumerate(timesteps)]
    actual = predict_original_sample(scheduler, model_output, timesteps, sample)
    torch.testing.assert_close(actual, torch.stack(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", THREE_TYPES)
def test_a_batch_explains_the_step_of_trajectory_consistency_distillation(kind):
    """TCD returns x_s at s = (1 - eta) t' instead of x0_hat; with eta = 1 that is x_0 = a_0 x0_hat + s_0 eps_hat."""
    scheduler = diffusers.TCDScheduler(prediction_type=kind)
    timesteps = schedule(scheduler)
    model_output, sample = random_images(2, len(timesteps), 2, 3, 4, scale=3)
    expected = torch.cat(
        [
            scheduler.step(model_output[i : i + 1], t, sample[i : i + 1], eta=1.0).pred_noised_sample
            for i, t in enumerate(timesteps)
        ]
    )
    x0_hat = predict_original_sample(scheduler, model_output, timesteps, sample)
    alpha_bar = scheduler.alphas_cumprod.double()
    alpha, sigma = (part.sqrt().reshape(-1, 1, 1, 1) for part in (alpha_bar[timesteps], 1 - alpha_bar[timesteps]))
    noise_hat = (sample - alpha * x0_hat) / sigma
    assert_close_per_image(alpha_bar[0].sqrt() * x0_hat + (1 - alpha_bar[0]).sqrt() * noise_hat, expected, 1e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"])
def test_flow_matching_subtracts_sigma_times_the_velocity(name, shift):
    scheduler = make(name, {"shift": shift})
    timesteps = schedule(scheduler)
    model_output, sample = random_images(2, len(timesteps), 2, 3, 4, scale=3)
    sigma = scheduler.sigmas[: len(timesteps)].double().reshape(-1, 1, 1, 1)
    actual = predict_original_sample(scheduler, model_output, timesteps, sample)
    assert_close_per_image(actual, sample - sigma * model_output, 1e-6)


def test_one_ideal_denoiser_gives_the_same_image_in_every_parameterization():
    """For Gaussian data of variance c, E[x_0 | x_t] = a c x_t / (a^2 c + s^2), whatever the network predicts of it."""
    timesteps = torch.tensor([1, 100, 420, 700])
    alpha_bar = diffusers.DDPMScheduler().alphas_cumprod[timesteps].double().reshape(-1, 1, 1, 1)
    alpha, sigma, variance = alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), 0.3
    sample = random_images(4, 1, 3, 2)
    ideal = alpha * variance * sample / (alpha**2 * variance + sigma**2)
    noise = (sample - alpha * ideal) / sigma
    outputs = {"epsilon": noise, "sample": ideal, "v_prediction": alpha * noise - sigma * ideal}
    for kind, output in outputs.items():
        preserving = diffusers.DDPMScheduler(prediction_type=kind)
        exploding = diffusers.EulerDiscreteScheduler(prediction_type=kind)
        for scheduler, x_t in ((preserving, sample), (exploding, sample / alpha)):
            actual = predict_original_sample(scheduler, output, timesteps, x_t)
            torch.testing.assert_close(actual, ideal, rtol=0, atol=2e-6)
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    flow_timesteps = 1000 * (sigma / (alpha + sigma)).flatten()
    actual = predict_original_sample(flow, noise - ideal, flow_timesteps, sample / (alpha + sigma))
    torch.testing.assert_close(actual, ideal, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("name", "options", "timesteps"), TRAINING, ids=str)
def test_the_target_stands_for_the_original_image(name, options, timesteps):
    scheduler, timesteps = make(name, options), torch.tensor(timesteps)
    original, noise = random_images(2, 4, 2, 3, 3)
    sample = add_noise(scheduler, original, noise, timesteps)
    target = prediction_target(scheduler, original, noise, timesteps)
    actual = predict_original_sample(scheduler, target, timesteps, sample)
    torch.testing.assert_close(actual, original, rtol=0, atol=1e-6)  # alpha and sigma are float32 numbers


@pytest.mark.parametrize(("name", "options", "timesteps"), TRAINING, ids=str)
def test_denoising_weight_converts_the_loss_to_x0_units(name, options, timesteps):
    """||o - target||^2 = w_d ||x0_hat - x_0||^2 for any output o: the definition of w_d."""
    scheduler, timesteps = make(name, options), torch.tensor(timesteps)
    original, noise, output = random_images(3, 4, 2, 3, 3)
    sample = add_noise(scheduler, original, noise, timesteps)
    target = prediction_target(scheduler, original, noise, timesteps)
    x0_hat = predict_original_sample(scheduler, output, timesteps, sample)
    in_output_units = (output - target).square().flatten(1).sum(1)
    in_x0_units = (x0_hat - original).square().flatten(1).sum(1)
    weight = noise_level(scheduler, timesteps).denoising_weight.double()
    torch.testing.assert_close(weight * in_x0_units, in_output_units, rtol=2e-6, atol=0)


@pytest.mark.parametrize(("name", "options", "timesteps"), TRAINING, ids=str)
def test_noise_level_describes_add_noise(name, options, timesteps):
    scheduler, timesteps = make(name, options), torch.tensor(timesteps)
    level = noise_level(scheduler, timesteps)
    for field in (level.timesteps, level.alpha, level.sigma, level.snr, level.denoising_weight):
        assert field.dtype == torch.float32
        assert field.shape == (4,)
    torch.testing.assert_close(level.timesteps, timesteps.float())
    torch.testing.assert_close(level.snr, level.alpha**2 / level.sigma**2)
    one, zero = torch.ones(4, 1), torch.zeros(4, 1)
    torch.testing.assert_close(add_noise(scheduler, one, zero, timesteps).flatten(), level.alpha, rtol=0, atol=0)
    torch.testing.assert_close(add_noise(scheduler, zero, one, timesteps).flatten(), level.sigma, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("kind", "weight_of_snr"),
    [("epsilon", lambda snr: snr), ("sample", torch.ones_like), ("v_prediction", lambda snr: snr + 1)],
)
def test_denoising_weight_has_its_closed_form(kind, weight_of_snr):
    scheduler = diffusers.DDPMScheduler(prediction_type=kind)
    alpha_bar = scheduler.alphas_cumprod
    snr = alpha_bar / (1 - alpha_bar)
    level = noise_level(scheduler, torch.arange(1000))
    torch.testing.assert_close(level.snr, snr)
    torch.testing.assert_close(level.denoising_weight, weight_of_snr(snr))


def test_noise_prediction_amplifies_the_gradient_at_high_noise():
    """d x0_hat / d eps_hat = -s/a: 157 at the last step of the linear DDPM schedule, where 1/SNR is 2.5e4."""
    scheduler = diffusers.DDPMScheduler()
    output = torch.zeros(1, 1, 1, 1, requires_grad=True)
    predict_original_sample(scheduler, output, 999, torch.zeros(1, 1, 1, 1)).sum().backward()
    assert output.grad.item() == pytest.approx(-157, abs=0.5)
    assert 1 / noise_level(scheduler, 999).snr.item() == pytest.approx(2.5e4, rel=0.02)
    cosine = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    assert 1 / noise_level(cosine, 999).snr.item() == pytest.approx(4e8, rel=0.1)


@pytest.mark.parametrize(
    ("name", "timesteps"),
    [
        *((name, INTEGER_TIMESTEPS) for name in ("DDPMScheduler", "DDPMParallelScheduler", "DDIMScheduler")),
        *((name, INTEGER_TIMESTEPS) for name in ("DDIMParallelScheduler", "CogVideoXDDIMScheduler", "TCDScheduler")),
        ("UnCLIPScheduler", INTEGER_TIMESTEPS),
    ],
)
def test_add_noise_equals_the_schedulers_bit_for_bit_where_its_table_is_exact(name, timesteps):
    scheduler, timesteps = make(name, {}), torch.tensor(timesteps)
    original, noise = random_images(2, 4, 1, 3, 2).float()
    tolerance = 1e-6 if name == "CogVideoXDDIMScheduler" else 0  # it rounds a float64 table before the root
    torch.testing.assert_close(
        add_noise(scheduler, original, noise, timesteps),
        scheduler.add_noise(original, noise, timesteps),
        rtol=tolerance,
        atol=tolerance,
    )


@pytest.mark.parametrize("steps", [None, 8])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("EulerDiscreteScheduler", {}),
        ("EulerDiscreteScheduler", KARRAS),
        ("EulerDiscreteScheduler", {"timestep_type": "continuous", "prediction_type": "v_prediction"}),
        ("EulerAncestralDiscreteScheduler", {}),
        ("HeunDiscreteScheduler", {}),
        ("LMSDiscreteScheduler", {}),
        ("KDPM2DiscreteScheduler", SHORT),
        ("KDPM2AncestralDiscreteScheduler", SHORT),
        ("EDMEulerScheduler", {}),
    ],
    ids=str,
)
def test_add_noise_equals_the_schedulers_on_sigma_schedules(name, options, steps):
    scheduler = make(name, options)
    if steps is not None:
        scheduler.set_timesteps(steps)
    order = getattr(scheduler, "order", 1)  # at inner evaluations of second-order solvers no noise is added
    outer = scheduler.timesteps[::order]
    timesteps = outer[[0, 1, len(outer) // 2, -1]]
    original, noise = random_images(2, 4, 1, 3, 2).float()
    expected = scheduler.add_noise(original, noise, timesteps)
    assert_close_per_image(add_noise(scheduler, original, noise, timesteps), expected, 1e-6)


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DDIMInverseScheduler"])
def test_solvers_and_their_training_schedule_share_one_table(name):
    timesteps = torch.tensor(INTEGER_TIMESTEPS)
    original, noise = random_images(2, 4, 1, 3, 2).float()
    trained = diffusers.DDPMScheduler().add_noise(original, noise, timesteps)
    assert torch.equal(add_noise(make(name, {}), original, noise, timesteps), trained)


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_add_noise_equals_the_solvers_on_sampling_schedules(name):
    scheduler = make(name, {})
    timesteps = schedule(scheduler)
    original, noise = random_images(2, len(timesteps), 1, 3, 2).float()
    expected = scheduler.add_noise(original, noise, timesteps)
    assert_close_per_image(add_noise(scheduler, original, noise, timesteps), expected, 1e-6)


@pytest.mark.parametrize("steps", [None, 8])
def test_add_noise_equals_scale_noise_of_flow_matching(steps):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    if steps is not None:
        scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps[[0, 1, 4, -1]]
    original, noise = random_images(2, 4, 1, 3, 2).float()
    expected = scheduler.scale_noise(original, timesteps, noise)
    assert_close_per_image(add_noise(scheduler, original, noise, timesteps), expected, 1e-6)


@pytest.mark.parametrize(("name", "options"), [*VARIANCE_PRESERVING[::4], *SIGMA_BASED[:-1], *MULTISTEP[::4]], ids=str)
def test_scale_model_input_equals_the_schedulers(name, options):
    scheduler = make(name, options)
    timesteps = schedule(scheduler)
    if scheduler.order == 2:  # `scale_model_input` of an inner evaluation depends on the state that `step` leaves
        timesteps = timesteps[::2]
    sample = random_images(len(timesteps), 2, 3, 4)
    expected = []
    for i, t in enumerate(timesteps):
        scheduler.set_timesteps(scheduler.num_inference_steps)
        expected.append(scheduler.scale_model_input(sample[i : i + 1], t))
    assert_close_per_image(scale_model_input(scheduler, sample, timesteps), torch.cat(expected), 1e-6)


@pytest.mark.parametrize(("name", "options", "timesteps"), TRAINING, ids=str)
def test_a_scalar_timestep_counts_for_the_whole_batch(name, options, timesteps):
    scheduler, t = make(name, options), timesteps[1]
    output, sample = random_images(2, 3, 2, 3, 3)
    repeated = torch.tensor([t] * 3)
    expected = predict_original_sample(scheduler, output, repeated, sample)
    for scalar in (t, torch.tensor(t), torch.tensor([t])):
        assert torch.equal(predict_original_sample(scheduler, output, scalar, sample), expected)
    assert torch.equal(add_noise(scheduler, sample, output, t), add_noise(scheduler, sample, output, repeated))
    assert torch.equal(scale_model_input(scheduler, sample, t), scale_model_input(scheduler, sample, repeated))
    assert noise_level(scheduler, t).snr.shape == (1,)


@pytest.mark.parametrize("shape", [(4, 6), (4, 2, 3), (4, 1, 2, 3, 1)])
@pytest.mark.parametrize(("name", "options", "timesteps"), TRAINING[::3], ids=str)
def test_any_rank_of_sample(name, options, timesteps, shape):
    scheduler, timesteps = make(name, options), torch.tensor(timesteps)
    output, sample = random_images(2, 4, 1, 2, 3)
    expected = predict_original_sample(scheduler, output, timesteps, sample).reshape(shape)
    actual = predict_original_sample(scheduler, output.reshape(shape), timesteps, sample.reshape(shape))
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("kind", THREE_TYPES)
@pytest.mark.parametrize(
    ("output_dtype", "sample_dtype", "expected"),
    [
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float16, torch.float32, torch.float32),
        (torch.float32, torch.float32, torch.float32),
        (torch.float64, torch.float32, torch.float64),
        (torch.bfloat16, torch.float64, torch.float64),
    ],
)
def test_the_result_has_at_least_single_precision(kind, output_dtype, sample_dtype, expected):
    scheduler = diffusers.DDPMScheduler(prediction_type=kind)
    output, sample = random_images(2, 4, 1, 2, 3)
    output, sample, timesteps = output.to(output_dtype), sample.to(sample_dtype), torch.tensor(INTEGER_TIMESTEPS)
    actual = predict_original_sample(scheduler, output, timesteps, sample)
    assert actual.dtype == expected
    exact = predict_original_sample(scheduler, output.double(), timesteps, sample.double())
    assert_close_per_image(actual.double(), exact, 1e-6)  # the arithmetic too, not only the result's type


@pytest.mark.parametrize(("name", "options", "timesteps"), TRAINING, ids=str)
def test_differentiable_in_output_and_sample(name, options, timesteps):
    scheduler, timesteps = make(name, options), torch.tensor(timesteps[2:])
    output, sample = random_images(2, 2, 1, 2, 1)
    function = partial(_predict, scheduler, timesteps)
    assert torch.autograd.gradcheck(function, (output.requires_grad_(), sample.requires_grad_()))


def _predict(scheduler, timesteps, output, sample):
    return predict_original_sample(scheduler, output, timesteps, sample)


@pytest.mark.parametrize(("name", "options"), [*VARIANCE_PRESERVING[::3], *SIGMA_BASED[::3], *MULTISTEP[::6]], ids=str)
def test_no_random_numbers_are_drawn_and_no_state_is_changed(name, options):
    scheduler = make(name, options)
    timesteps = schedule(scheduler)
    output, sample = random_images(2, len(timesteps), 1, 2, 2)
    random_state, scheduler_state = torch.get_rng_state(), pickle.dumps(vars(scheduler))
    predict_original_sample(scheduler, output, timesteps, sample)
    prediction_target(scheduler, output, sample, timesteps)
    add_noise(scheduler, output, sample, timesteps)
    scale_model_input(scheduler, sample, timesteps)
    noise_level(scheduler, timesteps)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert pickle.dumps(vars(scheduler)) == scheduler_state


@pytest.mark.parametrize("name", ["DDPMScheduler", "UnCLIPScheduler"])
def test_a_learned_variance_is_left_out(name):
    scheduler = make(name, {"variance_type": "learned_range", **NO_CLIPPING})
    timesteps = schedule(scheduler)
    output, sample = random_images(len(timesteps), 4, 3, 3), random_images(len(timesteps), 2, 3, 3, seed=1)
    expected = steps_one_by_one(scheduler, timesteps, output, sample)
    torch.testing.assert_close(
        predict_original_sample(scheduler, output, timesteps, sample), expected, rtol=1e-12, atol=1e-12
    )
    with pytest.raises(ValueError, match="shape"):
        predict_original_sample(diffusers.DDPMScheduler(), output, timesteps, sample)


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.DDPMScheduler(**ZERO_SNR),
        diffusers.DDIMScheduler(**ZERO_SNR),
        diffusers.DDPMScheduler(num_train_timesteps=3, trained_betas=[0.1, 0.5, 1.0]),
    ],
)
def test_noise_prediction_with_zero_terminal_snr_names_the_fix(scheduler):
    sample = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match=r"v_prediction.*rescale_betas_zero_snr"):
        predict_original_sample(scheduler, sample, 0, sample)


def test_v_prediction_works_at_zero_terminal_snr():
    """There x_t is pure noise, v = -x_0 and therefore x0_hat = -o."""
    scheduler = diffusers.DDPMScheduler(**ZERO_SNR, prediction_type="v_prediction")
    output, sample = random_images(2, 1, 1, 2, 2)
    assert torch.equal(predict_original_sample(scheduler, output, 999, sample), -output)
    level = noise_level(scheduler, 999)
    assert (level.alpha.item(), level.sigma.item(), level.snr.item(), level.denoising_weight.item()) == (0, 1, 0, 1)


@pytest.mark.parametrize("function", [predict_original_sample, prediction_target, add_noise])
def test_a_wrong_number_of_timesteps_is_refused(function):
    scheduler = diffusers.DDPMScheduler(prediction_type="v_prediction")
    image, timesteps = torch.zeros(3, 1, 2, 2), torch.tensor([1, 2])
    between = (timesteps, image) if function is predict_original_sample else (image, timesteps)
    with pytest.raises(ValueError, match="2 timesteps for a batch of 3"):
        function(scheduler, image, *between)


@pytest.mark.parametrize("kind", THREE_TYPES)
@pytest.mark.parametrize("shape", [(3, 1, 2, 1), (3, 1, 2), (1, 1, 2, 2), (3, 2, 2, 2)])
def test_an_output_of_another_shape_than_the_sample_is_refused(kind, shape):
    scheduler = diffusers.DDPMScheduler(prediction_type=kind)
    with pytest.raises(ValueError, match=r"model_output has shape .*, sample \(3, 1, 2, 2\)"):
        predict_original_sample(scheduler, torch.zeros(shape), torch.arange(3), torch.zeros(3, 1, 2, 2))


def test_outputs_of_networks_are_understood_and_other_things_named():
    scheduler, timesteps = diffusers.DDPMScheduler(), torch.arange(3)
    output, sample = random_images(2, 3, 1, 2, 2)
    expected = predict_original_sample(scheduler, output, timesteps, sample)
    for wrapped in ((output,), [output], UNet2DOutput(sample=output)):
        assert torch.equal(predict_original_sample(scheduler, wrapped, timesteps, sample), expected)
    with pytest.raises(TypeError, match=r"list of 3 tensors: pass torch.stack\(model_output\)"):
        predict_original_sample(scheduler, list(output), timesteps, sample)
    with pytest.raises(TypeError, match="must be a tensor, a tuple with one first, or a diffusers output, not dict"):
        predict_original_sample(scheduler, {"sample": output}, timesteps, sample)


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        (diffusers.DDPMScheduler(), "epsilon"),
        (diffusers.RePaintScheduler(), "epsilon"),
        (diffusers.EulerDiscreteScheduler(prediction_type="original_sample"), "sample"),
        (diffusers.FlowMatchEulerDiscreteScheduler(), "flow_prediction"),
        (diffusers.SCMScheduler(), "trigflow"),
    ],
)
def test_prediction_type_is_read_from_the_scheduler(scheduler, expected):
    assert prediction_type(scheduler) == expected


def test_an_unknown_prediction_type_lists_the_known():
    with pytest.raises(ValueError, match=r"'x_prediction' of DDPMScheduler .* epsilon, sample, v_prediction"):
        prediction_type(diffusers.DDPMScheduler(prediction_type="x_prediction"))
