"""What was asked to be in RAM before it is asked for: a bounded queue, and the count of what it was good for. No I/O.

- The newest request of a session takes the place of its older ones: a decode step that has gone on wants other records.
- Of what was brought, a record counts as useful when it is fetched, as wasted when so many others were
  brought after it, or a prefetch found that its session is gone or was rolled back.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import NamedTuple

from hga_kvd.errors import LimitExceeded
from hga_kvd.geometry import Keys

# Waiting, of all sessions. 64 K records of 8 KiB are 512 MiB, more than a prefetch can be right about.
QUEUED_KEYS_MAX = 65536
# Brought and not yet fetched, of all sessions; over it the oldest counts as wasted.
REMEMBERED_MAX = 65536
# Read at once: little enough that a fetch which comes then waits for less than a millisecond.
PART_KEYS = 32


class Part(NamedTuple):
    session_id: int
    epoch: int
    keys: Keys


class PrefetchQueue:
    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: OrderedDict[int, Part] = OrderedDict()  # by session
        self._closed = False

    def put(self, part: Part) -> None:
        """Raises: LimitExceeded when too much waits."""
        with self._changed:
            others = sum(len(p.keys) for session_id, p in self._waiting.items() if session_id != part.session_id)
            if others + len(part.keys) > QUEUED_KEYS_MAX:
                raise LimitExceeded(
                    f"{others} keys wait to be prefetched and this call has {len(part.keys)}; together they may be "
                    f"{QUEUED_KEYS_MAX}: prefetch less, or later"
                )
            self._waiting[part.session_id] = part
            self._changed.notify()

    def forget(self, session_id: int) -> None:
        with self._changed:
            self._waiting.pop(session_id, None)

    def take(self) -> Part | None:
        """The next few keys, sessions in turns. Waits for some; None: closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if self._closed:
                return None
            session_id, part = self._waiting.popitem(last=False)
            if len(part.keys) > PART_KEYS:
                self._waiting[session_id] = part._replace(keys=part.keys[PART_KEYS:])
            return part._replace(keys=part.keys[:PART_KEYS])

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class Ledger:
    """Records that a prefetch brought and nobody fetched yet. The engine's lock guards it."""

    def __init__(self) -> None:
        self._brought: OrderedDict[tuple[int, int], None] = OrderedDict()  # (session, packed key)
        self.useful = self.wasted = 0

    def __len__(self) -> int:
        return len(self._brought)

    def bring(self, session_id: int, keys: Keys) -> None:
        for key in keys.view("<u8").tolist():
            self._brought[session_id, key] = None
        while len(self._brought) > REMEMBERED_MAX:
            self._brought.popitem(last=False)
            self.wasted += 1

    def fetch(self, session_id: int, keys: Keys) -> None:
        for key in keys.view("<u8").tolist():
            if (session_id, key) in self._brought:
                del self._brought[session_id, key]
                self.useful += 1

    def forget(self, session_id: int) -> None:
        gone = [entry for entry in self._brought if entry[0] == session_id]
        for entry in gone:
            del self._brought[entry]
        self.wasted += len(gone)
