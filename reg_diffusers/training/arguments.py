"""The command line of train_reg.py.

Names and meanings are those of train_unconditional.py in diffusers, so that its command lines work here; what is new
concerns the regularizers. A YAML file may come first: its entries are read as if they were flags, and flags win.
"""

from __future__ import annotations

import argparse
import sys

from .config_file import flags_of_file
from .errors import UsageError
from .flag_values import auto, duration, fraction, natural, nonnegative, positive, positive_int
from .weight_rules import Target, parse_target, parse_weight

__all__ = ["add_objective_flags", "build_parser", "complete", "parse_args"]

# With no data of the user's own the run is a demonstration that ends within minutes on two cores.
DEMO_DEFAULTS = {
    "reg_weight": [0.05],
    "train_batch_size": 32,
    "max_train_steps": 400,
    "learning_rate": 2e-3,
    "lr_warmup_steps": 40,
    "preview_steps": 100,
    "ddpm_num_inference_steps": 25,
    "compare": True,
}
DEMO_MODEL_DEFAULTS = {"resolution": 16, "prediction_type": "v_prediction"}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The settings of a run: defaults, then the YAML file if there is one, then flags.

    Exits with status 2 and one line on a setting that cannot work.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser()
    try:
        if argv and not argv[0].startswith("-"):
            argv = flags_of_file(argv[0], parser) + argv[1:]
        args = parser.parse_args(argv)
        if args.dataset_name is None and args.train_data_dir is None:
            parser.set_defaults(**DEMO_DEFAULTS)
            if args.pretrained_model_name_or_path is None:
                parser.set_defaults(**DEMO_MODEL_DEFAULTS)
            args = parser.parse_args(argv)
        _check(args)
    except UsageError as error:
        parser.error(str(error))
    return args


def build_parser() -> argparse.ArgumentParser:
    """The parser behind `parse_args`, and behind the flags' page of the documentation."""
    parser = argparse.ArgumentParser(
        prog="train_reg.py",
        usage="accelerate launch train_reg.py [config.yaml] [flags]",
        description="Train a diffusion model with L = ||o - target||^2 + sum_k weight_k lambda_k(t) L'_k(x0_hat):"
        " x0_hat is the image that the prediction implies, L' any loss on images. Without flags: a demonstration on"
        " embedded images, with and without total variation, in a few minutes.",
        epilog="Most flags are those of diffusers' train_unconditional.py. Flags win over the YAML file.",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "config", nargs="?", help="YAML file with flags as keys, first of all arguments; a run writes its own"
    )
    for add_group in (_data, _model, _regularization, _optimization, _output, _hub):
        add_group(parser)
    return parser


