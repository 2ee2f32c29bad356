"""The model card of a saved pipeline, written from the files in its folder alone.

It says what was optimised, what came out, how to use it and how to make it again. It stands between two marks; text
outside of them, and metadata that it does not know, belong to the user and stay as they are when it is written anew.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import EntryNotFoundError

from .measurement import Measurement, markdown_table, read_comparison
from .model_index import saved_normalization

__all__ = ["CONFIG_FILE", "EVIDENCE", "copy_evidence", "merge_cards", "model_card", "remote_card", "write_card"]

CONFIG_FILE = "reg_config.json"
COMPARISON_FILE = "comparison.json"
# What a run leaves beside its pipeline, and an upload of the pipeline takes along.
EVIDENCE = (CONFIG_FILE, "reg_settings.yaml", "metrics.jsonl", COMPARISON_FILE, "comparison.png", "samples")

_BEGIN = "<!-- reg_diffusers: written anew at each upload down to the mark at its end; your own text goes outside -->"
_END = "<!-- reg_diffusers: end -->"
_TASK = "unconditional-image-generation"
_OUTPUTS = {"epsilon": "eps", "sample": "x_0", "v_prediction": "v", "flow_prediction": "eps - x_0"}


def model_card(folder: Path, repo_id: str, license: str | None = None) -> ModelCard:
    """The card for a folder that `RegDDPMPipeline.save_pretrained` or train_reg.py wrote.

    Args:
        folder: the pipeline, with as much of `EVIDENCE` as there is.
        repo_id: where it can be loaded from, named in its code.
        license: for the metadata; "unknown" unless given.
    """
    config, rows = _read_json(folder / CONFIG_FILE), _rows(folder)
    sections = [
        _BEGIN,
        f"# {repo_id.split('/')[-1]}",
        _introduction(folder, config),
        _objective(config),
        _evidence(folder, rows),
        _usage(folder, config, repo_id),
        _reproduction(config),
        _END,
    ]
    metadata = _metadata(folder, config, rows, repo_id, license)
    body = "\n\n".join(section for section in sections if section)
    return ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{body}\n")


def write_card(folder: Path, repo_id: str, old: ModelCard | None = None, license: str | None = None) -> None:
    """Writes README.md: the card for this folder, merged with `old`, or else with the README.md that is there."""
    path = folder / "README.md"
    if old is None and path.is_file():
        old = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True)
    merge_cards(model_card(folder, repo_id, license), old).save(path)


def remote_card(api: HfApi, repo_id: str) -> ModelCard | None:
    """The card that a repository has, if it has one."""
    try:
        path = api.hf_hub_download(repo_id, "README.md")
    except EntryNotFoundError:
        return None
    return ModelCard(Path(path).read_text(encoding="utf-8"), ignore_metadata_errors=True)


def copy_evidence(source: Path, target: Path) -> None:
    """Copies what there is of `EVIDENCE` from the folder of a run; from any other folder, nothing."""
    if not (source / CONFIG_FILE).is_file():
        return
    for path in (source / name for name in EVIDENCE):
        if path.is_dir():
            shutil.copytree(path, target / path.name, dirs_exist_ok=True)
        elif path.is_file():
            shutil.copy2(path, target / path.name)


def merge_cards(new: ModelCard, old: ModelCard | None) -> ModelCard:
    """The new card with the user's own text and metadata of the one that is there; tags occur once."""
    if old is None:
        return new
    kept, metadata = old.data.to_dict(), new.data.to_dict()
    tags = list(dict.fromkeys([*metadata.pop("tags"), *(kept.get("tags") or [])]))
    if metadata.get("license") == "unknown":
        metadata["license"] = kept.get("license") or "unknown"
    before, mark, rest = old.text.partition(_BEGIN)
    after = rest.partition(_END)[2] if mark else ""
    text = f"{before.strip()}\n\n{new.text.strip()}\n\n{after.strip()}".strip()
    data = ModelCardData(**{**kept, **metadata, "tags": tags}, ignore_metadata_errors=True)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n")


