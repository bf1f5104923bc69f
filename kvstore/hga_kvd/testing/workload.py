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

from hga_kvd.engine import Engine
from hga_kvd.errors import LimitExceeded, SessionNotFound, StorageFull, WriteFailed
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


@dataclass
class Known:
    """What the oracle knows of one session."""

    session_id: int
    name: str
    geometry: Geometry
    chunks: list[U8] = field(default_factory=list)
    token_ids: list[bytes] = field(default_factory=list)
    durable_chunks: int = 0
    durable: bool = False  # a flush of it returned
    # chunk -> bytes that may be found, newest last; the first is durable unless it is None: nothing
    summaries: dict[int, list[bytes | None]] = field(default_factory=dict)

    def flushed(self) -> None:
        self.durable, self.durable_chunks = True, len(self.chunks)
        self.summaries = {chunk: values[-1:] for chunk, values in self.summaries.items()}

    def array(self) -> U8:
        return np.array(self.chunks) if self.chunks else np.zeros((0, self.geometry.chunk_bytes), np.uint8)


SUMMARY_BYTES = 300
STEPS = ("append", "append", "append", "fetch", "fetch", "fetch", "flush", "put", "get", "open", "delete")


class Workload:
    """Drives `engine` step by step. `faulty`: refusals for lack of space or a failed write are part of the game."""

    def __init__(self, engine: Engine, seed: int, geometries: tuple[Geometry, ...], faulty: bool = False) -> None:
        self.engine = engine
        self.known: dict[str, Known] = {}  # by name; temporary ones under "#id"
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

    def _open(self) -> None:
        if len(self.known) >= 6:
            return
        geometry = self._chance.choice(self._geometries)
        name = f"s{self._numbers.integers(1 << 40)}" if self._chance.random() < 0.8 else ""
        info = self.engine.open(name, geometry, create=True)
        assert info.created
        self.known[name or f"#{info.session_id}"] = Known(info.session_id, name, geometry)

    def _append(self) -> None:
        known = self.pick()
        if known is None:
            return self._open()
        count = self._chance.randint(1, 4)
        first = len(known.chunks)
        payload = self._numbers.integers(0, 256, count * known.geometry.chunk_bytes, dtype=np.uint8)
        tokens = self._numbers.integers(0, 1 << 31, count * known.geometry.chunk_tokens).astype("<u4").tobytes()
        try:
            assert self.engine.append(known.session_id, first, count, payload, tokens) == first + count
        except LimitExceeded:
            return None
        known.chunks += list(payload.reshape(count, -1))
        known.token_ids.append(tokens)
        return None

    def _fetch(self) -> None:
        known = self.pick()
        if known is not None and known.chunks:
            self.check_fetch(known, self._chance.choice((1, 7, 60)))

    def check_fetch(self, known: Known, count: int) -> None:
        keys = random_keys(self._numbers, known.geometry, len(known.chunks), count)
        size = known.geometry.record_bytes
        # A destination that is not aligned takes the other road from disk.
        skew = self._chance.choice((0, 0, 1, 8))
        destination = np.zeros(count * size + skew, np.uint8)[skew:]
        fetched = self.engine.fetch(known.session_id, keys, destination)
        good = np.ones(count, bool) if fetched.statuses is None else fetched.statuses == 0
        assert good.all() or self.reads_may_fail
        assert fetched.ram_records + fetched.nvme_records == np.count_nonzero(good)
        expected = records_of(known.geometry, known.array(), keys)
        assert (destination.reshape(count, size) == expected)[good].all(), known.name

    def _flush(self) -> None:
        known = self.pick()
        if known is not None and known.name:
            assert self.engine.flush(known.session_id) == len(known.chunks)
            known.flushed()

    def _put(self) -> None:
        known = self.pick()
        if known is None or not known.chunks:
            return
        first = self._chance.randrange(len(known.chunks))
        count = self._chance.randint(1, len(known.chunks) - first)
        payload = self._numbers.bytes(count * SUMMARY_BYTES)
        self.engine.put_summaries(known.session_id, "k.v1", first, count, payload)
        for i in range(count):
            values = known.summaries.setdefault(first + i, [None])
            values.append(payload[i * SUMMARY_BYTES : (i + 1) * SUMMARY_BYTES])

    def _get(self) -> None:
        known = self.pick()
        if known is None:
            return
        for chunk in range(len(known.chunks)):
            self._check_summary(known, chunk, known.summaries.get(chunk, [None])[-1:])

    def _check_summary(self, known: Known, chunk: int, allowed: list[bytes | None]) -> bytes | None:
        try:
            count, found = self.engine.get_summaries(known.session_id, "k.v1", chunk, 1, 1 << 20)
            assert count == 1
        except SessionNotFound:
            found = None
        assert found in allowed or (found is None and self.reads_may_fail), (known.name, chunk)
        return found

    def _delete(self) -> None:
        known = self.pick()
        if known is None or self._chance.random() < 0.5:
            return
        key = known.name or f"#{known.session_id}"
        try:
            self.engine.delete(known.session_id)
        except WriteFailed:
            del self.known[key]  # it may come back
            raise
        del self.known[key]
        self.deleted.add(known.name)

    def check_all(self) -> None:
        for known in self.known.values():
            info = self.engine.info(known.session_id)
            assert info.chunk_count == len(known.chunks)
            assert info.token_ids == b"".join(known.token_ids)
            if known.chunks:
                self.check_fetch(known, 30)

    def after_restart(self, engine: Engine) -> None:
        """The daemon came back with another engine: judges what it still has, and goes on with that."""
        self.engine = engine
        found = {info.name: info for info in engine.list()}
        assert not self.deleted & set(found) - {""}, "a deleted session came back"
        for key, known in list(self.known.items()):
            info = found.get(known.name) if known.name else None
            if info is None:
                assert not known.durable, f"{key} was flushed and is gone"
                del self.known[key]
                continue
            assert (info.session_id, info.geometry) == (known.session_id, known.geometry)
            assert info.damaged_records == 0
            assert known.durable_chunks <= info.chunk_count <= len(known.chunks), key
            del known.chunks[info.chunk_count :]
            tokens, chunk_bytes = b"".join(known.token_ids), 4 * known.geometry.chunk_tokens
            known.token_ids = [tokens[: info.chunk_count * chunk_bytes]]
            # A summary may be any of those put since the last flush.
            for chunk in list(known.summaries):
                if chunk >= len(known.chunks):
                    del known.summaries[chunk]
                else:
                    known.summaries[chunk] = [self._check_summary(known, chunk, known.summaries[chunk])]
            known.durable, known.durable_chunks = True, info.durable_chunk_count
        self.check_all()
