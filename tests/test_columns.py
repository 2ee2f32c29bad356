"""Columns of the data that losses need: masks, images, numbers and texts, through the real command."""

import csv
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from diffusers import AutoencoderTiny
from in_processes import feed, run_script
from runs import ROOT, differ, metrics, refusal, weights
from tiny_pipelines import save_stable_diffusion

from reg_diffusers.cli import main
from reg_diffusers.regularizers import masked, threshold
from reg_diffusers.regularizers.contract import masks_of

pytestmark = pytest.mark.training

# The picture itself is the mask, its brightness the number and the text: any row, flip or crop that differs is seen.
LOSSES = """
import torch
from reg_diffusers.regularizers import masked, total_variation

seen = []


def aligned(x0_hat, /, *, original_samples, mask, age, words, twin):
    seen.append((original_samples, mask, age, words, twin))
    return (x0_hat - twin).square().flatten(1).mean(1)


aligned.needs = ("original_samples", "mask", "age", "words", "twin")
inside = masked(total_variation)


def of_all(x0_hat, /, *, mask, age, words, twin):
    numbers = torch.tensor([float(text.removeprefix("brightness ")) for text in words])
    return (mask * (x0_hat - twin).square()).flatten(1).mean(1) * age * numbers


of_all.needs = ("mask", "age", "words", "twin")


def similar(x0_hat, /, *, prompt):
    seen.append(prompt)
    return x0_hat.square().flatten(1).mean(1)


similar.needs = ("prompt",)


def older(x0_hat, /, *, age):
    return x0_hat.square().flatten(1).mean(1) * age


older.needs = ("age",)
"""
COLUMNS = "mask=area twin=copy words=text --image_column image".split()
ALIGNED = ("--regularizer", "own_columns:aligned", "--reg_weighting", "constant", "--reg_columns", *COLUMNS)
ROWS = 12


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The module of the losses, in the folder of the test."""
    (tmp_path / "own_columns.py").write_text(LOSSES)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("own_columns", None)
    yield lambda: sys.modules["own_columns"]
    sys.modules.pop("own_columns", None)


def picture(row, size=(16, 16)):
    generator = np.random.default_rng(row)
    pixels = generator.integers(0, 2, (size[1] // 4, size[0] // 4), dtype=np.uint8) * 255
    return PIL.Image.fromarray(pixels).resize(size, PIL.Image.Resampling.NEAREST)


def write_folder(folder="photos", size=(16, 16), mask_size=None, name="metadata.csv", rows=None, **columns):
    """Pictures whose mask, twin and number say which picture they belong to."""
    Path(folder, "areas").mkdir(parents=True)
    table = []
    for row in range(ROWS if rows is None else rows):
        picture(row, size).save(Path(folder, f"{row}.png"))
        area = picture(row, size).resize(mask_size or size, PIL.Image.Resampling.NEAREST)
        area.save(Path(folder, "areas", f"{row}.png"))
        brightness = np.asarray(picture(row, size)).mean() / 255
        found = {"file_name": f"{row}.png", "area": f"areas/{row}.png", "copy": f"{row}.png", "age": brightness}
        table.append(found | {"text": f"brightness {brightness:.6f}"})
        table[-1] |= {name: values[row] for name, values in columns.items()}
    write_table(Path(folder, name), table)


def write_table(path, table):
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(table[0]))
            writer.writeheader()
            writer.writerows(table)
    else:
        path.write_text("".join(f"{json.dumps(row)}\n" for row in table))


def write_parquet(path="table.parquet", **columns):
    images = [{"bytes": None, "path": str(Path(f"{row}.png").resolve())} for row in range(ROWS)]
    for row in range(ROWS):
        picture(row).save(f"{row}.png")
    brightness = [np.asarray(picture(row)).mean() / 255 for row in range(ROWS)]
    found = {"image": images, "area": images, "copy": images, "age": brightness}
    found |= {"text": [f"brightness {value:.6f}" for value in brightness]} | columns
    features = {"image": Image(), "area": Image(), "copy": Image(), "age": Value("float64"), "text": Value("string")}
    Dataset.from_dict(found, features=Features(features)).to_parquet(path)


@pytest.fixture
def on(train, own, tmp_path):
    """Runs the script on 16 x 16 images."""
    quick = "--resolution 16 --cache_dir cache --max_train_steps 3 --train_batch_size 4 --num_threads 1".split()
    return lambda *flags, **kwargs: train(*quick, *flags, **kwargs)


def check_alignment(seen, size=(16, 16)):
    assert len(seen) > 3
    for original, mask, age, words, twin in seen:
        assert original.shape == mask.shape == twin.shape == (len(original), 1, *size)
        torch.testing.assert_close(mask, (original + 1) / 2, rtol=0, atol=1e-6)
        torch.testing.assert_close(twin, original, rtol=0, atol=1e-6)
        assert mask.min() == 0 and mask.max() == 1
        torch.testing.assert_close(age, mask.mean((1, 2, 3)), rtol=0, atol=1e-6)
        assert age.dtype == torch.float32
        assert words == [f"brightness {value:.6f}" for value in mask.double().mean((1, 2, 3)).tolist()]


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_the_columns_of_a_folder_belong_to_their_images_and_are_flipped_with_them(on, own, capsys, name):
    write_folder(name=name)
    on("--train_data_dir", "photos", *ALIGNED, "--random_flip")
    check_alignment(own().seen)
    originals = torch.cat([original for original, *_ in own().seen])
    of_files = torch.stack([torch.from_numpy(np.array(picture(row))) for row in range(ROWS)])
    flipped = ~(originals / 2 + 0.5).eq(of_files / 255).flatten(2).all(2).any(1)
    assert flipped.any() and not flipped.all()
    printed = capsys.readouterr()
    assert "column     mask: masks, 0 to 1, of the column area\n" in printed.out
    assert "column     age: a number per image\n" in printed.out
    assert "not used" not in printed.err  # the masks are files of the folder that rows name


def test_the_columns_of_a_table_belong_to_their_images(on, own):
    write_parquet()
    on("--dataset_name", "table.parquet", *ALIGNED, "--random_flip")
    check_alignment(own().seen)


def test_the_columns_of_a_stream_belong_to_their_images(on, own):
    write_parquet()
    on("--dataset_name", "table.parquet", *ALIGNED, "--random_flip", "--streaming")
    check_alignment(own().seen)


def test_a_folder_can_be_streamed_with_its_columns(on, own):
    write_folder()
    on("--train_data_dir", "photos", *ALIGNED, "--random_flip", "--streaming")
    check_alignment(own().seen)


def test_masks_are_resized_and_cropped_as_their_pictures(on, own):
    write_folder(size=(48, 32))
    on(
        "--train_data_dir",
        "photos",
        "--regularizer",
        "own_columns:aligned",
        "--reg_columns",
        *COLUMNS[:3],
        *COLUMNS[3:],
    )
    for original, mask, *_ in own().seen:
        assert mask.shape[-2:] == (16, 16)
        torch.testing.assert_close(mask, (original + 1) / 2, rtol=0, atol=1e-6)


def test_a_mask_of_half_the_size_is_accepted_and_fits(on, own):
    write_folder(size=(32, 32), mask_size=(16, 16))
    on("--train_data_dir", "photos", *ALIGNED)
    for original, mask, *_ in own().seen:
        assert ((mask > 0.5) == (original > 0)).all()


def check_same_windows(seen, sizes):
    """The mask and the twin of each picture are its own window; number and text are those of the whole picture."""
    assert {original.shape[2:] for original, *_ in seen} == sizes
    for original, mask, age, words, twin in seen:
        torch.testing.assert_close(mask, (original[:, :1] + 1) / 2, rtol=0, atol=1e-6)
        torch.testing.assert_close(twin, original[:, :1], rtol=0, atol=1e-6)
        assert words == [f"brightness {value:.6f}" for value in age.tolist()]


@pytest.mark.parametrize("streaming", [(), ("--streaming",)])
def test_columns_have_the_random_window_of_their_picture(on, own, streaming):
    write_folder(size=(21, 21))
    on("--train_data_dir", "photos", *ALIGNED, *streaming, "--random_crop", "--random_flip")
    check_same_windows(own().seen, {(16, 16)})
    windows = {image.numpy().tobytes() for original, *_ in own().seen for image in original}
    assert len(windows) > ROWS  # not the central ones alone


def test_columns_are_in_the_buckets_of_their_pictures(on, own):
    write_folder()
    wide = [row for row in range(ROWS) if row % 2]
    for row in wide:
        for file in (f"photos/{row}.png", f"photos/areas/{row}.png"):
            picture(row, (32, 8)).save(file)
    on("--train_data_dir", "photos", *ALIGNED, "--random_flip", "--buckets", 8)
    check_same_windows(own().seen, {(16, 16), (8, 32)})


@pytest.mark.slow
def test_columns_reach_the_loss_of_a_text_to_image_model(on, own, tmp_path):
    pytest.importorskip("peft")
    save_stable_diffusion("base", tmp_path / "scratch")
    write_folder()
    model = ("--pretrained_model_name_or_path", "base")
    on(
        "--train_data_dir",
        "photos",
        *ALIGNED,
        "--random_flip",
        "--caption_column",
        "text",
        "--lora_rank",
        2,
        model=model,
    )
    check_same_windows(own().seen, {(16, 16)})


@pytest.mark.slow
def test_two_processes_train_with_columns_as_one(folder, monkeypatch):
    """By a loss whose value depends on all columns of an image; the noise belongs to the image."""
    monkeypatch.chdir(folder)
    write_folder()
    (folder / "own_columns.py").write_text(LOSSES)
    flags = (
        "--train_data_dir",
        "photos",
        *ALIGNED,
        "--resolution",
        16,
        "--max_train_steps",
        2,
        "--cache_dir",
        "cache",
    )
    for number in (1, 2):
        run = ("--train_batch_size", 4 // number, "--output_dir", number)
        assert run_script(folder, *flags, *run, prepare=feed, number=number) == [0] * number
    one, two = (weights(folder / str(number)) for number in (1, 2))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-6, atol=1e-9)


def test_without_a_mask_the_loss_sees_nothing_outside(on, own):
    """The gradient of `masked` is 0 where the mask is 0: with empty masks, the training is the plain one."""
    write_folder()
    for row in range(ROWS):
        PIL.Image.new("L", (16, 16)).save(f"photos/areas/{row}.png")
    flags = ("--train_data_dir", "photos", "--reg_weighting", "constant")
    plain = on(*flags, "--regularizer", "none", output="plain")
    inside = ("--regularizer", "own_columns:inside", "--reg_columns", "mask=area", "--reg_weight", 5)
    assert not differ(weights(on(*flags, *inside)), weights(plain))
    write_folder("full")
    full = on("--train_data_dir", "full", *flags[2:], *inside, output="out-full")
    assert differ(weights(full), weights(plain))


@pytest.mark.parametrize("streaming", [(), ("--streaming",)])
def test_a_training_with_columns_resumes_bit_for_bit(on, own, streaming):
    write_folder()
    flags = ("--train_data_dir", "photos", *ALIGNED, *streaming, "--random_flip", "--checkpointing_steps", 2)
    out = on(*flags, "--max_train_steps", 5)
    whole, logged = weights(out), metrics(out)[-1]
    for left in ("checkpoint-4", "unet"):
        shutil.rmtree(out / left)
    on(*flags, "--max_train_steps", 5, "--resume", "auto")
    assert not differ(whole, weights(out))
    assert {name: metrics(out)[-1][name] for name in ("denoising", "aligned")} == {
        name: logged[name] for name in ("denoising", "aligned")
    }


def test_another_column_is_another_training(on, own, capsys):
    write_folder(other=list(range(ROWS)))
    flags = ("--train_data_dir", "photos", "--regularizer", "own_columns:older", "--checkpointing_steps", 3)
    on(*flags)
    error = refusal(on, capsys, *flags, "--resume", "auto", "--reg_columns", "age=other")
    assert "--reg_columns None -> age=other" in error


def test_the_prompt_of_a_loss_is_a_column(on, own):
    write_folder(prompt=[f"a {row}" for row in range(ROWS)])
    on("--train_data_dir", "photos", "--regularizer", "own_columns:similar")
    texts = {text for batch in own().seen for text in batch}
    assert texts == {f"a {row}" for row in range(ROWS)}


def test_held_out_images_have_their_columns(on, own):
    write_folder()
    out = on("--train_data_dir", "photos", *ALIGNED, "--validation_split", 0.25, "--preview_steps", 100)
    check_alignment(own().seen)
    assert json.loads((out / "validation.json").read_text())["last"]["validation/raw/aligned"] > 0


def test_the_example_of_the_page_runs(on, capsys):
    page = (ROOT / "docs" / "data.md").read_text().split("## Columns for a loss")[1].split("\n## ")[0]
    code, command = re.findall(r"```(?:python|bash)\n(.*?)```", page, re.DOTALL)
    exec(code, {})
    sys.modules.pop("my_losses", None)  # that of another test
    flags = shlex.split(command.replace("\\\n", " ").removeprefix("accelerate launch train_reg.py "))
    on(*flags)
    assert "column     mask: masks, 0 to 1, of the column area" in capsys.readouterr().out
    sys.modules.pop("my_losses")


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["inside", "similar", "older"])
def test_diagnose_gives_losses_their_columns(own, monkeypatch, tmp_path, capsys, loss):
    monkeypatch.chdir(tmp_path)
    write_folder(rows=24, prompt=[f"a {row}" for row in range(24)])
    flags = "--train_data_dir photos --resolution 16 --cache_dir cache --num_levels 3 --output diagnosis".split()
    renamed = ("--reg_columns", "mask=area") if loss == "inside" else ()
    main(["diagnose", *flags, "--regularizer", f"own_columns:{loss}", *renamed])
    assert "cannot work" not in capsys.readouterr().out
    name = {"inside": "total_variation"}.get(loss, loss)
    assert json.loads((tmp_path / "diagnosis" / f"{name}.json").read_text())["verdict"]


@pytest.mark.parametrize("vae", [False, True])
def test_evaluate_gives_losses_the_columns_of_the_data_on_predictions(on, own, capsys, vae):
    """The column is the one that the training recorded; each image has its own, and the data have their own L'."""
    write_folder(rows=44)
    flags = ("--regularizer", "own_columns:aligned", "--reg_columns", *COLUMNS, "--train_data_dir", "photos")
    in_latents(on, *flags[:-2]) if vae else on(*flags)
    del own().seen[:]
    common = "--num_images 20 --num_inference_steps 2 --num_threads 1 --features pixels --model out".split()
    main(["evaluate", *common, "--regularizer", "own_columns:aligned", "total_variation", "--cache_dir", "cache"])
    printed = capsys.readouterr().out
    assert "aligned needs original_samples, mask, age, words, twin, which samples lack: measured on x0_hat" in printed
    check_alignment(own().seen)
    rows = json.loads(Path("evaluation", "evaluation.json").read_text())["rows"]
    assert list(rows["out"]["terms"]) == ["own_columns:aligned of x0_hat", "total_variation"]
    data, model = (rows[name]["terms"]["own_columns:aligned of x0_hat"]["value"] for name in ("data", "out"))
    assert data < 1e-6 < model
    page = Path("evaluation", "index.html").read_text()
    assert "own_columns:aligned of x0_hat" in page and "because samples lack what it needs" in page
    with pytest.raises(SystemExit, match="2"):
        main(["evaluate", *common, "--regularizer", "own_columns:inside", "--data", "photos", "--output", "other"])
    assert "mask" in capsys.readouterr().err.splitlines()[-1]


