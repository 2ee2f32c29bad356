"""`reg-diffusers evaluate` through the real command: what it measures, writes, goes on with and refuses."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from in_processes import in_processes
from runs import evaluation_result

from reg_diffusers import RegDDPMPipeline, Term, noise_level
from reg_diffusers.cli import main
from reg_diffusers.cli.bench import Bench
from reg_diffusers.cli.judging import check_regularizers, recorded_regularizers, regularizers_of
from reg_diffusers.evaluation import distances
from reg_diffusers.evaluation.distances import frechet, jackknife, kernel, mean_of, nearest
from reg_diffusers.evaluation.features import Features, FeaturesError, named_features, pixels, train_classifier
from reg_diffusers.evaluation.images import Images
from reg_diffusers.evaluation.judgement import Row, compare_rows, copies_of, judge_samples
from reg_diffusers.evaluation.measuring import SLICED, losses_of_predictions
from reg_diffusers.regularizers import classifier, total_variation
from reg_diffusers.regularizers.network_input import NetworkInput
from reg_diffusers.runtime.errors import UsageError
from reg_diffusers.sampling.store import ArrayFile

pytestmark = pytest.mark.training

N = 20
FLAGS = ("--data", "data", "--num_inference_steps", 2, "--num_threads", 1, "--num_images", N)
PIXELS = (*FLAGS, "--features", "pixels", "--regularizer", "total_variation")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def folder(tiny_unet, image_folder, tmp_path, monkeypatch):
    """A folder with data (60 pictures of two classes) and two models, which is the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    image_folder(60, size=(8, 8), name="data")
    for seed, name in enumerate(("A", "B")):
        save_model(tiny_unet(channels=3, seed=seed), name)
    return tmp_path


def save_model(unet, name, terms=("total_variation",), **pipeline):
    RegDDPMPipeline(
        unet.eval(), DDPMScheduler(prediction_type="v_prediction", clip_sample=False), **pipeline
    ).save_pretrained(name)
    record = {"objective": {"terms": [{"regularizer": term} for term in terms]}}
    Path(name, "reg_config.json").write_text(json.dumps(record))


def test_what_is_measured_is_what_it_says(folder, evaluate):
    told = evaluate("--model", "A", "--model", "B", *FLAGS, "--features", "pixels")  # the loss from reg_config.json
    rows = evaluation_result()["rows"]
    assert list(rows) == ["data", "A", "B"]
    for name in ("A", "B"):
        samples = torch.from_numpy(np.load(f"evaluation/samples/{name}.npz")["arr_0"])
        assert samples.shape == (N, 3, 8, 8)
        expected = mean_of(total_variation(samples))
        found = rows[name]["terms"]["total_variation"]
        assert found["value"] == pytest.approx(expected.value)
        assert found["standard_error"] == pytest.approx(expected.standard_error)
        assert found["interval"][1] - found["value"] == pytest.approx(1.96 * expected.standard_error)
        low, high = rows[name]["distances"][SLICED]["interval"]
        assert low < rows[name]["distances"][SLICED]["value"] < high
    assert (samples.abs() > 1).any()  # L' is of what the model says, not of what a picture can hold
    assert rows["data"]["distances"][SLICED]["value"] < rows["A"]["distances"][SLICED]["value"]
    assert rows["data"]["near_copies"]["value"] < 0.5
    assert "total_variation" in told and "A: total_variation " in told and "B against A: " in told
    assert sorted(path.name for path in Path("evaluation").iterdir()) == [
        *("evaluation.json", "evaluation.png", "evaluation.svg", "evaluation.txt", "evaluation_settings.json"),
        *("index.html", "samples"),
    ]
    assert Path("evaluation/evaluation.txt").read_text().strip() in told


def test_samples_in_bfloat16_are_the_same_to_its_precision_and_another_evaluation(folder, evaluate):
    """8 bits: each value of two steps is off by about 2^-8 of the largest ones."""
    evaluate("--model", "A", *PIXELS)
    assert "mixed_precision" in evaluate("--model", "A", *PIXELS, "--mixed_precision", "bf16", refused=True)
    evaluate("--model", "A", *PIXELS, "--mixed_precision", "bf16", "--output", "fast")
    plain, fast = (np.load(f"{output}/samples/A.npz")["arr_0"] for output in ("evaluation", "fast"))
    assert 0 < np.abs(plain - fast).max() < 2**-6 * np.abs(plain).max()


