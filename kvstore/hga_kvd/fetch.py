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

from hga_kvd import few, hits, misses
from hga_kvd.answers import STATUS_DAMAGED, STATUS_LATE, Counters, Fetched
from hga_kvd.arena import FILLING, VALID
from hga_kvd.damage import log_damaged, mark_damaged
from hga_kvd.errors import LimitExceeded
from hga_kvd.few import Few
from hga_kvd.geometry import KEY_DTYPE, Keys
from hga_kvd.hits import Found
from hga_kvd.index import Session
from hga_kvd.memory import aligned_buffer
from hga_kvd.misses import Misses
from hga_kvd.parts import Parts
from hga_kvd.residency import Pool, locate, out_of_range

U8 = npt.NDArray[np.uint8]
I64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

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
    ) -> Fetched:
        """As Engine.fetch. now: seconds. background: counts what a prefetch does, which nobody waits for."""
        assert keys.dtype == KEY_DTYPE
        count, counters, foreground = len(keys), background or self._parts.counters, background is None
        with self._lock:
            session = self._residency.session(session_id, epoch)
            pool = self._residency.pools[session.pool]
            slots = pool.slots
            self._check_size(count, slots.record_bytes)
            assert len(destination) == count * slots.record_bytes
            if not count:
                return Fetched(None, 0, 0)
            session.use(now)
            found = plan = None
            if count <= hits.FEW_KEYS and len(destination) <= hits.FEW_BYTES:
                found = hits.find(session, pool, keys.tolist())
            if found is not None and not found.missing:
                hits.copy(self._residency.memory, found.starts, slots.record_bytes, destination.data)
                pool.policy.touch_few(found.used)
                counters.count_hits(count, len(destination))
                return Fetched(None, count, 0)
            if found is not None and not (overdue is not None and overdue()):
                plan = few.claim(self._residency, self._parts.disk, self._segments, pool, found)
            self.reading += foreground
        try:
            if found is not None and plan is not None and self._bring_few(pool, found, plan, destination, counters):
                return Fetched(None, len(found.used), len(plan.misses))
            return self._fetch_many(session, epoch, keys, destination, overdue, counters)
        finally:
            with self._lock:
                self.reading -= foreground

    def _bring_few(self, pool: Pool, found: Found, plan: Few, destination: U8, counters: Counters) -> bool:
        """False: what was read is not what was written, and the general way has to look."""
        assert self._parts.disk is not None
        size, good = pool.slots.record_bytes, False
        try:
            good = few.bring(self._parts.disk, self._residency, pool, plan)
            if good:
                hits.copy(self._residency.memory, found.starts, size, destination.data)
        finally:
            with self._lock:
                few.end(self._residency, pool, plan)
                if good:
                    counters.count_hits(len(found.used), len(found.used) * size)
                    counters.count_read(len(plan.misses), len(plan.misses) * size)
        return good

    def _fetch_many(
        self,
        session: Session,
        epoch: int,
        keys: Keys,
        destination: U8,
        overdue: Callable[[], bool] | None,
        counters: Counters,
    ) -> Fetched:
        pool = self._residency.pools[session.pool]
        slots, count = pool.slots, len(keys)
        with self._lock:
            self._residency.session(session.session_id, epoch)
            try:  # numpy checks every index anyway; only a refusal looks for the one to blame
                rows, layers, records = locate(session, keys)
                sources = pool.table.slot[rows, layers]
                state = slots.state[sources, records]
            except IndexError:
                raise out_of_range(session, keys) from None
            hit = state == VALID
            all_hit = np.count_nonzero(hit) == count
            found = sources if all_hit else sources[hit]
            if len(found):
                slots.pin(found)
                pool.policy.touch(found)
            missing = None
            if not all_hit:
                filling = state == FILLING
                awaited = np.flatnonzero(filling)
                others = sources[awaited]
                sources[~hit] = 0
                absent = np.flatnonzero(~(hit | filling))
                missing = misses.plan(self._residency, self._segments, pool, rows, layers, records, sources, absent)
        bad = keep = late = None
        try:
            if missing is None:
                slots.gather(found, records, destination)
            else:
                bad, keep, late = misses.bring(
                    self._parts.disk, self._residency, pool, missing, records, destination, overdue
                )
        finally:
            with self._lock:
                if len(found):
                    slots.unpin(found)
                if missing is not None:
                    misses.end(self._residency, self._segments, pool, missing, keep)
                counters.count_hits(len(found), len(found) * slots.record_bytes)
        if missing is None:
            return Fetched(None, count, 0)
        assert bad is not None
        assert late is not None
        fetched = self._judge(session, epoch, keys, missing, bad, late, len(found), len(awaited), counters)
        if not len(awaited):
            return fetched
        rest, own = self._fetch_awaited(session, epoch, keys[awaited], others, records[awaited], overdue, counters)
        destination.reshape(count, -1)[awaited] = own
        statuses = np.zeros(count, np.uint8) if fetched.statuses is None else fetched.statuses
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
    ) -> tuple[Fetched, U8]:
        """Waits until the calls that read these records (of these slots) have ended, then fetches: [keys, record_bytes]."""
        pool = self._residency.pools[session.pool]
        own = aligned_buffer(len(keys) * pool.slots.record_bytes).reshape(len(keys), -1)
        with self._lock:
            while not self._residency.wait_for_fills(pool, slots, records, WAIT_S if overdue else None):
                if overdue is not None and overdue():
                    counters.late_records += len(keys)
                    return Fetched(np.full(len(keys), STATUS_LATE, np.uint8), 0, 0), own
        return self._fetch_many(session, epoch, keys, own.reshape(-1), overdue, counters), own

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
        bad: Bools,
        late: Bools,
        ram_records: int,
        awaited: int,
        counters: Counters,
    ) -> Fetched:
        """awaited: how many keys are another call's to read."""
        read = len(keys) - ram_records - awaited
        if not (len(missing.lost) or bad.any() or late.any()):
            with self._lock:
                counters.count_read(read, read * missing.items.item_bytes)
            return Fetched(None, ram_records, read)
        statuses = np.zeros(len(keys), np.uint8)
        statuses[missing.lost] = STATUS_DAMAGED
        statuses[missing.items.positions[bad]] = STATUS_DAMAGED
        statuses[missing.copies_to[bad[missing.copies_of]]] = STATUS_DAMAGED
        damaged = int(np.count_nonzero(statuses))
        statuses[missing.items.positions[late]] = STATUS_LATE
        statuses[missing.copies_to[late[missing.copies_of]]] = STATUS_LATE
        not_ok = int(np.count_nonzero(statuses))
        read -= not_ok
        with self._lock:
            if damaged:  # or gone: the chunk's place on disk is given back when its last session lets go of it
                self._residency.session(session.session_id, epoch)
            counters.count_read(read, read * missing.items.item_bytes)
            counters.late_records += not_ok - damaged
            marked = mark_damaged(session, keys[missing.items.positions[bad]], self._parts.counters)
        log_damaged(self._parts.log, session, marked)
        return Fetched(statuses if not_ok else None, ram_records, read)
