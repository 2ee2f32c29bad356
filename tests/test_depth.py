"""Numbers of more than 8 or 24 bits: deep pictures and fields far from 0, from the files to samples and back."""

import io
import struct
import zlib

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DDPMScheduler

from reg_diffusers import RegDDPMPipeline
from reg_diffusers.cli.conditions import ConditionFolder
from reg_diffusers.data.training_data import load_training_data
from reg_diffusers.runtime.errors import UsageError
from reg_diffusers.sampling.sampler import Sampler, model_sha256
from reg_diffusers.sampling.settings import SampleSettings
from reg_diffusers.sampling.store import ArrayFile
from reg_diffusers.settings.arguments import parse_args

pytestmark = pytest.mark.training

TABLE_AND_STREAM = pytest.mark.parametrize("streaming", [(), ("--streaming",)], ids=["table", "stream"])


@pytest.fixture
def load(tmp_path):
    def load(*flags):
        return load_training_data(parse_args([*map(str, flags), "--cache_dir", str(tmp_path / "cache")]).data)

    return load


def write(folder, images, suffix="png"):
    folder.mkdir(exist_ok=True)
    for number, image in enumerate(images):
        PIL.Image.fromarray(image).save(folder / f"{number}.{suffix}")
    return folder


def values_of(data):
    return data.examples.__getitems__(list(range(len(data.examples))))["values"]


# Pictures


@TABLE_AND_STREAM
def test_12_bits_in_16_are_reported_with_the_fix(load, tmp_path, capsys, streaming):
    folder = write(tmp_path / "scans", [np.full((8, 8), value, np.uint16) for value in (0, 2000, 4095)])
    data = load("--train_data_dir", folder, "--resolution", 8, *streaming)
    assert values_of(data).amax((1, 2, 3)).tolist() == [0, 2000 >> 8, 15]
    said = capsys.readouterr().err
    assert f"--train_data_dir {folder}: 16-bit images use 12 bits only: the largest value in 3 images is 4,095" in said
    assert "become 0 to 15 of 255. Multiply them by 16, or pass --preserve_input_precision" in said
    assert data.note == "16-bit images are scaled by 65535: they keep their upper 8 bits"
    fixed = write(tmp_path / "fixed", [np.full((8, 8), 16 * value, np.uint16) for value in (0, 2000, 4095)])
    data = load("--train_data_dir", fixed, "--resolution", 8, *streaming)
    assert values_of(data).amax((1, 2, 3)).tolist() == [0, 125, 255] and "bits" not in capsys.readouterr().err


@TABLE_AND_STREAM
def test_integer_tiffs_are_scaled_by_one_rule(load, tmp_path, streaming):
    """The dark one of two images is dark, too."""
    folder = write(tmp_path / "wide", [np.full((8, 8), value, np.int32) for value in (200, 40_000)], "tif")
    data = load("--train_data_dir", folder, "--resolution", 8, *streaming)
    assert values_of(data).amax((1, 2, 3)).tolist() == [0, 40_000 >> 8]
    assert "scaled by 65535" in data.note
    folder = write(tmp_path / "narrow", [np.full((8, 8), value, np.int32) for value in (3, 200)], "tif")
    data = load("--train_data_dir", folder, "--resolution", 8, *streaming)
    assert values_of(data).amax((1, 2, 3)).tolist() == [3, 200]
    assert data.note == "images of 32-bit integers hold 0 to 255 and are not scaled"


@pytest.mark.parametrize("value", [-1, 70_000])
def test_integers_that_no_rule_holds_are_refused_by_name(load, tmp_path, value):
    folder = write(tmp_path / "odd", [np.full((8, 8), number, np.int32) for number in (300, value)], "tif")
    with pytest.raises(
        UsageError, match=r"image .*1\.tif .*its values range from .* white is 65,535 in this data set: store .* \.npy"
    ):
        load("--train_data_dir", folder, "--resolution", 8)


def test_a_dark_16_bit_pgm_stays_dark(load, tmp_path):
    folder = write(tmp_path / "pgm", [np.full((8, 8), 255, np.uint16), np.full((8, 8), 65_535, np.uint16)], "pgm")
    data = load("--train_data_dir", folder, "--resolution", 8)
    assert values_of(data).amax((1, 2, 3)).tolist() == [0, 255] and "scaled by 65535" in data.note


