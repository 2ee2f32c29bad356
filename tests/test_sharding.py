"""Weights that processes share out (FSDP2), on a mesh of CPUs: nothing but memory changes."""

import json
import os
import re
import shutil
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, broadcast_object_list
from accelerate.utils.launch import prepare_multi_gpu_env
from diffusers import DDPMScheduler, UNet2DModel
from in_processes import feed, fill, in_processes, run_script
from runs import ROOT, metrics, weights
from torch.distributed.fsdp import fully_shard

from reg_diffusers import RegDDPMPipeline, RegularizedLoss
from reg_diffusers.networks.ema import build_ema
from reg_diffusers.networks.sharded import SampledNetwork, is_sharded, sharded_like, whole
from reg_diffusers.runtime.engine import check_engine
from reg_diffusers.runtime.errors import UsageError
from reg_diffusers.settings import OptimizationSettings
from reg_diffusers.training import opening

pytestmark = pytest.mark.reliability

CONFIGS = ROOT / "docs" / "accelerate"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("sharding"))


def launched(config):
    """The settings of `accelerate launch` with one of the configurations of the documentation."""
    arguments = launch_command_parser().parse_args(["--config_file", str(CONFIGS / config), "train_reg.py"])
    return _validate_launch_command(arguments)[0]


def shard(script):
    """Lets a script train by docs/accelerate/fsdp2.yaml, and accelerate take CPUs for accelerators.

    By itself it leaves FSDP out there. From there on everything is real: its FSDP2, the device mesh, gloo.
    """
    environment = prepare_multi_gpu_env(launched("fsdp2.yaml"))
    environment = {name: value for name, value in environment.items() if "FSDP" in name}
    assert environment["FSDP_VERSION"] == "2"

    def join_processes():
        state = real()
        state.distributed_type = DistributedType.MULTI_NPU
        return state

    real, opening.join_processes = opening.join_processes, join_processes
    opening.check_engine = lambda *_: os.environ.update(environment)


def shard_and_feed(script):
    shard(script)
    feed(script)


@pytest.fixture(scope="module")
def runs(folder):
    """The same run without and with sharding; names of the output folders."""
    flags = "--max_train_steps 4 --checkpointing_steps 2 --learning_rate 1e-3 --output_dir".split()
    assert run_script(folder, *flags, "divided", prepare=feed) == [0, 0]
    assert run_script(folder, *flags, "sharded", prepare=shard_and_feed) == [0, 0]
    return folder / "divided", folder / "sharded"


@pytest.mark.slow
def test_the_run_is_sharded_and_its_state_too(runs):
    parts = {path.name for path in (runs[1] / "checkpoint-4").rglob("*.distcp")}
    assert parts == {"__0_0.distcp", "__1_0.distcp"}
    assert not (runs[1] / "checkpoint-4" / "model.safetensors").exists()
    manifest = json.loads((runs[1] / "checkpoint-4" / "manifest.json").read_text())
    assert "pytorch_model_fsdp_0/__1_0.distcp" in manifest["files"]
    assert not list((runs[0] / "checkpoint-4").rglob("*.distcp"))


@pytest.mark.slow
def test_a_sharded_run_learns_what_one_without_sharding_learns(runs):
    """The saved weights are the average, whole; metrics, pictures and samples follow from them."""
    expected, found = map(weights, runs)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-7, atol=1e-9)
    (one,), (other,) = map(metrics, runs)
    assert other == pytest.approx(one, rel=1e-5)
    one, other = (np.asarray(PIL.Image.open(run / "samples" / "step-000004.png"), dtype=int) for run in runs)
    assert np.abs(one - other).max() <= 1
    one, other = (
        RegDDPMPipeline.from_pretrained(run, dtype=torch.float64)(
            2, torch.Generator().manual_seed(0), 2, output_type="pt"
        ).images
        for run in runs
    )
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_a_sharded_run_goes_on_from_its_checkpoint_to_the_same_end(folder, runs):
    before = weights(runs[1])
    for path in (runs[1] / "checkpoint-4").rglob("*.distcp"):
        path.unlink()
    flags = "--max_train_steps 4 --checkpointing_steps 2 --learning_rate 1e-3 --output_dir sharded --resume auto"
    assert run_script(folder, *flags.split(), prepare=shard_and_feed) == [0, 0]
    assert all(torch.equal(value, before[name]) for name, value in weights(runs[1]).items())


