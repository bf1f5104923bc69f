"""Prefetch: the queue and the ledger alone, and the engine that brings records in behind fetches."""

import sys
import threading
import time

import numpy as np
import pytest
from hga_kvd import prefetch, prefetcher
from hga_kvd.answers import STATUS_LATE
from hga_kvd.config import Settings
from hga_kvd.engine import Engine
from hga_kvd.errors import LimitExceeded
from hga_kvd.filedisk import make_disk
from hga_kvd.geometry import KEY_DTYPE, Geometry
from hga_kvd.log import make_log
from hga_kvd.prefetch import PART_KEYS, Ledger, Part, PrefetchQueue
from wire import all_keys, payload_of, records_of, wait_for

MIB = 1 << 20
WIDE = Geometry(layers=2, kv_heads=2, head_dim=128, dtype="bfloat16")  # records of 8 KiB, chunks of 128 KiB


def keys(count, first=0):
    made = np.zeros(count, KEY_DTYPE)
    made["group"] = np.arange(first, first + count)
    return made


def test_the_newest_of_a_session_replaces_the_older():
    queue = PrefetchQueue()
    queue.put(Part(1, 0, keys(3)))
    queue.put(Part(2, 0, keys(2 * PART_KEYS)))
    queue.put(Part(1, 5, keys(4, 100)))
    taken = [queue.take() for _ in range(3)]
    assert [(part.session_id, part.epoch, len(part.keys)) for part in taken] == [
        (1, 5, 4),
        (2, 0, PART_KEYS),
        (2, 0, PART_KEYS),
    ]
    assert taken[0].keys["group"][0] == 100
    queue.put(Part(1, 0, keys(1)))
    queue.forget(1)
    queue.close()
    assert queue.take() is None


def test_the_queue_is_bounded_over_all_sessions(monkeypatch):
    monkeypatch.setattr(prefetch, "QUEUED_KEYS_MAX", 10)
    queue = PrefetchQueue()
    queue.put(Part(1, 0, keys(6)))
    with pytest.raises(LimitExceeded, match="6 keys wait to be prefetched and this call has 5"):
        queue.put(Part(2, 0, keys(5)))
    queue.put(Part(1, 0, keys(10)))  # its own place


def test_take_waits_for_a_part():
    queue = PrefetchQueue()
    taken = []
    thread = threading.Thread(target=lambda: taken.append(queue.take()))
    thread.start()
    time.sleep(0.02)
    queue.put(Part(1, 0, keys(1)))
    thread.join(30)
    assert taken[0].session_id == 1


def test_the_ledger_counts_each_record_once(monkeypatch):
    monkeypatch.setattr(prefetch, "REMEMBERED_MAX", 8)
    ledger = Ledger()
    ledger.bring(1, keys(6))
    ledger.fetch(1, keys(3))
    ledger.fetch(1, keys(3))
    ledger.fetch(2, keys(6))
    assert (ledger.useful, ledger.wasted, len(ledger)) == (3, 0, 3)
    ledger.bring(2, keys(7))
    assert (ledger.useful, ledger.wasted, len(ledger)) == (3, 2, 8)
    ledger.forget(2)
    assert (ledger.useful, ledger.wasted, len(ledger)) == (3, 9, 1)


@pytest.fixture
def stored(disk_path):
    """An engine on a real disk, a session of 4 MiB in an arena of 2 MiB, and its payload."""
    settings = Settings(ram=2 * MIB, nvme=disk_path, segment_bytes=16 * MIB)
    log = make_log("error", sys.stderr)
    engine = Engine(settings, make_disk(settings, log), log)
    session_id = engine.open("s", WIDE, True).session_id
    payload = payload_of(32, geometry=WIDE)
    for chunk in range(0, 32, 8):
        part = payload[chunk * WIDE.chunk_bytes : (chunk + 8) * WIDE.chunk_bytes]
        engine.append(session_id, chunk, 8, part, b"")
        engine.flush(session_id)
    yield engine, session_id, payload
    engine.shutdown()


