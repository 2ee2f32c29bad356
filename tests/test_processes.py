"""Several processes train one model: the same whatever their number, and none waits for ever for another."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from datetime import timedelta
from functools import cache

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from diffusers import DDPMScheduler, UNet2DModel
from in_processes import FLAGS, feed, fill, free_port, in_processes, run_script
from runs import ROOT, metrics, weights
from safetensors.torch import load_file

from reg_diffusers import RegDDPMPipeline, RegularizedLoss, Term, regularizers, weighting
from reg_diffusers.runtime import processes
from reg_diffusers.runtime.errors import UsageError
from reg_diffusers.runtime.interruption import Interruption
from reg_diffusers.runtime.machines import bring_files
from reg_diffusers.training import run

pytestmark = pytest.mark.reliability

CONFIGS = ROOT / "docs" / "accelerate"


# The same mathematics, however a batch is divided


def gradients(folder, number, dtype):
    """Loss and gradient of a network for a batch of 8 images with fixed noise, to a file, from the main process."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    model = UNet2DModel.from_config(UNet2DModel.load_config(folder / "tiny")).to(dtype)
    images, noise = torch.randn(2, 8, 1, 8, 8, dtype=dtype).unbind()
    timesteps = torch.tensor([0, 20, 100, 200, 300, 400, 700, 999])
    terms = [
        Term(regularizers.total_variation, 0.3, weighting.constant, "a"),
        Term(regularizers.total_variation, 0.2, weighting.matched, "b"),
    ]
    loss_fn = RegularizedLoss(DDPMScheduler(prediction_type="v_prediction"), terms)
    model = accelerator.prepare(model)
    part = slice(accelerator.process_index * 8 // number, (accelerator.process_index + 1) * 8 // number)
    output = loss_fn(model, images[part], noise=noise[part], timesteps=timesteps[part])
    accelerator.backward(output.loss)
    found = {name: parameter.grad for name, parameter in accelerator.unwrap_model(model).named_parameters()}
    values = {"loss": output.loss, **output.terms}
    found |= {name: accelerator.reduce(value.detach(), "mean") for name, value in values.items()}
    if accelerator.is_main_process:
        torch.save(found, folder / f"gradients-{number}-{dtype}")


@pytest.mark.slow
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 1e-6)], ids=str)
def test_loss_and_gradient_of_halves_are_those_of_the_whole_batch(folder, dtype, tolerance):
    """By DDP alone, as in anyone's own loop; the terms' weights and which images they look at differ by timestep."""
    for number in (1, 2):
        in_processes(gradients, folder, number, dtype, number=number)
    expected, found = (torch.load(folder / f"gradients-{number}-{dtype}") for number in (1, 2))
    assert found["a"] > 0 and found["b"] > 0
    largest = max(value.abs().max() for name, value in expected.items())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance * largest)


DIVISIONS = {
    "one process": (1, 8, 1),
    "two processes": (2, 4, 1),
    "accumulated": (1, 4, 2),
    "two processes, accumulated": (2, 2, 2),
}


@pytest.fixture(scope="module")
def divided(folder):
    """A run of 6 steps of 8 images, over the end of an epoch, by how the 8 are divided; (weights, metrics)."""

    @cache
    def run(name):
        number, batch_size, accumulation = DIVISIONS[name]
        flags = f"--output_dir {name.replace(' ', '-')} --train_batch_size {batch_size} --max_train_steps 6"
        flags += (
            f" --gradient_accumulation_steps {accumulation} --learning_rate 1e-3 --max_grad_norm 0.5 --max_bad_steps 7"
        )
        flags += " --regularizer total_variation own_losses:partly_bad --reg_weight 0.3 0.2 --reg_weighting constant"
        assert run_script(folder, *flags.split(), prepare=feed, number=number) == [0] * number
        output = folder / name.replace(" ", "-")
        return weights(output), metrics(output)

    return run


of_each_division = pytest.mark.parametrize(
    "division", ["two processes", *(pytest.param(name, marks=pytest.mark.slow) for name in list(DIVISIONS)[2:])]
)


