"""The byte format of docs/format.md, version 1: segments and their frames. Pure: bytes in, values out, and back.

Every length field is bounded before it is used, and nothing is believed before its checksum: whatever the bytes are,
decoding returns a value or raises BadBytes (NewerFormat for a newer version) and allocates no more than it was given.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from hga_kvd.checksum import checksum
from hga_kvd.geometry import CHUNK_TOKENS_MAX, KV_HEADS_MAX, LAYERS_MAX, Geometry

FORMAT_VERSION = 1
BLOCK_BYTES = 4096

CHUNKS = 1
SUMMARIES = 2
LINK = 3

# A table is 0.1 % of its body for real models; 64 MiB is a chunk of 512 layers with 16 K records a layer.
TABLE_BYTES_MAX = 64 << 20
KIND_BYTES_MAX = 64
# A session of 1 G tokens; absurd numbers under a right checksum must not become memory.
CHUNKS_MAX = 1 << 24
IDS_END = 1 << 63
TOKENS_KNOWN = 1

_SEGMENT = struct.Struct("<8sIIQQ")
_FRAME = struct.Struct("<4sHHQQQQQQIIQQ8sQ")
_CHUNKS = struct.Struct("<IIII")
_SEGMENT_MAGIC, _FRAME_MAGIC = b"HGAKVSEG", b"KVFR"
_FRAME_CHECKED_BYTES = _FRAME.size - 8
FRAME_HEAD_BYTES = _FRAME.size


class BadBytes(Exception):
    """Bytes that are not what the format says, with the first reason found."""


class NewerFormat(BadBytes):
    """A version that this program does not know."""


def round_up(value: int, multiple: int = BLOCK_BYTES) -> int:
    return -(-value // multiple) * multiple


def segment_name(segment_id: int) -> str:
    return f"segment-{segment_id:08d}.kvs"


def segment_id_of(name: str) -> int | None:
    """None when the name is not one that segment_name makes."""
    match = re.fullmatch(r"segment-(\d{8,18})\.kvs", name, re.ASCII)
    return int(match[1]) if match and segment_name(int(match[1])) == name else None


# --- segment header ---


def encode_segment_header(segment_id: int, segment_bytes: int) -> bytes:
    head = _SEGMENT.pack(_SEGMENT_MAGIC, FORMAT_VERSION, 0, segment_id, segment_bytes).ljust(BLOCK_BYTES - 8, b"\0")
    return head + struct.pack("<Q", checksum(head))


def decode_segment_header(block: bytes) -> tuple[int, int]:
    """(segment id, bytes of the file)."""
    if len(block) < BLOCK_BYTES:
        raise BadBytes(f"a segment header is {BLOCK_BYTES} bytes, this is {len(block)}")
    magic, version, _, segment_id, segment_bytes = _SEGMENT.unpack_from(block)
    if magic != _SEGMENT_MAGIC:
        raise BadBytes(f"segment magic is {magic!r}")
    if struct.unpack_from("<Q", block, BLOCK_BYTES - 8)[0] != checksum(block[: BLOCK_BYTES - 8]):
        raise BadBytes("the segment header's checksum does not match")
    if version != FORMAT_VERSION:
        raise NewerFormat(f"segment format {version}; this program knows {FORMAT_VERSION}")
    return segment_id, segment_bytes


# --- frames ---


@dataclass(frozen=True)
class FrameHeader:
    kind: int
    segment_id: int
    offset: int
    sequence: int
    durable_bytes: int
    session_id: int
    first_chunk: int
    chunk_count: int
    table_bytes: int
    body_bytes: int
    epoch: int = 0

    @property
    def head_bytes(self) -> int:
        """Header and table, up to the body."""
        return round_up(FRAME_HEAD_BYTES + self.table_bytes)

    @property
    def frame_bytes(self) -> int:
        return self.head_bytes + self.body_bytes

    @property
    def body_offset(self) -> int:
        return self.offset + self.head_bytes


def encode_frame_head(header: FrameHeader, table: bytes) -> bytes:
    """Header and table, padded to a block; the body follows."""
    assert header.table_bytes == len(table)
    assert header.body_bytes % BLOCK_BYTES == 0
    h = header
    # fmt: off
    head = _FRAME.pack(
        _FRAME_MAGIC, h.kind, 0, h.segment_id, h.offset, h.sequence, h.durable_bytes, h.session_id, h.first_chunk,
        h.chunk_count, h.table_bytes, h.body_bytes, h.epoch, bytes(8), 0,
    )[:_FRAME_CHECKED_BYTES]
    # fmt: on
    return (head + struct.pack("<Q", checksum(head + table)) + table).ljust(header.head_bytes, b"\0")


def decode_frame_header(block: bytes, segment_id: int, offset: int, segment_bytes: int) -> FrameHeader:
    """The header at this place, lengths bounded but its checksum not yet compared: see decode_table."""
    if len(block) < FRAME_HEAD_BYTES:
        raise BadBytes("shorter than a frame header")
    magic, kind, zero, *numbers, zeros, _ = _FRAME.unpack_from(block)
    if magic != _FRAME_MAGIC or zero or any(zeros):
        raise BadBytes("no frame starts here")
    header = FrameHeader(kind, *numbers)
    if (header.segment_id, header.offset) != (segment_id, offset):
        raise BadBytes(f"a frame of segment {header.segment_id}, offset {header.offset}, at the wrong place")
    fewest = 0 if kind == LINK else 1
    if header.table_bytes > TABLE_BYTES_MAX or header.body_bytes % BLOCK_BYTES or header.chunk_count < fewest:
        raise BadBytes("a frame with impossible sizes")
    if header.first_chunk + header.chunk_count > CHUNKS_MAX or header.session_id >= IDS_END:
        raise BadBytes("a frame of chunks that no session can have")
    if offset + header.frame_bytes > segment_bytes:
        raise BadBytes(f"a frame of {header.frame_bytes} bytes goes past the end of its segment")
    return header


def check_frame(header: FrameHeader, head: bytes) -> bytes:
    """The table out of header and table bytes, after comparing the checksum. Raises BadBytes."""
    table = head[FRAME_HEAD_BYTES : FRAME_HEAD_BYTES + header.table_bytes]
    if len(table) != header.table_bytes:
        raise BadBytes("shorter than its table")
    expected = struct.unpack_from("<Q", head, _FRAME_CHECKED_BYTES)[0]
    if checksum(head[:_FRAME_CHECKED_BYTES] + table) != expected:
        raise BadBytes("the frame's checksum does not match")
    return table


@dataclass(frozen=True)
class ChunkFrame:
    """Table of a frame of chunks. checksums: u64 [chunks, layers, records]; token_ids: u32 [chunks, tokens]."""

    header: FrameHeader
    record_bytes: int
    uids: npt.NDArray[np.uint64]
    checksums: npt.NDArray[np.uint64]
    tokens_known: npt.NDArray[np.bool_]
    token_ids: npt.NDArray[np.uint32]

    @property
    def stride(self) -> int:
        """Bytes from one extent to the next."""
        return round_up(int(self.checksums.shape[2]) * self.record_bytes)

    @property
    def chunk_stride(self) -> int:
        return int(self.checksums.shape[1]) * self.stride


@dataclass(frozen=True)
class SummaryFrame:
    """Table of a frame of summaries of the chunks `uids`. uids, checksums: u64 [chunks]."""

    header: FrameHeader
    kind: str
    bytes_per_chunk: int
    uids: npt.NDArray[np.uint64]
    checksums: npt.NDArray[np.uint64]

    @property
    def stride(self) -> int:
        """Bytes from one summary to the next."""
        return round_up(self.bytes_per_chunk)


@dataclass(frozen=True)
class LinkFrame:
    """Which chunks a session has from header.first_chunk on. uids: u64 [chunks], 0: a chunk that was lost."""

    header: FrameHeader
    uids: npt.NDArray[np.uint64]


Frame = ChunkFrame | SummaryFrame | LinkFrame


def chunk_table_bytes(geometry: Geometry, chunk_count: int) -> int:
    per_chunk = 8 + 8 * geometry.layers * geometry.records_per_extent + 4 + 4 * geometry.chunk_tokens
    return _CHUNKS.size + chunk_count * per_chunk


def encode_chunk_table(
    record_bytes: int,
    uids: npt.NDArray[np.uint64],
    checksums: npt.NDArray[np.uint64],
    tokens_known: npt.NDArray[np.bool_],
    token_ids: npt.NDArray[np.uint32],
) -> bytes:
    _, layers, records = checksums.shape
    return b"".join(
        (
            _CHUNKS.pack(layers, records, record_bytes, token_ids.shape[1]),
            uids.astype("<u8").tobytes(),
            checksums.astype("<u8").tobytes(),
            (tokens_known * TOKENS_KNOWN).astype("<u4").tobytes(),
            token_ids.astype("<u4").tobytes(),
        )
    )


def encode_summary_table(
    kind: str, bytes_per_chunk: int, uids: npt.NDArray[np.uint64], checksums: npt.NDArray[np.uint64]
) -> bytes:
    text = kind.encode()
    assert len(text) <= KIND_BYTES_MAX
    numbers = uids.astype("<u8").tobytes() + checksums.astype("<u8").tobytes()
    return struct.pack("<Q", bytes_per_chunk) + numbers + struct.pack("<H", len(text)) + text


def encode_link_table(uids: npt.NDArray[np.uint64]) -> bytes:
    return uids.astype("<u8").tobytes()


def decode_table(header: FrameHeader, table: bytes) -> Frame:
    """The table of a frame whose checksum matched. Raises BadBytes when its sizes do not fit one another."""
    if header.kind == CHUNKS:
        return _decode_chunk_table(header, table)
    if header.kind == SUMMARIES:
        return _decode_summary_table(header, table)
    if header.kind == LINK:
        if len(table) != 8 * header.chunk_count or header.body_bytes:
            raise BadBytes("a link table whose size does not fit its fields")
        return LinkFrame(header, np.frombuffer(table, "<u8"))
    raise NewerFormat(f"frame kind {header.kind}; this program knows {CHUNKS}, {SUMMARIES} and {LINK}")


def _decode_chunk_table(header: FrameHeader, table: bytes) -> ChunkFrame:
    if len(table) < _CHUNKS.size:
        raise BadBytes("a chunk table shorter than its sizes")
    layers, records, record_bytes, tokens = _CHUNKS.unpack_from(table)
    count = header.chunk_count
    if not (1 <= layers <= LAYERS_MAX and 1 <= records <= KV_HEADS_MAX * CHUNK_TOKENS_MAX and record_bytes >= 1):
        raise BadBytes("a chunk table with impossible sizes")
    lengths = (8 * count, 8 * count * layers * records, 4 * count, 4 * count * tokens)
    if len(table) != _CHUNKS.size + sum(lengths) or tokens > CHUNK_TOKENS_MAX:
        raise BadBytes("a chunk table whose size does not fit its fields")
    if header.body_bytes != count * layers * round_up(records * record_bytes):
        raise BadBytes("a chunk table that does not fit its body")
    uids_at, sums_at, known_at, ids_at = accumulate(lengths[:-1], initial=_CHUNKS.size)
    uids = np.frombuffer(table, "<u8", count, uids_at)
    if int(uids.max()) >= IDS_END:
        raise BadBytes("a chunk uid that was never given out")
    return ChunkFrame(
        header,
        record_bytes,
        uids,
        np.frombuffer(table, "<u8", count * layers * records, sums_at).reshape(count, layers, records),
        (np.frombuffer(table, "<u4", count, known_at) & TOKENS_KNOWN).astype(bool),
        np.frombuffer(table, "<u4", count * tokens, ids_at).reshape(count, tokens),
    )


def _decode_summary_table(header: FrameHeader, table: bytes) -> SummaryFrame:
    count = header.chunk_count
    kind_at = 8 + 16 * count + 2
    if len(table) < kind_at or len(table) != kind_at + struct.unpack_from("<H", table, kind_at - 2)[0]:
        raise BadBytes("a summary table whose size does not fit its fields")
    bytes_per_chunk = struct.unpack_from("<Q", table)[0]
    if bytes_per_chunk < 1 or header.body_bytes != count * round_up(bytes_per_chunk):
        raise BadBytes("a summary table that does not fit its body")
    try:
        kind = table[kind_at:].decode()
    except UnicodeDecodeError:
        raise BadBytes("a summary kind that is not UTF-8") from None
    numbers = np.frombuffer(table[8 : kind_at - 2], "<u8")
    return SummaryFrame(header, kind, bytes_per_chunk, numbers[:count], numbers[count:])
