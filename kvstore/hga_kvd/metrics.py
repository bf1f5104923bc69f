"""Metrics for Prometheus. Counters are read from the engine at each scrape; only latencies are collected here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Gauge, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from hga_kvd import __version__
from hga_kvd.errors import StartRefused

if TYPE_CHECKING:
    from hga_kvd.answers import EngineStats

# A RAM hit takes tens of microseconds, a large read from a busy disk tens of milliseconds.
FETCH_BUCKETS_S = (*(base * 10**exponent for exponent in range(-5, 0) for base in (1, 2, 5)), 1.0, 5.0)

_GAUGES = {
    "sessions": "Sessions open or stored",
    "chunks": "Chunks stored, each counted once",
    "nvme_bytes_live": "Bytes of chunks and summaries in segments that a session has",
    "ram_bytes_max": "Size of the RAM arena",
    "ram_bytes_used": "Arena slots in use",
    "ram_bytes_dirty": "Acknowledged, not yet written to NVMe",
    "nvme_bytes_max": "Bytes that segments may take",
    "nvme_bytes_used": "Bytes taken by segments",
}
_COUNTERS = {
    "fetches": "Fetch calls",
    "fetched_ram_records": "Records served from the arena",
    "fetched_nvme_records": "Records read from NVMe",
    "fetched_ram_bytes": "Bytes served from the arena",
    "fetched_nvme_bytes": "Bytes of records read from NVMe",
    "late_records": "Records that missed the deadline of their fetch",
    "prefetched_records": "Records that prefetches brought into RAM",
    "prefetch_useful_records": "Prefetched records that were fetched",
    "prefetch_wasted_records": "Prefetched records given up before they were fetched",
    "appended_bytes": "K/V bytes acknowledged",
    "written_bytes": "Bytes written to NVMe, tables and padding included",
    "flushes": "Flush calls",
    "damaged_records": "Records found damaged",
    "evicted_extents": "Extents evicted from the arena",
    "evicted_sessions": "Sessions deleted because space was short",
    "expired_sessions": "Sessions deleted because their time was up",
    "scrubbed_bytes": "Bytes verified in the background",
    "scrub_damaged_records": "Records that scrub or Verify found damaged",
    "scrub_dropped_records": "Bad copies in the arena that were dropped and are read from NVMe again",
    "shared_chunks": "Chunks appended that were stored already",
}


class _EngineCollector(Collector):
    def __init__(self, stats: Callable[[], EngineStats], attached_clients: Callable[[], int]) -> None:
        self._stats = stats
        self._attached_clients = attached_clients

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        for name, text in _GAUGES.items():
            yield GaugeMetricFamily(f"hga_kvd_{name}", text, value=getattr(stats, name))
        for name, text in _COUNTERS.items():
            yield CounterMetricFamily(f"hga_kvd_{name}", text, value=getattr(stats, name))
        yield GaugeMetricFamily(
            "hga_kvd_attached_clients", "Clients with shared memory", value=self._attached_clients()
        )
        runs = {"version": __version__, "io_engine": stats.io_engine, "native": stats.native}
        yield InfoMetricFamily("hga_kvd", "The daemon", value=runs)


class Metrics:
    """The registry behind one HTTP address."""

    def __init__(self, stats: Callable[[], EngineStats], attached_clients: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(stats, attached_clients))
        self.fetch_seconds = Histogram(
            "hga_kvd_fetch_seconds",
            "Time of a Fetch in the daemon, without the transport",
            buckets=FETCH_BUCKETS_S,
            registry=self.registry,
        )

        self._wait_seconds = Histogram(
            "hga_kvd_wait_seconds",
            "Time that a call with payload waited for its turn",
            labelnames=("size",),
            buckets=FETCH_BUCKETS_S,
            registry=self.registry,
        )
        self._waiting_calls = Gauge(
            "hga_kvd_waiting_calls", "Calls that wait for their turn", labelnames=("size",), registry=self.registry
        )

    def watch_turns(self, waiting: Callable[[], dict[str, int]]) -> None:
        """waiting: how many calls wait, by size; asked at each scrape."""
        for size in waiting():
            self._waiting_calls.labels(size).set_function(lambda size=size: waiting()[size])  # type: ignore[misc]

    def observe_wait(self, size: str, seconds: float) -> None:
        self._wait_seconds.labels(size).observe(seconds)

    def serve(self, address: str) -> tuple[str, Callable[[], None]]:
        """Answers HTTP on HOST:PORT from a thread of its own. Returns the address, with the port that port 0 became, and
        what ends it. Raises StartRefused."""
        host, _, port = address.rpartition(":")
        try:
            server, thread = start_http_server(int(port), host.strip("[]"), self.registry)
        except OSError as error:
            raise StartRefused(f"cannot serve metrics on {address}: {error.strerror or error}") from error

        def stop() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        return f"{host}:{server.server_port}", stop
