"""Networks that are conditioned by an image: from a table with two columns of images to samples."""

import json

import numpy as np
import PIL.Image
import pytest
import torch

from reg_diffusers import RegDDPMPipeline
from reg_diffusers.data.training_data import load_training_data
from reg_diffusers.networks.conditions import Conditions
from reg_diffusers.runtime.errors import UsageError
from reg_diffusers.settings.arguments import parse_args
from reg_diffusers.training.batches import flip_half

pytestmark = pytest.mark.training

COLUMN = ("--conditioning_image_column", "conditioning")


@pytest.fixture
def pairs(tmp_path):
    """A folder of 8 x 8 grey images, each with its negative to be made from it, as `datasets` reads image folders."""
    folder = tmp_path / "pairs"
    (folder / "from").mkdir(parents=True)
    generator = np.random.default_rng(0)
    rows = []
    for index in range(32):
        pixels = np.kron(generator.choice([0, 255], (2, 2)), np.ones((4, 4))).astype(np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f"{index:02}.png")
        PIL.Image.fromarray(255 - pixels).save(folder / "from" / f"{index:02}.png")
        rows.append({"file_name": f"{index:02}.png", "conditioning_file_name": f"from/{index:02}.png"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def load(folder, *flags):
    return load_training_data(parse_args(["--train_data_dir", str(folder), "--resolution", "8", *flags]).data)


def test_a_batch_has_both_images_of_each_row(pairs):
    data = load(pairs, *COLUMN)
    batch = data.__getitems__([5, 2])
    assert data.shape == (1, 8, 8) and data.condition_channels == 1
    assert torch.equal(batch["values"], 255 - batch["condition"])
    without = load(pairs)
    assert without.condition_channels == 0 and "condition" not in without.__getitems__([0])
    other_way = load(pairs, "--image_column", "conditioning", "--conditioning_image_column", "image")
    assert torch.equal(other_way.__getitems__([5, 2])["values"], batch["condition"])


def test_a_row_with_either_image_damaged_is_left_out(pairs):
    (pairs / "03.png").write_bytes(b"no image")
    (pairs / "from" / "07.png").write_bytes(b"no image")
    data = load(pairs, *COLUMN, "--skip_bad_images")
    assert len(data) == 30
    batch = data.__getitems__(list(range(30)))
    assert torch.equal(batch["values"], 255 - batch["condition"])


def test_both_are_mirrored_together():
    torch.manual_seed(0)
    x = torch.arange(4.0).expand(100, 1, 2, 4)
    flipped, conditions = flip_half(x, Conditions({"condition": -x, "class_labels": torch.arange(100)}))
    assert torch.equal(conditions["condition"], -flipped) and not torch.equal(flipped, x)
    assert torch.equal(conditions["class_labels"], torch.arange(100))


def test_unknown_columns_are_named(pairs):
    with pytest.raises(
        UsageError, match=r"--conditioning_image_column 'mask' is not a column of images.*conditioning"
    ):
        load(pairs, "--conditioning_image_column", "mask")
    np.save(pairs.parent / "f.npy", np.zeros((3, 1, 8, 8)))
    with pytest.raises(UsageError, match="fields lack"):
        load(pairs.parent / "f.npy", *COLUMN)


@pytest.mark.slow
def test_the_network_learns_to_make_one_image_from_the_other(train, pairs, tmp_path):
    common = ("--train_data_dir", pairs, "--resolution", 8, "--max_train_steps", 150, "--lr_warmup_steps", 5)
    common += ("--learning_rate", 5e-3, "--lr_scheduler", "constant", "--prediction_type", "sample", "--random_flip")
    common += ("--ddpm_num_inference_steps", 5, "--no-use_ema")
    (tmp_path / "of_pairs.py").write_text(
        "def negative(x0_hat, /, *, condition):\n    return ((x0_hat + condition) ** 2).flatten(1).mean(1)\n"
        "negative.needs = ('condition',)\n"
    )
    out = train(*common, *COLUMN, "--regularizer", "of_pairs:negative", "--reg_weight", 1, "--compare")
    rows = json.loads((out / "comparison.json").read_text())["rows"]
    assert rows["data"]["terms"]["negative"] == 0
    assert rows["with negative"]["terms"]["negative"] < 0.3

    pipeline = RegDDPMPipeline.from_pretrained(str(out))
    assert pipeline.unet.config.in_channels == 2 and pipeline.unet.config.out_channels == 1
    pipeline.set_progress_bar_config(disable=True)
    data = load(pairs, *COLUMN)
    condition = data.normalization.normalize(data.__getitems__(list(range(8)))["condition"])
    samples = 2 * pipeline(8, num_inference_steps=50, condition=condition, output_type="pt").images - 1
    assert ((samples + condition) ** 2).mean() < 0.3  # 2 if it did not look

    again = ("--pretrained_model_name_or_path", str(out))
    finetuned = train("--train_data_dir", pairs, *COLUMN, "--max_train_steps", 1, model=again, output="again")
    assert RegDDPMPipeline.from_pretrained(str(finetuned)).unet.config.in_channels == 2


def test_forgetting_the_column_of_a_conditional_model_is_said(train, pairs, capsys, tmp_path):
    out = train("--train_data_dir", pairs, *COLUMN, "--resolution", 8, "--max_train_steps", 1)
    with pytest.raises(SystemExit):
        train("--train_data_dir", pairs, model=("--pretrained_model_name_or_path", str(out)), output="forgot")
    assert not (tmp_path / "forgot").exists()
    assert "name the images by --conditioning_image_column" in capsys.readouterr().err
