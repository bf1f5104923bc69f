"""LRFU against a slow reference that adds up every use, and what makes it worth having."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hga_kvd.eviction import HALF_LIFE_SLOTS, WINDOW_SLOTS, Lrfu
from hypothesis import given
from hypothesis import strategies as st


class Reference:
    """Every use with its time; worth is the sum of what each still counts. Nothing is ever forgotten."""

    def __init__(self, slot_count: int) -> None:
        self.half_life = HALF_LIFE_SLOTS * slot_count
        self.now = 0
        self.uses: dict[int, list[int]] = {}

    def ask(self, key: int, count: int = 1) -> None:
        self.now += count
        self.uses.setdefault(key, []).append(self.now)

    def worth(self, key: int) -> float:
        return math.fsum(2 ** ((use - self.now) / self.half_life) for use in self.uses[key])


def none_pinned(slot_count: int) -> np.ndarray:
    return np.zeros(slot_count, np.int32)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=400), st.integers(1, 12))
def test_the_victim_is_the_one_of_least_worth(requests: list[int], capacity: int) -> None:
    policy, reference = Lrfu(capacity), Reference(capacity)
    slot_of: dict[int, int] = {}
    free = list(range(capacity))
    for key in requests:
        if key in slot_of:
            policy.touch(np.array([slot_of[key], slot_of[key]]))  # one use, but time goes on by two asks
            reference.ask(key, 2)
            continue
        if not free:
            (slot,) = policy.evict(1, none_pinned(capacity))
            (victim,) = (key for key in slot_of if slot_of[key] == slot)
            least = min(map(reference.worth, slot_of))
            assert reference.worth(victim) == pytest.approx(least, rel=1e-9)
            free.append(slot_of.pop(victim))
        if key in reference.uses and math.isinf(policy.past.worth(np.array([key]))[0]):
            del reference.uses[key]  # its place in the table was taken: it is new again
        slot_of[key] = free.pop()
        policy.admit([slot_of[key]], [key])
        reference.ask(key)
    assert len(policy) == len(slot_of)


def test_the_worked_example() -> None:
    """Used at 0 and 100, or once at 150, with a half-life of 100: the second one goes first; used at 170 it stays."""
    for single_use, victim in ((1.5, 1), (1.7, 0)):
        policy = Lrfu(2)
        policy.tick = 0.0  # time is set by hand
        policy.admit([0], [10])
        policy.clock[:] = 1.0
        policy.touch(np.array([0]))
        policy.clock[:] = single_use
        policy.admit([1], [11])
        assert policy.evict(1, none_pinned(2)) == [victim]


def test_a_scan_does_not_empty_the_arena() -> None:
    policy = Lrfu(1000)
    hot = np.arange(500)
    policy.admit(range(500), range(500))
    policy.touch(hot)
    gone: set[int] = set()
    free = list(range(500, 1000))
    for key in range(10_000, 12_000):  # each asked for once
        if not free:
            free = policy.evict(1, none_pinned(1000))
            gone |= set(free)
        policy.admit([free.pop()], [key])
    assert not gone & set(hot.tolist())


def test_what_is_asked_for_more_often_stays_in_a_loop_larger_than_the_arena() -> None:
    """100 keys every turn, 400 others every fourth turn, 150 slots: a queue forgets each key before it comes back."""
    capacity, turns = 150, 40
    policy = Lrfu(capacity)
    slot_of: dict[int, int] = {}
    free = list(range(capacity))
    hits = 0
    for turn in range(turns):
        for key in [*range(100), *range(100 + turn % 4 * 100, 200 + turn % 4 * 100)]:
            if key in slot_of:
                policy.touch(np.array([slot_of[key]]))
                hits += 2 * turn >= turns
                continue
            if not free:
                free = policy.evict(1, none_pinned(capacity))
                slot_of = {key: slot for key, slot in slot_of.items() if slot not in free}
            slot_of[key] = free.pop()
            policy.admit([slot_of[key]], [key])
    assert hits > 0.9 * turns / 2 * 100


def test_what_comes_back_is_known() -> None:
    policy = Lrfu(4)
    policy.admit([0, 1], [10, 11])
    policy.touch(np.array([0]))
    assert policy.evict(2, none_pinned(4)) == [1, 0]
    policy.admit([0, 1], [12, 10])  # 10 has two uses behind it
    assert policy.evict(1, none_pinned(4)) == [0]


def test_pinned_slots_stay() -> None:
    policy = Lrfu(10)
    policy.admit(range(10), range(10))
    pinned = none_pinned(10)
    pinned[:9] = 1
    assert policy.evict(5, pinned) == [9]
    pinned[:] = 0
    assert sorted(policy.evict(20, pinned)) == list(range(9))
    assert policy.evict(1, pinned) == []
    assert len(policy) == 0


def test_forgotten_slots_are_not_victims() -> None:
    policy = Lrfu(4)
    policy.admit([0, 1, 2], [10, 11, 12])
    policy.forget([1, 3])
    assert sorted(policy.evict(4, none_pinned(4))) == [0, 2]


def test_a_slot_that_was_used_forgotten_or_pinned_since_is_spared() -> None:
    policy = Lrfu(320)
    policy.admit(range(320), range(320))
    first = policy.evict(1, none_pinned(320))[0]
    used, pinned_slot, forgotten = [slot for slot in range(4) if slot != first][:3]
    policy.touch(np.array([used]))
    policy.touch(np.array([used]))
    pinned = none_pinned(320)
    pinned[pinned_slot] = 1
    policy.forget([forgotten])
    victims = policy.evict(317, pinned)
    assert not {first, pinned_slot, forgotten} & set(victims)
    assert victims[-1] == used  # the only one with two uses
    assert len(policy) == 1


def test_every_window_of_a_large_arena_is_searched() -> None:
    slot_count = 2 * WINDOW_SLOTS + 10
    policy = Lrfu(slot_count)
    policy.admit([5, slot_count - 1], [1, 2])
    assert sorted(policy.evict(3, none_pinned(slot_count))) == [5, slot_count - 1]
    assert policy.evict(1, none_pinned(slot_count)) == []
