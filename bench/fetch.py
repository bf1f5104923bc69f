"""The data path through daemon and client, every target of docs/fastlane.md in one run, each case beside what bounds it.

Rounds of all cases take turns, so that a disk and cores that other people use disturb all alike; ratios are taken within a
round, medians over rounds are printed, with the lowest and highest. Bytes are compared outside the time. Records are 8 KiB
(dim 128, bfloat16); `32 KiB` is 4 neighbouring groups of one KV head. The arena of the disk cases holds a sixteenth of the
data, so nearly all comes from disk.

What is compared reads the same bytes in the same state, in short slices next to each other in time: the ratios are of
neighbours. All segments are read once before the first round: a host that caches gives what was read before up to four times
faster, and a bench that reads more and more of them would see its own progress. fio reads the store's own segments at
random places, by io_uring with O_DIRECT, with the daemon's depth, and streams; a fetch asks for 128 reads, and its client
asks for nothing until it has them all. `that asks in batches too` is fio told to do the same: 128 at once, and nothing new
before the last is there. Several clients, each with a fetch of 128 reads under way, stand beside fio with as many in flight.

fio's memory is of huge pages, and once its heap of 4 KiB pages. The client's landing has huge pages where the host set some
aside; which it had is in the result.
"""

from __future__ import annotations

import json
import mmap
import multiprocessing
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import grpc
import numpy as np
import results
import typer
from hga_kvd.bench.daemon import daemon_on
from hga_kvd.filedisk import FileDisk
from hga_kvd.uring import UringEngine
from hga_kvd_client.connection import Connection
from hga_kvd_client.geometry import KEY_DTYPE, Geometry
from hga_kvd_client.lane import End, best_end
from hga_kvd_proto import lane as layout
from hga_kvd_proto.v1 import kvd_pb2, kvd_pb2_grpc
from raw_io import ALIGNMENT, FIO, checksums_of, disk_speed, fetch_speed, fio_read
from rich.console import Console
from rich.table import Table

GEOMETRY = Geometry(layers=8, kv_heads=4, head_dim=128, dtype="bfloat16", model_fingerprint="bench")
RECORD = GEOMETRY.record_bytes
READS = 128
SMALL = 8
FOR_EVER_S = 60.0
GAP_US = 300  # what the model does for a layer, between two fetches of a decode step
RANDOM_FILES = " --file_service_type=random"
IN_BATCHES = " --iodepth_batch_submit={depth} --iodepth_batch_complete_min={depth} --iodepth_low=1"
SLICES = 3  # of a round: fio and we in turns
CLIENTS = (2, 4)
BUILD = results.ROOT / "build"
Values = dict[str, list[float]]


def fill(connection: Connection, chunks: int) -> tuple[int, np.ndarray]:
    """A named session of `chunks` chunks of random bytes, on disk. Returns its id and the bytes, [chunks, chunk_bytes]."""
    session_id = connection.open("bench", GEOMETRY).session_id
    data = np.random.default_rng(1).integers(0, 256, (chunks, GEOMETRY.chunk_bytes), np.uint8)
    for first in range(0, chunks, 8):
        part = data[first : first + 8]
        connection.append(session_id, first, len(part), part.reshape(-1))
        connection.flush(session_id)
    return session_id, data


def some_keys(chance: np.random.Generator, chunks: int, runs: int, groups: int) -> np.ndarray:
    """`runs` random runs of `groups` neighbouring groups, [runs * groups]."""
    g = GEOMETRY
    places = chance.choice(chunks * g.layers * g.kv_heads, runs, replace=False)
    chunk, layer, head = np.unravel_index(places, (chunks, g.layers, g.kv_heads))
    keys = np.zeros((runs, groups), KEY_DTYPE)
    first = chance.integers(0, g.groups_per_chunk - groups + 1, (runs, 1))
    keys["group"] = chunk[:, None] * g.groups_per_chunk + first + np.arange(groups)
    keys["layer"], keys["kv_head"] = layer[:, None], head[:, None]
    return keys.reshape(-1)


def fetched(connection: Connection, session_id: int, data: np.ndarray, keys: np.ndarray) -> tuple[float, int]:
    """Seconds of one fetch, and how many records came from disk. Raises when a byte is wrong."""
    g = GEOMETRY
    started = time.perf_counter()
    answer = connection.fetch(session_id, keys)
    took = time.perf_counter() - started
    chunk, group = np.divmod(keys["group"], g.groups_per_chunk)
    view = data.reshape(len(data), g.layers, g.kv_heads, g.groups_per_chunk, g.record_bytes)
    if answer.statuses is not None or not np.array_equal(
        answer.records, view[chunk, keys["layer"], keys["kv_head"], group]
    ):
        raise RuntimeError("wrong bytes")
    return took, answer.nvme_records


