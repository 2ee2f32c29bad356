"""The command line: names of diffusers' script, the YAML file, and one line for what cannot work."""

import pytest
import yaml

from reg_diffusers.training.arguments import build_parser, parse_args

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
    args = parse_args(
        "--dataset_name=huggan/flowers-102-categories --resolution=64 --center_crop --random_flip --output_dir=ddpm"
        " --train_batch_size=16 --num_epochs=50 --gradient_accumulation_steps=2 --use_ema --learning_rate=1e-4"
        " --lr_warmup_steps=500 --mixed_precision=no --prediction_type=sample --logger=tensorboard"
        " --regularizer total_variation --reg_weight 0.1".split()
    )
    assert (args.resolution, args.train_batch_size, args.num_epochs) == (64, 16, 50)
    assert args.use_ema and args.random_flip and not args.compare
    assert (args.prediction_type, args.gradient_accumulation_steps) == ("sample", 2)


def test_without_data_the_run_is_a_demonstration_and_flags_still_win():
    assert parse_args([]).compare and parse_args([]).resolution == 16
    args = parse_args(["--resolution", "8", "--no-compare"])
    assert args.resolution == 8 and not args.compare
    assert parse_args(["--train_data_dir", "x"]).max_train_steps is None


def test_a_yaml_file_is_read_first_and_flags_win(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "train_data_dir: photos\nseed: 3\nregularizer: [total_variation, sparsity]\nreg_weight: [1, 2.5]\n"
        "use_ema: false\nrandom_flip: true\ncenter_crop: false\nlogger: null\nlearning_rate: 1e-3\n"
    )
    args = parse_args([str(path), "--seed", "4"])
    assert (args.seed, args.regularizer, args.reg_weight) == (4, ["total_variation", "sparsity"], [1.0, 2.5])
    assert not args.use_ema and args.random_flip and not args.center_crop and args.logger is None
    assert args.learning_rate == 1e-3


def test_resolved_settings_are_a_valid_yaml_file_with_the_same_meaning(tmp_path):
    from reg_diffusers.training.output import SETTINGS_FILE, write_settings

    for argv in (["--seed", "5", "--hub_token", "hf_secret"], ["--regularizer", "none", "--train_data_dir", "x"]):
        args = parse_args(argv)
        write_settings(args, tmp_path)
        assert "hf_secret" not in (tmp_path / SETTINGS_FILE).read_text()
        again = parse_args([str(tmp_path / SETTINGS_FILE)])
        assert {**vars(again), "hub_token": args.hub_token} == vars(args)


@pytest.mark.parametrize(
    "content, message",
    [
        ("sead: 3", "unknown entry 'sead'; did you mean 'seed'"),
        ("- 3", "entries like"),
        ("a: [", "not YAML"),
        ("seed: x", "--seed: 'x' is not a whole number"),
        ("config: x", "unknown entry 'config'"),
    ],
)
def test_a_wrong_yaml_file_is_named(tmp_path, capsys, content, message):
    path = tmp_path / "run.yaml"
    path.write_text(content)
    assert message in error_of(capsys, str(path))


def test_one_weight_serves_all_and_none_means_none():
    args = parse_args("--regularizer total_variation sparsity --reg_weight 0.2".split())
    assert args.reg_weight == [0.2, 0.2] and args.reg_weighting == ["matched", "matched"]
    args = parse_args(["--regularizer", "none"])
    assert args.regularizer == [] and not args.compare


@pytest.mark.parametrize(
    "argv, message",
    [
        ("--reg_weight 0.1 0.2", "--reg_weight has 2 entries for 1 regularizers"),
        ("--regularizer a b --reg_weighting snr snr snr", "--reg_weighting has 3 entries for 2 regularizers"),
        ("--reg_weight -1", "--reg_weight: '-1' is not a number of at least 0"),
        ("--reg_weight nan", "--reg_weight: 'nan' is not a number of at least 0"),
        ("--reg_weight inf", "--reg_weight: 'inf' is not a number of at least 0"),
        ("--regularizer none total_variation", "--regularizer none stands alone"),
        ("--resolution 0", "--resolution: '0' is not a whole number above 0"),
        ("--adam_beta1 1", "--adam_beta1: '1' is not a number from 0 to below 1"),
        (
            "--train_data_dir x --rescale_betas_zero_snr",
            "--rescale_betas_zero_snr needs --prediction_type v_prediction",
        ),
        ("--prediction_type velocity", "--prediction_type: invalid choice"),
        ("--resolutoin 3", "unrecognized arguments: --resolutoin"),
        ("nowhere.yaml", "'nowhere.yaml' is neither a flag nor a YAML file"),
        ("--seed 1 run.yaml", "a YAML file comes before all flags"),
        ("--pretrained_model_name_or_path a --model_config_name_or_path b", "exclude each other"),
    ],
)
def test_what_cannot_work_is_one_line_with_the_flag_and_status_2(capsys, argv, message):
    assert message in error_of(capsys, *argv.split())


def test_help_shows_defaults_where_the_text_does_not_name_them():
    text = " ".join(build_parser().format_help().split())
    assert "(default: total_variation)" in text and "default: one by resolution" in text


def test_defaults_survive_a_trip_through_yaml(tmp_path):
    path = tmp_path / "all.yaml"
    settings = {name: value for name, value in vars(parse_args([])).items() if name != "config"}
    path.write_text(yaml.safe_dump(settings))
    assert vars(parse_args([str(path)])) == vars(parse_args([]))
