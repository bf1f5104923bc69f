"""Profile `decode`: a recorded model's decode steps again, fetch for fetch, with a bank in front, most K/V on disk.

A step is one fetch for each layer that misses groups, one after the other, as a decode step does it; its time is the sum of
its fetches. Beside it, in turns, the reads that the disk did in those steps, alone: the same sizes at the same
distances, neighbours merged, one batch a layer, straight on the I/O engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt
from hga_kvd_client.geometry import Geometry, Keys

from hga_kvd.bench.daemon import Daemon
from hga_kvd.bench.meter import Case, NothingToMeasure, Sample, Stage
from hga_kvd.bench.options import Options
from hga_kvd.bench.probes import ALIGNMENT, RawFile, fio_gb_per_s
from hga_kvd.bench.session import APPEND_BYTES_MAX, Stopwatch, filled_session
from hga_kvd.bench.trace import Misses, bank_misses

I64 = npt.NDArray[np.int64]


def trace_geometry(options: Options) -> tuple[Geometry, int]:
    """The geometry of the recorded model, and how many chunks its groups fill."""
    layers, kv_heads, _, groups = options.trace.shape
    geometry = Geometry(layers, kv_heads, options.head_dim, "bfloat16", model_fingerprint="bench")
    return geometry, -(-groups // geometry.groups_per_chunk)


def arena_bytes(geometry: Geometry, chunks: int, share: float) -> int:
    return max(int(share * chunks * geometry.chunk_bytes), 2 * max(APPEND_BYTES_MAX, geometry.chunk_bytes))


def trace_misses(options: Options) -> Misses:
    """What the bank leaves of the trace's steps. Raises: NothingToMeasure when that is nothing."""
    steps = options.warm_up_steps + options.steps_max
    misses = bank_misses(options.trace[:, :, :steps], options.bank_groups, options.warm_up_steps)
    if not len(misses.keys):
        raise NothingToMeasure(
            f"a bank of {options.bank_groups} groups a KV head leaves nothing of {options.trace_name} to be fetched: "
            "give a smaller --bank, or a trace of more steps"
        )
    return misses


def decode(daemon: Daemon, options: Options) -> Iterator[Stage | Case]:
    geometry, chunks = trace_geometry(options)
    yield Stage(f"a bank of {options.bank_groups} groups a KV head before {options.trace_name}")
    misses = trace_misses(options)
    yield Stage(f"storing {chunks * geometry.chunk_bytes >> 20} MiB")
    daemon.restart(arena_bytes(geometry, chunks, options.arena))
    connection = daemon.connect()
    raw = None
    if daemon.place is not None and geometry.record_bytes % ALIGNMENT == 0:
        raw = RawFile(daemon.place, chunks * geometry.chunk_bytes, options.queue_depth)
    of_step: list[Sample] = []
    of_fetch: list[Sample] = []
    fio: list[float] = []
    with filled_session(connection, geometry, chunks, "decode") as stored:
        blocks = np.array_split(np.unique(misses.steps), options.repeats)
        for number, block in enumerate(blocks):
            if not len(block):
                continue
            yield Stage(f"decode steps {block[0]} to {block[-1]}", number / len(blocks))
            first, end = np.searchsorted(misses.steps, (block[0], block[-1] + 1))
            watch, from_disk = Stopwatch(daemon.pid), []
            for keys in misses.fetches[first:end]:
                fetched = stored.fetch(watch, keys)
                from_disk.append(_some(keys, fetched.nvme_records, stored.chance))
            size, disk_bytes = watch.records * geometry.record_bytes, watch.disk_records * geometry.record_bytes
            sample = watch.sample(size, disk_bytes, None)
            if raw is not None:
                batches = [merged_reads(geometry, keys) for keys in from_disk if len(keys)]
                sample = replace(sample, reference_s=sum(raw.read_s(*batch) for batch in batches))
                depth = max(1, round(sum(len(offsets) for offsets, _ in batches) / max(1, len(batches))))
                speed = fio_gb_per_s(raw.path, "randread", raw.size, geometry.record_bytes, depth, options.seconds)
                fio += [disk_bytes / speed / 1e9 / sample.total_s] if speed and disk_bytes else []
            of_fetch.append(sample)
            of_step.append(replace(sample, seconds=_by_step(sample.seconds, misses.steps[first:end], block)))
    parameters = {
        "trace": options.trace_name,
        "bank_groups": options.bank_groups,
        "bank_hit_rate": misses.hit_rate,
        "steps": len(np.unique(misses.steps)),
        "fetches_a_step": len(misses.steps) / max(1, len(np.unique(misses.steps))),
        "records_a_step": len(misses.keys) / max(1, len(np.unique(misses.steps))),
        "record_bytes": geometry.record_bytes,
        "arena": options.arena,
        "kv_bytes": chunks * geometry.chunk_bytes,
        "of_fio": fio,
    }
    reference = "the same reads alone" if raw else ""
    if raw is not None:
        raw.close()
    connection.disconnect()
    yield Case("decode", "one step, all layers", "step", reference, of_step, parameters)
    yield Case("decode", "one layer's fetch", "fetch", reference, of_fetch, parameters)


def merged_reads(geometry: Geometry, keys: Keys) -> tuple[I64, I64]:
    """(offsets, lengths) of the reads these records need in a file of [chunk][layer][kv_head][group], neighbours merged."""
    g = geometry
    chunk, group = np.divmod(keys["group"].astype(np.int64), g.groups_per_chunk)
    extent = chunk * g.layers + keys["layer"]
    records = np.sort((extent * g.kv_heads + keys["kv_head"]) * g.groups_per_chunk + group)
    starts = np.flatnonzero(np.diff(records, prepend=-2) != 1)
    lengths = np.diff(starts, append=len(records))
    return records[starts] * g.record_bytes, lengths * g.record_bytes


def _some(keys: Keys, count: int, chance: np.random.Generator) -> Keys:
    """As many of the keys as came from the disk; which ones, the daemon does not say."""
    return keys if count >= len(keys) else keys[np.sort(chance.choice(len(keys), count, replace=False))]


def _by_step(seconds: npt.NDArray[np.float64], steps: I64, block: I64) -> npt.NDArray[np.float64]:
    """Sum of each step's fetches; steps without a fetch are not in `block`."""
    return np.add.reduceat(seconds, np.searchsorted(steps, block))
