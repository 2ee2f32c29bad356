"""Measures guidance next to training: samples of a plain and of a trained model, without and with guidance.

    python docs/benchmarks/four_corners.py                                     # trains first, once for each seed
    python docs/benchmarks/four_corners.py --run reg-ddpm-model another-run    # uses finished runs of train_reg.py

A run is one of train_reg.py on the embedded images, which trains twice from one seed, with and without total
variation. The same loss then guides both models, with each method at several scales, from the same noise. Every set
of samples is a point of the plane (distance to the data, L'). For each method the scale at which the guided plain
model has the L' of the trained one is looked for, and both models are sampled with it: these are the corners. Seconds
are measured apart, in turns, so that a drift of the machine's speed meets all.

Writes four_corners.txt and four_corners.json beside this file; docs/figures/four_corners.py draws the latter.
"""

import argparse
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

import diffusers
import torch

from reg_diffusers import RegDDPMPipeline, Term
from reg_diffusers.data.training_data import load_training_data
from reg_diffusers.evaluation.comparison import measure
from reg_diffusers.guidance import GUIDANCE_METHODS, Guidance
from reg_diffusers.pipeline import fast_scheduler
from reg_diffusers.regularizers import total_variation
from reg_diffusers.settings import DataSettings
from reg_diffusers.weighting import constant

ROOT = Path(__file__).parents[2]
RESULT = Path(__file__).with_suffix(".json")
STEPS, BATCH_SIZE, TIMED_BATCH_SIZE = 25, 64, 16
SCALES = {"mpgd": (0.125, 0.25, 0.5, 1, 2), "dps": (5, 10, 20, 40, 80, 160), "lgd": (10, 20, 40, 80, 160)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", nargs="+", type=Path, metavar="FOLDER", help="finished runs; default: trains them")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the runs to train")
    parser.add_argument("--images", type=int, default=512, help="samples of each kind")
    parser.add_argument("--rounds", type=int, default=20, help="timings of each kind, after one that warms up")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    runs = args.run or [train(seed, ROOT / f"reg-ddpm-seed-{seed}") for seed in args.seeds]
    results = {
        "steps": STEPS,
        "images": args.images,
        "weight": load(runs[0])[2].weight,
        "machine": f"torch {torch.__version__}, diffusers {diffusers.__version__}, {platform.machine()},"
        f" {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        "runs": [corners(run, args.images) for run in runs],
        "seconds": seconds(runs[0], args.rounds),
    }
    RESULT.write_text(json.dumps(results, indent=1) + "\n")
    report(results)


def train(seed: int, folder: Path) -> Path:
    """A run on the embedded images."""
    if not (folder / "comparison.json").exists():
        line = [sys.executable, ROOT / "train_reg.py", "--seed", str(seed), "--output_dir", folder]
        line += "--regularizer total_variation --reg_weight 0.05 --max_train_steps 400".split()
        subprocess.run(line, cwd=ROOT, check=True)
    return folder


def load(run: Path) -> tuple[RegDDPMPipeline, RegDDPMPipeline, Term]:
    """The plain and the trained pipeline, with the fast sampler, and the term of the training."""
    pipelines = []
    for folder in (run / "plain", run):
        loaded = RegDDPMPipeline.from_pretrained(folder)
        loaded.unet.requires_grad_(False)
        pipeline = RegDDPMPipeline(loaded.unet, fast_scheduler(loaded.scheduler))
        pipeline.set_progress_bar_config(disable=True)
        pipelines.append(pipeline)
    weight = json.loads((run / "comparison.json").read_text())["terms"]["total_variation"]["weight"]
    return *pipelines, Term(total_variation, weight)


# What the samples are


