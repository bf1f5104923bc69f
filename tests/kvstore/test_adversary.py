"""What a reader of the code thought of to break it: calls, faults and crashes, each as small as it gets."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hga_kvd import jobs, manifest, writeout
from hga_kvd.config import Settings
from hga_kvd.engine import Engine
from hga_kvd.errors import LimitExceeded, SessionNotFound, StorageFull, WriteFailed
from hga_kvd.format import BLOCK_BYTES, encode_segment_header, segment_name
from hga_kvd.geometry import Geometry
from hga_kvd.manifest import Manifest, SessionEntry, decode_manifest, encode_manifest
from hga_kvd.testing.faults import Remains
from hga_kvd.testing.oracle import random_keys, records_of
from hga_kvd.testing.simdisk import PowerLoss, SimDisk
from hga_kvd.testing.simulation import SMALL
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import CapturingLogger

KIB, MIB = 1 << 10, 1 << 20
CHUNKS = np.frombuffer(random.Random(7).randbytes(40 * SMALL.chunk_bytes), np.uint8).reshape(40, -1)


def make(disk: SimDisk, background: bool = False, log: CapturingLogger | None = None, **options: object) -> Engine:
    settings = Settings(**{"ram": 2 * MIB, "segment_bytes": 128 * KIB, "nvme_reserve": 0, "scrub_rate": 0, **options})
    return Engine(settings, disk, log, background=background)


def filled(engine: Engine, name: str, count: int) -> int:
    session = engine.open(name, SMALL, create=True).session_id
    engine.append(session, 0, count, CHUNKS[:count].reshape(-1), b"")
    engine.flush(session)
    return session


def check(engine: Engine, session: int, count: int) -> None:
    info = engine.info(session)
    assert (info.chunk_count, info.damaged_records) == (count, 0)
    keys = random_keys(np.random.default_rng(1), SMALL, count, 60)
    found = np.zeros((60, SMALL.record_bytes), np.uint8)
    assert engine.fetch(session, keys, found.reshape(-1), info.epoch).statuses is None
    assert (found == records_of(SMALL, CHUNKS[:count], keys)).all()


def fill(engine: Engine, refusal: type[Exception], match: str, chunks_each: int = 1, name: str = "") -> list[int]:
    """Sessions until one is refused."""
    sessions: list[int] = []

    def fill_on() -> None:
        while True:
            sessions.append(filled(engine, f"{len(sessions)}{name}", chunks_each))

    with pytest.raises(refusal, match=match):
        fill_on()
    return sessions


# --- what says which chunks a session has ---


def test_power_lost_while_a_long_list_of_chunks_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first frame of an epoch takes the place of the manifest's list: a part of it must not."""
    monkeypatch.setattr(jobs, "LINK_CHUNKS_MAX", 4)
    crashed = True
    for operation in range(1, 100):
        disk = SimDisk(seed=operation)
        engine = make(disk)
        session = filled(engine, "a", 12)
        engine.truncate(session, 0, 11)
        engine.append(session, 11, 1, CHUNKS[11], b"", 1)
        disk.lose_power_at(operation)
        try:
            engine.flush(session)
            crashed = False
        except PowerLoss:
            pass
        engine = make(disk.crash(Remains("half", operation)))
        count = engine.info(session).chunk_count
        assert count == 12 or (crashed and count == 11)
        check(engine, session, count)
        if not crashed:
            break
    assert not crashed


def in_turns(engine: Engine) -> tuple[int, int]:
    """Two sessions whose chunks were given their uids in turns: each has a run for each chunk."""
    one, two = (engine.open(name, SMALL, create=True).session_id for name in "ab")
    for i in range(20):
        for session in (one, two):
            engine.append(session, i, 1, CHUNKS[i], b"")
    engine.flush(one)
    engine.flush(two)
    return one, two


def links(disk: SimDisk, name: str) -> tuple[tuple[int, int], ...] | None:
    return next(entry.links for entry in decode_manifest(disk.get("MANIFEST")).sessions if entry.name == name)


def test_a_manifest_never_lists_many_chunks() -> None:
    disk = SimDisk()
    engine = make(disk)
    one, two = in_turns(engine)
    engine.truncate(one, 0, 18)
    engine.truncate(two, 0, 5)
    assert links(disk, "a") is None
    assert len(links(disk, "b") or ()) == 5
    for again in (disk.crash(), disk.kill()):
        engine = make(again)
        assert engine.info(one).epoch == engine.info(two).epoch == 1
        check(engine, one, 18)
        check(engine, two, 5)


@pytest.mark.parametrize("operation", range(1, 9))
def test_power_lost_while_the_frame_is_written_that_spares_the_manifest_a_list(operation: int) -> None:
    disk = SimDisk(seed=operation)
    engine = make(disk)
    one, two = in_turns(engine)
    disk.lose_power_at(operation)
    crashed = False
    for session in (one, two):
        try:
            engine.truncate(session, 0, 18)
        except PowerLoss:
            crashed = True
    assert crashed
    for remains in (Remains("half", operation), Remains("keep", 0), Remains("lose", 0)):
        engine = make(disk.crash(remains))
        for session in (one, two):
            epoch = engine.info(session).epoch
            check(engine, session, 18 if epoch else 20)


