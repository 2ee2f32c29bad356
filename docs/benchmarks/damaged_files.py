"""Damages checkpoints and data at random places, and counts what is noticed.

    python docs/benchmarks/damaged_files.py [--tries 500] [--seed 0]

A damaged checkpoint must be left out in favour of the one before, unless it reads as it was. Damaged data must be
read, or refused in one line that names the file or the row. Anything else is missed: another checkpoint, other
settings, a traceback. The last lines count the cases of the tests of faults and hostile input, as pytest collects
them. The result is printed and kept in damaged_files.txt beside this file.
"""

import argparse
import contextlib
import io
import random
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import PIL.Image
from datasets import Dataset, Features, Image
from datasets.utils.logging import disable_progress_bar, set_verbosity
from diffusers import UNet2DModel

from reg_diffusers.data.training_data import load_training_data
from reg_diffusers.runs.lineage import find_checkpoint
from reg_diffusers.runs.manifest import read_manifest
from reg_diffusers.runtime.errors import UsageError
from reg_diffusers.settings import OutputSettings
from reg_diffusers.settings.arguments import parse_args

ROOT = Path(__file__).parents[2]
RESULT = Path(__file__).with_suffix(".txt")
FLAGS = """--model_config_name_or_path tiny --resolution 8 --train_batch_size 4 --max_train_steps 4 --no-compare
 --checkpointing_steps 2 --ddpm_num_inference_steps 1 --eval_batch_size 1 --lr_warmup_steps 0 --mixed_precision no
 --regularizer none --output_dir out""".split()
TESTS = ("hostile", "lineage", "checkpoint", "run_lock", "run_folder", "ending", "interruption", "links", "demo_guard")
NOTICED, READ, MISSED = "noticed", "read", "missed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tries", type=int, default=500, help="for each kind of damage to a checkpoint")
    parser.add_argument("--seed", type=int, default=0, help="of the places")
    args = parser.parse_args()
    chance = random.Random(args.seed)
    disable_progress_bar()
    set_verbosity(60)
    with tempfile.TemporaryDirectory() as folder:
        rows = {**_checkpoints(Path(folder), args.tries, chance), **_data(Path(folder), args.tries // 5, chance)}
    lines = [f"{'':46}{'tries':>8}{NOTICED:>10}{READ:>8}{MISSED:>8}"]
    for name, found in rows.items():
        lines.append(f"{name:46}{found.total():8}{found[NOTICED]:10}{found[READ]:8}{found[MISSED]:8}")
    lines += ["", *_cases()]
    print(*lines, sep="\n")
    RESULT.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _checkpoints(folder: Path, tries: int, chance: random.Random) -> dict[str, Counter]:
    UNet2DModel(
        block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    ).save_config(folder / "tiny")  # fmt: skip
    command = [sys.executable, str(ROOT / "train_reg.py"), *FLAGS]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    out, newest = folder / "out", folder / "out" / "checkpoint-4"
    settings, wanted = OutputSettings(output_dir=str(out), resume_from_checkpoint="auto"), read_manifest(newest)

    def outcome() -> str:
        try:
            found = find_checkpoint(settings, out).name
            if found == "checkpoint-4":
                read = read_manifest(newest)  # a flip in the name of its sum makes it one of an older version
                return READ if {name: read.get(name) for name in wanted} == wanted else MISSED
            return NOTICED if found == "checkpoint-2" else MISSED
        except Exception:
            return MISSED

    others = [path for path in newest.iterdir() if path.name != "manifest.json" and path.stat().st_size]
    rows = {}
    for name, files in (("manifest.json", [newest / "manifest.json"]), ("another file of a checkpoint", others)):
        for kind, damage in (("one bit flipped", _flipped), ("cut off", _cut)):
            rows[f"{name}, {kind}"] = _tried(files, damage, outcome, tries, chance)
    return rows


def _data(folder: Path, tries: int, chance: random.Random) -> dict[str, Counter]:
    pixels = np.random.default_rng(0).integers(0, 255, (20, 8, 8), np.uint8)
    images = list(map(PIL.Image.fromarray, pixels))
    table = Dataset.from_dict({"image": images}, Features(image=Image()))
    table.to_parquet(folder / "t.parquet")
    table.save_to_disk(folder / "saved")
    next((folder / "saved").glob("*.arrow")).rename(folder / "t.arrow")
    (folder / "photos").mkdir()
    for number, image in enumerate(images):
        image.save(folder / "photos" / f"{number}.png")
    np.save(folder / "f.npy", pixels[:, None].astype(np.float32))
    rows = {}
    for flag, source, file in (
        ("--dataset_name", "t.parquet", "t.parquet"),
        ("--dataset_name", "t.arrow", "t.arrow"),
        ("--train_data_dir", "f.npy", "f.npy"),
        ("--train_data_dir", "photos", "photos/7.png"),
    ):
        flags = [flag, str(folder / source), "--resolution", "8", "--cache_dir", str(folder / "cache")]

        def outcome(flags=flags, file=file) -> str:
            try:
                with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
                    data = load_training_data(parse_args(flags).data)
                    data.__getitems__(list(range(len(data))))
                return READ
            except UsageError as error:
                is_named = any(part in str(error) for part in (Path(file).name, "row ", "the fields hold"))
                return NOTICED if is_named and len(str(error).splitlines()) == 1 else MISSED
            except Exception:
                return MISSED

        for kind, damage in (("4 bytes changed", _overwritten), ("cut off", _cut)):
            rows[f"a {Path(file).suffix} file, {kind}"] = _tried([folder / file], damage, outcome, tries, chance)
    return rows


def _tried(files: list[Path], damage, outcome, tries: int, chance: random.Random) -> Counter:
    found = Counter()
    for _ in range(tries):
        path = chance.choice(files)
        whole = path.read_bytes()
        path.write_bytes(damage(whole, chance))
        found[outcome()] += 1
        path.write_bytes(whole)
    return found


def _flipped(content: bytes, chance: random.Random) -> bytes:
    changed = bytearray(content)
    changed[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def _cut(content: bytes, chance: random.Random) -> bytes:
    return content[: chance.randrange(len(content))]


def _overwritten(content: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(len(content) - 4)
    return content[:place] + b"\xff\xff\xff\x7f" + content[place + 4 :]


def _cases() -> list[str]:
    """How many cases the tests of faults have."""
    files = [f"tests/test_{name}.py" for name in TESTS]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "--slow", *files]
    said = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    cases = Counter(re.findall(r"^(tests/test_\w+\.py)::", said, re.MULTILINE))
    return [f"{name:46}{cases[name]:8} cases" for name in files]


if __name__ == "__main__":
    main()
