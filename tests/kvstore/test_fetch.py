"""Misses: what several calls at once read of the same records, and in which order one call reads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hga_kvd import misses, reads
from hga_kvd.answers import STATUS_LATE, Fetched
from hga_kvd.arena import FILLING
from hga_kvd.config import Settings
from hga_kvd.engine import Engine
from hga_kvd.errors import SessionNotFound, StaleEpoch
from hga_kvd.geometry import KEY_DTYPE, Geometry
from hga_kvd.memory import aligned_buffer
from hga_kvd.testing.oracle import random_keys, records_of
from hga_kvd.testing.simdisk import SimDisk

pytestmark = pytest.mark.usefixtures("either_way")

MIB = 1 << 20
WIDE = Geometry(2, 2, 64, "float32")  # records of 8192 bytes, extents of 64 KiB, chunks of 128 KiB
KEY = np.array([(5, 1, 1)], KEY_DTYPE)


class Meddling(SimDisk):
    """Calls `meanwhile` once, when the next stream has its bytes but has not said so."""

    def __init__(self) -> None:
        super().__init__()
        self.meanwhile: Callable[[], None] | None = None
        self.streamed: list[int] = []

    def stream(self, *columns: Any) -> Iterator[Any]:
        self.streamed.append(len(columns[0]))
        for statuses in super().stream(*columns):
            meanwhile, self.meanwhile = self.meanwhile, None
            if meanwhile is not None:
                meanwhile()
            yield statuses


def on_disk(geometry: Geometry = WIDE, count: int = 8) -> tuple[Meddling, Engine, int, np.ndarray]:
    """A session of `count` chunks none of which is in RAM."""
    disk = Meddling()
    engine = Engine(Settings(ram=4 * MIB, segment_bytes=8 * MIB), disk, background=False)
    session = engine.open("a", geometry, create=True).session_id
    chunks = np.random.default_rng(1).integers(0, 256, (count, geometry.chunk_bytes), np.uint8)
    for first in range(0, count, 8):
        engine.append(session, first, 8, chunks[first : first + 8].reshape(-1), b"")
    engine.park(session)
    return disk, engine, session, chunks


def fetch(engine: Engine, session: int, keys: np.ndarray, **options: Any) -> tuple[Fetched, np.ndarray]:
    destination = aligned_buffer(len(keys) * engine.record_bytes(session))
    return engine.fetch(session, keys, destination, **options), destination.reshape(len(keys), -1)


def beside(call: Callable[[], None], engine: Engine) -> threading.Thread:
    """Starts a call in a thread of its own, and returns when it waits for another one's reads."""
    thread = threading.Thread(target=call)
    thread.start()
    end = time.monotonic() + 5
    while not engine._residency.filled._waiters and time.monotonic() < end:  # type: ignore[attr-defined]
        time.sleep(0.001)
    assert thread.is_alive()
    return thread


def test_what_a_client_writes_into_its_destination_does_not_come_into_the_arena() -> None:
    disk, engine, session, chunks = on_disk()
    mine = aligned_buffer(8192)
    disk.meanwhile = lambda: mine.fill(99)
    assert engine.fetch(session, KEY, mine).statuses is None
    assert (mine == records_of(WIDE, chunks, KEY)[0]).all()
    fetched, found = fetch(engine, session, KEY)
    assert (fetched.ram_records, fetched.nvme_records) == (1, 0)
    assert (found == records_of(WIDE, chunks, KEY)).all()


def test_a_record_that_another_call_reads_is_read_once() -> None:
    disk, engine, session, chunks = on_disk()
    keys = np.array([(1, 0, 0), (5, 1, 1), (5, 1, 1), (6, 0, 1)], KEY_DTYPE)
    answers: list[tuple[Fetched, np.ndarray]] = []
    threads: list[threading.Thread] = []
    disk.meanwhile = lambda: threads.append(beside(lambda: answers.append(fetch(engine, session, keys)), engine))
    _, found = fetch(engine, session, KEY)
    threads[0].join(30)
    fetched, others = answers[0]
    assert disk.streamed == [1, 2]  # the second call reads what is only its own
    assert (fetched.statuses, fetched.ram_records, fetched.nvme_records) == (None, 2, 2)
    assert (found == records_of(WIDE, chunks, KEY)).all()
    assert (others == records_of(WIDE, chunks, keys)).all()
    assert not engine._residency.pools[0].slots.pins.any()


@pytest.mark.parametrize("how", ["raises", "reads badly"])
def test_when_the_call_that_reads_fails_the_other_one_reads_itself(how: str) -> None:
    disk, engine, session, chunks = on_disk()
    answers: list[tuple[Fetched, np.ndarray]] = []
    threads: list[threading.Thread] = []

    def meanwhile() -> None:
        threads.append(beside(lambda: answers.append(fetch(engine, session, KEY)), engine))
        if how == "raises":
            raise MemoryError
        engine._residency.arena.region[:] = 0  # what came is not what was written

    disk.meanwhile = meanwhile
    if how == "raises":
        with pytest.raises(MemoryError):
            fetch(engine, session, KEY)
    else:
        assert fetch(engine, session, KEY)[0].statuses is None  # by its second try
    threads[0].join(30)
    fetched, found = answers[0]
    assert (fetched.statuses, fetched.ram_records + fetched.nvme_records) == (None, 1)
    assert (found == records_of(WIDE, chunks, KEY)).all()
    assert not engine._residency.pools[0].slots.pins.any()


