"""What makes a training fast changes neither its weights' names nor, within rounding, what it learns."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import UNet2DModel
from in_processes import run_script
from network_gradients import batch_for, gradients
from runs import differ, metrics, weights
from safetensors.torch import load_file

from reg_diffusers.data.training_data import make_dataloader
from reg_diffusers.networks.attention import use_explicit_attention
from reg_diffusers.networks.computation import Choice, CompiledForBatches, Computation
from reg_diffusers.runs.checkpoint import Progress
from reg_diffusers.runtime.errors import UsageError
from reg_diffusers.runtime.hardware import allow_tf32, set_threads
from reg_diffusers.runtime.profiling import SECTIONS, WARM_UP_STEPS, StepProfile
from reg_diffusers.settings import MachineSettings, OptimizationSettings
from reg_diffusers.training import preparation
from reg_diffusers.training.optimizer import build_optimizer
from reg_diffusers.training.report import describe_machine

pytestmark = pytest.mark.training

on_glibc = pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in getattr(os, "confstr_names", {}), reason="glibc's malloc")


# What a run says


@pytest.mark.slow
def test_a_run_says_how_it_computes_and_why_and_goes_on_only_so(train, capsys):
    flags = ("--max_train_steps", 2, "--mixed_precision", "bf16", "--num_threads", 2)
    out = train(*flags, "--checkpointing_steps", 1)
    machine = re.findall("^machine +(.*)$", capsys.readouterr().out, re.MULTILINE)
    said = r"1 x cpu, 2 threads each \(as asked\), freed memory (kept|left to the system)"
    assert re.fullmatch(said, machine[0]) and machine[1] == "mixed precision bf16 (as asked)"
    assert machine[2] == "explicit attention (faster in bf16 on a CPU), not compiled (no gain was measured on a CPU)"
    assert {"unet", "model_index.json"} <= {path.name for path in out.iterdir()}
    with pytest.raises(SystemExit):
        train(*flags, "--attention", "sdpa", "--resume", "auto")
    assert "--attention explicit -> sdpa" in capsys.readouterr().err


@pytest.mark.parametrize("asked, products", [(None, "TF32 (--mixed_precision no: float32)"), ("no", "float32")])
def test_a_gpu_gets_tf32_pinned_memory_and_a_fused_optimizer_and_the_run_says_so(monkeypatch, asked, products):
    """The device is but a name here: no CUDA is needed up to the first tensor."""
    set_to = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", set_to.append)
    device = torch.device("cuda")
    uses_tf32 = allow_tf32(device, asked)
    assert set_to == ["high"] * uses_tf32 and uses_tf32 == (asked is None)
    assert not allow_tf32(torch.device("cpu"), asked) and set_to == ["high"] * uses_tf32
    state = SimpleNamespace(device=device, num_processes=1)
    computation = Computation(Choice("bf16", "supported by the hardware"), Choice("sdpa", "PyTorch's own"))
    lines = describe_machine(MachineSettings(mixed_precision=asked), state, computation, False, uses_tf32)
    said = (
        f"mixed precision bf16 (supported by the hardware), other products in {products}, pinned memory, fused AdamW"
    )
    assert lines[1] == said and lines[2].endswith("not compiled (--compile takes minutes at the start)")
    images = torch.utils.data.TensorDataset(torch.zeros(4))
    for kind in ("cuda", "cpu"):
        accelerator = SimpleNamespace(num_processes=1, device=torch.device(kind))
        loader = make_dataloader(images, OptimizationSettings(train_batch_size=2), 0, accelerator, Progress())
        assert loader.pin_memory == (kind == "cuda")
    optimizer = build_optimizer(OptimizationSettings(learning_rate=1e-3), torch.nn.Linear(2, 2, device="meta"))
    assert optimizer.defaults["fused"]


def test_attention_and_xformers_exclude_each_other(train, capsys):
    with pytest.raises(SystemExit):
        train("--attention", "explicit", "--enable_xformers_memory_efficient_attention")
    assert "xformers" in capsys.readouterr().err


# Numerics


def every_loss(train, *flags, output):
    return torch.tensor([line["loss"] for line in metrics(train(*flags, output=output))])


def test_the_fast_path_learns_what_plain_float32_learns(train, monkeypatch):
    """bfloat16 keeps 8 bits: each product is off by up to 2^-9 = 0.2 %, in either direction. A loss is a mean of many
    of them, and training feeds them back: 1 % bounds each of 20 steps. In float32 explicit and fused attention differ
    by the order of sums alone, by 1e-7 or so, which training feeds back, too: 0.01 %.
    """
    monkeypatch.setattr("reg_diffusers.training.monitors.LOG_INTERVAL", 1)
    flags = ("--max_train_steps", 20, "--learning_rate", 3e-3)
    plain = every_loss(train, *flags, "--attention", "sdpa", output="plain")
    explicit = every_loss(train, *flags, "--attention", "explicit", output="explicit")
    fast = every_loss(train, *flags, "--mixed_precision", "bf16", output="fast")
    assert len(plain) == 20 and plain[-8:].mean() < 0.95 * plain[:8].mean()  # it does learn
    torch.testing.assert_close(explicit, plain, rtol=1e-4, atol=0)
    torch.testing.assert_close(fast, plain, rtol=1e-2, atol=0)
    assert not torch.equal(fast, plain) and not torch.equal(explicit, plain)  # or it was not used


# Memory


CHILD = """
import sys, torch
from reg_diffusers.runtime.hardware import keep_freed_memory
kept = keep_freed_memory(torch.device(sys.argv[1]))
import resource
def step():
    blocks = [torch.ones(3 * 2**22) for _ in range(3)]  # 48 MB each, above what glibc would learn to keep by itself
    del blocks
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    step()
before = faults()
for _ in range(5):
    step()
