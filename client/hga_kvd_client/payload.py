"""One append, one fetch, and summaries over a link, by the best way it has: fast lane, shared memory, bytes in messages.

Each is an attempt, made again as a whole when the daemon went away: a new link has a new region.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from hga_kvd_proto import lane as layout
from hga_kvd_proto.v1 import kvd_pb2

from hga_kvd_client import errors
from hga_kvd_client.answers import Fetched
from hga_kvd_client.geometry import Bytes, Geometry, Keys
from hga_kvd_client.link import Link
from hga_kvd_client.region import Region

Slot = tuple[int, int]  # of where fetches land: offset and bytes


@dataclass(frozen=True)
class Limits:
    """What calls on a session may have."""

    geometry: Geometry
    message_bytes_max: int
    fetch_keys_max: int

    @cached_property
    def record_bytes(self) -> int:
        return self.geometry.record_bytes

    @property
    def fetch_bytes_max(self) -> int:
        return self.fetch_keys_max * self.record_bytes


def append_once(link: Link, limits: Limits, header: kvd_pb2.AppendHeader, payload: Bytes) -> int:
    """The session's chunk count. header: all but where the payload is, which is put in here. Raises: as Connection's."""
    region = link.region
    if region is None or payload.nbytes > region.append_part.nbytes:
        header.ClearField("shared")
        return int(link.ask("Append", _in_parts(header, payload, limits.message_bytes_max)).chunk_count)
    offset = region.append_offset_of(payload)
    if offset is None:
        region.append_part[: payload.nbytes] = payload
        offset = region.append_offset
    if region.lane is not None and len(header.token_ids) <= layout.REQUEST_BODY_BYTES:
        place = (header.session_id, header.epoch, offset, payload.nbytes, header.first_chunk, header.chunk_count)
        return link.ask_lane(region, "Append", layout.APPEND, header.token_ids, *place).chunk_count
    header.shared.CopyFrom(kvd_pb2.SharedRange(client_id=region.client_id, offset=offset, bytes=payload.nbytes))
    return int(link.ask("Append", iter((kvd_pb2.AppendRequest(header=header),)), region).chunk_count)


def _in_parts(header: kvd_pb2.AppendHeader, payload: Bytes, part_bytes: int) -> Iterator[kvd_pb2.AppendRequest]:
    yield kvd_pb2.AppendRequest(header=header)
    for start in range(0, payload.nbytes, part_bytes):
        yield kvd_pb2.AppendRequest(payload=payload[start : start + part_bytes].tobytes())


def summaries_once(
    link: Link, session_id: int, kind: str, first_chunk: int, chunk_count: int, epoch: int
) -> tuple[int, Bytes]:
    """As many as fit where fetches land, or in one message: chunks and bytes. Raises: as Connection's."""
    slot = None if link.region is None else (0, link.region.fetch_part.nbytes)
    request = _summaries_request(link, session_id, kind, first_chunk, chunk_count, epoch, slot)
    answer = link.ask("GetSummaries", request)
    return int(answer.chunk_count), _landed(link.region, slot, answer, answer.payload_bytes)


def begin_summaries(
    link: Link, session_id: int, kind: str, first_chunk: int, chunk_count: int, epoch: int, slot: Slot | None
) -> Callable[[], tuple[int, Bytes]]:
    """The same, into this slot, begun now; what is returned waits for the answer, and then raises."""
    request = _summaries_request(link, session_id, kind, first_chunk, chunk_count, epoch, slot)
    region, finish = link.region, link.begin("GetSummaries", request)

    def answer() -> tuple[int, Bytes]:
        found = finish()
        return int(found.chunk_count), _landed(region, slot, found, found.payload_bytes)

    return answer


def _summaries_request(
    link: Link, session_id: int, kind: str, first_chunk: int, chunk_count: int, epoch: int, slot: Slot | None
) -> kvd_pb2.GetSummariesRequest:
    request = kvd_pb2.GetSummariesRequest(
        session_id=session_id, kind=kind, first_chunk=first_chunk, chunk_count=chunk_count, epoch=epoch
    )
    _name_slot(request, link.region, slot)
    return request


