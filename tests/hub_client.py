"""Runs scripts and train_reg.py in processes of their own, whose Hub is the server of the tests."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

from hub_server import TOKEN, client_environment
from huggingface_hub import constants

TRAIN_REG = Path(__file__).parents[1] / "train_reg.py"
SMALL = (
    "--resolution 8 --train_batch_size 4 --ddpm_num_inference_steps 2 --eval_batch_size 1 --lr_warmup_steps 0"
    " --mixed_precision no --no-compare --push_to_hub"
).split()

# Makes the package impossible to import, however it is installed.
WITHOUT_PACKAGE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "reg_diffusers":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
"""
PRELUDE = """
import json, os, sys
import torch

torch.set_num_threads(1)

def tell(**facts):
    print(json.dumps(facts))

def error_of(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
"""


def make_client(monkeypatch, hub, home, token=TOKEN):
    """Makes this process one whose Hub is `hub`, and whose caches are in the folder `home`."""
    environment = client_environment(hub, home, token)
    for name in set(os.environ) - set(environment):
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    place = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", place)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


class Client:
    """Processes that know one Hub and one folder.

    Args:
        hub: a `HubServer`.
        folder: where they run; their caches are beside it.
    """

    def __init__(self, hub, folder):
        self.hub, self.folder = hub, folder
        folder.mkdir(parents=True, exist_ok=True)

    def start(self, *command, token=TOKEN):
        """Starts a command, found where this Python's own commands are."""
        environment = client_environment(self.hub, f"{self.folder}-cache", token)
        environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
        environment["PYTHONUNBUFFERED"] = "1"
        return Process(list(map(str, command)), self.folder, environment)

    def run(self, *command, token=TOKEN, check=True):
        return self.start(*command, token=token).finish(check)

    def start_training(self, *flags, token=TOKEN):
        return self.start(sys.executable, TRAIN_REG, *SMALL, *flags, token=token)

    def train(self, *flags, token=TOKEN, check=True):
        return self.start_training(*flags, token=token).finish(check)

    def python(self, script, *arguments, token=TOKEN, package=True, prelude=PRELUDE, seconds=100):
        """Runs a script, and returns what it told last."""
        script = ("" if package else WITHOUT_PACKAGE) + prelude + textwrap.dedent(script)
        done = self.start(sys.executable, "-c", script, *arguments, token=token).finish(seconds=seconds)
        return json.loads(done.stdout.splitlines()[-1])


class Process:
    """A process that has begun, and what it has written so far."""

    def __init__(self, command, folder, environment):
        self._files = stdout, stderr = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115
        self._process = subprocess.Popen(command, cwd=folder, env=environment, stdout=stdout, stderr=stderr)

    @property
    def stdout(self):
        return self._text(0)

    @property
    def stderr(self):
        return self._text(1)

    @property
    def returncode(self):
        return self._process.poll()

    def finish(self, check=True, seconds=100):
        """Waits for its end, and returns it."""
        try:
            self._process.wait(seconds)
        finally:
            self._process.kill()
        assert not check or self.returncode == 0, self.stdout + self.stderr
        return self

    def wait_for(self, condition, seconds=100):
        """Waits until a condition holds while the process goes on."""
        end = time.monotonic() + seconds
        while not condition():
            assert self.returncode is None, self.stdout + self.stderr
            assert time.monotonic() < end, self.stdout + self.stderr
            time.sleep(0.02)

    def interrupt(self, number=signal.SIGINT):
        """As Ctrl-C does, or by another signal."""
        self._process.send_signal(number)

    def _text(self, number):
        return os.pread(self._files[number].fileno(), 10_000_000, 0).decode()


def asked(hub, method, part):
    """How often the server got such a request."""
    return sum(verb == method and part in path for verb, path in list(hub.requests))


def code_blocks(card, language="python"):
    return re.findall(rf"^```{language}\n(.*?)^```", card, re.MULTILINE | re.DOTALL)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