@of_each_division
def test_the_weights_do_not_depend_on_how_a_batch_is_divided(divided, division):
    """Equal after 6 steps of AdamW, which take gradients apart by their ratios, hence also by each term's weight."""
    expected, found = divided("one process")[0], divided(division)[0]
    assert {value.dtype for value in found.values()} == {torch.float64}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-7, atol=1e-9)


@of_each_division
def test_means_and_counts_do_not_depend_on_how_a_batch_is_divided(divided, division):
    ((expected,), (found,)) = divided("one process")[1], divided(division)[1]
    assert 5 < expected["nonfinite/partly_bad"] < 6 * 8 and expected["nonfinite/total_variation"] == 0
    assert set(found) == set(expected) and expected["bad_steps"] == 0
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5), name


@pytest.mark.slow
def test_two_processes_one_and_two_again_train_what_one_trains(folder, capfd):
    """Each image has its own noise here, so a step of the same images is the same step; 6 steps, 4 to an epoch."""

    def prepare(script):
        feed(script)

        class Noted(script.RegularizedLoss):
            def forward(self, model, original_samples, **arguments):
                with open(f"drawn-{os.environ['RANK']}", "a") as file:
                    file.write(f"{arguments['noise'].sum().item()}\n")
                return super().forward(model, original_samples, **arguments)

        script.RegularizedLoss = Noted

    flags = "--learning_rate 1e-3 --lr_scheduler constant --reg_weight 0.3 --reg_weighting constant"
    flags = [*flags.split(), *"--checkpointing_steps 1 --resume auto --allow_changed_settings".split()]

    def train(output, number, batch_size, steps, prepare=prepare):
        more = ("--output_dir", output, "--train_batch_size", batch_size, "--max_train_steps", steps)
        assert run_script(folder, *flags, *more, prepare=prepare, number=number) == [0] * number

    train("whole", 1, 8, 6, prepare=feed)
    for number, batch_size, steps in ((2, 4, 1), (1, 8, 3), (2, 4, 6)):
        train("elastic", number, batch_size, steps)
    expected, found = weights(folder / "whole"), weights(folder / "elastic")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-7, atol=1e-9)
    lines = [line for line in capfd.readouterr().err.splitlines() if " processes, " in line]
    assert len(lines) == 2 and "2 -> 1 processes, 8 -> 8 images in a step: the noise from here on is new" in lines[0]
    noise = [line for rank in "01" for line in (folder / f"drawn-{rank}").read_text().split()]
    assert len(set(noise)) == len(noise) == 2 * (1 + 3) + 2  # of what the script itself has drawn


@pytest.mark.slow
def test_an_estimator_that_calls_the_network_again_trains_the_same_in_two_processes(folder):
    """Several forward passes go through DDP before one backward; weight 0 gives other weights, so the term acts."""
    flags = "--max_train_steps 3 --learning_rate 1e-3 --reg_weighting constant --reg_estimator ddim(1)"
    runs = {"one": (1, 8, 0.3), "two": (2, 4, 0.3), "without": (1, 8, 0.0)}
    for name, (number, batch_size, weight) in runs.items():
        more = ("--train_batch_size", batch_size, "--reg_weight", weight, "--output_dir", f"ddim-{name}")
        assert run_script(folder, *flags.split(), *more, prepare=feed, number=number) == [0] * number
    one, two, without = (weights(folder / f"ddim-{name}") for name in runs)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-7, atol=1e-9)
    assert any((value - without[name]).abs().max() > 1e-4 for name, value in one.items())


def test_a_step_has_as_many_batches_as_asked_for_across_the_end_of_an_epoch(folder):
    """32 images in batches of 4 are 8 to an epoch, no multiple of 3; the last ones count as much as all others."""
    calls = folder / "calls"

    def count(script):
        class Counted(RegularizedLoss):
            def forward(self, *args, **kwargs):
                with calls.open("a") as file:
                    file.write(".")
                return super().forward(*args, **kwargs)

        script.RegularizedLoss = Counted

    flags = "--gradient_accumulation_steps 3 --num_epochs 3 --output_dir across"
    assert run_script(folder, *flags.split(), prepare=count, number=1) == [0]
    assert metrics(folder / "across")[-1]["step"] == 8 and len(calls.read_text()) == 8 * 3


# Different noise, equal weights


