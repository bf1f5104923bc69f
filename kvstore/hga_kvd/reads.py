"""Brings records from disk: few reads, and nothing is called good before its checksum matched.

Records that lie next to each other are read in one piece. Straight into the caller's memory only if they are also
wanted next to each other; through a buffer they need not be, but then whole blocks are read and the records copied out.
`direct` and `buffered` are pure: columns in, columns out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hga_kvd.arena import copy_records
from hga_kvd.checksum import checksums
from hga_kvd.disk import I32, I64, U64, Disk
from hga_kvd.memory import address_of, aligned_buffer

U8 = npt.NDArray[np.uint8]
Bools = npt.NDArray[np.bool_]

# Reads that cannot go straight to their destination go through a buffer of this size.
BUFFER_BYTES = 8 << 20


@dataclass(frozen=True, eq=False)
class Items:
    """What to read: `item_bytes` at offsets[i] of handles[i], to place positions[i] of the destination.

    Sorted by (handle, offset), no place twice. seeds and expected: of the checksums.
    """

    item_bytes: int
    handles: I64
    offsets: I64
    positions: I64
    seeds: U64
    expected: U64

    def __len__(self) -> int:
        return len(self.offsets)

    def part(self, at: slice) -> Items:
        """Some of the items, to the same positions."""
        columns = (self.handles[at], self.offsets[at], self.positions[at], self.seeds[at], self.expected[at])
        return Items(self.item_bytes, *columns)

    def one(self, i: int) -> Items:
        """One item, to position 0."""
        at = slice(i, i + 1)
        first = np.zeros(1, np.int64)
        return Items(self.item_bytes, self.handles[at], self.offsets[at], first, self.seeds[at], self.expected[at])

    def wrong(self, which: Bools, memory: memoryview, starts: I64) -> Bools:
        """Of the items in `which`, those whose bytes at memory[starts] fail their checksum."""
        wrong: Bools = checksums(memory, starts, self.item_bytes, self.seeds[which]) != self.expected[which]
        return wrong


@dataclass(frozen=True)
class Reads:
    """Columns of Disk.read, and for each record which read brings it."""

    handles: I32
    offsets: I64
    addresses: U64
    lengths: I64
    read_of: I64


def direct(handles: I64, offsets: I64, addresses: I64, record_bytes: int) -> Reads:
    """Record i, at offsets[i] of handles[i], to addresses[i]. Records come sorted by (handle, offset)."""
    first = _first_of_run(handles, offsets, record_bytes)
    first[1:] |= np.diff(addresses) != record_bytes
    starts = np.flatnonzero(first)
    lengths = np.diff(starts, append=len(handles)) * record_bytes
    read_of = np.cumsum(first) - 1
    return Reads(
        handles[starts].astype(np.int32), offsets[starts], addresses[starts].astype(np.uint64), lengths, read_of
    )


def buffered(handles: I64, offsets: I64, record_bytes: int, alignment: int) -> tuple[Reads, I64, int]:
    """Reads of whole blocks into a buffer whose address is added later.

    Returns the reads (addresses from 0), where each record then starts in the buffer, and the size of the buffer.
    """
    first = _first_of_run(handles, offsets, record_bytes)
    starts = np.flatnonzero(first)
    read_of = np.cumsum(first) - 1
    ends = np.append(starts[1:], len(handles)) - 1
    low = offsets[starts] // alignment * alignment
    high = -(-(offsets[ends] + record_bytes) // alignment) * alignment
    lengths = high - low
    at = np.cumsum(lengths) - lengths
    reads = Reads(handles[starts].astype(np.int32), low, at.astype(np.uint64), lengths, read_of)
    return reads, at[read_of] + offsets - low[read_of], int(lengths.sum())


def _first_of_run(handles: I64, offsets: I64, record_bytes: int) -> Bools:
    first = np.ones(len(handles), bool)
    first[1:] = (np.diff(offsets) != record_bytes) | (np.diff(handles) != 0)
    return first


def read(disk: Disk, items: Items, destination: U8) -> Bools:
    """Disk to destination, unverified. Returns which items the device could not read."""
    if not len(items):
        return np.zeros(0, bool)
    size, alignment, address = items.item_bytes, disk.alignment, address_of(destination)
    if not (size | address) % alignment and not (items.offsets % alignment).any():
        reads = direct(items.handles, items.offsets, address + items.positions * size, size)
        failed: Bools = disk.read(reads.handles, reads.offsets, reads.addresses, reads.lengths) != 0
        return failed[reads.read_of]
    bad = np.zeros(len(items), bool)
    step = max(1, BUFFER_BYTES // (size + 2 * alignment))
    for first in range(0, len(items), step):
        part = slice(first, first + step)
        reads, starts, buffer_bytes = buffered(items.handles[part], items.offsets[part], size, alignment)
        buffer = aligned_buffer(buffer_bytes)
        addresses = reads.addresses + np.uint64(address_of(buffer))
        failed = disk.read(reads.handles, reads.offsets, addresses, reads.lengths) != 0
        bad[part] = failed[reads.read_of]
        copy_records(buffer.data, starts, destination.data, items.positions[part] * size, size)
    return bad


def read_again(disk: Disk, items: Items, bad: Bools, destination: U8) -> None:
    """One single read more for each bad item, verified in memory of our own. Clears those that are good now."""
    size = items.item_bytes
    for i in np.flatnonzero(bad).tolist():
        own = np.zeros(size, np.uint8)
        item = items.one(i)
        if not read(disk, item, own)[0] and not item.wrong(np.ones(1, bool), own.data, item.positions)[0]:
            at = int(items.positions[i]) * size
            destination[at : at + size] = own
            bad[i] = False


def read_verified(disk: Disk, items: Items, destination: U8) -> Bools:
    """Disk to destination. Returns which items are bad, after a second try; their bytes mean nothing."""
    bad = read(disk, items, destination)
    bad |= items.wrong(np.ones(len(items), bool), destination.data, items.positions * items.item_bytes)
    read_again(disk, items, bad, destination)
    return bad
