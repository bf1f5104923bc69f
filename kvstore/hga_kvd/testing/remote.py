"""A daemon behind the methods of the engine, so that `Trial` drives a real process: the third of the three rings.

Straight on the stubs, nothing is repeated here: a call that got no answer raises `Gone`, and the oracle knows that it
has happened or has not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
from hga_kvd_proto import ERROR_KEY
from hga_kvd_proto.v1 import kvd_pb2, kvd_pb2_grpc

from hga_kvd import errors
from hga_kvd.answers import EngineStats, Fetched, SessionInfo
from hga_kvd.geometry import Geometry, Keys
from hga_kvd.testing.oracle import Gone

U8 = npt.NDArray[np.uint8]

PART_BYTES = 1 << 20
CALL_S = 60.0


class RemoteStore:
    def __init__(self, channel: grpc.Channel) -> None:
        self._stub: Any = kvd_pb2_grpc.KvdStub(channel)  # type: ignore[no-untyped-call]

    def open(
        self,
        name: str,
        geometry: Geometry | None,
        create: bool,
        *,
        tenant: str = "",
        token_ids: bytes = b"",
        ttl_s: int = 0,
    ) -> SessionInfo:
        message = None if geometry is None else geometry_message(geometry)
        request = kvd_pb2.OpenRequest(
            name=name, geometry=message, create=create, tenant=tenant, token_ids=token_ids, ttl_s=ttl_s
        )
        found = self._ask("Open", request)
        return _info(found, created=found.created)

    def fork(self, session_id: int, epoch: int, chunk_count: int, name: str) -> SessionInfo:
        request = kvd_pb2.ForkRequest(session_id=session_id, epoch=epoch, chunk_count=chunk_count, name=name)
        found = self._ask("Fork", request)
        return _info(found, created=found.created)

    def truncate(self, session_id: int, epoch: int, chunk_count: int) -> SessionInfo:
        self._ask("Truncate", kvd_pb2.TruncateRequest(session_id=session_id, epoch=epoch, chunk_count=chunk_count))
        return self.info(session_id)

    def append(
        self, session_id: int, first_chunk: int, chunk_count: int, payload: U8, token_ids: bytes, epoch: int = 0
    ) -> int:
        def parts() -> Iterator[kvd_pb2.AppendRequest]:
            header = kvd_pb2.AppendHeader(
                session_id=session_id,
                first_chunk=first_chunk,
                chunk_count=chunk_count,
                token_ids=token_ids,
                epoch=epoch,
            )
            yield kvd_pb2.AppendRequest(header=header)
            for start in range(0, len(payload), PART_BYTES):
                yield kvd_pb2.AppendRequest(payload=payload[start : start + PART_BYTES].tobytes())

        return int(self._ask("Append", parts()).chunk_count)

    def fetch(self, session_id: int, keys: Keys, destination: U8, epoch: int = 0) -> Fetched:
        """In as many calls as messages allow."""
        size = len(destination) // len(keys)
        step = max(1, PART_BYTES // size)
        statuses, ram, nvme = np.zeros(len(keys), np.uint8), 0, 0
        for first in range(0, len(keys), step):
            part = keys[first : first + step]
            request = kvd_pb2.FetchRequest(session_id=session_id, keys=part.tobytes(), epoch=epoch)
            answer = self._ask("Fetch", request)
            destination[first * size : (first + len(part)) * size] = np.frombuffer(answer.payload, np.uint8)
            if answer.statuses:
                statuses[first : first + len(part)] = np.frombuffer(answer.statuses, np.uint8)
            ram, nvme = ram + answer.ram_records, nvme + answer.nvme_records
        return Fetched(statuses if statuses.any() else None, ram, nvme)

    def flush(self, session_id: int) -> int:
        return int(self._ask("Flush", kvd_pb2.FlushRequest(session_id=session_id)).durable_chunk_count)

    def put_summaries(
        self, session_id: int, kind: str, first_chunk: int, chunk_count: int, payload: bytes, epoch: int = 0
    ) -> None:
        request = kvd_pb2.PutSummariesRequest(
            session_id=session_id,
            kind=kind,
            first_chunk=first_chunk,
            chunk_count=chunk_count,
            payload=payload,
            epoch=epoch,
        )
        self._ask("PutSummaries", request)

    def get_summaries(
        self, session_id: int, kind: str, first_chunk: int, chunk_count: int, bytes_max: int, epoch: int = 0
    ) -> tuple[int, bytes]:
        request = kvd_pb2.GetSummariesRequest(
            session_id=session_id, kind=kind, first_chunk=first_chunk, chunk_count=chunk_count, epoch=epoch
        )
        answer = self._ask("GetSummaries", request)
        return answer.chunk_count, answer.payload

    def park(self, session_id: int) -> None:
        self._ask("Park", kvd_pb2.ParkRequest(session_id=session_id))

    def pin(self, session_id: int, pinned: bool) -> None:
        self._ask("Pin", kvd_pb2.PinRequest(session_id=session_id, pinned=pinned))

    def close(self, session_id: int) -> None:
        self._ask("Close", kvd_pb2.CloseRequest(session_id=session_id))

    def delete(self, session_id: int) -> None:
        self._ask("Delete", kvd_pb2.DeleteRequest(session_id=session_id))

    def list(self) -> list[SessionInfo]:
        found: list[SessionInfo] = []
        more = True
        while more:
            answer = self._ask("List", kvd_pb2.ListRequest(after_session_id=found[-1].session_id if found else 0))
            found += [_info(message) for message in answer.sessions]
            more = answer.more
        return found

    def info(self, session_id: int) -> SessionInfo:
        """With the token ids of as many chunks as one message takes."""
        return _info(self._ask("Stat", kvd_pb2.StatRequest(session_id=session_id)).session)

    def stats(self) -> EngineStats:
        answer = self._ask("Stat", kvd_pb2.StatRequest())
        return EngineStats(**{field.name: getattr(answer, field.name) for field in fields(EngineStats)})

    def _ask(self, call: str, request: Any) -> Any:
        try:
            return getattr(self._stub, call)(request, timeout=CALL_S)
        except grpc.RpcError as error:
            metadata: Any = error.trailing_metadata() or ()
            meaning = next((str(value) for key, value in metadata if key == ERROR_KEY), "")
            kind = getattr(errors, meaning, None)
            if kind is not None:
                raise kind(error.details()) from None
            if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
                raise Gone(f"{call}: {error.details()}") from None
            raise AssertionError(f"{call} answered {error.code()}: {error.details()}") from error


def geometry_message(geometry: Geometry) -> kvd_pb2.Geometry:
    return kvd_pb2.Geometry(**{field.name: getattr(geometry, field.name) for field in fields(Geometry)})


def _info(message: Any, created: bool = False) -> SessionInfo:
    geometry = Geometry(**{field.name: getattr(message.geometry, field.name) for field in fields(Geometry)})
    return SessionInfo(
        message.session_id,
        message.name,
        geometry,
        message.chunk_count,
        message.durable_chunk_count,
        getattr(message, "damaged_records", 0),
        not message.name,
        getattr(message, "token_ids", b""),
        created,
        message.epoch,
        pinned=getattr(message, "pinned", False),
    )
