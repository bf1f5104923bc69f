"""What every call of the engine works on, in one frozen value. The engine makes it; the parts of the engine share it."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from structlog.typing import FilteringBoundLogger

from hga_kvd.answers import Counters
from hga_kvd.config import Settings
from hga_kvd.disk import Disk
from hga_kvd.index import Places, Session
from hga_kvd.residency import Residency
from hga_kvd.segments import SegmentLog
from hga_kvd.writeout import WriteOut


@dataclass(frozen=True, eq=False)
class Parts:
    """disk, writeout: None without NVMe."""

    settings: Settings
    residency: Residency
    disk: Disk | None
    writeout: WriteOut | None
    log: FilteringBoundLogger
    counters: Counters = field(default_factory=Counters)  # the residency's lock guards them
    stopping: threading.Event = field(default_factory=threading.Event)
    wake: threading.Event = field(default_factory=threading.Event)  # there is something for the background to write

    @property
    def segments(self) -> SegmentLog | None:
        return self.writeout.segments if self.writeout else None

    # --- called with the residency's lock held ---

    def mark_dirty(self, session: Session) -> None:
        """The session has something that disk does not have."""
        if self.writeout is not None:
            self.writeout.mark_dirty(session)

    def lose(self, places: Places) -> None:
        """The index has nothing more at these places of the disk."""
        if self.writeout is not None:
            self.writeout.lose(places)

    def remove(self, session: Session) -> None:
        """Takes the session out of the index. Its space on disk comes back when it is settled."""
        self.lose(self.residency.remove_session(session))
        if self.writeout is not None:
            self.writeout.drop(session)

    # --- called without any lock ---

    def settle(self, session: Session, what: str) -> None:
        """Makes durable that the session was `what`. Raises: WriteFailed."""
        if self.writeout is not None:
            self.writeout.settle(session, what)
