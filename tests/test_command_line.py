"""`reg-diffusers` itself: help, version, environment, and flags that are nearly right."""

import pytest
import yaml

import reg_diffusers
from reg_diffusers.cli import main
from reg_diffusers.settings.arguments import parse_args

pytestmark = pytest.mark.training


def refusal(capsys, command, *words):
    with pytest.raises(SystemExit, match=r"^2$"):
        command([*words])
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_the_command_alone_prints_its_help(capsys):
    main([])
    printed = capsys.readouterr().out
    commands = ("train", "diagnose", "evaluate", "sweep", "sample", "demo", "env")
    assert all(f"\n    {command} " in printed for command in commands)


@pytest.mark.parametrize("words", [["--version"], ["train", "--version"]])
def test_the_version_is_printed(capsys, words):
    with pytest.raises(SystemExit, match=r"^0$"):
        main(words)
    assert capsys.readouterr().out.split()[-1] == reg_diffusers.__version__


@pytest.mark.parametrize("command", ["train", "diagnose"])
def test_the_help_of_a_command_lists_its_flags(capsys, command):
    with pytest.raises(SystemExit, match=r"^0$"):
        main([command, "--help"])
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: reg-diffusers {command} ") and "--regularizer NAME" in printed


@pytest.mark.parametrize(
    "words, meant",
    [
        (["train", "--reg-weight", "1"], "--reg_weight"),
        (["train", "-regularizer", "symmetry"], "--regularizer"),
        (["diagnose", "--regulariser=symmetry"], "--regularizer"),
        (["evaluate", "--modle", "out"], "--model"),
        (["train", "--model", "out"], "--pretrained_model_name_or_path"),
    ],
)
def test_the_flag_that_was_meant_is_suggested(capsys, words, meant):
    error = refusal(capsys, main, *words)
    assert error.startswith(f"reg-diffusers {words[0]}: error: unrecognized arguments: {words[1]}")
    assert error.endswith(f"did you mean {meant!r}?")


def test_a_flag_unlike_all_others_gets_no_suggestion(capsys):
    assert refusal(capsys, parse_args, "--zzzzz").endswith("error: unrecognized arguments: --zzzzz")


def test_a_yaml_file_may_be_named_anywhere_and_flags_override_it(tmp_path, capsys):
    file, other = tmp_path / "a.yaml", tmp_path / "b.yaml"
    file.write_text(yaml.safe_dump({"resolution": 8, "seed": 3}))
    other.write_text(yaml.safe_dump({"config": "a.yaml"}))
    for words in (
        ["--seed", "5", "--config", str(file)],
        [f"--config={file}", "--seed", "5"],
        [str(file), "--seed=5"],
    ):
        settings = parse_args(words)
        assert (settings.data.resolution, settings.optimization.seed) == (8, 5)
    assert "one YAML file only" in refusal(capsys, parse_args, str(file), "--config", str(other))
    assert "--config: name a YAML file after it" in refusal(capsys, parse_args, "--config")
    assert "unknown entry 'config'" in refusal(capsys, parse_args, "--config", str(other))
    assert "unexpected argument" in refusal(capsys, parse_args, "--seed", "5", str(file))


def test_the_environment_names_versions_and_hardware_but_no_token(capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    main(["env"])
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    import torch

    assert lines["reg_diffusers"].strip() == reg_diffusers.__version__
    assert lines["torch"].strip() == torch.__version__.split("+")[0] or lines["torch"].strip() == torch.__version__
    assert {"Python", "diffusers", "accelerate", "processor", "memory", "GPUs"} <= lines.keys()
    assert not any("hf_secret" in value for value in lines.values())