@pytest.mark.slow
def test_four_processes_go_on_from_the_shards_of_two_to_the_same_end(folder, runs):
    """A step has the same 8 images, whose noise is their own; weights, optimizer and average are sharded again."""
    shutil.copytree(runs[1], folder / "elastic")
    shutil.rmtree(folder / "elastic" / "checkpoint-4")
    flags = "--max_train_steps 4 --checkpointing_steps 2 --learning_rate 1e-3 --output_dir elastic --resume auto"
    flags += " --allow_changed_settings --train_batch_size 2"
    assert run_script(folder, *flags.split(), prepare=shard_and_feed, number=4) == [0] * 4
    parts = {path.name for path in (folder / "elastic" / "checkpoint-4").rglob("*.distcp")}
    assert parts == {f"__{rank}_0.distcp" for rank in range(4)}
    found = weights(folder / "elastic")
    for name, value in weights(runs[0]).items():
        torch.testing.assert_close(found[name], value, rtol=1e-7, atol=1e-9)


@pytest.mark.slow
def test_a_sharded_comparison_in_bfloat16_leaves_out_a_bad_step(folder):
    """The gradient is no number on one process alone; nobody learns from it."""

    def prepare(script):
        class Bad(RegularizedLoss):
            calls = 0

            def forward(self, *args, **kwargs):
                output = super().forward(*args, **kwargs)
                Bad.calls += 1
                if Bad.calls == 2 and os.environ["RANK"] == "1":
                    object.__setattr__(output, "loss", output.loss * torch.nan)
                return output

        shard(script)
        script.RegularizedLoss = Bad

    flags = "--max_train_steps 3 --mixed_precision bf16 --compare --no-use_ema --output_dir bf16"
    assert run_script(folder, *flags.split(), prepare=prepare) == [0, 0]
    output = folder / "bf16"
    assert metrics(output)[-1]["bad_steps"] == 1 and metrics(output / "plain")[-1]["bad_steps"] == 0
    for folder in (output, output / "plain"):
        assert all(value.dtype == torch.float32 and value.isfinite().all() for value in weights(folder).values())
    rows = json.loads((output / "comparison.json").read_text())["rows"]
    assert list(rows) == ["data", "without", "with total_variation"]


# The parts, with PyTorch alone

EMA = OptimizationSettings(use_ema=True, ema_max_decay=0.5, ema_inv_gamma=1.0, ema_power=0.75)


def network(folder):
    torch.manual_seed(0)
    return UNet2DModel.from_config(UNet2DModel.load_config(folder / "tiny"))


def two_steps(unet, images):
    """Trains on images; returns the average."""
    ema = build_ema(EMA, unet)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3, fused=True)
    for _ in range(2):
        unet(images, torch.tensor([10]), return_dict=False)[0].square().mean().backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())
    return ema


def assert_same(tensors, others):
    for tensor, other in zip(tensors, others, strict=True):
        torch.testing.assert_close(tensor, other, rtol=1e-9, atol=1e-12)


def compare_with_unsharded(folder):
    torch.set_default_dtype(torch.float64)
    accelerator = Accelerator(cpu=True)
    images = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    plain, sharded = network(folder), network(folder)
    for block in [*sharded.down_blocks, sharded.mid_block, *sharded.up_blocks, sharded]:
        fully_shard(block)
    ema = two_steps(sharded, images.chunk(2)[accelerator.process_index])
    plain_ema = two_steps(plain, images)
    assert sum(parameter.to_local().numel() for parameter in sharded.parameters()) < 0.6 * plain.num_parameters()
    assert all(map(is_sharded, [*sharded.parameters(), *ema.shadow_params]))
    assert_same(map(whole, sharded.parameters()), plain.parameters())
    assert_same(map(whole, ema.shadow_params), plain_ema.shadow_params)

    state = ema.state_dict()
    assert_same(state["shadow_params"], plain_ema.shadow_params if accelerator.is_main_process else [])
    (state,) = broadcast_object_list([state])
    loaded = build_ema(EMA, network(folder))
    loaded.shadow_params = [torch.zeros_like(parameter) for parameter in ema.shadow_params]
    loaded.load_state_dict(state)
    for one, other in zip(loaded.shadow_params, ema.shadow_params, strict=True):
        assert one.placements == other.placements and torch.equal(one.to_local(), other.to_local())

    random_numbers = torch.get_rng_state()
    sampled = SampledNetwork(accelerator, sharded, ema)
    with sampled.ready():
        if accelerator.is_main_process:
            assert_same(sampled.unet.parameters(), plain_ema.shadow_params)
        else:
            assert {parameter.device.type for parameter in sampled.unet.parameters()} == {"meta"}
    without = SampledNetwork(accelerator, sharded, None)
    without.finish()
    if accelerator.is_main_process:
        assert_same(without.unet.parameters(), plain.parameters())
        RegDDPMPipeline(sampled.unet, DDPMScheduler()).save_pretrained(folder / "gathered")
        plain_ema.copy_to(plain.parameters())
        RegDDPMPipeline(plain, DDPMScheduler()).save_pretrained(folder / "plain")
    assert_same(map(whole, sharded.parameters()), (whole(parameter) for parameter in sharded.parameters()))
    assert torch.equal(random_numbers, torch.get_rng_state())


