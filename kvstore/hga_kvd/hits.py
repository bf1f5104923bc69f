"""The part of a fetch that RAM answers. No I/O.

`find` and `fetch_few` run under the residency's lock. What `find` names is pinned until `unpin`, so `copy` needs no lock.
Each runs in C where there is a library (native.py), and below it stands what it does, in numpy.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hga_kvd import native
from hga_kvd.arena import VALID
from hga_kvd.geometry import KEY_DTYPE, Keys
from hga_kvd.index import Session
from hga_kvd.native import FOUND, Found
from hga_kvd.parts import Parts
from hga_kvd.residency import Pool, locate, out_of_range

U8 = npt.NDArray[np.uint8]

# A decode step's fetch that RAM has is copied under the lock: less than pins and a second turn of it would cost.
FEW_KEYS = 32
FEW_BYTES = 256 << 10


def fetch_few(parts: Parts, session_id: int, packed: bytes, into: memoryview, epoch: int, now: float) -> int:
    """As Engine.fetch_few: a whole fetch in one turn of the lock, or nothing."""
    residency = parts.residency
    with residency.lock:
        session = residency.sessions.get(session_id)
        if session is None or session.epoch != epoch or len(packed) % KEY_DTYPE.itemsize:
            return 0
        pool, count = residency.pools[session.pool], len(packed) // KEY_DTYPE.itemsize
        size = count * pool.slots.record_bytes
        if count > FEW_KEYS or size > min(len(into), FEW_BYTES, parts.settings.fetch_bytes_max):
            return 0
        if pool.view is not None:
            if not native.fetch_few(pool.view, session.rows, session.chunk_count, packed, count, into[:size]):
                return 0
        elif not _fetch_few(session, pool, np.frombuffer(packed, KEY_DTYPE), np.frombuffer(into[:size], np.uint8)):
            return 0
        session.use(now)
        parts.counters.count_hits(count, size)
    return count


def _fetch_few(session: Session, pool: Pool, keys: Keys, into: U8) -> bool:
    try:
        rows, layers, records = locate(session, keys)
        slots = pool.table.slot[rows, layers]
        state = pool.slots.state[slots, records]
    except IndexError:
        return False
    if (state != VALID).any():
        return False
    pool.slots.gather(slots, records, into)
    pool.policy.touch(slots)
    return True


def find(session: Session, pool: Pool, keys: Keys) -> tuple[Found, int]:
    """Where the records of these keys are, and how many are VALID. Every slot that is named is pinned, and its use is
    counted.

    Raises: KeyOutOfRange, and then nothing was done.
    """
    found = np.empty(len(keys), FOUND)
    if pool.view is not None:
        valid = native.find(pool.view, session.rows, session.chunk_count, np.ascontiguousarray(keys), found)
        if valid < 0:
            raise out_of_range(session, keys)
        return found, valid
    try:  # numpy checks every index anyway; only a refusal looks for the one to blame
        rows, layers, records = locate(session, keys)
        slots = pool.table.slot[rows, layers]
        state = pool.slots.state[slots, records]
    except IndexError:
        raise out_of_range(session, keys) from None
    for name, column in (("row", rows), ("layer", layers), ("record", records), ("slot", slots), ("state", state)):
        found[name] = column
    found["start"] = pool.slots.starts(slots, records)
    pool.slots.pin(slots)
    pool.policy.touch(slots[slots != 0])
    return found, int(np.count_nonzero(state == VALID))


def unpin(pool: Pool, found: Found) -> None:
    """Under the lock: what `find` pinned."""
    if pool.view is None:
        pool.slots.unpin(found["slot"])
    else:
        native.unpin(pool.view, found)
        pool.slots.free_doomed(found["slot"])


def copy(pool: Pool, found: Found, destination: U8) -> None:
    """Those that are VALID, each to its key's place in the destination."""
    if pool.view is None:
        pool.slots.gather(np.where(found["state"] == VALID, found["slot"], 0), found["record"], destination)
    else:
        native.copy_hits(pool.view, found, destination)
