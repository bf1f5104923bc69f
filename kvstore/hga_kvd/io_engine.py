"""IoEngine: moves bytes between files and memory, many transfers a call. And the one place that finishes short ones.

An engine only reports what the kernel said: bytes moved or -errno, each. `transfer_all` turns that into done or failed,
so no engine has a rule of its own about short transfers, ends of files or retries.
"""

from __future__ import annotations

import ctypes
import errno
import threading
import time
from collections.abc import Generator
from typing import Protocol

import numpy as np

from hga_kvd.disk import I32, I64, U64

# A SQE's length is 32 bits and one read(2) stops at 2 GiB - 4 KiB; a longer transfer is a short one, finished below.
TRANSFER_BYTES_MAX = 1 << 30
# EAGAIN and EINTR ask to come again. So does ECANCELED, as nobody here cancels: io_uring says it of a transfer that it
# wanted to give to a worker thread and never began, when signals kept it from making that thread. After a second without
# any progress it is an error like others.
RETRY_ROUNDS_MAX = 1000
RETRY_PAUSE_S = 0.001
_TRANSIENT = (-errno.EAGAIN, -errno.EINTR, -errno.ECANCELED)


Results = Generator[I64, None, None]  # of transfers, a few at a time


class EngineUnavailable(Exception):
    """This machine refuses the engine. `errno` is the system's reason (0: ours), the text says it in words."""

    def __init__(self, reason: str, number: int = 0) -> None:
        super().__init__(reason)
        self.errno = number


class Mover(Protocol):
    def transfer(self, write: bool, fds: I32, offsets: I64, addresses: U64, lengths: I64) -> I64:
        """One transfer a row, in any order; each at most TRANSFER_BYTES_MAX. Returns bytes moved, or -errno, each.

        Rows sorted by (fd, offset) are fastest.
        """


class IoEngine(Mover, Protocol):
    """Thread-safe and blocking. Memory is the caller's until `transfer` returns or raises, and never touched after."""

    @property
    def name(self) -> str:
        """uring, liburing or posix."""

    def stream(self, fds: I32, offsets: I64, addresses: U64, lengths: I64, step: int) -> Results:
        """Reads, as `transfer`, and yields the results in order while later rows are under way: at least `step` at a
        time, but for the last. Closed early, it starts no more and waits for what has begun.

        For one thread, which makes no other call of the engine meanwhile.
        """

    def shutdown(self) -> None:
        """Waits for the calls under way, then lets go of threads and file descriptors. No call may come after it."""


class Callers:
    """The calls under way in an engine, `with callers:` around each. They share the depth; shutdown waits for them."""

    def __init__(self) -> None:
        self._count = ctypes.c_int64()
        self.address = ctypes.addressof(self._count)  # of the count, for C
        self._closed = False
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)

    @property
    def count(self) -> int:
        return self._count.value

    def __enter__(self) -> None:
        with self._lock:
            assert not self._closed, "a transfer after shutdown"
            self._count.value += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._count.value -= 1
            if self._closed:
                self._changed.notify_all()

    def close(self) -> None:
        """Lets no call in any more, and returns when the last one has left."""
        with self._changed:
            self._closed = True
            self._changed.wait_for(lambda: self.count == 0)


def transfer_all(
    engine: Mover, fds: I32, offsets: I64, addresses: U64, lengths: I64, *, write: bool, alignment: int
) -> I32:
    """Moves every row whole or fails it. Returns 0 or -errno each; a read that ends past the file's end is -ENODATA.

    O_DIRECT can go on only at a multiple of `alignment`, so the odd bytes of a short transfer are moved again; a short
    read without one whole block has met the end of the file.
    """
    statuses = np.zeros(len(fds), np.int32)
    if not len(fds):
        return statuses
    rows = np.lexsort((offsets, fds)) if len(fds) > 1 else np.zeros(1, np.intp)
    fds, offsets, addresses, left = fds[rows], offsets[rows], addresses[rows], lengths[rows]
    rounds_without_progress = 0
    while True:
        asked = np.minimum(left, TRANSFER_BYTES_MAX)
        moved = engine.transfer(write, fds, offsets, addresses, asked)
        if (moved == left).all():
            return statuses
        assert (moved <= asked).all(), "an engine moved more than it was asked to"

        transient = np.isin(moved, _TRANSIENT)
        moved[(moved >= 0) & (moved < asked)] &= -alignment
        statuses[rows[moved == 0]] = -(errno.EIO if write else errno.ENODATA)
        failed = (moved < 0) & ~transient
        statuses[rows[failed]] = moved[failed]

        rounds_without_progress = 0 if (moved > 0).any() else rounds_without_progress + 1
        if rounds_without_progress == RETRY_ROUNDS_MAX:
            statuses[rows[transient]] = moved[transient]
            return statuses
        if transient.any():
            time.sleep(RETRY_PAUSE_S)
        step = np.maximum(moved, 0)
        again = transient | ((moved > 0) & (moved < left))
        if not again.any():
            return statuses
        rows, fds = rows[again], fds[again]
        offsets, left = offsets[again] + step[again], left[again] - step[again]
        addresses = addresses[again] + step[again].astype(np.uint64)


def whole_or_failed(moved: I64, lengths: I64) -> I32:
    """Statuses of reads that nobody will go on with: a short one, which may be no fault of the device, is -EAGAIN."""
    short = moved - lengths
    if short.any():
        short[short != 0] = -errno.EAGAIN
        short[moved < 0] = moved[moved < 0]
    return short.astype(np.int32)
