"""The command line: names of diffusers' script, the YAML file, and one line for what cannot work."""

from dataclasses import FrozenInstanceError

import pytest
import yaml

from reg_diffusers.runtime.errors import UsageError
from reg_diffusers.settings import LossSettings, ModelSettings, Settings
from reg_diffusers.settings.arguments import as_flags, build_parser, parse_args

pytestmark = pytest.mark.training

# The flags of diffusers' train_unconditional.py.
THEIR_FLAGS = """
dataset_name dataset_config_name model_config_name_or_path train_data_dir output_dir overwrite_output_dir
cache_dir resolution center_crop random_flip train_batch_size eval_batch_size dataloader_num_workers
num_epochs save_images_epochs save_model_epochs gradient_accumulation_steps learning_rate lr_scheduler
lr_warmup_steps adam_beta1 adam_beta2 adam_weight_decay adam_epsilon use_ema ema_inv_gamma ema_power
ema_max_decay push_to_hub hub_token hub_model_id hub_private_repo logger logging_dir local_rank
mixed_precision prediction_type ddpm_num_steps ddpm_num_inference_steps ddpm_beta_schedule checkpointing_steps
checkpoints_total_limit resume_from_checkpoint enable_xformers_memory_efficient_attention
""".split()


def error_of(capsys, *argv):
    with pytest.raises(SystemExit) as stopped:
        parse_args(list(argv))
    assert stopped.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_every_flag_of_the_script_of_diffusers_is_known():
    known = {action.dest for action in build_parser()._actions}
    assert [flag for flag in THEIR_FLAGS if flag not in known] == []


def test_every_flag_is_explained():
    assert [action.dest for action in build_parser()._actions if not action.help] == []


def test_a_command_line_of_the_script_of_diffusers_means_the_same():
    settings = parse_args(
        "--dataset_name=huggan/flowers-102-categories --resolution=64 --center_crop --random_flip --output_dir=ddpm"
        " --train_batch_size=16 --num_epochs=50 --gradient_accumulation_steps=2 --use_ema --learning_rate=1e-4"
        " --lr_warmup_steps=500 --mixed_precision=no --prediction_type=sample --logger=tensorboard"
        " --regularizer total_variation --reg_weight 0.1".split()
    )
    data, optimization = settings.data, settings.optimization
    assert (data.resolution, optimization.train_batch_size, optimization.num_epochs) == (64, 16, 50)
    assert optimization.use_ema and data.random_flip and not settings.loss.compare
    assert (settings.model.prediction_type, optimization.gradient_accumulation_steps) == ("sample", 2)


def test_the_regularizer_that_nobody_asked_for_is_named(capsys, tmp_path):
    expected = "no --regularizer: using total_variation with --reg_weight 0.1; pass --regularizer none to disable it"
    parse_args(["--train_data_dir", "x"])
    assert expected in capsys.readouterr().err
    (tmp_path / "run.yaml").write_text("regularizer: [total_variation]")
    for given in ([str(tmp_path / "run.yaml")], ["--regularizer", "none"], ["--regularizer", "total_variation"]):
        parse_args([*given, "--train_data_dir", "x"])
    parse_args([])  # the demonstration is there to show it
    assert capsys.readouterr().err == ""


def test_without_data_the_run_is_a_demonstration_and_flags_still_win():
    assert parse_args([]).loss.compare and parse_args([]).data.resolution == 16
    settings = parse_args(["--resolution", "8", "--no-compare"])
    assert settings.data.resolution == 8 and not settings.loss.compare
    assert settings.loss.regularizer == ("near_background",) and settings.loss.reg_weight == (0.2,)
    usual = LossSettings().reg_weight  # the demonstration's own is for its own loss
    assert parse_args(["--regularizer", "total_variation"]).loss.reg_weight == usual
    assert parse_args(["--reg_weight", "3"]).loss.regularizer == ("near_background",)
    assert parse_args(["--train_data_dir", "x"]).optimization.max_train_steps is None


def test_a_yaml_file_is_read_first_and_flags_win(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "train_data_dir: photos\nseed: 3\nregularizer: [total_variation, sparsity]\nreg_weight: [1, 2.5]\n"
        "use_ema: false\nrandom_flip: true\ncenter_crop: false\nlogger: null\nlearning_rate: 1e-3\n"
    )
    settings = parse_args([str(path), "--seed", "4"])
    assert settings.loss.regularizer == ("total_variation", "sparsity") and settings.loss.reg_weight == (1.0, 2.5)
    assert settings.data.random_flip and not settings.data.center_crop and settings.output.logger is None
    optimization = settings.optimization
    assert (optimization.seed, optimization.use_ema, optimization.learning_rate) == (4, False, 1e-3)


