"""How long until a parked session can decode again: a daemon restarts, a client opens the session.

Geometry of Qwen3-30B-A3B (48 layers, 4 KV heads, dim 128, bfloat16), synthetic K/V, routing state as router "sketch" stores
it: its basis (25 MB) and the sketch of every chunk (5.3 % of the K/V). Two rows a run: `read` is the same bytes through a
Connection and dropped, `session` is Client.open, after which the session can attend. Beside them, in the same run: fio
reading the same file in sequence.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import results
import torch
import typer
from demo import BUILD
from hga_kvd.bench.daemon import daemon_on
from hga_kvd_client.client import Client
from hga_kvd_client.connection import Connection
from hga_kvd_client.geometry import Geometry
from hga_kvd_client.keys import extent_keys
from hga_kvd_client.options import Rope, SessionOptions
from hga_kvd_client.routing_state import BASIS_CHUNK
from hga_kvd_client.sketch import Basis, SketchSpec
from hga_kvd_client.sketches import basis_parts
from raw_io import KINDS as KINDS_OF_PAGES
from raw_io import fio_speed

ROPE = Rope(tuple(1e6 ** (-2 * i / 128) for i in range(64)), 128)
GEOMETRY = Geometry(layers=48, kv_heads=4, head_dim=128, dtype="bfloat16", rope=ROPE.text(), model_fingerprint="bench")
SPEC = SketchSpec.of_basis(GEOMETRY.head_dim)
STATE_BYTES = GEOMETRY.layers * GEOMETRY.kv_heads * SPEC.chunk_bytes  # of a chunk
OPTIONS = SessionOptions(router="sketch")
FILL_CHUNKS = 4


def made_basis() -> Basis:
    torch.manual_seed(1)
    shape = (GEOMETRY.layers, GEOMETRY.kv_heads, GEOMETRY.head_dim)
    return Basis(torch.randn(*shape, shape[-1]), torch.randn(*shape, shape[-1]), torch.randn(*shape))


KINDS, STATE_KIND = [kind for kind, _ in basis_parts(made_basis())], made_basis().kind(SPEC)


def fill(connection: Connection, chunks: int) -> None:
    session_id = connection.open("parked", GEOMETRY).session_id
    chance = np.random.default_rng(1)
    chunk = chance.integers(0, 256, GEOMETRY.chunk_bytes, np.uint8)
    states, basis = chance.integers(0, 256, (FILL_CHUNKS, STATE_BYTES), np.uint8).tobytes(), made_basis()
    for first in range(0, chunks, FILL_CHUNKS):
        payload = np.stack([np.roll(chunk, 4096 * (first + i)) for i in range(FILL_CHUNKS)])
        connection.append(session_id, first, FILL_CHUNKS, payload.reshape(-1))
        connection.put_summaries(session_id, basis.kind(SPEC), first, FILL_CHUNKS, states)
        if first % 64 == 0:
            connection.flush(session_id)
    for kind, part in basis_parts(basis):
        connection.put_summaries(session_id, kind, min(BASIS_CHUNK, chunks - 1), 1, part)
    connection.flush(session_id)


def read_all(connection: Connection, chunks: int) -> int:
    """What a resumed session reads, and nothing else is done with it. Returns the bytes."""
    session_id = connection.open("parked", GEOMETRY).session_id
    size = 0
    for kind in KINDS:
        size += len(connection.get_summaries(session_id, kind, min(BASIS_CHUNK, chunks - 1), 1)[1])
    for _, page in connection.summaries(session_id, STATE_KIND, 0, chunks):
        size += len(page)
    sinks, recent = OPTIONS.sink_chunks, OPTIONS.recent_chunks
    room = connection.fetch_records_max(session_id)
    for at, count in ((0, sinks), (chunks - recent, recent)):
        step = room // len(extent_keys(GEOMETRY, 0, at, count))
        for layer in range(0, GEOMETRY.layers, step):
            layers = range(layer, min(layer + step, GEOMETRY.layers))
            keys = np.concatenate([extent_keys(GEOMETRY, each, at, count) for each in layers])
            fetched = connection.fetch(session_id, keys)
            if fetched.statuses is not None:
                raise RuntimeError("damaged records")
            size += fetched.records.nbytes
    return size


def open_session(connection: Connection, chunks: int) -> None:
    session = Client(connection).open("parked", GEOMETRY, ROPE, OPTIONS, create=False)
    if session.tokens != chunks * GEOMETRY.chunk_tokens:
        raise RuntimeError(f"the session has {session.tokens} tokens")


def sequential_gbs(path: Path, kind: str) -> float:
    """GB/s of fio's direct reads of 1 MiB in sequence, 8 in flight, into "huge" or "plain" pages; 0: it cannot."""
    size = path.stat().st_size
    command = (
        f"fio --name=read --filename={path} --ioengine=io_uring --direct=1 --rw=read --bs=1M --iodepth=8 --readonly "
    )
    command += f"--size={size} --time_based --runtime=2 --output-format=json"
    return fio_speed(command, 8 << 20, kind) or 0.0


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
            connection = Connection(daemon.target, deadline_s=120)
            fill(connection, chunks)
            connection.disconnect()
        segment = max((directory / "kv").glob("segment-*"), key=lambda path: path.stat().st_size)
        for _ in range(repeats):
            run = {f"fio_{kind}_gbs": sequential_gbs(segment, kind) for kind in KINDS_OF_PAGES}
            for what, does in (("read", read_all), ("session", open_session)):
                with daemon_on(directory, "1GiB", "--scrub-rate", "0") as daemon:
                    connection = Connection(daemon.target, deadline_s=120)
                    started = time.perf_counter()
                    size = does(connection, chunks) or run["bytes"]
                    taken = time.perf_counter() - started
                    connection.disconnect()
                run |= {"bytes": size, f"{what}_s": taken, f"{what}_gbs": size / taken / 1e9}
            for kind in KINDS_OF_PAGES:  # the mean of before and after
                run[f"fio_{kind}_gbs"] = (run[f"fio_{kind}_gbs"] + sequential_gbs(segment, kind)) / 2
            runs.append(run)
            huge, plain = run["fio_huge_gbs"], run["fio_plain_gbs"]
            print(
                f"{run['bytes'] / stored:.1%} of {stored / 1e9:.1f} GB; fio {huge:.2f} GB/s, {plain:.2f} into plain pages"
            )
            for what in ("read", "session"):
                gbs = run[f"{what}_gbs"]
                print(
                    f"  {what} {run[f'{what}_s']:.2f} s, {gbs:.2f} GB/s, {gbs / huge:.2f} and {gbs / plain:.2f} of fio"
                )
    finally:
        shutil.rmtree(directory)
    results.append("resume", {"tokens": tokens, "router": "sketch"}, {"stored_bytes": stored, "runs": runs}, BUILD)


if __name__ == "__main__":
    typer.run(main)
