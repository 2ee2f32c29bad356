"""Which learning rate does the small default network need if a training has 1,000 steps?

    python docs/benchmarks/learning_rate.py [--output FOLDER] [--threads N]

README's second example without a loss: 240 windows of the two photographs in scikit-learn, at 32 x 32. "before" are
the defaults of diffusers' training script, a rate of 1e-4 after 500 steps of warm-up. Compares 120 samples with the
photos: the sliced Wasserstein distance, the mean absolute difference of neighbouring pixels (noise has a large one),
and the denoising loss on the photos. Runs that are in the folder are not trained again. Writes learning_rate.txt
beside this script.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from sklearn.datasets import load_sample_images

from reg_diffusers import RegDDPMPipeline, Term
from reg_diffusers.data.training_data import load_training_data
from reg_diffusers.evaluation.comparison import measure
from reg_diffusers.evaluation.measuring import denoising_losses
from reg_diffusers.settings import DataSettings
from reg_diffusers.training.preview import draw_samples

ROOT = Path(__file__).parents[2]
RATES = {"before": (1e-4, 500), "1e-3": (1e-3, 100)}
PHOTOS, IMAGES, STEPS = 240, 120, 50


def roughness(images):
    """The mean absolute difference of neighbours, (B,)."""
    return (images[..., 1:] - images[..., :-1]).abs().flatten(1).mean(1)


TERM = Term(roughness, 1.0, name="roughness")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("learning-rate"), help="folder for photos and runs")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.set_num_threads(args.threads)
    photos = args.output / "photos"
    if not photos.is_dir():
        write_photos(photos)
    data = load_training_data(DataSettings(train_data_dir=str(photos), resolution=32))
    order = torch.randperm(PHOTOS, generator=torch.Generator().manual_seed(0)).tolist()
    reference, other = (
        data.normalization.normalize(data.examples.__getitems__(indices)["values"])
        for indices in (order[:IMAGES], order[IMAGES:])
    )
    lines = [
        f"240 photographs at 32 x 32, 1,000 steps of 16 images, seed 0, {IMAGES} samples; ± 95 %",
        f"{'rate':8}{'warm-up':>9}{'roughness':>12}{'distance to data':>19}{'denoising loss':>16}",
        line("data", "", measure(reference, other, [TERM])),
    ]
    for name, (rate, warmup) in RATES.items():
        pipeline = RegDDPMPipeline.from_pretrained(trained(args, photos, name, rate, warmup))
        samples = draw_samples(pipeline, IMAGES, STEPS, 0)
        loss = denoising_losses(pipeline.unet.eval(), pipeline.scheduler, reference, 0).mean().item()
        lines.append(line(f"{rate:g}", warmup, measure(samples, reference, [TERM], loss)))
        print(lines[-1], flush=True)
    Path(__file__).with_suffix(".txt").write_text("\n".join(lines) + "\n")


def write_photos(folder):
    """Writes square windows of 96 to 260 pixels of both photographs."""
    folder.mkdir(parents=True)
    random, photographs = np.random.default_rng(0), load_sample_images().images
    for number in range(PHOTOS):
        photograph, side = photographs[number % 2], random.integers(96, 260)
        top, left = (random.integers(0, length - side) for length in photograph.shape[:2])
        PIL.Image.fromarray(photograph[top : top + side, left : left + side]).save(folder / f"{number:03d}.png")


def trained(args, photos, name, rate, warmup):
    """The folder of the model trained at this rate."""
    folder = args.output / name
    if not (folder / "model_index.json").exists():
        flags = "--resolution 32 --max_train_steps 1000 --regularizer none --preview_steps 100000"
        flags += (
            f" --learning_rate {rate} --lr_warmup_steps {warmup} --num_threads {args.threads} --mixed_precision bf16"
        )
        command = [sys.executable, str(ROOT / "train_reg.py"), "--train_data_dir", str(photos), *flags.split()]
        subprocess.run([*command, "--output_dir", str(folder)], check=True)
    return folder


def line(rate, warmup, row):
    distance = f"{row.distance:.3f} ± {row.distance_half_width:.3f}"
    loss = "" if row.denoising_loss is None else f"{row.denoising_loss:.4f}"
    return f"{rate:8}{warmup:>9}{row.terms[TERM.name]:>12.3f}{distance:>19}{loss:>16}".rstrip()


if __name__ == "__main__":
    main()
