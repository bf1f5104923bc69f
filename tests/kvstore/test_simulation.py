"""The storage engine keeps its guarantee: every crash point, and schedules of faults, on a simulated disk.

A failure prints its seed; `python -m hga_kvd.testing.replay SEED` runs exactly that one again.
"""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from hga_kvd.config import Settings
from hga_kvd.engine import Engine
from hga_kvd.format import segment_id_of
from hga_kvd.manifest import MANIFEST_COPY_NAME, MANIFEST_NAME
from hga_kvd.survey import repair, survey
from hga_kvd.testing import simulation
from hga_kvd.testing.faults import KINDS, Life, Remains, Schedule
from hga_kvd.testing.replay import main as replay
from hga_kvd.testing.simdisk import SimDisk
from hga_kvd.testing.simulation import SMALL, Simulation, Violation
from hga_kvd.testing.trial import Trial

# 30 lives of about 36 operations, 2,000 schedules: about 100 s of one core.
CRASH_SEEDS = 30
CRASH_POINTS_MIN = 1000
SCHEDULES = 2000
BLOCK = 100

_points: list[int] = []


@pytest.mark.parametrize("seed", range(CRASH_SEEDS))
def test_every_crash_point(seed: int) -> None:
    points = simulation.crash_points(seed)
    for operation in range(1, points + 1):
        assert simulation.crash_at(seed, operation).crashes >= 2
    _points.append(points)


def test_there_were_enough_crash_points() -> None:
    if len(_points) != CRASH_SEEDS:
        _points[:] = [simulation.crash_points(seed) for seed in range(CRASH_SEEDS)]
    assert sum(_points) >= CRASH_POINTS_MIN


@pytest.mark.parametrize("first", range(0, SCHEDULES, BLOCK))
def test_schedules_of_faults(first: int) -> None:
    for seed in range(first, first + BLOCK):
        simulation.run(seed)


def test_every_kind_of_fault_strikes() -> None:
    """Or the schedules above would show nothing."""
    struck: Counter[str] = Counter()
    for severity, operations in KINDS.items():
        wanted = {f"{operation} {kind}" for operation, kinds in operations.items() for kind in kinds}
        for seed in range(10_000, 10_400):
            struck += simulation.run(seed, severity).struck
            if not wanted - set(struck):
                break
        assert not wanted - set(struck), f"{severity}: never struck"


@pytest.mark.parametrize("name", ["17", "3:20"])
def test_a_replay_does_the_same_again(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    seen = []
    for _ in range(2):
        assert replay([name]) == 0
        seen.append(capsys.readouterr().out)
    assert seen[0] == seen[1]
    assert seen[0].count("\n") > 10


def test_a_broken_engine_is_caught_and_its_seed_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A disk that says that it synced, and did not."""
    monkeypatch.setattr(SimDisk, "sync", lambda self, handle: self._step("sync"))
    caught = []
    for seed in range(40):
        try:
            simulation.run(seed, "clean")
        except Violation as violation:
            caught.append((seed, str(violation)))
    assert caught
    seed, message = caught[0]
    assert f"replay: python -m hga_kvd.testing.replay {seed} --severity clean\n" in message or (
        f"replay: python -m hga_kvd.testing.replay {seed}\n" in message
    )
    assert replay([str(seed), "--severity", "clean"]) == 1
    assert capsys.readouterr().out.strip() == message.strip()


def test_wrong_bytes_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    trial = Trial(Engine(Settings(ram=2 << 20), None, background=False), 1, (SMALL,))
    while not any(known.chunks for known in trial.known.values()):
        trial._append()
    trial.check_all()
    known = next(known for known in trial.known.values() if known.chunks)
    known.chunks[0].payload = known.chunks[0].payload ^ np.uint8(1)
    with pytest.raises(AssertionError, match="wrong bytes"):
        trial.check_all()


class LosesItsManifest(Simulation):
    """With the power, wherever it is lost; and then it is repaired."""

    repaired = 0

    def _lose_power(self, remains: Remains) -> None:
        super()._lose_power(remains)
        names = self.disk.names()
        if MANIFEST_COPY_NAME in names and any(segment_id_of(name) for name in names):
            content = self.disk.get(MANIFEST_NAME)
            self.disk.put(MANIFEST_NAME, bytes([content[0] ^ 1]) + content[1:])
            assert repair(self.disk, survey(self.disk))
            self.repaired += 1


@pytest.mark.parametrize("first", range(0, 60, 30))
def test_a_manifest_that_goes_bad_with_the_power_is_made_again(first: int) -> None:
    """Whatever life it had and wherever that ended, `verify --repair` brings back what was flushed."""
    repaired = 0
    for seed in range(first, first + 30):
        chance = random.Random(f"repair {seed}")
        ends = [chance.choice((0, chance.randint(5, 120))) for _ in range(2)]
        lives = tuple(Life(chance.randint(5, 30), end, Remains.draw(chance)) for end in ends)
        simulation = LosesItsManifest(Schedule(seed, "clean", lives, f"repair {seed}"))
        simulation.run()
        repaired += simulation.repaired
    assert repaired > 20


def test_a_schedule_follows_from_its_seed() -> None:
    assert Schedule.draw(5) == Schedule.draw(5)
    assert Schedule.draw(5).lives != Schedule.draw(6).lives
    traces = []
    for _ in range(2):
        simulation_ = Simulation(Schedule.draw(99))
        simulation_.run()
        traces.append(simulation_.trial.trace)
    assert traces[0] == traces[1]