def test_a_yaml_file_may_name_the_home_folder_as_a_shell_does(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    path = tmp_path / "run.yaml"
    path.write_text("output_dir: ~/runs/a\ntrain_data_dir: a~/photos\n")
    settings = parse_args([str(path)])
    assert (settings.output.output_dir, settings.data.train_data_dir) == ("/home/somebody/runs/a", "a~/photos")


@pytest.mark.parametrize("word", ["no", "false", "off", "'no'", "False"])
def test_a_yaml_word_for_no_means_no(tmp_path, word):
    path = tmp_path / "run.yaml"
    path.write_text(f"class_conditional: '{word.strip(chr(39))}'\nuse_ema: {word}\nrandom_flip: {word}\n")
    settings = parse_args([str(path)])
    assert not (settings.data.class_conditional or settings.optimization.use_ema or settings.data.random_flip)
    path.write_text(f"mixed_precision: {word}\nclass_conditional: 'true'\n")
    settings = parse_args([str(path)])
    assert settings.machine.mixed_precision == "no" and settings.data.class_conditional


def test_resolved_settings_are_a_valid_yaml_file_with_the_same_meaning(tmp_path):
    from reg_diffusers.training.output import SETTINGS_FILE, write_settings

    for argv in (["--seed", "5", "--hub_token", "hf_secret"], ["--regularizer", "none", "--train_data_dir", "x"]):
        settings = parse_args(argv)
        write_settings(settings, tmp_path)
        assert "hf_secret" not in (tmp_path / SETTINGS_FILE).read_text()
        again = parse_args([str(tmp_path / SETTINGS_FILE)])
        assert again.values() | {"hub_token": settings.hub.hub_token} == settings.values()


@pytest.mark.parametrize(
    "content, message",
    [
        ("sead: 3", "unknown entry 'sead'; did you mean 'seed'"),
        ("seed: 3\nresolution: 8\nseed: 4", "'seed' is given twice: keep one of the two"),
        ("- 3", "entries like"),
        ("a: [", "not YAML"),
        ("seed: x", "--seed: 'x' is not a whole number"),
        ("config: x", "unknown entry 'config'"),
        ("class_conditional: maybe", "class_conditional: 'maybe' is neither true nor false"),
        ("output_dir: true", "output_dir: true is not a valid value of --output_dir"),
        ("seed: {a: 1}", "seed: {'a': 1} is not a valid value of --seed"),
    ],
)
def test_a_wrong_yaml_file_is_named(tmp_path, capsys, content, message):
    path = tmp_path / "run.yaml"
    path.write_text(content)
    assert message in error_of(capsys, str(path))


def test_one_weight_serves_all_and_none_means_none():
    loss = parse_args("--regularizer total_variation sparsity --reg_weight 0.2".split()).loss
    assert loss.reg_weight == (0.2, 0.2) and loss.reg_weighting == ("matched", "matched")
    loss = parse_args(["--regularizer", "none"]).loss
    assert loss.regularizer == () and not loss.compare


@pytest.mark.parametrize(
    "argv, message",
    [
        ("--reg_weight 0.1 0.2", "--reg_weight has 2 entries for 1 regularizers"),
        ("--regularizer a b --reg_weighting snr snr snr", "--reg_weighting has 3 entries for 2 regularizers"),
        ("--reg_weight -1", "--reg_weight: '-1' is neither a number of at least 0"),
        ("--reg_weight nan", "--reg_weight: 'nan' is neither a number of at least 0"),
        ("--reg_weight inf", "--reg_weight: 'inf' is neither a number of at least 0"),
        ("--regularizer none total_variation", "--regularizer none cannot be combined"),
        ("--resolution 0", "--resolution: '0' is neither a side such as 64 nor WIDTHxHEIGHT"),
        ("--adam_beta1 1", "--adam_beta1: '1' is not a number from 0 to below 1"),
        (
            "--train_data_dir x --rescale_betas_zero_snr",
            "--rescale_betas_zero_snr needs --prediction_type v_prediction",
        ),
        ("--prediction_type velocity", "--prediction_type: invalid choice"),
        ("--resolutoin 3", "unrecognized arguments: --resolutoin"),
        ("nowhere.yaml", "'nowhere.yaml' is neither a flag nor a readable YAML file"),
        ("--seed 1 run.yaml", "a YAML file must come before all flags"),
        ("--pretrained_model_name_or_path a --model_config_name_or_path b", "are mutually exclusive"),
        ("--reg_weight 1e300", "--reg_weight: 1e300 is above 1e+30: products with it would be infinite in float32"),
        ("--reg_weight auto:1e300", "--reg_weight: 1e300 is above 1e+30"),
        ("--reg_target total_variation=1e300", "--reg_target: 1e300 is above 1e+30"),
        (f"--seed {2**70}", f"--seed: '{2**70}' is not a whole number from 0 to 4294901760"),
        ("--ddpm_num_steps 1", "--ddpm_num_steps: '1' is not a whole number of at least 2"),
    ],
)
def test_what_cannot_work_is_one_line_with_the_flag_and_status_2(capsys, argv, message):
    assert message in error_of(capsys, *argv.split())


def test_help_shows_defaults_where_the_text_does_not_name_them():
    text = " ".join(build_parser().format_help().split())
    assert "(default: total_variation)" in text and "default: depends on resolution" in text


def test_defaults_survive_a_trip_through_yaml(tmp_path):
    path = tmp_path / "all.yaml"
    settings = parse_args([])
    lists = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.values().items()}
    path.write_text(yaml.safe_dump(lists))
    assert parse_args([str(path)]) == settings


@pytest.mark.parametrize(
    "argv",
    [
        [],
        "--regularizer total_variation --reg_weight 0.2".split(),
        "--regularizer none".split(),
        "--train_data_dir photos --regularizer none --no-use_ema --resume auto".split(),
        "--train_data_dir photos --regularizer a b --reg_weight auto:0.1 2 --reg_target b=0.9x --compare".split(),
        "--seed 3 --no-compare --max_train_time 90m --push_to_hub --hub_token hf_secret".split(),
    ],
)
def test_settings_can_be_written_as_the_flags_they_were_read_from(argv):
    settings = parse_args(argv)
    assert parse_args(as_flags(settings)) == settings


def test_settings_in_python_refuse_what_the_command_line_refuses():
    with pytest.raises(UsageError, match="--reg_weight has 2 entries for 1 regularizers"):
        LossSettings(reg_weight=(1.0, 2.0))
    with pytest.raises(UsageError, match="are mutually exclusive"):
        ModelSettings(model_config_name_or_path="a", pretrained_model_name_or_path="b")
    with pytest.raises(FrozenInstanceError):
        Settings().data.resolution = 8
