"""Checks that a change of the code's structure changed no result: weights, states, numbers and pixels, bit for bit.

    python docs/benchmarks/same_results.py before.json            # in the checkout before the change
    python docs/benchmarks/same_results.py after.json before.json # after it: prints each difference, exits with 1

A fixed set of command lines runs in a temporary folder, on one thread. Of all files that they write, the digest of
each tensor, number and pixel is kept; times, paths and texts are not compared.
"""

import argparse
import hashlib
import json
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
TRAIN = [sys.executable, str(ROOT / "train_reg.py")]
COMMAND = [sys.executable, "-m", "reg_diffusers"]
SHORT = "--resolution 8 --checkpointing_steps 2 --preview_steps 2 --lr_warmup_steps 2 --train_batch_size 4"
SHORT += " --ddpm_num_inference_steps 3 --eval_batch_size 4 --mixed_precision no --num_threads 1"
PHOTOS, FIELDS = f"--train_data_dir photos --max_train_steps 4 {SHORT}", f"--train_data_dir flow.npy {SHORT}"

RECORDS = ("manifest.json", "reg_config.json", "comparison.json", "evaluation.json", "total_variation.json")
RUNS = {
    "demonstration": [*TRAIN, *f"--max_train_steps 4 {SHORT}".split()],
    "classes": [*TRAIN, *f"{PHOTOS} --class_conditional --random_flip --reg_weight auto:0.1 --snr_gamma 5".split()],
    "two_losses": [
        *TRAIN,
        *f"{PHOTOS} --regularizer total_variation mean_intensity --reg_weight 0.1 0.2 --reg_weighting constant matched"
        " --reg_balance config --prediction_type sample --gradient_accumulation_steps 2".split(),
    ],
    "streaming": [*TRAIN, *f"{PHOTOS} --streaming --prediction_type flow --reg_target total_variation=0.9x".split()],
    "fields": [
        *TRAIN,
        *f"{FIELDS} --max_train_steps 4 --prediction_type v_prediction --compare".split(),
    ],
    "half": [*TRAIN, *f"{FIELDS} --max_train_steps 2 --regularizer none --lr_scheduler constant".split()],
    "resumed": [
        *TRAIN,
        *f"{FIELDS} --max_train_steps 4 --regularizer none --lr_scheduler constant --resume auto".split(),
        *"--output_dir half".split(),
    ],
    "fine_tuned": [*TRAIN, *f"{PHOTOS} --pretrained_model_name_or_path demonstration --reg_weight 1".split()],
    "two_processes": [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(ROOT / "train_reg.py")),
        *PHOTOS.split(),
    ],
    "diagnosis": [*COMMAND, *"diagnose --train_data_dir photos --resolution 8 --output diagnosis".split()],
    "samples": [*COMMAND, *"sample --model demonstration --num_images 6 --num_inference_steps 3".split()],
    "evaluation": [
        *COMMAND,
        *"evaluate --model demonstration --train_data_dir photos --num_images 20 --num_inference_steps 3".split(),
        *"--regularizer total_variation --features pixels --output evaluation".split(),
    ],
}
OUTPUT_FLAG = {"diagnosis": None, "evaluation": None, "resumed": None, "samples": "--output"}
NOT_RESULTS = ("seconds", "time", "command", "versions", "commit", "device", "sha256", "size", "path", "run")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("written", type=Path, help="file for the digests of this checkout")
    parser.add_argument("before", type=Path, nargs="?", help="file of another checkout to compare with")
    args = parser.parse_args()
    digests = digests_of_runs()
    args.written.write_text(json.dumps(digests, indent=1, sort_keys=True))
    print(f"{len(digests)} values of {len(RUNS)} command lines in {args.written}")
    if args.before:
        sys.exit(report(json.loads(args.before.read_text()), digests))


def digests_of_runs() -> dict[str, str]:
    """A digest by "file: part" of all that the command lines write."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_data(work)
        for name, command in RUNS.items():
            flag = OUTPUT_FLAG.get(name, "--output_dir")
            done = subprocess.run(
                command + ([flag, name] if flag else []), cwd=work, env=environment, capture_output=True, text=True
            )
            if done.returncode:
                sys.exit(f"{name} failed with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
            print(f"{name} done", flush=True)
        found = {}
        for path in sorted(path for path in work.rglob("*") if path.is_file()):
            place = path.relative_to(work).as_posix()
            if place.split("/")[0] not in ("photos", "flow.npy"):
                found |= {f"{place}: {part}": value for part, value in digests_of(path)}
        return found


def write_data(work: Path) -> None:
    """48 pictures in two classes, and as many fields."""
    random = np.random.default_rng(0)
    for number in range(48):
        folder = work / "photos" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(random.integers(0, 256, (10, 12, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    np.save(work / "flow.npy", random.normal(0, 3, (48, 2, 8, 8)).astype(np.float32))


def digests_of(path: Path):
    """(part, digest) of the tensors, numbers or pixels of a file; nothing of other files."""
    if path.suffix == ".safetensors":
        yield from ((name, digest(tensor)) for name, tensor in load_file(path).items())
    elif path.suffix in (".bin", ".pt", ".pkl") and "checkpoint-" in str(path):
        yield from leaves(loaded(path))
    elif path.suffix == ".png":
        picture = np.asarray(PIL.Image.open(path))
        yield "pixels", digest(torch.from_numpy(picture.copy()))
    elif path.name in (
        "manifest.json",
        "reg_config.json",
        "comparison.json",
        "evaluation.json",
        "total_variation.json",
    ):
        yield from leaves(json.loads(path.read_text()))
    elif path.suffix == ".jsonl":
        for number, line in enumerate(path.read_text().splitlines()):
            yield from ((f"line {number} {part}", value) for part, value in leaves(json.loads(line)))


def loaded(path: Path):
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except (pickle.UnpicklingError, RuntimeError):
        return pickle.loads(path.read_bytes())


def leaves(value, name: str = ""):
    """(name, digest) of each tensor and number in nested lists and dictionaries."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key not in NOT_RESULTS:
                yield from leaves(inner, f"{name}/{key}")
    elif isinstance(value, (list, tuple)):
        for number, inner in enumerate(value):
            yield from leaves(inner, f"{name}/{number}")
    elif isinstance(value, (torch.Tensor, np.ndarray)):
        yield name, digest(torch.as_tensor(value))
    elif isinstance(value, (bool, int, float)):
        yield name, repr(value)


def digest(tensor: torch.Tensor) -> str:
    content = tensor.contiguous().cpu().view(torch.uint8) if tensor.dim() else tensor.reshape(1).view(torch.uint8)
    return hashlib.sha256(content.numpy().tobytes()).hexdigest()[:16]


def report(before: dict, after: dict) -> int:
    """Prints what differs; 1 if anything does."""
    missing, new = sorted(before.keys() - after.keys()), sorted(after.keys() - before.keys())
    changed = sorted(name for name in before.keys() & after.keys() if before[name] != after[name])
    for title, names in (("missing", missing), ("new", new), ("changed", changed)):
        for name in names:
            print(f"{title}: {name} {before.get(name, '')} {after.get(name, '')}")
    print(f"{len(before)} values before, {len(missing)} missing, {len(new)} new, {len(changed)} changed")
    return int(bool(missing or new or changed))


if __name__ == "__main__":
    main()
