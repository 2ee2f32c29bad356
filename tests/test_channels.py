"""--channels and --preserve_input_precision: conversions of channels, and all bits from the files to the samples."""

import io
import json

import numpy as np
import PIL.Image
import pytest
import torch
from runs import refusal, weights

from reg_diffusers import RegDDPMPipeline
from reg_diffusers.cli import main
from reg_diffusers.data.deep import decode_deep, read_pixels
from reg_diffusers.data.depth import EIGHT_BITS, SIXTEEN_BITS
from reg_diffusers.data.pictures import decode, open_file
from reg_diffusers.runtime.errors import UsageError
from reg_diffusers.sampling.png import encode_png

pytestmark = pytest.mark.training

DEEP = "--preserve_input_precision"


def random(shape, dtype=np.uint8, seed=0):
    if dtype == np.float32:
        return np.random.default_rng(seed).normal(3, 2, shape).astype(dtype)
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


def write(folder, images, suffix="png"):
    folder.mkdir(exist_ok=True)
    for number, image in enumerate(images):
        if image.dtype == np.uint16 and image.ndim == 3 and suffix == "png":
            (folder / f"{number:03}.png").write_bytes(encode_png(image))
        else:
            PIL.Image.fromarray(image).save(folder / f"{number:03}.{suffix}")
    return folder


def values_of(data):
    return data.examples.__getitems__(list(range(len(data.examples))))["values"]


def samples_of(data):
    return data.normalization.normalize(values_of(data))


def tiff(image, **options):
    tifffile = pytest.importorskip("tifffile")
    file = io.BytesIO()
    tifffile.imwrite(file, image, **options)
    return file.getvalue()


# Channels


@pytest.mark.parametrize("streaming", [(), ("--streaming",)], ids=["table", "stream"])
def test_channels_are_converted_by_the_stated_rules(load, tmp_path, streaming):
    pixels = random((8, 8, 4))
    folder = write(tmp_path / "photos", [pixels])
    colours, opacity = pixels[..., :3].astype(float), pixels[..., 3:] / 255
    rgb = (colours * opacity + 255 * (1 - opacity)).transpose(2, 0, 1)
    kept = {n: values_of(load("--train_data_dir", folder, "--channels", n, *streaming))[0].numpy() for n in (1, 3, 4)}
    assert np.abs(kept[3] - rgb).max() <= 1
    assert np.abs(kept[1][0] - np.tensordot([0.299, 0.587, 0.114], rgb, 1)).max() <= 2
    assert (kept[4][3] == pixels[..., 3]).all()
    seen = pixels[..., 3] > 32  # of colours that are almost transparent, 8 bits keep little
    assert np.abs(kept[4][:3] - colours.transpose(2, 0, 1))[:, seen].max() <= 4


def test_channels_that_the_files_lack_are_reported(train, load, tmp_path, capsys):
    grey, colour = write(tmp_path / "grey", [random((8, 8))]), write(tmp_path / "colour", [random((8, 8, 3))])
    for folder in (grey, colour):
        error = refusal(train, capsys, "--train_data_dir", folder, "--channels", 4)
        assert (
            "--channels 4: none of 1 images looked at has transparency, the fourth channel: use --channels 3" in error
        )
    data = load("--train_data_dir", grey, "--channels", 3)
    assert "all 1 images looked at are grey, so their three channels are equal" in data.note
    assert "grey by luma" in load("--train_data_dir", colour, "--channels", 1).note
    np.save(tmp_path / "fields.npy", np.zeros((2, 1, 8, 8), np.float32))
    error = refusal(train, capsys, "--train_data_dir", "fields.npy", "--channels", 3)
    assert "--channels 3: fields keep their channels, here 1; drop it" in error
    assert "invalid choice: 2" in refusal(train, capsys, "--train_data_dir", grey, "--channels", 2)


def test_a_model_of_transparent_images_trains_samples_and_is_evaluated(train, tmp_path, capsys):
    write(tmp_path / "photos", [random((8, 8, 4), seed=seed) for seed in range(24)])
    out = train("--train_data_dir", "photos", "--channels", 4, "--max_train_steps", 2, "--compare")
    assert "data       24 images of 4 x 8 x 8" in capsys.readouterr().out
    main(["sample", "--model", str(out), "--num_images", "2", "--num_inference_steps", "2", "--output", "drawn"])
    assert PIL.Image.open("drawn/000000.png").mode == "RGBA"
    flags = ("--train_data_dir", "photos", "--channels", 1, "--pretrained_model_name_or_path", out)
    error = refusal(train, capsys, *flags, model=(), output="tuned")
    assert "--channels 1: the given model has 4 channels; drop the flag" in error


