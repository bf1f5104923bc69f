"""The part of a fetch that RAM answers. Under the residency's lock, and no I/O.

`copy_few` is the way of a decode step that misses a record or two of its bank; anything it cannot answer whole, a miss
or a key that does not exist, it declines, and the general way decides.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

import numpy as np

from hga_kvd.arena import VALID
from hga_kvd.index import Session
from hga_kvd.parts import Parts
from hga_kvd.residency import Pool

KEY = struct.Struct("<IHH")  # KEY_DTYPE: group, KV head, layer

# Up to here integers of Python are faster than arrays of numpy, and a copy under the lock than pins and a second turn
# of it: 8 records of 8 KiB take 10 us so, 25 us the other way. At 32 both take the same.
FEW_KEYS = 16
FEW_BYTES = 256 << 10


def fetch_few(parts: Parts, session_id: int, packed: bytes, into: memoryview, epoch: int, now: float) -> int:
    """As Engine.fetch_few: a whole fetch in one turn of the lock, or nothing."""
    residency = parts.residency
    with residency.lock:
        session = residency.sessions.get(session_id)
        if session is None or session.epoch != epoch or len(packed) % KEY.size:
            return 0
        pool = residency.pools[session.pool]
        count = len(packed) // KEY.size
        size = count * pool.slots.record_bytes
        if size > min(len(into), FEW_BYTES, parts.settings.fetch_bytes_max):
            return 0
        if not copy_few(session, pool, residency.memory, KEY.iter_unpack(packed), into):
            return 0
        session.use(now)
        parts.counters.count_hits(count, size)
    return count


def copy_few(
    session: Session, pool: Pool, memory: memoryview, keys: Iterable[tuple[int, int, int]], into: memoryview
) -> bool:
    """Copies the records if the arena has all of them. keys: (group, KV head, layer). False: nothing was done."""
    geometry, slots = pool.geometry, pool.slots
    layers, kv_heads, per_chunk = geometry.layers, geometry.kv_heads, geometry.groups_per_chunk
    group_count, size = session.chunk_count * per_chunk, slots.record_bytes
    row_of, slot_of = session.rows.data, pool.table.slot.data
    state, offset_of = slots.state.data, slots.offset.data
    starts: list[int] = []
    used: list[int] = []
    for group, kv_head, layer in keys:
        if group >= group_count or kv_head >= kv_heads or layer >= layers:
            return False
        chunk, place = divmod(group, per_chunk)
        slot = slot_of[row_of[chunk], layer]
        record = kv_head * per_chunk + place
        if state[slot, record] != VALID:
            return False
        starts.append(offset_of[slot] + record * size)
        used.append(slot)
    at = 0
    for start in starts:
        into[at : at + size] = memory[start : start + size]
        at += size
    pool.policy.touch(np.array(used))
    return True
