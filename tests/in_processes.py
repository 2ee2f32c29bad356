"""Runs functions, and train_reg.py itself, in several real processes of this machine that talk by gloo."""

import importlib.util
import json
import os
import socket
import sys
import time
from pathlib import Path

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.multiprocessing import start_processes

from reg_diffusers import RegularizedLoss

ROOT = Path(__file__).parents[1]
FLAGS = (
    "--train_data_dir fields.npy --train_batch_size 4 --eval_batch_size 2 --ddpm_num_inference_steps 2"
    " --model_config_name_or_path tiny --mixed_precision no --num_threads 1 --lr_warmup_steps 0 --no-compare"
).split()

IMAGES = 32
_PATIENCE = 300  # seconds


def in_processes(function, *args, number=2, machines=1):
    """Calls `function(*args)` in so many forked processes; an error in one is raised here.

    They find the environment that torchrun makes, with the same number of processes on each machine. A test that calls
    this is marked `forks`: it runs before this process has threads, whose locks a forked one would wait for.
    """
    environment = {
        "WORLD_SIZE": number,
        "LOCAL_WORLD_SIZE": number // machines,
        "GROUP_WORLD_SIZE": machines,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
        "ACCELERATE_USE_CPU": "true",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    started = start_processes(_called, (function, args, environment), nprocs=number, join=False, start_method="fork")
    end = time.monotonic() + _PATIENCE
    while not started.join(timeout=1):
        if time.monotonic() > end:
            for process in started.processes:
                process.kill()
            raise TimeoutError(f"{number} processes have not ended after {_PATIENCE} s")


def run_script(folder, *flags, prepare=lambda script: None, **launch):
    """Runs train_reg.py's main with FLAGS in a folder, after `prepare(script)`. Returns the exit codes by rank."""
    for file in folder.glob("exit-*"):
        file.unlink()
    in_processes(_run_script, folder, [*FLAGS, *map(str, flags)], prepare, **launch)
    return [int(file.read_text()) for file in sorted(folder.glob("exit-*"))]


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _called(rank, function, args, environment):
    local_rank = rank % environment["LOCAL_WORLD_SIZE"]
    os.environ.update({name: str(value) for name, value in environment.items()}, RANK=str(rank))
    os.environ["LOCAL_RANK"] = str(local_rank)
    os.environ.pop("OMP_NUM_THREADS", None)
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    torch.set_num_threads(1)  # threads of the process that was forked are gone
    function(*args)


def _run_script(folder, flags, prepare):
    os.chdir(folder)
    sys.argv = ["train_reg.py"]
    spec = importlib.util.spec_from_file_location("train_reg", ROOT / "train_reg.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    prepare(script)
    code = 0
    try:
        script.main(flags)
    except SystemExit as stopped:
        code = stopped.code
    (folder / f"exit-{os.environ['RANK']}").write_text(str(code))


def fill(folder):
    np.save(folder / "fields.npy", np.random.default_rng(0).normal(size=(IMAGES, 1, 8, 8)).clip(-2, 2))
    (folder / "tiny").mkdir()
    config = {
        "_class_name": "UNet2DModel",
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "layers_per_block": 1,
        "block_out_channels": [8, 16],
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "norm_num_groups": 4,
        "attention_head_dim": 8,
    }
    (folder / "tiny" / "config.json").write_text(json.dumps(config))
    (folder / "own_losses.py").write_text(
        "import os\n"
        "import torch\n"
        "def partly_bad(x, /, *, original_samples):\n"  # on the images themselves it is finite
        "    far = (x - original_samples).abs().flatten(1).mean(1) > 1e-3\n"
        "    bad = far & (original_samples.flatten(1).mean(1) > 0.02)\n"
        "    return torch.where(bad, torch.nan, x.square().flatten(1).mean(1))\n"
        "partly_bad.needs = ('original_samples',)\n"
        "def bad_on_one_process(x):\n"
        "    value = x.square().flatten(1).mean(1)\n"
        "    return value * torch.nan if os.environ.get('BAD') == os.environ['RANK'] else value\n"
    )
    return folder


class FedLoss(RegularizedLoss):
    """Each image has its own noise and timestep, in whatever batch of whatever process it comes; all in float64."""

    def forward(self, model, original_samples, **arguments):
        original_samples = original_samples.double()
        seeds = (original_samples.abs().flatten(1).sum(1) * 1e9).long().tolist()
        noise = [
            torch.randn(original_samples.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds
        ]
        arguments.update(noise=torch.stack(noise), timesteps=torch.tensor([seed % 500 for seed in seeds]))
        return super().forward(model, original_samples, **arguments)


def feed(script):
    torch.set_default_dtype(torch.float64)
    script.RegularizedLoss = FedLoss
