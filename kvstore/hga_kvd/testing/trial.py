"""One workload generator and one oracle for every ring: pure engine, simulated disk, real process.

The oracle is plain dictionaries that hold the guarantee. What was flushed comes back byte-exact, or damaged where a fault
has hit it; what was acknowledged only comes back byte-exact or is missing at the end of its session; wrong bytes never,
and what is gone stays gone. A call that the power loss or a failed write cut short has happened or has not, nothing
between. Everything follows from the seed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from hga_kvd.answers import EngineStats, Fetched, SessionInfo
from hga_kvd.checksum import checksum
from hga_kvd.errors import LimitExceeded, SessionNotFound, StorageFull, WriteFailed
from hga_kvd.geometry import KEY_DTYPE, Geometry, Keys
from hga_kvd.testing.workload import records_of

U8 = npt.NDArray[np.uint8]

SUMMARY_BYTES = 300
SUMMARY_KINDS = ("k.v1", "sketch.v1:0f3c")
SESSIONS_MAX = 6


class Gone(Exception):
    """The daemon went away before it answered: the call has happened or it has not."""


class Store(Protocol):
    """What a trial drives: the engine, or a client that reaches one. Refusals are the engine's errors."""

    def open(self, name: str, geometry: Geometry | None, create: bool) -> SessionInfo: ...
    def append(self, session_id: int, first_chunk: int, chunk_count: int, payload: U8, token_ids: bytes) -> int: ...
    def fetch(self, session_id: int, keys: Keys, destination: U8) -> Fetched: ...
    def flush(self, session_id: int) -> int: ...
    def put_summaries(self, session_id: int, kind: str, first_chunk: int, chunk_count: int, payload: bytes) -> None: ...
    def get_summaries(
        self, session_id: int, kind: str, first_chunk: int, chunk_count: int, bytes_max: int
    ) -> tuple[int, bytes]: ...
    def close(self, session_id: int) -> None: ...
    def delete(self, session_id: int) -> None: ...
    def list(self) -> list[SessionInfo]: ...
    def info(self, session_id: int) -> SessionInfo: ...
    def stats(self) -> EngineStats: ...


class Excuses(Protocol):
    """What faults have done to the disk, as far as the oracle has to forgive it."""

    def start(self) -> bool:
        """Faults that pass have struck the last start more than once: it may have missed anything."""

    def session(self, session_id: int) -> bool:
        """What says which chunks this session has was hit."""

    def bytes(self, digest: int) -> bool:
        """The chunk or summary with these bytes was hit, or is being read by an unlucky call."""


class NoExcuses:
    def start(self) -> bool:
        return False

    def session(self, session_id: int) -> bool:
        return False

    def bytes(self, digest: int) -> bool:
        return False


@dataclass(eq=False)
class Chunk:
    payload: U8  # [chunk_bytes]
    token_ids: bytes  # empty: unknown

    def __post_init__(self) -> None:
        self.digest = checksum(self.payload.data)


@dataclass(eq=False)
class Known:
    """What the oracle knows of one session."""

    session_id: int
    name: str
    geometry: Geometry
    chunks: list[Chunk] = field(default_factory=list)
    durable: bool = False  # it is there after any restart
    durable_chunks: int = 0
    # (kind, chunk) -> bytes that may be found, newest last; the first is durable unless it is None: nothing
    summaries: dict[tuple[str, int], list[bytes | None]] = field(default_factory=dict)
    replaced: dict[tuple[str, int], list[bytes]] = field(default_factory=dict)  # summaries before those
    deleting: bool = False  # a delete has begun and did not return
    shaky: set[int] = field(default_factory=set)  # chunks that a fault may have damaged, if they are found
    # Chunks behind the end that a start did not find, because of a fault: they may be found again until others are
    # appended in their place.
    ghosts: list[Chunk] = field(default_factory=list)

    @property
    def key(self) -> str:
        return self.name or f"#{self.session_id}"

    def flushed(self) -> None:
        self.durable, self.durable_chunks = True, len(self.chunks)
        for at, values in self.summaries.items():
            self.replaced.setdefault(at, []).extend(value for value in values[:-1] if value is not None)
            del values[:-1]


# Every step and how often it is taken.
STEPS = {"append": 6, "fetch": 4, "flush": 3, "put": 2, "get": 2, "open": 1, "delete": 1, "close": 1}


