"""What a run measures and how long: one frozen object, built once by the command."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hga_kvd.bench.trace import Trace

KIB, MIB = 1 << 10, 1 << 20
WARM_UP_STEPS_MAX = 64


@dataclass(frozen=True)
class Options:
    """size: K/V that burst and prefill store. reads: bytes of one read of the burst; depths: reads a fetch.

    repeats: samples a case; seconds: of each. arena: RAM over K/V, for what is to come from disk. trace, trace_name,
    head_dim, bank_groups, steps_max: of the replay. queue_depth: of reads that are compared with, in flight.
    """

    trace: Trace
    trace_name: str
    size: int = 1024 * MIB
    reads: tuple[int, ...] = (4 * KIB, 8 * KIB, 32 * KIB)
    depths: tuple[int, ...] = (1, 8, 32, 128)
    repeats: int = 5
    seconds: float = 0.5
    arena: float = 0.1
    head_dim: int = 128
    bank_groups: int = 64
    steps_max: int = 1024
    queue_depth: int = 64

    @property
    def warm_up_steps(self) -> int:
        """Of the trace, before the steps that count: a bank of 64 groups is full by then."""
        return min(WARM_UP_STEPS_MAX, int(self.trace.shape[2]) // 4)

    def quick(self) -> Options:
        """Small: to see in seconds that everything works, not to measure."""
        return replace(
            self,
            trace=self.trace[:4],
            size=min(self.size, 64 * MIB),
            depths=(8, 32),
            repeats=2,
            seconds=0.05,
            steps_max=24,
        )