def _metadata(folder: Path, config: dict, rows: dict, repo_id: str, license: str | None) -> ModelCardData:
    data = config.get("data", {})
    conditional = ["conditional-image-generation"] if _is_conditional(folder) else []
    return ModelCardData(
        license=license or "unknown",
        library_name="diffusers",
        pipeline_tag=_TASK,
        tags=["diffusers", _TASK, "reg_diffusers", *conditional],
        datasets=[data["hub_id"]] if data.get("hub_id") else None,
        base_model=config.get("base_model"),
        model_name=repo_id.split("/")[-1] if rows else None,
        eval_results=_eval_results(data, rows),
    )


def _eval_results(data: dict, rows: dict[str, Measurement]) -> list[EvalResult] | None:
    """The last row of the table, which is the model's, for the model-index."""
    if not rows:
        return None
    *_, measured = rows.values()
    values = {f"L' {name}": value for name, value in measured.terms.items()}
    values["sliced Wasserstein distance"] = measured.distance
    if measured.denoising_loss is not None:
        values["denoising loss"] = measured.denoising_loss
    return [
        EvalResult(
            task_type=_TASK,
            dataset_type=data.get("hub_id") or "unpublished",
            dataset_name=data.get("name") or "unknown",
            metric_type=name.replace("L' ", "").replace(" ", "_"),
            metric_name=name,
            metric_value=round(value, 6),
        )
        for name, value in values.items()
    ]


def _introduction(folder: Path, config: dict) -> str:
    unet = _read_json(folder / "unet" / "config.json")
    data = config.get("data", {})
    size = unet.get("sample_size")
    size = " x ".join(map(str, size if isinstance(size, list) else [size, size]))
    kind = "fields" if _is_field(folder) else "images"
    source = f", trained on {data['images']:,} {kind} of {data['name']}" if data else ""
    by = " by " + " and by ".join(conditions) if (conditions := _conditions(folder)) else ""
    return f"A diffusion model of {size} {kind}{by} ({unet.get('_class_name', 'UNet2DModel')}){source}."


def _objective(config: dict) -> str:
    objective = config.get("objective")
    if not objective:
        return ""
    output = _OUTPUTS[objective["prediction_type"]]
    weighting = f"min-SNR-{objective['snr_gamma']:g} weighted " if objective.get("snr_gamma") else ""
    extra = [f" + {term['weight']:g} * {term['weighting']}(t) * {term['name']}(x0_hat)" for term in objective["terms"]]
    lines = [
        "## What was optimised",
        f"```text\nL = {weighting}||{output} - model(x_t, t)||^2{''.join(extra)}\n```",
    ]
    if objective["terms"]:
        lines.append("x0_hat is the image that the prediction implies at the noise level t.")
        rows = [
            f"| {term['name']} | `{term['regularizer']}` | {term['weight']:g} | {term['weighting']} | {term['gate']} |"
            for term in objective["terms"]
        ]
        lines.append("\n".join(["| loss | given as | weight | weighting | acts at |", "|---|---|---|---|---|", *rows]))
    return "\n\n".join(lines)


def _evidence(folder: Path, rows: dict[str, Measurement]) -> str:
    lines = ["## What came out"]
    if rows:
        drawn = _read_json(folder / COMPARISON_FILE)
        number = next(iter(rows.values())).images
        lines.append(
            f"L' (mean ± standard error) and the sliced Wasserstein distance to the data over {number} images each,"
            f" sampled in {drawn['num_inference_steps']} steps from seed {drawn['seed']}. The distance of the data is"
            " that between two halves of them; a loss below the data's is not better than the data."
        )
        lines.append(markdown_table(rows))
    grids = sorted((folder / "samples").glob("*.png"))
    if (folder / "comparison.png").is_file():
        lines.append("![Samples with their numbers](comparison.png)")
    elif grids:
        lines.append(f"![Samples](samples/{grids[-1].name})")
    return "\n\n".join(lines) if len(lines) > 1 else ""


