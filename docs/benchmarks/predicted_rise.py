"""How well `diagnose` predicts what a loss costs: predicted and measured rise of the denoising loss, by rank.

    python docs/benchmarks/predicted_rise.py

Trains one plain model and one for each pair of regularizer and weight below, from the same weights, batches and noise,
on the embedded pictures, and measures the denoising loss of each on the same images, noise and timesteps. Runs that
are in --output are not trained again. Writes the table beside this script.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler
from scipy.stats import spearmanr

from reg_diffusers import RegDDPMPipeline, Term, diagnose, load_regularizer, load_weighting
from reg_diffusers.data.training_data import load_training_data
from reg_diffusers.evaluation.measuring import denoising_losses
from reg_diffusers.settings import DataSettings

ROOT = Path(__file__).parents[2]
PAIRS = [
    *[("total_variation", weight, "matched") for weight in (0.05, 0.3, 1)],
    *[("gradient_energy", weight, "matched") for weight in (0.05, 0.3, 1)],
    *[("symmetry", weight, "matched") for weight in (0.05, 0.3, 1)],
    *[("mean_intensity", weight, "matched") for weight in (0.05, 0.3, 1)],
    *[("sparsity", weight, "matched") for weight in (0.1, 0.5)],
    ("total_variation", 1, "constant"),
    ("symmetry", 1, "constant"),
]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("predicted-rise"), help="folder for the runs")
    parser.add_argument("--max_train_steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=1, help="number of runs for each pair")
    args = parser.parse_args()
    images, others = pictures()
    rows = []
    for regularizer, weight, weighting in PAIRS:
        term = Term(load_regularizer(regularizer), weight, load_weighting(weighting))
        predicted = diagnose(DDPMScheduler(prediction_type="v_prediction"), term, images).asked.rise
        measured = []
        for seed in range(args.seeds):
            plain = loss_of(args, seed, others, "--regularizer", "none")
            flags = ("--regularizer", regularizer, "--reg_weight", str(weight), "--reg_weighting", weighting)
            measured.append(loss_of(args, seed, others, *flags) / plain - 1)
        rows.append((regularizer, weight, weighting, predicted, measured))
        print(line(*rows[-1]), flush=True)
    report(args, rows)


def pictures():
    """The embedded pictures as the training sees them, and some of them to measure the loss on."""
    data = load_training_data(DataSettings(resolution=16))
    images = data.normalization.normalize(data.examples.__getitems__(list(range(len(data))))["values"])
    return images, images[:: len(images) // 1000][:1000]


def loss_of(args, seed, images, *flags):
    """Denoising loss of the model trained with these flags."""
    folder = args.output / "-".join([str(seed), *(flag for flag in flags if not flag.startswith("--"))])
    if not (folder / "model_index.json").exists():
        command = [sys.executable, str(ROOT / "train_reg.py"), *flags, "--no-compare", "--output_dir", str(folder)]
        steps = ["--max_train_steps", str(args.max_train_steps), "--preview_steps", "100000", "--seed", str(seed)]
        steps += ["--num_threads", "1"]  # several at once are then no slower
        subprocess.run([*command, *steps, "--checkpointing_steps", "100000"], check=True, stdout=subprocess.DEVNULL)
    found = folder / "denoising_loss.json"
    if not found.exists():
        pipeline = RegDDPMPipeline.from_pretrained(folder)
        found.write_text(
            json.dumps(denoising_losses(pipeline.unet.eval(), pipeline.scheduler, images, 0).mean().item())
        )
    return json.loads(found.read_text())


def line(regularizer, weight, weighting, predicted, measured):
    spread = f" ± {np.std(measured, ddof=1):.2%}" if len(measured) > 1 else ""
    return f"{regularizer:<18}{weight:<7g}{weighting:<10}{predicted:>10.2%}  {np.mean(measured):>10.2%}{spread}"


def report(args, rows):
    predicted, measured = [row[3] for row in rows], [np.mean(row[4]) for row in rows]
    correlation = spearmanr(predicted, measured).statistic
    head = f"{'regularizer':<18}{'weight':<7}{'weighting':<10}{'predicted':>10}  {'measured':>10}"
    said = f"rank correlation over {len(rows)} pairs: {correlation:.2f}"
    settings = f"{args.max_train_steps} steps, {args.seeds} seed(s), v-prediction, embedded pictures at 16 x 16"
    text = "\n".join([settings, "", head, *(line(*row) for row in rows), "", said]) + "\n"
    Path(__file__).with_suffix(".txt").write_text(text)
    print(said)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
