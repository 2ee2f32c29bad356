"""Measures training, decoding and sampling on one accelerator, beside the usual loop in the same call.

    python docs/benchmarks/gpu/gpu.py                # at most 8 minutes on one H100
    python docs/benchmarks/gpu/gpu.py --dry_run      # tiny sizes, any machine, under a minute

It needs torch, diffusers and this package (installed, or by PYTHONPATH=. in its checkout), and transformers for one
section; neither data nor a network connection: images are generated, weights are random. Contestants take turns in
blocks of steps; times are medians, ratios are those of neighbouring blocks. A section that fails, or takes longer than
its share of the time, is named, and the turns that it has completed are kept; the others go on.
Results are written to gpu.json and gpu.txt in --output after each row, so a run that is killed loses none.
"""

import argparse
import gc
import json
import os
import platform
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import diffusers
import torch
from sections import SECONDS, SECTIONS, Sizes

HERE = Path(__file__).parent
TINY = {
    "layers_per_block": 1,
    "block_out_channels": [32, 32],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry_run", action="store_true", help="tiny sizes on whatever device there is")
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=list(SECTIONS), metavar="NAME")
    parser.add_argument("--limit", type=float, default=480, help="seconds of all sections together")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of gpu.json and gpu.txt")
    args = parser.parse_args()
    if not torch.cuda.is_available() and not args.dry_run:
        parser.error("no CUDA device: measure on a GPU, or check the script by --dry_run")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)

    sizes, begin = _tiny() if args.dry_run else _full(), time.perf_counter()
    found = {"machine": _machine(device), "dry_run": args.dry_run, "rows": [], "left_out": []}
    for name in args.sections:
        left = args.limit - (time.perf_counter() - begin)
        try:
            with _at_most(min(left, SECONDS[name])):
                for row in SECTIONS[name](sizes, device):
                    found["seconds"] = time.perf_counter() - begin
                    found["rows"].append(row)
                    print(_line(row), flush=True)
                    _write(args.output, found)
        except Exception as error:  # of any type: out of memory, no compiler, a version that differs
            found["left_out"].append(f"{name}: {type(error).__name__}: {error}".splitlines()[0])
        found["seconds"] = time.perf_counter() - begin
        _write(args.output, found)
        gc.collect()  # of a section that failed
        if device.type == "cuda":
            torch.cuda.empty_cache()
    for line in found["left_out"]:
        print(f"left out: {line}")
    print(f"{args.output / 'gpu.txt'}, {found.get('seconds', 0):.0f} s")


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in the block after that time, when the call that runs then returns to Python.

    It is raised again every ten seconds, because what runs, such as a compiler, may catch it and go on.
    """

    def stop(*_) -> None:
        raise TimeoutError(f"longer than {max(seconds, 0):.0f} s")

    if seconds <= 0:
        stop()
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 10)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _full() -> Sizes:
    return Sizes(
        network=json.loads((HERE / "train_unconditional.json").read_text()),
        training=((64, 64), (256, 16)),
        autoencoder=(128, 256, 512, 512),
        pixels=512,
        latents=8,
        vit=(384, 12),
        rounds=5,
        steps=6,
    )


def _tiny() -> Sizes:
    return Sizes(
        network=TINY, training=((16, 2),), autoencoder=(32, 32), pixels=32, latents=2, vit=(64, 1), rounds=1, steps=1
    )


def _machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    return (
        f"{name}, {os.cpu_count()} cores, torch {torch.__version__}, diffusers {diffusers.__version__}, TF32 allowed"
    )


def _line(row: dict) -> str:
    if "ms" not in row:
        value = f"{row['s']:.0f} s" if "s" in row else f"{row['value']:.4g}"
        return f"  {row['section']}: {row['what']}: {value}"
    parts = [f"{row['ms']:9.2f} ms", f"{row['images_per_s']:9.1f} images/s"]
    parts.append(f"{row['times_as_fast']:.3f} x ({row['from']:.3f} to {row['to']:.3f})")
    parts += [f"{100 * row['mfu']:.1f} % MFU"] if row["mfu"] else []
    parts += [f"{row['peak_GiB']:.2f} GiB"] if row["peak_GiB"] else []
    return f"  {row['section']}: {row['what']:<40} " + "  ".join(parts)


def _write(folder: Path, found: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    title = "dry run, times mean nothing" if found["dry_run"] else f"{found['seconds']:.0f} s in all"
    lines = [f"{found['machine']}; {title}", *map(_line, found["rows"])]
    lines += [f"left out: {line}" for line in found["left_out"]]
    (folder / "gpu.txt").write_text("\n".join(lines) + "\n")
    (folder / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