def in_latents(on, *flags, **kwargs):
    torch.manual_seed(0)
    AutoencoderTiny(
        in_channels=1,
        out_channels=1,
        latent_channels=4,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).save_pretrained("vae")
    return on("--vae", "vae", "--train_data_dir", "photos", *flags, **kwargs)


def test_in_latents_columns_and_original_images_have_the_size_of_the_pictures(on, own):
    """original_samples are the pictures themselves, not what the autoencoder makes of them."""
    write_folder()
    in_latents(on, *ALIGNED, "--random_flip")
    check_alignment(own().seen)
    assert any(row["raw/aligned"] > 0 for row in metrics(Path("out")))


def test_in_latents_the_loss_of_a_perfect_model_is_the_error_of_the_autoencoder(on, own, capsys):
    write_folder()
    in_latents(on, *ALIGNED, "--preview_steps", 100)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("data       aligned")]
    vae = AutoencoderTiny.from_pretrained("vae")
    images = torch.stack([torch.from_numpy(np.array(picture(row))) for row in range(ROWS)])[:, None] / 127.5 - 1
    with torch.no_grad():
        decoded = vae.decode(vae.encode(images).latents).sample
    error = (decoded - images).square().mean().item()
    assert float(line.split()[2]) == pytest.approx(error, rel=0.01) and error > 0.01


