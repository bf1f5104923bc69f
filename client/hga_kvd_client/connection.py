"""Connection: the calls of the wire contract, in terms of numpy. No torch in here.

What always holds:
- A call that the daemon did not answer because it went away is made again (link.py). Every call is safe to repeat: an
  append names its first chunk, and one that was done but not answered is recognised.
- Where the daemon and this process share a host, appends and fetches go through the fast lane (lane.py), else over gRPC
  with payload in shared memory, else as bytes in messages (payload.py).
- `generation` grows when the daemon process behind the target was replaced. Sessions it had not made durable are gone;
  Session looks at this number and puts right what it can.

One caller at a time: a Connection has one region and no lock. Sessions of one client take turns, as layers do.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Literal

import numpy as np
from hga_kvd_proto import lane as layout
from hga_kvd_proto.v1 import kvd_pb2

from hga_kvd_client import errors
from hga_kvd_client.ahead import in_order, slots
from hga_kvd_client.answers import Fetched, Opened, SessionInfo, opened, session_info
from hga_kvd_client.geometry import Bytes, Geometry, Keys
from hga_kvd_client.link import MIB, Link
from hga_kvd_client.payload import Limits, append_once, begin_fetch, begin_summaries, fetch_once, summaries_once
from hga_kvd_client.target import checked_target, default_target


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
        self.target = checked_target(target or default_target())
        share, lane = transport != "bytes", transport == "auto"
        self._link = Link(
            self.target,
            share=share,
            lane=lane,
            region_bytes=region_bytes,
            deadline_s=deadline_s,
            reconnect_s=reconnect_s,
        )
        # Waits until a device has read the records of the last fetch in place; called before they are written over.
        self.reader: Callable[[], None] | None = None
        self._limits: dict[int, Limits] = {}
        self._unanswered: dict[int, tuple[int, int]] = {}  # session -> chunks of an append that got no answer

    # What a caller may ask about the connection.

    @property
    def generation(self) -> int:
        """Grows when the daemon was replaced."""
        return self._link.generation

    @property
    def transport(self) -> str:
        """How payloads travel: "lane", "shared" or "bytes"."""
        if self._link.region is None:
            return "bytes"
        return "shared" if self._link.region.lane is None else "lane"

    @property
    def landing(self) -> Bytes | None:
        """The shared memory in which fetched records arrive, and appended chunks leave; None where they come as bytes.
        Another after a restart."""
        return self._link.region.memory if self._link.region is not None else None

    @property
    def huge_pages(self) -> bool:
        """Whether the landing lies in huge pages."""
        return self._link.region is not None and self._link.region.huge_pages

    def notice_replacement(self) -> bool:
        """Asks the daemon how long it has run. Returns whether it was replaced since that was last asked."""
        before = self._link.generation
        self._link.repeat(self._link.identify)
        return self._link.generation != before

    def disconnect(self) -> None:
        """Ends the connection; temporary sessions opened through shared memory go with it. May be called twice."""
        self._link.close()

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
                client_id=self._link.client_id,
                tenant=tenant,
                token_ids=token_ids,
                ttl_s=ttl_s,
            )
            if geometry is not None:
                request.geometry.CopyFrom(geometry.to_proto())
            return self._link.ask("Open", request)  # type: ignore[no-any-return]

        return self._opened(self._link.repeat(attempt))

    def fork(self, session_id: int, chunk_count: int = 0, name: str = "", epoch: int = 0) -> Opened:
        """A new session that shares the first chunk_count (0: all) chunks of this one; copied on write, at no cost.

        Raises: SessionNotFound, StaleEpoch, KeyOutOfRange, InvalidRequest when there is another session of this name.
        """

        def attempt() -> kvd_pb2.OpenResponse:
            request = kvd_pb2.ForkRequest(
                session_id=session_id, epoch=epoch, chunk_count=chunk_count, name=name, client_id=self._link.client_id
            )
            return self._link.ask("Fork", request)  # type: ignore[no-any-return]

        return self._opened(self._link.repeat(attempt))

    def truncate(self, session_id: int, chunk_count: int, epoch: int = 0) -> int:
        """Drops the chunks from chunk_count on. Returns the session's new epoch; requests of older ones are refused.

        Raises: SessionNotFound, StaleEpoch, KeyOutOfRange; WriteFailed: it is done, but a restart may undo it.
        """
        attempts = 0

        def attempt() -> int:
            nonlocal attempts
            attempts += 1
            request = kvd_pb2.TruncateRequest(session_id=session_id, epoch=epoch, chunk_count=chunk_count)
            return int(self._link.ask("Truncate", request).epoch)

        try:
            return self._link.repeat(attempt)
        except errors.StaleEpoch:
            # An earlier attempt may have done it and lost the answer.
            info = self.info(session_id)
            if attempts == 1 or (info.epoch, info.chunk_count) != (epoch + 1, chunk_count):
                raise
            return info.epoch

    def _opened(self, answer: kvd_pb2.OpenResponse) -> Opened:
        found = opened(answer)
        self._limits[found.session_id] = Limits(
            found.geometry, answer.message_bytes_max or MIB, answer.fetch_keys_max or 1
        )
        return found

    def close(self, session_id: int) -> None:
        """Says that this client is done with the session; a temporary one is deleted. Raises: SessionNotFound."""
        self._link.call("Close", kvd_pb2.CloseRequest(session_id=session_id))
        self._limits.pop(session_id, None)

    def delete(self, session_id: int) -> None:
        """Removes the session for every client. Raises: SessionNotFound."""
        self._link.call("Delete", kvd_pb2.DeleteRequest(session_id=session_id))
        self._limits.pop(session_id, None)

    def park(self, session_id: int) -> None:
        """Flushes the session and takes it out of the daemon's RAM. Raises: as flush."""
        self._link.call("Park", kvd_pb2.ParkRequest(session_id=session_id))

    def pin(self, session_id: int, pinned: bool = True) -> None:
        """A pinned session is never evicted and does not expire. Raises: SessionNotFound, WriteFailed."""
        self._link.call("Pin", kvd_pb2.PinRequest(session_id=session_id, pinned=pinned))

    def list(self) -> list[SessionInfo]:
        """All sessions, in the order of their ids."""
        found: list[SessionInfo] = []
        more = True
        while more:
            request = kvd_pb2.ListRequest(after_session_id=found[-1].session_id if found else 0)
            answer = self._link.call("List", request)
            found += [session_info(message, message.token_ids) for message in answer.sessions]
            more = answer.more and len(answer.sessions) > 0
        return found

    def stat(self) -> kvd_pb2.StatResponse:
        """Counters and sizes of the daemon, as in the proto."""
        answer: kvd_pb2.StatResponse = self._link.call("Stat", kvd_pb2.StatRequest())
        return answer

    def info(self, session_id: int) -> SessionInfo:
        """One session, with its token ids. Raises: SessionNotFound."""
        token_ids = b""
        while True:
            request = kvd_pb2.StatRequest(session_id=session_id)
            chunk_tokens = self._limits_of(session_id).geometry.chunk_tokens
            request.first_chunk = len(token_ids) // (4 * chunk_tokens)
            message = self._link.call("Stat", request).session
            token_ids += message.token_ids
            if not message.token_ids or len(token_ids) >= 4 * chunk_tokens * message.chunk_count:
                return session_info(message, token_ids)

    # Payload.

    def append_bytes_max(self) -> int:
        """Largest payload that `append_buffer` can give without a copy later on."""
        return self._link.region.append_part.nbytes if self._link.region else 4 * MIB

    def append_buffer(self, size: int) -> Bytes:
        """Where to build the payload of the next append: [size], in shared memory if it fits there."""
        self._link.ready()
        if self._link.region is not None and size <= self._link.region.append_part.nbytes:
            return self._link.region.append_part[:size]
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
            self._free_landing()
        link, limits = self._link, self._limits.get(session_id) or self._limits_of(session_id)
        region = link.region
        if region is not None and region.lane is not None and not region.busy:
            # A lane notices the end of its daemon itself; asking the socket first would cost half of a small fetch.
            try:
                return fetch_once(link, limits, session_id, keys, epoch, deadline_us)
            except errors.Unavailable:
                pass
        return link.repeat(lambda: fetch_once(link, limits, session_id, keys, epoch, deadline_us))

    def prefetch(self, session_id: int, keys: Keys, epoch: int = 0) -> None:
        """Asks the daemon to have these records in RAM soon; returns at once. Keys over the limit of one call are left
        out: the newest prefetch of a session replaces the one before.

        Raises: SessionNotFound, StaleEpoch, KeyOutOfRange, LimitExceeded.
        """
        most = min(self._limits_of(session_id).fetch_keys_max, layout.FETCH_KEYS_MAX)
        packed = keys[:most].tobytes()

        def attempt() -> None:
            region = self._link.region
            if region is not None and region.lane is not None:
                self._link.ask_lane(region, "Prefetch", layout.PREFETCH, packed, session_id, epoch)
            else:
                self._link.ask("Prefetch", kvd_pb2.PrefetchRequest(session_id=session_id, epoch=epoch, keys=packed))

        self._link.repeat(attempt)

    def flush(self, session_id: int) -> int:
        """Returns when everything acknowledged survives power loss, with the durable chunk count.

        Raises: NotDurable, WriteFailed, SessionNotFound.
        """
        answer = self._link.call("Flush", kvd_pb2.FlushRequest(session_id=session_id))
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
            self._link.call("PutSummaries", request)

    def get_summaries(
        self, session_id: int, kind: str, first_chunk: int, chunk_count: int, epoch: int = 0
    ) -> tuple[int, bytes]:
        """As many chunks from first_chunk on as fit in one answer: their count and bytes.

        Raises: SummariesNotFound, SessionNotFound, StaleEpoch.
        """
        self._free_landing()
        asked = session_id, kind, first_chunk, chunk_count, epoch
        count, found = self._link.repeat(partial(summaries_once, self._link, *asked))
        return count, found.tobytes()

    # Payload read ahead: each answer is gone with the next one. Between two of them no call may be made that brings payload.

    def ahead_bytes_max(self, session_id: int, item_bytes: int) -> int:
        """What one of several answers, read ahead, may have, where items of this size are never cut."""
        limits, slot = self._limits_of(session_id), slots(self._link, item_bytes)[0]
        return min(limits.message_bytes_max if slot is None else slot[1], limits.fetch_bytes_max)

    def summaries(
        self, session_id: int, wanted: Sequence[tuple[str, int, int]], item_bytes: int, epoch: int = 0
    ) -> Generator[tuple[int, Bytes], None, None]:
        """As get_summaries, for each of these (kind, first chunk, chunks). item_bytes: of a chunk's.

        Raises: as get_summaries, at the first that cannot be had.
        """
        self._free_landing()
        link = self._link
        return in_order(link, [partial(begin_summaries, link, session_id, *each, epoch) for each in wanted], item_bytes)

    def records(
        self, session_id: int, wanted: Sequence[Keys], item_bytes: int, epoch: int = 0, once: bool = True
    ) -> Generator[Fetched, None, None]:
        """As fetch, for each of these keys: of at most ahead_bytes_max, in items that are never cut. once: the caller keeps
        them, and the daemon's RAM need not."""
        self._free_landing()
        link, record_bytes = self._link, self._limits_of(session_id).geometry.record_bytes
        asks = [partial(begin_fetch, link, session_id, keys, record_bytes, epoch, once) for keys in wanted]
        return in_order(link, asks, item_bytes)

    def _free_landing(self) -> None:
        """Waits until nobody reads the last records in place."""
        if self.reader is not None:
            reader, self.reader = self.reader, None
            reader()

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
            return append_once(self._link, limits, header, payload)

        earlier = self._unanswered.get(session_id)
        self._unanswered[session_id] = chunks
        try:
            count = self._link.repeat(attempt)
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

    def _limits_of(self, session_id: int) -> Limits:
        limits = self._limits.get(session_id)
        if limits is None:
            raise errors.SessionNotFound(f"session {session_id} was not opened through this connection: open it first")
        return limits
