"""--buckets: images in sizes near their own aspect ratios, in batches of one size."""

import json
import shutil
from collections import Counter
from functools import partial

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import UNet2DConditionModel
from in_processes import run_script
from runs import differ, metrics, refusal, weights
from safetensors.torch import load_file
from test_latents import save_vae
from tiny_pipelines import save_stable_diffusion_xl

from reg_diffusers import RegDDPMPipeline
from reg_diffusers.autoencoder import encoded
from reg_diffusers.cli import main
from reg_diffusers.data.buckets import BucketBatches, bucket_sizes, cropped, nearest_sizes
from reg_diffusers.data.held_out import split_rows
from reg_diffusers.data.training_data import load_training_data
from reg_diffusers.networks.computation import CompiledForBatches
from reg_diffusers.runs.checkpoint import Progress
from reg_diffusers.runtime.errors import UsageError
from reg_diffusers.settings import DataSettings
from reg_diffusers.training import preparation

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
        (("--buckets", 3, "--vae", "vae"), "--buckets 3: the autoencoder reduces images by 2, so use a multiple of 2"),
        (("--buckets", 2, "--vae", "vae"), "--buckets: size 10x6: the network halves the resolution 1 time after"),
    ],
)
def test_what_cannot_work_is_one_line(train, photos, capsys, flags, message):
    if "--vae" in flags:
        save_vae()
    assert message in refusal(train, capsys, "--train_data_dir", photos, "--max_train_steps", 1, *flags)


@pytest.fixture
def batches(train, monkeypatch):
    """The batches of the training that follows."""
    drawn = []
    original = train.script.batches_of

    def recorded(*args, **kwargs):
        for batch in original(*args, **kwargs):
            drawn.append(batch)
            yield batch

    monkeypatch.setattr(train.script, "batches_of", recorded)
    return drawn


def measured(folder):
    return [line for line in metrics(folder) if "validation/denoising" in line]


def flags_for(folder, steps):
    quick = ("--num_threads", 1, "--cache_dir", folder.parent / "cache", "--max_train_steps", steps)
    return "--train_data_dir", folder, *BUCKETS, *quick, "--checkpointing_steps", steps - 2, "--preview_steps", 4


