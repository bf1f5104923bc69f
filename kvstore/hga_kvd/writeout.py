"""From dirty to durable: frames, syncs, the manifest, and the space that dead segments give back.

A *round* makes frames of dirty chunks, links and summaries (as many as fit, in the order they were appended), writes
them to the open segment and syncs it. Only then are they clean: what a failed sync may have lost is still in RAM. A
round that fails poisons its segment and is tried once more in a new one.

`barrier` guards the log and the manifest and is held across I/O; whoever holds it may take the residency's lock, never
the other way round. Calls that wait for the barrier to flush are served together by whoever gets it first.
"""

from __future__ import annotations

import contextlib
import errno
import threading
from collections import OrderedDict
from dataclasses import replace

import numpy as np
from structlog.typing import FilteringBoundLogger

from hga_kvd import jobs
from hga_kvd.disk import Disk
from hga_kvd.errors import StorageFull, WriteFailed
from hga_kvd.index import U64, Places, Session
from hga_kvd.jobs import Job
from hga_kvd.manifest import (
    LINK_RUNS_MAX,
    MANIFEST_COPY_NAME,
    MANIFEST_NAME,
    MANIFEST_TEXT_BYTES_MAX,
    Manifest,
    SegmentEntry,
    SessionEntry,
    encode_manifest,
)
from hga_kvd.residency import Residency
from hga_kvd.segments import SegmentLog

# Between two syncs: 40 ms of a 1.6 GB/s disk, so that a flush never waits long for a round of the background.
ROUND_BYTES = 64 << 20
# The background is woken when one in so many bytes of the arena is dirty, and writes until it is one in so many.
DIRTY_SHARE_MAX, DIRTY_SHARE_MIN = 2, 4
# Ids that a run may give out before the manifest has to say so; a crash skips the rest of them.
SESSION_IDS_RESERVED = 1 << 20
CHUNK_UIDS_RESERVED = 1 << 40