def corners(run: Path, number: int) -> dict:
    """All that is measured of one run: rows of L', its standard error over the images, and the distance."""
    plain, trained, term = load(run)
    seed = json.loads((run / "comparison.json").read_text())["seed"]
    reference, other = data(seed, number)

    def row(pipeline, method="mpgd", scale=0.0) -> dict:
        samples = draw(pipeline, number, seed, guidance=[term], guidance_method=method, regularizer_scale=scale)
        print(f"{run.name}: {method} {scale:g}", file=sys.stderr, flush=True)
        return {"scale": scale, **numbers(samples, reference, term)}

    result = {"seed": seed, "data": numbers(reference, other, term)}
    for pipeline in (plain, trained):
        pipeline.register_modules(unet=Remembering(pipeline.unet))
    for name, pipeline in {"plain": plain, "trained": trained}.items():
        result[name] = row(pipeline)
        result[f"{name}, guided"] = {
            method: [row(pipeline, method, scale) for scale in scales] for method, scales in SCALES.items()
        }
    result["as low as trained"], result["trained, same scale"] = {}, {}
    for method, rows in result["plain, guided"].items():
        scale = scale_for(result["trained"]["loss"], [result["plain"], *rows])
        if scale is not None:
            result["as low as trained"][method] = row(plain, method, scale)
            result["trained, same scale"][method] = row(trained, method, scale)
    return result


