"""A seeded workload against an engine, and the oracle that judges it: plain dictionaries that hold the guarantee.

What was flushed must come back byte-exact, or be reported damaged where the test damaged it; what was acknowledged only
must come back byte-exact or be missing at the end of its session; wrong bytes never. Everything follows from the seed,
so a failure replays from the number it prints.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from hga_kvd.answers import SessionInfo
from hga_kvd.engine import Engine
from hga_kvd.errors import LimitExceeded, SessionNotFound, StaleEpoch, StorageFull, WriteFailed
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


@dataclass(eq=False)
class Chunk:
    """What the oracle knows of one chunk, by uid: sessions share it as the engine's do."""

    payload: U8
    token_ids: bytes  # empty: unknown
    # Summaries that may be found, newest last; the first is durable unless it is None: nothing
    summaries: list[bytes | None] = field(default_factory=lambda: [None])


@dataclass(frozen=True)
class Past:
    """What a session was before a truncation that may be undone at the next start."""

    uids: tuple[int, ...]
    durable_chunks: int


@dataclass
class Known:
    """What the oracle knows of one session."""

    session_id: int
    name: str
    geometry: Geometry
    tenant: str = ""
    epoch: int = 0
    uids: list[int] = field(default_factory=list)
    durable_chunks: int = 0
    durable: bool = False  # a flush of it returned
    past: dict[int, Past] = field(default_factory=dict)  # by epoch

    @property
    def key(self) -> str:
        return self.name or f"#{self.session_id}"


