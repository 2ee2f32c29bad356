"""Writes the card of LoRA weights from the files in their folder, between the marks of `card`."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import ModelCardData

from ..runs.measurement import as_text
from ..runs.run_folder import CONFIG_FILE, LORA_FILE, VALIDATION_FILE
from .card import BEGIN, END, as_card, read_json, shown_pictures, write_merged
from .card_text import block, objective_section, reproduction_section
from .held_out_text import held_out_text

__all__ = ["write_lora_card"]


def write_lora_card(folder: Path, repo_id: str, license: str | None = None) -> None:
    """Writes README.md: the card of the weights in this folder, merged with the present README.md.

    Its metadata name the base model if that is on the Hub.

    Args:
        folder: output folder of a LoRA training.
        repo_id: repository or folder of the weights.
        license: licence for the metadata; "unknown" by default.

    Raises:
        ValueError: README.md is a link out of the folder, or its metadata cannot be read.
    """
    record = read_json(folder / CONFIG_FILE)
    hub_id = (record.get("data") or {}).get("hub_id")
    data = ModelCardData(
        license=license or "unknown",
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["diffusers", "text-to-image", "lora", "reg_diffusers"],
        datasets=[hub_id] if hub_id else None,
        base_model=record.get("base_model"),
    )
    text = _text(record, held_out_text(read_json(folder / VALIDATION_FILE)), shown_pictures(folder), repo_id)
    write_merged(folder, as_card(data, f"{BEGIN}\n\n{text}\n\n{END}"))


def _text(record: dict, held_out: str, pictures: dict[str, str], repo_id: str) -> str:
    base, data = record.get("base_model"), record.get("data") or {}
    named = f"[{base}](https://huggingface.co/{base})" if base else "a pipeline on the author's machine"
    images = f", trained on {data['images']:,} images of {as_text(data['name'])}" if data else ""
    usage = [
        "from diffusers import DiffusionPipeline",
        "",
        f"pipeline = DiffusionPipeline.from_pretrained({json.dumps(base or 'the pipeline that was fine-tuned')})",
        f"pipeline.load_lora_weights({json.dumps(repo_id)})",
        'pipeline("your text").images[0].save("sample.png")',
    ]
    sections = [
        f"# {as_text(repo_id.rstrip('/').split('/')[-1])}",
        f"LoRA weights for {named}{images}: `{LORA_FILE}`.",
        objective_section(record.get("objective")),
        held_out,
        *(f"![{shown}]({path})" for shown, path in pictures.items()),
        "## Usage",
        block("python", *usage),
        reproduction_section(record),
    ]
    return "\n\n".join(section for section in sections if section)
