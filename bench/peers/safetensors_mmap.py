"""safetensors: one tensor of all records in a file that is mapped; rows are copied out of the map."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from peers.base import Bytes, Numbers, Peer, Shape, State


class Safetensors(Peer):
    def __init__(self, place: Path, shape: Shape, state: State) -> None:
        super().__init__(place, shape, state)
        self._path = place / "records.safetensors"
        self._all: Bytes | None = np.empty((shape.records, shape.record_bytes), np.uint8)

    def put(self, first: int, records: Bytes) -> None:
        assert self._all is not None
        self._all[first : first + len(records)] = records

    def finish(self) -> None:
        assert self._all is not None
        save_file({"records": self._all}, self._path)
        self._all = None
        self._open()

    def read(self, numbers: Numbers, out: Bytes) -> Bytes:
        # A slice is copied from the map for each record; there is no call that takes a list of rows.
        for record, number in zip(out, numbers.tolist(), strict=True):
            record[:] = self._rows[number : number + 1][0]
        return out

    def forget(self) -> None:
        del self._rows
        self._file.__exit__(None, None, None)
        self._open()

    def close(self) -> None:
        del self._rows
        self._file.__exit__(None, None, None)

    def _open(self) -> None:
        self._file = safe_open(str(self._path), framework="numpy")
        self._file.__enter__()
        self._rows = self._file.get_slice("records")


PEER = Safetensors
