"""What one run of a profile measured, and what of it was waiting for whom. Pure: clocks are read by `probes`.

A Case is one line of the table: the same work, done several times, each time (a Sample) beside its reference. A ratio is
taken within a sample, so that what disturbs the machine disturbs both sides; then the median over samples is shown.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

# Under this share of the time, nothing that was measured explains it: what is left is waiting for each other.
LIMIT_SHARE_MIN = 0.5


class NothingToMeasure(Exception):
    """A profile has no case with these options; the text says why. The others are measured."""


@dataclass(frozen=True)
class Stage:
    """What a profile is about to do, and how much of it is done, 0 to 1."""

    text: str
    done: float = 0.0


@dataclass(frozen=True)
class Sample:
    """seconds: [calls], what a caller waited, nothing else in it. bytes: of all calls; disk_bytes: those of the disk.

    daemon_cpu_s, client_cpu_s: of all calls; None: another host's daemon. reference_s: what the reference took for the
    same bytes of the disk (or, without a disk, of memory); None: there was no reference.
    """

    seconds: npt.NDArray[np.float64]
    bytes: int
    disk_bytes: int
    client_cpu_s: float
    daemon_cpu_s: float | None
    reference_s: float | None

    @property
    def total_s(self) -> float:
        return float(self.seconds.sum())

    @property
    def gb_per_s(self) -> float:
        return self.bytes / self.total_s / 1e9

    @property
    def of_reference(self) -> float | None:
        """Speed as a fraction of the reference's."""
        return self.reference_s / self.total_s if self.reference_s else None


@dataclass(frozen=True)
class Case:
    """profile: its name. case: what was done, in words. call: what one of `seconds` is. reference: what it is compared
    with. parameters: of a curve (read_bytes, depth), or what else describes the case."""

    profile: str
    case: str
    call: str
    reference: str
    samples: list[Sample]
    parameters: dict[str, Any] = field(default_factory=dict)

    def over(self, value: Callable[[Sample], float | None]) -> list[float]:
        """`value` of each sample that has it."""
        return [v for v in map(value, self.samples) if v is not None]

    def latency_s(self, quantile: float) -> float:
        """Over the calls of all samples."""
        return float(np.quantile(np.concatenate([sample.seconds for sample in self.samples]), quantile))

    def cpu_s_per_gb(self) -> float | None:
        """Daemon and client."""
        costs = self.over(lambda s: None if s.daemon_cpu_s is None else (s.daemon_cpu_s + s.client_cpu_s) / s.bytes)
        return statistics.median(costs) * 1e9 if costs else None

    def shares(self, memory_gb_per_s: float) -> dict[str, float]:
        """Which part of the time each would need alone: the disk (as the reference reads), a memcpy, each side's core."""
        found: dict[str, list[float]] = {
            "disk": self.over(lambda s: s.of_reference if s.disk_bytes else None),
            "memory": self.over(lambda s: s.bytes / memory_gb_per_s / 1e9 / s.total_s),
            "daemon": self.over(lambda s: None if s.daemon_cpu_s is None else s.daemon_cpu_s / s.total_s),
            "client": self.over(lambda s: s.client_cpu_s / s.total_s),
        }
        return {name: statistics.median(values) for name, values in found.items() if values}

    def as_dict(self, memory_gb_per_s: float) -> dict[str, Any]:
        """What `--json` writes of it."""
        return {
            "profile": self.profile,
            "case": self.case,
            "parameters": self.parameters,
            "call": self.call,
            "calls": sum(len(sample.seconds) for sample in self.samples),
            "gb_per_s": self.over(lambda s: s.gb_per_s),
            "latency_us": {f"p{100 * q:g}": 1e6 * self.latency_s(q) for q in (0.5, 0.9, 0.99, 0.999)},
            "reference": self.reference,
            "of_reference": self.over(lambda s: s.of_reference),
            "disk_share": self.over(lambda s: s.disk_bytes / s.bytes),
            "cpu_s_per_gb": self.cpu_s_per_gb(),
            "shares": self.shares(memory_gb_per_s),
            "limit": limit(self.shares(memory_gb_per_s)),
        }


def limit(shares: dict[str, float]) -> str:
    """What limits a case: "disk", "memory", "one core", or "waiting" where none of them explains half of the time.

    Client and daemon take turns in a call, so their time on a core adds up: what a thread of the daemon did meanwhile
    only makes the sum larger than 1.
    """
    needs = {
        "disk": shares.get("disk", 0.0),
        "memory": shares.get("memory", 0.0),
        "one core": shares.get("daemon", 0.0) + shares.get("client", 0.0),
    }
    # A core is busy while it copies, and while it asks the disk: the others explain more, so they come first.
    return next((name for name, share in needs.items() if share >= LIMIT_SHARE_MIN), "waiting")
