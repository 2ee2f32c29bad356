"""Training data: every kind of picture, tables, fields, and what cannot be read."""

import io
import re

import numpy as np
import PIL.Image
import pyarrow.parquet
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset, DatasetDict, Features, Image, List, Value

from reg_diffusers.data.pictures import decode
from reg_diffusers.data.training_data import Normalization, load_training_data, make_dataloader
from reg_diffusers.networks.conditions import Conditions
from reg_diffusers.runs.checkpoint import Progress
from reg_diffusers.runtime.errors import UsageError
from reg_diffusers.settings import OptimizationSettings
from reg_diffusers.settings.arguments import parse_args
from reg_diffusers.training.batches import flip_half

pytestmark = pytest.mark.training


@pytest.fixture
def load(tmp_path):
    """Loads the data of a command line, with the cache in a folder of the test's own."""

    def load_with(*flags, channels=None, size=None):
        settings = parse_args([*map(str, flags), "--cache_dir", str(tmp_path / "cache")])
        return load_training_data(settings.data, channels, size)

    return load_with


def samples(data, indices=None):
    batch = data.__getitems__(list(range(len(data))) if indices is None else indices)
    return data.normalization.normalize(batch["values"])


# Pictures


@pytest.mark.parametrize(
    "image, expected",
    [
        (PIL.Image.new("L", (6, 6), 100), [100]),
        (PIL.Image.new("RGB", (6, 6), (10, 20, 30)), [10, 20, 30]),
        (PIL.Image.new("1", (6, 6), 1), [255]),
        (PIL.Image.new("RGB", (6, 6), (10, 20, 30)).convert("P"), None),
        (PIL.Image.new("RGBA", (6, 6), (10, 20, 30, 255)), [10, 20, 30]),
        (PIL.Image.new("RGBA", (6, 6), (10, 20, 30, 0)), [255, 255, 255]),
        (PIL.Image.new("LA", (6, 6), (100, 0)), [255]),
        (PIL.Image.new("CMYK", (6, 6), (0, 0, 0, 0)), [255, 255, 255]),
        (PIL.Image.fromarray(np.full((6, 6), 0x6401, np.uint16)), [0x64]),
        (PIL.Image.fromarray(np.full((6, 6), 0x6401, np.int32)), [0x64]),
        (PIL.Image.fromarray(np.full((6, 6), 7 * 257, np.int32)), [7]),
    ],
)
def test_every_mode_of_picture_becomes_uint8(image, expected):
    stored = io.BytesIO()
    if image.mode not in ("CMYK", "I"):  # which PNG does not have
        image.save(stored, "png")
        image = PIL.Image.open(stored)
    for channels in (1, 3):
        pixels = decode(image, (4, 4), channels)
        assert pixels.shape == (channels, 4, 4) and pixels.dtype == np.uint8
        if expected is not None and len(expected) in (1, channels):
            assert pixels[:, 0, 0].tolist() == (expected * channels)[:channels]


def test_a_palette_keeps_its_colours():
    image = PIL.Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    assert decode(image, (4, 4), 3)[:, 0, 0].tolist() == [200, 100, 50]


def test_pictures_are_cropped_to_the_centre():
    wide = np.zeros((4, 12), np.uint8)
    wide[:, 4:8] = 255
    assert (decode(PIL.Image.fromarray(wide), (4, 4), 1) == 255).all()
    assert (decode(PIL.Image.fromarray(wide.T.copy()), (4, 4), 1) == 255).all()


def test_pictures_are_turned_upright():
    image = PIL.Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4) * 16)
    exif = PIL.Image.Exif()
    exif[0x0112] = 3  # turned by half a circle
    stored = io.BytesIO()
    image.save(stored, "png", exif=exif)
    upright = decode(PIL.Image.open(stored), (4, 4), 1)
    assert np.array_equal(upright[0], np.asarray(image)[::-1, ::-1])


