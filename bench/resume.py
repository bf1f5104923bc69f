"""How long until a parked session can decode again: a daemon restarts, a client reads summaries, sinks and recent chunks.

Geometry of Qwen3-30B-A3B (48 layers, 4 KV heads, dim 128, bfloat16), synthetic K/V, routing state of 5.3 % of the K/V (the
sketch's share). Beside it, in the same run: fio reading the same file in sequence.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import results
import typer
from demo import BUILD
from hga_kvd.bench.daemon import daemon_on
from hga_kvd_client.connection import Connection
from hga_kvd_client.geometry import Geometry
from hga_kvd_client.keys import extent_keys

GEOMETRY = Geometry(layers=48, kv_heads=4, head_dim=128, dtype="bfloat16", model_fingerprint="bench")
STATE_SHARE = 0.053
SINK_CHUNKS, RECENT_CHUNKS = 2, 8
KIND = "bench.v1"


def fill(connection: Connection, chunks: int) -> int:
    session_id = connection.open("parked", GEOMETRY).session_id
    chance = np.random.default_rng(1)
    chunk = chance.integers(0, 256, GEOMETRY.chunk_bytes, np.uint8)
    state_bytes = int(STATE_SHARE * GEOMETRY.chunk_bytes)
    states = chance.integers(0, 256, (8, state_bytes), np.uint8)
    for first in range(0, chunks, 4):
        count = min(4, chunks - first)
        payload = np.stack([np.roll(chunk, 4096 * (first + i)) for i in range(count)])
        connection.append(session_id, first, count, payload.reshape(-1))
        connection.put_summaries(session_id, KIND, first, count, states[:count].tobytes())
        if first % 64 == 0:
            connection.flush(session_id)
    connection.flush(session_id)
    return state_bytes


def resume(connection: Connection, chunks: int) -> tuple[float, float, int]:
    """Seconds for the summaries, seconds in all, bytes."""
    started = time.perf_counter()
    session_id = connection.open("parked", GEOMETRY).session_id
    size, first = 0, 0
    while first < chunks:
        count, payload = connection.get_summaries(session_id, KIND, first, chunks - first)
        size += len(payload)
        first += count
    summaries_s = time.perf_counter() - started
    for at, count in ((0, SINK_CHUNKS), (chunks - RECENT_CHUNKS, RECENT_CHUNKS)):
        for layer in range(GEOMETRY.layers):
            fetched = connection.fetch(session_id, extent_keys(GEOMETRY, layer, at, count))
            if fetched.statuses is not None:
                raise RuntimeError("damaged records")
            size += fetched.records.nbytes
    return summaries_s, time.perf_counter() - started, size


def sequential_gbs(path: Path, seconds: int) -> float:
    """GB/s of fio's direct reads of 1 MiB in sequence, 8 in flight."""
    command = ["fio", "--name=read", f"--filename={path}", "--ioengine=io_uring", "--direct=1", "--rw=read", "--bs=1M"]
    command += ["--iodepth=8", "--readonly", f"--size={path.stat().st_size}", "--time_based", f"--runtime={seconds}"]
    ran = subprocess.run([*command, "--output-format=json"], capture_output=True, text=True, check=True)
    answer: dict[str, Any] = json.loads(ran.stdout[ran.stdout.index("{") :])
    return float(answer["jobs"][0]["read"]["bw_bytes"]) / 1e9


def main(
    tokens: Annotated[int, typer.Option(help="a multiple of 256")] = 65536,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
) -> None:
    """Prints share of the bytes, seconds, and GB/s beside fio; appends to bench/results/resume.jsonl."""
    (BUILD / "bench").mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(dir=BUILD / "bench"))
    chunks = tokens // GEOMETRY.chunk_tokens
    stored = chunks * GEOMETRY.chunk_bytes
    runs: list[dict[str, float]] = []
    try:
        with daemon_on(directory, "1GiB", "--scrub-rate", "0") as daemon:
            connection = daemon.connect()
            fill(connection, chunks)
            connection.disconnect()
        segment = max((directory / "kv").glob("segment-*"), key=lambda path: path.stat().st_size)
        for _ in range(repeats):
            before = sequential_gbs(segment, 2)
            with daemon_on(directory, "1GiB", "--scrub-rate", "0") as daemon:
                connection = daemon.connect()
                summaries_s, total_s, size = resume(connection, chunks)
                connection.disconnect()
            disk = (before + sequential_gbs(segment, 2)) / 2
            gbs = size / total_s / 1e9
            runs.append({"summaries_s": summaries_s, "total_s": total_s, "bytes": size, "gbs": gbs, "disk_gbs": disk})
            print(
                f"{size / stored:.1%} of {stored / 1e9:.1f} GB in {total_s:.2f} s (summaries {summaries_s:.2f} s): "
                f"{gbs:.2f} GB/s, fio {disk:.2f}, ratio {gbs / disk:.2f}"
            )
    finally:
        shutil.rmtree(directory)
    numbers = {"stored_bytes": stored, "runs": runs}
    results.append("resume", {"tokens": tokens, "state_share": STATE_SHARE}, numbers, BUILD)


if __name__ == "__main__":
    typer.run(main)
