"""A folder of images: which are used, whatever their names, and what is said of those that are not."""

import json
import os
import time
import zipfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from datasets import Dataset, Features, Image

from reg_diffusers.cli import main
from reg_diffusers.data import pictures
from reg_diffusers.data.image_folder import list_images
from reg_diffusers.data.source import Source
from reg_diffusers.runtime.errors import UsageError

pytestmark = pytest.mark.training


@pytest.fixture
def write(tmp_path):
    """Writes small images by their names below a folder, and returns the folder."""

    def write_images(*names, folder="photos"):  # without a known extension as PNG
        for name in names:
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            PIL.Image.new("L", (8, 8)).save(path, "png" if path.suffix in ("", ".bak") else None)
        return tmp_path / folder

    return write_images


@pytest.fixture
def line(capsys):
    """Returns the line on images that are not used, "" without one; empties it."""

    def read():
        said = [line for line in capsys.readouterr().err.splitlines() if "image files are not used" in line]
        assert len(said) < 2
        return said[0] if said else ""

    return read


KINDS_OF_FLAGS = (("--train_data_dir",), ("--dataset_name",), ("--streaming", "--train_data_dir"))


@pytest.mark.parametrize("flags", KINDS_OF_FLAGS, ids=" ".join)
def test_names_of_splits_are_names_like_others(load, write, line, flags):
    folder = write(*(f"{name}/{index}.png" for name in ("bus", "car", "train") for index in range(4)))
    data = load("--class_conditional", *flags, folder)
    assert data.number == 12 and data.classes == ["bus", "car", "train"]
    folder = write("train_1.png", "test_1.png", "val_2.png", "dev.JPG", folder="mixed")
    assert load(*flags, folder).number == 4
    assert line() == ""


@pytest.mark.parametrize("flags", KINDS_OF_FLAGS, ids=" ".join)
def test_of_split_folders_alone_train_is_used_and_the_rest_counted(load, write, line, flags):
    folder = write("train/1.png", "train/2.png", "training/3.png", "test/1.png", "Val/1.png")
    (folder / "README.md").write_text("photos")
    assert load(*flags, folder).number == 3
    assert "2 of 5 image files are not used, because they are in Val/, test/ (only train/, training/ is used" in line()
    assert load(*flags, folder / "test").number == 1
    write("sketches/1.png")
    assert load(*flags, folder).number == 6 and line() == ""


def test_a_stray_table_does_not_make_a_folder_of_images_one_of_tables(load, write):
    folder = write("bus/1.png", "train/2.png", "train/3.png")
    Dataset.from_dict({"n": [1]}).to_parquet(folder / "notes.parquet")
    assert load("--dataset_name", folder, "--class_conditional").classes == ["bus", "train"]


def test_splits_without_train_are_named(load, write):
    folder = write("test/1.png", "val/1.png")
    with pytest.raises(UsageError, match=f"holds the splits test, val, but no train: name one.* {folder}/test$"):
        load("--train_data_dir", folder)


def test_a_run_and_evaluate_say_how_many_images_they_use(train, write, capsys, line):
    folder = write(*(f"{name}/{index}.png" for name in ("bus", "train") for index in range(20)))
    (folder / "bus" / "a.heic").write_bytes(b"")
    model = train("--train_data_dir", folder, "--max_train_steps", 1, "--seed", 0)
    said = capsys.readouterr()
    assert "40 images of 1 x 8 x 8" in said.out
    unused = "1 of 41 image files are not used, because they are of an unsupported format (.heic;"
    assert f"{folder}: {unused}" in said.err
    flags = "--num_images 20 --num_inference_steps 1 --features pixels --num_threads 1".split()
    main(["evaluate", "--model", str(model), "--data", str(folder), *flags])
    assert unused in line()


