"""The hot path in C (csrc/), called with arrays. Each function here has a twin, which its caller uses where `LIBRARY` is
None; STATE says why it is.

What a call is given is checked here or is the engine's own; what the arrays say is checked in C.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from hga_kvd_proto.native import load

from hga_kvd.memory import address_of

if TYPE_CHECKING:
    from hga_kvd.arena import SlotClass
    from hga_kvd.eviction import Lrfu
    from hga_kvd.index import ChunkTable

U8 = npt.NDArray[np.uint8]
I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]
Found = npt.NDArray[np.void]

VERSION = 6  # as in csrc/find.c

# Fewer bytes are copied in less time than another thread needs to take the interpreter's lock and give it back.
HELD_BYTES_MAX = 256 << 10

LIBRARY, STATE = load(Path(__file__).parent, VERSION)

BROKEN, UNALIGNED = -2, -3
CHECKSUM_BYTES_MIN = 241  # fewer are the twin's

_address, _number, _real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
_ARGUMENTS = {
    "find": (_address, _address, _number, _address, _number, _address),
    "unpin": (_address, _address, _number),
    "fetch_few": (_address, _address, _number, _address, _number, _address, _number),
    "copy_hits": (_address, _address, _number, _address, _number),
    "plan": (_address, _address, _number, _address, _address, _number, _address, _address),
    "claim": (_address, _address, _address, _number, _number, _address, _number),
    "evict": (_address, _address, _number),
    "empty": (_address, _address, _number),
    "settle": (_address, _address, _number, _number, _address, _address, _number),
    "put_extents": (_address, _address, _number, _address, _number, _address, _address),
    "take": (_address, _number, _number),
    "bring": (_address, _address, _address, _address, _number),
}
for _library in LIBRARY or ():
    _library.hga_kvd_checksum.restype = ctypes.c_uint64
    _library.hga_kvd_checksum.argtypes = (_address, _number, ctypes.c_uint64)
    for _name, _types in _ARGUMENTS.items():
        _function = getattr(_library, f"hga_kvd_{_name}")
        _function.restype, _function.argtypes = _number, _types

# Where a key's record is; `place` of csrc/pool.h.
_PLACE = ("row", "layer", "record", "slot", "state", "start")
FOUND = np.dtype([*((name, np.int64) for name in _PLACE), ("worth", np.float64)])


class Pool(ctypes.Structure):
    """What C knows of one geometry's chunks and slots; `pool` of csrc/pool.h."""

    _fields_ = [
        *((name, _number) for name in ("layers", "kv_heads", "groups_per_chunk", "record_bytes", "records")),
        *((name, _number) for name in ("slot_count", "stride", "slots_per_page", "page_rest")),
        *((name, _number) for name in ("row_count", "row_step", "layer_step")),
        ("slot_of", _address), ("chunk_count", _number),
        *((name, _address) for name in ("segment", "offset", "uid", "checksums")), ("number", _number),
        *((name, _address) for name in ("state", "pins", "log_worth", "policy_key", "past_key", "past_log_worth")),
        ("past_count", _number), ("policy_now", _address), ("tick", _real),
        *((name, _address) for name in ("window", "holder", "doomed", "held", "region")), ("region_bytes", _number),
    ]  # fmt: skip

    @classmethod
    def of(cls, number: int, table: ChunkTable, slots: SlotClass, policy: Lrfu) -> Pool:
        geometry, region = table.geometry, slots.units.reshape(-1)
        pool = cls(
            geometry.layers, geometry.kv_heads, geometry.groups_per_chunk, slots.record_bytes, slots.records,
            slots.slot_count, slots.stride, slots.slots_per_page, slots.page_rest,
            number=number, state=address_of(slots.state), pins=address_of(slots.pins),
            log_worth=address_of(policy.log_worth), policy_key=address_of(policy.key),
            past_key=address_of(policy.past.key), past_log_worth=address_of(policy.past.log_worth),
            past_count=len(policy.past.key), policy_now=address_of(policy.clock), tick=policy.tick,
            window=address_of(policy.window), holder=address_of(slots.holder), doomed=address_of(slots.doomed),
            held=address_of(slots.held),
            region=address_of(region), region_bytes=len(region),
        )  # fmt: skip
        pool.address = ctypes.addressof(pool)
        pool._table, pool._slot_of, pool._uid = table, table.slot[:0], table.uid[:0]
        return pool

    def now(self) -> int:
        """Its address, with the table's arrays as they are: these are others when it has grown."""
        table = self._table
        slot_of = table.slot
        if slot_of is not self._slot_of or table.uid is not self._uid:
            self._slot_of, self._uid, self.chunk_count = slot_of, table.uid, len(table.uid)
            for name in ("segment", "offset", "uid", "checksums"):
                setattr(self, name, address_of(getattr(table, name)))
            self.slot_of, self.row_count = address_of(slot_of), len(slot_of)
            self.row_step, self.layer_step = (step // slot_of.itemsize for step in slot_of.strides)
        return self.address

    address: int
    _table: ChunkTable
    _slot_of: I64
    _uid: U64


def checksum(data: U8, seed: int) -> int:
    """XXH3 of CHECKSUM_BYTES_MIN bytes or more, as `checksum.checksum` has it."""
    assert LIBRARY is not None
    assert len(data) >= CHECKSUM_BYTES_MIN
    return int(LIBRARY.held.hga_kvd_checksum(address_of(data), len(data), seed))


def find(pool: Pool, rows: I64, chunk_count: int, keys: npt.NDArray[np.void], found: Found) -> int:
    """hga_kvd_find."""
    assert LIBRARY is not None
    assert len(rows) >= chunk_count
    assert len(found) == len(keys)
    call = LIBRARY.held.hga_kvd_find
    valid: int = call(pool.now(), address_of(rows), chunk_count, address_of(keys), len(keys), address_of(found))
    assert valid > -2 - len(keys), "the index names a row or a slot that cannot be"
    return valid


def unpin(pool: Pool, found: Found) -> None:
    """hga_kvd_unpin."""
    assert LIBRARY is not None
    LIBRARY.held.hga_kvd_unpin(pool.address, address_of(found), len(found))


def fetch_few(pool: Pool, rows: I64, chunk_count: int, packed: bytes, count: int, into: memoryview) -> bool:
    """hga_kvd_fetch_few. packed: of KEY_DTYPE, `count` of them."""
    assert LIBRARY is not None
    call = LIBRARY.held.hga_kvd_fetch_few
    return bool(call(pool.now(), address_of(rows), chunk_count, packed, count, address_of(into), len(into)))


class Plan:
    """What is to be read; `planned` and the lists of csrc/plan.c. Columns of records, in the order in which to read them.

    C works on the memory. The arrays are cut out of it when one of them is first asked for: few fetches need any.
    """

    def __init__(self, room: int, scratch: int = 0) -> None:
        """scratch: words behind the columns, the lists, the counts, and what a Batch writes: reads and wrong."""
        wrong = 17 * room + 9
        self._memory = np.empty(wrong + (room + 7) // 8 + scratch, np.int64)
        self.room = room
        self.columns = address_of(self._memory)
        self.lists = self.columns + 8 * 9 * room
        self.counts = self.lists + 8 * 7 * room
        self.reads = self.counts + 8 * 8
        self.wrong = self.columns + 8 * wrong
        self.scratch = self.wrong + (room + 7) // 8 * 8

    def counted(self) -> Plan:
        """Once it is made in C."""
        at = 16 * self.room
        counts = self._memory[at : at + 8].tolist()
        self.count, self.copied_count, _, self.awaited_count, self.lost_count = counts[:5]
        self.absent_count, segment_count = counts[5], counts[7]
        self.segment_ids = self._memory[at - self.room : at - self.room + segment_count]
        self.wrong_items = self._memory[at + self.room + 9 :].view(bool)[: self.count]
        return self

    def laid_out(self, count: int, segment_count: int = 0) -> Plan:
        """So many records, nothing said of them yet and no lists: for who makes a plan by hand."""
        self._memory[16 * self.room : 16 * self.room + 8] = count, 0, 0, 0, 0, 0, 0, segment_count
        return self.counted()

    def __getattr__(self, name: str) -> I64:
        if name.startswith("_") or "room" not in self.__dict__ or "keys" in self.__dict__:
            raise AttributeError(name)
        self._cut()
        found: I64 = self.__dict__[name]
        return found

    def _cut(self) -> None:
        memory, room = self._memory, self.room
        count, copies, awaited, lost = self.count, self.copied_count, self.awaited_count, self.lost_count
        absent = self.absent_count
        columns = memory[: 9 * room].reshape(9, room)[:, :count]
        lists = memory[9 * room : 16 * room].reshape(7, room)
        self.keys, self.records, self.slots, self.extents, self.segments, self.offsets, seeds, sums, self.starts = (
            columns
        )
        self.seeds, self.expected = seeds.view(np.uint64), sums.view(np.uint64)
        self.copies_to, self.copies_of = lists[0, :copies], lists[1, :copies]
        self.awaited, self.lost = lists[2, :awaited], lists[3, :lost]
        self.absent_rows, self.absent_layers = lists[4, :absent], lists[5, :absent]

    def without_slots(self) -> I64:
        """All of it is read to the destination; no slots are fresh."""
        self.slots[:], self.starts[:] = 0, -1
        return self.slots[:0]

    count: int  # of records; the others: of the lists
    copied_count: int
    awaited_count: int
    lost_count: int
    absent_count: int
    keys: I64
    records: I64
    slots: I64  # of its extent, or 0; once it is claimed: to be filled, or 0
    extents: I64  # which of the absent ones, or -1
    segments: I64  # which of segment_ids
    offsets: I64
    seeds: U64
    expected: U64
    starts: I64  # in the region, or -1: once it is claimed
    copies_to: I64  # keys that ask for what another one asks for
    copies_of: I64  # and which of the records that is
    awaited: I64  # keys of records that another call is reading
    lost: I64  # keys of records that are nowhere
    absent_rows: I64
    absent_layers: I64
    segment_ids: I64
    wrong_items: npt.NDArray[np.bool_]  # of a Batch


def plan(pool: Pool, found: Found, missing_count: int) -> Plan:
    """hga_kvd_plan. missing_count: of the keys that are not VALID."""
    assert LIBRARY is not None
    count = len(found)
    made = Plan(missing_count, 4 * missing_count + count)
    memory = made.columns, made.lists, missing_count, made.scratch, made.counts
    assert not LIBRARY.held.hga_kvd_plan(pool.now(), address_of(found), count, *memory), (
        "the index names what cannot be"
    )
    return made.counted()


def claim(pool: Pool, plan: Plan, fresh: I64) -> None:
    """hga_kvd_claim."""
    assert LIBRARY is not None
    assert len(fresh) <= plan.absent_count
    arguments = plan.columns, plan.lists, plan.room, plan.count, address_of(fresh), len(fresh)
    assert not LIBRARY.held.hga_kvd_claim(pool.now(), *arguments), "the index names what cannot be"


def evict(pool: Pool, count: int) -> I64:
    """hga_kvd_evict: the victims."""
    assert LIBRARY is not None
    victims: I64 = np.empty(count, np.int64)
    return victims[: LIBRARY.held.hga_kvd_evict(pool.address, address_of(victims), count)]


def empty(pool: Pool, slots: I64) -> bool:
    """hga_kvd_empty."""
    assert LIBRARY is not None
    done: int = LIBRARY.held.hga_kvd_empty(pool.now(), address_of(slots), len(slots))
    assert done >= 0, "a slot holds what cannot be"
    return bool(done)


def settle(pool: Pool, plan: Plan, unkept: npt.NDArray[np.bool_], fresh: I64) -> None:
    """hga_kvd_settle."""
    assert LIBRARY is not None
    assert len(unkept) == plan.count
    arguments = plan.columns, plan.room, plan.count, address_of(unkept), address_of(fresh), len(fresh)
    LIBRARY.held.hga_kvd_settle(pool.address, *arguments)


def copy_hits(pool: Pool, found: Found, destination: U8) -> None:
    """hga_kvd_copy_hits."""
    assert LIBRARY is not None
    call = (LIBRARY.held if len(destination) <= HELD_BYTES_MAX else LIBRARY.free).hga_kvd_copy_hits
    copied = call(pool.address, address_of(found), len(found), address_of(destination), len(destination))
    assert copied >= 0, "a slot lies outside the arena, or a record outside the destination"


def put_extents(pool: Pool, slots: I64, source: U8, seeds: U64) -> U64:
    """hga_kvd_put_extents. source: [slots, extent_bytes]. Returns the checksums, as `seeds`."""
    assert LIBRARY is not None
    assert seeds.size == len(slots) * pool.records
    source, seeds = np.ascontiguousarray(source), np.ascontiguousarray(seeds)
    checksums = np.empty_like(seeds)
    places = (pool.address, address_of(slots), len(slots), address_of(source), source.size)
    done = LIBRARY.free.hga_kvd_put_extents(*places, address_of(seeds), address_of(checksums))
    assert done == len(slots), "a slot lies outside the arena, or an extent outside the payload"
    return checksums


class Batch(ctypes.Structure):
    """Records to read; `batch` of csrc/reads.c. Keeps the arrays alive."""

    _fields_ = [
        *((name, _number) for name in ("count", "size", "alignment")),
        ("region", _address), ("region_bytes", _number), ("destination", _address), ("destination_bytes", _number),
        *((name, _address) for name in ("starts", "positions", "offsets", "files", "fds")), ("file_count", _number),
        *((name, _address) for name in ("seeds", "expected", "wrong", "reads")),
    ]  # fmt: skip

    @classmethod
    def of(cls, pool: Pool, plan: Plan, part: slice, destination: U8) -> Batch:
        """This part of the plan, which must be claimed."""
        first = 8 * part.start
        column = range(plan.columns + first, plan.columns + 9 * 8 * plan.room + first, 8 * plan.room or 8)
        batch = cls(
            part.stop - part.start, pool.record_bytes, 1, pool.region, pool.region_bytes,
            address_of(destination), len(destination), column[8], column[0], column[5], column[4], 0, 0,
            column[6], column[7], plan.wrong + part.start, plan.reads,
        )  # fmt: skip
        batch.wrong_items = plan.wrong_items[part]
        batch._memory = plan, destination
        return batch

    wrong_items: npt.NDArray[np.bool_]
    _memory: tuple[Plan, U8]


class Ring(ctypes.Structure):
    """An io_uring that is set up; `ring` of csrc/reads.c."""

    _fields_ = [
        *((name, _number) for name in ("fd", "entries", "queue_depth")),
        ("callers", _address),
        *((name, _address) for name in ("sq_head", "sq_tail", "sq_array", "cq_head", "cq_tail", "sqes", "cqes")),
        ("cqe_count", _number),
    ]  # fmt: skip


def take(batch: Batch, failed: npt.NDArray[np.bool_], first: int) -> None:
    """hga_kvd_take of the items from `first` on that were read; failed: those of them that could not be."""
    assert LIBRARY is not None
    end = first + len(failed)
    batch.wrong_items[first:end] = failed
    assert not LIBRARY.free.hga_kvd_take(ctypes.addressof(batch), first, end), "an item lies outside its memory"


def bring(ring: Ring, batch: Batch, pool: Pool, found: Found) -> int:
    """hga_kvd_bring: 0, UNALIGNED (nothing was done), or the errno of a ring that is of no more use."""
    assert LIBRARY is not None
    call = LIBRARY.free.hga_kvd_bring
    error: int = call(ctypes.addressof(ring), ctypes.addressof(batch), pool.address, address_of(found), len(found))
    assert error != BROKEN, "an item or a hit lies outside its memory"
    return error
