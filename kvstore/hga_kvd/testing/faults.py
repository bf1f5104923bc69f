"""What goes wrong, and when: a `Schedule` follows from one seed and names every fault before the first step is taken.

A trial is a few *lives* of the daemon on one disk. A life starts with recovery, runs some steps of a workload, and ends
in a power loss: before one of its disk operations (then the process never sees that operation return), or after its last
step. Faults are counted by kind of operation from the start of the life, so that they hit recovery too.

Three severities, by what a correct engine may show for it:
- `clean`: power losses, and I/O that is slow, short, reordered or asked to come again. Nothing.
- `failing`: the device also refuses: EIO, ENOSPC, a failed sync that lost what it should have kept, a manifest that was
  replaced although the call failed. Typed refusals, no damage.
- `corrupting`: bits flip, reads and writes go to a wrong place, writes are lost, sectors go bad. Records that were hit
  are damaged or missing; none is ever wrong.
Pure: values only. `SimDisk` carries it out.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

Operation = Literal["read", "write", "sync", "names", "create", "replace", "remove", "punch"]
Severity = Literal["clean", "failing", "corrupting"]
# What a power loss leaves of the sectors and names that were not synced: nothing; all; all but a piece of the last
# write; a random half.
Mode = Literal["lose", "keep", "torn", "half"]
Kind = Literal[
    "short",  # less is moved than was asked for
    "again",  # EAGAIN: the ring is full, or a signal came
    "slow",
    "eio",  # nothing happened
    "enospc",
    "torn",  # a write that failed half way
    "lost",  # a sync that failed and left a random half; a write that was acknowledged and never happened
    "done",  # it happened, and yet the call failed
    "flip",  # one bit, in what is moved
    "misdirect",  # from or to another place
    "rot",  # one bit of what is stored here, for good
    "bad",  # a sector of this place cannot be read until it is written again
]

_CLEAN: dict[Operation, tuple[Kind, ...]] = {"read": ("short", "again", "slow"), "write": ("short", "again", "slow")}
_FAILING: dict[Operation, tuple[Kind, ...]] = {
    "read": ("eio", "short", "again"),
    "write": ("eio", "torn", "enospc", "short"),
    "sync": ("eio", "lost"),
    "names": ("eio",),
    "create": ("eio", "enospc"),
    "replace": ("eio", "enospc", "done"),
    "remove": ("eio",),
    "punch": ("eio",),
}
_CORRUPTING: dict[Operation, tuple[Kind, ...]] = {
    "read": ("flip", "misdirect", "rot", "bad", "short"),
    "write": ("flip", "misdirect", "lost", "rot"),
}
KINDS: dict[Severity, dict[Operation, tuple[Kind, ...]]] = {
    "clean": _CLEAN,
    "failing": _FAILING,
    "corrupting": _CORRUPTING,
}
# What a life of 10 to 30 steps does of each, so that most faults strike.
_REACH: dict[Operation, int] = {
    "read": 60, "write": 40, "sync": 16, "names": 4, "create": 4, "replace": 8, "remove": 3, "punch": 6,
}  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """The n-th `operation` of a life, from 1; reads and writes count one a column."""

    operation: Operation
    n: int
    kind: Kind
    seed: int  # of what the kind leaves open: which bit, how much, where to


@dataclass(frozen=True)
class Remains:
    mode: Mode
    seed: int

    @staticmethod
    def draw(chance: random.Random) -> Remains:
        mode: Mode = chance.choices(("lose", "keep", "torn", "half"), (3, 1, 2, 4))[0]
        return Remains(mode, chance.randrange(1 << 30))


@dataclass(frozen=True)
class Life:
    steps: int
    crash_at: int  # the disk operation that power fails in, from 1; 0: after the last step
    remains: Remains
    recovery_crashes: tuple[tuple[int, Remains], ...] = ()  # power losses in starts before the one that comes through
    faults: tuple[Fault, ...] = ()
    stops: bool = False  # ends with an orderly stop if it gets there


@dataclass(frozen=True)
class Schedule:
    seed: int
    severity: Severity
    lives: tuple[Life, ...]
    name: str  # what replays it: the seed, or another way to say which schedule it is

    @staticmethod
    def draw(seed: int, severity: Severity | None = None) -> Schedule:
        chance = random.Random(f"schedule {seed}")
        drawn = chance.choices(tuple(KINDS), (3, 3, 4))[0]
        severity = severity or drawn
        name = str(seed) if severity == drawn else f"{seed} --severity {severity}"
        return Schedule(seed, severity, tuple(_life(chance, severity) for _ in range(chance.randint(2, 3))), name)


def _life(chance: random.Random, severity: Severity) -> Life:
    crashes = [(chance.randint(1, 12), Remains.draw(chance)) for _ in range(chance.choice((0, 0, 0, 1, 2)))]
    operations = sorted(KINDS[severity])
    faults = []
    for _ in range(chance.randint(1, 5)):
        operation = chance.choice(operations)
        kind = chance.choice(KINDS[severity][operation])
        faults.append(Fault(operation, chance.randint(1, _REACH[operation]), kind, chance.randrange(1 << 30)))
    return Life(
        steps=chance.randint(3, 22),
        crash_at=chance.choice((0, chance.randint(1, 90))),
        remains=Remains.draw(chance),
        recovery_crashes=tuple(crashes),
        faults=tuple(faults),
        stops=chance.random() < 0.2,
    )
