"""Settings whose effect is easily overlooked are said in one line; what cannot work names its flag, not L'."""

import json

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel

from reg_diffusers import RegDDPMPipeline, RegularizedLoss
from reg_diffusers.networks.noise_schedule import build_noise_scheduler
from reg_diffusers.settings import DataSettings, LossSettings, ModelSettings, OptimizationSettings
from reg_diffusers.settings.advice import advise, advise_on_warmup
from reg_diffusers.settings.arguments import parse_args
from reg_diffusers.training.terms import build_terms

pytestmark = pytest.mark.training


def advice(capsys, *flags):
    settings = parse_args([*flags, "--regularizer", "none"])
    advise(settings.loss.snr_gamma, build_noise_scheduler(settings.model))
    return capsys.readouterr().err


def test_image_prediction_says_that_another_script_weighs_it_otherwise(capsys):
    told = advice(capsys, "--prediction_type", "sample")
    assert "--prediction_type sample: the denoising loss is ||x0 - x0_hat||^2; train_unconditional.py" in told
    assert told.count("\n") == 1 and "--snr_gamma 1e9" in told
    assert advice(capsys, "--prediction_type", "sample", "--snr_gamma", "1e9") == ""
    assert advice(capsys, "--prediction_type", "epsilon") == advice(capsys) == ""


def test_the_flag_that_it_names_gives_the_weight_alpha_bar_over_1_minus_alpha_bar():
    """Of each image: the loss of diffusers' script with --prediction_type sample."""
    scheduler = DDPMScheduler(prediction_type="sample")
    original_samples, noise = torch.randn(2, 3, 1, 4, 4)
    timesteps = torch.tensor([0, 500, 999])
    output = RegularizedLoss(scheduler, snr_gamma=1e9)(
        lambda sample, timesteps, **_: 0.9 * sample, original_samples, noise=noise, timesteps=timesteps
    )
    alpha_bar = scheduler.alphas_cumprod[timesteps].reshape(-1, 1, 1, 1)
    x0_hat = 0.9 * (alpha_bar.sqrt() * original_samples + (1 - alpha_bar).sqrt() * noise)
    expected = (alpha_bar / (1 - alpha_bar) * (x0_hat - original_samples).square()).mean()
    torch.testing.assert_close(output.loss, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "flags",
    [
        ("--prediction_type", "flow_prediction"),
        ("--prediction_type", "v_prediction", "--rescale_betas_zero_snr"),
    ],
)
def test_min_snr_weight_0_where_sampling_begins_is_said(capsys, flags):
    assert "--snr_gamma: this schedule ends in pure noise" in advice(capsys, *flags, "--snr_gamma", "5")
    assert advice(capsys, *flags) == advice(capsys, "--snr_gamma", "5", "--prediction_type", "v_prediction") == ""


def test_a_warmup_as_long_as_the_training_is_said(train, capsys):
    train("--max_train_steps", 3, "--lr_warmup_steps", 500, "--learning_rate", 1e-4)
    expected = "the training has 3 steps, so the learning rate only rises to 6e-07 of 0.0001: pass --lr_warmup_steps 0"
    assert capsys.readouterr().err.count(f"--lr_warmup_steps 500: {expected}") == 1
    advise_on_warmup(OptimizationSettings(lr_warmup_steps=2), 3)
    advise_on_warmup(OptimizationSettings(lr_scheduler="constant", lr_warmup_steps=9), 3)  # which has none
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"trained_betas": [0.1, 0.5, 1.5], "num_train_timesteps": 3},
            "betas from 0.1 to 1.5: they must be from 0 to",
        ),
        ({"trained_betas": [0.1, 0.5]}, "2 trained_betas for 1000 num_train_timesteps: they must agree"),
        ({"beta_end": 3.0}, "betas from 0.0001 to 3: they must be from 0 to 1"),
        ({"num_train_timesteps": 1}, "a single noise level"),
    ],
)
def test_a_given_schedule_that_is_none_is_named(settings, message):
    given = DDPMScheduler(**settings)
    with pytest.raises(ValueError, match=f"--pretrained_model_name_or_path: its scheduler_config.json has {message}"):
        build_noise_scheduler(ModelSettings(prediction_type="epsilon"), given)


@pytest.mark.parametrize("kind", ["model_config", "pretrained_model"])
def test_an_embedding_of_classes_that_no_flag_feeds_is_named(train, tiny_unet, capsys, kind):
    config = {name: value for name, value in tiny_unet().config.items() if not name.startswith("_")}
    config["class_embed_type"] = "timestep"
    if kind == "model_config":
        with open("embedded", "w") as file:
            json.dump(config, file)
    else:
        RegDDPMPipeline(UNet2DModel.from_config(config), DDPMScheduler()).save_pretrained("embedded")
    with pytest.raises(SystemExit, match="2"):
        train("--max_train_steps", 1, model=(f"--{kind}_name_or_path", "embedded"))
    assert f"--{kind}_name_or_path: class_embed_type 'timestep' is not supported" in capsys.readouterr().err


@pytest.mark.parametrize(
    "specs, names",
    [
        ("m:tv m:tv_2 m:tv", ["tv", "tv_2", "tv_3"]),
        ("m:tv m:tv m:tv_2", ["tv", "tv_2", "tv_2_2"]),
    ],
)
def test_equal_names_are_numbered_without_meeting_another(tmp_path, monkeypatch, specs, names):
    body = "(x):\n    return x.square().flatten(1).mean(1)\n"
    (tmp_path / "m.py").write_text(f"def tv{body}\ndef tv_2{body}")
    monkeypatch.chdir(tmp_path)
    terms = build_terms(LossSettings(regularizer=tuple(specs.split())), DataSettings())
    assert [term.name for term in terms] == names