def _common(a: list[bytes], b: list[bytes]) -> int:
    """How many chunks two sequences have in common from the start on."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


SUMMARY_BYTES = 300
SESSIONS_MAX = 8
# fmt: off
STEPS = (
    "append", "append", "append", "fetch", "fetch", "fetch", "flush", "put", "get", "open", "delete",
    "fork", "truncate", "resume", "repeat", "stale",
)
# fmt: on


class Workload:
    """Drives `engine` step by step. `faulty`: refusals for lack of space or a failed write are part of the game."""

    def __init__(self, engine: Engine, seed: int, geometries: tuple[Geometry, ...], faulty: bool = False) -> None:
        self.engine = engine
        self.known: dict[str, Known] = {}  # by name; temporary ones under "#id"
        self.chunks: dict[int, Chunk] = {}  # by uid
        self.deleted: set[str] = set()
        self.reads_may_fail = False  # the device is broken: records may be damaged, wrong bytes still never
        self._geometries = geometries
        self._chance = random.Random(seed)
        self._numbers = np.random.default_rng(seed)
        self._faulty = faulty
        self._steps: dict[str, Callable[[], None]] = {step: getattr(self, f"_{step}") for step in STEPS}

    def run(self, steps: int) -> None:
        for _ in range(steps):
            step = self._chance.choice(STEPS)
            try:
                self._steps[step]()
            except (StorageFull, WriteFailed):
                if not self._faulty:
                    raise

    def pick(self) -> Known | None:
        return self._chance.choice(list(self.known.values())) if self.known else None

    def _new_name(self) -> str:
        return f"s{self._numbers.integers(1 << 40)}" if self._chance.random() < 0.8 else ""

    def _add(self, info: SessionInfo, tenant: str) -> Known:
        assert info.created
        assert info.epoch == 0
        known = Known(info.session_id, info.name, info.geometry, tenant, uids=self._uids(info.session_id))
        assert len(known.uids) == info.chunk_count
        self.known[known.key] = known
        return known

    def _uids(self, session_id: int) -> list[int]:
        """Which chunks the engine says the session has. Sharing is the engine's choice; what is shared must be equal."""
        session = self.engine._residency.session(session_id)
        uids: list[int] = session.table.uid[session.all_rows()].tolist()
        return uids

    def _open(self) -> None:
        if len(self.known) < SESSIONS_MAX:
            geometry, tenant = self._chance.choice(self._geometries), self._chance.choice(("", "", "other"))
            info = self.engine.open(self._new_name(), geometry, create=True, tenant=tenant)
            assert self._add(info, tenant).uids == []

    def _append(self) -> None:
        known = self.pick()
        if known is None:
            return self._open()
        count = self._chance.randint(1, 4)
        payload = self._numbers.integers(0, 256, (count, known.geometry.chunk_bytes), dtype=np.uint8)
        # Few different tokens, so that sequences with equal beginnings and other bytes come up.
        tokens = [bytes([self._chance.randrange(2)] * (4 * known.geometry.chunk_tokens)) for _ in range(count)]
        return self._append_these(known, payload, [] if self._chance.random() < 0.1 else tokens)

    def _append_these(self, known: Known, payload: U8, tokens: list[bytes]) -> None:
        first, count = len(known.uids), len(payload)
        try:
            end = self.engine.append(known.session_id, first, count, payload.reshape(-1), b"".join(tokens), known.epoch)
        except LimitExceeded:
            return
        assert end == first + count
        for i, uid in enumerate(self._uids(known.session_id)[first:]):
            token_ids = tokens[i] if tokens else b""
            shared = self.chunks.setdefault(uid, Chunk(payload[i].copy(), token_ids))
            assert (shared.payload == payload[i]).all(), "a chunk is shared that has other bytes"
            assert shared.token_ids == token_ids
            known.uids.append(uid)

    def _repeat(self) -> None:
        """Another session computes the same chunks again."""
        other, known = self.pick(), self.pick()
        if other is None or known is None or other.geometry != known.geometry or len(other.uids) <= len(known.uids):
            return
        chunks = [self.chunks[uid] for uid in other.uids[len(known.uids) :][:3]]
        tokens = [chunk.token_ids for chunk in chunks]
        self._append_these(known, np.array([c.payload for c in chunks]), tokens if all(tokens) else [])

    def _resume(self) -> None:
        """A new session opens with the tokens of another one: it starts with the longest stored prefix."""
        other = self.pick()
        if other is None or len(self.known) >= SESSIONS_MAX:
            return
        tokens = self._known_tokens(other)[: self._chance.randint(0, 6)]
        wanted = b"".join(tokens) + self._numbers.bytes(4 * self._chance.randint(0, 9))
        tenant = other.tenant if self._chance.random() < 0.8 else "third"
        stored = max(
            _common(tokens, self._known_tokens(k))
            for k in [*self.known.values(), Known(0, "", other.geometry, tenant)]
            if (k.tenant, k.geometry) == (tenant, other.geometry)
        )
        info = self.engine.open(self._new_name(), other.geometry, create=True, tenant=tenant, token_ids=wanted)
        known = self._add(info, tenant)
        assert len(known.uids) == stored or (len(known.uids) < stored and self.reads_may_fail)
        assert [self.chunks[uid].token_ids for uid in known.uids] == tokens[: len(known.uids)]

    def _known_tokens(self, known: Known) -> list[bytes]:
        """By chunk, as far as they are known from the first on."""
        tokens = [self.chunks[uid].token_ids for uid in known.uids]
        return tokens[: tokens.index(b"")] if b"" in tokens else tokens

    def _fork(self) -> None:
        known = self.pick()
        if known is None or len(self.known) >= SESSIONS_MAX:
            return
        count = self._chance.randint(0, len(known.uids))
        info = self.engine.fork(known.session_id, known.epoch, count, self._new_name())
        assert self._add(info, known.tenant).uids == known.uids[: count or None]

    def _truncate(self) -> None:
        known = self.pick()
        if known is None:
            return
        count = self._chance.randint(0, len(known.uids))
        before = Past(tuple(known.uids), known.durable_chunks if known.durable else 0)
        epoch, failed = known.epoch, True
        try:
            info = self.engine.truncate(known.session_id, known.epoch, count)
            assert (info.epoch, info.chunk_count) == (epoch + 1, count)
            failed = False
        finally:  # a truncation that could not be made durable is done all the same
            known.epoch, known.uids = epoch + 1, known.uids[:count]
            known.durable_chunks = min(known.durable_chunks, count)
            known.past = {**known.past, epoch: before} if failed else {}

    def _stale(self) -> None:
        """Requests of an epoch that is over are refused."""
        known = self.pick()
        if known is None or not known.epoch:
            return
        old, g = self._chance.randrange(known.epoch), known.geometry
        keys, record, chunk = (
            np.zeros(1, KEY_DTYPE),
            np.zeros(g.record_bytes, np.uint8),
            np.zeros(g.chunk_bytes, np.uint8),
        )
        calls: tuple[Callable[[], object], ...] = (
            lambda: self.engine.fetch(known.session_id, keys, record, old),
            lambda: self.engine.append(known.session_id, len(known.uids), 1, chunk, b"", old),
            lambda: self.engine.truncate(known.session_id, old, 0),
            lambda: self.engine.fork(known.session_id, old, 0, ""),
            lambda: self.engine.put_summaries(known.session_id, "k.v1", 0, 1, b"x", old),
        )
        for call in calls:
            try:
                call()
            except StaleEpoch:
                continue
            raise AssertionError(f"a request of epoch {old} was served in epoch {known.epoch}")

    def _fetch(self) -> None:
        known = self.pick()
        if known is not None and known.uids:
            self.check_fetch(known, self._chance.choice((1, 7, 60)))

    def check_fetch(self, known: Known, count: int) -> None:
        keys = random_keys(self._numbers, known.geometry, len(known.uids), count)
        size = known.geometry.record_bytes
        # A destination that is not aligned takes the other road from disk.
        skew = self._chance.choice((0, 0, 1, 8))
        destination = np.zeros(count * size + skew, np.uint8)[skew:]
        fetched = self.engine.fetch(known.session_id, keys, destination, known.epoch)
        good = np.ones(count, bool) if fetched.statuses is None else fetched.statuses == 0
        assert good.all() or self.reads_may_fail
        assert fetched.ram_records + fetched.nvme_records == np.count_nonzero(good)
        expected = records_of(known.geometry, np.array([self.chunks[uid].payload for uid in known.uids]), keys)
        assert (destination.reshape(count, size) == expected)[good].all(), known.name

    def _flush(self) -> None:
        known = self.pick()
        if known is not None and known.name:
            self.flush(known)

    def flush(self, known: Known) -> None:
        assert self.engine.flush(known.session_id) == len(known.uids)
        known.durable, known.durable_chunks, known.past = True, len(known.uids), {}
        for uid in known.uids:
            self.chunks[uid].summaries = self.chunks[uid].summaries[-1:]

    def _put(self) -> None:
        known = self.pick()
        if known is None or not known.uids:
            return
        first = self._chance.randrange(len(known.uids))
        count = self._chance.randint(1, len(known.uids) - first)
        payload = self._numbers.bytes(count * SUMMARY_BYTES)
        self.engine.put_summaries(known.session_id, "k.v1", first, count, payload, known.epoch)
        for i, uid in enumerate(known.uids[first : first + count]):
            self.chunks[uid].summaries.append(payload[i * SUMMARY_BYTES : (i + 1) * SUMMARY_BYTES])

    def _get(self) -> None:
        known = self.pick()
        if known is None:
            return
        for i, uid in enumerate(known.uids):
            self._check_summary(known, i, self.chunks[uid].summaries[-1:])

    def _check_summary(self, known: Known, chunk: int, allowed: list[bytes | None]) -> bytes | None:
        try:
            count, found = self.engine.get_summaries(known.session_id, "k.v1", chunk, 1, 1 << 20, known.epoch)
            assert count == 1
        except SessionNotFound:
            found = None
        assert found in allowed or (found is None and self.reads_may_fail), (known.name, chunk)
        return found

    def _delete(self) -> None:
        known = self.pick()
        if known is None or self._chance.random() < 0.5:
            return
        try:
            self.engine.delete(known.session_id)
        except WriteFailed:
            del self.known[known.key]  # it may come back
            raise
        del self.known[known.key]
        self.deleted.add(known.name)

    def check_all(self) -> None:
        for known in self.known.values():
            info = self.engine.info(known.session_id)
            assert (info.chunk_count, info.epoch) == (len(known.uids), known.epoch)
            assert self._uids(known.session_id) == known.uids
            tokens = [self.chunks[uid].token_ids for uid in known.uids]
            assert info.token_ids == (b"".join(tokens) if all(tokens) else b"")
            if known.uids:
                self.check_fetch(known, 30)
        had = {uid for known in self.known.values() for uid in known.uids}
        assert had == {uid for info in self.engine.list() for uid in self._uids(info.session_id)}
        assert self.engine.stats().chunks == len(had), "chunks are stored that no session has"

    def after_restart(self, engine: Engine) -> None:
        """The daemon came back with another engine: judges what it still has, and goes on with that."""
        self.engine = engine
        found = {info.name: info for info in engine.list()}
        assert not self.deleted & set(found) - {""}, "a deleted session came back"
        for key, known in list(self.known.items()):
            info = found.pop(known.name, None) if known.name else None
            if info is None:
                assert not known.durable, f"{key} was flushed and is gone"
                del self.known[key]
                continue
            assert (info.session_id, info.geometry, info.tenant) == (known.session_id, known.geometry, known.tenant)
            assert info.damaged_records == 0
            if info.epoch != known.epoch:
                assert info.epoch in known.past, f"{key}: epoch {info.epoch} is over"
                known.epoch, known.uids = info.epoch, list(known.past[info.epoch].uids)
                known.durable_chunks = known.past[info.epoch].durable_chunks
            known.past = {}
            assert known.durable_chunks <= info.chunk_count <= len(known.uids), key
            del known.uids[info.chunk_count :]
            assert self._uids(known.session_id) == known.uids
            known.durable, known.durable_chunks = True, info.durable_chunk_count
        for info in found.values():  # its deletion failed and the start undid it
            self.engine.delete(info.session_id)
        # A summary may be any of those put since the last flush.
        for known in self.known.values():
            for i, uid in enumerate(known.uids):
                chunk = self.chunks[uid]
                chunk.summaries = [self._check_summary(known, i, chunk.summaries)]
        self.check_all()