def begin_fetch(
    link: Link, session_id: int, keys: Keys, record_bytes: int, epoch: int, once: bool, slot: Slot | None
) -> Callable[[], Fetched]:
    """One fetch into this slot or a message, where it must fit. As begin_summaries."""
    request = kvd_pb2.FetchRequest(session_id=session_id, keys=keys.tobytes(), epoch=epoch, once=once)
    _name_slot(request, link.region, slot)
    region, finish = link.region, link.begin("Fetch", request)

    def answer() -> Fetched:
        found = finish()
        records = _landed(region, slot, found, len(keys) * record_bytes).reshape(-1, record_bytes)
        statuses = np.frombuffer(found.statuses, np.uint8) if found.statuses else None
        return Fetched(records, statuses, found.ram_records, found.nvme_records)

    return answer


def _name_slot(request: Any, region: Region | None, slot: Slot | None) -> None:
    if region is not None and slot is not None:
        place = kvd_pb2.SharedRange(client_id=region.client_id, offset=slot[0], bytes=slot[1])
        request.shared.CopyFrom(place)


def _landed(region: Region | None, slot: Slot | None, answer: Any, size: int) -> Bytes:
    """The bytes of an answer, gone when its slot is used again."""
    if region is not None and slot is not None:
        return region.fetch_part[slot[0] : slot[0] + size]
    if len(answer.payload) != size:
        raise errors.DaemonFault(f"an answer of {len(answer.payload)} bytes where {size} were asked for")
    return np.frombuffer(bytearray(answer.payload), np.uint8)


def fetch_records_max(link: Link, limits: Limits) -> int:
    """Records that one answer takes."""
    region, record_bytes = link.region, limits.record_bytes
    if region is None or record_bytes > region.fetch_part.nbytes:
        return max(1, min(limits.fetch_keys_max, limits.message_bytes_max // record_bytes))
    most = min(limits.fetch_keys_max, len(region.records(record_bytes)))
    return min(most, layout.FETCH_KEYS_MAX) if region.lane is not None else most


def fetch_once(link: Link, limits: Limits, session_id: int, keys: Keys, epoch: int, deadline_us: int) -> Fetched:
    """One fetch, in parts where one answer would be too large. Raises: as Connection's."""
    record_bytes, count = limits.record_bytes, len(keys)
    if not count:
        return Fetched(np.empty((0, record_bytes), np.uint8), None, 0, 0)
    most, region = fetch_records_max(link, limits), link.region
    by_lane = region is not None and region.lane is not None and record_bytes <= region.fetch_part.nbytes
    part = _fetch_by_lane if by_lane else _fetch_by_grpc
    if count <= most:
        return part(link, session_id, keys, record_bytes, epoch, deadline_us)
    records = np.empty((count, record_bytes), np.uint8)
    statuses: Bytes | None = None
    ram_records = nvme_records = 0
    for start in range(0, count, most):
        found = part(link, session_id, keys[start : start + most], record_bytes, epoch, deadline_us)
        records[start : start + most] = found.records
        if found.statuses is not None:
            statuses = np.zeros(count, np.uint8) if statuses is None else statuses
            statuses[start : start + most] = found.statuses
        ram_records += found.ram_records
        nvme_records += found.nvme_records
    return Fetched(records, statuses, ram_records, nvme_records)


# What one answer takes: records in the landing, gone with the next call, or as they came in the message.


def _fetch_by_lane(link: Link, session_id: int, keys: Keys, record_bytes: int, epoch: int, deadline_us: int) -> Fetched:
    region, count = link.region, len(keys)
    assert region is not None
    fields = (session_id, epoch, 0, count * record_bytes, 0, 0, deadline_us)
    _, _, ram_records, nvme_records, found = link.ask_lane(region, "Fetch", layout.FETCH, keys.tobytes(), *fields)
    statuses = np.frombuffer(found, np.uint8) if found else None
    return Fetched(region.records(record_bytes)[:count], statuses, ram_records, nvme_records)


def _fetch_by_grpc(link: Link, session_id: int, keys: Keys, record_bytes: int, epoch: int, deadline_us: int) -> Fetched:
    region, count = link.region, len(keys)
    size = count * record_bytes
    if region is not None and size > region.fetch_part.nbytes:
        region = None
    request = kvd_pb2.FetchRequest(session_id=session_id, keys=keys.tobytes(), epoch=epoch, deadline_us=deadline_us)
    if region is not None:
        request.shared.client_id = region.client_id
        request.shared.bytes = size
    answer = link.ask("Fetch", request)
    records = _landed(region, (0, size), answer, size).reshape(count, record_bytes)
    statuses = np.frombuffer(answer.statuses, np.uint8) if answer.statuses else None
    return Fetched(records, statuses, answer.ram_records, answer.nvme_records)
