"""Brings a store directory back: manifest, segments, index. The rules are those of docs/format.md, "Recovery".

Nothing is changed on disk before all of it has been read and understood; a directory that cannot be is refused as it
is. Then a manifest of our own is written, which also says that a daemon is running.
"""

from __future__ import annotations

import errno
from collections import Counter

import numpy as np
from structlog.typing import FilteringBoundLogger

from hga_kvd.disk import Disk
from hga_kvd.errors import StartRefused
from hga_kvd.format import BadBytes, Frame, NewerFormat, segment_id_of, segment_name
from hga_kvd.index import LOST_ROW, Places, Session, places_of, runs_of
from hga_kvd.manifest import MANIFEST_NAME, Manifest, SegmentEntry, decode_manifest
from hga_kvd.memory import give_back_freed
from hga_kvd.rebuild import Rebuilt, rebuild
from hga_kvd.recovery import Unread, Walk, erase_heads, is_leftover, walk_all
from hga_kvd.residency import Residency
from hga_kvd.segments import Segment, SegmentLog, tail_of
from hga_kvd.writeout import WriteOut


def bring_back(disk: Disk, writeout: WriteOut, residency: Residency, log: FilteringBoundLogger, now: float) -> int:
    """What the disk has, and a manifest that says that a daemon is running. now: seconds. Returns how many records are lost
    to damage.

    Raises: StartRefused.
    """
    try:
        damaged_records, dead = recover(disk, writeout.segments, residency, log, now)
        writeout.start(dead)
    except OSError as error:
        what = "check the device and its permissions"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            what = "a start writes a manifest: free some space on its file system, then start again"
        raise StartRefused(f"the store cannot be used ({error}): {what}") from error
    sessions = residency.sessions.values()
    if sessions:
        give_back_freed()
        log.info(
            "recovered",
            sessions=len(sessions),
            chunks=sum(session.chunk_count for session in sessions),
            segments=len(writeout.segments.segments),
            damaged_records=damaged_records,
        )
    return damaged_records


def recover(
    disk: Disk, segments: SegmentLog, residency: Residency, log: FilteringBoundLogger, now: float
) -> tuple[int, list[Places]]:
    """Fills the log and the index from disk. Returns how many records are lost to damage, and places that are nobody's.

    Raises: StartRefused.
    """
    manifest = _read_manifest(disk)
    if manifest is None:
        return 0, []
    walks = _read_segments(disk, manifest, log)
    residency.next_session_id, residency.next_chunk_uid = manifest.next_session_id, manifest.next_chunk_uid
    segments.next_segment_id = manifest.next_segment_id
    frames: list[Frame] = []
    for entry, handle, found in sorted(walks, key=lambda w: w[0].segment_id):
        if handle < 0:
            continue
        segment = Segment(entry.segment_id, handle, disk.size(handle), entry.state)
        segments.segments[entry.segment_id] = segment
        segment.taken = min(segment.size, disk.taken(handle))
        segment.damaged = found is None or found.unreadable or bool(found.damage)
        if found is None:
            segment.used_bytes, segment.state = entry.used_bytes, "poisoned"
            continue
        segment.used_bytes = segment.synced_bytes = found.used_bytes
        segment.next_sequence = found.next_sequence
        frames += found.frames
    rebuilt = rebuild(manifest, frames, residency, now)
    for segment_id, count in rebuilt.live.items():
        segments.segments[segment_id].live = count
    for header in rebuilt.misfits:
        log.error(
            "frame damaged", segment=header.segment_id, offset=header.offset, error="its sizes are not its session's"
        )
    _go_on(disk, manifest, walks, segments, log)
    _remove_leftovers(disk, manifest, segments, log)
    lost = sum(_report_lost(session, log) for session in residency.sessions.values())
    return lost, _dead_places(segments, manifest, rebuilt)


def _dead_places(segments: SegmentLog, manifest: Manifest, rebuilt: Rebuilt) -> list[Places]:
    """What a crash kept from being given back. Nothing, while damage may hide who has it."""
    found = segments.segments.values()
    if len(found) < len(manifest.segments) or any(segment.damaged for segment in found):
        return []
    dead = runs_of([*rebuilt.dead, *(tail_of(segment) for segment in found if segment is not segments.open)])
    dead_bytes: Counter[int] = Counter()
    for segment_id, _, length in dead:
        dead_bytes[segment_id] += length
    # Most are holes already: a start of a large store must not sync each of its segments.
    left = {s.segment_id for s in found if s.taken > s.size - dead_bytes[s.segment_id]}
    return [places_of(run for run in dead if run[0] in left)]


