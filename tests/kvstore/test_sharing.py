"""Sessions that share chunks: stored once, told apart when they differ, gone with the last that has them."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hga_kvd.config import Settings
from hga_kvd.engine import Engine
from hga_kvd.errors import InvalidRequest, KeyOutOfRange, SessionNotFound, StaleEpoch, StorageFull, WriteFailed
from hga_kvd.geometry import KEY_DTYPE, Geometry
from hga_kvd.testing.oracle import random_keys, records_of
from hga_kvd.testing.simdisk import SimDisk

MIB = 1 << 20
WIDE = Geometry(2, 2, 64, "float32")  # chunks of 128 KiB
THIN = Geometry(1, 1, 4, "float16")  # chunks of 1 KiB, 4 KiB on disk
NUMBERS = np.random.default_rng(5)


def make(disk: SimDisk | None, ram: int = 8 * MIB, **options: object) -> Engine:
    return Engine(Settings(**{"ram": ram, "segment_bytes": 2 * MIB, **options}), disk, background=False)


def content(geometry: Geometry, count: int) -> tuple[np.ndarray, bytes]:
    chunks = NUMBERS.integers(0, 256, (count, geometry.chunk_bytes), dtype=np.uint8)
    return chunks, NUMBERS.integers(0, 1 << 31, count * geometry.chunk_tokens).astype("<u4").tobytes()


def append(engine: Engine, session_id: int, chunks: np.ndarray, tokens: bytes = b"", epoch: int = 0) -> int:
    first = engine.info(session_id).chunk_count
    return engine.append(session_id, first, len(chunks), chunks.reshape(-1), tokens, epoch)


def check(engine: Engine, session_id: int, chunks: np.ndarray) -> None:
    info = engine.info(session_id)
    assert info.chunk_count == len(chunks)
    if len(chunks):
        keys = random_keys(NUMBERS, info.geometry, len(chunks), 50)
        found = np.zeros((50, info.geometry.record_bytes), np.uint8)
        assert engine.fetch(session_id, keys, found.reshape(-1), info.epoch).statuses is None
        assert (found == records_of(info.geometry, chunks, keys)).all()


def filled(disk: SimDisk | None, count: int = 6) -> tuple[Engine, int, np.ndarray, bytes]:
    engine = make(disk)
    session = engine.open("a", WIDE, create=True).session_id
    chunks, tokens = content(WIDE, count)
    append(engine, session, chunks, tokens)
    return engine, session, chunks, tokens


# --- equal content ---


def test_two_sessions_with_one_32k_prefix_store_it_once() -> None:
    disk = SimDisk()
    engine = make(disk, segment_bytes=16 * MIB)
    chunks, tokens = content(THIN, 512 + 40)
    ids_bytes = 4 * THIN.chunk_tokens
    one = engine.open("one", THIN, create=True).session_id
    append(engine, one, chunks[:512], tokens[: 512 * ids_bytes])
    engine.flush(one)
    before, written = engine.stats(), engine.stats().written_bytes
    # One opens by its tokens, the other computes the prefix again.
    other = content(THIN, 40)
    two = engine.open("two", THIN, create=True, token_ids=tokens[: 512 * ids_bytes] + other[1])
    assert two.chunk_count == 512
    append(engine, two.session_id, other[0], other[1])
    three = engine.open("three", THIN, create=True).session_id
    append(engine, three, chunks, tokens)
    for session in (two.session_id, three):
        engine.flush(session)
    after = engine.stats()
    assert after.chunks == before.chunks + 80
    assert after.shared_chunks == 512
    assert after.written_bytes - written < 81 * 4096 + 3 * 48 * 1024  # 80 chunks, their tables, two links
    engine = make(disk.crash())
    check(engine, one, chunks[:512])
    check(engine, two.session_id, np.concatenate((chunks[:512], other[0])))
    check(engine, three, chunks)
    assert engine.stats().chunks == 592
    assert engine.open("", THIN, create=True, token_ids=tokens).chunk_count == 552


def test_equal_tokens_with_other_bytes_are_not_shared() -> None:
    engine, _, chunks, tokens = filled(None)
    other = chunks.copy()
    other[3, 77] ^= 1
    session = engine.open("b", WIDE, create=True).session_id
    append(engine, session, other, tokens)
    assert (engine.stats().chunks, engine.stats().shared_chunks) == (7, 5)
    check(engine, session, other)


@pytest.mark.parametrize("what", ["tenant", "geometry", "tokens", "unknown tokens"])
def test_what_differs_is_not_shared(what: str) -> None:
    engine, _, chunks, tokens = filled(None)
    geometry = Geometry(2, 2, 64, "float32", rope="other") if what == "geometry" else WIDE
    tenant = "t" if what == "tenant" else ""
    tokens = {"tokens": b"\1" + tokens[1:], "unknown tokens": b""}.get(what, tokens)
    assert engine.open("", geometry, create=True, tenant=tenant, token_ids=tokens).chunk_count == 0
    session = engine.open("b", geometry, create=True, tenant=tenant).session_id
    append(engine, session, chunks, tokens)
    assert engine.stats().shared_chunks == 0
    check(engine, session, chunks)


def test_a_session_of_another_tenant_is_not_opened() -> None:
    engine = make(None)
    engine.open("a", WIDE, create=True, tenant="one")
    for tenant in ("", "two"):
        with pytest.raises(InvalidRequest, match="another tenant's"):
            engine.open("a", WIDE, create=True, tenant=tenant)
    assert engine.open("a", None, create=False, tenant="one").tenant == "one"
    with pytest.raises(InvalidRequest, match="multiple of 4"):
        engine.open("b", WIDE, create=True, token_ids=b"123")
    with pytest.raises(InvalidRequest, match="tenant of 257 bytes"):
        engine.open("b", WIDE, create=True, tenant="t" * 257)


def test_a_chunk_found_damaged_is_not_shared_any_more() -> None:
    disk = SimDisk()
    engine, session, chunks, tokens = filled(disk, 2)
    engine.shutdown()
    disk.flip("segment-00000001.kvs", 4096 + 4096 + 17)
    engine = make(disk)
    found = np.zeros(8192, np.uint8)
    fetched = engine.fetch(session, np.zeros(1, KEY_DTYPE), found)
    assert fetched.statuses is not None
    again = engine.open("b", WIDE, create=True, token_ids=tokens)
    assert again.chunk_count == 0
    append(engine, again.session_id, chunks, tokens)
    check(engine, again.session_id, chunks)
    assert engine.stats().shared_chunks == 1  # the second one is sound


# --- forks ---


@pytest.mark.parametrize("restart", [False, True])
def test_a_fork_shares_and_goes_its_own_way(restart: bool) -> None:
    disk = SimDisk()
    engine, session, chunks, _ = filled(disk)
    engine.put_summaries(session, "k", 0, 6, bytes(range(6)))
    fork = engine.fork(session, 0, 4, "b")
    assert (fork.created, fork.chunk_count, fork.epoch, engine.stats().chunks) == (True, 4, 0, 6)
    mine, _ = content(WIDE, 2)
    append(engine, fork.session_id, mine)
    engine.put_summaries(fork.session_id, "k", 3, 2, b"xy")
    engine.flush(fork.session_id)
    engine.flush(session)
    if restart:
        engine = make(disk.crash())
    check(engine, session, chunks)
    check(engine, fork.session_id, np.concatenate((chunks[:4], mine)))
    assert engine.stats().chunks == 8
    assert engine.get_summaries(session, "k", 0, 6, 99) == (6, b"\0\1\2x\4\5")
    assert engine.get_summaries(fork.session_id, "k", 0, 5, 99) == (5, b"\0\1\2xy")
    engine.delete(session)
    assert engine.stats().chunks == 6
    check(engine, fork.session_id, np.concatenate((chunks[:4], mine)))
    engine.delete(fork.session_id)
    stats = engine.stats()
    assert (stats.chunks, stats.ram_bytes_used, stats.nvme_bytes_used) == (0, 0, 0)


def test_a_fork_of_what_is_not_yet_on_disk_survives_its_parent() -> None:
    disk = SimDisk()
    engine = make(disk)
    parent = engine.open("", WIDE, create=True).session_id
    chunks, _ = content(WIDE, 5)
    append(engine, parent, chunks)
    fork = engine.fork(parent, 0, 0, "b").session_id
    engine.close(parent)
    assert engine.flush(fork) == 5
    engine = make(disk.crash())
    check(engine, fork, chunks)


def test_a_parent_and_its_fork_flushed_together_write_each_chunk_once() -> None:
    disk = SimDisk()
    engine, session, chunks, _ = filled(disk)
    fork = engine.fork(session, 0, 0, "b").session_id
    engine.shutdown()
    assert engine.stats().written_bytes < 7 * WIDE.chunk_bytes
    engine = make(disk)
    for each in (session, fork):
        check(engine, each, chunks)


def test_forks_that_are_refused() -> None:
    engine, session, _, _ = filled(None)
    fork = engine.fork(session, 0, 3, "b")
    again = engine.fork(session, 0, 3, "b")  # the answer to the first was lost
    assert (again.session_id, again.created) == (fork.session_id, False)
    with pytest.raises(InvalidRequest, match="another session named 'b'"):
        engine.fork(session, 0, 2, "b")
    with pytest.raises(KeyOutOfRange, match="6 chunks"):
        engine.fork(session, 0, 7, "c")
    with pytest.raises(SessionNotFound):
        engine.fork(99, 0, 0, "c")
    with pytest.raises(StaleEpoch):
        engine.fork(session, 1, 0, "c")


# --- truncation ---


@pytest.mark.parametrize("flushed", [False, True])
def test_truncate_starts_an_epoch_and_is_durable(flushed: bool) -> None:
    disk = SimDisk()
    engine, session, chunks, tokens = filled(disk)
    if flushed:
        engine.flush(session)
    info = engine.truncate(session, 0, 2)
    assert (info.epoch, info.chunk_count) == (1, 2)
    for epoch in (0, 2):
        with pytest.raises(StaleEpoch, match=f"in epoch 1 now and has 2 chunks, the request is of epoch {epoch}"):
            engine.fetch(session, np.zeros(1, KEY_DTYPE), np.zeros(8192, np.uint8), epoch)
        with pytest.raises(StaleEpoch):
            append(engine, session, chunks[:1], epoch=epoch)
    with pytest.raises(KeyOutOfRange, match="cannot be truncated to 3"):
        engine.truncate(session, 1, 3)
    check(engine, session, chunks[:2])
    assert engine.stats().chunks == 2
    if flushed:
        disk = disk.crash()
        engine = make(disk)
        check(engine, session, chunks[:2])
        assert engine.info(session).epoch == 1
    new, _ = content(WIDE, 3)
    append(engine, session, new, epoch=1)
    assert engine.truncate(session, 1, 4).epoch == 2
    engine.flush(session)
    engine = make(disk.crash())
    check(engine, session, np.concatenate((chunks[:2], new[:2])))
    assert engine.info(session).token_ids == b""
    assert engine.open("", WIDE, create=True, token_ids=tokens).chunk_count == 2


def test_truncating_leaves_forks_alone() -> None:
    disk = SimDisk()
    engine, session, chunks, _ = filled(disk)
    engine.flush(session)
    fork = engine.fork(session, 0, 0, "b").session_id
    engine.truncate(session, 0, 1)
    engine.flush(fork)
    engine = make(disk.crash())
    check(engine, session, chunks[:1])
    check(engine, fork, chunks)
    assert engine.stats().chunks == 6


def test_a_truncation_that_cannot_be_written_is_said_and_a_flush_makes_it_durable() -> None:
    disk = SimDisk()
    engine, session, chunks, _ = filled(disk)
    engine.flush(session)
    disk.fail("replace")
    with pytest.raises(WriteFailed, match="truncated"):
        engine.truncate(session, 0, 2)
    check(engine, session, chunks[:2])
    check(make(disk.crash()), session, chunks)
    engine = make(disk.crash())
    disk = engine._disk  # type: ignore[assignment]
    disk.fail("replace")
    with pytest.raises(WriteFailed):
        engine.truncate(session, 0, 2)
    assert engine.flush(session) == 2
    check(make(disk.crash()), session, chunks[:2])


def test_a_full_disk_still_truncates() -> None:
    disk = SimDisk()
    engine = make(disk, ram=2 * MIB, nvme_max=2 * MIB)
    session = engine.open("a", WIDE, create=True).session_id
    chunks, _ = content(WIDE, 60)
    count = 0
    with pytest.raises(StorageFull):  # noqa: PT012
        while True:
            engine.append(session, count, 1, chunks[count], b"")
            count += 1
    assert engine.truncate(session, 0, 5).chunk_count == 5
    check(engine, session, chunks[:5])
    engine = make(disk.crash(), ram=2 * MIB, nvme_max=2 * MIB)
    check(engine, session, chunks[:5])


def test_a_damaged_link_is_damage_not_old_data() -> None:
    disk = SimDisk()
    engine, session, chunks, _ = filled(disk)
    engine.flush(session)
    engine.truncate(session, 0, 2)
    append(engine, session, chunks[5:], epoch=1)
    engine.flush(session)
    engine.shutdown()
    link = 4096 + 4096 + 6 * WIDE.chunk_bytes
    content_now = disk.get("segment-00000001.kvs")
    assert content_now[link : link + 6] == b"KVFR\3\0"
    for copy in (link, link + 4096):
        disk.flip("segment-00000001.kvs", copy + 96)
    engine = make(disk)
    info = engine.info(session)
    assert (info.epoch, info.chunk_count, info.damaged_records) == (1, 3, 32)
    keys = np.array([(0, 0, 0), (4, 1, 1), (8, 0, 0)], KEY_DTYPE)
    found = np.zeros((3, 8192), np.uint8)
    fetched = engine.fetch(session, keys, found.reshape(-1), 1)
    assert fetched.statuses is not None
    assert fetched.statuses.tolist() == [1, 1, 0]
    assert (found[2] == records_of(WIDE, chunks[5:], np.zeros(1, KEY_DTYPE))[0]).all()


class Waiting(SimDisk):
    """Calls `meanwhile` once, before the next batch of reads or writes is done."""

    meanwhile = None

    def _transfer(self, operation, *columns):  # type: ignore[no-untyped-def]
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile is not None:
            meanwhile()
        return super()._transfer(operation, *columns)


def test_an_append_that_a_truncation_overtakes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, session, chunks, _ = filled(None)
    store = engine._append_path._store
    monkeypatch.setattr(engine._append_path, "_store", lambda new: (store(new), engine.truncate(session, 0, 3)))
    with pytest.raises(StaleEpoch):
        append(engine, session, chunks[:2])
    check(engine, session, chunks[:3])
    stats = engine.stats()
    assert (stats.chunks, stats.ram_bytes_used) == (3, 3 * WIDE.chunk_bytes)


def test_a_write_that_a_truncation_overtakes_counts_for_the_forks_only() -> None:
    disk = Waiting()
    engine, session, chunks, _ = filled(disk)
    fork = engine.fork(session, 0, 5, "b").session_id
    cut = threading.Thread(target=lambda: engine.truncate(session, 0, 3))
    disk.meanwhile = lambda: (cut.start(), cut.join(0.3))
    engine.flush(session)
    cut.join()
    engine.flush(fork)
    engine = make(disk.crash(), ram=8 * MIB)
    check(engine, session, chunks[:3])
    check(engine, fork, chunks[:5])
    assert engine.stats().chunks == 5
