"""Round trips of every transport on this machine, RAM hits only: medians over rounds that take turns.

    python bench/transports.py

Rows: the empty unary call of gRPC, 8 and 512 records of 8 KiB and an append of 4 MiB by the fast lane, by gRPC with payload
in shared memory, and as bytes through the unix socket and through TCP; and a memcpy of the same bytes for scale.
"""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import grpc
import numpy as np
import results
import typer
from hga_kvd.bench.daemon import daemon_on
from hga_kvd_client.connection import Connection
from hga_kvd_client.geometry import KEY_DTYPE, Geometry
from hga_kvd_proto.v1 import kvd_pb2, kvd_pb2_grpc
from rich.console import Console
from rich.table import Table

GEOMETRY = Geometry(layers=4, kv_heads=8, head_dim=128, dtype="bfloat16", model_fingerprint="bench")
CHUNKS, APPENDED = 8, 4
SMALL, LARGE = 8, 512


def keys_of(count: int) -> np.ndarray:
    chance = np.random.default_rng(0)
    keys = np.zeros(count, KEY_DTYPE)
    keys["group"] = chance.integers(0, CHUNKS * GEOMETRY.groups_per_chunk, count)
    keys["kv_head"] = chance.integers(0, GEOMETRY.kv_heads, count)
    return keys


def timed(call: Callable[..., object], *arguments: object) -> float:
    started = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - started


def append_seconds(connection: Connection, data: np.ndarray) -> float:
    session_id = connection.open("", GEOMETRY).session_id
    payload = connection.append_buffer(data.nbytes)
    payload[:] = data
    took = timed(connection.append, session_id, 0, APPENDED, payload)
    connection.close(session_id)
    return took


def cases(target: str, tcp: str, ends: contextlib.ExitStack) -> dict[str, tuple[int, Callable[[], float]]]:
    """Bytes moved by, and seconds of, one call of each row."""
    found: dict[str, tuple[int, Callable[[], float]]] = {}
    data = np.random.default_rng(1).integers(0, 256, CHUNKS * GEOMETRY.chunk_bytes, np.uint8)
    ways = {"fast lane": (target, "auto"), "shared memory": (target, "shared")}
    ways |= {"bytes, unix": (target, "bytes"), "bytes, TCP": (tcp, "bytes")}
    for name, (where, transport) in ways.items():
        connection = Connection(where, transport=transport)  # type: ignore[arg-type]
        ends.callback(connection.disconnect)
        assert connection.transport == ("lane" if transport == "auto" else transport)
        session_id = connection.open("", GEOMETRY).session_id
        connection.append(session_id, 0, CHUNKS, data)
        if transport == "bytes":
            stub = kvd_pb2_grpc.KvdStub(ends.enter_context(grpc.insecure_channel(where)))  # type: ignore[no-untyped-call]
            empty = kvd_pb2.FetchRequest(session_id=session_id)
            found[f"empty call{name.removeprefix('bytes')}"] = (0, partial(timed, stub.Fetch, empty))
        for count in (SMALL, LARGE):
            size = count * GEOMETRY.record_bytes
            found[f"fetch {count}, {name}"] = (size, partial(timed, connection.fetch, session_id, keys_of(count)))
        part = data[: APPENDED * GEOMETRY.chunk_bytes]
        found[f"append 4 MiB, {name}"] = (part.nbytes, partial(append_seconds, connection, part))
    copy = np.empty(LARGE * GEOMETRY.record_bytes, np.uint8)
    found["memcpy 4 MiB"] = (copy.nbytes, partial(timed, np.copyto, copy, data[: copy.nbytes]))
    return dict(sorted(found.items(), key=lambda row: row[0].split(",")[0]))


def main(
    rounds: Annotated[int, typer.Option(min=1)] = 10,
    calls: Annotated[int, typer.Option(help="of the small rows in each round", min=10)] = 200,
    keep: Annotated[bool, typer.Option(help="Append to bench/results/transports.jsonl.")] = True,
) -> None:
    with contextlib.ExitStack() as ends:
        place = Path(ends.enter_context(tempfile.TemporaryDirectory(prefix="kvd")))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            tcp = f"127.0.0.1:{probe.getsockname()[1]}"
        daemon = ends.enter_context(daemon_on(place, "256MiB", "--listen", tcp))
        rows = cases(daemon.target, tcp, ends)
        times: dict[str, list[float]] = {name: [] for name in rows}
        for number in range(rounds + 1):  # the first round warms up
            for name, (size, call) in rows.items():
                took = [call() for _ in range(calls if size <= SMALL * GEOMETRY.record_bytes else calls // 10)]
                times[name] += took if number else []
    table = Table(title=f"{os.cpu_count()} cores, grpcio {grpc.__version__}, load {os.getloadavg()[0]:.1f}")
    for heading in ("", "p50 us", "p99 us", "GB/s"):
        table.add_column(heading, justify="right" if heading else "left")
    numbers: dict[str, dict[str, float]] = {}
    for name, (size, _) in rows.items():
        p50, p99 = np.quantile(times[name], (0.5, 0.99))
        numbers[name] = {"p50_us": round(1e6 * p50, 1), "p99_us": round(1e6 * p99, 1)}
        table.add_row(name, f"{1e6 * p50:.0f}", f"{1e6 * p99:.0f}", f"{size / p50 / 1e9:.2f}" if size else "")
    Console(width=80).print(table)
    if keep:
        results.append("transports", {"rounds": rounds, "calls": calls, "grpcio": grpc.__version__}, numbers)


if __name__ == "__main__":
    typer.run(main)
