"""128 random fetches of 32 KiB from disk through daemon and client, beside fio: same size, same depth, same disk, one run.

A fetch here is 4 neighbouring groups of one KV head (8 KiB records: dim 128, bfloat16). The arena holds a sixteenth of the
data, and each round asks for other chunks, so nearly all of it comes from disk; what did not is printed.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import results
import typer
from demo import BUILD, daemon
from hga_kvd_client.connection import Connection
from hga_kvd_client.geometry import KEY_DTYPE, Geometry
from rich.console import Console
from rich.table import Table

GEOMETRY = Geometry(layers=8, kv_heads=4, head_dim=128, dtype="bfloat16", model_fingerprint="bench")
RUNS_A_FETCH, GROUPS_A_RUN = 128, 4
RUN_BYTES = 32 << 10


def fill(connection: Connection, chunks: int) -> tuple[int, np.ndarray]:
    """A named session of `chunks` chunks of random bytes, on disk. Returns its id and the bytes, [chunks, chunk_bytes]."""
    session_id = connection.open("bench", GEOMETRY).session_id
    data = np.random.default_rng(1).integers(0, 256, (chunks, GEOMETRY.chunk_bytes), np.uint8)
    for first in range(0, chunks, 8):
        part = data[first : first + 8]
        connection.append(session_id, first, len(part), part.reshape(-1))
        connection.flush(session_id)
    return session_id, data


def fetch_rounds(
    connection: Connection, session_id: int, data: np.ndarray, rounds: int, seed: int
) -> tuple[float, float]:
    """GB/s over `rounds` fetches, and the share of records that came from disk. Every byte is compared, outside the time."""
    chance = np.random.default_rng(seed)
    g = GEOMETRY
    view = data.reshape(len(data), g.layers, g.kv_heads, g.groups_per_chunk, g.record_bytes)
    elapsed, disk_records = 0.0, 0
    for _ in range(rounds):
        places = chance.choice(len(data) * g.layers * g.kv_heads, RUNS_A_FETCH, replace=False)
        chunk, layer, head = np.unravel_index(places, (len(data), g.layers, g.kv_heads))
        keys = np.zeros((RUNS_A_FETCH, GROUPS_A_RUN), KEY_DTYPE)
        keys["group"] = chunk[:, None] * g.groups_per_chunk + np.arange(GROUPS_A_RUN)
        keys["layer"], keys["kv_head"] = layer[:, None], head[:, None]
        started = time.perf_counter()
        fetched = connection.fetch(session_id, keys.reshape(-1))
        elapsed += time.perf_counter() - started
        disk_records += fetched.nvme_records
        if fetched.statuses is not None or not np.array_equal(
            fetched.records, view[chunk, layer, head].reshape(-1, g.record_bytes)
        ):
            raise RuntimeError("wrong bytes")
    total = rounds * RUNS_A_FETCH
    return total * RUN_BYTES / elapsed / 1e9, disk_records / (total * GROUPS_A_RUN)


def fio(path: Path, size: int, depth: int, seconds: int) -> float:
    """GB/s of fio's random direct reads of 32 KiB by io_uring."""
    command = ["fio", "--name=read", f"--filename={path}", "--ioengine=io_uring", "--direct=1", "--rw=randread"]
    command += [f"--bs={RUN_BYTES}", f"--iodepth={depth}", f"--size={size}", "--time_based", f"--runtime={seconds}"]
    ran = subprocess.run([*command, "--output-format=json"], capture_output=True, text=True, check=True)
    answer: dict[str, Any] = json.loads(ran.stdout[ran.stdout.index("{") :])
    return float(answer["jobs"][0]["read"]["bw_bytes"]) / 1e9


def main(
    chunks: Annotated[int, typer.Option(help="of 1 MiB each")] = 1024,
    repeats: Annotated[int, typer.Option(help="client and fio in turns", min=1)] = 5,
    rounds: Annotated[int, typer.Option(help="fetches a repeat", min=1)] = 40,
    depth: Annotated[int, typer.Option(help="reads in flight, the daemon's and fio's")] = 64,
) -> None:
    """Prints GB/s of both and their ratio, medians; appends to bench/results/fetch.jsonl."""
    (BUILD / "bench").mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(dir=BUILD / "bench"))
    ours, theirs, shares = [], [], []
    try:
        ram = max(16, chunks // 16)
        with daemon(place, f"{ram}MiB", "--nvme-max", f"{2 * chunks + 1024}MiB") as target:
            connection = Connection(target)
            session_id, data = fill(connection, chunks)
            segment = max((place / "kv").glob("segment-*"), key=lambda path: path.stat().st_size)
            for repeat in range(repeats):
                theirs.append(fio(segment, segment.stat().st_size, depth, 2))
                speed, share = fetch_rounds(connection, session_id, data, rounds, repeat)
                ours.append(speed)
                shares.append(share)
            transport = connection.transport
            connection.disconnect()
    finally:
        shutil.rmtree(place)
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    table = Table(title=f"{RUNS_A_FETCH} x 32 KiB random, from disk, {depth} in flight")
    for name in ("", "median", "lowest", "highest"):
        table.add_column(name, justify="right")
    for name, values in (("hga-kvd, GB/s", ours), ("fio, GB/s", theirs), ("ratio", ratios), ("from disk", shares)):
        table.add_row(name, *(f"{f(values):.2f}" for f in (statistics.median, min, max)))
    Console().print(table)
    config = {"chunks": chunks, "ram_mib": ram, "rounds": rounds, "depth": depth, "transport": transport}
    numbers = {"ours_gbs": ours, "fio_gbs": theirs, "ratio": statistics.median(ratios), "disk_share": shares}
    results.append("fetch", config, numbers, BUILD)


if __name__ == "__main__":
    typer.run(main)
