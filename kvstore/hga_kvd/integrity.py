"""Verify and scrub: what the scrubber finds is taken note of, for every session that has the chunk."""

from __future__ import annotations

import numpy as np

from hga_kvd.answers import Verified
from hga_kvd.damage import log_damaged, mark_damaged
from hga_kvd.geometry import KEY_DTYPE
from hga_kvd.index import LOST_ROW
from hga_kvd.parts import Parts
from hga_kvd.scrub import Found, Scrubber, extent_keys, keys_of

VERIFY_BYTES = 16 << 20  # of chunks at once in `verify`


class Integrity:
    def __init__(self, parts: Parts) -> None:
        self.scrubber = Scrubber(parts.residency, parts.disk, parts.segments)
        self._parts = parts
        self._residency = parts.residency
        self._lock = parts.residency.lock

    def verify(self, session_id: int) -> Verified:
        """As Engine.verify."""
        with self._lock:
            session = self._residency.session(session_id)
            pool, geometry = self._residency.pools[session.pool], session.table.geometry
            rows = session.all_rows().copy()
        step = max(1, VERIFY_BYTES // pool.table.chunk_stride)
        for first in range(0, len(rows), step):
            part = rows[first : first + step]
            self._take_note(self.scrubber.check_chunks(pool, part[part != LOST_ROW]))
        with self._lock:
            session = self._residency.session(session_id)
            lost = np.flatnonzero(session.all_rows() == LOST_ROW)
            keys = np.array(sorted(session.damaged), KEY_DTYPE)
        keys = np.concatenate((keys, extent_keys(geometry, lost)))
        return Verified(len(rows) * geometry.layers * geometry.records_per_extent, keys)

    def scrub(self, bytes_max: int) -> int:
        """As Engine.scrub."""
        found = self.scrubber.step(bytes_max)
        self._take_note(found)
        with self._lock:
            self._parts.counters.scrubbed_bytes += found.bytes
        return found.bytes

    def _take_note(self, found: Found) -> None:
        parts, counters = self._parts, self._parts.counters
        if found.dropped_records:
            parts.log.error("bad copies in RAM dropped", records=found.dropped_records)
        news = []
        with self._lock:
            counters.scrub_dropped_records += found.dropped_records
            for damage in found.damage:
                for session in self._residency.sessions.values():
                    if session.table is damage.pool.table:
                        marked = mark_damaged(session, keys_of(session, damage), counters)
                        counters.scrub_damaged_records += len(marked)
                        news.append((session, marked))
        for session, marked in news:
            log_damaged(parts.log, session, marked)
