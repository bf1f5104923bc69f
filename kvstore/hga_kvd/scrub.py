"""Looks at stored bytes before anyone asks for them: records on disk and in the arena against their checksums.

A step looks at a little and returns what it found; the engine paces the steps and says whose the damage is. Reads and
checksums run without the residency's lock, on pinned segments and slots. What changed meanwhile (a chunk that died and
whose place was given back, a slot that was freed) is no damage: it is compared again before anything is said.

A bad copy in the arena of what disk has is dropped, and read again by who needs it. A bad copy of what only RAM has is
BAD from then on: never served, never filled.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from hga_kvd.arena import BAD, EMPTY, VALID
from hga_kvd.checksum import checksums, record_seeds
from hga_kvd.disk import Disk
from hga_kvd.geometry import KEY_DTYPE, Geometry, Keys
from hga_kvd.index import NO_SEGMENT, Session
from hga_kvd.reads import Items, read_verified
from hga_kvd.residency import Pool, Residency
from hga_kvd.segments import SegmentLog

I64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Damage:
    """Records of chunks of one pool: columns of equal length."""

    pool: Pool
    rows: I64
    layers: I64
    records: I64


@dataclass(eq=False)
class Found:
    record_count: int = 0
    bytes: int = 0
    damage: list[Damage] = field(default_factory=list)  # of bytes that nobody else has
    dropped_records: int = 0  # bad copies in the arena of what disk has

    def add(self, other: Found) -> None:
        self.record_count += other.record_count
        self.bytes += other.bytes
        self.damage += other.damage
        self.dropped_records += other.dropped_records


def keys_of(session: Session, damage: Damage) -> Keys:
    """Those of the records that this session has, as keys of a fetch."""
    groups = session.table.geometry.groups_per_chunk
    order = np.argsort(damage.rows, kind="stable")
    rows = damage.rows[order]
    mine = np.flatnonzero(np.isin(session.all_rows(), rows))
    first = np.searchsorted(rows, session.rows[mine], "left")
    count = np.searchsorted(rows, session.rows[mine], "right") - first
    chunk = np.repeat(mine, count)
    which = order[np.repeat(first - (np.cumsum(count) - count), count) + np.arange(len(chunk))]
    keys = np.zeros(len(chunk), KEY_DTYPE)
    keys["kv_head"], group = np.divmod(damage.records[which], groups)
    keys["group"], keys["layer"] = chunk * groups + group, damage.layers[which]
    return keys


def extent_keys(geometry: Geometry, chunks: I64) -> Keys:
    """All records of these chunks."""
    groups = geometry.groups_per_chunk
    keys = np.zeros((len(chunks), geometry.layers, geometry.kv_heads, groups), KEY_DTYPE)
    keys["layer"] = np.arange(geometry.layers)[:, None, None]
    keys["kv_head"] = np.arange(geometry.kv_heads)[:, None]
    keys["group"] = (chunks * groups)[:, None, None, None] + np.arange(groups)
    return keys.reshape(-1)


class Scrubber:
    """disk and log: None without NVMe."""

    def __init__(self, residency: Residency, disk: Disk | None, log: SegmentLog | None) -> None:
        self._residency = residency
        self._lock = residency.lock
        self._disk = disk
        self._log = log
        self._turn = 0  # which pool, and whether its slots or its chunks on disk
        self._next = 1  # slot or row, from which this turn goes on

    def step(self, bytes_max: int) -> Found:
        """About so many bytes more (at least one extent), round and round. Nothing found: a whole turn was empty."""
        with self._lock:
            pools = list(self._residency.pools)
        for _ in range(2 * len(pools)):
            number, on_disk = divmod(self._turn % (2 * len(pools)), 2)
            found = self._go_on(pools[number], bool(on_disk), bytes_max)
            if found.record_count:
                return found
            self._turn += 1
            self._next = 1
        return Found()

    def _go_on(self, pool: Pool, on_disk: bool, bytes_max: int) -> Found:
        unit = pool.table.chunk_stride if on_disk else pool.slots.stride
        count = max(1, bytes_max // unit)
        with self._lock:
            if on_disk:
                here = np.flatnonzero(pool.table.segment[self._next :] != NO_SEGMENT)[:count] + self._next
            else:
                here = np.flatnonzero(pool.slots.held[self._next :])[:count] + self._next
        if not len(here):
            return Found()
        self._next = int(here[-1]) + 1
        return self.check_disk(pool, here) if on_disk else self.check_slots(pool, here)

    def check_chunks(self, pool: Pool, rows: I64) -> Found:
        """These chunks, wherever they are."""
        with self._lock:
            slots = np.unique(pool.table.slot[rows])
            stored = np.unique(rows[pool.table.segment[rows] != NO_SEGMENT])
        found = self.check_slots(pool, slots[slots != 0])
        found.add(self.check_disk(pool, stored))
        return found

    def check_disk(self, pool: Pool, rows: I64) -> Found:
        """All records of these chunks as disk has them."""
        if self._disk is None or self._log is None or not len(rows):
            return Found()
        table, slots, layers = pool.table, pool.slots, pool.geometry.layers
        with self._lock:
            rows = rows[table.segment[rows] != NO_SEGMENT]
            rows = rows[np.lexsort((table.offset[rows], table.segment[rows]))]
            uids, places = table.uid[rows], np.stack((table.segment[rows], table.offset[rows]))
            expected = table.checksums[rows]
            segments, handles = self._log.pin(places[0])
        row, layer, record = (a.ravel() for a in np.indices((len(rows), layers, slots.records)))
        offsets = places[1][row] + layer * slots.stride + record * slots.record_bytes
        seeds = record_seeds(uids[row], layer, record)
        order = np.lexsort((offsets, handles[row]))
        # fmt: off
        items = Items(
            slots.record_bytes, handles[row][order], offsets[order], np.arange(len(order)), seeds[order],
            expected.reshape(-1)[order],
        )
        # fmt: on
        try:
            destination = np.zeros(len(order) * slots.record_bytes, np.uint8)
            bad = np.zeros(len(order), bool)
            bad[order] = read_verified(self._disk, items, destination)
        finally:
            with self._lock:
                self._log.unpin(segments)
        found = Found(len(bad), len(bad) * slots.record_bytes)
        if bad.any():
            with self._lock:
                same = table.uid[rows] == uids
                same &= (np.stack((table.segment[rows], table.offset[rows])) == places).all(0)
            bad &= same[row]
            found.damage.append(Damage(pool, rows[row[bad]], layer[bad], record[bad]))
        return found

    def check_slots(self, pool: Pool, slots: I64) -> Found:
        """The valid records in these slots; they may be of any pool with extents of this size."""
        place, pins = pool.slots, self._residency
        with self._lock:
            slots = slots[place.held[slots]]
            place.pin(slots)
            at, record = np.nonzero(place.state[slots] == VALID)
            slot = slots[at]
            holder = place.holder[slot]
            seeds, expected = np.zeros(len(slot), np.uint64), np.zeros(len(slot), np.uint64)
            for number in np.unique(holder[:, 0]).tolist():
                mine, table = holder[:, 0] == number, pins.pools[number].table
                rows, layers = holder[mine, 1], holder[mine, 2]
                seeds[mine] = record_seeds(table.uid[rows], layers, record[mine])
                expected[mine] = table.checksums[rows, layers, record[mine]]
        try:
            sums = checksums(pins.memory, place.starts(slot, record), place.record_bytes, seeds)
            bad: Bools = sums != expected
        except BaseException:
            with self._lock:
                place.unpin(slots)
            raise
        found = Found(len(slot), len(slot) * place.record_bytes)
        with self._lock:
            bad &= ~place.doomed[slot] & (place.state[slot, record] == VALID)
            dirty = bad & place.dirty[slot]
            place.state[slot[dirty], record[dirty]] = BAD
            clean = bad & ~dirty
            place.state[slot[clean], record[clean]] = EMPTY
            found.dropped_records = int(np.count_nonzero(clean))
            for number in np.unique(holder[dirty, 0]).tolist():
                mine = dirty & (holder[:, 0] == number)
                found.damage.append(Damage(pins.pools[number], holder[mine, 1], holder[mine, 2], record[mine]))
            place.unpin(slots)
        return found
