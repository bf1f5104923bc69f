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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import structlog
from structlog.typing import FilteringBoundLogger

from hga_kvd import misses
from hga_kvd.arena import VALID, copy_records
from hga_kvd.checksum import checksums, record_seeds, summary_seeds
from hga_kvd.config import Settings
from hga_kvd.disk import Disk
from hga_kvd.errors import (
    AppendOutOfOrder,
    GeometryMismatch,
    InvalidRequest,
    KeyOutOfRange,
    KvdError,
    LimitExceeded,
    NotDurable,
    SessionNotFound,
    StartRefused,
    StorageFull,
)
from hga_kvd.format import KIND_BYTES_MAX
from hga_kvd.geometry import KEY_DTYPE, Geometry, Keys
from hga_kvd.index import Session, Summaries
from hga_kvd.misses import Misses
from hga_kvd.reads import Items, read_verified
from hga_kvd.residency import Pool, Residency, locate, out_of_range
from hga_kvd.segments import Segment, SegmentLog
from hga_kvd.startup import recover
from hga_kvd.writeout import WriteOut

U8 = npt.NDArray[np.uint8]
I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]
Bools = npt.NDArray[np.bool_]

NAME_BYTES_MAX = 256
# Summaries wait in plain memory to be written, or for ever without a disk. They are about 1/25 of the K/V, so an eighth
# of the arena never is the tighter of the two limits.
SUMMARY_SHARE = 8
SUMMARY_BYTES_MIN = 64 << 20
# An append that finds every slot taken by calls in flight looks again this often, for 10 s.
CLAIM_WAIT_S = 0.02
CLAIM_WAITS_MAX = 500
WRITE_RETRY_S = 1.0
# Read parts of large fetches beside the calling threads; they share the queue depth of the disk.
READER_THREADS = 2

STATUS_DAMAGED = 1


@dataclass(frozen=True)
class Fetched:
    """statuses: u8 [keys], RecordStatus of the wire; None: all OK."""

    statuses: U8 | None
    ram_records: int
    nvme_records: int


@dataclass(frozen=True)
class SessionInfo:
    session_id: int
    name: str
    geometry: Geometry
    chunk_count: int
    durable_chunk_count: int
    damaged_records: int
    temporary: bool
    token_ids: bytes = b""
    created: bool = False


@dataclass(frozen=True)
class EngineStats:
    """As in StatResponse of kvd.proto."""

    io_engine: str
    sessions: int
    ram_bytes_max: int
    ram_bytes_used: int
    ram_bytes_dirty: int
    nvme_bytes_max: int
    nvme_bytes_used: int
    fetches: int
    fetched_ram_records: int
    fetched_nvme_records: int
    fetched_ram_bytes: int
    fetched_nvme_bytes: int
    appended_bytes: int
    written_bytes: int
    flushes: int
    damaged_records: int
    evicted_extents: int


@dataclass(eq=False)
class _Counters:
    fetches: int = 0
    fetched_ram_records: int = 0
    fetched_nvme_records: int = 0
    fetched_ram_bytes: int = 0
    fetched_nvme_bytes: int = 0
    appended_bytes: int = 0
    flushes: int = 0
    damaged_records: int = 0


