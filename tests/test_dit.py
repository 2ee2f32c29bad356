"""train_reg.py with a DiTTransformer2DModel: classes, in the latents of an autoencoder, saved as a DiTPipeline."""

import json
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiTPipeline, DiTTransformer2DModel
from in_processes import by_one_and_two, feed
from runs import differ, load_script, metrics, refusal, reset
from safetensors.torch import load_file
from tiny_pipelines import autoencoder

from reg_diffusers import RegDiTPipeline
from reg_diffusers.networks.dit import as_called, build, new_config
from reg_diffusers.runtime.errors import UsageError

pytestmark = pytest.mark.training

DIT = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 8,  # as in the published configs
    "num_layers": 2,
    "sample_size": 8,
    "patch_size": 2,
}
NEW = ("--model_config_name_or_path", "dit", "--vae", "vae")
NO_CLASS = 1000


def network(seed=0, **config):
    torch.manual_seed(seed)
    return DiTTransformer2DModel(**{**DIT, **config})


def save_parts(folder="."):
    torch.manual_seed(0)
    autoencoder(latent_channels=4).save_pretrained(Path(folder, "vae"))
    network().save_config(Path(folder, "dit"))


def save_pipeline(folder, **config):
    """A DiTPipeline as diffusers saves it, with a network that has a learned variance."""
    torch.manual_seed(0)
    vae, scheduler = autoencoder(latent_channels=4), DDIMScheduler(clip_sample=False)
    DiTPipeline(network(1, **config), vae, scheduler).save_pretrained(str(folder))
    return str(folder)


def weights(out):
    return load_file(out / "transformer" / "diffusion_pytorch_model.safetensors")


def drawn(pipeline, *labels, **call):
    if isinstance(pipeline.scheduler, DDPMScheduler):
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    call = {"generator": torch.Generator().manual_seed(3), "num_inference_steps": 3, "output_type": "np", **call}
    return pipeline(*labels, **call).images


@pytest.fixture
def with_classes(train, image_folder):
    """Runs the script on eight images of two classes, 16 x 16, in latents of 4 x 8 x 8."""
    image_folder(name="photos", size=(16, 16))
    save_parts()

    def run(*flags, model=NEW, **kwargs):
        given = "--train_data_dir photos --resolution 16 --regularizer total_variation --reg_weight 0.1".split()
        quick = "--cache_dir cache --max_train_steps 4 --num_threads 1 --class_conditional".split()
        return train(*given, *quick, *flags, model=model, **kwargs)

    return run


def test_stock_diffusers_draws_the_same_images_and_a_resumed_run_is_the_same(with_classes, capsys):
    flags = "--condition_dropout 0.5 --random_flip --checkpointing_steps 2 --learning_rate 1e-2".split()
    out = with_classes(*flags, "--preview_steps", 2, "--gradient_checkpointing")
    printed = capsys.readouterr().out
    assert "1,000 class embeddings, of which the data use 2; label 1000 is no class" in printed
    assert "out_channels 4 instead of the 8 of the config" in printed and "labels are not dropped" not in printed
    assert metrics(out)[-1]["total_variation"] > 0
    assert PIL.Image.open(out / "samples" / "step-000002.png").size[0] > 64
    assert not json.loads((out / "scheduler" / "scheduler_config.json").read_text())["clip_sample"]
    stock = DiTPipeline.from_pretrained(str(out))
    assert stock.get_label_ids(["dogs", "cats"]) == [1, 0]
    pipeline = RegDiTPipeline.from_pretrained(str(out))
    for scale in (1.0, 4.0):
        expected = drawn(stock, [1, 0], guidance_scale=scale)
        found = drawn(pipeline, 2, class_labels=["dogs", "cats"], guidance_scale=scale)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(expected - drawn(pipeline, 2, class_labels=["dogs", "cats"])).max() > 1e-4  # guidance does something
    card = (out / "README.md").read_text()
    assert "RegDiTPipeline.from_pretrained" in card and "pipeline([0], guidance_scale=1.0, " in card
    assert "`DiTTransformer2DModel` in the latents of an `AutoencoderKL`" in card
    assert "It was also trained without class labels" in card and "custom_pipeline" not in card

    whole = weights(out)
    shutil.rmtree(out / "checkpoint-4")
    shutil.rmtree(out / "transformer")
    with_classes(*flags, "--resume", "auto")  # gradient checkpointing does not change the result
    assert not differ(weights(out), whole)


class OfClasses:
    """Data of latents 4 x 8 x 8 with two classes."""

    shape, classes, is_picture = (4, 8, 8), ("cats", "dogs"), True


def test_a_new_network_begins_as_the_paper_says_and_drops_no_label_on_its_own():
    torch.manual_seed(0)
    made = build(None, new_config(DIT), OfClasses).train()
    sample, timesteps, labels = torch.randn(3, 4, 8, 8), torch.tensor([5, 70, 900]), torch.tensor([0, 1, 1])
    assert not made(sample, timesteps, labels).sample.any()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    first, *others = (made(sample, timesteps, labels).sample for _ in range(4))  # in training mode
    assert all(torch.equal(first, other) for other in others)
    first.square().sum().backward()
    assert all(parameter.grad is not None for parameter in made.parameters())


