"""Measures how long training takes to start on a folder of 200,000 image files, and how much memory that needs.

    python docs/benchmarks/many_files.py [--files N] [--folder FOLDER]

The files are hard links of 400 distinct pictures of 64 x 64 pixels, one half PNG, one half JPEG, in 200 subfolders;
nothing in the package remembers a file by its inode. Each start is a process of its own: train_reg.py with
--resolution 32 and one step of a small network, timed from the launch to the end of the first step. "first" decodes
everything into an empty cache, "second" is the same command again, "streaming" decodes on demand. Beside the time is
that of all processors together, until the exit, which tells whether others used the machine. Memory is the largest sum
of the memory of the process and its children; pages that several of them share count once (Linux's PSS).
The table is printed and kept in many_files.txt beside this file; the folder is deleted.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import PIL.Image
import psutil

RESULT = Path(__file__).with_suffix(".txt")
TRAIN = Path(__file__).parents[2] / "train_reg.py"
PICTURES = 400
FOLDERS = 200
SIDE = 64
FLAGS = "--regularizer total_variation --resolution 32 --train_batch_size 4 --max_train_steps 1 --num_threads 1"
FLAGS += " --ddpm_num_inference_steps 2 --overwrite_output_dir --mixed_precision no"
NETWORK = '{"sample_size": 32, "block_out_channels": [8, 8], "norm_num_groups": 4, "layers_per_block": 1,'
NETWORK += ' "down_block_types": ["DownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "UpBlock2D"]}'


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--files", type=int, default=200_000)
    parser.add_argument("--folder", help="where the temporary folder is made")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        write(folder / "data", arguments.files)
        lines = [f"{arguments.files:,} files, {os.cpu_count()} processors", ""]
        lines.append(f"{'start':<12}{'to the first step, s':>22}{'processors, s':>18}{'memory, GiB':>14}")
        for name, flags in (("first", ""), ("second", ""), ("streaming", "--streaming")):
            step, processors, memory = start(folder, flags)
            lines.append(f"{name:<12}{step:>22.1f}{processors:>18.1f}{memory:>14.2f}")
    finally:
        shutil.rmtree(folder)
    text = "\n".join(lines) + "\n"
    print(text, end="")
    RESULT.write_text(text)


def write(folder: Path, files: int) -> None:
    """Writes the pictures, and links them under as many names as there are files."""
    random, pictures = np.random.default_rng(0), folder.parent / "pictures"
    pictures.mkdir()
    for number in range(PICTURES):
        coarse = PIL.Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8))
        kind = "png" if number % 2 else "jpg"
        coarse.resize((SIDE, SIDE), PIL.Image.Resampling.BICUBIC).save(pictures / f"{number}.{kind}")
    originals = sorted(pictures.iterdir())
    for number in range(FOLDERS):
        (folder / f"{number:03d}").mkdir(parents=True)
    for number in range(files):
        original = originals[number % len(originals)]
        os.link(original, folder / f"{number % FOLDERS:03d}" / f"{number:06d}{original.suffix}")


def start(folder: Path, flags: str) -> tuple[float, float, float]:
    """Trains one step; returns the seconds to its end, those of the processors, and the largest memory in GiB."""
    (folder / "network.json").write_text(NETWORK)
    command = [sys.executable, str(TRAIN), "--train_data_dir", str(folder / "data"), *FLAGS.split(), *flags.split()]
    command += ["--model_config_name_or_path", str(folder / "network.json"), "--output_dir", str(folder / "run")]
    command += ["--cache_dir", str(folder / "cache")]
    log, began, memory, step = folder / "run" / "metrics.jsonl", time.time(), 0, None
    before = os.times()
    process = subprocess.Popen(command, env={**os.environ, "HF_HOME": str(folder / "home")})
    while process.poll() is None:
        memory = max(memory, used(process.pid))
        if step is None and log.exists() and log.stat().st_mtime > began:
            step = time.time() - began
        time.sleep(0.2)
    if process.returncode:
        raise SystemExit(process.returncode)
    after = os.times()
    processors = after.children_user + after.children_system - before.children_user - before.children_system
    return step, processors, memory / 2**30


def used(pid: int) -> int:
    """Returns the bytes of a process and its children."""
    total = 0
    try:
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            total += one.memory_full_info().pss
    except psutil.Error:  # it has ended
        pass
    return total


if __name__ == "__main__":
    main()
