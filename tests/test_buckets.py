"""--buckets: images in sizes near their own aspect ratios, in batches of one size."""

import json
import shutil
from collections import Counter

import numpy as np
import PIL.Image
import pytest
import torch
from runs import differ, metrics, refusal, weights

from reg_diffusers import RegDDPMPipeline
from reg_diffusers.cli import main
from reg_diffusers.data.buckets import BucketBatches, bucket_sizes, cropped, nearest_sizes
from reg_diffusers.data.training_data import load_training_data
from reg_diffusers.runs.checkpoint import Progress
from reg_diffusers.runtime.errors import UsageError
from reg_diffusers.settings import DataSettings

pytestmark = pytest.mark.training

BUCKETS = ("--resolution", 8, "--buckets", 4, "--train_batch_size", 4)


@pytest.fixture
def photos(tmp_path):
    """6 high, 9 wide and 5 square images, one of each lying on its side by its EXIF orientation."""
    folder = tmp_path / "photos"
    folder.mkdir()
    random = np.random.default_rng(0)
    for kind, (number, width, height) in {"high": (6, 10, 21), "wide": (9, 20, 10), "square": (5, 12, 13)}.items():
        for index in range(number):
            lying = index == 0
            shape = (width, height, 3) if lying else (height, width, 3)
            exif = PIL.Image.Exif()
            exif[0x0112] = 6 if lying else 1
            image = PIL.Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8))
            image.save(folder / f"{kind}{index}.png", exif=exif)
    return folder


def buckets(folder, **settings):
    settings = {"resolution": 8, "buckets": 4} | settings
    return load_training_data(DataSettings(train_data_dir=str(folder), cache_dir=str(folder.parent), **settings))


@pytest.mark.parametrize("size, multiple", [((256, 256), 64), ((512, 512), 64), ((192, 256), 32), ((8, 8), 4)])
def test_sizes_fill_the_area_and_are_multiples(size, multiple):
    area, sizes = size[0] * size[1], bucket_sizes(size, multiple)
    assert len(set(sizes)) == len(sizes) > 1
    for height, width in sizes:
        assert height % multiple == width % multiple == 0 and max(height, width) <= 4 * min(height, width)
        assert height * width <= area and (width, height) in sizes
        # neither side can grow, unless the other was made the largest one
        assert (height + multiple) * width > area or height * (width + multiple) > area
    if size[0] == size[1]:
        assert size in sizes


def test_an_image_gets_the_nearest_aspect_ratio_and_the_larger_of_two_sizes():
    sizes = [(4, 4), (8, 8), (4, 16), (16, 4)]
    images = np.array([(100, 90), (10, 45), (300, 100), (7, 7)])
    assert [sizes[place] for place in nearest_sizes(images, sizes)] == [(8, 8), (4, 16), (16, 4), (8, 8)]


def test_the_share_that_is_cropped():
    # 20 x 10 in a square loses one half, the same shape loses nothing
    assert cropped(np.array([(10, 20), (5, 5)]), np.array([(8, 8), (8, 8)])) == pytest.approx(0.25)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_each_image_is_drawn_once_an_epoch_in_batches_of_one_size(processes):
    members = [range(0, 7), range(7, 31), range(31, 33)]
    samplers = [BucketBatches(members, 4, 5, process, processes) for process in range(processes)]
    orders = []
    for epoch in range(2):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        steps = list(zip(*samplers, strict=True))
        assert len(steps) == len(samplers[0])
        drawn = Counter(index for step in steps for batch in step for index in batch)
        assert max(drawn.values()) == 1
        left_out = [set(one) - set(drawn) for one in map(set, members)]
        assert all(len(one) < processes for one in left_out)
        for step in steps:
            assert len({next(k for k, one in enumerate(members) if i in one) for batch in step for i in batch}) == 1
            assert all(1 <= len(batch) <= 4 for batch in step)
        assert steps == list(zip(*samplers, strict=True))  # the order depends on the seed and the epoch only
        orders.append(steps)
    assert orders[0] != orders[1]


def test_images_go_to_the_size_of_their_upright_aspect_ratio(photos):
    data = buckets(photos)
    numbers = {part.shape: len(part) for part in data.parts}
    assert numbers == {(3, 12, 4): 6, (3, 8, 8): 5, (3, 4, 12): 9}
    assert len(data) == data.number == 20 and data.shape == (3, 4, 12) and len(data.examples) == 9
    assert data.note.startswith("3 sizes (12x4: 9, 8x8: 5, 4x12: 6), 2")


def test_a_batch_has_the_pixels_of_its_part(photos):
    data = buckets(photos)
    for members, part in zip(data.members, data.parts, strict=True):
        batch = data.__getitems__(list(members)[::-1])
        assert batch["ids"].tolist() == list(members)[::-1]
        assert torch.equal(batch["values"], part.__getitems__(list(range(len(part)))[::-1])["values"])
    with pytest.raises(ValueError, match="different sizes"):
        data.__getitems__([0, len(data) - 1])


def test_grey_and_colour_images_have_the_channels_of_all(photos):
    for file in photos.glob("square*"):
        PIL.Image.new("L", (12, 12)).save(file)
    assert {part.shape[0] for part in buckets(photos).parts} == {3}