@pytest.mark.slow
def test_two_steps_of_shards_are_two_steps_of_the_whole_and_the_gathered_pipeline_samples_the_same(folder):
    in_processes(compare_with_unsharded, folder)
    gathered, plain = (
        RegDDPMPipeline.from_pretrained(folder / name, dtype=torch.float64)(
            2, torch.Generator().manual_seed(0), 2, output_type="pt"
        ).images
        for name in ("gathered", "plain")
    )
    torch.testing.assert_close(gathered, plain, rtol=1e-9, atol=1e-9)


def test_without_sharding_the_trained_network_itself_is_lent_the_average(folder):
    """Nothing is copied; the weights come back, and stay when the training is over."""
    unet = network(folder)
    before = [parameter.detach().clone() for parameter in unet.parameters()]
    ema = build_ema(EMA, unet)
    ema.shadow_params = [parameter + 1 for parameter in before]
    sampled = SampledNetwork(Accelerator(cpu=True), unet, ema)
    assert sampled.unet is unet and whole(before[0]) is before[0]
    unet.train()
    with pytest.raises(KeyboardInterrupt), sampled.ready():
        assert not unet.training
        assert all(map(torch.equal, unet.parameters(), ema.shadow_params))
        raise KeyboardInterrupt
    assert unet.training and all(map(torch.equal, unet.parameters(), before))
    sampled.finish()
    assert not unet.training and all(map(torch.equal, unet.parameters(), ema.shadow_params))


def test_a_loaded_average_goes_back_to_the_device_of_the_network():
    loaded = sharded_like(torch.ones(2), torch.zeros(2, device="meta"))
    assert loaded.device.type == "meta"


# The configurations


@pytest.mark.parametrize(
    "config, kind",
    [
        ("one_gpu.yaml", "NO"),
        ("ddp.yaml", "MULTI_GPU"),
        ("multi_node.yaml", "MULTI_GPU"),
        ("fsdp2.yaml", "FSDP"),
        ("hsdp.yaml", "FSDP"),
        ("deepspeed_zero2.yaml", "DEEPSPEED"),
    ],
)
def test_accelerate_reads_each_configuration(config, kind):
    read = load_config_from_file(str(CONFIGS / config))
    assert read.distributed_type == kind
    arguments = launched(config)
    expected = {"MULTI_GPU": "multi_gpu", "FSDP": "use_fsdp", "DEEPSPEED": "use_deepspeed"}.get(kind)
    engines = [name for name in ("multi_gpu", "use_fsdp", "use_deepspeed") if getattr(arguments, name)]
    assert engines == ([expected] if expected else [])
    head = [line for line in (CONFIGS / config).read_text().splitlines() if line.startswith("#")]
    assert re.search(r"# Tested: .*[Nn](ot|ever) run.* GPU", " ".join(head))
    assert f"docs/accelerate/{config}" in " ".join(head)


def test_every_configuration_is_listed():
    assert sorted(path.name for path in CONFIGS.iterdir()) == sorted(
        ["one_gpu.yaml", "ddp.yaml", "multi_node.yaml", "fsdp2.yaml", "hsdp.yaml", "deepspeed_zero2.yaml"]
    )


def test_accelerate_passes_on_the_mesh_of_hsdp():
    environment = prepare_multi_gpu_env(launched("hsdp.yaml"))
    sizes = [environment[f"PARALLELISM_CONFIG_DP_{name}_SIZE"] for name in ("REPLICATE", "SHARD")]
    assert environment["ACCELERATE_USE_PARALLELISM_CONFIG"] == "true" and sizes == ["2", "8"]
    assert environment["FSDP_VERSION"] == "2"


@pytest.mark.parametrize(
    "environment, device, message",
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "cpu", "FSDP needs GPUs"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "cuda", "fsdp_version: 2"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "cuda", None),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "cuda", "zero_stage: 2"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_MIXED_PRECISION": "bf16"}, "cuda", "--mixed_precision no"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_GRADIENT_CLIPPING": "0.5"}, "cuda", "gradient_clipping: 1"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "cuda", None),
        ({}, "cpu", None),
    ],
)
def test_an_engine_that_cannot_work_is_refused_with_the_fix(monkeypatch, environment, device, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    engine = (SimpleNamespace(device=torch.device(device)), None, False, 1.0)
    if message is None:
        check_engine(*engine)
        return
    with pytest.raises(UsageError, match=message):
        check_engine(*engine)
