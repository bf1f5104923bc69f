"""Space on disk: what is deleted comes back, the cap holds, the accounting is exact; and who has to go when it is short."""

from __future__ import annotations

import errno
import random
import time
from unittest.mock import Mock

import numpy as np
import pytest
from hga_kvd.config import Settings
from hga_kvd.engine import Engine
from hga_kvd.errors import NotDurable, SessionNotFound, StartRefused, StorageFull
from hga_kvd.geometry import KEY_DTYPE, Geometry
from hga_kvd.testing.oracle import random_keys, records_of
from hga_kvd.testing.simdisk import SimDisk
from hga_kvd.writeout import WriteOut

MIB = 1 << 20
WIDE = Geometry(2, 2, 64, "float32")  # chunks of 128 KiB
CHUNKS = np.random.default_rng(4).integers(0, 256, (40, WIDE.chunk_bytes), dtype=np.uint8)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def make(disk: SimDisk | None, ram: int = 4 * MIB, clock: Clock | None = None, **options: object) -> Engine:
    settings = Settings(**{"ram": ram, "segment_bytes": 2 * MIB, "nvme_reserve": 0, **options})
    return Engine(settings, disk, background=False, clock=clock or Clock())


def filled(engine: Engine, name: str, count: int, flush: bool = True) -> int:
    session = engine.open(name, WIDE, create=True).session_id
    for i in range(engine.info(session).chunk_count, count):
        engine.append(session, i, 1, CHUNKS[i], b"", engine.info(session).epoch)
    if flush:
        engine.flush(session)
    return session


def check(engine: Engine, session: int, count: int) -> None:
    info = engine.info(session)
    assert info.chunk_count == count
    keys = random_keys(np.random.default_rng(1), WIDE, count, 60)
    found = np.zeros((60, WIDE.record_bytes), np.uint8)
    assert engine.fetch(session, keys, found.reshape(-1), info.epoch).statuses is None
    assert (found == records_of(WIDE, CHUNKS[:count], keys)).all()


def exact(engine: Engine, disk: SimDisk) -> int:
    """Bytes on disk, which must be those that the engine knows of."""
    used = engine.stats().nvme_bytes_used
    assert used == disk.stored_bytes("segment-")
    return used


# --- holes ---


def test_a_deleted_session_gives_its_space_back_beside_one_that_stays() -> None:
    disk = SimDisk()
    engine = make(disk)
    one, two = (engine.open(name, WIDE, create=True).session_id for name in "ab")
    for i in range(30):  # turn by turn: every segment has chunks of both
        for session in (one, two):
            engine.append(session, i, 1, CHUNKS[i], b"")
            engine.flush(session)
    before = exact(engine, disk)
    engine.delete(one)
    assert before - exact(engine, disk) >= 30 * WIDE.chunk_bytes
    check(engine, two, 30)
    disk = disk.crash()
    engine = make(disk)
    assert before - exact(engine, disk) >= 30 * WIDE.chunk_bytes
    check(engine, two, 30)


def test_truncation_and_replaced_summaries_give_space_back() -> None:
    disk = SimDisk()
    engine = make(disk)
    session = filled(engine, "a", 30)
    full = exact(engine, disk)
    engine.truncate(session, 0, 10)
    cut = exact(engine, disk)
    assert full - cut >= 20 * WIDE.chunk_bytes
    for value in b"abcdef":
        engine.put_summaries(session, "k", 0, 10, bytes([value]) * (10 * 8192), 1)
        engine.flush(session)
    engine.delete(filled(engine, "b", 1))
    assert engine.stats().nvme_bytes_live == 10 * (WIDE.chunk_bytes + 8192)
    engine = make(disk := disk.crash())
    exact(engine, disk)
    assert engine.get_summaries(session, "k", 0, 10, MIB, 1) == (10, b"f" * (10 * 8192))
    check(engine, session, 10)


def test_nothing_that_a_fork_has_is_given_back() -> None:
    disk = SimDisk()
    engine = make(disk)
    session = filled(engine, "a", 20)
    fork = engine.fork(session, 0, 12, "b").session_id
    engine.flush(fork)
    engine.delete(session)
    exact(engine, disk)
    assert engine.stats().nvme_bytes_live == 12 * WIDE.chunk_bytes
    check(engine, fork, 12)
    check(make(disk.crash()), fork, 12)


def test_the_last_frames_of_the_log_are_not_taken_for_torn_when_they_have_holes() -> None:
    """What is dead at the end of the open segment is given back, and the frames before and behind it stay."""
    disk = SimDisk()
    engine = make(disk)
    one = filled(engine, "a", 2)
    two = filled(engine, "b", 3)
    three = filled(engine, "c", 1)
    engine.delete(two)
    engine.delete(three)
    for again in (disk.crash(), disk.crash(1), disk.kill()):
        restarted = make(again)
        check(restarted, one, 2)
        assert restarted.stats().damaged_records == 0
        filled(restarted, "d", 4)
        check(make(again.crash()), one, 2)


