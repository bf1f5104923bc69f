"""The read path: records of one session into the caller's memory.

The order of a fetch: under the lock, which records RAM has and where on disk the others are, slots and segments pinned;
under no lock, the reads of the misses into slots and the copies out of all slots; then what could not be had is judged,
record by record. A record that another call is reading is not read twice: it is waited for, after this call's own reads
have ended, so two calls never wait for each other.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from hga_kvd import hits, misses
from hga_kvd.answers import STATUS_DAMAGED, STATUS_LATE, Counters, Fetched
from hga_kvd.damage import log_damaged, mark_damaged
from hga_kvd.errors import LimitExceeded
from hga_kvd.geometry import KEY_DTYPE, Keys
from hga_kvd.index import Session
from hga_kvd.memory import aligned_buffer
from hga_kvd.misses import Brought, Misses
from hga_kvd.native import Found
from hga_kvd.parts import Parts
from hga_kvd.residency import Pool

U8 = npt.NDArray[np.uint8]
I64 = npt.NDArray[np.int64]

# How often a fetch with a deadline looks at the clock while it waits for another one's reads.
WAIT_S = 0.0005


class FetchPath:
    def __init__(self, parts: Parts) -> None:
        self.reading = 0  # fetches that wait for the disk, prefetches not counted
        self._parts = parts
        self._residency = parts.residency
        self._lock = parts.residency.lock
        self._segments = parts.segments

    def fetch(
        self,
        session_id: int,
        keys: Keys,
        destination: U8,
        epoch: int,
        now: float,
        overdue: Callable[[], bool] | None,
        background: Counters | None = None,
        once: bool = False,
    ) -> Fetched:
        """As Engine.fetch. now: seconds. background: counts what a prefetch does, which nobody waits for."""
        assert keys.dtype == KEY_DTYPE
        counters, count = background or self._parts.counters, len(keys)
        foreground = background is None
        with self._lock:
            session = self._residency.session(session_id, epoch)
            pool = self._residency.pools[session.pool]
            self._check_size(count, pool.slots.record_bytes)
            assert len(destination) == count * pool.slots.record_bytes
            if not count:
                return Fetched(None, 0, 0)
            session.use(now)
            planned = self._plan(session, pool, keys, foreground, once)
        return self._fetch(session, epoch, keys, *planned, destination, overdue, counters, foreground)

    def _plan(
        self, session: Session, pool: Pool, keys: Keys, foreground: bool, once: bool = False
    ) -> tuple[Found, int, Misses | None]:
        """Under the lock: where the records are, how many RAM has, and how the others are to be had. Pins what it names."""
        found, hit_count = hits.find(session, pool, keys)
        if hit_count == len(keys):
            return found, hit_count, None
        missing = misses.plan(self._residency, self._segments, pool, found, len(keys) - hit_count, once)
        self.reading += foreground
        return found, hit_count, missing

    def _fetch(
        self,
        session: Session,
        epoch: int,
        keys: Keys,
        found: Found,
        hit_count: int,
        missing: Misses | None,
        destination: U8,
        overdue: Callable[[], bool] | None,
        counters: Counters,
        foreground: bool,
    ) -> Fetched:
        """What was planned: the copies and the reads, and then the unpinning."""
        pool = self._residency.pools[session.pool]
        size, brought, read = pool.slots.record_bytes, None, 0
        try:
            if missing is None:
                hits.copy(pool, found, destination)
            else:
                brought = misses.bring(self._parts.disk, self._residency, pool, found, missing, destination, overdue)
        finally:
            with self._lock:
                hits.unpin(pool, found)
                if missing is not None:
                    misses.end(self._residency, self._segments, pool, missing, brought)
                    self.reading -= foreground
                    if brought and brought.bad is None and brought.late is None and not missing.plan.lost_count:
                        read = len(keys) - hit_count - missing.plan.awaited_count
                        counters.count_read(read, read * size)
                counters.count_hits(hit_count, hit_count * size)
        if missing is None:
            return Fetched(None, hit_count, 0)
        if read:
            fetched = Fetched(None, hit_count, read)
        else:
            assert brought is not None
            fetched = self._judge(session, epoch, keys, missing, brought, hit_count, counters)
        if not missing.plan.awaited_count:
            return fetched
        awaited = missing.plan.awaited
        places = found["slot"][awaited], found["record"][awaited]
        rest, own = self._fetch_awaited(session, epoch, keys[awaited], *places, overdue, counters, foreground)
        destination.reshape(len(keys), -1)[awaited] = own
        statuses = np.zeros(len(keys), np.uint8) if fetched.statuses is None else fetched.statuses
        statuses[awaited] = 0 if rest.statuses is None else rest.statuses
        ram, nvme = fetched.ram_records + rest.ram_records, fetched.nvme_records + rest.nvme_records
        return Fetched(statuses if statuses.any() else None, ram, nvme)

    def _fetch_awaited(
        self,
        session: Session,
        epoch: int,
        keys: Keys,
        slots: I64,
        records: I64,
        overdue: Callable[[], bool] | None,
        counters: Counters,
        foreground: bool,
    ) -> tuple[Fetched, U8]:
        """Waits until the calls that read these records (of these slots) have ended, then fetches: [keys, record_bytes]."""
        pool = self._residency.pools[session.pool]
        own = aligned_buffer(len(keys) * pool.slots.record_bytes).reshape(len(keys), -1)
        with self._lock:
            while not self._residency.wait_for_fills(pool, slots, records, WAIT_S if overdue else None):
                if overdue is not None and overdue():
                    counters.late_records += len(keys)
                    return Fetched(np.full(len(keys), STATUS_LATE, np.uint8), 0, 0), own
            self._residency.session(session.session_id, epoch)
            planned = self._plan(session, pool, keys, foreground)
        into = own.reshape(-1)
        return self._fetch(session, epoch, keys, *planned, into, overdue, counters, foreground), own

    def _check_size(self, count: int, record_bytes: int) -> None:
        settings = self._parts.settings
        if count > settings.fetch_keys_max:
            raise LimitExceeded(f"a fetch of {count} keys; at most {settings.fetch_keys_max} are allowed: split it")
        if count * record_bytes > settings.fetch_bytes_max:
            raise LimitExceeded(
                f"a fetch of {count * record_bytes} bytes; at most {settings.fetch_bytes_max} are allowed: split it"
            )

    def _judge(
        self,
        session: Session,
        epoch: int,
        keys: Keys,
        missing: Misses,
        brought: Brought,
        ram_records: int,
        counters: Counters,
    ) -> Fetched:
        read, late = len(keys) - ram_records - missing.plan.awaited_count, brought.late
        bad = np.zeros(missing.plan.count, bool) if brought.bad is None else brought.bad
        statuses = np.zeros(len(keys), np.uint8)
        statuses[missing.plan.lost] = STATUS_DAMAGED
        statuses[missing.plan.keys[bad]] = STATUS_DAMAGED
        statuses[missing.plan.copies_to[bad[missing.plan.copies_of]]] = STATUS_DAMAGED
        damaged = int(np.count_nonzero(statuses))
        if late is not None:
            statuses[missing.plan.keys[late]] = STATUS_LATE
            statuses[missing.plan.copies_to[late[missing.plan.copies_of]]] = STATUS_LATE
        not_ok = int(np.count_nonzero(statuses))
        read -= not_ok
        with self._lock:
            if damaged:  # or gone: the chunk's place on disk is given back when its last session lets go of it
                self._residency.session(session.session_id, epoch)
            counters.count_read(read, read * missing.record_bytes)
            counters.late_records += not_ok - damaged
            marked = mark_damaged(session, keys[missing.plan.keys[bad]], self._parts.counters)
        log_damaged(self._parts.log, session, marked)
        return Fetched(statuses if not_ok else None, ram_records, read)