def test_losses_say_which_of_their_needs_are_masks():
    def loss(x0_hat, /, **context): ...

    loss.needs = ("depth", "mask", "face_mask")
    assert masks_of(loss) == ("mask", "face_mask")
    assert masks_of(threshold(masked(loss, mask="hair"), 0.1)) == ("mask", "face_mask", "hair")


def lacking(**changes):
    """Writes a folder in which one value of each column is replaced."""

    def write():
        rows = {name: [value] + ["1"] * (ROWS - 1) for name, value in changes.items()}
        write_folder(**rows)

    return write


def write_and(change):
    def write():
        write_folder()
        change()

    return write


def save(path, image):
    return write_and(lambda: image.save(path))


BAD = {
    "no such column": (write_folder, "mask=aera", "have no column 'aera': did you mean area? Name it by"),
    "no metadata": (
        write_and(lambda: Path("photos/metadata.csv").unlink()),
        "mask=area",
        "the columns are: image (PIL.Image.Image)",
    ),
    "another shape": (
        save("photos/areas/3.png", PIL.Image.new("L", (16, 12), 255)),
        "mask=area",
        "--reg_columns mask=area: row 3: a mask of 16 x 12 pixels for a picture of 16 x 16",
    ),
    "no file": (write_and(lambda: Path("photos/areas/3.png").unlink()), "mask=area", "areas/3.png (row 3)"),
    "outside": (lacking(area="../secret.png"), "mask=area", "holds texts"),
    "texts": (write_folder, "mask=text", "a mask is an image, but this column holds texts"),
    "numbers": (write_folder, "mask=age", "a mask is an image, but this column holds numbers"),
    "not needed": (write_folder, "area=area", "no --regularizer needs area; they need mask"),
    "of the loop": (write_folder, "noise=area", "every run provides noise itself"),
    "no name": (write_folder, "area", "'area' is not NAME=COLUMN"),
}