def data(seed: int, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two sets of training images, which have none in common, (N, 1, 16, 16) in [-1, 1]."""
    images = load_training_data(DataSettings(resolution=16))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).tolist()
    sets = (images.__getitems__(indices)["values"] for indices in (order[:number], order[-number:]))
    return tuple(images.normalization.normalize(values) for values in sets)


def numbers(samples, reference, term: Term) -> dict:
    measured = measure(samples, reference, [term])
    return {
        "loss": measured.terms[term.name],
        "standard_error": measured.standard_errors[term.name],
        "distance": measured.distance,
    }


def draw(pipeline, number: int, seed: int, **guidance) -> torch.Tensor:
    """Samples (N, 1, 16, 16), from the same noise whatever the guidance."""
    batches = []
    for start in range(0, number, BATCH_SIZE):
        generator = torch.Generator().manual_seed(1000 * seed + start)
        size = min(BATCH_SIZE, number - start)
        batches.append(pipeline(size, generator, STEPS, "latent", **guidance).images)
    return torch.cat(batches)


class Remembering(torch.nn.Module):
    """A network that does not compute twice: before guidance sets in, all methods ask it the same."""

    def __init__(self, unet):
        super().__init__()
        self.unet, self.config, self.dtype, self.device = unet, unet.config, unet.dtype, unet.device
        self._memory = {}

    def forward(self, sample, t, **kwargs):
        if torch.is_grad_enabled():
            return self.unet(sample, t, **kwargs)
        key = int(t), sample.numpy().tobytes()
        if key not in self._memory:
            self._memory[key] = self.unet(sample, t, **kwargs)
        return self._memory[key]


def scale_for(loss: float, rows: list[dict]) -> float | None:
    """The smallest scale that should give this L', on the straight lines between the rows; None if none does."""
    for before, after in pairwise(rows):
        if before["loss"] >= loss >= after["loss"]:
            share = (before["loss"] - loss) / (before["loss"] - after["loss"])
            return before["scale"] + share * (after["scale"] - before["scale"])
    return None


# What they cost


def seconds(run: Path, rounds: int) -> dict:
    """Seconds per image and ratios to plain sampling, by kind."""
    plain, trained, term = load(run)
    everywhere = Term(term.regularizer, term.weight, constant)
    kinds = {"plain": partial(plain), "trained": partial(trained)}
    for name, guiding in {"": term, ", at every step": everywhere}.items():
        for method in GUIDANCE_METHODS:
            scale = SCALES[method][1]
            kinds[method + name] = partial(plain, guidance=[guiding], guidance_method=method, regularizer_scale=scale)
    times = {kind: [] for kind in kinds}
    for _ in range(rounds + 1):
        for kind, sample in kinds.items():
            generator = torch.Generator().manual_seed(0)
            start = time.perf_counter()
            sample(TIMED_BATCH_SIZE, generator, STEPS, "latent")
            times[kind].append((time.perf_counter() - start) / TIMED_BATCH_SIZE)
    guidance = Guidance([term])
    result = {"active_steps": sum(any(guidance.factors(plain.scheduler, t)) for t in plain.scheduler.timesteps)}
    for kind, measured in times.items():
        ratios = [this / base for this, base in zip(measured[1:], times["plain"][1:], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        result[kind] = {"seconds": statistics.median(measured[1:]), "ratio": middle, "quartiles": [low, high]}
    return result


# What is said


def report(results: dict) -> None:
    """Writes and prints the text."""
    lines = [*_corner_lines(results), "", *_curve_lines(results), "", *_second_lines(results)]
    RESULT.with_suffix(".txt").write_text("\n".join(lines) + "\n")
    print(*lines, sep="\n")


def _corner_lines(results: dict) -> list[str]:
    runs = results["runs"]
    lines = [
        f"L' is total_variation, in training and guidance with weight {results['weight']:g};"
        f" {results['images']} images each, {STEPS} steps of DDIM",
        f"means over {len(runs)} pairs of models, plain and trained",
        "+- images: standard error over the images of one model. +- models: standard deviation over the pairs",
        "",
        "                                    scale        L'  +- images  +- models   distance  +- models",
    ]
    for name in ("data", "plain"):
        lines.append(_row(name, [run[name] for run in runs]))
    for method in SCALES:
        lines.append(_row(f"guided, {method}, L' as trained", _where_found(runs, "as low as trained", method)))
    lines.append(_row("trained", [run["trained"] for run in runs]))
    for method in SCALES:
        lines.append(_row(f"trained and guided, {method}", _where_found(runs, "trained, same scale", method)))
    lines += ["", "against plain, pair by pair           L'                distance"]
    pairs = {"trained": [(run["trained"], run["plain"]) for run in runs]}
    for method in SCALES:
        found = [run for run in runs if method in run["as low as trained"]]
        pairs[f"guided, {method}"] = [(run["as low as trained"][method], run["plain"]) for run in found]
    for name, of_name in pairs.items():
        changes = [[row[key] / plain[key] - 1 for row, plain in of_name] for key in ("loss", "distance")]
        shown = "  ".join(
            f"{100 * _mean(change):+6.1f} % +- {100 * _spread(change):4.1f}" for change in changes if change
        )
        lines.append(f"{name:34}{shown or 'not reached'}")
    return lines


def _curve_lines(results: dict) -> list[str]:
    lines = ["                                    scale        L'  +- images  +- models   distance  +- models"]
    for name in ("plain", "trained"):
        lines.append(_row(name, [run[name] for run in results["runs"]]))
        for method, scales in SCALES.items():
            for place in range(len(scales)):
                lines.append(
                    _row(f"{name}, {method}", [run[f"{name}, guided"][method][place] for run in results["runs"]])
                )
    return lines


def _second_lines(results: dict) -> list[str]:
    times = dict(results["seconds"])
    active = times.pop("active_steps")
    lines = [
        f"Seconds per image, {TIMED_BATCH_SIZE} at a time, and the median ratio to plain sampling in the same round",
        f"{results['machine']}; the gate is open at {active} of {STEPS} steps",
        "",
    ]
    for kind, time_ in times.items():
        low, high = time_["quartiles"]
        lines.append(
            f"{kind:26}{time_['seconds']:8.4f} s   x {time_['ratio']:.2f}   quartiles {low:.2f} to {high:.2f}"
        )
    return lines


def _row(name: str, rows: list[dict]) -> str:
    if not rows:
        return f"{name:34}  not reached"
    scale = f"{_mean([row['scale'] for row in rows]):7.3g}" if rows[0].get("scale") else " " * 7
    loss, error, distance = ([row[key] for row in rows] for key in ("loss", "standard_error", "distance"))
    return (
        f"{name:34}{scale}  {_mean(loss):8.4f}  {_mean(error):9.4f}  {_spread(loss):9.4f}"
        f"  {_mean(distance):9.4f}  {_spread(distance):9.4f}"
    )


def _where_found(runs: list[dict], name: str, method: str) -> list[dict]:
    return [run[name][method] for run in runs if method in run[name]]


def _mean(values: list[float]) -> float:
    return statistics.mean(values)


def _spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else math.nan


if __name__ == "__main__":
    main()