def test_every_image_that_is_left_out_is_counted_with_its_reason(load, write, line):
    folder = write("a.png", "b.PNG", "c.avif", "d.jfif", ".e.png", "__MACOSX/f.png", "g", "h.bak")
    for name in ("i.heic", "j.HEIC", "k.psd", "l.png.gz"):
        (folder / name).write_bytes(b"")
    (folder / "notes.txt").write_text("no image")
    assert load("--train_data_dir", folder).number == 4
    said = line()
    assert f"{folder}: 8 of 12 image files are not used, because they are" in said
    for reason in (
        "are hidden or in a hidden folder: 2",
        "have no image extension (.bak, none; rename them): 2",
        "are of an unsupported format (.heic, .psd; convert them to PNG or JPEG): 3",
        "are compressed (.gz; unpack them): 1",
    ):
        assert reason in said


def test_the_line_is_one_and_short_whatever_the_names_are(load, write, line):
    folder = write("a.png", "Foto 1.23 Uhr\u202fPM.png", "b c::d.png", "e\n.png")
    content = (folder / "a.png").read_bytes()
    for name in (b"f\xff.png", b"g.x\ny", *(b"h.%d" % number for number in range(100))):
        Path(os.fsdecode(bytes(folder) + b"/" + name)).write_bytes(content)
    assert load("--train_data_dir", folder).number == 4
    assert line().endswith(
        "102 of 106 image files are not used, because they have no image extension"
        " (.0, .1, .10, .11, .12, ...; rename them): 101, have names that are not UTF-8 (rename them): 1"
    )


def test_a_kind_that_pillow_lacks_is_counted(load, write, line, monkeypatch):
    folder = write("a.png", "b.avif", "c.webp")
    monkeypatch.setattr("PIL.features.check", lambda feature: feature != "avif")
    pictures._kinds.cache_clear()
    assert load("--train_data_dir", folder).number == 2
    pictures._kinds.cache_clear()
    assert "1 of 3 image files" in (said := line()) and "unsupported format (.avif;" in said


def test_a_folder_without_a_usable_image_says_why(load, write):
    folder = write(".a.png")
    with pytest.raises(UsageError, match="holds no images that are used: 1 of 1 image files are not used, because"):
        load("--train_data_dir", folder)


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
@pytest.mark.parametrize("streaming", [False, True])
def test_images_in_no_row_of_the_metadata_are_counted(load, write, line, name, streaming):
    folder = write("1.png", "sub/2.png", "3.png", ".4.png")
    rows = [("1.png", "a"), ("./sub/../sub/2.png", "b")]
    if name == "metadata.csv":
        text = "file_name,kind\n" + "".join(f"{file},{kind}\n" for file, kind in rows)
    else:
        text = "".join(json.dumps({"file_name": file, "kind": kind}) + "\n" for file, kind in rows)
    (folder / name).write_text(text)
    flags = ["--streaming"] if streaming else ["--class_conditional", "--label_column", "kind"]
    assert load("--train_data_dir", folder, *flags).number == 2
    said = line()
    assert "2 of 4 image files are not used" in said and f"are in no row of {name} (add rows for them): 1" in said


def test_archives_count_as_the_folder_they_lie_in(load, write, line):
    folder = write("cats/1.png")
    with zipfile.ZipFile(folder / "more.zip", "w") as archive:
        for name in ("cats/2.png", "dogs/3.png", "__MACOSX/cats/._2.png", "cats/notes.txt"):
            archive.write(folder / "cats" / "1.png", name)
    data = load("--train_data_dir", folder, "--class_conditional")
    assert data.classes == ["cats", "dogs"] and data.number == 3
    assert data.__getitems__([0, 1, 2])["class_labels"].tolist() == [0, 0, 1]
    assert "1 of 4 image files" in line()
    (folder / "bad.zip").write_bytes(b"no archive")
    with pytest.raises(UsageError, match=r"bad\.zip cannot be read"):
        load("--train_data_dir", folder)


