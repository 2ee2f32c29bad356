"""Data and models that somebody made to do harm, or that are odd: refused by name, in one line, or trained on."""

import json
import os
import shutil
import struct
import sys
import time
import zipfile
import zlib

import numpy as np
import PIL.Image
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from diffusers import DDPMScheduler, UNet2DModel
from limits import memory_limited
from runs import metrics, refusal, weights

from reg_diffusers import RegDDPMPipeline
from reg_diffusers.data import fields, source
from reg_diffusers.data.arrow_files import rows_and_bytes
from reg_diffusers.data.source import check_arrow
from reg_diffusers.networks.build import load_given_model
from reg_diffusers.networks.noise_schedule import build_noise_scheduler
from reg_diffusers.runtime.errors import UsageError
from reg_diffusers.settings import ModelSettings

pytestmark = pytest.mark.reliability

SECRET = 9  # the grey of an image that nobody may read


@pytest.fixture
def refused(load):
    """Loads, and returns the one line of the refusal; the limit of memory is that of this process and half a GB."""

    def refuse(*flags):
        start = time.monotonic()
        with pytest.raises(UsageError) as refusal, memory_limited(2**29):
            load(*flags)
        assert time.monotonic() - start < 10
        message = str(refusal.value)
        assert len(message.splitlines()) == 1
        return message

    return refuse


@pytest.fixture
def folder(tmp_path):
    """A folder with one image, beside a secret one."""
    (tmp_path / "photos").mkdir()
    PIL.Image.new("L", (8, 8), 200).save(tmp_path / "photos" / "fine.png")
    PIL.Image.new("L", (8, 8), SECRET).save(tmp_path / "secret.png")
    return tmp_path / "photos"


