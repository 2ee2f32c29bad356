"""Runs of train_reg.py in this process, and what they leave; the fixture `train` is in conftest.py."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
QUICK = (
    "--resolution 8 --train_batch_size 8 --ddpm_num_inference_steps 2 --eval_batch_size 4 --lr_warmup_steps 0".split()
)
ACCELERATE = (sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch")
FLAGS = ("--max_train_steps", 9, "--checkpointing_steps", 3)  # three checkpoints


def load_script():
    spec = importlib.util.spec_from_file_location("train_reg", ROOT / "train_reg.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def reset():
    """Lets the next training or command of this process set up accelerate anew."""
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


def weights(folder):
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def differ(one, other):
    return any(not torch.equal(one[name], other[name]) for name in one)


def refusal(train, capsys, *flags, **kwargs):
    with pytest.raises(SystemExit) as stopped:
        train(*flags, **kwargs)
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("train_reg.py: error: ")
    return error


def checkpoints(folder):
    return sorted(path.name for path in folder.glob("*checkpoint-*"))


def resumed(train, *flags, **kwargs):
    return train(*FLAGS, "--resume", "auto", *flags, **kwargs)


def finished(train, out="out"):
    """A run of FLAGS; it is trained once, and copied after that."""
    kept = train.kept / out
    if not kept.is_dir():
        shutil.copytree(train(*FLAGS, output=out), kept)
    return shutil.copytree(kept, train.folder / out, dirs_exist_ok=True)


def cut(train, out="out"):
    """A finished run without what came after its sixth step."""
    folder = finished(train, out)
    shutil.rmtree(folder / "checkpoint-9")
    shutil.rmtree(folder / "unet")
    return folder


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def evaluation_result(folder="evaluation"):
    return json.loads(Path(folder, "evaluation.json").read_text())
