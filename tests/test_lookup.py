"""Names of --model and the like: what is neither a folder nor on the Hub is refused after one request."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
from diffusers import DDPMScheduler
from hub_client import asked, contents
from hub_server import HubServer
from hub_storage import Repository
from runs import metrics, refusal

from reg_diffusers import RegDDPMPipeline
from reg_diffusers.hub.lookup import pipeline_index, saved_file
from reg_diffusers.runtime.errors import UsageError

pytestmark = pytest.mark.hub

BASE = "--pretrained_model_name_or_path"
TRAINING = (BASE, "--vae", "--model_config_name_or_path")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub that this process asks, and that keeps its downloads in the current, empty folder."""
    monkeypatch.chdir(tmp_path)
    with HubServer() as server:
        for name, value in {
            "ENDPOINT": server.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": "downloads",
            "HF_HUB_OFFLINE": False,
        }.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        yield server


@pytest.fixture
def refused(train, capsys, command):
    """Returns how each command refuses a name."""

    def lines(name):
        for flags in (("sample",), ("evaluate", "--data", "photos", "--regularizer", "total_variation")):
            yield command(*flags, "--model", name, refused=True)
        yield command("diagnose", "--regularizer", "total_variation", BASE, name, refused=True)
        for flag in TRAINING:
            yield refusal(train, capsys, flag, name, model=())

    return lines


def put(hub, name, folder):
    files = contents(Path(folder))
    hub.objects |= {hashlib.sha256(content).hexdigest(): content for content in files.values()}
    hub.repositories[name] = Repository(name)
    hub.repositories[name].commit("main", "Model", files)


def test_a_name_that_the_hub_lacks_costs_one_request(hub, refused):
    for number, line in enumerate(refused("tester/none"), 1):
        assert "tester/none nor a model on the Hub of this name exists: give the path" in line
        assert asked(hub, "HEAD", "/tester/none/") == number


@pytest.mark.parametrize("offline", [False, True])
def test_without_the_hub_nothing_waits(hub, refused, monkeypatch, offline):
    """A download would wait between its attempts."""
    hub.stop()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("waits"))
    reason = "HF_HUB_OFFLINE is set" if offline else r"the Hub cannot be reached \(.*refused\)"
    for line in refused("nowhere"):
        assert re.search(rf"nowhere: .*/nowhere does not exist, and {reason}.*: give the path of a local folder", line)


def test_what_was_downloaded_is_found_without_the_hub(hub, tiny_unet, monkeypatch):
    RegDDPMPipeline(tiny_unet(), DDPMScheduler()).save_pretrained("model")
    put(hub, "tester/model", "model")
    files = [("unet/config.json", True), ("config.json", False)]

    def found():
        index = pipeline_index("tester/model", "--model")
        return index, [saved_file("tester/model", file, "--model") is not None for file, _ in files]

    index = json.loads(Path("model", "model_index.json").read_text())
    assert found() == (index, [exists for _, exists in files])
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("waits"))
    hub.stop()
    assert found() == (index, [exists for _, exists in files])
    assert saved_file("tester/model", "another.json", "--model") is None  # diffusers may have downloaded the rest
    with pytest.raises(UsageError, match=r"--model: .* the Hub cannot be reached"):
        saved_file("tester/another", "model_index.json", "--model")


def test_a_busy_hub_is_asked_again(hub, tiny_unet):
    tiny_unet().save_pretrained("unet")
    put(hub, "tester/unet", "unet")
    hub.busy = {"config.json": 2}
    assert saved_file("tester/unet", "config.json", "--model").is_file()


def test_models_of_other_kinds_on_the_hub_are_refused_in_one_line(hub, refused, tiny_unet):
    RegDDPMPipeline(tiny_unet(), DDPMScheduler()).save_pretrained("other")
    index = Path("other", "model_index.json")
    index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": "StableDiffusionInpaintPipeline"}))
    shutil.rmtree("other/unet")
    put(hub, "tester/other", "other")
    sample, evaluate, diagnose, pretrained, vae, config = refused("tester/other")
    for line in (sample, evaluate, diagnose, pretrained):
        assert "tester/other: a StableDiffusionInpaintPipeline is not supported: use a pipeline with a UNet2D" in line
    assert "--vae tester/other: no readable autoencoder" in vae
    assert "--model_config_name_or_path tester/other: holds a pipeline" in config

    Path("text").mkdir()
    Path("text", "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    put(hub, "tester/text", "text")
    sample, evaluate, diagnose, pretrained, vae, config = refused("tester/text")
    for line in (sample, evaluate):
        assert "--model tester/text: holds no pipeline; `reg-diffusers train` saves one" in line
    for line in (diagnose, pretrained, config):
        assert "tester/text: holds BertModel, not UNet2DModel or DiTTransformer2DModel" in line
    assert "--vae tester/text: an autoencoder of class None is not supported" in vae


def test_a_pipeline_of_the_first_versions_is_trained_further(hub, train, tiny_unet, image_folder, recwarn):
    """All files in one folder, as in google/ddpm-cat-256; and nothing is said that concerns programmers only."""
    RegDDPMPipeline(tiny_unet(3), DDPMScheduler(num_train_timesteps=7)).save_pretrained("old")
    for path in [*Path("old", "unet").iterdir(), *Path("old", "scheduler").iterdir()]:
        path.rename(Path("old", path.name))
    put(hub, "tester/old", "old")
    flags = ("--train_data_dir", image_folder(), "--max_train_steps", 1, "--cache_dir", "downloads")
    for number, name in enumerate(("old", "tester/old")):
        out = train(BASE, name, *flags, model=(), output=f"out{number}")
        assert metrics(out)[-1]["step"] == 1
        assert json.loads((out / "scheduler/scheduler_config.json").read_text())["num_train_timesteps"] == 7
    assert not [one for one in recwarn if "local_dir_use_symlinks" in str(one.message)]