# Bits


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_all_16_bits_of_a_png_are_read(channels):
    pixels = random((9, 7, channels), np.uint16)
    file = io.BytesIO(encode_png(pixels))
    found, kind = read_pixels(file, open_file)
    assert (found == pixels).all() and kind.depth == SIXTEEN_BITS and kind.channels == channels
    assert np.array_equal(np.asarray(PIL.Image.open(file)), pixels[..., 0] if channels == 1 else pixels >> 8)


@pytest.mark.parametrize(
    "options",
    [{}, {"compression": "zlib", "predictor": True}, {"byteorder": ">"}, {"planarconfig": "separate"}],
    ids=["plain", "deflate", "big-endian", "planes"],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_all_bits_of_a_tiff_are_read(options, dtype):
    pixels = random((9, 7, 3), dtype)
    options = {name: value for name, value in options.items() if name != "predictor" or dtype != np.float32}
    planes = np.moveaxis(pixels, -1, 0) if "planarconfig" in options else pixels
    found, _ = read_pixels(io.BytesIO(tiff(planes, photometric="rgb", **options)), open_file)
    assert found.dtype == dtype and (found == pixels).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8])
def test_a_picture_of_8_bits_is_that_of_the_usual_way(mode, orientation):
    image, file = PIL.Image.fromarray(random((40, 50, 4))).convert(mode), io.BytesIO()
    exif = image.getexif()
    exif[274] = orientation
    image.save(file, "TIFF" if mode == "CMYK" else "PNG", exif=exif)
    usual = {n: decode(PIL.Image.open(io.BytesIO(file.getvalue())), (8, 12), n) for n in (1, 3)}
    for channels, expected in usual.items():
        for depth, scale in ((EIGHT_BITS, 1), (SIXTEEN_BITS, 257)):
            found = decode_deep(io.BytesIO(file.getvalue()), open_file, (8, 12), channels, depth)
            assert np.abs(found / scale - expected.astype(float)).max() <= 1.01


def test_a_gradient_of_16_bits_keeps_its_steps(load, tmp_path):
    ramp = np.linspace(30_000, 30_600, 64).round().astype(np.uint16).reshape(8, 8)
    white = np.full((8, 8), 65535, np.uint16)
    folder = write(tmp_path / "scans", [ramp, white])
    assert len(values_of(load("--train_data_dir", folder))[0].unique()) == 3
    data = load("--train_data_dir", folder, DEEP)
    assert (values_of(data)[0, 0].numpy() == ramp).all() and data.white == 65535 and data.is_picture
    assert samples_of(data)[1].eq(1).all()
    stream = load("--train_data_dir", folder, DEEP, "--streaming")
    assert torch.equal(samples_of(stream), samples_of(data))


def test_white_is_that_of_the_bits_that_the_data_use(load, tmp_path):
    twelve = [np.full((8, 8), value, np.uint16) for value in (0, 2000, 4095)]
    data = load("--train_data_dir", write(tmp_path / "scans", twelve), DEEP)
    assert data.white == 4095 and samples_of(data).amax((1, 2, 3)).tolist() == pytest.approx([-1, 4000 / 4095 - 1, 1])
    assert "the largest value is 4,095, white is 4,095" in data.note
    mixed = write(tmp_path / "mixed", [*twelve, np.full((8, 8), 255, np.uint8)])  # 8 bits are scaled by 257
    assert samples_of(load("--train_data_dir", mixed, DEEP)).amax((1, 2, 3)).tolist()[-1] == 1
    plain = load("--train_data_dir", write(tmp_path / "plain", [random((8, 8))]), DEEP)
    assert plain.white is None and "no image has more than 8 bits" in plain.note


@pytest.mark.slow
def test_samples_have_the_depth_of_the_data(train, tmp_path, capsys):
    write(tmp_path / "scans", [random((8, 8, 3), np.uint16, seed) >> 4 for seed in range(24)])
    out = train("--train_data_dir", "scans", DEEP, "--max_train_steps", 2, "--compare", "--random_flip")
    assert "white is 4,095" in capsys.readouterr().out
    assert "The images are grey, with all bits of values up to 4,095." in (out / "README.md").read_text()
    pipeline = RegDDPMPipeline.from_pretrained(out)
    assert pipeline.config.white == 4095 and pipeline.config.normalization is None
    sample = ["sample", "--model", str(out), "--num_images", "2", "--num_inference_steps", "2", "--output"]
    main([*sample, "drawn"])
    main([*sample, "drawn.npz"])
    arrays = np.load("drawn.npz")["arr_0"]
    pixels, _ = read_pixels(tmp_path / "drawn" / "000001.png", open_file)
    assert arrays.dtype == np.uint16 and arrays.max() <= 4095 and (arrays % 16).any()
    assert (pixels == arrays[1]).all()
    # A training from it reads the data for the same white, and so does a measurement.
    flags = ("--train_data_dir", "scans", "--pretrained_model_name_or_path", out, "--max_train_steps", 1)
    tuned = train(*flags, model=(), output="tuned")
    assert RegDDPMPipeline.from_pretrained(tuned).config.white == 4095
    write(tmp_path / "bright", [random((8, 8, 3), np.uint16)])
    flags = ("--train_data_dir", "bright", "--pretrained_model_name_or_path", out)
    error = refusal(train, capsys, *flags, model=(), output="other")
    assert "the given model was trained on values up to 4,095, but the data reach" in error
    write(tmp_path / "shallow", [np.full((8, 8, 3), 255, np.uint8)])  # of 8 bits: scaled by 257, like among others
    flags = ("--train_data_dir", "shallow", "--pretrained_model_name_or_path", out)
    assert "but the data reach 65,535" in refusal(train, capsys, *flags, model=(), output="other")


