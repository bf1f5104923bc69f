"""sqlite from Python's own library: one table of blobs, one SELECT a batch."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import numpy as np

from peers.base import Bytes, Numbers, Peer, Shape, State

PAGE_BYTES = 65536  # the largest: a record is one overflow page or two
CACHE_KIB = {"cold": 0, "hot": 1 << 20}


class Sqlite(Peer):
    def __init__(self, place: Path, shape: Shape, state: State) -> None:
        super().__init__(place, shape, state)
        self._path = place / "records.sqlite"
        self._base = sqlite3.connect(self._path, isolation_level=None)
        self._base.execute(f"PRAGMA page_size = {PAGE_BYTES}")
        self._base.execute("CREATE TABLE records (number INTEGER PRIMARY KEY, content BLOB)")
        self._query = f"SELECT number, content FROM records WHERE number IN ({','.join('?' * shape.batch)})"

    def put(self, first: int, records: Bytes) -> None:
        self._base.execute("BEGIN")
        rows = ((first + row, record.tobytes()) for row, record in enumerate(records))
        self._base.executemany("INSERT INTO records VALUES (?, ?)", rows)
        self._base.execute("COMMIT")

    def finish(self) -> None:
        self.forget()

    def read(self, numbers: Numbers, out: Bytes) -> Bytes:
        rows = {number: row for row, number in enumerate(numbers.tolist())}
        for number, content in self._base.execute(self._query, list(rows)):
            out[rows[number]] = np.frombuffer(content, np.uint8)
        return out

    def forget(self) -> None:
        self._base.close()
        self._base = sqlite3.connect(self._path, isolation_level=None)
        self._base.execute(f"PRAGMA cache_size = -{CACHE_KIB[self.state]}")

    def close(self) -> None:
        self._base.close()


PEER = Sqlite
