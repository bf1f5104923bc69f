"""The gRPC face of the engine: what the .proto promises, and nothing more.

Each method checks the shape of its message, calls the engine once, and turns the answer into a message. It holds no
state of its own but the payload bytes on their way in. Whatever goes wrong leaves through `_answers`: a typed error
becomes its status, anything else INTERNAL with the traceback in the log, and the daemon goes on.
The fast lane (lane.py) is the other face; calls with payload in shared memory are `Calls`, for both.

Payloads in shared memory are borrowed from the landing for the length of the engine's call, and an Append in parts is
gathered in one private buffer; the engine sees nothing of a stream that does not end well.
"""

# ruff: noqa: N802 - methods have the names of the .proto

from __future__ import annotations

import contextlib
import functools
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, TypeVar

import grpc
import numpy as np
import numpy.typing as npt
from hga_kvd_proto import ERROR_KEY
from hga_kvd_proto import lane as layout
from hga_kvd_proto.v1 import kvd_pb2, kvd_pb2_grpc
from structlog.typing import FilteringBoundLogger

from hga_kvd import __version__, errors
from hga_kvd.answers import SessionInfo
from hga_kvd.calls import Calls
from hga_kvd.config import KIB, Settings
from hga_kvd.engine import Engine
from hga_kvd.handover import Handover
from hga_kvd.landing import Landing, NotAttached
from hga_kvd.lanes import Lanes
from hga_kvd.memory import aligned_buffer
from hga_kvd.messages import (
    client_of,
    fetch_response,
    gathered,
    geometry_message,
    geometry_of,
    range_of,
    session_message,
)
from hga_kvd.refusals import SharingRefused, refusal

U8 = npt.NDArray[np.uint8]
# Smaller answers are not counted among the bytes on their way; a connection has STREAMS_MAX of them at most.
UNCOUNTED_BYTES_MAX = 64 * KIB
Method = TypeVar("Method", bound=Callable[..., Any])


