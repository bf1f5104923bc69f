"""Profile `resume`: what a client reads before it can decode in a session that nobody has in RAM.

All summaries, then sinks and recent chunks of every layer, one fetch a layer, as Session.resume does. The session is parked
before each sample, so that it comes from disk; a temporary daemon is started anew too.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from hga_kvd_client.connection import Connection
from hga_kvd_client.geometry import Geometry
from hga_kvd_client.keys import extent_keys

from hga_kvd.bench.content import WrongBytes
from hga_kvd.bench.daemon import Daemon
from hga_kvd.bench.meter import Case, Stage
from hga_kvd.bench.options import Options
from hga_kvd.bench.probes import RawFile
from hga_kvd.bench.session import Stopwatch, Stored, filled_session

SINK_CHUNKS, RECENT_CHUNKS = 2, 8
KIND = "bench.v1"
GEOMETRY = Geometry(layers=24, kv_heads=8, head_dim=128, dtype="bfloat16", model_fingerprint="bench")
CHUNKS_MAX = 64
ARENA_BYTES = 128 << 20


def resume(daemon: Daemon, options: Options) -> Iterator[Stage | Case]:
    g = GEOMETRY
    chunks = max(SINK_CHUNKS + RECENT_CHUNKS, min(CHUNKS_MAX, options.size // g.chunk_bytes))
    yield Stage(f"storing {chunks * g.chunk_bytes >> 20} MiB")
    daemon.restart(ARENA_BYTES)
    connection = daemon.connect()
    raw = None
    if daemon.place is not None:
        raw = RawFile(daemon.place, (SINK_CHUNKS + RECENT_CHUNKS) * g.chunk_bytes, options.queue_depth)
    summary_bytes = (1 + g.groups_per_chunk) * g.layers * g.kv_heads * g.head_dim * 2  # one mean a chunk and a group
    summaries = np.random.default_rng(0).integers(0, 256, chunks * summary_bytes, np.uint8).tobytes()
    samples = []
    with filled_session(connection, g, chunks, "resume") as stored:
        connection.put_summaries(stored.session_id, KIND, 0, chunks, summaries)
        connection.flush(stored.session_id)
        name = connection.info(stored.session_id).name
        for repeat in range(options.repeats):
            yield Stage(f"resume, {repeat + 1} of {options.repeats}", repeat / options.repeats)
            connection.park(stored.session_id)
            daemon.restart(ARENA_BYTES)
            reader = daemon.connect()
            watch = Stopwatch(daemon.pid)
            session_id = watch.time(lambda c=reader: c.open(name, None, create=False)).session_id  # type: ignore[misc]
            got = watch.time(lambda c=reader, s=session_id: _summaries(c, s, chunks))  # type: ignore[misc]
            if got != summaries:
                raise WrongBytes("summaries came back with other bytes than were stored")
            here = Stored(reader, session_id, stored.content, chunks, stored.chance)
            for layer in range(g.layers):
                parts = ((0, SINK_CHUNKS), (chunks - RECENT_CHUNKS, RECENT_CHUNKS))
                here.fetch(watch, np.concatenate([extent_keys(g, layer, first, count) for first, count in parts]))
            records, from_disk = watch.records * g.record_bytes, watch.disk_records * g.record_bytes
            sample = watch.sample(records + len(summaries), from_disk, _raw_s(raw, from_disk) if raw else None)
            samples.append(sample)
            reader.disconnect()
    connection.disconnect()
    if raw is not None:
        raw.close()
    totals = [sample.total_s for sample in samples]
    parameters = {
        "chunks": chunks,
        "tokens": chunks * g.chunk_tokens,
        "resume_s": totals,
        "summary_bytes": summary_bytes,
    }
    reference = "the same reads alone" if raw else ""
    yield Case("resume", "summaries, sinks, recent chunks", "call", reference, samples, parameters)


def _summaries(connection: Connection, session_id: int, chunks: int) -> bytes:
    parts, first = [], 0
    while first < chunks:
        count, payload = connection.get_summaries(session_id, KIND, first, chunks - first)
        parts.append(payload)
        first += count
    return b"".join(parts)


def _raw_s(raw: RawFile, size: int) -> float | None:
    """The extents of these chunks, one read each, a layer's ten in one batch."""
    extent = GEOMETRY.extent_bytes
    places = np.arange(size // extent).reshape(GEOMETRY.layers, -1) if size % (extent * GEOMETRY.layers) == 0 else None
    if places is None or not places.size:
        return None  # some came from RAM: these are not the same reads
    # Chunks apart in the file, as the extents of one layer lie.
    offsets = [np.arange(places.shape[1]) * GEOMETRY.chunk_bytes + layer * extent for layer in range(GEOMETRY.layers)]
    return sum(raw.read_s(of_layer, np.full(len(of_layer), extent)) for of_layer in offsets)
