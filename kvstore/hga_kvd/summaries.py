"""Where the routing state of each chunk is: opaque bytes of a kind, in RAM until written, then only their place. Pure.

Summaries belong to chunks, not to sessions, so forks share them. One row is one summary; the rows of a chunk hang
together in a list that starts at `head[chunk row]`. That costs 53 bytes a summary, whatever kinds there are and however
few chunks have them. Row 0 is nobody's: "no summary" needs no branch.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hga_kvd.growing import grow, grown

I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]

NO_SEGMENT = 0
BLOCK_BYTES = 4096


class SummaryTable:
    """All summaries of the chunks of one geometry."""

    def __init__(self) -> None:
        self.head = np.zeros(1, np.int64)  # by chunk row: its first summary
        self.unsaved = np.zeros(1, np.int16)  # by chunk row: how many of its summaries only RAM has
        self.next = np.zeros(1, np.int64)
        self.chunk = np.zeros(1, np.int64)
        self.kind = np.zeros(1, np.int32)
        self.bytes = np.zeros(1, np.int32)
        self.segment = np.zeros(1, np.int64)  # NO_SEGMENT: not on disk
        self.offset = np.zeros(1, np.int64)
        self.checksum = np.zeros(1, np.uint64)
        self.in_ram: dict[int, bytes] = {}  # row -> newest bytes, if disk does not have them yet
        self.ram_bytes = 0
        self._row_count = 1
        self._free: list[int] = []
        self._kinds: dict[str, int] = {}
        self._kind_text: list[str] = []
        self._kind_uses: list[int] = []

    def find(self, chunks: I64, kind: str) -> I64:
        """The row of each chunk's summary of this kind; 0 where it has none."""
        number = self._kinds.get(kind, -1)
        if number < 0:
            return np.zeros(len(chunks), np.int64)
        known = chunks < len(self.head)
        rows: I64 = np.where(known, self.head[np.where(known, chunks, 0)], 0)
        while (other := (rows != 0) & (self.kind[rows] != number)).any():
            rows[other] = self.next[rows[other]]
        return rows

    def kinds_of(self, chunks: I64) -> dict[str, npt.NDArray[np.bool_]]:
        """Which of these chunks have a summary of each kind that any of them has."""
        present = {kind: self.find(chunks, kind) != 0 for kind in self._kinds}
        return {kind: has for kind, has in present.items() if has.any()}

    def kind_count(self, chunks: I64) -> int:
        """The most kinds that any of these chunks has."""
        known = chunks[chunks < len(self.head)]
        rows, count = self.head[known], 0
        while (rows := rows[rows != 0]).any():
            rows, count = self.next[rows], count + 1
        return count

    def add(self, chunks: I64, kind: str, size: int) -> I64:
        """The rows of these chunks' summaries of this kind, made where there are none; their size is `size` from now."""
        self.head = grown(self.head, int(chunks.max()) + 1)
        self.unsaved = grown(self.unsaved, len(self.head))
        rows = self.find(chunks, kind)
        number = self._number_of(kind)
        for i in np.flatnonzero(rows == 0).tolist():
            chunk = int(chunks[i])
            row = rows[i] = self._free.pop() if self._free else self._row_count
            self._row_count = max(self._row_count, row + 1)
            grow(self, ("next", "chunk", "kind", "bytes", "segment", "offset", "checksum"), self._row_count)
            self.next[row], self.head[chunk] = self.head[chunk], row
            self.chunk[row], self.kind[row] = chunk, number
            self._kind_uses[number] += 1
        self.bytes[rows] = size
        return rows

    def put(self, chunks: I64, kind: str, payload: bytes) -> None:
        """Takes equal parts of `payload` for these chunks."""
        size = len(payload) // len(chunks)
        for i, row in enumerate(self.add(chunks, kind, size).tolist()):
            self._drop_from_ram(row)
            # A copy of its own even if it is all of the payload: identity tells whether it was put again meanwhile.
            self.in_ram[row] = bytes(memoryview(payload)[i * size : (i + 1) * size])
            self.unsaved[self.chunk[row]] += 1
            self.ram_bytes += size

    def stride(self, rows: I64) -> I64:
        """Bytes that each of these summaries takes on disk."""
        blocks: I64 = -(-self.bytes[rows].astype(np.int64) // BLOCK_BYTES)
        return blocks * BLOCK_BYTES

    def kind_of(self, row: int) -> str:
        return self._kind_text[int(self.kind[row])]

    def unsaved_rows(self, chunks: I64) -> list[int]:
        """Summaries of these chunks that only RAM has."""
        found = []
        for chunk in chunks[self.has_unsaved(chunks)].tolist():
            row = int(self.head[chunk])
            while row:
                if row in self.in_ram:
                    found.append(row)
                row = int(self.next[row])
        return found

    def has_unsaved(self, chunks: I64) -> npt.NDArray[np.bool_]:
        """Which of these chunks have a summary that only RAM has."""
        if not self.in_ram:
            return np.zeros(len(chunks), bool)
        known = chunks < len(self.unsaved)
        unsaved: npt.NDArray[np.bool_] = known & (self.unsaved[np.where(known, chunks, 0)] != 0)
        return unsaved

    def saved(self, row: int, payload: bytes, segment: int, offset: int, checksum: int) -> bool:
        """Disk has `payload` at this place now. False if the summary is gone or was put again meanwhile."""
        if self.in_ram.get(row) is not payload:
            return False
        self._drop_from_ram(row)
        self.segment[row], self.offset[row], self.checksum[row] = segment, offset, checksum
        return True

    def rows_of(self, chunks: I64) -> I64:
        """All summaries of these chunks."""
        rows = self.head[chunks[chunks < len(self.head)]]
        found = []
        while len(rows := rows[rows != 0]):
            found.append(rows)
            rows = self.next[rows]
        return np.concatenate(found) if found else np.zeros(0, np.int64)

    def remove(self, chunks: I64) -> None:
        """These chunks are gone, and their summaries with them."""
        rows = self.rows_of(chunks)
        for row in rows.tolist():
            self._drop_from_ram(row)
            number = int(self.kind[row])
            self._kind_uses[number] -= 1
            if not self._kind_uses[number]:
                del self._kinds[self._kind_text[number]]
        self.segment[rows] = NO_SEGMENT
        self.head[chunks[chunks < len(self.head)]] = 0
        self._free.extend(rows.tolist())

    def _drop_from_ram(self, row: int) -> None:
        held = self.in_ram.pop(row, None)
        if held is not None:
            self.ram_bytes -= len(held)
            self.unsaved[self.chunk[row]] -= 1

    def _number_of(self, kind: str) -> int:
        number = self._kinds.get(kind)
        if number is None:
            number = self._kind_uses.index(0) if 0 in self._kind_uses else len(self._kind_uses)
            if number == len(self._kind_uses):
                self._kind_uses.append(0)
                self._kind_text.append("")
            self._kinds[kind], self._kind_text[number] = number, kind
        return number