def record(folder):
    """Makes the loss of a script note what it is given and which weights it finds."""

    def prepare(script):
        class Recorded(RegularizedLoss):
            seen = ()

            def forward(self, model, original_samples, **arguments):
                first = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
                step = (original_samples, arguments["noise"], arguments["timesteps"], first, torch.get_num_threads())
                Recorded.seen += (step,)
                torch.save(Recorded.seen, folder / f"seen-{os.environ['RANK']}")
                return super().forward(model, original_samples, **arguments)

        script.RegularizedLoss = Recorded

    return prepare


@pytest.mark.slow
def test_processes_have_the_same_weights_but_other_images_noise_and_timesteps(folder):
    flags = "--max_train_steps 2 --output_dir seen --num_threads 3"
    assert run_script(folder, *flags.split(), prepare=record(folder)) == [0, 0]
    ranks = [torch.load(folder / f"seen-{rank}") for rank in range(2)]
    for one, other in zip(*ranks, strict=True):
        images, noise, timesteps, before, threads = (
            torch.as_tensor(x) != torch.as_tensor(y) for x, y in zip(one, other, strict=True)
        )
        assert images.flatten(1).any(1).all() and noise.all() and timesteps.any()
        assert not before.any() and not threads.any()
    first, second = ranks[0]
    assert (first[1] != second[1]).all() and (first[3] != second[3]).any()
    assert first[4] == 3  # --num_threads, which accelerate would have changed


@pytest.mark.slow
def test_fewer_images_than_a_step_takes_come_again_so_that_all_batches_are_equal(tmp_path):
    fill(tmp_path)
    np.save(tmp_path / "fields.npy", np.load(tmp_path / "fields.npy")[:3])
    assert run_script(tmp_path, "--max_train_steps", 2, "--output_dir", "few", prepare=record(tmp_path)) == [0, 0]
    sizes = [[len(images) for images, *_ in torch.load(tmp_path / f"seen-{rank}")] for rank in range(2)]
    assert sizes == [[4, 4], [4, 4]]


# Nobody waits for ever


def arm(at, rank):
    """Makes `bad_on_one_process` bad on a process, from a call of the loss on."""

    def prepare(script):
        class Armed(RegularizedLoss):
            calls = 0

            def forward(self, *args, **kwargs):
                Armed.calls += 1
                os.environ["BAD"] = str(rank) if Armed.calls >= at else "none"
                return super().forward(*args, **kwargs)

        script.RegularizedLoss = Armed

    return prepare


@pytest.mark.slow
def test_a_regularizer_that_is_bad_on_one_process_stops_all_at_the_same_step(folder, capfd):
    flags = "--regularizer own_losses:bad_on_one_process --reg_weighting constant --max_train_steps 40"
    flags += " --max_bad_steps 6 --output_dir bad --checkpointing_steps 1000"
    assert run_script(folder, *flags.split(), prepare=arm(at=8, rank=1)) == [2, 2]
    error = capfd.readouterr().err
    assert error.count("error: regularizer 'bad_on_one_process' was not finite for 13 steps in a row") == 1
    assert re.search(r"last at timesteps \d+ to \d+\), 52 images in all", error)
    assert [path.name for path in (folder / "bad").glob("checkpoint-*")] == ["checkpoint-20"]
    assert metrics(folder / "bad")[-1]["nonfinite/bad_on_one_process"] == 52  # of the other process
    assert all(value.isfinite().all() for value in load_file(folder / "bad/checkpoint-20/model.safetensors").values())

    # The steps in a row that were saved are not held against a regularizer that has been mended.
    assert run_script(
        folder, *flags.split(), "--max_train_steps", 24, "--resume", "auto", "--allow_changed_settings"
    ) == [0, 0]
    assert metrics(folder / "bad")[-1]["step"] == 24


@pytest.mark.slow
def test_data_that_one_process_does_not_find_are_everybodys_error(folder, tmp_path, capfd):
    def move(script):
        if os.environ["RANK"] == "1":
            os.chdir(tmp_path)

    started = time.monotonic()
    assert run_script(folder, "--model_config_name_or_path", folder / "tiny", prepare=move) == [2, 2]
    assert time.monotonic() - started < 30
    assert "train_reg.py: error: process 1: fields.npy: no such file" in capfd.readouterr().err


