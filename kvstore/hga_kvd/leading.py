"""How the leader of the lanes waits for the next request of any of them: he looks at their counters for a while, or sleeps.

One thread at a time leads, and only it calls `next`; any thread may rouse it. In C the wait lets go of the interpreter's
lock, so looks take it from nobody (native.c); the twin in Python looks only while no other thread works.
"""

from __future__ import annotations

import ctypes
import os
import select
import weakref
from time import perf_counter_ns

from hga_kvd_proto import lane as layout
from hga_kvd_proto import rings

from hga_kvd.lane import Lane

# A look gives the core away, and has it back within 1 us if nobody wants it.
CROWDED_S = 10e-6
# Waits in a row that sleep at once, at most, before one looks again whether the core is free.
RESTS_MAX = 64


class Patience:
    """Whether the next wait looks at the counters for a while, as the client's does (ADR 14), or sleeps at once. Pure.

    It looks after a wait that was quick. Not on a core that others need: a client there computes and then waits behind the
    looks, as long as it had computed (ADR 35). Who sleeps is woken by the bell, and where a core is free. So after a crowded
    look one wait sleeps; after the next one, if it is crowded too, two, then four; until a look finds the core free.
    """

    def __init__(self) -> None:
        self.quick = False  # whether the last wait ended within SPIN_S
        self._sleeps, self._next_sleeps = 0, 1

    def looks(self) -> bool:
        """To be asked once a wait."""
        if self._sleeps:
            self._sleeps -= 1
            return False
        return self.quick

    def ended(self, wait_s: float, looked: bool) -> None:
        """looked: the whole time, undisturbed."""
        self.quick = wait_s < 2 * layout.SPIN_S
        if looked:
            self._next_sleeps = 1

    def crowded(self) -> None:
        self._sleeps = self._next_sleeps
        self._next_sleeps = min(2 * self._next_sleeps, RESTS_MAX)


class Wait:
    """The leader's. Bells are heard by their edge and never read: no value that a client writes to its own can make a wait
    return for ever."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        weakref.finalize(self, os.close, self._bell)
        self._epoll.register(self._bell, select.EPOLLIN | select.EPOLLET)
        self._patience = Patience()
        self._goes_on = False  # whether the wait that began has found no request yet
        self._lanes: tuple[Lane, ...] = ()
        self._places = (ctypes.c_void_p * 0)()
        self._roused = ctypes.c_uint64()
        self._words = rings.LeaderWords(
            roused=ctypes.addressof(self._roused),
            spin_ns=round(1e9 * layout.SPIN_S),
            crowded_ns=round(1e9 * CROWDED_S),
            epoll=self._epoll.fileno(),
        )
        self._address = ctypes.addressof(self._words)
        self._find_in_c = rings.LIBRARY.free.hga_kvd_lead if rings.LIBRARY is not None else None

    def add(self, lane: Lane) -> None:
        self._epoll.register(lane.request_bell, select.EPOLLIN | select.EPOLLET)

    def remove(self, lane: Lane) -> None:
        """To be called before its bell is closed: the client has the bell too, so closing ours would not do it."""
        self._epoll.unregister(lane.request_bell)
        self._lanes, self._words.count = (), 0

    def rouse(self) -> None:
        """The wait that is under way returns, or the next one."""
        self._roused.value += 1  # of two at once one may be lost; its ring is not
        os.eventfd_write(self._bell, 1)

    def next(self, lanes: tuple[Lane, ...]) -> Lane | None:
        """A lane that has a request and is not busy, each in its turn. None: something has changed; wait again then."""
        words = self._words
        if not self._goes_on:
            words.looks, words.since_ns = self._patience.looks(), 0
        if lanes is not self._lanes:
            self._lanes, words.count = lanes, len(lanes)
            self._places = (ctypes.c_void_p * len(lanes))(*map(ctypes.addressof, lanes))
            words.lanes = ctypes.addressof(self._places)
        place = self._find() if self._find_in_c is None else self._find_in_c(self._address)
        words.heard = self._roused.value
        if words.crowded:
            words.crowded = 0
            self._patience.crowded()
        self._goes_on = place == rings.LOOK_AGAIN
        if self._goes_on:
            return None
        self._patience.ended(1e-9 * words.waited_ns, bool(words.looks))
        return lanes[place]

    def _find(self) -> int:
        """The twin of hga_kvd_lead, but that it neither looks while others work nor says that it is awake."""
        words, lanes = self._words, self._lanes
        now = perf_counter_ns()
        words.since_ns = words.since_ns or now
        words.looks = words.looks and not any(lane.busy for lane in lanes)
        while True:
            for number in range(words.first, words.first + len(lanes)):
                lane = lanes[number % len(lanes)]
                if not lane.busy and lane.posted_word[0] != lane.served:
                    words.first, words.waited_ns = number % len(lanes) + 1, now - words.since_ns
                    return number % len(lanes)
            if words.heard != self._roused.value:
                return rings.LOOK_AGAIN
            if words.looks and now - words.since_ns < words.spin_ns:
                os.sched_yield()
                before, now = now, perf_counter_ns()
                if now - before > words.crowded_ns:
                    words.looks, words.crowded = 0, 1
            else:
                words.looks = 0
                self._epoll.poll()
                return rings.LOOK_AGAIN
