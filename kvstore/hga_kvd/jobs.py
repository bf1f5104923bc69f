"""Frames to be: what of the sessions is not on disk yet, and what the index knows once it is. No I/O.

Called with the residency's lock held. `plan` pins the slots that its frames are written from; whoever planned calls
`unpin`, and `commit` for each frame that was written and synced. Much may have happened in between: sessions are deleted
or truncated, chunks die and their rows are used again, summaries are put anew. So a commit believes uids, epochs and the
identity of payloads, never a row alone; what died meanwhile comes back as space that is free again.

A session is written from `written_count` on, in runs: chunks that only RAM has as a frame of chunks, chunks that are on
disk already (or in an earlier frame of the same plan) as a link to them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from hga_kvd.checksum import checksum, summary_seeds
from hga_kvd.format import (
    CHUNKS,
    LINK,
    SUMMARIES,
    chunk_table_bytes,
    encode_chunk_table,
    encode_link_table,
    encode_summary_table,
    round_up,
)
from hga_kvd.index import LOST_ROW, NO_SEGMENT, Places, Session
from hga_kvd.memory import address_of, aligned_buffer
from hga_kvd.residency import Pool, Residency
from hga_kvd.segments import NewFrame, frame_bytes

I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]

# Large enough that table and header are noise, small enough that a torn one loses little.
FRAME_BODY_BYTES = 16 << 20
# Chunks that one link frame names, a table of 512 KiB, but for the first of an epoch: that one names all.
LINK_CHUNKS_MAX = 1 << 16
# Nothing else says which chunks a forked or truncated session has: a bad block must not cost it all of them (ADR 9).
LINK_COPIES = 2

_NOTHING = np.zeros(0, np.int64)


@dataclass(eq=False)
class Job:
    """One frame to be: of chunks (rows, slots), of a link (rows), or of summaries (rows of the summary table)."""

    session: Session
    epoch: int
    first_chunk: int
    frame: NewFrame
    rows: I64
    uids: U64
    slots: I64
    payloads: list[bytes] = field(default_factory=list)
    checksums: U64 | None = None
    body: npt.NDArray[np.uint8] | None = None  # keeps the memory that the frame's addresses name


class Plan:
    """Jobs that fit in the open segment; if there are none, the bytes that the first one needs."""

    def __init__(self, segment_room: int, round_bytes: int) -> None:
        self.jobs: list[Job] = []
        self.needed_bytes = 0
        self._segment_room = segment_room
        self._room = min(segment_room, round_bytes)
        self._chunks: dict[int, list[I64]] = {}  # by pool: rows in frames of this plan
        self._summaries: set[tuple[int, int]] = set()  # (pool, row)

    @property
    def room(self) -> int:
        """Bytes that the next frame may take; the first one may be larger than a round."""
        return self._room if self.jobs else self._segment_room

    def add(self, job: Job, copies: int = 1) -> bool:
        """False if they do not fit."""
        if copies * job.frame.frame_bytes > self.room:
            self.needed_bytes = copies * job.frame.frame_bytes
            return False
        self._room -= copies * job.frame.frame_bytes
        self.jobs += [job] * copies
        if job.frame.kind == CHUNKS:
            self._chunks.setdefault(job.session.pool, []).append(job.rows)
        if job.frame.kind == SUMMARIES:
            self._summaries.update((job.session.pool, row) for row in job.rows.tolist())
        return True

    def on_disk(self, session: Session, rows: I64) -> npt.NDArray[np.bool_]:
        """Which of these chunks are on disk or will be when this plan's frames so far are."""
        stored: npt.NDArray[np.bool_] = (session.table.segment[rows] != NO_SEGMENT) | (rows == LOST_ROW)
        planned = self._chunks.get(session.pool)
        if planned is not None:
            stored |= np.isin(rows, np.concatenate(planned))
        return stored

    def has_summary(self, session: Session, row: int) -> bool:
        return (session.pool, row) in self._summaries


