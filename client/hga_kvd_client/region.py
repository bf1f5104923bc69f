"""The shared-memory region of one client: how it is received from the daemon, and which part of it is for what.

The first half is for fetched records, the second for payloads of appends; a connection has one call under way at a
time, so each call has its half to itself. Fetches that overlap are put in order by the daemon, so one that was given up
cannot write into the next. `busy` is set while the daemon may read the append half; if an append ends without an answer
it stays set, and the region must never be written again: what it is given up for could be stored in pieces of both.

Where the daemon gives a fast lane (lane.py), it comes with the region and goes with it.

The handover socket stays open as long as the client lives; the daemon takes its end for the client's death.
"""

from __future__ import annotations

import mmap
import os
import socket
from pathlib import Path

import numpy as np

from hga_kvd_client.geometry import Bytes
from hga_kvd_client.lane import Lane

PAGE_BYTES = 4096
LANE_DESCRIPTORS = 3  # memory, request bell, completion bell


class Region:
    def __init__(self, client_id: int, size: int, handover: socket.socket, descriptor: int, lane: Lane | None) -> None:
        """Maps `size` bytes of the descriptor and closes it. Raises OSError, ValueError."""
        self.client_id = client_id
        self.huge_pages = False  # who attached says so
        self.lane = lane
        self.busy = False
        self._handover = handover
        try:
            mapping = mmap.mmap(descriptor, size)
        finally:
            os.close(descriptor)
        # Views keep the mapping alive; it goes with the last of them.
        self.memory: Bytes = np.frombuffer(mapping, dtype=np.uint8)
        self.append_offset = size // 2 // PAGE_BYTES * PAGE_BYTES
        self.fetch_part: Bytes = self.memory[: self.append_offset]
        self.append_part: Bytes = self.memory[self.append_offset :]
        self._records: dict[int, Bytes] = {}

    def records(self, record_bytes: int) -> Bytes:
        """Where fetched records of this size land, from the start on: [records, record_bytes]."""
        found = self._records.get(record_bytes)
        if found is None:
            count = self.fetch_part.nbytes // record_bytes
            found = self._records[record_bytes] = self.fetch_part[: count * record_bytes].reshape(count, record_bytes)
        return found

    def daemon_lives(self) -> bool:
        try:
            return self._handover.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) != b""
        except BlockingIOError:
            return True
        except OSError:
            return False

    def leave_lane(self) -> None:
        """Calls go over gRPC from now on."""
        if self.lane is not None:
            self.lane.close()
            self.lane = None

    def append_offset_of(self, payload: Bytes) -> int | None:
        """Offset in the region if the payload lies there on a page boundary, else None."""
        within = payload.ctypes.data - self.append_part.ctypes.data
        if within >= 0 and within + payload.nbytes <= self.append_part.nbytes and within % PAGE_BYTES == 0:
            return self.append_offset + within
        return None

    def close(self) -> None:
        """Tells the daemon that this client is gone."""
        self.leave_lane()
        self._handover.close()


def receive(path: Path, token: bytes, client_id: int, size: int, lane: bool, deadline_s: float) -> Region:
    """Fetches the region that the daemon offered in Attach. Raises OSError, ValueError when it does not come."""
    handover = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        handover.settimeout(deadline_s)
        handover.connect(str(path))
        handover.sendall(token)
        data, descriptors, _, _ = socket.recv_fds(handover, 1, 4)
        mine, extra = descriptors[:1], descriptors[1:]
        whole = len(data) == 1 and len(mine) == 1 and len(extra) in (0, LANE_DESCRIPTORS)
        if not (lane and whole):
            for descriptor in extra if whole else descriptors:
                os.close(descriptor)
            extra = []
        if not whole:
            raise OSError(f"{path} handed over {len(descriptors)} descriptors with {len(data)} bytes")
        handover.settimeout(None)
        try:
            found = Lane(extra, handover.fileno()) if extra else None
        except BaseException:
            os.close(mine[0])
            raise
        return Region(client_id, size, handover, mine[0], found)
    except BaseException:
        handover.close()
        raise
