"""The part of a small fetch that RAM answers. Under the residency's lock, and no I/O.

`find` is the way of a decode step that misses a record or two of its bank. It says what is there and what is to be read;
of anything else, as a key that does not exist, it says nothing, and the general way decides.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass

from hga_kvd.arena import EMPTY, VALID
from hga_kvd.index import Session
from hga_kvd.parts import Parts
from hga_kvd.residency import Pool

KEY = struct.Struct("<IHH")  # KEY_DTYPE: group, KV head, layer

# Up to here integers of Python are faster than arrays of numpy, and a copy under the lock than pins and a second turn
# of it: 8 records of 8 KiB take 10 us so, 25 us the other way; at 32 both take the same. From disk 12, 32 and 48 records
# cost 0.57, 1.08 and 1.72 ms of processor this way, and 1.12, 1.57 and 1.73 the other.
FEW_KEYS = 32
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
        found = find(session, pool, KEY.iter_unpack(packed))
        if found is None or found.missing:
            return 0
        copy(residency.memory, found.starts, pool.slots.record_bytes, into)
        pool.policy.touch_few(found.used)
        session.use(now)
        parts.counters.count_hits(count, size)
    return count


@dataclass(slots=True, eq=False)
class Found:
    """starts: where each key's record lies in the arena; of a missing one that has no slot, nothing that counts."""

    starts: list[int]
    used: list[int]  # slots of those that are there
    missing: list[tuple[int, int, int, int, int]]  # (key, row, layer, record, slot or 0) of the others


def find(session: Session, pool: Pool, keys: Iterable[tuple[int, int, int]]) -> Found | None:
    """Where the arena has these records. keys: (group, KV head, layer). None: there is more to it than hits and misses."""
    geometry, slots = pool.geometry, pool.slots
    layers, kv_heads, per_chunk = geometry.layers, geometry.kv_heads, geometry.groups_per_chunk
    group_count, size = session.chunk_count * per_chunk, slots.record_bytes
    row_of, slot_of = session.rows.data, pool.table.slot.data
    state, stride, per_page, page_rest = slots.state.data, slots.stride, slots.slots_per_page, slots.page_rest
    found = Found([], [], [])
    for key, (group, kv_head, layer) in enumerate(keys):
        if group >= group_count or kv_head >= kv_heads or layer >= layers:
            return None
        chunk, place = divmod(group, per_chunk)
        row = row_of[chunk]
        slot = slot_of[row, layer]
        record = kv_head * per_chunk + place
        here = state[slot, record]
        if here == VALID:
            found.used.append(slot)
        elif here == EMPTY:
            found.missing.append((key, row, layer, record, slot))
        else:
            return None
        start = (slot - 1) * stride + record * size
        found.starts.append(start + (slot - 1) // per_page * page_rest if page_rest else start)
    return found


def copy(memory: memoryview, starts: list[int], size: int, into: memoryview) -> None:
    """The records that lie there, one after the other."""
    at = 0
    for start in starts:
        into[at : at + size] = memory[start : start + size]
        at += size
