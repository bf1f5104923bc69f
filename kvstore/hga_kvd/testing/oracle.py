"""What the oracle knows: plain objects that hold the guarantee, and what faults excuse.

A chunk is one object however many sessions have it, as in the store: its bytes, its tokens, its summaries.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from hga_kvd.answers import EngineStats, Fetched, SessionInfo
from hga_kvd.checksum import checksum
from hga_kvd.geometry import KEY_DTYPE, Geometry, Keys

U8 = npt.NDArray[np.uint8]


def random_keys(chance: np.random.Generator, geometry: Geometry, chunk_count: int, count: int) -> Keys:
    keys = np.zeros(count, KEY_DTYPE)
    keys["group"] = chance.integers(0, chunk_count * geometry.groups_per_chunk, count)
    keys["kv_head"] = chance.integers(0, geometry.kv_heads, count)
    keys["layer"] = chance.integers(0, geometry.layers, count)
    return keys


def records_of(geometry: Geometry, chunks: U8, keys: Keys) -> U8:
    """What a fetch of `keys` must return. chunks: [chunks, chunk_bytes]."""
    g = geometry
    view = chunks.reshape(len(chunks), g.layers, g.kv_heads, g.groups_per_chunk, g.record_bytes)
    group = keys["group"].astype(np.int64)
    records: U8 = view[group // g.groups_per_chunk, keys["layer"], keys["kv_head"], group % g.groups_per_chunk]
    return records


class Gone(Exception):
    """The daemon went away before it answered: the call has happened or it has not."""


class Store(Protocol):
    """What a trial drives: the engine, or a client that reaches one. Refusals are the engine's errors."""

    def open(
        self,
        name: str,
        geometry: Geometry | None,
        create: bool,
        *,
        tenant: str = "",
        token_ids: bytes = b"",
        ttl_s: int = 0,
    ) -> SessionInfo: ...
    def fork(self, session_id: int, epoch: int, chunk_count: int, name: str) -> SessionInfo: ...
    def truncate(self, session_id: int, epoch: int, chunk_count: int) -> SessionInfo: ...
    def append(
        self, session_id: int, first_chunk: int, chunk_count: int, payload: U8, token_ids: bytes, epoch: int = 0
    ) -> int: ...
    def fetch(self, session_id: int, keys: Keys, destination: U8, epoch: int = 0) -> Fetched: ...
    def flush(self, session_id: int) -> int: ...
    def put_summaries(
        self, session_id: int, kind: str, first_chunk: int, chunk_count: int, payload: bytes, epoch: int = 0
    ) -> None: ...
    def get_summaries(
        self, session_id: int, kind: str, first_chunk: int, chunk_count: int, bytes_max: int, epoch: int = 0
    ) -> tuple[int, bytes]: ...
    def park(self, session_id: int) -> None: ...
    def pin(self, session_id: int, pinned: bool) -> None: ...
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
    # kind -> bytes that may be found, newest last; the first is durable unless it is None: nothing
    summaries: dict[str, list[bytes | None]] = field(default_factory=dict)
    replaced: dict[str, list[bytes]] = field(default_factory=dict)  # those before
    seen_damaged: bool = False  # then nobody shares it by its tokens any more

    def __post_init__(self) -> None:
        self.digest = checksum(self.payload.data)

    def settle(self, kind: str, value: bytes | None) -> None:
        """From now on it is this one."""
        older = [old for old in self.summaries.get(kind, []) if old is not None and old is not value]
        self.replaced.setdefault(kind, []).extend(older)
        self.summaries[kind] = [value]


@dataclass(eq=False)
class Known:
    """What the oracle knows of one session."""

    session_id: int
    name: str
    geometry: Geometry
    chunks: list[Chunk] = field(default_factory=list)
    epoch: int = 0
    durable: bool = False  # it is there after any restart
    durable_chunks: int = 0
    pinned: set[bool] = field(default_factory=lambda: {False})  # what it may be, after pins that did not return well
    deleting: bool = False  # a delete has begun and did not return
    ttl_s: int = 0
    used: set[float] = field(default_factory=set)  # when it was used last: one of these
    idle: bool = False  # nobody has it open
    undo: list[Known] = field(default_factory=list)  # as it was before truncations that did not return well
    shaky: set[int] = field(default_factory=set)  # chunks that a fault may have damaged, if they are found
    # Chunks behind the end that a start did not find, because of a fault: they may be found again until others are
    # appended in their place.
    ghosts: list[Chunk] = field(default_factory=list)

    @property
    def key(self) -> str:
        return self.name or f"#{self.session_id}"

    def use(self, now: float) -> None:
        self.used, self.idle = {now}, False

    def may_expire(self, now: float) -> bool:
        return self.ttl_s > 0 and False in self.pinned and any(now - used >= self.ttl_s for used in self.used)

    def must_expire(self, now: float) -> bool:
        return self.ttl_s > 0 and self.pinned == {False} and all(now - used >= self.ttl_s for used in self.used)

    @property
    def evictable(self) -> bool:
        return bool(self.name and self.chunks) and self.idle and False in self.pinned

    def flushed(self) -> None:
        self.durable, self.durable_chunks = True, len(self.chunks)
        self.undo.clear()
        for chunk in self.chunks:
            for kind, values in chunk.summaries.items():
                chunk.settle(kind, values[-1])

    def before(self) -> Known:
        """A copy, to go back to."""
        copy = replace(self, chunks=list(self.chunks), undo=[], ghosts=list(self.ghosts))
        copy.shaky, copy.pinned, copy.used = set(self.shaky), set(self.pinned), set(self.used)
        return copy

    def cut(self, chunk_count: int) -> None:
        self.epoch += 1
        del self.chunks[chunk_count:]
        self.ghosts.clear()
        self.durable_chunks = min(self.durable_chunks, chunk_count)
        self.shaky = {i for i in self.shaky if i < chunk_count}

    def chained(self) -> int:
        """How many of its first chunks can be found by their tokens."""
        if self.shaky:
            return 0
        ends = (i for i, chunk in enumerate(self.chunks) if not chunk.token_ids or chunk.seen_damaged)
        return next(ends, len(self.chunks))

    def tokens(self, chunk_count: int) -> bytes:
        return b"".join(chunk.token_ids for chunk in self.chunks[:chunk_count])