print(kept, faults() - before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def memory_of_steps(device="cpu", **env):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, device], env=clean | env, capture_output=True, text=True, check=True
    )
    kept, faults, peak = done.stdout.split()
    return kept == "True", int(faults), int(peak)


@on_glibc
def test_freed_memory_is_used_again_without_page_faults_and_without_a_higher_peak():
    kept, faults, peak = memory_of_steps()
    not_kept, many_faults, plain_peak = memory_of_steps(device="cuda")  # not a training on a CPU
    assert kept and not not_kept
    assert faults < 1000 < many_faults
    assert peak < 1.05 * plain_peak


@on_glibc
def test_a_users_own_choice_of_allocation_is_kept():
    kept, faults, _ = memory_of_steps(MALLOC_MMAP_THRESHOLD_="65536")
    assert not kept and faults > 1000


@pytest.mark.parametrize("raised", [ValueError, AttributeError])
def test_another_c_library_is_left_alone(monkeypatch, raised):
    from reg_diffusers.runtime import hardware

    def confstr(name):
        raise raised

    monkeypatch.setattr(hardware.os, "confstr", confstr)
    for name in ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    assert hardware.keep_freed_memory(torch.device("cpu")) is False


@pytest.mark.parametrize("is_explicit", [False, True])
def test_checkpointed_gradients_are_the_same(tiny_unet, is_explicit):
    unet = tiny_unet()
    if is_explicit:
        use_explicit_attention(unet)
    output, grads = gradients(unet, *batch_for(unet))
    unet.enable_gradient_checkpointing()
    again, checkpointed = gradients(unet, *batch_for(unet))
    assert torch.equal(output, again) and not differ(grads, checkpointed)


def test_a_run_with_gradient_checkpointing_keeps_less_and_ends_in_the_same_weights(train):
    kept, trained = {}, {}
    for name, flags in {"plain": (), "checkpointed": ("--gradient_checkpointing",)}.items():
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t
        ):
            trained[name] = weights(train("--max_train_steps", 2, *flags, output=name))
        kept[name] = sum(sizes)
    assert not differ(trained["plain"], trained["checkpointed"])
    assert kept["checkpointed"] < kept["plain"]


# Compiling


