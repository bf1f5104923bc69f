"""kill -9 under load: nothing flushed is lost, nothing wrong is returned, sessions of clients go on.

The same generator and oracle as on the simulated disk, here through gRPC to a real process on real files. `make soak` sets
HGA_KVD_SOAK_KILLS to more.
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
from conftest import Daemon, Daemons
from hga_kvd.geometry import KEY_DTYPE, Geometry
from hga_kvd.testing.oracle import Gone
from hga_kvd.testing.remote import RemoteStore
from hga_kvd.testing.simulation import SMALL, TINY
from hga_kvd.testing.trial import Trial
from hga_kvd_client.connection import Connection
from hga_kvd_client.geometry import Geometry as ClientGeometry
from wire import wait_for

KILLS = int(os.environ.get("HGA_KVD_SOAK_KILLS", "5"))
CLIENTS = 3
# Chunks of 256 KiB: 4 clients fill the arena, so there is write-out in the background when the daemon dies.
LARGE = Geometry(2, 2, 128, "float32", chunk_tokens=64)


@contextlib.contextmanager
def store(daemon: Daemon) -> Iterator[RemoteStore]:
    options = (("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1))
    with grpc.insecure_channel(daemon.target, options=options) as channel:
        yield RemoteStore(channel)


def load(daemon: Daemon, trial: Trial, first: bool, step_done: Callable[[], object]) -> None:
    """Drives one client until the daemon is gone."""
    with store(daemon) as mine:
        trial.store = mine
        try:
            if not first:
                trial.restarted(mine)
            while True:
                trial.step()
                step_done()
        except Gone:
            return


class Steady:
    """One client library connection and one session for the whole test, whatever happens to the daemon."""

    def __init__(self, daemon: Daemon) -> None:
        self.connection = Connection(daemon.target, reconnect_s=60)
        self.geometry = ClientGeometry(**{name: getattr(SMALL, name) for name in ("layers", "kv_heads", "head_dim")},
                                       dtype=SMALL.dtype, chunk_tokens=16, group_tokens=8)  # fmt: skip
        self.session = self.connection.open("steady", self.geometry).session_id
        self.chunks = np.zeros((0, SMALL.chunk_bytes), np.uint8)
        self._numbers = np.random.default_rng(5)

    def step(self) -> None:
        """Reads all that was flushed, appends a chunk, flushes: it never learns that the daemon died, but for time."""
        self.check()
        chunk = self._numbers.integers(0, 256, SMALL.chunk_bytes, dtype=np.uint8)
        for _ in range(10):  # an append that was not flushed may have gone with the daemon
            held = self.connection.open("steady", self.geometry).chunk_count
            assert len(self.chunks) <= held <= len(self.chunks) + 1
            if held == len(self.chunks):
                self.connection.append(self.session, held, 1, chunk, b"")
            if self.connection.flush(self.session) == len(self.chunks) + 1:
                break
        self.chunks = np.concatenate((self.chunks, chunk[None]))
        self.check()

    def check(self) -> None:
        if not len(self.chunks):
            return
        keys = np.zeros((len(self.chunks), SMALL.kv_heads, SMALL.groups_per_chunk), KEY_DTYPE)
        keys["group"] = np.arange(len(self.chunks) * SMALL.groups_per_chunk).reshape(len(self.chunks), 1, -1)
        keys["kv_head"] = np.arange(SMALL.kv_heads)[:, None]
        fetched = self.connection.fetch(self.session, keys.reshape(-1))
        assert fetched.statuses is None
        assert (fetched.records.reshape(self.chunks.shape) == self.chunks).all()


def test_kill_9_under_load(daemon: Daemons) -> None:
    chance = random.Random(1)
    # Small segments and a small arena: rolling, evicting and reading from disk all the time.
    running = daemon("--ram", "8MiB", environment={"HGA_KVD_SEGMENT_BYTES": "4MiB", "HGA_KVD_LOG_LEVEL": "warning"})
    with store(running) as first:
        trials = [Trial(first, seed, (LARGE, SMALL, TINY), prefix=f"client{seed}-") for seed in range(CLIENTS)]
    steady = Steady(running)
    steps: list[None] = []
    rounds: list[None] = []
    ends = threading.Event()
    with ThreadPoolExecutor(CLIENTS + 1) as threads:

        def go_on() -> None:
            while not ends.is_set():
                steady.step()
                rounds.append(None)

        going_on = threads.submit(go_on)
        try:
            for kill in range(KILLS):
                had, seen = len(steps), len(rounds)
                clients = [
                    threads.submit(load, running, trial, kill == 0, lambda: steps.append(None)) for trial in trials
                ]
                time.sleep(chance.uniform(0.3, 1.5))
                # However slow the machine: the daemon dies with work under way, and not before there was some.
                wait_for(lambda had=had, seen=seen: len(steps) > had + CLIENTS and len(rounds) > seen, 120)
                running.kill()
                for client in clients:
                    client.result()
                running.start()
        finally:
            ends.set()
        going_on.result()
    for trial in trials:
        with store(running) as last:
            trial.restarted(last)
            trial.run(20)
    steady.step()
    steady.connection.disconnect()
