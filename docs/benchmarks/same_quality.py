"""Whether the fast training learns what the plain one learns: the distance of both models' samples to the data.

    python docs/benchmarks/same_quality.py [--peer path/to/train_unconditional.py] [--seeds 2]

Trains the same small network, for each seed, on the embedded Fashion-MNIST pictures, at 16 x 16 in RGB and without an
extra loss, in each way: train_reg.py as it chooses here, train_reg.py in float32 with PyTorch's attention, and your
copy of diffusers' script, which takes no seed: its trainings are repetitions. Then `reg-diffusers evaluate` draws
samples of all with the same noise. The numbers are classifier FD and sliced Wasserstein distance, for the data's own
halves too. Models that are in --output are not trained again.

The result is printed and kept in same_quality.txt beside this file.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import datasets
import PIL.Image
import torch
from diffusers import UNet2DModel

HERE = Path(__file__).parent
SCRIPT = HERE.parents[1] / "train_reg.py"
PICTURES = HERE.parents[1] / "reg_diffusers" / "data" / "fashion_mnist.parquet"
SIZE = 16
WAYS = {
    "fast": [SCRIPT, "--mixed_precision", "bf16"],
    "plain": [SCRIPT, "--mixed_precision", "no", "--attention", "sdpa"],
    "peer": [HERE / "pil_transforms.py", "PEER", "--mixed_precision", "no"],
}
OURS = ["--regularizer", "none", "--no-compare", "--preview_steps", 1000000, "--seed", "SEED"]
OURS += ["--learning_rate", 1e-4, "--lr_warmup_steps", 500]  # the peer's defaults
MEASURED = ("classifier FD", "sliced Wasserstein")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, help="your copy of diffusers' train_unconditional.py")
    parser.add_argument("--output", type=Path, default=Path("same-quality"), help="folder for pictures and models")
    parser.add_argument("--num_epochs", type=int, default=10, help="of 5,000 pictures, in batches of 64")
    parser.add_argument("--num_images", type=int, default=2048)
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    write_pictures(args.output / "pictures")
    write_config(args.output / "unet")
    ways = [way for way in WAYS if args.peer or way != "peer"]
    found = [evaluate(args, {way: trained(args, way, seed) for way in ways}, seed) for seed in range(args.seeds)]
    text = table(args, found, ways)
    Path(__file__).with_suffix(".txt").write_text(text)
    print(text)


def write_pictures(folder: Path) -> None:
    """One folder for each class, of the size that is trained at: no script has to resize anything."""
    if folder.exists():
        return
    for index, row in enumerate(datasets.Dataset.from_parquet(str(PICTURES)).cast_column("image", datasets.Image())):
        path = folder / str(row["label"]) / f"{index:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        row["image"].convert("RGB").resize((SIZE, SIZE), PIL.Image.Resampling.BOX).save(path)


def write_config(folder: Path) -> None:
    down, up = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
    UNet2DModel(
        sample_size=SIZE, block_out_channels=(32, 64), layers_per_block=1, down_block_types=down, up_block_types=up
    ).save_config(folder)


def trained(args, way: str, seed: int) -> Path:
    """The folder of a model trained this way."""
    folder = args.output / f"{way}-{seed}"
    if not (folder / "model_index.json").exists():
        placed = {"PEER": args.peer, "SEED": seed}
        flags = [placed.get(flag, flag) for flag in WAYS[way] + (OURS if way != "peer" else [])]
        flags += ["--train_data_dir", args.output / "pictures", "--model_config_name_or_path", args.output / "unet"]
        flags += ["--resolution", SIZE, "--train_batch_size", 64, "--num_epochs", args.num_epochs, "--use_ema"]
        flags += ["--checkpointing_steps", 1000000, "--save_images_epochs", 1000000, "--output_dir", folder]
        subprocess.run([sys.executable, *map(str, flags)], check=True)
    return folder


def evaluate(args, models: dict[str, Path], seed: int) -> dict[str, dict[str, float]]:
    """What was measured, by way and for the data."""
    output = args.output / f"evaluation-{seed}"
    flags = ["--data", args.output / "pictures", "--regularizer", "total_variation", "--output", output]
    flags += ["--features", "classifier", "--num_images", args.num_images]
    command = [sys.executable, "-m", "reg_diffusers", "evaluate", "--model", *models.values(), *flags]
    subprocess.run(list(map(str, command)), check=True)
    rows = json.loads((output / "evaluation.json").read_text())["rows"]
    of = {"data": "data"} | {way: folder.name for way, folder in models.items()}
    return {way: {name: rows[row]["distances"][name]["value"] for name in MEASURED} for way, row in of.items()}


def table(args, found: list[dict], ways: list[str]) -> str:
    precision = json.loads((args.output / "fast-0" / "reg_config.json").read_text())["mixed_precision"]
    lines = [
        f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}; mixed precision of fast: {precision}",
        f"{args.seeds} seeds, {args.num_epochs} epochs, {args.num_images} samples: mean (smallest to largest)",
        f"{'':<8}{''.join(f'{name:>32}' for name in MEASURED)}",
    ]
    for way in ("data", *ways):
        values = [[run[way][name] for run in found] for name in MEASURED]
        said = [f"{statistics.mean(v):.4g} ({min(v):.4g} to {max(v):.4g})" for v in values]
        lines.append(f"{way:<8}{''.join(f'{one:>32}' for one in said)}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
