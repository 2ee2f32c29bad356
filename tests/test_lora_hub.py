"""LoRA weights on the Hub: pushed by a run with a card, and read from there with the base that they record."""

import json

import numpy as np
import PIL.Image
import pytest
from hub_client import Client
from hub_server import HubServer
from huggingface_hub import ModelCard
from safetensors.torch import load
from tiny_pipelines import save_stable_diffusion, write_photos

pytestmark = [pytest.mark.hub, pytest.mark.slow]

QUICK = (
    "--resolution 16 --caption_column text --lora_rank 2 --max_train_steps 2 --num_threads 1 --cache_dir cache".split()
)


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    pytest.importorskip("peft")
    client = Client(hub, tmp_path_factory.mktemp("hub") / "work")
    save_stable_diffusion(client.folder / "base", client.folder / "scratch")
    write_photos(8, folder=client.folder / "photos")
    client.python(
        """
        from huggingface_hub import HfApi
        HfApi().create_repo("tester/base")
        HfApi().upload_folder(repo_id="tester/base", folder_path="base")
        tell(done=True)
        """
    )
    return client


def test_a_pushed_run_has_a_card_with_its_base_and_is_sampled_by_name(hub, client):
    losses = ("--regularizer", "total_variation", "--reg_weight", 0.1, "--learning_rate", 1e-2)
    names = ("--pretrained_model_name_or_path", "tester/base", "--train_data_dir", "photos", "--output_dir", "out")
    done = client.start_training(*names, *QUICK, *losses, "--hub_model_id", "tester/lora", "--hub_license", "mit")
    done = done.finish(seconds=400)
    assert done.stdout.splitlines()[-1] == f"uploaded    {hub.endpoint}/tester/lora"
    files = hub.files["tester/lora"]
    assert {"pytorch_lora_weights.safetensors", "README.md", "reg_config.json", "comparison.json"} <= files.keys()
    assert not any(name.startswith(("unet/", "vae/", "checkpoint-", "text_encoder/")) for name in files)
    assert all("lora" in name for name in load(files["pytorch_lora_weights.safetensors"]))
    card = ModelCard(files["README.md"].decode())
    assert card.data.base_model == "tester/base" and card.data.license == "mit"
    assert card.data.to_dict()["widget"][0] == {"text": "a cat"}
    assert 'load_lora_weights("tester/lora")' in card.text and "## Results" in card.text
    assert {result.task_type for result in card.data.eval_results} == {"text-to-image"}

    flags = ("--prompts", "a cat", "--num_images", 1, "--num_inference_steps", 2, "--num_threads", 1)
    client.run("reg-diffusers", "sample", "--model", "tester/lora", *flags, "--output", "remote")
    client.run("reg-diffusers", "sample", "--model", "out", *flags, "--output", "local")
    remote, local = (np.asarray(PIL.Image.open(client.folder / name / "000000.png")) for name in ("remote", "local"))
    assert (remote == local).all()


def test_weights_whose_base_is_on_another_machine_are_one_line(hub, client):
    names = ("--pretrained_model_name_or_path", "base", "--train_data_dir", "photos", "--output_dir", "own")
    client.start_training(*names, *QUICK, "--regularizer", "none", "--hub_model_id", "tester/own").finish(seconds=400)
    record = json.loads(hub.files["tester/own"]["reg_config.json"])
    assert record["base_model"] is None
    refused = client.run("reg-diffusers", "sample", "--model", "tester/own", "--prompts", "a", check=False)
    assert refused.returncode == 2
    assert "tester/own names no base on the Hub" in refused.stderr.splitlines()[-1]
