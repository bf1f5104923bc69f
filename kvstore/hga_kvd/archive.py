"""One session as one file, for `hga-kvd export` and `import`: the byte format of docs/archive.md, version 1. Pure.

A head, then parts in a fixed order, each checked before it is believed or unpacked; the last part says that it is the
last, so a file that was cut is known for one. Reading takes no more memory than one part, whatever the bytes are.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from hga_kvd.checksum import checksum
from hga_kvd.codec import CODECS, BadCode, CodecName, pack, unpack
from hga_kvd.errors import InvalidRequest
from hga_kvd.geometry import DTYPE_BYTES, Geometry

VERSION = 1
# Parts are packed one by one; below 1 MiB zstd begins to lose, and a part must fit in one message of the daemon (4 MiB).
PART_BYTES = 2 << 20
PART_BYTES_MAX = 16 << 20
HEAD_TEXT_BYTES_MAX = 64 << 10

BATCH, KV, SUMMARIES, END = 1, 2, 3, 4

_HEAD = struct.Struct("<8sIIQ")
_PART = struct.Struct("<4sHHQQIIIIQQ")
_HEAD_MAGIC, _PART_MAGIC = b"HGAKVEXP", b"KVXP"
_PART_CHECKED_BYTES = _PART.size - 8
_KIND_BYTES_MAX = 64


class BadArchive(Exception):
    """Bytes that are not an archive, with the first reason found and where."""


class Source(Protocol):
    def read(self, length: int, /) -> bytes:
        """`length` bytes, fewer only at the end."""


@dataclass(frozen=True)
class Head:
    name: str
    geometry: Geometry
    chunk_count: int


@dataclass(frozen=True)
class Part:
    """batch: token ids of chunks (empty: unknown) whose K/V parts follow; kv: the next bytes of the batch's payload;
    summaries: of one kind; end: nothing, chunk_count says how many chunks the file held."""

    kind: int
    first_chunk: int
    chunk_count: int
    payload: bytes = b""
    summary_kind: str = ""


def encode_head(head: Head) -> bytes:
    fields = {"name": head.name, "geometry": asdict(head.geometry), "chunk_count": head.chunk_count}
    text = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
    start = struct.pack("<8sII", _HEAD_MAGIC, VERSION, len(text))
    return start + struct.pack("<Q", checksum(start + text)) + text


def encode_part(part: Part, sequence: int, codec: CodecName, element_bytes: int) -> bytes:
    """sequence: 0 for the first part, then one more each. Only K/V is packed by `codec`; the rest is small."""
    kind = part.summary_kind.encode()
    assert len(kind) <= _KIND_BYTES_MAX
    raw = struct.pack("<H", len(kind)) + kind + part.payload if part.kind == SUMMARIES else part.payload
    assert len(raw) <= PART_BYTES_MAX + _KIND_BYTES_MAX + 2
    stored = pack(codec, raw, element_bytes) if part.kind == KV else raw
    if len(stored) >= len(raw):
        stored, codec = raw, "raw"
    # fmt: off
    head = _PART.pack(
        _PART_MAGIC, part.kind, CODECS.index(codec), sequence, part.first_chunk, part.chunk_count, len(raw),
        len(stored), 0, checksum(raw), 0,
    )[:_PART_CHECKED_BYTES]
    # fmt: on
    return head + struct.pack("<Q", checksum(head + stored)) + stored


def read_head(source: Source) -> Head:
    """Raises BadArchive."""
    start = source.read(_HEAD.size)
    if len(start) < _HEAD.size:
        raise BadArchive(f"it has {len(start)} bytes, fewer than the head of an archive")
    magic, version, text_bytes, expected = _HEAD.unpack(start)
    if magic != _HEAD_MAGIC:
        raise BadArchive(f"it starts with {magic!r}, not with {_HEAD_MAGIC!r}")
    if version != VERSION:
        raise BadArchive(f"it has format version {version}; this program knows {VERSION}")
    if text_bytes > HEAD_TEXT_BYTES_MAX:
        raise BadArchive(f"its head says {text_bytes} bytes of text; at most {HEAD_TEXT_BYTES_MAX} are allowed")
    text = source.read(text_bytes)
    if checksum(start[:16] + text) != expected:
        raise BadArchive("the checksum of its head does not match")
    try:
        return _head_of(json.loads(text))
    except (ValueError, TypeError, KeyError, RecursionError, InvalidRequest) as error:
        raise BadArchive(f"its head is not one of an archive: {error!r}") from None


def read_parts(source: Source, head: Head) -> Iterator[Part]:
    """All parts but the last, which ends the iteration. Raises BadArchive when a part is not what it must be."""
    element_bytes = DTYPE_BYTES[head.geometry.dtype]
    expected = _Order(head)
    sequence = 0
    while True:
        part = _read_part(source, sequence, element_bytes)
        expected.check(part, sequence)
        if part.kind == END:
            break
        yield part
        sequence += 1
    if source.read(1):
        raise BadArchive(f"bytes behind its last part, part {sequence}")


def _read_part(source: Source, sequence: int, element_bytes: int) -> Part:
    start = source.read(_PART.size)
    if len(start) < _PART.size:
        raise BadArchive(f"it ends before part {sequence}: the file was cut, or its export was")
    magic, kind, codec, number, first, count, raw_bytes, stored_bytes, zero, raw_checksum, expected = _PART.unpack(
        start
    )
    if magic != _PART_MAGIC or number != sequence or zero or codec >= len(CODECS):
        raise BadArchive(f"no part {sequence} where it should be")
    if max(raw_bytes, stored_bytes) > PART_BYTES_MAX + _KIND_BYTES_MAX + 2:
        raise BadArchive(
            f"part {sequence} says {max(raw_bytes, stored_bytes)} bytes; at most {PART_BYTES_MAX} are allowed"
        )
    stored = source.read(stored_bytes)
    if len(stored) < stored_bytes:
        raise BadArchive(f"it ends within part {sequence}: the file was cut, or its export was")
    if checksum(start[:_PART_CHECKED_BYTES] + stored) != expected:
        raise BadArchive(f"the checksum of part {sequence} does not match")
    try:
        raw = unpack(CODECS[codec], stored, raw_bytes, element_bytes)
    except BadCode as error:
        raise BadArchive(f"part {sequence}: {error}") from None
    if checksum(raw) != raw_checksum:
        raise BadArchive(f"part {sequence} does not unpack to what was packed")
    part = Part(kind, first, count, raw)
    return _summaries_of(part, sequence) if kind == SUMMARIES else part


def _summaries_of(part: Part, sequence: int) -> Part:
    length = struct.unpack_from("<H", part.payload)[0] if len(part.payload) >= 2 else _KIND_BYTES_MAX + 1
    payload = part.payload[2 + length :]
    if length > _KIND_BYTES_MAX or not payload or not part.chunk_count or len(payload) % part.chunk_count:
        raise BadArchive(f"part {sequence} holds summaries of impossible sizes")
    try:
        return replace(part, payload=payload, summary_kind=part.payload[2 : 2 + length].decode())
    except UnicodeDecodeError:
        raise BadArchive(f"part {sequence} holds summaries of a kind that is not UTF-8") from None


class _Order:
    """Batches in the order of chunks, each with all of its payload; then summaries; then the end."""

    def __init__(self, head: Head) -> None:
        self._head = head
        self._next_chunk = 0  # where the next batch starts
        self._payload_bytes = 0  # that the batch still has to come
        self._batch = (0, 0)

    def check(self, part: Part, sequence: int) -> None:
        if not self._fits(part):
            raise BadArchive(f"part {sequence} (kind {part.kind}) is not what must come there")

    def _fits(self, part: Part) -> bool:
        geometry, total = self._head.geometry, self._head.chunk_count
        end = part.first_chunk + part.chunk_count
        if part.kind == KV:
            self._payload_bytes -= len(part.payload)
            return (
                (part.first_chunk, part.chunk_count) == self._batch and bool(part.payload) and self._payload_bytes >= 0
            )
        if self._payload_bytes:
            return False
        if part.kind == BATCH:
            fits = part.first_chunk == self._next_chunk and self._next_chunk < end <= total
            self._batch, self._next_chunk = (part.first_chunk, part.chunk_count), end
            self._payload_bytes = part.chunk_count * geometry.chunk_bytes
            return fits and len(part.payload) in (0, 4 * part.chunk_count * geometry.chunk_tokens)
        complete = self._next_chunk == total
        if part.kind == SUMMARIES:
            return complete and end <= total
        return part.kind == END and complete and (part.first_chunk, part.chunk_count, part.payload) == (0, total, b"")


def _head_of(fields: dict[str, Any]) -> Head:
    name, chunk_count = fields["name"], fields["chunk_count"]
    if not isinstance(name, str) or not isinstance(chunk_count, int) or not 0 <= chunk_count < 1 << 32:
        raise TypeError("name or chunk_count")
    name.encode()  # JSON has text that UTF-8 has not, and a ValueError for it
    geometry = fields["geometry"]
    for field in ("layers", "kv_heads", "head_dim", "chunk_tokens", "group_tokens"):
        if not isinstance(geometry[field], int):
            raise TypeError(field)
    for field in ("dtype", "rope", "model_fingerprint"):
        if not isinstance(geometry[field], str):
            raise TypeError(field)
    return Head(name, Geometry(**geometry), chunk_count)
