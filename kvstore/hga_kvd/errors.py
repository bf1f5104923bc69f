"""What can go wrong outside our own code, one class a meaning. Bugs of our own are assertions, never these.

Every instance carries one sentence: what was wrong, with the numbers, and what to do. `service.py` maps each class to a
gRPC status; nothing else depends on gRPC.
"""


class KvdError(Exception):
    """A request or a start that was refused. State is unchanged unless the class says otherwise."""


class InvalidRequest(KvdError):
    """The request is malformed: an impossible geometry, a payload of the wrong size, a bad name."""


class SessionNotFound(KvdError):
    """No session has this id or name, or it was deleted; also: no summaries of this kind for a chunk."""


class GeometryMismatch(KvdError):
    """The session exists with another geometry."""


class AppendOutOfOrder(KvdError):
    """An append does not start at the session's end."""


class StaleEpoch(KvdError):
    """The session was truncated since the client learned its epoch: what the request names may be other data now."""


class KeyOutOfRange(KvdError):
    """A fetch names a layer, KV head or group that the session does not have."""


class LimitExceeded(KvdError):
    """A call is larger than one call may be, or there are too many of something. Splitting or closing helps."""


class StorageFull(KvdError):
    """No RAM slot or no NVMe space for an append. Reads go on."""


class NotDurable(KvdError):
    """A durability barrier was asked of a daemon that has no NVMe."""


class WriteFailed(KvdError):
    """A write or sync of acknowledged data failed; its segment is sealed. The message names what is not durable."""


class StartRefused(KvdError):
    """The daemon cannot run on this directory or with these settings."""
