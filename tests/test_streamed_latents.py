"""train_reg.py --streaming in latents: images are encoded, and texts embedded, in each step."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from in_processes import by_one_and_two, feed
from runs import differ, metrics, refusal, weights
from safetensors.torch import load_file
from tiny_pipelines import autoencoder, save_stable_diffusion, write_photos

from reg_diffusers.autoencoder import encoded
from reg_diffusers.data import streamed_latents, streaming
from reg_diffusers.training.batches import batches_of

pytestmark = pytest.mark.training

OWN = """
def own(x0_hat, /, original_samples, text):
    assert len(text) == len(x0_hat)
    return (x0_hat - original_samples).abs().flatten(1).mean(1)

own.needs = ("original_samples", "text")
"""


@pytest.fixture
def stream(train, tmp_path):
    """Runs the script on a stream of eight images with texts; returns the output folder."""
    write_photos()

    def run(*flags, model, **kwargs):
        given = "--streaming --train_data_dir photos --resolution 16 --train_batch_size 4".split()
        loss = "--regularizer total_variation --reg_weight 0.1".split()
        quick = "--cache_dir cache --max_train_steps 4 --num_threads 1 --eval_batch_size 2".split()
        return train(*given, *loss, *quick, *flags, model=model, **kwargs)

    return run


@pytest.fixture
def with_texts(stream, tmp_path):
    """The same with LoRA on a tiny Stable Diffusion."""
    pytest.importorskip("peft")
    save_stable_diffusion("base", tmp_path / "scratch", prediction_type="epsilon")

    def run(*flags, texts=("--caption_column", "text"), **kwargs):
        model = ("--pretrained_model_name_or_path", "base")
        return stream("--lora_rank", 2, "--learning_rate", 1e-2, *texts, *flags, model=model, **kwargs)

    return run


@pytest.fixture
def unconditional(stream):
    """The same without texts in the latents of an autoencoder."""
    torch.manual_seed(0)
    autoencoder().save_pretrained("vae")
    return partial(stream, "--vae", "vae", model=("--model_config_name_or_path", "tiny"))


def adapters(out):
    return load_file(out / "pytorch_lora_weights.safetensors")


def test_a_batch_is_the_latents_of_its_windows_with_the_embeddings_of_its_texts(with_texts, train, monkeypatch):
    Path("own_loss.py").write_text(OWN)
    batches = []

    def recorded(*args, **kwargs):
        for batch in batches_of(*args, **kwargs):
            batches.append(batch)
            yield batch

    monkeypatch.setattr(train.script, "batches_of", recorded)
    with_texts("--regularizer", "own_loss:own", "--random_crop", "--random_flip", "--max_train_steps", 3)
    base = StableDiffusionPipeline.from_pretrained("base")
    rows = [json.loads(line) for line in Path("photos", "metadata.jsonl").read_text().splitlines()]
    for batch in batches:
        pixels, texts = batch.context.columns["original_images"], batch.context.columns["text"]
        assert pixels.shape == (4, 3, 16, 16)
        torch.testing.assert_close(batch.original_samples, encoded(base.vae, pixels))
        embedded, _ = base.encode_prompt(texts, "cpu", 1, False)
        torch.testing.assert_close(batch.context.conditions["prompt_embeds"], embedded)
        assert texts == [rows[id // 10**9]["text"] for id in batch.ids.tolist()]  # each row is a piece
    assert any(batch.ids.tolist() != batches[0].ids.tolist() for batch in batches)
    assert not list(Path("cache").rglob("*.npy"))  # nothing is stored


@pytest.mark.slow
def test_a_stream_with_texts_resumes_bit_for_bit(with_texts, capsys):
    flags = ("--checkpointing_steps", 2, "--condition_dropout", 0.5, "--random_flip")
    whole = adapters(with_texts(*flags, output="whole"))
    printed = capsys.readouterr().out
    assert "latents    4 x 8 x 8, encoded in each step; standard deviation" in printed
    assert "4 different texts among the first 8 images; embedded in each step" in printed
    out = with_texts(*flags)
    shutil.rmtree(out / "checkpoint-4")
    (out / "pytorch_lora_weights.safetensors").unlink()
    with_texts(*flags, "--resume", "auto")
    assert not differ(adapters(out), whole)


@pytest.mark.slow
def test_an_unconditional_stream_resumes_bit_for_bit_and_is_compared(unconditional):
    """A comparison shows the images of the data; held-out images are encoded once, as they are read often."""
    write_photos(3, folder="others")
    flags = ("--max_train_steps", 2, "--checkpointing_steps", 1, "--random_flip", "--validation_data_dir", "others")
    whole = unconditional(*flags, "--compare", output="whole")
    assert json.loads((whole / "comparison.json").read_text())["rows"]["data"]["terms"]["total_variation"] > 0
    assert metrics(whole)[-1]["validation/denoising"] > 0
    out = unconditional(*flags)
    for left in ("checkpoint-2", "unet"):
        shutil.rmtree(out / left)
    unconditional(*flags, "--resume", "auto")
    assert not differ(weights(out), weights(whole))


@pytest.mark.slow
def test_bad_rows_of_a_stream_are_one_line(with_texts, capsys, monkeypatch):
    write_photos(texts=["a cat", "abcdefgh abcdefgh"])
    with_texts("--max_train_steps", 1)
    assert "cuts off the end of 4 of 8 texts of the first images, such as" in capsys.readouterr().err
    write_photos(texts=["a cat", " "])
    with_texts("--max_train_steps", 1, texts=("--prompt", "a cat"), output="one_text")
    assert "--caption_column text: 4 of 8 images have no text, the first is row 1" in refusal(with_texts, capsys)
    monkeypatch.setattr(streaming, "_EXAMPLES", 1)  # so that the others are read during the training
    error = refusal(with_texts, capsys, "--overwrite_output_dir")
    assert "--caption_column text: row 0 of piece " in error and "has no text: add one, or give one" in error


def feed_one_by_one(script):
    """As `feed`; each image is encoded alone, because the rounding of its latents could depend on the others."""
    feed(script)
    streamed_latents.AT_A_TIME = 1


@pytest.mark.slow
def test_two_processes_train_the_network_of_one(train, tmp_path):
    """A step takes all images of a pass over the data, so that one and two processes see the same ones in it."""
    write_photos()
    torch.manual_seed(0)
    autoencoder().save_pretrained("vae")
    flags = "--streaming --train_data_dir photos --vae vae --model_config_name_or_path tiny --cache_dir cache".split()
    one, two = by_one_and_two(tmp_path, flags, feed_one_by_one, weights, images=8)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-6, atol=1e-9)
