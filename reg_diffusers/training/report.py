"""What a run says at its beginning and at its end."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

import torch
from accelerate import PartialState
from torch import Tensor

from ..evaluation.comparison import (
    Measurement,
    denoising_loss,
    draw_comparison,
    measure,
    table,
    verdict,
    write_comparison,
)
from ..pipeline import RegDDPMPipeline
from ..prediction import prediction_type
from ..term import Term
from .data import FieldData, PictureData
from .interruption import Interruption
from .output import SETTINGS_FILE, write_whole
from .preview import draw_samples, grid

__all__ = ["compare", "describe", "describe_result"]

_IMAGES_MEASURED = 256
_IMAGES_SHOWN = 36


def describe(
    args: argparse.Namespace,
    state: PartialState,
    data: PictureData | FieldData,
    unet,
    noise_scheduler,
    terms: tuple[Term, ...],
    mixed_precision: str,
    threads: int,
) -> str:
    """The run in a few lines: data, model, objective, machine."""
    channels, height, width = data.shape
    source = args.dataset_name or args.train_data_dir or "embedded Fashion-MNIST"
    kind = "images" if data.is_picture else "fields"
    parameters = sum(parameter.numel() for parameter in unet.parameters()) / 1e6
    weighted = zip(terms, args.reg_weighting, strict=True)
    extra = [f"{term.weight:g} * {weighting} * {term.name}" for term, weighting in weighted]
    classes = ", ".join(f"{number} {name}" for number, name in enumerate(data.classes or ()))
    return "\n".join(
        [
            f"data       {len(data):,} {kind} of {channels} x {height} x {width} from {source}",
            *([f"classes    {classes}"] if classes else []),
            f"model      UNet2DModel, {parameters:.2f}M parameters, {type(noise_scheduler).__name__},"
            f" {prediction_type(noise_scheduler)}",
            f"objective  {' + '.join(['denoising loss', *extra])}",
            f"machine    {state.num_processes} x {state.device}, {threads} threads each, mixed precision"
            f" {mixed_precision}",
            f"output     {args.output_dir}",
        ]
    )


@torch.no_grad()
def compare(
    args: argparse.Namespace,
    data: PictureData | FieldData,
    terms: tuple[Term, ...],
    plain: RegDDPMPipeline,
    regularized: RegDDPMPipeline,
    output_dir: Path,
) -> None:
    """Measures both models against the data; prints the table, writes comparison.json and comparison.png."""
    number = min(_IMAGES_MEASURED, len(data) // 2) or len(data)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(args.seed)).tolist()
    device = plain.device
    reference, labels = _images(data, order[:number], device)
    other_half, _ = _images(data, order[-number:], device)
    with_name = "with " + " + ".join(term.name for term in terms)
    rows, pictures = {"data": measure(reference, other_half, terms)}, {"data": grid(reference[:_IMAGES_SHOWN])}
    for title, pipeline in (("without", plain), (with_name, regularized)):
        samples = draw_samples(pipeline, number, args.ddpm_num_inference_steps, args.seed).to(device)
        loss = denoising_loss(pipeline.unet, pipeline.scheduler, reference, labels, args.seed)
        rows[title] = measure(samples, reference, terms, loss)
        pictures[title] = grid(samples[:_IMAGES_SHOWN])
    settings = {
        "seed": args.seed,
        "num_inference_steps": args.ddpm_num_inference_steps,
        "terms": {
            term.name: {"weight": term.weight, "weighting": weighting}
            for term, weighting in zip(terms, args.reg_weighting, strict=True)
        },
    }
    write_whole(output_dir / "comparison.json", lambda path: write_comparison(path, rows, **settings))
    write_whole(output_dir / "comparison.png", lambda path: draw_comparison(path, pictures, rows))
    print(_comparison_text(rows, with_name, number))


def describe_result(args: argparse.Namespace, output_dir: Path, interruption: Interruption) -> str:
    """Where everything is, and the line of Python that loads it; after an interruption, how to go on."""
    lines = []
    if interruption:
        command = f"accelerate launch train_reg.py {shlex.quote(str(output_dir / SETTINGS_FILE))}"
        lines.append(f"stopped by {interruption.name}; go on with: {command} --resume_from_checkpoint latest")
    shown = {
        "pipeline": output_dir / "model_index.json",
        "samples": output_dir / "samples",
        "comparison": output_dir / "comparison.png",
        "plain model": output_dir / "plain",
        "metrics": output_dir / "metrics.jsonl",
        "settings": output_dir / SETTINGS_FILE,
    }
    lines += [f"{name:<12}{path}" for name, path in shown.items() if path.exists()]
    lines.append(
        f"load it     from reg_diffusers import RegDDPMPipeline; "
        f'pipeline = RegDDPMPipeline.from_pretrained("{output_dir}")'
    )
    return "\n".join(lines)


def _comparison_text(rows: dict[str, Measurement], with_name: str, number: int) -> str:
    return "\n".join(
        [
            "",
            f"L' and distances over {number} images each, ± standard error; same noise and steps for both models:",
            table(rows),
            verdict(rows["without"], rows[with_name]),
            "",
        ]
    )


def _images(data: PictureData | FieldData, indices: list[int], device: torch.device) -> tuple[Tensor, Tensor | None]:
    batch = data.__getitems__(indices)
    labels = batch.get("class_labels")
    samples = data.normalization.normalize(batch["values"].to(device))
    return samples, None if labels is None else labels.to(device)
