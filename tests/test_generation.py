"""`reg-diffusers sample`: image i is the pipeline's with seed + i, in any batch and after any interruption."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from hub_server import TOKEN, HubServer, client_environment
from hub_storage import Repository

from reg_diffusers import RegDDPMPipeline, Term
from reg_diffusers.cli import main
from reg_diffusers.data.training_data import load_training_data
from reg_diffusers.pipeline import fast_scheduler
from reg_diffusers.regularizers import total_variation
from reg_diffusers.sampling.sampler import Sampler, model_sha256
from reg_diffusers.sampling.schedulers import fitting_samplers
from reg_diffusers.sampling.settings import SampleSettings
from reg_diffusers.settings.arguments import parse_args

pytestmark = pytest.mark.sampling

STEPS = 3
QUICK = ("--model", "model", "--num_inference_steps", STEPS, "--num_threads", 1)


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny networks are not faster on more, and far slower where others use the same cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def model(tiny_unet, tmp_path):
    """Saves a pipeline with random weights in the folder "model", and returns it as it was saved."""

    def save(scheduler=None, normalization=None, by_image=False, **config):
        scheduler = scheduler or DDPMScheduler(prediction_type="v_prediction")
        unet = tiny_unet(**config)
        if by_image:
            unet = UNet2DModel.from_config(unet.config, in_channels=2)
        pipeline = RegDDPMPipeline(unet.eval(), scheduler, normalization)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.save_pretrained(tmp_path / "model")
        return pipeline

    return save


@pytest.fixture
def sample(tmp_path, monkeypatch, capsys):
    """Runs the command in this process, in an empty folder; returns what it printed, or how it was refused."""
    monkeypatch.chdir(tmp_path)

    def run(*flags, refused=False):
        for state in (AcceleratorState, PartialState, GradientState):
            state._reset_state()
        with pytest.raises(SystemExit, match=r"^2$") if refused else contextlib.nullcontext():
            main(["sample", *map(str, (*QUICK, *flags))])
        printed = capsys.readouterr()
        return printed.err.splitlines()[-1] if refused else printed.out

    return run


@pytest.fixture
def process(tmp_path):
    """Starts the command in processes of its own, in the same folder."""

    def start(*flags, launcher=(), env=None):
        command = [sys.executable, *launcher, "-m", "reg_diffusers", "sample", *map(str, (*QUICK, *flags))]
        return subprocess.Popen(
            command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    return start


def by_hand(pipeline, seed, output_type="pil", steps=STEPS, **kwargs):
    """One sample, as anybody would draw it."""
    drawing = RegDDPMPipeline(pipeline.unet, fast_scheduler(pipeline.scheduler), pipeline.config.normalization)
    drawing.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    return drawing(1, generator, steps, output_type, **kwargs).images[0]


def read(folder="samples"):
    """The pictures of a folder by name, (H, W) or (H, W, C)."""
    return {path.name: np.asarray(PIL.Image.open(path)) for path in sorted(Path(folder).glob("*.png"))}


def same_pictures(one, other):
    return one.keys() == other.keys() and all((one[name] == other[name]).all() for name in one)


def assert_same_up_to_rounding(one, other):
    """What another batch size leaves: where a value lies on the border of two grey levels, either may be taken."""
    assert one.keys() == other.keys()
    difference = np.abs(np.stack([*one.values()]).astype(int) - np.stack([*other.values()]).astype(int))
    assert difference.max() <= 1 and difference.mean() <= 1e-3


def settings_for(pipeline, scheduler="DDIM", **settings):
    return SampleSettings(
        model_sha256=model_sha256(pipeline), scheduler=scheduler, num_inference_steps=STEPS, **settings
    )


# What is drawn


@pytest.mark.parametrize("channels", [1, 3])
def test_image_i_is_the_pipelines_with_seed_plus_i(model, sample, channels):
    pipeline = model(channels=channels)
    told = sample("--num_images", 4, "--batch_size", 1, "--seed", 5)
    expected = {f"{index:06}.png": np.asarray(by_hand(pipeline, 5 + index)) for index in range(4)}
    assert same_pictures(read(), expected)
    assert len({picture.tobytes() for picture in expected.values()}) == 4
    assert told.startswith("samples     4 in samples, ")


@pytest.mark.parametrize("scheduler", ["DDIM", "DDPM", "Euler", "DPM-Solver++", "UniPC"])
def test_a_sample_does_not_depend_on_its_batch(model, scheduler):
    pipeline = model(num_class_embeds=3)
    guidance = {"guidance": ("total_variation",), "regularizer_scale": 2.0, "guidance_method": "lgd"}
    sampler = Sampler(pipeline, settings_for(pipeline, scheduler, seed=7, class_labels=(0, 1, 2), **guidance))
    together = sampler.draw(range(10))
    assert together.shape == (10, 1, 8, 8) and (together[0] - together[3]).abs().max() > 0.1
    alone = torch.cat([sampler.draw([index]) for index in range(10)])
    others = torch.cat([sampler.draw(indices) for indices in ([9, 0, 4], [1, 2, 3], [8, 7, 6], [5])])
    for drawn in (alone, others[torch.tensor([9, 0, 4, 1, 2, 3, 8, 7, 6, 5]).argsort()]):
        torch.testing.assert_close(drawn, together, rtol=0, atol=5e-6)  # 0.001 of a grey level


def test_pictures_do_not_depend_on_the_batch_size(model, sample):
    model()
    for size in (1, 3, 64):
        sample("--num_images", 8, "--batch_size", size, "--output", f"by_{size}", "--scheduler", "DDPM")
    assert_same_up_to_rounding(read("by_1"), read("by_3"))
    assert_same_up_to_rounding(read("by_1"), read("by_64"))


@pytest.mark.slow
def test_pictures_do_not_depend_on_the_number_of_processes(model, sample, process):
    model(num_class_embeds=3)
    sample("--num_images", 7, "--output", "one")
    launcher = ("-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes", "2")
    two = process(
        *("--num_images", 7, "--output", "two", "--batch_size", 2),
        launcher=launcher,
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
    )
    out, err = two.communicate()
    assert out.count("samples     7 in two") == 1 and "sampling (process 1 of 2)" in err, out + err
    assert_same_up_to_rounding(read("one"), read("two"))


def test_classes_are_taken_in_turn(model, sample):
    pipeline = model(num_class_embeds=3)
    sample("--num_images", 5, "--batch_size", 1)
    given = sample("--num_images", 4, "--batch_size", 1, "--class_labels", 2, 0, "--output", "given.npz")
    for index, picture in enumerate(read().values()):
        assert (picture == np.asarray(by_hand(pipeline, index, class_labels=index % 3))).all()
    stored = np.load("given.npz")
    assert stored["arr_1"].tolist() == [2, 0, 2, 0] and "4 in given.npz" in given
    for index, label in enumerate(stored["arr_1"]):
        expected = by_hand(pipeline, index, class_labels=int(label))
        assert (stored["arr_0"][index, :, :, 0] == np.asarray(expected)).all()


def test_conditions_are_taken_in_turn(model, sample, tmp_path):
    pipeline = model(by_image=True)
    (tmp_path / "conditions").mkdir()
    pictures = [np.full((8, 8), value, np.uint8) for value in (0, 255)]
    for name, pixels in zip(("a.png", "b.png"), pictures, strict=True):
        PIL.Image.fromarray(pixels).resize((24, 16)).save(tmp_path / "conditions" / name)
    (tmp_path / "conditions" / "notes.txt").write_text("no image")
    sample("--num_images", 5, "--batch_size", 3, "--condition_dir", "conditions")
    for index, picture in enumerate(read().values()):
        condition = torch.full((1, 1, 8, 8), -1.0 if index % 2 == 0 else 1.0)
        expected = np.asarray(by_hand(pipeline, index, condition=condition))
        assert_same_up_to_rounding({"": picture}, {"": expected})
        assert (picture != np.asarray(by_hand(pipeline, index, condition=-condition))).mean() > 0.5

    PIL.Image.fromarray(pictures[1]).save(tmp_path / "conditions" / "a.png")
    refusal = sample("--num_images", 3, "--condition_dir", "conditions", refused=True)
    assert "drawn with condition_sha256 " in refusal
    (tmp_path / "conditions" / "a.png").write_bytes(b"\x89PNG")
    assert "conditions/a.png cannot be decoded" in sample("--condition_dir", "conditions", refused=True)
    assert "name a folder by --condition_dir" in sample(refused=True)
    assert "--condition_dir nowhere: no such folder" in sample("--condition_dir", "nowhere", refused=True)


@pytest.mark.parametrize("method, scale", [("mpgd", 0.05), ("dps", 2.0)])
def test_guidance_steers(model, sample, method, scale):
    pipeline = model()
    common = ("--num_images", 3, "--batch_size", 1, "--num_inference_steps", 20)
    guided = (*common, "--guidance", "total_variation", "--guidance_method", method)
    sample(*guided, "--output", "default")
    sample(*guided, "--regularizer_scale", 4 * scale, "--output", "strong")
    sample(*common, "--output", "plain")
    steered = {"guidance": [Term(total_variation, 1.0)], "guidance_method": method, "regularizer_scale": scale}
    for index, picture in enumerate(read("default").values()):
        assert (picture == np.asarray(by_hand(pipeline, index, steps=20, **steered))).all()

    def variation(folder):
        pixels = torch.from_numpy(np.stack([*read(folder).values()])).float() / 127.5 - 1
        return total_variation(pixels[:, None]).mean()

    assert variation("strong") < variation("default") < variation("plain")


def test_bfloat16_is_close_and_leaves_the_network_as_it_was(model):
    pipeline = model()
    for scheduler in fitting_samplers(pipeline):
        full = Sampler(pipeline, settings_for(pipeline, scheduler)).draw([0, 1])
        short = Sampler(pipeline, settings_for(pipeline, scheduler, mixed_precision="bf16")).draw([0, 1])
        assert 0 < (full - short).abs().max() < 0.05
        assert (short != short.bfloat16()).any()  # only the network is that coarse
        assert torch.equal(Sampler(pipeline, settings_for(pipeline, scheduler)).draw([0, 1]), full)
    assert "forward" not in vars(pipeline.unet) and pipeline.unet.dtype == torch.float32


def test_flow_matching_is_sampled_by_euler(model, sample):
    pipeline = model(FlowMatchEulerDiscreteScheduler())
    sample("--num_images", 2, "--batch_size", 1)
    assert json.loads(Path("samples/sample_settings.json").read_text())["scheduler"] == "Euler"
    assert (read()["000001.png"] == np.asarray(by_hand(pipeline, 1))).all()


# Where it goes


def test_an_array_file_holds_the_same_pictures_and_grows(model, sample, tmp_path):
    model(channels=3)
    sample("--num_images", 7, "--batch_size", 1)
    for number in (4, 7, 2):
        sample("--num_images", number, "--batch_size", 1, "--output", "out/a.npz")
        stored = np.load("out/a.npz")
        assert stored.files == ["arr_0"] and stored["arr_0"].dtype == np.uint8
        expected = [*read().values()][: max(number, len(stored["arr_0"]))]
        assert len(stored["arr_0"]) == (4 if number == 4 else 7) and (stored["arr_0"] == np.stack(expected)).all()
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.npz", "a.npz.json"]


def test_parts_of_an_array_file_are_gone_on_from(model, sample, tmp_path):
    model()
    sample("--num_images", 4, "--batch_size", 1, "--output", "whole.npz")
    pictures = np.load("whole.npz")["arr_0"]
    sample("--num_images", 1, "--batch_size", 1, "--output", "a.npz")
    parts = tmp_path / "a.npz.parts"
    parts.mkdir()
    marked = np.zeros_like(pictures[2])  # would be drawn again if it did not count
    np.save(parts / "000002.npy", marked)
    (parts / ".000003.1234567.npy").write_bytes(b"half")
    (parts / ".2026.npy").write_bytes(b"mine")
    sample("--num_images", 4, "--batch_size", 1, "--output", "a.npz")
    stored = np.load("a.npz")["arr_0"]
    assert (stored[2] == marked).all() and (stored[[0, 1, 3]] == pictures[[0, 1, 3]]).all()
    assert [path.name for path in parts.iterdir()] == [".2026.npy"]


def test_fields_go_into_an_array_that_can_be_trained_on(model, sample):
    normalization = {"offset": [280.0, 0.0], "scale": [20.0, 5.0]}
    pipeline = model(normalization=normalization, channels=2)
    assert "--output samples: samples of this model are not images" in sample(refused=True)
    assert not Path("samples").exists()
    sample("--num_images", 5, "--batch_size", 1, "--output", "fields.npz")
    data = load_training_data(parse_args(["--train_data_dir", "fields.npz"]).data)
    values = data.__getitems__([0, 4])["values"]
    assert data.shape == (2, 8, 8) and len(data) == 5
    for index, field in zip((0, 4), values, strict=True):
        assert torch.equal(field, by_hand(pipeline, index, "pt"))


# Going on


def test_what_is_there_is_not_drawn_again(model, sample):
    model()
    sample("--num_images", 6, "--batch_size", 1)
    pictures = read()
    before = {path.name: path.stat().st_mtime_ns for path in Path("samples").iterdir()}
    for name in ("000001.png", "000004.png"):
        Path("samples", name).unlink()
    Path("samples", ".000004.1234567.png").write_bytes(b"half a picture")
    Path("samples", ".2026.png").write_bytes(b"mine")
    told = sample("--num_images", 6, "--batch_size", 64)
    assert "continuing: 4 of 6 are in samples" in told
    after = {path.name: path.stat().st_mtime_ns for path in Path("samples").iterdir()}
    drawn = {name for name in after if name.endswith(".png") and before.get(name) != after[name]} - {".2026.png"}
    assert drawn == {"000001.png", "000004.png"} and after.keys() - before.keys() == {".2026.png"}
    Path("samples", ".2026.png").unlink()
    assert_same_up_to_rounding(read(), pictures)

    assert "all complete already" in sample("--num_images", 3) and len(read()) == 6
    sample("--num_images", 8)
    assert sorted(read()) == [f"{index:06}.png" for index in range(8)]


@pytest.mark.slow
def test_killed_and_interrupted_it_goes_on(model, sample, process):
    model()
    number = 600  # enough that a signal meets the command on a busy machine, too
    flags = ("--num_images", number, "--batch_size", 2)
    sample("--num_images", number, "--batch_size", 2, "--output", "undisturbed")

    def present():
        return len(list(Path("samples").glob("[0-9]*.png")))

    def disturb(signal_number):
        running, already = process(*flags), present()
        while running.poll() is None and present() < already + 4:
            time.sleep(0.005)
        running.send_signal(signal_number)
        return running.communicate(), running.returncode

    _, status = disturb(signal.SIGKILL)
    assert status == -signal.SIGKILL and 4 <= present() < number
    whole = {path.name: path.stat().st_mtime_ns for path in Path("samples").glob("[0-9]*.png")}
    (out, err), status = disturb(signal.SIGINT)
    told = f"interrupted: {present()} of {number} are in samples; run the same command again to continue"
    assert status == 130 and out.splitlines()[-1] == told and "Traceback" not in err
    assert len(whole) < present() < number
    sample(*flags)
    assert {name: Path("samples", name).stat().st_mtime_ns for name in whole} == whole
    assert_same_up_to_rounding(read(), read("undisturbed"))
    assert not list(Path("samples").glob(".*"))


def test_samples_of_other_settings_are_left_alone(model, sample, tmp_path):
    pipeline = model()
    sample("--num_images", 2)
    before = {path: path.read_bytes() for path in Path("samples").iterdir()}
    refusal = sample("--num_images", 3, "--seed", 1, "--scheduler", "DDPM", refused=True)
    assert "--output samples holds samples drawn with scheduler DDIM instead of DDPM, seed 0 inst" in refusal
    with torch.no_grad():
        pipeline.unet.conv_out.bias.add_(1e-3)
    pipeline.save_pretrained(tmp_path / "model")
    assert "drawn with model_sha256 " in sample("--num_images", 3, refused=True)
    assert {path: path.read_bytes() for path in Path("samples").iterdir()} == before
    (tmp_path / "model").rename(tmp_path / "elsewhere")
    model()
    (tmp_path / "model").rename(tmp_path / "same")
    sample("--num_images", 3, "--model", "same")  # another name of the same model
    for path in Path("samples").glob("*.png"):
        path.unlink()
    sample("--num_images", 1, "--seed", 1, "--model", "same")


def test_samples_of_version_0_3_are_gone_on_from(model, sample):
    model()
    sample("--num_images", 1)
    path = Path("samples/sample_settings.json")
    stored = json.loads(path.read_text())
    stored["guidance_scale"] = stored.pop("regularizer_scale")
    for later in ("output_type", "class_labels"):
        del stored[later]
    path.write_text(json.dumps(stored))
    assert "continuing: 1 of 2" in sample("--num_images", 2)


def test_other_files_are_left_alone(model, sample, tmp_path):
    model()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "000000.png").write_bytes(b"mine")
    (tmp_path / "mine.npz").write_bytes(b"mine")
    (tmp_path / "file").write_bytes(b"mine")
    (tmp_path / "folder.npz").mkdir()
    for output, reason in {
        "mine": "exists and holds no known samples",
        "mine.npz": "exists and holds no known samples",
        "file": "is a file",
        "folder.npz": "is a folder",
    }.items():
        assert f"--output {output} {reason}: name" in sample("--output", output, refused=True)
    assert {path.read_bytes() for path in (tmp_path / "mine").iterdir()} == {b"mine"}
    assert (tmp_path / "mine.npz").read_bytes() == b"mine" and not list((tmp_path / "folder.npz").iterdir())


# What cannot work


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--scheduler", "Heun"), "--scheduler Heun: this model can be sampled with DDIM, DDPM, Euler"),
        (("--model", "no/such/folder"), "--model no/such/folder: no such folder, and not a Hub id"),
        (("--class_labels", 1), "--class_labels are given, but the model has no classes"),
        (("--condition_dir", "."), "--condition_dir: the model is not conditioned on images"),
        (("--guidance", "smoothness"), "--guidance: unknown regularizer 'smoothness'; known: "),
        (("--guidance", "labelled:wish"), "--guidance labelled:wish needs class_labels, which samples of this model"),
        (
            ("--guidance", "labelled:scalar", "--num_inference_steps", 20),
            "--guidance: regularizer 'labelled:scalar' must return one value per",
        ),
        (("--regularizer_scale", 1), "--regularizer_scale has no effect without --guidance"),
        (
            ("--guidance", "symmetry", "--regularizer_scale", -1),
            "--regularizer_scale -1: must be finite and at least 0",
        ),
        (
            ("--guidance", "symmetry", "--guidance_scale", 2),
            "--guidance_scale is that of classifier-free guidance, which needs a model with class labels or texts",
        ),
        (("--num_images", 0), "argument --num_images: '0' is not a whole number above 0"),
        (
            ("--push_to_hub", "me/it", "--output", "a.npz"),
            "--push_to_hub uploads image files: name a folder",
        ),
    ],
)
def test_what_cannot_work_is_said_in_one_line(model, sample, tmp_path, monkeypatch, flags, message):
    model()
    (tmp_path / "labelled.py").write_text(
        "def wish(x0_hat, /, *, class_labels): ...\n\nwish.needs = ('class_labels',)\n\n"
        "def scalar(x0_hat, /):\n    return x0_hat.mean()\n"
    )
    monkeypatch.delitem(sys.modules, "labelled", raising=False)
    assert message in sample(*flags, refused=True)
    assert not list(tmp_path.glob("samples/*.png")) and not list(tmp_path.glob("*.npz"))


def test_labels_have_to_be_classes_of_the_model(model, sample):
    model(num_class_embeds=3)
    refusal = sample("--class_labels", 0, 3, refused=True)
    assert "--class_labels must be from 0 to 2, the last class of the model" in refusal


def test_help_is_fast():
    code = "import sys\ntry:\n    __import__('reg_diffusers.cli').cli.main(['sample', '--help'])\nexcept SystemExit:\n"
    code += "    print([name for name in ('torch', 'diffusers', 'numpy', 'accelerate') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "--num_images" in done.stdout and done.stdout.splitlines()[-1] == "[]"


# The Hub


LOAD = """
import datasets, json, numpy
table = datasets.load_dataset("tester/drawn", split="train")
pixels = [numpy.asarray(image).flatten().tolist() for image in table["image"]]
print(json.dumps({"seed": table["seed"][:], "label": table["label"][:], "pixels": pixels}))
"""


@pytest.mark.slow
def test_the_pictures_are_pushed_as_a_data_set(model, sample, process, tmp_path):
    model(num_class_embeds=3)
    push = ("--num_images", 4, "--seed", 10, "--push_to_hub", "drawn", "--hub_token", TOKEN, "--hub_private_repo")
    with HubServer() as hub:
        environment = client_environment(hub, tmp_path / "hf", token=None)
        hub.fails = True
        failed = process(*push, env=environment)
        _, err = failed.communicate()
        assert failed.returncode == 2 and err.splitlines()[-1].startswith("reg-diffusers: error: --push_to_hub tester")
        assert "the images are in samples: run the same command again to upload them" in err and len(read()) == 4
        hub.fails = False
        pushed = process(*push, env=environment)
        out, err = pushed.communicate()
        assert pushed.returncode == 0, err
        assert "all complete already" in out and out.endswith(f"uploaded    {hub.endpoint}/datasets/tester/drawn\n")
        assert hub.private == {"datasets/tester/drawn": True}
        code = [sys.executable, "-c", LOAD]
        environment["HF_TOKEN"] = TOKEN
        loaded = subprocess.run(code, env=environment, capture_output=True, text=True, check=True, cwd=tmp_path)
    told = json.loads(loaded.stdout.splitlines()[-1])
    assert told["seed"] == [10, 11, 12, 13] and told["label"] == [0, 1, 2, 0]
    assert told["pixels"] == [picture.flatten().tolist() for picture in read().values()]
    card = hub.files["datasets/tester/drawn"]["README.md"].decode()
    assert "| scheduler | DDIM, 3 steps |" in card and "| seeds | 10 to 13 |" in card and "dataset_info" in card
    assert "reg-diffusers sample --model model --num_images 4 --num_inference_steps 3 --seed 10" in card
    assert TOKEN not in card + out + err


@pytest.mark.slow
def test_the_hub_is_asked_before_anything_is_drawn(model, process, tmp_path):
    model()
    with HubServer() as hub:
        environment = client_environment(hub, tmp_path / "hf", token="hf_wrong")
        wrong = process("--push_to_hub", "drawn", env=environment)
        hub.repositories["datasets/tester/other"] = others = Repository("datasets/tester/other")
        others.commit("main", "Numbers", {"numbers.csv": b"1,2"})
        environment = client_environment(hub, tmp_path / "hf")
        other = process("--push_to_hub", "tester/other", env=environment)
        assert "the Hub does not accept the token (401)" in wrong.communicate()[1].splitlines()[-1]
        assert "--push_to_hub tester/other: holds another data set" in other.communicate()[1].splitlines()[-1]
    assert wrong.returncode == other.returncode == 2 and not (tmp_path / "samples").exists()