@pytest.mark.parametrize("write, renamed, message", BAD.values(), ids=BAD)
def test_bad_masks_are_refused_in_one_line(on, own, capsys, write, renamed, message):
    write()
    flags = ("--train_data_dir", "photos", "--regularizer", "own_columns:inside", "--reg_columns", renamed)
    assert message in refusal(on, capsys, *flags)
    assert not Path("out").exists()


def test_masks_of_zeros_and_ones_are_refused(on, own, capsys):
    write_folder()
    for path in Path("photos/areas").iterdir():
        PIL.Image.fromarray((np.asarray(PIL.Image.open(path)) > 0).astype(np.uint8)).save(path)
    flags = ("--train_data_dir", "photos", "--regularizer", "own_columns:inside", "--reg_columns", "mask=area")
    assert "the largest value in 12 masks is 1 of 255, which is black" in refusal(on, capsys, *flags)


def test_a_mask_outside_the_folder_is_not_read(on, own, capsys):
    write_folder()
    picture(0).save("secret.png")
    rows = [{"file_name": f"{row}.png", "area": f"areas/{row}.png"} for row in range(ROWS)]
    rows[2]["area"] = "../secret.png"
    write_table(Path("photos/metadata.csv"), rows)
    flags = ("--train_data_dir", "photos", "--regularizer", "own_columns:inside", "--reg_columns", "mask=area")
    assert "secret.png lies outside and is not read" in refusal(on, capsys, *flags)
    rows[2]["area"] = "areas/2.png"
    write_table(Path("photos/metadata.csv"), rows)
    Path("photos/areas/2.png").unlink()
    Path("photos/areas/2.png").symlink_to(Path("secret.png").resolve())
    assert "lies outside and is not read" in refusal(on, capsys, *flags)


