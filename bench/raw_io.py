"""How fast each I/O engine reads random records through FileDisk, beside fio on the same file with the same depth.

One run measures fio and every engine once, one after the other and in turns, so that a disk that other people use too
disturbs all alike; ratios are taken within a run, and medians over the runs are printed. fio reads into memory of the
same kind as the engine does: its 4 KiB-page heap, or a shared mapping that was made of huge pages (needs root).
"""

from __future__ import annotations

import contextlib
import json
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
import typer
from hga_kvd import native
from hga_kvd.checksum import checksums
from hga_kvd.config import parse_size
from hga_kvd.filedisk import FileDisk
from hga_kvd.geometry import Geometry
from hga_kvd.io_engine import EngineUnavailable, IoEngine
from hga_kvd.liburing_engine import LiburingEngine
from hga_kvd.memory import HUGE_PAGE_BYTES, address_of, aligned_buffer
from hga_kvd.posix_engine import PosixEngine
from hga_kvd.residency import Residency
from hga_kvd.uring import UringEngine
from rich.console import Console
from rich.progress import track
from rich.table import Table

FILE_NAME = "raw_io.bin"
ENGINES: dict[str, Callable[[int], IoEngine]] = {
    "uring": UringEngine,
    "liburing": LiburingEngine,
    "posix": PosixEngine,
}
FIO = (
    "fio --name=read --filename='{file}' --size={total} --bs={size} --rw=randread --direct=1 --ioengine=io_uring "
    "--iodepth={depth} --norandommap --randrepeat=0 --time_based --runtime={ms}ms --output-format=json"
)
WRITE_BYTES = 8 << 20
RECORD_BYTES = 8192
ALIGNMENT = 4096  # of any device
KINDS = ("huge", "plain")


