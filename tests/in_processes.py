"""Runs functions, and train_reg.py itself, in several real processes of this machine that talk by gloo."""

import importlib.util
import os
import socket
import sys
import time
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.multiprocessing import start_processes

ROOT = Path(__file__).parents[1]
FLAGS = (
    "--train_data_dir fields.npy --train_batch_size 4 --eval_batch_size 2 --ddpm_num_inference_steps 2"
    " --model_config_name_or_path tiny --mixed_precision no --num_threads 1 --lr_warmup_steps 0 --no-compare"
).split()

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
