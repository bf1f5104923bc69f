"""The calls that carry payload through shared memory, in plain values: what gRPC and the fast lane do the same way.

One place checks their sizes, borrows their ranges and waits for their turns, so both have the same limits and refuse with
the same sentences.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from hga_kvd import errors
from hga_kvd.answers import Fetched
from hga_kvd.config import Settings
from hga_kvd.engine import Engine
from hga_kvd.geometry import KEY_DTYPE, Keys
from hga_kvd.hits import FEW_KEYS
from hga_kvd.landing import Landing
from hga_kvd.refusals import GivenUp
from hga_kvd.turns import SMALL_BYTES, Turns

U8 = npt.NDArray[np.uint8]

# What a fetch moves in one turn: 2.6 ms of a disk of 1.6 GB/s. A burst of 128 x 32 KiB is one part.
PART_BYTES = 4 << 20
# So much while another client makes small fetches, that is for so long after one. A part is planned in one turn of the
# index's lock and given to the device as a whole, and both are waited for (ADR 35).
PART_BESIDE_SMALL_BYTES = 1 << 20
BESIDE_SMALL_S = 0.1


class Range(NamedTuple):
    """Bytes of a client's region."""

    client_id: int
    offset: int
    bytes: int


class Calls:
    def __init__(
        self,
        engine: Engine,
        landing: Landing,
        settings: Settings,
        observe_fetch: Callable[[float], None] | None,
        observe_wait: Callable[[str, float], None] | None,
    ) -> None:
        self.engine = engine
        self.landing = landing
        self.settings = settings
        self.observe_fetch = observe_fetch
        self.turns = Turns(settings.waiting_calls_max, observe_wait)
        self._small: tuple[Hashable, float] = (None, -BESIDE_SMALL_S)  # whose small fetch came last, and when
        self._few_bytes = KEY_DTYPE.itemsize * min(FEW_KEYS, settings.fetch_keys_max)

    def fetch(
        self,
        session_id: int,
        packed_keys: bytes,
        shared: Range,
        wanted: Callable[[], bool],
        epoch: int = 0,
        deadline_us: int = 0,
        once: bool = False,
    ) -> Fetched:
        """Records into the client's region. wanted: asked once the range is ours. deadline_us: from now on; 0: none.
        once: as Engine.fetch.

        Raises: InvalidRequest, LimitExceeded, SessionNotFound, StaleEpoch, KeyOutOfRange, NotAttached, GivenUp.
        """
        start = time.perf_counter()
        keys, size = self.sized_keys(session_id, packed_keys)
        if not size:
            return Fetched(None, 0, 0)
        if shared.bytes < size:
            raise errors.InvalidRequest(f"the shared range has {shared.bytes} bytes; {len(keys)} records take {size}")
        with self.landing.borrow(shared.client_id, shared.offset, size) as destination:
            end = start + deadline_us * 1e-6 if deadline_us else None
            return self.fetch_in_turns(session_id, shared.client_id, keys, destination, wanted, epoch, start, end, once)

    def fetch_in_turns(
        self,
        session_id: int,
        client: Hashable,
        keys: Keys,
        destination: U8,
        wanted: Callable[[], bool],
        epoch: int,
        start: float,
        end: float | None,
        once: bool = False,
    ) -> Fetched:
        """A fetch in parts, each in its turn. start, end: perf_counter, when it began and what it has until.

        Raises: as fetch.
        """
        tenant, record_bytes = self.engine.tenant(session_id), len(destination) // len(keys)
        if len(destination) <= SMALL_BYTES:
            self._small = client, start
        overdue = None if end is None else lambda: time.perf_counter() >= end
        parts: list[tuple[int, Fetched]] = []
        first = 0
        while first < len(keys):
            part = keys[first : first + max(1, self._part_bytes(client) // record_bytes)]
            into = destination[first * record_bytes : (first + len(part)) * record_bytes]
            with self.turns.turn(tenant, client, len(into), end):
                if not wanted():
                    raise GivenUp
                parts.append((len(part), self.engine.fetch(session_id, part, into, epoch, overdue, once)))
            first += len(part)
        if self.observe_fetch is not None:
            self.observe_fetch(time.perf_counter() - start)
        return parts[0][1] if len(parts) == 1 else _as_one(parts)

    def _part_bytes(self, client: Hashable) -> int:
        small_client, small_at = self._small
        alone = small_client == client or time.perf_counter() - small_at > BESIDE_SMALL_S
        return PART_BYTES if alone else PART_BESIDE_SMALL_BYTES

    def fetch_few(self, session_id: int, packed_keys: bytes, shared: Range, epoch: int) -> int:
        """A few records into the client's region, if RAM has all of them: how many. 0: nothing was done, `fetch` will say
        why not, or get them. Waits for nothing but locks."""
        if len(packed_keys) > self._few_bytes:
            return 0
        start = time.perf_counter()
        self._small = shared.client_id, start
        with self.landing.lock:
            memory = self.landing.unlent(*shared)
            count = 0 if memory is None else self.engine.fetch_few(session_id, packed_keys, memory, epoch)
        if count and self.observe_fetch is not None:
            self.observe_fetch(time.perf_counter() - start)
        return count

    def prefetch(self, session_id: int, packed_keys: bytes, epoch: int = 0) -> None:
        """Raises: InvalidRequest, LimitExceeded, SessionNotFound, StaleEpoch, KeyOutOfRange."""
        keys, size = self.sized_keys(session_id, packed_keys)
        if size:
            self.engine.prefetch(session_id, epoch, keys)

    def sized_keys(self, session_id: int, packed: bytes) -> tuple[Keys, int]:
        """The keys, and the bytes that their records take. Raises: InvalidRequest, LimitExceeded, SessionNotFound."""
        record_bytes = self.engine.record_bytes(session_id)
        count, rest = divmod(len(packed), KEY_DTYPE.itemsize)
        if rest:
            raise errors.InvalidRequest(f"keys has {len(packed)} bytes, not a multiple of {KEY_DTYPE.itemsize}")
        if count > self.settings.fetch_keys_max:
            raise errors.LimitExceeded(
                f"{count} keys; one Fetch may have {self.settings.fetch_keys_max}: split the call"
            )
        size = count * record_bytes
        if size > self.settings.fetch_bytes_max:
            raise errors.LimitExceeded(
                f"{count} records are {size} bytes; one Fetch may have {self.settings.fetch_bytes_max}: split it"
            )
        return np.frombuffer(packed, KEY_DTYPE), size

    def summaries(
        self,
        session_id: int,
        kind: str,
        first_chunk: int,
        chunk_count: int,
        shared: Range,
        wanted: Callable[[], bool],
        epoch: int = 0,
    ) -> tuple[int, int]:
        """Routing state into the client's region: (chunks, bytes).

        Raises: as Engine.read_summaries; NotAttached, GivenUp.
        """
        tenant, client = self.engine.tenant(session_id), shared.client_id
        with self.landing.borrow(*shared) as destination, self.turns.turn(tenant, client, shared.bytes):
            if not wanted():
                raise GivenUp
            return self.engine.read_summaries(session_id, kind, first_chunk, chunk_count, destination, epoch)

    def append(
        self,
        session_id: int,
        first_chunk: int,
        chunk_count: int,
        token_ids: bytes,
        shared: Range,
        wanted: Callable[[], bool],
        epoch: int = 0,
    ) -> int:
        """Chunks from the client's region; returns the session's chunk count.

        Raises: as Engine.append; NotAttached, GivenUp.
        """
        expected = self.engine.append_limit_check(session_id, first_chunk, chunk_count, epoch)
        if shared.bytes != expected:
            raise errors.InvalidRequest(
                f"shared.bytes is {shared.bytes}; {chunk_count} chunks of this session take {expected} bytes"
            )
        place = (session_id, first_chunk, chunk_count)
        with self.landing.borrow(*shared) as payload:
            return self.append_in_turn(*place, shared.client_id, payload, token_ids, wanted, epoch)

    def append_in_turn(
        self,
        session_id: int,
        first_chunk: int,
        chunk_count: int,
        client: Hashable,
        payload: U8,
        token_ids: bytes,
        wanted: Callable[[], bool],
        epoch: int,
    ) -> int:
        """Raises: as Engine.append; LimitExceeded, GivenUp."""
        with self.turns.turn(self.engine.tenant(session_id), client, len(payload)):
            if not wanted():
                raise GivenUp
            return self.engine.append(session_id, first_chunk, chunk_count, payload, token_ids, epoch)


def _as_one(parts: list[tuple[int, Fetched]]) -> Fetched:
    """The answer of a fetch in parts, each with the count of its keys."""
    statuses = None
    if any(part.statuses is not None for _, part in parts):
        each = [np.zeros(count, np.uint8) if part.statuses is None else part.statuses for count, part in parts]
        statuses = np.concatenate(each)
    return Fetched(statuses, sum(part.ram_records for _, part in parts), sum(part.nvme_records for _, part in parts))
