"""Writes the model card of a saved pipeline from the files in its folder.

The generated text is between two marks. Text outside them and unknown metadata belong to the user; an update of the
card keeps them.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..runs.measurement import COMPARISON_FILE, read_comparison
from ..runs.run_folder import (
    ABANDONED,
    CARD_FILE,
    CONFIG_FILE,
    EVIDENCE,
    VALIDATION_FILE,
    VALIDATION_PICTURE,
    files_left,
)
from ..runtime.files import write_whole
from ..runtime.links import check_links, is_part_of
from .card_text import CardFacts, card_text
from .model_index import saved_class_names, saved_normalization

__all__ = [
    *("BEGIN", "END", "as_card", "copy_evidence", "facts_of", "merge_cards", "model_card", "read_card"),
    *("read_json", "results_of", "shown_pictures", "write_card", "write_merged"),
]

BEGIN = "<!-- reg_diffusers: written anew at each upload down to the mark at its end; your own text goes outside -->"
END = "<!-- reg_diffusers: end -->"
_TASK = "unconditional-image-generation"
# Names of results; the name of a loss follows the prefix.
_LOSS = "L' "
_DISTANCE = "sliced Wasserstein distance"
_DENOISING = "denoising loss"


def model_card(folder: Path, repo_id: str, license: str | None = None) -> ModelCard:
    """Builds the card for a folder that `RegDDPMPipeline.save_pretrained` or train_reg.py wrote.

    Args:
        folder: the pipeline, with any evidence of a run.
        repo_id: the repository that the code in the card loads.
        license: the licence for the metadata; "unknown" by default.
    """
    facts = facts_of(folder)
    return as_card(_metadata(facts, repo_id, license), f"{BEGIN}\n\n{card_text(facts, repo_id)}\n\n{END}")


def write_card(folder: Path, repo_id: str, old: ModelCard | None = None, license: str | None = None) -> None:
    """Writes README.md: the card for this folder, merged with `old` or with the present README.md.

    If README.md is a link to another file of the folder, it replaces the link and leaves that file unchanged.

    Raises:
        ValueError: if README.md is a link out of the folder, or if its metadata cannot be read.
    """
    write_merged(folder, model_card(folder, repo_id, license), old)


def write_merged(folder: Path, card: ModelCard, old: ModelCard | None = None) -> None:
    """Writes a card to README.md, merged with `old` or with the present README.md; see `write_card`.

    Raises:
        ValueError: as for `write_card`.
    """
    path = folder / CARD_FILE
    if path.is_symlink() and not is_part_of(str(path), str(folder)):
        raise ValueError(f"{path} is a link out of {folder}, and writing would follow it: remove the link")
    if old is None and path.is_file():
        old = read_card(path)
    write_whole(path, merge_cards(card, old).save)


def read_card(path: Path) -> ModelCard:
    """Reads a card, which may be written by hand.

    Raises:
        ValueError: if its metadata cannot be read.
    """
    try:
        return ModelCard(path.read_text(encoding="utf-8-sig"), ignore_metadata_errors=True)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, TypeError) as error:
        raise ValueError(f"the metadata of its {path.name} cannot be read: {' '.join(str(error).split())}") from error


def copy_evidence(source: Path, target: Path) -> None:
    """Copies the evidence from the folder of a run, including its card; copies nothing from any other folder.

    Raises:
        ValueError: if a part of it is a link out of the folder.
    """
    if not (source / CONFIG_FILE).is_file():
        return
    check_links(source, EVIDENCE)
    for path in (source / name for name in EVIDENCE):
        if path.is_dir():
            ignored = shutil.ignore_patterns(f"{ABANDONED}*", ".*")
            shutil.copytree(path, target / path.name, ignore=ignored, dirs_exist_ok=True)
        elif path.is_file():
            shutil.copy2(path, target / path.name)


def merge_cards(new: ModelCard, old: ModelCard | None) -> ModelCard:
    """Adds the user's own text, metadata and results of the old card to the new one; tags are not repeated."""
    if old is None:
        return new
    kept, metadata = old.data.to_dict(), new.data.to_dict()
    for data in (kept, metadata):
        data.pop("model-index", None)
    if metadata["license"] == "unknown":
        metadata["license"] = kept.get("license") or "unknown"
    metadata["tags"] = list(dict.fromkeys([*metadata["tags"], *(kept.get("tags") or [])]))
    results = [*(new.data.eval_results or []), *filter(_is_foreign, old.data.eval_results or [])]
    if results:
        metadata |= {"eval_results": results, "model_name": new.data.model_name or old.data.model_name}
    before, mark, rest = old.text.partition(BEGIN)
    after = rest.partition(END)[2] if mark else ""
    text = "\n\n".join(part for part in (before.strip(), new.text.strip(), after.strip()) if part)
    return as_card(ModelCardData(**{**kept, **metadata}, ignore_metadata_errors=True), text)


