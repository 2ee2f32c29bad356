"""train_reg.py --vae: a network in the latents of an autoencoder, with losses on the decoded picture."""

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, DiffusionPipeline, LDMPipeline, VQModel
from runs import differ, metrics, refusal, weights
from safetensors.torch import load_file

from reg_diffusers import RegDDPMPipeline, Term
from reg_diffusers.autoencoder import encoded
from reg_diffusers.cli import main
from reg_diffusers.data.latents import latents_of
from reg_diffusers.regularizers import total_variation
from reg_diffusers.runtime.errors import UsageError
from reg_diffusers.views import Affine, DecodedImage

pytestmark = pytest.mark.training

BLOCKS = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
}
TINY = {
    "encoder_block_out_channels": (8, 8),
    "decoder_block_out_channels": (8, 8),
    "num_encoder_blocks": (1, 1),
    "num_decoder_blocks": (1, 1),
}


def save_vae(kind=AutoencoderKL, folder="vae", seed=0, **config):
    torch.manual_seed(seed)
    config = (TINY if kind is AutoencoderTiny else BLOCKS) | {"latent_channels": 4, "scaling_factor": 2.0} | config
    vae = kind(**config)
    vae.save_pretrained(folder)
    return vae.eval()


def of_the_autoencoder(out):
    return load_file(out / "vqvae" / "diffusion_pytorch_model.safetensors")


def photos():
    """The files of the images, and the images (N, C, H, W) in [-1, 1]."""
    files = sorted(Path("photos").rglob("*.png"))
    pixels = torch.stack([torch.from_numpy(np.array(PIL.Image.open(file))) for file in files])
    return files, pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


@pytest.fixture
def in_latents(train, image_folder, tmp_path):
    """Runs the script in the latents, 4 x 8 x 8, of images of 16 x 16."""
    image_folder(name="photos", size=(16, 16))

    def run(*flags, vae="vae", **kwargs):
        chosen = () if vae is None else ("--vae", vae)
        given = "--train_data_dir photos --resolution 16 --regularizer total_variation --reg_weight 0.1".split()
        quick = "--cache_dir cache --max_train_steps 4 --num_threads 1".split()
        return train(*given, *chosen, *quick, *flags, **kwargs)

    return run


@pytest.mark.parametrize("kind", [AutoencoderKL, AutoencoderTiny, VQModel])
def test_a_latent_model_is_trained_and_stock_diffusers_draws_the_same_images(in_latents, kind):
    save_vae(kind)
    out = in_latents("--preview_steps", 2)
    assert metrics(out)[-1]["total_variation"] > 0
    assert PIL.Image.open(out / "samples" / "step-000002.png").size[0] > 64
    assert weights(out)["conv_in.weight"].shape[1] == 4
    assert not differ(load_file("vae/diffusion_pytorch_model.safetensors"), of_the_autoencoder(out))
    images = {}
    for loader in (RegDDPMPipeline, LDMPipeline, DiffusionPipeline):
        pipeline = loader.from_pretrained(str(out))
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
        generator = torch.Generator().manual_seed(1)
        drawn = pipeline(batch_size=2, generator=generator, num_inference_steps=2, output_type="np")
        images[loader] = drawn.images
    assert images[LDMPipeline].shape == (2, 16, 16, 3)
    for other in images.values():
        np.testing.assert_allclose(other, images[LDMPipeline], atol=1e-5)


@pytest.mark.slow
def test_the_loss_on_the_decoded_picture_falls(in_latents):
    """With a large weight at every noise level, x0_hat loses variation after decoding."""
    save_vae()
    variation = {}
    flags = "--prediction_type sample --reg_weighting constant --max_train_steps 60 --learning_rate 3e-3".split()
    for weight in (0, 100):
        out = in_latents(*flags, "--reg_weight", weight, output=f"w{weight}")
        variation[weight] = metrics(out)[-1]["total_variation"]
    assert variation[100] < 0.8 * variation[0]


def test_the_value_in_the_log_is_the_loss_of_the_decoded_estimate(in_latents, capsys):
    vae = save_vae()
    in_latents()
    printed = capsys.readouterr().out
    assert "latents    4 x 8 x 8" in printed and "L' sees decoded images" in printed
    _, images = photos()
    shown = total_variation(DecodedImage(vae)(encoded(vae, images))).mean().item()
    assert f"total_variation {shown:.3g} ±" in printed


