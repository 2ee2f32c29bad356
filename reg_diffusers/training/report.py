"""What a run says at its beginning and at its end."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import PartialState
from torch import Tensor

from ..evaluation.comparison import denoising_loss, draw_comparison, measure, verdict
from ..evaluation.trade_off import draw_evaluation
from ..files import write_whole
from ..measurement import COMPARISON_FILE, table, write_comparison
from ..pipeline import RegDDPMPipeline
from ..prediction import prediction_type
from ..term import Term
from .checks import OnData
from .data import TrainingData
from .hardware import precision_reason, threads_reason
from .interruption import Interruption
from .output import SETTINGS_FILE
from .preview import conditions_of, draw_samples, grid
from .profiling import PROFILE_FOLDER
from .terms import weight_rules
from .weight_rules import AutoWeight, Target

__all__ = ["compare", "describe", "describe_machine", "describe_result"]

_IMAGES_MEASURED = 256
_IMAGES_SHOWN = 36


def describe(
    args: argparse.Namespace,
    data: TrainingData,
    unet,
    noise_scheduler,
    terms: tuple[Term, ...],
    on_data: dict[str, OnData],
    machine: list[str],
) -> str:
    """The run in a few lines: data, model, objective, machine."""
    channels, height, width = data.shape
    source = args.dataset_name or args.train_data_dir or "embedded Fashion-MNIST"
    kind = "images" if data.is_picture else "fields"
    number = f"a stream of {kind}" if data.number is None else f"{data.number:,} {kind}"
    parameters = sum(parameter.numel() for parameter in unet.parameters()) / 1e6
    weighted = zip(weight_rules(args, terms).items(), args.reg_weighting, strict=True)
    extra = [_term(name, rule, weighting) for (name, rule), weighting in weighted]
    targets = [rule for rule in weight_rules(args, terms).values() if isinstance(rule, Target)]
    classes = ", ".join(f"{number} {name}" for number, name in enumerate(data.classes or ()))
    return "\n".join(
        [
            f"data       {number} of {channels} x {height} x {width} from {source}",
            *(f"data       {name} {values}" for name, values in on_data.items()),
            *([f"classes    {classes}"] if classes else []),
            *([f"condition  images of {data.condition_channels} channels"] if data.condition_channels else []),
            f"model      UNet2DModel, {parameters:.2f}M parameters, {type(noise_scheduler).__name__},"
            f" {prediction_type(noise_scheduler)}",
            f"objective  {' + '.join(['denoising loss', *extra])}",
            *(f"target     {_target(target, on_data[target.name].mean)}" for target in targets),
            *(f"machine    {line}" for line in machine),
            f"output     {args.output_dir}",
        ]
    )


def describe_machine(
    args: argparse.Namespace,
    state: PartialState,
    threads: int,
    keeps_memory: bool,
    mixed_precision: str,
    attention: str,
    attention_reason: str,
) -> list[str]:
    """What was chosen for the speed of the training, each with its reason, in two lines."""
    reason = threads_reason(args, state.num_processes)
    memory = "freed memory kept" if keeps_memory else "freed memory left to the system"
    precision = f"mixed precision {mixed_precision} ({precision_reason(args, mixed_precision)})"
    why_not = "no gain was measured on a CPU" if state.device.type == "cpu" else "--compile takes minutes at the start"
    compiled = "compiled, minutes before the first step" if args.compile else f"not compiled ({why_not})"
    checkpointing = ", gradient checkpointing" if args.gradient_checkpointing else ""
    return [
        f"{state.num_processes} x {state.device}, {threads} threads each ({reason}), {memory}, {precision}",
        f"{attention} attention ({attention_reason}), {compiled}{checkpointing}",
    ]


def _term(name: str, rule, weighting: str) -> str:
    weight = "multiplier" if isinstance(rule, Target) else rule if isinstance(rule, AutoWeight) else f"{rule:g}"
    return f"{weight} * {weighting} * {name}"


def _target(target: Target, mean_on_data: float) -> str:
    said = f", {target.value:g} x the data" if target.is_relative else ""
    return f"{target.name} of x0_hat at most {target.bound(mean_on_data):.4g} in the mean{said}"


@torch.no_grad()
def compare(
    args: argparse.Namespace,
    data: TrainingData,
    terms: tuple[Term, ...],
    plain: RegDDPMPipeline | None,
    trained: RegDDPMPipeline,
    output_dir: Path,
) -> None:
    """Measures the trained model, and a plain one if there is one, against the data.

    Prints the table, writes comparison.json, comparison.png and, if there is a loss, evaluation.png. Samples are
    conditioned as the images they are compared with.
    """
    number = min(_IMAGES_MEASURED, len(data.examples) // 2) or len(data.examples)
    order = torch.randperm(len(data.examples), generator=torch.Generator().manual_seed(args.seed)).tolist()
    reference, conditions = _images(data, order[:number], trained.device)
    other_half, _ = _images(data, order[-number:], trained.device)
    name = "with " + " + ".join(term.name for term in terms) if terms else "samples"
    rows = {"data": measure(reference, other_half, terms, **conditions)}
    pictures = {"data": grid(reference[:_IMAGES_SHOWN])}
    for title, pipeline in {"without": plain, name: trained}.items():
        if pipeline is None:
            continue
        samples = draw_samples(pipeline, number, args.ddpm_num_inference_steps, args.seed, **conditions)
        samples = samples.to(reference.device)
        loss = denoising_loss(pipeline.unet, pipeline.scheduler, reference, args.seed, **conditions)
        rows[title] = measure(samples, reference, terms, loss, **conditions)
        pictures[title] = grid(samples[:_IMAGES_SHOWN])
    settings = {
        "seed": args.seed,
        "num_inference_steps": args.ddpm_num_inference_steps,
        "terms": {
            term.name: {"weight": term.weight, "weighting": weighting}
            for term, weighting in zip(terms, args.reg_weighting, strict=True)
        },
    }
    write_whole(output_dir / COMPARISON_FILE, lambda path: write_comparison(path, rows, **settings))
    write_whole(output_dir / "comparison.png", lambda path: draw_comparison(path, pictures, rows))
    if rows["data"].terms:
        write_whole(output_dir / "evaluation.png", lambda path: draw_evaluation(path, rows))
    said = [f"L' and distances over {number} images each, ± standard error; same noise and steps:", table(rows)]
    if plain is not None:
        said.append(verdict(rows["without"], rows[name]))
    print("", *said, "", sep="\n")


def describe_result(args: argparse.Namespace, output_dir: Path, interruption: Interruption, resume: str) -> str:
    """Where everything is, and the line of Python that loads it; after an interruption, how to go on."""
    lines = []
    if interruption:
        lines.append(f"stopped by {interruption.name}; go on with: {resume}")
    shown = {
        "pipeline": output_dir / "model_index.json",
        "samples": output_dir / "samples",
        "comparison": output_dir / "comparison.png",
        "evaluation": output_dir / "evaluation.png",
        "plain model": output_dir / "plain",
        "metrics": output_dir / "metrics.jsonl",
        "profile": output_dir / PROFILE_FOLDER,
        "settings": output_dir / SETTINGS_FILE,
    }
    lines += [f"{name:<12}{path}" for name, path in shown.items() if path.exists()]
    lines.append(
        f"load it     from reg_diffusers import RegDDPMPipeline; "
        f'pipeline = RegDDPMPipeline.from_pretrained("{output_dir}")'
    )
    return "\n".join(lines)


def _images(data: TrainingData, indices: list[int], device: torch.device) -> tuple[Tensor, dict]:
    """Samples (N, C, H, W) in [-1, 1] and what they are conditioned on."""
    batch = {name: tensor.to(device) for name, tensor in data.examples.__getitems__(indices).items()}
    return data.normalization.normalize(batch["values"]), conditions_of(data, batch)
