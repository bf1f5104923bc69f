"""Plain preadv, one record after the other: what a program does that has no store."""

from __future__ import annotations

import os
from pathlib import Path

from hga_kvd.memory import aligned_buffer

from peers.base import Bytes, Numbers, Peer, Shape, State


class Preadv(Peer):
    direct = True

    def __init__(self, place: Path, shape: Shape, state: State) -> None:
        super().__init__(place, shape, state)
        self.path = place / "records.bin"
        self.file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)

    def put(self, first: int, records: Bytes) -> None:
        buffer = aligned_buffer(records.nbytes)
        buffer[:] = records.reshape(-1)
        os.pwrite(self.file, buffer.data, first * self.shape.record_bytes)

    def finish(self) -> None:
        os.fsync(self.file)
        if self.state == "hot":
            os.close(self.file)
            self.file = os.open(self.path, os.O_RDONLY)

    def read(self, numbers: Numbers, out: Bytes) -> Bytes:
        for record, number in zip(out, numbers.tolist(), strict=True):
            self.read_one(record, number)
        return out

    def read_one(self, record: Bytes, number: int) -> None:
        if os.preadv(self.file, [record.data], number * self.shape.record_bytes) != self.shape.record_bytes:
            raise OSError(f"short read of record {number}")

    def close(self) -> None:
        os.close(self.file)


PEER = Preadv
