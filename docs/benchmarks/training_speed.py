"""Measures train_reg.py, with total variation, against diffusers' own train_unconditional.py, without.

    python docs/benchmarks/training_speed.py --peer path/to/train_unconditional.py [--rows tiny small] [--rounds 3]

Every measurement is a process of its own that runs the script itself, from its `main`: the same UNet2DModel config,
batch, pictures (generated, PNG) and moving average. A step is timed from one `AdamW.step` to the next, so it holds all
that the loop does. Contestants take turns, in rounds; the figures are medians of the ratios within a round. Steps
longer than 1.5 times their run's median are left out and counted: OpenMP's threads spin while they wait for each
other, so any other process on the machine makes single steps several times longer. torchvision's transforms are
replaced one by one by equal ones through PIL (pil_transforms.py), as torchvision's compiled operators need its own
build of PyTorch. Both run as `python script`, on all cores: under `accelerate launch` the peer would use one.

The result is printed and kept in training_speed.txt beside this file, each call with its flags. "Load before" is that
of the minute before a call, often of the call before it.
"""

import argparse
import itertools
import json
import os
import platform
import resource
import runpy
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULT = Path(__file__).with_suffix(".txt")
SCRIPT = Path(__file__).parents[2] / "train_reg.py"
WARM_UP = 3  # steps

CONFIGS = {
    "tiny": {"block_out_channels": (32, 64), "layers_per_block": 1, "attention": 1},
    "small": {"block_out_channels": (64, 128, 128), "layers_per_block": 2, "attention": 1},
    "default": {"block_out_channels": (128, 128, 256, 256, 512, 512), "layers_per_block": 2, "attention": 4},
}
SIZES = {"tiny": (32, 64), "small": (32, 32), "default": (64, 4)}  # resolution, batch

