"""The engine over real files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import structlog
from hga_kvd import jobs
from hga_kvd.config import Settings
from hga_kvd.engine import Engine
from hga_kvd.errors import StartRefused
from hga_kvd.filedisk import make_disk
from hga_kvd.geometry import Geometry
from hga_kvd.testing.oracle import random_keys, records_of
from hga_kvd.testing.simdisk import SimDisk
from hga_kvd.testing.trial import Trial

MIB = 1 << 20
WIDE = Geometry(2, 2, 64, "float32")
LOG = structlog.wrap_logger(structlog.ReturnLogger())


def make(directory: Path, io_engine: str = "auto") -> Engine:
    settings = Settings(ram=4 * MIB, nvme=directory, nvme_max=256 * MIB, segment_bytes=4 * MIB, io_engine=io_engine)
    try:
        disk = make_disk(settings, LOG)
    except StartRefused as error:
        pytest.skip(str(error))
    return Engine(settings, disk)


@pytest.mark.parametrize("io_engine", ["auto", "posix"])
def test_round_trip(tmp_path: Path, io_engine: str) -> None:
    chance = np.random.default_rng(1)
    chunks = chance.integers(0, 256, (100, WIDE.chunk_bytes), dtype=np.uint8)
    engine = make(tmp_path, io_engine)
    session = engine.open("a", WIDE, create=True).session_id
    for i in range(0, 100, 5):
        engine.append(session, i, 5, chunks[i : i + 5].reshape(-1), b"")
    engine.put_summaries(session, "k", 0, 100, chance.bytes(100 * 777))
    summaries = engine.get_summaries(session, "k", 0, 100, MIB)
    assert engine.flush(session) == 100
    for _ in range(2):
        for skew in (0, 1):
            keys = random_keys(chance, WIDE, 100, 500)
            found = np.zeros(500 * 8192 + skew, np.uint8)[skew:]
            assert engine.fetch(session, keys, found).nvme_records > 0
            assert (found.reshape(500, -1) == records_of(WIDE, chunks, keys)).all()
        assert engine.get_summaries(session, "k", 0, 100, MIB) == summaries
        engine.shutdown()
        engine = make(tmp_path, io_engine)
    engine.delete(session)
    engine.shutdown()
    assert not list(tmp_path.glob("*.kvs"))


def test_what_will_be_flushed_is_written_by_the_frame_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "FRAME_BODY_BYTES", 4 * WIDE.chunk_bytes)
    engine = Engine(Settings(ram=16 * MIB, segment_bytes=8 * MIB), SimDisk(), background=False)
    writeout, chunk = engine._writeout, np.arange(WIDE.chunk_bytes, dtype=np.uint32).view(np.uint8)[: WIDE.chunk_bytes]
    assert writeout is not None
    ours = engine.open("a", WIDE, create=True).session_id
    temporary = engine.open("", WIDE, create=True).session_id
    for i in range(8):
        engine.append(temporary, i, 1, chunk, b"")
    for i in range(3):
        engine.append(ours, i, 1, chunk, b"")
    assert not writeout.write_ahead(), "half a frame, and what nobody flushes"
    engine.append(ours, 3, 1, chunk, b"")
    assert writeout.write_ahead()
    assert {s.session_id: s.durable_chunk_count for s in engine.list()} == {ours: 4, temporary: 0}
    assert list(writeout.dirty) == [temporary]
    assert not writeout.write_ahead()
    engine.shutdown()


def test_workload(tmp_path: Path) -> None:
    trial = Trial(make(tmp_path), 11, (WIDE, Geometry(3, 3, 80, "bfloat16")))
    for _ in range(3):
        trial.run(150)
        trial.store.shutdown()
        trial.stopped()
        trial.restarted(make(tmp_path))
    trial.store.shutdown()
