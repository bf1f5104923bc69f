"""Link: one daemon behind a target. The channel to it, the region it gave us, and asking again while nobody answers.

- A call that got no answer because the daemon went away is made again, for up to reconnect_s, with growing pauses. Every
  call is safe to repeat.
- A region that the daemon may still read, because an append ended without an answer, is retired: never written again,
  kept open.
- `generation` grows when the daemon process behind the target was replaced.
"""

from __future__ import annotations

import logging
import math
import random
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import grpc
from hga_kvd_proto import CLIENT_KEY, ERROR_KEY
from hga_kvd_proto import lane as layout
from hga_kvd_proto.v1 import kvd_pb2, kvd_pb2_grpc

from hga_kvd_client import errors
from hga_kvd_client.lane import Completion, LaneClosed
from hga_kvd_client.region import Region, receive

logger = logging.getLogger("hga_kvd_client")
Answer = TypeVar("Answer")

MIB = 1 << 20
# First pause before a retry, and the longest; each is varied by half so that many clients do not come back at once.
BACKOFF_FIRST_S, BACKOFF_MAX_S = 0.05, 1.0
# Regions given up after calls without an answer, before payloads go as bytes: the daemon keeps each until the end.
RETIRED_REGIONS_MAX = 4
# A call whose request does not fit in the socket of a daemon that reads nothing outlives gRPC's own deadline; we leave it
# this much later.
_LARGE_CALLS = ("Append", "PutSummaries")
DEADLINE_GRACE_S = 0.2
_CODE_NAMES = {code.value[0]: code.name for code in grpc.StatusCode}
# Largest message we take or send: the largest message_bytes_max that a daemon can be given, and what goes with it.
MESSAGE_BYTES_MAX = 257 * MIB


