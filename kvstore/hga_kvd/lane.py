"""The fast lane: the engine's other face. One thread a client answers requests out of shared memory; docs/fastlane.md.

What holds whatever the client does to the memory and the doorbells, both of which it can write at any time:
- A request is read once: header into integers, body into bytes of our own. Only these are checked and used, by the
  same `Calls` and the same refusals as over gRPC.
- Nothing that this side needs later is read back from shared memory: it counts requests and completions itself.
- The worst that a client gets is its own thread: one that posts more than there are slots loses its lane, one that
  fills its doorbell stops its own answers until it is gone.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import threading
from typing import NamedTuple

from hga_kvd_proto import lane as layout
from structlog.typing import FilteringBoundLogger

from hga_kvd.calls import Calls, Range
from hga_kvd.errors import InvalidRequest
from hga_kvd.refusals import refusal

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_NAMES = {layout.FETCH: "Fetch", layout.APPEND: "Append", layout.PREFETCH: "Prefetch"}


class _Answer(NamedTuple):
    code: int = 0
    body: bytes = b""
    chunk_count: int = 0
    ram_records: int = 0
    nvme_records: int = 0


class Lane:
    """One client's. The thread runs from `start` until `stop`, or until the client breaks the protocol."""

    def __init__(self, client_id: int, calls: Calls, log: FilteringBoundLogger) -> None:
        """Raises OSError when there is no memory or descriptor for it."""
        self.client_id = client_id
        self._calls = calls
        self._log = log
        self._stopping = self._ended = False
        self._descriptors_lock = threading.Lock()  # a number that was closed may be somebody else's
        with contextlib.ExitStack() as stack:
            self.descriptor = os.memfd_create("hga-kvd-lane", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            stack.callback(os.close, self.descriptor)
            os.ftruncate(self.descriptor, layout.LANE_BYTES)
            os.posix_fallocate(self.descriptor, 0, layout.LANE_BYTES)
            fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, _SEALS)
            self._memory = memoryview(mmap.mmap(self.descriptor, layout.LANE_BYTES))
            flags = os.EFD_CLOEXEC | os.EFD_NONBLOCK
            self.request_bell = os.eventfd(0, flags)
            stack.callback(os.close, self.request_bell)
            self.completion_bell = os.eventfd(0, flags)
            stack.callback(os.close, self.completion_bell)
            self._alarm = os.eventfd(0, flags)  # ours alone: the client has no descriptor of it
            stack.callback(os.close, self._alarm)
            self._watch = layout.Watch(self._memory, layout.REQUESTS_POSTED, self.request_bell, self._alarm)
            stack.callback(self._watch.close)
            self._completed = self._memory[layout.COMPLETIONS_POSTED :][:8].cast("Q")
            self._closing = stack.pop_all()
        self.thread = threading.Thread(target=self._run, name="lane", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        """Ends the thread after the call it is in. Does not wait, whatever the client did to the doorbells."""
        self._stopping = True
        with self._descriptors_lock:
            if self._ended:
                return
            os.eventfd_write(self._alarm, 1)
            # A client may have filled its doorbell and made it blocking: a full one is emptied, an empty one not waited on.
            with contextlib.suppress(OSError):
                os.preadv(self.completion_bell, [bytearray(8)], -1, os.RWF_NOWAIT)

    def _run(self) -> None:
        try:
            self._serve()
        except Exception:
            self._log.exception("fault", call="lane")
        finally:
            self._publish(layout.CLOSED)
            with self._descriptors_lock:
                self._ended = True
                self._closing.close()

    def _serve(self) -> None:
        served = 0
        while not self._stopping:
            posted = self._watch.wait(served)
            if posted == served:
                return
            if posted - served > layout.SLOT_COUNT or posted < served:
                self._log.warning("lane ended", posted=posted, served=served, reason="a counter that cannot be")
                return
            while served < posted and not self._stopping:
                answer = self._answer(served)
                at = layout.completion_at(served)
                body_at = at + layout.HEADER_BYTES
                self._memory[body_at : body_at + len(answer.body)] = answer.body
                code, body, *counts = answer
                layout.COMPLETION.pack_into(self._memory, at, served, code, len(body), *counts)
                served += 1
                self._publish(served)

    def _publish(self, completed: int) -> None:
        self._completed[0] = completed
        with contextlib.suppress(BlockingIOError):  # full: then it has rung
            os.eventfd_write(self.completion_bell, 1)

    def _answer(self, sequence: int) -> _Answer:
        """Reads the request, makes the call."""
        at = layout.request_at(sequence)
        said, verb, body_bytes, session_id, epoch, offset, size, first_chunk, chunk_count, deadline_us = (
            layout.REQUEST.unpack_from(self._memory, at)
        )
        try:
            if said != sequence or body_bytes > layout.REQUEST_BODY_BYTES:
                raise InvalidRequest(
                    f"lane request {said} with a body of {body_bytes} bytes, where request {sequence} with at most "
                    f"{layout.REQUEST_BODY_BYTES} was expected: attach again"
                )
            body_at = at + layout.HEADER_BYTES
            body = bytes(self._memory[body_at : body_at + body_bytes])
            shared = Range(self.client_id, offset, size)
            if verb == layout.FETCH:
                fetched = self._calls.fetch(session_id, body, shared, self._wanted, epoch, deadline_us)
                statuses = b"" if fetched.statuses is None else fetched.statuses.tobytes()
                return _Answer(0, statuses, 0, fetched.ram_records, fetched.nvme_records)
            if verb == layout.APPEND:
                count = self._calls.append(session_id, first_chunk, chunk_count, body, shared, self._wanted, epoch)
                return _Answer(chunk_count=count)
            if verb == layout.PREFETCH:
                self._calls.prefetch(session_id, body, epoch)
                return _Answer()
            raise InvalidRequest(f"lane request of verb {verb}: this daemon knows {sorted(_NAMES)}")
        except Exception as error:
            answer = refusal(error, _NAMES.get(verb, f"lane verb {verb}"), "lane", self._log)
            return _Answer(answer.code.value[0], f"{answer.meaning}\0{answer.sentence}".encode(errors="replace"))

    def _wanted(self) -> bool:
        return not self._stopping


class Lanes:
    """All of them. One that was stopped counts until its thread has ended: clients cannot pile up threads."""

    def __init__(self, calls: Calls, lanes_max: int, log: FilteringBoundLogger) -> None:
        self._calls = calls
        self._lanes_max = lanes_max
        self._log = log
        self._lock = threading.Lock()
        self._lanes: dict[int, Lane] = {}
        self._ending: list[Lane] = []
        self._shut = False

    def __len__(self) -> int:
        return len(self._lanes)

    def open(self, client_id: int) -> tuple[int, ...]:
        """A lane for this client; its descriptors (memory, request bell, completion bell), which the caller must close.

        Empty where there can be none: the client goes on over gRPC.
        """
        if not layout.supported():
            return ()
        with self._lock:
            self._ending = [lane for lane in self._ending if lane.thread.is_alive()]
            if self._shut or len(self._lanes) + len(self._ending) >= self._lanes_max:
                return ()
            try:
                lane = Lane(client_id, self._calls, self._log)
            except OSError as error:
                self._log.warning("no lane", error=str(error))
                return ()
            descriptors = tuple(os.dup(fd) for fd in (lane.descriptor, lane.request_bell, lane.completion_bell))
            self._lanes[client_id] = lane
            lane.start()
        return descriptors

    def end(self, client_id: int) -> None:
        """The client is gone."""
        with self._lock:
            lane = self._lanes.pop(client_id, None)
            if lane is not None:
                lane.stop()
                self._ending.append(lane)

    def shutdown(self, grace_s: float) -> None:
        """Takes no new requests, and gives the calls in flight `grace_s`."""
        with self._lock:
            self._shut = True
            ending = [*self._lanes.values(), *self._ending]
            self._lanes.clear()
        for lane in ending:
            lane.stop()
        for lane in ending:
            lane.thread.join(grace_s)
