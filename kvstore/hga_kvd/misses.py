"""The part of a fetch that goes to disk: which records, in which order, and what of them the arena keeps.

`plan` and `end` run under the residency's lock, `bring` between them under none: everything that the plan names (slots,
segments) is pinned in the meantime. Bytes become VALID in the arena only after they passed their checksum there.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, wait
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hga_kvd.arena import BAD, copy_records
from hga_kvd.checksum import record_seeds
from hga_kvd.disk import Disk
from hga_kvd.index import LOST_ROW, NO_SEGMENT
from hga_kvd.reads import Items, read, read_again
from hga_kvd.residency import Pool, Residency
from hga_kvd.segments import Segment, SegmentLog

U8 = npt.NDArray[np.uint8]
I64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

# What is verified and kept at once, while more is read: 32 records of 32 KiB.
PART_BYTES = 1 << 20
# What a fetch with a deadline reads between two looks at the clock: 0.2 ms of a disk of 1.3 GB/s.
DEADLINE_PART_BYTES = 256 << 10


@dataclass(frozen=True, eq=False)
class Misses:
    """Item i also goes to a record of the arena where slots[i] is not 0."""

    items: Items
    segments: tuple[Segment, ...]  # pinned
    slots: I64
    records: I64
    pinned_slots: I64
    copies_to: I64  # keys that ask for the same record as an item does ...
    copies_of: I64  # ... and which item
    lost: I64  # keys of records that are nowhere


def plan(
    residency: Residency, log: SegmentLog | None, pool: Pool, rows: I64, layers: I64, records: I64, *, missing: I64
) -> Misses:
    """missing: which of the keys (rows[i], layers[i], records[i]) RAM does not have. log: None without a disk."""
    table, slots = pool.table, pool.slots
    # Nowhere: recovery could not find the chunk, or only RAM has it and there the record went BAD.
    nowhere = table.segment[rows[missing]] == NO_SEGMENT
    lost, missing = missing[nowhere], missing[~nowhere]
    states = slots.state[table.slot[rows[lost], layers[lost]], records[lost]]
    assert ((rows[lost] == LOST_ROW) | (states == BAD)).all(), "a dirty chunk without its slots"
    segment_of = table.segment[rows[missing]]
    offset = table.offset[rows[missing]] + layers[missing] * slots.stride + records[missing] * slots.record_bytes
    order = np.lexsort((offset, segment_of))
    missing, segment_of, offset = missing[order], segment_of[order], offset[order]
    first = np.ones(len(missing), bool)
    first[1:] = (np.diff(segment_of) != 0) | (np.diff(offset) != 0)
    item_of = np.cumsum(first) - 1
    keys = missing[first]
    segments, handles = log.pin(segment_of[first]) if log else ((), np.zeros(0, np.int64))
    row, layer, record = rows[keys], layers[keys], records[keys]
    target, pinned = residency.claim_for_reads(pool, row, layer, record)
    seeds, expected = record_seeds(table.uid[row], layer, record), table.checksums[row, layer, record]
    items = Items(slots.record_bytes, handles, offset[first], keys, seeds, expected)
    return Misses(items, segments, target, record, pinned, missing[~first], item_of[~first], lost)


def bring(
    disk: Disk | None,
    readers: Executor,
    residency: Residency,
    pool: Pool,
    misses: Misses,
    destination: U8,
    overdue: Callable[[], bool] | None,
) -> tuple[Bools, Bools, Bools]:
    """Reads all items into the destination and the arena. Returns which are bad, which the arena may keep, and which are
    late.

    Large calls are read in parts, so that one part is verified while the next ones are under way. With a deadline,
    parts are small, one after another, and none begins once `overdue` says so; what has begun is finished: a read that
    went on behind the answer would write into memory that has another use by then.
    """
    items, size = misses.items, pool.slots.record_bytes
    late = np.zeros(len(items), bool)
    if disk is None or not len(items):
        return late, late, late
    if overdue is not None:
        bad = np.zeros(len(items), bool)
        for first in range(0, len(items), max(1, DEADLINE_PART_BYTES // size)):
            part = slice(first, first + max(1, DEADLINE_PART_BYTES // size))
            if overdue():
                late[first:] = True
                break
            bad[part] = read(disk, items.part(part), destination)
            bad[part] |= _keep(residency, pool, misses, part, destination)
        return *_finish(disk, misses, size, destination, bad, late), late
    step = max(1, PART_BYTES // size)
    parts = [slice(first, first + step) for first in range(0, len(items), step)]
    bad = np.zeros(len(items), bool)
    pending = [readers.submit(read, disk, items.part(part), destination) for part in parts[:-1]]
    try:
        # This thread reads the last part itself: a call of one part, as decode steps make, never waits for another.
        last = [read(disk, items.part(part), destination) for part in parts[-1:]]
        for i, part in enumerate(parts):
            bad[part] = pending[i].result() if i < len(pending) else last[0]
            bad[part] |= _keep(residency, pool, misses, part, destination)
    finally:
        wait(pending)  # nothing may be unpinned while the disk still writes to it
    return *_finish(disk, misses, size, destination, bad, late), late


def _finish(disk: Disk, misses: Misses, size: int, destination: U8, bad: Bools, late: Bools) -> tuple[Bools, Bools]:
    """A second try for bad ones, copies for keys named twice; (bad, keep)."""
    items = misses.items
    keep = (misses.slots != 0) & ~bad & ~late
    read_again(disk, items, bad, destination)
    at = items.positions * size
    copy_records(destination.data, at[misses.copies_of], destination.data, misses.copies_to * size, size)
    return bad, keep


def _keep(residency: Residency, pool: Pool, misses: Misses, part: slice, destination: U8) -> Bools:
    """Copies a part to its slots and verifies it. Returns which items of it are wrong."""
    items, slots, size, memory = misses.items.part(part), misses.slots[part], pool.slots.record_bytes, residency.memory
    # The destination is a client's memory and may change at any time, so what the arena keeps is verified in the
    # arena, after it was copied there. Once is enough: the destination has the same bytes unless its owner wrote.
    kept, at = slots != 0, items.positions * size
    starts = pool.slots.starts(slots[kept], misses.records[part][kept])
    copy_records(destination.data, at[kept], memory, starts, size)
    wrong = np.zeros(len(items), bool)
    wrong[kept] = items.wrong(kept, memory, starts)
    wrong[~kept] = items.wrong(~kept, destination.data, at[~kept])
    return wrong


def end(residency: Residency, log: SegmentLog | None, pool: Pool, misses: Misses, keep: Bools | None) -> None:
    """Unpins. keep: as `bring` returned it; None: it did not return."""
    residency.end_reads(pool, misses.slots, misses.records, keep, misses.pinned_slots)
    if log:
        log.unpin(misses.segments)
