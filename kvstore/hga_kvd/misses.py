"""The part of a fetch that goes to disk: which records, in which order, and what of them the arena keeps.

`plan` and `end` run under the residency's lock, `bring` between them under none: everything that the plan names (slots,
segments) is pinned in the meantime. Bytes become VALID in the arena only after they passed their checksum there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hga_kvd.arena import copy_records
from hga_kvd.checksum import record_seeds
from hga_kvd.disk import Disk
from hga_kvd.index import LOST_ROW, NO_SEGMENT
from hga_kvd.reads import Items, read, read_again
from hga_kvd.residency import Pool, Residency
from hga_kvd.segments import Segment, SegmentLog

U8 = npt.NDArray[np.uint8]
I64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


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
    lost: I64  # keys whose chunk recovery could not find


def plan(
    residency: Residency, log: SegmentLog, pool: Pool, rows: I64, layers: I64, records: I64, *, missing: I64
) -> Misses:
    """missing: which of the keys (rows[i], layers[i], records[i]) RAM does not have."""
    table, slots = pool.table, pool.slots
    lost = missing[rows[missing] == LOST_ROW]
    missing = missing[rows[missing] != LOST_ROW]
    segment_of = table.segment[rows[missing]]
    assert (segment_of != NO_SEGMENT).all(), "a dirty chunk without its slots"
    offset = table.offset[rows[missing]] + layers[missing] * slots.stride + records[missing] * slots.record_bytes
    order = np.lexsort((offset, segment_of))
    missing, segment_of, offset = missing[order], segment_of[order], offset[order]
    first = np.ones(len(missing), bool)
    first[1:] = (np.diff(segment_of) != 0) | (np.diff(offset) != 0)
    item_of = np.cumsum(first) - 1
    keys = missing[first]
    segments, handles = log.pin(segment_of[first])
    row, layer, record = rows[keys], layers[keys], records[keys]
    target, pinned = residency.claim_for_reads(pool, row, layer, record)
    seeds, expected = record_seeds(table.uid[row], layer, record), table.checksums[row, layer, record]
    items = Items(slots.record_bytes, handles, offset[first], keys, seeds, expected)
    return Misses(items, segments, target, record, pinned, missing[~first], item_of[~first], lost)


def bring(disk: Disk, residency: Residency, pool: Pool, misses: Misses, destination: U8) -> tuple[Bools, Bools]:
    """Reads all items into the destination and the arena. Returns which are bad, and which the arena may keep."""
    items, size, memory = misses.items, pool.slots.record_bytes, residency.memory
    bad = read(disk, items, destination)
    # The destination is a client's memory and may change at any time, so what the arena keeps is verified in the
    # arena, after it was copied there. Once is enough: the destination has the same bytes unless its owner wrote.
    kept, at = misses.slots != 0, items.positions * size
    starts = pool.slots.starts(misses.slots[kept], misses.records[kept])
    copy_records(destination.data, at[kept], memory, starts, size)
    bad[kept] |= items.wrong(kept, memory, starts)
    bad[~kept] |= items.wrong(~kept, destination.data, at[~kept])
    keep = kept & ~bad
    read_again(disk, items, bad, destination)
    copy_records(destination.data, at[misses.copies_of], destination.data, misses.copies_to * size, size)
    return bad, keep


def end(residency: Residency, log: SegmentLog, pool: Pool, misses: Misses, keep: Bools | None) -> None:
    """Unpins. keep: as `bring` returned it; None: it did not return."""
    residency.end_reads(pool, misses.slots, misses.records, keep, misses.pinned_slots)
    log.unpin(misses.segments)
