"""Records that were found to be wrong, whoever found them: counted once for each session, and said in the log."""

from __future__ import annotations

import numpy as np
from structlog.typing import FilteringBoundLogger

from hga_kvd.answers import Counters
from hga_kvd.geometry import Keys
from hga_kvd.index import Session

RecordKey = tuple[int, int, int]  # group, KV head, layer


def mark_damaged(session: Session, keys: Keys, counters: Counters) -> set[RecordKey]:
    """Counts records that are wrong wherever they were looked for; residency's lock. Returns those that are news."""
    found = {tuple(key) for key in keys.tolist()} - session.damaged
    session.damaged |= found
    chunks = np.array([key[0] for key in found], np.int64) // session.table.geometry.groups_per_chunk
    session.table.forget_chains(np.unique(session.rows[chunks]))  # a new copy must not be taken for this one
    session.damaged_records += len(found)
    counters.damaged_records += len(found)
    return found


def log_damaged(log: FilteringBoundLogger, session: Session, found: set[RecordKey]) -> None:
    for group, kv_head, layer in sorted(found):
        log.error("record damaged", session=session.session_id, layer=layer, kv_head=kv_head, group=group)
