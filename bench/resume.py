"""How long until a parked session can decode again: a daemon restarts, a client opens the session.

Geometry of Qwen3-30B-A3B (48 layers, 4 KV heads, dim 128, bfloat16), synthetic K/V, routing state as router "sketch" stores
it: its basis (25 MB) and the sketch of every chunk (5.3 % of the K/V). `session` is Client.open, after which the session can
attend; `read` is the same bytes through a Connection, and dropped.

A disk may answer what was read before from a cache of its host, up to four times faster. So everything is compared in one
state. `cold`: bytes that were written and never read; a session of a new store, between two probes, files of as many bytes
that were written with it, which fio reads once, in sequence. `again`: all of them once more.

A session keeps what it reads, and fio nothing: its 8 MiB are filled over and over. So the limit is measured as well, in a
process of its own each time: our I/O engine alone, without daemon, client, checksums or copies, reads a probe into `new`
memory (as much as the session keeps, never touched before) and into memory that was `there`, of both kinds of pages. The
first is as fast as a session could be that keeps what it reads. `fresh` is such memory alone: written to once.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import results
import torch
import typer
from demo import BUILD
from hga_kvd.bench.daemon import daemon_on
from hga_kvd.filedisk import FileDisk
from hga_kvd.memory import address_of, aligned_buffer
from hga_kvd.uring import UringEngine
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
WINDOW_CHUNKS = OPTIONS.sink_chunks + OPTIONS.recent_chunks
FILL_CHUNKS = 4
CHUNKS = 1024
PROBE_BLOCK_BYTES = 8 << 20
READ_BYTES, READ_DEPTH, READ_ALIGNMENT = 1 << 20, 8, 4096  # of fio and of the raw engine


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
    session_id, chunk = connection.open("parked", GEOMETRY).session_id, min(BASIS_CHUNK, chunks - 1)
    size = sum(len(page) for _, page in connection.summaries(session_id, [(kind, chunk, 1) for kind in KINDS], 1 << 20))
    step = connection.ahead_bytes_max(session_id, STATE_BYTES) // STATE_BYTES
    wanted = [(STATE_KIND, at, min(step, chunks - at)) for at in range(0, chunks, step)]
    size += sum(len(page) for _, page in connection.summaries(session_id, wanted, STATE_BYTES))
    window = (*range(OPTIONS.sink_chunks), *range(chunks - OPTIONS.recent_chunks, chunks))
    keys = [extent_keys(GEOMETRY, 0, at, 1, GEOMETRY.layers) for at in window]
    for fetched in connection.records(session_id, keys, GEOMETRY.extent_bytes):
        if fetched.statuses is not None:
            raise RuntimeError("damaged records")
        size += fetched.records.nbytes
    return size


def open_session(connection: Connection, chunks: int) -> None:
    session = Client(connection).open("parked", GEOMETRY, ROPE, OPTIONS, create=False)
    if session.tokens != chunks * GEOMETRY.chunk_tokens:
        raise RuntimeError(f"the session has {session.tokens} tokens")


def write_probe(path: Path) -> None:
    """As many bytes as a resumed session reads, of any."""
    block = aligned_buffer(PROBE_BLOCK_BYTES)
    block[:] = np.random.default_rng().integers(0, 256, len(block), np.uint8)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o600)
    for at in range(0, CHUNKS * STATE_BYTES + WINDOW_CHUNKS * GEOMETRY.chunk_bytes, len(block)):
        os.pwrite(file, block.data, at)
    os.fsync(file)
    os.close(file)


def sequential_gbs(path: Path, kind: str) -> float:
    """GB/s of fio's direct reads of 1 MiB in sequence, 8 in flight, of the whole file, into "huge" or "plain" pages."""
    command = (
        f"fio --name=read --filename={path} --ioengine=io_uring --direct=1 --rw=read --bs=1M --iodepth=8 --readonly"
    )
    speed = fio_speed(f"{command} --output-format=json", 8 << 20, kind)
    if speed is None:
        raise RuntimeError("fio cannot read into huge pages here: it takes root, and fio")
    return speed


def raw_s(path: Path, kind: str, new: bool) -> float:
    """Seconds in which our engine reads the file in sequence, 1 MiB a read, into new memory or into memory already there."""
    command = [sys.executable, __file__, "--raw", str(path), kind, str(int(new))]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def read_raw(path: Path, kind: str, new: bool) -> float:
    """What raw_s runs in its process."""
    disk = FileDisk(path.parent, UringEngine(READ_DEPTH), READ_ALIGNMENT)
    handle = disk.open(path.name)
    count = disk.size(handle) // READ_BYTES
    memory = aligned_buffer(count * READ_BYTES, huge=kind == "huge")
    if not new:
        memory[::4096] = 1
    offsets, lengths = np.arange(count) * READ_BYTES, np.full(count, READ_BYTES)
    addresses = (address_of(memory) + offsets).astype(np.uint64)
    started = time.perf_counter()
    statuses = disk.read(np.full(count, handle, np.int32), offsets, addresses, lengths)
    taken = time.perf_counter() - started
    assert not statuses.any()
    disk.shutdown()
    return taken


