"""What the bench compares with and looks at: fio, the I/O engine alone, memcpy, CPU clocks. No daemon, no client."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hga_kvd.filedisk import FileDisk
from hga_kvd.io_engine import EngineUnavailable, IoEngine
from hga_kvd.memory import address_of, aligned_buffer
from hga_kvd.posix_engine import PosixEngine
from hga_kvd.uring import UringEngine

# Of any device; the probe has no need to find out.
ALIGNMENT = 4096
WRITE_BYTES = 8 << 20
MEMCPY_BYTES = 64 << 20
FIO_DEADLINE_S = 120


def cpu_seconds(pid: int) -> float | None:
    """CPU time of a process and of its children so far; None: there is no such process.

    The kernel's clock of another process (clock_getcpuclockid(3) makes its number): nanoseconds, ended threads included.
    """
    try:
        total = time.clock_gettime((~pid << 3) | 2)
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return None
    return total + sum(cpu_seconds(int(child)) or 0.0 for child in children)


def memcpy_gb_per_s() -> float:
    """Of one core, over more than caches hold: the median of nine."""
    source, destination = np.ones(MEMCPY_BYTES, np.uint8), np.zeros(MEMCPY_BYTES, np.uint8)
    taken = []
    for _ in range(9):
        start = time.perf_counter()
        np.copyto(destination, source)
        taken.append(time.perf_counter() - start)
    return MEMCPY_BYTES / float(np.median(taken)) / 1e9


class RawFile:
    """A file of random bytes on the disk that is measured, read and written without daemon or client."""

    NAME = "reference.bin"

    def __init__(self, directory: Path, size: int, depth: int) -> None:
        """Writes the file. size: a multiple of ALIGNMENT. Real bytes: blocks only reserved are read without the disk."""
        self.path = directory / self.NAME
        self.size = size
        self._disk = FileDisk(directory, _engine(depth), ALIGNMENT)
        self._handle = self._disk.create(self.NAME, size)
        block = aligned_buffer(WRITE_BYTES, huge=True)
        chance = np.random.default_rng()
        for start in range(0, size, WRITE_BYTES):
            block[:] = chance.integers(0, 256, WRITE_BYTES, np.uint8)
            self._transfer(True, np.array([start]), np.array([min(WRITE_BYTES, size - start)]), block)
        self._disk.sync(self._handle)
        self._buffer = aligned_buffer(WRITE_BYTES, huge=True)

    def read_s(self, offsets: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> float:
        """Seconds that one batch of direct reads takes. Each a multiple of ALIGNMENT; together at most WRITE_BYTES
        fit in one batch, more go in several."""
        taken = 0.0
        bounds = np.flatnonzero(np.diff(np.cumsum(lengths) // WRITE_BYTES)) + 1
        for part, sizes in zip(np.split(offsets, bounds), np.split(lengths, bounds), strict=True):
            start = time.perf_counter()
            self._transfer(False, part, sizes, self._buffer)
            taken += time.perf_counter() - start
        return taken

    def _transfer(
        self, write: bool, offsets: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], memory: npt.NDArray[np.uint8]
    ) -> None:
        handles = np.full(len(offsets), self._handle, np.int32)
        ends = np.cumsum(lengths)
        assert ends[-1] <= memory.nbytes
        addresses = np.uint64(address_of(memory)) + (ends - lengths).astype(np.uint64)
        move = self._disk.write if write else self._disk.read
        statuses = move(handles, offsets, addresses, lengths)
        if statuses.any():
            raise OSError(-int(statuses.min()), f"{self.path} could not be {'written' if write else 'read'}")

    def close(self) -> None:
        self._disk.shutdown()
        self.path.unlink()


def _engine(depth: int) -> IoEngine:
    try:
        return UringEngine(depth)
    except EngineUnavailable:
        return PosixEngine(depth)


def fio_gb_per_s(path: Path, kind: str, size: int, block_bytes: int, depth: int, seconds: float) -> float | None:
    """fio's direct io_uring transfers of one block size; None where fio is not installed or io_uring is refused.

    kind: randread, or write (sequential, once over `size`, synced at the end).
    """
    if shutil.which("fio") is None:
        return None
    command = ["fio", "--name=bench", f"--filename={path}", f"--rw={kind}", "--direct=1", "--ioengine=io_uring"]
    command += [f"--bs={block_bytes}", f"--iodepth={depth}", f"--size={size}", "--output-format=json"]
    command += ["--randrepeat=0", "--norandommap"]
    command += ["--end_fsync=1"] if kind == "write" else ["--time_based", f"--runtime={max(1, int(1000 * seconds))}ms"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=FIO_DEADLINE_S)
    with suppress(ValueError, KeyError, IndexError):
        answer: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
        job = answer["jobs"][0]["write" if kind == "write" else "read"]
        if kind == "write":  # what the sync took is not in bw_bytes
            sync_ms = float(answer["jobs"][0].get("sync", {}).get("lat_ns", {}).get("mean", 0)) / 1e6
            return float(job["io_bytes"]) / (float(job["runtime"]) + sync_ms) / 1e6 or None
        return float(job["bw_bytes"]) / 1e9 or None
    return None
