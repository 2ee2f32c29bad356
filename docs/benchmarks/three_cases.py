"""What `diagnose` says before training against what `evaluate` finds after it, in three cases.

    cd docs/benchmarks && python three_cases.py

For three seeds, trains a plain model and one for each case from the same weights, batches and noise, on the embedded
pictures, and evaluates them together. Runs that are in --output are not trained again. Writes the figures of the
diagnoses to docs/images and the numbers beside this script, for docs/does-it-make-sense.md.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from PIL import Image

HERE = Path(__file__).parent
CASES = {
    "helps": ("wishes:more_contrast", "0.05"),
    "shrinks": ("mean_intensity", "0.3"),
    "cannot": ("wishes:more_contrast", "2"),
}
MEASURED = ("classifier FD", "recall", "coverage", "sliced Wasserstein")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("three-cases"), help="folder for the runs")
    parser.add_argument("--max_train_steps", type=int, default=400)
    parser.add_argument("--num_images", type=int, default=512)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    said = {case: diagnose(args, case, *flags) for case, flags in CASES.items()}
    said["helps, asked with the plain model"] = diagnose(args, "helps", *CASES["helps"], trained(args, 0, "none"))
    found = [evaluate(args, seed) for seed in range(args.seeds)]
    (HERE / "three_cases.json").write_text(json.dumps({"said": said, "found": found}, indent=1) + "\n")
    text = table(said, found)
    (HERE / "three_cases.txt").write_text(text)
    print(text)


def run(*command):
    subprocess.run([sys.executable, *map(str, command)], cwd=HERE, check=True)


def diagnose(args, case, regularizer, weight, model=None):
    """The verdict of one case; its figure goes to docs/images."""
    output, name = args.output.absolute() / "diagnoses", regularizer.split(":")[-1]
    flags = ("--regularizer", regularizer, "--reg_weight", weight, "--output", output, "--overwrite")
    run("-m", "reg_diffusers", "diagnose", *flags, *(["--model", model] if model else []))
    picture = Image.open(output / f"{name}.png").convert("P", palette=Image.Palette.ADAPTIVE, colors=64)
    picture.save(HERE.parent / "images" / f"diagnosis_{case}.png", optimize=True)
    result = json.loads((output / f"{name}.json").read_text())
    return {"name": name, "weight": weight, **result["verdict"], "asked": result["asked"]}


def evaluate(args, seed):
    """What was measured of all models of one seed, by case."""
    folders = {"plain": trained(args, seed, "none")}
    folders |= {case: trained(args, seed, *flags) for case, flags in CASES.items()}
    output = args.output.absolute() / f"evaluation-{seed}"
    names = dict.fromkeys(flags[0] for flags in CASES.values())
    flags = ("--regularizer", *names, "--num_images", args.num_images, "--num_inference_steps", 25, "--output", output)
    run("-m", "reg_diffusers", "evaluate", "--model", *folders.values(), *flags)
    rows = json.loads((output / "evaluation.json").read_text())["rows"]
    return {"data": numbers(rows["data"])} | {case: numbers(rows[folder.name]) for case, folder in folders.items()}


def numbers(row):
    """L' and distances of one set of images."""
    return {name: estimate["value"] for name, estimate in {**row["terms"], **row["distances"]}.items()}


def trained(args, seed, regularizer, weight=None):
    """The folder of a model that was trained with this loss."""
    label = [seed, regularizer, *([weight, "matched"] if weight else [])]
    folder = args.output.absolute() / "-".join(map(str, label))
    if not (folder / "model_index.json").exists():
        flags = ["--regularizer", regularizer, *(["--reg_weight", weight] if weight else []), "--seed", seed]
        flags += ["--max_train_steps", args.max_train_steps, "--preview_steps", 100000, "--num_threads", 1]
        flags += ["--checkpointing_steps", 100000, "--no-compare", "--output_dir", folder]
        run(HERE.parents[1] / "train_reg.py", *flags)
    return folder


def table(said, found):
    lines = [f"{len(found)} seeds, mean ± standard deviation", ""]
    for case, verdict in said.items():
        lines.append(f"{case}: {verdict['name']}, weight {verdict['weight']}: {verdict['answer']}")
        if case not in CASES:
            continue
        for measure in (CASES[case][0], *MEASURED):
            means = [f"{of} {over_seeds(found, of, measure)}" for of in ("data", "plain", case)]
            lines.append(f"  {measure.split(':')[-1]:<20}{'   '.join(means)}".replace(f" {case} ", " trained "))
        lines.append("")
    return "\n".join(lines)


def over_seeds(found, of, measure):
    values = [run[of][measure] for run in found if run[of][measure] is not None]
    if not values:
        return "not finite"
    spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3g}{spread}"


if __name__ == "__main__":
    main()
