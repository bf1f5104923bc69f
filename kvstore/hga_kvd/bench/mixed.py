"""Profile `mixed`: decode steps alone, beside a prefill that is appended, and beside a bulk read, by another process.

What counts is the tail: `p99_over_alone` of a case is its p99 over that of the same steps without the load, in one run.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from hga_kvd.bench.daemon import BenchFailed, Daemon
from hga_kvd.bench.decode import arena_bytes, trace_geometry
from hga_kvd.bench.meter import Case, Sample
from hga_kvd.bench.options import Options
from hga_kvd.bench.session import Stopwatch, filled_session
from hga_kvd.bench.trace import bank_misses

LOADS = {"alone": None, "beside a bulk append": "append", "beside a bulk read": "read"}
STOP_S = 60


def mixed(daemon: Daemon, options: Options) -> Iterator[str | Case]:
    geometry, chunks = trace_geometry(options)
    yield f"storing {chunks * geometry.chunk_bytes >> 20} MiB"
    misses = bank_misses(
        options.trace[:, :, : options.warm_up_steps + options.steps_max], options.bank_groups, options.warm_up_steps
    )
    daemon.restart(arena_bytes(geometry, chunks, options.arena))
    connection = daemon.connect()
    samples: dict[str, list[Sample]] = {name: [] for name in LOADS}
    with filled_session(connection, geometry, chunks, "mixed") as stored:
        # Blocks of fetches in turns: each block runs once under each load, so all loads see the same fetches.
        fetches = misses.fetches
        for number, block in enumerate(np.array_split(np.arange(len(fetches)), options.repeats)):
            for name, load in LOADS.items():
                yield f"decode {name}, {number + 1} of {options.repeats}"
                with _beside(daemon, load):
                    watch = Stopwatch(daemon.pid)
                    for row in block:
                        stored.fetch(watch, fetches[row])
                    g = geometry.record_bytes
                    samples[name].append(watch.sample(watch.records * g, watch.disk_records * g, None))
    connection.disconnect()
    alone: Case | None = None
    for name, of_load in samples.items():
        case = Case("mixed", f"a layer's fetch, {name}", "fetch", "", of_load)
        alone = alone or case
        for quantile in (0.5, 0.99):
            case.parameters[f"p{100 * quantile:g}_over_alone"] = case.latency_s(quantile) / alone.latency_s(quantile)
        yield case


@contextmanager
def _beside(daemon: Daemon, load: str | None) -> Iterator[None]:
    """Another process loads the daemon meanwhile; it says when it has begun, and ends when its input does."""
    if load is None:
        yield
        return
    command = [sys.executable, "-m", "hga_kvd.bench.loader", daemon.target, load]
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
