"""Brings records from disk: few reads, and nothing is called good before its checksum matched.

Records that lie next to each other are read in one piece. Straight into their memory only if they are also wanted next
to each other there; through a buffer they need not be, but then whole blocks are read and the records copied out.
`direct` and `buffered` are pure: columns in, columns out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hga_kvd.arena import copy_records
from hga_kvd.checksum import checksums
from hga_kvd.disk import I32, I64, U64, Disk
from hga_kvd.memory import address_of, aligned_buffer

U8 = npt.NDArray[np.uint8]
Bools = npt.NDArray[np.bool_]
Parts = Generator[tuple[slice, Bools], None, None]  # items, the next few at a time, and something of each

# Reads that cannot go straight to their destination go through a buffer of this size.
BUFFER_BYTES = 8 << 20
# Reads that are verified and copied at once, while others are under way.
STEP = 16


@dataclass(frozen=True, eq=False)
class Items:
    """What to read: `item_bytes` at offsets[i] of handles[i], to place positions[i] of the destination.

    Neighbours on disk that follow each other are read in one piece. No place twice. seeds and expected: of the checksums.
    """

    item_bytes: int
    handles: I64
    offsets: I64
    positions: I64
    seeds: U64
    expected: U64

    def __len__(self) -> int:
        return len(self.offsets)

    def part(self, at: slice | Bools) -> Items:
        """Some of the items, to the same positions."""
        columns = (self.handles[at], self.offsets[at], self.positions[at], self.seeds[at], self.expected[at])
        return Items(self.item_bytes, *columns)

    def one(self, i: int) -> Items:
        """One item, to position 0."""
        at = slice(i, i + 1)
        first = np.zeros(1, np.int64)
        return Items(self.item_bytes, self.handles[at], self.offsets[at], first, self.seeds[at], self.expected[at])

    def wrong(self, memory: memoryview, starts: I64) -> Bools:
        """Which items' bytes, at memory[starts], fail their checksum."""
        wrong: Bools = checksums(memory, starts, self.item_bytes, self.seeds) != self.expected
        return wrong


@dataclass(frozen=True)
class Reads:
    """Columns of Disk.read; counts: how many records each read brings."""

    handles: I32
    offsets: I64
    addresses: U64
    lengths: I64
    counts: I64


def direct(handles: I64, offsets: I64, addresses: I64, record_bytes: int) -> Reads:
    """Record i, at offsets[i] of handles[i], to addresses[i]."""
    first = _first_of_run(handles, offsets, record_bytes)
    first[1:] |= addresses[1:] - addresses[:-1] != record_bytes
    starts, counts = _runs(first)
    columns = handles[starts].astype(np.int32), offsets[starts], addresses[starts].astype(np.uint64)
    return Reads(*columns, counts * record_bytes, counts)


