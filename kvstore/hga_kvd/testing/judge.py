"""What the oracle says of a store's answers: of every fetch and summary, and of all of it after a start.

What was flushed comes back byte-exact, or damaged where a fault has hit it; what was acknowledged only comes back byte-exact
or is missing at the end of its session; wrong bytes never, and what is gone stays gone: deleted sessions, truncated chunks,
old epochs. A call that the power loss or a failed write cut short has happened or has not, nothing between.
"""

from __future__ import annotations

import random

import numpy as np
import numpy.typing as npt

from hga_kvd.answers import SessionInfo
from hga_kvd.checksum import checksum
from hga_kvd.errors import SessionNotFound
from hga_kvd.geometry import KEY_DTYPE, Keys
from hga_kvd.testing.oracle import Excuses, Known, Store, records_of

U8 = npt.NDArray[np.uint8]


class Clock:
    """Of a store whose time the trial tells. Seconds."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Judge:
    """Of the sessions of one trial on one store."""

    def __init__(
        self, store: Store, excuses: Excuses, chance: random.Random, clock: Clock, prefix: str, evicts: bool
    ) -> None:
        """prefix: of the names of its sessions. evicts: idle ones may go where space is short."""
        self.store = store
        self.known: dict[str, Known] = {}
        self.deleted: set[str] = set()
        self.doubtful: dict[str, Known] = {}  # gone as far as the client knows, but they may come back
        self.excuses = excuses
        self.trace: list[str] = []  # what was done, for the one who reads a failure
        self._opening: dict[str, Known] = {}  # opens and forks that got no answer
        self._chance = chance
        self._clock = clock
        self._prefix = prefix
        self._evicts = evicts

    def note_evicted(self) -> None:
        """Those that the store gave up for space: it may."""
        if not self._evicts:
            return
        left = {info.session_id for info in self.store.list()}
        for known in list(self.known.values()):
            if known.name and known.session_id not in left:
                assert known.evictable, f"{known.key} is gone: it is open or pinned"
                known.deleting = True
                self._lose(known, certainly=False)
                self.trace[-1] += f" evicted {known.key}"

    def _lose(self, known: Known, certainly: bool) -> None:
        """It is gone; certainly: for ever, else the next start may find it again."""
        del self.known[known.key]
        if certainly:
            self.deleted.add(known.name)
        elif known.name:
            self.doubtful[known.key] = known

    def _room(self, known: Known, count: int) -> U8:
        """Where to fetch to. A destination that is not aligned takes the other road from disk."""
        skew = self._chance.choice((0, 0, 1, 8))
        return np.zeros(count * known.geometry.record_bytes + skew, np.uint8)[skew:]

    def check_fetch(self, known: Known, keys: Keys) -> None:
        size, destination = known.geometry.record_bytes, self._room(known, len(keys))
        known.use(self._clock.now)
        fetched = self.store.fetch(known.session_id, keys, destination, known.epoch)
        good = np.ones(len(keys), bool) if fetched.statuses is None else fetched.statuses == 0
        assert fetched.ram_records + fetched.nvme_records == np.count_nonzero(good)
        expected = records_of(known.geometry, np.array([chunk.payload for chunk in known.chunks]), keys)
        wrong = np.flatnonzero((destination.reshape(len(keys), size) != expected).any(1) & good)
        assert not len(wrong), f"wrong bytes: {known.key}, keys {keys[wrong][:3].tolist()}"
        for chunk in np.unique(keys["group"][~good] // known.geometry.groups_per_chunk).tolist():
            excused = chunk in known.shaky or self.excuses.bytes(known.chunks[chunk].digest)
            assert excused, f"chunk {chunk} of {known.key} is damaged and nothing has hit it"
            known.chunks[chunk].seen_damaged = True

    def check(self, known: Known) -> None:
        """Every record and every summary of the session."""
        info = self.store.info(known.session_id)
        assert info.chunk_count == len(known.chunks), f"{known.key} has {info.chunk_count} chunks"
        token_ids = [chunk.token_ids for chunk in known.chunks]
        expected = b"".join(token_ids) if all(token_ids) else b""
        assert info.token_ids == expected or (known.shaky and not info.token_ids), known.key
        if known.chunks:
            g = known.geometry
            keys = np.zeros((len(known.chunks) * g.groups_per_chunk, g.kv_heads, g.layers), KEY_DTYPE)
            keys["group"] = np.arange(keys.shape[0])[:, None, None]
            keys["kv_head"] = np.arange(g.kv_heads)[:, None]
            keys["layer"] = np.arange(g.layers)
            self.check_fetch(known, keys.reshape(-1))

    def check_all(self) -> None:
        for known in self.known.values():
            self.check(known)

    def chunk_count(self) -> int | None:
        """How many chunks the store must hold, each counted once; None where faults leave that open."""
        sessions = self.known.values()
        if any(known.shaky or known.ghosts for known in sessions):
            return None
        return len({chunk for known in sessions for chunk in known.chunks})

    def _check_summary(self, known: Known, kind: str, at: int, allowed: list[bytes | None]) -> bytes | None:
        found: bytes | None
        chunk = known.chunks[at]
        try:
            count, found = self.store.get_summaries(known.session_id, kind, at, 1, 1 << 20, known.epoch)
            assert count == 1
        except SessionNotFound:
            found = None
        if found in allowed:
            return found
        where = f"summary {kind} of chunk {at} of {known.key}"
        # Any older value that is allowed too may be the one that was hit: then the newer ones were never written.
        hit = at in known.shaky or any(self.excuses.bytes(checksum(value)) for value in allowed if value is not None)
        # Where the frame of a summary is lost, the one that it replaced counts (docs/format.md, "Downsides").
        assert found is None or (hit and found in chunk.replaced.get(kind, [])), f"wrong bytes: {where}"
        assert hit, f"{where} is missing and nothing has hit it"
        return found

    def stopped(self) -> None:
        """The daemon came to an orderly end: all that has a name is durable."""
        for known in self.known.values():
            if known.name:
                known.flushed()

    def restarted(self, store: Store) -> None:
        """The daemon came back: judges what it still has, and goes on with that."""
        self.store = store
        found = {info.name: info for info in store.list() if info.name.startswith(self._prefix)}
        back = self.deleted & set(found) - {""}
        assert not back, f"deleted sessions came back: {back}"
        for name in self._opening.keys() & found.keys():
            self._opening[name].session_id = found[name].session_id
            self.known[name] = self._opening[name]
        self._opening.clear()
        self.known.update(self.doubtful)
        self.doubtful.clear()
        for key, known in list(self.known.items()):
            info = found.pop(known.name, None) if known.name else None
            if info is None:
                allowed = known.deleting or (self._evicts and known.evictable)
                assert not known.durable or allowed, f"{key} was flushed and is gone"
                del self.known[key]
                self.deleted.add(known.name)
            else:
                self.known[key] = self._judge(known, info)
        assert not found, f"sessions that nobody opened: {sorted(found)}"
        self.check_all()

    def _judge(self, known: Known, info: SessionInfo) -> Known:
        versions = [version for version in (known, *known.undo) if version.epoch == info.epoch]
        assert versions, f"{known.key} is in epoch {info.epoch}, not {known.epoch}"
        known = versions[0]
        known.deleting, known.undo, known.idle = False, [], True
        known.used |= {self._clock.now}  # after a crash the start counts as use
        assert info.ttl_s == known.ttl_s
        assert info.pinned in known.pinned, f"{known.key} is {'' if info.pinned else 'not '}pinned"
        known.pinned = {info.pinned}
        assert (info.session_id, info.geometry) == (known.session_id, known.geometry), known.key
        shaken = self.excuses.start() or self.excuses.session(known.session_id)
        chunks = known.chunks + known.ghosts
        hit = {i for i, chunk in enumerate(chunks) if shaken or self.excuses.bytes(chunk.digest)}
        certain = known.durable_chunks
        while certain and (certain - 1 in hit or certain - 1 in known.shaky):
            certain -= 1
        assert certain <= info.chunk_count <= len(chunks), (
            f"{known.key} has {info.chunk_count} chunks: {known.durable_chunks} were flushed, {len(known.chunks)} "
            f"acknowledged, and those up to {certain} were not hit"
        )
        known.chunks, rest = chunks[: info.chunk_count], chunks[info.chunk_count :]
        known.ghosts = rest if hit or known.ghosts else []
        known.shaky = {i for i in known.shaky | hit if i < info.chunk_count}
        assert info.damaged_records == 0 or known.shaky, f"{known.key} has {info.damaged_records} damaged records"
        for at, chunk in enumerate(known.chunks):
            for kind, values in list(chunk.summaries.items()):
                value = self._check_summary(known, kind, at, values)
                if at not in known.shaky:
                    chunk.settle(kind, value)
        known.durable, known.durable_chunks = True, info.durable_chunk_count
        return known