def test_the_label_after_the_last_class_is_no_class_and_the_variance_is_left_out():
    given = network().eval()
    sample, timesteps = torch.randn(2, 4, 8, 8), torch.tensor([5, 700])
    called = as_called(given, given.config, classes=7)
    (found,) = called(sample, timesteps, class_labels=torch.tensor([7, 6]))
    expected = given(sample, timesteps, torch.tensor([NO_CLASS, 6])).sample
    assert torch.equal(found, expected[:, :4]) and expected.shape[1] == 8


def test_fine_tuning_of_a_published_pipeline_leaves_its_variance_as_it_is(with_classes, capsys):
    """The older class name of the published models, and a larger size of the images than before."""
    base = Path(save_pipeline("base"))
    config = json.loads((base / "transformer" / "config.json").read_text())
    (base / "transformer" / "config.json").write_text(json.dumps({**config, "_class_name": "Transformer2DModel"}))
    index = json.loads((base / "model_index.json").read_text())
    names = {str(number): f"thing {number}" for number in range(12)}
    (base / "model_index.json").write_text(json.dumps({**index, "id2label": names}))
    given = ("--pretrained_model_name_or_path", "base")
    flags = "--resolution 24 --learning_rate 1e-2 --adam_weight_decay 0".split()
    out = with_classes(*flags, model=given)
    printed = capsys.readouterr()
    assert "the last 4 output channels, a learned variance, are kept as they are" in printed.out
    assert "train with --condition_dropout 0.1" in printed.out
    assert "stand for other classes: 0 was 'thing 0' and is 'cats'" in printed.err
    before, after = weights(base), weights(out)
    rows = before["proj_out_2.weight"].unflatten(0, (2, 2, 8))
    trained = after["proj_out_2.weight"].unflatten(0, (2, 2, 8))
    assert torch.equal(rows[:, :, 4:], trained[:, :, 4:]) and not torch.equal(rows[:, :, :4], trained[:, :, :4])
    stock, pipeline = DiTPipeline.from_pretrained(str(out)), RegDiTPipeline.from_pretrained(str(out))
    assert pipeline.image_shape == (3, 24, 24) and pipeline.config.class_names == ["cats", "dogs"]
    for scheduler in (DDIMScheduler, DDPMScheduler):
        stock.scheduler = pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
        expected = drawn(stock, [1], guidance_scale=4.0)
        np.testing.assert_allclose(drawn(pipeline, class_labels=1, guidance_scale=4.0), expected, atol=1e-5)
    again = with_classes("--resolution", 24, model=(given[0], str(out)), output="again")
    assert "stand for other classes" not in capsys.readouterr().err and (again / "transformer").is_dir()


