"""Timesteps that a scheduler does not count are refused with their likely cause; those that it counts are not."""

from functools import partial
from types import SimpleNamespace

import diffusers
import pytest
import torch

from reg_diffusers import RegularizedLoss, Term, X0Regularization
from reg_diffusers.prediction import (
    add_noise,
    noise_level,
    predict_original_sample,
    prediction_target,
    scale_model_input,
)
from reg_diffusers.regularizers import total_variation
from reg_diffusers.schedule import FirstTimesteps

pytestmark = pytest.mark.loss

FLOW = diffusers.FlowMatchEulerDiscreteScheduler()
DIVIDED = "look divided by 1000"
IMAGES = torch.ones(3, 1, 2, 2)
FUNCTIONS = {
    "noise_level": noise_level,
    "predict_original_sample": lambda scheduler, t: predict_original_sample(scheduler, IMAGES, t, IMAGES),
    "prediction_target": lambda scheduler, t: prediction_target(scheduler, IMAGES, IMAGES, t),
    "add_noise": lambda scheduler, t: add_noise(scheduler, IMAGES, IMAGES, t),
    "scale_model_input": lambda scheduler, t: scale_model_input(scheduler, IMAGES, t),
}
WRONG = [
    (diffusers.DDPMScheduler(), [0.1, 0.5, 0.9], DIVIDED),
    (diffusers.DDPMScheduler(), 0.5, DIVIDED),
    (diffusers.DDPMScheduler(prediction_type="sample"), [-1, 5, 6], "are negative"),
    (diffusers.DDPMScheduler(prediction_type="v_prediction"), [3.0, 50.5, 7.0], "look like sigmas, or lie between"),
    (diffusers.DDPMScheduler(), [3, 1000, 7], "are counted from 1"),
    (diffusers.DDPMScheduler(num_train_timesteps=100), [3, 500, 7], "beyond.*expects integers from 0 to 99"),
    (diffusers.DDPMScheduler(), [3.0, float("nan"), 7.0], "are non-finite"),
    (diffusers.DDPMScheduler(), [True, False, True], "must be numbers"),
    (diffusers.DDPMScheduler(), torch.tensor([3, 503, 7], dtype=torch.bfloat16), "bfloat16"),
    (diffusers.DPMSolverMultistepScheduler(), [3.0, 50.5, 7.0], "look like sigmas"),
    (diffusers.EulerDiscreteScheduler(), [3.0, -0.5, 0.2], r"negative, as log\(sigma\) is"),
    (diffusers.EulerDiscreteScheduler(), [0.3, 0.5, 0.2], DIVIDED),
    (diffusers.EulerDiscreteScheduler(), [3.0, 1001.0, 7.0], "beyond the schedule"),
    (FLOW, [3.0, 1500.0, 7.0], "beyond the schedule.*expects sigma times 1000"),
    (FLOW, [-3.0, 15.0, 7.0], "are negative"),
    (FLOW, [0.2, 0.7, 0.9], DIVIDED + r" \(or are sigmas"),
    (FLOW, 0.7, DIVIDED),
    (diffusers.EDMEulerScheduler(), [3, 500, 7], "look like sigmas or indices"),
    (diffusers.EDMEulerScheduler(), [0.1, 0.5, 14.6], "look like sigmas or indices"),
    (diffusers.SCMScheduler(), [3.0, 500.0, 7.0], "look like indices or sigmas"),
]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(("scheduler", "timesteps", "cause"), WRONG, ids=lambda value: str(value)[:40])
def test_wrong_timesteps_are_refused_with_the_likely_cause(function, scheduler, timesteps, cause):
    with pytest.raises(ValueError, match=cause) as error:
        FUNCTIONS[function](scheduler, torch.as_tensor(timesteps))
    assert "\n" not in str(error.value)


