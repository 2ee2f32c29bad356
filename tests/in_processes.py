"""Runs functions, and train_reg.py itself, in several real processes of this machine that talk by gloo."""

import json
import multiprocessing
import os
import socket
import sys
import tempfile
import time

import dill
import numpy as np
import torch
from runs import load_script
from torch.multiprocessing import start_processes

from reg_diffusers import RegularizedLoss

FLAGS = (
    "--train_data_dir fields.npy --train_batch_size 4 --eval_batch_size 2 --ddpm_num_inference_steps 2"
    " --model_config_name_or_path tiny --mixed_precision no --num_threads 1 --lr_warmup_steps 0 --no-compare"
).split()

SAME_STEPS = (
    "--max_train_steps 3 --num_threads 1 --no-compare --no-use_ema --lr_warmup_steps 0 --mixed_precision no"
    " --resolution 16 --regularizer total_variation --reg_weighting constant --learning_rate 1e-2 --adam_epsilon 1e-3"
    " --eval_batch_size 1 --ddpm_num_inference_steps 1"
).split()

IMAGES = 32
_PATIENCE = 300  # seconds


# Imported once, in place of 2.4 s of CPU in each process.
multiprocessing.set_forkserver_preload(["accelerate", "datasets", "diffusers.models.unets.unet_2d", "train_reg"])


def in_processes(function, *args, number=2, machines=1):
    """Calls `function(*args)` in that many processes, in the folder and environment of this one; raises their error.

    They are forked from a server that has imported the libraries and computed nothing: a process forked from this one
    would wait for the locks of threads that it does not have. dill carries functions that were defined in a test.

    `number` processes find the environment that torchrun makes, with the same number on each of `machines` machines.
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
    environment = os.environ | {name: str(value) for name, value in environment.items()}
    with tempfile.NamedTemporaryFile() as out, tempfile.NamedTemporaryFile() as err:
        arguments = (dill.dumps((function, args)), os.getcwd(), environment, out.name, err.name)
        started = start_processes(_called, arguments, nprocs=number, join=False, start_method="forkserver")
        try:
            _join(started)
        finally:
            print(out.read().decode(), end="")
            print(err.read().decode(), end="", file=sys.stderr)


def _join(started):
    end = time.monotonic() + _PATIENCE
    while not started.join(timeout=0.1):
        if time.monotonic() > end:
            for process in started.processes:
                process.kill()
            raise TimeoutError(f"{len(started.processes)} processes have not ended after {_PATIENCE} s")


def run_script(folder, *flags, prepare=lambda script: None, **launch):
    """Runs train_reg.py's main with FLAGS in a folder, after `prepare(script)`. Returns the exit codes by rank."""
    for file in folder.glob("exit-*"):
        file.unlink()
    in_processes(_run_script, folder, [*FLAGS, *map(str, flags)], prepare, **launch)
    return [int(file.read_text()) for file in sorted(folder.glob("exit-*"))]


def by_one_and_two(folder, flags, prepare, read, images=4):
    """What `read` finds in the outputs of three steps by one process and by two, of that many images each in all.

    A large adam_epsilon, because AdamW makes a step of full length from the rounding of a gradient of 0.
    """
    found = []
    for number in (1, 2):
        of_run = ("--train_batch_size", images // number, "--output_dir", number)
        in_processes(_run_script, folder, [*SAME_STEPS, *map(str, (*flags, *of_run))], prepare, number=number)
        assert [path.read_text() for path in folder.glob("exit-*")] == ["0"] * number
        found.append(read(folder / str(number)))
    return found


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _called(rank, pickled, folder, environment, out, err):
    for descriptor, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), descriptor)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank % int(environment["LOCAL_WORLD_SIZE"])))
    os.environ.pop("OMP_NUM_THREADS", None)
    torch.set_num_threads(1)
    function, args = dill.loads(pickled)
    function(*args)


def _run_script(folder, flags, prepare):
    os.chdir(folder)
    sys.argv = ["train_reg.py"]
    script = load_script()
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


def feed_noise(script):
    """As `feed`, in the precision of the run."""
    script.RegularizedLoss = FedLoss
