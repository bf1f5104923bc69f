"""The thread that brings what was asked for ahead of time, in small parts, behind all fetches that wait for the disk."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np

from hga_kvd.answers import Counters
from hga_kvd.arena import VALID
from hga_kvd.errors import KvdError
from hga_kvd.fetch import FetchPath
from hga_kvd.geometry import KEY_DTYPE, Keys
from hga_kvd.memory import aligned_buffer
from hga_kvd.parts import Parts
from hga_kvd.prefetch import Ledger, Part, PrefetchQueue
from hga_kvd.residency import locate, out_of_range

# A part of a prefetch lets fetches go first, but not for ever.
WAIT_S, PAUSE_S = 0.1, 0.0005


class Prefetcher:
    def __init__(self, parts: Parts, fetch_path: FetchPath, clock: Callable[[], float]) -> None:
        self.queue = PrefetchQueue()
        self.ledger = Ledger()  # the residency's lock guards it
        self.prefetched_records = 0
        self._parts = parts
        self._residency = parts.residency
        self._lock = parts.residency.lock
        self._fetch_path = fetch_path
        self._clock = clock
        self._thread: threading.Thread | None = None

    def put(self, part: Part) -> None:
        """As Engine.prefetch; the thread starts with the first one."""
        self._not_in_ram(part)
        if self._parts.disk is None:  # everything is in RAM
            return
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)
                self._thread.start()
        self.queue.put(part._replace(keys=part.keys.copy()))

    def fetched(self, session_id: int, keys: Keys) -> None:
        """A fetch had these: what was brought of them was useful."""
        if len(self.ledger):
            with self._lock:
                self.ledger.fetch(session_id, keys)

    def close(self) -> None:
        self.queue.close()
        if self._thread is not None:
            self._thread.join()

    def _work(self) -> None:
        while (part := self.queue.take()) is not None:
            give_up = time.monotonic() + WAIT_S
            while self._fetch_path.reading and time.monotonic() < give_up:
                self._parts.stopping.wait(PAUSE_S)
            try:
                self._bring(part)
            except KvdError:  # gone, or rolled back: nobody wants the rest
                self.queue.forget(part.session_id)
                with self._lock:
                    self.ledger.forget(part.session_id)
            except OSError as error:
                self._parts.log.warning("prefetch failed", error=str(error))
            except Exception:  # of this part; the next ones go on
                self._parts.log.exception("fault", call="prefetch")

    def _bring(self, part: Part) -> None:
        missing = self._not_in_ram(part)
        if not len(missing):
            return
        with self._lock:
            record_bytes = self._residency.session(part.session_id).table.geometry.record_bytes
        own, counters = aligned_buffer(len(missing) * record_bytes), Counters()
        self._fetch_path.fetch(part.session_id, missing, own, part.epoch, self._clock(), None, counters)
        with self._lock:
            self.prefetched_records += counters.fetched_nvme_records
            self.ledger.bring(part.session_id, missing[: counters.fetched_nvme_records])

    def _not_in_ram(self, part: Part) -> Keys:
        keys = np.unique(part.keys.view("<u8")).view(KEY_DTYPE)  # milliseconds, so without the lock
        with self._lock:
            session = self._residency.session(part.session_id, part.epoch)
            slots, table = self._residency.pools[session.pool].slots, session.table
            try:
                rows, layers, records = locate(session, keys)
                missing: Keys = keys[slots.state[table.slot[rows, layers], records] != VALID]
            except IndexError:
                raise out_of_range(session, keys) from None
            return missing
