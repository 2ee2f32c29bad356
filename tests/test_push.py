"""pipeline.push_to_hub and from_pretrained by the name of a repository, with the package and without it."""

import hashlib
import json

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from hub_client import Client, asked, contents
from hub_server import HubServer
from hub_storage import Repository
from huggingface_hub import ModelCard

from reg_diffusers import RegDDPMPipeline

pytestmark = pytest.mark.hub

RECORD = {
    "command": "accelerate launch train_reg.py",
    "seed": 0,
    "processes": 1,
    "device": "cpu",
    "mixed_precision": "no",
    "base_model": None,
    "data": {"name": "photos", "hub_id": None, "images": 8, "shape": [1, 8, 8], "classes": None},
    "objective": {"prediction_type": "epsilon", "snr_gamma": None, "terms": []},
    "versions": {"torch": "2"},
    "commit": None,
}
MEASURED = {"images": 4, "terms": {}, "standard_errors": {}, "distance": 0.25, "denoising_loss": None}
COMPARISON = {"rows": {"data": MEASURED, "samples": MEASURED}, "seed": 0, "num_inference_steps": 2}
CANARY = '\nopen("ran", "w").close()\n'


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    return Client(hub, tmp_path_factory.mktemp("hub") / "work")


@pytest.fixture(scope="module")
def unet():
    config = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "norm_num_groups": 4}
    config |= {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    torch.manual_seed(0)
    return UNet2DModel(block_out_channels=(8, 16), **config).eval()


@pytest.fixture(scope="module")
def pushed(hub, client, unet):
    """What a process told that pushed the pipeline of a run, and others, again and again."""
    folder = client.folder / "saved"
    RegDDPMPipeline(unet, DDPMScheduler()).save_pretrained(folder)
    (folder / "samples").mkdir()
    for name, content in {
        "reg_config.json": json.dumps(RECORD),
        "comparison.json": json.dumps(COMPARISON),
        "samples/step-000001.png": "picture",
        "README.md": "---\nlicense: mit\ntags: [mine]\n---\nMy own words.\n",
    }.items():
        (folder / name).write_text(content)
    hub.repositories["other/theirs"] = Repository("other/theirs")
    return client.python(
        """
        import shutil
        from pathlib import Path
        from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
        from huggingface_hub import HfApi, snapshot_download
        from reg_diffusers import RegDDPMPipeline

        def draw(pipeline):
            pipeline.set_progress_bar_config(disable=True)
            generator = torch.Generator().manual_seed(0)
            return pipeline(1, generator, num_inference_steps=3, output_type="np").images.tolist()

        def replace(repo, name, content):
            HfApi().upload_file(path_or_fileobj=content.encode(), path_in_repo=name, repo_id=repo)

        pipeline = RegDDPMPipeline.from_pretrained("saved")
        facts = dict(url=str(pipeline.push_to_hub("model", private=True)))  # a name of the token's user
        loaded = [kind.from_pretrained("tester/model") for kind in (RegDDPMPipeline, DDPMPipeline, DiffusionPipeline)]
        facts["images"] = [draw(one) for one in (pipeline, *loaded)]

        card = Path(snapshot_download("tester/model"), "README.md").read_text()
        replace("tester/model", "README.md", card.replace("license: mit", "license: other") + "Late words.\\n")
        again = RegDDPMPipeline.from_pretrained("tester/model")  # nothing of the run is on this disk
        again.scheduler = DDIMScheduler.from_config(again.scheduler.config)
        again.push_to_hub("tester/model", create_pr=True, commit_message="Proposed")
        again.save_pretrained("again", push_to_hub=True, repo_id="tester/model", commit_message="Sample by DDIM")
        again.push_to_hub("tester/copy")
        again.push_to_hub("tester/model", subfolder="inside", commit_message="Inside")
        for parameter in again.unet.parameters():
            parameter.data += 0.1
        again.push_to_hub("tester/model", commit_message="Trained on")
        facts["public"] = error_of(again.push_to_hub, "tester/copy", private=True)
        facts["theirs"] = error_of(again.push_to_hub, "other/theirs")

        replace("tester/copy", "pipeline.py", sys.argv[1])
        copy = RegDDPMPipeline.from_pretrained("tester/copy")
        copy.push_to_hub("tester/clean")
        facts |= dict(ran=Path("ran").exists(), module=type(copy).__module__)

        Path("secret").write_text("secret")
        facts["linked"] = {}
        for place in ("samples/x.png", "samples/deep", "README.md", "reg_config.json", "unet/more"):
            shutil.copytree("saved", "linked", dirs_exist_ok=True)
            Path("linked", place).unlink(missing_ok=True)
            Path("linked", place).symlink_to(Path("saved" if place.endswith("deep") else "secret").absolute())
            linked = RegDDPMPipeline.from_pretrained("linked")
            facts["linked"][place] = error_of(linked.push_to_hub, "tester/linked")
            shutil.rmtree("linked")

        os.chdir("saved")
        RegDDPMPipeline(UNet2DModel.from_pretrained("unet"), DDPMScheduler()).push_to_hub("made_here")
        tell(**facts)
        """,
        CANARY,
    )


def commits(hub):
    return {commit.title: commit.files for commit in hub.repositories["tester/model"].commits.values()}


@pytest.mark.slow
def test_a_pushed_pipeline_is_loaded_by_its_name_by_every_class(hub, pushed):
    assert pushed["images"][1:] == pushed["images"][:1] * 3
    assert pushed["url"].startswith(f"{hub.endpoint}/tester/model/commit/")
    assert hub.private == {"tester/model": True, **{name: False for name in hub.private if name != "tester/model"}}


def test_the_evidence_comes_along_as_long_as_the_weights_are_those_it_is_of(hub, pushed):
    evidence = {"reg_config.json", "comparison.json", "samples/step-000001.png"}
    made = commits(hub)
    assert list(made)[1:] == [
        *("Upload RegDDPMPipeline", "Upload README.md with huggingface_hub", "Proposed"),
        *("Sample by DDIM", "Inside", "Trained on"),
    ]
    assert hub.repositories["tester/model"].at("refs/pr/1").title == "Proposed"
    assert evidence <= set(made["Upload RegDDPMPipeline"]) and evidence <= set(made["Sample by DDIM"])
    assert evidence <= set(hub.files["tester/copy"]) and evidence <= set(hub.files["tester/clean"])
    assert not evidence & set(made["Trained on"]) and not evidence & set(hub.files["tester/made_here"])
    assert "inside/model_index.json" in made["Inside"] and "inside/README.md" not in made["Inside"]


def test_pushing_again_keeps_what_the_owner_wrote_and_repeats_nothing(hub, pushed):
    titles = ("Upload RegDDPMPipeline", "Sample by DDIM", "Trained on")
    cards = [ModelCard(commits(hub)[title]["README.md"].decode()) for title in titles]
    for card in cards:
        assert card.data.tags == ["diffusers", "unconditional-image-generation", "reg_diffusers", "mine"]
        assert card.text.count("My own words.") == card.text.count("\n# model\n") == 1
        assert card.text.count('RegDDPMPipeline.from_pretrained("tester/model")') == 1
    assert [card.data.license for card in cards] == ["mit", "other", "other"]
    assert [card.text.count("Late words.") for card in cards] == [0, 1, 1]
    assert ["Results" in card.text for card in cards] == [True, True, False]
    assert [bool(card.data.eval_results) for card in cards] == [True, True, False]
    assert 'from_pretrained("tester/copy")' in hub.files["tester/copy"]["README.md"].decode()
    assert "photos" not in hub.files["tester/made_here"]["README.md"].decode()


def test_nothing_is_pushed_where_it_must_not_be(hub, pushed):
    assert "tester/copy already exists and is public: make it private" in pushed["public"]
    assert pushed["theirs"].startswith("HfHubHTTPError") and "403" in pushed["theirs"]
    assert asked(hub, "POST", "/other/theirs/") == 0 and not hub.files["other/theirs"]


def test_a_model_folder_with_a_link_out_of_it_is_not_pushed(hub, pushed):
    for place, said in pushed["linked"].items():
        assert f"linked/{place} is a link out of linked, which is not uploaded" in said
    assert "tester/linked" not in hub.repositories


def test_the_package_runs_nothing_of_a_repository(hub, pushed):
    assert not pushed["ran"] and pushed["module"] == "reg_diffusers.pipeline"
    assert hub.files["tester/copy"]["pipeline.py"].decode() == CANARY
    assert CANARY not in hub.files["tester/clean"]["pipeline.py"].decode()


@pytest.mark.slow
def test_who_lacks_the_package_loads_the_class_guides_it_and_pushes_it_again(hub, client, unet):
    """pipeline.py of the repository runs where trust_remote_code is given, and nowhere else."""
    pipeline = RegDDPMPipeline(unet, DDIMScheduler(), {"offset": [2.0], "scale": [3.0]})
    pipeline.save_pretrained(client.folder / "fields")
    files = contents(client.folder / "fields")
    files["pipeline.py"] += CANARY.encode()
    hub.objects |= {hashlib.sha256(content).hexdigest(): content for content in files.values()}
    hub.repositories["tester/fields"] = Repository("tester/fields", private=True)
    hub.repositories["tester/fields"].commit("main", "Fields", files)
    told = client.python(
        """
        from pathlib import Path
        from diffusers import DDPMPipeline, DiffusionPipeline

        def load(repo, **options):
            pipeline = DiffusionPipeline.from_pretrained(repo, custom_pipeline=repo, **options)
            pipeline.set_progress_bar_config(disable=True)
            return pipeline

        def bright(x0_hat):
            return (x0_hat - 0.5).square().flatten(1).mean(1)

        def draw(pipeline, **options):
            generator = torch.Generator().manual_seed(0)
            return pipeline(2, generator, 6, output_type="pt", regularizers=[bright], **options)

        repo = "tester/fields"
        facts = dict(kinds=[type(kind.from_pretrained(repo)).__name__ for kind in (DDPMPipeline, DiffusionPipeline)])
        facts |= dict(untrusted=error_of(load, repo), ran=[Path("ran").exists()])
        pipeline = load(repo, trust_remote_code=True)
        facts["kinds"].append(type(pipeline).__name__)
        facts["ran"].append(Path("ran").exists())
        plain, guided = draw(pipeline), draw(pipeline, guidance=[bright], regularizer_scale=0.5)
        facts |= dict(images=plain.images.tolist(), scores=[one.scores["bright"].tolist() for one in (plain, guided)])
        pipeline.push_to_hub("tester/again")
        facts["again"] = draw(load("tester/again", trust_remote_code=True)).images.tolist()
        tell(**facts)
        """,
        package=False,
    )
    assert told["kinds"] == ["DDPMPipeline", "DDPMPipeline", "RegDDPMPipeline"]
    assert "trust_remote_code" in told["untrusted"] and told["ran"] == [False, True]
    expected = RegDDPMPipeline.from_pretrained(client.folder / "fields")
    expected.set_progress_bar_config(disable=True)
    images = expected(2, torch.Generator().manual_seed(0), 6, output_type="pt").images
    torch.testing.assert_close(torch.tensor(told["images"]), images, atol=1e-4, rtol=0)  # in the fields' own units
    plain, guided = told["scores"]
    assert all(better < 0.9 * worse for better, worse in zip(guided, plain, strict=True))
    assert told["again"] == told["images"]
    assert hub.files["tester/again"]["pipeline.py"] == files["pipeline.py"]