def test_resumed_runs_of_deep_pictures_are_exact(train, tmp_path):
    write(tmp_path / "scans", [random((8, 8), np.uint16, seed) for seed in range(9)])
    flags = ("--train_data_dir", "scans", DEEP, "--max_train_steps", 4, "--checkpointing_steps", 2)
    out = train(*flags, "--validation_split", 0.3)
    before = weights(out)
    (out / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    train(*flags, "--validation_split", 0.3, "--resume", "auto")
    assert all(torch.equal(before[name], weight) for name, weight in weights(out).items())


# Floating-point pixels and other numbers of channels


def test_floats_are_fields_in_their_own_units(train, tmp_path, capsys):
    folder = write(tmp_path / "heat", [random((8, 8), np.float32, seed) for seed in range(6)], "tif")
    assert "pass --preserve_input_precision" in refusal(train, capsys, "--train_data_dir", folder)
    out = train("--train_data_dir", folder, DEEP, "--max_train_steps", 1, "--validation_split", 0.3)
    assert "fields of 1 x 8 x 8" in capsys.readouterr().out
    normalization = json.loads((out / "model_index.json").read_text())["_reg_diffusers"]["normalization"]
    stack = np.stack([random((8, 8), np.float32, seed) for seed in range(6)])
    assert normalization["offset"] == pytest.approx([(stack.max() + stack.min()) / 2])
    assert normalization["scale"] == pytest.approx([(stack.max() - stack.min()) / 2])
    error = refusal(train, capsys, "--train_data_dir", folder, DEEP, "--streaming", "--max_train_steps", 1, output="x")
    assert "--streaming: the range of floating-point pixels is known only when all are read" in error


def test_a_tiff_of_any_channels_is_read(load, tmp_path):
    for dtype, kind in ((np.uint16, True), (np.float32, False)):
        folder = tmp_path / np.dtype(dtype).name
        folder.mkdir()
        images = [random((8, 8, 5), dtype, seed) for seed in range(3)]
        for number, image in enumerate(images):
            content = tiff(image, photometric="minisblack", planarconfig="contig")
            (folder / f"{number}.tif").write_bytes(content)
        data = load("--train_data_dir", folder, DEEP)
        assert data.shape == (5, 8, 8) and data.is_picture is kind
        assert (values_of(data).numpy() == np.stack(images).transpose(0, 3, 1, 2)).all()
    (folder / "odd.tif").write_bytes(tiff(random((8, 8, 3), dtype), photometric="rgb"))
    with pytest.raises(UsageError, match=r"odd.tif.* it has 3 channels, but the data set has 5"):
        load("--train_data_dir", folder, DEEP)


def test_pictures_of_two_kinds_are_refused_by_name(load, tmp_path):
    folder = write(tmp_path / "both", [random((8, 8), np.float32)], "tif")
    PIL.Image.fromarray(random((8, 8))).save(folder / "other.png")
    with pytest.raises(UsageError, match=r"other.png.* pixels are 8-bit, but the data set is floating-point"):
        load("--train_data_dir", folder, DEEP)
    (folder / "other.png").unlink()
    nan = random((8, 8), np.float32)
    nan[3, 3] = np.nan
    PIL.Image.fromarray(nan).save(folder / "nan.tif")
    with pytest.raises(UsageError, match=r"nan.tif.* infinite or missing"):
        load("--train_data_dir", folder, DEEP)


def test_several_images_in_a_tiff_are_no_channels(load, tmp_path):
    (tmp_path / "stack").mkdir()
    (tmp_path / "stack" / "a.tif").write_bytes(tiff(random((5, 8, 8), np.uint16), photometric="minisblack"))
    with pytest.raises(UsageError, match=r"a.tif.* it holds several images .axes QYX.: store each in its own file"):
        load("--train_data_dir", tmp_path / "stack", DEEP)
