"""train_reg.py, by its command line: what it leaves, what it refuses, what it goes on from."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from runs import ACCELERATE, QUICK, ROOT, differ, evaluation_result, load_script, metrics, refusal, weights
from safetensors.torch import load_file

from reg_diffusers import RegDDPMPipeline
from reg_diffusers.regularizers import RadialSpectrum
from reg_diffusers.settings import (
    DataSettings,
    LossSettings,
    MachineSettings,
    ModelSettings,
    OptimizationSettings,
    OutputSettings,
    Settings,
)
from reg_diffusers.settings.arguments import parse_args
from reg_diffusers.training.terms import build_terms

pytestmark = pytest.mark.training


# The main job


@pytest.mark.slow
def test_the_main_command_leaves_what_the_readme_promises(command_line, tmp_path):
    flags = "--resolution 8 --max_train_steps 10 --preview_steps 5 --ddpm_num_inference_steps 2".split()
    done = command_line(*flags, launcher=ACCELERATE)
    out = tmp_path / "reg-ddpm-model"
    assert sorted(path.name for path in (out / "samples").iterdir()) == ["step-000005.png", "step-000010.png"]
    assert PIL.Image.open(out / "comparison.png").size[0] > 900
    comparison = json.loads((out / "comparison.json").read_text())
    assert list(comparison["rows"]) == ["data", "without", "with near_background"]
    for title, row in comparison["rows"].items():
        assert row["terms"]["near_background"] > 0 and row["distance"] > 0
        assert (row["denoising_loss"] is None) == (title == "data")
        assert f"{row['terms']['near_background']:.4f}" in done.stdout
    assert 'RegDDPMPipeline.from_pretrained("reg-ddpm-model")' in done.stdout
    cores = len(os.sched_getaffinity(0))
    assert f"{cores} thread{'s' * (cores > 1)} each" in done.stdout  # although the launcher sets OMP_NUM_THREADS=1
    progress = done.stderr.replace("\r", "\n")
    assert re.search(r"10/10 .*it.*denoising=\d.*near_background=\d", progress)
    for loader in (RegDDPMPipeline, DDPMPipeline, DiffusionPipeline):
        images = loader.from_pretrained(str(out))(batch_size=1, num_inference_steps=2).images
        assert images[0].mode == "L" and images[0].size == (8, 8)
    assert differ(weights(out), weights(out / "plain"))
    assert metrics(out)[-1]["step"] == 10 and {"loss", "denoising", "near_background", "lr"} <= set(metrics(out)[-1])


def test_the_plain_model_of_a_comparison_is_the_one_that_none_trains(train):
    out = train("--compare", "--max_train_steps", 5)
    none = train("--regularizer", "none", "--max_train_steps", 5, output="none")
    assert not differ(weights(out / "plain"), weights(none))
    assert differ(weights(out), weights(none))


def test_a_training_from_python_is_that_of_the_command_line_it_prints(train, image_folder, capsys):
    by_command = train("--train_data_dir", image_folder(), "--max_train_steps", 3, "--regularizer", "sparsity")
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    settings = Settings(
        DataSettings(train_data_dir=str(image_folder()), resolution=8),
        ModelSettings(model_config_name_or_path="tiny"),
        LossSettings(regularizer=("sparsity",)),
        OptimizationSettings(train_batch_size=8, max_train_steps=3, lr_warmup_steps=0),
        MachineSettings(mixed_precision="no"),
        OutputSettings(output_dir="python", eval_batch_size=4, ddpm_num_inference_steps=2),
    )
    pipeline = train.script.train(settings)
    out = by_command.with_name("python")
    assert not differ(weights(out), weights(by_command))
    saved = weights(out)
    assert all(torch.equal(value, saved[name]) for name, value in pipeline.unet.state_dict().items())
    command = json.loads((out / "reg_config.json").read_text())["command"]
    assert parse_args(shlex.split(command.partition("train_reg.py ")[2])).values() == settings.values() | {
        "attention": "sdpa"
    }


def test_weight_zero_is_the_plain_model(train):
    zero = train("--reg_weight", 0, "--max_train_steps", 5, output="zero")
    none = train("--regularizer", "none", "--max_train_steps", 5, output="none")
    assert not differ(weights(zero), weights(none))
    assert metrics(zero)[-1]["near_background"] > 0


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(train):
    first, second, other = (
        train("--max_train_steps", 3, "--seed", seed, output=name) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert not differ(weights(first), weights(second)) and differ(weights(first), weights(other))


@pytest.mark.slow
def test_a_large_weight_makes_samples_smooth(train):
    """The sign and the path of the gradient, end to end: x0_hat loses variation when variation is all that counts."""
    variation = {}
    flags = "--regularizer total_variation --reg_weighting constant --prediction_type sample".split()
    flags += "--max_train_steps 60 --learning_rate 3e-3".split()
    for weight in (0, 100):
        out = train(*flags, "--reg_weight", weight, output=f"w{weight}")
        variation[weight] = metrics(out)[-1]["total_variation"]
    assert variation[100] < 0.7 * variation[0]


# Users' own data, models and losses


def test_a_command_line_of_diffusers_script_runs(train, image_folder):
    out = train(
        *f"--train_data_dir {image_folder()} --center_crop --random_flip --num_epochs 2 --use_ema"
        " --gradient_accumulation_steps 2 --learning_rate 1e-4 --save_images_epochs 1 --save_model_epochs 1"
        " --checkpointing_steps 500 --regularizer total_variation --reg_weight 0.1 --train_batch_size 2"
        " --dataloader_num_workers 1".split(),
        model=(),
    )
    assert len(list((out / "samples").iterdir())) == 2  # 8 images, batches of 2, accumulated by 2: 2 steps per epoch
    pipeline = RegDDPMPipeline.from_pretrained(str(out))
    assert pipeline.unet.config.in_channels == 3 and pipeline.unet.config.attention_head_dim == 64


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction", "flow_prediction"])
def test_every_prediction_type_learns(train, prediction_type):
    out = train("--prediction_type", prediction_type, "--max_train_steps", 60, "--learning_rate", 3e-3)
    losses = [line["denoising"] for line in metrics(out)]
    assert losses[-1] < 0.8 * losses[0]
    pipeline = RegDDPMPipeline.from_pretrained(str(out))
    assert isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler) == (prediction_type == "flow_prediction")
    pipeline(batch_size=2, num_inference_steps=3, output_type="np")


def test_zero_terminal_snr_trains_with_v_prediction(train):
    out = train("--rescale_betas_zero_snr", "--prediction_type", "v_prediction", "--max_train_steps", 2)
    assert RegDDPMPipeline.from_pretrained(str(out)).scheduler.alphas_cumprod[-1] == 0


def test_several_terms_with_their_own_weights_and_weightings(train, tmp_path):
    (tmp_path / "my_losses.py").write_text(
        "class Contrast:\n"
        "    needs = ('original_samples',)\n"
        "    def __call__(self, x0_hat, /, original_samples):\n"
        "        return (x0_hat.flatten(1).std(1) - original_samples.flatten(1).std(1)) ** 2\n"
        "def half(level):\n"
        "    return 0.5 * level.alpha\n"
    )
    out = train(
        *"--regularizer my_losses:Contrast sparsity sparsity --reg_weight 1 2 3 --reg_weighting my_losses:half snr"
        " constant --snr_gamma 5 --max_train_steps 2".split()
    )
    assert {"Contrast", "sparsity", "sparsity_2"} <= set(metrics(out)[-1])


def test_fields_come_back_in_their_units_from_the_saved_model(train, tmp_path, tiny_unet):
    tiny_unet(channels=2).save_config("two")
    np.save("fields.npy", np.random.default_rng(0).normal(300.0, 5.0, (16, 2, 8, 8)))
    QUICK_WITHOUT_RESOLUTION = ["--train_data_dir", "fields.npy", "--max_train_steps", 2, "--resolution", 8]
    out = train(*QUICK_WITHOUT_RESOLUTION, model=("--model_config_name_or_path", "two"))
    fields = RegDDPMPipeline.from_pretrained(str(out))(batch_size=2, num_inference_steps=2, output_type="pt").images
    assert fields.shape == (2, 2, 8, 8) and fields.min() > 270 and fields.max() < 330
    assert (out / "samples" / "step-000002.png").is_file()
    np.save("shifted.npy", np.load("fields.npy") + 7.0)
    flags = ("--train_data_dir", "shifted.npy", "--pretrained_model_name_or_path", str(out), "--max_train_steps", 1)
    tuned = train(*flags, model=(), output="tuned")  # in the units that the given network has learned
    normalization = [RegDDPMPipeline.from_pretrained(str(folder)).config.normalization for folder in (out, tuned)]
    assert normalization[0] == normalization[1]


def test_class_conditional_training(train, image_folder, capsys):
    out = train("--train_data_dir", image_folder(), "--class_conditional", "--max_train_steps", 2)
    assert "classes    0 cats, 1 dogs" in capsys.readouterr().out
    pipeline = RegDDPMPipeline.from_pretrained(str(out))
    assert pipeline.unet.config.num_class_embeds == 2
    pipeline(batch_size=2, num_inference_steps=2, class_labels=[0, 1])


def test_fine_tuning_starts_from_the_given_weights_and_keeps_its_prediction_type(train, tmp_path):
    first = train("--prediction_type", "v_prediction", "--max_train_steps", 3)
    given = RegDDPMPipeline.from_pretrained(str(first))
    given.scheduler = EulerDiscreteScheduler.from_config(given.scheduler.config)
    given.save_pretrained("euler")
    tuned = train(
        "--pretrained_model_name_or_path", "euler", "--max_train_steps", 1, "--learning_rate", 1e-12, "--no-use_ema",
        model=(), output="tuned",
    )  # fmt: skip
    assert DDPMScheduler.from_pretrained(tuned, subfolder="scheduler").config.prediction_type == "v_prediction"
    for name, value in weights(first).items():
        torch.testing.assert_close(weights(tuned)[name], value, atol=1e-6, rtol=0)
    UNet2DModel.from_pretrained(first, subfolder="unet").save_pretrained("bare")
    train("--pretrained_model_name_or_path", "bare", "--max_train_steps", 1, model=(), output="from_bare")


def readme_commands():
    """The README's commands for users' own data, without the virtual environment of its first two."""
    text = (ROOT / "README.md").read_text()
    return re.findall(r"^reg-diffusers train (.*)$", text, re.MULTILINE)


@pytest.mark.parametrize("flags", readme_commands())
def test_the_readmes_commands_run(train, image_folder, tmp_path, flags):
    image_folder(name="photos")
    (tmp_path / "my_module.py").write_text(
        "class MyReg:\n    def __call__(self, x):\n        return x.flatten(1).var(1)\n"
    )
    out = train(*flags.split(), "--max_train_steps", 2, model=())
    assert (out / "comparison.png").is_file() and "MyReg" in metrics(out)[-1]


def test_a_yaml_file_reproduces_a_run(train, tmp_path):
    first = train("--max_train_steps", 3)
    settings = yaml.safe_load((first / "reg_settings.yaml").read_text())
    Path("again.yaml").write_text(yaml.safe_dump({**settings, "output_dir": "again"}))
    load_script().main(["again.yaml"])
    assert not differ(weights(first), weights(tmp_path / "again"))


def test_bfloat16_learns_and_saves_full_precision(train):
    QUICK_BF16 = ("--mixed_precision", "bf16", "--max_train_steps", 20, "--learning_rate", 3e-3)
    out = train(*QUICK_BF16)
    assert metrics(out)[-1]["denoising"] < metrics(out)[0]["denoising"]
    assert {value.dtype for value in weights(out).values()} == {torch.float32}


def test_fine_tuning_at_another_resolution_samples_at_that_resolution(train):
    first = train("--max_train_steps", 1)
    given = ("--pretrained_model_name_or_path", str(first), "--resolution", 16)
    tuned = train(*given, "--max_train_steps", 1, "--compare", model=(), output="tuned")
    assert RegDDPMPipeline.from_pretrained(str(tuned))(num_inference_steps=1).images[0].size == (16, 16)
    assert (tuned / "comparison.png").is_file()


def test_samples_are_measured_before_they_are_clipped(train):
    out = train("--regularizer", "out_of_range", "--max_train_steps", 1, "--compare", "--prediction_type", "flow")
    rows = json.loads((out / "comparison.json").read_text())["rows"]
    assert rows["data"]["terms"]["out_of_range"] == 0 < rows["without"]["terms"]["out_of_range"]


# Going on


def test_latest_before_the_first_checkpoint_starts_anew(train):
    out = train("--max_train_steps", 1, "--resume_from_checkpoint", "latest")
    assert metrics(out)[-1]["step"] == 1


def test_a_comparison_whose_second_half_was_lost_is_finished_by_resuming(train):
    out = train("--max_train_steps", 3, "--compare")
    before, plain = weights(out), weights(out / "plain")
    shutil.rmtree(out / "plain")
    (out / "comparison.json").unlink()
    train("--max_train_steps", 3, "--compare", "--resume_from_checkpoint", "latest")
    assert not differ(weights(out), before) and not differ(weights(out / "plain"), plain)
    assert (out / "comparison.json").is_file() and len(metrics(out)) == 1


def test_a_run_that_is_no_number_any_more_stops_and_keeps_the_weights_before(train, capsys, tmp_path):
    flags = ("--max_train_steps", 30, "--max_bad_steps", 5, "--checkpointing_steps", 7, "--no-use_ema")
    error = refusal(train, capsys, *flags, "--learning_rate", 1e30)
    assert "5 steps in a row had a non-finite loss or gradient" not in error  # they are read every 10 steps
    assert re.search(r"\d+ steps in a row had a non-finite loss or gradient", error)
    assert "--learning_rate" in error
    out = tmp_path / "out"
    assert not (out / "model_index.json").exists()
    kept = load_file(out / "checkpoint-7" / "model.safetensors")
    assert all(value.isfinite().all() for value in kept.values())
    bad = [json.loads(line) for line in (out / "bad_steps.jsonl").read_text().splitlines()]
    assert [line["step"] for line in bad] == list(range(bad[0]["step"], 8))
    assert all(len(line["images"]) == len(line["timesteps"]) == 8 for line in bad)


def test_a_resumed_run_ends_in_the_same_weights(train):
    whole = train("--max_train_steps", 9, output="whole")
    part = train("--max_train_steps", 9, "--checkpointing_steps", 4, "--checkpoints_total_limit", 1, output="part")
    assert [path.name for path in part.glob("checkpoint-*")] == ["checkpoint-8"]
    shutil.rmtree(part / "unet")
    resumed = train("--max_train_steps", 9, "--resume_from_checkpoint", "latest", output="part")
    assert not differ(weights(whole), weights(resumed))


@pytest.mark.slow
def test_a_signal_saves_and_the_printed_command_goes_on(tmp_path, tiny_unet):
    tiny_unet().save_config(tmp_path / "tiny")
    flags = [*QUICK, *"--no-compare --max_train_steps 100000 --output_dir out --preview_steps 100000".split()]
    flags += ["--model_config_name_or_path", "tiny", "--mixed_precision", "no"]
    flags += ["--lr_scheduler", "constant"]  # so that the run may become shorter
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train_reg.py"), *flags],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    deadline = time.time() + 120
    while not (tmp_path / "out" / "metrics.jsonl").is_file() and time.time() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    command = re.search(r"stopped by SIGTERM; continue with: (.*)", output).group(1)
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    step = int(checkpoint.name.split("-")[1])
    assert (tmp_path / "out" / "model_index.json").is_file()
    subprocess.run([*shlex.split(command), "--max_train_steps", str(step + 2)], cwd=tmp_path, check=True)
    assert metrics(tmp_path / "out")[-1]["step"] == step + 2


# What cannot work


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--regularizer smoothness", "unknown regularizer 'smoothness'; known: gradient_energy, "),
        ("--regularizer my:Nothing", "--regularizer: 'my:Nothing': no module 'my'"),
        ("--reg_weighting heavy", "unknown weighting 'heavy'; known: alpha_bar, "),
        ("--mixed_precision fp16", "--mixed_precision fp16 needs a GPU"),
        ("--train_data_dir nowhere", "--train_data_dir nowhere: no such folder"),
        ("--image_column photo", "--image_column 'photo' is not a column of images; the columns are: image"),
        ("--resolution 9", "--resolution 9: the network halves the resolution 1 time, so sides must be multiples"),
        ("--pretrained_model_name_or_path tiny_nothing", "are mutually exclusive"),
        ("--model_config_name_or_path .", "no readable UNet2DModel"),
        ("--resume_from_checkpoint checkpoint-7", "--resume_from_checkpoint checkpoint-7: no such folder"),
        ("--logger wandb", "--logger wandb is not installed"),
        ("--prediction_type flow --ddpm_beta_schedule linear", "which flow matching lacks"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_one_line_and_writes_nothing(train, capsys, tmp_path, flags, message):
    assert message in refusal(train, capsys, *flags.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "body, message",
    [
        ("return x.mean()", r"must return one value per image.*returned a tensor of shape \(\)"),
        ("return x", r"returned a tensor of shape \(2, 1, 8, 8\)"),
        ("return 0.0", "returned float"),
        ("return x.detach().flatten(1).mean(1)", "detached from x0_hat"),
        ("return 1 / 0", "raised ZeroDivisionError on a batch of images"),
    ],
)
def test_a_bad_regularizer_is_found_before_the_first_step(train, capsys, tmp_path, body, message):
    (tmp_path / "bad_losses.py").write_text(f"def loss(x):\n    {body}\n")
    sys.modules.pop("bad_losses", None)
    error = refusal(train, capsys, "--regularizer", "bad_losses:loss")
    assert re.search(f"--regularizer bad_losses.loss.*{message}", error)
    assert not (tmp_path / "out").exists()


def test_a_wrong_argument_of_a_built_in_loss_is_one_line(train, capsys):
    error = refusal(train, capsys, "--regularizer", "symmetry(dim=9)")
    assert "error: --regularizer symmetry: dim must be a dimension of each image" in error
    assert "Traceback" not in error and "raised" not in error


@pytest.mark.parametrize(
    "needs, message",
    [
        ("class_labels", "needs class_labels: add --class_conditional"),
        ("condition", "needs condition: add --conditioning_image_column"),
        ("depth", "needs depth, but the data have no column 'depth'. Name it by --reg_columns depth=COLUMN"),
    ],
)
def test_what_a_regularizer_lacks_is_said_with_the_flag_that_gives_it(train, capsys, tmp_path, needs, message):
    (tmp_path / "needy_losses.py").write_text(f"def loss(x, {needs}): pass\nloss.needs = ({needs!r},)\n")
    sys.modules.pop("needy_losses", None)
    error = refusal(train, capsys, "--regularizer", "needy_losses:loss")
    assert re.search(f"--regularizer [a-z_:.]*loss {message}", error)


def test_an_error_in_the_users_regularizer_is_shown_with_its_line(train, capsys, tmp_path):
    (tmp_path / "failing_losses.py").write_text("def loss(x):\n    return undefined_name\n")
    with pytest.raises(SystemExit):
        train("--regularizer", "failing_losses:loss")
    assert 'failing_losses.py", line 2, in loss' in capsys.readouterr().err


def test_a_folder_that_is_not_ours_is_left_alone(train, capsys, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    for more in ((), ("--overwrite_output_dir",), ("--resume_from_checkpoint", "latest")):
        assert "does not belong to an earlier run" in refusal(train, capsys, *more)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_an_earlier_run_is_overwritten_only_when_asked(train, capsys, tmp_path):
    out = train("--max_train_steps", 2, "--checkpointing_steps", 1)
    before = weights(out)
    (out / "notes.txt").write_text("mine")
    assert "holds an earlier run" in refusal(train, capsys, "--max_train_steps", 1, "--seed", 1)
    assert not differ(weights(out), before)
    train("--max_train_steps", 1, "--seed", 1, "--overwrite_output_dir")
    assert differ(weights(out), before) and len(metrics(out)) == 1
    assert not list(out.glob("checkpoint-*")) and (out / "notes.txt").read_text() == "mine"


def test_a_folder_that_cannot_be_written_is_named(train, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refusal(train, capsys, output="file/out")
    assert "is a file" in refusal(train, capsys, output="file")
    assert "cannot be written: File name too long" in refusal(train, capsys, output="n" * 300)


def test_a_given_model_that_does_not_fit_is_refused(train, capsys, tmp_path):
    first = train("--max_train_steps", 1)
    given = ("--pretrained_model_name_or_path", str(first))
    assert "trained with v_prediction" in refusal(
        train, capsys, *given, "--prediction_type", "sample", model=(), output="a"
    )
    np.save("f.npy", np.zeros((4, 2, 8, 8)))
    assert "2 channels, but the given model has 1" in refusal(
        train, capsys, *given, "--train_data_dir", "f.npy", model=(), output="a"
    )
    assert "has no classes" in refusal(train, capsys, *given, "--class_conditional", model=(), output="a")


@pytest.mark.slow
def test_a_usage_error_ends_the_process_with_status_2(command_line, tmp_path):
    done = command_line("--regularizer", "smoothness", check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("train_reg.py: error: --regularizer: unknown")


def test_a_loss_and_a_weighting_may_have_arguments(train, evaluate, capsys):
    spec = "mean_intensity(target=0.25)"
    out = train("--regularizer", spec, "--reg_weighting", "gated(0.5)", "--max_train_steps", 2)
    assert "0.1 * gated(0.5) * mean_intensity" in capsys.readouterr().out
    (term,) = json.loads((out / "reg_config.json").read_text())["objective"]["terms"]
    assert (term["name"], term["regularizer"], term["weighting"]) == ("mean_intensity", spec, "gated(0.5)")
    assert yaml.safe_load((out / "reg_settings.yaml").read_text())["regularizer"] == [spec]
    assert metrics(out)[-1]["mean_intensity"] > 0
    evaluate("--model", out, "--num_images", 20, "--num_inference_steps", 2, "--features", "pixels")
    assert evaluation_result()["rows"]["data"]["terms"][spec]["value"] > 0


def test_a_paired_loss_trains_and_is_measured_on_x0_hat_of_the_data(train, evaluate, capsys):
    specs = ("spectrum(kind='amplitude')", "total_variation")
    out = train("--regularizer", *specs, "--reg_weighting", "gated(0.2)", "--compare", "--max_train_steps", 2)
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    assert metrics(out)[-1]["spectrum"] > 0
    evaluate("--model", out, "--num_images", 20, "--num_inference_steps", 2, "--features", "pixels")
    assert list(evaluation_result()["rows"]["data"]["terms"]) == [
        "spectrum(kind='amplitude') of x0_hat",
        "total_variation",
    ]


def test_a_target_spectrum_comes_from_a_file(train, capsys):
    RadialSpectrum.of(torch.randn(9, 1, 8, 8)).save("spectrum.pt")
    out = train("--regularizer", "RadialSpectrum('spectrum.pt')", "--max_train_steps", 2)
    assert metrics(out)[-1]["radial_spectrum"] > 0
    assert "does not exist" in refusal(train, capsys, "--regularizer", "RadialSpectrum('other.pt')", output="new")


@pytest.mark.parametrize("name", ["loss", "step", "lr", "batches", "denoising"])
def test_a_regularizer_with_a_name_of_the_logs_own_keeps_a_key_of_its_own(tmp_path, monkeypatch, name):
    """Its L' would take the place of the number that the log has under this name."""
    (tmp_path / f"named_{name}.py").write_text(f"def {name}(x):\n    return x.square().flatten(1).mean(1)\n")
    monkeypatch.chdir(tmp_path)
    settings = parse_args(["--regularizer", f"named_{name}:{name}", "total_variation"])
    assert [term.name for term in build_terms(settings.loss, settings.data)] == [
        f"named_{name}.{name}",
        "total_variation",
    ]


