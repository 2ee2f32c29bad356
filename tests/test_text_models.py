"""What holds for pixel models holds for LoRA: sampling, guidance by losses, measuring, comparing, uploading."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DiffusionPipeline, StableDiffusionPipeline
from in_processes import by_one_and_two, feed_noise
from runs import load_script, reset
from safetensors.torch import load_file
from tiny_pipelines import (
    TEXTS,
    save_flux,
    save_stable_diffusion,
    save_stable_diffusion_3,
    save_stable_diffusion_xl,
    write_photos,
)

from reg_diffusers import RegTextToImagePipeline, Term
from reg_diffusers.pipeline import fast_scheduler
from reg_diffusers.regularizers import total_variation
from reg_diffusers.weighting import constant

pytestmark = pytest.mark.training

FAMILIES = (save_stable_diffusion, save_stable_diffusion_xl, save_stable_diffusion_3, save_flux)


@pytest.mark.parametrize("save", FAMILIES, ids=lambda save: save.__name__)
def test_every_family_draws_the_image_of_its_pipeline_in_diffusers(save, tmp_path):
    stock = DiffusionPipeline.from_pretrained(save(tmp_path / "base", tmp_path / "scratch"))
    stock.scheduler = fast_scheduler(stock.scheduler)
    stock.set_progress_bar_config(disable=True)
    pipeline, of_both = wrapped(stock), {"height": 16, "width": 24}
    size = dict(of_both)
    if t5 := {"StableDiffusion3Pipeline": "tokenizer_3", "FluxPipeline": "tokenizer_2"}.get(type(stock).__name__):
        size["max_sequence_length"] = getattr(stock, t5).model_max_length  # shorter than usual
    for texts in ({}, {"guidance_scale": 2.0}):
        expected = draw(stock, prompt="a cat", **size, **texts)
        np.testing.assert_allclose(draw(pipeline, prompt="a cat", **of_both, **texts), expected, atol=2e-5)
    steer = [Term(total_variation, 50.0, weighting=constant)]
    assert np.abs(draw(pipeline, prompt="a cat", guidance=steer, **of_both, **texts) - expected).max() > 1e-3


@pytest.fixture
def stock(tmp_path):
    """A pipeline of diffusers, with DDIM."""
    pipeline = StableDiffusionPipeline.from_pretrained(save_stable_diffusion(tmp_path / "sd", tmp_path / "scratch"))
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def wrapped(stock, **size):
    pipeline = RegTextToImagePipeline.of(stock, **size)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, steps=3, seed=0, **kwargs):
    generator = torch.Generator().manual_seed(seed)
    return pipeline(generator=generator, num_inference_steps=steps, output_type="np", **kwargs).images


@pytest.mark.parametrize(
    "texts",
    [{}, {"guidance_scale": 3.0}, {"guidance_scale": 1.0}, {"negative_prompt": "dog"}],
    ids=["default", "scale", "without", "negative"],
)
def test_without_losses_it_draws_the_image_of_the_pipeline_in_diffusers(stock, texts):
    expected = draw(stock, prompt="a cat", height=16, width=24, **texts)
    found = draw(wrapped(stock, width=24), prompt="a cat", **texts)
    assert found.shape == (1, 16, 24, 3)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(found - draw(wrapped(stock, width=24), prompt="a dog", **texts)).max() > 1e-4


def test_embeddings_stand_for_their_texts(stock):
    pipeline = wrapped(stock)
    given = pipeline.embeddings(["a cat", "a dog"])
    np.testing.assert_array_equal(
        draw(pipeline, batch_size=2, **given), draw(pipeline, batch_size=2, prompt=["a cat", "a dog"])
    )


@pytest.mark.parametrize("method", ["mpgd", "dps"])
def test_losses_steer_the_decoded_image(stock, method):
    """A step down the gradient, small enough for the first order, lowers L' of each predicted image, decoded."""
    pipeline = wrapped(stock)
    scores = [
        pipeline(
            2,
            torch.Generator().manual_seed(0),
            2,
            prompt=["a cat", "a dog"],
            guidance=[Term(total_variation, weight, weighting=constant)] if weight else [],
            guidance_method=method,
            regularizers=[total_variation],
        ).scores["total_variation"]
        for weight in (0.0, 0.02)
    ]
    assert (scores[1] < scores[0]).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "conditioned on texts: pass prompt"),
        ({"prompt": "a", "class_labels": 0}, "class_labels: this network is conditioned on texts"),
        ({"prompt": ["a", "b", "c"]}, "prompt holds 3 texts for batch_size=2"),
        ({"prompt": "a", "negative_prompt": 3}, "negative_prompt must be a text"),
        ({"prompt": "a", "negative_prompt": "b", "guidance_scale": 1.0}, "negative_prompt has no effect with"),
        ({"prompt": "a", "guidance_scale": -1.0}, "guidance_scale must be finite"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(stock, arguments, message):
    with pytest.raises(ValueError, match=message):
        wrapped(stock)(2, num_inference_steps=2, **arguments)
    with pytest.raises(ValueError, match="height 17, width 16: both must be multiples of 4"):
        wrapped(stock, height=17)
    with pytest.raises(ValueError, match="a DDPMPipeline is not supported: use one of StableDiffusionPipeline"):
        RegTextToImagePipeline.of(DDPMPipeline(stock.unet, stock.scheduler))
    with pytest.raises(TypeError, match="unexpected keyword argument 'promt'"):
        wrapped(stock)(2, num_inference_steps=2, promt="a")


# Through the commands


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """The folder of a finished run, next to its base and its images."""
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("lora")
    base = save_stable_diffusion(folder / "base", folder / "scratch", prediction_type="epsilon")
    write_photos(40, folder=folder / "photos")
    flags = (
        "--resolution 16 --caption_column text --lora_rank 2 --max_train_steps 2 --train_batch_size 4 --num_threads 1"
    )
    losses = "--learning_rate 1e-2 --regularizer total_variation --reg_weight 0.1 --condition_dropout 0.2 --compare"
    previews = "--eval_batch_size 2 --ddpm_num_inference_steps 2 --mixed_precision no"
    names = ("--pretrained_model_name_or_path", base, "--train_data_dir", folder / "photos")
    names += ("--cache_dir", folder / "cache", "--output_dir", folder / "out")
    reset()
    load_script().main([*map(str, names), *flags.split(), *losses.split(), *previews.split()])
    return folder / "out"


def test_sample_draws_what_the_pipeline_in_diffusers_draws_with_the_weights(lora, command):
    quick = ("--model", lora, "--num_inference_steps", 12, "--num_threads", 1, "--output", "drawn")
    texts = ("--prompts", "a cat", "dog", "--negative_prompt", "b", "--guidance_scale", 2)
    command("sample", "--num_images", 1, *quick[:-1], "rough", *texts, "--mixed_precision", "bf16")
    command("sample", "--num_images", 3, *quick, *texts)
    stock = StableDiffusionPipeline.from_pretrained(lora.parent / "base")
    stock.load_lora_weights(str(lora))
    stock.scheduler = DDIMScheduler.from_config(stock.scheduler.config, timestep_spacing="trailing")
    call = {"negative_prompt": "b", "guidance_scale": 2.0, "height": 16, "width": 16}
    for index, text in enumerate(["a cat", "dog", "a cat"]):
        expected = draw(stock, 12, prompt=text, seed=index, **call)[0]
        found = np.asarray(PIL.Image.open(f"drawn/{index:06}.png"))
        assert np.abs(found - 255 * expected).max() <= 1
    assert "drawn with prompts a cat dog instead of a" in command(
        "sample", "--num_images", 4, *quick, "--prompts", "a", *texts[3:], refused=True
    )
    scale = ("--guidance", "total_variation", "--regularizer_scale", 300)
    command("sample", "--num_images", 1, *quick[:-1], "guided", *texts, *scale)
    rough, drawn = (np.asarray(PIL.Image.open(f"{name}/000000.png"), dtype=float) for name in ("rough", "drawn"))
    assert 0 < np.abs(rough - drawn).mean() < 8
    steered, plain = (np.asarray(PIL.Image.open(f"{name}/000000.png"), dtype=float) for name in ("guided", "drawn"))
    assert np.abs(steered - plain).max() > 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--prompts are missing, but the model is conditioned on texts"),
        (("--prompts", "a", "--class_labels", 0), "--class_labels are given, but the model has no classes"),
        (("--prompts", "a", "--guidance_scale", -1), "--guidance_scale must be finite and at least 0"),
        (("--prompts", "a", "--negative_prompt", "b", "--guidance_scale", 1), "--negative_prompt has no effect"),
    ],
)
def test_sample_refuses_in_one_line(lora, command, flags, message):
    assert message in command("sample", "--model", lora, "--num_images", 1, *flags, refused=True)


