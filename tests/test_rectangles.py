"""--resolution WIDTHxHEIGHT: images that are not square, in training and in everything after it."""

import json
import shutil

import numpy as np
import PIL.Image
import pytest
import torch
from runs import differ, metrics, refusal, weights

from reg_diffusers import RegDDPMPipeline, Term
from reg_diffusers.cli import main
from reg_diffusers.data.training_data import load_training_data
from reg_diffusers.networks.build import load_given_model
from reg_diffusers.regularizers import total_variation
from reg_diffusers.settings import DataSettings, ModelSettings
from reg_diffusers.settings.arguments import as_flags, parse_args
from reg_diffusers.settings.size import as_setting, shown, sides

pytestmark = pytest.mark.training
SHAPE = (1, 8, 16)  # of --resolution 16x8 and the tiny network


@pytest.fixture
def photos(image_folder):
    return ("--train_data_dir", str(image_folder(number=40, size=(20, 12), name="photos")))


def sizes(folder):
    return {PIL.Image.open(file).size for file in folder.glob("*.png")}


@pytest.mark.parametrize(
    "text, setting, size", [("64", 64, (64, 64)), ("32x24", "32x24", (24, 32)), ("8X8", 8, (8, 8))]
)
def test_a_size_is_a_side_or_width_x_height(text, setting, size):
    settings = parse_args(["--train_data_dir", "photos", "--resolution", text])
    assert settings.data.resolution == setting == as_setting(size) and sides(setting) == size
    assert parse_args(as_flags(settings)) == settings


def test_messages_name_width_and_height():
    assert shown((24, 32)) == "32 wide and 24 high"


@pytest.mark.parametrize("text", ["0", "16x", "x16", "16x0", "-8", "1.5", "16*8", "16x8x3"])
def test_other_sizes_are_refused(text, capsys):
    with pytest.raises(SystemExit):
        parse_args([f"--resolution={text}"])
    assert "neither a side such as 64 nor WIDTHxHEIGHT such as 256x192" in capsys.readouterr().err


@pytest.mark.slow
def test_everything_draws_and_measures_rectangles(train, photos, tmp_path, capsys):
    out = train(*photos, "--resolution", "16x8", "--compare", "--max_train_steps", 2, "--preview_steps", 1)
    pipeline = RegDDPMPipeline.from_pretrained(str(out))
    assert pipeline.image_shape == SHAPE
    assert pipeline(num_inference_steps=1).images[0].size == (16, 8)
    assert json.loads((out / "reg_config.json").read_text())["data"]["shape"] == list(SHAPE)
    assert "8 x 16 images" in (out / "README.md").read_text()

    main(["evaluate", "--model", str(out), "--num_inference_steps", "1", "--num_images", "20", "--output", "judged"])
    main(["sample", "--model", str(out), "--num_images", "2", "--num_inference_steps", "1", "--output", "drawn"])
    assert sizes(tmp_path / "drawn") == {(16, 8)}
    main(["diagnose", "--model", str(out), "--regularizer", "total_variation", "--num_levels", "2"])
    assert "of 40 images" in capsys.readouterr().out

    assert load_given_model(ModelSettings(pretrained_model_name_or_path=str(out))).size == (8, 16)


def test_a_rectangle_is_resized_to_cover_it_and_cropped_to_the_centre(tmp_path):
    # twice as wide as high, like the size: nothing is cropped
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, 8:] = 200
    (tmp_path / "photos").mkdir()
    PIL.Image.fromarray(pixels).resize((32, 16), PIL.Image.Resampling.NEAREST).save(tmp_path / "photos" / "0.png")
    data = load_training_data(
        DataSettings(train_data_dir=str(tmp_path / "photos"), cache_dir=str(tmp_path), resolution="16x8")
    )
    values = data.__getitems__([0])["values"][0, 0]
    assert values.shape == (8, 16) and (values[:, :7] == 0).all() and (values[:, 9:] == 200).all()


def test_a_rectangle_resumes_bit_for_bit_and_streams(train, photos):
    flags = (*photos, "--resolution", "16x8", "--random_flip", "--checkpointing_steps", 2)
    out = train(*flags, "--max_train_steps", 4)
    whole, last = weights(out), metrics(out)[-1]
    shutil.rmtree(out / "checkpoint-4")
    train(*flags, "--max_train_steps", 4, "--resume", "auto")
    assert not differ(whole, weights(out)) and metrics(out)[-1] == last
    streamed = train(*flags, "--max_train_steps", 1, "--streaming", output="streamed")
    assert RegDDPMPipeline.from_pretrained(str(streamed)).image_shape == SHAPE


