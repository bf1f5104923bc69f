"""Profile `burst`: random records, as many at once as a fetch has; from disk beside fio, from RAM beside a memcpy.

A read here is a run of neighbouring groups of one KV head, as routing likes to pick them: 32 KiB are four records of
8 KiB. Each fetch asks for other places, so nearly all of it comes from disk when the arena is a small part of the data.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator

import numpy as np
from hga_kvd_client.geometry import KEY_DTYPE, Geometry, Keys

from hga_kvd.bench.daemon import BenchFailed, Daemon
from hga_kvd.bench.meter import Case, Sample, Stage
from hga_kvd.bench.options import Options
from hga_kvd.bench.probes import RawFile, fio_gb_per_s
from hga_kvd.bench.session import APPEND_BYTES_MAX, Stopwatch, Stored, filled_session

HOT_BYTES_MAX = 256 << 20
ARENA_BYTES_MIN = 2 * APPEND_BYTES_MAX


def burst_geometry(read_bytes: int) -> tuple[Geometry, int]:
    """A geometry, and how many neighbouring groups a read of this size has in it."""
    head_dim = 64 if read_bytes < 8192 else 128
    geometry = Geometry(layers=8, kv_heads=4, head_dim=head_dim, dtype="bfloat16", model_fingerprint="bench")
    groups, rest = divmod(read_bytes, geometry.record_bytes)
    if rest or groups not in (1, 2, 4):
        raise BenchFailed(f"a read of {read_bytes} bytes cannot be: 4, 8, 16 or 32 KiB can")
    return geometry, groups


def check(options: Options) -> None:
    """Raises: BenchFailed when there can be no such reads, or not so many at once."""
    for read_bytes in options.reads:
        burst_geometry(read_bytes)
    most, size = max(options.depths) * max(options.reads), min(HOT_BYTES_MAX, options.size)
    if most > size:
        raise BenchFailed(
            f"{max(options.depths)} reads of {max(options.reads) >> 10} KiB at once are {most >> 20} MiB, more than the "
            f"{size >> 20} MiB of which they are a random part: give smaller --depths"
        )


def burst(daemon: Daemon, options: Options) -> Iterator[Stage | Case]:
    check(options)
    cases, measured = 2 * len(options.reads) * len(options.depths), 0
    for part in (_cold(daemon, options), _hot(daemon, options)):
        for told in part:
            measured += isinstance(told, Case)
            yield told if isinstance(told, Case) else Stage(told, measured / cases)


def _cold(daemon: Daemon, options: Options) -> Iterator[str | Case]:
    daemon.restart(max(ARENA_BYTES_MIN, options.size // 32))
    raw = None
    if daemon.place is not None:
        yield "writing what fio reads"
        raw = RawFile(daemon.place, options.size, options.queue_depth)
    connection = daemon.connect()
    by_geometry: dict[Geometry, list[tuple[int, int]]] = {}
    for read_bytes in options.reads:
        geometry, groups = burst_geometry(read_bytes)
        by_geometry.setdefault(geometry, []).append((read_bytes, groups))
    for geometry, reads in by_geometry.items():
        yield f"storing {options.size >> 20} MiB"
        with filled_session(connection, geometry, options.size // geometry.chunk_bytes, "cold") as stored:
            for read_bytes, groups in reads:
                for depth in options.depths:
                    yield f"{depth} x {read_bytes >> 10} KiB from disk"
                    samples = []
                    for _ in range(options.repeats):
                        reference = _disk_gb_per_s(raw, read_bytes, depth, options) if raw else None
                        samples.append(_sample(daemon, stored, groups, depth, options.seconds, reference, disk=True))
                    yield Case(
                        profile="burst",
                        case=f"{depth} x {read_bytes >> 10} KiB, disk",
                        call="fetch",
                        reference=("fio" if shutil.which("fio") else "the I/O engine alone") if raw else "",
                        samples=samples,
                        parameters={"read_bytes": read_bytes, "depth": depth, "from": "disk"},
                    )
    connection.disconnect()
    if raw is not None:
        raw.close()


def _hot(daemon: Daemon, options: Options) -> Iterator[str | Case]:
    size = min(HOT_BYTES_MAX, options.size)
    daemon.restart(2 * size + ARENA_BYTES_MIN)
    connection = daemon.connect()
    memory, copy = np.ones(size, np.uint8), np.ones(max(options.depths) * max(options.reads), np.uint8)
    for read_bytes in options.reads:
        geometry, groups = burst_geometry(read_bytes)
        with filled_session(connection, geometry, size // geometry.chunk_bytes, "hot") as stored:
            for depth in options.depths:
                yield f"{depth} x {read_bytes >> 10} KiB from RAM"
                samples = []
                for _ in range(options.repeats):
                    reference = _copy_gb_per_s(memory, copy[: depth * read_bytes], options.seconds / 4)
                    samples.append(_sample(daemon, stored, groups, depth, options.seconds, reference, disk=False))
                yield Case(
                    profile="burst",
                    case=f"{depth} x {read_bytes >> 10} KiB, RAM",
                    call="fetch",
                    reference="a memcpy",
                    samples=samples,
                    parameters={"read_bytes": read_bytes, "depth": depth, "from": "ram"},
                )
    connection.disconnect()


def random_runs(stored: Stored, count: int, groups: int) -> Keys:
    """`count` different aligned runs of `groups` neighbouring groups, one after another."""
    g = stored.geometry
    per_chunk = g.groups_per_chunk // groups
    shape = (stored.chunks, g.layers, g.kv_heads, per_chunk)
    chunk, layer, head, run = np.unravel_index(stored.chance.choice(np.prod(shape), count, replace=False), shape)
    keys = np.zeros((count, groups), KEY_DTYPE)
    keys["group"] = (chunk * g.groups_per_chunk + run * groups)[:, None] + np.arange(groups)
    keys["layer"], keys["kv_head"] = layer[:, None], head[:, None]
    return keys.reshape(-1)


def _sample(
    daemon: Daemon, stored: Stored, groups: int, depth: int, seconds: float, reference: float | None, disk: bool
) -> Sample:
    """reference: GB/s."""
    stored.fetch(Stopwatch(None), random_runs(stored, depth, groups))  # after a pause the first one is slow
    watch = Stopwatch(daemon.pid)
    end = time.monotonic() + 4 * seconds  # checking what came takes longer than fetching it, where RAM is fast
    while watch.total_s < seconds and time.monotonic() < end:
        stored.fetch(watch, random_runs(stored, depth, groups))
    record_bytes = stored.geometry.record_bytes
    size, disk_bytes = watch.records * record_bytes, watch.disk_records * record_bytes
    compared = disk_bytes if disk else size
    return watch.sample(size, disk_bytes, compared / reference / 1e9 if reference else None)


def _disk_gb_per_s(raw: RawFile, read_bytes: int, depth: int, options: Options) -> float:
    """What fio reads at this size and depth; without fio, what the I/O engine alone reads in batches of this depth."""
    in_flight = min(depth, options.queue_depth)
    speed = fio_gb_per_s(raw.path, "randread", raw.size, read_bytes, in_flight, options.seconds)
    if speed is not None:
        return speed
    chance, taken, calls = np.random.default_rng(), 0.0, 0
    while taken < options.seconds:
        offsets = chance.integers(0, raw.size // read_bytes, depth) * read_bytes
        taken += raw.read_s(offsets, np.full(depth, read_bytes))
        calls += 1
    return calls * depth * read_bytes / taken / 1e9


def _copy_gb_per_s(memory: np.ndarray, out: np.ndarray, seconds: float) -> float:
    """One memcpy after the other of so many bytes, each from another place than the last."""
    places = max(1, len(memory) // len(out))
    taken, calls = 0.0, 0
    while taken < seconds:
        start = (calls * 7919) % places * len(out)
        source = memory[start : start + len(out)]
        begun = time.perf_counter()
        np.copyto(out, source)
        taken += time.perf_counter() - begun
        calls += 1
    return calls * len(out) / taken / 1e9
