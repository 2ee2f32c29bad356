"""Smooth images, the example of README's formula: at which weight samples reach the total variation of the data.

    python docs/benchmarks/smooth_images.py

Trains the demonstration's network with noise prediction (600 steps, embedded pictures at 16 x 16) without a loss and
with total variation at several weights, from the same weights, batches and noise, and compares 256 samples of each
with the data. Runs that are in --output are not trained again. Writes smooth_images.txt beside this script.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch

from reg_diffusers import RegDDPMPipeline, Term
from reg_diffusers.data.training_data import load_training_data
from reg_diffusers.evaluation.comparison import measure
from reg_diffusers.evaluation.measuring import denoising_losses
from reg_diffusers.regularizers import total_variation
from reg_diffusers.settings import DataSettings
from reg_diffusers.training.preview import draw_samples

ROOT = Path(__file__).parents[2]
WEIGHTS, IMAGES, STEPS = (0, 0.02, 0.05, 0.1), 256, 25
TERM = Term(total_variation, 1.0)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("smooth-images"), help="folder for the runs")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    data = load_training_data(DataSettings(resolution=16))
    order = torch.randperm(len(data.examples), generator=torch.Generator().manual_seed(args.seed)).tolist()
    reference, other = (
        data.normalization.normalize(data.examples.__getitems__(indices)["values"])
        for indices in (order[:IMAGES], order[-IMAGES:])
    )
    lines = [
        f"total_variation, matched, noise prediction, seed {args.seed}, {IMAGES} samples; ± 95 %",
        f"{'weight':8}{'total variation':>17}{'distance to data':>19}{'std of pixels':>15}{'denoising loss':>16}",
        line("data", measure(reference, other, [TERM]), reference),
    ]
    for weight in WEIGHTS:
        pipeline = RegDDPMPipeline.from_pretrained(trained(args, weight))
        samples = draw_samples(pipeline, IMAGES, STEPS, args.seed)
        loss = denoising_losses(pipeline.unet.eval(), pipeline.scheduler, reference, args.seed).mean().item()
        lines.append(line(f"{weight:g}", measure(samples, reference, [TERM], loss), samples))
        print(lines[-1], flush=True)
    Path(__file__).with_suffix(".txt").write_text("\n".join(lines) + "\n")


def trained(args, weight):
    """The folder of the model with this weight."""
    folder = args.output / f"{args.seed}-{weight:g}"
    if not (folder / "model_index.json").exists():
        loss = (
            ["--regularizer", "total_variation", "--reg_weight", str(weight)] if weight else ["--regularizer", "none"]
        )
        flags = [*loss, "--prediction_type", "epsilon", "--no-compare", "--preview_steps", "100000"]
        command = [sys.executable, str(ROOT / "train_reg.py"), *flags, "--seed", str(args.seed)]
        subprocess.run([*command, "--output_dir", str(folder)], check=True)
    return folder


def line(title, row, images):
    distance = f"{row.distance:.3f} ± {row.distance_half_width:.3f}"
    loss = "" if row.denoising_loss is None else f"{row.denoising_loss:.4f}"
    cells = f"{row.terms[TERM.name]:>17.3f}{distance:>19}{images.std().item():>15.3f}{loss:>16}"
    return f"{title:8}{cells}".rstrip()


if __name__ == "__main__":
    main()
