"""The log: segment files, and frames appended to the open one. Knows bytes and files; what they mean is the engine's.

- Frames go to `open` only, one after the other; `synced_bytes` is how much of it a power loss cannot take.
- After a failed write or sync the segment is poisoned: nothing is ever written to it again, and only what had been
  synced counts.
- A file is created, given its header and synced, and the directory synced, before `create` returns: the caller may then
  name it in the manifest, and only after that append to it.
- `live` counts the chunks, summaries and links that the index still has in a segment; `pins` the calls that read it.
The engine's write-out lock guards appends and creation, its lock guards `live` and `pins`.
"""

from __future__ import annotations

import contextlib
import errno
import os
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import numpy.typing as npt

from hga_kvd.disk import Disk
from hga_kvd.errors import StorageFull
from hga_kvd.format import (
    BLOCK_BYTES,
    FRAME_HEAD_BYTES,
    FrameHeader,
    encode_frame_head,
    encode_segment_header,
    round_up,
    segment_name,
)
from hga_kvd.index import Places, places_of, runs_of
from hga_kvd.manifest import SegmentState
from hga_kvd.memory import address_of, aligned_buffer

I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]

# A segment smaller than this is not worth its file; the rest of the capacity is then full.
SEGMENT_BYTES_MIN = 64 << 10


@dataclass(eq=False)
class Segment:
    segment_id: int
    handle: int  # -1: the file is gone or unreadable
    size: int
    state: SegmentState
    used_bytes: int = BLOCK_BYTES
    synced_bytes: int = BLOCK_BYTES
    next_sequence: int = 0
    taken: int = 0  # bytes of the device: size less holes
    live: int = 0
    pins: int = 0
    damaged: bool = False  # something in it could not be read: its file is kept, in case that passes


@dataclass(frozen=True)
class NewFrame:
    """A frame to append. Its body is these pieces of memory, one after the other; they stay as they are meanwhile."""

    kind: int
    session_id: int
    epoch: int
    first_chunk: int
    chunk_count: int
    table: bytes
    addresses: U64
    lengths: I64

    @property
    def body_bytes(self) -> int:
        return int(self.lengths.sum())

    @property
    def frame_bytes(self) -> int:
        return frame_bytes(len(self.table), self.body_bytes)


def frame_bytes(table_bytes: int, body_bytes: int) -> int:
    return round_up(FRAME_HEAD_BYTES + table_bytes) + round_up(body_bytes)


def tail_of(segment: Segment) -> Places:
    """What a segment that was left has behind its last frame."""
    length = segment.size // BLOCK_BYTES * BLOCK_BYTES - segment.used_bytes
    return places_of([(segment.segment_id, segment.used_bytes, length)] if length > 0 else [])


def handles_of(segments: tuple[Segment, ...]) -> I64:
    return np.array([segment.handle for segment in segments], np.int64)


