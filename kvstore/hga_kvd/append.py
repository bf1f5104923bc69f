"""The write path up to the acknowledgement: closed chunks into the arena, or shared with those that are stored already.

Acknowledged means in the arena, dirty, readable, and not evictable until it is on disk; `writeout` takes it from there.
What an append holds and did not give to its session goes back, however it ends.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from hga_kvd import chains, native
from hga_kvd.arena import VALID
from hga_kvd.checksum import checksums, chunk_seeds
from hga_kvd.errors import AppendOutOfOrder, InvalidRequest, LimitExceeded, StorageFull
from hga_kvd.index import LOST_ROW, Session
from hga_kvd.parts import Parts
from hga_kvd.residency import Pool

U8 = npt.NDArray[np.uint8]
I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]

# An append that finds every slot taken by calls in flight looks again this often, for 10 s.
CLAIM_WAIT_S = 0.02
CLAIM_WAITS_MAX = 500


@dataclass(eq=False)
class Appended:
    """An append on its way. payload: u8 [chunks, chunk_bytes]. Where `same` is set the chunk is stored already, in
    `rows`, which the call holds.

    slots, uids, checksums: of the other chunks, in their order.
    """

    pool: Pool
    payload: U8
    token_ids: bytes
    ids: list[bytes] = field(default_factory=list)  # chain ids; none when the tokens are not known from the start on
    rows: I64 = field(init=False)
    same: npt.NDArray[np.bool_] = field(init=False)
    slots: I64 = field(default_factory=lambda: np.zeros(0, np.int64))
    uids: U64 = field(default_factory=lambda: np.zeros(0, np.uint64))
    checksums: U64 = field(default_factory=lambda: np.zeros(0, np.uint64))

    def __post_init__(self) -> None:
        self.rows = np.full(len(self.payload), LOST_ROW, np.int64)
        self.same = np.zeros(len(self.payload), bool)


class AppendPath:
    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._residency = parts.residency
        self._lock = parts.residency.lock
        self._writeout = parts.writeout

    def payload_bytes(self, session_id: int, epoch: int, first_chunk: int, chunk_count: int) -> int:
        """As Engine.append_limit_check."""
        with self._lock:
            session = self._residency.session(session_id, epoch)
            geometry, settings = session.table.geometry, self._parts.settings
            if first_chunk != session.chunk_count:
                raise AppendOutOfOrder(
                    f"the append starts at chunk {first_chunk}, but session {session_id} ends at chunk "
                    f"{session.chunk_count}; append there"
                )
            if chunk_count < 1:
                raise InvalidRequest("an append of no chunks")
            if first_chunk + chunk_count > settings.chunks_max:
                raise LimitExceeded(
                    f"a session may have {settings.chunks_max} chunks, this append would make it longer"
                )
            payload_bytes = chunk_count * geometry.chunk_bytes
            chunks_max = self._residency.chunks_max(geometry)
            if chunk_count > chunks_max or payload_bytes > settings.append_bytes_max:
                raise LimitExceeded(
                    f"an append of {chunk_count} chunks, {payload_bytes} bytes; one append may have {chunks_max} "
                    f"chunks (they must fit in the RAM arena) and {settings.append_bytes_max} bytes; split it"
                )
            return payload_bytes

    def append(
        self,
        session_id: int,
        epoch: int,
        first_chunk: int,
        chunk_count: int,
        payload: U8,
        token_ids: bytes,
        now: float,
    ) -> int:
        """As Engine.append. now: seconds."""
        payload_bytes = self.payload_bytes(session_id, epoch, first_chunk, chunk_count)
        with self._lock:
            session = self._residency.session(session_id, epoch)
            pool = self._residency.pools[session.pool]
            geometry = pool.geometry
            if len(payload) != payload_bytes:
                raise InvalidRequest(
                    f"a payload of {len(payload)} bytes; {chunk_count} chunks are {payload_bytes} bytes"
                )
            if token_ids and len(token_ids) != 4 * chunk_count * geometry.chunk_tokens:
                raise InvalidRequest(
                    f"{len(token_ids)} bytes of token ids; {chunk_count} chunks are "
                    f"{4 * chunk_count * geometry.chunk_tokens} bytes, or none if unknown"
                )
            if session.appending or session.chunk_count != first_chunk:
                raise AppendOutOfOrder(
                    f"another append to session {session_id} is under way or came first; wait for it"
                )
            session.appending = True
            session.use(now)
            parent = session.last_chain()
        new = Appended(pool, payload.reshape(chunk_count, -1), token_ids)
        try:
            if token_ids and parent:
                new.ids = chains.chain_ids(parent, token_ids, geometry.chunk_tokens)
                self._find_stored(new)
            self._store(new)
            with self._lock:
                self._residency.session(session_id, epoch)
                return self._commit(session, new)
        finally:
            with self._lock:
                session.appending = False
                self._let_go(new)

    def _find_stored(self, new: Appended) -> None:
        """Holds the stored chunks whose ids these have, and of them keeps those that have the same bytes."""
        pool, table, layers = new.pool, new.pool.table, new.pool.geometry.layers
        with self._lock:
            rows = np.array([table.find_chain(chain) for chain in new.ids], np.int64)
            table.hold(rows)
            new.rows = rows
            uids, expected = table.uid[rows], table.checksums[rows]
        for i in np.flatnonzero(rows != LOST_ROW).tolist():
            seeds = chunk_seeds(uids[i : i + 1], layers, pool.slots.records).reshape(-1)
            records = np.arange(len(seeds)) * pool.slots.record_bytes
            found = checksums(new.payload[i].data, records, pool.slots.record_bytes, seeds)
            new.same[i] = (found == expected[i].reshape(-1)).all()

    def _store(self, new: Appended) -> None:
        """Copies what is not shared into slots, and computes its checksums there."""
        pool, fresh = new.pool, ~new.same
        count = int(np.count_nonzero(fresh))
        if not count:
            return
        new.slots = self._claim(pool, count * pool.geometry.layers)
        with self._lock:
            first = self._residency.next_chunk_uid
            self._residency.next_chunk_uid += count
        new.uids = np.arange(first, first + count, dtype=np.uint64)
        extents = (new.payload[fresh] if new.same.any() else new.payload).reshape(len(new.slots), -1)
        seeds = chunk_seeds(new.uids, pool.geometry.layers, pool.slots.records)
        if pool.view is not None and pool.slots.record_bytes >= native.CHECKSUM_BYTES_MIN:
            new.checksums = native.put_extents(pool.view, new.slots, extents, seeds)
        else:
            pool.slots.put_extents(new.slots, extents)
            starts = pool.slots.starts(new.slots[:, None], np.arange(pool.slots.records)).reshape(-1)
            found = checksums(self._residency.memory, starts, pool.slots.record_bytes, seeds.reshape(-1))
            new.checksums = found.reshape(seeds.shape)

    def _claim(self, pool: Pool, count: int) -> I64:
        """Slots for an append; they are dirty from now on. Writes out, or waits for calls in flight, to get them."""
        for _ in range(CLAIM_WAITS_MAX):
            with self._lock:
                if self._residency.make_room(pool, count) >= count:
                    slots = pool.slots.take(count)
                    pool.slots.dirty[slots] = True
                    return slots
            if self._writeout is None:
                if self._evict_from_ram():
                    continue
                raise StorageFull(
                    f"the RAM arena of {len(self._residency.arena.region)} bytes is full and there is no NVMe: delete "
                    "sessions, or start the daemon with more --ram or with --nvme"
                )
            with self._writeout.barrier:
                wrote = self._writeout.round()
            if not wrote:
                self._parts.stopping.wait(CLAIM_WAIT_S)
        raise StorageFull(f"no {count} free slots in the RAM arena: calls in flight hold them; append again")

    def _evict_from_ram(self) -> bool:
        """Without NVMe: deletes the idle session that was not used for longest, if that is the policy."""
        if self._parts.settings.evict != "lru":
            return False
        with self._lock:
            session = self._residency.oldest_idle()
            if session is None:
                return False
            self._parts.remove(session)
            self._parts.counters.evicted_sessions += 1
        self._parts.log.info("session evicted", session=session.name, chunks=session.chunk_count)
        return True

    def _commit(self, session: Session, new: Appended) -> int:
        pool, table, layers = new.pool, new.pool.table, new.pool.geometry.layers
        rows, count = new.rows.copy(), len(new.payload)
        fresh = np.flatnonzero(~new.same)
        if len(fresh):
            added = table.add(len(fresh))
            table.uid[added], table.checksums[added] = new.uids, new.checksums
            table.tokens_known[added] = bool(new.token_ids)
            tokens = np.frombuffer(new.token_ids, "<u4").reshape(count, -1) if new.token_ids else None
            table.token_ids[added] = 0 if tokens is None else tokens[fresh]
            self._residency.hold(pool, new.slots, np.repeat(added, layers), np.tile(np.arange(layers), len(fresh)))
            pool.slots.state[new.slots] = VALID
            rows[fresh] = added
            for i, row in zip(fresh.tolist(), added.tolist(), strict=True) if new.ids else ():
                table.set_chain(row, new.ids[i])
        # What the session has now is no longer the append's to give back.
        new.slots, new.rows = new.slots[:0], new.rows[~new.same]
        session.put_rows(session.chunk_count, rows)
        session.chunk_count += count
        self._parts.counters.appended_bytes += count * pool.geometry.chunk_bytes
        self._parts.counters.shared_chunks += count - len(fresh)
        self._parts.mark_dirty(session)
        if self._writeout is not None and self._writeout.should_write(session):
            self._parts.wake.set()
        return session.chunk_count

    def _let_go(self, new: Appended) -> None:
        new.pool.slots.free(new.slots)
        dead = new.pool.table.release(new.rows)
        self._parts.lose(self._residency.forget(new.pool, dead))