def buffered(handles: I64, offsets: I64, record_bytes: int, alignment: int) -> tuple[Reads, I64, int]:
    """Reads of whole blocks into a buffer whose address is added later.

    Returns the reads (addresses from 0), where each record then starts in the buffer, and the size of the buffer.
    """
    starts, counts = _runs(_first_of_run(handles, offsets, record_bytes))
    ends = starts + counts - 1
    low = offsets[starts] // alignment * alignment
    high = -(-(offsets[ends] + record_bytes) // alignment) * alignment
    lengths = high - low
    at = np.cumsum(lengths) - lengths
    reads = Reads(handles[starts].astype(np.int32), low, at.astype(np.uint64), lengths, counts)
    return reads, offsets + np.repeat(at - low, counts), int(lengths.sum())


def _first_of_run(handles: I64, offsets: I64, record_bytes: int) -> Bools:
    first = np.ones(len(handles), bool)
    first[1:] = (offsets[1:] - offsets[:-1] != record_bytes) | (handles[1:] != handles[:-1])
    return first


def _runs(first: Bools) -> tuple[I64, I64]:
    """Where each run starts, and how long it is."""
    starts = np.flatnonzero(first)
    counts = np.empty_like(starts)
    counts[:-1] = starts[1:] - starts[:-1]
    counts[-1] = len(first) - starts[-1]
    return starts, counts


def _can_go_straight(disk: Disk, items: Items, addresses: I64) -> bool:
    """Whether all of this is aligned as direct reads must be."""
    bits = items.item_bytes | int(np.bitwise_or.reduce(items.offsets | addresses))
    return not bits & (disk.alignment - 1)


def brought(disk: Disk, items: Items, region: U8, destination: U8, starts: I64) -> Parts:
    """Disk to where the items belong, unverified: to starts[i] in the region or, where that is -1, to their place in the
    destination. Yields the next few and which of them the device could not read, those of at least STEP reads at a time,
    but for the last, while others are under way.

    Close it before the memory is used for something else.
    """
    kept, places = starts >= 0, items.positions * items.item_bytes
    addresses = np.where(kept, address_of(region) + starts, address_of(destination) + places)
    if not _can_go_straight(disk, items, addresses):
        failed = np.zeros(len(items), bool)
        for memory, at, mine in ((region, starts, kept), (destination, places, ~kept)):
            failed[mine] = read(disk, items.part(mine), memory, at[mine])
        yield slice(0, len(items)), failed
        return
    reads = direct(items.handles, items.offsets, addresses, items.item_bytes)
    first = first_read = 0
    with contextlib.closing(disk.stream(reads.handles, reads.offsets, reads.addresses, reads.lengths, STEP)) as parts:
        for statuses in parts:
            counts = reads.counts[first_read : first_read + len(statuses)]
            end = first + int(counts.sum())
            yield slice(first, end), np.repeat(statuses != 0, counts)
            first, first_read = end, first_read + len(statuses)


def read(disk: Disk, items: Items, memory: U8, at: I64) -> Bools:
    """Disk to memory, item i to the bytes at[i], unverified. Returns which items the device could not read."""
    if not len(items):
        return np.zeros(0, bool)
    addresses = address_of(memory) + at
    if _can_go_straight(disk, items, addresses):
        reads = direct(items.handles, items.offsets, addresses, items.item_bytes)
        return np.repeat(disk.read(reads.handles, reads.offsets, reads.addresses, reads.lengths) != 0, reads.counts)
    bad = np.zeros(len(items), bool)
    size, alignment = items.item_bytes, disk.alignment
    step = max(1, BUFFER_BYTES // (size + 2 * alignment))
    for first in range(0, len(items), step):
        part = slice(first, first + step)
        reads, starts, buffer_bytes = buffered(items.handles[part], items.offsets[part], size, alignment)
        buffer = aligned_buffer(buffer_bytes)
        to = reads.addresses + np.uint64(address_of(buffer))
        bad[part] = np.repeat(disk.read(reads.handles, reads.offsets, to, reads.lengths) != 0, reads.counts)
        copy_records(buffer.data, starts, memory.data, at[part], size)
    return bad


def read_again(disk: Disk, items: Items, bad: Bools, destination: U8) -> None:
    """Up to two reads of its own for each bad item, verified in memory of our own. Clears those that are good now.

    Two: the one that failed may have done so for a bad sector of its neighbours, and the next one by chance.
    """
    size = items.item_bytes
    for i in np.repeat(np.flatnonzero(bad), 2).tolist():
        own = np.zeros(size, np.uint8)
        item = items.one(i)
        if bad[i] and not read(disk, item, own, item.positions)[0] and not item.wrong(own.data, item.positions)[0]:
            at = int(items.positions[i]) * size
            destination[at : at + size] = own
            bad[i] = False


def read_verified(disk: Disk, items: Items, destination: U8) -> Bools:
    """Disk to destination. Returns which items are bad, also when read again; their bytes mean nothing."""
    at = items.positions * items.item_bytes
    bad = read(disk, items, destination, at)
    bad |= items.wrong(destination.data, at)
    read_again(disk, items, bad, destination)
    return bad