def test_the_embedded_data_are_small_grey_pictures_in_the_unit_range(load):
    data = load("--resolution", 28)
    assert len(data) == 5000 and data.shape == (1, 28, 28) and data.is_picture
    x = samples(data, [0, 4999, 17])
    assert x.dtype == torch.float32 and x.min() >= -1 and x.max() <= 1 and x.max() > 0.5


def test_a_folder_of_images_is_read_in_colour_with_its_classes(load, image_folder):
    folder = image_folder(number=6)
    data = load("--train_data_dir", folder, "--resolution", 8, "--class_conditional")
    assert data.shape == (3, 8, 8) and data.classes == ["cats", "dogs"]
    batch = data.__getitems__([0, 5])
    assert batch["values"].dtype == torch.uint8 and batch["class_labels"].tolist() == [0, 1]


def test_a_given_model_decides_on_channels_and_resolution(load, image_folder):
    assert load("--train_data_dir", image_folder(), channels=1, size=(4, 6)).shape == (1, 4, 6)


def test_unresized_pixels_arrive_unchanged_in_any_order(load, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    images = [PIL.Image.fromarray(image) for image in pixels]
    table = Dataset.from_dict({"id": list(range(5)), "photo": images}, Features(id=Value("int64"), photo=Image()))
    table.to_parquet(tmp_path / "data.parquet")
    data = load("--dataset_name", tmp_path / "data.parquet", "--resolution", 8)
    values = data.__getitems__([3, 0, 3])["values"]
    assert np.array_equal(values.numpy(), pixels[[3, 0, 3]].transpose(0, 3, 1, 2))
    torch.testing.assert_close(samples(data, [1])[0], torch.from_numpy(pixels[1] / 127.5 - 1).permute(2, 0, 1).float())


def test_tables_on_disk_are_read_in_every_form(load, tmp_path):
    images = [PIL.Image.new("L", (8, 8), value) for value in (0, 255)]
    table = Dataset.from_dict({"image": images}, Features(image=Image()))
    table.save_to_disk(tmp_path / "saved")
    (tmp_path / "folder").mkdir()
    table.to_parquet(tmp_path / "folder" / "train.parquet")
    for name in ("saved", "folder"):
        x = samples(load("--dataset_name", tmp_path / name, "--resolution", 8))
        assert x[0].unique().tolist() == [-1] and x[1].unique().tolist() == [1]


def test_labels_that_are_words_become_classes(load, tmp_path):
    images = [PIL.Image.new("L", (8, 8), value) for value in (0, 50, 255)]
    Dataset.from_dict(
        {"image": images, "kind": ["b", "a", "b"]}, Features(image=Image(), kind=Value("string"))
    ).to_parquet(tmp_path / "t.parquet")
    data = load("--dataset_name", tmp_path / "t.parquet", "--class_conditional", "--label_column", "kind")
    assert data.classes == ["a", "b"] and data.__getitems__([0, 1, 2])["class_labels"].tolist() == [1, 0, 1]


def test_labels_that_are_numbers_keep_their_order(load, tmp_path):
    images = [PIL.Image.new("L", (8, 8), value) for value in (0, 50, 255)]
    features = Features(image=Image(), label=Value("int64"))
    Dataset.from_dict({"image": images, "label": [10, 2, 7]}, features).to_parquet(tmp_path / "t.parquet")
    data = load("--dataset_name", tmp_path / "t.parquet", "--class_conditional")
    assert data.classes == ["2", "7", "10"]
    assert data.__getitems__([0, 1, 2])["class_labels"].tolist() == [2, 0, 1]


def test_a_table_written_without_metadata_is_read(load, tmp_path):
    stored = io.BytesIO()
    PIL.Image.new("L", (8, 8), 255).save(stored, "png")
    rows = {"image": [{"bytes": stored.getvalue(), "path": None}]}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "plain.parquet")
    assert (samples(load("--dataset_name", tmp_path / "plain.parquet", "--resolution", 8)) == 1).all()


