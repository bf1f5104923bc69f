"""Which clean extent leaves the arena: the one whose uses, each worth less the longer ago, add up to least (LRFU, Lee et
al., IEEE ToC 2001). Pure: it knows slot numbers and keys only. Dirty extents are never in here.

A use t asks ago counts 2 ** -(t / half_life); `log_worth` is log2 of the sum, plus the time / half_life. In that form
values never have to be aged, and any two compare as they are:

    half_life 100; used at 0 and 100: log2(2**0 + 2**1) = 1.58; used once at 150: 1.5; so the second one goes first

What was evicted is remembered for a while, so that an extent that keeps coming back is told from one that rarely does.
Decode steps of many sessions in turns ask for more than the arena holds, over and over: a queue then forgets every extent
just before it is asked for again. Measured on routed traces against S3-FIFO, LRU, SIEVE and Belady's optimum: ADR 0012.

A hit costs one vectorised update; evictions are made for many slots at once.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

# Asks of records, in multiples of the slots. From 8 to 64 hit rates differ by under 2 points but for bursts at a small
# arena, where 8 is better (ADR 0012).
HALF_LIFE_SLOTS = 8
# Victims are chosen among so many slots at a time, with the residency's lock held: 10 us in C, 60 in numpy. csrc/evict.c.
WINDOW_SLOTS = 1 << 13
_SPREAD = np.uint64(0x9E3779B97F4A7C15)
NOT_HERE = np.inf  # worth of a slot that may not be evicted; adding a use to it changes nothing


class Lrfu:
    """Slots are numbers below `slot_count`. A key names the extent itself, so that it is known when it comes back."""

    def __init__(self, slot_count: int) -> None:
        self.log_worth: F64 = np.full(slot_count, NOT_HERE)
        self.key: I64 = np.zeros(slot_count, np.int64)
        self.clock: F64 = np.zeros(1)  # in half-lives; an array, so that C moves it too
        self.tick = 1 / (HALF_LIFE_SLOTS * slot_count)  # of one ask
        self.past = Past(slot_count)
        self.window: I64 = np.zeros(1, np.int64)  # where the next choice of victims begins; C moves it too

    def __len__(self) -> int:
        return int(np.count_nonzero(np.isfinite(self.log_worth)))

    @property
    def now(self) -> float:
        return float(self.clock[0])

    def touch(self, slots: I64) -> None:
        """A call asked for these slots. A slot named twice in one call counts once."""
        self.clock += len(slots) * self.tick
        self.log_worth[slots] = np.logaddexp2(self.log_worth[slots], self.clock)

    def admit(self, slots: npt.ArrayLike, keys: npt.ArrayLike) -> None:
        """These slots now hold these clean extents and may be evicted."""
        slots, keys = np.asarray(slots, np.int64), np.asarray(keys, np.int64)
        self.clock += len(slots) * self.tick
        self.key[slots] = keys
        self.log_worth[slots] = np.logaddexp2(self.past.worth(keys), self.clock)

    def forget(self, slots: npt.ArrayLike) -> None:
        """These slots were freed for another reason; slots that were never admitted are fine."""
        self.log_worth[np.asarray(slots, np.int64)] = NOT_HERE

    def evict(self, count: int, pinned: npt.NDArray[np.integer]) -> list[int]:
        """Up to `count` slots to reuse now, of one window after the other; fewer when the others are pinned (pinned[slot]
        != 0). native.evict does the same in C."""
        victims: list[int] = []
        for _ in range(-(-len(self.key) // WINDOW_SLOTS)):
            if len(victims) == count:
                break
            begin = int(self.window[0])
            window = slice(begin, begin + WINDOW_SLOTS)
            self.window[0] = window.stop if window.stop < len(self.key) else 0
            worth = np.where(pinned[window] == 0, self.log_worth[window], NOT_HERE)
            wanted = min(count - len(victims), len(worth))
            least = np.argpartition(worth, wanted - 1)[:wanted]
            least = least[np.argsort(worth[least], kind="stable")]
            slots = begin + least[worth[least] != NOT_HERE]
            self.past.remember(self.key[slots], self.log_worth[slots])
            self.log_worth[slots] = NOT_HERE
            victims += slots.tolist()
        return victims


class Past:
    """Worth of evicted extents by key, in a table of twice the slots: of two keys in one place the later one stays."""

    def __init__(self, slot_count: int) -> None:
        size = 1 << (2 * slot_count - 1).bit_length()
        self._shift = np.uint64(65 - size.bit_length())  # 64 less log2 of it
        # Inverted, so that 0 is none: zeros take no memory until they are used.
        self.key: I64 = np.zeros(size, np.int64)
        self.log_worth: F64 = np.zeros(size)

    def remember(self, keys: I64, log_worth: F64) -> None:
        at = self._at(keys)
        self.key[at], self.log_worth[at] = ~keys, log_worth

    def worth(self, keys: I64) -> F64:
        """-inf of those that are not known."""
        at = self._at(keys)
        return np.where(self.key[at] == ~keys, self.log_worth[at], -np.inf)

    def _at(self, keys: I64) -> I64:
        # Fibonacci hashing: the high bits of a product with 2 ** 64 / golden ratio spread neighbours evenly.
        return (keys.view(np.uint64) * _SPREAD >> self._shift).view(np.int64)
