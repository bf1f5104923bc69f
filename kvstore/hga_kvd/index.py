"""The index: which chunks a session has, and where each of their extents is. Arrays, not objects; no I/O, no lock.

A session is a list of rows in the chunk table of its geometry; a row is one chunk. Row 0 is the lost chunk: it is in no
slot and no segment, so a chunk that recovery could not find needs no branch. A chunk of 48 layers with 16 records takes
48 * (128 + 8) + 300 bytes: 142 bytes an extent, record checksums included.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from hga_kvd.geometry import Geometry

I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]

LOST_ROW = 0
NO_SEGMENT = 0


def grown(array: npt.NDArray[np.generic], length: int) -> npt.NDArray[np.generic]:
    """`array` with at least `length` rows, doubled as often as needed, new ones zero."""
    if length <= len(array):
        return array
    rows = max(8, len(array))
    while rows < length:
        rows *= 2
    bigger = np.zeros((rows, *array.shape[1:]), array.dtype)
    bigger[: len(array)] = array
    return bigger


class ChunkTable:
    """All chunks of one geometry. A row in use is dirty (segment 0: only RAM has it) or on disk."""

    def __init__(self, geometry: Geometry) -> None:
        layers, records = geometry.layers, geometry.records_per_extent
        self.geometry = geometry
        self.uid = np.zeros(1, np.uint64)
        self.segment = np.zeros(1, np.int64)
        self.offset = np.zeros(1, np.int64)  # of the chunk's first extent in its segment, bytes
        self.checksums = np.zeros((1, layers, records), np.uint64)
        self.slot = np.zeros((1, layers), np.int64)
        self.tokens_known = np.zeros(1, bool)
        self.token_ids = np.zeros((1, geometry.chunk_tokens), np.uint32)
        self._row_count = 1
        self._free: list[int] = []

    def add(self, count: int) -> I64:
        """`count` rows, all zero."""
        fresh = max(0, count - len(self._free))
        reused = [self._free.pop() for _ in range(count - fresh)]
        first = self._row_count
        self._row_count += fresh
        for name in ("uid", "segment", "offset", "checksums", "slot", "tokens_known", "token_ids"):
            setattr(self, name, grown(getattr(self, name), self._row_count))
        return np.array([*reused, *range(first, first + fresh)], np.int64)

    def remove(self, rows: I64) -> None:
        """Rows that no session has any more."""
        rows = rows[rows != LOST_ROW]
        self.uid[rows] = 0
        self.segment[rows] = NO_SEGMENT
        self.slot[rows] = 0
        self.tokens_known[rows] = False
        self._free.extend(rows.tolist())

    def in_use(self) -> int:
        return self._row_count - 1 - len(self._free)


class Summaries:
    """Routing state of one kind of one session: bytes in RAM until written, then only their place."""

    def __init__(self, bytes_per_chunk: int) -> None:
        self.bytes_per_chunk = bytes_per_chunk
        self.segment = np.zeros(0, np.int64)  # NO_SEGMENT: not on disk
        self.offset = np.zeros(0, np.int64)
        self.checksum = np.zeros(0, np.uint64)
        self.in_ram: dict[int, bytes] = {}  # chunk -> newest bytes, if disk does not have them yet

    def reserve(self, chunk_count: int) -> None:
        for name in ("segment", "offset", "checksum"):
            setattr(self, name, grown(getattr(self, name), chunk_count))

    def put(self, first_chunk: int, payload: bytes) -> int:
        """Takes equal parts of `payload` for consecutive chunks. Returns how many bytes of RAM that takes more."""
        size, more = self.bytes_per_chunk, 0
        for i in range(len(payload) // size):
            more += size - len(self.in_ram.get(first_chunk + i, b""))
            # A copy of its own even if it is all of the payload: identity tells whether it was put again meanwhile.
            self.in_ram[first_chunk + i] = bytes(memoryview(payload)[i * size : (i + 1) * size])
        return more

    def first_missing(self, first_chunk: int, chunk_count: int) -> int | None:
        """The first of these chunks that has none."""
        for chunk in range(first_chunk, first_chunk + chunk_count):
            if chunk not in self.in_ram and (chunk >= len(self.segment) or self.segment[chunk] == NO_SEGMENT):
                return chunk
        return None

    def copy_from_ram(self, first_chunk: int, result: npt.NDArray[np.uint8]) -> I64:
        """Fills in what RAM has; returns which parts of `result` it has not, in their order on disk."""
        size = self.bytes_per_chunk
        absent = []
        for i in range(len(result) // size):
            held = self.in_ram.get(first_chunk + i)
            if held is None:
                absent.append(i)
            else:
                result[i * size : (i + 1) * size] = np.frombuffer(held, np.uint8)
        positions = np.array(absent, np.int64)
        chunks = first_chunk + positions
        return positions[np.lexsort((self.offset[chunks], self.segment[chunks]))]


@dataclass(eq=False)
class Session:
    session_id: int
    name: str
    table: ChunkTable
    pool: int = 0  # which pool of the residency its geometry has
    owner: int = 0
    chunk_count: int = 0
    # Chunks below this are on disk and synced, the rest dirty. Durable too, once the manifest names the session.
    written_count: int = 0
    appending: bool = False
    deleted: bool = False
    damaged_records: int = 0
    damaged: set[tuple[int, int, int]] = field(default_factory=set)  # (chunk, layer, record) already counted
    summaries: dict[str, Summaries] = field(default_factory=dict)
    rows: I64 = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def temporary(self) -> bool:
        return not self.name

    def put_rows(self, first_chunk: int, rows: I64) -> None:
        self.rows = grown(self.rows, first_chunk + len(rows))  # type: ignore[assignment]
        self.rows[first_chunk : first_chunk + len(rows)] = rows

    def token_ids(self) -> bytes:
        """Of all chunks, uint32; empty if any is unknown."""
        rows = self.rows[: self.chunk_count]
        if not self.table.tokens_known[rows].all():
            return b""
        return self.table.token_ids[rows].astype("<u4").tobytes()
