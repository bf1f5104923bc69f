"""What the simulator found, each as small as it gets."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hga_kvd.config import Settings
from hga_kvd.engine import Engine
from hga_kvd.errors import WriteFailed
from hga_kvd.format import BLOCK_BYTES, encode_segment_header
from hga_kvd.geometry import KEY_DTYPE
from hga_kvd.testing.faults import Fault
from hga_kvd.testing.simdisk import SECTOR_BYTES, SimDisk
from hga_kvd.testing.simulation import SMALL

KIB, MIB = 1 << 10, 1 << 20
SEGMENT = "segment-00000001.kvs"
CHUNKS = np.frombuffer(random.Random(1).randbytes(5 * SMALL.chunk_bytes), np.uint8).reshape(5, -1)
FRAME = BLOCK_BYTES + SMALL.chunk_bytes  # of one chunk


def make(disk: SimDisk, **options: object) -> Engine:
    settings = Settings(**{"ram": 2 * MIB, "segment_bytes": 64 * KIB, "nvme_reserve": 0, **options})
    return Engine(settings, disk, background=False)


def filled(disk: SimDisk, chunk_count: int = 5) -> Engine:
    """One flush and one frame a chunk."""
    engine = make(disk)
    session = engine.open("a", SMALL, create=True).session_id
    for i in range(chunk_count):
        engine.append(session, i, 1, CHUNKS[i], b"")
        engine.flush(session)
    return engine


def damaged(engine: Engine, chunk_count: int = 5) -> list[int]:
    """Chunks of "a" with a damaged record; the rest is exact."""
    info = engine.open("a", None, create=False)
    assert info.chunk_count == chunk_count
    keys = np.zeros((chunk_count, SMALL.groups_per_chunk, SMALL.kv_heads), KEY_DTYPE)
    keys["group"] = np.arange(keys[:, :, 0].size).reshape(keys.shape[:2])[:, :, None]
    keys["kv_head"] = np.arange(SMALL.kv_heads)
    keys = keys.transpose(0, 2, 1).reshape(-1)  # the order of storage
    found = np.zeros(chunk_count * SMALL.chunk_bytes, np.uint8)
    fetched = engine.fetch(info.session_id, keys, found)
    statuses = np.zeros(len(keys), np.uint8) if fetched.statuses is None else fetched.statuses
    bad = statuses.reshape(chunk_count, -1).any(1)
    assert (found.reshape(chunk_count, -1) == CHUNKS[:chunk_count])[~bad].all()
    return np.flatnonzero(bad).tolist()


def test_a_torn_header_of_a_new_segment_takes_no_space_for_ever() -> None:
    disk = SimDisk()
    filled(disk, 1)
    header = encode_segment_header(2, 64 * KIB)
    for kept in (range(7, 8), range(1), range(8)):  # of the header's sectors
        block = b"".join(header[s * 512 : s * 512 + 512] if s in kept else bytes(512) for s in range(8))
        disk.put("segment-00000002.kvs", block.ljust(64 * KIB, b"\0"))
        engine = make(disk := disk.kill())
        assert disk.names() == ["MANIFEST", "MANIFEST.copy", SEGMENT]
        assert engine.stats().nvme_bytes_used == 64 * KIB
    disk.put("segment-00000002.kvs", b"mine" + bytes(64 * KIB - 4))  # no part of our header
    make(disk := disk.kill())
    assert "segment-00000002.kvs" in disk.names()


def test_a_bad_sector_takes_only_its_own_record() -> None:
    """Recovery reads tables in pieces of 64 KiB: what else is in the piece is not to suffer."""
    disk = SimDisk()
    filled(disk).shutdown()
    at = BLOCK_BYTES + 3 * FRAME + BLOCK_BYTES + 100  # in the body of chunk 3
    disk = disk.kill()
    disk.spoil(SEGMENT, at // SECTOR_BYTES)
    engine = make(disk)
    assert damaged(engine) == [3]
    assert engine.info(1).damaged_records == 1


@pytest.mark.parametrize("kind", ["eio", "flip", "misdirect"])
@pytest.mark.parametrize("torn_end", [True, False])
def test_a_read_that_goes_wrong_once_costs_nothing_at_the_start(kind: str, torn_end: bool) -> None:
    disk = SimDisk()
    engine = filled(disk)
    if not torn_end:
        engine.shutdown()
    before = disk.kill()
    clean = before.kill()
    make(clean)
    for n in range(1, clean.counts["read"] + 1):
        for seed in range(4):
            disk = before.kill()
            disk.schedule([Fault("read", n, kind, seed)])  # type: ignore[arg-type]
            engine = make(disk)
            assert len(disk.struck) == 1
            assert damaged(engine) == []
            assert engine.stats().damaged_records == 0
            assert damaged(make(disk.crash())) == []


def test_a_segment_that_cannot_be_removed_still_counts() -> None:
    """Or --nvme-max is no cap."""
    disk = SimDisk()
    engine = make(disk, nvme_max=64 * KIB)
    session = engine.open("a", SMALL, create=True).session_id
    engine.append(session, 0, 1, CHUNKS[0], b"")
    disk.fail("names", 1)  # the new segment is not there yet ...
    disk.fail("remove", 1)  # ... and not gone either: it is removed before another is made
    assert engine.flush(session) == 1
    assert engine.stats().nvme_bytes_used == disk.stored_bytes("segment-") == 64 * KIB


@pytest.mark.parametrize("what", ["delete", "delete it empty", "truncate"])
def test_a_manifest_that_was_written_although_the_call_failed(what: str) -> None:
    """Renamed, then the sync of the directory failed: what it names is there, whatever the engine was told."""
    disk = SimDisk()
    engine = filled(disk)  # so that a segment is there, and the next manifest is written for the session
    session = engine.open("b", SMALL, create=True).session_id
    if what != "delete it empty":  # then no space comes back, and no other manifest is written for that
        engine.append(session, 0, 2, CHUNKS[:2].reshape(-1), b"")
    disk.schedule([Fault("replace", 1, "done", 0)])
    with pytest.raises(WriteFailed):
        engine.flush(session)
    if what.startswith("delete"):
        engine.delete(session)
        assert [info.name for info in make(disk.kill()).list()] == ["a"]
    else:
        engine.truncate(session, 0, 1)
        assert [(info.epoch, info.chunk_count) for info in make(disk.kill()).list()] == [(0, 5), (1, 1)]


def test_a_summary_outlives_the_session_it_was_put_through() -> None:
    disk = SimDisk()
    engine = make(disk)
    first = engine.open("a", SMALL, create=True).session_id
    engine.append(first, 0, 1, CHUNKS[0], b"")
    fork = engine.fork(first, 0, 0, "b").session_id
    engine.flush(first)
    engine.flush(fork)
    engine.put_summaries(first, "k", 0, 1, b"new")
    engine.truncate(first, 0, 0)
    engine.shutdown()
    assert make(disk.crash()).get_summaries(fork, "k", 0, 1, 100) == (1, b"new")


@pytest.mark.parametrize("n", range(1, 11))
def test_a_bad_sector_and_one_bad_read_cost_only_the_record_that_was_hit(n: int) -> None:
    """The bad sector fails the read of its neighbours, and then their own read is the one that goes wrong, for once."""
    disk = SimDisk()
    filled(disk).shutdown()
    disk = disk.kill()
    engine = make(disk)
    disk.spoil(SEGMENT, (BLOCK_BYTES + 3 * FRAME + BLOCK_BYTES + 100) // SECTOR_BYTES)
    disk.schedule([Fault("read", n, "flip", n)])
    assert damaged(engine) == [3]
    assert disk.struck
    assert engine.info(1).damaged_records == 1