# By name: script, flags.
CONTESTANTS = {
    "peer fp32": ("peer", ["--mixed_precision", "no"]),
    "peer bf16": ("peer", ["--mixed_precision", "bf16"]),
    "ours bf16": ("ours", ["--mixed_precision", "bf16"]),
    "ours fp32": ("ours", ["--mixed_precision", "no"]),
    "ours bf16 --compile": ("ours", ["--mixed_precision", "bf16", "--compile"]),
    "ours bf16 --attention sdpa": ("ours", ["--mixed_precision", "bf16", "--attention", "sdpa"]),
    "ours fp32 --attention explicit": ("ours", ["--mixed_precision", "no", "--attention", "explicit"]),
    "ours bf16, no term": ("ours", ["--mixed_precision", "bf16", "--regularizer", "none"]),
    "ours bf16, memory given back": ("ours", ["--mixed_precision", "bf16"]),
    "ours bf16 --gradient_checkpointing": ("ours", ["--mixed_precision", "bf16", "--gradient_checkpointing"]),
}
ENVIRONMENT = {"ours bf16, memory given back": {"GLIBC_TUNABLES": "glibc.malloc.check=0"}}  # a user's choice of malloc
RATIOS = [
    ("peer fp32", "ours bf16"),
    ("peer bf16", "ours bf16"),
    ("peer fp32", "ours fp32"),
    ("peer fp32", "ours bf16 --compile"),
    ("ours bf16", "ours bf16 --compile"),
    ("ours bf16 --attention sdpa", "ours bf16"),
    ("ours fp32", "ours fp32 --attention explicit"),
    ("ours bf16, memory given back", "ours bf16"),
    ("ours bf16", "ours bf16, no term"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", type=Path, help="your copy of diffusers' train_unconditional.py")
    parser.add_argument("--rows", nargs="*", choices=list(CONFIGS), default=["tiny", "small"])
    parser.add_argument("--contestants", nargs="+", choices=list(CONTESTANTS), default=list(CONTESTANTS)[:4])
    parser.add_argument("--parts", nargs="*", choices=["training", "x0", "sampling"], default=["training"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="measured in each process, after those that warm up")
    parser.add_argument(
        "--threads", type=int, help="of each process; 1 is less disturbed by others; default: all cores"
    )
    parser.add_argument("--append", action="store_true", help="keep what earlier calls have found")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.threads:
        import torch

        torch.set_num_threads(args.threads)
    if args.child:
        print(json.dumps(CHILDREN[args.child[0]](args, *args.child[1:])))
        return
    if not args.append:
        RESULT.unlink(missing_ok=True)
    flags = ["PEER" if args.peer and word == str(args.peer) else word for word in sys.argv[1:]]
    say(f"training_speed.py {shlex.join(flags)}\n{about_the_machine()}")
    with tempfile.TemporaryDirectory() as folder:
        for row in args.rows if "training" in args.parts else ():
            training_row(args, row, Path(folder))
    if "x0" in args.parts:
        x0_row(args)
    if "sampling" in args.parts:
        sampling_row(args)


def say(text: str) -> None:
    print(text, flush=True)
    with RESULT.open("a") as file:
        file.write(text + "\n")


def about_the_machine() -> str:
    import diffusers
    import torch

    name = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), ":")
    return (
        f"torch {torch.__version__}, diffusers {diffusers.__version__}, {name.split(':')[1].strip()}"
        f" ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads,"
        f" load before {os.getloadavg()[0]:.1f}"
    )


# Training


def training_row(args, row: str, folder: Path) -> None:
    resolution, batch = SIZES[row]
    write_config(row, folder / row)
    write_pictures(folder / f"{row}-pictures", resolution, batch * (WARM_UP + args.steps + 2))
    names = [name for name in args.contestants if args.peer or not name.startswith("peer")]
    found = {name: [] for name in names}
    for _ in range(args.rounds):
        for name in names:
            found[name].append(run_child(args, ENVIRONMENT.get(name), "train", name, row, str(folder)))
    say(f"\n{row}: UNet2DModel {CONFIGS[row]['block_out_channels']}, 3 x {resolution} x {resolution}, batch {batch},"
        f" EMA; {args.rounds} rounds of {args.steps} steps")  # fmt: skip
    for name in names:
        medians = [run["median"] for run in found[name]]
        peak = statistics.median(run["peak_mb"] for run in found[name])
        left_out = sum(run["left_out"] for run in found[name])
        say(f"  {name:<36}{1000 * statistics.median(medians):8.0f} ms a step  {peak:7.0f} MB at most"
            f"  {left_out} steps left out")  # fmt: skip
    for slow, fast in RATIOS:
        if slow in found and fast in found:
            pairs = zip(found[slow], found[fast], strict=True)
            ratios = [one["median"] / other["median"] for one, other in pairs]
            say(f"  {slow + ' / ' + fast:<50}{statistics.median(ratios):6.3f} x"
                f"  ({min(ratios):.3f} to {max(ratios):.3f})")  # fmt: skip


def write_config(row: str, folder: Path) -> None:
    from diffusers import UNet2DModel

    config = dict(CONFIGS[row])
    attention, levels = config.pop("attention"), len(config["block_out_channels"])
    down = ["AttnDownBlock2D" if level == attention else "DownBlock2D" for level in range(levels)]
    up = ["AttnUpBlock2D" if level == attention else "UpBlock2D" for level in reversed(range(levels))]
    unet = UNet2DModel(
        sample_size=SIZES[row][0], in_channels=3, out_channels=3, down_block_types=down, up_block_types=up, **config
    )
    unet.save_config(folder)


def write_pictures(folder: Path, resolution: int, number: int) -> None:
    """Smooth random colours, a little larger than they are trained at."""
    import numpy as np
    import PIL.Image

    generator = np.random.default_rng(0)
    folder.mkdir()
    for index in range(number):
        seed = PIL.Image.fromarray(generator.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        seed.resize((resolution + 8, resolution + 8), PIL.Image.Resampling.BICUBIC).save(folder / f"{index:05}.png")


def run_child(args, environment: dict | None, *what: str) -> dict:
    threads = ["--threads", str(args.threads)] if args.threads else []
    command = [sys.executable, __file__, "--steps", str(args.steps), *threads, "--child", *what]
    if args.peer:
        command[2:2] = ["--peer", str(args.peer)]
    with tempfile.TemporaryDirectory() as home:
        done = subprocess.run(
            command, env={**os.environ, "HF_HOME": home, **(environment or {})}, capture_output=True, text=True
        )
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


class Enough(BaseException):
    """All steps are measured."""


def train(args, name: str, row: str, folder: str) -> dict:
    """Runs a script in its own process until the given number of steps is done."""
    import torch

    kind, flags = CONTESTANTS[name]
    resolution, batch = SIZES[row]
    ends = []
    step = torch.optim.AdamW.step

    def timed_step(self, *args_, **kwargs):
        result = step(self, *args_, **kwargs)
        ends.append(time.perf_counter())
        if len(ends) > WARM_UP + args.steps:
            raise Enough
        return result

    torch.optim.AdamW.step = timed_step
    flags = [
        *("--train_data_dir", f"{folder}/{row}-pictures", "--resolution", str(resolution)),
        *("--model_config_name_or_path", f"{folder}/{row}", "--train_batch_size", str(batch)),
        *("--use_ema", "--output_dir", f"{folder}/out-{os.getpid()}", "--num_epochs", "1", *flags),
    ]
    try:
        if kind == "peer":
            from pil_transforms import run_script

            run_script(str(args.peer), flags)
        else:
            threads = ["--num_threads", str(args.threads)] if args.threads else []
            sys.argv = [str(SCRIPT), *flags, *threads, "--no-compare"]
            runpy.run_path(str(SCRIPT), run_name="__main__")
    except Enough:
        pass
    times = [end - start for start, end in itertools.pairwise(ends)][WARM_UP:]
    kept = [seconds for seconds in times if seconds <= 1.5 * statistics.median(times)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"median": statistics.median(kept), "left_out": len(times) - len(kept), "peak_mb": peak}


# x0_hat and its total variation


def x0_row(args) -> None:
    say("\nx0_hat of 64 images at 64 timesteps with its total variation, forward and backward")
    for side in (32, 64):
        looped, batched, alone = run_child(args, None, "x0", str(side))["seconds"]
        say(f"  3 x {side} x {side}: scheduler.step in a loop {1000 * looped:.2f} ms, batched {1000 * batched:.2f} ms,"
            f" {looped / batched:.1f} x; total variation alone {1000 * alone:.2f} ms")  # fmt: skip


def x0(args, side: str) -> dict:
    """A loop over the images that asks `scheduler.step` for each x0_hat, as it takes one timestep; and one batch.

    Both in a process that keeps freed memory, as train_reg.py has it.
    """
    import torch
    from diffusers import DDPMScheduler

    from reg_diffusers import predict_original_sample
    from reg_diffusers.regularizers import total_variation
    from reg_diffusers.runtime.hardware import keep_freed_memory

    keep_freed_memory(torch.device("cpu"))
    torch.manual_seed(0)
    scheduler, shape = DDPMScheduler(clip_sample=False), (64, 3, int(side), int(side))
    noisy, timesteps = torch.randn(shape), torch.randint(0, 1000, (64,))

    def looped(model_output):
        outputs = [
            scheduler.step(model_output[i : i + 1], timesteps[i], noisy[i : i + 1]).pred_original_sample
            for i in range(64)
        ]
        return torch.cat(outputs)

    def batched(model_output):
        return predict_original_sample(scheduler, model_output, timesteps, noisy)

    def given(model_output):
        return model_output

    times = {looped: [], batched: [], given: []}
    for _ in range(60):
        for x0_hat, found in times.items():
            model_output = torch.randn(shape, requires_grad=True)
            start = time.perf_counter()
            total_variation(x0_hat(model_output)).mean().backward()
            found.append(time.perf_counter() - start)
    return {"seconds": [statistics.median(found[5:]) for found in times.values()]}


# Sampling


def sampling_row(args) -> None:
    for row in args.rows:
        ways = ("DDPMPipeline fp32", "ours fp32", "ours bf16")
        rounds = [{way: run_child(args, None, "sample", row, way) for way in ways} for _ in range(args.rounds)]
        say(f"\nsampling, {row}: batch 16, DDPM, {args.steps} steps; {args.rounds} rounds")
        for way in ways:
            per_call = statistics.median(found[way]["seconds"] for found in rounds)
            say(f"  {way:<36}{1000 * per_call:8.0f} ms a network call  {16 / args.steps / per_call:6.2f} images/s")
        for way in ways[1:]:
            ratios = [found[ways[0]]["seconds"] / found[way]["seconds"] for found in rounds]
            say(f"  {ways[0] + ' / ' + way:<50}{statistics.median(ratios):6.3f} x"
                f"  ({min(ratios):.3f} to {max(ratios):.3f})")  # fmt: skip


def sample(args, row: str, way: str) -> dict:
    """In a process of its own: seconds of a call of the network and a step of the scheduler, median of 5 batches."""
    import torch
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    with tempfile.TemporaryDirectory() as folder:
        write_config(row, Path(folder) / "unet")
        torch.manual_seed(0)
        unet = UNet2DModel.from_config(UNet2DModel.load_config(Path(folder) / "unet"))
        DDPMPipeline(unet, DDPMScheduler(timestep_spacing="trailing")).save_pretrained(f"{folder}/model")
        if way.startswith("ours"):
            from reg_diffusers.cli.model import load_pipeline
            from reg_diffusers.sampling.sampler import Sampler
            from reg_diffusers.sampling.settings import SampleSettings

            precision = "bf16" if way.endswith("bf16") else "no"
            pipeline = load_pipeline(f"{folder}/model", "cpu", mixed_precision=precision)
            settings = SampleSettings(
                model_sha256="", scheduler="DDPM", num_inference_steps=args.steps, mixed_precision=precision
            )
            sampler = Sampler(pipeline, settings)
            draw = lambda: sampler.draw(range(16))  # noqa: E731
        else:
            pipeline = DDPMPipeline.from_pretrained(f"{folder}/model")
            pipeline.set_progress_bar_config(disable=True)
            draw = lambda: pipeline(16, num_inference_steps=args.steps)  # noqa: E731
        times = []
        for _ in range(6):
            start = time.perf_counter()
            draw()
            times.append((time.perf_counter() - start) / args.steps)
    return {"seconds": statistics.median(times[1:])}


CHILDREN = {"train": train, "x0": x0, "sample": sample}


if __name__ == "__main__":
    main()
