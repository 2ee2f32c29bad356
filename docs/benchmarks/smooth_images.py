"""Smooth images, the example of README's formula: at which weight samples reach the total variation of the data.

    python docs/benchmarks/smooth_images.py

For each seed, trains the demonstration's network with noise prediction (600 steps, embedded pictures at 16 x 16)
without a loss and with total variation in several ways, from the same weights, batches and noise, and compares 256
samples of each with the data. `Target` bounds the mean total variation of x0_hat by that of the data. Three rows have
the first seed only. Models that are in --output are not trained again, and rows of smooth_images.json, beside this
script, are not measured again. Writes the table, smooth_images.txt, too.
"""

import argparse
import json
import subprocess
import sys
from functools import partial
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
    "Target 1x": [*LOSS, "--reg_target", "total_variation=1x"],
    "constant 0.1": [*LOSS, "--reg_weight", "0.1", "--reg_weighting", "constant"],
    "constant 0.2": [*LOSS, "--reg_weight", "0.2", "--reg_weighting", "constant"],
}
ONCE = ("Target 1x", "constant 0.1", "constant 0.2")  # on the first seed only
COLUMNS = {"total variation": 3, "distance to data": 3, "std of pixels": 3, "denoising loss": 4}  # and digits
RESULT = HERE / "smooth_images.json"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("smooth-images"), help="folder for the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    found = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    for seed in args.seeds:
        data, other = pictures(seed)
        keep(found, "data", seed, partial(measured_data, data, other))
        for name in ROWS:
            if name not in ONCE or seed == args.seeds[0]:
                keep(found, name, seed, partial(measured, args.output, name, seed, data))
    heading = f"{'':14}" + "".join(f"{name:>18}" for name in COLUMNS)
    rows = [line(name, list(found[name].values())) for name in ("data", *ROWS)]
    seeds = ", ".join(found["plain"])
    title = f"total_variation, noise prediction, {IMAGES} samples, seeds {seeds}; rows without ± have one seed"
    RESULT.with_suffix(".txt").write_text("\n".join([title, heading, *rows]) + "\n")


def keep(found, name, seed, numbers):
    """Writes the numbers of a run into the file, unless it has them."""
    if str(seed) not in found.setdefault(name, {}):
        found[name][str(seed)] = numbers()
        RESULT.write_text(json.dumps(found, indent=1) + "\n")
        print(f"seed {seed}: {line(name, [found[name][str(seed)]])}", flush=True)


def pictures(seed):
    """Two sets of pictures without a common one."""
    data = load_training_data(DataSettings(resolution=16))
    order = torch.randperm(len(data.examples), generator=torch.Generator().manual_seed(seed)).tolist()
    sets = (data.examples.__getitems__(indices)["values"] for indices in (order[:IMAGES], order[-IMAGES:]))
    return [data.normalization.normalize(values) for values in sets]


def measured(output, name, seed, data):
    """The numbers of the samples of a row, after its training where that is missing."""
    pipeline = RegDDPMPipeline.from_pretrained(trained(output, name, seed))
    samples = draw_samples(pipeline, IMAGES, STEPS, seed)
    loss = denoising_losses(pipeline.unet.eval(), pipeline.scheduler, data, seed).mean().item()
    return numbers(measure(samples, data, [TERM], loss), samples)


def measured_data(data, other):
    return numbers(measure(data, other, [TERM]), data)


def trained(output, name, seed):
    """The folder of the model of a row."""
    folder = output / f"{seed}-{name.replace(' ', '-')}"
    if not (folder / "model_index.json").exists():
        common = ["--prediction_type", "epsilon", "--no-compare", "--preview_steps", "100000", "--seed", str(seed)]
        command = [sys.executable, str(HERE.parents[1] / "train_reg.py"), *ROWS[name], *common]
        subprocess.run([*command, "--output_dir", str(folder)], check=True)
    return folder


def numbers(row, images):
    values = row.terms[TERM.name], row.distance, images.std().item(), row.denoising_loss
    return {column: value for column, value in zip(COLUMNS, values, strict=True) if value is not None}


def line(name, runs):
    """Mean ± standard deviation over the seeds; no deviation where there is one seed."""
    cells = []
    for column, digits in COLUMNS.items():
        values = [run[column] for run in runs if column in run]
        spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
        cells.append(f"{mean(values):.{digits}f}{spread}" if values else "")
    return f"{name:14}{''.join(f'{cell:>18}' for cell in cells)}".rstrip()


if __name__ == "__main__":
    main()
