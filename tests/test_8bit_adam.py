"""train_reg.py --use_8bit_adam: AdamW of bitsandbytes, on the CPU."""

import json
import shutil

import numpy as np
import pytest
import torch
from accelerate import DistributedType
from diffusers import UNet2DModel
from runs import differ, refusal, weights
from torch import nn

from reg_diffusers.runtime.errors import UsageError
from reg_diffusers.settings.optimization import OptimizationSettings
from reg_diffusers.training.optimizer import build_optimizer, bytes_of_moments, check_optimizer

pytestmark = pytest.mark.training
SETTINGS = OptimizationSettings(learning_rate=1e-3, use_8bit_adam=True)


@pytest.fixture
def network():
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    return nn.Linear(96, 64)


def step(network, optimizer):
    network(torch.ones(1, 96)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_a_matrix_has_moments_of_8_bits_and_a_small_tensor_of_32(network):
    optimizer = build_optimizer(SETTINGS, network)
    step(network, optimizer)
    moments = [
        [value for name, value in optimizer.state[parameter].items() if name in ("state1", "state2")]
        for parameter in (network.weight, network.bias)
    ]
    assert [moment.dtype for pair in moments for moment in pair] == [torch.uint8] * 2 + [torch.float32] * 2
    scales = [value for name, value in optimizer.state[network.weight].items() if name.startswith("absmax")]
    kept = [value for pair in moments for value in pair] + scales
    used = sum(value.numel() * value.element_size() for value in kept)
    assert bytes_of_moments(list(network.parameters()), SETTINGS) == used
    assert bytes_of_moments(list(network.parameters()), OptimizationSettings()) == 8 * 65 * 96 - 8 * 32


def test_it_follows_adamw_of_pytorch(network):
    """Over ten steps on one gradient, the weights differ by a small part of the distance that they have gone."""
    start, found = network.weight.detach().clone(), []
    for settings in (
        OptimizationSettings(learning_rate=1e-3),
        OptimizationSettings(learning_rate=1e-3, use_8bit_adam=True),
    ):
        with torch.no_grad():
            network.weight.copy_(start)
        optimizer = build_optimizer(settings, network)
        for _ in range(10):
            step(network, optimizer)
        found.append(network.weight.detach() - start)
    assert (found[1] - found[0]).norm() < 0.05 * found[0].norm() and found[0].abs().max() > 5e-3


def test_a_step_with_a_gradient_that_is_not_finite_is_skipped(network):
    optimizer, before = build_optimizer(SETTINGS, network), network.weight.detach().clone()
    optimizer.found_inf = torch.tensor(1.0)
    network.weight.grad = torch.full_like(network.weight, float("nan"))
    optimizer.step()
    assert torch.equal(network.weight, before) and not optimizer.state
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.zero_grad()
    step(network, optimizer)
    assert not torch.equal(network.weight, before) and network.weight.isfinite().all()


def test_a_resumed_run_equals_an_uninterrupted_one_and_its_checkpoint_is_smaller(train, image_folder, capsys):
    pytest.importorskip("bitsandbytes")
    image_folder(size=(8, 8), name="photos")
    wide = {"sample_size": 8, "in_channels": 3, "out_channels": 3, "layers_per_block": 1, "norm_num_groups": 8}
    UNet2DModel(
        **wide, block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
    ).save_config("wide")
    flags = "--train_data_dir photos --regularizer none --max_train_steps 4 --checkpointing_steps 2 --num_threads 1"
    flags = [*flags.split(), "--learning_rate", "1e-2", "--use_8bit_adam"]
    model = ("--model_config_name_or_path", "wide")
    out = train(*flags, model=model)
    whole, size = weights(out), (out / "checkpoint-4" / "optimizer.bin").stat().st_size
    shutil.rmtree(out / "checkpoint-4")
    shutil.rmtree(out / "unet")
    train(*flags, "--resume", "auto", model=model)
    assert not differ(weights(out), whole)
    plain = train(*flags[:-1], model=model, output="plain")
    assert size < 0.6 * (plain / "checkpoint-4" / "optimizer.bin").stat().st_size and differ(weights(plain), whole)
    capsys.readouterr()
    shutil.rmtree(out / "checkpoint-4")
    assert "--use_8bit_adam True -> False" in refusal(train, capsys, *flags[:-1], "--resume", "auto", model=model)
    losses = [json.loads(line)["denoising"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert np.isfinite(losses).all()


def test_where_it_cannot_work_one_line_says_why(train, capsys, monkeypatch, tmp_path):
    for engine in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        monkeypatch.setattr("reg_diffusers.training.optimizer.find_spec", lambda name: name)
        with pytest.raises(UsageError, match=f"not supported with {engine.value}, which shards the optimizer"):
            check_optimizer(SETTINGS, engine)
        check_optimizer(OptimizationSettings(), engine)
    monkeypatch.setattr("reg_diffusers.training.optimizer.find_spec", lambda name: None)
    assert "not installed: pip install bitsandbytes" in refusal(train, capsys, "--use_8bit_adam")
    assert not (tmp_path / "out").exists()
