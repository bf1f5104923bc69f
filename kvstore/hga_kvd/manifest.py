"""The manifest of docs/format.md: which sessions and segments a store has. Pure: bytes in, values out, and back.

Whatever the bytes are, decoding returns a manifest or raises BadBytes (NewerFormat for a newer version).
"""

from __future__ import annotations

import json
import struct
from dataclasses import asdict, dataclass
from typing import Any, Literal

from hga_kvd.checksum import checksum
from hga_kvd.errors import InvalidRequest
from hga_kvd.format import CHUNKS_MAX, FORMAT_VERSION, IDS_END, BadBytes, NewerFormat
from hga_kvd.geometry import Geometry

MANIFEST_NAME = "MANIFEST"
MANIFEST_COPY_NAME = "MANIFEST.copy"
# 65,536 sessions of at most 700 bytes, if their names are not long.
MANIFEST_TEXT_BYTES_MAX = 64 << 20
# What of it is for sessions and geometries; the rest names 100,000 segments.
SESSIONS_TEXT_BYTES_MAX = 56 << 20
# Runs of chunks that the manifest lists for one session; more are told by a frame.
LINK_RUNS_MAX = 8
# What a session takes beside its name and tenant: 160 bytes of field names, numbers of at most 19 digits.
_SESSION_BYTES = 300 + 42 * LINK_RUNS_MAX

_MANIFEST = struct.Struct("<8sIIQ")
_MAGIC = b"HGAKVMAN"

SegmentState = Literal["open", "sealed", "poisoned"]


@dataclass(frozen=True)
class SessionEntry:
    """links: uids of all its chunks as runs (first uid, count), while no frame tells of this epoch; else None."""

    session_id: int
    name: str
    geometry: Geometry
    chunk_count: int
    epoch: int = 0
    tenant: str = ""
    ttl_s: int = 0
    pinned: bool = False
    links: tuple[tuple[int, int], ...] | None = None
    used_s: int = 0


@dataclass(frozen=True)
class SegmentEntry:
    segment_id: int
    state: SegmentState
    used_bytes: int


@dataclass(frozen=True)
class Manifest:
    clean: bool
    next_session_id: int
    next_chunk_uid: int
    next_segment_id: int
    sessions: tuple[SessionEntry, ...]
    segments: tuple[SegmentEntry, ...]


def encode_manifest(manifest: Manifest) -> bytes:
    geometries: dict[Geometry, int] = {}
    sessions = [
        {
            "id": s.session_id,
            "name": s.name,
            "geometry": geometries.setdefault(s.geometry, len(geometries)),
            "chunk_count": s.chunk_count,
            "epoch": s.epoch,
            "tenant": s.tenant,
            "ttl_s": s.ttl_s,
            "pinned": s.pinned,
            "links": s.links,
            "used_s": s.used_s,
        }
        for s in manifest.sessions
    ]
    fields = {
        "clean": manifest.clean,
        "next_session_id": manifest.next_session_id,
        "next_chunk_uid": manifest.next_chunk_uid,
        "next_segment_id": manifest.next_segment_id,
        "geometries": [asdict(g) for g in geometries],
        "sessions": sessions,
        "segments": [{"id": s.segment_id, "state": s.state, "used_bytes": s.used_bytes} for s in manifest.segments],
    }
    text = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
    head = struct.pack("<8sII", _MAGIC, FORMAT_VERSION, len(text))
    return head + struct.pack("<Q", checksum(head + text)) + text


def session_bytes_max(name: str, tenant: str) -> int:
    """The most that a session takes in a manifest, as long as it has at most LINK_RUNS_MAX runs."""
    return _SESSION_BYTES + len(json.dumps(name)) + len(json.dumps(tenant))


def geometry_bytes(geometry: Geometry) -> int:
    return len(json.dumps(asdict(geometry)))


def decode_manifest(content: bytes) -> Manifest:
    """Raises NewerFormat, or BadBytes with what is wrong."""
    if len(content) < _MANIFEST.size:
        raise BadBytes(f"it has {len(content)} bytes, fewer than its header")
    magic, version, text_bytes, expected = _MANIFEST.unpack_from(content)
    if magic != _MAGIC:
        raise BadBytes(f"its magic is {magic!r}")
    if version > FORMAT_VERSION:
        raise NewerFormat(f"it has format version {version}; this program knows {FORMAT_VERSION}")
    text = content[_MANIFEST.size :]
    if text_bytes != len(text) or text_bytes > MANIFEST_TEXT_BYTES_MAX:
        raise BadBytes(f"it has {len(text)} bytes of text where its header says {text_bytes}")
    if version != FORMAT_VERSION or checksum(content[:16] + text) != expected:
        raise BadBytes("its checksum does not match")
    try:
        return _manifest_of(json.loads(text))
    except (ValueError, TypeError, KeyError, IndexError, RecursionError, InvalidRequest) as error:
        raise BadBytes(f"its text is not a manifest: {error!r}") from None


def _manifest_of(fields: dict[str, Any]) -> Manifest:
    geometries = [_geometry_of(g) for g in fields["geometries"]]
    sessions = tuple(_session_of(s, geometries) for s in fields["sessions"])
    segments = tuple(
        SegmentEntry(_count(s["id"]), _state(s["state"]), _count(s["used_bytes"])) for s in fields["segments"]
    )
    if len({s.session_id for s in sessions}) != len(sessions) or len({s.name for s in sessions}) != len(sessions):
        raise ValueError("two sessions share an id or a name")
    if len({s.segment_id for s in segments}) != len(segments):
        raise ValueError("two segments share an id")
    next_ids = [_count(fields[f"next_{name}_id"]) for name in ("session", "segment")]
    return Manifest(
        _flag(fields["clean"]), next_ids[0], _count(fields["next_chunk_uid"]), next_ids[1], sessions, segments
    )


def _session_of(fields: dict[str, Any], geometries: list[Geometry]) -> SessionEntry:
    links = fields["links"]
    entry = SessionEntry(
        _count(fields["id"]),
        _text(fields["name"]),
        geometries[_count(fields["geometry"])],
        _count(fields["chunk_count"]),
        _count(fields["epoch"]),
        _text(fields["tenant"]),
        _count(fields["ttl_s"]),
        _flag(fields["pinned"]),
        links if links is None else tuple((_count(first), _count(count)) for first, count in links),
        _count(fields["used_s"]),
    )
    if entry.chunk_count > CHUNKS_MAX:
        raise ValueError(f"session {entry.session_id} cannot have {entry.chunk_count} chunks")
    if entry.links is not None and sum(count for _, count in entry.links) != entry.chunk_count:
        raise ValueError(f"session {entry.session_id} does not have as many links as chunks")
    return entry


def _geometry_of(fields: dict[str, Any]) -> Geometry:
    for name in ("layers", "kv_heads", "head_dim", "chunk_tokens", "group_tokens"):
        _count(fields[name])
    for name in ("dtype", "rope", "model_fingerprint"):
        _text(fields[name])
    return Geometry(**fields)


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < IDS_END:
        raise TypeError(f"{value!r} is not a count")
    return value


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{value!r} is not true or false")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value


def _state(value: object) -> SegmentState:
    states: tuple[SegmentState, ...] = ("open", "sealed", "poisoned")
    for state in states:
        if value == state:
            return state
    raise ValueError(f"{value!r} is not a segment state")