def test_the_time_is_said_before_the_first_sample_and_is_about_right(folder, evaluate, monkeypatch):
    """A clock that advances by one second per call of a network; a measured step is one."""
    from reg_diffusers.sampling import sampler

    calls, forward = [], UNet2DModel.forward

    def counted(self, *args, **kwargs):
        calls.append(len(args[0]))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(UNet2DModel, "forward", counted)
    monkeypatch.setattr(sampler.time, "perf_counter", lambda: len(calls))
    flags = ("--model", "A", "--model", "B", *PIXELS, "--batch_size", 10, "--num_inference_steps", 30)
    lines = evaluate(*flags).splitlines()
    place = next(number for number, line in enumerate(lines) if line.startswith("time "))
    assert (
        lines[place] == "time        about 2 min to draw 20 + 20 images; then they are measured"
    )  # 2 x 2 batches x 30
    assert lines[place + 1].startswith("sampling    A: 20 images")
    assert "to draw" not in evaluate(*flags, "--reuse")


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.images, self.links, self.open = [], [], []
        self.cells = []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "img":
            self.images.append(attributes)
        self.links += [value for name, value in attributes.items() if name in ("src", "href", "srcset", "action")]
        if tag in ("script", "iframe", "object", "link"):
            self.links.append(tag)
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.cells.append(data)


