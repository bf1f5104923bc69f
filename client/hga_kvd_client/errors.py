"""What a caller of this library can meet, one class a meaning. No torch and no gRPC in here.

Every instance carries one sentence: what was wrong, with the numbers, and what to do. Errors of the daemon carry the
daemon's own sentence. A wrong use of the library by its own code is an assertion, never one of these.
"""

from __future__ import annotations

from collections.abc import Sequence


class KvdError(Exception):
    """Base of all. Unless the class says otherwise, nothing was changed and the call may be made again."""


class InvalidRequest(KvdError):
    """The request is malformed: an impossible geometry, a tensor of the wrong shape, layers out of order."""


class SessionNotFound(KvdError):
    """No session has this id or name, or it was deleted."""


class SummariesNotFound(KvdError):
    """The session holds no summaries of this kind for a chunk that was asked for."""


class GeometryMismatch(KvdError):
    """The session exists with another geometry; the message names the fields that differ."""


class AppendOutOfOrder(KvdError):
    """An append does not start at the session's end: another client appended, or a chunk is missing."""


class StaleEpoch(KvdError):
    """The session was truncated, by this client or another, since the epoch that the request carries. Open it again."""


class KeyOutOfRange(KvdError):
    """A fetch names a layer, KV head or group that the session does not have."""


class LimitExceeded(KvdError):
    """A call is larger than one call may be, or there are too many of something. Splitting or closing helps."""


class StorageFull(KvdError):
    """The daemon has no room for an append. Reads go on."""


class NotDurable(KvdError):
    """A flush was asked of a daemon that has no NVMe, or of a temporary session."""


class WriteFailed(KvdError):
    """A write or sync of acknowledged data failed in the daemon. The message names what is not durable."""


class DeadlineExceeded(KvdError):
    """No answer within deadline_s. The daemon may still do what was asked; asking again is safe."""


class Unavailable(KvdError):
    """No daemon answered for reconnect_s."""


class NotAttached(Unavailable):
    """The daemon does not know our shared memory: it was replaced. Connection attaches again by itself."""


class Refused(KvdError):
    """The daemon does not have this call, or does not let this user make it."""


class DaemonFault(KvdError):
    """The daemon failed in a way it does not name: a bug there. The message is what it said."""


class RecordsDamaged(KvdError):
    """Stored K/V of these tokens is damaged. It was not used; other tokens are fine."""

    def __init__(self, layer: int, kv_heads: Sequence[int], token_ranges: Sequence[tuple[int, int]]) -> None:
        self.layer = layer
        self.kv_heads = tuple(kv_heads)
        self.token_ranges = tuple(token_ranges)
        super().__init__(
            f"stored K/V of layer {layer}, KV heads {_listed(self.kv_heads)}, tokens {_ranges(self.token_ranges)} is "
            "damaged; it was not used: delete the session and prefill again"
        )


class SessionLost(KvdError):
    """The daemon was replaced and no longer holds these tokens, nor does this client: prefill again."""

    def __init__(self, name: str, token_ranges: Sequence[tuple[int, int]]) -> None:
        self.name = name
        self.token_ranges = tuple(token_ranges)
        what = f"session {name!r}" if name else "the temporary session"
        super().__init__(
            f"the daemon was restarted and {what} lost tokens {_ranges(self.token_ranges)}: open a session and prefill "
            "again" + ("" if name else "; a named session on a daemon with --nvme survives restarts")
        )


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(str(n) for n in numbers)


def _ranges(ranges: Sequence[tuple[int, int]]) -> str:
    return ", ".join(f"{first} to {end - 1}" for first, end in ranges)


# (call, code of the status) -> class; the call None stands for all others. proto/hga_kvd_proto/v1/kvd.proto says what
# each call answers.
_CLASSES: dict[tuple[str | None, str], type[KvdError]] = {
    (None, "INVALID_ARGUMENT"): InvalidRequest,
    (None, "NOT_FOUND"): SessionNotFound,
    ("Open", "FAILED_PRECONDITION"): GeometryMismatch,
    ("Append", "FAILED_PRECONDITION"): AppendOutOfOrder,
    ("Flush", "FAILED_PRECONDITION"): NotDurable,
    ("Park", "FAILED_PRECONDITION"): NotDurable,
    ("Fork", "FAILED_PRECONDITION"): StaleEpoch,
    ("Truncate", "FAILED_PRECONDITION"): StaleEpoch,
    ("Fetch", "FAILED_PRECONDITION"): StaleEpoch,
    (None, "FAILED_PRECONDITION"): InvalidRequest,
    (None, "OUT_OF_RANGE"): KeyOutOfRange,
    (None, "RESOURCE_EXHAUSTED"): LimitExceeded,
    ("Append", "RESOURCE_EXHAUSTED"): StorageFull,
    (None, "DATA_LOSS"): WriteFailed,
    (None, "DEADLINE_EXCEEDED"): DeadlineExceeded,
    ("Append", "CANCELLED"): DeadlineExceeded,
    (None, "UNAVAILABLE"): Unavailable,
    (None, "UNIMPLEMENTED"): Refused,
    (None, "PERMISSION_DENIED"): Refused,
    (None, "UNAUTHENTICATED"): Refused,
}


# What the daemon names itself, in the trailing metadata ERROR_KEY, where a status has two meanings.
_MEANINGS: dict[str, type[KvdError]] = {
    found.__name__: found
    for found in (
        InvalidRequest,
        SessionNotFound,
        GeometryMismatch,
        AppendOutOfOrder,
        StaleEpoch,
        KeyOutOfRange,
        LimitExceeded,
        StorageFull,
        NotDurable,
        WriteFailed,
        NotAttached,
    )
}


def from_status(call: str, code: str, sentence: str, meaning: str = "") -> KvdError:
    """The error of a gRPC status. call: name in the proto, `Fetch`; code: name of the status, `NOT_FOUND`."""
    found = _MEANINGS.get(meaning) or _CLASSES.get((call, code)) or _CLASSES.get((None, code))
    if found is None:
        return DaemonFault(f"{call} answered {code}: {sentence}")
    # GetSummaries answers NOT_FOUND for an unknown session too; only its sentence tells them apart.
    if call == "GetSummaries" and found is SessionNotFound and "summar" in sentence.lower():
        found = SummariesNotFound
    return found(sentence)
