"""S3-FIFO against a slow reference that follows the paper's pseudocode, and what makes it worth having."""

from __future__ import annotations

import numpy as np
from hga_kvd.eviction import S3Fifo
from hypothesis import given
from hypothesis import strategies as st


class Reference:
    """One slot a key, lists instead of tricks."""

    def __init__(self) -> None:
        self.small: list[int] = []
        self.main: list[int] = []
        self.ghost: list[int] = []
        self.count: dict[int, int] = {}

    def touch(self, keys: set[int]) -> None:
        for key in keys:
            self.count[key] = min(3, self.count[key] + 1)

    def admit(self, key: int) -> None:
        self.count[key] = 0
        if key in self.ghost:
            self.ghost.remove(key)
            self.main.append(key)
        else:
            self.small.append(key)

    def evict(self) -> int | None:
        while self.small or self.main:
            size = len(self.small) + len(self.main)
            if self.small and (len(self.small) > 0.1 * size or not self.main):
                key = self.small.pop(0)
                if self.count[key]:
                    self.count[key] = 0
                    self.main.append(key)
                    continue
                self.ghost.append(key)
                del self.ghost[: max(0, len(self.ghost) - max(1, len(self.small) + len(self.main)))]
                return key
            key = self.main.pop(0)
            if not self.count[key]:
                return key
            self.count[key] -= 1
            self.main.append(key)
        return None


@given(st.lists(st.integers(0, 30), min_size=1, max_size=400), st.integers(1, 12))
def test_same_victims_as_the_reference(requests: list[int], capacity: int) -> None:
    policy, reference = S3Fifo(capacity), Reference()
    slot_of: dict[int, int] = {}
    free = list(range(capacity))
    pinned = np.zeros(capacity, np.int32)
    for key in requests:
        if key in slot_of:
            policy.touch(np.array([slot_of[key], slot_of[key]]))  # twice in one call counts once
            reference.touch({key})
            continue
        if not free:
            victims = policy.evict(1, pinned)
            victim = reference.evict()
            assert [key for key, slot in slot_of.items() if slot in victims] == [victim]
            assert victim is not None
            free.append(slot_of.pop(victim))
        slot_of[key] = free.pop()
        policy.admit([slot_of[key]], [key])
        reference.admit(key)
    assert len(policy) == len(slot_of)


def test_a_scan_does_not_empty_main() -> None:
    policy = S3Fifo(1000)
    hot = np.arange(500)
    policy.admit(range(500), range(500))
    policy.touch(hot)
    gone: set[int] = set()
    free = list(range(500, 1000))
    for key in range(10_000, 20_000):  # each asked for once
        if not free:
            free = policy.evict(1, np.zeros(1000, np.int32))
            gone |= set(free)
        policy.admit([free.pop()], [key])
    assert not gone & set(hot.tolist())


def test_pinned_slots_stay_and_keep_their_place() -> None:
    policy = S3Fifo(10)
    policy.admit(range(10), range(10))
    pinned = np.zeros(10, np.int32)
    pinned[:9] = 1
    assert policy.evict(5, pinned) == [9]
    pinned[:] = 0
    assert policy.evict(20, pinned) == list(range(9))
    assert policy.evict(1, pinned) == []


def test_forgotten_slots_are_not_victims() -> None:
    policy = S3Fifo(4)
    policy.admit([0, 1, 2], [10, 11, 12])
    policy.forget([1, 3])
    assert sorted(policy.evict(4, np.zeros(4, np.int32))) == [0, 2]
