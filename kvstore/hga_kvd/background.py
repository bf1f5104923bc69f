"""The engine's own threads: one writes out and ends sessions whose time is up, one scrubs. Both are matters of speed and
tidiness: without them nothing that was promised is missing, and an append that finds no slot writes out itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from hga_kvd.errors import KvdError
from hga_kvd.parts import Parts

WRITE_RETRY_S = 1.0
# How often sessions whose time is up are looked for.
EXPIRE_S = 1.0
# One read of a scrub: 0.3 ms of a disk of 1.6 GB/s, so that no fetch waits long behind it.
SCRUB_STEP_BYTES = 512 << 10
SCRUB_IDLE_S = 1.0
SCRUB_PAUSE_S_MIN = 0.001  # between two steps, whatever the rate: calls in flight come first


class Background:
    def __init__(self, parts: Parts, expire: Callable[[], None], scrub: Callable[[int], int]) -> None:
        """expire, scrub: the engine's."""
        self._parts = parts
        self._expire = expire
        self._scrub = scrub
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        works = [("write-out", self._write_out)]
        if self._parts.settings.scrub_rate:
            works.append(("scrub", self._scrub_round))
        self._threads = [threading.Thread(target=work, name=name, daemon=True) for name, work in works]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._parts.stopping.set()
        self._parts.wake.set()
        for thread in self._threads:
            thread.join()

    def _write_out(self) -> None:
        """Keeps most of the arena free of dirty extents, so that appends rarely wait, and flushes find little left."""
        parts, writeout = self._parts, self._parts.writeout
        trouble: type[Exception] | None = None
        while not parts.stopping.is_set():
            parts.wake.wait(EXPIRE_S)
            parts.wake.clear()
            try:
                self._expire()
                while writeout and not parts.stopping.is_set() and writeout.write_ahead():
                    pass
                if writeout:
                    writeout.tidy()
                if trouble:
                    parts.log.info("background write-out works again")
                trouble = None
            except (KvdError, OSError) as error:  # dirty data stays; who needs its slots or its durability is told
                if type(error) is not trouble:  # a full disk stays full for hours: said once
                    parts.log.warning("background write-out failed", error=str(error))
                trouble = type(error)
                parts.stopping.wait(WRITE_RETRY_S)

    def _scrub_round(self) -> None:
        """Goes round at scrub_rate bytes a second."""
        parts, rate = self._parts, self._parts.settings.scrub_rate
        while not parts.stopping.is_set():
            started = time.monotonic()
            try:
                done = self._scrub(SCRUB_STEP_BYTES)
            except OSError as error:
                parts.log.warning("scrub failed", error=str(error))
                done = 0
            left = started + done / rate - time.monotonic() if done else SCRUB_IDLE_S
            parts.stopping.wait(max(SCRUB_PAUSE_S_MIN, left))