class SegmentLog:
    def __init__(self, disk: Disk, segment_bytes: int, bytes_max: int, reserve_bytes: int) -> None:
        """bytes_max: cap on the sum of segment sizes; 0: none. reserve_bytes: of the file system, never taken: where it is
        full, there must be room for the manifest that says what was deleted."""
        self._disk = disk
        self._segment_bytes = segment_bytes
        self._bytes_max = bytes_max
        self._reserve_bytes = reserve_bytes
        self.segments: dict[int, Segment] = {}
        self.open: Segment | None = None
        self.next_segment_id = 1
        self.written_bytes = 0
        self.can_punch = True
        # Their files are still there and take space, whatever removing them has met.
        self._condemned: list[Segment] = []
        self.foreign_bytes = 0  # of files that have a segment's name and are not ours

    def used_bytes(self) -> int:
        """Space that files with a segment's name take."""
        return sum(segment.taken for segment in [*self.segments.values(), *self._condemned]) + self.foreign_bytes

    def capacity_bytes(self) -> int:
        """Most that segments may take."""
        there = max(0, self.used_bytes() + self._disk.free_bytes() - self._reserve_bytes)
        return min(there, self._bytes_max or there)

    def room(self) -> int:
        """Bytes that the open segment still takes."""
        return self.open.size - self.open.used_bytes if self.open else 0

    def create(self, frame_bytes_min: int) -> None:
        """Opens a new segment that has room for a frame of this size. There must be no open one.

        Raises: StorageFull; OSError from the device, and then there is no new segment.
        """
        assert self.open is None
        smallest = max(SEGMENT_BYTES_MIN, BLOCK_BYTES + frame_bytes_min)
        left = (self.capacity_bytes() - self.used_bytes()) // BLOCK_BYTES * BLOCK_BYTES
        if left < smallest:
            capped = self.capacity_bytes() == self._bytes_max
            more = "raise nvme_max" if capped else f"free some (nvme_reserve, {self._reserve_bytes}, stays free)"
            raise StorageFull(
                f"NVMe is full: segments take {self.used_bytes()} of {self.capacity_bytes()} bytes and a frame of "
                f"{frame_bytes_min} does not fit; delete sessions, or {more}"
            )
        size = round_up(min(left, max(smallest, self._segment_bytes)))
        segment_id = self.next_segment_id
        self.next_segment_id += 1
        name = segment_name(segment_id)
        try:
            handle = self._disk.create(name, size)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StorageFull(
                    f"the file system has no {size} bytes for {name}; free space or delete sessions"
                ) from error
            raise
        try:
            block = aligned_buffer(BLOCK_BYTES)
            block[:] = np.frombuffer(encode_segment_header(segment_id, size), np.uint8)
            self._write(
                handle, np.zeros(1, np.int64), np.array([address_of(block)], np.uint64), np.array([BLOCK_BYTES])
            )
            self._disk.sync(handle)
            self._disk.sync_names()
        except OSError:
            unused = Segment(segment_id, handle, size, "poisoned", taken=size)
            self._condemned.append(unused)
            self.erase([unused])
            raise
        self.open = self.segments[segment_id] = Segment(segment_id, handle, size, "open", taken=size)

    def append(self, frames: list[NewFrame]) -> list[int]:
        """Writes frames to the open segment, where they fit. Returns the offset of each body; nothing is synced yet.

        Raises: OSError; poison the segment then.
        """
        segment = self.open
        assert segment is not None
        offset, heads, headers = segment.used_bytes, [], []
        for sequence, frame in enumerate(frames, segment.next_sequence):
            # fmt: off
            header = FrameHeader(
                frame.kind, segment.segment_id, offset, sequence, segment.synced_bytes, frame.session_id,
                frame.first_chunk, frame.chunk_count, len(frame.table), frame.body_bytes, frame.epoch,
            )
            # fmt: on
            headers.append(header)
            heads.append(encode_frame_head(header, frame.table))
            offset += header.frame_bytes
        assert offset <= segment.size
        # After a failure nobody may take this space for unused: it may hold anything.
        segment.used_bytes, segment.next_sequence = offset, segment.next_sequence + len(frames)
        buffer = aligned_buffer(sum(map(len, heads)))
        buffer[:] = np.frombuffer(b"".join(heads), np.uint8)
        head_lengths = np.array([len(head) for head in heads], np.int64)
        head_addresses = (address_of(buffer) + np.cumsum(head_lengths) - head_lengths).astype(np.uint64)
        offsets, addresses, lengths = (
            [np.array([h.offset for h in headers], np.int64)],
            [head_addresses],
            [head_lengths],
        )
        for header, frame in zip(headers, frames, strict=True):
            offsets.append(header.body_offset + np.cumsum(frame.lengths) - frame.lengths)
            addresses.append(frame.addresses)
            lengths.append(frame.lengths)
        # fmt: off
        self._write(
            segment.handle, np.concatenate(offsets), np.concatenate(addresses), np.concatenate(lengths)
        )
        # fmt: on
        return [header.body_offset for header in headers]

    def _write(self, handle: int, offsets: I64, addresses: U64, lengths: I64) -> None:
        results = self._disk.write(np.full(len(offsets), handle, np.int32), offsets, addresses, lengths)
        failed = results[results < 0]
        if len(failed):
            raise OSError(-int(failed[0]), os.strerror(-int(failed[0])))
        self.written_bytes += int(lengths.sum())

    def sync(self) -> None:
        """Makes everything in the open segment durable. Raises OSError; poison the segment then."""
        segment = self.open
        assert segment is not None
        if segment.synced_bytes < segment.used_bytes:
            self._disk.sync(segment.handle)
            segment.synced_bytes = segment.used_bytes

    def seal(self, state: SegmentState) -> Places:
        """Leaves the open segment: nothing more is appended to it. Poisoned: only what was synced counts.

        Returns its rest, which nothing needs once the manifest knows.
        """
        segment = self.open
        assert segment is not None
        assert state != "open"
        if state == "sealed":
            assert segment.synced_bytes == segment.used_bytes
        segment.used_bytes = segment.synced_bytes
        segment.state = state
        self.open = None
        return tail_of(segment)

    def punch(self, places: list[Places]) -> list[Places]:
        """Gives the space of these places back, for good: a power loss must not fill holes that others were filled from.

        Nothing durable may name the places. Returns what could not be given back now. Where the file system cannot make
        holes, space comes back by whole segments only.
        """
        left = []
        for segment_id, runs in groupby(runs_of(places), lambda run: run[0]):
            segment, mine = self.segments.get(segment_id), list(runs)
            if segment is None or not self.can_punch:
                continue
            try:
                for _, offset, length in mine:
                    self._disk.punch(segment.handle, offset, length)
                self._disk.sync(segment.handle)
            except OSError as error:
                if error.errno == errno.EOPNOTSUPP:
                    self.can_punch = False
                else:
                    left.append(places_of(mine))
            segment.taken = min(segment.size, self._disk.taken(segment.handle))
        return left

    def pin(self, segment_of: I64) -> tuple[tuple[Segment, ...], I64]:
        """These segments, none of which is removed before `unpin`, and the handle of each item's."""
        ids, which = np.unique(segment_of, return_inverse=True)
        segments = self.hold(ids.tolist())
        return segments, handles_of(segments)[which]

    def hold(self, ids: list[int]) -> tuple[Segment, ...]:
        """These segments, none of which is removed before `unpin`."""
        segments = tuple([self.segments[segment_id] for segment_id in ids])
        for segment in segments:
            segment.pins += 1
        return segments

    def unpin(self, segments: tuple[Segment, ...]) -> None:
        for segment in segments:
            segment.pins -= 1

    def has_dead(self) -> bool:
        """Whether a segment's file could go now, unless it is damaged."""
        return bool(self._condemned) or any(self._is_dead(s) and not s.damaged for s in self.segments.values())

    def _is_dead(self, segment: Segment) -> bool:
        used = segment is not self.open or segment.used_bytes > BLOCK_BYTES
        return used and not segment.live and not segment.pins

    def drop_dead(self, damaged_too: bool) -> list[Segment]:
        """Takes segments out of the log that hold nothing live and that nobody reads; `erase` them, manifest first.

        Returns also those that earlier calls took out and could not erase.
        """
        dead = [s for s in self.segments.values() if self._is_dead(s) and (damaged_too or not s.damaged)]
        for segment in dead:
            del self.segments[segment.segment_id]
            if segment is self.open:
                self.open = None
        self._condemned += dead
        return list(self._condemned)

    def erase(self, segments: list[Segment]) -> None:
        """Removes the files of segments that the manifest does not name any more. Raises OSError."""
        for segment in segments:
            if segment.handle >= 0:
                with contextlib.suppress(FileNotFoundError):  # somebody else has removed it
                    self._disk.remove(segment_name(segment.segment_id))
                self._disk.close(segment.handle)
            self._condemned.remove(segment)
        if segments:
            self._disk.sync_names()
