"""The index: which chunks a session has, and where each of their extents is. Arrays, not objects; no I/O, no lock.

A session is a list of rows in the chunk table of its geometry; a row is one chunk, and sessions share it: `refs` counts
the sessions that have it, and the calls that hold it for a moment. A row whose count falls to zero is dead. Row 0 is the
lost chunk: it is in no slot and no segment, so a chunk that recovery could not find needs no branch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from hga_kvd.geometry import Geometry
from hga_kvd.growing import grow, grown
from hga_kvd.summaries import SummaryTable

I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]

LOST_ROW = 0
NO_SEGMENT = 0
CHAIN_BYTES = 32
_COLUMNS = (
    "uid", "segment", "offset", "checksums", "slot", "tokens_known", "token_ids", "refs", "chain", "chained", "twin",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Places:
    """Bytes on disk, in whole blocks: columns of equal length."""

    segment: I64
    offset: I64
    bytes: I64


def places_of(rows: Iterable[tuple[int, int, int]]) -> Places:
    """Of (segment, offset, bytes) each."""
    columns = np.array(list(rows), np.int64).reshape(-1, 3)
    return Places(columns[:, 0], columns[:, 1], columns[:, 2])


def runs_of(places: Iterable[Places]) -> list[tuple[int, int, int]]:
    """All of them as (segment, offset, bytes), in order, neighbours in one."""
    rows = np.concatenate([np.zeros((0, 3), np.int64), *(np.stack((p.segment, p.offset, p.bytes), 1) for p in places)])
    rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]
    first = np.ones(len(rows), bool)
    first[1:] = (np.diff(rows[:, 0]) != 0) | (rows[1:, 1] != rows[:-1, 1] + rows[:-1, 2])
    starts = np.flatnonzero(first)
    lengths = np.add.reduceat(rows[:, 2], starts) if len(rows) else rows[:, 2]
    return list(zip(rows[starts, 0].tolist(), rows[starts, 1].tolist(), lengths.tolist(), strict=True))


class ChunkTable:
    """All chunks of one geometry. A row in use is dirty (segment 0: only RAM has it) or on disk."""

    def __init__(self, geometry: Geometry, chunk_stride: int) -> None:
        """chunk_stride: bytes that a chunk takes on disk."""
        layers, records = geometry.layers, geometry.records_per_extent
        self.geometry = geometry
        self.chunk_stride = chunk_stride
        self.summaries = SummaryTable()
        self.uid = np.zeros(1, np.uint64)
        self.segment = np.zeros(1, np.int64)
        self.offset = np.zeros(1, np.int64)  # of the chunk's first extent in its segment, bytes
        self.checksums = np.zeros((1, layers, records), np.uint64)
        # A fetch asks for many chunks of one layer: a layer's slots lie together. 8 random records of 1 M tokens: -1 us.
        self.slot = np.zeros((2, layers), np.int64, order="F")
        self.tokens_known = np.zeros(1, bool)
        self.token_ids = np.zeros((1, geometry.chunk_tokens), np.uint32)
        self.refs = np.zeros(1, np.int32)
        self.chain = np.zeros((1, CHAIN_BYTES), np.uint8)  # chain id, where `chained`
        self.chained = np.zeros(1, bool)
        self.twin = np.zeros(1, np.int64)  # another row with the same chain id, or 0
        self._row_of_chain: dict[bytes, int] = {}
        self._row_count = 1
        self._free: list[int] = []

    def add(self, count: int) -> I64:
        """`count` rows with one reference each, otherwise all zero."""
        fresh = max(0, count - len(self._free))
        reused = [self._free.pop() for _ in range(count - fresh)]
        first = self._row_count
        self._row_count += fresh
        grow(self, _COLUMNS, self._row_count)
        rows = np.array([*reused, *range(first, first + fresh)], np.int64)
        self.refs[rows] = 1
        return rows

    def hold(self, rows: I64) -> None:
        """One reference more for each of these rows, no row twice but the lost one."""
        self.refs[rows] += 1

    def release(self, rows: I64) -> I64:
        """One reference less. Returns the rows that are dead now: take from them what they have, then `remove` them."""
        self.refs[rows] -= 1
        self.refs[LOST_ROW] = 0
        dead: I64 = rows[(self.refs[rows] == 0) & (rows != LOST_ROW)]
        return dead

    def places(self, rows: I64) -> Places:
        """What these chunks and their summaries take on disk."""
        written = rows[self.segment[rows] != NO_SEGMENT]
        table = self.summaries
        summaries = table.rows_of(rows)
        summaries = summaries[table.segment[summaries] != NO_SEGMENT]
        return Places(
            np.concatenate((self.segment[written], table.segment[summaries])),
            np.concatenate((self.offset[written], table.offset[summaries])),
            np.concatenate((np.full(len(written), self.chunk_stride), table.stride(summaries))),
        )

    def disk_bytes(self) -> int:
        """What all chunks and summaries take on disk."""
        summaries = np.flatnonzero(self.summaries.segment)
        return int(np.count_nonzero(self.segment)) * self.chunk_stride + int(self.summaries.stride(summaries).sum())

    def remove(self, rows: I64) -> None:
        """Forgets dead rows and their summaries."""
        self.forget_chains(rows)
        self.summaries.remove(rows)
        self.uid[rows] = 0
        self.segment[rows] = NO_SEGMENT
        self.slot[rows] = 0
        self.tokens_known[rows] = False
        self._free.extend(rows.tolist())

    def in_use(self) -> int:
        return self._row_count - 1 - len(self._free)

    # --- by content ---

    def set_chain(self, row: int, chain: bytes) -> None:
        """From now on `find_chain` may answer with this row."""
        self.chain[row] = np.frombuffer(chain, np.uint8)
        self.chained[row] = True
        self.twin[row] = self._row_of_chain.get(chain, 0)
        self._row_of_chain[chain] = row

    def find_chain(self, chain: bytes) -> int:
        """A row with this chain id, or LOST_ROW."""
        return self._row_of_chain.get(chain, LOST_ROW)

    def chain_of(self, row: int) -> bytes:
        return bytes(self.chain[row])

    def forget_chains(self, rows: I64) -> None:
        """`find_chain` answers with these rows no more."""
        for row in rows[self.chained[rows]].tolist():
            chain, after = self.chain_of(row), int(self.twin[row])
            at = self._row_of_chain[chain]
            if at == row and after:
                self._row_of_chain[chain] = after
            elif at == row:
                del self._row_of_chain[chain]
            else:
                while self.twin[at] != row:
                    at = int(self.twin[at])
                self.twin[at] = after
            self.chained[row] = False


@dataclass(eq=False)
class Session:
    session_id: int
    name: str
    table: ChunkTable
    pool: int = 0  # which pool of the residency its geometry has
    owner: int = 0
    tenant: str = ""
    root: bytes = b""  # what its chain ids start from
    ttl_s: int = 0  # 0: for ever
    pinned: bool = False
    state: Literal["open", "closed", "parked"] = "open"  # only a session that nobody has open is ever evicted
    used_at: float = 0.0  # seconds of the engine's clock
    epoch: int = 0  # grows with each truncation
    chunk_count: int = 0
    # Chunks below this are on disk and synced, and a frame says that they are this session's. Durable too, once the
    # manifest names the session.
    written_count: int = 0
    logged_epoch: int = 0  # the newest epoch that a frame tells of; while it is behind, the manifest lists the chunks
    link_segments: list[int] = field(default_factory=list)  # that hold link frames of it which count
    appending: bool = False
    deleted: bool = False
    damaged_records: int = 0
    damaged: set[tuple[int, int, int]] = field(default_factory=set)  # (chunk, layer, record) already counted
    rows: I64 = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def temporary(self) -> bool:
        return not self.name

    def use(self, now: float) -> None:
        """now: seconds of the engine's clock, which after a restart may be earlier than it was."""
        self.state, self.used_at = "open", max(now, self.used_at)

    def all_rows(self) -> I64:
        """[chunk_count]"""
        return self.rows[: self.chunk_count]

    def put_rows(self, first_chunk: int, rows: I64) -> None:
        self.rows = grown(self.rows, first_chunk + len(rows))
        self.rows[first_chunk : first_chunk + len(rows)] = rows

    def token_ids(self) -> bytes:
        """Of all chunks, uint32; empty if any is unknown."""
        rows = self.all_rows()
        if not self.table.tokens_known[rows].all():
            return b""
        return self.table.token_ids[rows].astype("<u4").tobytes()

    def last_chain(self) -> bytes:
        """Chain id that the next chunk's follows; empty when it cannot be known."""
        if not self.chunk_count:
            return self.root
        row = int(self.rows[self.chunk_count - 1])
        return self.table.chain_of(row) if self.table.chained[row] else b""
