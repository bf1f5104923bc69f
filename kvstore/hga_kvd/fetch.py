"""The read path: records of one session into the caller's memory.

The order of a fetch: under the lock, which records RAM has and where on disk the others are, slots and segments pinned;
under no lock, one copy of the hits and the reads of the misses; then what could not be had is judged, record by record.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from hga_kvd import hits, misses
from hga_kvd.answers import STATUS_DAMAGED, STATUS_LATE, Counters, Fetched
from hga_kvd.arena import VALID, copy_records
from hga_kvd.damage import log_damaged, mark_damaged
from hga_kvd.errors import LimitExceeded
from hga_kvd.geometry import KEY_DTYPE, Keys
from hga_kvd.index import Session
from hga_kvd.misses import Misses
from hga_kvd.parts import Parts
from hga_kvd.residency import locate, out_of_range

U8 = npt.NDArray[np.uint8]
Bools = npt.NDArray[np.bool_]

# Read parts of large fetches beside the calling threads; they share the queue depth of the disk.
READER_THREADS = 2


class FetchPath:
    def __init__(self, parts: Parts) -> None:
        self.reading = 0  # fetches that wait for the disk, prefetches not counted
        self._parts = parts
        self._residency = parts.residency
        self._lock = parts.residency.lock
        self._segments = parts.segments
        self._readers = ThreadPoolExecutor(READER_THREADS, thread_name_prefix="read")  # started when first used

    def close(self) -> None:
        self._readers.shutdown()

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
            if (
                count <= hits.FEW_KEYS
                and len(destination) <= hits.FEW_BYTES
                and hits.copy_few(session, pool, self._residency.memory, keys.tolist(), destination.data)
            ):
                counters.count_hits(count, len(destination))
                return Fetched(None, count, 0)
            try:  # numpy checks every index anyway; only a refusal looks for the one to blame
                rows, layers, records = locate(session, keys)
                slot_of = pool.table.slot[rows, layers]
                hit = slots.state[slot_of, records] == VALID
            except IndexError:
                raise out_of_range(session, keys) from None
            all_hit = np.count_nonzero(hit) == count
            found = slot_of if all_hit else slot_of[hit]
            slots.pin(found)
            pool.policy.touch(found)
            missing = None
            if not all_hit:
                absent = np.flatnonzero(~hit)
                missing = misses.plan(self._residency, self._segments, pool, rows, layers, records, missing=absent)
                self.reading += foreground
        bad = keep = late = None
        try:
            if missing is None:
                slots.gather(found, records, destination)
            else:
                at = np.flatnonzero(hit) * slots.record_bytes
                starts = slots.starts(found, records[hit])
                copy_records(self._residency.memory, starts, destination.data, at, slots.record_bytes)
                bad, keep, late = misses.bring(
                    self._parts.disk, self._readers, self._residency, pool, missing, destination, overdue
                )
        finally:
            with self._lock:
                slots.unpin(found)
                if missing is not None:
                    self.reading -= foreground
                    misses.end(self._residency, self._segments, pool, missing, keep)
                counters.count_hits(len(found), len(found) * slots.record_bytes)
        if missing is None:
            return Fetched(None, count, 0)
        assert bad is not None
        assert late is not None
        return self._judge(session, epoch, keys, missing, bad, late, len(found), counters)

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
        counters: Counters,
    ) -> Fetched:
        statuses = np.zeros(len(keys), np.uint8)
        statuses[missing.lost] = STATUS_DAMAGED
        statuses[missing.items.positions[bad]] = STATUS_DAMAGED
        statuses[missing.copies_to[bad[missing.copies_of]]] = STATUS_DAMAGED
        damaged = int(np.count_nonzero(statuses))
        statuses[missing.items.positions[late]] = STATUS_LATE
        statuses[missing.copies_to[late[missing.copies_of]]] = STATUS_LATE
        not_ok = int(np.count_nonzero(statuses))
        read = len(keys) - ram_records - not_ok
        with self._lock:
            if damaged:  # or gone: the chunk's place on disk is given back when its last session lets go of it
                self._residency.session(session.session_id, epoch)
            counters.fetched_nvme_records += read
            counters.fetched_nvme_bytes += read * missing.items.item_bytes
            counters.late_records += not_ok - damaged
            marked = mark_damaged(session, keys[missing.items.positions[bad]], self._parts.counters)
        log_damaged(self._parts.log, session, marked)
        return Fetched(statuses if not_ok else None, ram_records, read)
