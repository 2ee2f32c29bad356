"""A schedule of fewer noise levels than the usual number of steps: capped in one line, and no traceback."""

import json
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from reg_diffusers import RegDDPMPipeline
from reg_diffusers.cli import main
from reg_diffusers.hub.card import model_card
from reg_diffusers.sampling.inference_steps import available_steps

pytestmark = pytest.mark.training


@pytest.mark.parametrize("kind", [DDPMScheduler, FlowMatchEulerDiscreteScheduler])
def test_steps_are_capped_at_the_noise_levels_of_the_schedule(kind):
    told = []
    steps = [available_steps(kind(num_train_timesteps=40), steps, told.append) for steps in (1, 40, 41, 1000)]
    assert steps == [1, 40, 40, 40]
    assert told == [
        f"num_inference_steps {steps}: the schedule has only 40 noise levels; using 40 steps" for steps in (41, 1000)
    ]


@pytest.mark.parametrize("kind", [(), ("--prediction_type", "flow_prediction")])
def test_a_short_schedule_trains_previews_compares_samples_and_is_evaluated(train, capsys, kind):
    flags = ("--ddpm_num_steps", 4, "--ddpm_num_inference_steps", 50, "--max_train_steps", 2, "--preview_steps", 1)
    out = train(*flags, "--compare", *kind)
    line = "--ddpm_num_inference_steps 50: the schedule has only 4 noise levels; using 4 steps"
    assert capsys.readouterr().err.count(line) == 1
    assert len(list((out / "samples").iterdir())) == 2
    assert json.loads((out / "comparison.json").read_text())["num_inference_steps"] == 4

    pipeline = RegDDPMPipeline.from_pretrained(str(out))
    pipeline(batch_size=1, output_type="np")  # its default is 1,000 steps
    assert pipeline.scheduler.num_inference_steps == 4
    (out / "comparison.json").unlink()
    assert "pipeline(num_inference_steps=4)" in model_card(out, "me/mine").text

    for command in (["evaluate", "--features", "pixels"], ["sample"]):
        for state in (AcceleratorState, PartialState, GradientState):
            state._reset_state()
        main([*command, "--model", str(out), "--num_images", "20", "--num_threads", "1", "--output", command[0]])
    evaluated, sampled = (
        json.loads(Path(name).read_text())
        for name in ("evaluate/evaluation_settings.json", "sample/sample_settings.json")
    )
    assert evaluated["models"]["out"]["num_inference_steps"] == sampled["num_inference_steps"] == 4
