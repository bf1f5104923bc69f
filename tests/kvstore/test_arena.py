"""Arena: slots are given out once, stay while pinned, and hold what was put there, for any record size."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hga_kvd.arena import EMPTY, PAGE_BYTES, VALID, Arena, SlotClass, copy_records, unit_bytes
from hga_kvd.memory import aligned_buffer
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule


def test_unit() -> None:
    assert [unit_bytes(n) for n in (8192, 5120, 6144, 80, 3, 4 << 20)] == [8192, 1024, 2048, 16, 1, 2 << 20]


@pytest.mark.usefixtures("either_way")
@given(st.integers(1, 9000), st.integers(1, 20), st.integers(0, 1 << 30))
def test_records_come_back(record_bytes: int, records: int, seed: int) -> None:
    arena = Arena(aligned_buffer(2 * PAGE_BYTES, huge=True))
    slots = arena.slot_class(record_bytes, records)
    arena.grow(slots, 10)
    chance = np.random.default_rng(seed)
    taken = slots.take(7)
    extents = chance.integers(0, 256, (7, slots.extent_bytes), dtype=np.uint8)
    slots.put_extents(taken, extents)
    which, record = chance.integers(0, 7, 40), chance.integers(0, records, 40)
    found = np.zeros(40 * record_bytes, np.uint8)
    slots.gather(taken[which], record, found)
    expected = extents.reshape(7, records, record_bytes)[which, record]
    assert (found.reshape(40, -1) == expected).all()
    again = np.zeros(40 * record_bytes, np.uint8)
    starts = slots.starts(taken[which], record)
    copy_records(arena.region.data, starts, again.data, np.arange(40) * record_bytes, record_bytes)
    assert (again == found).all()
    # What is written to disk with the extent holds nothing of others.
    for at in slots.offsets(taken).tolist():
        assert not arena.region[at + slots.extent_bytes : at + slots.stride].any()


def test_slots_do_not_overlap() -> None:
    arena = Arena(aligned_buffer(8 * PAGE_BYTES, huge=True))
    spans = []
    for record_bytes, records in ((5120, 12), (8192, 16), (80, 2)):
        slots = arena.slot_class(record_bytes, records)
        arena.grow(slots, slots.slots_per_page + 1)
        taken = slots.take(slots.slots_per_page + 1)
        assert 0 not in taken
        assert not (slots.offsets(taken) % 4096).any()
        spans += [(at, at + slots.stride) for at in slots.offsets(taken).tolist()]
    spans.sort()
    assert all(a[1] <= b[0] for a, b in pairwise(spans))
    assert spans[-1][1] <= len(arena.region)


def test_a_pinned_slot_is_freed_at_its_last_unpin() -> None:
    arena = Arena(aligned_buffer(PAGE_BYTES, huge=True))
    slots = arena.slot_class(4096, 16)
    arena.grow(slots, 4)
    taken = slots.take(4)
    slots.state[taken] = VALID
    twice = np.array([taken[0], taken[0], taken[1]])
    slots.pin(twice)
    slots.pin(taken[:1])
    slots.free(taken)
    free = slots.free_count
    slots.unpin(twice)
    assert slots.free_count == free + 1
    assert (slots.state[taken[1]] == EMPTY).all()
    slots.set_valid(taken[:1], np.array([3]), np.array([True]))  # a read that ends after the session was deleted
    slots.unpin(taken[:1])
    assert slots.free_count == free + 2
    assert not slots.state.any()
    assert arena.used_bytes == 0


def test_pages_move_between_classes() -> None:
    arena = Arena(aligned_buffer(4 * PAGE_BYTES, huge=True))
    small, large = arena.slot_class(4096, 2), arena.slot_class(65536, 16)
    arena.grow(small, 10**9)
    held = small.take(small.slots_per_page + 1)  # one page whole, one slot of the next
    small.dirty[held[:1]] = True
    arena.grow(large, 1)
    assert large.free_count == 0
    assert arena.is_small(large)
    pages = arena.reclaimable(large, 10)
    assert len(pages) == 3  # not the page with the dirty slot
    assert pages[-1][0] == (held[-1] - 1) // small.slots_per_page  # the one that holds something comes last
    arena.give_back(pages[0][0])
    arena.grow(large, 1)
    assert large.free_count == large.slots_per_page
    assert arena.slots_max(large) == 4 * large.slots_per_page


class SlotsMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.slots = SlotClass(aligned_buffer(2 * PAGE_BYTES, huge=True), 32768, 8)
        self.slots.add_page(0)
        self.slots.add_page(1)
        self.total = self.slots.free_count
        self.held: set[int] = set()
        self.doomed: set[int] = set()
        self.pins: list[np.ndarray] = []

    @precondition(lambda self: self.slots.free_count)
    @rule(data=st.data())
    def take(self, data: st.DataObject) -> None:
        taken = set(self.slots.take(data.draw(st.integers(1, self.slots.free_count))).tolist())
        assert not taken & (self.held | self.doomed)
        self.held |= taken

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        gone = data.draw(st.sets(st.sampled_from(sorted(self.held)), min_size=1))
        self.slots.free(np.array(sorted(gone)))
        self.held -= gone
        self.doomed |= {slot for slot in gone if any(slot in pin for pin in self.pins)}

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        slots = np.array(data.draw(st.lists(st.sampled_from(sorted(self.held)), min_size=1)))
        self.slots.pin(slots)
        self.pins.append(slots)

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        slots = self.pins.pop(data.draw(st.integers(0, len(self.pins) - 1)))
        self.slots.unpin(slots)
        self.doomed = {slot for slot in self.doomed if any(slot in pin for pin in self.pins)}

    @invariant()
    def nothing_is_lost(self) -> None:
        assert self.slots.held_count == len(self.held) + len(self.doomed)
        assert self.slots.free_count + self.slots.held_count == self.total


TestSlots = SlotsMachine.TestCase


@pytest.mark.parametrize("bad", [PAGE_BYTES - 4096, PAGE_BYTES + 1])
def test_the_region_is_whole_pages(bad: int) -> None:
    with pytest.raises(AssertionError):
        Arena(np.zeros(bad, np.uint8))
