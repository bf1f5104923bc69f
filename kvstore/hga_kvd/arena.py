"""The RAM arena: one preallocated region in pages of 2 MiB, cut into slots of one extent each. No I/O, no policy.

- A slot class (one per record size and extent size) owns whole pages. Slot s of a class always lies at the same
  address: page (s - 1) // slots_per_page. Slot 0 is nobody's and never holds a valid record: "no slot" needs no branch.
- A slot starts on a 4096-byte boundary and takes a multiple of that, so it can be written to disk as it lies.
- Records are copied as rows of the region seen as [bytes / unit, unit]; the unit is the largest power of two that
  divides a record, so one np.take gathers any set of records.
- Per record: EMPTY, FILLING (one call is bringing it in and is the only one to write there), VALID (never changes
  again until the slot is freed) or BAD (its bytes went wrong while only RAM had them: never served, never filled). Per
  slot: pins (calls that use it outside the lock), dirty (only RAM has it).
- A slot that is freed while pinned is doomed: it goes back to the free list at the last unpin.

The engine's lock guards everything here except the copies, which touch only slots pinned by the copying call.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import numpy.typing as npt

U8 = npt.NDArray[np.uint8]
I64 = npt.NDArray[np.int64]
Number = TypeVar("Number", int, I64)

PAGE_BYTES = 2 << 20
BLOCK_BYTES = 4096

EMPTY, FILLING, VALID, BAD = 0, 1, 2, 3

# Slots of all classes together, by page: 16 classes of the smallest extents, or 512 of those of real models. A class keeps
# books for every slot that it might have: 8 bytes at once, and 80 for those that it gets. That is at most 3 % of the arena.
BOOKED_SLOTS_MAX = 16 * PAGE_BYTES // BLOCK_BYTES


def unit_bytes(record_bytes: int) -> int:
    """Largest power of two that divides a record, at most a page: 8192 -> 8192, 5120 -> 1024."""
    return min(record_bytes & -record_bytes, PAGE_BYTES)


def rows_of(first_rows: I64, rows_each: int) -> I64:
    """first_rows[i] .. first_rows[i] + rows_each for all i, in one array."""
    if rows_each == 1:
        return first_rows
    rows: I64 = (first_rows[:, None] + np.arange(rows_each)).reshape(-1)
    return rows


def copy_rows(source: U8, first_rows: I64, rows_each: int, destination: U8) -> None:
    """Gathers runs of rows of `source` [rows, unit] into `destination` [len(first_rows) * rows_each, unit]."""
    # mode="clip" because "raise" makes numpy gather into a temporary first: 4 times slower. And not to where numpy puts a
    # large array, 16 bytes behind the beginning of a page: `rep movsb` into there took 11 us for 8 KiB on a Zen, not 0.3.
    source.take(rows_of(first_rows, rows_each), axis=0, out=destination, mode="clip")


class SlotClass:
    """Slots for extents of `records` records of `record_bytes` bytes."""

    def __init__(self, region: U8, record_bytes: int, records: int) -> None:
        self.record_bytes = record_bytes
        self.records = records
        self.extent_bytes = records * record_bytes
        self.stride = -(-self.extent_bytes // BLOCK_BYTES) * BLOCK_BYTES
        self.unit = unit_bytes(record_bytes)
        self.units_per_record = record_bytes // self.unit
        self.units = region.reshape(-1, self.unit)
        self.slots_per_page = PAGE_BYTES // self.stride
        pages = len(region) // PAGE_BYTES
        self.slot_count = 1 + pages * self.slots_per_page
        self.page_rest = PAGE_BYTES - self.slots_per_page * self.stride  # bytes of a page behind its last slot
        # Large arrays of zeros cost memory only where they are written.
        self.state: U8 = np.zeros((self.slot_count, records), np.uint8)
        self.pins = np.zeros(self.slot_count, np.int32)
        self.held = np.zeros(self.slot_count, bool)
        self.dirty = np.zeros(self.slot_count, bool)
        self.doomed = np.zeros(self.slot_count, bool)
        # Whose extent it is: (table, row, layer); the engine's to write and read.
        self.holder: I64 = np.zeros((self.slot_count, 3), np.int64)
        self.held_count = 0
        self.page_count = 0
        self._doomed_count = 0
        self._free: list[int] = []  # last one first

    @property
    def free_count(self) -> int:
        return len(self._free)

    def add_page(self, page: int) -> None:
        self.page_count += 1
        first = 1 + page * self.slots_per_page
        # Reversed, so that slots are given out in ascending order and neighbours are written in one piece.
        self._free.extend(range(first + self.slots_per_page - 1, first - 1, -1))

    def remove_page(self, page: int) -> None:
        """The page's slots are all free."""
        slots = self.slots_of(page)
        assert not self.held[slots].any()
        self.page_count -= 1
        first, last = int(slots[0]), int(slots[-1])
        self._free = [slot for slot in self._free if not first <= slot <= last]

    def slots_of(self, page: int) -> I64:
        return np.arange(self.slots_per_page) + (1 + page * self.slots_per_page)

    def take(self, count: int) -> I64:
        """`count` free slots, held from now on and all EMPTY."""
        assert count <= len(self._free)
        cut = len(self._free) - count
        slots = np.array(self._free[cut:][::-1], np.int64)
        del self._free[cut:]
        self.held[slots] = True
        self.held_count += count
        return slots

    def free(self, slots: I64) -> None:
        """Gives held slots back; pinned ones when their last pin goes."""
        self.state[slots] = EMPTY
        self.dirty[slots] = False
        busy = self.pins[slots] != 0
        doomed = slots[busy]
        self.doomed[doomed] = True
        self._doomed_count += len(doomed)
        self._release(slots[~busy])

    def emptied(self, slots: I64) -> None:
        """These, of which none is held any more, are free."""
        self.held_count -= len(slots)
        self._free.extend(slots[::-1].tolist())

    def _release(self, slots: I64) -> None:
        assert self.held[slots].all()
        self.held[slots] = False
        self.emptied(slots)

    def pin(self, slots: I64) -> None:
        """A slot named twice in one call is pinned once; unpin with the same array."""
        self.pins[slots] += 1

    def unpin(self, slots: I64) -> None:
        self.pins[slots] -= 1
        self.free_doomed(slots)

    def free_doomed(self, slots: I64) -> None:
        """Frees those of these slots that were freed while pinned and are not any more."""
        if self._doomed_count:
            gone = np.unique(slots[self.doomed[slots] & (self.pins[slots] == 0)])
            self.doomed[gone] = False
            self._doomed_count -= len(gone)
            self.state[gone] = EMPTY
            self._release(gone)

    def set_valid(self, slots: I64, records: I64, good: npt.NDArray[np.bool_]) -> None:
        """Ends FILLING of these records: VALID where good, else EMPTY. Doomed slots stay as they are."""
        alive = ~self.doomed[slots]
        self.state[slots[alive], records[alive]] = np.where(good[alive], VALID, EMPTY)

    # --- copies, outside the lock, on pinned slots ---

    def gather(self, slots: I64, records: I64, destination: U8) -> None:
        """Records to `destination`, 1-D, len(slots) * record_bytes. Where a slot is 0, it stays as it is."""
        if not slots.all():
            some = np.flatnonzero(slots)
            starts, at = self.starts(slots[some], records[some]), some * self.record_bytes
            copy_records(self.units.reshape(-1).data, starts, destination.data, at, self.record_bytes)
        else:
            first = self.offsets(slots) // self.unit + records * self.units_per_record
            copy_rows(self.units, first, self.units_per_record, destination.reshape(-1, self.unit))

    def starts(self, slots: I64, records: I64) -> I64:
        """Where these records lie in the region, bytes."""
        return self.offsets(slots) + records * self.record_bytes

    def offsets(self, slots: Number) -> Number:
        """Where these slots begin in the region, bytes; below 0 for slot 0. Reckoned: an array of them would be one more
        line of the cache that every record of a large session misses (8 of 1 M tokens: 26 us instead of 31)."""
        offsets = (slots - 1) * self.stride
        return offsets + (slots - 1) // self.slots_per_page * self.page_rest if self.page_rest else offsets

    def put_extents(self, slots: I64, source: U8) -> None:
        """`source`: [len(slots), extent_bytes]. What a slot has behind its extent becomes zeros."""
        region = self.units.reshape(-1)
        for at, extent in zip(self.offsets(slots).tolist(), source, strict=True):
            region[at : at + self.extent_bytes] = extent
            region[at + self.extent_bytes : at + self.stride] = 0


