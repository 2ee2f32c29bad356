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


@pytest.fixture(scope="module")
def pushed(client):
    """A run that was pushed as tester/lora."""
    losses = ("--regularizer", "total_variation", "--reg_weight", 0.1, "--learning_rate", 1e-2)
    names = ("--pretrained_model_name_or_path", "tester/base", "--train_data_dir", "photos", "--output_dir", "out")
    done = client.start_training(*names, *QUICK, *losses, "--hub_model_id", "tester/lora", "--hub_license", "mit")
    return done.finish(seconds=400)


def test_a_pushed_run_has_a_card_with_its_base_and_is_sampled_by_name(hub, client, pushed):
    assert pushed.stdout.splitlines()[-1] == f"uploaded    {hub.endpoint}/tester/lora"
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


def test_a_pipeline_with_adapters_is_pushed_and_nothing_is_left_beside_it(hub, client, pushed):
    """By Python: weights that were loaded go on with a card; a repository of the other kind of model is refused."""
    facts = client.python(
        """
        from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DModel
        from reg_diffusers import RegDDPMPipeline, RegTextToImagePipeline
        from reg_diffusers.hub.uploads import Uploads
        from reg_diffusers.settings.arguments import parse_args

        stock = StableDiffusionPipeline.from_pretrained("tester/base")
        plain = RegTextToImagePipeline.of(stock)
        facts = dict(plain=error_of(plain.push_to_hub, "tester/plain"))
        stock.load_lora_weights("tester/lora")
        pipeline = RegTextToImagePipeline.of(stock)
        facts["url"] = str(pipeline.push_to_hub("again"))
        facts["over"] = error_of(pipeline.push_to_hub, "tester/base")
        settings = parse_args([])
        facts["training"] = error_of(Uploads, settings.hub, "tester/base", settings.output, is_adapter=True)
        shape = dict(down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=4)
        unet = UNet2DModel(sample_size=8, block_out_channels=(8,), layers_per_block=1, **shape)
        facts["under"] = error_of(RegDDPMPipeline(unet, DDPMScheduler()).push_to_hub, "tester/lora")
        tell(**facts)
        """
    )
    assert "the network has no LoRA weights, and others are not saved here" in facts["plain"]
    assert "tester/plain" not in hub.repositories
    assert facts["url"].startswith(f"{hub.endpoint}/tester/again/commit/")
    names = ("tester/lora", "tester/again")
    first, again = (load(hub.files[name]["pytorch_lora_weights.safetensors"]) for name in names)
    assert first.keys() == again.keys() and all((first[name] == again[name]).all() for name in first)
    card = ModelCard(hub.files["tester/again"]["README.md"].decode())
    assert card.data.base_model == "tester/base" and 'load_lora_weights("tester/again")' in card.text
    assert (
        "unet/config.json" in hub.files["tester/base"]
        and "pytorch_lora_weights.safetensors" not in hub.files["tester/base"]
    )
    for said in (facts["over"], facts["training"]):
        assert "tester/base holds a whole pipeline, which would stay there beside LoRA weights: name another" in said
        assert "hf repos delete-files tester/base model_index.json 'scheduler/*' 'text_encoder/*'" in said
    assert "hf repos delete-files tester/lora pytorch_lora_weights.safetensors" in facts["under"]


def test_weights_whose_base_is_on_another_machine_are_one_line(hub, client):
    names = ("--pretrained_model_name_or_path", "base", "--train_data_dir", "photos", "--output_dir", "own")
    client.start_training(*names, *QUICK, "--regularizer", "none", "--hub_model_id", "tester/own").finish(seconds=400)
    record = json.loads(hub.files["tester/own"]["reg_config.json"])
    assert record["base_model"] is None
    refused = client.run("reg-diffusers", "sample", "--model", "tester/own", "--prompts", "a", check=False)
    assert refused.returncode == 2
    assert "tester/own names no base on the Hub" in refused.stderr.splitlines()[-1]
