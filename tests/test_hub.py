"""train_reg.py --push_to_hub, by the real client in processes of their own against a server of the tests'."""

import json
import re
import shlex
import shutil
import signal
import sys
import textwrap

import numpy as np
import PIL.Image
import pytest
from hub_client import Client, asked, code_blocks, contents, make_client
from hub_server import TOKEN, HubServer
from hub_storage import Repository
from huggingface_hub import ModelCard, constants
from safetensors.torch import load, load_file

from reg_diffusers.hub.uploads import Uploads, check_upload
from reg_diffusers.settings.arguments import parse_args

pytestmark = pytest.mark.hub

REPO, OUT = "tester/smooth", "my runs/smooth run"
RUN = (
    "--regularizer total_variation my_losses:Dark --reg_weight 0.05 0.1 --reg_weighting matched my_losses:early"
    " --prediction_type v_prediction --max_train_steps 4 --preview_steps 2 --checkpointing_steps 1 --no-use_ema"
    " --checkpoints_total_limit 0"
    f" --train_data_dir photos --compare --hub_model_id {REPO} --hub_private_repo --hub_license mit"
    f" --hub_strategy checkpoint --hub_token {TOKEN} --output_dir"
).split()
LOSSES = """
class Dark:
    def __call__(self, x0_hat, /):
        return (x0_hat + 1).square().flatten(1).mean(1)

def early(level):
    return (level.timesteps < 500).float()
"""
USERS_CARD = """---
license: cc-by-4.0
language: en
tags:
- art
- diffusers
model-index:
- name: mine
  results:
  - task:
      type: unconditional-image-generation
    dataset:
      name: Pictures
      type: tester/pictures
    metrics:
    - type: fid
      value: 12.5
      name: FID
---
# My pictures

Please cite me.
"""


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    client = Client(hub, tmp_path_factory.mktemp("hub") / "work")
    (client.folder / "my_losses.py").write_text(LOSSES)
    generator = np.random.default_rng(0)
    (client.folder / "photos").mkdir()
    for index in range(16):
        pixels = generator.integers(0, 256, (8, 8), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(client.folder / "photos" / f"{index}.png")
    return client


@pytest.fixture(scope="module")
def run(hub, client):
    """A run whose first upload in the background hangs until the training is over, on a line that then breaks."""
    hub.takes_uploads.clear()
    process = client.start_training(*RUN, OUT, token=None)
    process.wait_for(lambda: "waiting for the upload of step 1" in process.stdout)
    run = {"trained_while_hanging": (client.folder / OUT / "checkpoint-4").is_dir()}
    run["commits_while_hanging"] = list(hub.repositories[REPO].commits.values())[1:]
    hub.broken_uploads, hub.busy = 1, {f"{REPO}/commit/": 1}
    hub.takes_uploads.set()
    run["process"] = process.finish()
    run["files"], run["card"] = hub.files[REPO], hub.files[REPO]["README.md"].decode()
    return run


def commit(hub, title, repo=REPO):
    (found,) = [commit.files for commit in hub.repositories[repo].commits.values() if commit.title == title]
    return found


# A run that is uploaded


@pytest.mark.slow
def test_the_training_goes_on_while_an_upload_hangs(hub, run):
    assert run["trained_while_hanging"] and not run["commits_while_hanging"]
    told = "uploads     1 of 1 during the training, 2 skipped while another was running"
    assert told in run["process"].stdout.splitlines()
    assert run["process"].stdout.splitlines()[-1] == f"uploaded    {hub.endpoint}/{REPO}"
    assert hub.broken_uploads == 0 and set(hub.busy.values()) == {0}  # and were overcome


@pytest.mark.slow
def test_what_is_uploaded_at_a_checkpoint_is_what_was_saved_then(hub, client, run):
    first, last = commit(hub, "Upload step 1"), commit(hub, "Upload a training run")
    weights = "unet/diffusion_pytorch_model.safetensors"
    saved = load_file(client.folder / OUT / "checkpoint-1" / "model.safetensors")
    uploaded = load(first[weights])
    assert uploaded.keys() == saved.keys() and all(uploaded[name].equal(saved[name]) for name in saved)
    assert first[weights] != last[weights] and "comparison.json" in last
    assert {"model_index.json", "pipeline.py", "reg_config.json"} <= set(first) and "comparison.json" not in first
    card = first["README.md"].decode()
    assert "## Objective" in card and "## Results" not in card


@pytest.mark.slow
def test_the_finished_run_is_uploaded_with_its_evidence_and_without_its_checkpoints(hub, client, run):
    on_disk = contents(client.folder / OUT)
    assert run["files"] == {path: on_disk[path] for path in run["files"]}
    assert set(run["files"]) == {
        *("README.md", "model_index.json", "pipeline.py", "scheduler/scheduler_config.json", "unet/config.json"),
        *("unet/diffusion_pytorch_model.safetensors", "reg_config.json", "reg_settings.yaml", "metrics.jsonl"),
        *("comparison.json", "comparison.png", "evaluation.png", "samples/step-000002.png", "samples/step-000004.png"),
    }
    assert hub.private[REPO] and not (client.folder / OUT / ".upload").exists()


@pytest.mark.slow
def test_the_token_is_nowhere(client, run):
    seen = run["process"].stdout + run["process"].stderr
    assert TOKEN not in seen and "--hub_token" not in seen
    caches = client.folder.with_name(f"{client.folder.name}-cache")
    for path, content in {**run["files"], **contents(client.folder), **contents(caches)}.items():
        assert TOKEN.encode() not in content, path


@pytest.mark.slow
def test_the_card_says_what_was_optimised(run):
    formula = (
        "L = ||v - model(x_t, t)||^2 + 0.05 * matched(t) * total_variation(x0_hat) + 0.1 * early(t) * Dark(x0_hat)"
    )
    assert formula in code_blocks(run["card"], "text")[0].splitlines()
    assert (
        "\n| `Dark` | `my_losses:Dark` | 0.1 | `my_losses:early` | t = 0 to 499 of 1000 (SNR at least 0.0"
        in run["card"]
    )
    assert "`my_losses` is code of the author that is not in this repository." in run["card"]
    assert "generates 8 x 8 images: a `UNet2DModel`, trained on 16 images of photos." in run["card"]


@pytest.mark.slow
def test_the_card_has_what_was_measured(run):
    rows = json.loads(run["files"]["comparison.json"])["rows"]
    assert list(rows) == ["data", "without", "with total_variation + Dark"]
    for title, row in rows.items():
        (line,) = [line for line in run["card"].splitlines() if line.startswith(f"| {title} |")]
        for name, value in row["terms"].items():
            assert f"| {value:.4f} ± {row['standard_errors'][name]:.4f} |" in line
        assert f"| {row['distance']:.4f} |" in line
    pictures = re.findall(r"!\[[^]]+\]\((.+)\)", run["card"])
    assert pictures == ["comparison.png", "evaluation.png"] and set(pictures) <= set(run["files"])

    data = ModelCard(run["card"]).data
    assert data.license == "mit" and data.library_name == "diffusers"
    assert {"diffusers", "unconditional-image-generation", "reg_diffusers"} <= set(data.tags)
    measured = rows["with total_variation + Dark"]
    assert {result.metric_name: result.metric_value for result in data.eval_results} == pytest.approx(
        {
            "L' total_variation": measured["terms"]["total_variation"],
            "L' Dark": measured["terms"]["Dark"],
            "sliced Wasserstein distance": measured["distance"],
            "denoising loss": measured["denoising_loss"],
        },
        abs=1e-6,
    )


@pytest.mark.slow
def test_the_card_has_the_command_of_the_run(run):
    (command,) = code_blocks(run["card"], "bash")
    words = shlex.split(command)
    assert words[:3] == ["accelerate", "launch", "train_reg.py"]
    given = [word for word in [*RUN, OUT] if word not in ("--hub_token", TOKEN)]
    decided = [flag for flag in ("--mixed_precision", "--attention") if flag not in words[: -len(given)]]
    end = len(words) - 2 * len(decided)
    assert words[end - len(given) : end] == given
    assert words[end::2] == decided  # by this machine, and another might decide otherwise
    assert set(words[end + 1 :: 2]) <= {"no", "bf16", "sdpa", "explicit"}
    assert "`--push_to_hub` uploads to the author's repository" in run["card"]
    assert re.search(r"Seed 0, 1 process on cpu, .*torch \d.*, Python 3", run["card"])


@pytest.mark.slow
@pytest.mark.parametrize("package", [True, False], ids=["with_the_package", "without_it"])
def test_the_code_of_the_card_runs_as_it_is(client, run, package, tmp_path):
    blocks = code_blocks(run["card"])
    assert len(blocks) == 3
    told = client.python(
        """
        for number, block in enumerate(json.loads(sys.argv[1])):
            os.makedirs(f"{sys.argv[2]}/{number}")
            os.chdir(f"{sys.argv[2]}/{number}")
            names = {}
            exec(block, names)
        tell(pipeline=type(names["pipeline"]).__name__, scheduler=type(names["pipeline"].scheduler).__name__)
        """,
        json.dumps(blocks if package else blocks[1:]),
        tmp_path,
        package=package,
    )
    assert told == {"pipeline": "RegDDPMPipeline", "scheduler": "DDIMScheduler"}
    sizes = [PIL.Image.open(path).size for path in tmp_path.glob("*/sample.png")]
    assert sizes == [(8, 8)] * (3 if package else 2)


# A run in this process


@pytest.fixture
def here(hub, tmp_path, monkeypatch):
    make_client(monkeypatch, hub, tmp_path / "cache")


def test_a_run_in_this_process_is_uploaded_with_a_card_and_without_checkpoints_and_token(here, hub, train, capsys):
    """In outline what the tests above show in detail."""
    hub.repositories["tester/here"] = Repository("tester/here", private=True)
    hub.repositories["tester/here"].commit("main", "Mine", {"README.md": USERS_CARD.encode()})
    flags = ("--max_train_steps", 2, "--checkpointing_steps", 1, "--hub_model_id", "tester/here", "--push_to_hub")
    out = train(*flags, "--regularizer", "total_variation", "--hub_token", TOKEN)
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == f"uploaded    {hub.endpoint}/tester/here"
    on_disk, uploaded = contents(out), hub.files["tester/here"]
    assert uploaded == {path: on_disk[path] for path in uploaded}
    assert set(uploaded) == {
        *("README.md", "model_index.json", "pipeline.py", "scheduler/scheduler_config.json", "unet/config.json"),
        *("unet/diffusion_pytorch_model.safetensors", "reg_config.json", "reg_settings.yaml", "metrics.jsonl"),
        *("comparison.json", "comparison.png", "evaluation.png", "samples/step-000002.png"),
    }
    card = uploaded["README.md"].decode()
    assert "# My pictures\n\nPlease cite me.\n" in card and card.index("Please cite me") < card.index("# here")
    assert ModelCard(card).data.license == "cc-by-4.0" and "art" in ModelCard(card).data.tags
    assert "0.1 * matched(t) * total_variation(x0_hat)" in code_blocks(card, "text")[0]
    words = shlex.split(code_blocks(card, "bash")[0])
    assert words[:3] == ["accelerate", "launch", "train_reg.py"] and not {"--hub_token", TOKEN} & set(words)
    assert TOKEN not in printed.out + printed.err
    assert not [path for path, content in on_disk.items() if TOKEN.encode() in content]


# A run from the Hub, whose upload is refused at its end


@pytest.fixture(scope="module")
def refused(hub, client, run):
    """Fine-tunes a private model on a data set, both by their names; the right to write is lost meanwhile."""
    client.python(
        """
        from datasets import load_dataset
        load_dataset("photos", split="train").push_to_hub("tester/pictures", private=True)
        tell()
        """
    )
    hub.repositories["tester/tuned"] = Repository("tester/tuned")
    hub.repositories["tester/tuned"].commit("main", "Mine", {"README.md": USERS_CARD.encode()})
    flags = "--dataset_name tester/pictures --max_train_steps 1 --hub_model_id tester/tuned --output_dir tuned"
    process = client.start_training(*flags.split(), "--pretrained_model_name_or_path", REPO)
    process.wait_for(lambda: "model      UNet2DModel" in process.stdout)
    hub.read_only = True
    finished = process.finish(check=False)
    hub.read_only = False
    return finished


def of_upload(process):
    """The line with the command of a run whose upload failed, by which a script can tell, too."""
    assert process.returncode == 1
    *_, line, last = process.stdout.splitlines()
    assert last == "failed      the upload; the rest is saved: see the lines above"
    return line


@pytest.mark.slow
def test_a_refused_upload_keeps_the_run_and_its_command_uploads_later(hub, client, refused):
    line = of_upload(refused)
    told = "upload      failed (HfHubHTTPError 403: You don't have the rights to write under the namespace tester)"
    assert line.startswith(f"{told}; upload it later with: hf upload tester/tuned tuned ")
    assert (client.folder / "tuned" / "model_index.json").is_file() and set(hub.files["tester/tuned"]) == {"README.md"}

    client.run("bash", "-c", line.split("with: ")[1])
    on_disk = contents(client.folder / "tuned")
    for path, content in hub.files["tester/tuned"].items():
        assert content == on_disk[path], path
    assert {"README.md", "model_index.json", "evaluation.png"} <= set(hub.files["tester/tuned"])
    assert not [path for path in hub.files["tester/tuned"] if path.startswith((".", "checkpoint"))]


@pytest.mark.slow
def test_the_card_names_the_model_and_the_data_it_came_from(hub, client, refused):
    card = (client.folder / "tuned" / "README.md").read_text()
    assert "fine-tuned from [tester/smooth](https://huggingface.co/tester/smooth) on 16 images of" in card
    assert "[tester/pictures](https://huggingface.co/datasets/tester/pictures)" in card
    data = ModelCard(card).data
    assert data.base_model == REPO and data.datasets == ["tester/pictures"]
    assert ModelCard(hub.files[REPO]["README.md"].decode()).data.base_model is None


@pytest.mark.slow
def test_the_owners_text_metadata_and_results_stay(client, refused):
    card = (client.folder / "tuned" / "README.md").read_text()
    assert "# My pictures\n\nPlease cite me.\n" in card and card.index("Please cite me") < card.index("# tuned")
    data = ModelCard(card).data
    assert data.license == "cc-by-4.0" and data.language == "en"
    assert data.tags == ["diffusers", "unconditional-image-generation", "reg_diffusers", "art"]
    assert {result.metric_name for result in data.eval_results} >= {"FID", "L' total_variation"}


@pytest.mark.slow
def test_what_the_owner_wrote_while_the_training_went_on_stays(hub, client, run, tmp_path):
    at_home = shutil.ignore_patterns("checkpoint-*", "plain")
    folder = shutil.copytree(client.folder / OUT, tmp_path / "run", ignore=at_home)
    hub.repositories["tester/edited"] = Repository("tester/edited")
    hub.repositories["tester/edited"].commit("main", "Mine", {"README.md": b"Written meanwhile."})
    script = """
        import json, sys
        from pathlib import Path
        from reg_diffusers.hub.background_upload import Upload
        print(json.dumps({"failure": Upload(Path(sys.argv[1]), "tester/edited", "Late", [], "mit").wait()}))
    """
    assert client.python(script, folder, prelude="")["failure"] == ""
    card = ModelCard(hub.files["tester/edited"]["README.md"].decode())
    assert card.text.strip().startswith("Written meanwhile.\n\n<!-- reg_diffusers") and card.data.license == "mit"


@pytest.mark.slow
def test_links_to_folders_and_the_best_model_which_are_left_out_are_named(hub, client, run, tmp_path):
    at_home = shutil.ignore_patterns("checkpoint-*", "plain")
    folder = shutil.copytree(client.folder / OUT, tmp_path / "run", ignore=at_home)
    for name, target in {"more": "samples", "samples/unet": "../unet", "checkpoint-9": "samples"}.items():
        (folder / name).symlink_to(target)
    (folder / "best").mkdir()
    (folder / "best" / "model_index.json").write_text("{}")
    script = """
        import sys
        from pathlib import Path
        from reg_diffusers.hub.uploads import Uploads
        from reg_diffusers.settings.arguments import parse_args
        flags = ["--push_to_hub", "--hub_model_id", "tester/links", "--output_dir", sys.argv[1]]
        settings = parse_args(flags)
        assert Uploads(settings.hub, "tester/links", settings.output).finish(Path(sys.argv[1]))
    """
    done = client.run(sys.executable, "-c", textwrap.dedent(script), folder)
    links = f"{folder}/more, {folder}/samples/unet"
    said = f"warning: --push_to_hub: links to folders were not uploaded: {links}"
    assert any(line.endswith(said) for line in done.stderr.splitlines()), done.stderr
    uploaded = set(hub.files["tester/links"])
    assert "samples/step-000002.png" in uploaded
    assert not [path for path in uploaded if path.startswith(("more", "best"))]
    assert f"hf upload tester/links-best {folder}/best" in done.stdout.splitlines()[-1]


# What cannot work, and what goes wrong


@pytest.mark.slow
def test_ctrl_c_ends_a_run_whose_upload_hangs(hub, client):
    hub.takes_uploads.clear()
    before = asked(hub, "PUT", "/upload/")
    flags = "--train_data_dir photos --max_train_steps 1000000 --checkpointing_steps 5 --hub_strategy checkpoint"
    process = client.start_training(*flags.split(), "--hub_model_id", "tester/cut", "--output_dir", "cut")
    process.wait_for(lambda: asked(hub, "PUT", "/upload/") > before)
    process.interrupt()
    try:
        process.finish(seconds=20)
    finally:
        hub.takes_uploads.set()
    assert "uploads     0 of 1 during the training, 1 failed (step 5: cut off)" in process.stdout
    (command,) = re.findall(r"stopped by SIGINT.*continue with: (.*)", process.stdout)
    assert "--push_to_hub" in command and "--hub_strategy checkpoint" in command
    assert not hub.files["tester/cut"] and not (client.folder / "cut" / ".upload").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_the_last_upload(hub, client, name):
    """All is saved, so the status is 0, and the command uploads later what the signal kept from it."""
    hub.takes_uploads.clear()
    before, repo = asked(hub, "PUT", "/upload/"), f"tester/by-{name.lower()}"
    seed = getattr(signal, name).value  # other weights, which the Hub does not have yet
    flags = ("--train_data_dir", "photos", "--max_train_steps", 1, "--hub_model_id", repo, "--output_dir", name)
    process = client.start_training(*flags, "--seed", seed)
    process.wait_for(lambda: asked(hub, "PUT", "/upload/") > before)
    process.interrupt(getattr(signal, name))
    try:
        process.finish(seconds=20)
    finally:
        hub.takes_uploads.set()
    line = process.stdout.splitlines()[-1]
    assert line.startswith(f"upload      stopped by {name}; upload it later with: hf upload {repo} {name} ")
    assert "Traceback" not in process.stderr and not hub.files[repo]
    client.run("bash", "-c", line.split("with: ")[1])
    assert {"README.md", "model_index.json"} <= set(hub.files[repo])


@pytest.mark.slow
def test_a_wrong_token_is_said_before_anything_else(hub, client):
    requests = len(hub.requests)
    done = client.train(
        "--dataset_name", "tester/pictures", "--regularizer", "total_variation", token="hf_wrong", check=False
    )
    assert done.returncode == 2
    said = "train_reg.py: error: --push_to_hub: the Hub does not accept the token (401): run `hf auth login`"
    assert done.stderr.splitlines() == [said]
    assert [path for _, path in hub.requests[requests:] if "/tester/" in path] == []
    assert not (client.folder / "reg-ddpm-model").exists()


def said(*flags):
    """How a training with these flags is refused before it begins; None if it is not."""
    settings = parse_args(["--push_to_hub", *flags])
    try:
        Uploads(settings.hub, check_upload(settings.hub, settings.output.output_dir), settings.output)
    except ValueError as error:
        return str(error)


REFUSED = [
    ("--hub_model_id a/b/c", "--hub_model_id a/b/c: Repo id must "),
    ("--hub_model_id .hidden", "--hub_model_id .hidden: Repo id must "),
    ("--output_dir pets&cats", "--push_to_hub uses the name of --output_dir: .*'pets&cats'.*; pass --hub_model_id"),
    (
        "--hub_model_id other/theirs",
        r"--hub_model_id other/theirs: the repository cannot be opened \(HfHubHTTPError 403: You don't have the rights"
        " .* other.*: the token needs write access",
    ),
    ("--hub_model_id other/new", "--hub_model_id other/new: the repository cannot be opened .*needs write access"),
    (
        "--hub_model_id tester/open --hub_private_repo",
        "--hub_model_id tester/open: .* already exists and is public: make it private in its settings on the Hub",
    ),
    ("--hub_model_id tester/open --hub_license free", '--hub_license free: "license" must be one of .apache-2.0, mit'),
    ("--hub_model_id tester/broken", "--hub_model_id tester/broken: the metadata of its README.md cannot be read: .*"),
    ("--output_dir linked", "--push_to_hub: linked/samples/x.png is a link out of linked, which is not uploaded"),
    ("--hub_token hf_wrong", r"--push_to_hub: the Hub does not accept the token \(401\): run `hf auth login`"),
]


def test_what_cannot_be_uploaded_is_said_before_the_training(here, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "linked" / "samples").mkdir(parents=True)
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "linked" / "samples" / "x.png").symlink_to(tmp_path / "secret")
    for name in ("other/theirs", "tester/open", "tester/broken"):
        hub.repositories[name] = Repository(name)
    hub.repositories["tester/broken"].commit("main", "Mine", {"README.md": b"---\nlicense: [mit\n---\n"})
    accepted = ["--hub_model_id tester/open --hub_license mit", "--output_dir some/named --hub_private_repo", ""]
    for flags, expected in REFUSED:
        told = said(*flags.split())
        assert told and re.match(expected, told) and "\n" not in told, f"{flags}: {told}"
    assert [said(*flags.split()) for flags in accepted] == [None, None, None]
    assert hub.private["tester/named"] and not hub.private["tester/reg-ddpm-model"]
    assert "other/new" not in hub.repositories and "tester/linked" not in hub.repositories


