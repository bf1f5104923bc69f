"""A session that is filled with known content and goes away afterwards, and the stopwatch that every profile uses."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from hga_kvd_client.answers import Fetched
from hga_kvd_client.connection import Connection
from hga_kvd_client.geometry import Geometry, Keys

from hga_kvd.bench.content import Content
from hga_kvd.bench.meter import Sample
from hga_kvd.bench.probes import cpu_seconds

Answer = TypeVar("Answer")

# An append is cut so that it fits in a shared region and in a small arena beside what is being written.
APPEND_BYTES_MAX = 4 << 20
# Records of one fetch that are compared; the rest is compared in other fetches, as chance has it.
CHECKED_RECORDS_MAX = 32


@dataclass(frozen=True)
class Stored:
    """A session full of `content`. Every fetch through here is checked."""

    connection: Connection
    session_id: int
    content: Content
    chunks: int
    chance: np.random.Generator

    @property
    def geometry(self) -> Geometry:
        return self.content.geometry

    def fetch(self, watch: Stopwatch, keys: Keys) -> Fetched:
        """Only the fetch is timed. Raises: WrongBytes."""
        fetched = watch.time(lambda: self.connection.fetch(self.session_id, keys))
        watch.disk_records += fetched.nvme_records
        watch.records += len(keys)
        self.content.check(keys, fetched.records, fetched.statuses, self.chance, CHECKED_RECORDS_MAX)
        return fetched

    def append(self, watch: Stopwatch, chunks: int) -> int:
        """The first `chunks` chunks, in as many calls as it takes; returns the bytes. The payload is built untimed."""
        g = self.geometry
        part = max(1, APPEND_BYTES_MAX // g.chunk_bytes)
        for first in range(0, chunks, part):
            count = min(part, chunks - first)
            payload = self.connection.append_buffer(count * g.chunk_bytes)
            self.content.fill_chunks(first, payload)
            watch.time(lambda f=first, c=count, p=payload: self.connection.append(self.session_id, f, c, p))  # type: ignore[misc]
        return chunks * g.chunk_bytes


class Stopwatch:
    """What a caller waits for in one sample, and what both sides' cores do meanwhile."""

    def __init__(self, daemon_pid: int | None) -> None:
        self.seconds: list[float] = []
        self.records = self.disk_records = 0
        self._client_cpu_s = 0.0
        self._pid = daemon_pid
        self._daemon_from_s = cpu_seconds(daemon_pid) if daemon_pid is not None else None

    def time(self, call: Callable[[], Answer]) -> Answer:
        cpu, start = time.process_time(), time.perf_counter()
        answer = call()
        self.seconds.append(time.perf_counter() - start)
        self._client_cpu_s += time.process_time() - cpu
        return answer

    @property
    def total_s(self) -> float:
        return sum(self.seconds)

    def sample(self, size: int, disk_bytes: int, reference_s: float | None) -> Sample:
        """size, disk_bytes: bytes of all calls so far. To be asked before anything else keeps the daemon busy."""
        now = cpu_seconds(self._pid) if self._pid is not None else None
        known = now is not None and self._daemon_from_s is not None
        return Sample(
            seconds=np.array(self.seconds),
            bytes=size,
            disk_bytes=disk_bytes,
            client_cpu_s=self._client_cpu_s,
            daemon_cpu_s=now - self._daemon_from_s if known else None,  # type: ignore[operator]
            reference_s=reference_s,
        )


@contextmanager
def empty_session(
    connection: Connection, geometry: Geometry, purpose: str, seed: int = 0, tenant: str = ""
) -> Iterator[Stored]:
    """A named session, deleted at the end."""
    opened = connection.open(f"hga-kvd-bench-{os.getpid()}-{purpose}", geometry, tenant=tenant)
    try:
        yield Stored(connection, opened.session_id, Content(geometry, seed), 0, np.random.default_rng(seed))
    finally:
        connection.delete(opened.session_id)


@contextmanager
def filled_session(
    connection: Connection, geometry: Geometry, chunks: int, purpose: str, seed: int = 0, tenant: str = ""
) -> Iterator[Stored]:
    """A named session of so many chunks, flushed; deleted at the end."""
    with empty_session(connection, geometry, purpose, seed, tenant) as empty:
        empty.append(Stopwatch(None), chunks)
        connection.flush(empty.session_id)
        yield Stored(connection, empty.session_id, empty.content, chunks, empty.chance)
