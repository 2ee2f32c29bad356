"""What diffusers demands of a pipeline: by its own tests, where they are at hand, and as tests of ours."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, SchedulerMixin, UNet2DModel
from diffusers.callbacks import PipelineCallback

from reg_diffusers import RegDDPMPipeline
from reg_diffusers.regularizers import total_variation

pytestmark = pytest.mark.sampling


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipeline, batch_size=2, steps=6, seed=0, **kwargs):
    kwargs.setdefault("output_type", "np")
    generator = torch.Generator().manual_seed(seed)
    return quiet(pipeline)(batch_size=batch_size, num_inference_steps=steps, generator=generator, **kwargs)


def test_the_tests_of_diffusers_pass(request):
    """They need parameterized and requests-mock beside what a test needs here."""
    folder = request.config.getoption("--diffusers-tests")
    if folder is None:
        pytest.skip("diffusers' own tests of a pipeline: name the folder tests of a clone by --diffusers-tests PATH")
    path = os.pathsep.join([str(Path(folder).resolve().parent), os.environ.get("PYTHONPATH", "")])
    case = Path(__file__).with_name("diffusers_contract.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", str(case)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 20


def test_the_latent_is_the_sample_as_the_last_step_gives_it(tiny_unet):
    """Pictures are clipped to [0, 1] and fields have units; what they are made of is neither."""
    unet, scheduler = tiny_unet(), DDIMScheduler(clip_sample=False)
    latent = sample(RegDDPMPipeline(unet, scheduler), output_type="latent").images
    assert latent.shape == (2, 1, 8, 8) and latent.abs().max() > 1
    pictures = sample(RegDDPMPipeline(unet, scheduler), output_type="pt").images
    assert torch.equal(pictures, (latent / 2 + 0.5).clamp(0, 1))
    field = RegDDPMPipeline(unet, scheduler, {"offset": [280.0], "scale": [20.0]})
    assert torch.equal(sample(field, output_type="latent").images, latent)
    torch.testing.assert_close(sample(field, output_type="pt").images, 280 + 20 * latent)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        *(({"batch_size": size}, "batch_size must be a whole number of at least 1") for size in (0, -1, None, 1.5)),
        *(({"num_inference_steps": steps}, "num_inference_steps must be a whole") for steps in (0, -1, None, 2.5)),
        ({"generator": 0}, "generator must be a torch.Generator or a list of them"),
        ({"generator": [0, 1]}, "generator must be a torch.Generator or a list of them"),
        *(({"generator": [torch.Generator()] * n}, f"a list of {n} for batch_size=2") for n in (0, 1, 3)),
        ({"guidance_scale": 2.0}, "needs a model with class labels or texts: .* is regularizer_scale="),
        ({"negative_prompt": "cat"}, "negative_prompt is for text-to-image pipelines"),
    ],
    ids=lambda value: re.sub(r" at 0x\w+", "", str(value)),  # the same in each process of pytest-xdist
)
def test_arguments_that_cannot_be_meant_are_refused(tiny_unet, argument, message):
    pipeline = RegDDPMPipeline(tiny_unet(), DDIMScheduler())
    with pytest.raises(ValueError, match=message):
        pipeline(**{"batch_size": 2, "num_inference_steps": 2, "output_type": "np", **argument})


def test_an_unknown_argument_is_a_type_error_as_everywhere(tiny_unet):
    with pytest.raises(TypeError, match="unexpected keyword argument 'regulariser'"):
        RegDDPMPipeline(tiny_unet(), DDIMScheduler())(regulariser=[total_variation])


def test_a_pipeline_is_made_from_that_of_diffusers_and_back(tiny_unet):
    theirs = quiet(DDPMPipeline(tiny_unet(), DDPMScheduler()))
    ours = RegDDPMPipeline.from_pipe(theirs)
    assert ours.unet is theirs.unet and ours.config.normalization is None
    assert np.array_equal(sample(ours).images, sample(theirs).images)
    units = {"offset": [280.0], "scale": [20.0]}
    fields = RegDDPMPipeline.from_pipe(theirs, normalization=units)
    back = DDPMPipeline.from_pipe(fields)
    assert back.unet is theirs.unet
    assert RegDDPMPipeline.from_pipe(back).config.normalization == units
    # diffusers 0.35 reads these and cannot read the names of classes.
    parameters = inspect.signature(RegDDPMPipeline.__init__).parameters
    assert parameters["unet"].annotation is UNet2DModel and parameters["scheduler"].annotation is SchedulerMixin


def test_callback_sees_and_replaces_tensors_as_in_diffusers(tiny_unet):
    pipeline = RegDDPMPipeline(tiny_unet(), DDIMScheduler())
    seen = []

    def callback(pipeline, index, timestep, tensors):
        seen.append((index, int(timestep), sorted(tensors)))
        return {"latents": torch.zeros_like(tensors["latents"])} if index == 5 else tensors

    names = ["latents", "model_output", "x0_hat"]
    output = sample(
        pipeline, output_type="pt", callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names
    )
    assert seen == [(i, int(t), sorted(names)) for i, t in enumerate(pipeline.scheduler.timesteps)]
    assert (output.images == 0.5).all()
    for unknown, said in (("noise", "noise not among latents, model_output, x0_hat$"), ("sample", "'latents', as in")):
        with pytest.raises(ValueError, match=said):
            sample(pipeline, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=[unknown])


@pytest.mark.parametrize("name", ["sample", "x0_hat"])
def test_what_a_callback_cannot_replace_is_refused(tiny_unet, name):
    def callback(pipeline, index, timestep, tensors):
        return {name: torch.zeros(2, 1, 8, 8)}

    with pytest.raises(ValueError, match=f"returned '{name}': only 'latents' can be replaced"):
        names = ["latents", "x0_hat"]
        sample(
            RegDDPMPipeline(tiny_unet(), DDIMScheduler()),
            callback_on_step_end=callback,
            callback_on_step_end_tensor_inputs=names,
        )


def test_callback_objects_of_diffusers_bring_their_tensor_names(tiny_unet):
    class Counter(PipelineCallback):
        tensor_inputs = ("x0_hat",)

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            shapes.append(callback_kwargs["x0_hat"].shape)
            return callback_kwargs

    shapes = []
    sample(
        RegDDPMPipeline(tiny_unet(), DDIMScheduler()),
        callback_on_step_end=Counter(cutoff_step_ratio=None, cutoff_step_index=1),
    )
    assert shapes == [(2, 1, 8, 8)] * 6


def test_a_callback_can_end_the_sampling(tiny_unet):
    pipeline = RegDDPMPipeline(tiny_unet(), DDIMScheduler())
    steps = []

    def callback(pipeline, index, timestep, tensors):
        assert not pipeline.interrupt and pipeline.num_timesteps == 6
        steps.append(index)
        pipeline._interrupt = index == 2
        return tensors

    sample(pipeline, callback_on_step_end=callback)
    assert steps == [0, 1, 2] and pipeline.interrupt
    sample(pipeline, callback_on_step_end=callback)  # the next call starts anew
    assert steps == [0, 1, 2] * 2