def as_card(data: ModelCardData, text: str) -> ModelCard:
    """Builds a card from metadata and Markdown text."""
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n", ignore_metadata_errors=True)


def _metadata(facts: CardFacts, repo_id: str, license: str | None) -> ModelCardData:
    hub_id = facts.record.get("data", {}).get("hub_id")
    conditional = ["conditional-image-generation"] if facts.by_class or facts.by_image else []
    results = results_of(facts, _TASK)
    return ModelCardData(
        license=license or "unknown",
        library_name="diffusers",
        pipeline_tag=_TASK,
        tags=["diffusers", _TASK, "reg_diffusers", *conditional],
        datasets=[hub_id] if hub_id else None,
        base_model=facts.record.get("base_model"),
        model_name=repo_id.split("/")[-1] if results else None,
        eval_results=results,
    )


def results_of(facts: CardFacts, task: str) -> list[EvalResult] | None:
    """Returns the last row of the table, that of the model, for the model-index; None without measurements.

    Args:
        facts: the facts about the model.
        task: the task of the Hub.
    """
    if not facts.rows:
        return None
    *_, measured = facts.rows.values()
    values = {f"{_LOSS}{name}": value for name, value in measured.terms.items()}
    values |= {_DISTANCE: measured.distance, _DENOISING: measured.denoising_loss}
    data = facts.record.get("data", {})
    return [
        EvalResult(
            task_type=task,
            dataset_type=data.get("hub_id") or "unpublished",
            dataset_name=data.get("name") or "unknown",
            metric_type=name.removeprefix(_LOSS).replace(" ", "_"),
            metric_name=name,
            metric_value=round(value, 6),
        )
        for name, value in values.items()
        if value is not None and math.isfinite(value)
    ]


def _is_foreign(result: EvalResult) -> bool:
    """Whether a result was not written by `results_of`, for this or the previous model."""
    name = result.metric_name or ""
    return not (name.startswith(_LOSS) or name in (_DISTANCE, _DENOISING))


def facts_of(folder: Path) -> CardFacts:
    """Reads the facts about a model from its folder."""
    comparison, index = folder / COMPARISON_FILE, read_json(folder / "model_index.json")
    record = read_json(folder / CONFIG_FILE)
    names = saved_class_names(index) or (record.get("data") or {}).get("classes") or []
    return CardFacts(
        record=record,
        unet=read_json(folder / "unet" / "config.json") or _as_unet(folder, len(names), record),
        scheduler=read_json(folder / "scheduler" / "scheduler_config.json"),
        vae=read_json(folder / "vqvae" / "config.json") or read_json(folder / "vae" / "config.json"),
        is_field=saved_normalization(index) is not None,
        class_names=names,
        settings=read_json(comparison),
        rows=read_comparison(comparison) if comparison.is_file() else {},
        pictures=shown_pictures(folder),
        validation=read_json(folder / VALIDATION_FILE),
    )


def _as_unet(folder: Path, classes: int, record: dict) -> dict:
    """Returns the config of a DiT with the entries of a UNet2DModel; empty if there is none."""
    config = read_json(folder / "transformer" / "config.json")
    if "num_embeds_ada_norm" not in config:
        return config
    has_no_class = bool((record.get("data") or {}).get("condition_dropout"))
    embeddings = (classes or config["num_embeds_ada_norm"]) + has_no_class
    return {**config, "out_channels": config["in_channels"], "num_class_embeds": embeddings}


def shown_pictures(folder: Path) -> dict[str, str]:
    """Returns the paths of the figures of a card, relative to its folder, by caption."""
    shown = {"Data and samples with their numbers": "comparison.png", "Loss against distance": "evaluation.png"}
    found = {text: name for text, name in shown.items() if (folder / name).is_file()}
    grids = sorted(files_left(folder, lambda left: left.evidence and left.folder == "samples"), key=_number)
    found = found or ({"Samples": f"samples/{grids[-1].name}"} if grids else {})
    is_validated = (folder / VALIDATION_PICTURE).is_file()
    return found | ({"Losses of training and held-out images": VALIDATION_PICTURE} if is_validated else {})


def _number(path: Path) -> int:
    return int("".join(filter(str.isdigit, path.stem)))


def read_json(path: Path) -> dict:
    """Reads a JSON file; empty if there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