def test_a_decoder_in_bfloat16_is_not_reported_as_the_precision_of_the_loss(in_latents, capsys):
    save_vae()
    in_latents("--mixed_precision", "bf16")
    assert "bfloat16" not in capsys.readouterr().err


def test_the_card_says_that_a_loss_sees_the_decoded_latent(in_latents):
    save_vae()
    card = (in_latents() / "README.md").read_text()
    assert "the sample that the output of the network implies, a latent; a loss sees it decoded to an image" in card


def test_a_resumed_run_in_latents_equals_an_uninterrupted_one(in_latents):
    save_vae()
    flags = ("--random_flip", "--checkpointing_steps", 2)
    whole = weights(in_latents(*flags, output="whole"))
    out = in_latents(*flags)
    shutil.rmtree(out / "checkpoint-4")
    shutil.rmtree(out / "unet")
    in_latents(*flags, "--resume", "auto")
    assert not differ(weights(out), whole)


def test_a_comparison_measures_pictures(in_latents, image_folder):
    save_vae()
    out = in_latents("--compare")
    rows = json.loads((out / "comparison.json").read_text())["rows"]
    _, images = photos()
    least, most = total_variation(images).min().item(), total_variation(images).max().item()
    assert least <= rows["data"]["terms"]["total_variation"] <= most  # of the pictures, not of their latents
    assert rows["without"]["denoising_loss"] > 0 and (out / "plain" / "vqvae").is_dir()


def test_fine_tuning_keeps_the_autoencoder_of_the_pipeline(in_latents):
    save_vae()
    first = in_latents()
    tuned = in_latents("--pretrained_model_name_or_path", first, vae=None, model=(), output="tuned")
    assert RegDDPMPipeline.from_pretrained(str(tuned)).image_shape == (3, 16, 16)
    assert not differ(of_the_autoencoder(first), of_the_autoencoder(tuned))


def test_samples_and_guidance_of_a_latent_model_see_pictures(in_latents):
    save_vae()
    pipeline = RegDDPMPipeline.from_pretrained(str(in_latents()))
    scores = {}
    for weight in (0.0, 1e-2):
        output = pipeline(
            2,
            torch.Generator().manual_seed(0),
            4,
            "latent",
            regularizers=[total_variation],
            guidance=[Term(total_variation, weight)],
        )
        decoded = pipeline.decode(output.images)
        torch.testing.assert_close(output.scores["total_variation"], total_variation(decoded))
        scores[weight] = output.scores["total_variation"].mean()
    assert scores[1e-2] < scores[0.0]


def test_evaluate_measures_a_latent_model_by_its_pictures(in_latents, image_folder, evaluate, capsys):
    image_folder(number=40, name="photos", size=(16, 16))
    save_vae()
    out = in_latents()
    capsys.readouterr()
    flags = ("--num_inference_steps", 2, "--num_images", 20, "--features", "pixels", "--num_threads", 1)
    printed = evaluate("--model", out, "--regularizer", "total_variation", *flags)
    assert "3 x 16 x 16" in printed
    assert np.load("evaluation/samples/out.npz")["arr_0"].shape == (20, 3, 16, 16)


# The cache


@pytest.mark.slow
def test_latents_are_computed_once_and_again_for_other_images_or_weights(in_latents, capsys):
    def files():
        return {path.name: path.stat().st_mtime_ns for path in Path("cache", "reg_diffusers").glob("latents-*.npy")}

    save_vae()
    in_latents(output="a")
    first = files()
    in_latents(output="b")
    assert files() == first and len(first) == 1
    save_vae(seed=1)
    in_latents(output="c")
    assert len(files()) == 2
    photos()[0][0].unlink()
    in_latents(output="d")
    assert len(files()) == 3
    name = next(iter(first))
    Path("cache", "reg_diffusers", name).write_bytes(b"damaged")
    save_vae()
    PIL.Image.new("RGB", (16, 16)).save("photos/dogs/0.png")
    in_latents(output="e")
    assert len(files()) == 4


class Numbers:
    """Three images of one pixel, whose latents are known."""

    fingerprint, shape, classes, white = "numbers", (1, 1, 2), None, None

    def __len__(self):
        return 3

    class normalization:
        @staticmethod
        def normalize(values):
            return values

    def __getitems__(self, indices):
        return {"values": torch.tensor([[[[float(i), 10.0 * i]]] for i in indices])}

    def labels(self, indices):
        return {"ids": torch.tensor(indices)}


