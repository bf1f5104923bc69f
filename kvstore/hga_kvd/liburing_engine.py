"""The second io_uring engine, on the PyPI `liburing` binding: the cross-check of `uring.py` in tests, and a spare.

Simple on purpose: one ring, one call at a time. The binding keeps the interpreter lock while it waits, so callers could
not overlap anyhow, and every other thread of the process stands still meanwhile (DESIGN section 4).

The ring belongs to a thread of its own: signal handlers run in the main thread only, so no exception of theirs can part
the binding's calls from our notes of what is in flight.

The binding's wheel may hold instructions that this CPU lacks (2026.3.30 dies of SIGILL on CPUs without AVX-512), and that
kills a process. So it is imported here only, after a child process has made a ring with it and lived.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import importlib
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from hga_kvd.disk import I32, I64, U64
from hga_kvd.io_engine import Callers, EngineUnavailable, Results

_TRIAL = "import liburing as l; r = l.Ring(); l.io_uring_queue_init(2, r); l.io_uring_queue_exit(r)"
_TRIAL_S = 30.0


@functools.cache
def crash() -> str:
    """How the binding ends a process on this machine; empty: it does not. Other refusals are for the engine to meet."""
    try:
        ended = subprocess.run([sys.executable, "-c", _TRIAL], capture_output=True, timeout=_TRIAL_S, check=False)
    except subprocess.TimeoutExpired:
        return f"the liburing package hangs here: a ring was not made within {_TRIAL_S:g} s"
    if ended.returncode >= 0:
        return ""
    name = signal.Signals(-ended.returncode).name
    return f"the liburing package ends its process with {name} here; its wheel was probably built for another CPU"


class LiburingEngine:
    name = "liburing"

    def __init__(self, queue_depth: int) -> None:
        if crash():
            raise EngineUnavailable(crash())
        self._liburing: Any = importlib.import_module("liburing")
        self._queue_depth = queue_depth
        self._callers = Callers()
        self._thread = ThreadPoolExecutor(1, "liburing-io")
        self._ring = self._liburing.Ring()
        self._cqe = self._liburing.Cqe()
        try:  # also starts the thread: an interrupted start would leave the pool with a second one
            self._thread.submit(self._liburing.io_uring_queue_init, queue_depth, self._ring).result()
        except OSError as error:
            self._thread.shutdown()
            raise EngineUnavailable(f"liburing: {error.strerror}", error.errno or 0) from error

    def transfer(self, write: bool, fds: I32, offsets: I64, addresses: U64, lengths: I64) -> I64:
        with self._callers:
            try:
                return self._thread.submit(self._run, write, fds, offsets, addresses, lengths).result()
            except BaseException:
                self._thread.submit(int).result()  # an interrupt: this comes after our batch, if that was handed over
                raise

    def stream(self, fds: I32, offsets: I64, addresses: U64, lengths: I64, step: int) -> Results:
        yield self.transfer(False, fds, offsets, addresses, lengths)

    def shutdown(self) -> None:
        self._callers.close()
        self._thread.shutdown()
        self._liburing.io_uring_queue_exit(self._ring)

    def _run(self, write: bool, fds: I32, offsets: I64, addresses: U64, lengths: I64) -> I64:
        results = np.zeros(len(fds), np.int64)
        rows = list(zip(fds.tolist(), addresses.tolist(), lengths.tolist(), offsets.tolist(), strict=True))
        vectors: dict[int, object] = {}  # by row, in flight; the kernel reads an entry's vector when it is submitted
        queued = 0
        while queued < len(rows) or vectors:
            while queued < len(rows) and len(vectors) < self._queue_depth:
                vectors[queued] = self._queue(write, queued, rows[queued])
                queued += 1
            self._complete(results, vectors)
        return results

    def _queue(self, write: bool, row: int, transfer: tuple[int, int, int, int]) -> object:
        fd, address, length, offset = transfer
        vector = self._liburing.Iovec([memoryview((ctypes.c_ubyte * length).from_address(address))])
        entry = self._liburing.io_uring_get_sqe(self._ring)
        prepare = self._liburing.io_uring_prep_writev if write else self._liburing.io_uring_prep_readv
        prepare(entry, fd, vector, offset)
        entry.user_data = row
        return vector

    def _complete(self, results: I64, vectors: dict[int, object]) -> None:
        """Submits what is queued, waits for at least one completion, and books all that are there."""
        try:
            self._liburing.io_uring_submit_and_wait(self._ring, 1)
        except OSError as error:
            if error.errno not in (errno.EINTR, errno.EAGAIN, errno.EBUSY):
                raise
        ready = 0
        for _ in self._liburing.CqeIter(self._ring, self._cqe):  # points cqe[0] at one completion after the other
            entry = self._cqe[0]
            try:
                results[entry.user_data] = entry.res
            except OSError as error:  # how the binding says a negative result
                results[entry.user_data] = -(error.errno or errno.EIO)
            del vectors[entry.user_data]
            ready += 1
        self._liburing.io_uring_cq_advance(self._ring, ready)
