"""Upload of a finished run to the Hugging Face Hub."""

from __future__ import annotations

import argparse
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from .evaluation.comparison import markdown_table, read_comparison
from .training.errors import UsageError

__all__ = ["check_upload", "upload_run"]

_NOT_UPLOADED = ("checkpoint-*", "plain/*", ".*")


def check_upload(args: argparse.Namespace) -> None:
    """Asks the Hub who we are, so that a wrong token is found before the training and not after it.

    Raises:
        UsageError: --push_to_hub without a token that the Hub knows, or without a Hub in reach.
    """
    if not args.push_to_hub:
        return
    try:
        validate_repo_id(_repo_name(args))
        HfApi(token=args.hub_token).whoami()
    except HFValidationError as error:
        raise UsageError(f"--hub_model_id: {error}") from None
    except LocalTokenNotFoundError:
        raise UsageError("--push_to_hub: no token: run `hf auth login`, or set HF_TOKEN") from None
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "no answer")
        raise UsageError(f"--push_to_hub: the Hub does not accept the token ({status}): run `hf auth login`") from None
    except OSError as error:
        raise UsageError(f"--push_to_hub: the Hub cannot be reached ({type(error).__name__})") from error


def upload_run(args: argparse.Namespace, output_dir: Path) -> str:
    """Writes the model card and uploads pipeline, samples, comparison and settings; returns what to tell the user.

    A failure is told with the command that uploads later: the run itself is on disk.
    """
    api = HfApi(token=args.hub_token)
    name = _repo_name(args)
    ignored = [*_NOT_UPLOADED, f"{args.logging_dir}/*"]
    try:
        repo_id = api.create_repo(name, private=args.hub_private_repo or None, exist_ok=True).repo_id
        model_card(args, output_dir, repo_id).save(output_dir / "README.md")
        api.upload_folder(
            repo_id=repo_id,
            folder_path=output_dir,
            ignore_patterns=ignored,
            commit_message="Upload a training run",
        )
    except (HfHubHTTPError, OSError) as error:
        excluded = " ".join(f"--exclude '{pattern}'" for pattern in ignored)
        command = f"hf upload {name} {output_dir} {excluded}"
        return f"upload      failed ({type(error).__name__}); upload it later with: {command}"
    return f"uploaded    {api.endpoint}/{repo_id}"


def _repo_name(args: argparse.Namespace) -> str:
    return args.hub_model_id or Path(args.output_dir).resolve().name


def model_card(args: argparse.Namespace, output_dir: Path, repo_id: str) -> ModelCard:
    """What was optimised, what came out, how to use it and how to repeat it."""
    tags = ["diffusers", "unconditional-image-generation", "reg_diffusers"]
    is_hub_data = args.dataset_name is not None and not Path(args.dataset_name).exists()
    data = ModelCardData(
        library_name="diffusers",
        tags=tags,
        datasets=[args.dataset_name] if is_hub_data else None,
        base_model=_hub_id(args.pretrained_model_name_or_path),
    )
    weighted = zip(args.reg_weight, args.reg_weighting, args.regularizer, strict=True)
    objective = " + ".join(
        ["denoising loss", *(f"{weight:g} · {gate}(t) · {name}" for weight, gate, name in weighted)]
    )
    sections = [
        f"---\n{data.to_yaml()}\n---\n# {repo_id.split('/')[-1]}",
        f"A diffusion model trained with reg_diffusers: {objective}, with the extra losses on the denoised image.",
        _comparison_section(output_dir),
        f'```python\nfrom diffusers import DDPMPipeline\n\nDDPMPipeline.from_pretrained("{repo_id}")().images[0]\n```',
        "`reg_settings.yaml` repeats the training: `accelerate launch train_reg.py reg_settings.yaml`.",
    ]
    return ModelCard("\n\n".join(section for section in sections if section) + "\n")


def _comparison_section(output_dir: Path) -> str:
    path = output_dir / "comparison.json"
    if not path.is_file():
        return ""
    table = markdown_table(read_comparison(path))
    return f"{table}\n\n![data, samples without and with the extra losses](comparison.png)"


def _hub_id(path: str | None) -> str | None:
    return None if path is None or Path(path).exists() else path