def save_one_image(folder):
    Dataset.from_dict({"image": [PIL.Image.new("L", (8, 8))]}, Features(image=Image())).save_to_disk(folder)


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, packed, extra=b""):
    """A grey PNG with pixels as they are given, compressed."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def packed_zeros(megabytes):
    """A zlib stream of zeros, from one packed megabyte repeated."""
    packer = zlib.compressobj(9, wbits=-15)
    megabyte = packer.compress(bytes(2**20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return b"\x78\xda" + megabyte * megabytes + b"\x03\0\0\0\0\0"


PIXELS = zlib.compress(b"".join(b"\0" + b"\x80" * 8 for _ in range(8)))
GIGABYTE = packed_zeros(1024)


# Files from outside of the folder


@pytest.mark.parametrize("name", ["../secret.png", "{}/secret.png", "a/../../secret.png", "file://{}/secret.png"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_path_out_of_the_folder_in_metadata_is_refused(refused, folder, tmp_path, name, streaming):
    name = name.format(tmp_path)
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": name}) + "\n")
    message = refused("--train_data_dir", folder, *(["--streaming", "--max_train_steps", 1] if streaming else []))
    assert f"--train_data_dir {folder}" in message and "secret.png" in message


def test_links_out_of_the_folder_are_refused(refused, folder, tmp_path):
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    assert f"{folder}/link.png lies outside" in refused("--train_data_dir", folder)
    (folder / "link.png").unlink()
    (tmp_path / "others").mkdir()
    (tmp_path / "secret.png").rename(tmp_path / "others" / "secret.png")
    (folder / "metadata.jsonl").write_text('{"file_name": "fine.png"}\n{"file_name": "linked/secret.png"}\n')
    (folder / "linked").symlink_to(tmp_path / "others")
    assert "linked/secret.png lies outside" in refused("--train_data_dir", folder)


def test_a_relative_name_means_the_current_folder(load, tmp_path, monkeypatch):
    for name in ("one", "two"):
        (tmp_path / name / "photos").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / name)
        PIL.Image.new("L", (8, 8)).save("photos/image.png")
        np.save("fields.npy", np.zeros((2, 1, 8, 8)))
        assert len(load("--train_data_dir", "photos")) == 1 and len(load("--train_data_dir", "fields.npy")) == 2


def test_links_within_the_folder_and_a_link_to_the_folder_are_followed(load, folder, tmp_path):
    (folder / "again.png").symlink_to("fine.png")
    (tmp_path / "link").symlink_to(folder)
    assert len(load("--train_data_dir", tmp_path / "link")) == 2


@pytest.mark.parametrize("path", ["{}/secret.png", "../secret.png", "https://127.0.0.1:9/secret.png", "/dev/zero"])
def test_a_table_that_names_files_elsewhere_is_refused(refused, folder, tmp_path, monkeypatch, path):
    monkeypatch.chdir(folder)
    rows = {"image": [{"bytes": None, "path": path.format(tmp_path)}]}
    pyarrow.parquet.write_table(pyarrow.table(rows), folder / "table.parquet")
    (folder / "fine.png").unlink()
    assert "lies outside and is not read" in refused("--dataset_name", folder / "table.parquet")


def test_a_way_out_through_a_link_and_back_is_refused(refused, folder, tmp_path):
    """photos/linked/../secret.png is not photos/secret.png, but lies beside the folder that is linked."""
    (tmp_path / "others").mkdir()
    (folder / "linked").symlink_to(tmp_path / "others")
    rows = {"image": [{"bytes": None, "path": f"{folder}/linked/../secret.png"}]}
    pyarrow.parquet.write_table(pyarrow.table(rows), folder / "table.parquet")
    assert "linked/../secret.png lies outside" in refused("--dataset_name", folder / "table.parquet")


@pytest.mark.parametrize("files", ["../secret.png", "{}/secret.png", "../*.png"])
def test_a_card_that_names_files_elsewhere_is_refused(refused, folder, tmp_path, files):
    config = f"- config_name: default\n  data_files:\n  - split: train\n    path: {files.format(tmp_path)!r}\n"
    (folder / "README.md").write_text(f"---\nconfigs:\n{config}---\n")
    assert "secret.png lies outside" in refused("--dataset_name", folder)


def test_a_saved_data_set_that_lists_files_elsewhere_is_refused(refused, load, tmp_path):
    Dataset.from_dict({"image": [PIL.Image.new("L", (8, 8))]}, Features(image=Image())).save_to_disk(
        tmp_path / "saved"
    )
    assert len(load("--dataset_name", tmp_path / "saved")) == 1
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    arrow.rename(tmp_path / "elsewhere.arrow")
    state = json.loads((tmp_path / "saved" / "state.json").read_text())
    state["_data_files"] = [{"filename": "../elsewhere.arrow"}]
    (tmp_path / "saved" / "state.json").write_text(json.dumps(state))
    assert "elsewhere.arrow lies outside" in refused("--dataset_name", tmp_path / "saved")


def test_a_saved_data_set_cannot_choose_a_file_to_be_written(load, tmp_path):
    Dataset.from_dict({"image": [PIL.Image.new("L", (8, 8))]}, Features(image=Image())).save_to_disk(
        tmp_path / "saved"
    )
    state = json.loads((tmp_path / "saved" / "state.json").read_text())
    state["_fingerprint"] = "../../written"
    (tmp_path / "saved" / "state.json").write_text(json.dumps(state))
    assert len(load("--dataset_name", tmp_path / "saved")) == 1
    assert [path.name for path in tmp_path.iterdir() if "written" in path.name] == []


def test_a_loading_script_is_not_run(refused, folder, tmp_path):
    (folder / "photos.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert f"--dataset_name {folder}: cannot be read" in refused("--dataset_name", folder)
    assert not (tmp_path / "ran").exists()


def test_pipes_are_not_waited_for(refused, folder):
    (folder / "pipe.png").unlink(missing_ok=True)
    os.mkfifo(folder / "pipe.png")
    (folder / "metadata.jsonl").write_text('{"file_name": "pipe.png"}\n')
    assert "pipe.png" in refused("--train_data_dir", folder)


# Images that are too much


@pytest.mark.parametrize(
    "content, message",
    [
        (png(100_000, 100_000, PIXELS), "more than 89,478,485 pixels"),
        (png(13_000, 13_000, packed_zeros(162)), "more than 89,478,485 pixels"),
        (b"P6 100000 100000 255\n" + bytes(100), "more than 89,478,485 pixels"),
        (png(8, 8, PIXELS, chunk(b"zTXt", b"Comment\0\0" + GIGABYTE)), "Decompressed data too large"),
        (png(8, 8, PIXELS, chunk(b"iTXt", b"Comment\0\1\0\0\0" + GIGABYTE)), "Decompressed data too large"),
        (png(8, 8, PIXELS, chunk(b"iCCP", b"profile\0\0" + GIGABYTE)), "Decompressed data too large"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(%pipe%id) (w) file\n", "is damaged, or its format"),
        (png(8, 8, PIXELS)[:50], "image file is truncated"),
        (b"", "is damaged, or its format"),
    ],
    ids="header 13k ppm ztxt itxt iccp eps truncated empty".split(),
)  # fmt: skip
def test_a_bomb_or_a_damaged_image_is_refused_by_name(refused, load, folder, content, message):
    (folder / "hostile.png").write_bytes(content)
    said = refused("--train_data_dir", folder)
    assert f"image {folder}/hostile.png (row 1) cannot be decoded" in said and message in said
    assert len(load("--train_data_dir", folder, "--skip_bad_images")) == 1


def test_more_pixels_in_the_file_than_in_its_header_are_never_unpacked(load, folder):
    (folder / "hostile.png").write_bytes(png(8, 8, GIGABYTE))
    with memory_limited(2**29):
        assert load("--train_data_dir", folder).__getitems__([1])["values"].unique().tolist() == [0]


@pytest.fixture
def small_limits(monkeypatch):
    """The limits of a gigabyte as a megabyte, so that what exceeds them is quickly made."""
    for module in (source, fields):
        monkeypatch.setattr(module, "_GIGABYTE", 2**20)


def test_an_archive_that_would_fill_the_disk_is_refused(refused, folder, small_limits):
    with zipfile.ZipFile(folder / "photos.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(2**21))
    assert "photos.zip: would expand from" in refused("--train_data_dir", folder)


# Tables and arrays


def test_a_table_with_more_rows_than_bytes_is_refused(refused, tmp_path):
    same = pyarrow.DictionaryArray.from_arrays(np.zeros(100_000, np.int8), pyarrow.array([b"x" * 100]))
    image = {"bytes": same.cast(pyarrow.binary()), "path": pyarrow.nulls(len(same), pyarrow.string())}
    image = pyarrow.StructArray.from_arrays(image.values(), image)
    pyarrow.parquet.write_table(pyarrow.table({"image": image}), tmp_path / "rows.parquet")
    message = refused("--dataset_name", tmp_path / "rows.parquet")
    assert "rows.parquet: 100,000 rows" in message


def test_a_table_that_expands_is_refused(refused, tmp_path, small_limits):
    rows = {"image": [{"bytes": bytes(2**21), "path": None}]}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "wide.parquet", compression="zstd")
    assert "wide.parquet: 1 rows and 2," in refused("--dataset_name", tmp_path / "wide.parquet")


def write_arrow(path, kind, compression, sizes=(2**21,)):
    image = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    rows = pyarrow.Table.from_pylist(
        [{"image": {"bytes": bytes(size), "path": None}} for size in sizes], pyarrow.schema({"image": image})
    )
    writer = {"stream": pyarrow.ipc.new_stream, "file": pyarrow.ipc.new_file}[kind]
    options = pyarrow.ipc.IpcWriteOptions(compression=compression)
    with writer(str(path), rows.schema, options=options) as file:
        file.write_table(rows)


@pytest.mark.parametrize("streaming", [(), ("--streaming", "--max_train_steps", 1)], ids=["table", "stream"])
@pytest.mark.parametrize("kind", ["stream", "file"])
@pytest.mark.parametrize("compression", ["zstd", "lz4"])
def test_an_arrow_file_that_expands_is_refused(refused, tmp_path, small_limits, kind, compression, streaming):
    write_arrow(tmp_path / "wide.arrow", kind, compression)
    assert "wide.arrow: 1 rows and 2," in refused("--dataset_name", tmp_path / "wide.arrow", *streaming)


def test_a_saved_data_set_that_expands_is_refused(refused, tmp_path, small_limits):
    save_one_image(tmp_path / "saved")
    write_arrow(next((tmp_path / "saved").glob("*.arrow")), "stream", "zstd")
    assert ".arrow: 1 rows and 2," in refused("--dataset_name", tmp_path / "saved")


def test_an_arrow_file_with_more_rows_than_bytes_is_refused(refused, tmp_path):
    rows = pyarrow.table({"image": pyarrow.nulls(10**9)})
    with pyarrow.ipc.new_file(str(tmp_path / "rows.arrow"), rows.schema) as file:
        file.write_table(rows)
    assert "rows.arrow: 1,000,000,000 rows" in refused("--dataset_name", tmp_path / "rows.arrow")


@pytest.mark.parametrize("kind", ["stream", "file"])
@pytest.mark.parametrize("compression", [None, "zstd", "lz4"])
def test_the_size_of_an_arrow_file_is_that_of_its_content(tmp_path, kind, compression):
    write_arrow(tmp_path / "t.arrow", kind, compression, sizes=(1000, 2000, 0, 5))
    rows, size = rows_and_bytes(tmp_path / "t.arrow")
    assert rows == 4 and 3005 <= size <= 3005 + 200  # and offsets


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["stream", "file"])
def test_an_arrow_file_that_is_damaged_anywhere_is_refused_or_read(load, tmp_path, kind):
    write_arrow(tmp_path / "t.arrow", kind, "zstd", sizes=(100,) * 20)
    content = (tmp_path / "t.arrow").read_bytes()
    for place in range(0, len(content) - 4, 7):
        changed = content[:place] + b"\xff\xff\xff\x7f" + content[place + 4 :]
        (tmp_path / "t.arrow").write_bytes(changed)
        try:
            check_arrow(tmp_path / "t.arrow")
        except UsageError as error:
            assert "t.arrow" in str(error)
    for length in range(0, len(content), 50):
        (tmp_path / "t.arrow").write_bytes(content[:length])
        with pytest.raises(UsageError, match=r"t\.arrow"):
            load("--dataset_name", tmp_path / "t.arrow")


@pytest.mark.parametrize("streaming", [(), ("--streaming", "--max_train_steps", 1)], ids=["table", "stream"])
@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + bytes(200) + b"PAR1"])
def test_a_damaged_table_is_refused(refused, tmp_path, content, streaming):
    (tmp_path / "t.parquet").write_bytes(content)
    assert "t.parquet" in refused("--dataset_name", tmp_path / "t.parquet", *streaming)


@pytest.mark.parametrize("place", [4, 2000, -300, -9])
def test_a_table_that_is_damaged_somewhere_is_refused(refused, tmp_path, place):
    pixels = np.random.default_rng(0).integers(0, 255, (50, 8, 8), np.uint8)
    images = Dataset.from_dict({"image": list(map(PIL.Image.fromarray, pixels))}, Features(image=Image()))
    images.to_parquet(tmp_path / "t.parquet")
    content = bytearray((tmp_path / "t.parquet").read_bytes())
    content[place : place + 4] = b"\xff\xff\xff\x7f"
    (tmp_path / "t.parquet").write_bytes(content)
    message = refused("--dataset_name", tmp_path / "t.parquet")
    assert "t.parquet" in message or "image row 1" in message


def test_arrays_of_objects_never_run_their_code(refused, tmp_path):
    class Hostile:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    np.save(tmp_path / "f.npy", np.array([Hostile()], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "f.npz", np.array([Hostile()], dtype=object))
    for name in ("f.npy", "f.npz"):
        assert f"{name}: not a readable array file" in refused("--train_data_dir", tmp_path / name)
    assert not (tmp_path / "ran").exists()


def npz(path, header, content):
    """An archive whose array says of itself what it wants."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {header}, }}".ljust(117) + "\n"
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            file.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode())
            for part in content:
                file.write(part)