def test_metadata_in_an_archive_are_read(load, write, line):
    folder = write("1.png")
    with zipfile.ZipFile(folder / "all.zip", "w") as archive:
        for name in ("a/1.png", "a/2.png"):
            archive.write(folder / "1.png", name)
        archive.writestr("metadata.jsonl", json.dumps({"file_name": "a/1.png"}))
    assert load("--train_data_dir", folder).number == 1
    assert "2 of 3 image files" in line()


@pytest.mark.parametrize("name", ["[1]", "a*b", "what?", "a b's"])
def test_no_name_of_a_folder_is_a_pattern(load, write, name):
    folder = write("cats/1.png", "dogs/2.png", folder=name)
    for flag in ("--train_data_dir", "--dataset_name"):
        assert load(flag, folder, "--class_conditional").classes == ["cats", "dogs"]
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "cats/1.png"}))
    assert load("--train_data_dir", folder).number == 1


@pytest.mark.parametrize(
    "names, message",
    [
        (["cats/1.png", "dogs/puppies/2.png"], "nested, .*dogs/puppies/2.png lies deeper than .*cats/1.png"),
        (["cats/1.png", "2.png"], "2.png is in no class folder"),
        (["cats/1.png", "cats/2.png"], "all images are in one folder, cats"),
    ],
)
def test_folders_that_do_not_say_the_class_are_refused(load, write, names, message):
    folder = write(*names)
    with pytest.raises(UsageError, match=f"^--class_conditional: .*{message}"):
        load("--train_data_dir", folder, "--class_conditional")
    assert load("--train_data_dir", folder).number == 2


def test_the_innermost_folder_is_the_class(load, write):
    folder = write("summer/cats/1.png", "winter/cats/2.png", "winter/dogs/3.png")
    data = load("--train_data_dir", folder, "--class_conditional")
    assert data.classes == ["cats", "dogs"]
    assert data.__getitems__([0, 1, 2])["class_labels"].tolist() == [0, 0, 1]


def test_links_to_folders_are_followed_within_and_refused_beyond(load, write, tmp_path):
    folder = write("cats/1.png")
    (folder / "dogs").symlink_to("cats")
    (folder / "cats" / "up").symlink_to(folder)
    assert load("--train_data_dir", folder, "--class_conditional").classes == ["cats", "dogs"]
    (folder / "birds").symlink_to(write("1.png", folder="elsewhere"))
    with pytest.raises(UsageError, match="photos/birds lies outside"):
        load("--train_data_dir", folder)


def test_links_that_multiply_are_refused(load, write):
    """Folders that link to each other would be listed in every order of their names."""
    folder = write(*(f"{number}/1.png" for number in range(12)))
    for number in range(12):
        for other in {*range(12)} - {number}:
            (folder / str(number) / f"to{other}").symlink_to(folder / str(other))
    with pytest.raises(UsageError, match="is a link in a linked folder, and nested links are not followed"):
        load("--train_data_dir", folder)


def test_a_large_archive_is_opened_once(load, write, monkeypatch):
    folder = write("1.png")
    with zipfile.ZipFile(folder / "all.ZIP", "w") as archive:
        for number in range(50):
            archive.write(folder / "1.png", f"{number}.png")
    opened = []
    init = zipfile.ZipFile.__init__
    monkeypatch.setattr(zipfile.ZipFile, "__init__", lambda *args, **more: opened.append(1) or init(*args, **more))
    assert load("--train_data_dir", folder).number == 51
    assert len(opened) <= 4  # `datasets` opened it for each image


def test_a_changed_image_is_decoded_anew(load, write):
    folder = write("1.png")
    assert load("--train_data_dir", folder).__getitems__([0])["values"].max() == 0
    PIL.Image.new("L", (8, 8), 9).save(folder / "1.png")
    os.utime(folder / "1.png", (1, 1))
    assert load("--train_data_dir", folder).__getitems__([0])["values"].max() == 9


