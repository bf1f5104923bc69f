"""One workload generator and one oracle for every ring: pure engine, simulated disk, real process.

The oracle is plain objects that hold the guarantee (oracle.py). What was flushed comes back byte-exact, or damaged where a
fault has hit it; what was acknowledged only comes back byte-exact or is missing at the end of its session; wrong bytes
never, and what is gone stays gone: deleted sessions, truncated chunks, old epochs. Sessions share chunks (forks, opens
with known tokens, appends of what another one has), and none suffers from what happens to another. A call that the power
loss or a failed write cut short has happened or has not, nothing between. Everything follows from the seed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from hga_kvd.answers import SessionInfo
from hga_kvd.checksum import checksum
from hga_kvd.errors import LimitExceeded, SessionNotFound, StaleEpoch, StorageFull, WriteFailed
from hga_kvd.geometry import KEY_DTYPE, Geometry, Keys
from hga_kvd.testing.oracle import Chunk, Excuses, Gone, Known, NoExcuses, Store
from hga_kvd.testing.workload import records_of

U8 = npt.NDArray[np.uint8]

SUMMARY_BYTES = 300
SUMMARY_KINDS = ("k.v1", "sketch.v1:0f3c")
SESSIONS_MAX = 6

# Every step and how often it is taken.
STEPS = {
    "append": 8, "fetch": 5, "flush": 4, "put": 2, "get": 2, "fork": 2, "truncate": 2, "open": 1, "delete": 1, "close": 1,
    "park": 1, "pin": 1,
}  # fmt: skip


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
        self._opening: dict[str, Known] = {}  # opens and forks that got no answer
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
        source, shared = self._pick(), 0
        geometry = self._chance.choice(self._geometries)
        tokens = b""
        if source is not None and source.chained() and self._chance.random() < 0.4:
            # What another session has, and perhaps more that nobody has.
            geometry, shared = source.geometry, self._chance.randint(1, source.chained())
            tokens = source.tokens(shared) + self._chance.randbytes(4 * self._chance.choice((0, 3, 40)))
        known = Known(0, self._name(), geometry, source.chunks[:shared] if source else [])
        with self._making(known):
            info = self.store.open(known.name, geometry, create=True, token_ids=tokens)
        return self._made(known, info)

    def _fork(self) -> str:
        parent = self._pick()
        if parent is None or len(self.known) >= SESSIONS_MAX:
            return "nothing"
        count = self._chance.randint(0, len(parent.chunks))
        chunks = parent.chunks[: count or None]
        shaky = {i for i in parent.shaky if i < len(chunks)}
        known = Known(0, self._name(), parent.geometry, chunks, shaky=shaky)
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
            chunks = self._new_chunks(known.geometry, self._chance.randint(1, 3))
        payload = np.concatenate([chunk.payload for chunk in chunks])
        tokens = b"".join(chunk.token_ids for chunk in chunks)
        try:
            count = self.store.append(known.session_id, first, len(chunks), payload, tokens, known.epoch)
            assert count == first + len(chunks)
        except LimitExceeded as error:
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
        assert self.store.flush(known.session_id) == len(known.chunks)
        known.flushed()
        return known.key

    def _park(self) -> str:
        """Durable, and from now on read from disk."""
        known = self._pick()
        if known is None or not known.name:
            return "nothing"
        self.store.park(known.session_id)
        known.flushed()
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
        kind, payload = self._chance.choice(SUMMARY_KINDS), self._chance.randbytes(count * SUMMARY_BYTES)
        if not known.shaky.isdisjoint(range(first, first + count)):
            return "nothing"
        chunks = known.chunks[first : first + count]
        # From here on, not from when it returns: it may be written out and the power lost before that.
        for i, chunk in enumerate(chunks):
            chunk.summaries.setdefault(kind, [None]).append(payload[i * SUMMARY_BYTES : (i + 1) * SUMMARY_BYTES])
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
        for kind in SUMMARY_KINDS:
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

    def _room(self, known: Known, count: int) -> U8:
        """Where to fetch to. A destination that is not aligned takes the other road from disk."""
        skew = self._chance.choice((0, 0, 1, 8))
        return np.zeros(count * known.geometry.record_bytes + skew, np.uint8)[skew:]

    def check_fetch(self, known: Known, keys: Keys) -> None:
        size, destination = known.geometry.record_bytes, self._room(known, len(keys))
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

    def delete_all(self) -> None:
        for known in list(self.known.values()):
            with self._deleting(known):
                self.store.delete(known.session_id)

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
                assert not known.durable or known.deleting, f"{key} was flushed and is gone"
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
        known.deleting, known.undo = False, []
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