def test_arrays_that_expand_are_refused(refused, tmp_path, small_limits):
    npz(tmp_path / "expands.npz", (2, 1, 512, 512), [bytes(2**21)])
    assert "expands.npz: would expand from" in refused("--train_data_dir", tmp_path / "expands.npz")
    npz(tmp_path / "boasts.npz", (10**6, 1, 10**5, 10**3), [bytes(64)])
    assert "boasts.npz: not a readable array file" in refused("--train_data_dir", tmp_path / "boasts.npz")
    np.save(tmp_path / "f.npy", np.zeros((2, 1, 4, 4)))
    content = (tmp_path / "f.npy").read_bytes()
    (tmp_path / "f.npy").write_bytes(content.replace(b"(2, 1, 4, 4)", b"(2**9,1,4,4)"))
    assert "f.npy: not a readable array file" in refused("--train_data_dir", tmp_path / "f.npy")
    (tmp_path / "f.npy").write_bytes(content.replace(b"(2, 1, 4, 4)", b"(9, 9, 9, 9)"))
    assert "f.npy: not a readable array file" in refused("--train_data_dir", tmp_path / "f.npy")


def test_an_array_that_is_a_link_out_of_its_folder_is_refused(refused, load, tmp_path):
    np.save(tmp_path / "secret.npy", np.zeros((2, 1, 4, 4)))
    (tmp_path / "fields").mkdir()
    (tmp_path / "fields" / "f.npy").symlink_to(tmp_path / "secret.npy")
    assert "f.npy lies outside" in refused("--train_data_dir", tmp_path / "fields")


