"""train_reg.py on a text-to-image pipeline without --lora_rank: the whole network is trained, and a pipeline saved."""

import json
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from huggingface_hub import ModelCard
from in_processes import by_one_and_two, feed_noise
from runs import differ, load_script, metrics, refusal, reset
from safetensors.torch import load_file
from tiny_pipelines import (
    save_flux,
    save_stable_diffusion,
    save_stable_diffusion_3,
    save_stable_diffusion_xl,
    write_photos,
)
from torch import nn

from reg_diffusers.networks.families import FAMILIES
from reg_diffusers.networks.whole_pipeline import load_whole_pipeline
from reg_diffusers.settings.optimization import OptimizationSettings
from reg_diffusers.training.notes import memory_of_weights

pytestmark = pytest.mark.training

SAVE = {
    "StableDiffusionPipeline": save_stable_diffusion,
    "StableDiffusionXLPipeline": save_stable_diffusion_xl,
    "StableDiffusion3Pipeline": save_stable_diffusion_3,
    "FluxPipeline": save_flux,
}
COMPONENT = {family.pipeline: family.component for family in FAMILIES}
OF_BASE = ("--pretrained_model_name_or_path", "base")


@pytest.fixture
def fine_tune(train, tmp_path):
    """Runs the script on a pipeline "base" and eight images with texts; returns the output folder."""
    write_photos()

    def run(*flags, **kwargs):
        given = "--train_data_dir photos --resolution 16 --regularizer total_variation --reg_weight 0.1".split()
        quick = "--cache_dir cache --max_train_steps 4 --num_threads 1 --learning_rate 1e-2 --eval_batch_size 2"
        return train(*given, "--caption_column", "text", *quick.split(), *flags, model=OF_BASE, **kwargs)

    return run


def weights(folder, component="unet"):
    return load_file(Path(folder) / component / "diffusion_pytorch_model.safetensors")


def drawn(pipeline, seed=3, steps=2, **call):
    if "betas" in vars(pipeline.scheduler):
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    pipeline.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": steps, "output_type": "np", "height": 16, "width": 16, **call}
    return pipeline("a cat", generator=torch.Generator().manual_seed(seed), **call).images


@pytest.mark.slow
@pytest.mark.parametrize("name", SAVE)
def test_the_saved_pipeline_is_complete_and_a_resumed_run_is_the_same(name, fine_tune, train, tmp_path, monkeypatch):
    SAVE[name]("base", tmp_path / "scratch")
    trained, component = [], COMPONENT[name]
    train_of_script = train.script.train
    monkeypatch.setattr(train.script, "train", lambda *given: trained.append(train_of_script(*given)))
    flags = "--checkpointing_steps 2 --condition_dropout 0.5 --random_flip".split()
    out = fine_tune(*flags, "--gradient_checkpointing")
    stock = DiffusionPipeline.from_pretrained(str(out))
    assert type(stock).__name__ == name
    base = DiffusionPipeline.from_pretrained("base")
    before, found = drawn(base), drawn(stock)
    own = DiffusionPipeline.from_pretrained("base", **{component: trained[0].unet})
    np.testing.assert_allclose(found, drawn(own), atol=1e-5)
    assert np.abs(found - before).max() > 1e-3
    copied = {path.relative_to("base") for path in Path("base").rglob("*") if path.is_file()}
    copied = {path for path in copied if path.parts[0] not in (component, "model_index.json")}
    assert copied and all((out / path).read_bytes() == (Path("base") / path).read_bytes() for path in copied)
    first, whole = weights("base", component), weights(out, component)
    untrained = [key for key, value in first.items() if torch.equal(value, whole[key])]
    # Of SD3: a table, and queries of texts whose result the last block drops.
    assert not [key for key in untrained if "pos_embed.pos_embed" not in key and "attn.add_q_proj" not in key]

    shutil.rmtree(out / "checkpoint-4")
    shutil.rmtree(out / component)
    fine_tune(*flags, "--resume", "auto")  # gradient checkpointing does not change the result
    assert not differ(weights(out, component), whole)