@pytest.mark.parametrize("after", range(1, 9))
def test_power_lost_between_the_manifest_and_the_holes(after: int) -> None:
    disk = SimDisk()
    engine = make(disk)
    one, two = filled(engine, "a", 5), filled(engine, "b", 20)
    for i in range(5, 9):
        engine.append(one, i, 1, CHUNKS[i], b"")
        engine.flush(one)
    disk.die_after(after)
    try:
        engine.delete(two)
    except Exception:
        disk.heal()
    engine = make(disk := disk.crash(after))
    exact(engine, disk)
    check(engine, one, 9)
    assert engine.stats().nvme_bytes_live == (9 + (20 if len(engine.list()) == 2 else 0)) * WIDE.chunk_bytes


def test_a_hole_that_cannot_be_made_is_made_later() -> None:
    disk = SimDisk()
    engine = make(disk)
    kept, gone = filled(engine, "a", 3), filled(engine, "b", 6)
    before = exact(engine, disk)
    disk.fail("punch")
    engine.delete(gone)
    assert exact(engine, disk) == before
    engine.delete(filled(engine, "c", 1))
    assert before - exact(engine, disk) >= 6 * WIDE.chunk_bytes
    check(engine, kept, 3)


def test_without_holes_space_comes_back_by_segments() -> None:
    disk = SimDisk()
    disk.can_punch = False
    engine = make(disk)
    kept, gone = filled(engine, "a", 3), filled(engine, "b", 40)
    engine.delete(gone)
    assert exact(engine, disk) <= 3 * 2 * MIB
    check(engine, kept, 3)
    engine = make(disk := disk.crash())
    exact(engine, disk)
    check(engine, kept, 3)


# --- the cap, and the space that churn takes ---