def fetch_rounds(
    connection: Connection, session_id: int, data: np.ndarray, rounds: int, seed: int, groups: int = 4
) -> tuple[float, float]:
    """GB/s over `rounds` fetches of 128 runs, and the share of records that came from disk."""
    chance = np.random.default_rng(seed)
    times = [fetched(connection, session_id, data, some_keys(chance, len(data), READS, groups)) for _ in range(rounds)]
    records = rounds * READS * groups
    return records * RECORD / sum(t for t, _ in times) / 1e9, sum(n for _, n in times) / records


def microseconds(call: Callable[[], object], count: int, gap_s: float = 0.0) -> list[float]:
    """p50 and p99 of `count` calls, back to back or with so much work of the caller's between two."""
    times = []
    for _ in range(count):
        works_until = time.perf_counter() + gap_s
        while (started := time.perf_counter()) < works_until:
            pass
        call()
        times.append(time.perf_counter() - started)
    return [1e6 * float(np.quantile(times, q)) for q in (0.5, 0.99)]


def _end(memory: mmap.mmap, moves: int, watches: int, bells: tuple[int, int, int]) -> End:
    first, second, alarm = bells
    mine, theirs = (first, second) if moves == layout.REQUESTS_POSTED else (second, first)
    return best_end()(memory, moves, watches, mine, theirs, alarm)


def _echo(memory: mmap.mmap, bells: tuple[int, int, int], count: int) -> None:
    end = _end(memory, layout.COMPLETIONS_POSTED, layout.REQUESTS_POSTED, bells)
    end.wait(0, FOR_EVER_S)
    for number in range(1, count):
        end.exchange(number, number, FOR_EVER_S)
    end.exchange(count, count, 0.0)


def bare_ring(count: int) -> list[float]:
    """p50 and p99, us, of a round trip of the lane's counters and bells between two processes that spin."""
    memory = mmap.mmap(-1, 4096)
    bells = (os.eventfd(0), os.eventfd(0), os.eventfd(0))
    echo = multiprocessing.get_context("fork").Process(target=_echo, args=(memory, bells, count))
    echo.start()
    end = _end(memory, layout.REQUESTS_POSTED, layout.COMPLETIONS_POSTED, bells)
    done = 0

    def trip() -> None:
        nonlocal done
        end.exchange(done + 1, done, FOR_EVER_S)
        done += 1

    times = microseconds(trip, count)
    echo.join(10)
    end.close()
    for bell in bells:
        os.close(bell)
    return times


def _sleepy_echo(request: int, answer: int, count: int) -> None:
    for _ in range(count):
        os.eventfd_read(request)
        os.eventfd_write(answer, 1)


def bare_eventfd(count: int) -> list[float]:
    """p50 and p99, us, of a round trip of two eventfds between two processes that sleep in them: DESIGN's 6 us."""
    request, answer = os.eventfd(0), os.eventfd(0)
    echo = multiprocessing.get_context("fork").Process(target=_sleepy_echo, args=(request, answer, count))
    echo.start()

    def trip() -> None:
        os.eventfd_write(request, 1)
        os.eventfd_read(answer)

    times = microseconds(trip, count)
    echo.join(10)
    for bell in (request, answer):
        os.close(bell)
    return times


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def from_ram(target: str, values: Values, calls: int) -> None:
    """One round of the RAM cases."""
    chance = np.random.default_rng(3)
    for name, trip in (("ring that spins", bare_ring), ("eventfd ring", bare_eventfd)):
        p50, p99 = trip(calls)
        values.setdefault(f"bare {name}, p50 us", []).append(p50)
        values.setdefault(f"bare {name}, p99 us", []).append(p99)
    with grpc.insecure_channel(target) as channel:
        stub = kvd_pb2_grpc.KvdStub(channel)
        for transport in ("auto", "shared"):
            connection = Connection(target, transport=transport)
            session_id = connection.open("", GEOMETRY).session_id
            data = chance.integers(0, 256, (16, GEOMETRY.chunk_bytes), np.uint8)
            connection.append(session_id, 0, 16, data.reshape(-1))
            small = some_keys(chance, 16, SMALL, 1)
            fetched(connection, session_id, data, small)
            name = "lane" if connection.transport == "lane" else "gRPC"
            # As layers of a decode step come that has nothing else to do, and as they come with work between them.
            for gap_us in (0, GAP_US) if name == "lane" else (0,):
                p50, p99 = microseconds(lambda: connection.fetch(session_id, small), calls, gap_us * 1e-6)  # noqa: B023
                way = f"{name}, {gap_us} us apart" if gap_us else name
                values.setdefault(f"8 x 8 KiB RAM, {way}, p50 us", []).append(p50)
                values.setdefault(f"8 x 8 KiB RAM, {way}, p99 us", []).append(p99)
            if name == "gRPC":
                empty = kvd_pb2.FetchRequest(session_id=session_id)
                p50, _ = microseconds(lambda: stub.Fetch(empty), calls)  # noqa: B023
                values.setdefault("empty gRPC call, p50 us", []).append(p50)
            else:
                large = some_keys(chance, 16, READS, 4)
                copy = np.empty(READS * 4 * RECORD, np.uint8)
                source = data.reshape(-1)[: copy.nbytes]
                fetched(connection, session_id, data, large)
                ours, _ = microseconds(lambda: connection.fetch(session_id, large), 100)  # noqa: B023
                theirs, _ = microseconds(lambda: np.copyto(copy, source), 100)  # noqa: B023
                values.setdefault("128 x 32 KiB RAM, lane over memcpy", []).append(theirs / ours)
            connection.disconnect()