def test_a_column_may_have_any_name(load, tmp_path):
    images = [PIL.Image.new("L", (8, 8), 0)]
    features = Features({"../left/photo": Image(), "n": Value("int64")})
    Dataset.from_dict({"../left/photo": images, "n": [1]}, features).to_parquet(tmp_path / "t.parquet")
    assert len(load("--dataset_name", tmp_path / "t.parquet")) == 1


# Models


@pytest.fixture
def model(tmp_path, tiny_unet, monkeypatch):
    """A saved pipeline; files in it and in the current folder leave a mark when they are run."""
    monkeypatch.chdir(tmp_path)
    RegDDPMPipeline(tiny_unet(), DDPMScheduler()).save_pretrained("model")
    source = f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom diffusers import UNet2DModel as Evil, DDPMPipeline\n"
    for place in ("hostile.py", "model/hostile.py", "model/unet/hostile.py", "model/pipeline.py"):
        (tmp_path / place).write_text(source)
    yield tmp_path / "model"
    sys.modules.pop("hostile", None)
    assert not (tmp_path / "ran").exists()


def change(path, **entries):
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


HOSTILE = {
    "none": lambda model: None,
    "pipeline": lambda model: change(model / "model_index.json", _class_name=["pipeline", "RegDDPMPipeline"]),
    "module": lambda model: change(model / "model_index.json", _class_name=["hostile", "Evil"]),
    "unet": lambda model: change(model / "model_index.json", unet=["hostile", "Evil"]),
    "scheduler": lambda model: change(model / "model_index.json", scheduler=["hostile", "Evil"]),
    "third": lambda model: change(model / "model_index.json", filter=["hostile", "Evil"]),
    "unet_class": lambda model: change(model / "unet" / "config.json", _class_name="hostile.Evil"),
    "auto_map": lambda model: change(model / "unet" / "config.json", auto_map={"AutoModel": "hostile.Evil"}),
    "scheduler_class": lambda model: change(model / "scheduler" / "scheduler_config.json", _class_name="hostile.Evil"),
}