@pytest.mark.parametrize(
    "column, value, message",
    [
        ("age", "", "column 'age': 1 of 12 rows have no finite number, the first is row 0"),
        ("age", "inf", "have no finite number"),
        ("prompt", "", "column 'prompt': 1 of 12 rows have no text, the first is row 0"),
        ("age", "old", "; the data give it age: a text per image"),
    ],
)
def test_missing_values_are_refused_in_one_line(on, own, capsys, column, value, message):
    others = [f"a {row}" if column == "prompt" else row for row in range(1, ROWS)]
    write_folder(**{column: [value, *others]})
    loss = {"age": "older", "prompt": "similar"}[column]
    assert message in refusal(on, capsys, "--train_data_dir", "photos", "--regularizer", f"own_columns:{loss}")


def test_a_stream_stops_at_a_row_without_a_value(on, own, capsys):
    write_parquet(age=[0.5] * 11 + [None])
    flags = ("--dataset_name", "table.parquet", "--streaming", "--regularizer", "own_columns:older")
    assert "column 'age': row 11 of piece 0 has no finite number" in refusal(on, capsys, *flags)


def test_fields_have_no_columns(on, own, capsys):
    np.save("fields.npy", np.random.default_rng(0).random((8, 1, 8, 8), dtype=np.float32))
    error = refusal(on, capsys, "--train_data_dir", "fields.npy", "--regularizer", "own_columns:older")
    assert "needs age, a column of the data, which fields lack" in error