def test_another_size_is_another_run(train, photos, capsys):
    train(*photos, "--resolution", "16x8", "--checkpointing_steps", 1, "--max_train_steps", 1)
    message = refusal(train, capsys, *photos, "--resolution", "8x16", "--max_train_steps", 2, "--resume", "auto")
    assert "--resolution 16x8 -> 8x16" in message


def test_sides_that_the_network_cannot_halve_are_refused(train, photos, capsys):
    message = refusal(train, capsys, *photos, "--resolution", "16x7", "--max_train_steps", 1)
    assert "--resolution 16x7: the network halves" in message and "such as 6 or 8" in message


def test_conditioning_images_have_the_size_of_the_model(train, tmp_path):
    folder = tmp_path / "pairs"
    folder.mkdir()
    lines = []
    for index in range(4):
        for name in (f"{index}.png", f"edges_{index}.png"):
            PIL.Image.new("RGB", (20, 12), (40 * index, 90, 10)).save(folder / name)
        lines.append(json.dumps({"file_name": f"{index}.png", "edges_file_name": f"edges_{index}.png"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    flags = ("--train_data_dir", folder, "--conditioning_image_column", "edges")
    out = train(*flags, "--resolution", "16x8", "--max_train_steps", 1)
    (tmp_path / "conditions").mkdir()
    PIL.Image.new("RGB", (30, 30)).save(tmp_path / "conditions" / "a.png")
    sample = ["sample", "--model", str(out), "--num_images", "1", "--num_inference_steps", "1", "--output", "drawn"]
    main([*sample, "--condition_dir", "conditions"])
    assert sizes(tmp_path / "drawn") == {(16, 8)}
    main([*sample[:-1], "other", "--condition_dir", "conditions", "--size", "8x12"])
    assert sizes(tmp_path / "other") == {(8, 12)}


def test_another_size_can_be_drawn(train, photos, tmp_path, capsys):
    out = train(*photos, "--resolution", "16x8", "--max_train_steps", 1)
    pipeline = RegDDPMPipeline.from_pretrained(str(out))

    def draw(**size):
        generator = torch.Generator().manual_seed(3)
        guidance = [Term(total_variation, 0.1)]
        return pipeline(2, generator, 2, "pt", guidance=guidance, regularizers=[total_variation], **size).images

    own, wide = draw(), draw(height=12, width=20)
    assert torch.equal(own, draw(height=8)) and own.shape == (2, 1, 8, 16)
    pipeline.unet.register_to_config(sample_size=(12, 20))
    assert torch.equal(wide, draw()) and wide.shape == (2, 1, 12, 20)
    for size, message in (
        ({"height": 9}, "height 9, width 20: both must be multiples of 2"),
        ({"width": 0}, "width must"),
    ):
        with pytest.raises(ValueError, match=message):
            draw(**size)
    sample = ["sample", "--model", str(out), "--num_images", "1", "--num_inference_steps", "1", "--output", "drawn"]
    main([*sample, "--size", "20x12"])
    assert sizes(tmp_path / "drawn") == {(20, 12)}
    for size, message in (
        ("16x8", "size 20x12 instead of 16x8"),
        ("20x9", "--size 20x9: height 9, width 20: both must"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main([*sample, "--size", size])
        assert message in capsys.readouterr().err


def test_latents_of_rectangles(train, photos, capsys):
    from test_latents import save_vae

    save_vae()
    out = train(*photos, "--vae", "vae", "--resolution", "16x8", "--max_train_steps", 1)
    pipeline = RegDDPMPipeline.from_pretrained(str(out))
    assert pipeline.image_shape == (3, 8, 16) and pipeline._size == (4, 8)
    assert pipeline(num_inference_steps=1, height=16, width=12).images[0].size == (12, 16)
    with pytest.raises(ValueError, match="height 16, width 14: both must be multiples of 4"):
        pipeline(height=16, width=14)
    message = refusal(
        train, capsys, *photos, "--vae", "vae", "--resolution", "16x7", "--max_train_steps", 1, output="other"
    )
    assert "--resolution 16x7: the autoencoder reduces images by 2" in message


def test_losses_guide_rectangles(train, photos):
    pipeline = RegDDPMPipeline.from_pretrained(str(train(*photos, "--resolution", "16x8", "--max_train_steps", 1)))
    images = pipeline(
        batch_size=2, num_inference_steps=2, guidance=[Term(total_variation, weight=1.0)], output_type="pt"
    ).images
    assert images.shape == (2, *SHAPE) and torch.isfinite(images).all()
