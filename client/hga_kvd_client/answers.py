"""What the daemon answers, as plain values."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, NamedTuple, TypeVar

from hga_kvd_proto.v1 import kvd_pb2

from hga_kvd_client.geometry import Bytes, Geometry

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Opened:
    """A session as the daemon has it. chunk_count: acknowledged chunks. epoch: of the calls that name its chunks."""

    session_id: int
    name: str
    geometry: Geometry
    chunk_count: int
    durable_chunk_count: int
    created: bool
    epoch: int = 0


@dataclass(frozen=True)
class SessionInfo:
    """token_ids: uint32, of all chunks, or empty if some were never told; only `info` fills it."""

    session_id: int
    name: str
    geometry: Geometry
    chunk_count: int
    durable_chunk_count: int
    damaged_records: int
    temporary: bool
    token_ids: bytes
    epoch: int = 0
    pinned: bool = False
    parked: bool = False
    tenant: str = ""
    ttl_s: int = 0


class Fetched(NamedTuple):
    """records: [keys, record_bytes], a view that is valid until the next fetch. statuses: a byte a key, None: all are
    OK.

    Records whose status is not 0 have undefined bytes.
    """

    records: Bytes
    statuses: Bytes | None
    ram_records: int
    nvme_records: int


def opened(message: kvd_pb2.OpenResponse) -> Opened:
    return _of(Opened, message)


def session_info(message: kvd_pb2.SessionInfo, token_ids: bytes) -> SessionInfo:
    return _of(SessionInfo, message, token_ids=token_ids)


def _of(kind: type[Answer], message: Any, **given: Any) -> Answer:
    """What the message's fields of the same names say, but for those that are given."""
    told = {each.name: getattr(message, each.name) for each in fields(kind) if each.name not in given}  # type: ignore[arg-type]
    return kind(**{**told, "geometry": Geometry.from_proto(message.geometry), **given})
