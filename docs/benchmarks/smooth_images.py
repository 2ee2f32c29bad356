"""Smooth images, the example of README's formula: at which weight samples reach the total variation of the data.

    python docs/benchmarks/smooth_images.py

For each seed, trains the demonstration's network with noise prediction (600 steps, embedded pictures at 16 x 16)
without a loss and with total variation in several ways, from the same weights, batches and noise, and compares 256
samples of each with the data. Runs that are in --output are not trained again. Writes smooth_images.json, after each
run, and smooth_images.txt beside this script.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

import torch

from reg_diffusers import RegDDPMPipeline, Term
from reg_diffusers.data.training_data import load_training_data
from reg_diffusers.evaluation.comparison import measure
from reg_diffusers.evaluation.measuring import denoising_losses
from reg_diffusers.regularizers import total_variation
from reg_diffusers.settings import DataSettings
from reg_diffusers.training.preview import draw_samples

HERE = Path(__file__).parent
IMAGES, STEPS = 256, 25
TERM = Term(total_variation, 1.0)
LOSS = ["--regularizer", "total_variation"]
ROWS = {
    "plain": ["--regularizer", "none"],
    "matched 0.05": [*LOSS, "--reg_weight", "0.05"],
    "constant 0.2": [*LOSS, "--reg_weight", "0.2", "--reg_weighting", "constant"],
}
COLUMNS = {"total variation": 3, "distance to data": 3, "std of pixels": 3, "denoising loss": 4}  # and digits


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("smooth-images"), help="folder for the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    data = load_training_data(DataSettings(resolution=16))
    found = {name: [] for name in ("data", *ROWS)}
    for seed in args.seeds:
        order = torch.randperm(len(data.examples), generator=torch.Generator().manual_seed(seed)).tolist()
        reference, other = (
            data.normalization.normalize(data.examples.__getitems__(indices)["values"])
            for indices in (order[:IMAGES], order[-IMAGES:])
        )
        found["data"].append(numbers(seed, measure(reference, other, [TERM]), reference))
        for name, flags in ROWS.items():
            pipeline = RegDDPMPipeline.from_pretrained(trained(args.output, name, flags, seed))
            samples = draw_samples(pipeline, IMAGES, STEPS, seed)
            loss = denoising_losses(pipeline.unet.eval(), pipeline.scheduler, reference, seed).mean().item()
            found[name].append(numbers(seed, measure(samples, reference, [TERM], loss), samples))
            print(f"seed {seed}: {line(name, found[name][-1:])}", flush=True)
            (HERE / "smooth_images.json").write_text(json.dumps(found, indent=1) + "\n")
    heading = f"{'':14}" + "".join(f"{name:>18}" for name in COLUMNS)
    text = "\n".join([title(args.seeds), heading, *(line(name, runs) for name, runs in found.items())])
    (HERE / "smooth_images.txt").write_text(text + "\n")


def trained(output, name, flags, seed):
    """The folder of the model of a row."""
    folder = output / f"{seed}-{name.replace(' ', '-')}"
    if not (folder / "model_index.json").exists():
        common = ["--prediction_type", "epsilon", "--no-compare", "--preview_steps", "100000", "--seed", str(seed)]
        command = [sys.executable, str(HERE.parents[1] / "train_reg.py"), *flags, *common]
        subprocess.run([*command, "--output_dir", str(folder)], check=True)
    return folder


def numbers(seed, row, images):
    found = {
        "seed": seed,
        "total variation": row.terms[TERM.name],
        "distance to data": row.distance,
        "std of pixels": images.std().item(),
    }
    return found if row.denoising_loss is None else found | {"denoising loss": row.denoising_loss}


def title(seeds):
    return f"total_variation, noise prediction, {IMAGES} samples, seeds {', '.join(map(str, seeds))}"


def line(name, runs):
    """Mean ± standard deviation over the seeds."""
    cells = []
    for column, digits in COLUMNS.items():
        values = [run[column] for run in runs if column in run]
        spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
        cells.append(f"{mean(values):.{digits}f}{spread}" if values else "")
    return f"{name:14}{''.join(f'{cell:>18}' for cell in cells)}".rstrip()


if __name__ == "__main__":
    main()