def main(
    *,
    directory: Annotated[Path, typer.Option(help="On the disk to measure.")] = results.ROOT / "build" / "bench",
    file_size: Annotated[str, typer.Option(help="Of the test file; larger than the device's cache.")] = "2GiB",
    read_sizes: Annotated[str, typer.Option(help="Bytes of one read, comma-separated.")] = "32KiB,8KiB",
    engines: Annotated[str, typer.Option(help="Comma-separated.")] = "uring,liburing,posix",
    batch: Annotated[int, typer.Option(min=1, help="Reads a call.")] = 128,
    depth: Annotated[int, typer.Option(min=1, help="Reads in flight.")] = 32,
    runs: Annotated[int, typer.Option(min=1)] = 9,
    seconds: Annotated[float, typer.Option(min=0.01, help="Of each engine in a run; fio gets twice that.")] = 0.25,
    keep: Annotated[bool, typer.Option(help="Leave the test file for the next time.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:
    """Random O_DIRECT reads, GB/s, with the ratio to fio."""
    directory.mkdir(parents=True, exist_ok=True)
    sizes = [parse_size(text) for text in read_sizes.split(",")]
    total = parse_size(file_size)
    sys.setswitchinterval(0.0002)  # as the daemon's __main__ does
    _fill(directory, total)
    disks = make_disks(directory, engines.split(","), depth)
    fio = shutil.which("fio")
    if fio is None:
        Console(stderr=True).print("fio is not installed (apt install fio): no ratios")

    plan = [(size, kind, run) for run in range(runs) for size in sizes for kind in KINDS]
    speeds: dict[tuple[int, str], dict[str, list[float]]] = {}
    for size, kind, run in track(plan, "reading", console=Console(stderr=True), disable=as_json):
        of_case = speeds.setdefault((size, kind), {name: [] for name in ("fio", *disks)})
        names = list(of_case)
        for name in names[run % len(names) :] + names[: run % len(names)]:
            if name == "fio":
                job = FIO.format(file=directory / FILE_NAME, total=total, size=size, depth=depth, ms=int(2e3 * seconds))
                speed = fio_speed(job, depth * size, kind) if fio else None
            else:
                speed = disk_speed(disks[name], size, batch, seconds, kind, [FILE_NAME])
            of_case[name].append(speed if speed is not None else float("nan"))
    for disk in disks.values():
        disk.shutdown()
    if not keep:
        (directory / FILE_NAME).unlink()

    numbers = summary(speeds)
    config = {"file_bytes": total, "batch": batch, "depth": depth, "runs": runs, "seconds": seconds}
    path = results.append("raw_io", config, {"cases": numbers}, directory)
    if as_json:
        print(json.dumps({"config": config, "cases": numbers}))
        return
    table = Table(title=f"{batch} random reads a call, {depth} in flight, median of {runs}")
    for heading in ("read", "pages", "by", "GB/s", "of fio", "worst", "best"):
        table.add_column(heading, justify="left" if heading in ("pages", "by") else "right")
    for row in numbers:
        ratios = [
            f"{row[key]:.2f}" if row[key] is not None else "-" for key in ("of_fio", "of_fio_worst", "of_fio_best")
        ]
        absolute = f"{row['gb_per_s']:.2f}" if row["gb_per_s"] is not None else "-"
        table.add_row(f"{row['read_bytes'] >> 10} KiB", row["pages"], row["by"], absolute, *ratios)
    Console().print(table)
    Console().print(f"appended to {path.relative_to(results.ROOT)}")


def make_disks(directory: Path, names: list[str], depth: int) -> dict[str, FileDisk]:
    disks: dict[str, FileDisk] = {}
    for name in names:
        try:
            disks[name] = FileDisk(directory, ENGINES[name](depth), ALIGNMENT)
        except EngineUnavailable as error:
            Console(stderr=True).print(f"{name} is refused here: {error}")
    return disks


def disk_speed(disk: FileDisk, size: int, batch: int, seconds: float, kind: str, names: list[str]) -> float:
    """GB/s over `seconds` of calls to random places of these files, without what making up the calls takes."""
    opened = np.array([disk.open(name) for name in names], np.int32)
    places = np.array([disk.size(handle) // size for handle in opened])
    rng = np.random.default_rng()
    buffer = aligned_buffer(batch * size, huge=kind == "huge")
    buffer[:] = 1
    addresses = np.uint64(address_of(buffer)) + np.arange(batch, dtype=np.uint64) * np.uint64(size)
    lengths = np.full(batch, size, np.int64)
    taken, calls = 0.0, 0
    while taken < seconds:
        file = rng.integers(0, len(names), batch)
        handles, offsets = opened[file], rng.integers(0, places[file]) * size
        start = time.perf_counter()
        statuses = disk.read(handles, offsets, addresses, lengths)
        taken += time.perf_counter() - start
        calls += 1
        assert not statuses.any(), statuses
    for handle in opened:
        disk.close(handle)
    return calls * batch * size / taken / 1e9


def fetch_speed(disk: FileDisk, files: dict[str, np.ndarray], runs: int, groups: int, seconds: float) -> float:
    """GB/s of what a fetch of `runs` runs of `groups` records does below its plan, and nothing else: one call in C that
    reads into an arena of huge pages, verifies, and copies to a landing of huge pages (native.bring). files: checksums of
    all records, as `checksums_of` has them.
    """
    opened, size, count = [disk.open(name) for name in files], RECORD_BYTES, runs * groups
    geometry = Geometry(1, 1, 128, "bfloat16")
    residency = Residency(2 * count * size + (2 << 20))
    pool = residency.pool_for(geometry)
    landing = aligned_buffer(count * size, huge=True)
    residency.arena.region[:], landing[:] = 1, 1
    made = native.Plan(count).laid_out(count, len(files))
    rng, table = np.random.default_rng(), np.stack(list(files.values()))
    nothing = np.zeros(0, native.FOUND)
    made.keys[:], made.seeds[:], made.starts[:] = np.arange(count), 0, np.arange(count) * size
    taken, calls = 0.0, 0
    while taken < seconds:
        file = np.repeat(rng.integers(0, len(files), runs), groups)
        first = rng.integers(0, table.shape[1] // groups, runs) * groups
        record = (first[:, None] + np.arange(groups)).reshape(-1)
        made.segments[:], made.offsets[:], made.expected[:] = file, record * size, table[file, record]
        start = time.perf_counter()
        batch = native.Batch.of(pool.view, made, slice(0, count), landing)
        done = disk.bring(np.array(opened), batch, pool.view, nothing)
        taken += time.perf_counter() - start
        calls += 1
        assert done
        assert not batch.wrong_items.any()
    for handle in opened:
        disk.close(handle)
    return calls * count * size / taken / 1e9


def checksums_of(disk: FileDisk, names: list[str]) -> dict[str, np.ndarray]:
    """Of every RECORD_BYTES of these files, as many as the shortest has, seed 0. Reads them."""
    buffer, found = aligned_buffer(WRITE_BYTES, huge=True), {}
    for name in names:
        handle = disk.open(name)
        sums = []
        for at in range(0, disk.size(handle) // WRITE_BYTES * WRITE_BYTES, WRITE_BYTES):
            column = np.array([at]), np.array([address_of(buffer)], np.uint64), np.array([WRITE_BYTES])
            assert not disk.read(np.array([handle], np.int32), *column).any()
            starts = np.arange(0, WRITE_BYTES, RECORD_BYTES)
            sums.append(checksums(buffer.data, starts, RECORD_BYTES, np.zeros(len(starts), np.uint64)))
        disk.close(handle)
        found[name] = np.concatenate(sums)
    shortest = min(map(len, found.values()))
    return {name: sums[:shortest] for name, sums in found.items()}


def fio_speed(job: str, memory_bytes: int, kind: str) -> float | None:
    """GB/s, or None where fio cannot have memory of this kind."""
    read = fio_read(job, memory_bytes, kind)
    return read[0] if read else None


def fio_read(job: str, memory_bytes: int, kind: str) -> tuple[float, float] | None:
    """GB/s, and CPU seconds a GB; None where fio cannot have memory of this kind.

    fio's own buffer is too small to be given a huge page, so it maps a file of a tmpfs that is all huge pages and was
    filled before; that tmpfs lives in a mount namespace of this one command.
    """
    with tempfile.TemporaryDirectory() as mount:
        command = ["sh", "-c", job]
        if kind == "huge":
            bytes_needed = -(-memory_bytes // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES + 2 * HUGE_PAGE_BYTES
            setup = (
                f"mount -t tmpfs -o huge=always,size={2 * bytes_needed} tmpfs {mount} && "
                f"dd if=/dev/zero of={mount}/memory bs={bytes_needed} count=1 status=none && "
            )
            command = ["unshare", "--mount", "sh", "-c", f"{setup} {job} --iomem=mmapshared:{mount}/memory"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    with contextlib.suppress(ValueError):
        found = json.loads(done.stdout)["jobs"][0]
        speed = float(found["read"]["bw_bytes"]) / 1e9
        return speed, (found["usr_cpu"] + found["sys_cpu"]) / 100 / speed
    return None


def summary(speeds: dict[tuple[int, str], dict[str, list[float]]]) -> list[dict[str, Any]]:
    def known(value: float) -> float | None:
        return None if np.isnan(value) else round(float(value), 3)

    rows: list[dict[str, Any]] = []
    for (size, kind), of_case in speeds.items():
        for name, values in of_case.items():
            ratios = np.array(values) / np.array(of_case["fio"])
            rows.append(
                {
                    "read_bytes": size,
                    "pages": kind,
                    "by": name,
                    "gb_per_s": known(float(np.median(values))),
                    "of_fio": known(float(np.median(ratios))),
                    "of_fio_worst": known(float(ratios.min())),
                    "of_fio_best": known(float(ratios.max())),
                }
            )
    return rows


def _fill(directory: Path, total: int) -> None:
    """Real random bytes: blocks that were only reserved would be answered without the device."""
    path = directory / FILE_NAME
    if path.exists() and path.stat().st_size == total:
        return
    path.unlink(missing_ok=True)
    rng = np.random.default_rng()
    block = aligned_buffer(WRITE_BYTES, huge=True)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o600)
    for start in track(range(0, total, WRITE_BYTES), "writing the test file", console=Console(stderr=True)):
        block[:] = rng.integers(0, 256, WRITE_BYTES, np.uint8)
        os.pwrite(fd, block[: min(WRITE_BYTES, total - start)].data, start)
    os.fsync(fd)
    os.close(fd)


if __name__ == "__main__":
    typer.run(main)