def test_where_that_frame_has_no_room_the_manifest_lists_them() -> None:
    disk = SimDisk()
    engine = make(disk, nvme_max=256 * KIB)
    one, two = in_turns(engine)
    fill(engine, StorageFull, "nvme_max")
    engine.truncate(one, 0, 18)
    assert len(links(disk, "a") or ()) == 18
    engine = make(disk.crash(), nvme_max=256 * KIB)
    check(engine, one, 18)
    check(engine, two, 20)


names = st.text(st.characters(codec="utf-8"), max_size=60)


@given(names, names, st.integers(0, (1 << 63) - 1), st.booleans())
def test_a_session_takes_no_more_of_a_manifest_than_is_reckoned(
    name: str, tenant: str, number: int, pinned: bool
) -> None:
    runs = ((number, 1),) * manifest.LINK_RUNS_MAX
    entry = SessionEntry(number, name, SMALL, len(runs), number, tenant, number, pinned, runs, number)
    empty = len(encode_manifest(Manifest(False, 1, 1, 1, (), ())))
    taken = len(encode_manifest(Manifest(False, 1, 1, 1, (entry,), ()))) - empty
    assert taken <= manifest.session_bytes_max(name, tenant) + manifest.geometry_bytes(SMALL)


def test_names_that_would_make_a_manifest_which_no_start_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = 20 * KIB
    for module in (manifest, writeout):
        monkeypatch.setattr(module, "MANIFEST_TEXT_BYTES_MAX", limit)
    monkeypatch.setattr("hga_kvd.sessions.SESSIONS_TEXT_BYTES_MAX", limit)
    disk = SimDisk()
    engine = make(disk)
    opened = fill(engine, LimitExceeded, "shorter names", name="я" * 100)
    check(engine, opened[-1], 1)
    assert 5 < len(opened) < 40
    engine.delete(opened[0])
    opened[0] = filled(engine, "0" + "я" * 100, 1)
    engine.open("", SMALL, create=True)  # no manifest names it
    engine.shutdown()
    engine = make(disk.kill())
    for session in opened:
        check(engine, session, 1)


def test_a_manifest_that_no_start_would_read_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = SimDisk()
    engine = make(disk)
    session = filled(engine, "a", 1)
    before = disk.get("MANIFEST")
    monkeypatch.setattr(writeout, "MANIFEST_TEXT_BYTES_MAX", 550)
    with pytest.raises(WriteFailed, match="delete sessions"):
        filled(engine, "b" * 200, 1)
    assert disk.get("MANIFEST") == before
    check(make(disk.crash()), session, 1)


# --- what happens while a frame is written ---


class Waiting(SimDisk):
    """Calls `meanwhile` once, when the next write is done and has not returned."""

    meanwhile: Callable[[], None] | None = None

    def write(self, *columns: Any) -> Any:
        moved = super().write(*columns)
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile is not None:
            meanwhile()
        return moved


def test_rows_that_are_used_again_while_their_old_chunks_are_written() -> None:
    """The frame is of chunks that died; whose rows they had are others' by now, and those are not on disk."""
    disk = Waiting()
    engine = make(disk)
    filled(engine, "z", 1)  # a segment that is open: the next write is the frame
    gone, other = (engine.open(name, SMALL, create=True).session_id for name in "ab")
    engine.append(gone, 0, 3, CHUNKS[10:13].reshape(-1), b"")
    deleted = threading.Thread(target=lambda: engine.delete(gone))

    def meanwhile() -> None:
        deleted.start()
        while engine._residency.sessions.get(gone):
            time.sleep(0.001)
        engine.append(other, 0, 3, CHUNKS[:3].reshape(-1), b"")

    disk.meanwhile = meanwhile
    with pytest.raises(SessionNotFound):
        engine.flush(gone)
    deleted.join()
    assert engine.flush(other) == 3
    check(engine, other, 3)
    engine = make(disk.crash())
    check(engine, other, 3)
    assert engine.stats().chunks == 4


# --- space ---


def test_a_file_system_that_is_smaller_than_the_cap_still_takes_the_news_of_what_was_deleted() -> None:
    disk = SimDisk(bytes_max=MIB)
    engine = make(disk, nvme_max=64 * MIB, nvme_reserve=32 * KIB)
    sessions = fill(engine, StorageFull, "nvme_reserve", 20)
    used = engine.stats().nvme_bytes_used
    engine.delete(sessions[0])
    assert engine.stats().nvme_bytes_used < used
    engine = make(disk := disk.crash(), nvme_max=64 * MIB, nvme_reserve=32 * KIB)  # and a start takes one more
    check(engine, sessions[1], 20)
    assert engine.stats().nvme_bytes_used == disk.stored_bytes("segment-")


