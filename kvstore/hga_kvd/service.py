"""The gRPC face of the engine: what the .proto promises, and nothing more.

Each method checks the shape of its message, calls the engine once, and turns the answer into a message. It holds no
state of its own but the payload bytes on their way in. Whatever goes wrong leaves through `_answers`: a typed error
becomes its status, anything else INTERNAL with the traceback in the log, and the daemon goes on.

Payloads in shared memory are borrowed from the landing for the length of the engine's call, and an Append in parts is
gathered in one private buffer; the engine sees nothing of a stream that does not end well.
"""

# ruff: noqa: N802 - methods have the names of the .proto

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, TypeVar

import grpc
import numpy as np
import numpy.typing as npt
from hga_kvd_proto.v1 import kvd_pb2, kvd_pb2_grpc
from structlog.typing import FilteringBoundLogger

from hga_kvd import __version__, errors
from hga_kvd.config import KIB, Settings
from hga_kvd.engine import Engine, Fetched, SessionInfo
from hga_kvd.geometry import KEY_DTYPE, Geometry
from hga_kvd.handover import Handover
from hga_kvd.landing import Landing, NotAttached
from hga_kvd.memory import aligned_buffer

U8 = npt.NDArray[np.uint8]
Method = TypeVar("Method", bound=Callable[..., Any])


class SharingRefused(errors.KvdError):
    """Shared memory is for clients that came through the daemon's unix socket."""


# The only place where an error of ours becomes a status of gRPC.
STATUS: dict[type[errors.KvdError], grpc.StatusCode] = {
    errors.InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    errors.SessionNotFound: grpc.StatusCode.NOT_FOUND,
    errors.GeometryMismatch: grpc.StatusCode.FAILED_PRECONDITION,
    errors.AppendOutOfOrder: grpc.StatusCode.FAILED_PRECONDITION,
    errors.KeyOutOfRange: grpc.StatusCode.OUT_OF_RANGE,
    errors.LimitExceeded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.StorageFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.NotDurable: grpc.StatusCode.FAILED_PRECONDITION,
    errors.WriteFailed: grpc.StatusCode.DATA_LOSS,
    NotAttached: grpc.StatusCode.UNAVAILABLE,
    SharingRefused: grpc.StatusCode.UNIMPLEMENTED,
}
ERROR_KEY = "hga-kvd-error"  # trailing metadata
# A status travels in HTTP/2 headers, of which peers take 8 KiB; bytes outside ASCII take three there.
SENTENCE_BYTES_MAX = 2 * KIB


def _answers(method: Method) -> Method:
    """Gives every way out of an RPC method its status."""
    name = method.__name__

    @functools.wraps(method)
    def call(self: KvdService, request: Any, context: grpc.ServicerContext) -> Any:
        try:
            return method(self, request, context)
        except tuple(STATUS) as error:
            kind = next(kind for kind in type(error).__mro__ if kind in STATUS)
            code, sentence, meaning = STATUS[kind], str(error), kind.__name__
        except grpc.RpcError:  # from a request stream: the client is gone or gave up
            self.log.debug("stream broken", call=name, peer=context.peer())
            code, sentence, meaning = grpc.StatusCode.CANCELLED, "the stream broke; nothing was stored", ""
        except OSError as error:
            self.log.error("device error", call=name, error=str(error))  # noqa: TRY400
            code, meaning = grpc.StatusCode.UNAVAILABLE, ""
            sentence = f"the device answered {error.strerror or error}; repeat the call"
        except MemoryError:
            self.log.error("out of memory", call=name)  # noqa: TRY400
            code, meaning = grpc.StatusCode.RESOURCE_EXHAUSTED, "LimitExceeded"
            sentence = "the daemon has no memory for this call; send smaller ones"
        except Exception as error:
            self.log.exception("fault", call=name)
            code, meaning = grpc.StatusCode.INTERNAL, ""
            sentence = f"the daemon failed in {name} ({type(error).__name__}); its log has the details"
        self.log.debug("refused", call=name, code=code.name, sentence=sentence)
        if meaning:
            context.set_trailing_metadata(((ERROR_KEY, meaning),))
        return context.abort(code, _shortened(sentence))

    return call  # type: ignore[return-value]


def _shortened(sentence: str) -> str:
    encoded = sentence.encode(errors="replace")
    if len(encoded) <= SENTENCE_BYTES_MAX:
        return sentence
    return encoded[:SENTENCE_BYTES_MAX].decode(errors="ignore") + "..."


