"""Replays one trial of the simulator and prints what was done: `python -m hga_kvd.testing.replay SEED`.

SEED is what a failure printed: a number (a schedule of faults), or number:operation (a crash point).
"""

from __future__ import annotations

import argparse
import sys

from hga_kvd.testing.faults import KINDS, Schedule
from hga_kvd.testing.simulation import Simulation, Violation, crash_schedule


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m hga_kvd.testing.replay", description=__doc__)
    parser.add_argument("seed", help="as printed by the failure: 1234, or 12:34")
    parser.add_argument("--severity", choices=tuple(KINDS), help="of the faults; the seed draws it if not given")
    given = parser.parse_args(arguments)
    seed, _, operation = given.seed.partition(":")
    crash = crash_schedule(int(seed), int(operation)) if operation else None
    simulation = Simulation(crash or Schedule.draw(int(seed), given.severity))
    try:
        result = simulation.run()
    except Violation as violation:
        print(violation)
        return 1
    schedule = simulation.schedule
    print("\n".join(simulation.trial.trace))
    print(f"seed {schedule.name} ({schedule.severity}): the guarantee held through {result.crashes} power losses")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