@pytest.mark.parametrize("change_it", HOSTILE.values(), ids=HOSTILE)
def test_no_code_that_a_model_names_is_run(model, change_it):
    """Refused or loaded as what it should be: the fixture looks at what ran."""
    change_it(model)
    try:
        pipeline = RegDDPMPipeline.from_pretrained(str(model))
        assert type(pipeline.unet).__module__.startswith("diffusers.")
    except ValueError as error:
        assert "pipeline" in str(error) or "hostile" in str(error)
    script_model = load_given_model(ModelSettings(pretrained_model_name_or_path=str(model)))
    assert type(script_model.unet) is UNet2DModel and "hostile" not in sys.modules


def test_a_module_that_only_a_file_names_is_named(model):
    HOSTILE["unet"](model)
    with pytest.raises(ValueError, match=r"model_index\.json: unet is of 'hostile', a module that is not imported"):
        RegDDPMPipeline.from_pretrained(str(model))


class Harm:
    def __reduce__(self):
        return (open, ("ran", "w"))


@pytest.mark.parametrize("content", [{"weight": Harm()}, {"weight": torch.zeros(1)}], ids=["hostile", "harmless"])
def test_pickled_weights_are_refused(model, train, capsys, tmp_path, content):
    (model / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(content, model / "unet" / "diffusion_pytorch_model.bin")
    advice = "pickled weights may run code and are not loaded: convert them to safetensors"
    with pytest.raises(ValueError, match=advice):
        RegDDPMPipeline.from_pretrained(str(model))
    for given in (model, model / "unet"):
        error = refusal(train, capsys, "--pretrained_model_name_or_path", given, model=())
        assert "diffusion_pytorch_model.bin" in error and advice in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "file, content",
    [
        ("model_index.json", "[]"),
        ("model_index.json", "{"),
        ("unet/config.json", '{"_class_name": "UNet2DModel", "block_out_channels": "many"}'),
        ("unet/config.json", '{"_class_name": "UNet2DModel", "down_block_types": [["hostile", "Evil"]]}'),
        ("scheduler/scheduler_config.json", '{"_class_name": "DDPMScheduler", "num_train_timesteps": "all"}'),
        ("unet/diffusion_pytorch_model.safetensors", "not weights"),
    ],
)
def test_a_damaged_model_is_refused_in_one_line(model, train, capsys, file, content):
    (model / file).write_text(content)
    error = refusal(train, capsys, "--pretrained_model_name_or_path", model, model=())
    assert f"--pretrained_model_name_or_path {model}" in error