class KvdService(kvd_pb2_grpc.KvdServicer):
    """One for each daemon; gRPC calls it from its threads. handover: None without a unix socket."""

    def __init__(
        self,
        *,
        engine: Engine,
        landing: Landing,
        handover: Handover | None,
        settings: Settings,
        log: FilteringBoundLogger,
        observe_fetch: Callable[[float], None] | None = None,
    ) -> None:
        self.engine = engine
        self.landing = landing
        self.handover = handover
        self.settings = settings
        self.log = log
        self.observe_fetch = observe_fetch
        self.started = time.monotonic()
        self._inflight_bytes = 0
        self._inflight_lock = threading.Lock()
        self._thread = threading.local()

    def watch_clients(self, handover: Handover) -> None:
        """Runs the handover until it is stopped, and lets go of what belonged to clients that are gone."""
        for client_id in handover.serve():
            self.landing.release(client_id)
            self.log.info("client gone", attached=len(self.landing))
            try:
                self.engine.release_owner(client_id)
            except Exception:
                self.log.exception("fault", call="release_owner")

    @_answers
    def Attach(self, request: kvd_pb2.AttachRequest, context: grpc.ServicerContext) -> kvd_pb2.AttachResponse:
        if self.handover is None or not context.peer().startswith("unix:"):
            raise SharingRefused("shared memory needs the daemon's unix socket; go on with payloads in the messages")
        region, descriptor = self.landing.create(request.region_bytes)
        token = self.handover.offer(region.client_id, descriptor)
        self.log.info("client attached", region_bytes=region.bytes, huge_pages=region.huge_pages)
        return kvd_pb2.AttachResponse(
            client_id=region.client_id,
            region_bytes=region.bytes,
            handover_socket=self.handover.path.name,
            token=token,
            huge_pages=region.huge_pages,
        )

    @_answers
    def Open(self, request: kvd_pb2.OpenRequest, context: grpc.ServicerContext) -> kvd_pb2.OpenResponse:
        owner = request.client_id
        if owner and owner not in self.landing:
            raise NotAttached(f"client {owner} is not attached; call Attach again, then open")
        geometry = _geometry(request.geometry) if request.HasField("geometry") else None
        info = self.engine.open(request.name, geometry, request.create, owner)
        if owner and info.temporary and owner not in self.landing:
            # The client went while its session was made: nobody else would ever delete it.
            with contextlib.suppress(errors.SessionNotFound):
                self.engine.close(info.session_id)
            raise NotAttached(f"client {owner} went away; attach again, then open")
        return kvd_pb2.OpenResponse(
            session_id=info.session_id,
            name=info.name,
            geometry=_geometry_message(info.geometry),
            chunk_count=info.chunk_count,
            durable_chunk_count=info.durable_chunk_count,
            created=info.created,
            message_bytes_max=self.settings.message_bytes_max,
            fetch_keys_max=self.settings.fetch_keys_max,
        )

    @_answers
    def Append(
        self, requests: Iterator[kvd_pb2.AppendRequest], context: grpc.ServicerContext
    ) -> kvd_pb2.AppendResponse:
        # A stream that stalls would keep its thread for ever.
        watchdog = threading.Timer(self.settings.append_stream_s_max, context.cancel)
        watchdog.daemon = True
        watchdog.start()
        try:
            first = next(requests, None)
            if first is None or not first.HasField("header"):
                raise errors.InvalidRequest("the first message of an Append has no header; send the header first")
            header = first.header
            expected = self.engine.append_limit_check(header.session_id, header.first_chunk, header.chunk_count)
            with contextlib.ExitStack() as stack:
                if header.HasField("shared"):
                    if header.shared.bytes != expected or first.payload:
                        raise errors.InvalidRequest(
                            f"shared.bytes is {header.shared.bytes}, with {len(first.payload)} bytes of payload beside "
                            f"it; {header.chunk_count} chunks of this session take {expected} bytes in one of the two"
                        )
                    shared = header.shared
                    payload = stack.enter_context(self.landing.borrow(shared.client_id, shared.offset, shared.bytes))
                    if next(requests, None) is not None:
                        raise errors.InvalidRequest("an Append from shared memory is one message; another one came")
                else:
                    stack.enter_context(self._inflight(expected))
                    payload = _gathered(first.payload, requests, header.chunk_count, expected)
                watchdog.cancel()
                if not context.is_active():
                    raise grpc.RpcError
                count = self.engine.append(
                    header.session_id, header.first_chunk, header.chunk_count, payload, header.token_ids
                )
        finally:
            watchdog.cancel()
        return kvd_pb2.AppendResponse(chunk_count=count)

    @_answers
    def Fetch(self, request: kvd_pb2.FetchRequest, context: grpc.ServicerContext) -> bytes:
        """Returns the serialized FetchResponse: see `_fetch_response`."""
        start = time.perf_counter()
        record_bytes = self.engine.record_bytes(request.session_id)
        keys = self._keys(request.keys)
        size = len(keys) * record_bytes
        if size > self.settings.fetch_bytes_max:
            raise errors.LimitExceeded(
                f"{len(keys)} records are {size} bytes; one Fetch may have {self.settings.fetch_bytes_max}: split it"
            )
        if not len(keys):
            return b""
        payload = None
        if request.HasField("shared"):
            shared = request.shared
            if shared.bytes < size:
                raise errors.InvalidRequest(
                    f"the shared range has {shared.bytes} bytes; {len(keys)} records take {size}"
                )
            with self.landing.borrow(shared.client_id, shared.offset, size) as destination:
                if not context.is_active():  # given up while it waited: the range may have another use by now
                    raise grpc.RpcError
                fetched = self.engine.fetch(request.session_id, keys, destination)
        else:
            if size > self.settings.message_bytes_max:
                raise errors.LimitExceeded(
                    f"{len(keys)} records are {size} bytes; a message may have {self.settings.message_bytes_max}: "
                    "split the call, or use shared memory"
                )
            destination = self._buffer(size)
            fetched = self.engine.fetch(request.session_id, keys, destination)
            payload = destination
        if self.observe_fetch is not None:
            self.observe_fetch(time.perf_counter() - start)
        return _fetch_response(payload, fetched)

    @_answers
    def Flush(self, request: kvd_pb2.FlushRequest, context: grpc.ServicerContext) -> kvd_pb2.FlushResponse:
        return kvd_pb2.FlushResponse(durable_chunk_count=self.engine.flush(request.session_id))

    @_answers
    def PutSummaries(
        self, request: kvd_pb2.PutSummariesRequest, context: grpc.ServicerContext
    ) -> kvd_pb2.PutSummariesResponse:
        if len(request.payload) > self.settings.message_bytes_max:
            raise errors.LimitExceeded(
                f"the payload has {len(request.payload)} bytes; a message may have {self.settings.message_bytes_max}: "
                "put fewer chunks in one call"
            )
        self.engine.put_summaries(
            request.session_id, request.kind, request.first_chunk, request.chunk_count, request.payload
        )
        return kvd_pb2.PutSummariesResponse()

    @_answers
    def GetSummaries(
        self, request: kvd_pb2.GetSummariesRequest, context: grpc.ServicerContext
    ) -> kvd_pb2.GetSummariesResponse:
        count, payload = self.engine.get_summaries(
            request.session_id,
            request.kind,
            request.first_chunk,
            request.chunk_count,
            self.settings.message_bytes_max,
        )
        return kvd_pb2.GetSummariesResponse(chunk_count=count, payload=payload)

    @_answers
    def Close(self, request: kvd_pb2.CloseRequest, context: grpc.ServicerContext) -> kvd_pb2.CloseResponse:
        self.engine.close(request.session_id)
        return kvd_pb2.CloseResponse()

    @_answers
    def Delete(self, request: kvd_pb2.DeleteRequest, context: grpc.ServicerContext) -> kvd_pb2.DeleteResponse:
        self.engine.delete(request.session_id)
        return kvd_pb2.DeleteResponse()

    @_answers
    def List(self, request: kvd_pb2.ListRequest, context: grpc.ServicerContext) -> kvd_pb2.ListResponse:
        response = kvd_pb2.ListResponse()
        size = 0
        for info in sorted(self.engine.list(), key=lambda info: info.session_id):
            if info.session_id <= request.after_session_id:
                continue
            message = _session_message(info)
            size += message.ByteSize() + 16  # tag and length
            if response.sessions and size > self.settings.message_bytes_max:
                response.more = True
                break
            response.sessions.append(message)
        return response

    @_answers
    def Stat(self, request: kvd_pb2.StatRequest, context: grpc.ServicerContext) -> kvd_pb2.StatResponse:
        response = kvd_pb2.StatResponse(
            version=__version__,
            uptime_s=time.monotonic() - self.started,
            attached_clients=len(self.landing),
            **asdict(self.engine.stats()),
        )
        if request.session_id:
            info = self.engine.info(request.session_id)
            response.session.CopyFrom(_session_message(info))
            chunk_bytes = 4 * info.geometry.chunk_tokens
            start = request.first_chunk * chunk_bytes
            room = max(chunk_bytes, self.settings.message_bytes_max // chunk_bytes * chunk_bytes)
            response.session.token_ids = info.token_ids[start : start + room]
        return response

    def _keys(self, packed: bytes) -> npt.NDArray[np.void]:
        if len(packed) % KEY_DTYPE.itemsize:
            raise errors.InvalidRequest(f"keys has {len(packed)} bytes, not a multiple of {KEY_DTYPE.itemsize}")
        count = len(packed) // KEY_DTYPE.itemsize
        if count > self.settings.fetch_keys_max:
            raise errors.LimitExceeded(
                f"{count} keys; one Fetch may have {self.settings.fetch_keys_max}: split the call"
            )
        return np.frombuffer(packed, KEY_DTYPE)

    def _buffer(self, size: int) -> U8:
        """This thread's buffer: its pages are there already, and one call at a time uses it."""
        if getattr(self._thread, "buffer", None) is None or self._thread.buffer.size < size:
            self._thread.buffer = aligned_buffer(max(size, min(self.settings.message_bytes_max, 4 << 20)))
        buffer: U8 = self._thread.buffer
        return buffer[:size]

    @contextlib.contextmanager
    def _inflight(self, size: int) -> Iterator[None]:
        limit = self.settings.inflight_bytes_max
        with self._inflight_lock:
            if self._inflight_bytes + size > limit:
                raise errors.LimitExceeded(
                    f"{self._inflight_bytes} bytes of appends are on their way and this one has {size}; together they "
                    f"may have {limit}: repeat the call later, or send less in one"
                )
            self._inflight_bytes += size
        try:
            yield
        finally:
            with self._inflight_lock:
                self._inflight_bytes -= size


def _gathered(first: bytes, rest: Iterator[kvd_pb2.AppendRequest], chunk_count: int, expected: int) -> U8:
    """The parts of an Append in one buffer. Raises: InvalidRequest once they are too long, or at the end too short."""
    buffer = aligned_buffer(expected)
    received = 0
    part = first
    while True:
        end = received + len(part)
        if end > expected:
            raise errors.InvalidRequest(
                f"the payload has {end} bytes or more; {chunk_count} chunks of this session take {expected}"
            )
        buffer[received:end] = np.frombuffer(part, np.uint8)
        received = end
        message = next(rest, None)
        if message is None:
            break
        if message.HasField("header"):
            raise errors.InvalidRequest("a second header in one Append; send the parts with payload only")
        part = message.payload
    if received != expected:
        raise errors.InvalidRequest(
            f"the payload has {received} bytes; {chunk_count} chunks of this session take {expected}"
        )
    return buffer


def _fetch_response(payload: U8 | None, fetched: Fetched) -> bytes:
    """The bytes of a FetchResponse, with one copy of the payload.

    Protobuf would copy it three times, the last time into a buffer that grows by doubling: 1.3 ms for 4 MiB on a quiet
    machine, 20 ms on a busy one.
    """
    rest = kvd_pb2.FetchResponse(
        statuses=b"" if fetched.statuses is None else fetched.statuses.tobytes(),
        ram_records=fetched.ram_records,
        nvme_records=fetched.nvme_records,
    ).SerializeToString()
    if payload is None:
        return rest
    # Field 1, length-delimited. Fields of a message may come in any order.
    return b"".join((b"\x0a", _varint(payload.size), payload.data, rest))


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _geometry(message: kvd_pb2.Geometry) -> Geometry:
    return Geometry(**{field.name: getattr(message, field.name) for field in message.DESCRIPTOR.fields})


def _geometry_message(geometry: Geometry) -> kvd_pb2.Geometry:
    return kvd_pb2.Geometry(**asdict(geometry))


def _session_message(info: SessionInfo) -> kvd_pb2.SessionInfo:
    return kvd_pb2.SessionInfo(
        session_id=info.session_id,
        name=info.name,
        geometry=_geometry_message(info.geometry),
        chunk_count=info.chunk_count,
        durable_chunk_count=info.durable_chunk_count,
        damaged_records=info.damaged_records,
        temporary=info.temporary,
    )