@pytest.mark.parametrize("seed", range(4))
def test_space_amplification_and_cap_under_churn(seed: int) -> None:
    """Steady state: at most 1.3 bytes on disk for each byte that a session has, and never more than nvme_max."""
    cap, disk, chance = 24 * MIB, SimDisk(), random.Random(seed)
    engine = make(disk, nvme_max=cap)
    live: dict[int, int] = {}  # session -> chunks
    worst, full = 0.0, 0
    for step in range(240):
        session = engine.open(f"s{step}", WIDE, create=True).session_id
        count = chance.randint(1, 12)
        try:
            engine.append(session, 0, count, CHUNKS[:count].reshape(-1), b"")
            engine.flush(session)
            live[session] = count
        except StorageFull:
            full += 1
            engine.delete(session)
        while sum(live.values()) > 110:  # 14 MiB
            victim = chance.choice(list(live))
            if chance.random() < 0.5:
                engine.delete(victim)
                del live[victim]
            else:
                info = engine.info(victim)
                engine.truncate(victim, info.epoch, live[victim] // 2)
                live[victim] //= 2
                if not live[victim]:
                    engine.delete(victim)
                    del live[victim]
        if step % 24 == 23:
            disk = disk.crash()
            engine = make(disk, nvme_max=cap)
        used = exact(engine, disk)
        assert used <= cap
        assert engine.stats().nvme_bytes_live == sum(live.values()) * WIDE.chunk_bytes
        if step > 50:
            worst = max(worst, used / engine.stats().nvme_bytes_live)
    assert not full
    assert worst <= 1.3, worst
    for session, count in live.items():
        check(engine, session, count)


@pytest.mark.parametrize("seed", range(6))
def test_the_cap_is_hard_when_more_comes_than_fits(seed: int) -> None:
    cap, disk, chance = 5 * MIB, SimDisk(), random.Random(seed)
    engine = make(disk, ram=2 * MIB, nvme_max=cap)
    live: dict[int, int] = {}
    refused = 0
    for step in range(150):
        try:
            if live and chance.random() < 0.25:
                victim = chance.choice(list(live))
                engine.delete(victim)
                del live[victim]
            session = engine.open(f"s{step}", WIDE, create=True).session_id
            live[session] = 0
            for i in range(chance.randint(1, 8)):
                engine.append(session, i, 1, CHUNKS[i], b"")
                live[session] += 1
            engine.flush(session)
        except StorageFull:
            refused += 1
        assert exact(engine, disk) <= cap
        for session in chance.sample(list(live), min(3, len(live))):  # reads go on
            if live[session]:
                check(engine, session, live[session])
    for session, count in live.items():
        if count:
            check(engine, session, count)
    assert refused


# --- eviction, expiry, parking, pins ---


def test_eviction_takes_the_session_that_was_idle_for_longest() -> None:
    clock, disk = Clock(), SimDisk()
    engine = make(disk, ram=2 * MIB, clock=clock, nvme_max=8 * MIB, evict="lru")
    sessions = {}
    for name in "abcd":
        sessions[name] = filled(engine, name, 10)
        clock.now += 1
    engine.pin(sessions["a"], True)
    engine.park(sessions["a"])
    engine.close(sessions["b"])
    clock.now += 1
    engine.close(sessions["c"])
    engine.open("b", None, create=False)  # in use again, and later than c
    engine.close(sessions["b"])
    # a is pinned, c was idle for longest; d is open
    filled(engine, "e", 30)
    names = {info.name for info in engine.list()}
    assert "c" not in names
    assert {"a", "d", "e"} <= names
    assert engine.stats().evicted_sessions >= 1
    with pytest.raises(StorageFull):  # what is open or pinned is never evicted
        filled(engine, "f", 40)
    check(engine, sessions["a"], 10)
    check(engine, sessions["d"], 10)
    assert exact(engine, disk) <= 8 * MIB
    disk = disk.crash()
    engine = make(disk, ram=2 * MIB, nvme_max=8 * MIB, evict="lru")
    assert engine.info(sessions["a"]).pinned
    check(engine, sessions["a"], 10)
    with pytest.raises(SessionNotFound):
        engine.info(sessions["c"])


def test_eviction_is_opt_in() -> None:
    engine = make(SimDisk(), ram=2 * MIB, nvme_max=4 * MIB)
    engine.close(filled(engine, "a", 20))
    with pytest.raises(StorageFull):
        filled(engine, "b", 40)
    assert engine.stats().evicted_sessions == 0


def test_ram_only_evicts_too() -> None:
    engine = make(None, ram=2 * MIB, evict="lru")
    one = filled(engine, "a", 10, flush=False)
    with pytest.raises(StorageFull):
        filled(engine, "b", 10, flush=False)
    engine.close(one)
    check(engine, filled(engine, "b", 10, flush=False), 10)
    assert [info.name for info in engine.list()] == ["b"]


def test_sessions_expire_when_they_were_not_used_for_their_time() -> None:
    clock, disk = Clock(), SimDisk()
    engine = make(disk, clock=clock)
    for name, ttl_s in (("a", 10), ("b", 10), ("c", 0), ("d", 10)):
        session = engine.open(name, WIDE, create=True, ttl_s=ttl_s).session_id
        filled(engine, name, 3)
        if name == "d":
            engine.pin(session, True)
    fork = engine.fork(1, 0, 0, "e")
    assert fork.ttl_s == 10
    clock.now += 9
    check(engine, 2, 3)
    engine.expire()
    assert engine.stats().expired_sessions == 0
    clock.now += 2
    engine.expire()
    assert [info.name for info in engine.list()] == ["b", "c", "d"]
    assert (engine.stats().expired_sessions, engine.stats().chunks) == (2, 9)
    exact(engine, disk)
    engine.shutdown()
    clock.now += 9  # the time that the daemon is away counts
    engine = make(disk, clock=clock)
    engine.expire()
    assert [info.name for info in engine.list()] == ["c", "d"]
    filled(engine, "b", 1)
    assert engine.info(engine.open("b", None, create=False, ttl_s=5).session_id).ttl_s == 5


def test_a_system_clock_that_is_set_ends_no_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ahead while the daemon runs; or back before it starts, and right again at the next start."""
    disk, years, system = SimDisk(), 1e9, time.time
    engine = Engine(Settings(ram=4 * MIB, segment_bytes=2 * MIB, nvme_reserve=0), disk, background=False)
    engine.open("a", WIDE, create=True, ttl_s=3600)
    filled(engine, "a", 3)
    monkeypatch.setattr(time, "time", lambda: system() + years)
    engine.expire()
    assert engine.stats().expired_sessions == 0
    check(engine, filled(engine, "a", 3), 3)
    engine.shutdown()
    monkeypatch.undo()
    right = Clock()
    right.now = system()
    for crash, wrong in ((True, 0.0), (False, 1000.0)):
        clock = Clock()
        clock.now = wrong
        engine = make(disk, clock=clock)
        check(engine, filled(engine, "a", 3), 3)
        engine.expire()
        assert engine.stats().expired_sessions == 0
        if crash:
            disk = disk.crash()
        else:
            engine.shutdown()
    engine = make(disk, clock=right)
    engine.expire()
    assert engine.stats().expired_sessions == 0
    check(engine, filled(engine, "a", 3), 3)


def test_a_start_on_a_full_disk_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = SimDisk()
    engine = make(disk)
    check(engine, filled(engine, "a", 3), 3)
    engine.shutdown()
    with monkeypatch.context() as full:
        full.setattr(WriteOut, "start", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(StartRefused, match="free some space on its file system"):
            make(disk)
    engine = make(disk)
    check(engine, filled(engine, "a", 3), 3)


def test_park_empties_ram_and_the_session_stays() -> None:
    disk = SimDisk()
    engine = make(disk)
    session = filled(engine, "a", 12, flush=False)
    fork = engine.fork(session, 0, 4, "b").session_id
    engine.park(session)
    assert engine.stats().ram_bytes_used == 4 * WIDE.chunk_bytes  # what the fork has too
    info = engine.info(session)
    assert (info.parked, info.durable_chunk_count) == (True, 12)
    engine.park(fork)
    assert engine.stats().ram_bytes_used == 4 * WIDE.chunk_bytes
    keys = np.array([(40, 0, 0)], KEY_DTYPE)
    assert engine.fetch(session, keys, np.zeros(WIDE.record_bytes, np.uint8)).nvme_records == 1
    assert not engine.info(session).parked
    check(engine, session, 12)
    with pytest.raises(NotDurable):
        engine.park(engine.open("", WIDE, create=True).session_id)