@pytest.mark.slow
def test_any_error_of_one_process_is_everybodys(tmp_path):
    def work():
        if PartialState().process_index == 1:
            raise KeyError("lost")
        return "done"

    def check():
        state = processes.join_processes()
        is_lost = state.process_index == 1
        with pytest.raises(KeyError if is_lost else processes.FailedElsewhere) as raised:
            processes.together(state, work)
        if not is_lost:
            assert raised.value.failure == processes.Failure(1, "KeyError('lost')")
            assert isinstance(raised.value, UsageError) and str(raised.value) == "process 1: KeyError('lost')"
        assert processes.together(state, lambda: state.process_index) == state.process_index
        assert processes.on_main_process(state, lambda: "main") == ("main" if state.is_main_process else None)
        processes.leave_processes(state)

    in_processes(check)


@pytest.mark.slow
def test_the_main_process_goes_first_then_one_of_each_machine_then_all_others(tmp_path):
    """Two machines with two processes each, which may or may not see the same files."""

    def work(folder):
        def once():
            with (folder / "order").open("a") as file:
                file.write(f"{state.process_index} {'found' if (folder / 'cache').exists() else 'made'}\n")
            (folder / "cache").touch()
            return state.process_index

        state = processes.join_processes()
        assert processes.in_turn(state, once) == state.process_index
        processes.leave_processes(state)

    def shared():
        work(tmp_path / "shared")

    def separate():
        work(tmp_path / f"machine-{int(os.environ['RANK']) // 2}")

    for name in ("shared", "machine-0", "machine-1"):
        (tmp_path / name).mkdir()
    in_processes(shared, number=4, machines=2)
    lines = (tmp_path / "shared" / "order").read_text().splitlines()
    assert lines[:2] == ["0 made", "2 found"] and sorted(lines[2:]) == ["1 found", "3 found"]
    in_processes(separate, number=4, machines=2)
    for machine, expected in enumerate((["0 made", "1 found"], ["2 made", "3 found"])):
        assert (tmp_path / f"machine-{machine}" / "order").read_text().splitlines() == expected


@pytest.mark.slow
def test_the_main_process_compares_when_the_others_have_left(folder):
    """So it may take as long as it likes: here until the other has ended."""

    def prepare(script):
        def compare(*args, **kwargs):
            deadline = time.monotonic() + 60
            while not (folder / "exit-1").exists() and time.monotonic() < deadline:
                time.sleep(0.05)
            assert (folder / "exit-1").exists() and not dist.is_initialized()
            real(*args, **kwargs)

        real, run.compare = run.compare, compare

    assert run_script(folder, *"--max_train_steps 2 --output_dir left --compare".split(), prepare=prepare) == [0, 0]
    assert (folder / "left" / "comparison.json").is_file()


@pytest.mark.slow
def test_work_of_the_main_process_in_the_training_is_waited_for(folder):
    """PyTorch gives up after 30 minutes, NCCL after 10; a grid of samples or a decoded data set may take longer."""

    def check():
        state = processes.join_processes()
        asked = Interruption(state)._group
        for group in (dist.group.WORLD, asked):
            assert group._get_backend(torch.device("cpu")).options._timeout == processes.PROCESS_TIMEOUT
        assert timedelta(hours=1) < processes.PROCESS_TIMEOUT
        processes.leave_processes(state)

    in_processes(check)


# Machines that do not see each other's files


def move_to_own_folder(folder):
    """Makes each process work in a folder of its machine, of which there are two with one process each."""

    def prepare(script):
        os.chdir(folder / f"machine-{os.environ['RANK']}")

    return prepare


@pytest.fixture(scope="module")
def separate(folder):
    for machine in range(2):
        (folder / f"machine-{machine}").mkdir()
        fill(folder / f"machine-{machine}")
    flags = (*SEPARATE, "--max_train_steps", 4)
    assert run_script(folder, *flags, prepare=move_to_own_folder(folder), machines=2) == [0, 0]
    return folder


SEPARATE = ("--output_dir", "out", "--checkpointing_steps", 2, "--lr_scheduler", "constant")


