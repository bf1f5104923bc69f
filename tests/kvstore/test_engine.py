"""The engine's promises one by one: what it refuses, what it keeps, what it gives back."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest
from hga_kvd.config import Settings
from hga_kvd.engine import Engine, Fetched
from hga_kvd.errors import (
    AppendOutOfOrder,
    GeometryMismatch,
    InvalidRequest,
    KeyOutOfRange,
    LimitExceeded,
    NotDurable,
    SessionNotFound,
    StorageFull,
)
from hga_kvd.geometry import KEY_DTYPE, Geometry
from hga_kvd.testing.oracle import random_keys, records_of
from hga_kvd.testing.simdisk import SimDisk

MIB = 1 << 20
WIDE = Geometry(2, 2, 64, "float32")  # records of 8192 bytes, extents of 64 KiB, chunks of 128 KiB
NUMBERS = np.random.default_rng(7)


def make(disk: SimDisk | None = None, ram: int = 4 * MIB, **options: object) -> Engine:
    return Engine(Settings(**{"ram": ram, "segment_bytes": MIB, **options}), disk, background=False)


def chunks_of(geometry: Geometry, count: int) -> np.ndarray:
    return NUMBERS.integers(0, 256, (count, geometry.chunk_bytes), dtype=np.uint8)


def fill(engine: Engine, session_id: int, chunks: np.ndarray) -> None:
    first = engine.info(session_id).chunk_count
    for i, chunk in enumerate(chunks):
        engine.append(session_id, first + i, 1, chunk, b"")


def fetch(engine: Engine, session_id: int, keys: np.ndarray, skew: int = 0) -> tuple[Fetched, np.ndarray]:
    size = engine.record_bytes(session_id)
    destination = np.zeros(len(keys) * size + skew, np.uint8)[skew:]
    return engine.fetch(session_id, keys, destination), destination.reshape(len(keys), size)


def check(engine: Engine, session_id: int, chunks: np.ndarray, count: int = 64) -> Fetched:
    geometry = engine.info(session_id).geometry
    keys = random_keys(NUMBERS, geometry, len(chunks), count)
    fetched, found = fetch(engine, session_id, keys, skew=int(NUMBERS.choice([0, 4])))
    assert fetched.statuses is None
    assert (found == records_of(geometry, chunks, keys)).all()
    return fetched


# --- refusals ---


def test_open() -> None:
    engine = make()
    one = engine.open("a", WIDE, create=True)
    assert (one.created, one.name, one.chunk_count, one.temporary) == (True, "a", 0, False)
    again = engine.open("a", None, create=False)
    assert (again.created, again.session_id) == (False, one.session_id)
    assert engine.open("a", WIDE, create=True).session_id == one.session_id
    with pytest.raises(GeometryMismatch, match="head_dim: 64 != 32"):
        engine.open("a", Geometry(2, 2, 32, "float32"), create=True)
    with pytest.raises(SessionNotFound, match="no session named 'b'"):
        engine.open("b", WIDE, create=False)
    with pytest.raises(InvalidRequest, match="needs a geometry"):
        engine.open("b", None, create=True)
    with pytest.raises(InvalidRequest, match="257 bytes"):
        engine.open("n" * 257, WIDE, create=True)
    with pytest.raises(LimitExceeded, match="more --ram"):
        engine.open("b", Geometry(500, 64, 128, "bfloat16"), create=True)
    temporary = engine.open("", WIDE, create=True)
    assert temporary.temporary
    assert engine.open("", WIDE, create=True).session_id != temporary.session_id
    with pytest.raises(SessionNotFound):
        engine.open("", WIDE, create=False)


def test_too_many_sessions() -> None:
    engine = make(sessions_max=2)
    engine.open("a", WIDE, create=True)
    engine.open("", WIDE, create=True)
    with pytest.raises(LimitExceeded, match="2 sessions"):
        engine.open("b", WIDE, create=True)
    assert not engine.open("a", WIDE, create=True).created


def test_append_refusals_change_nothing() -> None:
    engine = make(append_bytes_max=16 * WIDE.chunk_bytes, chunks_max=20)
    session = engine.open("a", WIDE, create=True).session_id
    chunks = chunks_of(WIDE, 2)
    assert engine.append_limit_check(session, 0, 2) == 2 * WIDE.chunk_bytes
    engine.append(session, 0, 2, chunks.reshape(-1), b"")
    with pytest.raises(AppendOutOfOrder, match="ends at chunk 2"):
        engine.append(session, 1, 1, chunks[0], b"")
    with pytest.raises(AppendOutOfOrder):
        engine.append(session, 3, 1, chunks[0], b"")
    with pytest.raises(InvalidRequest, match="payload of 5 bytes"):
        engine.append(session, 2, 1, np.zeros(5, np.uint8), b"")
    with pytest.raises(InvalidRequest, match="token ids"):
        engine.append(session, 2, 1, chunks[0], b"123")
    with pytest.raises(InvalidRequest, match="no chunks"):
        engine.append_limit_check(session, 2, 0)
    with pytest.raises(LimitExceeded, match="split it"):
        engine.append_limit_check(session, 2, 17)
    with pytest.raises(LimitExceeded, match="20 chunks"):
        engine.append_limit_check(session, 2, 19)
    with pytest.raises(SessionNotFound):
        engine.append(99, 0, 1, chunks[0], b"")
    assert engine.info(session).chunk_count == 2
    check(engine, session, chunks)


@pytest.mark.parametrize("key", [(8, 0, 0), (0, 2, 0), (0, 0, 2), (2**32 - 1, 65535, 65535), (0, 2, 1)])
def test_fetch_names_the_first_key_out_of_range(key: tuple[int, int, int]) -> None:
    engine = make()
    session = engine.open("a", WIDE, create=True).session_id
    fill(engine, session, chunks_of(WIDE, 2))
    keys = np.array([(7, 1, 1), key, key], KEY_DTYPE)
    with pytest.raises(KeyOutOfRange, match=f"key 1 asks for layer {key[2]}, KV head {key[1]}, group {key[0]}"):
        fetch(engine, session, keys)


def test_fetch_limits() -> None:
    engine = make(fetch_keys_max=10, fetch_bytes_max=5 * WIDE.record_bytes)
    session = engine.open("a", WIDE, create=True).session_id
    with pytest.raises(KeyOutOfRange):
        fetch(engine, session, np.zeros(1, KEY_DTYPE))
    fill(engine, session, chunks_of(WIDE, 1))
    assert fetch(engine, session, np.zeros(0, KEY_DTYPE))[0] == Fetched(None, 0, 0)
    fetch(engine, session, np.zeros(5, KEY_DTYPE))
    with pytest.raises(LimitExceeded, match="49152 bytes"):
        fetch(engine, session, np.zeros(6, KEY_DTYPE))
    with pytest.raises(LimitExceeded, match="11 keys"):
        fetch(engine, session, np.zeros(11, KEY_DTYPE))


def test_deleted_sessions_are_unknown() -> None:
    engine = make(SimDisk())
    session = engine.open("a", WIDE, create=True).session_id
    fill(engine, session, chunks_of(WIDE, 1))
    engine.flush(session)
    engine.delete(session)
    for call in (
        lambda: engine.append(session, 1, 1, np.zeros(WIDE.chunk_bytes, np.uint8), b""),
        lambda: fetch(engine, session, np.zeros(1, KEY_DTYPE)),
        lambda: engine.flush(session),
        lambda: engine.delete(session),
        lambda: engine.close(session),
        lambda: engine.info(session),
        lambda: engine.put_summaries(session, "k", 0, 1, b"x"),
        lambda: engine.get_summaries(session, "k", 0, 1, 10),
        lambda: engine.record_bytes(session),
    ):
        with pytest.raises(SessionNotFound, match=f"session {session} does not exist"):
            call()
    assert engine.stats().ram_bytes_used == 0
    assert engine.stats().nvme_bytes_used == 0
    new = engine.open("a", WIDE, create=True)
    assert new.created
    assert new.session_id > session


def test_flush_needs_a_disk_and_a_name() -> None:
    engine = make()
    with pytest.raises(NotDurable, match="--nvme"):
        engine.flush(engine.open("a", WIDE, create=True).session_id)
    engine = make(SimDisk())
    with pytest.raises(NotDurable, match="temporary"):
        engine.flush(engine.open("", WIDE, create=True).session_id)


# --- RAM ---


@pytest.mark.parametrize(
    "geometry",
    [
        WIDE,
        Geometry(3, 3, 80, "bfloat16"),
        Geometry(2, 1, 96, "float16"),
        Geometry(1, 1, 5, "float8_e5m2", chunk_tokens=6, group_tokens=3),  # records of 30 bytes
        Geometry(4, 3, 7, "float16", chunk_tokens=8, group_tokens=2),
        Geometry(1, 64, 128, "bfloat16"),  # an extent fills an arena page
    ],
)
@pytest.mark.parametrize("with_disk", [False, True])
def test_geometries(geometry: Geometry, with_disk: bool) -> None:
    disk = SimDisk() if with_disk else None
    engine = make(disk, ram=8 * MIB)
    session = engine.open("a", geometry, create=True).session_id
    chunks = chunks_of(geometry, 3)
    fill(engine, session, chunks)
    assert check(engine, session, chunks).ram_records == 64
    if disk is not None:
        engine.flush(session)
        engine = make(disk.crash(), ram=8 * MIB)
        check(engine, session, chunks)
        check(engine, session, chunks)


def test_ram_only_is_full_and_goes_on_reading() -> None:
    engine = make(ram=2 * MIB)
    session = engine.open("a", WIDE, create=True).session_id
    chunks = chunks_of(WIDE, 16)
    fill(engine, session, chunks)
    with pytest.raises(StorageFull, match="--nvme"):
        fill(engine, session, chunks[:1])
    check(engine, session, chunks)
    stats = engine.stats()
    assert (stats.ram_bytes_used, stats.ram_bytes_max, stats.io_engine) == (2 * MIB, 2 * MIB, "none")
    other = engine.open("b", WIDE, create=True).session_id
    engine.delete(session)
    fill(engine, other, chunks)
    check(engine, other, chunks)


def test_an_append_larger_than_the_arena_is_refused() -> None:
    engine = make(SimDisk(), ram=2 * MIB)
    session = engine.open("a", WIDE, create=True).session_id
    engine.append(session, 0, 16, chunks_of(WIDE, 16).reshape(-1), b"")
    with pytest.raises(LimitExceeded, match="16 chunks"):
        engine.append_limit_check(session, 16, 17)
    engine.append(session, 16, 16, chunks_of(WIDE, 16).reshape(-1), b"")


def test_data_much_larger_than_the_arena() -> None:
    engine = make(SimDisk(), ram=2 * MIB)
    session = engine.open("a", WIDE, create=True).session_id
    chunks = chunks_of(WIDE, 100)
    fill(engine, session, chunks)
    for _ in range(20):
        check(engine, session, chunks)
    stats = engine.stats()
    assert stats.fetched_nvme_records > 0
    assert stats.evicted_extents > 100
    assert stats.ram_bytes_used <= 2 * MIB
    assert stats.fetched_nvme_bytes == stats.fetched_nvme_records * 8192
    engine.flush(session)  # dirty extents leave no room for others
    hot = random_keys(NUMBERS, WIDE, 4, 20)
    fetch(engine, session, hot)
    assert fetch(engine, session, hot)[0].nvme_records == 0


def test_the_same_record_twice_in_one_fetch() -> None:
    disk = SimDisk()
    engine = make(disk)
    session = engine.open("a", WIDE, create=True).session_id
    chunks = chunks_of(WIDE, 2)
    fill(engine, session, chunks)
    engine.flush(session)
    engine = make(disk.crash())
    keys = np.array([(3, 1, 1), (0, 0, 0), (3, 1, 1), (3, 1, 1), (4, 0, 1)], KEY_DTYPE)
    for expected in (5, 0):
        fetched, found = fetch(engine, session, keys)
        assert fetched.nvme_records == expected
        assert (found == records_of(WIDE, chunks, keys)).all()


def test_neighbours_are_read_in_one_piece() -> None:
    disk = SimDisk()
    engine = make(disk)
    session = engine.open("a", WIDE, create=True).session_id
    fill(engine, session, chunks_of(WIDE, 4))
    engine.flush(session)
    disk = disk.crash()
    engine = make(disk)
    keys = np.zeros(8, KEY_DTYPE)
    keys["group"][:4], keys["group"][4:] = np.arange(4), np.arange(4) + 8
    before = disk.counts["read"]
    destination = np.zeros(8 * 8192 + 4096, np.uint8)
    skew = -destination.ctypes.data % 4096
    engine.fetch(session, keys, destination[skew:][: 8 * 8192])
    assert disk.counts["read"] == before + 2


def test_geometries_share_the_arena() -> None:
    engine = make(SimDisk(), ram=4 * MIB)
    kept = []
    for i in range(6):
        geometry = Geometry(1 + i % 2, 1 + i % 3, 64, "float32", rope=str(i))
        session = engine.open(str(i), geometry, create=True).session_id
        chunks = chunks_of(geometry, 30)
        fill(engine, session, chunks)
        kept.append((session, chunks))
    for _ in range(5):
        for session, chunks in kept:
            check(engine, session, chunks)


# --- sessions ---


def test_temporary_sessions_end_with_close_owner_or_restart() -> None:
    disk = SimDisk()
    engine = make(disk, ram=2 * MIB)
    closed, owned, left = (engine.open("", WIDE, create=True, owner=o).session_id for o in (0, 5, 6))
    named = engine.open("a", WIDE, create=True, owner=5).session_id
    chunks = chunks_of(WIDE, 20)
    for session in (closed, owned, left, named):
        fill(engine, session, chunks)  # more than the arena: they are on disk too
    check(engine, closed, chunks)
    engine.close(closed)
    engine.release_owner(5)
    engine.close(named)
    assert {info.session_id for info in engine.list()} == {left, named}
    check(engine, left, chunks)
    check(engine, named, chunks)
    engine.shutdown()
    engine = make(disk)
    assert [info.session_id for info in engine.list()] == [named]
    check(engine, named, chunks)


def test_token_ids() -> None:
    disk = SimDisk()
    engine = make(disk)
    session = engine.open("a", WIDE, create=True).session_id
    tokens = np.arange(128, dtype="<u4").tobytes()
    engine.append(session, 0, 2, chunks_of(WIDE, 2).reshape(-1), tokens)
    assert engine.info(session).token_ids == tokens
    engine.flush(session)
    engine = make(disk.crash())
    assert engine.info(session).token_ids == tokens
    engine.append(session, 2, 1, chunks_of(WIDE, 1)[0], b"")
    assert engine.info(session).token_ids == b""
    assert engine.list()[0].token_ids == b""


def test_durable_counts() -> None:
    engine = make(SimDisk())
    session = engine.open("a", WIDE, create=True).session_id
    other = engine.open("b", WIDE, create=True).session_id
    fill(engine, session, chunks_of(WIDE, 3))
    fill(engine, other, chunks_of(WIDE, 2))
    assert engine.info(session).durable_chunk_count == 0
    assert engine.stats().ram_bytes_dirty == 5 * WIDE.chunk_bytes
    assert engine.flush(session) == 3
    assert engine.info(session).durable_chunk_count == 3
    assert engine.info(other).durable_chunk_count == 0
    assert engine.stats().ram_bytes_dirty == 2 * WIDE.chunk_bytes
    assert engine.flush(other) == 2


def test_a_flush_of_nothing_writes_nothing() -> None:
    disk = SimDisk()
    engine = make(disk)
    session = engine.open("a", WIDE, create=True).session_id
    engine.flush(session)
    before = dict(disk.counts)
    engine.flush(session)
    assert disk.counts == before
    assert [info.name for info in make(disk.crash()).list()] == ["a"]


# --- summaries ---


def test_summaries() -> None:
    disk = SimDisk()
    engine = make(disk)
    session = engine.open("a", WIDE, create=True).session_id
    with pytest.raises(KeyOutOfRange, match="0 chunks"):
        engine.put_summaries(session, "k.v1", 0, 1, b"1234")
    fill(engine, session, chunks_of(WIDE, 4))
    engine.put_summaries(session, "k.v1", 0, 3, b"aaabbbccc")
    engine.put_summaries(session, "other", 1, 1, b"x" * 5000)
    assert engine.get_summaries(session, "k.v1", 0, 3, 100) == (3, b"aaabbbccc")
    assert engine.get_summaries(session, "k.v1", 1, 2, 5) == (1, b"bbb")
    assert engine.get_summaries(session, "k.v1", 0, 4, 100) == (3, b"aaabbbccc")  # those that follow one another
    with pytest.raises(SessionNotFound, match=r"chunk 3 .* no summary of kind 'k.v1'"):
        engine.get_summaries(session, "k.v1", 3, 1, 100)
    place = np.zeros(7, np.uint8)
    assert engine.read_summaries(session, "k.v1", 1, 3, place) == (2, 6)
    assert place.tobytes() == b"bbbccc\0"
    with pytest.raises(SessionNotFound, match="kind 'nothing'"):
        engine.get_summaries(session, "nothing", 0, 1, 100)
    with pytest.raises(LimitExceeded, match="5000 bytes"):
        engine.get_summaries(session, "other", 1, 1, 100)
    for kind, first, count, payload in (
        ("k.v1", 0, 2, b"abc"),
        ("k.v1", 0, 1, b""),
        ("", 0, 1, b"a"),
        ("k" * 65, 0, 1, b"a"),
    ):
        with pytest.raises(InvalidRequest):
            engine.put_summaries(session, kind, first, count, payload)
    with pytest.raises(InvalidRequest, match="3 bytes a chunk"):
        engine.put_summaries(session, "k.v1", 0, 1, b"abcd")
    with pytest.raises(LimitExceeded):
        engine.put_summaries(session, "k.v1", 0, 1, bytes(2 * MIB))
    engine.flush(session)
    engine.put_summaries(session, "k.v1", 1, 1, b"BBB")
    assert engine.get_summaries(session, "k.v1", 0, 3, 100) == (3, b"aaaBBBccc")
    engine.flush(session)
    engine = make(disk.crash())
    assert engine.get_summaries(session, "k.v1", 0, 3, 100) == (3, b"aaaBBBccc")
    assert engine.get_summaries(session, "other", 1, 1, 5000) == (1, b"x" * 5000)


def test_summaries_in_ram_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hga_kvd.recall.RAM_BYTES_MIN", MIB)
    for disk in (None, SimDisk()):
        engine = make(disk)
        session = engine.open("", WIDE, create=True).session_id
        fill(engine, session, chunks_of(WIDE, 4))
        engine.put_summaries(session, "k", 0, 1, bytes(MIB))
        if disk is None:
            with pytest.raises(StorageFull, match="summaries"):
                engine.put_summaries(session, "k", 1, 1, bytes(MIB))
        else:  # even of a temporary session they go to disk to make room
            engine.put_summaries(session, "k", 1, 1, b"x" * MIB)
            assert engine.get_summaries(session, "k", 0, 2, 2 * MIB) == (2, bytes(MIB) + b"x" * MIB)
        engine.delete(session)
        other = engine.open("", WIDE, create=True).session_id
        fill(engine, other, chunks_of(WIDE, 1))
        engine.put_summaries(other, "k", 0, 1, bytes(MIB))


# --- threads ---


@pytest.fixture
def busy() -> Iterator[Engine]:
    engine = Engine(Settings(ram=4 * MIB, segment_bytes=2 * MIB), SimDisk())
    yield engine
    engine.shutdown()


def test_threads(busy: Engine) -> None:
    """Appends, fetches, flushes and deletions at once, with an arena much smaller than the data."""
    engine, failures = busy, []

    def client(number: int) -> None:
        try:
            numbers = np.random.default_rng(number)
            for life in range(3):
                info = engine.open(f"c{number}.{life}" if life else "", WIDE, create=True)
                chunks = numbers.integers(0, 256, (24, WIDE.chunk_bytes), dtype=np.uint8)
                for i in range(0, 24, 2):
                    engine.append(info.session_id, i, 2, chunks[i : i + 2].reshape(-1), b"")
                    engine.put_summaries(info.session_id, "k", i, 2, bytes([number, life]) * 100)
                    keys = random_keys(numbers, WIDE, i + 2, 40)
                    found = np.zeros(40 * 8192, np.uint8)
                    fetched = engine.fetch(info.session_id, keys, found)
                    assert fetched.statuses is None
                    assert (found.reshape(40, -1) == records_of(WIDE, chunks, keys)).all()
                    if info.name and i % 6 == 0:
                        assert engine.flush(info.session_id) == i + 2
                assert engine.get_summaries(info.session_id, "k", 0, 24, MIB)[1] == bytes([number, life]) * 1200
                if life != 1:
                    engine.delete(info.session_id)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]
    stats = engine.stats()
    assert stats.sessions == 5
    assert stats.damaged_records == 0


def test_readers_of_one_session_while_it_is_deleted(busy: Engine) -> None:
    engine, failures = busy, []
    chunks = chunks_of(WIDE, 60)

    def reader(session: int, number: int) -> None:
        numbers = np.random.default_rng(number)
        found = np.zeros(50 * 8192, np.uint8)
        try:
            while True:
                keys = random_keys(numbers, WIDE, len(chunks), 50)
                assert engine.fetch(session, keys, found).statuses is None
                assert (found.reshape(50, -1) == records_of(WIDE, chunks, keys)).all()
        except SessionNotFound:
            return
        except BaseException as error:
            failures.append(error)

    for life in range(3):
        session = engine.open(f"s{life}", WIDE, create=True).session_id
        fill(engine, session, chunks)
        threads = [threading.Thread(target=reader, args=(session, n)) for n in range(4)]
        for thread in threads:
            thread.start()
        threading.Event().wait(0.2)
        engine.delete(session)
        for thread in threads:
            thread.join()
    assert not failures, failures[0]
    assert engine.stats().ram_bytes_used == 0


def test_flushes_at_once_share_syncs() -> None:
    disk = SimDisk()
    engine = make(disk)
    sessions = [engine.open(f"s{i}", WIDE, create=True).session_id for i in range(6)]
    engine.flush(sessions[0])
    for session in sessions:
        fill(engine, session, chunks_of(WIDE, 1))
    assert engine._writeout is not None
    before = disk.counts["sync"]
    with engine._writeout.barrier:
        threads = [threading.Thread(target=engine.flush, args=(session,)) for session in sessions]
        for thread in threads:
            thread.start()
        while len(engine._writeout._flushing) < len(sessions):
            threading.Event().wait(0.001)
    for thread in threads:
        thread.join()
    # Three of these are the first segment's: its header, its name, and the data of all six.
    assert disk.counts["sync"] - before <= 4
    assert all(info.durable_chunk_count == 1 for info in engine.list())
