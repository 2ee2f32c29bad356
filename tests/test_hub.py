"""--push_to_hub, by the real client in a process of its own against a server of the tests'."""

import os

import pytest
from hub_server import TOKEN, HubServer

from reg_diffusers import RegDDPMPipeline

FLAGS = (
    "--resolution 8 --max_train_steps 2 --ddpm_num_inference_steps 2 --eval_batch_size 1 --train_batch_size 4"
    " --push_to_hub --checkpointing_steps 1 --preview_steps 2"
).split()


@pytest.fixture
def push(command_line, tmp_path):
    """Runs train_reg.py with --push_to_hub against a server."""

    def run(hub, *flags, token=TOKEN, **kwargs):
        env = {
            **os.environ,
            "HF_ENDPOINT": hub.endpoint,
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": token,
            "HF_HOME": str(tmp_path / "hf"),
        }
        return command_line(*FLAGS, *flags, env=env, **kwargs)

    return run


def test_a_run_is_uploaded_with_its_evidence_and_without_its_checkpoints(push, tmp_path):
    with HubServer() as hub:
        done = push(hub, "--hub_model_id", "tester/smooth", "--hub_private_repo")
    files = hub.files["tester/smooth"]
    assert {"README.md", "model_index.json", "comparison.png", "comparison.json", "reg_settings.yaml"} <= set(files)
    assert not [path for path in files if path.startswith(("checkpoint", "plain", "logs"))]
    assert hub.private["tester/smooth"]
    assert f"{hub.endpoint}/tester/smooth" in done.stdout

    card = files["README.md"].decode()
    assert "+ 0.05 * matched(t) * total_variation(x0_hat)" in card and "| with total_variation |" in card
    assert 'DDPMPipeline.from_pretrained("tester/smooth")' in card and "library_name: diffusers" in card
    assert not [path for path, content in files.items() if TOKEN.encode() in content]
    assert TOKEN not in done.stdout + done.stderr

    for path, content in files.items():
        (tmp_path / "copy" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "copy" / path).write_bytes(content)
    RegDDPMPipeline.from_pretrained(str(tmp_path / "copy"))(num_inference_steps=2)


def test_a_wrong_token_is_said_before_the_training(push, tmp_path):
    with HubServer() as hub:
        done = push(hub, token="hf_wrong", check=False)
    assert done.returncode == 2 and "does not accept the token (401)" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "reg-ddpm-model").exists()


def test_a_failed_upload_keeps_the_run_and_names_the_command(push, tmp_path):
    with HubServer(fails=True) as hub:
        done = push(hub, "--no-compare")
    assert "hf upload tester/reg-ddpm-model reg-ddpm-model --exclude 'checkpoint-*'" in done.stdout
    assert (tmp_path / "reg-ddpm-model" / "model_index.json").is_file()