@pytest.mark.slow
def test_only_the_first_of_two_machines_keeps_files_and_its_checkpoints_are_complete(separate):
    assert [path for path in (separate / "machine-1" / "out").rglob("*") if path.is_file()] == []
    checkpoint = separate / "machine-0" / "out" / "checkpoint-4"
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    of_each = {f"{name}_{rank}" for name in ("random_states", "counters") for rank in range(2)}
    assert of_each <= {name.rsplit(".", 1)[0] for name in manifest["files"]}
    RegDDPMPipeline.from_pretrained(separate / "machine-0" / "out")


@pytest.mark.slow
def test_a_checkpoint_that_one_machine_does_not_see_is_refused_and_resumed_when_it_is_copied(separate, capfd):
    def go_on():
        flags = (*SEPARATE, "--max_train_steps", 6, "--resume", "auto")
        return run_script(separate, *flags, prepare=move_to_own_folder(separate), machines=2)

    assert go_on() == [2, 2]
    error = "error: process 1: out/checkpoint-4 does not exist: name an --output_dir that all machines share, or copy"
    assert error in capfd.readouterr().err
    copied = separate / "machine-1" / "out" / "checkpoint-4"
    shutil.copytree(separate / "machine-0" / "out" / "checkpoint-4", copied)
    assert go_on() == [0, 0]
    shared = ("--output_dir", "shared", "--max_train_steps", 6, "--lr_scheduler", "constant")
    assert run_script(separate, *shared, machines=2) == [0, 0]
    expected = weights(separate / "shared")
    assert all(torch.equal(value, expected[name]) for name, value in weights(separate / "machine-0" / "out").items())


@pytest.mark.slow
def test_large_parts_of_other_machines_are_not_sent_but_refused(tmp_path):
    def check():
        state = processes.join_processes()
        folder = tmp_path / f"machine-{state.process_index}"
        (folder / "parts").mkdir(parents=True)
        (folder / "parts" / f"{state.process_index}.txt").write_text(f"of {state.process_index}")
        bring_files(state, folder)
        if state.is_main_process:
            assert (folder / "parts" / "1.txt").read_text() == "of 1"
        (folder / f"{state.process_index}.bin").write_bytes(bytes(2**20 + 1))
        with pytest.raises(UsageError, match=r"1\.bin is too large .* --output_dir that all machines share"):
            bring_files(state, folder)
        processes.leave_processes(state)

    in_processes(check, machines=2)


# Real launchers

