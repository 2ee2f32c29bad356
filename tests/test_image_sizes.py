"""The sizes of images that Stable Diffusion XL takes: of each image in training, the pipeline's default in samples."""

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import UNet2DConditionModel
from runs import differ
from safetensors.torch import load_file
from tiny_pipelines import save_stable_diffusion_xl

from reg_diffusers.data.crops import central, drawn
from reg_diffusers.data.image_sizes import time_ids, windowed
from reg_diffusers.data.pictures import decode
from reg_diffusers.networks.families.stable_diffusion_xl import FAMILY
from reg_diffusers.training.batches import batches_of

SIZES = [(24, 24), (20, 40), (64, 16), (16, 16), (33, 17), (12, 30)]  # width, height
DEFAULT = [16, 16, 0, 0, 16, 16]


def of_script(width, height, resolution):
    """The sizes as train_text_to_image_lora_sdxl.py of diffusers computes them, with --center_crop."""
    short = min(width, height)
    resized = [int(resolution * side / short) for side in (height, width)]  # torchvision's Resize of the shorter side
    corner = [max(0, round((side - resolution) / 2.0)) for side in resized]
    return [height, width, *corner, resolution, resolution]


def test_sizes_are_those_of_the_script_of_diffusers():
    sizes = [(width, height) for width in range(5, 70, 3) for height in range(4, 90, 7)]
    found = time_ids(torch.tensor([size[::-1] for size in sizes]), (16, 16))
    assert found.tolist() == [of_script(*size, 16) for size in sizes] and found.dtype == torch.int64
    assert time_ids(torch.tensor([[30, 90]]), (10, 20)).tolist() == [[30, 90, 0, 5, 10, 20]]


def test_the_corner_is_where_the_decoded_image_begins():
    ramp = np.tile(np.arange(240, dtype=np.uint8), (60, 1))  # the value of a pixel is its column
    (ids,) = time_ids(torch.tensor([ramp.shape]), (20, 20)).tolist()
    first = decode(PIL.Image.fromarray(ramp), (20, 20), 1)[0, :, 0].mean()
    assert ids == [60, 240, 0, 30, 20, 20] and abs(first - (30 + 0.5) * 240 / 80) < 1


def test_a_window_moves_the_corner_and_is_the_target():
    ids = time_ids(torch.tensor([[40, 40], [40, 80]]), (20, 20))
    assert windowed(ids, torch.tensor([[1, 2], [3, 0]]), (18, 18)).tolist() == [
        [40, 40, 1, 2, 18, 18],
        [40, 80, 3, 10, 18, 18],
    ]
    column = torch.arange(20.0).expand(2, 1, 20, 20)  # the value of a pixel is its place
    batch = {"values": column, "ids": torch.tensor([5, 6]), "time_ids": ids}
    assert central(batch, (16, 16))["time_ids"][:, 2:].tolist() == [[2, 2, 16, 16], [2, 12, 16, 16]]
    across, down = drawn(batch, (16, 16), 0, 3), drawn({**batch, "values": column.mT}, (16, 16), 0, 3)
    moved = across["time_ids"][:, 2:4] - ids[:, 2:4]
    assert torch.equal(moved[:, 1].float(), across["values"][:, 0, 0, 0])
    assert torch.equal(moved[:, 0].float(), down["values"][:, 0, 0, 0])
    assert "time_ids" not in central({"values": column}, (16, 16))


def test_sizes_stay_exact_in_half_precision():
    seen = []

    def network(sample, timesteps, *, added_cond_kwargs, **_):
        seen.append(added_cond_kwargs["time_ids"])
        return (sample,)

    called = FAMILY.as_called(network, {}, torch.bfloat16, 2)
    texts = {"prompt_embeds": torch.zeros(1, 2, 3), "pooled_prompt_embeds": torch.zeros(1, 3)}
    sizes = torch.tensor([[1023, 4097, 0, 513, 1016, 1016]])
    called(torch.zeros(1, 4, 8, 8), torch.tensor([3]), **texts, time_ids=sizes)
    called(torch.zeros(1, 4, 511, 8), torch.tensor([3]), **texts)
    assert torch.equal(seen[0], sizes.float()) and seen[1].tolist() == [[1022, 16, 0, 0, 1022, 16]]


