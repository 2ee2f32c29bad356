"""train_reg.py --lora_rank on each family of text-to-image pipelines, by tiny random ones."""

import gc
import json
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FluxPipeline
from huggingface_hub import ModelCard
from runs import differ, metrics, refusal
from safetensors.torch import load_file
from tiny_pipelines import (
    save_flux,
    save_stable_diffusion,
    save_stable_diffusion_3,
    save_stable_diffusion_xl,
    write_photos,
)
from transformers import PreTrainedModel

from reg_diffusers.networks.families import FAMILIES, flux
from reg_diffusers.training.batches import batches_of

pytestmark = pytest.mark.training

SAVE = {
    "StableDiffusionPipeline": save_stable_diffusion,
    "StableDiffusionXLPipeline": save_stable_diffusion_xl,
    "StableDiffusion3Pipeline": save_stable_diffusion_3,
    "FluxPipeline": save_flux,
}
BY_NAME = {family.pipeline: family for family in FAMILIES}


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.slow) for name in SAVE])
def name(request):
    return request.param


@pytest.fixture
def fine_tune(name, train, tmp_path):
    """Runs the script on a tiny pipeline of the family and eight images with texts; returns the output folder."""
    pytest.importorskip("peft")
    SAVE[name]("base", tmp_path / "scratch")
    write_photos()

    def run(*flags, **kwargs):
        given = "--train_data_dir photos --resolution 16 --regularizer total_variation --reg_weight 0.1".split()
        quick = "--cache_dir cache --max_train_steps 4 --num_threads 1 --learning_rate 1e-2 --eval_batch_size 2"
        texts = ("--caption_column", "text", "--lora_rank", 4)
        return train(
            *given, *texts, *quick.split(), *flags, model=("--pretrained_model_name_or_path", "base"), **kwargs
        )

    return run


def adapters(out):
    return load_file(out / "pytorch_lora_weights.safetensors")


def drawn(pipeline):
    if "betas" in vars(pipeline.scheduler):
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 2, "output_type": "np", "height": 16, "width": 16}
    return pipeline("a cat", generator=torch.Generator().manual_seed(3), **call).images


def test_latents_of_flux_are_packed_as_its_pipeline_does():
    latents = torch.randn(2, 16, 8, 6)
    assert torch.equal(flux._packed(latents), FluxPipeline._pack_latents(latents, 2, 16, 8, 6))
    assert torch.equal(flux._unpacked(flux._packed(latents), 8, 6), latents)
    places = FluxPipeline._prepare_latent_image_ids(2, 4, 3, "cpu", torch.float32)
    assert torch.equal(flux._places(4, 3, latents), places)


def test_stock_diffusers_draws_the_same_image_and_a_resumed_run_is_the_same(name, fine_tune, train, monkeypatch):
    trained = []
    train_of_script = train.script.train
    monkeypatch.setattr(train.script, "train", lambda *given: trained.append(train_of_script(*given)))
    flags = "--checkpointing_steps 2 --condition_dropout 0.5 --random_flip --preview_steps 2".split()
    out = fine_tune(*flags, "--gradient_checkpointing", "--lora_alpha", 8)
    component = BY_NAME[name].component
    stock = DiffusionPipeline.from_pretrained("base")
    assert type(stock).__name__ == name
    plain = drawn(stock)
    stock.load_lora_weights(str(out))
    with_adapters = drawn(stock)
    assert np.abs(with_adapters - plain).max() > 1e-3
    own = DiffusionPipeline.from_pretrained("base", **{component: trained[0].unet})
    np.testing.assert_allclose(with_adapters, drawn(own), atol=1e-5)
    shift = json.loads(Path("base", "vae", "config.json").read_text())["shift_factor"]
    assert trained[0].vqvae.config.shift_factor == shift  # L' sees what the pipeline decodes
    assert not {path.name for path in out.iterdir()} & {"unet", "transformer", "vae", "text_encoder"}
    assert ModelCard((out / "README.md").read_text()).data.pipeline_tag == "text-to-image"
    assert PIL.Image.open(out / "samples" / "step-000002.png").size[0] > 64

    whole = adapters(out)
    shutil.rmtree(out / "checkpoint-4")
    (out / "pytorch_lora_weights.safetensors").unlink()
    fine_tune(*flags, "--lora_alpha", 8, "--resume", "auto")  # gradient checkpointing does not change the result
    assert not differ(adapters(out), whole)