def test_colour_anywhere_in_the_data_makes_them_colour(load, tmp_path):
    images = [PIL.Image.new("L", (4, 4))] * 1500 + [PIL.Image.new("RGB", (4, 4))] * 5
    Dataset.from_dict({"image": images}, Features(image=Image())).to_parquet(tmp_path / "t.parquet")
    assert load("--dataset_name", tmp_path / "t.parquet", "--resolution", 4).shape[0] == 3


def test_the_folder_of_the_data_is_only_read(load, tmp_path):
    images = [PIL.Image.new("L", (8, 8), value) for value in (0, 255)]
    Dataset.from_dict({"image": images}, Features(image=Image())).save_to_disk(tmp_path / "saved")
    before = sorted(tmp_path.joinpath("saved").iterdir())
    load("--dataset_name", tmp_path / "saved", "--resolution", 4)
    assert sorted(tmp_path.joinpath("saved").iterdir()) == before


def test_an_array_among_pictures_does_not_take_their_place(load, image_folder):
    folder = image_folder()
    np.save(folder / "embedding.npy", np.zeros((2, 1, 8, 8)))
    assert load("--train_data_dir", folder, "--resolution", 8).is_picture


def test_images_are_decoded_only_once(load, image_folder, monkeypatch):
    flags = ("--train_data_dir", image_folder(), "--resolution", 8)
    expected = samples(load(*flags))
    monkeypatch.setattr("PIL.ImageOps.fit", lambda *_: pytest.fail("decoded again"))
    assert torch.equal(samples(load(*flags)), expected)


def test_a_bad_image_is_named_or_left_out(load, image_folder, capsys):
    folder = image_folder(number=4)
    (folder / "cats" / "broken.png").write_bytes(b"not a picture")
    truncated = (folder / "dogs" / "0.png").read_bytes()[:150]
    (folder / "dogs" / "short.png").write_bytes(truncated)
    with pytest.raises(UsageError, match=r"(broken|short)\.png.*--skip_bad_images"):
        load("--train_data_dir", folder, "--resolution", 8)
    data = load("--train_data_dir", folder, "--resolution", 8, "--skip_bad_images", "--class_conditional")
    assert len(data) == 4 and data.__getitems__([0, 1, 2, 3])["class_labels"].tolist() == [0, 0, 1, 1]
    assert "skipped 2 of 6" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--image_column", "photo"], r"--image_column 'photo'.*columns are: image \(.*\), label"),
        (["--class_conditional", "--label_column", "kind"], "no column 'kind' among image, label"),
    ],
)
def test_a_missing_column_lists_those_there_are(load, image_folder, flags, message):
    with pytest.raises(UsageError, match=message):
        load("--train_data_dir", image_folder(), *flags)


@pytest.mark.parametrize("streaming", [(), ("--streaming",)], ids=["table", "stream"])
@pytest.mark.parametrize(
    "feature, labels",
    [
        (Value("float32"), [0.0, 1.0, 2.0]),
        (List(Value("int64")), [[0], [1], [2]]),
        ({"a": Value("int64")}, [{"a": 0}] * 3),
    ],
    ids=["float32", "list", "dict"],
)
def test_labels_that_are_no_classes_are_refused(load, tmp_path, request, feature, labels, streaming):
    images = [PIL.Image.new("L", (8, 8), value) for value in (0, 50, 255)]
    Dataset.from_dict({"image": images, "label": labels}, Features(image=Image(), label=feature)).to_parquet(
        tmp_path / "t.parquet"
    )
    kind = request.node.callspec.id.split("-")[0]
    with pytest.raises(
        UsageError, match=f"^--label_column label: a class must be .*, but this column holds {kind}: name"
    ):
        load("--dataset_name", tmp_path / "t.parquet", "--class_conditional", *streaming)


def test_one_column_is_not_both_image_and_condition(load, image_folder):
    flags = ("--train_data_dir", image_folder(), "--conditioning_image_column", "image")
    with pytest.raises(UsageError, match=r"^--conditioning_image_column image: is the column of the training images"):
        load(*flags, "--image_column", "image")
    with pytest.raises(UsageError, match=r"^no column of images other than image; the columns are: image"):
        load(*flags)