def test_16_bit_colours_with_empty_upper_bits_are_reported(load, tmp_path, capsys):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = b"".join(b"\0" + np.full((8, 3), 4095, ">u2").tobytes() for _ in range(8))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0))
    (tmp_path / "rgb").mkdir()
    png = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (tmp_path / "rgb" / "0.png").write_bytes(png)
    assert PIL.Image.open(io.BytesIO(png)).mode == "RGB"
    data = load("--train_data_dir", tmp_path / "rgb", "--resolution", 8)
    assert values_of(data).unique().tolist() == [15]
    assert "16-bit images use 12 bits" in capsys.readouterr().err and "scaled by 65535" in data.note


def test_pictures_of_8_bits_are_left_without_a_word(load, tmp_path, capsys):
    data = load("--train_data_dir", write(tmp_path / "plain", [np.full((8, 8), 3, np.uint8)]), "--resolution", 8)
    assert data.note == "" and "bits" not in capsys.readouterr().err


def test_conditions_for_sampling_follow_one_rule(tmp_path, capsys):
    folder = write(tmp_path / "maps", [np.full((8, 8), value, np.int32) for value in (200, 300)], "tif")
    conditions = ConditionFolder(folder, (8, 8), 1)
    assert [condition.max().item() for condition in (conditions[0], conditions[1])] == pytest.approx(
        [-1, 1 / 127.5 - 1]
    )
    assert f"--condition_dir {folder}: 16-bit images use 9 bits" in capsys.readouterr().err


# Fields


@pytest.mark.parametrize(
    "array",
    [
        1e9 + np.random.default_rng(0).uniform(size=(4, 1, 8, 8)),
        1_700_000_000 + np.arange(256).reshape(4, 1, 8, 8),
        1000 + np.random.default_rng(0).uniform(size=(4, 1, 8, 8)),
    ],
    ids=["offset", "Unix seconds", "small offset"],
)
def test_fields_far_from_0_keep_their_values(load, tmp_path, array):
    np.save(tmp_path / "f.npy", array)
    data = load("--train_data_dir", tmp_path / "f.npy")
    samples = data.normalization.normalize(values_of(data))
    assert samples.dtype == torch.float32
    low, high = array.min(), array.max()
    torch.testing.assert_close(
        samples.double(), torch.from_numpy(2 * (array - low) / (high - low) - 1), atol=1e-6, rtol=0
    )
    there_and_back = data.normalization.units(samples)
    torch.testing.assert_close(
        there_and_back.double(), torch.from_numpy(array * 1.0), atol=1e-4 * (high - low), rtol=0
    )


def test_samples_of_such_fields_keep_their_values(tiny_unet, tmp_path):
    """Through the pipeline, a file of samples, and back into a data set."""
    unet = tiny_unet()

    def drawn(offset):
        pipeline = RegDDPMPipeline(unet, DDPMScheduler(), {"offset": [offset], "scale": [0.5]})
        settings = SampleSettings(model_sha256=model_sha256(pipeline), scheduler="DDIM", num_inference_steps=2)
        return pipeline, Sampler(pipeline, settings).draw([0, 1])

    _, plain = drawn(0.0)
    pipeline, far = drawn(1e9)
    assert plain.dtype == torch.float32 and far.dtype == torch.float64
    assert plain.std() > 0.1
    torch.testing.assert_close(far - 1e9, plain.double(), atol=1e-6, rtol=0)
    images = pipeline(2, torch.Generator().manual_seed(0), 2, "np").images
    assert images.dtype == np.float64 and images.std() > 0.1
    store = ArrayFile(tmp_path / "f.npz", is_field=True)
    store.prepare()
    for index, sample in enumerate(far):
        store.write(index, sample)
    store.finish(2)
    data = load_training_data(parse_args(["--train_data_dir", str(tmp_path / "f.npz")]).data)
    assert torch.equal(values_of(data), far)


def test_a_channel_that_holds_no_steps_is_named(load, tmp_path, capsys):
    random = np.random.default_rng(0).uniform(size=(4, 1, 8, 8))
    array = np.concatenate([1e9 + 1000 * random, np.full_like(random, 3.0), random], 1).astype(np.float32)
    np.save(tmp_path / "f.npy", array)
    load("--train_data_dir", tmp_path / "f.npy")
    said = capsys.readouterr().err
    assert "channel 0 of the fields ranges from 1000000000 to 1000001024, where float32 numbers are 64 apart" in said
    assert "channel 1 of the fields is constant, 3, and becomes 0" in said and "channel 2" not in said