def plan(residency: Residency, sessions: Iterable[Session], segment_room: int, round_bytes: int) -> Plan:
    """The next frames of these sessions, in the order in which chunks were appended."""
    result = Plan(segment_room, round_bytes)
    for session in sessions:
        pool = residency.pools[session.pool]
        if not session.deleted and not (
            _plan_chunks(residency, result, session, pool) and _plan_summaries(result, session)
        ):
            break
    return result


def unpin(residency: Residency, jobs: list[Job]) -> None:
    for job in jobs:
        residency.pools[job.session.pool].slots.unpin(job.slots)


def _plan_chunks(residency: Residency, plan: Plan, session: Session, pool: Pool) -> bool:
    """False when no more fits."""
    # The first frame of an epoch says all that came before it. One frame, which is there or not: from then on nothing
    # else tells of it (docs/format.md, "Recovery", step 6).
    whole = session.logged_epoch != session.epoch
    first = 0 if whole else session.written_count
    while whole or first < session.chunk_count:
        stored = plan.on_disk(session, session.rows[first : session.chunk_count])
        run = int(np.argmin(stored)) if not stored.all() else len(stored)
        if whole or run:
            run = run if whole else min(run, LINK_CHUNKS_MAX)
            job, copies = _link_job(session, first, run), LINK_COPIES
        else:
            run = int(np.argmax(stored)) if stored.any() else len(stored)
            run = _chunks_that_fit(pool, run, plan.room)
            if not run:
                plan.needed_bytes = _chunk_frame_bytes(pool, 1)
                return False
            job, copies = _chunk_job(residency, session, pool, first, run), 1
        if not plan.add(job, copies):
            return False
        whole = False
        first += run
    return True


def _chunk_frame_bytes(pool: Pool, count: int) -> int:
    return frame_bytes(chunk_table_bytes(pool.geometry, count), count * pool.table.chunk_stride)