def test_the_loss_on_the_decoded_picture_falls(name, fine_tune, tmp_path):
    is_unet = BY_NAME[name].component == "unet"
    if is_unet:
        SAVE[name]("base", tmp_path / "scratch", prediction_type="sample")
    flags = "--max_train_steps 20 --lr_scheduler constant --reg_weighting constant --lora_target_modules".split()
    layers = ("conv_out", "to_out.0") if is_unet else ("proj_out", "to_out.0")  # attention alone changes little here
    rate, variation = 5e-2 if is_unet else 0.2, []
    for weight in (0, 1e4):
        out = fine_tune(*flags, *layers, "--reg_weight", weight, "--learning_rate", rate, output=f"w{weight}")
        variation.append(metrics(out)[-1]["total_variation"])
    assert variation[1] < 0.9 * variation[0]


def test_frozen_parts_are_in_half_precision_and_adapters_in_float32(name, fine_tune, train, monkeypatch):
    found = {}

    def batches(training, *given, **kwargs):
        gc.collect()
        alive = [one for one in gc.get_objects() if isinstance(one, PreTrainedModel)]
        networks = [one for one in gc.get_objects() if type(one) is type(training.unet)]
        found.update(
            encoders=len(alive),
            networks=len(networks),
            dtypes={(value.requires_grad, value.dtype) for value in training.unet.parameters()},
        )
        return batches_of(training, *given, **kwargs)

    monkeypatch.setattr(train.script, "batches_of", batches)
    trained = []
    train_of_script = train.script.train
    monkeypatch.setattr(train.script, "train", lambda *given: trained.append(train_of_script(*given)))
    out = fine_tune("--mixed_precision", "bf16", "--max_train_steps", 2, "--validation_split", 0.25)
    assert found["dtypes"] == {(False, torch.bfloat16), (True, torch.float32)}
    assert found["encoders"] == 0 and found["networks"] == 1  # nothing that is not needed stays in memory
    assert trained[0].vqvae.dtype == torch.bfloat16
    assert {value.dtype for value in adapters(out).values()} == {torch.float32}
    assert np.isfinite(metrics(out)[-1]["validation/raw/total_variation"])


# Texts and guidance, by the functions of a family


@pytest.fixture(params=list(SAVE))
def encoder(request, tmp_path):
    """A family, and a tiny pipeline of it that embeds texts."""
    SAVE[request.param](tmp_path / "base", tmp_path / "scratch")
    family = BY_NAME[request.param]
    return family, family.load_encoder(str(tmp_path / "base"), None, torch.float32)


def test_a_text_of_none_is_what_the_pipeline_takes_in_its_place(encoder):
    family, pipeline = encoder
    null = family.null(pipeline)
    if family.pipeline == "StableDiffusionXLPipeline":  # force_zeros_for_empty_prompt
        assert not any(value.any() for value in null.values())
        pipeline.register_to_config(force_zeros_for_empty_prompt=False)
        null = family.null(pipeline)
    for name, value in family.embed(pipeline, [""]).items():
        assert torch.equal(null[name], value)


def test_texts_are_counted_at_the_limit_of_each_tokenizer(encoder):
    family, pipeline = encoder
    limits = family.token_limits(pipeline)
    words = "a" * 11  # with the marks at the ends, 13 tokens for CLIP of at most 12, and 13 for T5 of at most 8
    expected = {name: 13 - limit for name, limit in limits.items()}
    assert family.lost_tokens(pipeline, words) == expected and set(limits.values()) <= {12, 8}
    assert family.lost_tokens(pipeline, "a") == {}


