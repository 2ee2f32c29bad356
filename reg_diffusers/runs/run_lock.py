"""Locks an output folder for one run at a time; the lock of a dead run expires.

A file in the folder names the process that writes there: host, process id, start time. On the same host, this detects
a dead process even after a kill, a reboot, or when another process has reused its id. An operating system lock on the
same file decides which process is first, and covers processes in other containers. From another host, nothing shows
whether a process lives: there the lock holds until its file is removed.
"""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from ..runtime.errors import UsageError
from .run_folder import LOCK_FILE

try:
    import fcntl
except ImportError:  # not a POSIX system: the file alone must suffice
    fcntl = None

__all__ = ["RunLock"]

_PATIENCE = 15  # seconds that subprocesses of a dead run may take to exit; data loading workers check every 5 s


@dataclass(frozen=True)
class _Owner:
    """The unique identity of a process.

    Attributes:
        host: name and id of the machine.
        boot: id of the machine's current boot; process ids are unique within it.
        namespace: the namespace of process ids; a container has its own.
        pid: the process id.
        started: the start time in clock ticks of the machine, which changes of the system time do not affect.
        since: the start time in readable form.
    """

    host: str
    boot: str
    namespace: str
    pid: int
    started: str
    since: str

    @classmethod
    def this_process(cls) -> _Owner:
        pid = os.getpid()
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(psutil.Process(pid).create_time()))
        host = f"{socket.gethostname()} {_text('/etc/machine-id')}".strip()
        return cls(host, _text("/proc/sys/kernel/random/boot_id"), _namespace(), pid, _started(pid) or "", since)

    @classmethod
    def read(cls, descriptor: int) -> _Owner | None:
        """Returns the process that wrote a lock file; None if the file is empty or unreadable."""
        os.lseek(descriptor, 0, os.SEEK_SET)
        try:
            owner = cls(**json.loads(os.read(descriptor, 2**16)))
            return owner if isinstance(owner.pid, int) else None
        except (ValueError, TypeError):
            return None

    def is_alive(self, seen_from: _Owner, is_locked: bool | None) -> bool | None:
        """Whether the process lives; None if that is unknown.

        Args:
            seen_from: the process that checks.
            is_locked: whether a process holds the operating system lock; None if the file system has no locks.
        """
        if self.host != seen_from.host:
            return None
        if self.boot != seen_from.boot:
            return bool(is_locked)
        if self.namespace != seen_from.namespace:
            return is_locked
        return bool(self.started) and _started(self.pid) == self.started

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host.split()[0]}, since {self.since}"


class RunLock:
    """Locks an output folder until `release`, or until the end of the `with` block.

    Raises:
        UsageError: if another run holds the lock or may hold it; the message names the process and the file.
        OSError: if the lock file cannot be written.
    """

    def __init__(self, folder: Path):
        self._path = folder / LOCK_FILE
        self._owner = _Owner.this_process()
        deadline = time.monotonic() + _PATIENCE
        while (descriptor := self._taken(folder, is_last_try=time.monotonic() > deadline)) is None:
            time.sleep(0.2)
        self._descriptor: int | None = descriptor

    def release(self) -> None:
        """Releases the lock if this process holds it."""
        if self._descriptor is None or os.getpid() != self._owner.pid:
            return
        self._path.unlink(missing_ok=True)
        os.close(self._descriptor)
        self._descriptor = None

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *_) -> None:
        self.release()

    def _taken(self, folder: Path, is_last_try: bool) -> int | None:
        """Returns the open lock file, locked and naming this process; None to try again."""
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
        try:
            is_locked = _lock(descriptor)
            if not self._is_the_file(descriptor):  # released in the meantime
                os.close(descriptor)
                return None
            self._check_owner(_Owner.read(descriptor), is_locked, folder, is_last_try)
            if is_locked:
                os.close(descriptor)
                return None
            content = json.dumps(asdict(self._owner)).encode()
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, content, 0)
            os.fsync(descriptor)
            if is_locked is None:  # of two simultaneous processes, the last one to write wins
                time.sleep(0.5)
                if _Owner.read(descriptor) != self._owner:
                    raise UsageError(f"--output_dir {folder}: another run just started there: name another folder")
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _is_the_file(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self._path, follow_symlinks=False))
        except FileNotFoundError:
            return False

    def _check_owner(self, owner: _Owner | None, is_locked: bool | None, folder: Path, is_last_try: bool) -> None:
        """Raises `UsageError` unless the process in the file is dead; its subprocesses get some time to exit."""
        flag = f"--output_dir {folder}"
        if owner is not None and (is_alive := owner.is_alive(self._owner, is_locked)) is not False:
            if is_alive:
                raise UsageError(
                    f"{flag}: another run is writing there ({owner}): wait until it ends, or name another folder"
                )
            raise UsageError(
                f"{flag}: another run may write there ({owner}), but that cannot be checked from here: if it is dead,"
                f" remove {self._path}"
            )
        if is_locked and is_last_try:
            raise UsageError(
                f"{flag}: a process of an earlier run still holds {self._path}: end it, or name another folder"
            )


def _lock(descriptor: int) -> bool | None:
    """Locks an open file. Returns True if another process holds it, None if the file system has no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    return False


def _started(pid: int) -> str | None:
    """Returns the start time of a process; None if it does not exist or is a zombie."""
    if os.path.isdir("/proc/self"):
        try:
            # The fields after the name in parentheses, which may hold any text; the first is field 3, the state.
            fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] in "ZX" else fields[19]
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else f"{process.create_time():.0f}"
    except psutil.Error:
        return None


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _text(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except (OSError, ValueError):
        return ""
