"""Fixtures and options shared by all tests."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import UNet2DModel

ROOT = Path(__file__).parents[1]


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow, too")


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: item.get_closest_marker("forks") is None)
    if config.getoption("--slow"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    items[:] = [item for item in items if item not in slow]
    config.hook.pytest_deselected(items=slow)


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