class Trial:
    """Drives `store` step by step. With `refusals`, lack of space and failed writes are part of the game."""

    def __init__(
        self,
        store: Store,
        seed: int,
        geometries: tuple[Geometry, ...],
        *,
        refusals: bool = False,
        excuses: Excuses | None = None,
        prefix: str = "s",
    ) -> None:
        """prefix: of the names of its sessions; those with another are not its business."""
        self.store = store
        self.known: dict[str, Known] = {}
        self.deleted: set[str] = set()
        self.session_ids: set[int] = set()
        self.doubtful: dict[str, Known] = {}  # deleted as far as the client knows, but they may come back
        self.excuses = excuses or NoExcuses()
        self.refusals = refusals
        self.trace: list[str] = []  # what was done, for the one who reads a failure
        self._geometries = geometries
        self._prefix = prefix
        self._opening: dict[str, Geometry] = {}  # opens that got no answer
        self._chance = random.Random(f"trial {seed}")
        self._steps: dict[str, Callable[[], str]] = {step: getattr(self, f"_{step}") for step in STEPS}

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.step()

    def step(self) -> None:
        name = self._chance.choices(tuple(STEPS), tuple(STEPS.values()))[0]
        self.trace.append(name)
        try:
            self.trace[-1] += " " + self._steps[name]()
        except (StorageFull, WriteFailed) as error:
            self.trace[-1] += f" refused: {error!r}"
            if not self.refusals:
                raise

    # --- steps; each returns what it did ---

    def _pick(self) -> Known | None:
        return self._chance.choice(list(self.known.values())) if self.known else None

    def _open(self) -> str:
        if len(self.known) >= SESSIONS_MAX:
            return "nothing: there are enough"
        geometry = self._chance.choice(self._geometries)
        name = f"{self._prefix}{self._chance.randrange(1 << 40)}" if self._chance.random() < 0.85 else ""
        try:
            info = self.store.open(name, geometry, create=True)
        except Gone:
            self._opening[name] = geometry
            raise
        assert info.created
        assert info.chunk_count == 0
        assert info.session_id not in self.session_ids, "a session id was used twice"
        self.session_ids.add(info.session_id)
        known = Known(info.session_id, name, geometry)
        self.known[known.key] = known
        return known.key

    def _append(self) -> str:
        known = self._pick()
        if known is None:
            return self._open()
        count, geometry = self._chance.randint(1, 3), known.geometry
        first = len(known.chunks)
        payload = np.frombuffer(self._chance.randbytes(count * geometry.chunk_bytes), np.uint8)
        tokens = self._chance.randbytes(4 * count * geometry.chunk_tokens) if self._chance.random() < 0.8 else b""
        each = len(tokens) // count
        chunks = [Chunk(part, tokens[i * each : (i + 1) * each]) for i, part in enumerate(payload.reshape(count, -1))]
        try:
            assert self.store.append(known.session_id, first, count, payload, tokens) == first + count
        except LimitExceeded as error:
            return repr(error)
        except Gone:
            known.ghosts = chunks
            raise
        known.chunks += chunks
        known.ghosts.clear()
        return f"{known.key} [{first}, {first + count})"

    def _fetch(self) -> str:
        known = self._pick()
        if known is None or not known.chunks:
            return "nothing"
        geometry, count = known.geometry, self._chance.choice((1, 7, 40))
        keys = np.zeros(count, KEY_DTYPE)
        numbers = np.random.default_rng(self._chance.randrange(1 << 30))
        keys["group"] = numbers.integers(0, len(known.chunks) * geometry.groups_per_chunk, count)
        keys["kv_head"] = numbers.integers(0, geometry.kv_heads, count)
        keys["layer"] = numbers.integers(0, geometry.layers, count)
        self.check_fetch(known, keys)
        return f"{known.key}: {count} keys"

    def _flush(self) -> str:
        known = self._pick()
        if known is None or not known.name:
            return "nothing"
        assert self.store.flush(known.session_id) == len(known.chunks)
        known.flushed()
        return known.key

    def _put(self) -> str:
        known = self._pick()
        if known is None or not known.chunks:
            return "nothing"
        first = self._chance.randrange(len(known.chunks))
        count = self._chance.randint(1, len(known.chunks) - first)
        kind, payload = self._chance.choice(SUMMARY_KINDS), self._chance.randbytes(count * SUMMARY_BYTES)
        # From here on, not from when it returns: it may be written out and the power lost before that.
        for i in range(count):
            values = known.summaries.setdefault((kind, first + i), [None])
            values.append(payload[i * SUMMARY_BYTES : (i + 1) * SUMMARY_BYTES])
        try:
            self.store.put_summaries(known.session_id, kind, first, count, payload)
        except (StorageFull, WriteFailed):
            for i in range(count):
                known.summaries[kind, first + i].pop()
            raise
        return f"{known.key} {kind} [{first}, {first + count})"

    def _get(self) -> str:
        known = self._pick()
        if known is None:
            return "nothing"
        for kind in SUMMARY_KINDS:
            chunks = range(len(known.chunks))
            for chunk in self._chance.sample(chunks, min(2, len(chunks))):
                self._check_summary(known, kind, chunk, known.summaries.get((kind, chunk), [None])[-1:])
        return known.key

    def _delete(self) -> str:
        known = self._pick()
        if known is None or self._chance.random() < 0.5:
            return "nothing"
        with self._deleting(known):
            self.store.delete(known.session_id)
        return known.key

    def _close(self) -> str:
        known = self._pick()
        if known is None:
            return "nothing"
        if known.name:
            self.store.close(known.session_id)
        else:
            with self._deleting(known):
                self.store.close(known.session_id)
        return known.key

    @contextmanager
    def _deleting(self, known: Known) -> Iterator[None]:
        """The session is gone when this ends well, and may come back when it does not."""
        known.deleting = True
        try:
            yield
        except WriteFailed:
            del self.known[known.key]
            if known.name:
                self.doubtful[known.key] = known
            raise
        del self.known[known.key]
        self.deleted.add(known.name)

    # --- checks ---

    def check_fetch(self, known: Known, keys: Keys) -> None:
        size = known.geometry.record_bytes
        # A destination that is not aligned takes the other road from disk.
        skew = self._chance.choice((0, 0, 1, 8))
        destination = np.zeros(len(keys) * size + skew, np.uint8)[skew:]
        fetched = self.store.fetch(known.session_id, keys, destination)
        good = np.ones(len(keys), bool) if fetched.statuses is None else fetched.statuses == 0
        assert fetched.ram_records + fetched.nvme_records == np.count_nonzero(good)
        expected = records_of(known.geometry, np.array([chunk.payload for chunk in known.chunks]), keys)
        wrong = np.flatnonzero((destination.reshape(len(keys), size) != expected).any(1) & good)
        assert not len(wrong), f"wrong bytes: {known.key}, keys {keys[wrong][:3].tolist()}"
        for chunk in np.unique(keys["group"][~good] // known.geometry.groups_per_chunk).tolist():
            excused = chunk in known.shaky or self.excuses.bytes(known.chunks[chunk].digest)
            assert excused, f"chunk {chunk} of {known.key} is damaged and nothing has hit it"

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

    def _check_summary(self, known: Known, kind: str, chunk: int, allowed: list[bytes | None]) -> bytes | None:
        found: bytes | None
        try:
            count, found = self.store.get_summaries(known.session_id, kind, chunk, 1, 1 << 20)
            assert count == 1
        except SessionNotFound:
            found = None
        if found in allowed:
            return found
        where = f"summary {kind} of chunk {chunk} of {known.key}"
        # Any older value that is allowed too may be the one that was hit: then the newer ones were never written.
        hit = chunk in known.shaky or any(self.excuses.bytes(checksum(value)) for value in allowed if value is not None)
        # Where the frame of a summary is lost, the one that it replaced counts (docs/format.md, "Downsides").
        assert found is None or (hit and found in known.replaced.get((kind, chunk), [])), f"wrong bytes: {where}"
        assert hit, f"{where} is missing and nothing has hit it"
        return found

    def restarted(self, store: Store) -> None:
        """The daemon came back: judges what it still has, and goes on with that."""
        self.store = store
        found = {info.name: info for info in store.list() if info.name.startswith(self._prefix)}
        for name in self._opening.keys() & found.keys():
            self.known[name] = Known(found[name].session_id, name, self._opening[name])
        self._opening.clear()
        back = self.deleted & set(found) - {""}
        assert not back, f"deleted sessions came back: {back}"
        self.known.update(self.doubtful)
        self.doubtful.clear()
        for key, known in list(self.known.items()):
            info = found.pop(known.name, None) if known.name else None
            if info is None:
                assert not known.durable or known.deleting, f"{key} was flushed and is gone"
                del self.known[key]
                self.deleted.add(known.name)
            else:
                known.deleting = False
                self._judge(known, info)
        assert not found, f"sessions that nobody opened: {sorted(found)}"
        self.check_all()

    def _judge(self, known: Known, info: SessionInfo) -> None:
        assert (info.session_id, info.geometry) == (known.session_id, known.geometry), known.key
        shaken = self.excuses.start() or self.excuses.session(known.session_id)
        chunks = known.chunks + known.ghosts
        hit = {i for i, chunk in enumerate(chunks) if shaken or self.excuses.bytes(chunk.digest)}
        certain = known.durable_chunks
        while certain and (certain - 1 in hit or certain - 1 in known.shaky):
            certain -= 1
        high = len(chunks)
        assert certain <= info.chunk_count <= high, (
            f"{known.key} has {info.chunk_count} chunks: {known.durable_chunks} were flushed, {len(known.chunks)} "
            f"acknowledged, and those up to {certain} were not hit"
        )
        known.chunks, rest = chunks[: info.chunk_count], chunks[info.chunk_count :]
        known.ghosts = rest if hit or known.ghosts else []
        known.shaky = {i for i in known.shaky | hit if i < info.chunk_count}
        assert info.damaged_records == 0 or known.shaky, f"{known.key} has {info.damaged_records} damaged records"
        for at, values in list(known.summaries.items()):
            if at[1] >= info.chunk_count:
                del known.summaries[at]
            else:
                known.summaries[at] = [self._check_summary(known, *at, values)]
                known.replaced.setdefault(at, []).extend(value for value in values if value is not None)
        known.durable, known.durable_chunks = True, info.durable_chunk_count
