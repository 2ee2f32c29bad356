"""train_reg.py --lora_rank on each family of text-to-image pipelines, by tiny random ones."""

import shutil

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from huggingface_hub import ModelCard
from runs import differ, metrics
from safetensors.torch import load_file
from tiny_pipelines import (
    save_flux,
    save_stable_diffusion,
    save_stable_diffusion_3,
    save_stable_diffusion_xl,
    write_photos,
)

from reg_diffusers.networks.families import FAMILIES

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