@pytest.mark.parametrize("streaming", [(), ("--streaming",)], ids=["table", "stream"])
def test_no_name_of_a_table_is_a_pattern(load, tmp_path, streaming):
    table = Dataset.from_dict({"image": [PIL.Image.new("L", (8, 8))]}, Features(image=Image()))
    folder = tmp_path / "[1]"
    folder.mkdir()
    table.to_parquet(folder / "t*[ab].parquet")
    assert load("--dataset_name", folder / "t*[ab].parquet", *streaming).number == 1
    with pytest.raises(UsageError, match=f"--dataset_name {re.escape(str(folder))}: .*: rename the folder"):
        load("--dataset_name", folder, *streaming)


def test_splits_that_are_not_used_are_named(load, tmp_path, capsys):
    table = Dataset.from_dict({"image": [PIL.Image.new("L", (8, 8))] * 3}, Features(image=Image()))
    DatasetDict(train=table, test=table.select([0])).save_to_disk(tmp_path / "saved")
    (tmp_path / "tables").mkdir()
    for name, part in (("train", table), ("test", table.select([0, 1])), ("validation", table)):
        part.to_parquet(tmp_path / "tables" / f"{name}.parquet")
    for name, flags, others in (
        ("saved", (), "test (1 rows)"),
        ("tables", (), "validation (3 rows), test (2 rows)"),
        ("tables", ("--streaming", "--max_train_steps", 1), "validation, test"),
    ):
        load("--dataset_name", tmp_path / name, *flags)
        said = capsys.readouterr().err
        assert f"warning: {tmp_path / name}: only the split train is used, not {others}\n" in said


@pytest.mark.parametrize("flags", [(), ("--streaming",)], ids=["table", "stream"])
def test_a_cache_that_cannot_be_written_is_named(tmp_path, image_folder, flags):
    (tmp_path / "file").write_text("")
    for name in ("file", "file/below"):
        settings = parse_args(["--train_data_dir", str(image_folder()), "--cache_dir", str(tmp_path / name), *flags])
        with pytest.raises(UsageError, match=rf"^--cache_dir {tmp_path}/{name}: cannot be written \("):
            load_training_data(settings.data)


def test_what_is_no_data_set_is_refused_by_name(load, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "table.txt").write_text("1")
    for flags, message in [
        (("--train_data_dir", tmp_path / "empty"), "--train_data_dir .*empty"),
        (("--train_data_dir", tmp_path / "nowhere"), "no such folder"),
        (("--dataset_name", tmp_path / "table.txt"), r"\.parquet, \.arrow"),
    ]:
        with pytest.raises(UsageError, match=message):
            load(*flags)


# Fields


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_fields_fill_the_unit_range_channel_by_channel_and_can_be_undone(load, tmp_path, suffix):
    fields = np.random.default_rng(0).normal([[[[5.0]], [[-300.0]]]], [[[[0.1]], [[40.0]]]], (30, 2, 8, 12))
    path = tmp_path / f"fields{suffix}"
    np.save(path, fields) if suffix == ".npy" else np.savez(path, fields)
    data = load("--train_data_dir", path)
    x = samples(data)
    assert data.shape == (2, 8, 12) and not data.is_picture
    for channel in range(2):
        assert x[:, channel].min() == pytest.approx(-1, abs=1e-5) and x[:, channel].max() == pytest.approx(1, abs=1e-5)
    offset, scale = (
        torch.tensor(numbers).reshape(1, 2, 1, 1) for numbers in (data.normalization.offset, data.normalization.scale)
    )
    np.testing.assert_allclose((offset + scale * x).numpy(), fields, rtol=1e-5)


def test_a_constant_channel_becomes_zero(load, tmp_path):
    np.save(tmp_path / "f.npy", np.full((3, 1, 4, 4), 7.0))
    assert (samples(load("--train_data_dir", tmp_path)) == 0).all()


