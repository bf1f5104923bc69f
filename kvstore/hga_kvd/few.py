"""The part of a small fetch that goes to disk, the way of a decode step: `misses.py` for a few records.

For so few, integers of Python are faster than arrays of numpy, whose calls cost the same for one record as for a hundred.
What is done, and in which order, is the same, for the plain case only. Everything else is declined before anything was
changed, or given back, and the general way decides: records that are nowhere or named twice, an arena without room, odd
geometries, and what fails its checksum.

`claim` and `end` run under the residency's lock, `bring` between them under none.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter

from hga_kvd.arena import EMPTY, FILLING, VALID
from hga_kvd.checksum import checksum, record_seed
from hga_kvd.disk import Disk, Read
from hga_kvd.hits import Found
from hga_kvd.index import NO_SEGMENT
from hga_kvd.residency import Pool, Residency
from hga_kvd.segments import Segment, SegmentLog


@dataclass(slots=True, eq=False)
class _Miss:
    layer: int
    record: int
    slot: int
    start: int  # where it goes in the arena, bytes
    handle: int
    offset: int
    seed: int
    expected: int


@dataclass(slots=True, eq=False)
class Few:
    misses: list[_Miss]
    pinned: list[int]  # slots, of hits too
    segments: list[Segment]  # pinned, once for each miss
    good: list[bool]  # of the misses, once they were read


def claim(residency: Residency, disk: Disk | None, log: SegmentLog | None, pool: Pool, found: Found) -> Few | None:
    """Slots and segments for what is missing, pinned until `end`; its starts are known then. None: nothing was done."""
    slots, table, size, missing = pool.slots, pool.table, pool.slots.record_bytes, found.missing
    segment_of, uid_of = table.segment.data, table.uid.data
    if disk is None or log is None or size % disk.alignment or len({m[1:4] for m in missing}) < len(missing):
        return None
    if any(segment_of[row] == NO_SEGMENT for _, row, _, _, _ in missing):
        return None
    present = [slot for *_, slot in missing if slot]
    absent = {(row, layer) for _, row, layer, _, slot in missing if not slot}
    few = Few([], list({*found.used, *present}), [], [])
    slots.pin_few(few.pinned)  # before room is made, so that it is not made of them
    if absent and residency.make_room(pool, len(absent)) < len(absent):
        slots.unpin_few(few.pinned)
        return None
    fresh = residency.hold_few(pool, absent)
    slots.pin_few(fresh.values())
    few.pinned += fresh.values()
    pool.policy.touch_few(found.used + present)
    state, disk_offset = slots.state.data, table.offset.data
    checksum_of = table.checksums.data
    for key, row, layer, record, held in missing:
        slot = held or fresh[row, layer]
        found.starts[key] = start = slots.offsets(slot) + record * size
        state[slot, record] = FILLING
        segment = log.segments[segment_of[row]]
        segment.pins += 1
        few.segments.append(segment)
        offset = disk_offset[row] + layer * slots.stride + record * size
        seed = record_seed(uid_of[row], layer, record)
        few.misses.append(
            _Miss(layer, record, slot, start, segment.handle, offset, seed, checksum_of[row, layer, record])
        )
    return few


def bring(disk: Disk, residency: Residency, pool: Pool, few: Few) -> bool:
    """Reads the misses into their slots and verifies them there. False: some are wrong."""
    size, address, memory = pool.slots.record_bytes, residency.address, residency.memory
    reads: list[Read] = []
    after = (-1, 0, 0)
    for m in sorted(few.misses, key=attrgetter("handle", "offset")):
        if (m.handle, m.offset, m.start) == after:
            handle, offset, to, length = reads.pop()
            reads.append((handle, offset, to, length + size))
        else:
            reads.append((m.handle, m.offset, address + m.start, size))
        after = (m.handle, m.offset + size, m.start + size)
    whole = disk.read_few(reads)
    few.good = [whole and checksum(memory[m.start : m.start + size], m.seed) == m.expected for m in few.misses]
    return all(few.good)


def end(residency: Residency, pool: Pool, few: Few) -> None:
    """Unpins what `claim` pinned; what was read and is good may stay."""
    state, doomed = pool.slots.state.data, pool.slots.doomed.data
    for m, good in zip(few.misses, few.good or [False] * len(few.misses), strict=True):
        if not doomed[m.slot]:
            state[m.slot, m.record] = VALID if good else EMPTY
    pool.slots.unpin_few(few.pinned)
    for segment in few.segments:
        segment.pins -= 1
    residency.filled.notify_all()