def add_objective_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags about data, model and regularization to another command, which calls `complete` on its arguments.

    Their defaults are left open there, because those of a training depend on its data.
    """
    for add_group in (_data, _model, _regularization):
        add_group(parser)
    parser.set_defaults(**dict.fromkeys((*DEMO_DEFAULTS, *DEMO_MODEL_DEFAULTS)))


def complete(args: argparse.Namespace) -> argparse.Namespace:
    """What a training with these flags would have as settings, its other flags at their defaults.

    Raises:
        UsageError: a setting that cannot work.
    """
    settings = vars(args) | vars(build_parser().parse_args([]))
    if args.dataset_name is None and args.train_data_dir is None:
        settings |= DEMO_DEFAULTS | (DEMO_MODEL_DEFAULTS if args.pretrained_model_name_or_path is None else {})
    settings |= {name: value for name, value in vars(args).items() if value is not None}
    completed = argparse.Namespace(**settings)
    _check(completed)
    return completed


def _data(parser) -> None:
    add = parser.add_argument_group("data (none given: 5,000 embedded Fashion-MNIST images)").add_argument
    add(
        "--dataset_name", help="Hub id of a data set, or a local folder or file that `datasets` reads (parquet, arrow)"
    )
    add("--dataset_config_name", help="configuration of that data set, where it has several")
    add(
        "--train_data_dir",
        help="folder of images (subfolders are classes), or an .npy/.npz file of float fields (N, C, H, W)",
    )
    add("--cache_dir", help="where downloads and decoded images are kept; default: the Hugging Face cache")
    add("--image_column", help="column with the images; default: the first column of images")
    add("--label_column", help="column with the class labels; default: 'label'. Used with --class_conditional")
    add(
        "--resolution",
        type=positive_int,
        help="images are resized and cropped to this square; default: 64, a given model's own, 16 for the embedded"
        " data. Fields keep their size",
    )
    add(
        "--center_crop",
        action="store_true",
        help="accepted for compatibility: the crop is always central, because images are decoded only once",
    )
    add("--random_flip", action="store_true", help="mirror half of the images, left to right, anew in each epoch")
    add(
        "--conditioning_image_column",
        help="column with a second image of each row, which the network is given to make the first from it",
    )
    add(
        "--streaming",
        action="store_true",
        help="read images as they are needed instead of storing all of them decoded: for data that fit neither memory"
        " nor disk, such as a Hub id. Needs --max_train_steps where the number of images is not known",
    )
    add("--skip_bad_images", action="store_true", help="leave out images that cannot be decoded, and say how many")
    add("--dataloader_num_workers", type=natural, default=0, help="processes that fetch data; 0: the main process")


def _model(parser) -> None:
    add = parser.add_argument_group("model").add_argument
    add(
        "--model_config_name_or_path",
        help="config of a UNet2DModel (folder, file or Hub id) to train from scratch; default: one by resolution",
    )
    add(
        "--pretrained_model_name_or_path",
        help="fine-tune this pipeline or UNet2DModel (folder or Hub id); it keeps its config and prediction type",
    )
    add("--class_conditional", action="store_true", help="condition on the class label of each image")
    add(
        "--prediction_type",
        choices=["epsilon", "sample", "v_prediction", "flow_prediction"],
        type=lambda name: {"flow": "flow_prediction"}.get(name, name),
        help="what the network predicts: noise (epsilon, the default), image, velocity (in the demonstration), or"
        " the flow from image to noise (FlowMatchEulerDiscreteScheduler)",
    )
    add("--ddpm_num_steps", type=positive_int, help="noise levels of the training schedule; default: 1000")
    add(
        "--ddpm_beta_schedule",
        choices=["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"],
        help="the schedule's betas; default: linear",
    )
    add(
        "--rescale_betas_zero_snr",
        action="store_true",
        help="end the schedule in pure noise (arXiv:2305.08891); needs --prediction_type v_prediction or sample",
    )


def _regularization(parser) -> None:
    add = parser.add_argument_group("regularization").add_argument
    add(
        "--regularizer",
        nargs="+",
        default=["total_variation"],
        metavar="NAME",
        help="losses L' on x0_hat: built-in names, or my_module:MyReg from the current folder; 'none' trains a plain"
        " model",
    )
    add(
        "--reg_weight",
        nargs="+",
        type=_reg_weight,
        default=[0.1],
        metavar="WEIGHT",
        help="one for each regularizer, or one for all; auto:0.1 finds the weight at which the gradient of L' at the"
        " network's output is a tenth of the denoising loss's, and freezes it 100 steps after --lr_warmup_steps",
    )
    add(
        "--reg_target",
        nargs="+",
        type=_reg_target,
        metavar="NAME=VALUE",
        help="train for the smallest denoising loss with L' of x0_hat at most VALUE in the mean, or at most a multiple"
        " of what the data have, such as total_variation=0.9x; takes the place of that regularizer's --reg_weight",
    )
    add(
        "--reg_weighting",
        nargs="+",
        default=["matched"],
        metavar="NAME",
        help="how much each counts by noise level: matched, constant (the formula to the letter), snr, alpha_bar,"
        " truncated_snr, low_noise, or my_module:my_weighting; one for each regularizer, or one for all",
    )
    add(
        "--reg_balance",
        choices=["config", "pcgrad"],
        help="combine the gradients of all losses into one that points against none of them, before AdamW and clipping"
        " and to first order: by ConFIG (arXiv:2408.11104; weights then count for the length of an update alone) or"
        " PCGrad (arXiv:2001.06782; pair by pair): one backward pass for each loss, and memory for its gradients;"
        " needs pip install conflictfree",
    )
    add("--snr_gamma", type=positive, help="min-SNR weighting of the denoising loss, 5 is usual (arXiv:2303.09556)")
    add(
        "--compare",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="train a second, plain model on the same batches and noise, and compare the two: doubles the work."
        " On by default with the embedded data only",
    )


def _optimization(parser) -> None:
    add = parser.add_argument_group("optimization").add_argument
    add("--seed", type=natural, default=0, help="seed of weights, data order and noise")
    add("--train_batch_size", type=positive_int, default=16, help="images per process and step")
    add("--num_epochs", type=positive_int, default=100, help="passes over the data")
    add("--max_train_steps", type=positive_int, help="optimizer steps; overrides --num_epochs")
    add("--gradient_accumulation_steps", type=positive_int, default=1, help="batches per optimizer step")
    add("--learning_rate", type=positive, default=1e-4, help="of AdamW, after the warmup")
    add(
        "--lr_scheduler",
        choices=["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"],
        default="cosine",
        help="how the learning rate changes",
    )
    add("--lr_warmup_steps", type=natural, default=500, help="steps in which the learning rate rises")
    add("--adam_beta1", type=fraction, default=0.95, help="decay of AdamW's first moment")
    add("--adam_beta2", type=fraction, default=0.999, help="decay of AdamW's second moment")
    add("--adam_weight_decay", type=nonnegative, default=1e-6, help="AdamW's weight decay")
    add("--adam_epsilon", type=positive, default=1e-8, help="AdamW's denominator term")
    add(
        "--max_bad_steps",
        type=positive_int,
        default=10,
        help="stop after so many steps in a row whose loss or gradient is not finite, each of which is left out; or in"
        " which L' of an image is not finite, whose part is left out",
    )
    add("--max_grad_norm", type=positive, default=1.0, help="gradients are clipped to this norm")
    add(
        "--use_ema",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="sample from and save an exponential moving average of the weights",
    )
    add("--ema_inv_gamma", type=positive, default=1.0, help="inverse gamma of the average's warmup")
    add("--ema_power", type=positive, default=0.75, help="power of the average's warmup")
    add("--ema_max_decay", type=fraction, default=0.9999, help="largest decay of the average")
    add(
        "--mixed_precision",
        choices=["no", "fp16", "bf16"],
        help="precision of the network; default: what accelerate is configured for, else bf16 where the processor has"
        " it in hardware. L' always runs in float32",
    )
    add(
        "--attention",
        choices=["sdpa", "explicit"],
        help="how attention is computed: by PyTorch's fused kernel, or by explicit products of matrices; default:"
        " explicit in bf16 on a CPU where the matrix of a batch takes at most 128 MB in each layer, else sdpa",
    )
    add(
        "--compile",
        action="store_true",
        help="compile the network for the training (torch.compile): minutes at the start; no gain was measured on a"
        " CPU, and a GPU was not tried",
    )
    add(
        "--gradient_checkpointing",
        action="store_true",
        help="keep fewer activations and compute them again in the backward pass: less memory, longer steps",
    )
    add("--num_threads", type=positive_int, help="CPU threads per process; default: the cores shared evenly")
    add("--local_rank", type=int, help="accepted for compatibility: accelerate knows")
    add("--enable_xformers_memory_efficient_attention", action="store_true", help="use xformers' attention on a GPU")


def _output(parser) -> None:
    add = parser.add_argument_group("output").add_argument
    add("--output_dir", default="reg-ddpm-model", help="folder for the pipeline, samples, checkpoints and logs")
    add("--overwrite_output_dir", action="store_true", help="start anew in a folder that holds an earlier run")
    add("--eval_batch_size", type=positive_int, default=16, help="images in each grid of samples")
    add("--save_images_epochs", type=positive_int, default=10, help="epochs between grids of samples")
    add("--preview_steps", type=positive_int, help="steps between grids of samples, instead of epochs")
    add("--ddpm_num_inference_steps", type=positive_int, default=50, help="network calls per sample in grids (DDIM)")
    add("--save_model_epochs", type=positive_int, default=10, help="epochs between savings of the pipeline")
    add("--checkpointing_steps", type=positive_int, default=500, help="steps between checkpoints to resume from")
    add("--checkpoints_total_limit", type=positive_int, help="number of checkpoints kept; default: all")
    add("--resume_from_checkpoint", metavar="PATH", help="a checkpoint folder, or 'latest' of --output_dir")
    add(
        "--resume",
        dest="resume_from_checkpoint",
        metavar="auto",
        type=auto,
        help="auto: go on from the newest checkpoint of --output_dir that is whole, or start if there is none; so one"
        " and the same command starts a run and goes on with it",
    )
    add(
        "--allow_changed_settings",
        action="store_true",
        help="resume although settings that change the mathematics differ from those of the checkpoint",
    )
    add(
        "--max_train_time",
        type=duration,
        metavar="TIME",
        help="save and end after so long, such as 90m, 3h30m or 03:30:00; --resume auto goes on",
    )
    add(
        "--logger", choices=["tensorboard", "wandb", "trackio"], help="also log there; metrics.jsonl is always written"
    )
    add(
        "--profile",
        type=positive_int,
        metavar="N",
        help="profile N steps after a warm-up: prints where their time goes, and writes OUTPUT_DIR/profile/trace.json,"
        " which chrome://tracing and ui.perfetto.dev open",
    )
    add("--logging_dir", default="logs", help="folder in --output_dir for the logger's files")


def _hub(parser) -> None:
    add = parser.add_argument_group("Hub").add_argument
    add(
        "--push_to_hub",
        action="store_true",
        help="upload the pipeline with a card, samples and measurements; the token is checked before the training",
    )
    add(
        "--hub_strategy",
        choices=["end", "checkpoint"],
        default="end",
        help="end: upload once, at the end; checkpoint: also at each checkpoint, in the background",
    )
    add("--hub_token", help="token for the upload; default: the one `hf auth login` stored")
    add("--hub_model_id", help="repository to upload to; default: the output folder's name")
    add("--hub_private_repo", action="store_true", help="create the repository as private")
    add("--hub_license", help="licence in the card, such as apache-2.0 or mit; default: unknown, for only you know it")


class _HelpFormatter(argparse.HelpFormatter):
    """Adds each flag's default to its help, unless the text speaks of it or there is none."""

    def _get_help_string(self, action) -> str:
        silent = action.default in (None, False, argparse.SUPPRESS) or "default" in action.help
        shown = " ".join(map(str, action.default)) if isinstance(action.default, list) else action.default
        return action.help if silent else f"{action.help} (default: {shown})"


