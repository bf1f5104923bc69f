"""The io_uring engine: rings driven from Python by whole columns.

A batch is written to the submission queue with one numpy store a column, and its completions are read with one gather,
at the end or a few times on the way. In between are only rounds of two integers, how many more to submit and how many to
wait for, and one `io_uring_enter` each, without the interpreter lock: Python's work while the device runs dry costs
bandwidth. `stream` hands out what is complete while the device works on the rest.

Every calling thread has a ring of its own: no I/O thread, no hand-over, no lock between callers; ADR 2 has the
measurement. Calls under way share the queue depth: each of n keeps at most depth / n in flight, so a small batch goes
to the device at once however large the batch beside it is.

What is always true:
- A ring is empty between calls, and during a stream it is that stream's. What is in flight is (SQ head - CQ tail), the
  kernel's own counters: nothing that happens to a call, not even an interrupt, makes us lose count of memory that the
  kernel may still write to.
- A ring is given at most as much as its submission queue holds before it is read empty, and its completion queue is no
  smaller: that cannot overflow.
- A ring dies with its thread or at shutdown; its mappings and descriptors go with the object.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import threading
import time
import weakref

import numpy as np
import numpy.typing as npt

from hga_kvd import native
from hga_kvd.disk import I32, I64, U64
from hga_kvd.io_engine import Callers, EngineUnavailable, Results
from hga_kvd.memory import address_of

U32 = npt.NDArray[np.uint32]

# linux/io_uring.h
_SYS_SETUP, _SYS_ENTER = 425, 426  # the same on every architecture
_OP_READ, _OP_WRITE = 22, 23
_SETUP_SUBMIT_ALL, _SETUP_SINGLE_ISSUER, _SETUP_DEFER_TASKRUN = 1 << 7, 1 << 12, 1 << 13
_FLAGS = (_SETUP_SUBMIT_ALL | _SETUP_SINGLE_ISSUER | _SETUP_DEFER_TASKRUN, 0)  # Linux 6.1; any
_FEATURE_SINGLE_MMAP, _FEATURE_NODROP, _FEATURE_RW_CUR_POS = 1 << 0, 1 << 1, 1 << 3
_ENTER_GETEVENTS = 1 << 0
_OFFSET_SQES = 0x10000000

_PARAMS = np.dtype(
    [(name, "<u4") for name in ("sq_entries", "cq_entries", "flags", "sq_thread_cpu", "sq_thread_idle", "features")]
    + [("wq_fd", "<u4"), ("reserved", "<u4", 3)]
    + [(f"sq_{name}", "<u4") for name in ("head", "tail", "mask", "count", "flags", "dropped", "array", "reserved")]
    + [("sq_address", "<u8")]
    + [(f"cq_{name}", "<u4") for name in ("head", "tail", "mask", "count", "overflow", "cqes", "flags", "reserved")]
    + [("cq_address", "<u8")]
)
_SQE = np.dtype(
    {
        "names": ["opcode", "fd", "offset", "address", "length", "row"],
        "formats": ["u1", "<i4", "<i8", "<u8", "<u4", "<i8"],
        "offsets": [0, 4, 8, 16, 24, 32],
        "itemsize": 64,
    }
)
# Reads of one thread that are laid out at once: 100 KiB of ring. A longer batch runs dry once in so many.
_ENTRIES = 1024
_CQE = np.dtype([("row", "<i8"), ("result", "<i4"), ("flags", "<u4")])

_MASK = 0xFFFFFFFF  # of the rings' counters
_UNKNOWN = np.int64(-1 << 63)  # the result of a transfer that is not complete

# A round waits for this part of what is in flight: the rest keeps the device busy while Python refills. A half, a
# quarter and an eighth measured alike at a depth of 32; all of it, a sixteenth and a single read were 6 to 12 % slower.
_WAIT_DIVISOR = 8
# The kernel may be short of memory for requests (EAGAIN) or want completions reaped first (EBUSY). A second of that
# without progress is an error.
_BUSY_TRIES_MAX = 1000
_BUSY_PAUSE_S = 0.001

_libc = ctypes.CDLL(None, use_errno=True)
_setup = ctypes.CDLL(None, use_errno=True).syscall
_setup.argtypes = (ctypes.c_long, ctypes.c_uint, ctypes.c_void_p)
_enter = ctypes.CDLL(None, use_errno=True).syscall
_enter.argtypes = (ctypes.c_long, *[ctypes.c_uint] * 4, ctypes.c_void_p, ctypes.c_size_t)


class Ring:
    """One ring, for the thread that made it. In flight is at most this call's share of the queue depth, asked every round.

    Raises EngineUnavailable when the kernel or the machine refuses.
    """

    def __init__(self, queue_depth: int, callers: Callers) -> None:
        fd, params, flags = _setup_ring(_ENTRIES)
        weakref.finalize(self, os.close, fd)
        required = _FEATURE_SINGLE_MMAP | _FEATURE_NODROP | _FEATURE_RW_CUR_POS  # the last came with OP_READ, Linux 5.6
        if int(params["features"]) & required != required:
            raise EngineUnavailable("io_uring of this kernel is too old; Linux 5.6 is the first that serves")
        # Memory order. Submission: the kernel reads the SQ inside our own io_uring_enter, on our own core. Completion
        # with DEFER_TASKRUN: it writes the CQ there too, and program order is all that is needed. Without it another
        # core may write the CQ: on x86-64 loads are not reordered with loads, nor stores with stores, so the plain ones
        # that numpy makes do. Elsewhere they do not.
        machine = platform.machine()
        if machine != "x86_64" and not (machine == "aarch64" and flags & _SETUP_DEFER_TASKRUN):
            raise EngineUnavailable(f"the ring in Python is not known to be safe on {machine} with this kernel")

        sq_count, cq_count = int(params["sq_entries"]), int(params["cq_entries"])
        size = max(int(params["sq_array"]) + 4 * sq_count, int(params["cq_cqes"]) + _CQE.itemsize * cq_count)
        ring = mmap.mmap(fd, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        sqes = mmap.mmap(fd, _SQE.itemsize * sq_count, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, offset=_OFFSET_SQES)

        def u32(field: str, count: int = 1) -> U32:
            return np.frombuffer(ring, np.uint32, count, int(params[field]))

        self.fd = fd
        self._queue_depth, self._callers = queue_depth, callers
        self._count = sq_count
        self._sq_head, self._sq_tail = u32("sq_head"), u32("sq_tail")
        self._cq_head, self._cq_tail = u32("cq_head"), u32("cq_tail")
        self._sq_array = u32("sq_array", sq_count)
        self._sqes = np.frombuffer(sqes, _SQE)
        self._busy_tries = 0
        self._cqes = np.frombuffer(ring, _CQE, cq_count, int(params["cq_cqes"]))
        # places[p : p + n] are the n entries from p on, wrapped.
        self._sq_places = np.tile(np.arange(sq_count), 2)
        self._cq_places = np.tile(np.arange(cq_count), 2)
        words = self._sq_head, self._sq_tail, self._sq_array, self._cq_head, self._cq_tail, self._sqes, self._cqes
        self.view = native.Ring(fd, sq_count, queue_depth, callers.address, *map(address_of, words), cq_count)

    @property
    def in_flight(self) -> int:
        """Transfers that the kernel took and has not completed."""
        return (int(self._sq_head[0]) - int(self._cq_tail[0])) & _MASK

    def stream(self, write: bool, fds: I32, offsets: I64, addresses: U64, lengths: I64, step: int) -> Results:
        """As IoEngine.stream. Raises OSError when the kernel refuses `io_uring_enter`.

        After any exception, and when it is closed early, nothing is in flight.
        """
        assert not self.in_flight, "a ring serves one call at a time"
        try:
            for start in range(0, len(fds), self._count):
                part = slice(start, start + self._count)
                count = self._queue(write, fds[part], offsets[part], addresses[part], lengths[part])
                yield from self._run(count, step)
                self._cq_head[0] = self._cq_tail[0]
        except BaseException:
            self._drain()
            raise

    def _depth(self) -> int:
        return max(1, self._queue_depth // self._callers.count)

    def _queue(self, write: bool, fds: I32, offsets: I64, addresses: U64, lengths: I64) -> int:
        """Lays the transfers out in SQEs 0, 1, ... and names these in the next places of the queue; returns how many."""
        count, tail = len(fds), int(self._sq_tail[0])
        sqes = self._sqes[:count]
        sqes["opcode"] = _OP_WRITE if write else _OP_READ
        sqes["row"] = self._sq_places[:count]
        sqes["fd"], sqes["offset"], sqes["address"], sqes["length"] = fds, offsets, addresses, lengths
        place = tail % self._count
        self._sq_array[self._sq_places[place : place + count]] = self._sq_places[:count]
        self._sq_tail[0] = (tail + count) & _MASK
        return count

    def _run(self, count: int, step: int) -> Results:
        """Submits what is queued, by and by, and yields results in order, at least `step` at a time but for the last."""
        results = np.full(count, _UNKNOWN)
        submitted = completed = read = known = told = 0
        while told < count:
            room = max(0, min(self._depth() - (submitted - completed), count - submitted))
            waiting = submitted + room - completed
            ready = known - told >= step or known == count
            if ready and not room:
                yield results[told:known]
                told = known
                continue
            # What is ready is told only when the device has as much to do as it may have.
            wanted = min(waiting, step) if submitted + room == count else max(1, waiting // _WAIT_DIVISOR)
            submitted, completed = self._advance(count, completed, room, 0 if ready else completed + wanted)
            if completed - told >= step or completed == count:
                self._read(results, read, completed)
                read = completed
                unknown = results[told:] == _UNKNOWN
                known = told + int(unknown.argmax()) if completed < count else count

    def _advance(self, count: int, completed: int, room: int, wanted: int) -> tuple[int, int]:
        """Submits `room` more of `count`, and waits for `wanted` to be complete; (submitted, completed). Raises OSError."""
        error = self._enter(room, wanted)
        submitted = count - ((int(self._sq_tail[0]) - int(self._sq_head[0])) & _MASK)
        now = (int(self._cq_tail[0]) - int(self._cq_head[0])) & _MASK
        self._busy_tries = self._busy_tries + 1 if error and now == completed else 0
        if error not in (0, errno.EINTR, errno.EAGAIN, errno.EBUSY) or self._busy_tries == _BUSY_TRIES_MAX:
            raise OSError(error, "io_uring_enter: " + os.strerror(error))
        if self._busy_tries and error != errno.EINTR:
            time.sleep(_BUSY_PAUSE_S)
        return submitted, now

    def _enter(self, submit_count: int, cqe_count: int) -> int:
        """Submits, and waits until so many completions are unread; 0 or errno.

        The SQ head tells how many the kernel took; when not all, it did not wait.
        """
        if _enter(_SYS_ENTER, self.fd, submit_count, cqe_count, _ENTER_GETEVENTS, None, 0) >= 0:
            return 0
        return ctypes.get_errno()

    def _read(self, results: I64, first: int, end: int) -> None:
        """Reads the completions from the `first` unread one to before `end`; they stay in the queue."""
        place = int(self._cq_head[0]) % len(self._cqes)
        cqes = self._cqes[self._cq_places[place + first : place + end]]
        results[cqes["row"]] = cqes["result"]

    def _drain(self) -> None:
        """Takes back what is queued, and waits until the kernel has let go of the caller's memory. A signal may cut a
        wait short, never the loop.
        """
        self._sq_tail[0] = self._sq_head[0]
        while self.in_flight:
            self._cq_head[0] = self._cq_tail[0]
            if self._enter(0, 1):
                time.sleep(_BUSY_PAUSE_S)
        self._cq_head[0] = self._cq_tail[0]


class UringEngine:
    name = "uring"

    def __init__(self, queue_depth: int) -> None:
        self._queue_depth = queue_depth
        self._callers = Callers()
        self._local = threading.local()
        self._ring()

    def transfer(self, write: bool, fds: I32, offsets: I64, addresses: U64, lengths: I64) -> I64:
        parts = list(self._stream(write, fds, offsets, addresses, lengths, len(fds)))
        return parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, np.int64), *parts])

    def stream(self, fds: I32, offsets: I64, addresses: U64, lengths: I64, step: int) -> Results:
        return self._stream(False, fds, offsets, addresses, lengths, step)

    def bring(self, batch: native.Batch, pool: native.Pool, found: native.Found) -> bool:
        """As Disk.bring, of descriptors."""
        with self._callers:
            try:
                error = native.bring(self._ring().view, batch, pool, found)
            except EngineUnavailable:
                return False
            if error > 0:
                self._local.__dict__.clear()
            return error != native.UNALIGNED

    def _stream(self, write: bool, fds: I32, offsets: I64, addresses: U64, lengths: I64, step: int) -> Results:
        told = 0
        with self._callers:
            try:
                for results in self._ring().stream(write, fds, offsets, addresses, lengths, step):
                    yield results
                    told += len(results)
            except GeneratorExit:
                raise
            except BaseException as error:
                self._local.__dict__.clear()
                if not isinstance(error, (EngineUnavailable, OSError)):
                    raise
                yield np.full(len(fds) - told, -(error.errno or errno.EIO), np.int64)

    def shutdown(self) -> None:
        self._callers.close()
        self._local = threading.local()  # the old one takes the rings of all threads with it

    def _ring(self) -> Ring:
        ring: Ring | None = getattr(self._local, "ring", None)
        if ring is None:
            ring = self._local.ring = Ring(self._queue_depth, self._callers)
        return ring


def _setup_ring(entries: int) -> tuple[int, np.void, int]:
    """Descriptor, parameters and flags of a new ring; with the best flags that the kernel knows."""
    number = 0
    for flags in _FLAGS:
        params = np.zeros(1, _PARAMS)
        params["flags"] = flags
        fd = int(_setup(_SYS_SETUP, entries, params.__array_interface__["data"][0]))
        if fd >= 0:
            return fd, params[0], flags
        number = ctypes.get_errno()
        if number != errno.EINVAL:
            break
    raise EngineUnavailable(f"io_uring_setup: {os.strerror(number)}{_HINTS.get(number, '')}", number)


_HINTS = {
    errno.ENOSYS: " (this kernel has no io_uring)",
    errno.EPERM: " (switched off by kernel.io_uring_disabled or a seccomp profile, as in Docker's default)",
    errno.ENOMEM: " (raise the limit of locked memory: ulimit -l)",
}