def test_folders_can_be_excluded_with_a_reason(write):
    folder = write("1.png", "run/samples/2.png", "run/3.png")
    (folder / "run" / "link").symlink_to("/nowhere")
    source = Source(f"--train_data_dir {folder}", (str(folder),))
    found = list_images(folder, source, lambda path, is_folder: "are in run/" if path == f"{folder}/run" else None)
    assert found.files == [f"{folder}/1.png"]
    assert found.unused() == "2 of 3 image files are not used, because they are in run/"


def test_a_listing_takes_as_long_as_it_has_files(write):
    folder = write("1.png")
    content = (folder / "1.png").read_bytes()

    def seconds(files):
        for index in range(files):
            (folder / f"train_{index}.png").write_bytes(content)
        start = time.process_time()
        assert len(list_images(folder, Source("", (str(folder),))).files) == files + 1
        return time.process_time() - start

    assert seconds(1000) < 1 and seconds(10_000) < 4  # `datasets` took 7 s for the latter


# The cache of the Hub


@pytest.fixture
def snapshot(tmp_path):
    """A data set in the cache of the Hub: one image is a link to its blob, another to one that repositories share."""
    cache = tmp_path / "hub"
    repository = cache / "datasets--user--pictures"
    folder = repository / "snapshots" / "abc"
    (folder / "data").mkdir(parents=True)
    (repository / "blobs").mkdir()
    PIL.Image.new("L", (8, 8)).save(repository / "blobs" / "1f", "png")
    (folder / "1.png").symlink_to("../../blobs/1f")
    shared = cache / "blobs" / "0a" / ("0a" * 32)
    shared.parent.mkdir(parents=True)
    PIL.Image.new("L", (8, 8)).save(shared, "png")
    (repository / "blobs" / "2f").symlink_to(f"../../blobs/0a/{shared.name}")
    (folder / "data" / "2.png").symlink_to("../../../blobs/2f")
    return folder


@pytest.mark.parametrize("flags", KINDS_OF_FLAGS, ids=" ".join)
def test_a_data_set_in_the_cache_of_the_hub_is_read(load, snapshot, flags):
    data = load(*flags, snapshot)
    assert data.number == 2 and data.examples.__getitems__([0, 1])["values"].max() == 0
    assert load(*flags, snapshot / "data").number == 1


def test_tables_and_arrays_in_the_cache_of_the_hub_are_read(load, snapshot):
    blobs = snapshot.parents[1] / "blobs"
    table = Dataset.from_dict({"image": [str(snapshot / "1.png")]}, Features(image=Image()))
    table.to_parquet(blobs / "3")
    np.save(blobs / "4.npy", np.zeros((2, 1, 8, 8)))
    for place, blob in (("tables/t.parquet", "3"), ("fields/f.npy", "4.npy")):
        (snapshot / place).parent.mkdir()
        (snapshot / place).symlink_to(f"../../../blobs/{blob}")
    for streaming in ((), ("--streaming",)):
        assert load("--dataset_name", snapshot / "tables" / "t.parquet", *streaming).number == 1
    assert load("--dataset_name", snapshot / "tables").number == 1
    assert load("--train_data_dir", snapshot / "fields").number == 2


@pytest.mark.parametrize("target", ["../../secret.png", "../../../secret.png", "../../../other/blobs/1f"])
def test_links_of_a_snapshot_to_anything_but_blobs_are_refused(load, snapshot, target):
    path = snapshot / target
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("L", (8, 8)).save(path.resolve(), "png")
    (snapshot / "link.png").symlink_to(target)
    with pytest.raises(UsageError, match=r"link\.png lies outside"):
        load("--train_data_dir", snapshot)


def test_blobs_that_are_a_link_themselves_lead_nowhere(load, snapshot, write):
    """Whoever makes a folder in the layout of the cache does not choose what lies in its blobs."""
    elsewhere = write("1f", folder="elsewhere")
    blobs = snapshot.parents[1] / "blobs"
    blobs.rename(blobs.with_name("before"))
    blobs.symlink_to(elsewhere)
    with pytest.raises(UsageError, match=r"1\.png lies outside"):
        load("--train_data_dir", snapshot)