def _answers(method: Method) -> Method:
    """Gives every way out of an RPC method its status."""
    name = method.__name__

    @functools.wraps(method)
    def call(self: KvdService, request: Any, context: grpc.ServicerContext) -> Any:
        try:
            made = method(self, request, context)
            self._count_answer(made, context)
            return made
        except Exception as error:
            answer = refusal(error, name, context.peer(), self.log)
        if answer.meaning:
            context.set_trailing_metadata(((ERROR_KEY, answer.meaning),))
        return context.abort(answer.code, answer.sentence)

    return call  # type: ignore[return-value]


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
        observe_wait: Callable[[str, float], None] | None = None,
    ) -> None:
        self.engine = engine
        self.landing = landing
        self.handover = handover
        self.settings = settings
        self.log = log
        self.calls = Calls(engine, landing, settings, observe_fetch, observe_wait)
        self.lanes = Lanes(self.calls, settings.clients_max, log)
        self.started = time.monotonic()
        self.instance = secrets.randbits(64)
        self._inflight_bytes = 0
        # Streams that are slow to come must not hold all threads: one in four is never theirs.
        self._streams_max = max(1, settings.rpc_threads * 3 // 4)
        self._streams = threading.Semaphore(self._streams_max)
        self._inflight_lock = threading.Lock()
        self._thread = threading.local()

    def watch_clients(self, handover: Handover) -> None:
        """Runs the handover until it is stopped, and lets go of what belonged to clients that are gone."""
        for client_id in handover.serve():
            self.lanes.end(client_id)
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
        lane = self.lanes.open(region.client_id) if request.lane else ()
        token = self.handover.offer(region.client_id, (descriptor, *lane))
        self.log.info("client attached", region_bytes=region.bytes, huge_pages=region.huge_pages, lane=bool(lane))
        return kvd_pb2.AttachResponse(
            client_id=region.client_id,
            region_bytes=region.bytes,
            handover_socket=self.handover.path.name,
            token=token,
            huge_pages=region.huge_pages,
            lane_version=layout.VERSION if lane else 0,
        )

    @_answers
    def Open(self, request: kvd_pb2.OpenRequest, context: grpc.ServicerContext) -> kvd_pb2.OpenResponse:
        geometry = geometry_of(request.geometry) if request.HasField("geometry") else None
        return self._opened(
            request.client_id,
            lambda owner: self.engine.open(
                request.name,
                geometry,
                request.create,
                owner,
                tenant=request.tenant,
                token_ids=request.token_ids,
                ttl_s=request.ttl_s,
            ),
        )

    @_answers
    def Fork(self, request: kvd_pb2.ForkRequest, context: grpc.ServicerContext) -> kvd_pb2.OpenResponse:
        return self._opened(
            request.client_id,
            lambda owner: self.engine.fork(request.session_id, request.epoch, request.chunk_count, request.name, owner),
        )

    def _opened(self, owner: int, make: Callable[[int], SessionInfo]) -> kvd_pb2.OpenResponse:
        if owner and owner not in self.landing:
            raise NotAttached(f"client {owner} is not attached; call Attach again, then open")
        info = make(owner)
        if owner and info.temporary and owner not in self.landing:
            # The client went while its session was made: nobody else would ever delete it.
            with contextlib.suppress(errors.SessionNotFound):
                self.engine.close(info.session_id)
            raise NotAttached(f"client {owner} went away; attach again, then open")
        return kvd_pb2.OpenResponse(
            session_id=info.session_id,
            name=info.name,
            geometry=geometry_message(info.geometry),
            chunk_count=info.chunk_count,
            durable_chunk_count=info.durable_chunk_count,
            created=info.created,
            message_bytes_max=self.settings.message_bytes_max,
            fetch_keys_max=self.settings.fetch_keys_max,
            epoch=info.epoch,
        )

    @_answers
    def Truncate(self, request: kvd_pb2.TruncateRequest, context: grpc.ServicerContext) -> kvd_pb2.TruncateResponse:
        info = self.engine.truncate(request.session_id, request.epoch, request.chunk_count)
        return kvd_pb2.TruncateResponse(epoch=info.epoch, chunk_count=info.chunk_count)

    @_answers
    def Park(self, request: kvd_pb2.ParkRequest, context: grpc.ServicerContext) -> kvd_pb2.ParkResponse:
        self.engine.park(request.session_id)
        return kvd_pb2.ParkResponse()

    @_answers
    def Pin(self, request: kvd_pb2.PinRequest, context: grpc.ServicerContext) -> kvd_pb2.PinResponse:
        self.engine.pin(request.session_id, request.pinned)
        return kvd_pb2.PinResponse()

    @_answers
    def Verify(self, request: kvd_pb2.VerifyRequest, context: grpc.ServicerContext) -> kvd_pb2.VerifyResponse:
        found = self.engine.verify(request.session_id)
        shown = found.damaged[: self.settings.message_bytes_max // found.damaged.itemsize - 1]
        return kvd_pb2.VerifyResponse(
            checked=found.record_count, damaged=len(found.damaged), damaged_keys=shown.tobytes()
        )

    @_answers
    def Append(
        self, requests: Iterator[kvd_pb2.AppendRequest], context: grpc.ServicerContext
    ) -> kvd_pb2.AppendResponse:
        with self._arriving(context) as arrived:
            first = next(requests, None)
            if first is None or not first.HasField("header"):
                raise errors.InvalidRequest("the first message of an Append has no header; send the header first")
            header = first.header
            place = (header.session_id, header.first_chunk, header.chunk_count)
            expected = self.engine.append_limit_check(*place, header.epoch)
            if header.HasField("shared"):
                if first.payload or next(requests, None) is not None:
                    raise errors.InvalidRequest(
                        "an Append from shared memory is one message without payload; send the bytes in one of the two"
                    )
                arrived()
                count = self.calls.append(
                    *place, header.token_ids, range_of(header.shared), context.is_active, header.epoch
                )
            else:
                with self._inflight(expected):
                    payload = gathered(first.payload, requests, header.chunk_count, expected)
                    arrived()
                    count = self.calls.append_in_turn(
                        *place, client_of(context), payload, header.token_ids, context.is_active, header.epoch
                    )
        return kvd_pb2.AppendResponse(chunk_count=count)

    @contextlib.contextmanager
    def _arriving(self, context: grpc.ServicerContext) -> Iterator[Callable[[], None]]:
        """While a stream comes, which may stall: one of so many, and cancelled after a while. Call what this yields when it
        is there."""
        if not self._streams.acquire(blocking=False):
            raise errors.LimitExceeded(
                f"{self._streams_max} Append streams are on their way, three in four of rpc_threads: append again later, or "
                "use shared memory, which is one message"
            )
        watchdog = threading.Timer(self.settings.append_stream_s_max, context.cancel)
        watchdog.daemon = True
        watchdog.start()
        with contextlib.ExitStack() as stack:
            stack.callback(self._streams.release)
            stack.callback(watchdog.cancel)
            yield stack.close

    @_answers
    def Fetch(self, request: kvd_pb2.FetchRequest, context: grpc.ServicerContext) -> bytes:
        """Returns the serialized FetchResponse: see `fetch_response`."""
        if request.HasField("shared"):
            fetched = self.calls.fetch(
                request.session_id,
                request.keys,
                range_of(request.shared),
                context.is_active,
                request.epoch,
                request.deadline_us,
                request.once,
            )
            return fetch_response(None, fetched)
        start = time.perf_counter()
        keys, size = self.calls.sized_keys(request.session_id, request.keys)
        if not size:
            return b""
        if size > self.settings.message_bytes_max:
            raise errors.LimitExceeded(
                f"{len(keys)} records are {size} bytes; a message may have {self.settings.message_bytes_max}: "
                "split the call, or use shared memory"
            )
        payload = self._buffer(size)
        end = start + request.deadline_us * 1e-6 if request.deadline_us else None
        fetched = self.calls.fetch_in_turns(
            request.session_id,
            client_of(context),
            keys,
            payload,
            context.is_active,
            request.epoch,
            start,
            end,
            request.once,
        )
        return fetch_response(payload, fetched)

    @_answers
    def Prefetch(self, request: kvd_pb2.PrefetchRequest, context: grpc.ServicerContext) -> kvd_pb2.PrefetchResponse:
        self.calls.prefetch(request.session_id, request.keys, request.epoch)
        return kvd_pb2.PrefetchResponse()

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
        with self.calls.turns.turn(self.engine.tenant(request.session_id), client_of(context), len(request.payload)):
            self.engine.put_summaries(
                request.session_id,
                request.kind,
                request.first_chunk,
                request.chunk_count,
                request.payload,
                request.epoch,
            )
        return kvd_pb2.PutSummariesResponse()

    @_answers
    def GetSummaries(
        self, request: kvd_pb2.GetSummariesRequest, context: grpc.ServicerContext
    ) -> kvd_pb2.GetSummariesResponse:
        asked = request.session_id, request.kind, request.first_chunk, request.chunk_count
        if request.HasField("shared"):
            count, size = self.calls.summaries(*asked, range_of(request.shared), context.is_active, request.epoch)
            return kvd_pb2.GetSummariesResponse(chunk_count=count, payload_bytes=size)
        bytes_max = self.settings.message_bytes_max  # more or less what it will be
        with self.calls.turns.turn(self.engine.tenant(request.session_id), client_of(context), bytes_max):
            count, payload = self.engine.get_summaries(*asked, bytes_max, request.epoch)
        return kvd_pb2.GetSummariesResponse(chunk_count=count, payload=payload, payload_bytes=len(payload))

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
            message = session_message(info)
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
            instance=self.instance,
            attached_clients=len(self.landing),
            **asdict(self.engine.stats()),
        )
        if request.session_id:
            info = self.engine.info(request.session_id)
            response.session.CopyFrom(session_message(info))
            chunk_bytes = 4 * info.geometry.chunk_tokens
            start = request.first_chunk * chunk_bytes
            room = max(chunk_bytes, self.settings.message_bytes_max // chunk_bytes * chunk_bytes)
            response.session.token_ids = info.token_ids[start : start + room]
            for kind, has in self.engine.summary_kinds(request.session_id).items():
                response.summary_kinds.add(kind=kind, chunks=np.packbits(has, bitorder="little").tobytes())
        return response

    def _buffer(self, size: int) -> U8:
        """This thread's buffer: its pages are there already, and one call at a time uses it."""
        if getattr(self._thread, "buffer", None) is None or self._thread.buffer.size < size:
            self._thread.buffer = aligned_buffer(max(size, min(self.settings.message_bytes_max, 4 << 20)))
        buffer: U8 = self._thread.buffer
        return buffer[:size]

    def _count_answer(self, made: Any, context: grpc.ServicerContext) -> None:
        """A large answer is on its way until the call has ended: a client that asks and does not read holds it here."""
        size = len(made) if isinstance(made, bytes) else made.ByteSize()
        if size > UNCOUNTED_BYTES_MAX:
            self._begin(size)
            if not context.add_callback(lambda: self._end(size)):
                self._end(size)

    @contextlib.contextmanager
    def _inflight(self, size: int) -> Iterator[None]:
        self._begin(size)
        try:
            yield
        finally:
            self._end(size)

    def _begin(self, size: int) -> None:
        limit = self.settings.inflight_bytes_max
        with self._inflight_lock:
            if self._inflight_bytes + size > limit:
                raise errors.LimitExceeded(
                    f"{self._inflight_bytes} bytes of appends and answers are on their way and this one has {size}; "
                    f"together they may have {limit}: repeat the call later, or send or ask less in one"
                )
            self._inflight_bytes += size

    def _end(self, size: int) -> None:
        with self._inflight_lock:
            self._inflight_bytes -= size