def fresh_s() -> float:
    """Seconds that a new process takes to write once to as much memory as a session keeps: sketches, basis, window."""
    size = (
        CHUNKS * STATE_BYTES
        + WINDOW_CHUNKS * GEOMETRY.chunk_bytes
        + sum(len(part) for _, part in basis_parts(made_basis()))
    )
    code = f"import mmap, time; m = mmap.mmap(-1, {size}); t = time.perf_counter()\n"
    code += f"for at in range(0, {size}, 4096): m[at] = 1\nprint(time.perf_counter() - t)"
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def through_new_daemon(directory: Path, does: Callable[[Connection, int], int | None]) -> tuple[float, int | None]:
    """Seconds that this takes of a daemon that was just started, and what it returns."""
    with daemon_on(directory, "1GiB", "--scrub-rate", "0") as daemon:
        connection = Connection(daemon.target, deadline_s=120)
        started = time.perf_counter()
        size = does(connection, CHUNKS)
        taken = time.perf_counter() - started
        connection.disconnect()
    return taken, size


def one_store(directory: Path, repeats: int) -> list[dict[str, Any]]:
    """Fills it; a row for `cold` and one for each `again`."""
    probes = [directory / f"probe-{number}" for number in range(2)]
    with daemon_on(directory, "1GiB", "--scrub-rate", "0") as daemon:
        write_probe(probes[0])
        connection = Connection(daemon.target, deadline_s=120)
        fill(connection, CHUNKS)
        connection.disconnect()
        write_probe(probes[1])
    before = sequential_gbs(probes[0], "huge")
    cold_s, _ = through_new_daemon(directory, open_session)
    rows: list[dict[str, Any]] = [{"state": "cold", "fio_huge_gbs": (before + sequential_gbs(probes[1], "huge")) / 2}]
    rows[0] |= {"session_s": cold_s, "fresh_s": fresh_s()}
    for _ in range(repeats):
        row: dict[str, Any] = {"state": "again"}
        row |= {f"fio_{kind}_gbs": sequential_gbs(probes[0], kind) for kind in KINDS_OF_PAGES}
        row["read_s"], size = through_new_daemon(directory, read_all)
        row["session_s"], _ = through_new_daemon(directory, open_session)
        row["fresh_s"] = fresh_s()
        for kind in KINDS_OF_PAGES:
            for new in (True, False):
                row[f"raw_{'new' if new else 'there'}_{kind}_gbs"] = (
                    probes[0].stat().st_size / raw_s(probes[0], kind, new) / 1e9
                )
            row[f"fio_{kind}_gbs"] = (row[f"fio_{kind}_gbs"] + sequential_gbs(probes[1], kind)) / 2
        rows.append(row)
    for row in rows:
        row["bytes"] = size
        row |= {f"{what}_gbs": size / row[f"{what}_s"] / 1e9 for what in ("read", "session") if f"{what}_s" in row}
    return rows


def main(
    stores: Annotated[int, typer.Option(min=1, help="each is cold once")] = 3,
    repeats: Annotated[int, typer.Option(min=1, help="of each store, again")] = 1,
) -> None:
    """Prints share of the bytes, seconds, and GB/s beside fio; appends to bench/results/resume.jsonl."""
    (BUILD / "bench").mkdir(parents=True, exist_ok=True)
    stored = CHUNKS * GEOMETRY.chunk_bytes
    rows: list[dict[str, Any]] = []
    for _ in range(stores):
        directory = Path(tempfile.mkdtemp(dir=BUILD / "bench"))
        try:
            rows += one_store(directory, repeats)
        finally:
            shutil.rmtree(directory)
    print(f"{rows[0]['bytes'] / stored:.1%} of {stored / 1e9:.1f} GB are read")
    for row in rows:
        for what in ("read", "session"):
            if f"{what}_s" in row:
                beside = ("fio", "raw_new") if what == "session" else ("fio", "raw_there")
                fio = [
                    f"{row[f'{what}_gbs'] / row[key]:.2f} of {row[key]:.2f} ({key})"
                    for key in row
                    if key.startswith(beside)
                ]
                alone = f"; fresh memory alone {row['fresh_s']:.2f} s" if what == "session" else ""
                gbs = f"{row[f'{what}_gbs']:.2f} GB/s, {', '.join(fio)}"
                print(f"{row['state']}: {what} {row[f'{what}_s']:.2f} s, {gbs}{alone}")
    config = {"tokens": CHUNKS * GEOMETRY.chunk_tokens, "router": "sketch"}
    results.append("resume", config, {"stored_bytes": stored, "runs": rows}, BUILD)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--raw"]:
        print(read_raw(Path(sys.argv[2]), sys.argv[3], sys.argv[4] == "1"))
    else:
        typer.run(main)