def test_the_page_needs_nothing_but_itself(folder, evaluate):
    (folder / "a<b>").mkdir()
    shutil.copytree("A", folder / "a<b>" / "x & y")
    evaluate("--model", "a<b>/x & y", "B", *PIXELS)
    text = Path("evaluation/index.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert not page.open
    assert page.links and all(link.startswith("data:image/png;base64,") for link in page.links)
    assert "url(" not in text and "@import" not in text and "<b>" not in text.replace("a&lt;b&gt;", "")
    assert all(image["alt"] for image in page.images)
    assert len(page.images) == 1 + 3 + 2 * 2 * 2 * 6  # figure, grids, pairs
    assert {"data", "x & y", "total_variation", SLICED} <= set(page.cells)
    assert 'name="viewport"' in text


def test_the_same_command_goes_on_and_another_is_refused(folder, evaluate):
    flags = ("--model", "A", *PIXELS)
    first = evaluate(*flags)
    samples, rows = Path("evaluation/samples/A.npz"), evaluation_result()["rows"]
    before = samples.stat().st_mtime_ns
    assert evaluate(*flags).splitlines()[-8:] == first.splitlines()[-8:]
    assert samples.stat().st_mtime_ns == before and evaluation_result()["rows"] == rows

    refusal = evaluate(*flags, "--regularizer", "symmetry", refused=True)
    assert (
        "--output evaluation holds another evaluation (it differs in regularizers)" in refusal and "--reuse" in refusal
    )
    assert evaluation_result()["rows"] == rows
    evaluate(*flags, "--regularizer", "symmetry", "--reuse")
    assert list(evaluation_result()["rows"]["A"]["terms"]) == ["symmetry"] and samples.stat().st_mtime_ns == before
    refusal = evaluate(*flags, "--seed", 1, "--reuse", refused=True)
    assert "A.npz holds samples drawn with seed 0 instead of 1" in refusal


@pytest.mark.slow
def test_what_was_drawn_before_a_kill_is_not_drawn_again(folder, evaluate):
    command = [sys.executable, "-m", "reg_diffusers", "evaluate", "--model", "A", *map(str, PIXELS)]
    command += ["--num_inference_steps", "60", "--batch_size", "2"]
    parts = Path("evaluation/samples/A.npz.parts")
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while running.poll() is None and len(list(parts.glob("[0-9]*.npy"))) < 4:
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.communicate()
    drawn = {int(path.stem): np.load(path) for path in parts.glob("[0-9]*.npy")}
    assert 4 <= len(drawn) < N and not Path("evaluation/evaluation.json").exists()
    marked = np.zeros_like(next(iter(drawn.values())))
    np.save(parts / "000000.npy", marked)
    evaluate("--model", "A", *PIXELS, "--num_inference_steps", 60, "--batch_size", 2)
    samples = np.load("evaluation/samples/A.npz")["arr_0"]
    assert (samples[0] == marked).all()
    assert all((samples[index] == sample).all() for index, sample in drawn.items() if index)
    assert not parts.exists()


def _in_folder(folder, flags):
    os.chdir(folder)
    os.environ["HF_HUB_OFFLINE"] = "1"
    main(["evaluate", *map(str, flags)])


@pytest.mark.slow
def test_two_processes_share_the_samples_and_judge_once(folder, evaluate):
    flags = ("--model", "A", *PIXELS)
    in_processes(_in_folder, folder, (*flags, "--output", "two"))
    evaluate(*flags, "--output", "one")
    one, two = (np.load(f"{name}/samples/A.npz")["arr_0"] for name in ("one", "two"))
    np.testing.assert_allclose(one, two, atol=1e-4)
    for name, found in evaluation_result("one")["rows"]["A"]["distances"].items():
        assert evaluation_result("two")["rows"]["A"]["distances"][name]["value"] == pytest.approx(
            found["value"], rel=1e-3
        )


# Features


@pytest.fixture
def network(folder):
    """A DINOv2 of random weights, saved as transformers does."""
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained("network")
    BitImageProcessorPil(
        size={"shortest_edge": 32},
        crop_size={"height": 28, "width": 28},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    ).save_pretrained("network")
    return "network"


def test_a_named_network_gives_its_distances(folder, evaluate, network):
    evaluate("--model", "A", *FLAGS, "--features", network)
    row = evaluation_result()["rows"]["A"]
    expected = ["FD-DINOv2", "KD-DINOv2", "precision", "recall", "density", "coverage", SLICED]
    assert list(row["distances"]) == expected
    assert evaluation_result()["settings"]["features"] == "network, 28 x 28"


def test_a_network_that_brings_code_is_refused_without_asking(network, monkeypatch):
    """On a terminal transformers asks whether to run the code of such a folder: an answer must not be possible."""
    config = json.loads(Path(network, "config.json").read_text())
    config |= {"model_type": "stranger", "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}}
    Path(network, "config.json").write_text(json.dumps(config))
    Path(network, "code.py").write_text("import pathlib\npathlib.Path('was_run').touch()\n")
    asked = []
    monkeypatch.setattr("builtins.input", lambda *question: asked.append(question) or "y")
    with pytest.raises(FeaturesError):
        named_features(network)
    assert not asked and not Path("was_run").exists()


@pytest.mark.parametrize("size", [(64, 64), (64, 45)])
def test_images_are_brought_to_a_network_as_its_processor_does(network, size):
    from transformers import AutoImageProcessor, Dinov2Model

    picture = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8))
    picture = picture.resize((20, 20)).resize(size, PIL.Image.Resampling.BICUBIC)
    batch = AutoImageProcessor.from_pretrained(network)(picture, return_tensors="pt")
    expected = Dinov2Model.from_pretrained(network)(**batch).last_hidden_state[:, 0]
    image = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    found = named_features(network).extract(image)
    of_a_loss = NetworkInput.of(AutoImageProcessor.from_pretrained(network)).shown((image + 1) / 2)
    assert torch.equal(named_features(network).extract.shown(image), of_a_loss.clamp(0, 1))
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()
    upside_down = named_features(network).extract(image.flip(2))
    assert (found - expected).norm() < 0.2 * (found - upside_down).norm()


def test_without_the_network_the_classifier_is_taken_and_said(folder, evaluate, monkeypatch):
    monkeypatch.setattr(classifier, "_STEPS", 20)
    told = evaluate("--model", "A", *FLAGS)
    assert "features    a classifier of these data instead of facebook/dinov2-small: facebook/dinov2-small: " in told
    row = evaluation_result()["rows"]["A"]
    assert next(iter(row["distances"])) == "classifier FD" and "FID" not in "".join(row["distances"])
    assert "held-out images recognised" in evaluation_result()["settings"]["features"]


