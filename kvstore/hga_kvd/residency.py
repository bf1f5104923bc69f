"""What is where in RAM: sessions, chunk tables, arena slots, and the policy that empties slots. No I/O.

One lock guards everything here. It is held for bookkeeping only, never during a copy, a checksum or I/O: a call pins
the slots it needs, lets go of the lock, works, takes it again and unpins. Methods are called with the lock held.

A slot is free; or dirty (acknowledged, not yet synced to disk: stays whatever happens); or clean (disk has it too) and
then known to its policy, which may give it away while it is not pinned.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hga_kvd import native
from hga_kvd.arena import EMPTY, FILLING, PAGE_BYTES, Arena, SlotClass
from hga_kvd.errors import KeyOutOfRange, SessionNotFound, StaleEpoch
from hga_kvd.eviction import Lrfu
from hga_kvd.geometry import Geometry, Keys
from hga_kvd.index import ChunkTable, Places, Session
from hga_kvd.manifest import geometry_bytes, session_bytes_max
from hga_kvd.memory import address_of, aligned_buffer
from hga_kvd.native import Plan

I64 = npt.NDArray[np.int64]

NO_SLOTS: I64 = np.zeros(0, np.int64)

# Evicted at once while a few slots are wanted, at most one in EVICTED_SHARE: an eviction costs 0.1 ms, whatever its size.
EVICTED_AT_ONCE, EVICTED_SHARE = 64, 32


@dataclass(frozen=True, eq=False)
class Pool:
    """What sessions of one geometry share. Slots and policy are shared by all geometries with equal extents."""

    number: int
    geometry: Geometry
    table: ChunkTable
    slots: SlotClass
    policy: Lrfu
    view: native.Pool | None  # what C sees of it; None: the twins run


class Residency:
    def __init__(self, ram_bytes: int) -> None:
        """Takes ram_bytes of memory, rounded down to pages, at least one page."""
        self.lock = threading.Lock()
        self.filled = threading.Condition(self.lock)  # some call has ended its reads
        self.arena = Arena(aligned_buffer(max(1, ram_bytes // PAGE_BYTES) * PAGE_BYTES, huge=True))
        self.address = address_of(self.arena.region)
        self.memory = self.arena.region.data
        self.sessions: dict[int, Session] = {}
        self.by_name: dict[str, Session] = {}
        self.told_bytes = 0  # what sessions with a name, and geometries, take in a manifest at most
        self.pools: list[Pool] = []
        self.evicted_extents = 0
        self.next_session_id = 1
        self.next_chunk_uid = 1
        self._pool_of: dict[Geometry, Pool] = {}
        self._policies: dict[SlotClass, Lrfu] = {}

    def pool_for(self, geometry: Geometry) -> Pool:
        pool = self._pool_of.get(geometry)
        if pool is None:
            slots = self.arena.slot_class(geometry.record_bytes, geometry.records_per_extent)
            policy = self._policies.setdefault(slots, Lrfu(slots.slot_count))
            table = ChunkTable(geometry, geometry.layers * slots.stride)
            view = native.Pool.of(len(self.pools), table, slots, policy) if native.LIBRARY is not None else None
            pool = Pool(len(self.pools), geometry, table, slots, policy, view)
            self.pools.append(pool)
            self._pool_of[geometry] = pool
            self.told_bytes += geometry_bytes(geometry)
        return pool

    def chunks_max(self, geometry: Geometry) -> int:
        """Chunks of this geometry that fit in the arena when it holds nothing else."""
        slots = self.arena.slot_class(geometry.record_bytes, geometry.records_per_extent)
        return self.arena.slots_max(slots) // geometry.layers

    def may_know(self, geometry: Geometry, geometries_max: int) -> bool:
        """Whether the books of one more geometry may be kept. They are never given up: calls in flight use them."""
        if geometry in self._pool_of:
            return True
        return len(self.pools) < geometries_max and self.arena.may_cut(
            geometry.record_bytes, geometry.records_per_extent
        )

    @property
    def summary_bytes(self) -> int:
        """Of summaries that only RAM has."""
        return sum(pool.table.summaries.ram_bytes for pool in self.pools)

    # --- sessions ---

    def session(self, session_id: int, epoch: int | None = None) -> Session:
        """The session; with `epoch`, only if that is its epoch. Raises: SessionNotFound, StaleEpoch."""
        session = self.sessions.get(session_id)
        if session is None:
            raise SessionNotFound(
                f"session {session_id} does not exist: it was never opened, was deleted, or was temporary and its "
                "owner or the daemon went away; open it again"
            )
        if epoch is not None and session.epoch != epoch:
            raise StaleEpoch(
                f"session {session_id} was truncated: it is in epoch {session.epoch} now and has "
                f"{session.chunk_count} chunks, the request is of epoch {epoch}; open it again and go on from there"
            )
        return session

    def add_session(self, session: Session) -> None:
        self.sessions[session.session_id] = session
        if session.name:
            self.by_name[session.name] = session
            self.told_bytes += session_bytes_max(session.name, session.tenant)

    def remove_session(self, session: Session) -> Places:
        """Returns what it alone had on disk. Calls in flight keep what they pinned."""
        session.deleted = True
        del self.sessions[session.session_id]
        if session.name:
            del self.by_name[session.name]
            self.told_bytes -= session_bytes_max(session.name, session.tenant)
        return self.release(session, session.all_rows())

    def oldest_idle(self) -> Session | None:
        """The session to evict next: named, not pinned, nobody has it open, used before all other such ones."""
        idle = [s for s in self.sessions.values() if s.name and s.chunk_count and s.state != "open" and not s.pinned]
        return min(idle, key=lambda s: s.used_at, default=None)

    def drop_slots(self, session: Session) -> None:
        """Frees the clean slots of chunks that only this session has."""
        pool, rows = self.pools[session.pool], session.all_rows()
        slots = pool.table.slot[rows[pool.table.refs[rows] == 1]].reshape(-1)
        slots = slots[(slots != 0) & ~pool.slots.dirty[slots] & (pool.slots.pins[slots] == 0)]
        pool.policy.forget(slots.tolist())
        self._evict(pool.slots, slots.tolist())

    def release(self, session: Session, rows: I64) -> Places:
        """The session lets go of these chunks. What nobody else has is forgotten; returns where it was on disk."""
        pool = self.pools[session.pool]
        return self.forget(pool, pool.table.release(rows))

    def forget(self, pool: Pool, dead: I64) -> Places:
        """Takes from dead rows what they have in RAM. Returns what they had on disk."""
        slots = pool.table.slot[dead].reshape(-1)
        slots = slots[slots != 0]
        pool.policy.forget(slots.tolist())
        pool.slots.free(slots)
        places = pool.table.places(dead)
        pool.table.remove(dead)
        return places

    # --- slots ---

    def make_room(self, pool: Pool, count: int) -> int:
        """Evicts until `count` slots are free or nothing more can go. Returns how many are free, at most count."""
        slots = pool.slots
        self.arena.grow(slots, count)
        if slots.free_count < count and self.arena.is_small(slots):
            self._take_pages(slots, count)
        if slots.free_count < count:
            ahead = min(EVICTED_AT_ONCE, slots.held_count // EVICTED_SHARE)
            wanted = max(ahead, count - slots.free_count)
            if pool.view is None:
                self._evict(slots, pool.policy.evict(wanted, slots.pins))
            else:
                self._evict(slots, native.evict(pool.view, wanted), pool.view)
        if slots.free_count < count:
            self._take_pages(slots, count)
        return min(count, slots.free_count)

    def _take_pages(self, slots: SlotClass, count: int) -> None:
        """Takes pages from other classes by evicting what is clean in them."""
        wanted = -(-(count - slots.free_count) // slots.slots_per_page)
        for page, owner in self.arena.reclaimable(slots, wanted):
            held = owner.slots_of(page)
            held = held[owner.held[held]]
            self._policies[owner].forget(held.tolist())
            self._evict(owner, held.tolist())
            self.arena.give_back(page)
        self.arena.grow(slots, count)

    def _evict(self, slots: SlotClass, victims: npt.ArrayLike, view: native.Pool | None = None) -> None:
        gone = np.asarray(victims, np.int64)
        self.evicted_extents += len(gone)
        if view is not None and native.empty(view, gone):
            slots.emptied(gone)
            return
        owner, row, layer = slots.holder[gone].T
        for number in set(owner.tolist()):
            mine = owner == number
            self.pools[number].table.slot[row[mine], layer[mine]] = 0
        slots.free(gone)

    def hold(self, pool: Pool, slots: I64, rows: I64, layers: I64) -> None:
        """These slots hold these extents from now on."""
        pool.slots.holder[slots, 0] = pool.number
        pool.slots.holder[slots, 1] = rows
        pool.slots.holder[slots, 2] = layers
        pool.table.slot[rows, layers] = slots

    def make_evictable(self, pool: Pool, slots: I64) -> None:
        """Disk has what these slots hold."""
        pool.slots.dirty[slots] = False
        holder = pool.slots.holder[slots]
        pool.policy.admit(slots, extent_key(holder[:, 0], holder[:, 1], holder[:, 2]))

    # --- reads from disk ---

    def claim(self, pool: Pool, plan: Plan) -> I64:
        """Slots for the records that a call is about to read, as far as there are slots: plan.slots and plan.starts. Returns
        those that hold nothing yet, pinned. End with `end_reads`.
        """
        slots, wanted = pool.slots, plan.absent_count
        fresh = slots.take(self.make_room(pool, wanted)) if wanted else NO_SLOTS
        if pool.view is not None:
            native.claim(pool.view, plan, fresh)
            return fresh
        rows, layers = plan.absent_rows[: len(fresh)], plan.absent_layers[: len(fresh)]
        pool.policy.admit(fresh, extent_key(pool.number, rows, layers))
        self.hold(pool, fresh, rows, layers)
        slots.pin(fresh)
        target, given = plan.slots.copy(), (plan.extents >= 0) & (plan.extents < len(fresh))
        target[given] = fresh[plan.extents[given]]
        target[slots.state[target, plan.records] != EMPTY] = 0  # BAD: that place is never filled again
        filled = target != 0
        slots.state[target[filled], plan.records[filled]] = FILLING
        plan.slots, plan.starts = target, np.where(filled, slots.starts(target, plan.records), -1)
        return fresh

    def end_reads(self, pool: Pool, plan: Plan, unkept: npt.NDArray[np.bool_] | None, fresh: I64) -> None:
        """unkept: which of the records may not stay in their slots: they are not verified. None: none of them may."""
        if unkept is None:
            unkept = np.ones(plan.count, bool)
        if pool.view is not None:
            native.settle(pool.view, plan, unkept, fresh)
            pool.slots.free_doomed(fresh)
        else:
            filled = plan.slots != 0
            pool.slots.set_valid(plan.slots[filled], plan.records[filled], ~unkept[filled])
            pool.slots.unpin(fresh)
        self.filled.notify_all()

    def wait_for_fills(self, pool: Pool, slots: I64, records: I64, seconds: float | None) -> bool:
        """Waits until other calls have brought these records, or given up. False: not within so many seconds."""
        state = pool.slots.state
        return self.filled.wait_for(lambda: not (state[slots, records] == FILLING).any(), seconds)


def extent_key(pool_number: int | I64, row: I64, layer: I64) -> I64:
    """Names the extent while its row lives. A row used again may meet an old key once: a wrong guess, no harm."""
    return (pool_number << 48) | (row << 10) | layer


def locate(session: Session, keys: Keys) -> tuple[I64, I64, I64]:
    """(row, layer, record in the extent) of each key. Raises IndexError if a group is past the session's end.

    A layer or KV head past its end gives an index past the end of the slot or record axis: see `out_of_range`.
    """
    groups = session.table.geometry.groups_per_chunk
    group = keys["group"].astype(np.int64)
    chunk = group // groups
    record = keys["kv_head"] * np.int64(groups) + (group - chunk * groups)
    return session.rows[: session.chunk_count][chunk], keys["layer"].astype(np.int64), record


def out_of_range(session: Session, keys: Keys) -> KeyOutOfRange:
    """The refusal that names the first key that is not in the session."""
    geometry = session.table.geometry
    limits = (geometry.layers, geometry.kv_heads, session.chunk_count * geometry.groups_per_chunk)
    layer, kv_head, group = keys["layer"], keys["kv_head"], keys["group"]
    first = int(np.argmax((layer >= limits[0]) | (kv_head >= limits[1]) | (group >= limits[2])))
    return KeyOutOfRange(
        f"key {first} asks for layer {layer[first]}, KV head {kv_head[first]}, group {group[first]}; session "
        f"{session.session_id} has {limits[0]} layers, {limits[1]} KV heads and {limits[2]} groups"
    )
