"""What the engine answers, as plain values."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hga_kvd.geometry import Geometry, Keys

U8 = npt.NDArray[np.uint8]

STATUS_DAMAGED, STATUS_LATE = 1, 2  # RecordStatus of the wire


@dataclass(frozen=True)
class Fetched:
    """statuses: u8 [keys], RecordStatus of the wire; None: all OK."""

    statuses: U8 | None
    ram_records: int
    nvme_records: int


@dataclass(frozen=True)
class SessionInfo:
    session_id: int
    name: str
    geometry: Geometry
    chunk_count: int
    durable_chunk_count: int
    damaged_records: int
    temporary: bool
    token_ids: bytes = b""
    created: bool = False
    epoch: int = 0
    tenant: str = ""
    ttl_s: int = 0
    pinned: bool = False
    parked: bool = False


@dataclass(frozen=True)
class Verified:
    """damaged: KEY_DTYPE, records that are lost or wrong."""

    record_count: int
    damaged: Keys


@dataclass(frozen=True)
class EngineStats:
    """As in StatResponse of kvd.proto."""

    io_engine: str
    native: str
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
    chunks: int
    shared_chunks: int
    late_records: int
    prefetched_records: int
    prefetch_useful_records: int
    prefetch_wasted_records: int
    evicted_sessions: int
    expired_sessions: int
    nvme_bytes_live: int
    scrubbed_bytes: int
    scrub_damaged_records: int
    scrub_dropped_records: int


@dataclass(eq=False)
class Counters:
    fetches: int = 0
    fetched_ram_records: int = 0
    fetched_nvme_records: int = 0
    fetched_ram_bytes: int = 0
    fetched_nvme_bytes: int = 0
    appended_bytes: int = 0
    flushes: int = 0
    damaged_records: int = 0
    shared_chunks: int = 0
    late_records: int = 0
    evicted_sessions: int = 0  # from RAM alone; the log counts its own
    expired_sessions: int = 0
    scrubbed_bytes: int = 0
    scrub_damaged_records: int = 0
    scrub_dropped_records: int = 0

    def count_hits(self, records: int, size: int) -> None:
        """A fetch, and what of it RAM had."""
        self.fetches += 1
        self.fetched_ram_records += records
        self.fetched_ram_bytes += size

    def count_read(self, records: int, size: int) -> None:
        """What disk had of it."""
        self.fetched_nvme_records += records
        self.fetched_nvme_bytes += size
