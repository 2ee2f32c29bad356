"""Writes the card of a text-to-image model, LoRA weights or a pipeline, from its folder; uploads either."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from huggingface_hub import HfApi, ModelCard, ModelCardData
from safetensors.torch import load_file

from ..runs.measurement import as_text
from ..runs.run_folder import LORA_FILE
from .card import BEGIN, END, as_card, copy_evidence, facts_of, read_json, results_of, write_card, write_merged
from .card_text import CardFacts, evidence_section, reproduction_section
from .data_text import data_text
from .objective_text import block, objective_section
from .repository import STALE, check_kind, check_source, fetch_evidence, open_repository, remote_card

__all__ = ["push_text_to_image", "write_card_of_run"]

_TASK = "text-to-image"


def write_card_of_run(folder: Path, repo_id: str, old: ModelCard | None = None, license: str | None = None) -> None:
    """Writes README.md: the card of the model in this folder, with that of text-to-image models; see `write_card`.

    Raises:
        ValueError: README.md is a link out of the folder, or its metadata cannot be read.
    """
    if (folder / LORA_FILE).is_file() or (folder / "tokenizer").is_dir():
        _write_card(folder, repo_id, facts_of(folder), old, license)
    else:
        write_card(folder, repo_id, old, license)


def push_text_to_image(
    folder: Path,
    repo_id: str,
    source: str | None,
    about: dict,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    *,
    create_pr: bool = False,
) -> str:
    """Uploads LoRA weights, or a whole pipeline, with a card; returns the URL of the commit.

    Args:
        folder: folder of the weights; the card is written there.
        repo_id: user/name, or a name of the token's user.
        source: output folder of the training, of which the records are uploaded if it has these weights; or None.
        about: what is known of them without a record, as in reg_config.json.
        commit_message, private, token, create_pr: see `RegDDPMPipeline.push_to_hub`.

    Raises:
        ValueError: as in `repository.open_repository` and `check_kind`, or there is a link out of `source`.
        HfHubHTTPError: there is no network, or no write access.
    """
    api, is_adapter = HfApi(token=token), (folder / LORA_FILE).is_file()
    check_source(source)
    repo_id = open_repository(api, repo_id, private, write=not create_pr)
    check_kind(api, repo_id, is_adapter=is_adapter)
    if source and not is_adapter:
        fetch_evidence(api, source, folder)
    elif source and _holds(Path(source), folder / LORA_FILE):
        copy_evidence(Path(source), folder)
    facts = facts_of(folder)
    _write_card(folder, repo_id, replace(facts, record={**about, **facts.record}), remote_card(api, repo_id))
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        commit_message=commit_message or f"Upload {'LoRA weights' if is_adapter else 'the pipeline'}",
        create_pr=create_pr,
        delete_patterns=list(STALE),
    )


def _holds(source: Path, weights: Path) -> bool:
    """Whether a folder holds the same LoRA weights, which peft writes with another header each time."""
    if not (source / LORA_FILE).is_file():
        return False
    there, here = load_file(source / LORA_FILE), load_file(weights)
    return there.keys() == here.keys() and all(torch.equal(there[name], here[name]) for name in here)


def _write_card(
    folder: Path,
    repo_id: str,
    facts: CardFacts,
    old: ModelCard | None,
    license: str | None = None,
) -> None:
    is_lora = (folder / LORA_FILE).is_file()
    pipeline = "" if is_lora else read_json(folder / "model_index.json").get("_class_name", "")
    text = f"{BEGIN}\n\n{_text(facts, repo_id, pipeline)}\n\n{END}"
    write_merged(folder, as_card(_metadata(facts, repo_id, license, is_lora=is_lora), text), old)


def _metadata(facts: CardFacts, repo_id: str, license: str | None, *, is_lora: bool) -> ModelCardData:
    """Returns the metadata; the base model is named if it is on the Hub."""
    record, prompts = facts.record, _prompts(facts)
    hub_id = (record.get("data") or {}).get("hub_id")
    results = results_of(facts, _TASK)
    return ModelCardData(
        license=license or "unknown",
        library_name="diffusers",
        pipeline_tag=_TASK,
        tags=["diffusers", _TASK, *(["lora"] if is_lora else []), "reg_diffusers"],
        datasets=[hub_id] if hub_id else None,
        base_model=record.get("base_model"),
        widget=[{"text": prompt} for prompt in prompts] or None,
        model_name=repo_id.split("/")[-1] if results else None,
        eval_results=results,
    )


def _prompts(facts: CardFacts) -> list[str]:
    return (facts.record.get("data") or {}).get("prompts") or []


def _text(facts: CardFacts, repo_id: str, pipeline: str) -> str:
    record, prompts = facts.record, _prompts(facts)
    base, data = record.get("base_model"), record.get("data") or {}
    named = f"[{base}](https://huggingface.co/{base})" if base else "a pipeline on the author's machine"
    number = "a stream of" if data and data["images"] is None else f"{data['images']:,}" if data else ""
    _, height, width = data.get("shape") or (None, None, None)
    of_size = f" at {height} x {width}" if height else ""
    images = f", trained on {number} images of {as_text(data['name'])}{of_size}" if data else ""
    about_data = data_text(data, draws="the code below draws")
    lora = [
        f"pipeline = DiffusionPipeline.from_pretrained({json.dumps(base or 'the pipeline that was fine-tuned')})",
        f"pipeline.load_lora_weights({json.dumps(repo_id)})",
    ]
    loading = [f"pipeline = DiffusionPipeline.from_pretrained({json.dumps(repo_id)})"] if pipeline else lora
    size = f", height={height}, width={width}" if height else ""
    usage = [
        "from diffusers import DiffusionPipeline",
        "",
        *loading,
        f'pipeline({json.dumps(prompts[0] if prompts else "your text")}{size}).images[0].save("sample.png")',
    ]
    whole = f"A `{pipeline}`, fine-tuned as a whole from {named}{images}."
    what = whole if pipeline else f"LoRA weights for {named}{images}: `{LORA_FILE}`."
    regularized = [
        "from reg_diffusers import RegTextToImagePipeline",
        "",
        "pipeline = RegTextToImagePipeline.of(pipeline)",
        f"output = pipeline(prompt={json.dumps(prompts[0] if prompts else 'your text')}, num_inference_steps=50)",
    ]
    sections = [
        f"# {as_text(repo_id.rstrip('/').split('/')[-1])}",
        f"{what} {about_data}".rstrip(),
        objective_section(record.get("objective")),
        evidence_section(facts),
        "## Usage",
        block("python", *usage),
        "With reg_diffusers, for guidance by a loss and scores:",
        block("python", *regularized),
        f"Texts of the training, for example: {'; '.join(map(as_text, prompts))}." if prompts else "",
        reproduction_section(record),
    ]
    return "\n\n".join(section for section in sections if section)
