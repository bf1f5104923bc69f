"""Scrub and Verify: damage is found before it is asked for, and nothing that is sound is called damaged."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hga_kvd.arena import BAD
from hga_kvd.config import Settings
from hga_kvd.engine import Engine
from hga_kvd.errors import SessionNotFound
from hga_kvd.geometry import KEY_DTYPE, Geometry
from hga_kvd.testing.oracle import records_of
from hga_kvd.testing.simdisk import SimDisk
from hga_kvd_proto.v1 import kvd_pb2
from wire import append, command, open_session, payload_of, rot

MIB = 1 << 20
WIDE = Geometry(2, 2, 64, "float32")  # records of 8192 bytes, extents of 64 KiB, chunks of 128 KiB
CHUNKS = 8
NUMBERS = np.random.default_rng(3)


def make(disk: SimDisk | None, ram: int = 4 * MIB) -> Engine:
    return Engine(Settings(ram=ram, segment_bytes=4 * MIB), disk, background=False)


def filled(disk: SimDisk | None, flush: bool = True) -> tuple[Engine, int, np.ndarray]:
    engine = make(disk)
    session_id = engine.open("a", WIDE, create=True).session_id
    chunks = NUMBERS.integers(0, 256, (CHUNKS, WIDE.chunk_bytes), np.uint8)
    engine.append(session_id, 0, CHUNKS, chunks.reshape(-1), b"")
    if flush and disk is not None:
        engine.flush(session_id)
    return engine, session_id, chunks


def key(layer: int, kv_head: int, group: int) -> np.ndarray:
    return np.array([(group, kv_head, layer)], KEY_DTYPE)


def damaged(engine: Engine, session_id: int) -> list[tuple[int, int, int]]:
    return sorted(map(tuple, engine.verify(session_id).damaged.tolist()))


def rot_on_disk(disk: SimDisk, chunks: np.ndarray, wanted: np.ndarray) -> None:
    name = next(name for name in disk.names() if name.startswith("segment"))
    disk.flip(name, disk.get(name).index(records_of(WIDE, chunks, wanted)[0].tobytes()) + 77)


def rot_in_ram(engine: Engine, chunks: np.ndarray, wanted: np.ndarray) -> None:
    region = engine._residency.arena.region
    at = region.tobytes().index(records_of(WIDE, chunks, wanted)[0].tobytes())
    region[at + 77] ^= 1


def whole_turn(engine: Engine, step: int = 100_000) -> int:
    """Until the scrub has seen everything at least once. Returns bytes."""
    return sum(engine.scrub(step) for _ in range(2 * 2 * CHUNKS * 2))


def fetch(engine: Engine, session_id: int, keys: np.ndarray) -> tuple[bool, np.ndarray]:
    """(damaged, bytes)"""
    destination = np.zeros(WIDE.record_bytes, np.uint8)
    statuses = engine.fetch(session_id, keys, destination).statuses
    return statuses is not None and bool(statuses.any()), destination


@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("with_disk", [False, True])
def test_sound_data_is_called_sound(with_disk: bool, flush: bool) -> None:
    engine, session_id, _ = filled(SimDisk() if with_disk else None, flush)
    assert whole_turn(engine) > CHUNKS * WIDE.chunk_bytes
    verified = engine.verify(session_id)
    assert (verified.record_count, len(verified.damaged)) == (CHUNKS * 2 * 2 * 4, 0)
    stats = engine.stats()
    assert (stats.damaged_records, stats.scrub_damaged_records, stats.scrub_dropped_records) == (0, 0, 0)
    assert stats.scrubbed_bytes > CHUNKS * WIDE.chunk_bytes


def test_nothing_stored_is_nothing_scrubbed() -> None:
    assert make(SimDisk()).scrub(MIB) == 0


@pytest.mark.parametrize("restart", [False, True])
def test_a_bad_record_on_disk_is_found(restart: bool) -> None:
    disk = SimDisk()
    engine, session_id, chunks = filled(disk)
    if restart:
        engine.shutdown()
        disk = disk.crash()
        engine = make(disk)
    bad = key(1, 0, 13)
    rot_on_disk(disk, chunks, bad)
    whole_turn(engine)
    stats = engine.stats()
    assert (stats.damaged_records, stats.scrub_damaged_records) == (1, 1)
    assert engine.info(session_id).damaged_records == 1
    assert damaged(engine, session_id) == [(13, 0, 1)]
    assert engine.stats().scrub_damaged_records == 1  # counted once
    if restart:  # nothing of it is in RAM
        assert fetch(engine, session_id, bad)[0]


def test_a_bad_copy_in_ram_is_dropped_and_read_again() -> None:
    engine, session_id, chunks = filled(SimDisk())
    bad = key(0, 1, 5)
    rot_in_ram(engine, chunks, bad)
    assert (fetch(engine, session_id, bad)[1] != records_of(WIDE, chunks, bad)[0]).any()  # what a scrub is for
    whole_turn(engine)
    assert (engine.stats().scrub_dropped_records, engine.stats().damaged_records) == (1, 0)
    is_damaged, found = fetch(engine, session_id, bad)
    assert not is_damaged
    assert (found == records_of(WIDE, chunks, bad)[0]).all()
    assert damaged(engine, session_id) == []


@pytest.mark.parametrize("with_disk", [False, True])
def test_a_bad_record_that_only_ram_has_is_damaged_for_good(with_disk: bool) -> None:
    disk = SimDisk() if with_disk else None
    engine, session_id, chunks = filled(disk, flush=False)
    bad, good = key(1, 1, 20), key(1, 1, 21)
    rot_in_ram(engine, chunks, bad)
    whole_turn(engine)
    assert engine.stats().scrub_damaged_records == 1
    for _ in range(2):
        assert fetch(engine, session_id, bad)[0]
        is_damaged, found = fetch(engine, session_id, good)
        assert not is_damaged
        assert (found == records_of(WIDE, chunks, good)[0]).all()
        if disk is None:
            break
        engine.flush(session_id)  # its frame has the checksum of what was appended
    assert damaged(engine, session_id) == [(20, 1, 1)]
    assert np.count_nonzero(engine._residency.pools[0].slots.state == BAD) == 1
    assert engine.stats().damaged_records == 1


def test_every_fork_is_told() -> None:
    disk = SimDisk()
    engine, session_id, chunks = filled(disk)
    fork = engine.fork(session_id, 0, 4, "fork").session_id
    rot_on_disk(disk, chunks, key(0, 0, 3))  # in both
    rot_on_disk(disk, chunks, key(0, 0, 30))  # behind the fork's end
    assert damaged(engine, session_id) == [(3, 0, 0), (30, 0, 0)]
    assert damaged(engine, fork) == [(3, 0, 0)]
    assert engine.stats().damaged_records == 3


def test_lost_chunks_are_damaged_in_verify() -> None:
    disk = SimDisk()
    engine, session_id, _ = filled(disk)
    engine.shutdown()
    disk = disk.crash()
    for name in disk.names():
        if name.startswith("segment"):
            disk.flip(name, 4096)  # the magic of its first frame
    engine = make(disk)
    assert len(damaged(engine, session_id)) == CHUNKS * 2 * 2 * 4


def test_what_is_deleted_or_truncated_meanwhile_is_no_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes are overwritten between the plan and the read; by then the chunks are gone."""
    disk = SimDisk()
    engine, session_id, _ = filled(disk)
    scrubber = engine._integrity.scrubber
    monkeypatch.setattr("hga_kvd.scrub.read_verified", lambda disk, items, to: (gone(), np.ones(len(items), bool))[1])
    done: list[bool] = []

    def gone() -> None:
        if not done:
            done.append(True)
            engine.truncate(session_id, 0, 2)

    pool = engine._residency.pools[0]
    found = scrubber.check_disk(pool, np.arange(1, CHUNKS + 1))
    assert done
    assert sorted(np.unique(found.damage[0].rows).tolist()) == [1, 2]  # the lie is told of those that are still there


