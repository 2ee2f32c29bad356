"""Reports of a run: its settings at the start, its measurements and files at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import PIL.Image
import torch
from accelerate import PartialState
from accelerate.utils import send_to_device
from torch import Tensor

from ..data.prompts import Prompts, PromptsOnDemand
from ..data.training_data import TrainingData
from ..evaluation.comparison import describe_change, difference, draw_comparison, measure
from ..evaluation.measuring import denoising_losses
from ..evaluation.trade_off import draw_evaluation
from ..hub.card import read_json
from ..networks.computation import Computation
from ..networks.conditions import Conditions
from ..networks.lora import frozen_dtype
from ..networks.trained import trained_parameters
from ..pipeline import RegDDPMPipeline
from ..prediction import prediction_type
from ..runs.measurement import COMPARISON_FILE, table, write_comparison
from ..runs.run_folder import LORA_FILE, PLAIN_FOLDER, VALIDATION_FILE, shown_files
from ..runtime.files import write_whole
from ..runtime.hardware import threads_reason
from ..runtime.interruption import Interruption
from ..settings.loss import LossSettings
from ..settings.machine import MachineSettings
from ..settings.weights import NamedTarget
from ..term import Term
from ..trial.checks import OnData
from .ending import Ending
from .preview import draw_samples, grid
from .terms import units_note, weight_rules
from .trackers import Trackers

__all__ = ["compare", "describe", "describe_machine", "describe_result", "images_measured"]

_IMAGES_MEASURED = 256
_IMAGES_SHOWN = 16


def describe(
    data: TrainingData,
    images: TrainingData,
    source: str | None,
    unet,
    noise_scheduler,
    loss: LossSettings,
    terms: tuple[Term, ...],
    on_data: dict[str, OnData],
    estimates: tuple[str, str],
    machine: list[str],
    output_dir: str,
    held_out: str | None = None,
    notes: Sequence[str] = (),
) -> str:
    """Describes the run: data, model, objective, time and disk in five lines, then details.

    Args:
        data: data of the training, as the network sees them.
        images: the same data as images.
        source: name of the data; None for the embedded data.
        unet: network.
        noise_scheduler: scheduler of the training.
        loss: settings of the loss.
        terms: terms of the loss.
        on_data: L' of each term on the data, by name.
        estimates: time and disk that the run needs.
        machine: what was chosen for this machine.
        output_dir: output folder.
        held_out: what the held-out images are, if there are any.
        notes: what else to say about the model, a line each.
    """
    source = source or "embedded Fashion-MNIST"
    kind = "images" if data.is_picture else "fields"
    number = f"a stream of {kind}" if data.number is None else f"{data.number:,} {kind}"
    parameters = sum(parameter.numel() for parameter in unet.parameters()) / 1e6
    rules = weight_rules(loss, terms).items()
    weighted = zip(rules, loss.reg_weighting, loss.estimators, loss.schedules, strict=True)
    trained = sum(parameter.numel() for parameter in trained_parameters(unet)) / 1e6
    adapted = "" if trained == parameters else f" ({trained:.3g}M of LoRA trained, {_frozen(unet)})"
    extra = [
        f"{_by(schedule)}{rule.formula} * {weighting} * {name}{_of(estimator)}"
        for (name, rule), weighting, estimator, schedule in weighted
    ]
    targets = loss.reg_target or ()
    classes = ", ".join(f"{number} {name}" for number, name in enumerate(data.classes or ()))
    return "\n".join(
        [
            f"data       {number} of {_size(images)} from {source}",
            f"model      {type(unet).__name__}, {parameters:.2f}M parameters{adapted},"
            f" {type(noise_scheduler).__name__}, {prediction_type(noise_scheduler)}",
            f"objective  {' + '.join(['denoising loss', *extra])}",
            f"time       {estimates[0]}",
            f"disk       {estimates[1]}",
            *(f"model      {note}" for note in notes),
            *([f"data       {images.note}"] if images.note else []),
            *([f"latents    {_size(data)}, {data.note}; L' sees decoded images"] if data is not images else []),
            *([f"held out   {held_out}"] if held_out else []),
            *([f"texts      {_texts(data.prompts)}"] if data.prompts is not None else []),
            *(f"data       {name} {values}" for name, values in on_data.items()),
            *([f"classes    {classes}"] if classes else []),
            *(f"column     {column}" for column in data.columns),
            *([f"condition  images of {data.condition_channels} channels"] if data.condition_channels else []),
            *([f"units      {note}"] if extra and (note := units_note(data, loss.reg_units)) else []),
            *(f"target     {_target(target, on_data[target.name].mean)}" for target in targets),
            *(f"machine    {line}" for line in machine),
            f"output     {output_dir}",
        ]
    )


def describe_machine(
    settings: MachineSettings,
    state: PartialState,
    computation: Computation,
    keeps_memory: bool,
    uses_tf32: bool,
    sizes: int = 1,
) -> list[str]:
    """Describes in three lines what was chosen for the speed of the training, and why; `sizes` are of images."""
    reason = threads_reason(settings.num_threads, state.num_processes)
    memory = "freed memory kept" if keeps_memory else "freed memory left to the system"
    precision, attention = computation.mixed_precision, computation.attention
    why_not = "no gain was measured on a CPU" if state.device.type == "cpu" else "--compile takes minutes at the start"
    takes = "before the first step" if sizes == 1 else f"at the first full batch of each of {sizes} sizes"
    compiled = f"compiled (takes minutes {takes})" if settings.compile else f"not compiled ({why_not})"
    checkpointing = ", gradient checkpointing" if settings.gradient_checkpointing else ""
    products = "TF32 (--mixed_precision no: float32)" if uses_tf32 else "float32"
    threads = torch.get_num_threads()
    on_gpu = f", other products in {products}, pinned memory, fused AdamW" if state.device.type == "cuda" else ""
    return [
        f"{state.num_processes} x {state.device}, {threads} thread{'s' * (threads != 1)} each ({reason}), {memory}",
        f"mixed precision {precision.value} ({precision.reason}){on_gpu}",
        f"{attention.value} attention ({attention.reason}), {compiled}{checkpointing}",
    ]


def _frozen(network) -> str:
    dtype = str(frozen_dtype(network)).removeprefix("torch.")
    return f"the rest frozen in {dtype}"


def _by(schedule: str) -> str:
    return "" if schedule == "constant" else f"{schedule} * "


def _texts(prompts: Prompts | PromptsOnDemand) -> str:
    texts, different = prompts.texts, len(set(prompts.texts))
    number = f"{different:,} different {'text' if different == 1 else 'texts'}{prompts.note}"
    return f"{number}, the first is {texts[0][:60]!r}"


def _size(data: TrainingData) -> str:
    return " x ".join(map(str, data.shape))


def _of(estimator: str) -> str:
    return "" if estimator == "one_step" else f" of {estimator}"


def _target(named: NamedTarget, mean_on_data: float) -> str:
    target = named.target
    origin = f", {target.value:g} x the data" if target.relative else ""
    return f"mean {named.name} of x0_hat at most {target.bound(mean_on_data):.4g}{origin}"


def images_measured(data: TrainingData) -> int:
    """Returns the number of samples of each model that `compare` measures: at most half of the data."""
    return min(_IMAGES_MEASURED, len(data.examples) // 2) or len(data.examples)


def compare(
    images: TrainingData,
    data: TrainingData,
    loss: LossSettings,
    terms: tuple[Term, ...],
    plain: RegDDPMPipeline | None,
    trained: RegDDPMPipeline,
    output_dir: Path,
    interruption: Interruption,
    ending: Ending,
    trackers: Trackers,
    *,
    seed: int,
    steps: int,
) -> None:
    """Calls `_compare`; a signal stops it, and `ending` records a failure. The models are saved before."""
    models = f"--model {output_dir}" + (f" --model {output_dir / 'plain'}" if plain is not None else "")
    fix = f"the training is saved: measure again with --resume auto, or with reg-diffusers evaluate {models}"
    work = partial(_compare, images, data, loss, terms, plain, trained, output_dir, trackers, seed, steps)
    interruption.cut_short(lambda: ending.attempt("the comparison", fix, work))


@torch.no_grad()
def _compare(
    images: TrainingData,
    data: TrainingData,
    loss: LossSettings,
    terms: tuple[Term, ...],
    plain: RegDDPMPipeline | None,
    trained: RegDDPMPipeline,
    output_dir: Path,
    trackers: Trackers,
    seed: int,
    steps: int,
) -> None:
    """Compares the trained model and, if there is one, the plain model with the data.

    Prints a table, and writes comparison.json, comparison.png and, if there are terms, evaluation.png. Samples have
    the conditions of the images that they are compared with, as in `data`, what the network sees of the images.
    """
    number = images_measured(images)
    order = torch.randperm(len(images.examples), generator=torch.Generator().manual_seed(seed)).tolist()
    reference, conditions = _images(images, data, order[:number], trained.device)
    other_half, _ = _images(images, images, order[-number:], trained.device)
    name = "with " + " + ".join(term.name for term in terms) if terms else "samples"
    rows = {"data": measure(reference, other_half, terms, **conditions)}
    pictures, losses = {"data": grid(reference[:_IMAGES_SHOWN])}, {}
    for title, pipeline in {"without": plain, name: trained}.items():
        if pipeline is None:
            continue
        samples = draw_samples(pipeline, number, steps, seed, **conditions)
        samples = samples.to(reference.device)
        data_term = {name: getattr(loss, name) for name in ("snr_gamma", "loss_weighting", "timestep_sampling")}
        trained_with = {**data_term, **conditions}
        encoded = pipeline.encode(reference)
        losses[title] = denoising_losses(pipeline.as_in_loss(), pipeline.scheduler, encoded, seed, **trained_with)
        row = measure(samples, reference, terms, losses[title].mean().item(), **conditions)
        measured = read_json(output_dir / (PLAIN_FOLDER if pipeline is plain else "") / VALIDATION_FILE)
        rows[title] = replace(row, held_out_loss=measured.get("last", {}).get("validation/denoising"))
        pictures[title] = grid(samples[:_IMAGES_SHOWN])
    recorded = {
        "seed": seed,
        "num_inference_steps": steps,
        "terms": {
            term.name: {
                "weight": term.weight,
                "weighting": weighting,
                **({} if schedule == "constant" else {"schedule": schedule}),
            }
            for term, weighting, schedule in zip(terms, loss.reg_weighting, loss.schedules, strict=True)
        },
    }
    write_whole(output_dir / COMPARISON_FILE, lambda path: write_comparison(path, rows, **recorded))
    write_whole(output_dir / "comparison.png", lambda path: draw_comparison(path, pictures, rows))
    with PIL.Image.open(output_dir / "comparison.png") as picture:
        trackers.log_picture_afterwards("comparison", picture)
    if rows["data"].terms:
        write_whole(output_dir / "evaluation.png", lambda path: draw_evaluation(path, rows))
    lines = [f"L' and distances over {number} images each, ± standard error; same noise and steps:", table(rows)]
    if plain is not None:
        cost = difference(losses[name], losses["without"])
        lines.append(describe_change(("without", name), rows["without"], rows[name], cost))
        lines.append("± is half of a 95 % confidence interval there; reg-diffusers evaluate measures on more images.")
    print("", *lines, "", sep="\n")


def describe_result(output_dir: Path, interruption: Interruption, resume: str) -> str:
    """Lists the files of a run, how to load it in Python and, after an interruption, the command that continues."""
    lines = []
    if interruption:
        lines.append(f"stopped by {interruption.name}; continue with: {resume}")
    lines += _held_out_losses(read_json(output_dir / VALIDATION_FILE))
    lines += [f"{name:<12}{path}" for name, path in shown_files(output_dir).items() if path.exists()]
    if (output_dir / LORA_FILE).is_file():
        lines.append(f'load it     pipeline.load_lora_weights("{output_dir}"), with the pipeline that was fine-tuned')
        return "\n".join(lines)
    if (output_dir / "tokenizer").is_dir():
        lines.append(f'load it     pipeline = DiffusionPipeline.from_pretrained("{output_dir}"), of diffusers')
        return "\n".join(lines)
    kind = "RegDiTPipeline" if (output_dir / "transformer").is_dir() else "RegDDPMPipeline"
    lines.append(f'load it     from reg_diffusers import {kind}; pipeline = {kind}.from_pretrained("{output_dir}")')
    return "\n".join(lines)


def _held_out_losses(validation: dict) -> list[str]:
    """Returns a line about the last and the best measurement on held-out images."""
    if not validation:
        return []
    last, best = validation["last"], validation["best"]
    losses = [f"denoising {last['validation/denoising']:.5g}"]
    losses += [f"{name.split('/raw/')[1]} {value:.4g}" for name, value in last.items() if "/raw/" in name]
    lowest = (
        f"; the lowest denoising loss was {best['validation/denoising']:.5g} at step {best['step']:,}" if best else ""
    )
    return [f"held out    {', '.join(losses)} at step {last['step']:,}{lowest}"]


def _images(
    images: TrainingData, data: TrainingData, indices: list[int], device: torch.device
) -> tuple[Tensor, Conditions]:
    """Returns images (N, C, H, W) in [-1, 1], and their conditions in what the network sees of them."""
    batch, seen = (send_to_device(source.examples.__getitems__(indices), device) for source in (images, data))
    return images.normalization.normalize(batch["values"]), Conditions.of_batch(data, seen)
