"""One workload generator and one oracle for every ring: pure engine, simulated disk, real process.

The oracle is plain objects that hold the guarantee (oracle.py); judge.py compares them with what the store says. Sessions
share chunks (forks, opens with known tokens, appends of what another one has), and none suffers from what happens to
another. Everything follows from the seed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from hga_kvd.answers import SessionInfo
from hga_kvd.engine import Engine
from hga_kvd.errors import LimitExceeded, StaleEpoch, StorageFull, WriteFailed
from hga_kvd.geometry import KEY_DTYPE, Geometry
from hga_kvd.testing.judge import Clock, Judge
from hga_kvd.testing.oracle import Chunk, Excuses, Gone, Known, NoExcuses, Store

U8 = npt.NDArray[np.uint8]

SUMMARY_BYTES = {"k.v1": 300, "sketch.v1:0f3c": 1024}  # by kind: whole sectors are read another way
SESSIONS_MAX = 6

# Every step and how often it is taken.
STEPS = {
    "append": 8, "fetch": 5, "flush": 4, "put": 2, "get": 2, "fork": 2, "truncate": 2, "open": 1, "delete": 1, "close": 1,
    "park": 1, "pin": 1,
}  # fmt: skip


class Trial(Judge):
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
        clock: Clock | None = None,
        evicts: bool = False,
        without: tuple[str, ...] = (),
    ) -> None:
        """prefix: of the names of its sessions; those with another are not its business. clock: the store's, which passes
        and lets sessions expire; None: it has its own, and none expire. evicts: the store is an engine, and idle sessions
        may go where space is short. without: steps that it never takes."""
        chance = random.Random(f"trial {seed}")
        super().__init__(store, excuses or NoExcuses(), chance, clock or Clock(), prefix, evicts)
        self.session_ids: set[int] = set()
        self.refusals = refusals
        self._geometries = geometries
        self._weights = STEPS if clock is None else STEPS | {"wait": 1}
        if evicts:
            self._weights = self._weights | {"append": 12, "close": 4, "park": 3}
        self._weights = {step: weight for step, weight in self._weights.items() if step not in without}
        self._steps: dict[str, Callable[[], str]] = {step: getattr(self, f"_{step}") for step in self._weights}

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.step()

    def step(self) -> None:
        name = self._chance.choices(tuple(self._weights), tuple(self._weights.values()))[0]
        self.trace.append(name)
        try:
            self.trace[-1] += " " + self._steps[name]()
        except (StorageFull, WriteFailed) as error:
            self.trace[-1] += f" refused: {error!r}"
            if not self.refusals:
                raise
        self.note_evicted()

    # --- steps; each returns what it did ---

    def _pick(self) -> Known | None:
        known = list(self.known.values())
        if self._evicts and self._chance.random() < 0.8:  # who is done with a session rarely comes back to it
            known = [k for k in known if not k.idle] or known
        return self._chance.choice(known) if known else None

    def _open(self) -> str:
        if len(self.known) >= SESSIONS_MAX:
            return "nothing: there are enough"
        source, shared = self._pick(), 0
        geometry = self._chance.choice(self._geometries)
        tokens = b""
        if source is not None and source.chained() and self._chance.random() < 0.4:
            # What another session has, and perhaps more that nobody has.
            geometry, shared = source.geometry, self._chance.randint(1, source.chained())
            tokens = source.tokens(shared) + self._chance.randbytes(4 * self._chance.choice((0, 3, 40)))
        known = Known(0, self._name(), geometry, source.chunks[:shared] if source else [])
        known.ttl_s = self._chance.choice((0, 0, 5, 60)) if "wait" in self._weights else 0
        known.use(self._clock.now)
        with self._making(known):
            info = self.store.open(known.name, geometry, create=True, token_ids=tokens, ttl_s=known.ttl_s)
        return self._made(known, info)

    def _fork(self) -> str:
        parent = self._pick()
        if parent is None or len(self.known) >= SESSIONS_MAX:
            return "nothing"
        count = self._chance.randint(0, len(parent.chunks))
        chunks = parent.chunks[: count or None]
        shaky = {i for i in parent.shaky if i < len(chunks)}
        known = Known(0, self._name(), parent.geometry, chunks, shaky=shaky, ttl_s=parent.ttl_s)
        known.use(self._clock.now)
        parent.use(self._clock.now)
        with self._making(known):
            info = self.store.fork(parent.session_id, parent.epoch, count, known.name)
        return f"{parent.key} [0, {len(chunks)}) as {self._made(known, info)}"

    def _name(self) -> str:
        return f"{self._prefix}{self._chance.randrange(1 << 40)}" if self._chance.random() < 0.85 else ""

    @contextmanager
    def _making(self, known: Known) -> Iterator[None]:
        try:
            yield
        except Gone:
            self._opening[known.name] = known
            raise

    def _made(self, known: Known, info: SessionInfo) -> str:
        assert info.created
        assert info.chunk_count == len(known.chunks), f"{info.chunk_count} chunks are shared, not {len(known.chunks)}"
        assert info.epoch == 0
        assert info.session_id not in self.session_ids, "a session id was used twice"
        self.session_ids.add(info.session_id)
        known.session_id = info.session_id
        self.known[known.key] = known
        return f"{known.key} ({len(known.chunks)} shared)"

    def _append(self) -> str:
        known = self._pick()
        if known is None:
            return self._open()
        first = len(known.chunks)
        source = self._chance.choice([k for k in self.known.values() if k.geometry == known.geometry])
        more = source.chained() - first
        if more > 0 and not known.shaky and source.chunks[:first] == known.chunks and self._chance.random() < 0.7:
            chunks = source.chunks[first : first + self._chance.randint(1, more)]
        else:
            chunks = self._new_chunks(known.geometry, self._chance.randint(1, 8 if self._evicts else 3))
        payload = np.concatenate([chunk.payload for chunk in chunks])
        tokens = b"".join(chunk.token_ids for chunk in chunks)
        used, idle = known.used, known.idle
        known.use(self._clock.now)
        try:
            count = self.store.append(known.session_id, first, len(chunks), payload, tokens, known.epoch)
            assert count == first + len(chunks)
        except LimitExceeded as error:
            known.used, known.idle = used, idle
            return repr(error)
        except Gone:
            known.ghosts = chunks
            raise
        known.chunks += chunks
        known.ghosts = []
        return f"{known.key} [{first}, {count}) {'as ' + source.key if chunks[0] in source.chunks[:count] else ''}"

    def _new_chunks(self, geometry: Geometry, count: int) -> list[Chunk]:
        tokens_known = self._chance.random() < 0.85
        chunks = []
        for _ in range(count):
            tokens = self._chance.randbytes(4 * geometry.chunk_tokens) if tokens_known else b""
            chunks.append(Chunk(np.frombuffer(self._chance.randbytes(geometry.chunk_bytes), np.uint8), tokens))
        return chunks

    def _truncate(self) -> str:
        known = self._pick()
        if known is None:
            return "nothing"
        known.use(self._clock.now)
        count, before = self._chance.randint(0, len(known.chunks)), known.before()
        undo = [*known.undo, before]
        known.undo = undo  # until it returns
        try:
            info = self.store.truncate(known.session_id, known.epoch, count)
        except BaseException:
            known.cut(count)
            raise
        known.cut(count)
        known.undo = []
        assert (info.epoch, info.chunk_count) == (known.epoch, count)
        try:
            self.store.fetch(known.session_id, np.zeros(1, KEY_DTYPE), self._room(known, 1), before.epoch)
        except StaleEpoch:
            return f"{known.key} to {count}"
        raise AssertionError(f"{known.key} answers requests of epoch {before.epoch}")

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
        known.use(self._clock.now)
        assert self.store.flush(known.session_id) == len(known.chunks)
        known.flushed()
        return known.key

    def _park(self) -> str:
        """Durable, and from now on read from disk."""
        known = self._pick()
        if known is None or not known.name:
            return "nothing"
        known.use(self._clock.now)
        self.store.park(known.session_id)
        known.flushed()
        known.idle = True
        return known.key

    def _pin(self) -> str:
        known = self._pick()
        if known is None:
            return "nothing"
        pinned = self._chance.random() < 0.5
        known.pinned.add(pinned)
        self.store.pin(known.session_id, pinned)
        if known.durable:
            known.pinned = {pinned}
        return f"{known.key} {pinned}"

    def _put(self) -> str:
        known = self._pick()
        if known is None or not known.chunks:
            return "nothing"
        first = self._chance.randrange(len(known.chunks))
        count = self._chance.randint(1, len(known.chunks) - first)
        kind, size = self._chance.choice(list(SUMMARY_BYTES.items()))
        payload = self._chance.randbytes(count * size)
        if not known.shaky.isdisjoint(range(first, first + count)):
            return "nothing"
        chunks = known.chunks[first : first + count]
        known.use(self._clock.now)
        # From here on, not from when it returns: it may be written out and the power lost before that.
        for i, chunk in enumerate(chunks):
            chunk.summaries.setdefault(kind, [None]).append(payload[i * size : (i + 1) * size])
        try:
            self.store.put_summaries(known.session_id, kind, first, count, payload, known.epoch)
        except (StorageFull, WriteFailed):
            for chunk in chunks:
                chunk.summaries[kind].pop()
            raise
        return f"{known.key} {kind} [{first}, {first + count})"

    def _get(self) -> str:
        known = self._pick()
        if known is None:
            return "nothing"
        for kind in SUMMARY_BYTES:
            chunks = range(len(known.chunks))
            for chunk in self._chance.sample(chunks, min(2, len(chunks))):
                self._check_summary(known, kind, chunk, known.chunks[chunk].summaries.get(kind, [None])[-1:])
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
            known.idle = True
        else:
            with self._deleting(known):
                self.store.close(known.session_id)
        return known.key

    def _wait(self) -> str:
        """Time passes. Who was not used for its time to live is gone as a whole; nobody else is."""
        assert isinstance(self.store, Engine)
        self._clock.now += self._chance.choice((1, 5, 30))
        due = [known for known in self.known.values() if known.may_expire(self._clock.now)]
        for known in due:
            known.deleting = True
        failed = True
        try:
            self.store.expire()
            failed = False
        except WriteFailed:
            if not self.refusals:
                raise
        left = {info.session_id for info in self.store.list()}
        for known in due:
            if known.session_id in left:
                known.deleting = False
                assert not known.must_expire(self._clock.now), (
                    f"{known.key} was not used for {known.ttl_s} s and is there"
                )
            else:
                self._lose(known, certainly=not failed)
        return f"until {self._clock.now}: {[known.key for known in due if known.key not in self.known]} expired"

    @contextmanager
    def _deleting(self, known: Known) -> Iterator[None]:
        """The session is gone when this ends well, and may come back when it does not."""
        known.deleting = True
        try:
            yield
        except WriteFailed:
            self._lose(known, certainly=False)
            raise
        self._lose(known, certainly=True)

    def delete_all(self) -> None:
        for known in list(self.known.values()):
            with self._deleting(known):
                self.store.delete(known.session_id)