ACCELERATE = (sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch")
ENDLESS = (*FLAGS, *"--max_train_steps 100000 --preview_steps 100000 --lr_scheduler constant --output_dir run".split())


def launch(folder, *words, **environment):
    """Starts a command in a folder; what it says goes to a file there."""
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo", **environment}
    with (folder / "said.txt").open("w") as said:
        return subprocess.Popen(list(map(str, words)), cwd=folder, env=environment, stdout=said, stderr=said)


def said(folder):
    return (folder / "said.txt").read_text()


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert condition()


@pytest.mark.slow
def test_processes_that_do_not_know_of_each_other_are_refused(tmp_path):
    """torchrun without ACCELERATE_USE_CPU: each would train by itself into the same folder."""
    fill(tmp_path)
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", free_port())
    assert launch(tmp_path, *launcher, ROOT / "train_reg.py", *ENDLESS, ACCELERATE_USE_CPU="false").wait(120) != 0
    error = (
        "error: 2 processes were launched, but accelerate joined 1: without GPUs, launch with ACCELERATE_USE_CPU=true"
    )
    assert said(tmp_path).count(error) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_configuration_for_several_gpus_trains_and_the_printed_command_goes_on(tmp_path):
    fill(tmp_path)
    config = (*ACCELERATE, "--config_file", CONFIGS / "ddp.yaml", "--main_process_port", 0)
    flags = (*FLAGS, *"--max_train_steps 2 --checkpointing_steps 2 --lr_scheduler constant --output_dir run".split())
    assert launch(tmp_path, *config, ROOT / "train_reg.py", *flags).wait(120) == 0, said(tmp_path)
    assert "2 x cpu" in said(tmp_path) and metrics(tmp_path / "run")[-1]["step"] == 2
    command = re.search(r"continue with: (.*)", said(tmp_path)).group(1)
    assert f"--config_file {CONFIGS / 'ddp.yaml'}" in command
    assert launch(tmp_path, *shlex.split(command), "--max_train_steps", 3).wait(120) == 0, said(tmp_path)
    assert "2 x cpu" in said(tmp_path) and metrics(tmp_path / "run")[-1]["step"] == 3


@pytest.mark.slow
def test_two_launchers_train_one_model_as_two_machines(tmp_path):
    """Over loopback, each in a folder of its own: one writes, both end well."""
    port = free_port()
    machines = []
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        fill(tmp_path / str(rank))
        config = ("--config_file", CONFIGS / "multi_node.yaml", "--machine_rank", rank, "--main_process_port", port)
        flags = (*FLAGS, *"--max_train_steps 3 --checkpointing_steps 2 --output_dir run --compare".split())
        machines.append(launch(tmp_path / str(rank), *ACCELERATE, *config, ROOT / "train_reg.py", *flags))
    codes = [machine.wait(200) for machine in machines]
    assert 'RegDDPMPipeline.from_pretrained("run")' in said(tmp_path / "0"), said(tmp_path / "0")
    assert codes == [0, 0], said(tmp_path / "0") + said(tmp_path / "1")
    assert "2 x cpu" in said(tmp_path / "0") and metrics(tmp_path / "0" / "run")[-1]["step"] == 3
    assert (tmp_path / "0" / "run" / "comparison.json").is_file()
    assert [path for path in (tmp_path / "1" / "run").rglob("*") if path.is_file()] == []
    RegDDPMPipeline.from_pretrained(tmp_path / "0" / "run")


SRUN = """#!/usr/bin/env python3
# Stands in for srun: one task for each node; signals go to the tasks.
import os, signal, subprocess, sys
tasks = [
    subprocess.Popen(sys.argv[1:], env={**os.environ, "SLURM_NODEID": str(node)})
    for node in range(int(os.environ["SLURM_NNODES"]))
]
signal.signal(signal.SIGUSR1, lambda number, frame: [task.send_signal(number) for task in tasks])
sys.exit(max(abs(task.wait()) for task in tasks))
"""


@pytest.mark.slow
def test_the_lines_for_slurm_save_at_the_signal_and_go_on_when_submitted_again(tmp_path):
    """As docs/scaling.md prints them, with stand-ins for srun and scontrol, and other flags for train_reg.py."""
    fill(tmp_path)
    (script,) = re.findall(r"```bash\n(#!/bin/bash.*?)```", (ROOT / "docs" / "scaling.md").read_text(), re.DOTALL)
    assert "#SBATCH --signal=USR1@" in script and "--resume auto'" in script
    script = script.replace("docs/accelerate", str(CONFIGS)).replace("29500", str(free_port()))
    script = script.replace("train_reg.py --train_data_dir photos --output_dir run", f"{ROOT / 'train_reg.py'} $FLAGS")
    (tmp_path / "job.sh").write_text(script)
    programs = {
        "srun": SRUN,
        "scontrol": "#!/bin/sh\necho 127.0.0.1\n",
        "accelerate": f'#!/bin/sh\nexec {sys.executable} -m accelerate.commands.accelerate_cli "$@"\n',
    }
    (tmp_path / "bin").mkdir()
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    environment = {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1", "SLURM_JOB_NODELIST": "node[1-2]"}
    environment |= {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "FLAGS": " ".join(ENDLESS)}
    job = launch(tmp_path, "bash", "job.sh", **environment)
    wait_for((tmp_path / "run" / "metrics.jsonl").is_file)
    (srun,) = psutil.Process(job.pid).children()
    srun.send_signal(signal.SIGUSR1)
    job.wait(120)
    assert "stopped by SIGUSR1; continue with: " in said(tmp_path)
    assert [process for process in psutil.process_iter(["cwd"]) if process.info["cwd"] == str(tmp_path)] == []
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    step = int(checkpoint.name.split("-")[1])
    environment["FLAGS"] += f" --max_train_steps {step + 2}"
    assert launch(tmp_path, "bash", "job.sh", **environment).wait(120) == 0, said(tmp_path)
    assert f"continuing from run/{checkpoint.name}" in said(tmp_path)
    assert metrics(tmp_path / "run")[-1]["step"] == step + 2