def test_an_epoch_that_another_number_of_processes_continues_has_every_image_once():
    members, progress = [np.arange(30), np.arange(30, 41), np.arange(41, 60)], Progress()
    first = [list(BucketBatches(members, 2, 5, process, 3)) for process in range(3)]
    seen = Counter(image for batches in first for batch in batches[:4] for image in batch)
    progress.batch = 4
    progress.divide_again(3, 2)
    rest = [list(BucketBatches(members, 4, 5, process, 2, progress)) for process in range(2)]
    seen.update(image for batches in rest for batch in batches for image in batch)
    assert set(seen.values()) == {1} and 60 - len(seen) <= len(members)  # one of each size, which fills no step
    for batch in (batch for batches in rest for batch in batches):
        assert any(set(batch) <= set(one) for one in members)


def test_an_unreadable_image_is_refused_or_skipped(photos, capsys):
    (photos / "high3.png").write_bytes(b"rubbish")
    with pytest.raises(UsageError, match=r"high3\.png"):
        buckets(photos)
    assert buckets(photos, skip_bad_images=True).number == 19
    assert "skipped 1 of" in capsys.readouterr().out


def test_conditioning_images_and_classes_follow(tmp_path):
    folder, lines = tmp_path / "pairs", []
    folder.mkdir()
    for index in range(6):
        size = (20, 10) if index % 2 else (10, 20)
        for name in (f"{index}.png", f"edges_{index}.png"):
            PIL.Image.new("L", size, 40 * index).save(folder / name)
        lines.append(
            json.dumps({"file_name": f"{index}.png", "edges_file_name": f"edges_{index}.png", "label": index})
        )
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    data = buckets(folder, conditioning_image_column="edges", class_conditional=True)
    assert data.condition_channels == 1 and len(data.classes) == 6
    for members in data.members:
        batch = data.__getitems__(list(members))
        assert torch.equal(batch["values"], batch["condition"])
        assert (batch["values"][:, 0, 0, 0] == 40 * batch["class_labels"]).all()


def test_a_training_resumes_bit_for_bit_and_uses_every_image(train, photos, capsys):
    flags = (
        "--train_data_dir",
        photos,
        *BUCKETS,
        "--random_flip",
        "--checkpointing_steps",
        4,
        "--max_train_steps",
        12,
    )
    out = train(*flags, "--preview_steps", 6, "--regularizer", "total_variation", "--compare")
    assert "3 sizes (12x4: 9, 8x8: 5, 4x12: 6)" in capsys.readouterr().out
    whole, last = weights(out), metrics(out)[-1]
    assert RegDDPMPipeline.from_pretrained(str(out)).image_shape == (1, 4, 12)
    shutil.rmtree(out / "checkpoint-12")
    shutil.rmtree(out / "checkpoint-8")  # in the middle of an epoch of 7 steps
    train(*flags, "--preview_steps", 6, "--regularizer", "total_variation", "--compare", "--resume", "auto")
    assert not differ(whole, weights(out)) and metrics(out)[-1] == last


def test_an_epoch_has_the_announced_steps(train, photos, capsys):
    out = train("--train_data_dir", photos, *BUCKETS, "--num_epochs", 2)
    assert metrics(out)[-1]["step"] == 2 * 7  # of 2 + 3 + 2 batches
    assert ": 14 steps of " in capsys.readouterr().out


def test_the_model_is_measured_on_images_of_its_own_size(train, photos, tmp_path, capsys):
    out = train("--train_data_dir", photos, *BUCKETS, "--max_train_steps", 1)
    for index in range(9, 24):
        shutil.copy(photos / "wide1.png", photos / f"wide{index}.png")
    main(["diagnose", "--train_data_dir", str(photos), *map(str, BUCKETS[:4]), "--num_levels", "2"])
    assert "data: 24 of 35 images" in capsys.readouterr().out
    main(["sample", "--model", str(out), "--num_images", "1", "--num_inference_steps", "1", "--output", "drawn"])
    assert {PIL.Image.open(file).size for file in (tmp_path / "drawn").glob("*.png")} == {(12, 4)}


def test_small_sizes_are_named(train, photos, capsys):
    train(
        "--train_data_dir", photos, "--resolution", 8, "--buckets", 4, "--train_batch_size", 6, "--max_train_steps", 1
    )
    assert "fewer images than a step takes, so its batches are smaller: 8x8 (5)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--buckets", 16), "--buckets 16: no size with such sides has the area of --resolution 8"),
        (("--buckets", 3), "--buckets: size 9x6: the network halves"),
        (("--buckets", 4, "--streaming"), "--buckets: the sizes of all images are needed"),
        (("--buckets", 4, "--compile"), "--compile: the network would be compiled for each size of --buckets"),
        (("--buckets", 4, "--vae", "vae"), "--buckets is not supported in latents"),
    ],
)
def test_what_cannot_work_is_one_line(train, photos, capsys, flags, message):
    if "--vae" in flags:
        from test_latents import save_vae

        save_vae()
    assert message in refusal(train, capsys, "--train_data_dir", photos, "--max_train_steps", 1, *flags)


def test_fields_keep_their_size(train, tmp_path, capsys):
    np.save(tmp_path / "fields.npy", np.zeros((4, 1, 8, 8), np.float32))
    message = refusal(train, capsys, "--train_data_dir", "fields.npy", "--buckets", 4, "--max_train_steps", 1)
    assert "--buckets groups images by aspect ratio" in message
