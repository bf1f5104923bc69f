"""Seeded workloads against the oracle, on a simulated disk with restarts, crashes and faults."""

from __future__ import annotations

import contextlib
import errno
import random

import pytest
from hga_kvd.config import Settings
from hga_kvd.engine import Engine
from hga_kvd.errors import StartRefused
from hga_kvd.geometry import Geometry
from hga_kvd.testing.simdisk import SimDisk
from hga_kvd.testing.workload import Workload

MIB = 1 << 20

TINY = Geometry(2, 1, 5, "float16", chunk_tokens=8, group_tokens=4)  # records of 80 bytes
ODD = Geometry(3, 3, 80, "bfloat16")  # records of 5120 bytes
WIDE = Geometry(2, 2, 64, "float32")  # records of 8192 bytes, extents of 64 KiB


def make(disk: SimDisk | None, ram: int = 2 * MIB, **options: object) -> Engine:
    return Engine(Settings(ram=ram, segment_bytes=MIB, **options), disk, background=False)


@pytest.mark.parametrize("seed", range(6))
def test_ram_only(seed: int) -> None:
    work = Workload(make(None, 16 * MIB), seed, (TINY, ODD, WIDE), faulty=True)
    work._steps["flush"] = lambda: None  # nothing is durable here
    work.run(200)
    work.check_all()


@pytest.mark.parametrize("seed", range(6))
def test_arena_much_smaller_than_the_data(seed: int) -> None:
    disk = SimDisk()
    work = Workload(make(disk, 4 * MIB), seed, (TINY, ODD, WIDE))
    work.run(400)
    work.check_all()
    work.engine.shutdown()
    work.after_restart(make(disk, 4 * MIB))


@pytest.mark.parametrize("how", ["kill", "crash", "torn"])
@pytest.mark.parametrize("seed", range(12))
def test_restarts(how: str, seed: int) -> None:
    disk = SimDisk()
    chance = random.Random(seed)
    work = Workload(make(disk, 4 * MIB), seed, (TINY, WIDE))
    for _ in range(8):
        work.run(chance.randint(1, 50))
        torn = chance.randrange(1 << 30) if how == "torn" else None
        disk = disk.kill() if how == "kill" else disk.crash(torn)
        work.after_restart(make(disk, 4 * MIB))


@pytest.mark.parametrize("seed", range(40))
def test_crash_in_the_middle_of_a_disk_operation(seed: int) -> None:
    """From some disk operation on, everything fails, as for a process that was killed there; then power comes back."""
    disk = SimDisk()
    chance = random.Random(seed)
    work = Workload(make(disk, 4 * MIB), seed, (TINY, WIDE), faulty=True)
    for _ in range(6):
        work.run(chance.randint(1, 30))
        disk.die_after(chance.randint(1, 40))
        work.reads_may_fail = True
        work.run(30)
        work.reads_may_fail = False
        disk = disk.crash(chance.choice((None, chance.randrange(1 << 30))))
        for operations in (chance.randint(1, 12), chance.randint(1, 40)):  # and twice while it recovers
            disk.die_after(operations)
            with contextlib.suppress(StartRefused):
                make(disk, 4 * MIB)
            disk = disk.crash(chance.randrange(1 << 30))
        work.after_restart(make(disk, 4 * MIB))


@pytest.mark.parametrize("seed", range(30))
def test_failing_device(seed: int) -> None:
    disk = SimDisk(24 * MIB)
    chance = random.Random(seed)
    work = Workload(make(disk, 4 * MIB, nvme_max=16 * MIB, nvme_reserve=0), seed, (TINY, WIDE), faulty=True)
    for _ in range(20):
        operation = chance.choice(("write", "sync", "create", "replace"))
        disk.fail(operation, chance.randint(1, 20), chance.choice((errno.EIO, errno.ENOSPC)))
        work.run(20)
        work.check_all()
    disk.heal()
    disk = disk.crash(seed)
    work.after_restart(make(disk, 4 * MIB))
