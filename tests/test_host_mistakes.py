"""What a person would write first in a loop of each kind, and get wrong: refused, in words that name the mistake."""

import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from reg_diffusers import AffineSchedule, Term, X0Regularization
from reg_diffusers.regularizers import total_variation

sys.path.insert(0, str(Path(__file__).parents[1] / "docs" / "benchmarks"))
import host_loops
import hosts

pytestmark = pytest.mark.loss


def checked(step, **changed):
    """Checks a step by `verify`, with some arguments replaced, and a scheduler of its own."""
    scheduler = changed.pop("scheduler", step.scheduler)
    arguments = {**step.of_verify(), **changed}
    if "x0_hat" in changed:
        arguments.pop("model_output", None)
    if "model_output" in changed:
        arguments.pop("x0_hat", None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return X0Regularization(scheduler, [Term(total_variation, weight=0.1)]).verify(**arguments)


PERTURBED = "model_output does not match the noise in x_t"


def flow(shift=1.0):
    return FlowMatchEulerDiscreteScheduler(shift=shift)


def unshifted(sigma, shift=3.0):
    return 1000 * sigma / (shift - (shift - 1) * sigma)


MISTAKES = {
    "the image for the noise": ("eps", "this is x0, not the noise", lambda s: {"model_output": s.original_samples}),
    "the noise for v": ("v", "this is the noise, not the velocity", lambda s: {"model_output": s.local["noise"]}),
    "divided timesteps": ("eps", "divided by 1000", lambda s: {"timesteps": s.arguments["timesteps"] / 1000}),
    "sigma for flow": ("Flux", "divided by 1000", lambda s: {"timesteps": s.local["sigma"]}),
    "tokens": ("Flux", "model_output has shape .*, sample", lambda s: {"model_output": s.local["packed"]}),
    "the noise for flow": (
        "Flux",
        "this is the noise, not the velocity",
        lambda s: {"model_output": s.local["noise"]},
    ),
    "places for flow": (
        "flow, shift 3, mode",
        "places in scheduler.timesteps",
        lambda s: {"timesteps": (s.scheduler.timesteps == s.arguments["timesteps"][:, None]).nonzero()[:, 1]},
    ),
    "places for flow without a shift": (
        "Flux",
        "time reversed: pass 1000 - timesteps",
        lambda s: {"timesteps": (1000 - s.arguments["timesteps"]).round().long()},
    ),
    "without the shift": (
        "flow, shift 3, mode",
        "timesteps lack the shift of 3",
        lambda s: {"timesteps": unshifted(s.local["sigma"])},
    ),
    "converted, but handed over as output": (
        "SD3",
        "this is x0, not the velocity: pass it as x0_hat=",
        lambda s: {"model_output": s.local["image"]},
    ),
    "output, but handed over as x0_hat": (
        "SD3",
        "this is the velocity, not x0: pass it as model_output",
        lambda s: {"x0_hat": s.local["output"]},
    ),
    "scaled input, Euler": (
        "SDXL, EDM style, Euler",
        "x_t was already scaled for the network",
        lambda s: {"model_output": s.local["output"], "sample": s.local["model_input"]},
    ),
    "scaled input, EDM": (
        "SDXL, EDM style, EDM",
        "x_t was already scaled for the network",
        lambda s: {"sample": s.local["model_input"]},
    ),
    "the image of get_velocity as output": (
        "CogVideoX",
        "this is x0, not the velocity",
        lambda s: {"model_output": s.arguments["x0_hat"]},
    ),
    "frames before channels": (
        "CogVideoX",
        "x0_hat has shape .*, sample",
        lambda s: {"x0_hat": s.local["image"]},
    ),
    "Lumina2 as plain flow": (
        "Lumina2",
        "sign and time reversed and divided by 1000",
        lambda s: {"scheduler": flow(6.0)},
    ),
    "the network's time of Z-Image": (
        "Z-Image",
        "time reversed and divided by 1000",
        lambda s: {"timesteps": s.local["network_time"]},
    ),
    "the network's output of Z-Image": ("Z-Image", "^sign reversed", lambda s: {"model_output": s.local["raw"]}),
    "the network's output of HiDream": ("HiDream", "^sign reversed", lambda s: {"model_output": s.local["raw"]}),
    "Ideogram as plain flow": (
        "Ideogram",
        "sign reversed and timesteps look divided by 1000",
        lambda s: {"scheduler": flow()},
    ),
    "the network's time of Ideogram": (
        "Ideogram",
        "time reversed",
        lambda s: {"timesteps": s.local["network_time"]},
    ),
    "SiT as plain flow": (
        "SiT linear, PBFM",
        "sign and time reversed and divided by 1000",
        lambda s: {"scheduler": flow()},
    ),
    "the time of SiT": ("SiT linear, PBFM", "^time reversed", lambda s: {"timesteps": 1 - s.local["t"]}),
    "sign and time of SiT": (
        "SiT GVP",
        "^sign and time reversed",
        lambda s: {"model_output": -s.local["output"], "timesteps": 1 - s.local["t"]},
    ),
    "multiplied time of SiT": (
        "SiT VP",
        "^timesteps look multiplied by 1000",
        lambda s: {"timesteps": 1000 * s.local["t"]},
    ),
    "multiplied time of Ideogram": (  # there alpha is negative, and so was the error
        "Ideogram",
        "^timesteps look multiplied by 1000",
        lambda s: {"timesteps": 1000 * s.local["sigma"]},
    ),
    "the sign of SiT": ("SiT GVP", "^sign reversed", lambda s: {"model_output": -s.arguments["model_output"]}),
    "the noise for SiT": ("SiT VP", "this is the noise, not", lambda s: {"model_output": s.local["noise"]}),
    "c_noise for sigma": (
        "EDM",
        r"timesteps are log\(sigma\) / 4",
        lambda s: {"timesteps": s.local["sigma"].log() / 4},
    ),
    "scaled input, EDM's own": (
        "EDM",
        r"x_t was already scaled for the network: pass x_t before c_in, .* \(sigma\^2 \+ 0.25\)",
        lambda s: {"sample": s.local["x_t"] / (s.local["sigma"] ** 2 + 0.25).sqrt().reshape(-1, 1, 1, 1)},
    ),
    "time of azula": ("azula", "time reversed", lambda s: {"timesteps": 1 - s.local["t"]}),
    "sigma for c_noise": ("k-diffusion", "timesteps are sigmas", lambda s: {"timesteps": s.local["sigma"]}),
    "scaled input, k-diffusion": (
        "k-diffusion",
        "x_t was already scaled for the network",
        lambda s: {"sample": s.local["x_t"] / s.local["variance"].sqrt()},
    ),
    "the noise for a denoiser": ("azula", "this is the noise, not x0", lambda s: {"model_output": s.local["noise"]}),
    "what the network of Elucidated sees": (
        "ElucidatedDiffusion",
        "x_t was already scaled for the network",
        lambda s: {"sample": s.local["model_input"]},
    ),
    "what the inner network of k-diffusion sees": (
        "k-diffusion, Denoiser",
        "timesteps are sigmas and x_t was already scaled for the network",
        lambda s: {"timesteps": s.local["seen_time"], "sample": s.local["model_input"]},
    ),
    "pictures from 0 to 1": (
        "GaussianDiffusion, eps",
        r"another scale than x_t: pass 2 \* original_samples - 1",
        lambda s: {"original_samples": s.local["pictures"]},
    ),
    "Transport as plain flow": (
        "SiT Transport",
        "sign and time reversed and divided by 1000",
        lambda s: {"scheduler": flow()},
    ),
    "half of a batch": (
        "prior preservation",
        "model_output has 32 images, sample 64: .* use image_mask=",
        lambda s: {"model_output": s.local["instance"]},
    ),
    "places for ai-toolkit": (
        "calculate_loss",
        "time reversed: pass 1000 - timesteps",
        lambda s: {"timesteps": s.local["places"]},
    ),
    "counted from 1": (
        "call_dit, compute_loss",
        "timesteps are too large by 1",
        lambda s: {"timesteps": s.local["timesteps"]},
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_first_try_that_is_wrong_is_refused_under_its_name(mistake):
    name, message, change = MISTAKES[mistake]
    step = hosts.step_of(name)
    with pytest.raises(ValueError, match=message) as error:
        checked(step, **change(step))
    assert "\n" not in str(error.value)


def messages():
    """Returns the messages of all first tries."""
    for name, _, change in MISTAKES.values():
        step = hosts.step_of(name)
        with pytest.raises(ValueError) as error:
            checked(step, **change(step))
        yield str(error.value)


def test_the_pages_have_the_messages_of_verify():
    found = [*messages(), PERTURBED]
    for page in sorted(hosts.PAGES.glob("*.md")):
        _, _, table = page.read_text(encoding="utf-8").partition("| wrong | what `verify` says |\n|---|---|\n")
        for row in table.splitlines():
            said = row.split("|")[2].strip()
            parts = [re.escape(part) for part in said.split("...")]
            assert any(re.search(".*".join(parts), message) for message in found), f"{page.name}: {said}"


def test_perturbed_input_is_refused_under_its_name():
    torch.manual_seed(0)
    step = host_loops.ddpm(torch.randn(64, 4, 16, 16))
    perturbed = step.local["noise"] + 0.1 * torch.randn_like(step.local["noise"])
    with pytest.raises(ValueError, match=PERTURBED):
        checked(step, sample=step.scheduler.add_noise(step.original_samples, perturbed, step.arguments["timesteps"]))


def test_a_mask_of_dropped_prompts_must_be_bool():
    step = hosts.step_of("dropped prompts")
    with pytest.raises(ValueError, match="image_mask must be bool"):
        hosts.regularized(step.replaced(image_mask=step.local["is_dropped"].float()))


def test_a_hidden_loop_with_the_network_of_another_scheduler_has_a_loss():
    """The check of the page on hidden loops."""
    torch.manual_seed(0)
    x0 = hosts.images_of(hosts.HOSTS["SiT Transport"], 8)
    perfect = hosts.trainers.Perfect(AffineSchedule(*host_loops.PATHS["linear"], "velocity", sign=-1), x0)
    loss = hosts.trainers.Transport().training_losses(perfect, x0)["loss"].mean()
    assert loss > 1