@pytest.fixture
def photos(tmp_path):
    """Images of several sizes, the fourth of them damaged; one lies on its side and is stood up by its metadata."""
    folder, lines = Path("photos"), []
    folder.mkdir()
    for number, (width, height) in enumerate(SIZES):
        pixels = np.random.default_rng(number).integers(0, 255, (height, width, 3), dtype=np.uint8)
        image, exif = PIL.Image.fromarray(pixels), PIL.Image.Exif()
        if number == 5:
            image, exif[0x0112] = image.transpose(PIL.Image.Transpose.ROTATE_90), 6
        image.save(folder / f"{number}.png", exif=exif)
        lines.append(json.dumps({"file_name": f"{number}.png", "text": "a cat"}))
    (folder / "3.png").write_bytes(b"no image")
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def fine_tune(train, photos, tmp_path, monkeypatch):
    """Trains LoRA on a tiny Stable Diffusion XL; `run.batches` and `run.seen` have batches and sizes in calls."""
    pytest.importorskip("peft")
    save_stable_diffusion_xl("base", tmp_path / "scratch")

    def run(*flags):
        run.batches, run.seen, forward = [], [], UNet2DConditionModel.forward

        def noting(self, sample, *args, added_cond_kwargs, **kwargs):
            if not torch.compiler.is_compiling():
                run.seen.append(added_cond_kwargs["time_ids"].tolist())
            return forward(self, sample, *args, added_cond_kwargs=added_cond_kwargs, **kwargs)

        def kept(*args, **kwargs):
            for batch in batches_of(*args, **kwargs):
                run.batches.append(batch)
                yield batch

        with monkeypatch.context() as patch:
            patch.setattr(UNet2DConditionModel, "forward", noting)
            patch.setattr(train.script, "batches_of", kept)
            given = f"--train_data_dir {photos} --resolution 16 --caption_column text --skip_bad_images"
            loss = "--lora_rank 2 --regularizer total_variation --reg_weight 0.1 --train_batch_size 2"
            quick = "--cache_dir cache --num_threads 1 --learning_rate 1e-2 --eval_batch_size 1"
            model = ("--pretrained_model_name_or_path", "base")
            return train(*given.split(), *loss.split(), *quick.split(), *flags, model=model)

    return run


def recorded_sizes(out):
    return json.loads((out / "reg_config.json").read_text())["data"]["original_sizes"]


READABLE = [of_script(*size, 16) for number, size in enumerate(SIZES) if number != 3]


@pytest.mark.training
@pytest.mark.slow
def test_the_network_is_given_the_sizes_of_each_image_and_a_resumed_run_is_the_same(fine_tune, capsys):
    flags = "--max_train_steps 6 --checkpointing_steps 3 --random_flip --condition_dropout 0.5 --compare".split()
    out = fine_tune(*flags)
    for batch in fine_tune.batches:
        sizes = batch.given["time_ids"].tolist()
        assert sizes == [READABLE[row] for row in batch.ids.tolist()] and sizes in fine_tune.seen
    assert len({tuple(size) for batch in fine_tune.batches for size in batch.given["time_ids"].tolist()}) == 5
    assert [DEFAULT] in fine_tune.seen  # previews and the comparison
    said = "takes the size of each image before it is resized (12 x 30 to 64 x 16 pixels) and the corner of its crop;"
    assert f"{said} samples count as 16 x 16 and uncropped, the default of the pipeline" in capsys.readouterr().out
    assert recorded_sizes(out) == "12 x 30 to 64 x 16 pixels"
    card = (out / "README.md").read_text()
    assert "given the size of each image before it was resized (12 x 30 to 64 x 16 pixels) and the corner of" in card
    whole = load_file(out / "pytorch_lora_weights.safetensors")
    (out / "pytorch_lora_weights.safetensors").unlink()
    for folder in (out, out / "plain"):
        (folder / "checkpoint-6" / "model.safetensors").unlink()
    fine_tune(*flags, "--resume", "auto")
    assert not differ(load_file(out / "pytorch_lora_weights.safetensors"), whole)


@pytest.mark.training
@pytest.mark.slow
def test_a_compiled_training_is_the_plain_one(fine_tune, compiled):
    """Of a text-to-image model with all its conditions."""
    flags = ("--max_train_steps", 3, "--condition_dropout", 0.5)
    plain = load_file(fine_tune(*flags) / "pytorch_lora_weights.safetensors")
    with compiled() as graphs:
        out = fine_tune(*flags, "--compile", "--overwrite_output_dir")
    assert len(graphs) == 1
    for name, value in load_file(out / "pytorch_lora_weights.safetensors").items():
        torch.testing.assert_close(value, plain[name], rtol=0, atol=1e-4)


@pytest.mark.training
@pytest.mark.slow
def test_a_stream_reads_the_sizes_with_each_image_and_follows_its_windows(fine_tune, capsys):
    out = fine_tune("--streaming", "--random_crop", "--max_train_steps", 8)
    before = time_ids(torch.tensor([size[::-1] for number, size in enumerate(SIZES) if number != 3]), (19, 19))
    corners = set()
    for batch in fine_tune.batches:
        for ids in batch.given["time_ids"].tolist():
            (uncropped,) = (one for one in before.tolist() if one[:2] == ids[:2])
            moved = [now - then for now, then in zip(ids[2:4], uncropped[2:4], strict=True)]
            assert ids[4:] == [16, 16] and all(0 <= place <= 3 for place in moved)
            corners.add(tuple(moved))
    assert len(corners) > 2
    assert "before it is resized (read with each image)" in capsys.readouterr().out
    assert recorded_sizes(out) == "read with each image"