RIGHT = [
    (diffusers.DDPMScheduler(), [0, 999, 5]),
    (diffusers.DDPMScheduler(), [0.0, 999.0, 1.0]),
    (diffusers.DDPMScheduler(), torch.tensor([0, 2, 256], dtype=torch.bfloat16)),
    (diffusers.DDPMScheduler(num_train_timesteps=4000), [0, 3999, 5]),
    (diffusers.EulerDiscreteScheduler(), [0.0, 951.38, 999.0]),
    (diffusers.EulerDiscreteScheduler(), 1000 * torch.tensor([0.999, 0.5, 0.1])),  # 999.00006
    (diffusers.EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"), [-1.5, 0.0, 1.6]),
    (FLOW, [0.0, 1000.0, 0.3]),
    (FLOW, torch.tensor([1, 1000, 500])),
    (FLOW, torch.tensor([0.3])),  # one image in a thousand has it by chance, where t is drawn from all of [0, 1000]
    (FLOW, torch.full((3,), 0.5)),  # one level of a figure
    (FLOW, 1000 * torch.tensor([1 + 1e-7, 0.5, 0.1])),
    (diffusers.EDMEulerScheduler(), [-1.55, 0.0, 1.6]),
    (diffusers.EDMEulerScheduler(), [-float("inf"), 0.0, 1.6]),  # sigma = 0
    (diffusers.SCMScheduler(), [0.0, 0.5, 1.5708]),
]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(("scheduler", "timesteps"), RIGHT, ids=lambda value: str(value)[:40])
def test_what_a_scheduler_counts_is_accepted(function, scheduler, timesteps):
    timesteps = torch.as_tensor(timesteps)
    FUNCTIONS[function](scheduler, timesteps)
    if timesteps.numel() == 3:
        FUNCTIONS[function](scheduler, timesteps.reshape(3, 1, 1, 1))


@pytest.mark.parametrize("steps", [3, 5, 50])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DDPMScheduler", {"timestep_spacing": "trailing"}),
        ("DDIMScheduler", {"steps_offset": 1}),
        ("DDIMInverseScheduler", {"timestep_spacing": "trailing"}),
        ("PNDMScheduler", {"skip_prk_steps": True}),
        ("LCMScheduler", {}),
        ("TCDScheduler", {}),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
        ("EulerDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": 1}),
        ("EulerDiscreteScheduler", {"timestep_type": "continuous", "prediction_type": "v_prediction"}),
        ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing"}),
        ("HeunDiscreteScheduler", {}),
        ("KDPM2DiscreteScheduler", {}),
        ("LMSDiscreteScheduler", {"use_karras_sigmas": True}),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
        ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}),
        ("DPMSolverSinglestepScheduler", {}),
        ("DEISMultistepScheduler", {}),
        (
            "UniPCMultistepScheduler",
            {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 5.0},
        ),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 0.2}),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 12.0, "use_karras_sigmas": True}),
        ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
        ("EDMEulerScheduler", {"sigma_max": 1000.0}),
    ],
    ids=str,
)
def test_every_timestep_that_a_scheduler_samples_at_is_accepted(name, options, steps):
    """Also as the pipeline passes it, alone and as a scalar."""
    scheduler = getattr(diffusers, name)(**options)
    scheduler.set_timesteps(steps)
    noise_level(scheduler, scheduler.timesteps)
    for t in scheduler.timesteps:
        assert noise_level(scheduler, t).sigma.shape == (1,)


def test_fractions_in_the_first_small_batches_are_divided_timesteps():
    images = torch.ones(1, 1, 2, 2)

    def loss():
        return X0Regularization(FLOW, [Term(total_variation, 1.0)])

    def call(loss, *timesteps):
        loss(images.expand(len(timesteps), 1, 2, 2), torch.tensor(timesteps), images.expand(len(timesteps), 1, 2, 2))

    with pytest.raises(ValueError, match=DIVIDED):
        call(loss(), 0.3, 0.7)
    with pytest.raises(ValueError, match=DIVIDED):
        RegularizedLoss(FLOW)(lambda sample, t: sample, images.expand(2, 1, 2, 2), timesteps=torch.tensor([0.3, 0.7]))
    one_by_one = loss()
    call(one_by_one, 0.3)
    call(one_by_one, 0.3)  # a batch that is looked at again
    with pytest.raises(ValueError, match=DIVIDED):
        call(one_by_one, 0.7)
    usual = loss()
    call(usual, 0.3)
    call(usual, 300.0)
    call(usual, 0.3, 0.7)  # by chance


def test_the_first_batch_on_an_accelerator_is_checked_on_the_host():
    """A stand-in for timesteps on a device, which counts its copies: later batches would wait for the device."""
    copies = []

    def on_device(*timesteps):
        copied = lambda: copies.append(timesteps) or torch.tensor(timesteps)  # noqa: E731
        return SimpleNamespace(device=torch.device("cuda"), is_meta=False, is_cuda=False, cpu=copied)

    first = FirstTimesteps()
    with pytest.raises(ValueError, match="timesteps are counted from 1: DDPMScheduler expects integers from 0 to 999"):
        first.check(diffusers.DDPMScheduler(), on_device(1, 1000))
    for later in ((2, 3), (4, 1000)):
        first.check(diffusers.DDPMScheduler(), on_device(*later))
    assert copies == [(1, 1000)]


def test_values_that_cannot_be_read_are_not_looked_at():
    """On an accelerator the look would wait; inside vmap there is nothing to see."""
    wrong = torch.tensor([3, 5000])
    noise_level(diffusers.FlowMatchEulerDiscreteScheduler(), wrong.to("meta"))
    timesteps, images = torch.tensor([3, 500]), torch.ones(2, 1, 1, 2, 2)
    add = partial(add_noise, diffusers.DDPMScheduler())
    actual = torch.vmap(add)(images, images, timesteps)
    assert torch.equal(actual, add(images[:, 0], images[:, 0], timesteps)[:, None])