@pytest.mark.parametrize(
    "array, message",
    [
        (np.zeros((4, 8, 8)), r"\(N, C, H, W\), not float64 \(4, 8, 8\)"),
        (np.zeros((0, 1, 8, 8)), r"\(N, C, H, W\)"),
        (np.full((2, 1, 8, 8), np.nan), "nan"),
        (np.zeros((2, 1, 8, 8), dtype=complex), "complex"),
        (np.zeros((5, 8, 12, 3)), r"\(5, 8, 12, 3\) looks like \(N, H, W, C\).*use np.moveaxis\(x, -1, 1\)"),
        (
            np.full((2, 1, 8, 8), 1e300),
            r"values up to 1e\+300, but float32 at most 3.4e\+38: store them in larger units",
        ),
        (np.array([[[[-1.7e308, 1.7e308]]]]), r"values up to 1.7e\+308, but float32 at most"),
    ],
)
def test_arrays_that_are_no_fields_are_refused(load, tmp_path, array, message):
    np.save(tmp_path / "f.npy", array)
    with pytest.raises(UsageError, match=message):
        load("--train_data_dir", tmp_path / "f.npy")


def test_arrays_that_would_run_code_or_are_damaged_are_refused(load, tmp_path):
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "damaged.npy").write_bytes(b"\x93NUMPY")
    for name in ("objects", "damaged"):
        with pytest.raises(UsageError, match=name):
            load("--train_data_dir", tmp_path / f"{name}.npy")


def test_fields_with_the_channels_of_a_given_model_are_in_its_order(load, tmp_path):
    np.save(tmp_path / "f.npy", np.zeros((2, 8, 16, 4)))
    assert load("--train_data_dir", tmp_path / "f.npy", channels=8).shape == (8, 16, 4)


def test_flags_for_pictures_are_refused_with_fields(load, tmp_path):
    np.save(tmp_path / "f.npy", np.zeros((2, 1, 8, 8)))
    for flags, message in [
        (["--resolution", 16], "keep their size"),
        (["--class_conditional"], "fields have no class labels"),
    ]:
        with pytest.raises(UsageError, match=message):
            load("--train_data_dir", tmp_path / "f.npy", *flags)
    with pytest.raises(UsageError, match="1 channels, but the given model has 3"):
        load("--train_data_dir", tmp_path / "f.npy", channels=3)


# Batches


def test_an_epoch_shows_every_image_once_in_an_order_of_its_own(load, tmp_path):
    np.save(tmp_path / "f.npy", np.arange(64.0).reshape(64, 1, 1, 1))
    loader = make_dataloader(
        load("--train_data_dir", tmp_path), OptimizationSettings(), 0, Accelerator(cpu=True), Progress()
    )
    epochs = [torch.cat([batch["values"].flatten() for batch in loader]) for _ in range(2)]
    assert not torch.equal(*epochs)
    for epoch in epochs:
        assert torch.equal(epoch.sort().values, torch.arange(64.0, dtype=torch.float64))


def test_a_batch_larger_than_the_data_set_is_the_data_set(load, tmp_path):
    np.save(tmp_path / "f.npy", np.arange(3.0).reshape(3, 1, 1, 1))
    batches = list(
        make_dataloader(
            load("--train_data_dir", tmp_path), OptimizationSettings(), 0, Accelerator(cpu=True), Progress()
        )
    )
    assert [len(batch["values"]) for batch in batches] == [3]


def test_half_of_the_images_are_mirrored_left_to_right():
    torch.manual_seed(0)
    x = torch.arange(4.0).expand(1000, 1, 2, 4)
    flipped, _ = flip_half(x, Conditions({}))
    mirrored = (flipped == x.flip(-1)).flatten(1).all(1)
    assert ((flipped == x).flatten(1).all(1) ^ mirrored).all()
    assert 420 < mirrored.sum() < 580  # five standard deviations


def test_normalization_is_per_channel():
    values = torch.tensor([[[[0.0]], [[10.0]]]])
    assert Normalization((1.0, 5.0), (2.0, 5.0)).normalize(values).flatten().tolist() == [-0.5, 1.0]
