from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RecordStatus(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RECORD_STATUS_OK: _ClassVar[RecordStatus]
    RECORD_STATUS_DAMAGED: _ClassVar[RecordStatus]
    RECORD_STATUS_LATE: _ClassVar[RecordStatus]
RECORD_STATUS_OK: RecordStatus
RECORD_STATUS_DAMAGED: RecordStatus
RECORD_STATUS_LATE: RecordStatus

class Geometry(_message.Message):
    __slots__ = ("layers", "kv_heads", "head_dim", "dtype", "chunk_tokens", "group_tokens", "rope", "model_fingerprint")
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    CHUNK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    GROUP_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ROPE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    layers: int
    kv_heads: int
    head_dim: int
    dtype: str
    chunk_tokens: int
    group_tokens: int
    rope: str
    model_fingerprint: str
    def __init__(self, layers: _Optional[int] = ..., kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., dtype: _Optional[str] = ..., chunk_tokens: _Optional[int] = ..., group_tokens: _Optional[int] = ..., rope: _Optional[str] = ..., model_fingerprint: _Optional[str] = ...) -> None: ...

class SharedRange(_message.Message):
    __slots__ = ("client_id", "offset", "bytes")
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    client_id: int
    offset: int
    bytes: int
    def __init__(self, client_id: _Optional[int] = ..., offset: _Optional[int] = ..., bytes: _Optional[int] = ...) -> None: ...

class AttachRequest(_message.Message):
    __slots__ = ("region_bytes", "lane")
    REGION_BYTES_FIELD_NUMBER: _ClassVar[int]
    LANE_FIELD_NUMBER: _ClassVar[int]
    region_bytes: int
    lane: bool
    def __init__(self, region_bytes: _Optional[int] = ..., lane: bool = ...) -> None: ...

class AttachResponse(_message.Message):
    __slots__ = ("client_id", "region_bytes", "handover_socket", "token", "huge_pages", "lane_version")
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    REGION_BYTES_FIELD_NUMBER: _ClassVar[int]
    HANDOVER_SOCKET_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    HUGE_PAGES_FIELD_NUMBER: _ClassVar[int]
    LANE_VERSION_FIELD_NUMBER: _ClassVar[int]
    client_id: int
    region_bytes: int
    handover_socket: str
    token: bytes
    huge_pages: bool
    lane_version: int
    def __init__(self, client_id: _Optional[int] = ..., region_bytes: _Optional[int] = ..., handover_socket: _Optional[str] = ..., token: _Optional[bytes] = ..., huge_pages: bool = ..., lane_version: _Optional[int] = ...) -> None: ...

class OpenRequest(_message.Message):
    __slots__ = ("name", "geometry", "create", "client_id", "tenant", "token_ids", "ttl_s")
    NAME_FIELD_NUMBER: _ClassVar[int]
    GEOMETRY_FIELD_NUMBER: _ClassVar[int]
    CREATE_FIELD_NUMBER: _ClassVar[int]
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TTL_S_FIELD_NUMBER: _ClassVar[int]
    name: str
    geometry: Geometry
    create: bool
    client_id: int
    tenant: str
    token_ids: bytes
    ttl_s: int
    def __init__(self, name: _Optional[str] = ..., geometry: _Optional[_Union[Geometry, _Mapping]] = ..., create: bool = ..., client_id: _Optional[int] = ..., tenant: _Optional[str] = ..., token_ids: _Optional[bytes] = ..., ttl_s: _Optional[int] = ...) -> None: ...

class OpenResponse(_message.Message):
    __slots__ = ("session_id", "name", "geometry", "chunk_count", "durable_chunk_count", "created", "message_bytes_max", "fetch_keys_max", "epoch")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    GEOMETRY_FIELD_NUMBER: _ClassVar[int]
    CHUNK_COUNT_FIELD_NUMBER: _ClassVar[int]
    DURABLE_CHUNK_COUNT_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_BYTES_MAX_FIELD_NUMBER: _ClassVar[int]
    FETCH_KEYS_MAX_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    session_id: int
    name: str
    geometry: Geometry
    chunk_count: int
    durable_chunk_count: int
    created: bool
    message_bytes_max: int
    fetch_keys_max: int
    epoch: int
    def __init__(self, session_id: _Optional[int] = ..., name: _Optional[str] = ..., geometry: _Optional[_Union[Geometry, _Mapping]] = ..., chunk_count: _Optional[int] = ..., durable_chunk_count: _Optional[int] = ..., created: bool = ..., message_bytes_max: _Optional[int] = ..., fetch_keys_max: _Optional[int] = ..., epoch: _Optional[int] = ...) -> None: ...

class ForkRequest(_message.Message):
    __slots__ = ("session_id", "epoch", "chunk_count", "name", "client_id")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CHUNK_COUNT_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: int
    epoch: int
    chunk_count: int
    name: str
    client_id: int
    def __init__(self, session_id: _Optional[int] = ..., epoch: _Optional[int] = ..., chunk_count: _Optional[int] = ..., name: _Optional[str] = ..., client_id: _Optional[int] = ...) -> None: ...

class TruncateRequest(_message.Message):
    __slots__ = ("session_id", "epoch", "chunk_count")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CHUNK_COUNT_FIELD_NUMBER: _ClassVar[int]
    session_id: int
    epoch: int
    chunk_count: int
    def __init__(self, session_id: _Optional[int] = ..., epoch: _Optional[int] = ..., chunk_count: _Optional[int] = ...) -> None: ...

class TruncateResponse(_message.Message):
    __slots__ = ("epoch", "chunk_count")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CHUNK_COUNT_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    chunk_count: int
    def __init__(self, epoch: _Optional[int] = ..., chunk_count: _Optional[int] = ...) -> None: ...

class ParkRequest(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: int
    def __init__(self, session_id: _Optional[int] = ...) -> None: ...

class ParkResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PinRequest(_message.Message):
    __slots__ = ("session_id", "pinned")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    session_id: int
    pinned: bool
    def __init__(self, session_id: _Optional[int] = ..., pinned: bool = ...) -> None: ...

class PinResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AppendRequest(_message.Message):
    __slots__ = ("header", "payload")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    header: AppendHeader
    payload: bytes
    def __init__(self, header: _Optional[_Union[AppendHeader, _Mapping]] = ..., payload: _Optional[bytes] = ...) -> None: ...

class AppendHeader(_message.Message):
    __slots__ = ("session_id", "first_chunk", "chunk_count", "shared", "token_ids", "epoch")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_CHUNK_FIELD_NUMBER: _ClassVar[int]
    CHUNK_COUNT_FIELD_NUMBER: _ClassVar[int]
    SHARED_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    session_id: int
    first_chunk: int
    chunk_count: int
    shared: SharedRange
    token_ids: bytes
    epoch: int
    def __init__(self, session_id: _Optional[int] = ..., first_chunk: _Optional[int] = ..., chunk_count: _Optional[int] = ..., shared: _Optional[_Union[SharedRange, _Mapping]] = ..., token_ids: _Optional[bytes] = ..., epoch: _Optional[int] = ...) -> None: ...

class AppendResponse(_message.Message):
    __slots__ = ("chunk_count",)
    CHUNK_COUNT_FIELD_NUMBER: _ClassVar[int]
    chunk_count: int
    def __init__(self, chunk_count: _Optional[int] = ...) -> None: ...

class FetchRequest(_message.Message):
    __slots__ = ("session_id", "keys", "shared", "epoch", "deadline_us", "once")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    SHARED_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_US_FIELD_NUMBER: _ClassVar[int]
    ONCE_FIELD_NUMBER: _ClassVar[int]
    session_id: int
    keys: bytes
    shared: SharedRange
    epoch: int
    deadline_us: int
    once: bool
    def __init__(self, session_id: _Optional[int] = ..., keys: _Optional[bytes] = ..., shared: _Optional[_Union[SharedRange, _Mapping]] = ..., epoch: _Optional[int] = ..., deadline_us: _Optional[int] = ..., once: bool = ...) -> None: ...

class FetchResponse(_message.Message):
    __slots__ = ("payload", "statuses", "ram_records", "nvme_records")
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    STATUSES_FIELD_NUMBER: _ClassVar[int]
    RAM_RECORDS_FIELD_NUMBER: _ClassVar[int]
    NVME_RECORDS_FIELD_NUMBER: _ClassVar[int]
    payload: bytes
    statuses: bytes
    ram_records: int
    nvme_records: int
    def __init__(self, payload: _Optional[bytes] = ..., statuses: _Optional[bytes] = ..., ram_records: _Optional[int] = ..., nvme_records: _Optional[int] = ...) -> None: ...

class PrefetchRequest(_message.Message):
    __slots__ = ("session_id", "epoch", "keys")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    session_id: int
    epoch: int
    keys: bytes
    def __init__(self, session_id: _Optional[int] = ..., epoch: _Optional[int] = ..., keys: _Optional[bytes] = ...) -> None: ...

class PrefetchResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class FlushRequest(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: int
    def __init__(self, session_id: _Optional[int] = ...) -> None: ...

class FlushResponse(_message.Message):
    __slots__ = ("durable_chunk_count",)
    DURABLE_CHUNK_COUNT_FIELD_NUMBER: _ClassVar[int]
    durable_chunk_count: int
    def __init__(self, durable_chunk_count: _Optional[int] = ...) -> None: ...

class PutSummariesRequest(_message.Message):
    __slots__ = ("session_id", "kind", "first_chunk", "chunk_count", "payload", "epoch")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    FIRST_CHUNK_FIELD_NUMBER: _ClassVar[int]
    CHUNK_COUNT_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    session_id: int
    kind: str
    first_chunk: int
    chunk_count: int
    payload: bytes
    epoch: int
    def __init__(self, session_id: _Optional[int] = ..., kind: _Optional[str] = ..., first_chunk: _Optional[int] = ..., chunk_count: _Optional[int] = ..., payload: _Optional[bytes] = ..., epoch: _Optional[int] = ...) -> None: ...

class PutSummariesResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetSummariesRequest(_message.Message):
    __slots__ = ("session_id", "kind", "first_chunk", "chunk_count", "epoch", "shared")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    FIRST_CHUNK_FIELD_NUMBER: _ClassVar[int]
    CHUNK_COUNT_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SHARED_FIELD_NUMBER: _ClassVar[int]
    session_id: int
    kind: str
    first_chunk: int
    chunk_count: int
    epoch: int
    shared: SharedRange
    def __init__(self, session_id: _Optional[int] = ..., kind: _Optional[str] = ..., first_chunk: _Optional[int] = ..., chunk_count: _Optional[int] = ..., epoch: _Optional[int] = ..., shared: _Optional[_Union[SharedRange, _Mapping]] = ...) -> None: ...

class GetSummariesResponse(_message.Message):
    __slots__ = ("chunk_count", "payload", "payload_bytes")
    CHUNK_COUNT_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    chunk_count: int
    payload: bytes
    payload_bytes: int
    def __init__(self, chunk_count: _Optional[int] = ..., payload: _Optional[bytes] = ..., payload_bytes: _Optional[int] = ...) -> None: ...

class CloseRequest(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: int
    def __init__(self, session_id: _Optional[int] = ...) -> None: ...

class CloseResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DeleteRequest(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: int
    def __init__(self, session_id: _Optional[int] = ...) -> None: ...

class DeleteResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class VerifyRequest(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: int
    def __init__(self, session_id: _Optional[int] = ...) -> None: ...

class VerifyResponse(_message.Message):
    __slots__ = ("checked", "damaged", "damaged_keys")
    CHECKED_FIELD_NUMBER: _ClassVar[int]
    DAMAGED_FIELD_NUMBER: _ClassVar[int]
    DAMAGED_KEYS_FIELD_NUMBER: _ClassVar[int]
    checked: int
    damaged: int
    damaged_keys: bytes
    def __init__(self, checked: _Optional[int] = ..., damaged: _Optional[int] = ..., damaged_keys: _Optional[bytes] = ...) -> None: ...

class ListRequest(_message.Message):
    __slots__ = ("after_session_id",)
    AFTER_SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    after_session_id: int
    def __init__(self, after_session_id: _Optional[int] = ...) -> None: ...

class ListResponse(_message.Message):
    __slots__ = ("sessions", "more")
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    sessions: _containers.RepeatedCompositeFieldContainer[SessionInfo]
    more: bool
    def __init__(self, sessions: _Optional[_Iterable[_Union[SessionInfo, _Mapping]]] = ..., more: bool = ...) -> None: ...

class SessionInfo(_message.Message):
    __slots__ = ("session_id", "name", "geometry", "chunk_count", "durable_chunk_count", "damaged_records", "temporary", "token_ids", "epoch", "pinned", "parked", "tenant", "ttl_s")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    GEOMETRY_FIELD_NUMBER: _ClassVar[int]
    CHUNK_COUNT_FIELD_NUMBER: _ClassVar[int]
    DURABLE_CHUNK_COUNT_FIELD_NUMBER: _ClassVar[int]
    DAMAGED_RECORDS_FIELD_NUMBER: _ClassVar[int]
    TEMPORARY_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    PARKED_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    TTL_S_FIELD_NUMBER: _ClassVar[int]
    session_id: int
    name: str
    geometry: Geometry
    chunk_count: int
    durable_chunk_count: int
    damaged_records: int
    temporary: bool
    token_ids: bytes
    epoch: int
    pinned: bool
    parked: bool
    tenant: str
    ttl_s: int
    def __init__(self, session_id: _Optional[int] = ..., name: _Optional[str] = ..., geometry: _Optional[_Union[Geometry, _Mapping]] = ..., chunk_count: _Optional[int] = ..., durable_chunk_count: _Optional[int] = ..., damaged_records: _Optional[int] = ..., temporary: bool = ..., token_ids: _Optional[bytes] = ..., epoch: _Optional[int] = ..., pinned: bool = ..., parked: bool = ..., tenant: _Optional[str] = ..., ttl_s: _Optional[int] = ...) -> None: ...

class StatRequest(_message.Message):
    __slots__ = ("session_id", "first_chunk")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_CHUNK_FIELD_NUMBER: _ClassVar[int]
    session_id: int
    first_chunk: int
    def __init__(self, session_id: _Optional[int] = ..., first_chunk: _Optional[int] = ...) -> None: ...

class SummaryKind(_message.Message):
    __slots__ = ("kind", "chunks")
    KIND_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    kind: str
    chunks: bytes
    def __init__(self, kind: _Optional[str] = ..., chunks: _Optional[bytes] = ...) -> None: ...

class StatResponse(_message.Message):
    __slots__ = ("version", "uptime_s", "io_engine", "sessions", "ram_bytes_max", "ram_bytes_used", "ram_bytes_dirty", "nvme_bytes_max", "nvme_bytes_used", "fetches", "fetched_ram_records", "fetched_nvme_records", "fetched_ram_bytes", "fetched_nvme_bytes", "appended_bytes", "written_bytes", "flushes", "damaged_records", "evicted_extents", "attached_clients", "session", "chunks", "shared_chunks", "evicted_sessions", "expired_sessions", "nvme_bytes_live", "late_records", "prefetched_records", "prefetch_useful_records", "prefetch_wasted_records", "scrubbed_bytes", "scrub_damaged_records", "scrub_dropped_records", "summary_kinds", "instance", "native")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    IO_ENGINE_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    RAM_BYTES_MAX_FIELD_NUMBER: _ClassVar[int]
    RAM_BYTES_USED_FIELD_NUMBER: _ClassVar[int]
    RAM_BYTES_DIRTY_FIELD_NUMBER: _ClassVar[int]
    NVME_BYTES_MAX_FIELD_NUMBER: _ClassVar[int]
    NVME_BYTES_USED_FIELD_NUMBER: _ClassVar[int]
    FETCHES_FIELD_NUMBER: _ClassVar[int]
    FETCHED_RAM_RECORDS_FIELD_NUMBER: _ClassVar[int]
    FETCHED_NVME_RECORDS_FIELD_NUMBER: _ClassVar[int]
    FETCHED_RAM_BYTES_FIELD_NUMBER: _ClassVar[int]
    FETCHED_NVME_BYTES_FIELD_NUMBER: _ClassVar[int]
    APPENDED_BYTES_FIELD_NUMBER: _ClassVar[int]
    WRITTEN_BYTES_FIELD_NUMBER: _ClassVar[int]
    FLUSHES_FIELD_NUMBER: _ClassVar[int]
    DAMAGED_RECORDS_FIELD_NUMBER: _ClassVar[int]
    EVICTED_EXTENTS_FIELD_NUMBER: _ClassVar[int]
    ATTACHED_CLIENTS_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    SHARED_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    EVICTED_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    EXPIRED_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    NVME_BYTES_LIVE_FIELD_NUMBER: _ClassVar[int]
    LATE_RECORDS_FIELD_NUMBER: _ClassVar[int]
    PREFETCHED_RECORDS_FIELD_NUMBER: _ClassVar[int]
    PREFETCH_USEFUL_RECORDS_FIELD_NUMBER: _ClassVar[int]
    PREFETCH_WASTED_RECORDS_FIELD_NUMBER: _ClassVar[int]
    SCRUBBED_BYTES_FIELD_NUMBER: _ClassVar[int]
    SCRUB_DAMAGED_RECORDS_FIELD_NUMBER: _ClassVar[int]
    SCRUB_DROPPED_RECORDS_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_KINDS_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    NATIVE_FIELD_NUMBER: _ClassVar[int]
    version: str
    uptime_s: float
    io_engine: str
    sessions: int
    ram_bytes_max: int
    ram_bytes_used: int
    ram_bytes_dirty: int
    nvme_bytes_max: int
    nvme_bytes_used: int
    fetches: int
    fetched_ram_records: int
    fetched_nvme_records: int
    fetched_ram_bytes: int
    fetched_nvme_bytes: int
    appended_bytes: int
    written_bytes: int
    flushes: int
    damaged_records: int
    evicted_extents: int
    attached_clients: int
    session: SessionInfo
    chunks: int
    shared_chunks: int
    evicted_sessions: int
    expired_sessions: int
    nvme_bytes_live: int
    late_records: int
    prefetched_records: int
    prefetch_useful_records: int
    prefetch_wasted_records: int
    scrubbed_bytes: int
    scrub_damaged_records: int
    scrub_dropped_records: int
    summary_kinds: _containers.RepeatedCompositeFieldContainer[SummaryKind]
    instance: int
    native: str
    def __init__(self, version: _Optional[str] = ..., uptime_s: _Optional[float] = ..., io_engine: _Optional[str] = ..., sessions: _Optional[int] = ..., ram_bytes_max: _Optional[int] = ..., ram_bytes_used: _Optional[int] = ..., ram_bytes_dirty: _Optional[int] = ..., nvme_bytes_max: _Optional[int] = ..., nvme_bytes_used: _Optional[int] = ..., fetches: _Optional[int] = ..., fetched_ram_records: _Optional[int] = ..., fetched_nvme_records: _Optional[int] = ..., fetched_ram_bytes: _Optional[int] = ..., fetched_nvme_bytes: _Optional[int] = ..., appended_bytes: _Optional[int] = ..., written_bytes: _Optional[int] = ..., flushes: _Optional[int] = ..., damaged_records: _Optional[int] = ..., evicted_extents: _Optional[int] = ..., attached_clients: _Optional[int] = ..., session: _Optional[_Union[SessionInfo, _Mapping]] = ..., chunks: _Optional[int] = ..., shared_chunks: _Optional[int] = ..., evicted_sessions: _Optional[int] = ..., expired_sessions: _Optional[int] = ..., nvme_bytes_live: _Optional[int] = ..., late_records: _Optional[int] = ..., prefetched_records: _Optional[int] = ..., prefetch_useful_records: _Optional[int] = ..., prefetch_wasted_records: _Optional[int] = ..., scrubbed_bytes: _Optional[int] = ..., scrub_damaged_records: _Optional[int] = ..., scrub_dropped_records: _Optional[int] = ..., summary_kinds: _Optional[_Iterable[_Union[SummaryKind, _Mapping]]] = ..., instance: _Optional[int] = ..., native: _Optional[str] = ...) -> None: ...