def test_weights_stay_in_float32_and_the_run_says_what_memory_they_need(fine_tune, capsys, tmp_path):
    save_stable_diffusion("base", tmp_path / "scratch")
    out = fine_tune("--mixed_precision", "bf16", "--max_train_steps", 1, "--validation_split", 0.25, "--keep_best")
    assert {value.dtype for value in weights(out).values()} == {torch.float32}
    assert (
        load_file(out / "vae" / "diffusion_pytorch_model.safetensors")["encoder.conv_in.weight"].dtype == torch.float32
    )
    assert (out / "best" / "text_encoder").is_dir() and np.isfinite(metrics(out)[-1]["validation/denoising"])
    number = sum(value.numel() for value in weights(out).values())
    printed = capsys.readouterr().out
    assert f"trained weights {4 * number / 1e3:.0f} kB" in printed and "copies in half precision" in printed
    assert "all weights are trained" in printed
    parts = ("vae", "text_encoder", "tokenizer", "scheduler")
    size = 4 * number + sum(path.stat().st_size for part in parts for path in (out / part).iterdir())
    assert f"a pipeline of {size / 1e3:.0f} kB" in printed
    assert "copies in half precision" not in memory_of_weights(nn.Linear(1, 1), None, OptimizationSettings(), "no")


def test_the_memory_of_the_weights_is_their_number_times_their_bytes():
    vae = nn.Linear(1000, 1000, bias=False).to(torch.bfloat16).requires_grad_(False)
    network = nn.Linear(1000, 2000, bias=False)
    line = memory_of_weights(network, vae, OptimizationSettings(), "bf16")
    assert line.startswith("at least 46 MB of memory: trained weights 8 MB, their gradients 8 MB, AdamW 16 MB")
    assert "average 8 MB, copies in half precision 4 MB, frozen weights 2 MB" in line
    assert memory_of_weights(network, None, OptimizationSettings(use_ema=False), "no").startswith("at least 32 MB")


@pytest.mark.parametrize("name", SAVE)
def test_every_weight_of_the_network_gets_a_gradient(name, tmp_path):
    """Otherwise several processes would wait for it."""
    family = next(family for family in FAMILIES if family.pipeline == name)
    network = family.load_network(SAVE[name](tmp_path / "base", tmp_path / "scratch"), None, torch.float32)
    encoder = family.load_encoder(str(tmp_path / "base"), None, torch.float32)
    sample = torch.randn(1, family.channels(network.config), 8, 8)
    called = family.as_called(network, network.config, torch.float32, 2)
    called(sample, torch.tensor([500]), **family.embed(encoder, ["a"]))[0].square().sum().backward()
    assert not [key for key, value in network.named_parameters() if value.grad is None]


def test_a_base_that_cannot_be_copied_is_refused_in_one_line(fine_tune, capsys, tmp_path):
    save_stable_diffusion("base", tmp_path / "scratch")
    secret = tmp_path / "secret.txt"
    secret.write_text("s")
    link = Path("base", "tokenizer", "more.txt")
    link.symlink_to(secret)
    assert "more.txt is a link out of the folder" in refusal(fine_tune, capsys)
    link.unlink()
    Path("base", "text_encoder", "model.safetensors").rename("base/text_encoder/pytorch_model.bin")
    assert "pickled weights may run code" in refusal(fine_tune, capsys)
    assert not (tmp_path / "out").exists()


def test_every_model_of_a_run_draws_images_of_the_size_of_its_training(tmp_path):
    for name in ("out", "out/plain", "out/best"):
        save_stable_diffusion(tmp_path / name, tmp_path / "scratch")
    (tmp_path / "out" / "reg_config.json").write_text(json.dumps({"data": {"shape": [3, 24, 32]}}))
    for name in ("out", "out/plain", "out/best"):
        assert load_whole_pipeline(str(tmp_path / name)).image_shape == (3, 24, 32)
    (tmp_path / "out" / "reg_config.json").unlink()
    assert load_whole_pipeline(str(tmp_path / "out")).image_shape == (3, 16, 16)