def _usage(folder: Path, config: dict, repo_id: str) -> str:
    steps = _read_json(folder / COMPARISON_FILE).get("num_inference_steps", 50)
    conditional, field = _is_conditional(folder), _is_field(folder)
    arguments = [f"num_inference_steps={steps}"]
    setup = []
    if "class" in _conditions(folder):
        arguments.append("class_labels=0")
    if "image" in _conditions(folder):
        unet = _read_json(folder / "unet" / "config.json")
        channels, size = unet["in_channels"] - unet["out_channels"], unet["sample_size"]
        height, width = size if isinstance(size, list) else (size, size)
        setup.append(f"condition = torch.zeros(1, {channels}, {height}, {width})  # yours, in [-1, 1]")
        arguments.append("condition=condition")
    if field:
        arguments.append('output_type="np"')
    show = "print(output.images[0].shape)" if field else 'output.images[0].save("sample.png")'
    call = f"output = pipeline({', '.join(arguments)})\n{show}"
    imports = ["import torch", ""] if setup else []
    package = _code(
        *imports,
        "from reg_diffusers import RegDDPMPipeline",
        "from reg_diffusers.pipeline import fast_scheduler",
        "",
        f'pipeline = RegDDPMPipeline.from_pretrained("{repo_id}")',
        "pipeline.scheduler = fast_scheduler(pipeline.scheduler)",
        *setup,
        call,
    )
    anyone = _code(
        *imports[:1],
        "from diffusers import DiffusionPipeline",
        "",
        f'repo = "{repo_id}"',
        "pipeline = DiffusionPipeline.from_pretrained(repo, custom_pipeline=repo, trust_remote_code=True)",
        *setup,
        call,
    )
    sections = ["## How to use it", "With reg_diffusers:", package]
    if not conditional and not field:
        plain = call if _is_flow(config) else f"pipeline.scheduler = {_DDIM}\n{call}"
        names = "DDPMPipeline" if _is_flow(config) else "DDIMScheduler, DDPMPipeline"
        load = f'pipeline = DDPMPipeline.from_pretrained("{repo_id}")'
        sections += ["With diffusers alone:", _code(f"from diffusers import {names}", "", load, plain)]
    sections += [
        "With diffusers alone, and all that RegDDPMPipeline can do (every scheduler, scores, guidance by a loss,"
        " conditions): this runs the file pipeline.py of this repository, which you may want to read first.",
        anyone,
    ]
    return "\n\n".join(sections)


_DDIM = 'DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")'


def _reproduction(config: dict) -> str:
    if not config:
        return ""
    versions = ", ".join(f"{name} {version}" for name, version in config["versions"].items())
    commit = f", commit {config['commit']}" if config.get("commit") else ""
    processes = "1 process" if config["processes"] == 1 else f"{config['processes']} processes"
    return "\n\n".join(
        [
            "## How to make it again",
            f"```bash\n{config['command']}\n```",
            f"Seed {config['seed']}, {processes} on {config['device']}, mixed precision {config['mixed_precision']};"
            f" {versions}{commit}. All settings, defaults included, are in `reg_settings.yaml`, which train_reg.py"
            " takes as its first argument.",
        ]
    )


def _code(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"])


def _conditions(folder: Path) -> list[str]:
    """What the network is conditioned on: "class", "image", both or nothing."""
    unet = _read_json(folder / "unet" / "config.json")
    by_image = unet and unet["in_channels"] > unet["out_channels"]
    return [*(["class"] if unet.get("num_class_embeds") else []), *(["image"] if by_image else [])]


def _is_conditional(folder: Path) -> bool:
    return bool(_conditions(folder))


def _is_field(folder: Path) -> bool:
    return saved_normalization(_read_json(folder / "model_index.json")) is not None


def _is_flow(config: dict) -> bool:
    return config.get("objective", {}).get("prediction_type") == "flow_prediction"


def _rows(folder: Path) -> dict[str, Measurement]:
    path = folder / COMPARISON_FILE
    return read_comparison(path) if path.is_file() else {}


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