def test_latents_are_those_of_the_images_of_each_size_held_out_ones_are_not_trained_on_and_a_run_resumes(
    train, photos, batches, capsys
):
    vae = save_vae()
    flags = (
        *flags_for(photos, 6),
        "--vae",
        "vae",
        "--random_flip",
        "--validation_split",
        0.25,
        "--validation_steps",
        3,
    )
    out = train(*flags, "--regularizer", "total_variation")
    printed = capsys.readouterr()
    assert "latents    4 x 2 x 6, standard deviation" in printed.out and "held out   5 images" in printed.out
    data = buckets(photos)
    held_out = set(split_rows(20, 0.25, 0)[1])
    epoch = Counter(torch.cat([batch.ids for batch in batches[:5]]).tolist())
    assert set(epoch) == set(range(20)) - held_out and set(epoch.values()) == {1}
    images = {row: data.normalization.normalize(data.__getitems__([row])["values"]) for row in epoch}
    shapes = set()
    for batch in batches[:5]:
        shapes.add(batch.original_samples.shape[1:])
        for row, latent in zip(batch.ids.tolist(), batch.original_samples, strict=True):
            seen = [(encoded(vae, view) - latent).abs().max() for view in (images[row], images[row].flip(-1))]
            assert min(seen) < 1e-5
    assert shapes == {(4, 6, 2), (4, 4, 4), (4, 2, 6)}
    before = measured(out)
    assert [line["step"] for line in before] == [3, 6] and before[1]["validation/raw/total_variation"] > 0
    assert PIL.Image.open(out / "samples" / "step-000004.png").size[0] > 64
    whole = weights(out)
    (out / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    train(*flags, "--regularizer", "total_variation", "--resume", "auto")
    assert not differ(whole, weights(out)) and measured(out) == before


@pytest.mark.slow
def test_a_text_to_image_model_gets_the_text_and_the_size_of_each_image(train, photos, batches, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    base = save_stable_diffusion_xl("base", tmp_path / "scratch")
    lines, texts = [], {}
    for number, file in enumerate(sorted(photos.glob("*.png"))):
        texts[file.name] = "a cat" if number % 2 else "a dog"
        lines.append(json.dumps({"file_name": file.name, "text": texts[file.name]}))
    (photos / "metadata.jsonl").write_text("\n".join(lines))
    sizes = []
    forward = UNet2DConditionModel.forward

    def noting(self, sample, *args, added_cond_kwargs, **kwargs):
        sizes.append((tuple(sample.shape[-2:]), tuple(added_cond_kwargs["time_ids"][0].tolist())))
        return forward(self, sample, *args, added_cond_kwargs=added_cond_kwargs, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "forward", noting)
    flags = (*flags_for(photos, 6), "--caption_column", "text", "--lora_rank", 2, "--eval_batch_size", 1)
    flags += ("--regularizer", "total_variation", "--reg_weight", 0.1, "--validation_split", 0.2, "--random_flip")
    model = ("--pretrained_model_name_or_path", base)
    out = train(*flags, model=model)
    assert {shape for shape, _ in sizes} == {(6, 2), (4, 4), (2, 6)}
    found = {ids for _, ids in sizes}
    of_images = {(21, 10, 0, 0, 12, 4), (10, 20, 1, 0, 4, 12), (13, 12, 0, 0, 8, 8)}
    assert found == of_images | {(4, 12, 0, 0, 4, 12)}  # samples have the most frequent size
    assert all(ids[4:] == (2 * height, 2 * width) for (height, width), ids in sizes)
    embedded = {}
    captions = [text for part in buckets(photos, caption_column="text").parts for text in part.captions]
    for batch in batches:
        for row, embedding in zip(batch.ids.tolist(), batch.context.conditions["prompt_embeds"], strict=True):
            assert torch.equal(embedding, embedded.setdefault(captions[row], embedding))
    assert len(embedded) == 2 and not torch.equal(*embedded.values())
    card = (out / "README.md").read_text()
    assert "16 images of photos at 4 x 12: " in card
    assert "any of them; the code below draws the most frequent one." in card
    adapters = load_file(out / "pytorch_lora_weights.safetensors")
    (out / "pytorch_lora_weights.safetensors").unlink()
    train(*flags, "--resume", "auto", model=model)
    assert not differ(adapters, load_file(out / "pytorch_lora_weights.safetensors"))


def test_held_out_images_of_another_folder_get_the_sizes_of_the_training(train, photos, tmp_path, capsys):
    others = tmp_path / "others"
    others.mkdir()
    for index, size in enumerate([(20, 10), (30, 9), (12, 12), (8, 30)]):
        PIL.Image.new("RGB", size, (60 * index, 9, 0)).save(others / f"{index}.png")
    shutil.copy(photos / "square2.png", others)
    out = train(*flags_for(photos, 3), "--validation_data_dir", others)
    card = (out / "README.md").read_text()
    assert "The images are grey, with 8 bits. They have 3 sizes near their own aspect ratios: 12x4 (9)" in card
    printed = capsys.readouterr()
    assert "1 of 5 held-out images are among the training images, too: not measured" in printed.err
    assert "held out   4 images" in printed.out
    assert metrics(out)[-1]["validation/denoising"] > 0


@pytest.mark.slow
def test_a_compiled_training_is_the_plain_one(train, photos, monkeypatch, capsys):
    torch._dynamo.reset()
    graphs = []

    def noting(graph, example_inputs):
        graphs.append(max(example_inputs, key=lambda one: getattr(one, "ndim", 0)).shape)
        return graph.forward

    for index in range(6):  # now there is a full batch of each size
        shutil.copy(photos / "square1.png", photos / f"square{5 + index}.png")
    flags = (*flags_for(photos, 8), "--random_flip")
    plain = weights(train(*flags, output="plain"))
    monkeypatch.setattr(preparation, "CompiledForBatches", partial(CompiledForBatches, backend=noting))
    with torch._dynamo.config.patch(recompile_limit=1):  # which monkeypatch does not restore
        out = train(*flags, "--compile")
    assert "compiled (takes minutes at the first full batch of each of 3 sizes)" in capsys.readouterr().out
    assert len(graphs) == 3 and not differ(plain, weights(out))
    torch._dynamo.reset()


@pytest.mark.slow
def test_two_processes_measure_images_of_each_size_as_one_does(train, photos, folder, monkeypatch):
    monkeypatch.chdir(folder)
    flags = (*flags_for(photos, 3), "--validation_split", 0.25, "--validation_steps", 2, "--learning_rate", 1e-30)
    flags += ("--keep_best", "--regularizer", "total_variation", "--eval_batch_size", 1)
    one = train(*flags, output=str(folder / "one"))
    assert run_script(folder, *flags, "--output_dir", "two") == [0, 0]
    assert measured(one) == measured(folder / "two") and len(measured(one)) == 2


def test_two_processes_share_the_steps_of_one():
    members = [range(0, 8), range(8, 18), range(18, 21)]
    one, *two = (BucketBatches(members, *settings) for settings in ((4, 5), (2, 5, 0, 2), (2, 5, 1, 2)))
    shared = [sorted(first + second) for first, second in zip(*two, strict=True)]
    assert shared == [sorted(batch) for batch in one]


def test_fields_keep_their_size(train, tmp_path, capsys):
    np.save(tmp_path / "fields.npy", np.zeros((4, 1, 8, 8), np.float32))
    message = refusal(train, capsys, "--train_data_dir", "fields.npy", "--buckets", 4, "--max_train_steps", 1)
    assert "--buckets groups images by aspect ratio" in message
