"""The daemon's memory stays within --ram + 200 MiB + its index, however long sessions come and go.

`make soak` sets HGA_KVD_SOAK_CHURN_S to 600.
"""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path

import numpy as np
from conftest import Daemons
from hga_kvd.geometry import KEY_DTYPE
from hga_kvd_client import errors
from hga_kvd_client.connection import Connection
from hga_kvd_client.geometry import Geometry

CHURN_S = float(os.environ.get("HGA_KVD_SOAK_CHURN_S", "8"))
MIB = 1 << 20
RAM_BYTES = 64 * MIB
BESIDE_BYTES = 200 * MIB
INDEX_BYTES_PER_EXTENT = 200
SESSIONS = 12
GEOMETRY = Geometry(layers=4, kv_heads=2, head_dim=64, dtype="bfloat16")  # chunks of 128 KiB
EXTENT_BYTES = 32 << 10


def resident_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) << 10
    raise AssertionError("no VmRSS")


class Churn:
    """Sessions that are appended to, read, flushed, summarised and deleted, in random order, over one connection."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.chance = random.Random(7)
        self.sessions: dict[int, int] = {}  # id -> chunks
        self.made = 0

    def step(self) -> None:
        if len(self.sessions) < SESSIONS:
            self.made += 1
            self.sessions[self.connection.open(f"s{self.made}", GEOMETRY).session_id] = 0
        session = self.chance.choice(list(self.sessions))
        chunks = self.sessions[session]
        try:
            self._change(session, chunks)
        except errors.StorageFull:
            self._delete(session)

    def _change(self, session: int, chunks: int) -> None:
        chosen = self.chance.random()
        if chosen < 0.5 or not chunks:
            count = self.chance.randint(1, 16)
            payload = np.frombuffer(self.chance.randbytes(count * 131072), np.uint8)
            tokens = self.chance.randbytes(256 * count)
            self.sessions[session] = self.connection.append(session, chunks, count, payload, tokens)
        elif chosen < 0.75:
            keys = np.zeros(256, KEY_DTYPE)
            keys["group"] = np.random.default_rng(self.made).integers(0, 4 * chunks, 256)
            keys["layer"] = np.arange(256) % 4
            assert self.connection.fetch(session, keys).statuses is None
        elif chosen < 0.85:
            self.connection.flush(session)
        elif chosen < 0.95:
            self.connection.put_summaries(session, "k.v1", 0, chunks, self.chance.randbytes(2048 * chunks))
        else:
            self._delete(session)

    def _delete(self, session: int) -> None:
        self.connection.delete(session)
        del self.sessions[session]


def test_memory_stays_within_its_bound(daemon: Daemons) -> None:
    running = daemon("--ram", "64MiB", "--nvme-max", "512MiB", environment={"HGA_KVD_SEGMENT_BYTES": "32MiB"})
    connection = Connection(running.target, region_bytes=8 * MIB)
    churn = Churn(connection)
    samples: list[int] = []
    end, appended = time.monotonic() + CHURN_S, 0
    while time.monotonic() < end or appended < 3 * RAM_BYTES:
        for _ in range(20):
            churn.step()
        stat = connection.stat()
        appended = stat.appended_bytes
        index_bytes = INDEX_BYTES_PER_EXTENT * (stat.nvme_bytes_used + RAM_BYTES) // EXTENT_BYTES
        samples.append(resident_bytes(running.pid))
        bound = RAM_BYTES + BESIDE_BYTES + index_bytes
        assert samples[-1] <= bound, f"{samples[-1] >> 20} MiB are resident, {bound >> 20} are allowed"
    connection.disconnect()
    assert churn.made > SESSIONS
    result = {
        "churn_s": CHURN_S,
        "resident_mib_first_tenth": max(samples[: len(samples) // 10 + 1]) >> 20,
        "resident_mib_last_tenth": max(samples[-(len(samples) // 10) - 1 :]) >> 20,
        "resident_mib_max": max(samples) >> 20,
        "bound_mib": bound >> 20,
        "sessions": churn.made,
        "appended_gib": round(appended / 2**30, 2),
    }
    print(json.dumps(result))