class Engine:
    def __init__(
        self,
        settings: Settings,
        disk: Disk | None,
        log: FilteringBoundLogger | None = None,
        *,
        background: bool = True,
    ) -> None:
        """Recovers what is on the disk. background=False: nothing is written but by the caller's own calls.

        Raises: StartRefused.
        """
        self._settings = settings
        self._disk = disk
        self._log = log or _silent_log()
        self._residency = Residency(settings.ram)
        self._lock = self._residency.lock
        self._counters = _Counters()
        self._summary_bytes_max = max(SUMMARY_BYTES_MIN, settings.ram // SUMMARY_SHARE)
        self._writeout: WriteOut | None = None
        self._stopping = threading.Event()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._readers = ThreadPoolExecutor(READER_THREADS, thread_name_prefix="read")  # started when first used
        if disk is None:
            return
        segments = SegmentLog(disk, settings.segment_bytes, settings.nvme_max, settings.nvme_reserve)
        self._writeout = WriteOut(self._residency, disk, segments, self._log)
        self._counters.damaged_records = self._recover(disk, self._writeout)
        if background:
            self._thread = threading.Thread(target=self._write_in_background, name="write-out", daemon=True)
            self._thread.start()

    # --- sessions ---

    def open(self, name: str, geometry: Geometry | None, create: bool, owner: int = 0) -> SessionInfo:
        """The session of this name, made if there is none and `create` says so; without a name a new temporary one.

        Raises: InvalidRequest, GeometryMismatch, SessionNotFound, LimitExceeded.
        """
        if len(name.encode()) > NAME_BYTES_MAX:
            raise InvalidRequest(f"a session name of {len(name.encode())} bytes; at most {NAME_BYTES_MAX} are allowed")
        with self._lock:
            session = self._residency.by_name.get(name) if name else None
            if session is not None:
                differences = session.table.geometry.differences(geometry) if geometry else []
                if differences:
                    raise GeometryMismatch(
                        f"session {name!r} exists with another geometry ({'; '.join(differences)}): open it with its "
                        "own, or delete it first"
                    )
                return self._info(session)
            if not create:
                raise SessionNotFound(f"there is no session named {name!r}; open it with create to make one")
            return self._info(self._create(name, geometry, owner), created=True)

    def _create(self, name: str, geometry: Geometry | None, owner: int) -> Session:
        residency, settings = self._residency, self._settings
        if geometry is None:
            raise InvalidRequest("a new session needs a geometry")
        if len(residency.sessions) >= settings.sessions_max:
            raise LimitExceeded(f"there are {settings.sessions_max} sessions already; delete some")
        if not residency.chunks_max(geometry):
            raise LimitExceeded(
                f"one chunk of this geometry takes {geometry.chunk_bytes} bytes in {geometry.layers} extents, more "
                f"than the RAM arena of {len(residency.arena.region)} bytes holds; start the daemon with more --ram"
            )
        pool = residency.pool_for(geometry)
        session = Session(residency.next_session_id, name, pool.table, pool.number, owner)
        residency.next_session_id += 1
        residency.add_session(session)
        return session

    def close(self, session_id: int) -> None:
        """The client is done: a temporary session is deleted, a named one stays. Raises: SessionNotFound."""
        with self._lock:
            session = self._residency.session(session_id)
        if session.temporary:
            self.delete(session_id)

    def delete(self, session_id: int) -> None:
        """Removes the session for everybody; durable when this returns.

        Raises: SessionNotFound; WriteFailed: it is gone now, but may come back at the next start.
        """
        with self._lock:
            session = self._residency.session(session_id)
            if self._writeout is not None:
                self._writeout.lose_places(session)
            self._residency.remove_session(session)
        if self._writeout is not None:
            self._writeout.forget(session)

    def release_owner(self, owner: int) -> None:
        """A client is gone, and with it its temporary sessions."""
        with self._lock:
            sessions = [s.session_id for s in self._residency.sessions.values() if s.temporary and s.owner == owner]
        for session_id in sessions:
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
        )

    # --- append ---

    def append_limit_check(self, session_id: int, first_chunk: int, chunk_count: int) -> int:
        """Bytes that the payload of this append must have.

        Raises: SessionNotFound, AppendOutOfOrder, InvalidRequest, LimitExceeded.
        """
        with self._lock:
            session = self._residency.session(session_id)
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

    def append(self, session_id: int, first_chunk: int, chunk_count: int, payload: U8, token_ids: bytes) -> int:
        """Adds closed chunks at the end of the session; returns its chunk count. All of them or none.

        payload: [chunk][layer][kv_head][group][K,V][token][dim], 1-D. It may change under our hands (it is a client's
        memory): checksums are computed over what lies in the arena.
        Raises: as append_limit_check; StorageFull; WriteFailed.
        """
        payload_bytes = self.append_limit_check(session_id, first_chunk, chunk_count)
        with self._lock:
            session = self._residency.session(session_id)
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
            uids = np.arange(chunk_count, dtype=np.uint64) + np.uint64(self._residency.next_chunk_uid)
            self._residency.next_chunk_uid += chunk_count
        try:
            slots = self._claim(pool, chunk_count * geometry.layers)
            try:
                pool.slots.put_extents(slots, payload.reshape(-1, geometry.extent_bytes))
                sums = self._checksums_of(pool, slots, uids)
                with self._lock:
                    return self._commit_append(session, pool, first_chunk, slots, uids, sums, token_ids)
            except BaseException:
                with self._lock:
                    pool.slots.free(slots)
                raise
        finally:
            with self._lock:
                session.appending = False

    def _claim(self, pool: Pool, count: int) -> I64:
        """Slots for an append; they are dirty from now on. Writes out, or waits for calls in flight, to get them."""
        for _ in range(CLAIM_WAITS_MAX):
            with self._lock:
                if self._residency.make_room(pool, count) >= count:
                    slots = pool.slots.take(count)
                    pool.slots.dirty[slots] = True
                    return slots
            if self._writeout is None:
                raise StorageFull(
                    f"the RAM arena of {len(self._residency.arena.region)} bytes is full and there is no NVMe: delete "
                    "sessions, or start the daemon with more --ram or with --nvme"
                )
            with self._writeout.barrier:
                wrote = self._writeout.round()
            if not wrote:
                self._stopping.wait(CLAIM_WAIT_S)
        raise StorageFull(f"no {count} free slots in the RAM arena: calls in flight hold them; append again")

    def _checksums_of(self, pool: Pool, slots: I64, uids: U64) -> U64:
        """Of all records in freshly filled slots: u64 [chunks, layers, records]."""
        layers, records = pool.geometry.layers, np.arange(pool.slots.records)
        seeds = record_seeds(uids[:, None, None], np.arange(layers)[:, None], records)
        starts = pool.slots.starts(slots[:, None], records).reshape(-1)
        found = checksums(self._residency.memory, starts, pool.slots.record_bytes, seeds.reshape(-1))
        return found.reshape(len(uids), layers, pool.slots.records)

    def _commit_append(
        self, session: Session, pool: Pool, first_chunk: int, slots: I64, uids: U64, sums: U64, token_ids: bytes
    ) -> int:
        if session.deleted:
            raise SessionNotFound(f"session {session.session_id} was deleted during the append")
        assert session.chunk_count == first_chunk
        table, count, layers = pool.table, len(uids), pool.geometry.layers
        rows = table.add(count)
        table.uid[rows], table.checksums[rows] = uids, sums
        table.tokens_known[rows] = bool(token_ids)
        table.token_ids[rows] = np.frombuffer(token_ids, "<u4").reshape(count, -1) if token_ids else 0
        self._residency.hold(pool, slots, np.repeat(rows, layers), np.tile(np.arange(layers), count))
        pool.slots.state[slots] = VALID
        session.put_rows(first_chunk, rows)
        session.chunk_count += count
        self._counters.appended_bytes += count * pool.geometry.chunk_bytes
        if self._writeout is not None:
            self._writeout.mark_dirty(session)
            if 2 * self._residency.arena.dirty_bytes > len(self._residency.arena.region):
                self._wake.set()
        return session.chunk_count

    # --- fetch ---

    def fetch(self, session_id: int, keys: Keys, destination: U8) -> Fetched:
        """Records of `keys` (KEY_DTYPE) in their order into `destination`, 1-D, len(keys) * record_bytes.

        Raises: SessionNotFound, KeyOutOfRange, LimitExceeded; nothing was written to the destination then.
        """
        assert keys.dtype == KEY_DTYPE
        count = len(keys)
        with self._lock:
            session = self._residency.session(session_id)
            pool = self._residency.pools[session.pool]
            slots = pool.slots
            self._check_fetch_size(count, slots.record_bytes)
            assert len(destination) == count * slots.record_bytes
            if not count:
                return Fetched(None, 0, 0)
            try:  # numpy checks every index anyway; only a refusal looks for the one to blame
                rows, layers, records = locate(session, keys)
                slot_of = pool.table.slot[rows, layers]
                hit = slots.state[slot_of, records] == VALID
            except IndexError:
                raise out_of_range(session, keys) from None
            all_hit = np.count_nonzero(hit) == count
            hits = slot_of if all_hit else slot_of[hit]
            slots.pin(hits)
            pool.policy.touch(hits)
            missing = None
            if not all_hit:
                assert self._writeout is not None
                log = self._writeout.segments
                missing = misses.plan(self._residency, log, pool, rows, layers, records, missing=np.flatnonzero(~hit))
        bad = keep = None
        try:
            if missing is None:
                slots.gather(hits, records, destination)
            else:
                at = np.flatnonzero(hit) * slots.record_bytes
                starts = slots.starts(hits, records[hit])
                copy_records(self._residency.memory, starts, destination.data, at, slots.record_bytes)
                assert self._disk is not None
                bad, keep = misses.bring(self._disk, self._readers, self._residency, pool, missing, destination)
        finally:
            with self._lock:
                slots.unpin(hits)
                if missing is not None:
                    misses.end(self._residency, log, pool, missing, keep)
                counters = self._counters
                counters.fetches += 1
                counters.fetched_ram_records += len(hits)
                counters.fetched_ram_bytes += len(hits) * slots.record_bytes
        if missing is None:
            return Fetched(None, count, 0)
        assert bad is not None
        return self._judge(session, keys, missing, bad, len(hits))

    def _check_fetch_size(self, count: int, record_bytes: int) -> None:
        settings = self._settings
        if count > settings.fetch_keys_max:
            raise LimitExceeded(f"a fetch of {count} keys; at most {settings.fetch_keys_max} are allowed: split it")
        if count * record_bytes > settings.fetch_bytes_max:
            raise LimitExceeded(
                f"a fetch of {count * record_bytes} bytes; at most {settings.fetch_bytes_max} are allowed: split it"
            )

    def _judge(self, session: Session, keys: Keys, missing: Misses, bad: Bools, ram_records: int) -> Fetched:
        statuses = np.zeros(len(keys), np.uint8)
        statuses[missing.lost] = STATUS_DAMAGED
        statuses[missing.items.positions[bad]] = STATUS_DAMAGED
        statuses[missing.copies_to[bad[missing.copies_of]]] = STATUS_DAMAGED
        damaged = int(np.count_nonzero(statuses))
        read = len(keys) - ram_records - damaged
        with self._lock:
            self._counters.fetched_nvme_records += read
            self._counters.fetched_nvme_bytes += read * missing.items.item_bytes
            found = {tuple(key) for key in keys[missing.items.positions[bad]].tolist()} - session.damaged
            session.damaged |= found
            session.damaged_records += len(found)
            self._counters.damaged_records += len(found)
        for group, kv_head, layer in sorted(found):
            self._log.error("record damaged", session=session.session_id, layer=layer, kv_head=kv_head, group=group)
        return Fetched(statuses if damaged else None, ram_records, read)

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

    def _write_in_background(self) -> None:
        """Keeps half of the arena free of dirty extents, so that appends rarely wait."""
        writeout, arena = self._writeout, self._residency.arena
        assert writeout is not None
        while not self._stopping.is_set():
            self._wake.wait()
            self._wake.clear()
            try:
                while not self._stopping.is_set() and 4 * arena.dirty_bytes > len(arena.region):
                    with writeout.barrier:
                        if not writeout.round():
                            break
            except (KvdError, OSError) as error:  # dirty data stays; who needs its slots or its durability is told
                self._log.warning("background write-out failed", error=str(error))
                self._stopping.wait(WRITE_RETRY_S)

    def _recover(self, disk: Disk, writeout: WriteOut) -> int:
        try:
            damaged_records = recover(disk, writeout.segments, self._residency, self._log)
            writeout.start()
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

    def put_summaries(self, session_id: int, kind: str, first_chunk: int, chunk_count: int, payload: bytes) -> None:
        """Stores chunk_count equal parts of `payload` as the routing state of these chunks, in place of older ones.

        Raises: SessionNotFound, InvalidRequest, KeyOutOfRange, LimitExceeded, StorageFull, WriteFailed.
        """
        if not 1 <= len(kind.encode()) <= KIND_BYTES_MAX:
            raise InvalidRequest(f"a summary kind of {len(kind.encode())} bytes; it must have 1 to {KIND_BYTES_MAX}")
        size, rest = divmod(len(payload), max(1, chunk_count))
        if chunk_count < 1 or rest or not size:
            raise InvalidRequest(
                f"{len(payload)} bytes are not the same number of bytes for each of {chunk_count} chunks"
            )
        if size > self._settings.summary_bytes_max:
            raise LimitExceeded(
                f"a summary of {size} bytes a chunk; at most {self._settings.summary_bytes_max} are allowed"
            )
        while not self._put_summaries(session_id, kind, first_chunk, size, payload):
            if self._writeout is None:
                raise StorageFull(
                    f"summaries in RAM have reached {self._summary_bytes_max} bytes and there is no NVMe: delete "
                    "sessions"
                )
            with self._writeout.barrier:
                self._writeout.round()

    def _put_summaries(self, session_id: int, kind: str, first_chunk: int, size: int, payload: bytes) -> bool:
        """False if they do not fit in RAM now."""
        chunk_count = len(payload) // size
        with self._lock:
            session = self._residency.session(session_id)
            if first_chunk + chunk_count > session.chunk_count:
                raise KeyOutOfRange(
                    f"summaries of chunks up to {first_chunk + chunk_count - 1}; session {session_id} has "
                    f"{session.chunk_count} chunks: append them first"
                )
            known = session.summaries.get(kind)
            if known is not None and known.bytes_per_chunk != size:
                raise InvalidRequest(
                    f"summaries of kind {kind!r} have {known.bytes_per_chunk} bytes a chunk in this session, not "
                    f"{size}: use another kind"
                )
            if self._residency.summary_bytes and self._residency.summary_bytes + len(payload) > self._summary_bytes_max:
                return False
            summaries = session.summaries.setdefault(kind, Summaries(size))
            self._residency.summary_bytes += summaries.put(first_chunk, payload)
            if self._writeout is not None:
                self._writeout.mark_dirty(session)
        return True

    def get_summaries(
        self, session_id: int, kind: str, first_chunk: int, chunk_count: int, bytes_max: int
    ) -> tuple[int, bytes]:
        """(chunks, their routing state) for as many of the chunks as fit in bytes_max.

        Raises: SessionNotFound (also when a chunk has none, or it is damaged), InvalidRequest, LimitExceeded.
        """
        if chunk_count < 1:
            raise InvalidRequest("summaries of no chunks")
        with self._lock:
            session = self._residency.session(session_id)
            summaries = session.summaries.get(kind) or Summaries(1)
            size = summaries.bytes_per_chunk
            count = min(chunk_count, bytes_max // size)
            if not count:
                raise LimitExceeded(f"a summary of {size} bytes does not fit in an answer of {bytes_max} bytes")
            missing = summaries.first_missing(first_chunk, count)
            if missing is not None:
                raise SessionNotFound(
                    f"chunk {missing} of session {session_id} has no summary of kind {kind!r}: put it"
                )
            result = np.zeros(count * size, np.uint8)
            positions = summaries.copy_from_ram(first_chunk, result)
            chunks = first_chunk + positions
            segments: tuple[Segment, ...] = ()
            handles = np.zeros(0, np.int64)
            if len(chunks):
                assert self._writeout is not None
                segments, handles = self._writeout.segments.pin(summaries.segment[chunks])
            seeds, expected = summary_seeds(session_id, kind, chunks), summaries.checksum[chunks]
            items = Items(size, handles, summaries.offset[chunks], positions, seeds, expected)
        if not len(items):
            return count, result.tobytes()
        assert self._disk is not None
        assert self._writeout is not None
        try:
            bad = read_verified(self._disk, items, result)
        finally:
            with self._lock:
                self._writeout.segments.unpin(segments)
        if bad.any():
            chunk = first_chunk + int(items.positions[bad].min())
            self._log.error("summary damaged", session=session_id, kind=kind, chunk=chunk)
            raise SessionNotFound(
                f"the summary of kind {kind!r} of chunk {chunk} of session {session_id} is damaged: compute it again "
                "from the chunk's K/V and put it"
            )
        return count, result.tobytes()

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
            )


def _silent_log() -> FilteringBoundLogger:
    log: FilteringBoundLogger = structlog.wrap_logger(
        structlog.ReturnLogger(), wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL)
    )
    return log