@pytest.mark.parametrize("scale", [[0.0], [float("nan")], "x", None])
def test_a_normalization_that_is_none_is_refused(model, train, capsys, scale):
    change(model / "model_index.json", _reg_diffusers={"normalization": {"offset": [0.0], "scale": scale}})
    assert "no readable UNet2DModel" in refusal(train, capsys, "--pretrained_model_name_or_path", model, model=())


# Odd, not hostile


def folder_of(tmp_path, *images):
    shutil.rmtree(tmp_path / "odd", ignore_errors=True)
    (tmp_path / "odd").mkdir()
    for number, image in enumerate(images):
        image.save(tmp_path / "odd" / f"{number}.png")
    return tmp_path / "odd"


ODD = {
    "one image": [PIL.Image.fromarray(np.eye(8, dtype=np.uint8) * 255)],
    "no variance": [PIL.Image.new("L", (8, 8), 77)] * 5,
    "constant images": [PIL.Image.new("L", (8, 8), value) for value in (0, 255, 9)],
    "black": [PIL.Image.new("L", (8, 8), 0)] * 2,
    "one pixel": [PIL.Image.new("L", (1, 1), 3)] * 2,
}


@pytest.mark.parametrize(
    ("kind", "how"), [*((kind, ()) for kind in ODD), ("one image", ("--streaming",)), ("black", ("--streaming",))]
)
def test_odd_data_train_and_are_compared(train, tmp_path, kind, how):
    images = ODD[kind]
    flags = ("--train_data_dir", folder_of(tmp_path, *images), "--regularizer", "isotropic_total_variation")
    out = train(*how, *flags, "sparsity", "--max_train_steps", 2, "--compare", "--train_batch_size", 4)
    assert all(value.isfinite().all() for value in weights(out).values())
    assert np.isfinite([line["loss"] for line in metrics(out)]).all()
    rows = json.loads((out / "comparison.json").read_text())["rows"]
    assert np.isfinite([value for row in rows.values() for value in row["terms"].values()]).all()


@pytest.mark.parametrize("size", [1, 64])
@pytest.mark.parametrize("how", [(), ("--streaming",)], ids=["table", "stream"])
def test_batches_of_one_and_larger_than_the_data_train(train, tmp_path, size, how):
    generator = np.random.default_rng(0)
    images = [PIL.Image.fromarray(generator.integers(0, 255, (8, 8), np.uint8)) for _ in range(5)]
    flags = ("--train_data_dir", folder_of(tmp_path, *images), "--train_batch_size", size, "--max_train_steps", 2)
    out = train(*how, *flags, output=f"out{size}")
    assert metrics(out)[-1]["step"] == 2 and metrics(out)[-1]["loss"] > 0


@pytest.mark.parametrize("array", [np.zeros((1, 1, 8, 8)), np.full((3, 1, 8, 8), 7.0), np.full((2, 1, 8, 8), 1e30)])
def test_constant_fields_train(train, tmp_path, array):
    np.save(tmp_path / "f.npy", array)
    out = train("--train_data_dir", tmp_path / "f.npy", "--max_train_steps", 2, "--compare")
    assert all(value.isfinite().all() for value in weights(out).values())
    fields = RegDDPMPipeline.from_pretrained(str(out))(num_inference_steps=2, output_type="pt").images
    assert fields.isfinite().all()


def test_a_noise_schedule_of_two_billion_steps_is_refused_before_its_tables_are_made(tmp_path, tiny_unet):
    """A downloaded scheduler may ask for 20 GB."""
    RegDDPMPipeline(tiny_unet(), DDPMScheduler()).save_pretrained(str(tmp_path / "model"))
    path = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    for steps in (2e9, 2_000_000_000, 0, "many"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"num_train_timesteps": steps}))
        with memory_limited(2**29):
            with pytest.raises(ValueError, match="num_train_timesteps must be from 1 to 1,000,000"):
                RegDDPMPipeline.from_pretrained(tmp_path / "model")
            with pytest.raises(UsageError, match="num_train_timesteps must be from 1 to 1,000,000"):
                load_given_model(ModelSettings(pretrained_model_name_or_path=str(tmp_path / "model")))
    RegDDPMPipeline.from_pretrained(tmp_path / "model", scheduler=DDPMScheduler())  # which need not read it
    with pytest.raises(UsageError, match="--ddpm_num_steps 2000000000: at most 1,000,000"):
        build_noise_scheduler(ModelSettings(ddpm_num_steps=2_000_000_000))
