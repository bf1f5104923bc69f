"""preadv from 32 threads: a queue depth without io_uring."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from peers.base import Bytes, Numbers, Shape, State
from peers.preadv import Preadv

THREADS = 32


class PreadvPool(Preadv):
    def __init__(self, place: Path, shape: Shape, state: State) -> None:
        super().__init__(place, shape, state)
        self._threads = ThreadPoolExecutor(THREADS)

    def read(self, numbers: Numbers, out: Bytes) -> Bytes:
        list(self._threads.map(self.read_one, out, numbers.tolist()))
        return out

    def close(self) -> None:
        self._threads.shutdown()
        super().close()


PEER = PreadvPool
