"""The storage engine: sessions of K/V chunks in a RAM arena over a log on disk. The daemon's hub: it knows the order of
steps, its parts do not know each other.

- Bytes leave the engine from a slot whose record is VALID, or from a disk read whose checksum matched; nothing else.
- Acknowledged (append returned) means in the arena, dirty, readable, and not evictable until synced to disk. Durable
  means: flush returned.
- Two locks. `residency.lock`: index and slots, for bookkeeping only. `writeout.barrier`: log and manifest, held across
  writes and syncs. The barrier is taken first. Copies, checksums and reads run under neither, on pinned slots and
  pinned segments.
- A background thread writes out when half of the arena is dirty. It is a matter of speed: an append that finds no slot
  does the same itself.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import structlog
from structlog.typing import FilteringBoundLogger

from hga_kvd import chains, hits, misses, recall, sessions
from hga_kvd.answers import Counters, EngineStats, Fetched, SessionInfo, Verified
from hga_kvd.appended import Appended
from hga_kvd.arena import VALID, copy_records
from hga_kvd.checksum import checksums, record_seeds
from hga_kvd.config import Settings
from hga_kvd.disk import Disk
from hga_kvd.errors import (
    AppendOutOfOrder,
    GeometryMismatch,
    InvalidRequest,
    KvdError,
    LimitExceeded,
    NotDurable,
    SessionNotFound,
    StartRefused,
    StorageFull,
)
from hga_kvd.geometry import KEY_DTYPE, Geometry, Keys
from hga_kvd.index import LOST_ROW, Session
from hga_kvd.memory import aligned_buffer
from hga_kvd.misses import Misses
from hga_kvd.prefetch import Ledger, Part, PrefetchQueue
from hga_kvd.reads import read_verified
from hga_kvd.residency import Pool, Residency, locate, out_of_range
from hga_kvd.scrub import Found, Scrubber, extent_keys, keys_of
from hga_kvd.segments import SegmentLog
from hga_kvd.startup import recover
from hga_kvd.writeout import WriteOut

U8 = npt.NDArray[np.uint8]
I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]
Bools = npt.NDArray[np.bool_]

# Summaries wait in plain memory to be written, or for ever without a disk. They are about 1/25 of the K/V, so an eighth
# of the arena never is the tighter of the two limits.
SUMMARY_SHARE = 8
SUMMARY_BYTES_MIN = 64 << 20
# An append that finds every slot taken by calls in flight looks again this often, for 10 s.
CLAIM_WAIT_S = 0.02
CLAIM_WAITS_MAX = 500
WRITE_RETRY_S = 1.0
# How often the background looks for sessions whose time is up.
EXPIRE_S = 1.0
# Read parts of large fetches beside the calling threads; they share the queue depth of the disk.
READER_THREADS = 2
# One read of a scrub: 0.3 ms of a disk of 1.6 GB/s, so that no fetch waits long behind it.
SCRUB_STEP_BYTES = 512 << 10
SCRUB_IDLE_S = 1.0
SCRUB_PAUSE_S_MIN = 0.001  # between two steps, whatever the rate: calls in flight come first
VERIFY_BYTES = 16 << 20  # of chunks at once in `verify`

STATUS_DAMAGED, STATUS_LATE = 1, 2
# A part of a prefetch lets fetches go first, but not for ever.
PREFETCH_WAIT_S, PREFETCH_PAUSE_S = 0.1, 0.0005


class Engine:
    def __init__(
        self,
        settings: Settings,
        disk: Disk | None,
        log: FilteringBoundLogger | None = None,
        *,
        background: bool = True,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Recovers what is on the disk. background=False: nothing is written and nothing expires but by the caller's own
        calls. clock: seconds, of the same zero in all runs on one store.

        Raises: StartRefused.
        """
        self._settings = settings
        self._disk = disk
        self._log = log or _silent_log()
        self._clock = clock
        self._residency = Residency(settings.ram)
        self._lock = self._residency.lock
        self._counters = Counters()
        self._summary_bytes_max = max(SUMMARY_BYTES_MIN, settings.ram // SUMMARY_SHARE)
        self._writeout: WriteOut | None = None
        self._stopping = threading.Event()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._reading = 0  # fetches that wait for the disk, prefetches not counted
        self._prefetches = PrefetchQueue()
        self._ledger = Ledger()
        self._prefetched_records = 0
        self._prefetcher: threading.Thread | None = None
        self._readers = ThreadPoolExecutor(READER_THREADS, thread_name_prefix="read")  # started when first used
        self._scrubber = Scrubber(self._residency, None, None)
        self._scrub_thread = threading.Thread(target=self._scrub_in_background, name="scrub", daemon=True)
        if disk is not None:
            segments = SegmentLog(disk, settings.segment_bytes, settings.nvme_max, settings.nvme_reserve)
            self._writeout = WriteOut(self._residency, disk, segments, self._log, settings.evict == "lru")
            self._scrubber = Scrubber(self._residency, disk, segments)
            self._counters.damaged_records = self._recover(disk, self._writeout)
        if background:
            self._thread = threading.Thread(target=self._work_in_background, name="write-out", daemon=True)
            self._thread.start()
        if background and settings.scrub_rate:
            self._scrub_thread.start()

    # --- sessions ---

    def open(
        self,
        name: str,
        geometry: Geometry | None,
        create: bool,
        owner: int = 0,
        *,
        tenant: str = "",
        token_ids: bytes = b"",
        ttl_s: int = 0,
    ) -> SessionInfo:
        """The session of this name, made if there is none and `create` says so; without a name a new temporary one.

        token_ids: uint32. A new session starts with the longest prefix of them that this tenant has stored.
        Raises: InvalidRequest, GeometryMismatch, SessionNotFound, LimitExceeded.
        """
        sessions.check_names(name, tenant)
        if len(token_ids) % 4:
            raise InvalidRequest(f"token_ids has {len(token_ids)} bytes, not a multiple of 4")
        ids: list[bytes] = []
        if token_ids and geometry is not None and create:
            ids = chains.chain_ids(chains.root(geometry, tenant), token_ids, geometry.chunk_tokens)
        with self._lock:
            session = self._residency.by_name.get(name) if name else None
            if session is not None:
                self._check_same(session, geometry, tenant)
                self._use(session)
                session.owner = owner or session.owner
                session.ttl_s = ttl_s or session.ttl_s
                return self._info(session)
            if not create:
                raise SessionNotFound(f"there is no session named {name!r}; open it with create to make one")
            if geometry is None:
                raise InvalidRequest("a new session needs a geometry")
            session = sessions.make(self._residency, self._settings, name, geometry, owner, tenant, ttl_s)
            rows = sessions.longest_prefix(session.table, ids[: self._settings.chunks_max])
            self._share(session, rows)
            self._use(session)
            return self._info(session, created=True)

    def _use(self, session: Session) -> None:
        session.state, session.used_at = "open", self._clock()

    def _check_same(self, session: Session, geometry: Geometry | None, tenant: str) -> None:
        differences = session.table.geometry.differences(geometry) if geometry else []
        if differences:
            raise GeometryMismatch(
                f"session {session.name!r} exists with another geometry ({'; '.join(differences)}): open it with its "
                "own, or delete it first"
            )
        if session.tenant != tenant:
            raise InvalidRequest(f"session {session.name!r} is another tenant's: choose another name")

    def _share(self, session: Session, rows: I64) -> None:
        sessions.share(session, rows)
        if len(rows) and self._writeout is not None:
            self._writeout.mark_dirty(session)

    def fork(self, session_id: int, epoch: int, chunk_count: int, name: str, owner: int = 0) -> SessionInfo:
        """A new session that starts with the first chunk_count (0: all) chunks of this one, its own from then on.

        A fork that was made already, by a call whose answer was lost, is returned as it is.
        Raises: SessionNotFound, StaleEpoch, KeyOutOfRange, InvalidRequest, LimitExceeded.
        """
        sessions.check_names(name)
        with self._lock:
            parent = self._residency.session(session_id, epoch)
            rows = sessions.first_rows(parent, chunk_count or parent.chunk_count)
            known = self._residency.by_name.get(name) if name else None
            if known is not None:
                if known.table is parent.table and not known.epoch and np.array_equal(known.all_rows(), rows):
                    return self._info(known)
                raise InvalidRequest(f"there is another session named {name!r}: choose another name, or delete it")
            geometry = parent.table.geometry
            session = sessions.make(self._residency, self._settings, name, geometry, owner, parent.tenant, parent.ttl_s)
            self._share(session, rows)
            self._use(session)
            self._use(parent)
            return self._info(session, created=True)

    def truncate(self, session_id: int, epoch: int, chunk_count: int) -> SessionInfo:
        """Drops the chunks from chunk_count on; the session's epoch grows by one, and requests of the old one are
        refused from now on. Durable when this returns.

        Raises: SessionNotFound, StaleEpoch, KeyOutOfRange; WriteFailed: it is done, but may be undone at the next start.
        """
        with self._lock:
            session = self._residency.session(session_id, epoch)
            places = sessions.cut(self._residency, session, chunk_count)
            if self._writeout is not None:
                self._writeout.lose(places)
                self._writeout.mark_dirty(session)
            info = self._info(session)
        if self._writeout is not None:
            self._writeout.settle(session, "truncated")
        return info

    def close(self, session_id: int) -> None:
        """The client is done: a temporary session is deleted, a named one stays. Raises: SessionNotFound."""
        with self._lock:
            session = self._residency.session(session_id)
            session.state = "closed"
        if session.temporary:
            self.delete(session_id)

    def delete(self, session_id: int) -> None:
        """Removes the session for everybody; durable when this returns.

        Raises: SessionNotFound; WriteFailed: it is gone now, but may come back at the next start.
        """
        with self._lock:
            session = self._residency.session(session_id)
            self._remove(session)
        if self._writeout is not None:
            self._writeout.settle(session, "deleted")

    def _remove(self, session: Session) -> None:
        places = self._residency.remove_session(session)
        if self._writeout is not None:
            self._writeout.lose(places)
            self._writeout.drop(session)

    def park(self, session_id: int) -> None:
        """Makes the session durable and takes it out of RAM. It may be evicted until it is used again.

        Raises: as flush.
        """
        self.flush(session_id)
        with self._lock:
            session = self._residency.session(session_id)
            session.state = "parked"
            self._residency.drop_slots(session)

    def pin(self, session_id: int, pinned: bool) -> None:
        """A pinned session is never evicted and does not expire. Durable when this returns, if the session is.

        Raises: SessionNotFound, WriteFailed.
        """
        with self._lock:
            session = self._residency.session(session_id)
            session.pinned = pinned
        if self._writeout is not None:
            self._writeout.settle(session, "pinned" if pinned else "no longer pinned")

    def expire(self) -> None:
        """Deletes the sessions that were not used for their ttl_s. Raises: WriteFailed."""
        now = self._clock()
        with self._lock:
            every = self._residency.sessions.values()
            over = [s for s in every if s.ttl_s and not s.pinned and now - s.used_at >= s.ttl_s]
            for session in over:
                self._remove(session)
                self._counters.expired_sessions += 1
        for session in over:
            self._log.info("session expired", session=session.name, chunks=session.chunk_count, ttl_s=session.ttl_s)
            if self._writeout is not None:
                self._writeout.settle(session, "expired")

    def release_owner(self, owner: int) -> None:
        """A client is gone, and with it its temporary sessions."""
        with self._lock:
            for session in self._residency.sessions.values():
                if session.name and session.owner == owner:
                    session.state = "closed"
            owned = [s.session_id for s in self._residency.sessions.values() if s.temporary and s.owner == owner]
        for session_id in owned:
            try:
                self.delete(session_id)
            except SessionNotFound:
                continue
            except KvdError as error:  # nobody is there to be told
                self._log.warning("delete failed", session=session_id, error=str(error))

    def list(self) -> list[SessionInfo]:
        with self._lock:
            return [self._info(session) for session in self._residency.sessions.values()]

    def info(self, session_id: int) -> SessionInfo:
        """With token ids. Raises: SessionNotFound."""
        with self._lock:
            session = self._residency.session(session_id)
            return self._info(session, token_ids=session.token_ids())

    def record_bytes(self, session_id: int) -> int:
        with self._lock:
            return self._residency.session(session_id).table.geometry.record_bytes

    def _info(self, session: Session, *, created: bool = False, token_ids: bytes = b"") -> SessionInfo:
        durable = self._writeout is not None and session.session_id in self._writeout.named
        return SessionInfo(
            session.session_id,
            session.name,
            session.table.geometry,
            session.chunk_count,
            session.written_count if durable else 0,
            session.damaged_records,
            session.temporary,
            token_ids,
            created,
            session.epoch,
            session.tenant,
            session.ttl_s,
            session.pinned,
            session.state == "parked",
        )

    # --- append ---

    def append_limit_check(self, session_id: int, first_chunk: int, chunk_count: int, epoch: int = 0) -> int:
        """Bytes that the payload of this append must have.

        Raises: SessionNotFound, StaleEpoch, AppendOutOfOrder, InvalidRequest, LimitExceeded.
        """
        with self._lock:
            session = self._residency.session(session_id, epoch)
            geometry, settings = session.table.geometry, self._settings
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
        self, session_id: int, first_chunk: int, chunk_count: int, payload: U8, token_ids: bytes, epoch: int = 0
    ) -> int:
        """Adds closed chunks at the end of the session; returns its chunk count. All of them or none. Chunks that are
        stored already, same tokens from the start on and same bytes, are shared.

        payload: [chunk][layer][kv_head][group][K,V][token][dim], 1-D. It may change under our hands (it is a client's
        memory): checksums are computed over what lies in the arena.
        Raises: as append_limit_check; StorageFull; WriteFailed.
        """
        payload_bytes = self.append_limit_check(session_id, first_chunk, chunk_count, epoch)
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
            self._use(session)
            parent = session.last_chain()
        new = Appended(pool, payload.reshape(chunk_count, -1), token_ids)
        try:
            if token_ids and parent:
                new.ids = chains.chain_ids(parent, token_ids, geometry.chunk_tokens)
                self._find_stored(new)
            self._store(new)
            with self._lock:
                self._residency.session(session_id, epoch)
                return self._commit_append(session, new)
        finally:
            with self._lock:
                session.appending = False
                self._let_go(new)

    def _find_stored(self, new: Appended) -> None:
        """Holds the stored chunks whose ids these have, and of them keeps those that have the same bytes."""
        pool, table = new.pool, new.pool.table
        with self._lock:
            rows = np.array([table.find_chain(chain) for chain in new.ids], np.int64)
            table.hold(rows)
            new.rows = rows
            uids, expected = table.uid[rows], table.checksums[rows]
        for i in np.flatnonzero(rows != LOST_ROW).tolist():
            seeds = seeds_of(pool, uids[i : i + 1]).reshape(-1)
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
        extents = new.payload[fresh] if new.same.any() else new.payload
        pool.slots.put_extents(new.slots, extents.reshape(-1, pool.geometry.extent_bytes))
        starts = pool.slots.starts(new.slots[:, None], np.arange(pool.slots.records)).reshape(-1)
        seeds = seeds_of(pool, new.uids)
        found = checksums(self._residency.memory, starts, pool.slots.record_bytes, seeds.reshape(-1))
        new.checksums = found.reshape(seeds.shape)

    def _let_go(self, new: Appended) -> None:
        """Ends the append: what it holds and did not give to the session goes back."""
        new.pool.slots.free(new.slots)
        dead = new.pool.table.release(new.rows)
        places = self._residency.forget(new.pool, dead)
        if self._writeout is not None:
            self._writeout.lose(places)

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
                self._stopping.wait(CLAIM_WAIT_S)
        raise StorageFull(f"no {count} free slots in the RAM arena: calls in flight hold them; append again")

    def _evict_from_ram(self) -> bool:
        """Without NVMe: deletes the idle session that was not used for longest, if that is the policy."""
        if self._settings.evict != "lru":
            return False
        with self._lock:
            session = self._residency.oldest_idle()
            if session is None:
                return False
            self._remove(session)
            self._counters.evicted_sessions += 1
        self._log.info("session evicted", session=session.name, chunks=session.chunk_count)
        return True

    def _commit_append(self, session: Session, new: Appended) -> int:
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
        self._counters.appended_bytes += count * pool.geometry.chunk_bytes
        self._counters.shared_chunks += count - len(fresh)
        if self._writeout is not None:
            self._writeout.mark_dirty(session)
            if 2 * self._residency.arena.dirty_bytes > len(self._residency.arena.region):
                self._wake.set()
        return session.chunk_count

    # --- fetch ---

    def fetch(
        self,
        session_id: int,
        keys: Keys,
        destination: U8,
        epoch: int = 0,
        overdue: Callable[[], bool] | None = None,
    ) -> Fetched:
        """Records of `keys` (KEY_DTYPE) in their order into `destination`, 1-D, len(keys) * record_bytes.

        overdue: says when the deadline has passed; what is not read by then is LATE. None: no deadline.
        Raises: SessionNotFound, StaleEpoch, KeyOutOfRange, LimitExceeded; nothing was written to the destination then.
        """
        fetched = self._fetch(session_id, keys, destination, epoch, overdue, self._counters)
        if len(self._ledger):
            with self._lock:
                self._ledger.fetch(session_id, keys)
        return fetched

    def _fetch(
        self,
        session_id: int,
        keys: Keys,
        destination: U8,
        epoch: int,
        overdue: Callable[[], bool] | None,
        counters: Counters,
    ) -> Fetched:
        assert keys.dtype == KEY_DTYPE
        count, foreground = len(keys), counters is self._counters
        with self._lock:
            session = self._residency.session(session_id, epoch)
            pool = self._residency.pools[session.pool]
            slots = pool.slots
            self._check_fetch_size(count, slots.record_bytes)
            assert len(destination) == count * slots.record_bytes
            if not count:
                return Fetched(None, 0, 0)
            self._use(session)
            if (
                count <= hits.FEW_KEYS
                and len(destination) <= hits.FEW_BYTES
                and hits.copy_few(session, pool, self._residency.memory, keys, destination)
            ):
                _count_hits(counters, count, len(destination))
                return Fetched(None, count, 0)
            try:  # numpy checks every index anyway; only a refusal looks for the one to blame
                rows, layers, records = locate(session, keys)
                slot_of = pool.table.slot[rows, layers]
                hit = slots.state[slot_of, records] == VALID
            except IndexError:
                raise out_of_range(session, keys) from None
            all_hit = np.count_nonzero(hit) == count
            found = slot_of if all_hit else slot_of[hit]
            slots.pin(found)
            pool.policy.touch(found)
            missing = None
            if not all_hit:
                log = self._writeout.segments if self._writeout else None
                missing = misses.plan(self._residency, log, pool, rows, layers, records, missing=np.flatnonzero(~hit))
                self._reading += foreground
        bad = keep = late = None
        try:
            if missing is None:
                slots.gather(found, records, destination)
            else:
                at = np.flatnonzero(hit) * slots.record_bytes
                starts = slots.starts(found, records[hit])
                copy_records(self._residency.memory, starts, destination.data, at, slots.record_bytes)
                bad, keep, late = misses.bring(
                    self._disk, self._readers, self._residency, pool, missing, destination, overdue
                )
        finally:
            with self._lock:
                slots.unpin(found)
                if missing is not None:
                    self._reading -= foreground
                    misses.end(self._residency, log, pool, missing, keep)
                _count_hits(counters, len(found), len(found) * slots.record_bytes)
        if missing is None:
            return Fetched(None, count, 0)
        assert bad is not None
        assert late is not None
        return self._judge(session, epoch, keys, missing, bad, late, len(found), counters)

    def _check_fetch_size(self, count: int, record_bytes: int) -> None:
        settings = self._settings
        if count > settings.fetch_keys_max:
            raise LimitExceeded(f"a fetch of {count} keys; at most {settings.fetch_keys_max} are allowed: split it")
        if count * record_bytes > settings.fetch_bytes_max:
            raise LimitExceeded(
                f"a fetch of {count * record_bytes} bytes; at most {settings.fetch_bytes_max} are allowed: split it"
            )

    def _judge(
        self,
        session: Session,
        epoch: int,
        keys: Keys,
        missing: Misses,
        bad: Bools,
        late: Bools,
        ram_records: int,
        counters: Counters,
    ) -> Fetched:
        statuses = np.zeros(len(keys), np.uint8)
        statuses[missing.lost] = STATUS_DAMAGED
        statuses[missing.items.positions[bad]] = STATUS_DAMAGED
        statuses[missing.copies_to[bad[missing.copies_of]]] = STATUS_DAMAGED
        damaged = int(np.count_nonzero(statuses))
        statuses[missing.items.positions[late]] = STATUS_LATE
        statuses[missing.copies_to[late[missing.copies_of]]] = STATUS_LATE
        not_ok = int(np.count_nonzero(statuses))
        read = len(keys) - ram_records - not_ok
        with self._lock:
            if damaged:  # or gone: the chunk's place on disk is given back when its last session lets go of it
                self._residency.session(session.session_id, epoch)
            counters.fetched_nvme_records += read
            counters.fetched_nvme_bytes += read * missing.items.item_bytes
            counters.late_records += not_ok - damaged
            marked = self._mark_damaged(session, keys[missing.items.positions[bad]])
        self._log_damaged(session, marked)
        return Fetched(statuses if not_ok else None, ram_records, read)

    def _mark_damaged(self, session: Session, keys: Keys) -> set[tuple[int, int, int]]:
        """Counts records that are wrong wherever they were looked for. Returns those that are news."""
        found = {tuple(key) for key in keys.tolist()} - session.damaged
        session.damaged |= found
        chunks = np.array([key[0] for key in found], np.int64) // session.table.geometry.groups_per_chunk
        session.table.forget_chains(np.unique(session.rows[chunks]))  # a new copy must not be taken for this one
        session.damaged_records += len(found)
        self._counters.damaged_records += len(found)
        return found

    def _log_damaged(self, session: Session, found: set[tuple[int, int, int]]) -> None:
        for group, kv_head, layer in sorted(found):
            self._log.error("record damaged", session=session.session_id, layer=layer, kv_head=kv_head, group=group)

    # --- prefetch ---

    def prefetch(self, session_id: int, epoch: int, keys: Keys) -> None:
        """Brings these records into RAM, as far as its policy takes them, behind all fetches; returns at once. Takes the
        place of what the session asked for before and is not brought yet.

        Raises: SessionNotFound, StaleEpoch, KeyOutOfRange, LimitExceeded.
        """
        self._not_in_ram(Part(session_id, epoch, keys))
        if self._disk is None:  # everything is in RAM
            return
        with self._lock:
            if self._prefetcher is None:
                self._prefetcher = threading.Thread(target=self._prefetch_in_background, name="prefetch", daemon=True)
                self._prefetcher.start()
        self._prefetches.put(Part(session_id, epoch, keys.copy()))

    def _prefetch_in_background(self) -> None:
        while (part := self._prefetches.take()) is not None:
            give_up = time.monotonic() + PREFETCH_WAIT_S
            while self._reading and time.monotonic() < give_up:
                self._stopping.wait(PREFETCH_PAUSE_S)
            counters = Counters()
            try:
                missing = self._not_in_ram(part)
                if not len(missing):
                    continue
                own = aligned_buffer(len(missing) * self.record_bytes(part.session_id))
                self._fetch(part.session_id, missing, own, part.epoch, None, counters)
            except KvdError:  # gone, or rolled back: nobody wants the rest
                self._prefetches.forget(part.session_id)
                with self._lock:
                    self._ledger.forget(part.session_id)
                continue
            except OSError as error:
                self._log.warning("prefetch failed", error=str(error))
                continue
            with self._lock:
                self._prefetched_records += counters.fetched_nvme_records
                self._ledger.bring(part.session_id, missing[: counters.fetched_nvme_records])

    def _not_in_ram(self, part: Part) -> Keys:
        with self._lock:
            session = self._residency.session(part.session_id, part.epoch)
            slots, table = self._residency.pools[session.pool].slots, session.table
            keys = np.unique(part.keys.view("<u8")).view(KEY_DTYPE)
            try:
                rows, layers, records = locate(session, keys)
                missing: Keys = keys[slots.state[table.slot[rows, layers], records] != VALID]
            except IndexError:
                raise out_of_range(session, keys) from None
            return missing

    # --- integrity ---

    def verify(self, session_id: int) -> Verified:
        """Compares every record of the session, on disk and in RAM, with its checksum. Takes as long as reading it does.

        Raises: SessionNotFound.
        """
        with self._lock:
            session = self._residency.session(session_id)
            pool, geometry = self._residency.pools[session.pool], session.table.geometry
            rows = session.all_rows().copy()
        step = max(1, VERIFY_BYTES // pool.table.chunk_stride)
        for first in range(0, len(rows), step):
            part = rows[first : first + step]
            self._take_note(self._scrubber.check_chunks(pool, part[part != LOST_ROW]))
        with self._lock:
            session = self._residency.session(session_id)
            lost = np.flatnonzero(session.all_rows() == LOST_ROW)
            keys = np.array(sorted(session.damaged), KEY_DTYPE)
        keys = np.concatenate((keys, extent_keys(geometry, lost)))
        return Verified(len(rows) * geometry.layers * geometry.records_per_extent, keys)

    def scrub(self, bytes_max: int) -> int:
        """Verifies about so many bytes more, of disk and arena in turns. Returns how many; 0: there are none."""
        found = self._scrubber.step(bytes_max)
        self._take_note(found)
        with self._lock:
            self._counters.scrubbed_bytes += found.bytes
        return found.bytes

    def _take_note(self, found: Found) -> None:
        if found.dropped_records:
            self._log.error("bad copies in RAM dropped", records=found.dropped_records)
        news = []
        with self._lock:
            self._counters.scrub_dropped_records += found.dropped_records
            for damage in found.damage:
                for session in self._residency.sessions.values():
                    if session.table is damage.pool.table:
                        marked = self._mark_damaged(session, keys_of(session, damage))
                        self._counters.scrub_damaged_records += len(marked)
                        news.append((session, marked))
        for session, marked in news:
            self._log_damaged(session, marked)

    def _scrub_in_background(self) -> None:
        """Goes round at scrub_rate bytes a second."""
        rate = self._settings.scrub_rate
        while not self._stopping.is_set():
            started = time.monotonic()
            try:
                done = self.scrub(SCRUB_STEP_BYTES)
            except OSError as error:
                self._log.warning("scrub failed", error=str(error))
                done = 0
            left = started + done / rate - time.monotonic() if done else SCRUB_IDLE_S
            self._stopping.wait(max(SCRUB_PAUSE_S_MIN, left))

    # --- durability ---

    def flush(self, session_id: int) -> int:
        """The durability barrier: what was acknowledged before survives power loss. Returns the durable chunk count.

        Raises: SessionNotFound, NotDurable, WriteFailed, StorageFull.
        """
        with self._lock:
            session = self._residency.session(session_id)
            self._counters.flushes += 1
        if self._writeout is None:
            raise NotDurable("this daemon keeps K/V in RAM only: start it with --nvme to make sessions durable")
        if session.temporary:
            raise NotDurable(f"session {session_id} is temporary and never durable: open it by name to keep it")
        self._writeout.flush(session)
        with self._lock:
            return self._residency.session(session_id).written_count

    def _work_in_background(self) -> None:
        """Keeps half of the arena free of dirty extents, so that appends rarely wait; deletes sessions whose time is up."""
        writeout, arena = self._writeout, self._residency.arena
        while not self._stopping.is_set():
            self._wake.wait(EXPIRE_S)
            self._wake.clear()
            try:
                self.expire()
                while writeout and not self._stopping.is_set() and 4 * arena.dirty_bytes > len(arena.region):
                    with writeout.barrier:
                        if not writeout.round():
                            break
            except (KvdError, OSError) as error:  # dirty data stays; who needs its slots or its durability is told
                self._log.warning("background write-out failed", error=str(error))
                self._stopping.wait(WRITE_RETRY_S)

    def _recover(self, disk: Disk, writeout: WriteOut) -> int:
        try:
            damaged_records, dead = recover(disk, writeout.segments, self._residency, self._log, self._clock())
            writeout.start(dead)
        except OSError as error:
            raise StartRefused(f"the store cannot be used ({error}): check the device and its permissions") from error
        if self._residency.sessions:
            self._log.info(
                "recovered",
                sessions=len(self._residency.sessions),
                chunks=sum(session.chunk_count for session in self._residency.sessions.values()),
                segments=len(writeout.segments.segments),
                damaged_records=damaged_records,
            )
        return damaged_records

    def shutdown(self) -> None:
        """Makes all named sessions durable and closes the disk. Raises: WriteFailed, StorageFull."""
        self._stopping.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
        self._prefetches.close()
        if self._prefetcher is not None:
            self._prefetcher.join()
        if self._scrub_thread.ident is not None:
            self._scrub_thread.join()
        self._readers.shutdown()
        if self._writeout is None or self._disk is None:
            return
        try:
            with self._lock:
                temporary = [s.session_id for s in self._residency.sessions.values() if s.temporary]
            for session_id in temporary:
                self.delete(session_id)
            self._writeout.finish()
        finally:
            self._disk.shutdown()

    # --- summaries ---

    def put_summaries(
        self, session_id: int, kind: str, first_chunk: int, chunk_count: int, payload: bytes, epoch: int = 0
    ) -> None:
        """Stores chunk_count equal parts of `payload` as the routing state of these chunks, in place of older ones.
        They belong to the chunks: every session that shares a chunk shares them.

        Raises: SessionNotFound, StaleEpoch, InvalidRequest, KeyOutOfRange, LimitExceeded, StorageFull, WriteFailed.
        """
        size = recall.summary_bytes(self._settings, kind, chunk_count, payload)
        while True:
            with self._lock:
                session = self._residency.session(session_id, epoch)
                rows = recall.rows_to_put(self._settings, session, kind, first_chunk, chunk_count, size)
                held = self._residency.summary_bytes
                if not held or held + len(payload) <= self._summary_bytes_max:
                    recall.put(session, rows, kind, payload)
                    if self._writeout is not None:
                        self._writeout.mark_dirty(session)
                    return
            if self._writeout is None:
                raise StorageFull(f"summaries in RAM have reached {held} bytes and there is no NVMe: delete sessions")
            with self._writeout.barrier:
                self._writeout.round()

    def get_summaries(
        self, session_id: int, kind: str, first_chunk: int, chunk_count: int, bytes_max: int, epoch: int = 0
    ) -> tuple[int, bytes]:
        """(chunks, their routing state) for as many of the chunks as fit in bytes_max.

        Raises: SessionNotFound (also when a chunk has none, or it is damaged), StaleEpoch, InvalidRequest,
        LimitExceeded.
        """
        log = self._writeout.segments if self._writeout else None
        while True:
            with self._lock:
                session = self._residency.session(session_id, epoch)
                found = recall.plan(session, log, kind, first_chunk, chunk_count, bytes_max)
            if not len(found.items):
                break
            assert self._disk is not None
            assert log is not None
            try:
                bad = read_verified(self._disk, found.items, found.result)
            finally:
                with self._lock:
                    log.unpin(found.segments)
            if not bad.any():
                break
            with self._lock:
                if not found.is_current():  # put anew meanwhile: what was read is no more
                    continue
            chunk = first_chunk + int(found.items.positions[bad].min())
            self._log.error("summary damaged", session=session_id, kind=kind, chunk=chunk)
            raise SessionNotFound(
                f"the summary of kind {kind!r} of chunk {chunk} of session {session_id} is damaged: compute it again "
                "from the chunk's K/V and put it"
            )
        return found.chunk_count, found.result.tobytes()

    def summary_kinds(self, session_id: int) -> dict[str, Bools]:
        """Which chunks have a summary of each kind that the session has. Raises: SessionNotFound."""
        with self._lock:
            session = self._residency.session(session_id)
            return session.table.summaries.kinds_of(session.all_rows())

    # --- counters ---

    def stats(self) -> EngineStats:
        writeout = self._writeout
        nvme_bytes_max = writeout.segments.capacity_bytes() if writeout else 0
        with self._lock:
            arena, counters = self._residency.arena, self._counters
            return EngineStats(
                io_engine=self._disk.engine if self._disk else "none",
                sessions=len(self._residency.sessions),
                ram_bytes_max=len(arena.region),
                ram_bytes_used=arena.used_bytes,
                ram_bytes_dirty=arena.dirty_bytes,
                nvme_bytes_max=nvme_bytes_max,
                nvme_bytes_used=writeout.segments.used_bytes() if writeout else 0,
                fetches=counters.fetches,
                fetched_ram_records=counters.fetched_ram_records,
                fetched_nvme_records=counters.fetched_nvme_records,
                fetched_ram_bytes=counters.fetched_ram_bytes,
                fetched_nvme_bytes=counters.fetched_nvme_bytes,
                appended_bytes=counters.appended_bytes,
                written_bytes=writeout.segments.written_bytes if writeout else 0,
                flushes=counters.flushes,
                damaged_records=counters.damaged_records,
                evicted_extents=self._residency.evicted_extents,
                chunks=sum(pool.table.in_use() for pool in self._residency.pools),
                shared_chunks=counters.shared_chunks,
                late_records=counters.late_records,
                prefetched_records=self._prefetched_records,
                prefetch_useful_records=self._ledger.useful,
                prefetch_wasted_records=self._ledger.wasted,
                evicted_sessions=counters.evicted_sessions + (writeout.evicted_sessions if writeout else 0),
                expired_sessions=counters.expired_sessions,
                nvme_bytes_live=sum(pool.table.disk_bytes() for pool in self._residency.pools),
                scrubbed_bytes=counters.scrubbed_bytes,
                scrub_damaged_records=counters.scrub_damaged_records,
                scrub_dropped_records=counters.scrub_dropped_records,
            )


def _count_hits(counters: Counters, records: int, record_bytes: int) -> None:
    counters.fetches += 1
    counters.fetched_ram_records += records
    counters.fetched_ram_bytes += record_bytes


def seeds_of(pool: Pool, uids: U64) -> U64:
    """Checksum seeds of all records of these chunks: [chunks, layers, records]."""
    layers, records = np.arange(pool.geometry.layers), np.arange(pool.slots.records)
    return record_seeds(uids[:, None, None], layers[:, None], records)


def _silent_log() -> FilteringBoundLogger:
    log: FilteringBoundLogger = structlog.wrap_logger(
        structlog.ReturnLogger(), wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL)
    )
    return log
