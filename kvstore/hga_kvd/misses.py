"""The part of a fetch that goes to disk: which records, in which order, and how they come into the arena and out of it.

Records are read into their slots, verified there, and copied to the caller from there, like those that RAM had: the arena
is memory of our own, which no client can write to, and physically contiguous, which disks read into fastest. Records that
get no slot go straight to their place in the destination.

`plan` and `end` run under the residency's lock, `bring` between them under none: everything that the plan names (slots,
segments) is pinned in the meantime. Bytes leave a slot, and become VALID there, only after they passed their checksum.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hga_kvd.arena import BAD, copy_records
from hga_kvd.checksum import mix, place_codes
from hga_kvd.disk import Disk
from hga_kvd.index import LOST_ROW, NO_SEGMENT
from hga_kvd.memory import address_of
from hga_kvd.reads import Items, can_go_straight, read, read_again, stream
from hga_kvd.residency import Pool, Residency
from hga_kvd.segments import Segment, SegmentLog

U8 = npt.NDArray[np.uint8]
I64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Parts = Generator[tuple[slice, Bools], None, None]  # items, the next few at a time, and something of each

# Reads that are verified and copied at once, while others are under way.
STEP = 16
# Neighbours that are not asked for one after the other are read apart while they are less than one in so many: sorting
# takes 0.15 ms, another read 10 us.
APART_SHARE = 32
# What a fetch with a deadline reads between two looks at the clock: 0.2 ms of a disk of 1.3 GB/s.
DEADLINE_PART_BYTES = 256 << 10


@dataclass(frozen=True, eq=False)
class Misses:
    """Item i goes to record records[i] of slots[i] or, where that is 0, to its place in the destination.

    Keys that ask for what another key asks for (copies_to) share its item (copies_of).
    """

    items: Items
    slots: I64
    records: I64
    segments: tuple[Segment, ...]  # pinned
    pinned: I64  # slots
    fresh: int  # of them were free before
    sources: I64  # of each key of the fetch: the slot that its record comes from, or 0
    copies_to: I64
    copies_of: I64
    lost: I64  # keys of records that are nowhere


def plan(
    residency: Residency,
    log: SegmentLog | None,
    pool: Pool,
    rows: I64,
    layers: I64,
    records: I64,
    sources: I64,
    missing: I64,
) -> Misses:
    """missing: which of the keys (rows[i], layers[i], records[i]) are to be read; their sources are 0. log: None without
    a disk.
    """
    table, slots = pool.table, pool.slots
    row = rows[missing]
    lost, nowhere = missing[:0], table.segment[row] == NO_SEGMENT
    if nowhere.any():  # recovery could not find the chunk, or only RAM has it and there the record went BAD
        lost, missing = missing[nowhere], missing[~nowhere]
        states = slots.state[table.slot[rows[lost], layers[lost]], records[lost]]
        assert ((rows[lost] == LOST_ROW) | (states == BAD)).all(), "a dirty chunk without its slots"
        row = rows[missing]
    place = (row * pool.geometry.layers + layers[missing]) * slots.records + records[missing]
    keys, copies_to, copies_of = _in_turn(missing, place)
    row, layer, record = rows[keys], layers[keys], records[keys]
    target, pinned, fresh = residency.claim_for_reads(pool, row, layer, record)
    sources[keys] = target
    sources[copies_to] = target[copies_of]
    segments, handles = log.pin(table.segment[row]) if log else ((), keys)
    offsets = table.offset[row] + layer * slots.stride + record * slots.record_bytes
    seeds = mix(table.uid[row] ^ place_codes(pool.geometry.layers, slots.records)[layer, record])
    items = Items(slots.record_bytes, handles, offsets, keys, seeds, table.checksums[row, layer, record])
    return Misses(items, target, record, segments, pinned, fresh, sources, copies_to, copies_of, lost)


def _in_turn(keys: I64, place: I64) -> tuple[I64, I64, I64]:
    """(one key of each place, in the order in which to read; the other keys, and which of the first each is like).

    Neighbours (place + 1) are read together, and what the first keys ask for first, so that it can be copied to the
    caller while the rest is read.
    """
    order = np.sort(place)
    steps = order[1:] - order[:-1]
    apart = np.count_nonzero(steps == 1) - np.count_nonzero(place[1:] - place[:-1] == 1)
    if apart * APART_SHARE <= len(place) and steps.all():  # as most callers ask
        return keys, keys[:0], keys[:0]
    order = np.argsort(place, kind="stable")
    place = place[order]
    first = np.ones(len(place), bool)
    first[1:] = place[1:] != place[:-1]
    copies_to, copies_of = keys[order[~first]], (np.cumsum(first) - 1)[~first]
    keys, place = keys[order[first]], place[first]
    run = np.ones(len(place), bool)
    run[1:] = place[1:] - place[:-1] != 1
    turn = np.argsort(np.minimum.reduceat(keys, np.flatnonzero(run))[np.cumsum(run) - 1], kind="stable")
    return keys[turn], copies_to, np.argsort(turn)[copies_of]


def bring(
    disk: Disk | None,
    residency: Residency,
    pool: Pool,
    misses: Misses,
    records: I64,
    destination: U8,
    overdue: Callable[[], bool] | None,
) -> tuple[Bools, Bools, Bools]:
    """Reads all items, and copies everything that the fetch asked for to the destination. records: of all its keys.
    Returns which items are bad, which the arena may keep, and which are late.

    With a deadline, parts are small, one after another, and none begins once `overdue` says so; what has begun is
    finished: a read that went on behind the answer would write into memory that has another use by then.
    """
    items, sources, size = misses.items, misses.sources, pool.slots.record_bytes
    bad, late = np.zeros(len(items), bool), np.zeros(len(items), bool)
    left: I64 | None = None  # left[i]: the first key that waits for item i or a later one
    copied = 0

    def copy_until(end: int) -> None:
        nonlocal copied
        if end > copied:
            pool.slots.gather(sources[copied:end], records[copied:end], destination[copied * size : end * size])
            copied = end

    step = max(1, len(items) if overdue is None else DEADLINE_PART_BYTES // size)
    for begin in range(0, len(items), step):
        assert disk is not None
        if overdue is not None and overdue():
            late[begin:] = True
            break
        which = slice(begin, begin + step)
        # Closed before anything is unpinned, whatever happens: the disk may still write to the slots.
        with contextlib.closing(_verified(disk, residency, pool, misses, which, destination)) as parts:
            for part, wrong in parts:
                if left is None:  # the device works on the rest: what can wait until then takes no time
                    left = np.append(np.minimum.accumulate(items.positions[::-1])[::-1], len(sources))
                    with residency.lock:
                        residency.make_room_ahead(pool, misses.fresh)
                bad[part] = wrong
                if wrong.any():
                    _leave_out(misses, bad)
                copy_until(int(left[part.stop]))
    _leave_out(misses, late)
    copy_until(len(sources))
    keep = (misses.slots != 0) & ~bad & ~late
    if disk is not None:
        read_again(disk, items, bad, destination)
    # Keys that share an item are copied from its slot; where it has none, from its place in the destination.
    alone = sources[misses.copies_to] == 0
    at, to = items.positions[misses.copies_of[alone]], misses.copies_to[alone]
    copy_records(destination.data, at * size, destination.data, to * size, size)
    return bad, keep, late


def _leave_out(misses: Misses, which: Bools) -> None:
    """These items are not to be copied from their slots."""
    misses.sources[misses.items.positions[which]] = 0
    misses.sources[misses.copies_to[which[misses.copies_of]]] = 0


def _verified(disk: Disk, residency: Residency, pool: Pool, misses: Misses, which: slice, destination: U8) -> Parts:
    """Reads these items to where they belong. Yields the next few, and which of them are wrong, by and by."""
    items, slots, size = misses.items.part(which), misses.slots[which], pool.slots.record_bytes
    kept, region = slots != 0, residency.arena.region
    starts = np.where(kept, pool.slots.starts(slots, misses.records[which]), items.positions * size)
    addresses = np.where(kept, residency.address, address_of(destination)) + starts
    all_kept = kept.all()
    with contextlib.closing(_brought(disk, items, kept, region, destination, starts, addresses)) as parts:
        for part, failed in parts:
            wrong = failed.copy()
            for memory, mine in () if all_kept else ((region, kept[part]), (destination, ~kept[part])):
                wrong[mine] |= items.part(part).part(mine).wrong(memory.data, starts[part][mine])
            if all_kept:
                wrong |= items.part(part).wrong(region.data, starts[part])
            yield slice(which.start + part.start, which.start + part.stop), wrong


def _brought(disk: Disk, items: Items, kept: Bools, region: U8, destination: U8, starts: I64, addresses: I64) -> Parts:
    """The same, unverified: which of the next few the device could not read."""
    if can_go_straight(disk, items, addresses):
        yield from stream(disk, items, addresses, STEP)
        return
    failed = np.zeros(len(items), bool)
    for memory, mine in ((region, kept), (destination, ~kept)):
        failed[mine] = read(disk, items.part(mine), memory, starts[mine])
    yield slice(0, len(items)), failed


def end(residency: Residency, log: SegmentLog | None, pool: Pool, misses: Misses, keep: Bools | None) -> None:
    """Unpins. keep: as `bring` returned it; None: it did not return."""
    residency.end_reads(pool, misses.slots, misses.records, keep, misses.pinned)
    if log:
        log.unpin(misses.segments)
