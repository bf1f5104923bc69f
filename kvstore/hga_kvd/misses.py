"""The part of a fetch that goes to disk: which records, in which order, and how they come into the arena and out of it.

Records are read into their slots, verified there, and copied to the caller from there: the arena is memory of our own,
which no client can write to, and physically contiguous, which disks read into fastest. Records that get no slot go
straight to their place in the destination. Bytes leave a slot, and become VALID there, only after they passed their
checksum.

`plan` and `end` run under the residency's lock, `bring` between them under none: everything that the plan names (slots,
segments) is pinned in the meantime.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from hga_kvd import hits, native
from hga_kvd.arena import BAD, FILLING, VALID, copy_records
from hga_kvd.checksum import mix, place_codes
from hga_kvd.disk import Disk
from hga_kvd.index import LOST_ROW, NO_SEGMENT
from hga_kvd.native import CHECKSUM_BYTES_MIN, Batch, Found, Plan
from hga_kvd.reads import Items, brought, read_again
from hga_kvd.residency import Pool, Residency
from hga_kvd.segments import Segment, SegmentLog, handles_of

U8 = npt.NDArray[np.uint8]
I64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

# What a fetch with a deadline reads between two looks at the clock: 0.2 ms of a disk of 1.3 GB/s.
DEADLINE_PART_BYTES = 256 << 10


@dataclass(frozen=True, eq=False)
class Misses:
    """Record i of the plan goes to its slot or, where that is 0, to its place in the destination."""

    plan: Plan
    record_bytes: int
    handles: I64  # of plan.segment_ids
    segments: tuple[Segment, ...]  # pinned
    fresh: I64  # slots that held nothing, pinned

    def items(self, part: slice) -> Items:
        p = self.plan
        columns = self.handles[p.segments[part]], p.offsets[part], p.keys[part], p.seeds[part], p.expected[part]
        return Items(self.record_bytes, *columns)


class Brought(NamedTuple):
    """Which records of a plan are bad, and which late (None: none), and which may not stay in their slots."""

    bad: Bools | None
    late: Bools | None
    unkept: Bools


def plan(
    residency: Residency, log: SegmentLog | None, pool: Pool, found: Found, missing_count: int, once: bool
) -> Misses:
    """Of what RAM does not have, so many keys. log: None without a disk. once: it gets no slots."""
    made = _plan(pool, found) if pool.view is None else native.plan(pool.view, found, missing_count)
    if made.lost_count:  # recovery could not find the chunk, or only RAM has it and there the record went BAD
        lost = found[made.lost]
        assert ((lost["row"] == LOST_ROW) | (lost["state"] == BAD)).all(), "a dirty chunk without its slots"
    fresh = made.without_slots() if once else residency.claim(pool, made)
    segments = log.hold(made.segment_ids.tolist()) if log else ()
    return Misses(made, pool.slots.record_bytes, handles_of(segments), segments, fresh)


def _plan(pool: Pool, found: Found) -> Plan:
    """What native.plan does, in numpy."""
    table, slots, state, made = pool.table, pool.slots, found["state"], Plan(0)
    missing = np.flatnonzero((state != VALID) & (state != FILLING))
    nowhere = table.segment[found["row"][missing]] == NO_SEGMENT
    made.awaited, made.lost, missing = np.flatnonzero(state == FILLING), missing[nowhere], missing[~nowhere]
    layers = pool.geometry.layers
    place = (found["row"][missing] * layers + found["layer"][missing]) * slots.records + found["record"][missing]
    made.keys, made.copies_to, made.copies_of = _in_turn(missing, place)
    asked = found[made.keys]
    row, layer, made.records, made.slots = asked["row"], asked["layer"], asked["record"], asked["slot"].copy()
    absent, extent = np.unique(np.where(made.slots, -1, row * layers + layer), return_inverse=True)
    first = int(len(absent) > 0 and absent[0] < 0)  # of those that have a slot
    made.extents = extent - first
    made.absent_rows, made.absent_layers = np.divmod(absent[first:], layers)
    made.segment_ids, made.segments = np.unique(table.segment[row], return_inverse=True)
    made.offsets = table.offset[row] + layer * slots.stride + made.records * slots.record_bytes
    made.seeds = mix(table.uid[row] ^ place_codes(layers, slots.records)[layer, made.records])
    made.expected = table.checksums[row, layer, made.records]
    made.starts, made.count, made.copied_count = np.full(len(row), -1), len(row), len(made.copies_to)
    made.awaited_count, made.lost_count, made.absent_count = (
        len(made.awaited),
        len(nowhere[nowhere]),
        len(made.absent_rows),
    )
    return made


def _in_turn(keys: I64, place: I64) -> tuple[I64, I64, I64]:
    """(one key of each place, in the order in which to read; the other keys, and which of the first each is like).

    Neighbours (place + 1) are read together; otherwise the order is that of the keys.
    """
    order = np.argsort(place, kind="stable")
    place = place[order]
    first, run = np.ones(len(place), bool), np.ones(len(place), bool)
    first[1:] = place[1:] != place[:-1]
    copies_to, copies_of = keys[order[~first]], (np.cumsum(first) - 1)[~first]
    keys, place = keys[order[first]], place[first]
    run = run[: len(place)]
    run[1:] = place[1:] - place[:-1] != 1
    lowest = np.minimum.reduceat(keys, np.flatnonzero(run))[np.cumsum(run) - 1] if len(keys) else keys
    turn = np.argsort(lowest, kind="stable")
    return keys[turn], copies_to, np.argsort(turn)[copies_of]


def bring(
    disk: Disk | None,
    residency: Residency,
    pool: Pool,
    found: Found,
    misses: Misses,
    destination: U8,
    overdue: Callable[[], bool] | None,
) -> Brought:
    """Reads all records, and copies everything that the fetch asked for to the destination, what RAM has while the device
    reads the rest.

    With a deadline, parts are small, one after another, and none begins once `overdue` says so; what has begun is
    finished: a read that went on behind the answer would write into memory that has another use by then.
    """
    count, size, late = misses.plan.count, pool.slots.record_bytes, None
    if count and overdue is None:
        assert disk is not None
        bad = _bring(disk, residency, pool, found, misses, slice(0, count), destination)
    else:
        bad, step = np.zeros(count, bool), max(1, DEADLINE_PART_BYTES // size)
        for begin in range(0, count, step):
            assert disk is not None
            assert overdue is not None
            if overdue():
                late = np.arange(count) >= begin
                break
            part = slice(begin, min(begin + step, count))
            bad[part] = _bring(disk, residency, pool, found, misses, part, destination)
            found = found[:0]
        if len(found):
            hits.copy(pool, found, destination)
    unkept, some_bad = bad if late is None else bad | late, bool(bad.any())
    if some_bad:
        assert disk is not None
        unkept = unkept.copy()
        read_again(disk, misses.items(slice(0, count)), bad, destination)
    if misses.plan.copied_count:
        at, to = misses.plan.keys[misses.plan.copies_of], misses.plan.copies_to
        copy_records(destination.data, at * size, destination.data, to * size, size)
    return Brought(bad if some_bad and bad.any() else None, late, unkept)


def _bring(
    disk: Disk, residency: Residency, pool: Pool, found: Found, misses: Misses, part: slice, destination: U8
) -> Bools:
    """Reads, verifies and copies these records, and copies what RAM has; which of them are wrong."""
    region, batch = residency.arena.region, None
    if pool.view is not None and misses.record_bytes >= CHECKSUM_BYTES_MIN:
        batch = Batch.of(pool.view, misses.plan, part, destination)
        if disk.bring(misses.handles, batch, pool.view, found):
            return batch.wrong_items
    items, starts = misses.items(part), misses.plan.starts[part]
    wrong = np.ones(len(items), bool)
    # Closed before anything is unpinned, whatever happens: the disk may still write to the slots.
    with contextlib.closing(brought(disk, items, region, destination, starts)) as parts:
        for few, failed in parts:
            if len(found):
                hits.copy(pool, found, destination)
                found = found[:0]
            if batch is not None:
                native.take(batch, failed, few.start)
                wrong[few] = batch.wrong_items[few]
            else:
                wrong[few] = _take(items.part(few), failed, region, destination, starts[few])
    return wrong


def _take(items: Items, failed: Bools, region: U8, destination: U8, starts: I64) -> Bools:
    """Verifies what was read, and copies what is right to its place in the destination. Returns which items are wrong."""
    wrong, places, kept = failed.copy(), items.positions * items.item_bytes, starts >= 0
    for memory, at, mine in ((region, starts, kept), (destination, places, ~kept)):
        wrong[mine] |= items.part(mine).wrong(memory.data, at[mine])
    good = kept & ~wrong
    copy_records(region.data, starts[good], destination.data, places[good], items.item_bytes)
    return wrong


def end(residency: Residency, log: SegmentLog | None, pool: Pool, misses: Misses, brought: Brought | None) -> None:
    """Unpins. brought: what `bring` returned; None: it did not."""
    residency.end_reads(pool, misses.plan, brought.unkept if brought else None, misses.fresh)
    if log:
        log.unpin(misses.segments)
