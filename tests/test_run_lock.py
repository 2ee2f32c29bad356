"""One run at a time in an output folder: others are refused, a dead one is noticed however it died."""

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
from in_processes import run_script
from runs import refusal

from reg_diffusers.runs import run_lock
from reg_diffusers.runs.run_lock import RunLock
from reg_diffusers.runtime.errors import UsageError

pytestmark = pytest.mark.reliability

HOLD = """
import sys, time
from pathlib import Path
from reg_diffusers.runs.run_lock import RunLock
lock = RunLock(Path("."))
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def hold(tmp_path):
    """Another process that holds the lock of a folder."""
    running = []

    def start(code=HOLD):
        process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
        running.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in running:
        process.kill()
        process.wait()


def owner_of(path):
    return run_lock._Owner(**json.loads((path / ".lock").read_text()))


def test_a_second_run_is_refused_in_one_line_and_changes_nothing(train, capsys, tmp_path):
    out = train("--max_train_steps", 2, "--checkpointing_steps", 1)
    assert not (out / ".lock").exists()
    with RunLock(out):
        before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
        for flags in (("--overwrite_output_dir",), ("--resume", "auto"), ()):
            error = refusal(train, capsys, "--max_train_steps", 3, *flags)
            assert (
                f"--output_dir out: another run is writing there (process {os.getpid()} on {socket.gethostname()}, "
                in error
            )
            assert error.endswith("wait until it ends, or name another folder")
        assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    train("--max_train_steps", 2, "--resume", "auto")


def test_a_refused_or_failed_run_gives_the_folder_free(train, capsys, tmp_path):
    out = train("--max_train_steps", 1)
    refusal(train, capsys, "--max_train_steps", 1)  # an earlier run, and no flag that says what to do
    assert not (out / ".lock").exists()
    train.script.fit = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        train("--max_train_steps", 1, "--overwrite_output_dir")
    assert not (out / ".lock").exists()


def test_a_killed_run_keeps_no_lock_and_a_living_one_does(hold, tmp_path):
    process = hold()
    with pytest.raises(UsageError, match=f"process {process.pid} on"):
        RunLock(tmp_path)
    process.send_signal(signal.SIGSTOP)  # it lives, whatever it does
    with pytest.raises(UsageError, match=f"process {process.pid} on"):
        RunLock(tmp_path)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and not yet collected by its parent
    with RunLock(tmp_path):
        assert owner_of(tmp_path).pid == os.getpid()
    assert not (tmp_path / ".lock").exists()


def test_a_lock_whose_process_number_another_process_has_now_is_free(tmp_path):
    me = run_lock._Owner.this_process()
    for stale in (
        replace(me, started=str(int(me.started) - 1)),  # the number was given anew
        replace(me, boot="another", pid=1),  # the machine was started anew
        replace(me, pid=2**22 + 1),
        replace(me, namespace="pid:[1]"),  # a container that is gone: nobody holds the file
    ):
        (tmp_path / ".lock").write_text(json.dumps(asdict(stale)))
        with RunLock(tmp_path):
            assert owner_of(tmp_path) == me


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"pid": 1}', "\xff", '{"pid": 1, "host": []}'])
def test_an_unreadable_lock_that_nobody_holds_is_free(tmp_path, content):
    (tmp_path / ".lock").write_text(content, encoding="latin-1")
    RunLock(tmp_path).release()


def test_a_run_on_another_host_is_refused_and_the_file_named(train, capsys):
    out = train("--max_train_steps", 1)
    there = replace(run_lock._Owner.this_process(), host="node7 3d1219")
    (out / ".lock").write_text(json.dumps(asdict(there)))
    error = refusal(train, capsys, "--max_train_steps", 1, "--overwrite_output_dir")
    assert f"another run may write there (process {os.getpid()} on node7, since {there.since})" in error
    assert error.endswith("if it is dead, remove out/.lock")
    (out / ".lock").unlink()
    train("--max_train_steps", 1, "--overwrite_output_dir")


def test_a_run_in_another_container_of_this_machine_is_seen_by_the_lock_of_the_system(hold, tmp_path):
    process = hold()
    there = replace(owner_of(tmp_path), namespace="pid:[1]", pid=1)
    (tmp_path / ".lock").write_text(json.dumps(asdict(there)))  # the very file, which that process holds
    with pytest.raises(UsageError, match="process 1 on"):
        RunLock(tmp_path)
    process.kill()
    process.wait()
    RunLock(tmp_path).release()


def test_helpers_of_a_dead_run_are_waited_for(hold, tmp_path):
    process = hold(HOLD.replace("print(", "import os; os.fork() or time.sleep(2) or os._exit(0); print("))
    process.kill()
    process.wait()
    assert (tmp_path / ".lock").exists()
    RunLock(tmp_path).release()  # its child held the file for two seconds


def test_without_locks_of_the_system_the_file_decides(hold, tmp_path, monkeypatch):
    process = hold()
    monkeypatch.setattr(run_lock, "fcntl", None)
    with pytest.raises(UsageError, match=f"process {process.pid} on"):
        RunLock(tmp_path)
    process.kill()
    process.wait()
    RunLock(tmp_path).release()
    here = run_lock._Owner.this_process()
    (tmp_path / ".lock").write_text(json.dumps(asdict(replace(here, namespace="pid:[1]"))))
    with pytest.raises(UsageError, match="but that cannot be checked from here: if it is dead, remove"):
        RunLock(tmp_path)


def test_of_many_that_start_at_once_one_gets_the_folder(tmp_path):
    code = HOLD.replace("time.sleep(600)", "time.sleep(3)").replace("lock = ", "sys.stdin.readline(); lock = ")
    command = [sys.executable, "-c", code]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    (tmp_path / ".lock").write_text(json.dumps(asdict(replace(run_lock._Owner.this_process(), pid=2**22 + 1))))
    started = [subprocess.Popen(command, cwd=tmp_path, text=True, **pipes) for _ in range(4)]
    outputs = []
    for process in started:
        process.stdin.write("\n")
        process.stdin.flush()
    for process in started:
        outputs.append(process.communicate(timeout=60)[0])
    assert sorted(outputs) == ["", "", "", "held\n"]


@pytest.mark.slow
def test_all_processes_of_a_launch_end_where_the_folder_is_taken(folder, capfd):
    (folder / "taken").mkdir()
    with RunLock(folder / "taken"):
        assert run_script(folder, "--output_dir", "taken", "--max_train_steps", 1) == [2, 2]
    assert capfd.readouterr().err.count("--output_dir taken: another run is writing there") == 1
    assert not list((folder / "taken").iterdir())