def test_a_segment_whose_file_somebody_removed_is_no_obstacle() -> None:
    disk = SimDisk()
    engine = make(disk)
    gone, kept = filled(engine, "a", 40), filled(engine, "b", 20)
    for segment_id in {*engine._parts.writeout.segments.segments} - {engine._parts.writeout.segments.open.segment_id}:  # type: ignore[union-attr]
        disk.remove(segment_name(segment_id))
    engine.delete(gone)
    check(engine, kept, 20)
    check(engine, filled(engine, "c", 30), 30)


def test_a_segment_that_was_being_read_when_it_died_goes_later() -> None:
    disk = SimDisk()
    engine = make(disk, background=True)
    session = filled(engine, "a", 30)
    log = engine._parts.segments
    assert log is not None
    with engine._lock:
        pinned, _ = log.pin(np.array([*log.segments]))
    engine.delete(session)
    assert engine.stats().nvme_bytes_used > 0
    with engine._lock:
        log.unpin(pinned)
    deadline = time.monotonic() + 30
    while engine.stats().nvme_bytes_used and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.stats().nvme_bytes_used == disk.stored_bytes("segment-") == 0
    engine.shutdown()


@pytest.mark.parametrize("sector", [0, 7, None])
def test_a_new_segment_whose_header_went_bad_before_anything_named_it(sector: int | None) -> None:
    """Removed, if anything of our header is left; else counted, so that the cap holds."""
    disk = SimDisk()
    session = filled(make(disk, nvme_max=MIB), "a", 1)
    block = bytearray(encode_segment_header(2, 128 * KIB))
    for at in range(0, BLOCK_BYTES, 512):
        if sector is None or at == 512 * sector:
            block[at + 3] ^= 1
    disk.put(segment_name(2), bytes(block) + bytes(128 * KIB - BLOCK_BYTES))
    engine = make(disk, nvme_max=MIB)
    check(engine, session, 1)
    assert (segment_name(2) in disk.names()) == (sector is None)
    assert engine.stats().nvme_bytes_used == disk.stored_bytes("segment-")


# --- memory ---


def test_ever_new_geometries_are_refused_before_their_books_fill_the_memory() -> None:
    engine = make(SimDisk(), geometries_max=30)

    def meet(kv_heads: int, fingerprint: str) -> None:
        geometry = Geometry(1, kv_heads, 5, "float16", chunk_tokens=8, group_tokens=4, model_fingerprint=fingerprint)
        engine.close(engine.open("", geometry, create=True).session_id)

    for kv_heads in range(1, 17):  # extents of less than a block: the most slots
        meet(kv_heads, "")
    with pytest.raises(LimitExceeded, match="16 geometries"):
        meet(17, "")
    for number in range(14):
        meet(1, f"{number}")
    with pytest.raises(LimitExceeded, match="30 geometries"):
        meet(1, "14")
    meet(16, "")  # those that are known are welcome
    meet(1, "13")


# --- stops, and the log ---


def test_a_temporary_session_that_cannot_be_deleted_does_not_keep_a_stop_from_writing_the_others() -> None:
    disk = SimDisk()
    engine = make(disk)
    filled(engine, "z", 1)
    session = engine.open("a", SMALL, create=True).session_id
    engine.append(session, 0, 3, CHUNKS[:3].reshape(-1), b"")
    temporary = engine.open("", SMALL, create=True).session_id
    engine.append(temporary, 0, 30, CHUNKS[:30].reshape(-1), b"")
    engine._parts.writeout.round()  # type: ignore[union-attr]
    disk.fail("replace")
    engine.shutdown()
    check(make(disk.crash()), session, 3)


def test_a_disk_that_stays_full_is_said_once() -> None:
    log = CapturingLogger()
    engine = make(SimDisk(), background=True, log=log, nvme_max=256 * KIB, ram=2 * MIB)
    session = engine.open("a", SMALL, create=True).session_id

    def append_until_full() -> None:
        for i in range(10_000):
            engine.append(session, i, 1, CHUNKS[i % 40], b"")

    with pytest.raises(StorageFull):
        append_until_full()
    deadline = time.monotonic() + 60

    def said(event: str) -> int:
        return sum(call.args[:1] == (event,) for call in log.calls)

    tried = engine._parts.writeout.write_ahead  # type: ignore[union-attr]
    tries: list[int] = []

    def counted() -> bool:
        tries.append(1)
        return tried()

    engine._parts.writeout.write_ahead = counted  # type: ignore[union-attr, method-assign]
    while len(tries) < 3 and time.monotonic() < deadline:
        engine._parts.wake.set()
        time.sleep(0.01)
    assert len(tries) >= 3
    assert said("background write-out failed") == 1
    engine.delete(session)
    while not said("background write-out works again") and time.monotonic() < deadline:
        engine._parts.wake.set()
        time.sleep(0.01)
    assert said("background write-out works again") == 1
    engine.shutdown()