def _chunks_that_fit(pool: Pool, count: int, room: int) -> int:
    """Of `count` chunks, how many make one frame of at most `room` bytes."""
    count = min(count, max(1, FRAME_BODY_BYTES // pool.table.chunk_stride))
    if _chunk_frame_bytes(pool, count) <= room:
        return count
    each = _chunk_frame_bytes(pool, count + 1) - _chunk_frame_bytes(pool, count)
    count = min(count, room // max(1, each) + 1)
    while count and _chunk_frame_bytes(pool, count) > room:
        count -= 1
    return count


def _chunk_job(residency: Residency, session: Session, pool: Pool, first: int, count: int) -> Job:
    table, rows = pool.table, session.rows[first : first + count].copy()
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
    addresses = residency.address + pool.slots.offsets(slots)
    starts = np.flatnonzero(np.append(True, np.diff(addresses) != pool.slots.stride))
    lengths = np.diff(starts, append=len(slots)) * pool.slots.stride
    place = addresses[starts].astype(np.uint64), lengths
    frame = NewFrame(CHUNKS, session.session_id, session.epoch, first, count, text, *place)
    return Job(session, session.epoch, first, frame, rows, table.uid[rows], slots)


def _link_job(session: Session, first: int, count: int) -> Job:
    rows = session.rows[first : first + count].copy()
    uids, text = session.table.uid[rows], encode_link_table(session.table.uid[rows])
    frame = NewFrame(LINK, session.session_id, session.epoch, first, count, text, np.zeros(0, np.uint64), _NOTHING)
    return Job(session, session.epoch, first, frame, rows, uids, _NOTHING)


def _plan_summaries(plan: Plan, session: Session) -> bool:
    """False when no more fits."""
    summaries = session.table.summaries
    groups: dict[tuple[int, int], list[int]] = {}
    for row in summaries.unsaved_rows(session.all_rows()):
        if not plan.has_summary(session, row):
            groups.setdefault((int(summaries.kind[row]), int(summaries.bytes[row])), []).append(row)
    for (_, size), rows in groups.items():
        per_frame = max(1, FRAME_BODY_BYTES // size)
        for at in range(0, len(rows), per_frame):
            if not plan.add(_summary_job(session, rows[at : at + per_frame])):
                return False
    return True


def _summary_job(session: Session, rows: list[int]) -> Job:
    summaries, at = session.table.summaries, np.array(rows, np.int64)
    kind, size = summaries.kind_of(rows[0]), int(summaries.bytes[rows[0]])
    stride = round_up(size)
    payloads = [summaries.in_ram[row] for row in rows]
    uids = session.table.uid[summaries.chunk[at]]
    seeds = summary_seeds(uids, kind).tolist()
    sums = np.array([checksum(p, seed) for p, seed in zip(payloads, seeds, strict=True)], np.uint64)
    body = aligned_buffer(len(rows) * stride)
    lines = body.reshape(len(rows), stride)
    for line, payload in zip(lines, payloads, strict=True):
        line[:size], line[size:] = np.frombuffer(payload, np.uint8), 0
    text = encode_summary_table(kind, size, uids, sums)
    place = np.array([address_of(body)], np.uint64), np.array([len(body)], np.int64)
    frame = NewFrame(SUMMARIES, 0, 0, 0, len(rows), text, *place)
    return Job(session, session.epoch, 0, frame, at, uids, _NOTHING, payloads, sums, body)


# --- after the sync ---


def commit(residency: Residency, job: Job, segment_id: int, offset: int) -> tuple[int, Places, list[int]]:
    """The frame's body is durable at this place. Returns how many things came to live in its segment, what is dead on disk
    since (some of these perhaps), and the segments of link frames that count no more."""
    if job.frame.kind == SUMMARIES:
        return (*_commit_summaries(job, segment_id, offset), [])
    if job.frame.kind == LINK:
        return _commit_link(job, segment_id)
    return (*_commit_chunks(residency, job, segment_id, offset), [])


def _is_current(job: Job) -> bool:
    """Whether the session still is what the frame says."""
    return not job.session.deleted and job.session.epoch == job.epoch


def _commit_chunks(residency: Residency, job: Job, segment_id: int, offset: int) -> tuple[int, Places]:
    session, pool = job.session, residency.pools[job.session.pool]
    table, stride = pool.table, pool.table.chunk_stride
    offsets = offset + np.arange(len(job.rows)) * stride
    alive = table.uid[job.rows] == job.uids
    rows = job.rows[alive]
    table.segment[rows] = segment_id
    table.offset[rows] = offsets[alive]
    residency.make_evictable(pool, job.slots.reshape(len(job.rows), -1)[alive].reshape(-1))
    if _is_current(job):
        session.written_count = job.first_chunk + len(job.rows)
    dead = int(np.count_nonzero(~alive))
    return len(job.rows), Places(np.full(dead, segment_id), offsets[~alive], np.full(dead, stride))


def _commit_link(job: Job, segment_id: int) -> tuple[int, Places, list[int]]:
    session, none = job.session, Places(_NOTHING, _NOTHING, _NOTHING)
    if not _is_current(job):
        return 1, none, [segment_id]
    session.written_count = job.first_chunk + len(job.rows)
    if job.first_chunk:
        session.link_segments.append(segment_id)
        return 1, none, []
    old, session.link_segments = session.link_segments, [segment_id]
    session.logged_epoch = job.epoch
    return 1, none, old


def _commit_summaries(job: Job, segment_id: int, offset: int) -> tuple[int, Places]:
    summaries = job.session.table.summaries
    assert job.checksums is not None
    stride = len(job.body) // len(job.rows) if job.body is not None else 0
    dead = []
    for i, (row, payload) in enumerate(zip(job.rows.tolist(), job.payloads, strict=True)):
        place, old = offset + i * stride, (int(summaries.segment[row]), int(summaries.offset[row]))
        if not summaries.saved(row, payload, segment_id, place, int(job.checksums[i])):
            dead.append((segment_id, place))  # gone, or put again meanwhile: the next round writes the newer one
        elif old[0] != NO_SEGMENT:
            dead.append(old)
    columns = np.array(dead, np.int64).reshape(-1, 2)
    return len(job.rows), Places(columns[:, 0], columns[:, 1], np.full(len(dead), stride))