class WriteOut:
    def __init__(
        self, residency: Residency, disk: Disk, segments: SegmentLog, log: FilteringBoundLogger, evict: bool = False
    ) -> None:
        """evict: where space is short, idle sessions are deleted, least recently used first."""
        self.barrier = threading.Lock()
        self.segments = segments
        self.dirty: OrderedDict[int, Session] = OrderedDict()  # residency's lock; oldest first
        self.named: dict[int, int] = {}  # sessions in the manifest on disk, and the epoch that it tells of
        self.unsure = True  # a manifest was not written well: the one on disk may name what `named` does not
        self.evicted_sessions = 0
        self._evict = evict
        self._dead: list[Places] = []  # what the manifest on disk may still name
        self._free: list[Places] = []  # what nothing names any more, not yet given back
        self._copied: tuple[SessionEntry, ...] | None = None  # what the manifest's copy says
        self._flushing: dict[int, Session] = {}
        self._residency = residency
        self._lock = residency.lock
        self._disk = disk
        self._log = log

    # --- called with the residency's lock held ---

    def mark_dirty(self, session: Session) -> None:
        self.dirty.setdefault(session.session_id, session)

    def should_write(self, session: Session) -> bool:
        """Whether the background has something to do now that this session has more: much of the arena is dirty, or the
        session will be flushed and has a frame's worth, which its flush need not wait for then."""
        return self._is_dirty(DIRTY_SHARE_MAX) or _has_frame(session)

    def _is_dirty(self, share: int) -> bool:
        arena = self._residency.arena
        return share * arena.dirty_bytes > len(arena.region)

    def is_durable(self, session: Session, chunk_count: int) -> bool:
        """Whether these chunks and all summaries survive power loss."""
        count = min(chunk_count, session.chunk_count)  # it may have been truncated meanwhile
        pending = session.table.summaries.has_unsaved(session.all_rows()).any()
        told = session.epoch in (self.named.get(session.session_id), session.logged_epoch)
        return session.session_id in self.named and told and session.written_count >= count and not pending

    def lose(self, places: Places) -> None:
        """The index has nothing more at these places."""
        for segment_id, count in zip(*np.unique(places.segment, return_counts=True), strict=True):
            self.segments.segments[int(segment_id)].live -= int(count)
        if len(places.segment):
            self._dead.append(places)

    def lose_links(self, segment_ids: list[int]) -> None:
        """Link frames in these segments count no more."""
        for segment_id in segment_ids:
            self.segments.segments[segment_id].live -= 1

    def drop(self, session: Session) -> None:
        """The session is gone: nothing of it is to be written any more."""
        self.dirty.pop(session.session_id, None)
        self.lose_links(session.link_segments)

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

    def settle(self, session: Session, what: str) -> None:
        """The session was deleted, truncated or pinned (`what`): says so in the manifest if that names it, and gives
        back the space of what is gone.

        Raises: WriteFailed.
        """
        with self.barrier:
            with self._lock:
                runs = 0 if session.temporary else len(_links(session) or ())
            if runs > LINK_RUNS_MAX:
                with contextlib.suppress(StorageFull, WriteFailed):  # then the manifest lists them
                    self.round([session])
            try:
                if session.session_id in self.named or self.unsure:
                    self.write_manifest()
                self.collect()
            except OSError as error:
                raise WriteFailed(
                    f"session {session.session_id} is {what}, but the manifest could not be written ({error}): what is "
                    "gone may come back at the next start"
                ) from error

    def start(self, dead: list[Places]) -> None:
        """Says in the manifest that a daemon runs. dead: places that were found to be nobody's. Raises: OSError."""
        with self.barrier:
            self._dead += dead
            self.write_manifest()
            self.collect()

    def tidy(self) -> None:
        """Gives back what could not be when it died: calls were reading it, or the device refused. Raises: OSError."""
        with self.barrier:
            with self._lock:
                left = self.segments.has_dead()
            if left:
                self.collect()
            self._free = self.segments.punch(self._free)

    def finish(self) -> None:
        """Makes everything durable and says so in the manifest. Raises: WriteFailed, StorageFull."""
        with self.barrier:
            while self.round():
                pass
            with contextlib.suppress(OSError):  # the next start gives back what this does not
                self.collect()
            try:
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
                chosen = self._all_dirty() if sessions is None else sessions
                plan = jobs.plan(self._residency, chosen, self.segments.room(), ROUND_BYTES)
            if not plan.jobs and not plan.needed_bytes:
                return False
            try:
                if plan.jobs:
                    self._write(plan.jobs)
                    return True
                self._roll(plan.needed_bytes)
            except OSError as error:
                self._log.error("write failed", error=str(error), again=failed)
                if self.segments.open is not None:
                    self._dead.append(self.segments.seal("poisoned"))
                if failed:
                    kind = StorageFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else WriteFailed
                    raise kind(
                        f"writing to NVMe failed twice ({error}): what was appended since the last flush is not "
                        "durable; it is still served from RAM. Check the device, then flush again"
                    ) from error
                failed = True

    def _all_dirty(self) -> list[Session]:
        if not self.dirty and self._residency.summary_bytes:
            # Of chunks that others still have; the session that they were put through was truncated or deleted.
            for session in self._residency.sessions.values():
                if session.table.summaries.has_unsaved(session.all_rows()).any():
                    self.mark_dirty(session)
        return list(self.dirty.values())

    def write_ahead(self) -> bool:
        """A round of what `should_write` means. False: there is nothing left. Raises as `round`."""
        with self.barrier:
            with self._lock:
                ahead = [session for session in self.dirty.values() if _has_frame(session)]
                much = self._is_dirty(DIRTY_SHARE_MIN)
            return (much or bool(ahead)) and self.round(ahead or None)

    def _write(self, chosen: list[Job]) -> None:
        segment = self.segments.open
        assert segment is not None
        try:
            offsets = self.segments.append([job.frame for job in chosen])
            self.segments.sync()
        except BaseException:
            with self._lock:
                jobs.unpin(self._residency, chosen)
            raise
        with self._lock:
            jobs.unpin(self._residency, chosen)
            for job, offset in zip(chosen, offsets, strict=True):
                live, dead, links = jobs.commit(self._residency, job, segment.segment_id, offset)
                segment.live += live
                self.lose(dead)
                self.lose_links(links)
                session = job.session
                written = session.written_count == session.chunk_count and session.logged_epoch == session.epoch
                if written and not session.table.summaries.has_unsaved(session.all_rows()).any():
                    self.dirty.pop(session.session_id, None)

    def _roll(self, needed_bytes: int) -> None:
        """Leaves the open segment for a new one that takes a frame of this size. Raises OSError, StorageFull."""
        if self.segments.open is not None:
            self.segments.sync()
            self._dead.append(self.segments.seal("sealed"))
        self.collect()
        while True:
            try:
                self.segments.create(needed_bytes)
                break
            except StorageFull:
                if not self._evict or not self._evict_one():
                    raise
        self.write_manifest()

    def _evict_one(self) -> bool:
        """Deletes the idle session that was not used for longest. False if there is none. Raises OSError."""
        with self._lock:
            session = self._residency.oldest_idle()
            if session is None:
                return False
            self.lose(self._residency.remove_session(session))
            self.drop(session)
            self.evicted_sessions += 1
        self._log.info("session evicted", session=session.name, chunks=session.chunk_count)
        self.collect()
        return True

    def collect(self) -> None:
        """Removes segments in which nothing lives, and makes holes of what is dead in others. Raises OSError."""
        with self._lock:
            dead = self.segments.drop_dead(damaged_too=not any(s.name for s in self._residency.sessions.values()))
        if dead or self._dead:
            self.write_manifest()
        if dead:
            self.segments.erase(dead)
            self._log.info("segments removed", segments=[s.segment_id for s in dead], bytes=sum(s.size for s in dead))

    def write_manifest(self, clean: bool = False) -> None:
        """Names all sessions with a name, and all segments. Raises OSError; then the old one is there, or this."""
        with self._lock:
            sessions = [s for s in self._residency.sessions.values() if not s.temporary]
            dead, self._dead = self._dead, []
            ahead = (0, 0) if clean else (SESSION_IDS_RESERVED, CHUNK_UIDS_RESERVED)
            manifest = Manifest(
                clean,
                self._residency.next_session_id + ahead[0],
                self._residency.next_chunk_uid + ahead[1],
                self.segments.next_segment_id,
                tuple(_entry(s) for s in sessions),
                tuple(
                    SegmentEntry(s.segment_id, s.state, s.synced_bytes if s.state == "open" else s.used_bytes)
                    for s in self.segments.segments.values()
                ),
            )
        self.unsure = True
        content = encode_manifest(manifest)
        try:
            if len(content) > MANIFEST_TEXT_BYTES_MAX:  # no start would read it
                raise OSError(errno.EFBIG, f"it has {len(content)} bytes, too many: delete sessions")
            self._disk.replace(MANIFEST_NAME, content)
        except BaseException:
            with self._lock:
                self._dead = dead + self._dead
            raise
        with self._lock:
            self.unsure = False
            self.named = {entry.session_id: entry.epoch for entry in manifest.sessions}
        self._copy_manifest(manifest, content)  # before what it may still name is given back
        if self._free or dead:
            could = self.segments.can_punch
            self._free = self.segments.punch(self._free + dead)
            if could and not self.segments.can_punch:
                self._log.warning("this file system cannot make holes in files: space comes back by whole segments")

    def _copy_manifest(self, manifest: Manifest, content: bytes) -> None:
        """Beside the manifest, for `verify --repair`, whenever it has news that the log has not: sessions, not sizes."""
        told = tuple(replace(entry, chunk_count=0, used_s=0) for entry in manifest.sessions)
        if told == self._copied:
            return
        try:
            self._disk.replace(MANIFEST_COPY_NAME, content)
            self._copied = told
        except OSError as error:  # nothing that was promised depends on it
            self._log.warning("the manifest has no copy", error=str(error))


def _has_frame(session: Session) -> bool:
    unwritten = session.chunk_count - session.written_count
    return not session.temporary and unwritten * session.table.chunk_stride >= jobs.FRAME_BODY_BYTES


def _links(session: Session) -> tuple[tuple[int, int], ...] | None:
    """What the manifest has to say of its chunks, as long as no frame of this epoch does."""
    if session.logged_epoch == session.epoch:
        return None
    return _runs(session.table.uid[session.rows[: session.written_count]])


def _entry(session: Session) -> SessionEntry:
    # fmt: off
    return SessionEntry(
        session.session_id, session.name, session.table.geometry, session.written_count, session.epoch, session.tenant,
        session.ttl_s, session.pinned, _links(session), int(session.used_at),
    )
    # fmt: on


def _runs(uids: U64) -> tuple[tuple[int, int], ...]:
    """(first, count) of each run of consecutive numbers; lost chunks, 0, are runs of one."""
    signed = uids.astype(np.int64)
    starts = np.flatnonzero(np.append(True, (np.diff(signed) != 1) | (signed[:-1] == 0))[: len(signed)])
    counts = np.diff(starts, append=len(signed))
    return tuple(zip(signed[starts].tolist(), counts.tolist(), strict=True))