# Through the commands


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a finished comparison, next to its base and its images."""
    folder = tmp_path_factory.mktemp("whole")
    base = save_stable_diffusion(folder / "base", folder / "scratch")
    write_photos(40, folder=folder / "photos")
    flags = "--resolution 16 --caption_column text --max_train_steps 2 --train_batch_size 4 --num_threads 1"
    losses = "--learning_rate 1e-2 --regularizer total_variation --reg_weight 0.1 --condition_dropout 0.2 --compare"
    previews = "--eval_batch_size 2 --ddpm_num_inference_steps 2 --mixed_precision no --lr_warmup_steps 0"
    names = ("--pretrained_model_name_or_path", base, "--train_data_dir", folder / "photos")
    names += ("--cache_dir", folder / "cache", "--output_dir", folder / "out")
    reset()
    load_script().main([*map(str, names), *f"{flags} {losses} {previews}".split()])
    return folder / "out"


def test_sample_draws_what_the_pipeline_in_diffusers_draws(whole, command):
    quick = ("--num_inference_steps", 3, "--num_threads", 1, "--num_images", 1, "--prompts", "a cat")
    images = {}
    for name, folder in {"tuned": whole, "base": whole.parent / "base"}.items():
        command("sample", "--model", folder, *quick, "--guidance_scale", 2, "--output", name)
        stock = DiffusionPipeline.from_pretrained(str(folder))
        expected = 255 * drawn(stock, seed=0, steps=3, guidance_scale=2.0)[0]
        images[name] = np.asarray(PIL.Image.open(f"{name}/000000.png")).astype(float)
        assert np.abs(images[name] - expected).max() <= 1
    assert np.abs(images["tuned"] - images["base"]).max() > 1


def test_it_is_compared_evaluated_and_described(whole, command):
    rows = json.loads((whole / "comparison.json").read_text())["rows"]
    assert list(rows) == ["data", "without", "with total_variation"] and rows["without"]["denoising_loss"] > 0
    quick = ("--num_inference_steps", 2, "--num_images", 20, "--features", "pixels", "--num_threads", 1)
    texts = ("--caption_column", "text")
    assert "total_variation" in command("evaluate", "--model", whole, whole / "plain", *quick, *texts)
    card = ModelCard((whole / "README.md").read_text())
    assert card.data.pipeline_tag == "text-to-image" and "lora" not in card.data.tags
    assert "A `StableDiffusionPipeline`, fine-tuned as a whole from" in card.text
    assert 'pipeline("a cat", height=16, width=16)' in card.text and "load_lora_weights" not in card.text


@pytest.mark.slow
def test_a_sweep_measures_whole_pipelines(whole, command):
    training = ("--pretrained_model_name_or_path", whole.parent / "base", "--train_data_dir", whole.parent / "photos")
    training += ("--cache_dir", whole.parent / "cache", "--caption_column", "text", "--regularizer", "total_variation")
    training += tuple("--resolution 16 --max_train_steps 2 --num_threads 1 --mixed_precision no".split())
    measuring = "--num_inference_steps 2 --num_images 20 --features pixels --num_threads 1 --guidance_scale 2".split()
    command("sweep", "--reg_weights", 0, 1, "--reg_weightings", "constant", *measuring, "--", *training)
    found = json.loads(Path("sweep", "sweep.json").read_text())
    assert len([title for title in found["rows"] if title != "data"]) == 2


@pytest.mark.slow
def test_two_processes_train_the_network_of_one(whole, tmp_path):
    names = ("--pretrained_model_name_or_path", whole.parent / "base", "--train_data_dir", whole.parent / "photos")
    names += ("--cache_dir", whole.parent / "cache", "--caption_column", "text")
    one, two = by_one_and_two(tmp_path, names, feed_noise, weights)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-6)
    before = weights(whole.parent / "base")
    assert all((one[name] - value).abs().max() > 1e-5 for name, value in before.items())
