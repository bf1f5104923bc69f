"""The daemon that is measured: one that the bench starts, restarts and ends itself, or one that runs already."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hga_kvd_client import errors
from hga_kvd_client.connection import Connection

from hga_kvd.config import parse_size

START_S = 30.0
STOP_S = 120.0


class BenchFailed(Exception):
    """The bench cannot go on; the text says why."""


class Daemon:
    """target: where it listens. pid: None when it is on another host. place: a directory of ours on its disk, or None."""

    def __init__(self, target: str, place: Path | None, pid: int | None) -> None:
        self.target = target
        self.place = place
        self.pid = pid

    @property
    def temporary(self) -> bool:
        return False

    def connect(self) -> Connection:
        try:
            return Connection(self.target, reconnect_s=2.0)
        except errors.KvdError as error:
            raise BenchFailed(str(error)) from error

    def restart(self, ram_bytes: int) -> None:
        """A running daemon stays as it is."""


class TemporaryDaemon(Daemon):
    """A process of ours on a directory of ours. The environment's HGA_KVD_* settings hold, but for where it works.

    It ends with us: from the first start on, a SIGTERM to this process is an exit that runs what is to run at its end.
    """

    def __init__(self, place: Path, sockets: Path, *options: str) -> None:
        """options: of the command, beside where it works. In `place` it makes kv and daemon.log."""
        super().__init__(f"unix:{sockets / 'k.sock'}", place, None)
        self._log = place / "daemon.log"
        self._nvme = place / "kv"
        self._nvme.mkdir(exist_ok=True)
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def temporary(self) -> bool:
        return True

    def restart(self, ram_bytes: int) -> None:
        """Ends the process if there is one, then starts one with this arena on the same directory. Its RAM is empty."""
        self.stop()
        _exit_at_sigterm()
        command = [sys.executable, "-m", "hga_kvd", "--nvme", str(self._nvme), "--ram", str(ram_bytes)]
        command += ["--listen", self.target, "--log-level", "warning", *self._options]
        with self._log.open("ab") as log:
            # Its own session: a Ctrl-C at the terminal is ours, and we end it with SIGTERM.
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self._process, self.pid = process, process.pid
        deadline = time.monotonic() + START_S
        while not _answers(self.target):
            if process.poll() is not None or time.monotonic() > deadline:
                raise BenchFailed(f"the daemon did not start:\n{self._log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.02)

    def stop(self) -> None:
        if self._process is None:
            return
        process, self._process, self.pid = self._process, None, None
        process.send_signal(signal.SIGTERM)
        try:
            code = process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise BenchFailed(f"the daemon did not stop within {STOP_S:g} s") from None
        if code not in (0, -signal.SIGTERM):  # the latter: so early in its start that it did not know the signal yet
            raise BenchFailed(f"the daemon ended with {code}:\n{self._log.read_text(errors='replace')[-2000:]}")


def _exit_at_sigterm() -> None:
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


@contextmanager
def daemon_on(place: Path, ram: str, *options: str) -> Iterator[TemporaryDaemon]:
    """A daemon that runs on this directory, which stays. ram, options: as on its command line. Raises: BenchFailed."""
    daemon = TemporaryDaemon(place, place, *options)
    try:
        daemon.restart(parse_size(ram))
        yield daemon
    finally:
        daemon.stop()


@contextmanager
def temporary_daemon(directory: Path) -> Iterator[TemporaryDaemon]:
    """A daemon, not yet started, whose files lie in a new directory inside `directory`; all of it goes at the end."""
    with contextlib.ExitStack() as stack:
        try:
            place = Path(tempfile.mkdtemp(prefix="hga-kvd-bench-", dir=directory))
        except OSError as error:
            raise BenchFailed(f"cannot work in {directory}: {error.strerror}") from error
        stack.callback(shutil.rmtree, place, ignore_errors=True)
        # A socket's path has at most 107 bytes, which `directory` may have already.
        sockets = stack.enter_context(tempfile.TemporaryDirectory(prefix="kvd"))
        daemon = TemporaryDaemon(place, Path(sockets))
        stack.callback(daemon.stop)
        yield daemon


@contextmanager
def running_daemon(target: str, directory: Path | None) -> Iterator[Daemon]:
    """directory: on the daemon's disk, for what is compared with; None: nothing is."""
    with contextlib.ExitStack() as stack:
        place = None
        if directory is not None:
            place = Path(tempfile.mkdtemp(prefix="hga-kvd-bench-", dir=directory))
            stack.callback(shutil.rmtree, place, ignore_errors=True)
        yield Daemon(target, place, _pid_of(target))


def _answers(target: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
        probe.connect(target.removeprefix("unix:"))
        return True
    return False


def _pid_of(target: str) -> int | None:
    """Who listens on a unix socket, as the kernel knows it; None for TCP, which may be another host."""
    if not target.startswith("unix:"):
        return None
    with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
        probe.connect(target.removeprefix("unix:"))
        pid: int = struct.unpack("3i", probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
        return pid if pid and pid != os.getpid() else None
    return None
