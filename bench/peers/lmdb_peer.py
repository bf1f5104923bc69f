"""LMDB through its Python binding: a memory map, one read transaction a batch."""

from __future__ import annotations

from pathlib import Path

import lmdb
import numpy as np

from peers.base import Bytes, Numbers, Peer, Shape, State


class Lmdb(Peer):
    def __init__(self, place: Path, shape: Shape, state: State) -> None:
        super().__init__(place, shape, state)
        # Values over half a page go to pages of their own, so that a record takes one page more than it has.
        self._map_bytes = shape.records * (shape.record_bytes + 8192) + (64 << 20)
        self._environment = self._open()

    def put(self, first: int, records: Bytes) -> None:
        with self._environment.begin(write=True) as transaction:
            for number, record in enumerate(records, first):
                transaction.put(number.to_bytes(8, "big"), record.data, append=True)

    def finish(self) -> None:
        self._environment.sync(True)

    def read(self, numbers: Numbers, out: Bytes) -> Bytes:
        with self._environment.begin(buffers=True) as transaction:
            for record, number in zip(out, numbers.tolist(), strict=True):
                record[:] = np.frombuffer(transaction.get(number.to_bytes(8, "big")), np.uint8)
        return out

    def forget(self) -> None:
        self._environment.close()
        self._environment = self._open()

    def close(self) -> None:
        self._environment.close()

    def _open(self) -> lmdb.Environment:
        # readahead=False is what its manual advises for random reads of more than memory holds.
        readahead = self.state == "hot"
        return lmdb.open(str(self.place / "lmdb"), map_size=self._map_bytes, readahead=readahead, sync=False)


PEER = Lmdb
