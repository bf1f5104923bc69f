"""LMCache's raw-block device, on a file: its io_uring engine with O_DIRECT when cold, buffered posix reads when hot."""

from __future__ import annotations

import os
from pathlib import Path

from hga_kvd.memory import aligned_buffer
from lmcache_rust_raw_block_io import RawBlockDevice

from peers.base import Bytes, Numbers, Peer, Shape, State

DEPTH = 256  # its example's


class LmcacheRaw(Peer):
    direct = True

    def __init__(self, place: Path, shape: Shape, state: State) -> None:
        super().__init__(place, shape, state)
        self._path = place / "records.bin"
        with self._path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, shape.records * shape.record_bytes)
        self._device = self._open(direct=True)

    def put(self, first: int, records: Bytes) -> None:
        size = self.shape.record_bytes
        buffer = aligned_buffer(records.nbytes)
        buffer[:] = records.reshape(-1)
        views = [buffer[start : start + size] for start in range(0, len(buffer), size)]
        offsets = [(first + row) * size for row in range(len(records))]
        self._wait(self._device.batched_write(offsets, views, [size] * len(records)))

    def finish(self) -> None:
        with self._path.open("rb+") as file:
            os.fsync(file.fileno())
        if self.state == "hot":
            self._device.close()
            self._device = self._open(direct=False)

    def read(self, numbers: Numbers, out: Bytes) -> Bytes:
        size = self.shape.record_bytes
        offsets = (numbers * size).tolist()
        if self.state == "hot":
            for record, offset in zip(out, offsets, strict=True):
                self._device.pread_into(offset, record, size, size)
        else:
            self._wait(self._device.batched_read(offsets, list(out), [size] * len(offsets)))
        return out

    def close(self) -> None:
        self._device.close()

    def _open(self, direct: bool) -> RawBlockDevice:
        engine = "io_uring" if direct else "posix"
        return RawBlockDevice(str(self._path), True, use_odirect=direct, io_engine=engine, iouring_queue_depth=DEPTH)

    def _wait(self, batch: int) -> None:
        _, errors = self._device.wait_iouring(batch)
        if errors:
            raise OSError(errors[0][1])


PEER = LmcacheRaw