def from_disk(
    connection: Connection,
    target: str,
    session_id: int,
    data: np.ndarray,
    segments: list[Path],
    values: Values,
    rounds: int,
    seed: int,
    depth: int,
    pid: int,
) -> None:
    """One round of the disk cases. `alone`: batches of as many reads by the daemon's I/O engine, and nothing else. `no
    daemon`: the same, verified and copied, in C: what one fetch at a time could reach at best."""
    disk, names = FileDisk(segments[0].parent, UringEngine(depth), ALIGNMENT), [segment.name for segment in segments]
    sums = checksums_of(disk, names[:1])
    for part, groups in product(range(SLICES), (4, 1)):
        size = groups * RECORD
        name = f"128 x {size >> 10} KiB NVMe"
        theirs = {"huge pages": of_fio(segments, size, depth, "huge")}
        before = cpu_seconds(pid)
        speed, share = fetch_rounds(connection, session_id, data, rounds, 1000 * seed + part, groups)
        used = cpu_seconds(pid) - before
        theirs["that asks in batches too"] = of_fio(segments, size, READS, "huge", IN_BATCHES)
        alone = disk_speed(disk, size, READS, 0.2, "huge", names)
        best = fetch_speed(disk, sums, READS, groups, 0.2)
        theirs["plain pages"] = of_fio(segments, size, depth, "plain")
        values.setdefault(f"{name}, GB/s", []).append(speed)
        values.setdefault(f"{name}, from disk", []).append(share)
        values.setdefault(f"{name}, daemon CPU s/GB", []).append(used / (rounds * READS * size / 1e9))
        values.setdefault(f"{name}, over the same reads alone", []).append(speed / alone)
        for kind, found in theirs.items():
            if found is not None:
                values.setdefault(f"{name}, no daemon, over fio, {kind}", []).append(best / found[0])
                values.setdefault(f"{name}, over fio, {kind}", []).append(speed / found[0])
                values.setdefault(f"{name}, fio's CPU s/GB, {kind}", []).append(found[1])
    disk.shutdown()
    chance = np.random.default_rng(seed + 1000)
    times = [fetched(connection, session_id, data, some_keys(chance, len(data), READS, 4))[0] for _ in range(rounds)]
    p50, p99 = np.quantile(times, (0.5, 0.99))
    values.setdefault("128 x 32 KiB NVMe, p99 over p50", []).append(float(p99 / p50))
    for count in CLIENTS:
        theirs = of_fio(segments, 4 * RECORD, count * READS, "huge")
        speed = several(target, len(data), count, seed)
        values.setdefault(f"{count} clients, 128 x 32 KiB NVMe, GB/s", []).append(speed)
        if theirs is not None:
            values.setdefault(f"{count} clients, 128 x 32 KiB NVMe, over fio, huge pages", []).append(speed / theirs[0])
    append_and_flush(connection, segments[0], values, "append + flush, full arena")
    fairness(connection, target, session_id, data, values, seed, rounds)


