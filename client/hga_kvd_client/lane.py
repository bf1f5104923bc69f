"""The client's end of the fast lane: one call at a time through shared memory. docs/fastlane.md is the contract.

Requests are answered in their order, so a call that was given up is answered before the one that comes after it: its
late answer is passed over, and it cannot write into the answer of the next.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import select
from collections.abc import Sequence
from time import perf_counter
from typing import NamedTuple

from hga_kvd_proto import lane as layout
from hga_kvd_proto import rings

from hga_kvd_client.errors import DeadlineExceeded, Unavailable

# Rings that a wait hears without sleeping are read now and then. A bell holds about 270 of them, and a full one costs the
# daemon an exception a ring.
RINGS_UNREAD_MAX = 64
RINGS_READ_BYTES = 4096


class LaneClosed(Exception):
    """The daemon ended this lane; nothing posted on it is under way. The region still serves calls over gRPC."""


class Completion(NamedTuple):
    """code: of a gRPC status, 0 for OK. body: statuses; of a refusal its meaning, a zero byte and the sentence."""

    code: int
    chunk_count: int
    ram_records: int
    nvme_records: int
    body: bytes


class Lane:
    def __init__(self, descriptors: Sequence[int], handover: int) -> None:
        """Takes over the descriptors of memory, request bell and completion bell. handover: its end means death.

        Raises OSError, ValueError.
        """
        memory, *self._bells = descriptors
        try:
            mapping = mmap.mmap(memory, layout.LANE_BYTES)
            self._memory = memoryview(mapping)
            self._end = best_end()(
                mapping, layout.REQUESTS_POSTED, layout.COMPLETIONS_POSTED, self._bells[0], self._bells[1], handover
            )
        except BaseException:
            self.close()
            raise
        finally:
            os.close(memory)
        self._posted = self._completed = 0

    def call(
        self,
        timeout_s: float,
        verb: int,
        body: bytes,
        session_id: int,
        epoch: int = 0,
        offset: int = 0,
        size: int = 0,
        first_chunk: int = 0,
        chunk_count: int = 0,
        deadline_us: int = 0,
    ) -> Completion:
        """Raises: LaneClosed; Unavailable when the daemon is gone; DeadlineExceeded after timeout_s."""
        sequence = self._posted
        if sequence - self._completed >= layout.SLOT_COUNT:
            self._wait(sequence - layout.SLOT_COUNT, timeout_s)
        at = layout.request_at(sequence)
        memory = self._memory
        memory[at + layout.HEADER_BYTES : at + layout.HEADER_BYTES + len(body)] = body
        fields = (session_id, epoch, offset, size, first_chunk, chunk_count, deadline_us)
        layout.REQUEST.pack_into(memory, at, sequence, verb, len(body), *fields)
        self._posted = sequence + 1
        self._seen(self._end.exchange(sequence + 1, self._completed, timeout_s), timeout_s)
        if self._completed <= sequence:
            self._wait(sequence, timeout_s)
        at = layout.completion_at(sequence)
        said, code, body_bytes, chunk_count, ram_records, nvme_records = layout.COMPLETION.unpack_from(memory, at)
        assert said == sequence, "the daemon answered another request"
        at += layout.HEADER_BYTES
        body = bytes(memory[at : at + body_bytes]) if body_bytes else b""
        return Completion(code, chunk_count, ram_records, nvme_records, body)

    def _wait(self, sequence: int, timeout_s: float) -> None:
        """Returns when this request was answered."""
        while self._completed <= sequence:
            self._seen(self._end.wait(self._completed, timeout_s), timeout_s)

    def _seen(self, completed: int, timeout_s: float) -> None:
        """What a wait returned."""
        if completed == layout.CLOSED:
            raise LaneClosed
        if completed == self._completed:
            if self._end.alarmed:
                raise Unavailable("the daemon closed the connection of this client")
            raise DeadlineExceeded(f"no answer within {timeout_s:g} s")
        self._completed = completed

    def close(self) -> None:
        with contextlib.suppress(AttributeError):
            self._end.close()
        for bell in self._bells:
            os.close(bell)
        self._bells = []


class End:
    """One side of a pair of counters: it moves one and rings, and waits until the other side has moved the other.

    alarmed: whether the alarm has gone off, which ends a wait.
    """

    def __init__(self, memory: mmap.mmap, moves: int, watches: int, rings_bell: int, bell: int, alarm: int) -> None:
        """moves, watches: places of the counters in memory. rings_bell: an eventfd. bell: read here, never blocking.
        alarm: a descriptor that is readable, or hung up, once waiting is over."""
        os.set_blocking(bell, False)
        self._words = memoryview(memory)
        self._moved, self._counter = (self._words[at : at + 8].cast("Q") for at in (moves, watches))
        self._rings_bell, self._bell, self._alarm = rings_bell, bell, alarm
        self._epoll = select.epoll()
        self._epoll.register(bell, select.EPOLLIN)
        self._epoll.register(alarm, select.EPOLLIN)
        self.alarmed = False
        self._quick = True  # whether the last wait ended within SPIN_S
        self._unread = 0

    def exchange(self, moved: int, seen: int, timeout_s: float) -> int:
        """Moves the own counter, rings, and waits as `wait` does."""
        self._moved[0] = moved
        os.eventfd_write(self._rings_bell, 1)
        return self.wait(seen, timeout_s)

    def wait(self, seen: int, timeout_s: float) -> int:
        """The counter, once it is not `seen`. Returns `seen` when the alarm went off, or after timeout_s.

        A wait that follows a quick one spins first: traffic that comes slowly costs no processor. Spinning yields: the
        other side may need this very core to move the counter.
        """
        counter, yields = self._counter, os.sched_yield
        now = started = perf_counter()
        if self._quick:
            while now - started < layout.SPIN_S:
                if counter[0] != seen:
                    self._unread += 1
                    if self._unread >= RINGS_UNREAD_MAX:
                        self._read_rings()
                    return counter[0]
                yields()
                now = perf_counter()
        while True:
            self._read_rings()  # whoever rings from here on wakes the poll
            if (posted := counter[0]) != seen:
                break
            left = started + timeout_s - perf_counter()
            if left <= 0:
                return seen
            if any(descriptor == self._alarm for descriptor, _ in self._epoll.poll(left)):
                self.alarmed = True
                return counter[0]
        self._quick = perf_counter() - started < 2 * layout.SPIN_S
        return posted

    def _read_rings(self) -> None:
        self._unread = 0
        with contextlib.suppress(BlockingIOError):
            os.read(self._bell, RINGS_READ_BYTES)

    def close(self) -> None:
        self._epoll.close()


class NativeEnd(End):
    """The same in C, in one call that lets go of the interpreter's lock. It says when it is awake, and is not rung then."""

    def __init__(self, memory: mmap.mmap, moves: int, watches: int, rings_bell: int, bell: int, alarm: int) -> None:
        super().__init__(memory, moves, watches, rings_bell, bell, alarm)
        assert rings.LIBRARY is not None
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._native = rings.EndWords(
            posted=start + moves,
            completed=start + watches,
            awake=start + layout.awake_at(watches),
            other_awake=start + layout.awake_at(moves),
            other_bell=rings_bell,
            bell=bell,
            alarm=alarm,
            quick=1,
            spin_ns=round(1e9 * layout.SPIN_S),
        )
        self._address = ctypes.addressof(self._native)
        self._exchange, self._wait = rings.LIBRARY.free.hga_kvd_exchange, rings.LIBRARY.free.hga_kvd_wait

    def exchange(self, moved: int, seen: int, timeout_s: float) -> int:
        until = perf_counter() + timeout_s
        return self._ended(self._exchange(self._address, moved, seen, int(1e9 * timeout_s)), seen, until)

    def wait(self, seen: int, timeout_s: float) -> int:
        until = perf_counter() + timeout_s
        return self._ended(self._wait(self._address, seen, int(1e9 * timeout_s)), seen, until)

    def _ended(self, how: int, seen: int, until: float) -> int:
        while how == rings.INTERRUPTED:  # and Python's handlers of signals have run
            how = self._wait(self._address, seen, int(1e9 * (until - perf_counter())))
        if how == rings.MOVED:
            return self._counter[0]
        self.alarmed = how == rings.ALARMED
        return seen


def best_end() -> type[End]:
    return End if rings.LIBRARY is None else NativeEnd