def test_the_rate_is_kept() -> None:
    disk = SimDisk()
    engine = Engine(Settings(ram=4 * MIB, segment_bytes=4 * MIB, scrub_rate=8 * MIB), disk)
    session_id = engine.open("a", WIDE, create=True).session_id
    engine.append(session_id, 0, CHUNKS, NUMBERS.integers(0, 256, CHUNKS * WIDE.chunk_bytes, np.uint8), b"")
    before, started = engine.stats().scrubbed_bytes, time.monotonic()
    time.sleep(1.5)
    done, elapsed = engine.stats().scrubbed_bytes - before, time.monotonic() - started
    assert 0 < done <= 8 * MIB * elapsed + 2 * (512 << 10)
    engine.shutdown()


def test_verify_of_a_running_daemon(daemon) -> None:  # type: ignore[no-untyped-def]
    running = daemon("--scrub-rate", "0")
    stub = running.stub()
    for name in ("sound", "bad"):
        append(stub, open_session(stub, name).session_id, payload_of(3, seed=len(name)), part_bytes=100_000)
    running.stop()
    running.start()
    done = command("verify", "--target", running.target)
    assert done.exit_code == 0, done.stderr
    assert "2 sessions are sound" in done.stdout
    running.stop()
    rot(running.nvme, payload_of(3, seed=3), chunk=1)
    running.start()
    done = command("verify", "--target", running.target)
    assert done.exit_code == 1
    assert "bad" in done.stdout
    assert "layer 0, tokens 64 to 79" in " ".join(done.stdout.split())
    assert running.stub().Stat(kvd_pb2.StatRequest()).scrub_damaged_records == 1


# Odd sizes are read through a buffer, whole sectors straight to where they go.
@pytest.mark.parametrize("size", [300, 1024, MIB])
def test_a_damaged_summary_is_not_returned(size: int) -> None:
    disk = SimDisk()
    engine, session_id, _ = filled(disk)
    payload = NUMBERS.integers(0, 256, (CHUNKS, size), np.uint8)
    engine.put_summaries(session_id, "k", 0, CHUNKS, payload.tobytes())
    engine.flush(session_id)
    name = next(name for name in disk.names() if payload[5].tobytes() in disk.get(name))
    disk.flip(name, disk.get(name).index(payload[5].tobytes()) + size - 1)
    whole = CHUNKS * size
    with pytest.raises(SessionNotFound, match=r"chunk 5 .* is damaged"):
        engine.get_summaries(session_id, "k", 0, CHUNKS, whole)
    assert engine.get_summaries(session_id, "k", 0, 5, whole) == (5, payload[:5].tobytes())
    assert engine.get_summaries(session_id, "k", 6, 2, whole) == (2, payload[6:].tobytes())
