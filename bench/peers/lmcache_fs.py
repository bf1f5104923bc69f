"""LMCache's native file-system client: a file a record, O_DIRECT when cold; its worker threads are its queue depth."""

from __future__ import annotations

import os
import select
from pathlib import Path

from hga_kvd.memory import aligned_buffer
from lmcache import lmcache_fs

from peers.base import Bytes, Numbers, Peer, Shape, State

WORKERS = 32
DEADLINE_MS = 60_000


class LmcacheFs(Peer):
    direct = True

    def __init__(self, place: Path, shape: Shape, state: State) -> None:
        super().__init__(place, shape, state)
        self._place = place / "fs"
        self._place.mkdir()
        self._client = lmcache_fs.LMCacheFSClient(str(self._place), WORKERS, "", state == "cold", 0)
        self._poll = select.poll()
        self._poll.register(self._client.event_fd(), select.POLLIN)

    def put(self, first: int, records: Bytes) -> None:
        size = self.shape.record_bytes
        buffer = aligned_buffer(records.nbytes)
        buffer[:] = records.reshape(-1)
        views = [memoryview(buffer[start : start + size].data) for start in range(0, len(buffer), size)]
        self._wait(self._client.submit_batch_set([_key(first + row) for row in range(len(records))], views))

    def finish(self) -> None:
        os.sync()

    def read(self, numbers: Numbers, out: Bytes) -> Bytes:
        keys = [_key(number) for number in numbers.tolist()]
        self._wait(self._client.submit_batch_get(keys, [record.data for record in out]))
        return out

    def close(self) -> None:
        self._client.close()

    def _wait(self, number: int) -> None:
        while self._poll.poll(DEADLINE_MS):
            for done, well, error, results in self._client.drain_completions():
                assert done == number
                if not well or (results is not None and not all(results)):
                    raise OSError(f"LMCacheFSClient: {error or 'a record is missing'}")
                return
        raise TimeoutError("LMCacheFSClient did not answer")


def _key(number: int) -> str:
    return f"bench@00000000@0@{number:08x}"


PEER = LmcacheFs
