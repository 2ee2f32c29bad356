"""Data and models that somebody made to do harm, or that are odd: refused by name, in one line, or trained on."""

import json
import os
import resource
import struct
import time
import zipfile
import zlib
from contextlib import contextmanager

import numpy as np
import PIL.Image
import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset, Features, Image, Value

from reg_diffusers.training import fields, source
from reg_diffusers.training.arguments import parse_args
from reg_diffusers.training.data import load_training_data
from reg_diffusers.training.errors import UsageError

SECRET = 9  # the grey of an image that nobody may read


@pytest.fixture
def load(tmp_path):
    """Loads the data of a command line."""

    def load_with(*flags):
        args = parse_args([*map(str, flags), "--resolution", "8", "--cache_dir", str(tmp_path / "cache")])
        return load_training_data(args)

    return load_with


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


@contextmanager
def memory_limited(more):
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as statm:
        now = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


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
    assert f"{folder}/link.png is not in there" in refused("--train_data_dir", folder)
    (folder / "link.png").unlink()
    (tmp_path / "others").mkdir()
    (tmp_path / "secret.png").rename(tmp_path / "others" / "secret.png")
    (folder / "metadata.jsonl").write_text('{"file_name": "fine.png"}\n{"file_name": "linked/secret.png"}\n')
    (folder / "linked").symlink_to(tmp_path / "others")
    assert "linked/secret.png is not in there" in refused("--train_data_dir", folder)


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
    assert "is not in there, and is not read" in refused("--dataset_name", folder / "table.parquet")


@pytest.mark.parametrize("files", ["../secret.png", "{}/secret.png", "../*.png"])
def test_a_card_that_names_files_elsewhere_is_refused(refused, folder, tmp_path, files):
    config = f"- config_name: default\n  data_files:\n  - split: train\n    path: {files.format(tmp_path)!r}\n"
    (folder / "README.md").write_text(f"---\nconfigs:\n{config}---\n")
    assert "secret.png is not in there" in refused("--dataset_name", folder)


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
    assert "elsewhere.arrow is not in there" in refused("--dataset_name", tmp_path / "saved")


def test_a_saved_data_set_cannot_choose_a_file_to_be_written(load, tmp_path):
    Dataset.from_dict({"image": [PIL.Image.new("L", (8, 8))]}, Features(image=Image())).save_to_disk(
        tmp_path / "saved"
    )
    state = json.loads((tmp_path / "saved" / "state.json").read_text())
    state["_fingerprint"] = "../../../written"
    (tmp_path / "saved" / "state.json").write_text(json.dumps(state))
    assert len(load("--dataset_name", tmp_path / "saved")) == 1
    assert [path.name for path in tmp_path.iterdir() if "written" in path.name] == []


def test_pipes_are_not_waited_for(refused, folder):
    (folder / "pipe.png").unlink(missing_ok=True)
    os.mkfifo(folder / "pipe.png")
    (folder / "metadata.jsonl").write_text('{"file_name": "pipe.png"}\n')
    assert "pipe.png" in refused("--train_data_dir", folder)


# Images that are too much


@pytest.mark.parametrize(
    "content, message",
    [
        (png(100_000, 100_000, PIXELS), "more than the 89,478,485 pixels"),
        (png(13_000, 13_000, packed_zeros(162)), "more than the 89,478,485 pixels"),
        (b"P6 100000 100000 255\n" + bytes(100), "more than the 89,478,485 pixels"),
        (png(8, 8, PIXELS, chunk(b"zTXt", b"Comment\0\0" + GIGABYTE)), "Decompressed data too large"),
        (png(8, 8, PIXELS, chunk(b"iTXt", b"Comment\0\1\0\0\0" + GIGABYTE)), "Decompressed data too large"),
        (png(8, 8, PIXELS, chunk(b"iCCP", b"profile\0\0" + GIGABYTE)), "Decompressed data too large"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(%pipe%id) (w) file\n", "is damaged, or none of"),
        (png(8, 8, PIXELS)[:50], "image file is truncated"),
        (b"", "is damaged, or none of"),
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
        assert f"{name}: not an array file that can be read" in refused("--train_data_dir", tmp_path / name)
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
    assert "boasts.npz: not an array file that can be read" in refused("--train_data_dir", tmp_path / "boasts.npz")
    np.save(tmp_path / "f.npy", np.zeros((2, 1, 4, 4)))
    content = (tmp_path / "f.npy").read_bytes()
    (tmp_path / "f.npy").write_bytes(content.replace(b"(2, 1, 4, 4)", b"(2**9,1,4,4)"))
    assert "f.npy: not an array file" in refused("--train_data_dir", tmp_path / "f.npy")
    (tmp_path / "f.npy").write_bytes(content.replace(b"(2, 1, 4, 4)", b"(9, 9, 9, 9)"))
    assert "f.npy: not an array file" in refused("--train_data_dir", tmp_path / "f.npy")


def test_an_array_that_is_a_link_out_of_its_folder_is_refused(refused, load, tmp_path):
    np.save(tmp_path / "secret.npy", np.zeros((2, 1, 4, 4)))
    (tmp_path / "fields").mkdir()
    (tmp_path / "fields" / "f.npy").symlink_to(tmp_path / "secret.npy")
    assert "f.npy is not in there" in refused("--train_data_dir", tmp_path / "fields")


def test_a_column_may_have_any_name(load, tmp_path):
    images = [PIL.Image.new("L", (8, 8), 0)]
    features = Features({"../left/photo": Image(), "n": Value("int64")})
    Dataset.from_dict({"../left/photo": images, "n": [1]}, features).to_parquet(tmp_path / "t.parquet")
    assert len(load("--dataset_name", tmp_path / "t.parquet")) == 1
