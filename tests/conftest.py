"""Fixtures and options shared by all tests."""

import contextlib
import gc
import os
import subprocess
import sys
from functools import partial

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import UNet2DModel
from in_processes import fill
from runs import QUICK, ROOT, load_script, reset

from reg_diffusers.cli import main
from reg_diffusers.data import looks
from reg_diffusers.data.training_data import load_training_data
from reg_diffusers.networks.computation import CompiledForBatches
from reg_diffusers.settings.arguments import parse_args
from reg_diffusers.training import preparation, report


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow, too")
    parser.addoption("--diffusers-tests", metavar="PATH", help="folder tests of diffusers: run those of a pipeline")


def pytest_configure(config):
    """Gives each worker of pytest-xdist cores of its own, so that the threads of one do not wait for another's."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1 and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        worker = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
        os.sched_setaffinity(0, cores[worker::workers] or {cores[worker % len(cores)]})
        torch.set_num_threads(len(os.sched_getaffinity(0)))


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    items[:] = [item for item in items if item not in slow]
    config.hook.pytest_deselected(items=slow)


def pytest_collection_finish(session):
    """Spares the garbage collector the libraries, which it would look through again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def forget_modules(tmp_path_factory):
    """Modules that the tests of one file wrote and imported: those of another file may have their names."""
    yield
    written = str(tmp_path_factory.getbasetemp())
    for name, module in list(sys.modules.items()):
        if (getattr(module, "__file__", None) or "").startswith(written):
            del sys.modules[name]


@pytest.fixture
def tiny_unet():
    """Builds the smallest useful UNet2DModel, 8 x 8."""

    def build(channels=1, seed=0, **config):
        torch.manual_seed(seed)
        return UNet2DModel(
            sample_size=8,
            in_channels=channels,
            out_channels=channels,
            layers_per_block=1,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
            attention_head_dim=8,
            **config,
        )

    return build


@pytest.fixture
def image_folder(tmp_path):
    """Writes a folder of random colour images in two class folders, and returns it."""

    def build(number=8, size=(12, 10), name="images"):
        generator = np.random.default_rng(0)
        for index in range(number):
            folder = tmp_path / name / ("cats" if index % 2 else "dogs")
            folder.mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
            PIL.Image.fromarray(pixels).save(folder / f"{index}.png")
        return tmp_path / name

    return build


@pytest.fixture
def command_line(tmp_path):
    """Runs train_reg.py in a process of its own, in an empty folder, and returns the finished process."""

    def run(*flags, launcher=(sys.executable,), check=True, env=None, cwd=tmp_path):
        done = subprocess.run(
            [*launcher, str(ROOT / "train_reg.py"), *map(str, flags)],
            cwd=cwd,
            env=env,
            capture_output=True,
            text=True,
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    return run


@pytest.fixture
def train(tmp_path, tmp_path_factory, monkeypatch, tiny_unet):
    """Runs the script's main in this process with a tiny network, in an empty folder; returns the output folder."""
    script = load_script()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train_reg.py"])
    monkeypatch.setattr(looks, "_IMAGES_LOOKED_AT", 64)  # for the decoding; of 1,000 they are a third of a short run
    monkeypatch.setattr(report, "_IMAGES_MEASURED", 40)  # of each model that --compare compares
    tiny_unet().save_config("tiny")
    threads = torch.get_num_threads()

    def run(*flags, output="out", model=("--model_config_name_or_path", "tiny")):
        reset()
        arguments = [*QUICK, *model, "--mixed_precision", "no", "--output_dir", output, *map(str, flags)]
        if "--compare" not in arguments:
            arguments.append("--no-compare")
        script.main(arguments)
        return tmp_path / output

    run.script, run.folder, run.kept = script, tmp_path, tmp_path_factory.getbasetemp() / "finished_runs"
    yield run
    torch.set_num_threads(threads)


@pytest.fixture
def compiled(monkeypatch):
    """Inside, --compile runs the graphs of the network as they are, without a compiler; a list of the graphs."""

    @contextlib.contextmanager
    def context():
        graphs = []

        def noting(graph, example_inputs):
            graphs.append(graph)
            return graph.forward

        torch._dynamo.reset()
        with monkeypatch.context() as patch:
            patch.setattr(preparation, "CompiledForBatches", partial(CompiledForBatches, backend=noting))
            yield graphs
        torch._dynamo.reset()

    return context


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with data, a tiny network and losses of its own."""
    folder = tmp_path_factory.mktemp("processes")
    fill(folder)
    return folder


@pytest.fixture
def evaluate(capsys):
    """Runs the command in this process; returns what it printed, or how it was refused."""

    def run(*flags, refused=False):
        reset()
        with pytest.raises(SystemExit, match=r"^2$") if refused else contextlib.nullcontext():
            main(["evaluate", *map(str, flags)])
        printed = capsys.readouterr()
        assert "no --regularizer" not in printed.err  # the default of a training is none of its business
        return printed.err.splitlines()[-1] if refused else printed.out

    return run


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs a command in an empty folder; returns what it printed, or how it was refused."""
    monkeypatch.chdir(tmp_path)

    def run(name, *flags, refused=False):
        reset()
        with pytest.raises(SystemExit, match=r"^2$") if refused else contextlib.nullcontext():
            main([name, *map(str, flags)])
        printed = capsys.readouterr()
        return printed.err.splitlines()[-1] if refused else printed.out + printed.err

    return run


@pytest.fixture
def load(tmp_path):
    """Loads the data of a command line, 8 x 8; a module that needs more has a fixture of its own under this name."""

    def load_with(*flags):
        settings = parse_args([*map(str, flags), "--resolution", "8", "--cache_dir", str(tmp_path / "cache")])
        return load_training_data(settings.data)

    return load_with