@pytest.mark.parametrize("name", SAVE)
def test_a_loss_calls_the_network_as_the_pipeline_does(name, tmp_path):
    """The same latents, timesteps and text give the output that the pipeline computes in its first step."""
    SAVE[name](tmp_path / "base", tmp_path / "scratch")
    family, pipeline = BY_NAME[name], DiffusionPipeline.from_pretrained(tmp_path / "base")
    pipeline.set_progress_bar_config(disable=True)
    network, calls = getattr(pipeline, family.component), []
    hook = network.register_forward_hook(lambda _, *call: calls.append(call), with_kwargs=True)
    tokens = min(family.token_limits(pipeline).values())
    of_t5 = {"max_sequence_length": tokens} if family.component == "transformer" else {}
    size = {"height": 16, "width": 24}
    pipeline("a cat", guidance_scale=1.0, num_inference_steps=1, output_type="latent", **size, **of_t5)
    hook.remove()
    args, kwargs, (expected,) = calls[0]
    sample, timestep = (args or (kwargs["hidden_states"], kwargs["timestep"]))[:2]
    if name == "FluxPipeline":
        timestep = 1000 * timestep  # the pipeline divides it
    unpack = flux._unpacked if name == "FluxPipeline" else lambda latents, *size: latents
    called = family.as_called(network, network.config, torch.float32, 2)
    with torch.no_grad():
        (output,) = called(unpack(sample, 8, 12), timestep.reshape(-1), **family.embed(pipeline, ["a cat"]))
    torch.testing.assert_close(output, unpack(expected, 8, 12))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["StableDiffusion3Pipeline"])
def test_a_pipeline_without_t5_is_trained_on_its_embeddings(name, fine_tune, capsys):
    stock = DiffusionPipeline.from_pretrained("base", text_encoder_3=None, tokenizer_3=None)
    shutil.rmtree("base")
    stock.save_pretrained("base")
    out = fine_tune("--max_train_steps", 2)
    assert (
        "base has no text_encoder_3 and no tokenizer_3: embedded without, as its pipeline does"
        in capsys.readouterr().out
    )
    stock.load_lora_weights(str(out))
    assert drawn(stock).shape == (1, 16, 16, 3)
    encoder = BY_NAME[name].load_encoder("base", None, torch.float32)
    embedded, _, pooled, _ = stock.encode_prompt("a cat", "a cat", "a cat", do_classifier_free_guidance=False)
    found = BY_NAME[name].embed(encoder, ["a cat"])
    assert torch.equal(found["prompt_embeds"], embedded) and torch.equal(found["pooled_prompt_embeds"], pooled)


# What is refused or counted


@pytest.mark.parametrize("name", ["StableDiffusion3Pipeline"])
def test_what_does_not_fit_a_family_is_refused_in_one_line(name, fine_tune, capsys, tmp_path):
    def refused(*flags):
        return refusal(fine_tune, capsys, *flags)

    assert "no layer ends in to_nothing)" in refused("--lora_target_modules", "to_q", "to_nothing")
    assert "sides must be multiples of 4, such as 16 or 20" in refused("--resolution", 18)
    index = Path("base", "model_index.json")
    whole = json.loads(index.read_text())
    index.write_text(json.dumps({**whole, "text_encoder_2": [None, None], "tokenizer_2": [None, None]}))
    assert refused().endswith("no readable text encoder: the pipeline was saved without text_encoder_2, tokenizer_2")
    index.write_text(json.dumps({**whole, "vae": [None, None]}))
    assert refused().endswith("it has no autoencoder: name one by --vae")
    index.write_text(json.dumps(whole))
    save_stable_diffusion("other", tmp_path / "scratch")
    shutil.rmtree(Path("base", "vae"))
    shutil.copytree(Path("other", "vae"), Path("base", "vae"))
    assert "the autoencoder gives latents of 4 channels, but the given model has 16" in refused()
    shutil.rmtree(Path("base", "tokenizer_3"))
    shutil.copytree(Path("other", "vae"), Path("base", "tokenizer_3"))
    assert not Path("out").exists()


@pytest.mark.parametrize("name", ["FluxPipeline"])
def test_texts_that_any_tokenizer_cuts_off_are_counted_in_one_warning(name, fine_tune, capsys):
    write_photos(texts=["a cat", "abcdefghi", "abcdefgh abcdefgh", "dog"])
    fine_tune("--max_train_steps", 1, "--validation_prompts", "dog", "abcdefghi")
    warning, of_prompts = [line for line in capsys.readouterr().err.splitlines() if "cuts off" in line]
    assert "cuts off the end of 1 of 2 --validation_prompts, such as 'abcdefghi'" in of_prompts
    assert "cuts off the end of 4 of 8 texts, such as 'abcdefghi', which is 3 tokens too long" in warning
    assert "tokenizer 2 of them, at 12 tokens, tokenizer_2 4 of them, at 8 tokens" in warning