@pytest.fixture
def compiled_by(monkeypatch, train):
    """Has train_reg.py compile with a quick back end; returns the shapes it compiled for and how often each ran."""

    def use(backend):
        runs = []

        def counting(graph, example_inputs):
            forward = backend(graph, example_inputs)
            runs.append(0)
            place = len(runs) - 1

            def run(*args):
                runs[place] += 1
                return forward(*args)

            return run

        torch._dynamo.reset()
        quick = functools.partial(CompiledForBatches, backend=counting)
        monkeypatch.setattr(preparation, "CompiledForBatches", quick)
        return runs

    yield use
    torch._dynamo.reset()


def as_it_is(graph, example_inputs):
    return graph.forward


@pytest.mark.slow
def test_a_compiled_run_is_the_plain_one_with_the_same_names_and_resumes(train, compiled_by, capsys):
    runs = compiled_by(as_it_is)
    flags = ("--max_train_steps", 3, "--checkpointing_steps", 2, "--preview_steps", 2)
    flags += ("--gradient_accumulation_steps", 2, "--mixed_precision", "bf16", "--attention", "sdpa")
    plain = weights(train(*flags, output="plain"))
    assert runs == [] and "not compiled" in capsys.readouterr().out
    out = train(*flags, "--compile", output="compiled")
    assert "compiled (takes minutes before the first step)" in capsys.readouterr().out
    assert runs == [6]  # one shape, for each training batch; previews ran the plain network
    assert list(weights(out)) == list(plain) and not differ(weights(out), plain)
    state = load_file(out / "checkpoint-2" / "model.safetensors")
    assert set(state) == set(plain) and UNet2DModel.from_pretrained(out / "unet")
    torch._dynamo.reset()
    resumed = train(*flags, "--compile", "--resume_from_checkpoint", "checkpoint-2", output="compiled")
    assert runs == [6, 2] and not differ(weights(resumed), plain)


def test_only_full_batches_of_the_step_are_compiled_and_bad_graphs_are_no_secret(tiny_unet):
    torch._dynamo.reset()
    unet, compiled_for = tiny_unet(), []

    def noting(graph, example_inputs):
        compiled_for.append([t.shape[0] for t in example_inputs if isinstance(t, torch.Tensor) and t.ndim == 4])
        return graph.forward

    use_explicit_attention(unet)
    names = list(unet.state_dict())
    network = CompiledForBatches(unet, batch_size=4, backend=noting)
    sample, timesteps = batch_for(unet)
    network(sample, timesteps, return_dict=False)
    assert len(compiled_for) == 1
    network(sample[:3], timesteps[:3], return_dict=False)  # a last, shorter batch
    with torch.no_grad():
        unet(sample, timesteps, return_dict=False)
    unet.eval()
    unet(sample, 7)  # as a pipeline does
    assert len(compiled_for) == 1
    assert "forward" not in vars(unet) and list(unet.state_dict()) == names

    class Broken(torch.nn.Module):
        def forward(self, sample):
            torch._dynamo.graph_break()
            return sample + 1

    with pytest.raises(torch._dynamo.exc.Unsupported):
        CompiledForBatches(Broken(), batch_size=4, backend=noting)(sample)


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("precision, tolerance", [("no", 1e-4), ("bf16", 1e-2)])  # as above; bf16 is explicit, too
def test_what_inductor_compiles_learns_the_same(train, monkeypatch, precision, tolerance):
    """Its sums have another order, which training feeds back. One level, because compiling takes the time."""
    levels = {"block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    UNet2DModel(8, 1, 1, layers_per_block=1, norm_num_groups=4, attention_head_dim=8, **levels).save_config(
        "one_level"
    )
    train = functools.partial(train, model=("--model_config_name_or_path", "one_level"))
    monkeypatch.setattr("reg_diffusers.training.monitors.LOG_INTERVAL", 1)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    flags = ("--max_train_steps", 5, "--learning_rate", 3e-3, "--mixed_precision", precision)
    flags += ("--regularizer", "total_variation", "--reg_weight", 0.05)  # its gradient is bounded
    plain = every_loss(train, *flags, output="plain")
    assert not torch._dynamo.utils.counters["stats"]["unique_graphs"]
    compiled = every_loss(train, *flags, "--compile", output="compiled")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()
    torch.testing.assert_close(compiled, plain, rtol=tolerance, atol=0)