def test_mirrored_images_have_latents_of_their_own_and_a_damaged_file_is_written_again(tmp_path):
    def encode(images):
        return images.cumsum(-1)  # not equivariant

    for _ in range(2):
        data = latents_of(Numbers(), encode, "key", tmp_path, torch.device("cpu"), mirrored=True)
        batch = data.__getitems__([2, 1])
        assert batch["values"].tolist() == [[[[2, 22]]], [[[1, 11]]]]
        assert batch["mirrored"].tolist() == [[[[20, 22]]], [[[10, 11]]]]
        (path,) = tmp_path.iterdir()
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UsageError, match="latents of image 1 are not finite"):
        latents_of(Numbers(), lambda x: 1 / (x - 1), "other", tmp_path, torch.device("cpu"), mirrored=False)


@pytest.mark.parametrize("config", [{"scaling_factor": 0.5}, {"scaling_factor": 3.0, "shift_factor": 0.7}])
def test_decoding_inverts_the_coordinates_of_encoding(config, tmp_path):
    vae = save_vae(folder=tmp_path, **config)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    latents = encoded(vae, images)
    mean = vae.encode(images).latent_dist.mean
    expected = (mean - config.get("shift_factor", 0.0)) * config["scaling_factor"]
    torch.testing.assert_close(latents, expected)
    torch.testing.assert_close(DecodedImage(vae)(latents), vae.decode(mean).sample, rtol=1e-4, atol=1e-5)


def test_the_inverse_of_affine_units():
    x = torch.randn(3, 2, 4, 4)
    for affine in (Affine(2.0, 5.0), Affine((2.0, 0.5), (1.0, -3.0)), Affine((2.0, 4.0), 1.0)):
        torch.testing.assert_close(affine.inverse(affine(x)), x)


# What is refused


def test_what_does_not_fit_is_refused_in_one_line(in_latents, capsys, tiny_unet, tmp_path):
    refused = partial(refusal, in_latents, capsys)
    assert "--vae ./nowhere: no such folder" in refused(vae="./nowhere")
    save_vae()
    assert "is a file: name the folder of the model" in refused(vae="vae/config.json")
    tiny_unet().save_pretrained("unet")
    assert "class UNet2DModel is not supported: use one of AutoencoderKL" in refused(vae="unet")
    save_vae()
    assert "multiples of 2, such as 14 or 16" in refused("--resolution", 15)
    assert "drop the flag, or add --streaming, which encodes each window" in refused("--random_crop")
    assert "L' sees decoded images" in refused("--reg_units", "model")
    np.save("fields.npy", np.zeros((8, 3, 16, 16), np.float32) + np.linspace(0, 1, 16, dtype=np.float32))
    assert "are fields" in refused("--train_data_dir", "fields.npy")
    save_vae(folder="other", latent_channels=3)
    tiny_unet(channels=4).save_pretrained("of_four")
    given = ("--pretrained_model_name_or_path", "of_four")
    assert "latents of 3 channels, but the given model has 4" in refused(*given, vae="other", model=())
    first = in_latents(output="first")
    given = ("--pretrained_model_name_or_path", first)
    assert "has an autoencoder of its own; drop the flag" in refused(*given, model=())
    assert not (tmp_path / "out").exists()


def test_a_run_is_not_continued_with_another_autoencoder_under_the_same_name(in_latents, capsys):
    save_vae()
    in_latents("--checkpointing_steps", 2)
    save_vae(seed=3)
    assert "trained with other settings: autoencoder" in refusal(in_latents, capsys, "--resume", "auto")


def test_a_diagnosis_of_a_latent_model_is_refused(in_latents, capsys):
    save_vae()
    given = ("--pretrained_model_name_or_path", str(in_latents()))
    with pytest.raises(SystemExit):
        main(["diagnose", "--train_data_dir", "photos", "--regularizer", "total_variation", *given])
    assert "works in latents, which a diagnosis does not support" in capsys.readouterr().err.splitlines()[-1]


def test_a_shift_that_stock_diffusers_would_not_undo_is_left_out_and_said(in_latents, capsys):
    save_vae(shift_factor=0.3)
    out = in_latents()
    assert "shift_factor is left out, because diffusers' pipeline reads" in capsys.readouterr().err
    assert json.loads((out / "vqvae" / "config.json").read_text())["shift_factor"] is None
