"""From dirty to durable: frames, syncs, the manifest, and the space that dead segments give back.

A *round* makes frames of dirty chunks and summaries (as many as fit, in the order they were appended), writes them to
the open segment and syncs it. Only then are they clean: what a failed sync may have lost is still in RAM. A round that
fails poisons its segment and is tried once more in a new one.

`barrier` guards the log and the manifest and is held across I/O; whoever holds it may take the residency's lock, never
the other way round. Calls that wait for the barrier to flush are served together by whoever gets it first.
"""

from __future__ import annotations

import errno
import threading
from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from structlog.typing import FilteringBoundLogger

from hga_kvd.checksum import checksum, summary_seeds
from hga_kvd.disk import Disk
from hga_kvd.errors import StorageFull, WriteFailed
from hga_kvd.format import (
    CHUNKS,
    MANIFEST_NAME,
    SUMMARIES,
    Manifest,
    SegmentEntry,
    SessionEntry,
    chunk_table_bytes,
    encode_chunk_table,
    encode_manifest,
    encode_summary_table,
    round_up,
)
from hga_kvd.index import NO_SEGMENT, Session
from hga_kvd.memory import address_of, aligned_buffer
from hga_kvd.residency import Pool, Residency
from hga_kvd.segments import NewFrame, SegmentLog, frame_bytes

I64 = npt.NDArray[np.int64]

# Large enough that table and header are noise, small enough that a torn one loses little.
FRAME_BODY_BYTES = 16 << 20
# Between two syncs: 40 ms of a 1.6 GB/s disk, so that a flush never waits long for a round of the background.
ROUND_BYTES = 64 << 20
# Ids that a run may give out before the manifest has to say so; a crash skips the rest of them.
SESSION_IDS_RESERVED = 1 << 20
CHUNK_UIDS_RESERVED = 1 << 40


@dataclass(eq=False)
class _Job:
    """One frame to be: of chunks (rows, slots) or of summaries (payloads)."""

    session: Session
    kind: int
    first_chunk: int
    chunk_count: int
    frame: NewFrame
    slots: I64
    summary_kind: str = ""
    payloads: list[bytes] = field(default_factory=list)
    checksums: npt.NDArray[np.uint64] | None = None
    body: npt.NDArray[np.uint8] | None = None  # keeps the memory that the frame's addresses name