@pytest.mark.slow
def test_two_processes_train_one_compiled_model_with_clean_names(tmp_path, tiny_unet):
    np.save(tmp_path / "fields.npy", np.random.default_rng(0).normal(size=(16, 1, 8, 8)).astype("float32"))
    tiny_unet().save_config(tmp_path / "tiny")

    def quickly(script):
        torch._dynamo.reset()
        preparation.CompiledForBatches = functools.partial(CompiledForBatches, backend="eager")

    flags = ("--max_train_steps", 3, "--output_dir")
    assert run_script(tmp_path, *flags, "plain") == [0, 0]
    assert run_script(tmp_path, *flags, "compiled", "--compile", prepare=quickly) == [0, 0]
    plain = weights(tmp_path / "plain")
    assert list(weights(tmp_path / "compiled")) == list(plain)
    for name, value in weights(tmp_path / "compiled").items():
        torch.testing.assert_close(value, plain[name], atol=1e-6, rtol=0, msg=name)


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED"])
def test_compiling_is_refused_where_it_was_never_tried(train, capsys, monkeypatch, engine):
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    with pytest.raises(SystemExit):
        train("--compile")
    assert "--compile is not supported with" in capsys.readouterr().err


# Profile


def test_a_profile_says_where_the_time_goes_and_leaves_a_trace(train, capsys):
    out = train("--max_train_steps", 8, "--profile", 3)
    said = capsys.readouterr()
    lines = (said.out + said.err).replace("\r", "\n")
    (heading,) = re.findall(r"profile +3 steps, ([\d.]+) ms each; (\S+)", lines)
    assert heading[1] == "out/profile/trace.json"
    table = dict(re.findall(r"^  (\w+) +([\d.]+)% +[\d.]+ ms", lines, re.MULTILINE))
    assert list(table) == [*SECTIONS, "rest"]
    assert sum(map(float, table.values())) == pytest.approx(100, abs=0.5)
    assert all(float(share) > 0 for share in table.values())
    assert float(table["forward"]) > float(table["data"])
    events = json.loads((out / "profile" / "trace.json").read_text())["traceEvents"]
    labelled = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    assert {name: labelled.count(name) for name in SECTIONS} == {
        name: 6 if name == "auxiliary" else 3 for name in SECTIONS
    }
    assert "profile" not in (out / "reg_settings.yaml").read_text()


def test_a_profile_of_a_run_that_ends_early_is_of_what_there_was(train, capsys):
    out = train("--max_train_steps", WARM_UP_STEPS + 2, "--profile", 100)
    said = capsys.readouterr()
    assert "profile    2 steps" in said.out + said.err and (out / "profile" / "trace.json").is_file()


def test_a_profile_changes_nothing_that_is_learned(train):
    assert not differ(
        weights(train("--max_train_steps", 5)), weights(train("--max_train_steps", 5, "--profile", 1, output="b"))
    )


def test_sections_count_what_is_theirs_alone(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("reg_diffusers.runtime.profiling.time.perf_counter", lambda: now[0])
    profile = StepProfile(Accelerator(cpu=True), 1, tmp_path)

    def forward():
        now[0] += 3

    labelled = profile.around("forward", forward)
    for _ in range(WARM_UP_STEPS):
        labelled()
        assert profile.step() == []
    with profile("auxiliary"):
        labelled()
        now[0] += 1
    now[0] += 4
    lines = profile.step()
    assert lines[0].startswith("profile    1 steps, 8000.0 ms each")
    shares = {line.split()[0]: line.split()[1] for line in lines[1:]}
    assert shares == dict.fromkeys(SECTIONS, "0.0%") | {"forward": "37.5%", "auxiliary": "12.5%", "rest": "50.0%"}
    assert profile.step() == [] and profile.around("forward", forward) is forward


def test_far_more_threads_than_cores_are_refused():
    with pytest.raises(UsageError, match=r"--num_threads 99999: this process has .* cores: name at most that number"):
        set_threads(99999)