def _check(args: argparse.Namespace) -> None:
    """What no single flag can tell."""
    if args.config is not None:
        raise UsageError(f"unexpected argument {args.config!r}: a YAML file comes before all flags")
    if args.regularizer == ["none"] and args.reg_target:
        raise UsageError(f"--reg_target {args.reg_target[0]} is about a regularizer, and there is none")
    if args.regularizer == ["none"]:
        args.regularizer, args.reg_weight, args.reg_weighting, args.compare = [], [], [], False
    if "none" in args.regularizer:
        raise UsageError("--regularizer none stands alone: it means no regularizer at all")
    if args.hub_strategy == "checkpoint" and not args.push_to_hub:
        raise UsageError("--hub_strategy checkpoint is about uploads: add --push_to_hub")
    for flag in ("reg_weight", "reg_weighting"):
        values = getattr(args, flag)
        if len(values) == 1:
            setattr(args, flag, values * len(args.regularizer))
        elif len(values) != len(args.regularizer):
            raise UsageError(
                f"--{flag} has {len(values)} entries for {len(args.regularizer)} regularizers"
                f" ({' '.join(args.regularizer) or 'none'}): give one for each, or one for all"
            )
    if args.pretrained_model_name_or_path and args.model_config_name_or_path:
        raise UsageError("--pretrained_model_name_or_path and --model_config_name_or_path exclude each other")
    for flag in ("ddpm_beta_schedule", "rescale_betas_zero_snr"):
        if args.prediction_type == "flow_prediction" and getattr(args, flag):
            raise UsageError(f"--{flag} is about the betas of a schedule, which flow matching does not have; drop it")
    if args.rescale_betas_zero_snr and args.prediction_type in (None, "epsilon"):
        raise UsageError(
            "--rescale_betas_zero_snr needs --prediction_type v_prediction or sample: with zero terminal SNR predicted"
            " noise says nothing about the image"
        )


def _reg_weight(text: str):
    return _parsed(parse_weight, text)


def _reg_target(text: str) -> Target:
    return _parsed(parse_target, text)


def _parsed(parse, text: str):
    try:
        return parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
