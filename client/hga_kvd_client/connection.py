"""Connection: the calls of the wire contract, in terms of numpy. No torch in here.

What always holds:
- A call that the daemon did not answer because it went away is made again, for up to reconnect_s, with growing pauses.
  Every call is safe to repeat: an append names its first chunk, and one that was done but not answered is recognised.
- Where the daemon and this process share a host, appends and fetches go through the fast lane (lane.py), else over gRPC
  with payload in shared memory, else as bytes in messages. An append
  that ends without an answer retires the region: the daemon may still read it, and would store what comes there next.
- `generation` grows when the daemon process behind the target was replaced. Sessions it had not made durable are gone;
  Session looks at this number and puts right what it can.

One caller at a time: a Connection has one region and no lock. Sessions of one client take turns, as layers do.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import grpc
import numpy as np
from hga_kvd_proto import lane as layout
from hga_kvd_proto.v1 import kvd_pb2, kvd_pb2_grpc

from hga_kvd_client import errors
from hga_kvd_client.geometry import Bytes, Geometry, Keys
from hga_kvd_client.lane import Completion, LaneClosed
from hga_kvd_client.region import Region, receive

logger = logging.getLogger("hga_kvd_client")
Answer = TypeVar("Answer")

MIB = 1 << 20
# First pause before a retry, and the longest; each is varied by half so that many clients do not come back at once.
BACKOFF_FIRST_S, BACKOFF_MAX_S = 0.05, 1.0
# Regions given up after calls without an answer, before payloads go as bytes: the daemon keeps each until the end.
RETIRED_REGIONS_MAX = 4
# A daemon whose start moved by more than this against our clock is another process.
START_TOLERANCE_S = 0.25
# A call whose request does not fit in the socket of a daemon that reads nothing outlives gRPC's own deadline; we leave it
# this much later.
_LARGE_CALLS = ("Append", "PutSummaries")
DEADLINE_GRACE_S = 0.2
_CODE_NAMES = {code.value[0]: code.name for code in grpc.StatusCode}
# Largest message we take or send: the largest message_bytes_max that a daemon can be given, and what goes with it.
MESSAGE_BYTES_MAX = 257 * MIB


def default_target() -> str:
    """HGA_KVD_TARGET, or else the unix socket where a daemon of this user listens by default."""
    target = os.environ.get("HGA_KVD_TARGET")
    if target:
        return target
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    base = Path(runtime) / "hga-kvd" if runtime else Path(f"/tmp/hga-kvd-{os.getuid()}")
    return f"unix:{base / 'kvd.sock'}"


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


@dataclass(frozen=True)
class Fetched:
    """records: [keys, record_bytes], a view that is valid until the next fetch. statuses: a byte a key, None: all are
    OK.

    Records whose status is not 0 have undefined bytes.
    """

    records: Bytes
    statuses: Bytes | None
    ram_records: int
    nvme_records: int


@dataclass
class _Limits:
    geometry: Geometry
    message_bytes_max: int
    fetch_keys_max: int


class Connection:
    def __init__(
        self,
        target: str | None = None,
        transport: Literal["auto", "shared", "bytes"] = "auto",
        region_bytes: int = 64 * MIB,
        deadline_s: float = 60.0,
        reconnect_s: float = 15.0,
    ) -> None:
        """Connects, waiting up to reconnect_s for a daemon to come up.

        target: unix:/path, /path or host:port; None: default_target(). transport: the best there is; "shared": without
        the fast lane; "bytes": without shared memory. deadline_s: for each call.
        Raises: Unavailable; InvalidRequest for a target or transport that cannot be.
        """
        if transport not in ("auto", "shared", "bytes"):
            raise errors.InvalidRequest(f"transport is {transport!r}; it must be 'auto', 'shared' or 'bytes'")
        self.target = _checked_target(target or default_target())
        self._socket = Path(self.target.removeprefix("unix:")) if self.target.startswith("unix:") else None
        self._deadline_s = deadline_s
        self._reconnect_s = reconnect_s
        self._region_bytes = region_bytes
        self._share = transport != "bytes" and self._socket is not None
        self._want_lane = transport == "auto" and layout.supported()
        self._region: Region | None = None
        # Waits until a device has read the records of the last fetch in place; called before they are written over.
        self.reader: Callable[[], None] | None = None
        self._retired: list[Region] = []
        self._limits: dict[int, _Limits] = {}
        self._unanswered: dict[int, tuple[int, int]] = {}  # session -> chunks of an append that got no answer
        self._started_at = -math.inf
        self._generation = 0
        self._closed = False
        self._channel: grpc.Channel | None = None
        self._stub: Any = None
        self._repeat(lambda: None)

    # What a caller may ask about the connection.

    @property
    def generation(self) -> int:
        """Grows when the daemon was replaced."""
        return self._generation

    @property
    def transport(self) -> str:
        """How payloads travel: "lane", "shared" or "bytes"."""
        if self._region is None:
            return "bytes"
        return "shared" if self._region.lane is None else "lane"

    @property
    def landing(self) -> Bytes | None:
        """The shared memory in which fetched records arrive; None where they come as bytes. Another after a restart."""
        return self._region.fetch_part if self._region is not None else None

    def notice_replacement(self) -> bool:
        """Asks the daemon how long it has run. Returns whether it was replaced since that was last asked."""
        before = self._generation
        self._repeat(self._identify)
        return self._generation != before

    def disconnect(self) -> None:
        """Ends the connection; temporary sessions opened through shared memory go with it. May be called twice."""
        self._closed = True
        self._forget_regions()
        self._hang_up()

    # Sessions.

    def open(
        self,
        name: str,
        geometry: Geometry | None,
        create: bool = True,
        *,
        tenant: str = "",
        token_ids: bytes = b"",
        ttl_s: int = 0,
    ) -> Opened:
        """Opens a session, or makes it if `create`. name "": a new temporary session.

        token_ids: uint32; a new session starts with the chunks of the longest prefix that the tenant has stored, and
        chunk_count of the answer says how many. ttl_s: a new session not used for so long is deleted; 0: never.
        Raises: SessionNotFound, GeometryMismatch, InvalidRequest, LimitExceeded.
        """

        def attempt() -> kvd_pb2.OpenResponse:
            request = kvd_pb2.OpenRequest(
                name=name,
                create=create,
                client_id=self._client_id(),
                tenant=tenant,
                token_ids=token_ids,
                ttl_s=ttl_s,
            )
            if geometry is not None:
                request.geometry.CopyFrom(geometry.to_proto())
            return self._ask("Open", request)  # type: ignore[no-any-return]

        return self._opened(self._repeat(attempt))

    def fork(self, session_id: int, chunk_count: int = 0, name: str = "", epoch: int = 0) -> Opened:
        """A new session that shares the first chunk_count (0: all) chunks of this one; copied on write, at no cost.

        Raises: SessionNotFound, StaleEpoch, KeyOutOfRange, InvalidRequest when there is another session of this name.
        """

        def attempt() -> kvd_pb2.OpenResponse:
            request = kvd_pb2.ForkRequest(
                session_id=session_id, epoch=epoch, chunk_count=chunk_count, name=name, client_id=self._client_id()
            )
            return self._ask("Fork", request)  # type: ignore[no-any-return]

        return self._opened(self._repeat(attempt))

    def truncate(self, session_id: int, chunk_count: int, epoch: int = 0) -> int:
        """Drops the chunks from chunk_count on. Returns the session's new epoch; requests of older ones are refused.

        Raises: SessionNotFound, StaleEpoch, KeyOutOfRange; WriteFailed: it is done, but a restart may undo it.
        """
        attempts = 0

        def attempt() -> int:
            nonlocal attempts
            attempts += 1
            request = kvd_pb2.TruncateRequest(session_id=session_id, epoch=epoch, chunk_count=chunk_count)
            return int(self._ask("Truncate", request).epoch)

        try:
            return self._repeat(attempt)
        except errors.StaleEpoch:
            # An earlier attempt may have done it and lost the answer.
            info = self.info(session_id)
            if attempts == 1 or (info.epoch, info.chunk_count) != (epoch + 1, chunk_count):
                raise
            return info.epoch

    def _opened(self, answer: kvd_pb2.OpenResponse) -> Opened:
        opened = Opened(
            session_id=answer.session_id,
            name=answer.name,
            geometry=Geometry.from_proto(answer.geometry),
            chunk_count=answer.chunk_count,
            durable_chunk_count=answer.durable_chunk_count,
            created=answer.created,
            epoch=answer.epoch,
        )
        self._limits[opened.session_id] = _Limits(
            opened.geometry, answer.message_bytes_max or MIB, answer.fetch_keys_max or 1
        )
        return opened

    def close(self, session_id: int) -> None:
        """Says that this client is done with the session; a temporary one is deleted. Raises: SessionNotFound."""
        self._repeat(lambda: self._ask("Close", kvd_pb2.CloseRequest(session_id=session_id)))
        self._limits.pop(session_id, None)

    def delete(self, session_id: int) -> None:
        """Removes the session for every client. Raises: SessionNotFound."""
        self._repeat(lambda: self._ask("Delete", kvd_pb2.DeleteRequest(session_id=session_id)))
        self._limits.pop(session_id, None)

    def park(self, session_id: int) -> None:
        """Flushes the session and takes it out of the daemon's RAM. Raises: as flush."""
        self._repeat(lambda: self._ask("Park", kvd_pb2.ParkRequest(session_id=session_id)))

    def pin(self, session_id: int, pinned: bool = True) -> None:
        """A pinned session is never evicted and does not expire. Raises: SessionNotFound, WriteFailed."""
        self._repeat(lambda: self._ask("Pin", kvd_pb2.PinRequest(session_id=session_id, pinned=pinned)))

    def list(self) -> list[SessionInfo]:
        """All sessions, in the order of their ids."""
        found: list[SessionInfo] = []
        more = True
        while more:
            request = kvd_pb2.ListRequest(after_session_id=found[-1].session_id if found else 0)
            answer = self._repeat(lambda request=request: self._ask("List", request))  # type: ignore[misc]
            found += [_session_info(message, message.token_ids) for message in answer.sessions]
            more = answer.more and len(answer.sessions) > 0
        return found

    def stat(self) -> kvd_pb2.StatResponse:
        """Counters and sizes of the daemon, as in the proto."""
        answer: kvd_pb2.StatResponse = self._repeat(lambda: self._ask("Stat", kvd_pb2.StatRequest()))
        return answer

    def info(self, session_id: int) -> SessionInfo:
        """One session, with its token ids. Raises: SessionNotFound."""
        token_ids = b""
        while True:
            request = kvd_pb2.StatRequest(session_id=session_id)
            chunk_tokens = self._limits_of(session_id).geometry.chunk_tokens
            request.first_chunk = len(token_ids) // (4 * chunk_tokens)
            message = self._repeat(lambda request=request: self._ask("Stat", request)).session  # type: ignore[misc]
            token_ids += message.token_ids
            if not message.token_ids or len(token_ids) >= 4 * chunk_tokens * message.chunk_count:
                return _session_info(message, token_ids)

    # Payload.

    def append_bytes_max(self) -> int:
        """Largest payload that `append_buffer` can give without a copy later on."""
        return self._region.append_part.nbytes if self._region else 4 * MIB

    def append_buffer(self, size: int) -> Bytes:
        """Where to build the payload of the next append: [size], in shared memory if it fits there."""
        self._repeat(lambda: None)
        if self._region is not None and size <= self._region.append_part.nbytes:
            return self._region.append_part[:size]
        return np.empty(size, np.uint8)

    def append(
        self,
        session_id: int,
        first_chunk: int,
        chunk_count: int,
        payload: Bytes,
        token_ids: bytes = b"",
        epoch: int = 0,
    ) -> int:
        """Appends closed chunks; returns the session's chunk count. A payload too large for one call goes in several.

        payload: [chunk_count * chunk_bytes], extents [chunk][layer][kv_head][group][K,V][token][head_dim], contiguous;
        no copy is made of one built in append_buffer. token_ids: uint32, chunk_count * chunk_tokens, or empty.
        Raises: AppendOutOfOrder, StaleEpoch, StorageFull, InvalidRequest, SessionNotFound. When several calls were
        needed, chunks of the ones before the refusal are appended.
        """
        geometry = self._limits_of(session_id).geometry
        assert payload.dtype == np.uint8
        assert payload.ndim == 1
        if payload.nbytes != chunk_count * geometry.chunk_bytes:
            raise errors.InvalidRequest(
                f"the payload has {payload.nbytes} bytes; {chunk_count} chunks of {geometry.chunk_bytes} bytes are "
                f"{chunk_count * geometry.chunk_bytes}"
            )
        ids_bytes = 4 * geometry.chunk_tokens
        part = max(1, self.append_bytes_max() // geometry.chunk_bytes)
        count = first_chunk
        for start in range(0, chunk_count, part):
            end = min(start + part, chunk_count)
            count = self._append_part(
                session_id,
                first_chunk + start,
                end - start,
                payload[start * geometry.chunk_bytes : end * geometry.chunk_bytes],
                token_ids[start * ids_bytes : end * ids_bytes],
                epoch,
            )
        return count

    def fetch(self, session_id: int, keys: Keys, epoch: int = 0, deadline_us: int = 0) -> Fetched:
        """Records of keys [n] (KEY_DTYPE), in their order. Split into several calls where one would be over a limit.

        deadline_us: of each call, in the daemon; records that it could not begin to read by then have status LATE. 0: none.

        Raises: SessionNotFound, StaleEpoch, KeyOutOfRange, DeadlineExceeded.
        """
        if self.reader is not None:
            reader, self.reader = self.reader, None
            reader()
        region = self._region
        if region is not None and region.lane is not None and not region.busy:
            # A lane notices the end of its daemon itself; asking the socket first would cost half of a small fetch.
            with contextlib.suppress(errors.Unavailable):
                return self._fetch_all(session_id, keys, epoch, deadline_us)
        return self._repeat(lambda: self._fetch_all(session_id, keys, epoch, deadline_us))

    def prefetch(self, session_id: int, keys: Keys, epoch: int = 0) -> None:
        """Asks the daemon to have these records in RAM soon; returns at once. Keys over the limit of one call are left
        out: the newest prefetch of a session replaces the one before.

        Raises: SessionNotFound, StaleEpoch, KeyOutOfRange, LimitExceeded.
        """
        most = min(self._limits_of(session_id).fetch_keys_max, layout.FETCH_KEYS_MAX)
        packed = keys[:most].tobytes()

        def attempt() -> None:
            region = self._region
            if region is not None and region.lane is not None:
                self._ask_lane(region, "Prefetch", layout.PREFETCH, packed, session_id, epoch=epoch)
            else:
                self._ask("Prefetch", kvd_pb2.PrefetchRequest(session_id=session_id, epoch=epoch, keys=packed))

        self._repeat(attempt)

    def flush(self, session_id: int) -> int:
        """Returns when everything acknowledged survives power loss, with the durable chunk count.

        Raises: NotDurable, WriteFailed, SessionNotFound.
        """
        answer = self._repeat(lambda: self._ask("Flush", kvd_pb2.FlushRequest(session_id=session_id)))
        return int(answer.durable_chunk_count)

    def put_summaries(
        self, session_id: int, kind: str, first_chunk: int, chunk_count: int, payload: bytes, epoch: int = 0
    ) -> None:
        """payload: the same number of bytes for each chunk.

        Raises: SessionNotFound, StaleEpoch, InvalidRequest, LimitExceeded.
        """
        chunk_bytes = len(payload) // chunk_count
        part = max(1, self._limits_of(session_id).message_bytes_max // max(1, chunk_bytes))
        for start in range(0, chunk_count, part):
            end = min(start + part, chunk_count)
            request = kvd_pb2.PutSummariesRequest(
                session_id=session_id,
                kind=kind,
                first_chunk=first_chunk + start,
                chunk_count=end - start,
                payload=payload[start * chunk_bytes : end * chunk_bytes],
                epoch=epoch,
            )
            self._repeat(lambda request=request: self._ask("PutSummaries", request))  # type: ignore[misc]

    def get_summaries(
        self, session_id: int, kind: str, first_chunk: int, chunk_count: int, epoch: int = 0
    ) -> tuple[int, bytes]:
        """As many chunks from first_chunk on as fit in one message: their count and bytes.

        Raises: SummariesNotFound, SessionNotFound, StaleEpoch.
        """
        request = kvd_pb2.GetSummariesRequest(
            session_id=session_id, kind=kind, first_chunk=first_chunk, chunk_count=chunk_count, epoch=epoch
        )
        answer = self._repeat(lambda: self._ask("GetSummaries", request))
        return int(answer.chunk_count), bytes(answer.payload)

    # One append, one fetch.

    def _append_part(
        self, session_id: int, first_chunk: int, chunk_count: int, payload: Bytes, token_ids: bytes, epoch: int
    ) -> int:
        limits = self._limits_of(session_id)
        header = kvd_pb2.AppendHeader(
            session_id=session_id, first_chunk=first_chunk, chunk_count=chunk_count, token_ids=token_ids, epoch=epoch
        )
        chunks = (first_chunk, first_chunk + chunk_count)
        attempts = 0

        def attempt() -> int:
            nonlocal attempts
            attempts += 1
            region = self._region
            if region is not None and payload.nbytes <= region.append_part.nbytes:
                offset = region.append_offset_of(payload)
                if offset is None:
                    region.append_part[: payload.nbytes] = payload
                    offset = region.append_offset
                if region.lane is not None and len(token_ids) <= layout.REQUEST_BODY_BYTES:
                    place = {"offset": offset, "size": payload.nbytes, "chunk_count": chunk_count}
                    answer = self._ask_lane(
                        region,
                        "Append",
                        layout.APPEND,
                        token_ids,
                        session_id,
                        first_chunk=first_chunk,
                        epoch=epoch,
                        **place,
                    )
                    return answer.chunk_count
                header.shared.CopyFrom(
                    kvd_pb2.SharedRange(client_id=region.client_id, offset=offset, bytes=payload.nbytes)
                )
                messages = iter((kvd_pb2.AppendRequest(header=header),))
            else:
                region = None
                header.ClearField("shared")
                messages = _in_parts(header, payload, limits.message_bytes_max)
            return int(self._ask("Append", messages, region).chunk_count)

        earlier = self._unanswered.get(session_id)
        self._unanswered[session_id] = chunks
        try:
            count = self._repeat(attempt)
        except errors.AppendOutOfOrder:
            # An append that got no answer may have been done: an attempt of this call, or of one that gave up.
            del self._unanswered[session_id]
            if not (attempts > 1 or earlier == chunks):
                raise
            count = self.info(session_id).chunk_count
            if count != chunks[1]:
                raise
            return count
        except (errors.DeadlineExceeded, errors.Unavailable):
            raise
        except errors.KvdError:
            del self._unanswered[session_id]
            raise
        del self._unanswered[session_id]
        return count

    def _fetch_all(self, session_id: int, keys: Keys, epoch: int, deadline_us: int) -> Fetched:
        """All parts of one fetch. Made again as a whole, because a new connection has a new region."""
        limits = self._limits_of(session_id)
        record_bytes = limits.geometry.record_bytes
        region = self._region
        if region is not None and record_bytes > region.fetch_part.nbytes:
            region = None
        room = region.fetch_part.nbytes if region is not None else limits.message_bytes_max
        most = max(1, min(limits.fetch_keys_max, room // record_bytes))
        if region is not None and region.lane is not None:
            most = min(most, layout.FETCH_KEYS_MAX)
        if region is not None and len(keys) <= most:
            records = region.fetch_part[: len(keys) * record_bytes].reshape(-1, record_bytes)
        else:
            records = np.empty((len(keys), record_bytes), np.uint8)

        statuses: Bytes | None = None
        ram_records = nvme_records = 0
        for start in range(0, len(keys), most):
            end = min(start + most, len(keys))
            packed = keys[start:end].tobytes()
            size = (end - start) * record_bytes
            answer: Any
            if region is not None and region.lane is not None:
                answer = self._ask_lane(
                    region, "Fetch", layout.FETCH, packed, session_id, size=size, epoch=epoch, deadline_us=deadline_us
                )
                found = answer.body
            else:
                request = kvd_pb2.FetchRequest(session_id=session_id, keys=packed, epoch=epoch, deadline_us=deadline_us)
                if region is not None:
                    request.shared.client_id = region.client_id
                    request.shared.bytes = size
                answer = self._ask("Fetch", request)
                found = answer.statuses
            if region is None or len(keys) > most:
                received = np.frombuffer(answer.payload, np.uint8) if region is None else region.fetch_part[:size]
                if received.nbytes != size:
                    raise errors.DaemonFault(f"Fetch answered {received.nbytes} bytes, {size} were asked for")
                records[start:end] = received.reshape(-1, record_bytes)
            if found:
                if statuses is None:
                    statuses = np.zeros(len(keys), np.uint8)
                statuses[start:end] = np.frombuffer(found, np.uint8)
            ram_records += answer.ram_records
            nvme_records += answer.nvme_records
        return Fetched(records, statuses, ram_records, nvme_records)

    # Calls, retries, regions.

    def _ask(self, call: str, request: Any, read: Region | None = None) -> Any:
        """One call, once. read: the region that the daemon reads for it. Raises: KvdError."""
        if read is not None:
            read.busy = True
        try:
            method = getattr(self._stub, call)
            if call in _LARGE_CALLS:
                pending = method.future(request, timeout=self._deadline_s)
                try:
                    answer = pending.result(timeout=self._deadline_s + DEADLINE_GRACE_S)
                except grpc.FutureTimeoutError:
                    pending.cancel()
                    raise errors.DeadlineExceeded(self._no_answer(call)) from None
            else:
                answer = method(request, timeout=self._deadline_s)
        except grpc.RpcError as error:
            code = error.code()
            found = (item.value for item in error.trailing_metadata() or () if item.key == errors.MEANING_KEY)
            raised = errors.from_status(call, code.name, error.details() or "", str(next(found, "")))
            self._note_refusal(raised, read)
            if code is grpc.StatusCode.DEADLINE_EXCEEDED:
                raised = errors.DeadlineExceeded(self._no_answer(call))
            raise raised from None
        if read is not None:
            read.busy = False
        return answer

    def _ask_lane(
        self, region: Region, call: str, verb: int, body: bytes, session_id: int, **fields: int
    ) -> Completion:
        """One call on the region's lane, once. Raises: KvdError; Unavailable once when the lane was closed: repeat."""
        assert region.lane is not None
        read = region if verb == layout.APPEND else None
        if read is not None:
            read.busy = True
        try:
            answer = region.lane.call(verb, body, session_id, timeout_s=self._deadline_s, **fields)
        except LaneClosed:
            logger.warning("the daemon closed the fast lane of %s; calls go over gRPC", self.target)
            region.leave_lane()
            if read is not None:
                read.busy = False
            raise errors.Unavailable("the fast lane was closed") from None
        except errors.DeadlineExceeded:
            raise errors.DeadlineExceeded(self._no_answer(call)) from None
        if answer.code:
            meaning, _, sentence = answer.body.decode(errors="replace").partition("\0")
            raised = errors.from_status(call, _CODE_NAMES.get(answer.code, "UNKNOWN"), sentence, meaning)
            self._note_refusal(raised, read)
            raise raised
        if read is not None:
            read.busy = False
        return answer

    def _no_answer(self, call: str) -> str:
        return f"{call} had no answer within {self._deadline_s:g} s (deadline_s): repeat it, or allow more time"

    def _note_refusal(self, raised: errors.KvdError, read: Region | None) -> None:
        """What a refusal means for our regions. read: the region that the daemon read for the call."""
        if isinstance(raised, errors.NotAttached):
            self._forget_regions()
        elif read is not None and not isinstance(raised, (errors.DeadlineExceeded, errors.Unavailable)):
            read.busy = False

    def _repeat(self, attempt: Callable[[], Answer]) -> Answer:
        """Makes the attempt; while no daemon answers, connects again and repeats it. Raises: KvdError."""
        give_up_at = math.inf
        pause = BACKOFF_FIRST_S
        while True:
            try:
                self._connect()
                return attempt()
            except errors.Unavailable as error:
                reason = str(error)
            now = time.monotonic()
            if give_up_at == math.inf:
                give_up_at = now + self._reconnect_s
                logger.warning("no answer from %s (%s); trying for %g s", self.target, reason, self._reconnect_s)
            wait = pause * random.uniform(0.5, 1.5)
            if now + wait > give_up_at:
                raise errors.Unavailable(
                    f"no daemon answered at {self.target} for {self._reconnect_s:g} s; start one with "
                    f"`hga-kvd --listen {self.target}`, or name another target (last reason: {reason})"
                )
            time.sleep(wait)
            pause = min(2 * pause, BACKOFF_MAX_S)
            self._hang_up()

    def _connect(self) -> None:
        """Makes sure that there is a channel, that we know who answers on it, and that our region is the daemon's."""
        if self._closed:
            raise errors.InvalidRequest("the connection was ended by disconnect(): connect again")
        if self._region is not None and not self._region.daemon_lives():
            self._forget_regions()
            self._hang_up()
        if self._channel is None:
            self._channel = grpc.insecure_channel(
                self.target,
                options=[
                    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
                    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
                    # Retries are ours: gRPC's own would repeat a call on a daemon that never gave us our region.
                    ("grpc.enable_retries", 0),
                    ("grpc.use_local_subchannel_pool", 1),
                ],
            )
            self._stub = kvd_pb2_grpc.KvdStub(self._channel)  # type: ignore[no-untyped-call]
            self._identify()
        self._prepare_region()

    def _hang_up(self) -> None:
        """Drops the channel, so that the next attempt has no back-off of gRPC's own to wait for."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def _identify(self) -> None:
        """Compares the daemon's start with the one known."""
        answer = self._ask("Stat", kvd_pb2.StatRequest())
        started_at = time.monotonic() - answer.uptime_s
        if abs(started_at - self._started_at) > START_TOLERANCE_S:
            if self._started_at != -math.inf:
                self._generation += 1
                self._forget_regions()
                logger.warning("the daemon at %s was replaced (now hga-kvd %s)", self.target, answer.version)
            self._started_at = started_at

    def _forget_regions(self) -> None:
        for region in [*self._retired, *([self._region] if self._region is not None else [])]:
            region.close()
        self._retired, self._region = [], None

    def _prepare_region(self) -> None:
        """Gives up a region that may still be read; gets one if there should be one."""
        if self._region is not None and self._region.busy:
            # Its handover socket stays open: temporary sessions live by it.
            self._retired.append(self._region)
            self._region = None
            if len(self._retired) >= RETIRED_REGIONS_MAX:
                self._use_bytes(f"{len(self._retired)} calls had no answer")
        if self._region is None and self._share:
            self._region = self._attach()

    def _attach(self) -> Region | None:
        """Raises: Unavailable. Any other refusal means payloads as bytes, for good."""
        assert self._socket is not None
        try:
            answer = self._ask("Attach", kvd_pb2.AttachRequest(region_bytes=self._region_bytes, lane=self._want_lane))
        except errors.Unavailable:
            raise
        except errors.KvdError as error:
            self._use_bytes(str(error))
            return None
        path = self._socket.parent / answer.handover_socket
        try:
            lane = answer.lane_version == layout.VERSION
            region = receive(path, answer.token, answer.client_id, answer.region_bytes, lane, self._deadline_s)
        except (ConnectionError, FileNotFoundError) as error:
            raise errors.Unavailable(f"{path} did not hand over the region: {error}") from None
        except (OSError, ValueError) as error:
            self._use_bytes(f"{path} did not hand over the region: {error}")
            return None
        way = "through the fast lane and" if region.lane else "through"
        logger.info("payloads go %s %d bytes of shared memory at %s", way, answer.region_bytes, self.target)
        return region

    def _use_bytes(self, reason: str) -> None:
        self._share = False
        logger.warning("payloads go as bytes to %s: %s", self.target, reason)

    def _client_id(self) -> int:
        """The client that a temporary session is tied to; the oldest region's lives longest."""
        if self._retired:
            return self._retired[0].client_id
        return self._region.client_id if self._region is not None else 0

    def _limits_of(self, session_id: int) -> _Limits:
        limits = self._limits.get(session_id)
        if limits is None:
            raise errors.SessionNotFound(f"session {session_id} was not opened through this connection: open it first")
        return limits


def _checked_target(target: str) -> str:
    if target.startswith("/"):
        return f"unix:{target}"
    if target.startswith("unix:"):
        return "unix:" + target.removeprefix("unix:").removeprefix("//")
    host, colon, port = target.rpartition(":")
    if not (colon and host and port.isdigit()):
        raise errors.InvalidRequest(f"target is {target!r}; it must be unix:/path, /path or host:port")
    return target


def _in_parts(header: kvd_pb2.AppendHeader, payload: Bytes, part_bytes: int) -> Iterator[kvd_pb2.AppendRequest]:
    yield kvd_pb2.AppendRequest(header=header)
    for start in range(0, payload.nbytes, part_bytes):
        yield kvd_pb2.AppendRequest(payload=payload[start : start + part_bytes].tobytes())


def _session_info(message: kvd_pb2.SessionInfo, token_ids: bytes) -> SessionInfo:
    return SessionInfo(
        session_id=message.session_id,
        name=message.name,
        geometry=Geometry.from_proto(message.geometry),
        chunk_count=message.chunk_count,
        durable_chunk_count=message.durable_chunk_count,
        damaged_records=message.damaged_records,
        temporary=message.temporary,
        token_ids=token_ids,
        epoch=message.epoch,
        pinned=message.pinned,
        parked=message.parked,
        tenant=message.tenant,
        ttl_s=message.ttl_s,
    )
