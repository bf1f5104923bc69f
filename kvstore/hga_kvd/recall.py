"""Routing summaries, put and read back: which rows a call means, what of them is in RAM, what is to be read.

`SummaryPath` has the order of steps. The functions after it are called with the residency's lock held; the read that they
plan runs under none, on pinned segments.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hga_kvd.checksum import summary_seeds
from hga_kvd.config import Settings
from hga_kvd.errors import InvalidRequest, KeyOutOfRange, LimitExceeded, SessionNotFound, StorageFull
from hga_kvd.format import KIND_BYTES_MAX
from hga_kvd.index import I64, LOST_ROW, NO_SEGMENT, Session
from hga_kvd.parts import Parts
from hga_kvd.reads import Items, read_verified
from hga_kvd.segments import Segment, SegmentLog
from hga_kvd.summaries import SummaryTable

U8 = npt.NDArray[np.uint8]

# Summaries wait in plain memory to be written, or for ever without a disk. They are about 1/25 of the K/V, so an eighth
# of the arena never is the tighter of the two limits.
RAM_SHARE = 8
RAM_BYTES_MIN = 64 << 20


class SummaryPath:
    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._residency = parts.residency
        self._lock = parts.residency.lock
        self._bytes_max = max(RAM_BYTES_MIN, parts.settings.ram // RAM_SHARE)

    def put(
        self, session_id: int, epoch: int, kind: str, first_chunk: int, chunk_count: int, payload: bytes, now: float
    ) -> None:
        """As Engine.put_summaries. now: seconds."""
        settings, writeout = self._parts.settings, self._parts.writeout
        size = summary_bytes(settings, kind, chunk_count, payload)
        while True:
            with self._lock:
                session = self._residency.session(session_id, epoch)
                rows = rows_to_put(settings, session, kind, first_chunk, chunk_count, size)
                session.use(now)
                held = self._residency.summary_bytes
                if not held or held + len(payload) <= self._bytes_max:
                    put(session, rows, kind, payload)
                    self._parts.mark_dirty(session)
                    return
            if writeout is None:
                raise StorageFull(f"summaries in RAM have reached {held} bytes and there is no NVMe: delete sessions")
            with writeout.barrier:
                writeout.round()

    def get(
        self, session_id: int, epoch: int, kind: str, first_chunk: int, chunk_count: int, destination: U8
    ) -> tuple[int, int]:
        """As Engine.read_summaries."""
        disk, segments = self._parts.disk, self._parts.segments
        while True:
            with self._lock:
                session = self._residency.session(session_id, epoch)
                found = plan(session, segments, kind, first_chunk, chunk_count, destination)
            if not len(found.items):
                break
            assert disk is not None
            assert segments is not None
            try:
                bad = read_verified(disk, found.items, destination)
            finally:
                with self._lock:
                    segments.unpin(found.segments)
            if not bad.any():
                break
            with self._lock:
                if not found.is_current():  # put anew meanwhile: what was read is no more
                    continue
            chunk = first_chunk + int(found.items.positions[bad].min())
            self._parts.log.error("summary damaged", session=session_id, kind=kind, chunk=chunk)
            raise SessionNotFound(
                f"the summary of kind {kind!r} of chunk {chunk} of session {session_id} is damaged: compute it again "
                "from the chunk's K/V and put it"
            )
        return found.chunk_count, found.chunk_count * found.items.item_bytes


def summary_bytes(settings: Settings, kind: str, chunk_count: int, payload: bytes) -> int:
    """Bytes a chunk. Raises: InvalidRequest, LimitExceeded."""
    if not 1 <= len(kind.encode()) <= KIND_BYTES_MAX:
        raise InvalidRequest(f"a summary kind of {len(kind.encode())} bytes; it must have 1 to {KIND_BYTES_MAX}")
    size, rest = divmod(len(payload), max(1, chunk_count))
    if chunk_count < 1 or rest or not size:
        raise InvalidRequest(f"{len(payload)} bytes are not the same number of bytes for each of {chunk_count} chunks")
    if size > settings.summary_bytes_max:
        raise LimitExceeded(f"a summary of {size} bytes a chunk; at most {settings.summary_bytes_max} are allowed")
    return size


def rows_to_put(settings: Settings, session: Session, kind: str, first_chunk: int, chunk_count: int, size: int) -> I64:
    """Chunk rows that get a summary of `size` bytes. Raises: KeyOutOfRange, InvalidRequest, LimitExceeded."""
    end, summaries = first_chunk + chunk_count, session.table.summaries
    if end > session.chunk_count:
        raise KeyOutOfRange(
            f"summaries of chunks up to {end - 1}; session {session.session_id} has {session.chunk_count} chunks: "
            "append them first"
        )
    all_rows = session.all_rows()
    sizes = summaries.bytes[summaries.find(all_rows, kind)]
    other = sizes[(sizes != 0) & (sizes != size)]
    if len(other):
        raise InvalidRequest(
            f"summaries of kind {kind!r} have {other[0]} bytes a chunk in this session, not {size}: use another kind"
        )
    rows = all_rows[first_chunk:end]
    if summaries.kind_count(rows[summaries.find(rows, kind) == 0]) >= settings.summary_kinds_max:
        raise LimitExceeded(f"a chunk may have summaries of {settings.summary_kinds_max} kinds")
    return rows


def put(session: Session, rows: I64, kind: str, payload: bytes) -> None:
    """Stores equal parts of `payload`; those of lost chunks, whose records are damaged, go with them."""
    size = len(payload) // len(rows)
    kept = np.flatnonzero(rows != LOST_ROW).tolist()
    if len(kept) < len(rows):
        payload = b"".join(payload[i * size : (i + 1) * size] for i in kept)
    if kept:
        session.table.summaries.put(rows[kept], kind, payload)


@dataclass(frozen=True, eq=False)
class Recall:
    """Of the summaries of chunk_count chunks the destination has what is in RAM; items: what is to be read into it."""

    chunk_count: int
    items: Items
    segments: tuple[Segment, ...]  # pinned
    table: SummaryTable
    rows: I64  # of the items
    places: I64

    def is_current(self) -> bool:
        """Whether what was to be read is still what counts."""
        return bool((_places(self.table, self.rows) == self.places).all())


def plan(
    session: Session, log: SegmentLog | None, kind: str, first_chunk: int, chunk_count: int, destination: U8
) -> Recall:
    """Of as many chunks as follow one another and fit. Raises: SessionNotFound if the first has none, InvalidRequest,
    LimitExceeded."""
    if chunk_count < 1:
        raise InvalidRequest("summaries of no chunks")
    table = session.table.summaries
    chunk_rows = session.all_rows()[first_chunk : first_chunk + chunk_count]
    rows = table.find(chunk_rows, kind)
    if not len(rows) or not rows[0]:
        raise SessionNotFound(
            f"chunk {first_chunk} of session {session.session_id} has no summary of kind {kind!r}: put it"
        )
    size = int(table.bytes[rows[0]])
    rows = rows[: len(destination) // size]
    if not len(rows):
        raise LimitExceeded(f"a summary of {size} bytes does not fit in an answer of {len(destination)} bytes")
    # Sessions that were forked from one may have given a kind other sizes: only equal ones go into one answer.
    count = int(np.argmax(np.append((table.bytes[rows] != size) | (rows == 0), True)))
    absent = []
    for i, row in enumerate(rows[:count].tolist()):
        held = table.in_ram.get(row)
        if held is None:
            absent.append(i)
        else:
            destination[i * size : (i + 1) * size] = np.frombuffer(held, np.uint8)
    positions = np.array(absent, np.int64)
    positions = positions[np.lexsort((table.offset[rows[positions]], table.segment[rows[positions]]))]
    wanted = rows[positions]
    segments, handles = log.pin(table.segment[wanted]) if log and len(wanted) else ((), np.zeros(0, np.int64))
    assert (table.segment[wanted] != NO_SEGMENT).all()
    seeds = summary_seeds(session.table.uid[chunk_rows[positions]], kind)
    items = Items(size, handles, table.offset[wanted], positions, seeds, table.checksum[wanted])
    return Recall(count, items, segments, table, wanted, _places(table, wanted))


def _places(table: SummaryTable, rows: I64) -> I64:
    return np.stack((table.segment[rows], table.offset[rows]))