@pytest.mark.parametrize("count", [8, 100])
@pytest.mark.parametrize("what", ["parked", "deleted", "truncated", "crowded out"])
def test_what_becomes_of_a_session_while_it_is_read_harms_neither_the_fetch_nor_the_arena(
    what: str, count: int
) -> None:
    disk, engine, session, chunks = on_disk(count=40)  # 80 extents, for 64 slots
    keys = random_keys(np.random.default_rng(2), WIDE, 8, count)
    others = random_keys(np.random.default_rng(3), WIDE, 32, 500)
    others["group"] += 8 * WIDE.groups_per_chunk  # of chunks that are not being read: this thread would wait for itself

    def crowd() -> None:
        for first in range(0, 500, 100):
            fetch(engine, session, others[first : first + 100])

    disk.meanwhile = {
        "parked": lambda: engine.park(session),
        "deleted": lambda: engine.delete(session),
        "truncated": lambda: engine.truncate(session, 0, 0),
        "crowded out": crowd,
    }[what]
    gone = {"deleted": SessionNotFound, "truncated": StaleEpoch}.get(what)
    if gone is not None and count > reads.STEP:  # what was left to read is a hole by now
        with pytest.raises(gone):
            fetch(engine, session, keys)
    else:
        fetched, found = fetch(engine, session, keys)
        assert fetched.statuses is None
        assert (found == records_of(WIDE, chunks, keys)).all()
    assert disk.meanwhile is None
    slots = engine._residency.pools[0].slots
    assert not slots.pins.any()
    assert not slots.doomed.any()
    assert not (slots.state == FILLING).any()
    assert slots.held_count + slots.free_count == slots.page_count * slots.slots_per_page
    assert bool(slots.held_count) == (gone is None)


def test_a_deadline_ends_the_wait_for_another_call() -> None:
    disk, engine, session, _ = on_disk()
    answers: list[Fetched] = []

    def meanwhile() -> None:
        end = time.monotonic() + 0.02
        answers.append(fetch(engine, session, KEY, overdue=lambda: time.monotonic() > end)[0])

    disk.meanwhile = meanwhile
    assert fetch(engine, session, KEY)[0].statuses is None
    assert answers[0].statuses is not None
    assert answers[0].statuses.tolist() == [STATUS_LATE]


def test_what_the_first_keys_ask_for_is_read_first() -> None:
    """Keys in the order of the caller; neighbours stay together."""
    keys = np.array([0, 3, 4, 7, 8, 9])
    in_turn, copies, _ = misses._in_turn(keys, np.array([50, 20, 21, 90, 51, 10]))
    assert (in_turn.tolist(), copies.tolist()) == ([0, 8, 3, 4, 7, 9], [])
    in_turn, copies, _ = misses._in_turn(keys, np.array([50, 51, 90, 20, 21, 10]))
    assert (in_turn.tolist(), copies.tolist()) == (keys.tolist(), [])
    in_turn, copies, of = misses._in_turn(keys, np.array([50, 20, 50, 90, 51, 20]))
    assert (in_turn.tolist(), copies.tolist(), in_turn[of].tolist()) == ([0, 8, 3, 7], [9, 4], [3, 0])


@pytest.mark.parametrize("geometry", [WIDE, Geometry(2, 2, 40, "bfloat16"), Geometry(3, 1, 24, "float8_e5m2")])
@pytest.mark.parametrize("ram", [2 * MIB, 16 * MIB])
def test_any_order_of_keys_is_brought_in_that_order(geometry: Geometry, ram: int) -> None:
    """Hits, misses, keys named twice, records with a slot and without one, of aligned sizes and others."""
    disk, chance = SimDisk(seed=3), np.random.default_rng(4)
    engine = Engine(Settings(ram=ram, segment_bytes=8 * MIB), disk, background=False)
    session = engine.open("a", geometry, create=True).session_id
    count = 4 * MIB // geometry.chunk_bytes
    chunks = chance.integers(0, 256, (count, geometry.chunk_bytes), np.uint8)
    for i in range(count):
        engine.append(session, i, 1, chunks[i], b"")
        engine.flush(session)
    engine.park(session)
    for size in (1, 7, 40, 400, 900):
        keys = np.zeros(size, KEY_DTYPE)
        keys["group"] = chance.integers(0, count * geometry.groups_per_chunk, size)
        keys["kv_head"] = chance.integers(0, geometry.kv_heads, size)
        keys["layer"] = chance.integers(0, geometry.layers, size)
        fetched, found = fetch(engine, session, keys)
        assert fetched.statuses is None
        assert fetched.ram_records + fetched.nvme_records == size
        assert (found == records_of(geometry, chunks, keys)).all()
    assert not engine._residency.pools[0].slots.pins.any()


@pytest.mark.parametrize("skew", [0, 8])
def test_what_is_fetched_once_is_read_past_the_arena(skew: int) -> None:
    disk, engine, session, chunks = on_disk()
    fetch(engine, session, KEY)
    used, table = engine.stats().ram_bytes_used, engine._residency.pools[0].table
    keys = np.array(
        [*KEY.tolist(), *((group, head, layer) for layer in (0, 1) for group in (9, 8, 8) for head in (0, 1))],
        KEY_DTYPE,
    )
    disk.flip("segment-00000001.kvs", int(table.offset[1 + 2]) + 7)  # group 8 is the first of chunk 2
    destination = aligned_buffer(len(keys) * 8192 + skew)[skew:]
    fetched = engine.fetch(session, keys, destination, once=True)
    assert fetched.statuses is not None
    bad = (keys["group"] == 8) & (keys["kv_head"] == 0) & (keys["layer"] == 0)
    assert (fetched.statuses != 0).tolist() == bad.tolist()
    found = destination.reshape(len(keys), -1)
    assert (found == records_of(WIDE, chunks, keys))[~bad].all()
    assert (fetched.ram_records, fetched.nvme_records) == (1, len(keys) - 1 - int(bad.sum()))
    assert engine.stats().ram_bytes_used == used
    assert not engine._residency.pools[0].slots.pins.any()