# Estimators


@pytest.mark.parametrize("estimator", ["ddim(1)", "known_noise(0.5)", "monte_carlo(2)"])
def test_an_estimator_changes_one_step_of_the_weights_and_is_said_and_recorded(train, estimator, capsys):
    flags = ("--max_train_steps", 1, "--reg_weighting", "constant", "--reg_estimator", estimator)
    ours = train(*flags, "--reg_weight", 1, output="ours")
    assert f"1 * constant * near_background of {estimator}" in capsys.readouterr().out
    without, plain = train(*flags, "--reg_weight", 0, output="without"), train(*flags[:4], "--reg_weight", 1)
    assert differ(weights(ours), weights(without)) and differ(weights(ours), weights(plain))
    (term,) = json.loads((ours / "reg_config.json").read_text())["objective"]["terms"]
    assert term["estimator"] == estimator
    assert yaml.safe_load((ours / "reg_settings.yaml").read_text())["reg_estimator"] == [estimator]


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--reg_estimator ddim", "--reg_estimator: estimator 'ddim' needs steps"),
        ("--reg_estimator ddim(1) --reg_weight auto:0.1", "--reg_estimator ddim(1) calls the network again, so the"),
        ("--reg_estimator ddim(1) --reg_target near_background=0.1", "give --reg_weight as a number"),
        ("--reg_estimator ddim(1) --reg_balance config", "which --reg_balance config cannot combine"),
        ("--regularizer none --reg_estimator ddim(1)", "needs a regularizer, but none is given"),
        ("--reg_estimator one_step ddim(1)", "--reg_estimator has 2 entries for 1 regularizers"),
    ],
)
def test_an_estimator_that_cannot_work_is_refused(train, capsys, flags, message):
    assert message in refusal(train, capsys, *flags.split())
