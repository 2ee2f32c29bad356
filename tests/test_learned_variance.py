"""Networks that learn a variance beside the image: trained on, previewed, sampled with any scheduler, described."""

import json

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, SASolverScheduler, UNet2DModel
from runs import evaluation_result, metrics, refusal

from reg_diffusers import RegDDPMPipeline
from reg_diffusers.cli import main
from reg_diffusers.demo import build_demo
from reg_diffusers.pipeline import fast_scheduler
from reg_diffusers.regularizers import total_variation
from reg_diffusers.sampling.schedulers import fitting_samplers

pytestmark = pytest.mark.training


@pytest.fixture
def network(tiny_unet):
    """Networks of images with C channels and a variance, conditioned by K further ones."""

    def build(channels=1, condition_channels=0):
        sizes = {"in_channels": channels + condition_channels, "out_channels": 2 * channels}
        return UNet2DModel.from_config({**tiny_unet().config, **sizes}).eval()

    return build


@pytest.fixture
def learned(network):
    return RegDDPMPipeline(network(), DDPMScheduler(variance_type="learned_range", clip_sample=False))


def test_every_sampler_draws_images_of_the_models_own_channels(learned):
    """DDIM knows of no variance, and made two channels of one."""
    images = {}
    for name, make in fitting_samplers(learned).items():
        sampler = RegDDPMPipeline(learned.unet, make())
        images[name] = sampler(batch_size=2, num_inference_steps=3, output_type="latent").images
        assert images[name].shape == (2, 1, 8, 8), name
    assert {"DDIM", "DDPM", "DPM-Solver++"} <= set(images)
    # the steps of DDIM on the part of the output that is the image
    generator, scheduler = torch.Generator().manual_seed(0), fast_scheduler(learned.scheduler)
    fast = RegDDPMPipeline(learned.unet, fast_scheduler(learned.scheduler))
    found = fast(batch_size=1, num_inference_steps=3, generator=generator, output_type="latent").images
    sample = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    scheduler.set_timesteps(3)
    with torch.no_grad():
        for t in scheduler.timesteps:
            sample = scheduler.step(learned.unet(sample, t).sample[:, :1], t, sample).prev_sample
    torch.testing.assert_close(found, sample)
    assert isinstance(scheduler, DDIMScheduler)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", [DPMSolverMultistepScheduler, SASolverScheduler])
def test_schedulers_that_drop_three_channels_get_the_image(network, kind, channels):
    """diffusers splits the output of these at channel 3, whatever the image has."""
    unet, generator = network(channels), torch.Generator().manual_seed(0)
    pipeline = RegDDPMPipeline(unet, kind(variance_type="learned_range"))
    found = pipeline(1, generator, 3, "latent").images
    scheduler, generator = kind(), torch.Generator().manual_seed(0)
    sample = torch.randn(1, channels, 8, 8, generator=generator)
    scheduler.set_timesteps(3)
    step = {"generator": generator} if kind is SASolverScheduler else {}
    with torch.no_grad():
        for t in scheduler.timesteps:
            sample = scheduler.step(unet(sample, t).sample[:, :channels], t, sample, **step).prev_sample
    torch.testing.assert_close(found, sample)


@pytest.mark.parametrize("kind", [DPMSolverMultistepScheduler, SASolverScheduler])
def test_what_they_would_cut_is_refused(network, kind):
    pipeline = RegDDPMPipeline(network(4), kind(variance_type="learned_range"))
    with pytest.raises(ValueError, match=f"{kind.__name__} with a learned variance samples up to 3 channels, not 4"):
        pipeline(1, num_inference_steps=2, output_type="latent")
    by_image = RegDDPMPipeline(network(4), kind(variance_type="learned_range", prediction_type="sample"))
    assert by_image(1, num_inference_steps=2, output_type="latent").images.shape == (1, 4, 8, 8)  # nothing to cut


def test_a_network_without_a_word_about_its_variance_is_refused(train, capsys, network, tmp_path):
    network().save_pretrained(tmp_path / "bare")
    RegDDPMPipeline(network(), DDPMScheduler()).save_pretrained(str(tmp_path / "given"))
    for flag, folder, fix in (
        ("--pretrained_model_name_or_path", "bare", "name a pipeline with it, whose scheduler_config.json has"),
        (
            "--pretrained_model_name_or_path",
            "given",
            "set variance_type to learned_range in its scheduler_config.json",
        ),
        ("--model_config_name_or_path", "bare", "set out_channels to the channels of the images"),
    ):
        message = refusal(train, capsys, model=(flag, folder))
        assert f"{flag} {folder}: 2 output channels for 1 input channels indicate a learned variance" in message
        assert fix in message


@pytest.mark.slow
def test_such_a_model_is_evaluated_and_diagnosed(learned, evaluate, capsys, image_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image_folder(60, size=(8, 8), name="data")
    learned.save_pretrained("A")
    flags = ("--regularizer", "total_variation", "--num_threads", 1, "--num_inference_steps", 2, "--num_images", 20)
    for scheduler in ("DDIM", "DDPM", "DPM-Solver++"):
        output = ("--output", scheduler, "--scheduler", scheduler)
        evaluate("--model", "A", "--data", "data", "--features", "pixels", *flags, *output)
        assert evaluation_result(scheduler)["rows"]["A"]["terms"]["total_variation"]["value"] > 0
    flags = "--model A --train_data_dir data --num_levels 3 --num_images 20 --regularizer total_variation"
    main(["diagnose", *flags.split()])
    assert "total_variation" in capsys.readouterr().out


def test_the_demo_shows_such_a_model_but_not_one_conditioned_by_an_image(learned, network):
    pytest.importorskip("gradio")
    build_demo(learned, {"total_variation": total_variation})
    # as many channels in as out
    conditioned = RegDDPMPipeline(network(condition_channels=1), learned.scheduler)
    with pytest.raises(ValueError, match="the model is conditioned on images"):
        build_demo(conditioned, {"total_variation": total_variation})


def test_such_a_model_is_trained_on_with_previews_and_a_card(train, learned, tmp_path, capsys):
    learned.save_pretrained(str(tmp_path / "given"))
    flags = ("--max_train_steps", 2, "--preview_steps", 1, "--regularizer", "total_variation", "--compare")
    out = train(*flags, model=("--pretrained_model_name_or_path", "given"))
    assert "the learned variance of this network is not trained" in capsys.readouterr().err
    assert sorted(path.name for path in (out / "samples").iterdir()) == ["step-000001.png", "step-000002.png"]
    assert len(metrics(out)) == 1
    rows = json.loads((out / "comparison.json").read_text())["rows"]
    assert all(row["distance"] is not None for row in rows.values())
    saved = RegDDPMPipeline.from_pretrained(str(out))
    assert saved.unet.config.out_channels == 2 and saved.scheduler.config.variance_type == "learned_range"
    card = (out / "README.md").read_text()
    assert "With diffusers alone" not in card  # whose DDIM takes the variance for a channel of the image
    assert "A diffusion model that generates 8 x 8 images: a `UNet2DModel`" in card
