"""Kills real training runs at random moments, resumes them, and compares their ends with runs that nobody disturbed.

    python docs/benchmarks/random_kills.py [--kills 50] [--seed 0]

Each run is started again by the same command, with --resume auto, until it is through; SIGKILL meets the whole run or,
where it has several processes, sometimes one of them. At the end the weights, their average in the last checkpoint
and the logged numbers must be those of the undisturbed run, bit for bit. A checkpoint is written every other step, so
that many kills meet one that is half written. The result is printed and kept in random_kills.txt beside this file.
"""

import argparse
import filecmp
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil
from diffusers import UNet2DModel

ROOT = Path(__file__).parents[2]
RESULT = Path(__file__).with_suffix(".txt")
STEPS = 40
FLAGS = f"""--model_config_name_or_path tiny --resolution 8 --train_batch_size 4 --max_train_steps {STEPS} --no-compare
 --checkpointing_steps 2 --checkpoints_total_limit 2 --ddpm_num_inference_steps 1 --eval_batch_size 1
 --preview_steps 1000 --lr_warmup_steps 5 --mixed_precision no --resume auto""".split()
LAUNCHER = (sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch")
# name: (launcher, further flags, variables)
KINDS = {
    "one process": ((sys.executable,), [], {}),
    "one process, two data workers": ((sys.executable,), ["--dataloader_num_workers", "2"], {}),
    "two processes": ((*LAUNCHER, "--multi_gpu", "--num_processes", "2"), [], {"ACCELERATE_USE_CPU": "true"}),
    "gradients accumulated, epochs of 5 steps": (
        (sys.executable,),
        ["--gradient_accumulation_steps", "2", "--train_data_dir", "few", "--random_flip"],
        {},
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="in all")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--kinds", nargs="+", type=int, default=list(range(len(KINDS))), help="numbers of the kinds")
    parser.add_argument("--keep", action="store_true", help="leave random_kills.txt as it is")
    args = parser.parse_args()
    chance = random.Random(args.seed)
    kinds = [list(KINDS)[number] for number in args.kinds]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        _prepare(folder)
        rows = {}
        for number, kind in enumerate(kinds):
            share = args.kills // len(kinds) + (number < args.kills % len(kinds))
            rows[kind] = _torture(folder, kind, share, chance)
            print(_row(kind, rows[kind]), flush=True)
    total = sum(rows.values(), Counter())
    head = f"{'':42}{'kills':>7}{'during a save':>15}{'before a step':>15}{'runs':>6}{'equal ends':>12}"
    lines = [head, *(_row(kind, row) for kind, row in rows.items()), _row("all", total)]
    if not args.keep:
        RESULT.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    if total["equal"] < total["runs"]:
        sys.exit("some runs did not end as the undisturbed ones")


def _prepare(folder: Path) -> None:
    """The network, and a folder of few pictures."""
    import numpy as np
    import PIL.Image

    network = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"), norm_num_groups=4,
    )  # fmt: skip
    network.save_config(folder / "tiny")
    (folder / "few").mkdir()
    for index, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)):
        PIL.Image.fromarray(pixels).save(folder / "few" / f"{index:02}.png")


def _torture(folder: Path, kind: str, kills: int, chance: random.Random) -> Counter:
    """Repeats a run until `kills` of its processes were killed, and compares each with an undisturbed run."""
    started = time.monotonic()
    undisturbed = folder / f"{kind}-undisturbed"
    if _start(folder, kind, undisturbed).wait() != 0:
        sys.exit((folder / "log.txt").read_text())
    longest = time.monotonic() - started
    counts = Counter()
    while counts["kills"] < kills:
        output_dir = folder / f"{kind}-{counts['runs']}"
        while True:
            process = _start(folder, kind, output_dir)
            if counts["kills"] < kills and _kill_sometime(process, output_dir, longest, chance):
                counts["kills"] += 1
                counts["during a save"] += any(output_dir.glob(".checkpoint-*"))
                counts["before a step"] += not any(output_dir.glob("*checkpoint-*"))
            else:
                process.wait()
                break
        counts["runs"] += 1
        if _equal(undisturbed, output_dir):
            counts["equal"] += 1
        else:
            print((folder / "log.txt").read_text()[-2000:])
    return counts


def _start(folder: Path, kind: str, output_dir: Path) -> subprocess.Popen:
    launcher, flags, variables = KINDS[kind]
    with (folder / "log.txt").open("w") as log:
        return subprocess.Popen(
            [*launcher, str(ROOT / "train_reg.py"), *FLAGS, *flags, "--output_dir", str(output_dir)],
            cwd=folder,
            env={**os.environ, **variables, "HF_HOME": str(folder / "huggingface")},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _kill_sometime(process: subprocess.Popen, output_dir: Path, longest: float, chance: random.Random) -> bool:
    """Kills a run at a random moment: one time in five while it starts, else while it trains; whether it still ran."""
    if chance.random() < 0.2:
        time.sleep(chance.uniform(0, longest))
    else:
        before = _newest(output_dir)
        while process.poll() is None and _newest(output_dir) == before:
            time.sleep(0.01)
        time.sleep(chance.expovariate(1.0))
    if process.poll() is not None:
        return False
    children = [child for child in psutil.Process(process.pid).children() if "train_reg.py" in " ".join(_line(child))]
    if len(children) > 1 and chance.random() < 0.5:
        chance.choice(children).kill()  # the launcher then ends the others
        process.wait()
    else:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return True


def _line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _newest(output_dir: Path) -> tuple:
    """Changes when a checkpoint is begun or done."""
    return tuple(sorted(path.name for path in output_dir.glob("*checkpoint-*")))


def _equal(undisturbed: Path, output_dir: Path) -> bool:
    """Whether a run has left the same weights, the same state and the same numbers."""
    newest = f"checkpoint-{STEPS}"
    files = ["unet/diffusion_pytorch_model.safetensors", "metrics.jsonl"]
    files += [f"{newest}/{name}" for name in json.loads((undisturbed / newest / "manifest.json").read_text())["files"]]
    different = [name for name in files if not _same(undisturbed / name, output_dir / name)]
    if different:
        print(f"{output_dir}: {', '.join(different)} differ")
    return not different


def _same(one: Path, other: Path) -> bool:
    return other.is_file() and filecmp.cmp(one, other, shallow=False)


def _row(name: str, counts: Counter) -> str:
    columns = (counts["kills"], counts["during a save"], counts["before a step"], counts["runs"], counts["equal"])
    return name.ljust(42) + "".join(
        f"{value:>{width}}" for value, width in zip(columns, (7, 15, 15, 6, 12), strict=True)
    )


if __name__ == "__main__":
    main()
