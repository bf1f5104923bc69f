"""Shared fixtures: the real daemon process on real files."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import hypothesis
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hga_kvd import native
from hga_kvd_proto import rings
from hga_kvd_proto.v1 import kvd_pb2_grpc

# Kernels are compared with their twins everywhere: in Triton's interpreter where there is no GPU. Before any import.
if not (shutil.which("nvidia-smi") or list(Path("/dev").glob("nvidia[0-9]*"))):
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A busy machine is no failure: hypothesis would call an example of more than 200 ms one, and many that are slow to draw.
# `make test` draws the same examples every time, so it fails for a change and not by chance; `make soak` draws others.
CHANCE = os.environ.get("HGA_KVD_SOAK_CHANCE") == "1"
hypothesis.settings.register_profile(
    "any-speed", deadline=None, derandomize=not CHANCE, suppress_health_check=list(hypothesis.HealthCheck)
)
hypothesis.settings.load_profile("any-speed")


@pytest.fixture(params=["native", "twin"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hot path in C, and then in Python."""
    if request.param == "twin":
        monkeypatch.setattr(native, "LIBRARY", None)
        monkeypatch.setattr(rings, "LIBRARY", None)
    elif native.LIBRARY is None:
        pytest.skip(f"native code is {native.STATE}")


START_S = 60.0
STOP_S = 60.0


class Daemon:
    """One daemon process on one directory and one socket; may be stopped, killed and started again.

    target: `unix:PATH`. nvme: the directory of segments, None for RAM only. Each start appends to the log.
    """

    def __init__(
        self, nvme: Path | None, options: tuple[str, ...], environment: dict[str, str], log_path: Path
    ) -> None:
        # A unix socket path has at most 107 bytes; pytest's directories alone come near that.
        self.socket_directory = Path(tempfile.mkdtemp(prefix="kvd"))
        self.socket = self.socket_directory / "k.sock"
        self.target = f"unix:{self.socket}"
        self.nvme = nvme
        self.options = options
        self.environment = environment
        self.log_path = log_path
        self.process: subprocess.Popen[bytes] | None = None
        self._channels: list[grpc.Channel] = []

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def start(self) -> Daemon:
        """Starts the process and waits until it serves."""
        assert self.process is None
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                self.command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._environment()
            )
        deadline = time.monotonic() + START_S
        while not self._serves():
            assert self.process.poll() is None, f"the daemon ended with {self.process.returncode}:\n{self.log()}"
            assert time.monotonic() < deadline, f"the daemon does not serve after {START_S} s:\n{self.log()}"
            time.sleep(0.01)
        return self

    def _serves(self) -> bool:
        # A channel that finds nobody waits for a second before it looks again: gRPC asks when there is somebody.
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(self.target.removeprefix("unix:")):
                return False
        with contextlib.suppress(grpc.RpcError), grpc.insecure_channel(self.target) as channel:
            request = health_pb2.HealthCheckRequest(service="hga_kvd.v1.Kvd")
            answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=5)
            return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
        return False

    def command(self) -> list[str]:
        place = ["--nvme", str(self.nvme)] if self.nvme else []
        return [sys.executable, "-m", "hga_kvd", *place, "--listen", self.target, *self.options]

    def run(self) -> subprocess.CompletedProcess[str]:
        """Runs a daemon that is expected to refuse the start, to its end."""
        return subprocess.run(
            self.command(), check=False, capture_output=True, text=True, timeout=START_S, env=self._environment()
        )

    def _environment(self) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("HGA_KVD_")}
        return {**inherited, "HGA_KVD_RAM": "64MiB", "HGA_KVD_SEGMENT_BYTES": "32MiB", **self.environment}

    def stop(self) -> None:
        """SIGTERM; asserts a clean end."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        self.wait()

    def wait(self) -> None:
        """Waits for the end of a daemon that was told to stop; asserts exit code 0 and no traceback."""
        assert self.process is not None
        try:
            code = self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"the daemon did not stop within {STOP_S} s:\n{self.log()}") from None
        self.process = None
        assert code == 0, f"the daemon ended with {code}:\n{self.log()}"
        assert "Traceback" not in self.log(), self.log()

    def kill(self) -> None:
        """kill -9."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        self.process = None

    def log(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def events(self, name: str) -> list[dict[str, Any]]:
        """Log lines of one event."""
        lines = [json.loads(line) for line in self.log().splitlines() if line.startswith("{")]
        return [line for line in lines if line["event"] == name]

    def channel(self) -> grpc.Channel:
        """A new gRPC channel, closed when the test ends."""
        channel = grpc.insecure_channel(
            self.target, options=(("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1))
        )
        self._channels.append(channel)
        return channel

    def stub(self) -> Any:
        return kvd_pb2_grpc.KvdStub(self.channel())

    def discard(self) -> None:
        for channel in self._channels:
            channel.close()
        if self.process is not None:
            if self.process.poll() is None:
                self.stop()
            else:
                raise AssertionError(f"the daemon ended by itself with {self.process.returncode}:\n{self.log()}")

    def clean(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for path in self.socket_directory.iterdir():
            path.unlink()
        self.socket_directory.rmdir()


@contextlib.contextmanager
def real_disk(base: Path) -> Iterator[Path]:
    """A directory on a real disk, `base` if it is on one: O_DIRECT does not work on tmpfs."""
    chosen = os.environ.get("HGA_KVD_TEST_DIR")
    if chosen:
        with tempfile.TemporaryDirectory(prefix="hga-kvd-test-", dir=chosen) as directory:
            yield Path(directory)
        return
    command = ["stat", "-f", "-c", "%T", str(base)]
    kind = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if kind in ("tmpfs", "ramfs"):
        pytest.skip(f"{base} is on {kind}: set HGA_KVD_TEST_DIR to a directory on a real disk")
    yield base


@pytest.fixture
def disk_path(tmp_path: Path) -> Iterator[Path]:
    """A directory for this test on a real disk."""
    with real_disk(tmp_path) as path:
        yield path


class Daemons:
    """Starts daemons: `daemons("--ram", "64MiB", nvme=True, environment={...})`.

    nvme: True: a new directory on a real disk; a Path: that one; False: RAM only. The RAM arena is 64 MiB unless given.
    start: False: made, not started.
    """

    def __init__(self, base: Path, stack: contextlib.ExitStack) -> None:
        self._base = base
        self._stack = stack
        self._made: list[Daemon] = []

    def __call__(
        self, *options: str, nvme: bool | Path = True, environment: dict[str, str] | None = None, start: bool = True
    ) -> Daemon:
        number = len(self._made)
        if nvme is True:
            place: Path | None = self._stack.enter_context(real_disk(self._base)) / f"kv{number}"
            assert place is not None
            place.mkdir()
        else:
            place = Path(nvme) if nvme else None
        made = Daemon(place, options, environment or {}, self._base / f"daemon{number}.log")
        self._made.append(made)
        return made.start() if start else made

    def end(self) -> None:
        """Every daemon that still runs must stop cleanly, with no traceback in its log."""
        try:
            for made in self._made:
                made.discard()
        finally:
            for made in self._made:
                made.clean()


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemons]:
    """Daemons of one test: call it to start one."""
    with contextlib.ExitStack() as stack:
        daemons = Daemons(tmp_path, stack)
        stack.callback(daemons.end)
        yield daemons


@pytest.fixture(scope="module")
def module_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemons]:
    """Daemons of one test module."""
    with contextlib.ExitStack() as stack:
        daemons = Daemons(tmp_path_factory.mktemp("daemon"), stack)
        stack.callback(daemons.end)
        yield daemons
