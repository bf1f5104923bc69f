"""What a million tokens cost before any K/V is read: memory of the index, time to open the store, latency of a fetch.

The store is written as the daemon would have left it: 16,384 chunks of 48 layers, 4 KV heads, dim 128, bfloat16, in sealed
segments, with real headers, tables and manifest (0.2 GB). Bodies are holes, but for layer 0: there the fetches go.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
import results
import typer
from demo import BUILD
from hga_kvd.arena import copy_records
from hga_kvd.checksum import checksum, record_seeds
from hga_kvd.config import Settings
from hga_kvd.engine import Engine
from hga_kvd.filedisk import make_disk
from hga_kvd.format import (
    CHUNKS,
    FrameHeader,
    encode_chunk_table,
    encode_frame_head,
    encode_segment_header,
    segment_name,
)
from hga_kvd.geometry import KEY_DTYPE, Geometry, Keys
from hga_kvd.log import make_log
from hga_kvd.manifest import MANIFEST_NAME, Manifest, SegmentEntry, SessionEntry, encode_manifest
from rich.console import Console
from rich.table import Table

U8 = npt.NDArray[np.uint8]
GEOMETRY = Geometry(layers=48, kv_heads=4, head_dim=128, dtype="bfloat16", model_fingerprint="bench")
SMALL = Geometry(layers=12, kv_heads=4, head_dim=4, dtype="float8_e5m2", model_fingerprint="bench")
FRAME_CHUNKS, SEGMENT_FRAMES = 2, 20
LENGTHS = (4096, 65536, 1 << 20)
KEYS_A_FETCH = 8


def write_store(directory: Path, chunks: int) -> int:
    """Returns bytes of headers and tables."""
    g, record = GEOMETRY, bytes(GEOMETRY.record_bytes)
    written, segments = 0, []
    per_segment = FRAME_CHUNKS * SEGMENT_FRAMES
    for first in range(0, chunks, per_segment):
        segment_id = 1 + first // per_segment
        heads, offset = [], 4096
        for sequence, at in enumerate(range(first, min(first + per_segment, chunks), FRAME_CHUNKS)):
            uids = np.arange(at + 1, at + 1 + FRAME_CHUNKS, dtype=np.uint64)
            sums = np.full((FRAME_CHUNKS, g.layers, g.records_per_extent), 1, np.uint64)
            seeds = record_seeds(uids[:, None], 0, np.arange(g.records_per_extent))
            sums[:, 0] = np.vectorize(lambda seed: checksum(record, int(seed)), otypes=[np.uint64])(seeds)
            known, ids = np.zeros(FRAME_CHUNKS, bool), np.zeros((FRAME_CHUNKS, g.chunk_tokens), np.uint32)
            table = encode_chunk_table(g.record_bytes, uids, sums, known, ids)
            body = FRAME_CHUNKS * g.chunk_bytes
            header = FrameHeader(CHUNKS, segment_id, offset, sequence, offset, 1, at, FRAME_CHUNKS, len(table), body)
            heads.append((offset, encode_frame_head(header, table), header.body_offset))
            offset += header.frame_bytes
        path = directory / segment_name(segment_id)
        with path.open("wb") as file:
            file.truncate(offset)
            os.pwrite(file.fileno(), encode_segment_header(segment_id, offset), 0)
            for place, head, body_offset in heads:
                written += os.pwrite(file.fileno(), head, place)
                for chunk in range(FRAME_CHUNKS):
                    os.pwrite(file.fileno(), bytes(g.extent_bytes), body_offset + chunk * g.chunk_bytes)
            os.fsync(file.fileno())
        segments.append(SegmentEntry(segment_id, "sealed", offset))
    session = SessionEntry(1, "long", g, chunks)
    manifest = Manifest(True, 2, chunks + 1, len(segments) + 1, (session,), tuple(segments))
    (directory / MANIFEST_NAME).write_bytes(encode_manifest(manifest))
    return written


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


Way = Literal["disk", "ram", "few"]  # few: from RAM as the fast lane asks, in one turn of the lock
Taken = dict[int, tuple[float, float]]  # by length: median us of a fetch, and of its bare reads or copies


def random_keys(chance: np.random.Generator, g: Geometry, tokens: int) -> Keys:
    """Of 8 records of layer 0 below `tokens`."""
    keys = np.zeros(KEYS_A_FETCH, KEY_DTYPE)
    keys["group"] = chance.choice(tokens // g.group_tokens, KEYS_A_FETCH, replace=False)
    keys["kv_head"] = chance.integers(0, g.kv_heads, KEYS_A_FETCH)
    return keys


def bare_read_s(engine: Engine, session_id: int, keys: Keys, destination: U8) -> float:
    """The same reads, straight from the disk interface: no index, no checksum, no arena."""
    session, disk, log = engine._residency.sessions[session_id], engine._disk, engine._parts.segments
    assert disk is not None
    assert log is not None
    g, table = session.table.geometry, session.table
    chunk, group = np.divmod(keys["group"].astype(np.int64), g.groups_per_chunk)
    rows = session.rows[chunk]
    offsets = table.offset[rows] + (keys["kv_head"] * g.groups_per_chunk + group) * g.record_bytes
    handles = np.array([log.segments[int(number)].handle for number in table.segment[rows]], np.int32)
    addresses = np.uint64(destination.ctypes.data) + np.arange(len(keys), dtype=np.uint64) * np.uint64(g.record_bytes)
    order = np.lexsort((offsets, handles))
    lengths = np.full(len(keys), g.record_bytes)
    started = time.perf_counter()
    disk.read(handles[order], offsets[order], addresses, lengths)
    return time.perf_counter() - started


def bare_copy_s(engine: Engine, session_id: int, keys: Keys, destination: U8) -> float:
    """The same copies from the arena, one memcpy a record: no index, no lock."""
    session, residency = engine._residency.sessions[session_id], engine._residency
    g, slots = session.table.geometry, residency.pools[session.pool].slots
    chunk, group = np.divmod(keys["group"].astype(np.int64), g.groups_per_chunk)
    records = keys["kv_head"] * g.groups_per_chunk + group
    starts = slots.starts(session.table.slot[session.rows[chunk], 0], records)
    at = np.arange(len(keys)) * g.record_bytes
    started = time.perf_counter()
    copy_records(residency.memory, starts, destination.data, at, g.record_bytes)
    return time.perf_counter() - started


def latencies_us(
    engine: Engine, session_id: int, tokens: int, fetches: int, way: Way
) -> tuple[list[float], list[float]]:
    """Of fetches, all of them from disk or all from RAM; and of bare transfers of as many other records."""
    chance = np.random.default_rng(tokens)
    g = engine.info(session_id).geometry
    destination = np.zeros(KEYS_A_FETCH * g.record_bytes + 4096, np.uint8)
    start = -destination.ctypes.data % 4096
    destination = destination[start : start + KEYS_A_FETCH * g.record_bytes]
    taken: list[float] = []
    bare: list[float] = []
    while len(taken) < fetches:
        keys = random_keys(chance, g, tokens)
        if way == "few":
            packed = keys.tobytes()
            started = time.perf_counter()
            ram_records = engine.fetch_few(session_id, packed, destination.data)
            elapsed = time.perf_counter() - started
        else:
            started = time.perf_counter()
            fetched = engine.fetch(session_id, keys, destination)
            elapsed, ram_records = time.perf_counter() - started, fetched.ram_records
            if fetched.statuses is not None:
                raise RuntimeError("damaged records in a new store")
        if ram_records == (0 if way == "disk" else len(keys)):
            taken.append(elapsed * 1e6)
            bare_s = bare_read_s if way == "disk" else bare_copy_s
            bare.append(bare_s(engine, session_id, random_keys(chance, g, tokens), destination) * 1e6)
    return taken, bare


def in_turns(engine: Engine, sessions: dict[int, int], fetches: int, way: Way) -> Taken:
    """The lengths take turns, so that a busy moment hits all of them."""
    found: dict[int, tuple[list[float], list[float]]] = {tokens: ([], []) for tokens in sessions}
    for _ in range(10):
        for tokens, session_id in sessions.items():
            taken, bare = latencies_us(engine, session_id, tokens, fetches // 10, way)
            found[tokens][0].extend(taken)
            found[tokens][1].extend(bare)
    return {tokens: (statistics.median(taken), statistics.median(bare)) for tokens, (taken, bare) in found.items()}


def main(
    fetches: Annotated[int, typer.Option(help="a length and a tier", min=10)] = 1000,
    tokens: Annotated[int, typer.Option(help="of the store")] = 1 << 20,
) -> None:
    """Prints the three; appends to bench/results/index_scale.jsonl."""
    (BUILD / "bench").mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(dir=BUILD / "bench"))
    chunks = tokens // GEOMETRY.chunk_tokens
    lengths = [length for length in LENGTHS if length <= tokens]
    null = (BUILD / "bench" / "index_scale.log").open("w")
    try:
        tables = write_store(directory, chunks)
        settings = Settings(nvme=directory, ram=2 << 20, scrub_rate=0)
        disk = make_disk(settings, make_log("error", null))
        before, started = resident_bytes(), time.perf_counter()
        engine = Engine(settings, disk, background=False)
        open_s, index_bytes = time.perf_counter() - started, resident_bytes() - before - (2 << 20)
        on_disk = in_turns(engine, dict.fromkeys(lengths, 1), fetches, "disk")
        engine.shutdown()
    finally:
        shutil.rmtree(directory)
        null.close()
    small = Engine(Settings(ram=4 << 30, scrub_rate=0), None, background=False)
    sessions = {length: small.open(f"s{length}", SMALL, create=True).session_id for length in lengths}
    for length, session_id in sessions.items():
        count = length // SMALL.chunk_tokens
        for first in range(0, count, 64):
            part = min(64, count - first)
            small.append(session_id, first, part, np.zeros(part * SMALL.chunk_bytes, np.uint8), b"")
    in_ram = in_turns(small, sessions, fetches, "ram")
    few = in_turns(small, sessions, fetches, "few")
    per_extent = index_bytes / (chunks * GEOMETRY.layers)
    print(f"{tokens} tokens, {chunks * GEOMETRY.layers} extents, {tables / 1e6:.0f} MB of tables")
    print(f"opened in {open_s:.2f} s; index {per_extent:.0f} bytes an extent, all-in (resident memory)")
    table = Table(title=f"fetch of {KEYS_A_FETCH} random records, median us")
    for name in ("tokens", "from disk", "bare reads", "from RAM", "bare copies", "by the lane", "bare copies"):
        table.add_column(name, justify="right")
    for length in lengths:
        disk_us, ram_us = on_disk[length], (*in_ram[length], *few[length])
        table.add_row(str(length), *(f"{us:.0f}" for us in disk_us), *(f"{us:.1f}" for us in ram_us))
    Console().print(table)
    numbers = {"open_s": open_s, "bytes_per_extent": per_extent, "table_bytes": tables}
    numbers |= {"disk_us": on_disk, "ram_us": in_ram, "few_us": few}
    results.append("index_scale", {"tokens": tokens, "fetches": fetches}, numbers, BUILD)


if __name__ == "__main__":
    typer.run(main)
