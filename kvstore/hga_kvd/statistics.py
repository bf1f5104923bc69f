"""What the daemon says about itself, of all parts of the engine at one moment."""

from __future__ import annotations

from hga_kvd import native
from hga_kvd.answers import EngineStats
from hga_kvd.parts import Parts
from hga_kvd.prefetcher import Prefetcher


def collect(parts: Parts, prefetcher: Prefetcher) -> EngineStats:
    residency, counters, writeout = parts.residency, parts.counters, parts.writeout
    nvme_bytes_max = writeout.segments.capacity_bytes() if writeout else 0
    with residency.lock:
        arena = residency.arena
        return EngineStats(
            io_engine=parts.disk.engine if parts.disk else "none",
            native=native.STATE,
            sessions=len(residency.sessions),
            ram_bytes_max=len(arena.region),
            ram_bytes_used=arena.used_bytes,
            ram_bytes_dirty=arena.dirty_bytes,
            nvme_bytes_max=nvme_bytes_max,
            nvme_bytes_used=writeout.segments.used_bytes() if writeout else 0,
            fetches=counters.fetches,
            fetched_ram_records=counters.fetched_ram_records,
            fetched_nvme_records=counters.fetched_nvme_records,
            fetched_ram_bytes=counters.fetched_ram_bytes,
            fetched_nvme_bytes=counters.fetched_nvme_bytes,
            appended_bytes=counters.appended_bytes,
            written_bytes=writeout.segments.written_bytes if writeout else 0,
            flushes=counters.flushes,
            damaged_records=counters.damaged_records,
            evicted_extents=residency.evicted_extents,
            chunks=sum(pool.table.in_use() for pool in residency.pools),
            shared_chunks=counters.shared_chunks,
            late_records=counters.late_records,
            prefetched_records=prefetcher.prefetched_records,
            prefetch_useful_records=prefetcher.ledger.useful,
            prefetch_wasted_records=prefetcher.ledger.wasted,
            evicted_sessions=counters.evicted_sessions + (writeout.evicted_sessions if writeout else 0),
            expired_sessions=counters.expired_sessions,
            nvme_bytes_live=sum(pool.table.disk_bytes() for pool in residency.pools),
            scrubbed_bytes=counters.scrubbed_bytes,
            scrub_damaged_records=counters.scrub_damaged_records,
            scrub_dropped_records=counters.scrub_dropped_records,
        )