class WriteOut:
    def __init__(self, residency: Residency, disk: Disk, segments: SegmentLog, log: FilteringBoundLogger) -> None:
        self.barrier = threading.Lock()
        self.segments = segments
        self.dirty: OrderedDict[int, Session] = OrderedDict()  # residency's lock; oldest first
        self.named: set[int] = set()  # sessions in the manifest on disk
        self.session_ids_end = 0  # as reserved in the manifest
        self._flushing: dict[int, Session] = {}
        self._residency = residency
        self._lock = residency.lock
        self._disk = disk
        self._log = log

    # --- called with the residency's lock held ---

    def mark_dirty(self, session: Session) -> None:
        self.dirty.setdefault(session.session_id, session)

    def is_durable(self, session: Session, chunk_count: int) -> bool:
        """Whether these chunks and all summaries survive power loss."""
        pending = any(summaries.in_ram for summaries in session.summaries.values())
        return session.session_id in self.named and session.written_count >= chunk_count and not pending

    def lose_places(self, session: Session) -> None:
        """The session is going: its segments lose what it had in them. Before its rows are removed."""
        table = self._residency.pools[session.pool].table
        places = [table.segment[session.rows[: session.chunk_count]]]
        for summaries in session.summaries.values():
            places.append(summaries.segment)
        for segment_id, count in zip(*np.unique(np.concatenate(places), return_counts=True), strict=True):
            if segment_id != NO_SEGMENT:
                self.segments.segments[int(segment_id)].live -= int(count)
        self.dirty.pop(session.session_id, None)

    # --- called without any lock ---

    def flush(self, session: Session) -> None:
        """Returns when what the session has now is durable. Raises WriteFailed, StorageFull."""
        with self._lock:
            chunk_count = session.chunk_count
            if self.is_durable(session, chunk_count):
                return
            self._flushing[session.session_id] = session
        try:
            with self.barrier:
                while True:
                    with self._lock:
                        if session.deleted or self.is_durable(session, chunk_count):
                            return
                        waiting = list({**self._flushing, session.session_id: session}.values())
                    if not self.round(waiting):
                        self._name_sessions()
        finally:
            with self._lock:
                self._flushing.pop(session.session_id, None)

    def forget(self, session: Session) -> None:
        """The session was deleted: takes it out of the manifest, and removes segments that nothing lives in now.

        Raises: WriteFailed.
        """
        with self.barrier:
            try:
                if session.session_id in self.named:
                    self.write_manifest()
                self.collect()
            except OSError as error:
                raise WriteFailed(
                    f"session {session.session_id} is deleted, but the manifest could not be written ({error}): it may "
                    "come back at the next start"
                ) from error

    def start(self) -> None:
        """Says in the manifest that a daemon runs. Raises: OSError."""
        with self.barrier:
            self.write_manifest()
            self.collect()

    def finish(self) -> None:
        """Makes everything durable and says so in the manifest. Raises: WriteFailed, StorageFull."""
        with self.barrier:
            while self.round():
                pass
            try:
                self.collect()
                self.write_manifest(clean=True)
            except OSError as error:
                raise WriteFailed(f"the manifest could not be written ({error}); the next start reads more") from error

    def _name_sessions(self) -> None:
        try:
            self.write_manifest()
        except OSError as error:
            raise WriteFailed(f"the manifest could not be written ({error.strerror}); flush again") from error

    # --- called with the barrier held ---

    def round(self, sessions: list[Session] | None = None) -> bool:
        """Writes and syncs the next frames of these sessions (None: of all). False if nothing is dirty.

        Raises: StorageFull, WriteFailed; the data is then still in RAM and dirty.
        """
        failed = False
        while True:
            with self._lock:
                jobs, needed_bytes = self._next_jobs(sessions)
            if not jobs and not needed_bytes:
                return False
            try:
                if jobs:
                    self._write(jobs)
                    return True
                self._roll(needed_bytes)
            except OSError as error:
                self._log.error("write failed", error=str(error), again=failed)
                if self.segments.open is not None:
                    self.segments.seal("poisoned")
                if failed:
                    kind = StorageFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else WriteFailed
                    raise kind(
                        f"writing to NVMe failed twice ({error}): what was appended since the last flush is not "
                        "durable; it is still served from RAM. Check the device, then flush again"
                    ) from error
                failed = True

    def _next_jobs(self, sessions: list[Session] | None) -> tuple[list[_Job], int]:
        """Jobs that fit in the open segment, their slots pinned; or none and the bytes that the first one needs."""
        jobs: list[_Job] = []
        room = min(self.segments.room(), ROUND_BYTES)
        for session in list(self.dirty.values()) if sessions is None else sessions:
            if session.deleted:
                continue
            first = session.written_count
            while first < session.chunk_count:
                pool = self._residency.pools[session.pool]
                # The first frame of a round may be larger than a round.
                left = room if jobs else self.segments.room()
                count = self._chunks_that_fit(pool, session.chunk_count - first, left)
                if not count:
                    return jobs, self._chunk_frame_bytes(pool, 1)
                jobs.append(self._chunk_job(session, pool, first, count))
                room -= jobs[-1].frame.frame_bytes
                first += count
            for job in self._summary_jobs(session):
                if job.frame.frame_bytes > (room if jobs else self.segments.room()):
                    return jobs, job.frame.frame_bytes
                jobs.append(job)
                room -= job.frame.frame_bytes
        return jobs, 0

    def _chunk_frame_bytes(self, pool: Pool, count: int) -> int:
        return frame_bytes(chunk_table_bytes(pool.geometry, count), count * pool.geometry.layers * pool.slots.stride)

    def _chunks_that_fit(self, pool: Pool, count: int, room: int) -> int:
        """Of `count` chunks, how many make one frame of at most `room` bytes."""
        count = min(count, max(1, FRAME_BODY_BYTES // (pool.geometry.layers * pool.slots.stride)))
        if self._chunk_frame_bytes(pool, count) <= room:
            return count
        each = self._chunk_frame_bytes(pool, count + 1) - self._chunk_frame_bytes(pool, count)
        count = min(count, room // max(1, each) + 1)
        while count and self._chunk_frame_bytes(pool, count) > room:
            count -= 1
        return count

    def _chunk_job(self, session: Session, pool: Pool, first: int, count: int) -> _Job:
        table, rows = pool.table, session.rows[first : first + count]
        slots = table.slot[rows].reshape(-1)
        assert slots.all()
        pool.slots.pin(slots)
        # fmt: off
        text = encode_chunk_table(
            pool.geometry.record_bytes, table.uid[rows], table.checksums[rows], table.tokens_known[rows],
            table.token_ids[rows],
        )
        # fmt: on
        # Slots that follow one another in memory are written in one piece.
        addresses = self._residency.address + pool.slots.offset[slots]
        starts = np.flatnonzero(np.append(True, np.diff(addresses) != pool.slots.stride))
        lengths = np.diff(starts, append=len(slots)) * pool.slots.stride
        frame = NewFrame(CHUNKS, session.session_id, first, count, text, addresses[starts].astype(np.uint64), lengths)
        return _Job(session, CHUNKS, first, count, frame, slots)

    def _summary_jobs(self, session: Session) -> list[_Job]:
        jobs = []
        for kind, summaries in session.summaries.items():
            chunks = np.array(sorted(summaries.in_ram), np.int64)
            per_frame = max(1, FRAME_BODY_BYTES // summaries.bytes_per_chunk)
            for run in np.split(chunks, np.flatnonzero(np.diff(chunks) != 1) + 1):
                for at in range(0, len(run), per_frame):
                    jobs.append(self._summary_job(session, kind, run[at : at + per_frame]))
        return jobs

    def _summary_job(self, session: Session, kind: str, chunks: I64) -> _Job:
        summaries = session.summaries[kind]
        payloads = [summaries.in_ram[chunk] for chunk in chunks.tolist()]
        seeds = summary_seeds(session.session_id, kind, chunks).tolist()
        sums = np.array([checksum(p, seed) for p, seed in zip(payloads, seeds, strict=True)], np.uint64)
        text = encode_summary_table(kind, summaries.bytes_per_chunk, sums)
        joined = b"".join(payloads)
        body = aligned_buffer(round_up(len(joined)))
        body[: len(joined)] = np.frombuffer(joined, np.uint8)
        first, count = int(chunks[0]), len(chunks)
        place = np.array([address_of(body)], np.uint64), np.array([len(body)], np.int64)
        frame = NewFrame(SUMMARIES, session.session_id, first, count, text, *place)
        return _Job(session, SUMMARIES, first, count, frame, np.zeros(0, np.int64), kind, payloads, sums, body)

    def _write(self, jobs: list[_Job]) -> None:
        segment = self.segments.open
        assert segment is not None
        try:
            offsets = self.segments.append([job.frame for job in jobs])
            self.segments.sync()
        except BaseException:
            with self._lock:
                self._unpin(jobs)
            raise
        with self._lock:
            self._unpin(jobs)
            for job, offset in zip(jobs, offsets, strict=True):
                if not job.session.deleted:
                    commit = self._commit_chunks if job.kind == CHUNKS else self._commit_summaries
                    segment.live += commit(job, segment.segment_id, offset)
                    if job.session.written_count == job.session.chunk_count and not any(
                        s.in_ram for s in job.session.summaries.values()
                    ):
                        self.dirty.pop(job.session.session_id, None)

    def _unpin(self, jobs: list[_Job]) -> None:
        for job in jobs:
            self._residency.pools[job.session.pool].slots.unpin(job.slots)

    def _commit_chunks(self, job: _Job, segment_id: int, offset: int) -> int:
        """Returns by how much the segment's live count grows."""
        session, pool = job.session, self._residency.pools[job.session.pool]
        rows = session.rows[job.first_chunk : job.first_chunk + job.chunk_count]
        pool.table.segment[rows] = segment_id
        pool.table.offset[rows] = offset + np.arange(job.chunk_count) * (pool.geometry.layers * pool.slots.stride)
        self._residency.make_evictable(pool, job.slots)
        session.written_count = job.first_chunk + job.chunk_count
        return job.chunk_count

    def _commit_summaries(self, job: _Job, segment_id: int, offset: int) -> int:
        summaries = job.session.summaries[job.summary_kind]
        assert job.checksums is not None
        summaries.reserve(job.first_chunk + job.chunk_count)
        taken = 0
        for i, payload in enumerate(job.payloads):
            chunk = job.first_chunk + i
            if summaries.in_ram.get(chunk) is not payload:  # put again meanwhile: the next round writes the newer one
                continue
            del summaries.in_ram[chunk]
            self._residency.summary_bytes -= len(payload)
            if summaries.segment[chunk] != NO_SEGMENT:
                self.segments.segments[int(summaries.segment[chunk])].live -= 1
            summaries.segment[chunk] = segment_id
            summaries.offset[chunk] = offset + i * summaries.bytes_per_chunk
            summaries.checksum[chunk] = job.checksums[i]
            taken += 1
        return taken

    def _roll(self, needed_bytes: int) -> None:
        """Leaves the open segment for a new one that takes a frame of this size. Raises OSError, StorageFull."""
        if self.segments.open is not None:
            self.segments.sync()
            self.segments.seal("sealed")
        self.collect()
        self.segments.create(needed_bytes)
        self.write_manifest()

    def collect(self) -> None:
        """Removes segments in which nothing lives. Raises OSError."""
        with self._lock:
            dead = self.segments.drop_dead(damaged_too=not any(s.name for s in self._residency.sessions.values()))
        if dead:
            self.write_manifest()
            self.segments.erase(dead)
            self._log.info("segments removed", segments=[s.segment_id for s in dead], bytes=sum(s.size for s in dead))

    def write_manifest(self, clean: bool = False) -> None:
        """Names all sessions with a name, and all segments. Raises OSError; the old manifest is then still there."""
        with self._lock:
            sessions = [s for s in self._residency.sessions.values() if not s.temporary]
            ahead = (0, 0) if clean else (SESSION_IDS_RESERVED, CHUNK_UIDS_RESERVED)
            manifest = Manifest(
                clean,
                self._residency.next_session_id + ahead[0],
                self._residency.next_chunk_uid + ahead[1],
                self.segments.next_segment_id,
                tuple(SessionEntry(s.session_id, s.name, s.table.geometry, s.written_count) for s in sessions),
                tuple(
                    SegmentEntry(s.segment_id, s.state, 0 if s.state == "open" and not clean else s.used_bytes)
                    for s in self.segments.segments.values()
                ),
            )
        self._disk.replace(MANIFEST_NAME, encode_manifest(manifest))
        with self._lock:
            self.named = {s.session_id for s in sessions}
            self.session_ids_end = manifest.next_session_id
