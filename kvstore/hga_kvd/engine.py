"""The storage engine: sessions of K/V chunks in a RAM arena over a log on disk. The daemon's hub: it knows the order of
steps, its parts do not know each other.

- Bytes leave the engine from a slot whose record is VALID, or from a disk read whose checksum matched; nothing else.
- Acknowledged (append returned) means in the arena, dirty, readable, and not evictable until synced to disk. Durable
  means: flush returned.
- Two locks. `residency.lock`: index and slots, for bookkeeping only. `writeout.barrier`: log and manifest, held across
  writes and syncs. The barrier is taken first. Copies, checksums and reads run under neither, on pinned slots and
  pinned segments.

Here are the lives of sessions, start and shutdown. Calls that move bytes go to one part each: `append`, `fetch`,
`prefetcher`, `recall` (summaries), `integrity`; `background` has the threads.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from structlog.typing import FilteringBoundLogger

from hga_kvd import chains, hits, sessions
from hga_kvd.answers import EngineStats, Fetched, SessionInfo, Verified
from hga_kvd.append import AppendPath
from hga_kvd.background import Background
from hga_kvd.clock import steady_clock
from hga_kvd.config import Settings
from hga_kvd.disk import Disk
from hga_kvd.errors import InvalidRequest, KvdError, NotDurable, SessionNotFound
from hga_kvd.fetch import FetchPath
from hga_kvd.geometry import KEY_DTYPE, Geometry, Keys
from hga_kvd.index import Session
from hga_kvd.integrity import Integrity
from hga_kvd.log import silent_log
from hga_kvd.memory import aligned_buffer
from hga_kvd.parts import Parts
from hga_kvd.prefetch import Part
from hga_kvd.prefetcher import Prefetcher
from hga_kvd.recall import SummaryPath
from hga_kvd.residency import Residency
from hga_kvd.segments import SegmentLog
from hga_kvd.startup import bring_back
from hga_kvd.statistics import collect
from hga_kvd.writeout import WriteOut

U8 = npt.NDArray[np.uint8]
Bools = npt.NDArray[np.bool_]


class Engine:
    def __init__(
        self,
        settings: Settings,
        disk: Disk | None,
        log: FilteringBoundLogger | None = None,
        *,
        background: bool = True,
        clock: Callable[[], float] | None = None,
    ) -> None:
        """Recovers what is on the disk. background=False: nothing is written and nothing expires but by the caller's own
        calls. clock: seconds, of the same zero in all runs on one store; None: clock.py.

        Raises: StartRefused.
        """
        self._settings = settings
        self._log = log or silent_log()
        self._clock = clock = clock or steady_clock()
        self._residency = Residency(settings.ram)
        self._lock = self._residency.lock
        self._disk = disk
        self._writeout = None
        if disk is not None:
            segments = SegmentLog(disk, settings.segment_bytes, settings.nvme_max, settings.nvme_reserve)
            self._writeout = WriteOut(self._residency, disk, segments, self._log, settings.evict == "lru")
        self._parts = Parts(settings, self._residency, disk, self._writeout, self._log)
        self._counters = self._parts.counters
        if disk is not None and self._writeout is not None:
            self._counters.damaged_records = bring_back(disk, self._writeout, self._residency, self._log, clock())
        self._append_path = AppendPath(self._parts)
        self._fetch_path = FetchPath(self._parts)
        self._summary_path = SummaryPath(self._parts)
        self._prefetcher = Prefetcher(self._parts, self._fetch_path, clock)
        self._integrity = Integrity(self._parts)
        self._background = Background(self._parts, self.expire, self.scrub)
        if background:
            self._background.start()

    def shutdown(self) -> None:
        """Makes all named sessions durable and closes the disk. Raises: WriteFailed, StorageFull."""
        self._background.stop()
        self._prefetcher.close()
        if self._writeout is None or self._disk is None:
            return
        try:
            with self._lock:
                for session in [s for s in self._residency.sessions.values() if s.temporary]:
                    self._parts.remove(session)
            self._writeout.finish()
        finally:
            self._disk.shutdown()

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
                sessions.check_same(session, geometry, tenant)
                session.use(self._clock())
                session.owner = owner or session.owner
                session.ttl_s = ttl_s or session.ttl_s
                return self._info(session)
            if not create:
                raise SessionNotFound(f"there is no session named {name!r}; open it with create to make one")
            if geometry is None:
                raise InvalidRequest("a new session needs a geometry")
            session = sessions.make(self._residency, self._settings, name, geometry, owner, tenant, ttl_s)
            rows = sessions.longest_prefix(session.table, ids[: self._settings.chunks_max])
            sessions.share(session, rows)
            if len(rows):
                self._parts.mark_dirty(session)
            session.use(self._clock())
            return self._info(session, created=True)

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
            sessions.share(session, rows)
            if len(rows):
                self._parts.mark_dirty(session)
            session.use(self._clock())
            parent.use(self._clock())
            return self._info(session, created=True)

    def truncate(self, session_id: int, epoch: int, chunk_count: int) -> SessionInfo:
        """Drops the chunks from chunk_count on; the session's epoch grows by one, and requests of the old one are
        refused from now on. Durable when this returns.

        Raises: SessionNotFound, StaleEpoch, KeyOutOfRange; WriteFailed: it is done, but may be undone at the next start.
        """
        with self._lock:
            session = self._residency.session(session_id, epoch)
            session.use(self._clock())
            places = sessions.cut(self._residency, session, chunk_count)
            self._parts.lose(places)
            self._parts.mark_dirty(session)
            info = self._info(session)
        self._parts.settle(session, "truncated")
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
            self._parts.remove(session)
        self._parts.settle(session, "deleted")

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
        self._parts.settle(session, "pinned" if pinned else "no longer pinned")

    def expire(self) -> None:
        """Deletes the sessions that were not used for their ttl_s. Raises: WriteFailed."""
        now = self._clock()
        with self._lock:
            every = self._residency.sessions.values()
            over = [s for s in every if s.ttl_s and not s.pinned and now - s.used_at >= s.ttl_s]
            for session in over:
                self._parts.remove(session)
                self._counters.expired_sessions += 1
        for session in over:
            self._log.info("session expired", session=session.name, chunks=session.chunk_count, ttl_s=session.ttl_s)
            self._parts.settle(session, "expired")

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

    def tenant(self, session_id: int) -> str:
        """Whose session it is; "" also where there is none, which the call itself will say."""
        session = self._residency.sessions.get(session_id)
        return "" if session is None else session.tenant

    def record_bytes(self, session_id: int) -> int:
        """Raises: SessionNotFound. Without the lock, which a plan may hold for a millisecond."""
        return self._residency.session(session_id).table.geometry.record_bytes

    def _info(self, session: Session, *, created: bool = False, token_ids: bytes = b"") -> SessionInfo:
        durable = self._writeout is not None and session.session_id in self._writeout.named
        return sessions.info(session, durable, created, token_ids)

    # --- bytes ---

    def append_limit_check(self, session_id: int, first_chunk: int, chunk_count: int, epoch: int = 0) -> int:
        """Bytes that the payload of this append must have.

        Raises: SessionNotFound, StaleEpoch, AppendOutOfOrder, InvalidRequest, LimitExceeded.
        """
        return self._append_path.payload_bytes(session_id, epoch, first_chunk, chunk_count)

    def append(
        self, session_id: int, first_chunk: int, chunk_count: int, payload: U8, token_ids: bytes, epoch: int = 0
    ) -> int:
        """Adds closed chunks at the end of the session; returns its chunk count. All of them or none. Chunks that are
        stored already, same tokens from the start on and same bytes, are shared.

        payload: [chunk][layer][kv_head][group][K,V][token][dim], 1-D. It may change under our hands (it is a client's
        memory): checksums are computed over what lies in the arena.
        Raises: as append_limit_check; StorageFull; WriteFailed.
        """
        now = self._clock()
        return self._append_path.append(session_id, epoch, first_chunk, chunk_count, payload, token_ids, now)

    def fetch(
        self,
        session_id: int,
        keys: Keys,
        destination: U8,
        epoch: int = 0,
        overdue: Callable[[], bool] | None = None,
        once: bool = False,
    ) -> Fetched:
        """Records of `keys` (KEY_DTYPE) in their order into `destination`, 1-D, len(keys) * record_bytes.

        overdue: says when the deadline has passed; what is not read by then is LATE. None: no deadline.
        once: the caller keeps them; what RAM does not have is read past it.
        Raises: SessionNotFound, StaleEpoch, KeyOutOfRange, LimitExceeded; nothing was written to the destination then.
        """
        fetched = self._fetch_path.fetch(session_id, keys, destination, epoch, self._clock(), overdue, once=once)
        self._prefetcher.fetched(session_id, keys)
        return fetched

    def fetch_few(self, session_id: int, packed_keys: bytes, into: memoryview, epoch: int = 0) -> int:
        """As `fetch`, in one turn of the lock, if RAM has all records and there is room for them: how many. 0: nothing was
        done. packed_keys: of KEY_DTYPE."""
        count = hits.fetch_few(self._parts, session_id, packed_keys, into, epoch, self._clock())
        if count:
            self._prefetcher.fetched(session_id, np.frombuffer(packed_keys, KEY_DTYPE))
        return count

    def prefetch(self, session_id: int, epoch: int, keys: Keys) -> None:
        """Brings these records into RAM, as far as its policy takes them, behind all fetches; returns at once. Takes the
        place of what the session asked for before and is not brought yet.

        Raises: SessionNotFound, StaleEpoch, KeyOutOfRange, LimitExceeded.
        """
        self._prefetcher.put(Part(session_id, epoch, keys))

    def put_summaries(
        self, session_id: int, kind: str, first_chunk: int, chunk_count: int, payload: bytes, epoch: int = 0
    ) -> None:
        """Stores chunk_count equal parts of `payload` as the routing state of these chunks, in place of older ones.
        They belong to the chunks: every session that shares a chunk shares them.

        Raises: SessionNotFound, StaleEpoch, InvalidRequest, KeyOutOfRange, LimitExceeded, StorageFull, WriteFailed.
        """
        self._summary_path.put(session_id, epoch, kind, first_chunk, chunk_count, payload, self._clock())

    def get_summaries(
        self, session_id: int, kind: str, first_chunk: int, chunk_count: int, bytes_max: int, epoch: int = 0
    ) -> tuple[int, bytes]:
        """As read_summaries, into memory of its own: (chunks, their routing state)."""
        destination = aligned_buffer(bytes_max)
        count, size = self.read_summaries(session_id, kind, first_chunk, chunk_count, destination, epoch)
        return count, destination[:size].tobytes()

    def read_summaries(
        self, session_id: int, kind: str, first_chunk: int, chunk_count: int, destination: U8, epoch: int = 0
    ) -> tuple[int, int]:
        """The routing state of as many of the chunks as follow one another, have equal sizes, and fit in the destination,
        1-D. Returns how many chunks, and how many bytes.

        Raises: SessionNotFound (also when the first chunk has none, or one is damaged), StaleEpoch, InvalidRequest,
        LimitExceeded.
        """
        return self._summary_path.get(session_id, epoch, kind, first_chunk, chunk_count, destination)

    def summary_kinds(self, session_id: int) -> dict[str, Bools]:
        """Which chunks have a summary of each kind that the session has. Raises: SessionNotFound."""
        with self._lock:
            session = self._residency.session(session_id)
            return session.table.summaries.kinds_of(session.all_rows())

    def flush(self, session_id: int) -> int:
        """The durability barrier: what was acknowledged before survives power loss. Returns the durable chunk count.

        Raises: SessionNotFound, NotDurable, WriteFailed, StorageFull.
        """
        with self._lock:
            session = self._residency.session(session_id)
            session.use(self._clock())  # nor may space be made of it while it is written
            self._counters.flushes += 1
        if self._writeout is None:
            raise NotDurable("this daemon keeps K/V in RAM only: start it with --nvme to make sessions durable")
        if session.temporary:
            raise NotDurable(f"session {session_id} is temporary and never durable: open it by name to keep it")
        self._writeout.flush(session)
        with self._lock:
            return self._residency.session(session_id).written_count

    # --- integrity ---

    def verify(self, session_id: int) -> Verified:
        """Compares every record of the session, on disk and in RAM, with its checksum. Takes as long as reading it does.

        Raises: SessionNotFound.
        """
        return self._integrity.verify(session_id)

    def scrub(self, bytes_max: int) -> int:
        """Verifies about so many bytes more, of disk and arena in turns. Returns how many; 0: there are none."""
        return self._integrity.scrub(bytes_max)

    def stats(self) -> EngineStats:
        return collect(self._parts, self._prefetcher)
