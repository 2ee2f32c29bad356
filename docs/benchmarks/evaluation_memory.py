"""Measures the time and the memory of `reg-diffusers evaluate` after sampling, by the number of images.

    python docs/benchmarks/evaluation_memory.py

Images of 1 x 32 x 32 random pixels stand for the data and for the samples of one model, in files that are mapped into
memory. The features are 64 random projections, as of a network, or the pixels. Each line is a process of its own, with
one thread. "blocks" is what the process holds at most beyond its start, of memory that does not belong to files. The
table is printed and kept in evaluation_memory.txt beside this file.
"""

import json
import subprocess
import sys
import tempfile
import threading
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import psutil
import torch

from reg_diffusers import Term
from reg_diffusers.cli.bench import Bench
from reg_diffusers.cli.judged import judge_models
from reg_diffusers.evaluation.features import Features, pixels
from reg_diffusers.evaluation.images import Images
from reg_diffusers.regularizers import total_variation

RESULT = Path(__file__).with_suffix(".txt")
NUMBERS = (2_500, 5_000, 10_000, 50_000)
SHAPE = (1, 32, 32)
DIMENSIONS = 64


def main() -> None:
    lines = [f"{'features':<14}{'images':>8}{'searched':>10}{'processor, s':>14}{'blocks, MiB':>14}{'all, MiB':>10}"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "images.npy"
        rows = np.lib.format.open_memmap(path, "w+", np.float32, (3 * max(NUMBERS), *SHAPE))
        generator = np.random.default_rng(0)
        for start in range(0, len(rows), 1000):
            rows[start : start + 1000] = generator.standard_normal((1000, *SHAPE), np.float32)
        rows.flush()
        for kind in ("projections", "pixels"):
            for number in NUMBERS:
                command = [sys.executable, __file__, str(path), kind, str(number)]
                found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                whole = 3 * number * 4 * np.prod(SHAPE) / 2**20
                searched = max(2 * number, 10_000)
                line = f"{kind:<14}{number:>8,}{searched:>10,}{found['seconds']:>14.0f}"
                lines.append(f"{line}{found['bytes'] / 2**20:>14.0f}{whole:>10.0f}")
                print(lines[-1], flush=True)
                RESULT.write_text("\n".join(lines) + "\n")


def measure(path: str, kind: str, number: int) -> None:
    torch.set_num_threads(1)
    rows = np.load(path, mmap_mode="r")

    def read(places: range) -> torch.Tensor:
        return torch.from_numpy(np.array(rows[places.start : places.stop]))

    def moved(by: int) -> Images:
        return Images(number, lambda places: read(range(by + places.start, by + places.stop)))

    matrix = torch.randn(int(np.prod(SHAPE)), DIMENSIONS, generator=torch.Generator().manual_seed(0))
    projections = Features(lambda images: images.flatten(1) @ matrix, "projections", "FD", "KD")
    searched = max(2 * number, 10_000)
    bench = Bench(None, "", [], number, moved(0), moved(number), searched=searched)
    bench.images = read
    features = pixels() if kind == "pixels" else projections
    arguments, samples = Namespace(fid=False), {"model": moved(2 * number)}
    process, peak, done = psutil.Process(), [0], threading.Event()
    before = process.memory_info()

    def watch() -> None:
        while not done.wait(0.02):
            now = process.memory_info()
            peak[0] = max(peak[0], now.rss - now.shared - before.rss + before.shared)

    thread = threading.Thread(target=watch)
    thread.start()
    began = time.process_time()
    terms = {"total_variation": Term(total_variation, 1.0)}
    judge_models(arguments, {}, samples, bench, features, terms, "cpu")
    seconds = time.process_time() - began
    done.set()
    thread.join()
    print(json.dumps({"seconds": seconds, "bytes": peak[0]}))


if __name__ == "__main__":
    measure(sys.argv[1], sys.argv[2], int(sys.argv[3])) if len(sys.argv) == 4 else main()
