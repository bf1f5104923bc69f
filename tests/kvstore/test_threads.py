"""Many threads on one engine, each with a trial and an oracle of its own, and the engine's own threads beside them; then the
power goes, or an orderly stop comes, and each judges what is left of its sessions.

What threads do to each other does not follow from a seed; what each of them does, does.
"""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Iterator

import pytest
from hga_kvd.config import Settings
from hga_kvd.engine import Engine
from hga_kvd.errors import StorageFull, WriteFailed
from hga_kvd.testing.faults import Remains
from hga_kvd.testing.simdisk import PowerLoss, SimDisk
from hga_kvd.testing.simulation import SMALL, TINY, WIDE
from hga_kvd.testing.trial import Trial

KIB, MIB = 1 << 10, 1 << 20
THREADS, LIVES, STEPS = 4, 2, 60


@pytest.fixture(autouse=True)
def _many_switches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Between any two lines another thread may go on. A thread of the engine may end with its machine."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    other = threading.excepthook
    monkeypatch.setattr(threading, "excepthook", lambda a: None if a.exc_type is PowerLoss else other(a))
    yield
    sys.setswitchinterval(usual)


def run(trial: Trial, disk: SimDisk, errors: list[BaseException]) -> None:
    try:
        for _ in range(STEPS):
            if disk.dark:
                return
            trial.step()
    except PowerLoss:
        trial.trace.append("power lost")
    except BaseException as error:
        error.add_note("\n".join(trial.trace[-20:]))
        errors.append(error)


@pytest.mark.parametrize("twins", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_the_guarantee_holds_between_threads(seed: int, twins: bool) -> None:
    """twins: all append the same, and share it while they do (but for summaries: an oracle knows only its own)."""
    chance = random.Random(f"threads {seed} {twins}")
    disk = SimDisk(seed=seed)
    settings = Settings(
        ram=2 * MIB, segment_bytes=chance.choice((64, 256)) * KIB, nvme_max=chance.choice((0, MIB)), nvme_reserve=0,
        scrub_rate=chance.choice((0, 1 << 30)),
    )  # fmt: skip
    geometries = chance.choice(((TINY, SMALL), (WIDE, TINY)))
    engine = Engine(settings, disk)
    trials = [
        Trial(
            engine,
            seed if twins else THREADS * seed + i,
            geometries,
            refusals=True,
            prefix=f"t{i}-",
            without=("put",) * twins,
        )
        for i in range(THREADS)
    ]
    for _ in range(LIVES):
        errors: list[BaseException] = []
        threads = [threading.Thread(target=run, args=(trial, disk, errors)) for trial in trials]
        disk.lose_power_at(chance.choice((0, chance.randint(50, 2000))))
        for thread in threads:
            thread.start()
        end = time.monotonic() + 120
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))
        assert not any(thread.is_alive() for thread in threads), "calls hang"
        if errors:
            raise errors[0]
        if not disk.dark and chance.random() < 0.5:
            try:
                engine.shutdown()
                for trial in trials:
                    trial.stopped()
            except (StorageFull, WriteFailed):
                pass
        disk = disk.crash(Remains.draw(chance))
        engine._background.stop()
        engine._prefetcher.close()
        engine = Engine(settings, disk)
        for trial in trials:
            trial.restarted(engine)
    for trial in trials:
        trial.delete_all()
    assert engine.stats().chunks == 0
    engine.shutdown()