def test_without_labels_it_is_pixels(folder, evaluate):
    (folder / "flat").mkdir()
    for index, path in enumerate(sorted((folder / "data").rglob("*.png"))):
        shutil.copy(path, folder / "flat" / f"{index}.png")
    flags = ("--model", "A", *FLAGS, "--data", "flat")
    told = evaluate(*flags)
    assert "features    pixels instead of a network's features" in told and "there are no labels" in told
    assert list(evaluation_result()["rows"]["A"]["distances"]) == [SLICED]
    assert "--features classifier needs labels" in evaluate(*flags, "--features", "classifier", refused=True)
    assert "--features nowhere: " in evaluate(*flags, "--features", "nowhere", refused=True)


def test_the_classifier_recognises_what_it_was_trained_on(monkeypatch):
    monkeypatch.setattr(classifier, "_STEPS", 80)
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (300,), generator=generator)
    images = 0.3 * torch.randn(300, 1, 8, 8, generator=generator) + (labels.float() - 1)[:, None, None, None]
    found = train_classifier(images, labels, 3)
    assert "100.0% of 30 held-out images" in found.description
    vectors = found.extract(images)
    assert torch.equal(vectors, train_classifier(images, labels, 3).extract(images))  # the same seed
    one, other, different = vectors[labels == 0][:40], vectors[labels == 0][40:80], vectors[labels == 2][:40]
    assert frechet(one, other) < 0.1 * frechet(one, different)
    with pytest.raises(FeaturesError, match="needs at least 2 classes and 20 images"):
        train_classifier(images[:10], labels[:10], 3)


# What is said


def test_copies_of_the_data_are_found(folder, evaluate):
    evaluate("--model", "A", *PIXELS)
    path = Path("evaluation/samples/A.npz")
    picture = np.asarray(PIL.Image.open(next(Path("data").rglob("*.png")))).transpose(2, 0, 1) / 127.5 - 1
    samples = np.load(path)["arr_0"]
    samples = np.random.default_rng(1).uniform(-3, 3, samples.shape).astype(np.float32)  # far from all data
    samples[:5] = picture
    np.savez(path, arr_0=samples)
    evaluate("--model", "A", *PIXELS)
    assert evaluation_result()["rows"]["A"]["near_copies"]["value"] == 5 / N
    assert "distance 0 *" in Path("evaluation/index.html").read_text(encoding="utf-8").replace("\u00a0", " ")


def test_differences_within_the_uncertainty_are_not_called_any():
    generator = torch.Generator().manual_seed(0)
    reference, like, other = torch.randn(3, 100, 1, 4, 4, generator=generator)

    def row(samples):
        return judge_samples(samples, reference, {"mean": lambda x: x.flatten(1).mean(1)}, features=pixels())

    rows = {"data": row(like), "A": row(other), "B": row(other + 0.01), "C": row(other - 3)}
    said = "\n".join(compare_rows(rows))
    assert (
        "A: mean is like the data's" in said
        and "C: mean is below the data's" in said
        and "Lower than the data is not better" in said
    )
    assert "B against A: mean shows no difference (+0.01 ± " in said
    assert "C against A: mean lower by 3 ± " in said and f"{SLICED} higher by " in said
    own, distance = (rows[name].distances[SLICED].value for name in ("data", "C"))
    assert f", at {SLICED} {distance:.3g} (data {own:.3g})." in said  # never one number without the other
    assert isinstance(rows["A"], Row) and rows["A"].near_copies is None


