"""How a call that went wrong is answered, whatever it came by: a status, its meaning, and one sentence.

A typed error becomes its status; anything else INTERNAL with the traceback in the log, and the daemon goes on.
"""

from __future__ import annotations

from dataclasses import dataclass

import grpc
from structlog.typing import FilteringBoundLogger

from hga_kvd import errors
from hga_kvd.config import KIB
from hga_kvd.landing import NotAttached


class SharingRefused(errors.KvdError):
    """Shared memory is for clients that came through the daemon's unix socket."""


class GivenUp(Exception):
    """The caller went away while the call waited for its range: it is not made, the range may have another use."""


# The only place where an error of ours becomes a status of gRPC.
STATUS: dict[type[errors.KvdError], grpc.StatusCode] = {
    errors.InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    errors.SessionNotFound: grpc.StatusCode.NOT_FOUND,
    errors.GeometryMismatch: grpc.StatusCode.FAILED_PRECONDITION,
    errors.AppendOutOfOrder: grpc.StatusCode.FAILED_PRECONDITION,
    errors.StaleEpoch: grpc.StatusCode.FAILED_PRECONDITION,
    errors.KeyOutOfRange: grpc.StatusCode.OUT_OF_RANGE,
    errors.LimitExceeded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.StorageFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.NotDurable: grpc.StatusCode.FAILED_PRECONDITION,
    errors.WriteFailed: grpc.StatusCode.DATA_LOSS,
    NotAttached: grpc.StatusCode.UNAVAILABLE,
    SharingRefused: grpc.StatusCode.UNIMPLEMENTED,
}
# A status travels in HTTP/2 headers, of which peers take 8 KiB; bytes outside ASCII take three there.
SENTENCE_BYTES_MAX = 2 * KIB


@dataclass(frozen=True)
class Refusal:
    """meaning: the name of the error's class where it says more than the code; else empty."""

    code: grpc.StatusCode
    meaning: str
    sentence: str


def refusal(error: Exception, call: str, peer: str, log: FilteringBoundLogger) -> Refusal:
    """What to answer to this call, and what the log is to know."""
    if isinstance(error, tuple(STATUS)):
        kind = next(kind for kind in type(error).__mro__ if kind in STATUS)
        answer = Refusal(STATUS[kind], kind.__name__, _shortened(str(error)))
    elif isinstance(error, (GivenUp, grpc.RpcError)):  # the latter from a request stream: the client is gone
        log.debug("stream broken", call=call, peer=peer)
        answer = Refusal(grpc.StatusCode.CANCELLED, "", "the stream broke; nothing was stored")
    elif isinstance(error, MemoryError):
        log.error("out of memory", call=call)
        sentence = "the daemon has no memory for this call; send smaller ones"
        answer = Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "LimitExceeded", sentence)
    elif isinstance(error, OSError):
        log.error("device error", call=call, error=str(error))
        sentence = f"the device answered {error.strerror or error}; repeat the call"
        answer = Refusal(grpc.StatusCode.UNAVAILABLE, "", sentence)
    else:
        log.error("fault", call=call, exc_info=error)
        sentence = f"the daemon failed in {call} ({type(error).__name__}); its log has the details"
        answer = Refusal(grpc.StatusCode.INTERNAL, "", sentence)
    log.debug("refused", call=call, code=answer.code.name, sentence=answer.sentence)
    return answer


def _shortened(sentence: str) -> str:
    encoded = sentence.encode(errors="replace")
    if len(encoded) <= SENTENCE_BYTES_MAX:
        return sentence
    return encoded[:SENTENCE_BYTES_MAX].decode(errors="ignore") + "..."