class Link:
    """target: as `checked_target` gives it. share: payloads may go through shared memory; lane: and by the fast lane.

    One caller at a time.
    """

    def __init__(
        self, target: str, *, share: bool, lane: bool, region_bytes: int, deadline_s: float, reconnect_s: float
    ) -> None:
        """Raises: Unavailable when no daemon comes up within reconnect_s."""
        self.target = target
        self.region: Region | None = None
        self.generation = 0
        self._socket = Path(target.removeprefix("unix:")) if target.startswith("unix:") else None
        self._share = share and self._socket is not None
        self._want_lane = lane and layout.supported()
        self._region_bytes = region_bytes
        self._deadline_s = deadline_s
        self._reconnect_s = reconnect_s
        self._name = ((CLIENT_KEY, secrets.token_hex(8)),)
        self._retired: list[Region] = []
        self._instance: int | None = None
        self._closed = False
        self._channel: grpc.Channel | None = None
        self._stub: Any = None
        self.ready()

    def ready(self) -> None:
        """Returns when a daemon answers, and the region is the one it has. Raises: Unavailable."""
        self.repeat(lambda: None)

    def close(self) -> None:
        """The daemon forgets the regions and what lives by them. May be called twice."""
        self._closed = True
        self._forget_regions()
        self._hang_up()

    # One call.

    def ask(self, call: str, request: Any, read: Region | None = None) -> Any:
        """One call, once. read: the region that the daemon reads for it. Raises: KvdError."""
        if read is not None:
            read.busy = True
        if call in _LARGE_CALLS:
            return self.begin(call, request, read)()
        try:
            answer = getattr(self._stub, call)(request, timeout=self._deadline_s, metadata=self._name)
        except grpc.RpcError as error:
            raise self._refusal(call, error, read) from None
        if read is not None:
            read.busy = False
        return answer

    def begin(self, call: str, request: Any, read: Region | None = None) -> Callable[[], Any]:
        """One call, once, begun now: what is returned waits for its answer, and then raises as `ask`."""
        pending = getattr(self._stub, call).future(request, timeout=self._deadline_s, metadata=self._name)

        def finish() -> Any:
            try:
                answer = pending.result(timeout=self._deadline_s + DEADLINE_GRACE_S)
            except grpc.FutureTimeoutError:
                pending.cancel()
                raise errors.DeadlineExceeded(self._no_answer(call)) from None
            except grpc.RpcError as error:
                if error.code() is grpc.StatusCode.CANCELLED:  # by us: the channel was left for another
                    raise errors.Unavailable(f"{call} was under way when the daemon went away") from None
                raise self._refusal(call, error, read) from None
            if read is not None:
                read.busy = False
            return answer

        return finish

    def _refusal(self, call: str, error: grpc.RpcError, read: Region | None) -> errors.KvdError:
        code = error.code()
        found = (item.value for item in error.trailing_metadata() or () if item.key == ERROR_KEY)
        raised = errors.from_status(call, code.name, error.details() or "", str(next(found, "")))
        self._note_refusal(raised, read)
        return errors.DeadlineExceeded(self._no_answer(call)) if code is grpc.StatusCode.DEADLINE_EXCEEDED else raised

    def ask_lane(self, region: Region, call: str, verb: int, body: bytes, *fields: int) -> Completion:
        """One call on the region's lane, once. fields: as of Lane.call, from the session on.

        Raises: KvdError; Unavailable once when the lane was closed: repeat.
        """
        assert region.lane is not None
        read = region if verb == layout.APPEND else None
        if read is not None:
            read.busy = True
        try:
            answer = region.lane.call(self._deadline_s, verb, body, *fields)
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

    # Until it is answered.

    def call(self, name: str, request: Any) -> Any:
        """One call over gRPC. Raises: KvdError."""
        return self.repeat(lambda: self.ask(name, request))

    def repeat(self, attempt: Callable[[], Answer]) -> Answer:
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
        if self.region is not None and not self.region.daemon_lives():
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
            self.identify()
        self._prepare_region()

    def _hang_up(self) -> None:
        """Drops the channel, so that the next attempt has no back-off of gRPC's own to wait for."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def identify(self) -> None:
        """Compares the daemon's process with the one known."""
        answer = self.ask("Stat", kvd_pb2.StatRequest())
        if answer.instance != self._instance:
            if self._instance is not None:
                self.generation += 1
                self._forget_regions()
                logger.warning("the daemon at %s was replaced (now hga-kvd %s)", self.target, answer.version)
            self._instance = answer.instance

    # Regions.

    def _forget_regions(self) -> None:
        for region in [*self._retired, *([self.region] if self.region is not None else [])]:
            region.close()
        self._retired, self.region = [], None

    def _prepare_region(self) -> None:
        """Gives up a region that may still be read; gets one if there should be one."""
        if self.region is not None and self.region.busy:
            # Its handover socket stays open: temporary sessions live by it.
            self._retired.append(self.region)
            self.region = None
            if len(self._retired) >= RETIRED_REGIONS_MAX:
                self._use_bytes(f"{len(self._retired)} calls had no answer")
        if self.region is None and self._share:
            self.region = self._attach()

    def _attach(self) -> Region | None:
        """Raises: Unavailable. Any other refusal means payloads as bytes, for good."""
        assert self._socket is not None
        try:
            answer = self.ask("Attach", kvd_pb2.AttachRequest(region_bytes=self._region_bytes, lane=self._want_lane))
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
        region.huge_pages = answer.huge_pages
        way = "through the fast lane and" if region.lane else "through"
        logger.info("payloads go %s %d bytes of shared memory at %s", way, answer.region_bytes, self.target)
        return region

    def _use_bytes(self, reason: str) -> None:
        self._share = False
        logger.warning("payloads go as bytes to %s: %s", self.target, reason)

    @property
    def client_id(self) -> int:
        """The client that a temporary session is tied to; the oldest region's lives longest."""
        if self._retired:
            return self._retired[0].client_id
        return self.region.client_id if self.region is not None else 0
