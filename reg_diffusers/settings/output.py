"""Settings of the output: where a run writes, when it saves and samples, and when it ends."""

from __future__ import annotations

from dataclasses import dataclass

from .flag_values import duration, inner_folder, natural, positive_int
from .flags import flag

__all__ = ["OutputSettings"]


@dataclass(frozen=True)
class OutputSettings:
    """The output folder, and the intervals of saved models, checkpoints and sample grids."""

    output_dir: str = flag(
        "reg-ddpm-model", "folder for the pipeline, samples, checkpoints and logs", mathematics=False
    )
    overwrite_output_dir: bool = flag(
        False, "start again in a folder that holds an earlier run", mathematics=False, kept=False
    )
    eval_batch_size: int = flag(16, "images in each grid of samples", parse=positive_int, mathematics=False)
    save_images_epochs: int = flag(10, "epochs between grids of samples", parse=positive_int, mathematics=False)
    validation_prompts: tuple[str, ...] | None = flag(
        None,
        "texts of the grids of samples of a text-to-image model, in turn; default: those of the first images",
        metavar="TEXT",
        many=True,
        mathematics=False,
    )
    preview_steps: int | None = flag(
        None, "steps between grids of samples, instead of epochs", parse=positive_int, mathematics=False
    )
    ddpm_num_inference_steps: int = flag(
        50, "network calls per sample in grids (DDIM)", parse=positive_int, mathematics=False
    )
    save_model_epochs: int = flag(10, "epochs between saves of the pipeline", parse=positive_int, mathematics=False)
    checkpointing_steps: int = flag(
        500, "steps between checkpoints to resume from", parse=positive_int, mathematics=False
    )
    checkpoints_total_limit: int = flag(3, "number of checkpoints kept; 0 keeps all", parse=natural, mathematics=False)
    resume_from_checkpoint: str | None = flag(
        None,
        "checkpoint folder to resume from, or 'latest' for the newest in --output_dir",
        metavar="PATH",
        mathematics=False,
        kept=False,
    )
    allow_changed_settings: bool = flag(
        False,
        "resume even if settings that affect the mathematics differ from those of the checkpoint",
        mathematics=False,
        kept=False,
    )
    max_train_time: int | None = flag(
        None,
        "save and end after this time, such as 90m, 3h30m or 03:30:00; --resume auto continues",
        parse=duration,
        metavar="TIME",
        mathematics=False,
    )
    logger: str | None = flag(
        None,
        "additional logger, of numbers, pictures and settings; metrics.jsonl is always written",
        choices=["tensorboard", "wandb", "trackio"],
        mathematics=False,
    )
    tracker_project_name: str = flag(
        "train_reg",
        "project in wandb and trackio; the run there has the name of the output folder, and TensorBoard has folders",
        metavar="NAME",
        mathematics=False,
    )
    quiet: bool = flag(
        False,
        "hide progress bars and messages; warnings, errors and the result are shown",
        mathematics=False,
        kept=False,
    )
    verbose: bool = flag(False, "also print the logged numbers, one line each time", mathematics=False, kept=False)
    profile: int | None = flag(
        None,
        "profile N steps after a warm-up: print the time of each part, and write OUTPUT_DIR/profile/trace.json for"
        " chrome://tracing or ui.perfetto.dev",
        parse=positive_int,
        metavar="N",
        mathematics=False,
        kept=False,
    )
    logging_dir: str = flag(
        "logs", "folder in --output_dir for the logger's files", parse=inner_folder, mathematics=False
    )
