"""The daemon's clock: seconds since 1970 as the system said when it was made, and from then on only time that passes.

A session's TTL is counted by it. Somebody who sets the system's clock, or a server of time that corrects it, must not make
sessions of a minute look a year old.
"""

from __future__ import annotations

import time
from collections.abc import Callable


def steady_clock() -> Callable[[], float]:
    """Time in which the machine sleeps counts."""
    start = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    return lambda: start + time.clock_gettime(time.CLOCK_BOOTTIME)
