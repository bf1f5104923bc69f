"""Profile `mixed`: decode steps alone, and beside a bulk append or a bulk read of another client and of another tenant.

After each fetch of the replay comes one of a few records that RAM has. What counts is the tail: `p99_over_alone` of a case
is its p99 over that of the same fetches without the load, in one run.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from hga_kvd_client.keys import extent_keys

from hga_kvd.bench.daemon import BenchFailed, Daemon
from hga_kvd.bench.decode import arena_bytes, trace_geometry, trace_misses
from hga_kvd.bench.meter import Case, Sample, Stage
from hga_kvd.bench.options import Options
from hga_kvd.bench.session import Stopwatch, filled_session

# Name, what the loader does, its tenant; the fetches that are measured are of tenant "".
LOADS = (
    ("alone", None, ""),
    ("beside a bulk append", "append", ""),
    ("beside a bulk read", "read", ""),
    ("beside another tenant's append", "append", "another"),
    ("beside another tenant's read", "read", "another"),
)
RAM_RECORDS = 8
STOP_S = 60


def mixed(daemon: Daemon, options: Options) -> Iterator[Stage | Case]:
    geometry, chunks = trace_geometry(options)
    misses = trace_misses(options)
    yield Stage(f"storing {chunks * geometry.chunk_bytes >> 20} MiB")
    daemon.restart(arena_bytes(geometry, chunks, options.arena))
    connection = daemon.connect()
    replayed: dict[str, list[Sample]] = {name: [] for name, *_ in LOADS}
    from_ram: dict[str, list[Sample]] = {name: [] for name, *_ in LOADS}
    with (
        filled_session(connection, geometry, chunks, "mixed") as stored,
        filled_session(connection, geometry, 1, "mixed-hot") as hot,
    ):
        few = extent_keys(geometry, 0, 0, 1)[:RAM_RECORDS]
        # Blocks of fetches in turns: each block runs once under each load, so all loads see the same fetches.
        fetches = misses.fetches
        repeats = min(options.repeats, len(fetches))
        for number, block in enumerate(np.array_split(np.arange(len(fetches)), repeats)):
            for place, (name, load, tenant) in enumerate(LOADS):
                yield Stage(f"decode {name}, {number + 1} of {repeats}", (number + place / len(LOADS)) / repeats)
                with _beside(daemon, load, tenant):
                    watches = Stopwatch(daemon.pid), Stopwatch(daemon.pid)
                    for row in block:
                        stored.fetch(watches[0], fetches[row])
                        hot.fetch(watches[1], few)
                    for watch, samples in zip(watches, (replayed, from_ram), strict=True):
                        g = geometry.record_bytes
                        samples[name].append(watch.sample(watch.records * g, watch.disk_records * g, None))
    connection.disconnect()
    yield from _over_alone("a layer's fetch", replayed)
    yield from _over_alone(f"{RAM_RECORDS} records of RAM", from_ram)


def _over_alone(what: str, samples: dict[str, list[Sample]]) -> Iterator[Case]:
    alone: Case | None = None
    for name, of_load in samples.items():
        case = Case("mixed", f"{what}, {name}", "fetch", "", of_load)
        alone = alone or case
        for quantile in (0.5, 0.99):
            case.parameters[f"p{100 * quantile:g}_over_alone"] = case.latency_s(quantile) / alone.latency_s(quantile)
        yield case


@contextmanager
def _beside(daemon: Daemon, load: str | None, tenant: str) -> Iterator[None]:
    """Another process loads the daemon meanwhile; it says when it has begun, and ends when its input does."""
    if load is None:
        yield
        return
    command = [sys.executable, "-m", "hga_kvd.bench.loader", daemon.target, load, tenant]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        if process.stdout.readline() != b"begun\n":
            raise BenchFailed(f"the bulk {load} did not begin")
        yield
    finally:
        process.stdin.close()
        try:
            code = process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise BenchFailed(f"the bulk {load} did not end") from None
        finally:
            process.stdout.close()
    if code:
        raise BenchFailed(f"the bulk {load} ended with {code}")
