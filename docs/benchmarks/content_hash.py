"""Measures what the hash of a data set costs, by which a run notices changed images: `data.content.table_digests`.

    python docs/benchmarks/content_hash.py [--images N] [--side PIXELS] [--folder FOLDER]

The table is like that of decoded images in the cache: uint8 pixels of random RGB images, mapped into memory. "first"
is the start after the images changed, "later" every other one, which reads the result. Seconds are those of the clock
and of a processor, which is what counts where others use the machine. The result is kept in content_hash.txt beside
this file.
"""

import argparse
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow
from datasets import Dataset, load_from_disk

from reg_diffusers.data.content import table_digests

RESULT = Path(__file__).with_suffix(".txt")
ROWS = 10_000  # written at a time


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=200_000)
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--folder", help="where the temporary folder is made")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        table = written(Path(folder), arguments.images, 3 * arguments.side**2)
        size = arguments.images * 3 * arguments.side**2 / 2**30
        lines = [
            f"{arguments.images:,} images of 3 x {arguments.side} x {arguments.side}, {size:.2f} GiB; {processor()}",
            f"{'start':<8}{'seconds':>10}{'of a processor':>17}",
        ]
        for name in ("first", "later"):
            clock, own = time.perf_counter(), time.process_time()
            table_digests(table, Path(folder))
            lines.append(f"{name:<8}{time.perf_counter() - clock:>10.2f}{time.process_time() - own:>17.2f}")
    text = "\n".join(lines) + "\n"
    print(text, end="")
    RESULT.write_text(text)


def written(folder: Path, images: int, length: int) -> Dataset:
    """Returns a table of random images that is mapped from a file."""
    random, kind = np.random.default_rng(0), pyarrow.list_(pyarrow.uint8(), length)
    parts = []
    for start in range(0, images, ROWS):
        values = random.integers(0, 256, min(ROWS, images - start) * length, np.uint8)
        parts.append(pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(values), type=kind))
    Dataset(pyarrow.table({"pixels": pyarrow.chunked_array(parts)})).save_to_disk(folder / "table")
    return load_from_disk(str(folder / "table"))


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