def of_fio(segments: list[Path], size: int, depth: int, kind: str, more: str = "") -> tuple[float, float] | None:
    """GB/s and CPU seconds a GB; None where fio cannot have this memory."""
    files, total = ":".join(map(str, segments)), sum(segment.stat().st_size for segment in segments)
    job = (FIO + RANDOM_FILES + more).format(file=files, total=total, size=size, depth=depth, ms=300)
    return fio_read(job, depth * size, kind)


def several(target: str, chunks: int, count: int, seed: int, seconds: float = 0.7) -> float:
    """GB/s of so many clients, each of which fetches 128 x 32 KiB without a pause."""
    context = multiprocessing.get_context("spawn")
    start, ends = context.Barrier(count), [context.Pipe() for _ in range(count)]
    for number, (_, theirs) in enumerate(ends):
        arguments = (target, chunks, 10 * seed + number, seconds, start, theirs)
        context.Process(target=_client, args=arguments, daemon=True).start()
        theirs.close()  # so that the end of a client that failed is seen
    return sum(mine.recv() for mine, _ in ends)


def _client(target: str, chunks: int, seed: int, seconds: float, start: Any, pipe: Any) -> None:
    connection = Connection(target)
    session_id = connection.open("bench", GEOMETRY).session_id
    chance = np.random.default_rng(seed + 4000)
    wanted = [some_keys(chance, chunks, READS, 4) for _ in range(64)]
    start.wait()
    moved, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        answer = connection.fetch(session_id, wanted[moved % len(wanted)])
        assert answer.statuses is None
        moved += 1
    pipe.send(moved * READS * 4 * RECORD / (time.perf_counter() - began) / 1e9)


