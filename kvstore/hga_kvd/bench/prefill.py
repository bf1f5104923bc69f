"""Profile `prefill`: closed chunks are appended as a prefill makes them, then flushed; beside fio's sequential write.

The time is that of the append calls and of the flush that makes all of them durable; the payload is built before, in the
shared region, where a client builds it too. fio writes the same bytes with 8 blocks in flight and syncs at its end.
"""

from __future__ import annotations

from collections.abc import Iterator

from hga_kvd.bench.burst import burst_geometry
from hga_kvd.bench.daemon import Daemon
from hga_kvd.bench.meter import Case, Stage
from hga_kvd.bench.options import Options
from hga_kvd.bench.probes import fio_gb_per_s
from hga_kvd.bench.session import APPEND_BYTES_MAX, Stopwatch, empty_session

PREFILL_BYTES_MAX = 512 << 20
FIO_DEPTH = 8


def prefill(daemon: Daemon, options: Options) -> Iterator[Stage | Case]:
    geometry, _ = burst_geometry(8192)
    size = min(options.size, PREFILL_BYTES_MAX)
    daemon.restart(max(32 << 20, size // 4))  # so that most of it must be written while it is appended
    connection = daemon.connect()
    samples = []
    for repeat in range(options.repeats):
        yield Stage(f"append and flush, {repeat + 1} of {options.repeats}", repeat / options.repeats)
        speed = None
        if daemon.place is not None:
            path = daemon.place / "fio.bin"
            speed = fio_gb_per_s(path, "write", size, APPEND_BYTES_MAX, FIO_DEPTH, 0)
            path.unlink(missing_ok=True)
        with empty_session(connection, geometry, f"prefill-{repeat}", seed=repeat) as session:
            watch = Stopwatch(daemon.pid)
            written = session.append(watch, size // geometry.chunk_bytes)
            watch.time(lambda s=session: connection.flush(s.session_id))  # type: ignore[misc]
            samples.append(watch.sample(written, written, written / speed / 1e9 if speed else None))
    connection.disconnect()
    parameters = {"chunk_bytes": geometry.chunk_bytes, "append_bytes": APPEND_BYTES_MAX, "bytes": size}
    reference = "fio's sequential write" if samples[0].reference_s else ""
    yield Case("prefill", "append and flush", "append", reference, samples, parameters)