def copy_records(source: memoryview, starts: I64, destination: memoryview, at: I64, record_bytes: int) -> None:
    """Record by record; for the few cases in which rows cannot be gathered in one go."""
    for a, b in zip(starts.tolist(), at.tolist(), strict=True):
        destination[b : b + record_bytes] = source[a : a + record_bytes]


class Arena:
    """Pages and who owns them."""

    def __init__(self, region: U8) -> None:
        assert region.ndim == 1
        assert len(region) % PAGE_BYTES == 0
        self.region = region
        self.page_count = len(region) // PAGE_BYTES
        self._owners: list[SlotClass | None] = [None] * self.page_count
        self._free_pages = list(range(self.page_count - 1, -1, -1))
        self._classes: dict[tuple[int, int], SlotClass] = {}

    def slot_class(self, record_bytes: int, records: int) -> SlotClass:
        key = (record_bytes, records)
        if key not in self._classes:
            self._classes[key] = SlotClass(self.region, record_bytes, records)
        return self._classes[key]

    def grow(self, slots: SlotClass, count: int) -> None:
        """Gives the class free pages until it has `count` free slots or pages run out."""
        while slots.free_count < count and self._free_pages:
            page = self._free_pages.pop()
            self._owners[page] = slots
            slots.add_page(page)

    def give_back(self, page: int) -> None:
        """A page whose slots are all free may serve another class."""
        owner = self._owners[page]
        assert owner is not None
        owner.remove_page(page)
        self._owners[page] = None
        self._free_pages.append(page)

    def reclaimable(self, wanted_by: SlotClass, count: int) -> list[tuple[int, SlotClass]]:
        """Up to `count` pages of other classes with nothing dirty or pinned in them, emptiest first."""
        if len(self._classes) == 1:
            return []
        found: list[tuple[int, int, SlotClass]] = []
        for page, owner in enumerate(self._owners):
            if owner is None or owner is wanted_by:
                continue
            slots = owner.slots_of(page)
            if not (owner.dirty[slots] | (owner.pins[slots] != 0)).any():
                found.append((int(owner.held[slots].sum()) * owner.stride, page, owner))
        found.sort(key=lambda entry: entry[:2])
        return [(page, owner) for _, page, owner in found[:count]]

    def is_small(self, slots: SlotClass) -> bool:
        """Whether another class has more than twice the pages: then this one grows rather than evict its own."""
        return any(2 * slots.page_count < other.page_count for other in self._classes.values())

    def slots_max(self, slots: SlotClass) -> int:
        """Slots of this class if it had every page."""
        return self.page_count * slots.slots_per_page

    def may_cut(self, record_bytes: int, records: int) -> bool:
        """Whether there is such a class, or its books would not take too much memory."""
        booked = sum(slots.slots_per_page for slots in self._classes.values())
        known = (record_bytes, records) in self._classes
        return known or booked + PAGE_BYTES // max(BLOCK_BYTES, record_bytes * records) <= BOOKED_SLOTS_MAX

    @property
    def used_bytes(self) -> int:
        return sum(c.held_count * c.stride for c in self._classes.values())

    @property
    def dirty_bytes(self) -> int:
        return sum(int(np.count_nonzero(c.dirty)) * c.stride for c in self._classes.values())
