"""Seeded trials against the oracle: in RAM alone, with an arena smaller than the data, through restarts, and on a device
that fails for good. What fails once and passes is the simulator's (test_simulation.py)."""

from __future__ import annotations

import contextlib
import errno
import random

import pytest
from hga_kvd.config import Settings
from hga_kvd.engine import Engine
from hga_kvd.errors import StartRefused
from hga_kvd.geometry import Geometry
from hga_kvd.testing.judge import Clock
from hga_kvd.testing.simdisk import SimDisk
from hga_kvd.testing.trial import Trial

MIB = 1 << 20

TINY = Geometry(2, 1, 5, "float16", chunk_tokens=8, group_tokens=4)  # records of 80 bytes
ODD = Geometry(3, 3, 80, "bfloat16")  # records of 5120 bytes
WIDE = Geometry(2, 2, 64, "float32")  # records of 8192 bytes, extents of 64 KiB


class Broken:
    """The device is: what is not in RAM may be damaged, and wrong bytes are never right."""

    def __init__(self) -> None:
        self.now = False

    def start(self) -> bool:
        return False

    def session(self, session_id: int) -> bool:
        return False

    def bytes(self, digest: int) -> bool:
        return self.now


def make(disk: SimDisk | None, ram: int = 2 * MIB, **options: object) -> Engine:
    return Engine(Settings(ram=ram, segment_bytes=MIB, **options), disk, background=False)


def in_ram(seed: int, ram: int, evict: str) -> Trial:
    clock = Clock()
    engine = Engine(Settings(ram=ram, evict=evict), None, background=False, clock=clock)
    trial = Trial(engine, seed, (TINY, ODD, WIDE), refusals=True, clock=clock, evicts=evict == "lru")
    for step in ("flush", "park"):  # nothing is durable here
        trial._steps[step] = lambda: "nothing"
    trial.run(200)
    trial.check_all()
    return trial


@pytest.mark.parametrize("seed", range(6))
def test_ram_only(seed: int) -> None:
    in_ram(seed, 8 * MIB, "none")


def test_ram_only_with_eviction() -> None:
    """In no single trial must a session go for space, only in one of them: which ones do follows from every draw."""
    trials = [in_ram(seed, 2 * MIB, "lru") for seed in range(6)]
    assert any("evicted" in step for trial in trials for step in trial.trace)


@pytest.mark.parametrize("seed", range(6))
def test_arena_much_smaller_than_the_data(seed: int) -> None:
    disk = SimDisk()
    engine = make(disk, 4 * MIB)
    trial = Trial(engine, seed, (TINY, ODD, WIDE))
    trial.run(300)
    trial.check_all()
    engine.shutdown()
    trial.stopped()
    trial.restarted(make(disk, 4 * MIB))


@pytest.mark.parametrize("how", ["kill", "crash", "torn"])
@pytest.mark.parametrize("seed", range(12))
def test_restarts(how: str, seed: int) -> None:
    disk = SimDisk()
    chance = random.Random(seed)
    trial = Trial(make(disk, 4 * MIB), seed, (TINY, WIDE))
    for _ in range(8):
        trial.run(chance.randint(1, 50))
        torn = chance.randrange(1 << 30) if how == "torn" else None
        disk = disk.kill() if how == "kill" else disk.crash(torn)
        trial.restarted(make(disk, 4 * MIB))


@pytest.mark.parametrize("seed", range(40))
def test_a_device_that_is_gone_until_power_comes_back(seed: int) -> None:
    """From some disk operation on everything fails, also twice while it recovers."""
    disk, broken = SimDisk(), Broken()
    chance = random.Random(seed)
    trial = Trial(make(disk, 4 * MIB), seed, (TINY, WIDE), refusals=True, excuses=broken)
    for _ in range(5):
        trial.run(chance.randint(1, 30))
        disk.die_after(chance.randint(1, 40))
        broken.now = True
        trial.run(20)
        broken.now = False
        disk = disk.crash(chance.choice((None, chance.randrange(1 << 30))))
        for operations in (chance.randint(1, 12), chance.randint(1, 40)):
            disk.die_after(operations)
            with contextlib.suppress(StartRefused):
                make(disk, 4 * MIB)
            disk = disk.crash(chance.randrange(1 << 30))
        trial.restarted(make(disk, 4 * MIB))


@pytest.mark.parametrize("seed", range(15))
def test_failing_device(seed: int) -> None:
    disk = SimDisk(24 * MIB)
    chance = random.Random(seed)
    trial = Trial(make(disk, 4 * MIB, nvme_max=16 * MIB, nvme_reserve=0), seed, (TINY, WIDE), refusals=True)
    for _ in range(12):
        operation = chance.choice(("write", "sync", "create", "replace"))
        disk.fail(operation, chance.randint(1, 20), chance.choice((errno.EIO, errno.ENOSPC)))
        trial.run(20)
        trial.check_all()
    disk.heal()
    trial.restarted(make(disk.crash(seed), 4 * MIB))
