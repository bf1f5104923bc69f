"""Which clean extent leaves the arena: S3-FIFO (Yang et al., SOSP 2023). Pure: it knows slot numbers and keys only.

New extents enter a small queue (a tenth of all); one that was asked for again by the time it reaches the end moves to
the main queue, any other leaves and is remembered in a ghost queue. An extent that comes back while remembered goes
straight to main. A long scan therefore passes through the small queue and leaves main alone. Dirty extents are never
in here.

Hits cost one vectorised counter update; queues are touched only on admission and eviction.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

I64 = npt.NDArray[np.int64]

# 10 % is the published choice; the paper finds hit rates flat from 5 to 20 %.
SMALL_SHARE = 0.1
FREQUENCY_MAX = 3


class S3Fifo:
    """Slots are numbers below `slot_count`. A key names the extent itself, so that it is known when it comes back."""

    def __init__(self, slot_count: int) -> None:
        # One array, seen twice: single elements of a bytearray cost a quarter of numpy's.
        self._count_of = bytearray(slot_count)
        self._frequency = np.frombuffer(self._count_of, np.uint8)
        self._small: OrderedDict[int, int] = OrderedDict()  # slot -> key
        self._main: OrderedDict[int, int] = OrderedDict()
        self._ghost: OrderedDict[int, None] = OrderedDict()  # key

    def __len__(self) -> int:
        return len(self._small) + len(self._main)

    def touch(self, slots: I64) -> None:
        """A call asked for these slots. A slot named twice in one call counts once."""
        self._frequency[slots] = np.minimum(self._frequency[slots] + 1, FREQUENCY_MAX)

    def admit(self, slots: Iterable[int], keys: Iterable[int]) -> None:
        """These slots now hold these clean extents and may be evicted."""
        for slot, key in zip(slots, keys, strict=True):
            self._count_of[slot] = 0
            if key in self._ghost:
                del self._ghost[key]
                self._main[slot] = key
            else:
                self._small[slot] = key

    def forget(self, slots: Iterable[int]) -> None:
        """These slots were freed for another reason; slots that were never admitted are fine."""
        for slot in slots:
            self._small.pop(slot, None)
            self._main.pop(slot, None)

    def evict(self, count: int, pinned: npt.NDArray[np.integer]) -> list[int]:
        """Up to `count` slots to reuse now; fewer when the others are pinned (pinned[slot] != 0)."""
        small, main, count_of, pins = self._small, self._main, self._count_of, pinned.data
        victims: list[int] = []
        passed_over: list[tuple[OrderedDict[int, int], int, int]] = []
        while len(victims) < count and (small or main):
            from_small = bool(small) and (not main or len(small) > SMALL_SHARE * (len(small) + len(main)))
            queue = small if from_small else main
            slot, key = queue.popitem(last=False)
            if pins[slot]:
                passed_over.append((queue, slot, key))
            elif from_small and count_of[slot]:
                count_of[slot] = 0
                main[slot] = key
            elif count_of[slot]:
                count_of[slot] -= 1
                main[slot] = key
            else:
                victims.append(slot)
                if from_small:
                    self._ghost[key] = None
        for queue, slot, key in passed_over:
            queue[slot] = key
        while len(self._ghost) > max(1, len(self)):
            self._ghost.popitem(last=False)
        return victims
