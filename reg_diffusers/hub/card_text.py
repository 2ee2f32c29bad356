"""Builds the text of a model card: the results, the usage, and how to reproduce the model."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from ..prediction import image_channels
from ..runs.measurement import Measurement, as_text, markdown_table
from .data_text import data_text
from .held_out_text import held_out_text
from .objective_text import block, objective_section

__all__ = ["CardFacts", "card_text", "evidence_section", "reproduction_section"]

_DDIM = 'pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")'
_CLASSES_NAMED = 50
_MANY_STEPS = 50


@dataclass(frozen=True)
class CardFacts:
    """Facts about a saved pipeline from the files next to it, if there are any.

    Attributes:
        record: the content of reg_config.json: the objective and the settings of a run.
        unet: the config of the network, that of a DiT with the entries of a UNet2DModel.
        scheduler: the config of the scheduler.
        vae: the config of the autoencoder of a model of latents; empty for a model of images.
        is_field: whether the samples are fields instead of images.
        class_names: names of the classes, if they are known.
        settings: the settings of the measurement.
        rows: the measured rows, that of the model last.
        pictures: paths of the figures to show, by caption.
        validation: the losses of held-out images.
    """

    record: dict
    unet: dict
    scheduler: dict
    vae: dict
    is_field: bool
    class_names: list[str]
    settings: dict
    rows: dict[str, Measurement]
    pictures: dict[str, str]
    validation: dict = field(default_factory=dict)

    @property
    def is_dit(self) -> bool:
        return "num_embeds_ada_norm" in self.unet

    @property
    def by_class(self) -> bool:
        return bool(self.unet.get("num_class_embeds"))

    @property
    def knows_no_class(self) -> bool:
        """Whether the network was also trained without class labels."""
        return bool(self.class_names) and self.unet.get("num_class_embeds") == len(self.class_names) + 1

    @property
    def by_image(self) -> bool:
        return self.condition_channels > 0

    @property
    def condition_channels(self) -> int:
        return self.unet["in_channels"] - self.channels if self.unet else 0

    @property
    def channels(self) -> int:
        return image_channels(self.unet["out_channels"], self.scheduler)

    @property
    def learns_variance(self) -> bool:
        """Whether the output also holds a variance, which diffusers' own DDIM mistakes for image channels."""
        return bool(self.unet) and self.channels != self.unet["out_channels"]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images."""
        size, factor = self.unet["sample_size"], 2 ** (len(self.vae["block_out_channels"]) - 1) if self.vae else 1
        return (factor * size,) * 2 if isinstance(size, int) else tuple(factor * side for side in size)


def card_text(facts: CardFacts, repo_id: str) -> str:
    """Builds the Markdown text of a card.

    Args:
        facts: the facts about the pipeline.
        repo_id: the repository or folder that the code loads the pipeline from.
    """
    sections = [
        f"# {as_text(repo_id.rstrip('/').split('/')[-1])}",
        _introduction(facts),
        objective_section(facts.record.get("objective")),
        evidence_section(facts),
        _usage(facts, repo_id),
        reproduction_section(facts.record),
    ]
    return "\n\n".join(section for section in sections if section)


def _introduction(facts: CardFacts) -> str:
    height, width = facts.size
    kind = "fields" if facts.is_field else "images"
    drawn = f"{height} x {width} {kind}" + (f" of {facts.channels} channels" if facts.is_field else "")
    given = [*(["of a given class"] if facts.by_class else []), *(["from a given image"] if facts.by_image else [])]
    network = f"a `{facts.unet.get('_class_name', 'UNet2DModel')}`"
    if facts.vae:
        network += f" in the latents of an `{facts.vae.get('_class_name', 'autoencoder')}`"
    data = facts.record.get("data")
    trained = ""
    if data:
        number = f"a stream of {kind}" if data["images"] is None else f"{data['images']:,} {kind}"
        trained = f", {_start(facts.record)} on {number} of {_data_name(data)}"
    generates = f"A diffusion model that generates {' '.join([drawn, *given])}: {network}{trained}."
    about_data = "" if facts.is_field or not data else data_text(data)
    return f"{generates} {about_data}".rstrip()


def _start(record: dict) -> str:
    base = record.get("base_model")
    if base:
        return f"fine-tuned from [{base}](https://huggingface.co/{base})"
    return "fine-tuned from another model" if record.get("fine_tuned") else "trained"


def _data_name(data: dict) -> str:
    name = as_text(data["name"])
    return f"[{name}](https://huggingface.co/datasets/{data['hub_id']})" if data.get("hub_id") else name


def evidence_section(facts: CardFacts) -> str:
    """Builds the section with measurements and figures; empty without them."""
    sections = ["## Results"]
    if facts.rows:
        sections += [_how_measured(facts), markdown_table(facts.rows)]
    sections += [text for text in (held_out_text(facts.validation),) if text]
    sections += [f"![{shown}]({path})" for shown, path in facts.pictures.items()]
    return "\n\n".join(sections) if len(sections) > 1 else ""


def _how_measured(facts: CardFacts) -> str:
    first, *_ = facts.rows.values()
    kind = "fields" if facts.is_field else "images"
    steps, seed = facts.settings["num_inference_steps"], facts.settings["seed"]
    sentences = [
        f"Each row is measured on {first.images} {kind}; samples are drawn in {steps} steps from seed {seed}.",
    ]
    if first.terms:
        name = as_text(next(iter(first.terms)))
        column = f"The column {name} has" if len(first.terms) == 1 else "The columns of the losses have"
        sentences.append(f"{column} the mean and its standard error; the goal is the value of the data, not less.")
    sentences.append(
        "The distance is the sliced Wasserstein distance in pixel values from -1 to 1; for the data, it is the one"
        " between two halves of them, which no model is expected to beat."
    )
    if "without" in facts.rows:
        losses = "loss" if len(first.terms) <= 1 else "losses"
        sentences.append(f"*without* is the same training, with the same noise, without the auxiliary {losses}.")
    return " ".join(sentences)


def _usage(facts: CardFacts, repo_id: str) -> str:
    """Builds code examples with reg_diffusers, with diffusers alone, and with the class in this repository."""
    repo = json.dumps(repo_id)
    is_flow = "shift" in facts.scheduler
    own, stock = "RegDDPMPipeline", "LDMPipeline" if facts.vae else "DDPMPipeline"
    if facts.is_dit:
        own, stock = "RegDiTPipeline", "DiTPipeline"
    setup, call = _call(facts)
    labels = facts.is_dit and not is_flow  # the one stock pipeline with class labels
    with_labels = [call[0].replace("(", "([0], guidance_scale=1.0, ", 1).replace(", class_labels=0", ""), *call[1:]]
    with_torch = ["import torch"] if setup else []
    names = [] if is_flow else ["DDIMScheduler"]
    ddim = [] if is_flow else [_DDIM]
    package = [
        *([*with_torch, ""] if setup else []),
        f"from reg_diffusers import {own}",
        "from reg_diffusers.pipeline import fast_scheduler",
        "",
        f"pipeline = {own}.from_pretrained({repo})",
        "pipeline.scheduler = fast_scheduler(pipeline.scheduler)",
    ]
    plain = [
        f"from diffusers import {', '.join([*names, stock])}",
        "",
        f"pipeline = {stock}.from_pretrained({repo})",
        *ddim,
    ]
    remote = [
        *with_torch,
        f"from diffusers import {', '.join([*names, 'DiffusionPipeline'])}",
        "",
        f"repo = {repo}",
        "pipeline = DiffusionPipeline.from_pretrained(repo, custom_pipeline=repo, trust_remote_code=True)",
        *ddim,
    ]
    sections = ["## Usage", "With reg_diffusers:", block("python", *package, *setup, *call)]
    if labels or not (facts.by_class or facts.by_image or facts.is_field or facts.learns_variance):
        sections += ["With diffusers alone:", block("python", *plain, *(with_labels if labels else call))]
    if not facts.is_dit:
        sections += [
            "Without reg_diffusers, but with all features of its pipeline, such as any scheduler, conditions and"
            " guidance by a loss. This runs the file pipeline.py of this repository on your machine: read it first.",
            block("python", *remote, *setup, *call),
        ]
    if facts.by_class and facts.class_names:
        classes = facts.class_names
        named = [f"{number} {as_text(name)}" for number, name in enumerate(classes[:_CLASSES_NAMED])]
        sections.append(f"The classes: {', '.join(named)}{', ...' if len(classes) > _CLASSES_NAMED else '.'}")
    if facts.knows_no_class:
        sections.append(
            "It was also trained without class labels: `guidance_scale=2` and more follows the class more closely, by"
            " classifier-free guidance, at the cost of variety."
        )
    return "\n\n".join(sections)


def _call(facts: CardFacts) -> tuple[list[str], list[str]]:
    """Returns the lines before the call of the pipeline, and those of the call."""
    steps = facts.settings.get("num_inference_steps", _MANY_STEPS)
    steps = min(steps, facts.scheduler.get("num_train_timesteps", steps))
    arguments, setup = [f"num_inference_steps={steps}"], []
    if facts.by_class:
        arguments.append("class_labels=0")
    if facts.by_image:
        height, width = facts.size
        setup.append(f"condition = torch.zeros(1, {facts.condition_channels}, {height}, {width})  # yours, in [-1, 1]")
        arguments.append("condition=condition")
    if facts.is_field:
        arguments.append('output_type="np"')
        show = "print(output.images[0].shape)  # height, width, channels"
    else:
        show = 'output.images[0].save("sample.png")'
    return setup, [f"output = pipeline({', '.join(arguments)})", show]


def reproduction_section(record: dict) -> str:
    """Builds the section with command, seed and versions; empty without the record of a training."""
    if "command" not in record:
        return ""
    command = record["command"]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    commit = f", commit {record['commit']}" if record.get("commit") else ""
    processes = "1 process" if record["processes"] == 1 else f"{record['processes']} processes"
    sentences = [
        f"Seed {record['seed']}, {processes} on {record['device']}, mixed precision {record['mixed_precision']};"
        f" {versions}{commit}.",
        "`reg_settings.yaml` holds all settings, including defaults; pass it to train_reg.py as the first argument.",
    ]
    if "--push_to_hub" in command:
        sentences.append("`--push_to_hub` uploads to the author's repository: omit it, or name one of yours.")
    return "\n\n".join(["## How to reproduce it", block("bash", command), " ".join(sentences)])