# Through the commands


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished comparison, next to its images."""
    folder = tmp_path_factory.mktemp("dit")
    save_parts(folder)
    generator = np.random.default_rng(0)
    for index in range(40):
        path = folder / "photos" / ("cats" if index % 2 else "dogs")
        path.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(path / f"{index}.png")
    flags = "--resolution 16 --class_conditional --condition_dropout 0.2 --max_train_steps 2 --train_batch_size 4"
    losses = "--num_threads 1 --regularizer total_variation --reg_weight 0.1 --compare --validation_split 0.1"
    previews = "--eval_batch_size 2 --ddpm_num_inference_steps 2 --mixed_precision no"
    names = ("--model_config_name_or_path", folder / "dit", "--vae", folder / "vae")
    names += ("--train_data_dir", folder / "photos", "--cache_dir", folder / "cache", "--output_dir", folder / "out")
    reset()
    load_script().main([*map(str, names), *f"{flags} {losses} {previews}".split()])
    return folder / "out"


def test_sample_draws_what_the_pipeline_in_diffusers_draws(finished, command):
    quick = ("--model", finished, "--num_inference_steps", 3, "--num_threads", 1, "--num_images", 2)
    labels = ("--class_labels", "dogs", "cats", "--guidance_scale", 3)
    command("sample", *quick, *labels, "--output", "drawn")
    command("sample", *quick, *labels, "--output", "rough", "--mixed_precision", "bf16")
    stock = DiTPipeline.from_pretrained(str(finished))
    stock.scheduler = DDIMScheduler.from_config(stock.scheduler.config, timestep_spacing="trailing")
    for index, label in enumerate((1, 0)):
        generator = torch.Generator().manual_seed(index)
        expected = 255 * drawn(stock, [label], guidance_scale=3.0, generator=generator)[0]
        found, rough = (np.asarray(PIL.Image.open(f"{name}/{index:06}.png")) for name in ("drawn", "rough"))
        assert np.abs(found - expected).max() <= 1
        assert np.abs(rough.astype(float) - found).mean() < 8
    refused = command("sample", *quick, "--class_labels", 2, "--output", "none", refused=True)
    assert "class_labels must be from 0 to 1" in refused


@pytest.mark.slow
def test_it_is_compared_evaluated_and_diagnosed(finished, command):
    rows = json.loads((finished / "comparison.json").read_text())["rows"]
    assert list(rows) == ["data", "without", "with total_variation"] and rows["without"]["denoising_loss"] > 0
    assert (finished / "plain" / "transformer").is_dir() and (finished / "validation.json").is_file()
    quick = ("--num_inference_steps", 2, "--num_images", 20, "--features", "pixels", "--num_threads", 1)
    assert "total_variation" in command("evaluate", "--model", finished, finished / "plain", *quick)
    flags = ("--regularizer", "total_variation", "--num_levels", 3, "--num_images", 20)
    flags += ("--cache_dir", finished.parent / "cache", "--class_conditional")
    command("diagnose", "--model", finished, *flags)
    levels = json.loads(Path("diagnosis", "total_variation.json").read_text())["levels"]
    assert len(levels) == 3 and all(level["model"]["error"] > 0 for level in levels)


def test_a_flow_is_sampled_here_and_the_run_says_that_stock_diffusers_cannot(with_classes, capsys):
    out = with_classes("--prediction_type", "flow_prediction")
    assert "DiTPipeline has no sampler for flow matching" in capsys.readouterr().out
    assert "With diffusers alone" not in (out / "README.md").read_text()
    pipeline = RegDiTPipeline.from_pretrained(str(out))
    assert np.isfinite(drawn(pipeline, class_labels="cats")).all()


def test_what_does_not_fit_is_refused_in_one_line(with_classes, train, capsys, tmp_path):
    data = "--train_data_dir photos --resolution 16 --cache_dir cache".split()
    assert "needs a class for each image: pass --class_conditional" in refusal(train, capsys, *data, model=NEW)
    labels = (*data, "--class_conditional")
    assert "name an autoencoder by --vae" in refusal(train, capsys, *labels, model=NEW[:2])
    assert "draws squares only, not 12 x 8 latents" in refusal(with_classes, capsys, "--resolution", "24x16")
    assert "multiples of 4, such as 16 or 20" in refusal(with_classes, capsys, "--resolution", 18)
    config = {**json.loads(Path("dit", "config.json").read_text()), "patch_size": 0}
    Path("dit", "config.json").write_text(json.dumps(config))
    assert "not a config of DiTTransformer2DModel: " in refusal(with_classes, capsys)
    network(num_embeds_ada_norm=1, out_channels=4).save_pretrained("small")
    given = ("--pretrained_model_name_or_path", "small", "--vae", "vae")
    assert "embeds 1 classes, but the data have 2: train a new" in refusal(with_classes, capsys, model=given)
    save_pipeline("other")
    (tmp_path / "other" / "transformer" / "diffusion_pytorch_model.safetensors").rename("other/transformer/a.bin")
    given = ("--pretrained_model_name_or_path", "other")
    assert "pickled weights may run code" in refusal(with_classes, capsys, model=given)
    with pytest.raises(ValueError, match="pickled weights may run code"):
        RegDiTPipeline.from_pretrained("other")
    assert not (tmp_path / "out").exists()
    save_parts()
    assert "only a UNet2DModel supports it" in refusal(with_classes, capsys, "--attention", "explicit")


class OfManyClasses(OfClasses):
    classes = tuple(map(str, range(1001)))


def test_more_classes_than_stock_diffusers_knows_need_a_larger_embedding():
    with pytest.raises(UsageError, match="set num_embeds_ada_norm in its config to 1001"):
        build(None, new_config(DIT), OfManyClasses)
    made = build(None, new_config({**DIT, "num_embeds_ada_norm": 1001}), OfManyClasses)
    assert made.transformer_blocks[0].norm1.emb.class_embedder.embedding_table.num_embeddings == 1002


@pytest.mark.slow
def test_two_processes_train_the_network_of_one(finished, tmp_path):
    folder = finished.parent
    names = ("--model_config_name_or_path", folder / "dit", "--vae", folder / "vae")
    names += ("--train_data_dir", folder / "photos", "--cache_dir", folder / "cache", "--class_conditional")
    one, two = by_one_and_two(tmp_path, names, feed, weights)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-6, atol=1e-8)
    assert one["proj_out_2.weight"].abs().max() > 1e-3  # 0 at the start


@pytest.mark.slow
def test_a_compiled_training_is_the_plain_one(with_classes, compiled):
    flags = ("--condition_dropout", 0.5, "--random_flip")
    plain = weights(with_classes(*flags, output="plain"))
    with compiled() as graphs:
        found = weights(with_classes(*flags, "--compile"))
    assert len(graphs) == 1
    for name, value in found.items():
        torch.testing.assert_close(value, plain[name], rtol=0, atol=1e-6)
