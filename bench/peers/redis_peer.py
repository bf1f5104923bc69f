"""Redis on a unix socket: MGET. Its records are in RAM, of another process as ours; there is no cold state."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import ClassVar

import numpy as np
import redis

from peers.base import Bytes, Numbers, Peer, Shape, State

PROGRAMS = ("redis-server", "valkey-server")
START_S = 10


class Redis(Peer):
    states: ClassVar[tuple[State, ...]] = ("hot",)

    def __init__(self, place: Path, shape: Shape, state: State) -> None:
        super().__init__(place, shape, state)
        self._sockets = tempfile.TemporaryDirectory(prefix="redis")  # `place` may be too long for a socket's path
        socket = f"{self._sockets.name}/r.sock"
        program = next(filter(None, map(shutil.which, PROGRAMS)))
        options = ["--port", "0", "--unixsocket", socket, "--save", "", "--appendonly", "no", "--dir", str(place)]
        self._process = subprocess.Popen([program, *options], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + START_S
        while not Path(socket).exists():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{program} did not start")
            time.sleep(0.02)
        self._client = redis.Redis(unix_socket_path=socket)

    @classmethod
    def check(cls) -> None:
        if not any(map(shutil.which, PROGRAMS)):
            raise ImportError("neither redis-server nor valkey-server is installed")

    def put(self, first: int, records: Bytes) -> None:
        pipeline = self._client.pipeline(transaction=False)
        for number, record in enumerate(records, first):
            pipeline.set(number, record.tobytes())
        pipeline.execute()

    def read(self, numbers: Numbers, out: Bytes) -> Bytes:
        for record, content in zip(out, self._client.mget(numbers.tolist()), strict=True):
            record[:] = np.frombuffer(content, np.uint8)
        return out

    def close(self) -> None:
        self._client.close()
        self._process.terminate()
        self._process.wait(START_S)
        self._sockets.cleanup()


PEER = Redis
