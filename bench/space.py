"""What giving space back costs, how much more than the data a store takes, and how fast a large one opens.

    python bench/space.py --nvme DIR [--record]

- `holes`: half of the chunks of one segment die, every second one. Holes (and their sync), against compaction: read the
  live half, write it to a new segment, sync.
- `churn`: sessions come and go at a constant amount of live data; bytes on disk for each live byte.
- `open`: a store of 1 M tokens of Qwen3-30B (48 layers, 4 KV heads, dim 128, bf16). Its frames have real tables and holes
  for bodies, which a start does not read. Seconds until the engine answers.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from pathlib import Path

import numpy as np
import results
import structlog
from hga_kvd.config import Settings
from hga_kvd.engine import Engine
from hga_kvd.filedisk import FileDisk, make_disk
from hga_kvd.format import (
    CHUNKS,
    FrameHeader,
    encode_chunk_table,
    encode_frame_head,
    encode_segment_header,
    segment_name,
)
from hga_kvd.geometry import Geometry
from hga_kvd.manifest import Manifest, SegmentEntry, SessionEntry, encode_manifest
from hga_kvd.memory import address_of, aligned_buffer

MIB = 1 << 20
QWEN3_30B = Geometry(48, 4, 128, "bfloat16")
CHUNK_BYTES = 4 * MIB
LOG = structlog.wrap_logger(structlog.ReturnLogger())


def disk_at(directory: Path) -> FileDisk:
    return make_disk(Settings(nvme=directory, ram=2 * MIB), LOG)


def transfer(disk: FileDisk, write: bool, handle: int, offsets: np.ndarray, memory: np.ndarray) -> None:
    count = len(offsets)
    addresses = address_of(memory) + np.arange(count, dtype=np.uint64) * np.uint64(CHUNK_BYTES)
    call = disk.write if write else disk.read
    lengths = np.full(count, CHUNK_BYTES)
    assert not call(np.full(count, handle, np.int32), offsets, addresses.astype(np.uint64), lengths).any()


def holes(directory: Path, chunks: int = 64) -> dict[str, float]:
    disk = disk_at(directory)
    memory = aligned_buffer(chunks * CHUNK_BYTES)
    memory[:] = np.random.default_rng(1).integers(0, 256, len(memory), dtype=np.uint8)
    offsets = np.arange(chunks) * CHUNK_BYTES
    handle = disk.create("old", chunks * CHUNK_BYTES)
    transfer(disk, True, handle, offsets, memory)
    disk.sync(handle)
    live = chunks // 2
    start = time.perf_counter()
    other = disk.create("new", live * CHUNK_BYTES)
    transfer(disk, False, handle, offsets[::2], memory[: live * CHUNK_BYTES])
    transfer(disk, True, other, offsets[:live], memory[: live * CHUNK_BYTES])
    disk.sync(other)
    disk.sync_names()
    compaction_s = time.perf_counter() - start
    before = disk.taken(handle)
    start = time.perf_counter()
    for offset in offsets[1::2].tolist():
        disk.punch(handle, offset, CHUNK_BYTES)
    disk.sync(handle)
    holes_s = time.perf_counter() - start
    given_back = before - disk.taken(handle)
    disk.shutdown()
    return {"given_back_mib": given_back / MIB, "holes_s": holes_s, "compaction_s": compaction_s}


def churn(directory: Path, live_chunks: int = 300, sessions: int = 250) -> dict[str, float]:
    geometry = Geometry(8, 4, 128, "bfloat16")  # chunks of 1 MiB
    settings = Settings(nvme=directory, ram=64 * MIB, segment_bytes=16 * MIB, nvme_max=500 * MIB)
    engine = Engine(settings, make_disk(settings, LOG), LOG)
    chance, live, worst, total, written = random.Random(1), dict[int, int](), 0.0, 0.0, 0
    payload = np.random.default_rng(1).integers(0, 256, 12 * geometry.chunk_bytes, dtype=np.uint8)
    for number in range(sessions):
        count = chance.randint(1, 12)
        session = engine.open(f"s{number}", geometry, create=True).session_id
        engine.append(session, 0, count, payload[: count * geometry.chunk_bytes], b"")
        engine.flush(session)
        live[session] = count
        written += count * geometry.chunk_bytes
        while sum(live.values()) > live_chunks:
            victim = chance.choice(list(live))
            engine.delete(victim)
            del live[victim]
        stats = engine.stats()
        assert stats.nvme_bytes_used <= 500 * MIB
        if number > sessions // 2:
            worst = max(worst, stats.nvme_bytes_used / stats.nvme_bytes_live)
            total += stats.nvme_bytes_used / stats.nvme_bytes_live
    amplification = engine.stats().written_bytes / written
    engine.shutdown()
    mean = total / (sessions - sessions // 2 - 1)
    return {"space_amplification_worst": worst, "space_amplification_mean": mean, "write_amplification": amplification}


def write_large_store(directory: Path, tokens: int) -> None:
    geometry, per_frame = QWEN3_30B, 2
    chunk_count = tokens // geometry.chunk_tokens
    numbers = np.random.default_rng(1)
    segments, segment_id, offset, sequence, size = [], 0, 0, 0, 256 * MIB
    file = -1
    for first in range(0, chunk_count, per_frame):
        uids = np.arange(first + 1, first + 1 + per_frame, dtype=np.uint64)
        sums = numbers.integers(0, 1 << 62, (per_frame, geometry.layers, geometry.records_per_extent)).astype(np.uint64)
        ids = numbers.integers(0, 150_000, (per_frame, geometry.chunk_tokens)).astype(np.uint32)
        table = encode_chunk_table(geometry.record_bytes, uids, sums, np.ones(per_frame, bool), ids)
        body = per_frame * geometry.chunk_bytes
        if not segment_id or offset + body + (64 << 10) > size:
            if segment_id:
                segments.append(SegmentEntry(segment_id, "sealed", offset))
                os.close(file)
            segment_id, offset, sequence = segment_id + 1, 4096, 0
            file = os.open(directory / segment_name(segment_id), os.O_RDWR | os.O_CREAT)
            os.truncate(file, size)
            os.pwrite(file, encode_segment_header(segment_id, size), 0)
        header = FrameHeader(CHUNKS, segment_id, offset, sequence, offset, 1, first, per_frame, len(table), body)
        os.pwrite(file, encode_frame_head(header, table), offset)
        offset, sequence = offset + header.frame_bytes, sequence + 1
    segments.append(SegmentEntry(segment_id, "sealed", offset))
    os.close(file)
    entry = SessionEntry(1, "large", geometry, chunk_count)
    manifest = Manifest(True, 2, chunk_count + 1, segment_id + 1, (entry,), tuple(segments))
    (directory / "MANIFEST").write_bytes(encode_manifest(manifest))
    os.sync()


def open_large(directory: Path, tokens: int = 1 << 20) -> dict[str, float]:
    write_large_store(directory, tokens)
    settings = Settings(nvme=directory, ram=64 * MIB)
    taken = []
    for _ in range(2):
        disk = make_disk(settings, LOG)
        start = time.perf_counter()
        engine = Engine(settings, disk, LOG, background=False)
        taken.append(time.perf_counter() - start)
        info = engine.info(1)
        assert (info.chunk_count, info.damaged_records) == (tokens // 64, 0)
        engine.shutdown()
    return {"open_s": taken[0], "open_again_s": taken[1], "tokens": tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nvme", type=Path, required=True, help="a directory on the disk to measure")
    parser.add_argument("--only", choices=("holes", "churn", "open"))
    parser.add_argument("--record", action="store_true", help="add a line to bench/results/space.jsonl")
    options = parser.parse_args()
    numbers: dict[str, dict[str, float]] = {}
    for name, measure in (("holes", holes), ("churn", churn), ("open", open_large)):
        if options.only in (None, name):
            with tempfile.TemporaryDirectory(dir=options.nvme) as directory:
                numbers[name] = measure(Path(directory))
            print(name, json.dumps(numbers[name]))
    if options.record:
        results.append("space", {"geometry": "48 x 4 x 128 bfloat16"}, numbers, options.nvme)


if __name__ == "__main__":
    main()