def fetch(engine, session_id, wanted, **options):
    destination = np.zeros(len(wanted) * WIDE.record_bytes, np.uint8)
    return engine.fetch(session_id, wanted, destination, **options), destination.reshape(len(wanted), -1)


def test_what_was_prefetched_is_in_ram_and_counted(stored):
    engine, session_id, payload = stored
    wanted = all_keys(2, WIDE)
    engine.prefetch(session_id, 0, wanted)
    wait_for(lambda: engine.stats().prefetched_records == len(wanted))
    before = engine.stats()
    assert before.prefetch_useful_records == before.fetches == before.fetched_nvme_records == 0
    fetched, got = fetch(engine, session_id, wanted)
    assert (fetched.statuses, fetched.ram_records, fetched.nvme_records) == (None, len(wanted), 0)
    np.testing.assert_array_equal(got, records_of(payload, wanted, WIDE))
    after = engine.stats()
    assert (after.prefetch_useful_records, after.prefetch_wasted_records) == (len(wanted), 0)


@pytest.mark.parametrize("how", ["delete", "truncate", "newer"])
def test_a_prefetch_ends_when_it_is_stale(stored, monkeypatch, how):
    """With its session, with its epoch, and with the next step's: what still waits is not brought."""
    engine, session_id, _ = stored
    monkeypatch.setattr(prefetcher, "WAIT_S", 60)
    engine._fetch_path.reading = 1  # a fetch goes first, so the first part waits
    engine.prefetch(session_id, 0, all_keys(32, WIDE))
    waiting = engine._prefetcher.queue._waiting
    wait_for(lambda: session_id in waiting and len(waiting[session_id].keys) < len(all_keys(32, WIDE)))
    if how == "delete":
        engine.delete(session_id)
    elif how == "truncate":
        engine.truncate(session_id, 0, 30)
    else:
        engine.prefetch(session_id, 0, all_keys(1, WIDE))
    engine._fetch_path.reading = 0
    wait_for(lambda: not waiting)
    # The part that a thread had in hand is read yet, of a session that is there in this epoch.
    in_hand = prefetch.PART_KEYS if how == "newer" else 0
    wait_for(lambda: engine.stats().prefetched_records >= in_hand)
    assert engine.stats().prefetched_records <= in_hand + (len(all_keys(1, WIDE)) if how == "newer" else 0)


def test_a_prefetch_lets_fetches_go_first(stored):
    engine, session_id, _ = stored
    engine._fetch_path.reading = 1  # one waits for the disk, and goes on to
    engine.prefetch(session_id, 0, all_keys(2, WIDE))
    time.sleep(0.05)
    assert engine.stats().prefetched_records == 0
    engine._fetch_path.reading = 0
    wait_for(lambda: engine.stats().prefetched_records == len(all_keys(2, WIDE)))


def test_a_deadline_cuts_between_parts(stored):
    """Answered by the clock of the test: two parts of 256 KiB are read, the rest is late, and nothing of it is kept."""
    engine, session_id, payload = stored
    wanted = all_keys(8, WIDE)[np.random.default_rng(0).permutation(128)]
    wanted = np.concatenate((wanted, wanted[-3:]))  # named twice
    looks = iter([False, False, True])
    fetched, got = fetch(engine, session_id, wanted, overdue=lambda: next(looks))
    late = fetched.statuses == STATUS_LATE
    assert np.count_nonzero(~late[:128]) == 2 * (256 // 8)
    assert (late[-3:] == late[125:128]).all()
    assert fetched.nvme_records + fetched.ram_records == np.count_nonzero(~late)
    np.testing.assert_array_equal(got[~late], records_of(payload, wanted, WIDE)[~late])
    fetched, got = fetch(engine, session_id, wanted)
    assert fetched.statuses is None
    np.testing.assert_array_equal(got, records_of(payload, wanted, WIDE))
    assert engine.stats().late_records == np.count_nonzero(late)
    assert engine.stats().damaged_records == 0