def test_pairs_of_many_images_are_sampled_and_their_intervals_cover_both_sets(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    samples, reference = torch.randn(2, 400, 1, 2, 2, generator=generator)
    features = Features(lambda images: images.flatten(1), "numbers", "FD", "KD")

    def row(number):
        vectors = samples[:number].flatten(1), reference[:number].flatten(1)
        return judge_samples(samples[:number], reference[:number], {}, features=features, vectors=vectors).distances

    whole, part = row(400), row(40)
    monkeypatch.setattr(distances, "PAIRED", 40)
    sampled = row(400)
    assert sampled["FD"] == whole["FD"] and sampled[SLICED] == whole[SLICED]
    for name in ("KD", "precision", "recall", "density", "coverage"):
        assert sampled[name].value == part[name].value != whole[name].value
    both = jackknife(kernel, samples[:40].flatten(1), reference[:40].flatten(1))
    assert sampled["KD"] == both and both.half_width != part["KD"].half_width


def test_images_are_measured_a_few_at_a_time():
    images, largest = torch.randn(700, 1, 4, 4, generator=torch.Generator().manual_seed(0)), []

    def read(places):
        largest.append(len(places))
        return images[places.start : places.stop]

    lazy = Images(700, read)
    regularizers = {"mean": lambda x0_hat: x0_hat.flatten(1).mean(1)}
    whole, blockwise = (judge_samples(one, images.flip(0), regularizers) for one in (images, lazy))
    assert max(largest) < 700 and blockwise.images == 700
    assert blockwise.terms["mean"].value == pytest.approx(images.mean().item(), abs=1e-6)
    assert blockwise == whole


def test_samples_are_mapped_however_they_were_written(tmp_path):
    samples = np.random.default_rng(0).standard_normal((5, 1, 3, 3)).astype(np.float32)
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", arr_0=samples)
        assert np.array_equal(ArrayFile(tmp_path / "a.npz", is_field=True).mapped(), samples)
    store = ArrayFile(tmp_path / "b.npz", is_field=True)
    store.prepare()
    for index, sample in enumerate(samples):
        store.write(index, torch.from_numpy(sample))
    store.finish(5)
    mapped = store.mapped()
    assert isinstance(mapped, np.memmap) and np.array_equal(mapped, samples)


def test_copies_are_found_among_data_that_are_there_twice():
    data = torch.arange(10.0)[:, None].repeat(2, 1)
    copies = copies_of(*nearest(torch.tensor([[3.0], [3.5], [20.0]]), [data]), torch.zeros(20))
    assert copies.limit == 0 and copies.near.tolist() == [True, False, False]
    assert copies.share.value == pytest.approx(1 / 3)


def test_samples_that_are_not_finite_are_counted_and_said(folder, evaluate, network):
    flags = ("--model", "A", "B", *FLAGS, "--features", network)
    evaluate(*flags)
    path = Path("evaluation/samples/B.npz")
    samples = np.load(path)["arr_0"]
    samples[2:5, 0, 0, 0] = np.nan
    np.savez(path, arr_0=samples)
    told = evaluate(*flags)
    assert f"B: 3 of {N} images are non-finite, so mean L' and distances are nan." in told.splitlines()
    assert "B: total_variation cannot be compared with the data's (nan, data " in told
    assert "B against A: total_variation cannot be compared (nan and " in told
    row = evaluation_result()["rows"]["B"]
    assert row["not_finite"] == 3 and evaluation_result()["rows"]["A"]["not_finite"] == 0
    assert all(distance["value"] is None for distance in row["distances"].values()) and len(row["distances"]) == 7


def test_recorded_losses_are_built_in_ones_that_read_nothing(tmp_path):
    Path(tmp_path, "A").mkdir()
    (tmp_path / "A" / "reg_config.json").write_text(
        json.dumps(
            {
                "objective": {
                    "terms": [
                        {"regularizer": spec}
                        for spec in (
                            "spectrum(kind='amplitude')",
                            "RadialSpectrum('/etc/hostname')",
                            "physics.divergence(spacing=0.5)",
                            "physics.poisson",
                            "physics.poisson(source=1.0)",
                            "my_losses:own",
                            "mean_intensity(targt=1)",
                        )
                    ]
                }
            }
        )
    )
    found = recorded_regularizers([str(tmp_path / "A")])
    physics = ["physics.divergence(spacing=0.5)", "physics.poisson", "physics.poisson(source=1.0)"]
    assert found == ["spectrum(kind='amplitude')", *physics, "mean_intensity(targt=1)"]
    with pytest.raises(UsageError, match="no argument 'targt'"):
        regularizers_of(found)


def test_regularizers_that_are_networks_are_frozen_and_on_the_device():
    class Critic(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Conv2d(1, 1, 3))

        def forward(self, x0_hat):
            assert x0_hat.device.type == "meta"
            return self.layers(x0_hat).flatten(1).mean(1)

    critic, models = Critic(), {"A": RegDDPMPipeline(None, DDPMScheduler())}
    bench = Bench(SimpleNamespace(is_picture=True), "", [], 2, torch.zeros(2, 1, 8, 8), None)
    check_regularizers({"my_losses:critic": critic}, bench, models, "meta", None)
    assert not critic.training and not critic.layers[0].training
    (weight, bias) = critic.parameters()
    assert not weight.requires_grad and weight.device.type == bias.device.type == "meta"


# What cannot work


def test_what_cannot_work_is_one_line(folder, evaluate, tiny_unet, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # "nowhere" is looked for there

    def refusal(*flags):
        line = evaluate(*flags, refused=True)
        assert not Path("evaluation").exists()
        return line

    assert "HF_HUB_OFFLINE is set, so that the Hub is not asked" in refusal("--model", "nowhere", *PIXELS)
    assert "--model A is given more than once" in refusal("--model", "A", "A", *PIXELS)
    assert "60 images are too few: two halves need 80; use --num_images 30" in refusal(
        "--model", "A", *PIXELS, "--num_images", 40
    )
    assert "--num_images 5: confidence intervals need at least 20" in refusal(
        "--model", "A", *PIXELS, "--num_images", 5
    )
    save_model(tiny_unet(channels=1), "grey")
    assert "--model grey has images 1 x 8 x 8, but A has 3 x 8 x 8" in refusal("--model", "A", "grey", *PIXELS)
    np.save("fields.npy", np.random.default_rng(0).normal(size=(60, 1, 4, 4)).astype(np.float32))
    assert "images are 1 x 4 x 4, but --model grey draws 1 x 8 x 8" in refusal(
        "--model", "grey", *PIXELS, "--data", "fields.npy"
    )
    assert "the data have 1 channels, but --model A has 3" in refusal("--model", "A", *PIXELS, "--data", "fields.npy")
    assert "error: --data nowhere/: cannot be read" in refusal("--model", "A", *PIXELS, "--data", "nowhere/")
    Path("my_loss.py").write_text(
        "def of_noise(x, /, *, noise):\n    return (x - noise).flatten(1).mean(1)\n"
        'of_noise.needs = ("noise",)\n'
        "def one(x, /):\n    return x.mean()\n"
    )
    flags = ("--model", "A", *FLAGS, "--features", "pixels", "--regularizer")
    assert "--regularizer my_loss:of_noise needs noise, which neither" in refusal(*flags, "my_loss:of_noise")
    assert "regularizer 'my_loss:one' must return one value per image" in refusal(*flags, "my_loss:one")
    assert "--regularizer: unknown regularizer 'no'" in refusal(*flags, "no")
    error = refusal(*flags, "symmetry(dim=9)")
    assert "--regularizer symmetry(dim=9): dim must be a dimension of each image" in error and "Trace" not in error
    assert "--scheduler Foo: this model can be sampled with" in refusal("--model", "A", *PIXELS, "--scheduler", "Foo")
    assert "--fid: the Frechet inception distance needs torch-fidelity" in refusal("--model", "A", *PIXELS, "--fid")
    save_model(tiny_unet(channels=3), "plain", terms=())
    assert "name no" in refusal("--model", "plain", *FLAGS).replace("names", "name")
    save_model(tiny_unet(channels=3), "foreign", terms=("os:abort",))  # what a file names is not run
    assert "name the loss to measure" in refusal("--model", "foreign", *FLAGS)
    Path("evaluation").write_text("")
    assert "is a file: name a folder" in evaluate("--model", "A", *PIXELS, refused=True)
    assert "holds no evaluation: name another" in evaluate("--model", "A", *PIXELS, "--output", "data", refused=True)


def test_losses_of_predictions_are_those_of_the_images_for_a_perfect_network_with_what_belongs_to_each():
    scheduler, number = DDPMScheduler(), 40
    images, mask = torch.full((number, 1, 4, 4), 0.5), torch.zeros(number, 1, 4, 4)
    for row in range(number):
        mask[row].flatten()[: row % 16] = 1

    def share(x0_hat, /, *, mask, original_samples):
        assert x0_hat.requires_grad
        return (mask * x0_hat + x0_hat - original_samples).flatten(1).mean(1)

    share.needs = ("mask", "original_samples")
    seen = []

    def perfect(sample, timesteps, return_dict=True):
        level = noise_level(scheduler, timesteps)
        alpha, sigma = (value.reshape(-1, 1, 1, 1) for value in (level.alpha, level.sigma))
        seen.append((timesteps, sample))
        return ((sample - 0.5 * alpha) / sigma,)

    found = losses_of_predictions(Term(share, 7.0), perfect, scheduler, images, 3, {"mask": mask})
    torch.testing.assert_close(found.float(), 0.5 * mask.flatten(1).mean(1), atol=1e-4, rtol=0)
    timesteps = torch.cat([times for times, _ in seen])
    snr = noise_level(scheduler, timesteps).snr
    assert len(timesteps) == 4 * number and snr.min() >= 1 and len(timesteps.unique()) > 0.9 * len(timesteps)
    assert snr.min() < 1.1 and snr.max() > 100
    before = list(seen)
    seen.clear()
    losses_of_predictions(Term(share, 1.0), perfect, scheduler, images, 3, {"mask": mask})
    assert all(
        torch.equal(one, other) for pair in zip(before, seen, strict=True) for one, other in zip(*pair, strict=True)
    )


def test_a_class_conditional_model_is_asked_for_the_classes_of_the_data(folder, evaluate, tiny_unet):
    save_model(tiny_unet(channels=3, num_class_embeds=2), "classes")
    Path("my_conditional_loss.py").write_text(
        "def of_class(x, /, *, class_labels):\n    return class_labels.float() + 0 * x.flatten(1).mean(1)\n"
        'of_class.needs = ("class_labels",)\n'
    )
    evaluate("--model", "classes", *FLAGS, "--features", "pixels", "--regularizer", "my_conditional_loss:of_class")
    rows = evaluation_result()["rows"]
    settings = json.loads(Path("evaluation/samples/classes.npz.json").read_text())
    labels = settings["class_labels"]
    assert len(labels) == N and set(labels) == {0, 1}
    assert rows["classes"]["terms"]["my_conditional_loss:of_class"]["value"] == pytest.approx(sum(labels) / N)
    save_model(tiny_unet(channels=3, num_class_embeds=1), "one")
    refusal = evaluate("--model", "one", *PIXELS, "--output", "e", refused=True)
    assert "--model one has 1 classes, but the data have 2" in refusal
    (folder / "flat").mkdir()
    for path in (folder / "data").rglob("*.png"):
        shutil.copy(path, folder / "flat" / f"{path.parent.name}{path.name}")
    refusal = evaluate("--model", "one", *PIXELS, "--data", "flat", "--output", "e", refused=True)
    assert "error: --model one is class-conditional: " in refusal and "is in no class folder" in refusal


def test_fields_are_compared_in_their_own_units_unless_the_models_are_wanted(folder, evaluate, tiny_unet):
    fields = np.random.default_rng(0).normal(280, 20, size=(60, 1, 8, 8)).astype(np.float32)
    np.save("fields.npy", fields)
    save_model(tiny_unet(), "fields", normalization={"offset": [280.0], "scale": [40.0]})
    told = evaluate("--model", "fields", *FLAGS, "--data", "fields.npy")
    assert "pixels instead of a network's features" in told and "fields" in told
    spread = evaluation_result()["rows"]["data"]["terms"]["total_variation"]["value"]
    assert spread == pytest.approx(2 * 2 / np.sqrt(np.pi) * 20, rel=0.1)  # a difference of two normals, twice
    assert json.loads(Path("evaluation/evaluation.json").read_text())["settings"]["reg_units"] == "user"
    other = ("--model", "fields", *FLAGS, "--data", "fields.npy", "--reg_units", "model")
    assert "holds another evaluation (it differs in reg_units)" in evaluate(*other, refused=True)
    evaluate(*other, "--reuse")
    assert evaluation_result()["rows"]["data"]["terms"]["total_variation"]["value"] == pytest.approx(
        spread / 40, rel=1e-5
    )


def test_fields_are_measured_in_the_units_that_the_models_losses_saw(folder, evaluate, tiny_unet):
    np.save("fields.npy", np.random.default_rng(0).normal(280, 20, size=(60, 1, 8, 8)).astype(np.float32))
    for name, units in {"seen": "model", "own": "user", "silent": None}.items():
        save_model(tiny_unet(), name, normalization={"offset": [280.0], "scale": [40.0]})
        record = json.loads(Path(name, "reg_config.json").read_text())
        record["objective"] |= {"units": units} if units else {}
        Path(name, "reg_config.json").write_text(json.dumps(record))
    flags = (*FLAGS, "--data", "fields.npy", "--features", "pixels")

    def measured(*flags):
        said = evaluate(*flags, "--output", "e", "--reuse")
        return said, evaluation_result("e")["rows"]["data"]["terms"]["total_variation"]["value"]

    said, spread = measured("--model", "own", *flags)
    assert "units       L' sees the fields' own units: --reg_units user, as in the training of own" in said
    said, same = measured("--model", "silent", *flags)
    assert "the fields' own units: --reg_units user, the default" in said and same == spread
    said, seen = measured("--model", "silent", "seen", *flags)
    assert "sees the network's units, about -1 to 1: --reg_units model, as in the training of seen" in said
    assert seen == pytest.approx(spread / 40, rel=1e-5)
    assert "--reg_units model" in evaluation_result("e")["command"]
    said, asked = measured("--model", "seen", *flags, "--reg_units", "user")
    assert "--reg_units user, from the command line" in said and asked == spread
    refusal = evaluate("--model", "seen", "own", *flags, "--output", "other", refused=True)
    assert "was trained in different units (--model seen with --reg_units model, --model own with" in refusal


# Which data, which samples, which words


def test_without_data_those_of_the_training_are_taken_or_it_is_refused(folder, evaluate):
    """The embedded pictures have nothing to do with a model of photographs."""
    flags = [flag for flag in PIXELS if flag not in ("--data", "data")]
    assert "--model A does not record its training data: name them, --data" in evaluate(
        "--model", "A", *flags, refused=True
    )
    for name in ("A", "B"):
        Path(name, "reg_settings.yaml").write_text("dataset_name: null\ntrain_data_dir: data\nimage_column: null\n")
    told = evaluate("--model", "A", "B", *flags)
    assert "data        60 images of 3 x 8 x 8 from data, the training data of A" in told
    assert evaluation_result()["settings"]["data"] == "data"
    Path("B", "reg_settings.yaml").write_text("dataset_name: null\ntrain_data_dir: elsewhere\n")
    assert "--model B and A were trained on different data" in evaluate("--model", "A", "B", *flags, refused=True)
    assert "trained on elsewhere, which does not exist here" in evaluate("--model", "B", *flags, refused=True)


def test_names_that_look_alike_do_not_share_their_samples(folder, evaluate):
    for source, name in (("A", "run a"), ("B", "run_a"), ("A", "ÄÄ"), ("B", "ÖÖ")):
        shutil.copytree(source, name)
    evaluate("--model", "run a", "run_a", "ÄÄ", "ÖÖ", *PIXELS)
    rows = evaluation_result()["rows"]
    means = {name: rows[name]["terms"]["total_variation"]["value"] for name in rows}
    assert means["run a"] == means["ÄÄ"] != means["run_a"] == means["ÖÖ"]
    assert len(list(Path("evaluation", "samples").glob("*.npz"))) == 4


def test_the_command_of_an_evaluation_repeats_its_precision(folder, evaluate):
    evaluate("--model", "A", *PIXELS, "--mixed_precision", "bf16")
    assert "--mixed_precision bf16" in evaluation_result()["command"]


def test_precision_without_recall_is_flagged():
    one = mean_of(torch.tensor([1.0, 1.0, 1.0]))
    zero = mean_of(torch.zeros(3))
    half = mean_of(torch.tensor([0.5, 0.5, 0.5]))

    def row(precision, recall):
        return Row(3, {"a": one}, {"FD": one, "precision": precision, "recall": recall})

    said = compare_rows({"data": row(one, one), "noise": row(one, zero), "fair": row(half, half)})
    assert "noise: precision 1 means nothing at recall 0: pure noise" in said[0]
    assert not any(line.startswith(("data: precision", "fair: precision")) for line in said)


def test_a_signed_loss_has_no_percentage():
    from reg_diffusers.evaluation.distances import Estimate
    from reg_diffusers.evaluation.judgement import change

    def at(value):
        return Estimate(value, 0.001, 0.002)

    assert change("contrast", at(-0.26), at(-0.20)) == "contrast lower by 0.06 ± 0.0028"
    assert change("variation", at(0.26), at(0.20)) == "variation higher by 0.06 ± 0.0028, +30.0%"
