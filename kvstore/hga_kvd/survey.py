"""What a store directory holds, read as a start reads it, and every byte of it compared with its checksum. Changes nothing;
`repair` does, and only so far that a daemon starts again: it writes a new manifest, keeps the old one beside it, and
removes no file. The disk is the caller's, and locked.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from hga_kvd.checksum import summary_seeds
from hga_kvd.disk import Disk
from hga_kvd.format import BadBytes, Frame, FrameHeader, NewerFormat, segment_id_of, segment_name
from hga_kvd.geometry import KEY_DTYPE, Geometry, Keys
from hga_kvd.index import LOST_ROW, Session
from hga_kvd.manifest import (
    MANIFEST_COPY_NAME,
    MANIFEST_NAME,
    Manifest,
    SegmentEntry,
    SegmentState,
    decode_manifest,
    encode_manifest,
)
from hga_kvd.reads import Items, read_verified
from hga_kvd.rebuild import rebuild
from hga_kvd.recovery import Unread, walk_all
from hga_kvd.residency import Pool, Residency
from hga_kvd.scrub import Scrubber, extent_keys, keys_of
from hga_kvd.segments import Segment, SegmentLog

I64 = npt.NDArray[np.int64]
BATCH_BYTES = 16 << 20


@dataclass(eq=False)
class SegmentReport:
    segment_id: int
    name: str
    state: SegmentState | None  # as the manifest has it; None: it does not name it
    size: int = 0
    used_bytes: int = 0
    frames: list[Frame] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # no damage: what a crash leaves
    readable: bool = True  # its header is ours


@dataclass(eq=False)
class SessionReport:
    session_id: int
    name: str
    geometry: Geometry
    epoch: int
    chunk_count: int
    record_count: int
    damaged: Keys  # records that are lost or wrong
    bad_summaries: list[tuple[str, int]] = field(default_factory=list)  # (kind, chunk)


@dataclass(eq=False)
class Survey:
    """manifest: the one that a start would read, or else its copy; None: neither can be read."""

    manifest: Manifest | None = None
    from_copy: bool = False
    new: bool = False  # nothing is here yet
    refused: str = ""  # why nothing may be done here
    faults: list[str] = field(default_factory=list)
    segments: list[SegmentReport] = field(default_factory=list)
    sessions: list[SessionReport] = field(default_factory=list)
    misfits: list[FrameHeader] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        faulty = any(segment.faults for segment in self.segments)
        damaged = any(len(session.damaged) or session.bad_summaries for session in self.sessions)
        return not (self.faults or faulty or damaged or self.misfits)


def survey(disk: Disk, bodies: bool = True) -> Survey:
    """bodies=False: tables only, as a start reads them."""
    found = Survey()
    _read_manifest(disk, found)
    log = SegmentLog(disk, 1 << 20, 0, 0)
    named = {entry.segment_id: entry for entry in found.manifest.segments} if found.manifest else {}
    stored = {number: name for name in disk.names() if (number := segment_id_of(name)) is not None}
    for segment_id in sorted({*named, *stored}):
        report = _read_segment(disk, found, segment_id, named.get(segment_id), segment_id in stored, log)
        found.segments.append(report)
    if found.manifest is None:
        return found
    # Segments that the manifest does not name are leftovers to a start; with a copy, they may be newer than it.
    counted = [s for s in found.segments if s.state is not None or found.from_copy]
    residency = Residency(0)
    rebuilt = rebuild(found.manifest, [frame for s in counted for frame in s.frames], residency, now=0.0)
    found.misfits = rebuilt.misfits
    for session in residency.sessions.values():
        found.sessions.append(_report(session))
    if bodies:
        for pool in residency.pools:
            _check_bodies(disk, log, residency, pool, found)
    return found


def _read_manifest(disk: Disk, found: Survey) -> None:
    for name in (MANIFEST_NAME, MANIFEST_COPY_NAME):
        try:
            found.manifest = decode_manifest(disk.read_file(name))
            found.from_copy = name == MANIFEST_COPY_NAME
            return
        except FileNotFoundError:
            if name == MANIFEST_NAME and not any(segment_id_of(n) is not None for n in disk.names()):
                found.new = True
                return
            found.faults.append(f"{name} is missing")
        except NewerFormat as error:
            found.refused = f"{name}: {error}; use that version's hga-kvd"
            found.faults.append(found.refused)
            return
        except (BadBytes, OSError) as error:
            found.faults.append(f"{name} cannot be read: {error}")


def _read_segment(
    disk: Disk, found: Survey, segment_id: int, entry: SegmentEntry | None, exists: bool, log: SegmentLog
) -> SegmentReport:
    report = SegmentReport(segment_id, segment_name(segment_id), entry.state if entry else None)
    if not exists:
        report.readable = False
        report.faults.append("its file is gone")
        return report
    try:
        handle = disk.open(report.name)
    except OSError as error:
        report.readable = False
        report.faults.append(f"it cannot be opened: {error.strerror}")
        return report
    report.size = disk.size(handle)
    clean = found.manifest is not None and found.manifest.clean and not found.from_copy
    torn_end = entry is None or (entry.state == "open" and not clean)
    (content,) = walk_all(disk, [Unread(handle, segment_id, entry.used_bytes if entry else 0, torn_end)])
    if content is None:
        report.readable = False
        told = report.faults if entry else report.notes
        told.append("its header is not ours, or cannot be read")
        return report
    if entry is None and not found.from_copy:
        report.notes.append("a leftover of a crash: the next start removes it")
        return report
    report.used_bytes, report.frames = content.used_bytes, content.frames
    report.faults += [f"frames in bytes {start} to {end} are lost" for start, end in content.damage]
    if content.unreadable:
        report.faults.append("the device cannot read some of it")
    if content.stale:
        report.notes.append(f"a torn end of {len(content.stale)} frames: the next start cuts it")
    log.segments[segment_id] = Segment(segment_id, handle, report.size, "sealed")
    return report


def _report(session: Session) -> SessionReport:
    geometry = session.table.geometry
    lost = np.flatnonzero(session.all_rows() == LOST_ROW)
    count = session.chunk_count * geometry.layers * geometry.records_per_extent
    # fmt: off
    return SessionReport(
        session.session_id, session.name, geometry, session.epoch, session.chunk_count, count,
        extent_keys(geometry, lost),
    )
    # fmt: on


def _check_bodies(disk: Disk, log: SegmentLog, residency: Residency, pool: Pool, found: Survey) -> None:
    scrubber = Scrubber(residency, disk, log)
    mine = [session for session in residency.sessions.values() if session.table is pool.table]
    reports = {report.session_id: report for report in found.sessions}
    rows = np.flatnonzero(pool.table.segment)
    step = max(1, BATCH_BYTES // pool.table.chunk_stride)
    for first in range(0, len(rows), step):
        for damage in scrubber.check_disk(pool, rows[first : first + step]).damage:
            for session in mine:
                report = reports[session.session_id]
                report.damaged = np.concatenate((report.damaged, keys_of(session, damage))).astype(KEY_DTYPE)
    bad = _bad_summaries(disk, log, pool)
    for session in mine:
        chunks = np.flatnonzero(np.isin(session.all_rows(), pool.table.summaries.chunk[bad]))
        for chunk in chunks.tolist():
            of_chunk = bad[pool.table.summaries.chunk[bad] == session.rows[chunk]]
            kinds = [pool.table.summaries.kind_of(row) for row in of_chunk.tolist()]
            reports[session.session_id].bad_summaries += [(kind, chunk) for kind in kinds]


def _bad_summaries(disk: Disk, log: SegmentLog, pool: Pool) -> I64:
    table = pool.table.summaries
    rows = np.flatnonzero(table.segment)
    bad: list[int] = []
    groups = {(table.kind_of(row), int(table.bytes[row])) for row in rows.tolist()}
    for kind, size in sorted(groups):
        of_kind = rows[[table.kind_of(row) == kind and table.bytes[row] == size for row in rows.tolist()]]
        of_kind = of_kind[np.lexsort((table.offset[of_kind], table.segment[of_kind]))]
        step = max(1, BATCH_BYTES // size)
        for first in range(0, len(of_kind), step):
            part = of_kind[first : first + step]
            segments, handles = log.pin(table.segment[part])
            order = np.lexsort((table.offset[part], handles))
            part, handles = part[order], handles[order]
            seeds = summary_seeds(pool.table.uid[table.chunk[part]], kind)
            items = Items(size, handles, table.offset[part], np.arange(len(part)), seeds, table.checksum[part])
            wrong = read_verified(disk, items, np.zeros(len(part) * size, np.uint8))
            log.unpin(segments)
            bad += part[wrong].tolist()
    return np.array(bad, np.int64)


def repair(disk: Disk, found: Survey) -> list[str]:
    """Makes the directory one that a daemon starts on. Returns what was done, a sentence each; none: nothing had to be.

    Raises: OSError; the directory is then as it was.
    """
    if found.manifest is None or found.refused:
        return []
    gone = [s.segment_id for s in found.segments if s.state is not None and not s.size]
    if not found.from_copy and not gone:
        return []
    done: list[str] = []
    manifest = found.manifest
    if found.from_copy:
        kept = _keep_old(disk)
        if kept:
            done.append(f"kept the unreadable {MANIFEST_NAME} as {kept}")
        segments = tuple(
            SegmentEntry(s.segment_id, "sealed", s.used_bytes) for s in found.segments if s.readable and s.size
        )
        for segment in segments:  # what the new manifest vouches for may have been written and never synced
            disk.sync(disk.open(segment_name(segment.segment_id)))
        frames = [frame.header.session_id for s in found.segments for frame in s.frames]
        manifest = replace(
            manifest,
            clean=False,
            segments=segments,
            next_session_id=max([manifest.next_session_id, *(number + 1 for number in frames)]),
            next_segment_id=max([manifest.next_segment_id, *(s.segment_id + 1 for s in found.segments)]),
        )
        done.append(
            f"wrote a new {MANIFEST_NAME} from {MANIFEST_COPY_NAME} and the frames of {len(segments)} segments: "
            f"{len(manifest.sessions)} sessions. What the copy could not know: a session that was deleted when the copy "
            "could not be written may be back"
        )
    else:
        manifest = replace(manifest, segments=tuple(s for s in manifest.segments if s.segment_id not in gone))
        done += [f"took {segment_name(number)}, whose file is gone, out of {MANIFEST_NAME}" for number in gone]
    disk.replace(MANIFEST_NAME, encode_manifest(manifest))
    return done


def _keep_old(disk: Disk) -> str:
    """The name under which the unreadable manifest is kept, or nothing if there is none to keep."""
    try:
        content = disk.read_file(MANIFEST_NAME)
    except OSError:
        return ""
    names = set(disk.names())
    name = next(n for i in range(1, len(names) + 2) if (n := f"{MANIFEST_NAME}.damaged-{i}") not in names)
    disk.replace(name, content)
    return name
