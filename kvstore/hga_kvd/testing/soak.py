"""The simulator for as long as one likes: `python -m hga_kvd.testing.soak --seconds 600`.

Schedules and crash points of seeds that nobody has tried, one process a core. Ends with 1 if any broke the guarantee; each
prints what replays it.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor

from hga_kvd.testing import simulation
from hga_kvd.testing.simulation import Violation

SEEDS_A_JOB = 50


def _job(first: int) -> tuple[int, int, list[str]]:
    """(crashes, crash points, violations) of some seeds, and of every crash point of the first one."""
    crashes, points, violations = 0, simulation.crash_points(first), []
    for seed in range(first, first + SEEDS_A_JOB):
        try:
            crashes += simulation.run(seed).crashes
        except Violation as violation:
            violations.append(str(violation))
    for operation in range(1, points + 1):
        try:
            crashes += simulation.crash_at(first, operation).crashes
        except Violation as violation:
            violations.append(str(violation))
    return crashes, points, violations


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m hga_kvd.testing.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--first", type=int, help="first seed; of the clock if not given")
    given = parser.parse_args(arguments)
    first = given.first if given.first is not None else int(time.time()) * 1000
    print(f"seeds from {first}", flush=True)
    ends, jobs, crashes, points, violations = time.monotonic() + given.seconds, 0, 0, 0, 0
    workers = os.cpu_count() or 1
    with ProcessPoolExecutor(workers) as pool:
        while time.monotonic() < ends:
            firsts = [first + SEEDS_A_JOB * (jobs + i) for i in range(workers)]
            jobs += workers
            for found in pool.map(_job, firsts):
                crashes, points, violations = crashes + found[0], points + found[1], violations + len(found[2])
                for violation in found[2]:
                    print(violation, flush=True)
    print(f"{jobs * SEEDS_A_JOB} schedules and {points} crash points, {crashes} power losses: {violations} violations")
    return min(violations, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
