"""One client's fast lane, the daemon's end: requests out of shared memory, answers into it. docs/fastlane.md.

What holds whatever the client does to the memory and the bells, both of which it can write at any time:
- A request is read once: header into integers, body into bytes of our own. Only these are checked and used.
- Nothing that this side needs later is read back from shared memory: it counts requests and completions itself.
- Ringing never blocks: the completion bell is a socket, and MSG_DONTWAIT asks nobody how the socket is set.

One thread at a time serves a lane (lanes.py); nothing here takes a lock.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import socket
from typing import NamedTuple

from hga_kvd_proto import lane as layout
from hga_kvd_proto import rings

from hga_kvd.errors import InvalidRequest

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class LaneBroken(Exception):
    """The client wrote a counter that cannot be: there is no telling what it has posted."""


class Request(NamedTuple):
    verb: int
    session_id: int
    epoch: int
    offset: int
    size: int
    first_chunk: int
    chunk_count: int
    deadline_us: int
    body: bytes


class Lane(rings.LaneWords):
    """served: requests that were answered. busy: a thread makes a slow call of it. ending: nothing more is served;
    whoever serves it next closes it."""

    served: int
    busy: int

    def __init__(self, client_id: int) -> None:
        """Raises OSError when there is no memory or descriptor for it."""
        super().__init__()
        self.client_id = client_id
        self.ending = False
        with contextlib.ExitStack() as stack:
            memory = os.memfd_create("hga-kvd-lane", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            stack.callback(os.close, memory)
            os.ftruncate(memory, layout.LANE_BYTES)
            os.posix_fallocate(memory, 0, layout.LANE_BYTES)
            fcntl.fcntl(memory, fcntl.F_ADD_SEALS, _SEALS)
            mapping = mmap.mmap(memory, layout.LANE_BYTES)
            self._memory = memoryview(mapping)
            self.request_bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            stack.callback(os.close, self.request_bell)
            self._bell, its_bell = socket.socketpair()
            stack.callback(self._bell.close)
            stack.callback(its_bell.close)
            # The client's memory, request bell and completion bell; whoever hands them over closes them.
            self.descriptors = (memory, os.dup(self.request_bell), its_bell.fileno())
            its_bell.detach()
            stack.pop_all()
        self.posted_word = self._memory[layout.REQUESTS_POSTED :][:8].cast("Q")
        self._completed_word = self._memory[layout.COMPLETIONS_POSTED :][:8].cast("Q")
        start = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        self.posted = start + layout.REQUESTS_POSTED
        self.awake = start + layout.awake_at(layout.REQUESTS_POSTED)
        self._completed = start + layout.COMPLETIONS_POSTED
        self._client_awake = start + layout.awake_at(layout.COMPLETIONS_POSTED)
        self._bell_number = self._bell.fileno()
        self._publish_in_c = rings.LIBRARY.held.hga_kvd_publish if rings.LIBRARY is not None else None

    def take(self) -> Request:
        """The request after the last one served, which must have been posted. Raises: LaneBroken, InvalidRequest."""
        posted, sequence = self.posted_word[0], self.served
        if not 0 < posted - sequence <= layout.SLOT_COUNT:
            raise LaneBroken(f"{posted} posted, {sequence} served")
        at = layout.request_at(sequence)
        said, verb, body_bytes, session_id, epoch, offset, size, first_chunk, chunk_count, deadline_us = (
            layout.REQUEST.unpack_from(self._memory, at)
        )
        if said != sequence or body_bytes > layout.REQUEST_BODY_BYTES:
            raise InvalidRequest(
                f"lane request {said} with a body of {body_bytes} bytes, where request {sequence} with at most "
                f"{layout.REQUEST_BODY_BYTES} was expected: attach again"
            )
        body_at = at + layout.HEADER_BYTES
        body = bytes(self._memory[body_at : body_at + body_bytes])
        return Request(verb, session_id, epoch, offset, size, first_chunk, chunk_count, deadline_us, body)

    def answer(
        self, code: int = 0, body: bytes = b"", chunk_count: int = 0, ram_records: int = 0, nvme_records: int = 0
    ) -> None:
        """Publishes the completion of the request after the last one served."""
        sequence, memory = self.served, self._memory
        at = layout.completion_at(sequence)
        if body:
            memory[at + layout.HEADER_BYTES : at + layout.HEADER_BYTES + len(body)] = body
        layout.COMPLETION.pack_into(memory, at, sequence, code, len(body), chunk_count, ram_records, nvme_records)
        self.served = sequence + 1
        self._publish(self.served)

    def wanted(self) -> bool:
        return not self.ending

    def close(self) -> None:
        """Says so to the client, and gives everything back."""
        self._publish(layout.CLOSED)
        self._bell_number = -1  # its number may soon be another socket's
        self._bell.close()
        os.close(self.request_bell)

    def _publish(self, completed: int) -> None:
        if self._publish_in_c is not None:
            self._publish_in_c(self._completed, completed, self._client_awake, self._bell_number)
            return
        self._completed_word[0] = completed
        with contextlib.suppress(OSError):  # full: then it has rung; or the client is gone
            self._bell.send(b"\0", socket.MSG_DONTWAIT)
