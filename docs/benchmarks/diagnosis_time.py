"""How long a diagnosis of 10,000 pictures of 28 x 28 takes, and how much memory: the embedded ones and their mirrors.

    python docs/benchmarks/diagnosis_time.py

Writes what it found beside this script.
"""

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from reg_diffusers.data.training_data import load_training_data
from reg_diffusers.settings import DataSettings


def main():
    data = load_training_data(DataSettings(resolution=28))
    images = data.normalization.normalize(data.examples.__getitems__(list(range(len(data))))["values"]).numpy()
    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/pictures.npy", np.concatenate([images, images[..., ::-1]]))
        flags = ("--train_data_dir", f"{folder}/pictures.npy", "--output", f"{folder}/diagnosis")
        start = time.perf_counter()
        command = [sys.executable, "-m", "reg_diffusers", "diagnose", "--regularizer", "total_variation", *flags]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    megabytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    said = f"10,000 pictures of 28 x 28, total_variation: {seconds:.0f} s with the start, at most {megabytes:.0f} MB"
    Path(__file__).with_suffix(".txt").write_text(said + "\n")
    print(said)


if __name__ == "__main__":
    main()