def test_a_token_that_may_only_read_is_said_before_the_training(here, hub):
    hub.repositories["tester/old"] = Repository("tester/old")
    hub.read_only = True
    told = [said("--hub_model_id", name) for name in ("tester/old", "tester/not_yet")]
    hub.read_only = False
    assert all("HfHubHTTPError 403" in line and "needs write access" in line for line in told), told


def test_no_token_and_no_hub_are_told_apart(hub, tmp_path, monkeypatch):
    make_client(monkeypatch, hub, tmp_path / "cache", token=None)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    assert said() == "--push_to_hub: no token: run `hf auth login`, or set HF_TOKEN"
    with HubServer() as gone:
        make_client(monkeypatch, gone, tmp_path / "cache")
    assert said().startswith("--push_to_hub: the Hub cannot be reached (ConnectError")


@pytest.mark.slow
def test_a_hub_that_is_gone_at_the_end_costs_nothing_but_a_command(hub, client):
    flags = "--train_data_dir photos --max_train_steps 1 --output_dir".split()
    process = client.start_training(*flags, "late one", "--hub_model_id", "tester/late", "--hub_private_repo")
    process.wait_for(lambda: "model      UNet2DModel" in process.stdout)
    hub.stop()
    line = of_upload(process.finish(check=False, seconds=200))
    hub.start()
    assert re.match(
        r"upload      failed \(ConnectError.*\); upload it later with: hf upload tester/late 'late one'", line
    )
    client.run("bash", "-c", line.split("with: ")[1])
    assert "model_index.json" in hub.files["tester/late"] and hub.private["tester/late"]
