"""Reads segments back: which frames in them are sound, where each log ends, and what is damaged. Changes nothing.

docs/format.md, "Recovery", is the rule; this is its steps 3 and 4. Below what is vouched for, a frame is taken by its
table and a hole is damage. Above, a frame is taken only if its body is whole, and the first that is not ends the log.

Where a frame is, only the one before it says. So one segment is a chain of small reads that wait for each other, and a
store of 100 GB has thousands of them: many segments are walked at once. A walk is a generator that asks for bytes and
knows nothing of the others; `walk_all` reads what they ask for in batches.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from hga_kvd.checksum import checksums, chunk_seeds, summary_seeds
from hga_kvd.disk import Disk
from hga_kvd.format import (
    BLOCK_BYTES,
    BadBytes,
    ChunkFrame,
    Frame,
    SummaryFrame,
    check_frame,
    decode_frame_header,
    decode_segment_header,
    decode_table,
    encode_segment_header,
)
from hga_kvd.memory import address_of, aligned_buffer

U8 = npt.NDArray[np.uint8]

SECTOR_BYTES = 512  # what a device writes whole or not at all

# Header and table of a few chunks of a real model (6 KiB a chunk) in one read. After the first frame of a segment as much
# as the largest head so far: its frames are much alike.
HEAD_READ_BYTES = 64 << 10
# One read while looking for the next sound frame, or through a body.
SCAN_READ_BYTES = 4 << 20
# What is not sound is read once more: a read that failed, or brought other bytes, for once must not cut
# off what was flushed.
TRIES = 2
# Blocks that cannot be read, after which the rest of a segment is not looked through: of a device that fails every read
# each block would be asked for, one after another.
BAD_BLOCKS_MAX = 64
# Walks at once, and bytes of one batch: a disk is busy with 32 to 64 reads in flight.
WALKS_MAX = 128
BATCH_BYTES = 16 << 20


@dataclass(frozen=True)
class Walk:
    frames: list[Frame]
    used_bytes: int  # where the log ends
    next_sequence: int
    damage: list[tuple[int, int]]  # [from, to) offsets that should hold frames and do not
    unreadable: bool  # the device failed a read: what is behind the end may be sound
    stale: list[int]  # offsets of sound frames behind the end


Result = TypeVar("Result")
# What a walk asks for, (offset, length), both multiples of a block; it gets the bytes, which are its own until it asks
# again, or None if the device failed.
Request = tuple[int, int]
Steps = Generator[Request, U8 | None, Result]


@dataclass(frozen=True)
class Unread:
    """A segment to walk. torn_end: it was being appended to when the daemon died."""

    handle: int
    segment_id: int
    vouched_bytes: int
    torn_end: bool


def walk_all(disk: Disk, unread: Iterable[Unread]) -> list[Walk | None]:
    """What each of these segments holds; None where the header is not its own, or cannot be read."""
    waiting = deque(enumerate(unread))
    found: list[Walk | None] = [None] * len(waiting)
    asking: deque[tuple[int, int, Steps[Walk | None], Request]] = deque()  # number, handle, walk, what it wants
    buffer = aligned_buffer(BATCH_BYTES)
    while waiting or asking:
        while waiting and len(asking) < WALKS_MAX:
            number, segment = waiting.popleft()
            steps = _Walker(segment, disk.size(segment.handle)).walk()
            first = next(steps, None)
            if first is not None:  # a file too short for a header asks for nothing
                asking.append((number, segment.handle, steps, first))
        if not asking:
            break
        batch, ends = [asking.popleft()], [0]
        ends.append(batch[0][3][1])
        while asking and ends[-1] + asking[0][3][1] <= len(buffer):
            batch.append(asking.popleft())
            ends.append(ends[-1] + batch[-1][3][1])
        if ends[-1] > len(buffer):
            buffer = aligned_buffer(ends[-1])
        results = disk.read(
            np.array([handle for _, handle, _, _ in batch], np.int32),
            np.array([offset for *_, (offset, _) in batch], np.int64),
            np.array(ends[:-1], np.uint64) + np.uint64(address_of(buffer)),
            np.diff(ends),
        )
        for i, (number, handle, steps, _) in enumerate(batch):
            try:
                request = steps.send(None if results[i] else buffer[ends[i] : ends[i + 1]])
                asking.append((number, handle, steps, request))
            except StopIteration as stop:
                found[number] = stop.value
    return found


class _Walker:
    def __init__(self, segment: Unread, file_bytes: int) -> None:
        self._segment = segment
        self._file_bytes = file_bytes
        self._head_bytes = HEAD_READ_BYTES  # how much a frame's head is guessed to have
        self._largest_head_bytes = 0
        self._unreadable = False
        self._bad_blocks = 0

    def walk(self) -> Steps[Walk | None]:
        if not (yield from self._header_fits()):
            return None
        size, vouched, torn_end = self._file_bytes, self._segment.vouched_bytes, self._segment.torn_end
        size = size // BLOCK_BYTES * BLOCK_BYTES
        limit = size if torn_end else min(size, vouched)
        sound: list[Frame] = []
        offset, sequence = BLOCK_BYTES, 0
        while offset < limit:
            frame = yield from self._frame_at(offset, limit)
            if frame is None or frame.header.sequence < sequence:
                frame = yield from self._next_frame(offset + BLOCK_BYTES, limit, sequence)
            if frame is None:
                break
            sound.append(frame)
            offset, sequence = frame.header.offset + frame.header.frame_bytes, frame.header.sequence + 1
        vouched = max([BLOCK_BYTES, vouched, *(frame.header.durable_bytes for frame in sound)])
        return (yield from self._judge(sound, vouched, torn_end))

    def _header_fits(self) -> Steps[bool]:
        for _ in range(TRIES if self._file_bytes >= BLOCK_BYTES else 0):
            block = yield 0, BLOCK_BYTES
            if block is not None and is_header(block, self._segment.segment_id):
                return True
        return False

    def _judge(self, sound: list[Frame], vouched: int, torn_end: bool) -> Steps[Walk]:
        taken: list[Frame] = []
        damage: list[tuple[int, int]] = []
        stale: list[int] = []
        end = BLOCK_BYTES
        for frame in sound:
            header = frame.header
            if header.offset + header.frame_bytes <= vouched:
                if header.offset > end:
                    damage.append((end, header.offset))
            else:
                if end < vouched:
                    damage.append((end, vouched))
                    end = vouched
                next_one = torn_end and header.offset == end and not stale
                if not next_one or not (yield from self._body_is_whole(frame)):
                    stale.append(header.offset)
                    continue
            taken.append(frame)
            end = header.offset + header.frame_bytes
        if end < vouched:
            damage.append((end, vouched))
            end = vouched
        # Above all that were seen, so that a stale frame can never pass for the next one.
        next_sequence = sound[-1].header.sequence + 1 if sound else 0
        return Walk(taken, end, next_sequence, damage, self._unreadable, stale)

    def _read(self, offset: int, length: int) -> Steps[U8 | None]:
        for _ in range(TRIES):
            piece = yield offset, length
            if piece is not None:
                return piece
        self._unreadable = True
        return None

    def _frame_at(self, offset: int, limit: int) -> Steps[Frame | None]:
        """The sound frame that starts here and ends by `limit`, or None."""
        for _ in range(TRIES):
            frame = yield from self._try_frame_at(offset, limit)
            if frame is not None:
                self._largest_head_bytes = max(self._largest_head_bytes, frame.header.head_bytes)
                self._head_bytes = min(HEAD_READ_BYTES, self._largest_head_bytes)
                return frame
        return None

    def _try_frame_at(self, offset: int, limit: int) -> Steps[Frame | None]:
        head = yield offset, min(self._head_bytes, limit - offset)
        if head is None:  # a bad sector behind the head is no damage to the head
            head = yield from self._read(offset, BLOCK_BYTES)
        if head is None:
            return None
        try:
            header = decode_frame_header(head[:BLOCK_BYTES].tobytes(), self._segment.segment_id, offset, limit)
            if header.head_bytes > len(head):
                head = yield from self._read(offset, header.head_bytes)
                if head is None:
                    return None
            return decode_table(header, check_frame(header, head[: header.head_bytes].tobytes()))
        except BadBytes:
            return None

    def _next_frame(self, offset: int, limit: int, sequence: int) -> Steps[Frame | None]:
        """The first sound frame at or behind `offset` with at least this sequence number."""
        for start in range(offset, limit, SCAN_READ_BYTES):
            length = min(SCAN_READ_BYTES, limit - start)
            for block in (yield from self._likely_blocks(start, length)):
                frame = yield from self._frame_at(block, limit)
                if frame is not None and frame.header.sequence >= sequence:
                    return frame
            if self._bad_blocks >= BAD_BLOCKS_MAX:
                return None
        return None

    def _likely_blocks(self, start: int, length: int) -> Steps[list[int]]:
        """Where a frame may start, of what can be read here."""
        piece = yield from self._read(start, length)
        if piece is not None:
            return [start + int(at) * BLOCK_BYTES for at in np.flatnonzero(piece[::BLOCK_BYTES] == ord("K"))]
        found = []  # one bad block hides its whole piece
        for at in range(start, start + length, BLOCK_BYTES):
            block = yield from self._read(at, BLOCK_BYTES)
            if block is None:
                self._bad_blocks += 1
                if self._bad_blocks >= BAD_BLOCKS_MAX:
                    break
            else:
                found.append(at)
        return found

    def _body_is_whole(self, frame: Frame) -> Steps[bool]:
        header = frame.header
        if isinstance(frame, ChunkFrame):
            count, layers, records = frame.checksums.shape
            seeds = chunk_seeds(frame.uids, layers, records)
            unit_count, unit_bytes, stride = count * layers, frame.record_bytes, frame.stride
        elif isinstance(frame, SummaryFrame):
            unit_count, records, unit_bytes, stride = header.chunk_count, 1, frame.bytes_per_chunk, frame.stride
            seeds = summary_seeds(frame.uids, frame.kind)
        else:
            return True  # a link is all table
        expected = frame.checksums.reshape(unit_count, records)
        seeds = seeds.reshape(unit_count, records)
        step = max(1, SCAN_READ_BYTES // stride)  # extents a read
        for first in range(0, unit_count, step):
            extents = min(step, unit_count - first)
            starts = (np.arange(extents)[:, None] * stride + np.arange(records) * unit_bytes).reshape(-1)
            for _ in range(TRIES):
                piece = yield from self._read(header.body_offset + first * stride, extents * stride)
                if piece is None:
                    return False
                found = checksums(piece.data, starts, unit_bytes, seeds[first : first + extents].reshape(-1))
                if (found == expected[first : first + extents].reshape(-1)).all():
                    break
            else:
                return False
        return True


def is_header(block: U8, segment_id: int) -> bool:
    try:
        return decode_segment_header(block.tobytes())[0] == segment_id
    except BadBytes:
        return False


def is_leftover(disk: Disk, handle: int, segment_id: int) -> bool:
    """Whether the file starts with this segment's header, or with what is left of it if power was lost while it was
    written: a sector of it, or nothing but zeros."""
    size = disk.size(handle)
    if size < BLOCK_BYTES:
        return False
    whole = np.frombuffer(encode_segment_header(segment_id, size), np.uint8).reshape(-1, SECTOR_BYTES)
    for _ in range(TRIES):
        try:
            block = read_bytes(disk, handle, 0, BLOCK_BYTES)
        except OSError:
            continue
        sectors = block.reshape(-1, SECTOR_BYTES)
        if ((sectors == whole).all(1) & whole.any(1)).any() or not block.any() or is_header(block, segment_id):
            return True
    return False


def read_bytes(disk: Disk, handle: int, offset: int, length: int) -> U8:
    """`length` bytes of a file, both multiples of a block. Raises OSError."""
    buffer = aligned_buffer(length)
    address = np.array([address_of(buffer)], np.uint64)
    result = int(disk.read(np.array([handle], np.int32), np.array([offset]), address, np.array([length]))[0])
    if result:
        raise OSError(-result, f"{os.strerror(-result)} at {offset}")
    return buffer


def erase_heads(disk: Disk, handle: int, offsets: list[int]) -> None:
    """Overwrites the first block of stale frames with zeros and syncs the file. Raises OSError."""
    zeros = aligned_buffer(BLOCK_BYTES)
    count = len(offsets)
    results = disk.write(
        np.full(count, handle, np.int32),
        np.array(offsets, np.int64),
        np.full(count, address_of(zeros), np.uint64),
        np.full(count, BLOCK_BYTES, np.int64),
    )
    if results.any():
        raise OSError(-int(results.min()), "cannot erase a torn frame")
    disk.sync(handle)
