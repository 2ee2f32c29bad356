"""README's first command on three seeds: what its loss does to the samples, and what it costs.

    python docs/benchmarks/first_picture.py

For each seed and example, runs train_reg.py, which trains with and without the loss from the same weights, batches and
noise, and compares 256 samples of each with the data. Runs that are in --output are not trained again. Reads their
comparison.json; the standard deviation is that of all pixels of the same samples, which are drawn once more.

Judges the first example by three rules, on every seed: L' at least 20 % below that of the plain model; the distance to
the data (sliced Wasserstein) not significantly above the plain model's (95 % intervals overlap, or it is lower); the
standard deviation within 3 % of the plain model's, or nearer to that of the data.

Writes first_picture.txt and first_picture.json beside this script, and docs/images/comparison.png from seed 0.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import time
from pathlib import Path

import torch

from reg_diffusers import RegDDPMPipeline
from reg_diffusers.data.training_data import load_training_data
from reg_diffusers.settings import DataSettings
from reg_diffusers.training.preview import draw_samples

HERE = Path(__file__).parent
EXAMPLES = {"near_background": []}
JUDGED = "near_background"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("first-picture"), help="folder for the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    found = {name: [measured(args.output, name, seed) for seed in args.seeds] for name in EXAMPLES}
    (HERE / "first_picture.json").write_text(json.dumps(found, indent=1) + "\n")
    shutil.copy(args.output / f"{JUDGED}-{args.seeds[0]}" / "comparison.png", HERE.parent / "images")
    text = "\n".join(lines(found)) + "\n"
    (HERE / "first_picture.txt").write_text(text)
    print(text)


def measured(output, name, seed):
    """Numbers of the data, the plain and the trained model of one run, and the seconds that it took."""
    folder = output / f"{name}-{seed}"
    if not (folder / "comparison.json").exists():
        start = time.perf_counter()
        flags = [*EXAMPLES[name], "--seed", str(seed), "--output_dir", str(folder), "--resume", "auto"]
        subprocess.run(["accelerate", "launch", str(HERE.parents[1] / "train_reg.py"), *flags], check=True)
        (folder / "seconds.txt").write_text(f"{time.perf_counter() - start:.0f}\n")
    comparison = json.loads((folder / "comparison.json").read_text())
    samples = {"data": reference(comparison)}
    for title, place in {"without": folder / "plain", f"with {name}": folder}.items():
        pipeline = RegDDPMPipeline.from_pretrained(place)
        number, steps = len(samples["data"]), comparison["num_inference_steps"]
        samples[title] = draw_samples(pipeline, number, steps, comparison["seed"])
    rows = {title.split()[0]: numbers(row, name, samples[title]) for title, row in comparison["rows"].items()}
    return {"seed": seed, "weight": comparison["terms"][name]["weight"], **rows}


def reference(comparison):
    """The pictures that the run compared its samples with."""
    data = load_training_data(DataSettings(resolution=16))
    order = torch.randperm(len(data.examples), generator=torch.Generator().manual_seed(comparison["seed"])).tolist()
    values = data.examples.__getitems__(order[: comparison["rows"]["data"]["images"]])["values"]
    return data.normalization.normalize(values)


def numbers(row, name, samples):
    return {
        "loss": row["terms"][name],
        "distance": row["distance"],
        "half_width": row["distance_half_width"],
        "std": samples.std().item(),
        "denoising": row["denoising_loss"],
    }


def lines(found):
    for name, runs in found.items():
        flags = " ".join(["accelerate launch train_reg.py", *EXAMPLES[name]])
        yield f"{flags}  (weight {runs[0]['weight']:g}, seeds {', '.join(str(run['seed']) for run in runs)})"
        yield f"{'':17}{'data':>17}{'without':>17}{'with':>17}{'change, in %':>17}"
        for key, title in {"loss": "L'", "distance": "distance to data", "std": "std of pixels"}.items():
            cells = [spread([run[of][key] for run in runs]) for of in ("data", "without", "with")]
            changes = [100 * (run["with"][key] / run["without"][key] - 1) for run in runs]
            yield f"{title:17}" + "".join(f"{cell:>17}" for cell in (*cells, spread(changes, 1)))
        changes = [100 * (run["with"]["denoising"] / run["without"]["denoising"] - 1) for run in runs]
        cells = [
            "",
            *(spread([run[of]["denoising"] for run in runs]) for of in ("without", "with")),
            spread(changes, 1),
        ]
        yield f"{'denoising loss':17}" + "".join(f"{cell:>17}" for cell in cells)
        yield from (by_seed(run) for run in runs)
        if name == JUDGED:
            yield from (f"seed {run['seed']}: {verdict(run)}" for run in runs)
        yield ""


def by_seed(run):
    plain, trained = run["without"], run["with"]
    return (
        f"seed {run['seed']}: L' {plain['loss']:.3f} -> {trained['loss']:.3f} (data {run['data']['loss']:.3f}),"
        f" distance {plain['distance']:.3f} ± {plain['half_width']:.3f} -> {trained['distance']:.3f}"
        f" ± {trained['half_width']:.3f} (95 %), std {plain['std']:.3f} -> {trained['std']:.3f}"
        f" (data {run['data']['std']:.3f})"
    )


def verdict(run):
    """Whether each of the rules holds for one seed."""
    data, plain, trained = run["data"], run["without"], run["with"]
    fell = trained["loss"] <= 0.8 * plain["loss"]
    no_farther = trained["distance"] - trained["half_width"] <= plain["distance"] + plain["half_width"]
    same = abs(trained["std"] / plain["std"] - 1) <= 0.03
    nearer = abs(trained["std"] - data["std"]) < abs(plain["std"] - data["std"])
    rules = {"L' 20 % lower": fell, "no farther from the data": no_farther, "as varied": same or nearer}
    return ", ".join(f"{rule}: {'yes' if holds else 'NO'}" for rule, holds in rules.items())


def spread(values, digits=3):
    """Mean ± standard deviation over the seeds."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


if __name__ == "__main__":
    main()
