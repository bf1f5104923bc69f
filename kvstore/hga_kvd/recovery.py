"""Reads a segment back: which frames in it are sound, where its log ends, and what is damaged. Changes nothing.

docs/format.md, "Recovery", is the rule; this is its steps 3 and 4. Below what is vouched for, a frame is taken by its
table and a hole is damage. Above, a frame is taken only if its body is whole, and the first that is not ends the log.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

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

# Header and table of a few chunks of a real model (6 KiB a chunk) in one read.
HEAD_READ_BYTES = 64 << 10
# One read while looking for the next sound frame, or through a body.
SCAN_READ_BYTES = 4 << 20
# What is not sound is read once more, as records are: a read that failed, or brought other bytes, for once must not cut
# off what was flushed.
TRIES = 2


@dataclass(frozen=True)
class Walk:
    frames: list[Frame]
    used_bytes: int  # where the log ends
    next_sequence: int
    damage: list[tuple[int, int]]  # [from, to) offsets that should hold frames and do not
    unreadable: bool  # the device failed a read: what is behind the end may be sound
    stale: list[int]  # offsets of sound frames behind the end


def read_bytes(disk: Disk, handle: int, offset: int, length: int) -> U8:
    """`length` bytes of a file, both multiples of a block. Raises OSError."""
    buffer = aligned_buffer(length)
    address = np.array([address_of(buffer)], np.uint64)
    result = int(disk.read(np.array([handle], np.int32), np.array([offset]), address, np.array([length]))[0])
    if result:
        raise OSError(-result, f"{os.strerror(-result)} at {offset}")
    return buffer


def walk(disk: Disk, handle: int, segment_id: int, vouched_bytes: int, torn_end: bool) -> Walk:
    """Frames of one segment in order. torn_end: it was being appended to when the daemon died."""
    return _Walker(disk, handle, segment_id).walk(vouched_bytes, torn_end)


class _Walker:
    def __init__(self, disk: Disk, handle: int, segment_id: int) -> None:
        self._disk = disk
        self._handle = handle
        self._segment_id = segment_id
        self._unreadable = False

    def walk(self, vouched_bytes: int, torn_end: bool) -> Walk:
        size = self._disk.size(self._handle) // BLOCK_BYTES * BLOCK_BYTES
        limit = size if torn_end else min(size, vouched_bytes)
        sound: list[Frame] = []
        offset, sequence = BLOCK_BYTES, 0
        while offset < limit:
            frame = self._frame_at(offset, limit)
            if frame is None or frame.header.sequence < sequence:
                frame = self._next_frame(offset + BLOCK_BYTES, limit, sequence)
            if frame is None:
                break
            sound.append(frame)
            offset, sequence = frame.header.offset + frame.header.frame_bytes, frame.header.sequence + 1
        vouched = max([BLOCK_BYTES, vouched_bytes, *(frame.header.durable_bytes for frame in sound)])
        return self._judge(sound, vouched, torn_end)

    def _judge(self, sound: list[Frame], vouched: int, torn_end: bool) -> Walk:
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
                if not torn_end or header.offset != end or stale or not self._body_is_whole(frame):
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

    def _read(self, offset: int, length: int) -> U8 | None:
        for _ in range(TRIES):
            try:
                return read_bytes(self._disk, self._handle, offset, length)
            except OSError:
                continue
        self._unreadable = True
        return None

    def _frame_at(self, offset: int, limit: int) -> Frame | None:
        """The sound frame that starts here and ends by `limit`, or None."""
        tries = (self._try_frame_at(offset, limit) for _ in range(TRIES))
        return next((frame for frame in tries if frame is not None), None)

    def _try_frame_at(self, offset: int, limit: int) -> Frame | None:
        head: U8 | None
        try:
            head = read_bytes(self._disk, self._handle, offset, min(HEAD_READ_BYTES, limit - offset))
        except OSError:  # a bad sector behind the head is no damage to the head
            head = self._read(offset, BLOCK_BYTES)
        if head is None:
            return None
        try:
            header = decode_frame_header(head[:BLOCK_BYTES].tobytes(), self._segment_id, offset, limit)
            if header.head_bytes > len(head):
                head = self._read(offset, header.head_bytes)
                if head is None:
                    return None
            return decode_table(header, check_frame(header, head[: header.head_bytes].tobytes()))
        except BadBytes:
            return None

    def _next_frame(self, offset: int, limit: int, sequence: int) -> Frame | None:
        """The first sound frame at or behind `offset` with at least this sequence number."""
        for start in range(offset, limit, SCAN_READ_BYTES):
            length = min(SCAN_READ_BYTES, limit - start)
            piece = self._read(start, length)
            # One bad block hides its whole piece: look block by block there.
            blocks = np.arange(length // BLOCK_BYTES)
            starts = blocks if piece is None else np.flatnonzero(piece[::BLOCK_BYTES] == ord("K"))
            for block in starts.tolist():
                frame = self._frame_at(start + block * BLOCK_BYTES, limit)
                if frame is not None and frame.header.sequence >= sequence:
                    return frame
        return None

    def _body_is_whole(self, frame: Frame) -> bool:
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
                piece = self._read(header.body_offset + first * stride, extents * stride)
                if piece is None:
                    return False
                found = checksums(piece.data, starts, unit_bytes, seeds[first : first + extents].reshape(-1))
                if (found == expected[first : first + extents].reshape(-1)).all():
                    break
            else:
                return False
        return True


def header_fits(disk: Disk, handle: int, segment_id: int, unwritten: bool = False) -> bool:
    """Whether the file starts with this segment's header.

    unwritten: also if power was lost while it was written, and each sector of it is the header's or still zeros.
    """
    size = disk.size(handle)
    if size < BLOCK_BYTES:
        return False
    whole = np.frombuffer(encode_segment_header(segment_id, size), np.uint8).reshape(-1, SECTOR_BYTES)
    for _ in range(TRIES):
        try:
            block = read_bytes(disk, handle, 0, BLOCK_BYTES)
            sectors = block.reshape(-1, SECTOR_BYTES)
            if unwritten and ((sectors == whole).all(1) | ~sectors.any(1)).all():
                return True
            if decode_segment_header(block.tobytes())[0] == segment_id:
                return True
        except (OSError, BadBytes):
            continue
    return False


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