def test_a_base_that_is_gone_is_one_line(lora, command, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # the base is looked for there
    moved = shutil.copytree(lora, tmp_path / "moved")
    settings = (moved / "reg_settings.yaml").read_text()
    (moved / "reg_settings.yaml").write_text(settings.replace(str(lora.parent / "base"), "gone/base"))
    refusal = command("sample", "--model", moved, "--prompts", "a", refused=True)
    assert "moved: its base gone/base: " in refusal and "gone/base does not exist" in refusal


def test_compare_and_evaluate_measure_with_the_texts_of_the_images(lora, command):
    comparison = json.loads((lora / "comparison.json").read_text())["rows"]
    assert list(comparison) == ["data", "without", "with total_variation"]
    assert comparison["data"]["terms"]["total_variation"] > 0
    plain = lora / "plain"
    assert (plain / "pytorch_lora_weights.safetensors").is_file() and not (plain / "unet").exists()
    quick = ("--num_inference_steps", 2, "--num_images", 20, "--features", "pixels", "--num_threads", 1)
    printed = command("evaluate", "--model", lora, plain, *quick)
    assert "total_variation" in printed
    settings = json.loads(Path("evaluation", "evaluation_settings.json").read_text())
    assert {model["guidance_scale"] for model in settings["models"].values()} == {7.5}
    drawn = json.loads(next(Path("evaluation", "samples").glob("out*.json")).read_text())
    assert len(drawn["prompts"]) == 20 and set(drawn["prompts"]) == set(TEXTS)
    other = command("evaluate", "--model", lora, *quick, "--prompt", "a b", "--output", "one")
    assert "total_variation" in other
    drawn = json.loads(next(Path("one", "samples").glob("out*.json")).read_text())
    assert set(drawn["prompts"]) == {"a b"}


@pytest.mark.slow
def test_diagnose_measures_the_guesses_of_the_network_for_the_texts_of_the_images(lora, command, monkeypatch):
    asked = []
    embeddings = RegTextToImagePipeline.embeddings
    monkeypatch.setattr(
        RegTextToImagePipeline, "embeddings", lambda self, texts: asked.append(texts) or embeddings(self, texts)
    )
    flags = ("--regularizer", "total_variation", "--num_levels", 3, "--cache_dir", lora.parent / "cache")
    assert "40 of 40 images" in command("diagnose", "--model", lora, *flags)
    levels = json.loads(Path("diagnosis", "total_variation.json").read_text())["levels"]
    assert len(levels) == 3 and all(level["model"]["error"] > 0 for level in levels)
    held_out = torch.randperm(40, generator=torch.Generator().manual_seed(0))[:8].tolist()
    assert asked == 3 * [[TEXTS[index % len(TEXTS)] for index in held_out]]


@pytest.mark.slow
def test_a_sweep_measures_lora_runs(lora, command):
    training = (
        f"--pretrained_model_name_or_path {lora.parent / 'base'} --train_data_dir {lora.parent / 'photos'}".split()
    )
    training += "--resolution 16 --caption_column text --lora_rank 2 --max_train_steps 2 --num_threads 1".split()
    training += ["--regularizer", "total_variation", "--cache_dir", lora.parent / "cache", "--mixed_precision", "no"]
    measuring = "--num_inference_steps 2 --num_images 20 --features pixels --num_threads 1 --guidance_scale 2".split()
    weights = ("--reg_weights", 0, 1, "--reg_weightings", "constant")
    command("sweep", *weights, *measuring, "--", *training)
    found = json.loads(Path("sweep", "sweep.json").read_text())
    losses = [row["denoising_loss"] for title, row in found["rows"].items() if title != "data"]
    assert len(losses) == 2 and all(loss > 0 for loss in losses)


@pytest.mark.slow
def test_two_processes_train_the_adapters_of_one(lora, tmp_path):
    names = ("--pretrained_model_name_or_path", lora.parent / "base", "--train_data_dir", lora.parent / "photos")
    names += ("--cache_dir", lora.parent / "cache", "--caption_column", "text", "--lora_rank", 2)
    one, two = by_one_and_two(
        tmp_path, names, feed_noise, lambda out: load_file(out / "pytorch_lora_weights.safetensors")
    )
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-6)
    assert max(value.abs().max() for name, value in one.items() if "lora_B" in name or "up" in name) > 1e-4