def _read_manifest(disk: Disk) -> Manifest | None:
    """None: a new store."""
    try:
        return decode_manifest(disk.read_file(MANIFEST_NAME))
    except FileNotFoundError:
        files = [name for name in disk.names() if segment_id_of(name) is not None]
        if files:
            raise StartRefused(
                f"the store has {len(files)} segment files but no {MANIFEST_NAME}: `hga-kvd verify DIR --repair` makes a "
                "new one; or move the segment files away to start empty"
            ) from None
        return None
    except NewerFormat as error:
        raise StartRefused(
            f"the store was written by a newer hga-kvd ({MANIFEST_NAME}: {error}): run that version, or use another "
            "directory"
        ) from None
    except (BadBytes, OSError) as error:
        raise StartRefused(
            f"{MANIFEST_NAME} of the store cannot be read ({error}): `hga-kvd verify DIR --repair` makes a new one; or "
            "move it and the segment files away to start empty"
        ) from None


def _read_segments(
    disk: Disk, manifest: Manifest, log: FilteringBoundLogger
) -> list[tuple[SegmentEntry, int, Walk | None]]:
    """Handle and content of each segment; no handle (-1) if its file is missing, no content if that is not ours."""
    handles = [_open_segment(disk, segment_name(entry.segment_id), log) for entry in manifest.segments]
    there = [(entry, handle) for entry, handle in zip(manifest.segments, handles, strict=True) if handle >= 0]
    unread = [
        Unread(handle, entry.segment_id, entry.used_bytes, entry.state == "open" and not manifest.clean)
        for entry, handle in there
    ]
    found = {entry.segment_id: walk for (entry, _), walk in zip(there, walk_all(disk, unread), strict=True)}
    for segment_id, walk in found.items():
        name = segment_name(segment_id)
        if walk is None:
            error = "its header is not ours or cannot be read; all of it is lost"
            log.error("segment damaged", segment=name, error=error)
        for start, end in walk.damage if walk else ():
            log.error("segment damaged", segment=name, from_byte=start, to_byte=end, error="frames in here are lost")
    return [(e, handle, found.get(e.segment_id)) for e, handle in zip(manifest.segments, handles, strict=True)]


def _open_segment(disk: Disk, name: str, log: FilteringBoundLogger) -> int:
    try:
        return disk.open(name)
    except FileNotFoundError:
        log.error("segment lost", segment=name, error="its file is gone")  # noqa: TRY400
        return -1
    except OSError as error:
        raise StartRefused(
            f"{name} cannot be opened ({error}): give this user access to it, then start again"
        ) from error


def _go_on(
    disk: Disk,
    manifest: Manifest,
    walks: list[tuple[SegmentEntry, int, Walk | None]],
    segments: SegmentLog,
    log: FilteringBoundLogger,
) -> None:
    """Makes the open segment fit to be appended to: what is taken from it is synced, what is not is erased."""
    for entry, handle, found in walks:
        segment = segments.segments.get(entry.segment_id)
        if entry.state != "open" or found is None or segment is None:
            continue
        if found.unreadable:  # what is there may be readable another time: leave it as it is
            segment.state = "poisoned"
            continue
        if found.stale:
            log.warning("torn end cut", segment=segment_name(entry.segment_id), at_byte=found.used_bytes)
        try:
            if not manifest.clean:
                erase_heads(disk, handle, found.stale)
        except OSError as error:
            raise StartRefused(
                f"{segment_name(entry.segment_id)} cannot be written ({error}): check the device and the file's "
                "permissions, then start again"
            ) from error
        if segments.open is None:
            segments.open = segment
        else:
            segment.state = "sealed"


def _remove_leftovers(disk: Disk, manifest: Manifest, segments: SegmentLog, log: FilteringBoundLogger) -> None:
    """Segment files that the manifest does not name: of a crash before it did, or after it no longer did."""
    named = {entry.segment_id for entry in manifest.segments}
    for name in disk.names():
        segment_id = segment_id_of(name)
        if segment_id is None or segment_id in named:
            continue
        segments.next_segment_id = max(segments.next_segment_id, segment_id + 1)
        handle = disk.open(name)
        ours, size = is_leftover(disk, handle, segment_id), disk.taken(handle)
        disk.close(handle)
        if ours:
            disk.remove(name)
            log.info("leftover removed", segment=name)
        else:
            segments.foreign_bytes += size
            log.warning("unknown file left alone", file=name, error="its name is a segment's, its content is not")


def _report_lost(session: Session, log: FilteringBoundLogger) -> int:
    """Chunks that must have been there and were not found are lost rows. Returns how many records they had."""
    lost = np.flatnonzero(session.all_rows() == LOST_ROW)
    if len(lost):
        geometry = session.table.geometry
        session.damaged_records = len(lost) * geometry.layers * geometry.records_per_extent
        # fmt: off
        log.error(
            "chunks lost", session=session.name, count=len(lost), first_chunk=int(lost[0]), last_chunk=int(lost[-1])
        )
        # fmt: on
    return session.damaged_records