def append_and_flush(connection: Connection, segment: Path, values: Values, name: str) -> None:
    """64 MiB in appends of 8 chunks and one flush, beside fio's sequential write of the same bytes and its fdatasync."""
    session_id = connection.open("written", GEOMETRY).session_id
    count, part = 64, 8
    payload = connection.append_buffer(part * GEOMETRY.chunk_bytes)
    payload[:] = np.random.default_rng(4).integers(0, 256, payload.nbytes, np.uint8)
    started = time.perf_counter()
    for first in range(0, count, part):
        payload[:8] = first  # else all chunks after the first part would be stored already
        connection.append(session_id, first, part, payload)
    connection.flush(session_id)
    speed = count * GEOMETRY.chunk_bytes / (time.perf_counter() - started) / 1e9
    connection.delete(session_id)
    place = segment.with_name(".fio-write")
    size = count * GEOMETRY.chunk_bytes
    command = ["fio", "--name=w", f"--filename={place}", f"--size={size}", "--bs=1m", "--rw=write", "--direct=1"]
    command += ["--ioengine=io_uring", "--iodepth=16", "--end_fsync=1", "--output-format=json"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    place.unlink()
    job = json.loads(ran.stdout[ran.stdout.index("{") :])["jobs"][0]
    values.setdefault(f"{name}, GB/s", []).append(speed)
    values.setdefault(f"{name}, over fio", []).append(speed / (size / (job["job_runtime"] / 1e3) / 1e9))


def fairness(
    connection: Connection, target: str, session_id: int, data: np.ndarray, values: Values, seed: int, rounds: int
) -> None:
    """p99 of fetches of 8 records from disk, alone and beside a client that fetches 512 records without a pause."""
    chance = np.random.default_rng(seed + 2000)

    def p99() -> float:
        times = [fetched(connection, session_id, data, some_keys(chance, len(data), SMALL, 1))[0] for _ in range(200)]
        return 1e6 * float(np.quantile(times, 0.99))

    alone = p99()
    bulk = multiprocessing.get_context("spawn").Process(target=_bulk, args=(target, len(data), seed), daemon=True)
    bulk.start()
    time.sleep(2.0)
    beside = p99()
    bulk.terminate()
    bulk.join(10)
    values.setdefault("8 x 8 KiB NVMe, p99 us", []).append(alone)
    values.setdefault("8 x 8 KiB NVMe, p99 beside bulk over alone", []).append(beside / alone)


def _bulk(target: str, chunks: int, seed: int) -> None:
    connection = Connection(target)
    session_id = connection.open("bench", GEOMETRY).session_id
    chance = np.random.default_rng(seed + 3000)
    while True:
        connection.fetch(session_id, some_keys(chance, chunks, READS, 4))


# Each with its target, and whether the number must be at most (True) or at least that.
TARGETS = {
    "8 x 8 KiB RAM, lane, p50 us": (40, True),
    "8 x 8 KiB RAM, lane, p99 us": (150, True),
    "128 x 32 KiB RAM, lane over memcpy": (0.80, False),
    "128 x 32 KiB NVMe, over fio, huge pages": (0.90, False),
    "128 x 8 KiB NVMe, over fio, huge pages": (0.90, False),
    "2 clients, 128 x 32 KiB NVMe, over fio, huge pages": (0.90, False),
    "128 x 32 KiB NVMe, daemon CPU s/GB": (0.15, True),
    "128 x 32 KiB NVMe, p99 over p50": (2.5, True),
    "append + flush, over fio": (0.85, False),
    "append + flush, full arena, over fio": (0.85, False),
    "8 x 8 KiB NVMe, p99 beside bulk over alone": (2.0, True),
    "lane over bare eventfd ring": (8, True),
    "gRPC fetch over empty gRPC call": (1.3, True),
}


def main(
    chunks: Annotated[int, typer.Option(help="of 1 MiB each")] = 512,
    repeats: Annotated[int, typer.Option(help="rounds of all cases", min=1)] = 5,
    rounds: Annotated[int, typer.Option(help="fetches of 128 reads a slice", min=1)] = 20,
    calls: Annotated[int, typer.Option(help="small fetches a round", min=10)] = 2000,
    depth: Annotated[int, typer.Option(help="reads in flight, the daemon's and fio's")] = 64,
) -> None:
    """Prints the medians beside their targets; appends to bench/results/fetch.jsonl."""
    (BUILD / "bench").mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(dir=BUILD / "bench"))
    ram = max(16, chunks // 16)
    values: Values = {}
    try:
        (place / "ram").mkdir()
        with (
            daemon_on(place, f"{ram}MiB", "--nvme-max", f"{2 * chunks + 1024}MiB") as daemon,
            daemon_on(place / "ram", "256MiB") as of_ram,
        ):
            target, pid = daemon.target, daemon.pid
            assert pid is not None
            connection = Connection(target)
            session_id, data = fill(connection, chunks)
            # All but the last one are full; fio would not read what was only reserved.
            segments = sorted((place / "kv").glob("segment-*"))[: max(1, (chunks >> 8) - 1)]
            for segment in (place / "kv").glob("segment-*"):
                subprocess.run(
                    ["dd", f"if={segment}", "of=/dev/null", "bs=4M", "iflag=direct", "status=none"], check=True
                )
            for repeat in range(repeats):
                from_ram(of_ram.target, values, calls)
                other = Connection(of_ram.target)
                append_and_flush(other, segments[0], values, "append + flush")
                other.disconnect()
                from_disk(connection, target, session_id, data, segments, values, rounds, repeat, depth, pid)
            transport, huge = connection.transport, connection.huge_pages
            connection.disconnect()
    finally:
        shutil.rmtree(place)
    pairs = {
        "lane over bare eventfd ring": ("8 x 8 KiB RAM, lane, p50 us", "bare eventfd ring, p50 us"),
        "lane over bare ring that spins": ("8 x 8 KiB RAM, lane, p50 us", "bare ring that spins, p50 us"),
        "gRPC fetch over empty gRPC call": ("8 x 8 KiB RAM, gRPC, p50 us", "empty gRPC call, p50 us"),
    }
    for name, (over, under) in pairs.items():
        values[name] = [a / b for a, b in zip(values[over], values[under], strict=True)]
    table = Table(title=f"medians of {repeats}, {depth} in flight, load {os.getloadavg()[0]:.1f}")
    for name in ("", "median", "lowest", "highest", "target", "held"):
        table.add_column(name, justify="left" if not name else "right")
    for name, found in values.items():
        limit, at_most = TARGETS.get(name, (None, True))
        median = statistics.median(found)
        held = "" if limit is None else "yes" if (median <= limit) == at_most or median == limit else "no"
        shown = "" if limit is None else f"{'<=' if at_most else '>='} {limit}"
        table.add_row(name, *(f"{f(found):.3g}" for f in (statistics.median, min, max)), shown, held)
    Console(width=120).print(table)
    config = {"chunks": chunks, "ram_mib": ram, "rounds": rounds, "depth": depth, "transport": transport}
    config |= {
        "landing": "huge pages" if huge else "4 KiB pages",
        "calls": calls,
        "load_average": os.getloadavg()[0],
    }
    results.append("fetch", config, values, BUILD)


if __name__ == "__main__":
    typer.run(main)
