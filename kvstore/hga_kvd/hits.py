"""The part of a fetch that RAM answers. Under the residency's lock, and no I/O.

`copy_few` is the way of a decode step that misses a record or two of its bank; anything it cannot answer whole, a miss
or a key that does not exist, it declines, and the general way decides.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hga_kvd.arena import VALID
from hga_kvd.geometry import Keys
from hga_kvd.index import Session
from hga_kvd.residency import Pool

U8 = npt.NDArray[np.uint8]

# Up to here integers of Python are faster than arrays of numpy, and a copy under the lock than pins and a second turn
# of it: 8 records of 8 KiB take 10 us so, 25 us the other way. At 32 both take the same.
FEW_KEYS = 16
FEW_BYTES = 256 << 10


def copy_few(session: Session, pool: Pool, memory: memoryview, keys: Keys, destination: U8) -> bool:
    """Copies the records if the arena has all of them. False: nothing was done."""
    geometry, slots = pool.geometry, pool.slots
    layers, kv_heads, per_chunk = geometry.layers, geometry.kv_heads, geometry.groups_per_chunk
    group_count, size = session.chunk_count * per_chunk, slots.record_bytes
    row_of, slot_of = session.rows.data, pool.table.slot.data
    state, offset_of = slots.state.data, slots.offset.data
    starts: list[int] = []
    used: list[int] = []
    for group, kv_head, layer in keys.tolist():
        if group >= group_count or kv_head >= kv_heads or layer >= layers:
            return False
        chunk, place = divmod(group, per_chunk)
        slot = slot_of[row_of[chunk], layer]
        record = kv_head * per_chunk + place
        if state[slot, record] != VALID:
            return False
        starts.append(offset_of[slot] + record * size)
        used.append(slot)
    at, into = 0, destination.data
    for start in starts:
        into[at : at + size] = memory[start : start + size]
        at += size
    pool.policy.touch(np.array(used))
    return True
