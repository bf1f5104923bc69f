"""How one daemon serves 1, 2, 4, 8 clients at once from RAM: calls a second, GB/s, p50 and p99 of each client's fetches.

Clients are processes; each fetches without a pause, either 8 records of 8 KiB (a decode step's miss) or 128 x 32 KiB.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import results
import typer
from hga_kvd.bench.daemon import daemon_on
from hga_kvd_client.connection import Connection
from hga_kvd_client.geometry import KEY_DTYPE, Geometry
from rich.console import Console
from rich.table import Table

GEOMETRY = Geometry(layers=8, kv_heads=4, head_dim=128, dtype="bfloat16", model_fingerprint="bench")
CHUNKS = 16
CASES = {"8 x 8 KiB": (8, 1), "128 x 32 KiB": (128, 4)}


def client(target: str, runs: int, groups: int, seconds: float, start: Any, pipe: Any, seed: int) -> None:
    """Fetches for so long; sends the times of its calls, seconds, and when they began and ended."""
    connection = Connection(target)
    session_id = connection.open("", GEOMETRY).session_id
    chance = np.random.default_rng(seed)
    data = chance.integers(0, 256, CHUNKS * GEOMETRY.chunk_bytes, np.uint8)
    connection.append(session_id, 0, CHUNKS, data)
    g = GEOMETRY
    places = chance.choice(CHUNKS * g.layers * g.kv_heads, runs, replace=False)
    chunk, layer, head = np.unravel_index(places, (CHUNKS, g.layers, g.kv_heads))
    keys = np.zeros((runs, groups), KEY_DTYPE)
    keys["group"] = chunk[:, None] * g.groups_per_chunk + np.arange(groups)
    keys["layer"], keys["kv_head"] = layer[:, None], head[:, None]
    keys = keys.reshape(-1)
    got = connection.fetch(session_id, keys).records
    expected = data.reshape(CHUNKS, g.layers, g.kv_heads, g.groups_per_chunk, -1)[chunk, layer, head, :groups]
    assert np.array_equal(got, expected.reshape(got.shape)), "wrong bytes"
    start.wait()
    times = []
    began = now = time.monotonic()
    while now - began < seconds:
        connection.fetch(session_id, keys)
        times.append(-now + (now := time.monotonic()))
    pipe.send((times, connection.transport))
    connection.disconnect()


def measure(target: str, count: int, runs: int, groups: int, seconds: float) -> dict[str, float]:
    context = multiprocessing.get_context("spawn")
    start, ends, processes = context.Barrier(count), [], []
    for number in range(count):
        mine, theirs = context.Pipe()
        arguments = (target, runs, groups, seconds, start, theirs, number)
        processes.append(context.Process(target=client, args=arguments, daemon=True))
        processes[-1].start()
        ends.append(mine)
    answers = [end.recv() for end in ends]
    for process in processes:
        process.join(10)
    times = np.concatenate([each for each, _ in answers])
    assert {transport for _, transport in answers} == {"lane"}
    rate = len(times) / seconds
    p50, p99 = np.quantile(times, (0.5, 0.99)) * 1e6
    return {
        "calls_s": rate,
        "gb_s": rate * runs * groups * GEOMETRY.record_bytes / 1e9,
        "p50_us": float(p50),
        "p99_us": float(p99),
    }


def main(
    seconds: Annotated[float, typer.Option(help="of each case")] = 2.0,
    most: Annotated[int, typer.Option(help="clients")] = 8,
    keep: Annotated[bool, typer.Option(help="Append to bench/results/clients.jsonl.")] = True,
) -> None:
    with tempfile.TemporaryDirectory(prefix="kvd") as directory:
        numbers: dict[str, dict[str, float]] = {}
        with daemon_on(Path(directory), "1GiB") as daemon:
            count = 1
            while count <= most:
                for name, (runs, groups) in CASES.items():
                    numbers[f"{name}, {count} clients"] = measure(daemon.target, count, runs, groups, seconds)
                count *= 2
    table = Table(title=f"one daemon, RAM, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    for heading in ("", "calls/s", "GB/s", "p50 us", "p99 us"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, found in numbers.items():
        table.add_row(name, *(f"{value:.4g}" for value in found.values()))
    Console(width=100).print(table)
    if keep:
        results.append("clients", {"seconds": seconds, "load_average": os.getloadavg()[0]}, numbers)


if __name__ == "__main__":
    typer.run(main)
