"""The bank on the device: which opened groups are held, what leaves for those that are not, and what the host must fetch.

Per KV head a table of `slots` entries: the group that each holds, and the step it was last opened in. It is searched as
a whole, 128 compares a group: no page table to grow, nothing that two tables could disagree about. `place` is the step:

- takes the selection's groups (select.Chosen) in order of place;
- hits go to `held`; keys of the misses go to the mailbox, and every KV head's word follows them: the host waits for
  these words, the one synchronisation of a layer;
- misses get the slots that were opened longest ago, never one opened in this step, and go to `late`.

`land` waits in its turn: for the host's word that the records are there, or that they will not come. So route, bank and
attention of a layer are one graph, and the device goes on by itself when the records arrive. One thread listens to the
host and passes the word on to all programs; the records themselves are read in place, 29 GB/s of 20 and 45 of 64.

The tables name a missed group from `place` on. If the fetch fails, the caller must `forget` the layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hga_kvd_client.kernels import (
    CONTROL_SIZE,
    COUNT_MASK,
    FIRST_GROUP,
    MAIL_POSTED,
    MAIL_READY,
    NEVER,
    OPENED_SHIFT,
    READY_SHIFT,
    SLOTS_MAX,
    STAGED,
    STEP,
    STEP_SHIFT,
    mail_keys,
    mail_words,
)
from hga_kvd_client.kernels.select import TIES_MAX, Chosen

PLACE_WARPS, LAND_WARPS = 16, 4
# Ties that are ranked in the usual case; ranking all TIES_MAX costs 16 times as much.
TIES_FEW = 32
COPY_WORDS = 1024  # int64 of a record that one program moves at once


@dataclass(frozen=True)
class Tables:
    """One layer's. int32. groups: [kv_heads, slots], -1: empty; used_at: [kv_heads, slots]: step, -1: never.

    opened: [kv_heads, most], the groups of the last step, sorted; opened_counts: [kv_heads]. arrived: int64 [1], the host's
    last word, as `land` heard it.
    """

    groups: Tensor
    used_at: Tensor
    opened: Tensor
    opened_counts: Tensor
    arrived: Tensor

    @classmethod
    def empty(cls, kv_heads: int, slots: int, most: int, device: torch.device) -> Tables:
        def full(value: int, *shape: int) -> Tensor:
            return torch.full(shape, value, dtype=torch.int32, device=device)

        return cls(
            full(-1, kv_heads, slots), full(-1, kv_heads, slots), full(0, kv_heads, most), full(0, kv_heads),
            torch.zeros(1, dtype=torch.int64, device=device),
        )  # fmt: skip

    def forget(self) -> None:
        self.groups.fill_(-1)
        self.used_at.fill_(-1)


@dataclass(frozen=True)
class Lists:
    """Slots of what a step opens; shared by all layers. int32.

    held, late: [kv_heads, most] and their counts [kv_heads]; missing: [kv_heads, most], the groups that go to `late`. The
    records of the fetch are those of late, KV head by KV head.
    """

    held: Tensor
    held_counts: Tensor
    late: Tensor
    late_counts: Tensor
    missing: Tensor

    @classmethod
    def empty(cls, kv_heads: int, most: int, device: torch.device) -> Lists:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        return cls(
            zeros(kv_heads, most), zeros(kv_heads), zeros(kv_heads, most), zeros(kv_heads), zeros(kv_heads, most)
        )


@triton.jit
def _fenced(value, INTERPRETED: tl.constexpr):
    """The value, in the program's first thread once every earlier write of this program can be seen by the host."""
    tl.debug_barrier()
    if not INTERPRETED:
        value = tl.inline_asm_elementwise(
            """{ .reg .pred first; .reg .b32 thread; mov.u32 thread, %tid.x; setp.eq.u32 first, thread, 0;
            @first fence.acq_rel.sys; mov.u64 $0, $1; }""",
            "=l,l", [value], dtype=tl.int64, is_pure=False, pack=1,
        )  # fmt: skip
    return value


@triton.jit
def _read_now(place, THREADS: tl.constexpr, INTERPRETED: tl.constexpr):
    """The int64 there, not negative, as the host has it now; what it wrote before can be seen after. One thread reads."""
    if INTERPRETED:
        value = tl.load(place)
    else:
        thread = tl.arange(0, THREADS)
        value = tl.inline_asm_elementwise(
            """{ .reg .pred first; setp.eq.s32 first, $2, 0; mov.u64 $0, 0;
            @first ld.acquire.sys.global.b64 $0, [$1]; }""",
            "=&l,l,r", [place + thread * 0, thread], dtype=tl.int64, is_pure=False, pack=1,
        )  # fmt: skip
        value = tl.max(value, 0)
    return value


@triton.jit
def _take_ties(chosen, ties, count, head, own, need, outside, capacity, most, TIES: tl.constexpr, COVERS: tl.constexpr):
    """Adds this head's of the `need` best of the first TIES ties to its row of `chosen`; returns how many there are then.

    COVERS: of those, the ones before which less than `outside` was taken."""
    tie = tl.arange(0, TIES)
    tied = tie < count
    key = tl.load(ties + tie, mask=tied, other=-1)
    larger = key[None, :] > key[:, None]
    rank = tl.sum(larger.to(tl.int32), 1)
    flat = 0x7FFFFFFF - (key & 0xFFFFFFFF).to(tl.int32)
    mine = tied & (rank < need) & (flat // capacity == head)
    if COVERS:
        mass = (key >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        mine = mine & (tl.sum(tl.where(larger, mass[None, :], 0.0), 1) < outside)
    place = own + tl.cumsum(mine.to(tl.int32), 0) - 1
    tl.store(chosen + head * most + place, flat % capacity, mask=mine)
    return own + tl.sum(mine.to(tl.int32), 0)


@triton.jit(do_not_specialize=["layer"])
def _place(
    chosen,
    chosen_counts,
    ties,
    tie_count,
    stored,
    control,
    layer,
    groups,
    used_at,
    opened,
    opened_counts,
    held,
    held_counts,
    late,
    late_counts,
    missing,
    posted,  # of the mailbox
    keys,
    capacity,
    budget,
    slots,
    most,
    uncovered,
    MOST: tl.constexpr,  # powers of two from here on
    SLOTS: tl.constexpr,
    HEADS: tl.constexpr,
    TIES_FEW: tl.constexpr,
    TIES: tl.constexpr,
    COVERS: tl.constexpr,
    STEP: tl.constexpr,
    FIRST_GROUP: tl.constexpr,
    STEP_SHIFT: tl.constexpr,
    OPENED_SHIFT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    head, kv_heads = tl.program_id(0), tl.num_programs(0)
    step = tl.load(control + STEP)
    first_group = tl.load(control + FIRST_GROUP).to(tl.int32)
    slot = tl.arange(0, SLOTS)
    real = slot < slots
    holds = tl.load(groups + head * slots + slot, mask=real, other=-1)

    # The best of the ties fill the budget.
    each = tl.arange(0, HEADS)
    above = tl.sum(tl.load(chosen_counts + each, mask=each < kv_heads, other=0), 0)
    own = tl.load(chosen_counts + head)
    tied = tl.load(tie_count)
    outside = tl.sum(tl.load(stored + each, mask=each < kv_heads, other=0.0), 0) - uncovered
    if tied > 0:
        if tied <= TIES_FEW:
            own = _take_ties(chosen, ties, tied, head, own, budget - above, outside, capacity, most, TIES_FEW, COVERS)
        else:
            own = _take_ties(chosen, ties, tied, head, own, budget - above, outside, capacity, most, TIES, COVERS)
    tl.debug_barrier()

    # What is held, and where. Lists are put in order by counting what comes before, all at once.
    entry = tl.arange(0, MOST)
    valid = entry < own
    group = tl.load(chosen + head * most + entry, mask=valid, other=0x7FFFFFFF - first_group) + first_group
    same = (holds[None, :] == group[:, None]) & valid[:, None]
    at = tl.max(tl.where(same, slot[None, :], -1), 1)
    hit = at >= 0
    miss = valid & (at < 0)
    again = tl.load(chosen + head * most + entry, mask=valid, other=0x7FFFFFFF - first_group) + first_group
    # Two counts in one: groups before, and those of them that are held.
    before = tl.where(again[None, :] < group[:, None], 1 + (hit.to(tl.int32) << 16)[None, :], 0)
    before = tl.sum(before, 1)
    order, held_order = before & 0xFFFF, before >> 16
    number = order - held_order
    misses = tl.sum(miss.to(tl.int32), 0)

    # The host can fetch while the rest is done.
    wire = group.to(tl.int64) | (head.to(tl.int64) << 32) | (layer.to(tl.int64) << 48)
    tl.store(keys + head * most + number, wire, mask=miss)
    tl.store(used_at + head * slots + at, step.to(tl.int32), mask=hit)
    tl.store(missing + head * most + number, group, mask=miss)
    word = (step << STEP_SHIFT) | (own.to(tl.int64) << OPENED_SHIFT) | misses.to(tl.int64)
    tl.store(posted + head, _fenced(word, INTERPRETED))
    tl.store(opened + head * most + order, group, mask=valid)
    tl.store(opened_counts + head, own)
    tl.store(held + head * most + held_order, at, mask=hit)
    tl.store(held_counts + head, own - misses)
    tl.store(late_counts + head, misses)

    # The slots opened longest ago go to the misses, in order. Age and slot share 31 bits: older than what is left for an
    # age, 2^20 steps and more, is as good as never.
    if misses > 0:
        used = tl.load(used_at + head * slots + slot, mask=real, other=0)
        age = tl.minimum(step.to(tl.int32) - used, 0x40000000 // SLOTS) * SLOTS + (SLOTS - 1 - slot)
        age = tl.where(real, age, -1)
        used = tl.load(used_at + head * slots + slot, mask=real, other=0)
        older = tl.minimum(step.to(tl.int32) - used, 0x40000000 // SLOTS) * SLOTS + (SLOTS - 1 - slot)
        older = tl.where(real, older, -1)
        rank = tl.sum((older[None, :] > age[:, None]).to(tl.int32), 1)
        given = real & (rank < misses)
        tl.store(groups + head * slots + slot, tl.load(missing + head * most + rank, mask=given), mask=given)
        tl.store(used_at + head * slots + slot, step.to(tl.int32), mask=given)
        tl.store(late + head * most + rank, slot, mask=given)


@triton.jit
def _copy(source, to, record_words: tl.constexpr, WORDS: tl.constexpr):
    for first in range(0, record_words, WORDS):
        word = first + tl.arange(0, WORDS)
        inside = word < record_words
        tl.store(to + word, tl.load(source + word, mask=inside), inside)


@triton.jit
def _land(
    landing,
    staging,
    mailbox,
    control,
    late,
    late_counts,
    arrived,
    records,
    most,
    slots,
    record_words: tl.constexpr,
    WORDS: tl.constexpr,
    HEADS: tl.constexpr,
    THREADS: tl.constexpr,
    STEP: tl.constexpr,
    MAIL_READY: tl.constexpr,
    READY_SHIFT: tl.constexpr,
    STAGED: tl.constexpr,
    NEVER: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    number, head, kv_heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    each = tl.arange(0, HEADS)
    counts = tl.load(late_counts + each, mask=each < kv_heads, other=0)
    own = tl.sum(tl.where(each == head, counts, 0), 0)
    listens = (number == 0) & (head == 0) & (tl.sum(counts, 0) > 0)
    if (number >= own) & (listens == 0):
        return
    row = number + tl.sum(tl.where(each < head, counts, 0), 0)
    step = tl.load(control + STEP)
    slot = tl.load(late + head * most + number)
    if listens:
        word = _read_now(mailbox + MAIL_READY, THREADS, INTERPRETED)
        if not INTERPRETED:
            while (word >> READY_SHIFT) != step:
                word = _read_now(mailbox + MAIL_READY, THREADS, INTERPRETED)
        tl.atomic_xchg(arrived, word, sem="release")
    else:
        word = tl.atomic_add(arrived, 0, sem="acquire")
        if not INTERPRETED:
            while (word >> READY_SHIFT) != step:
                word = tl.atomic_add(arrived, 0, sem="acquire")
    where = word & 0xFFFFFFFF
    if (number >= own) | (where == NEVER):
        return
    to = records + (head * slots + slot).to(tl.int64) * record_words
    if where == STAGED:
        _copy(staging + row.to(tl.int64) * record_words, to, record_words, WORDS)
    else:
        # Loads of 16 bytes: every one is a request over the bus.
        _copy(landing + tl.multiple_of(where * 2, 2) + row.to(tl.int64) * record_words, to, record_words, WORDS)


def place(
    chosen: Chosen,
    control: Tensor,
    layer: int,
    budget: int,
    capacity: int,
    tables: Tables,
    lists: Lists,
    mailbox: Tensor,
    uncovered: float | None = None,
) -> None:
    """One step of a layer's bank; see the module. capacity: groups a KV head, as the selection counted them.

    uncovered: opened is only as much of the budget, from the largest mass on, as leaves no more than this outside; for
    that the selection must be one that `covers`. mailbox: int64, pinned host memory on a GPU. control[STEP] must grow from
    step to step and be above 0.
    """
    kv_heads, slots = tables.groups.shape
    most = chosen.groups.shape[1]
    assert most <= slots, "everything opened in a step must fit in the bank"
    assert slots <= SLOTS_MAX, "more slots cannot be searched"
    assert most & (most - 1) == 0, "lists are sorted in blocks of a power of two"
    assert most <= COUNT_MASK
    assert lists.held.shape == lists.late.shape == tables.opened.shape == (kv_heads, most)
    assert mailbox.dtype == torch.int64
    assert mailbox.shape == (mail_words(kv_heads, most),)
    assert control.shape[0] == CONTROL_SIZE
    _place[(kv_heads,)](
        chosen.groups, chosen.counts, chosen.ties, chosen.tie_count, chosen.stored, control, layer,
        tables.groups, tables.used_at, tables.opened, tables.opened_counts,
        lists.held, lists.held_counts, lists.late, lists.late_counts, lists.missing, mailbox[MAIL_POSTED:],
        mailbox[mail_keys(kv_heads) :], capacity, budget, slots, most, uncovered or 0.0,
        MOST=most, SLOTS=triton.next_power_of_2(slots), HEADS=triton.next_power_of_2(kv_heads), TIES_FEW=TIES_FEW,
        TIES=TIES_MAX if uncovered is None else 2 * TIES_MAX, COVERS=uncovered is not None, STEP=STEP,
        FIRST_GROUP=FIRST_GROUP, STEP_SHIFT=STEP_SHIFT, OPENED_SHIFT=OPENED_SHIFT,
        INTERPRETED=mailbox.device == control.device, num_warps=PLACE_WARPS,
    )  # fmt: skip


def land(
    landing: Tensor, staging: Tensor, mailbox: Tensor, control: Tensor, lists: Lists, tables: Tables, records: Tensor
) -> None:
    """Copies the fetched records, straight from host memory, to the slots of lists.late, once mailbox[MAIL_READY] says that
    they are there; nothing if it says that they will not come.

    landing, staging: int64, memory of the host that the device reads. records: [kv_heads, slots, ...], contiguous. In the
    interpreter, which does not wait, the word must be there.
    """
    kv_heads, slots = records.shape[:2]
    assert landing.dtype == staging.dtype == torch.int64
    assert records.is_contiguous()
    words = records.view(torch.int64) if records.dtype != torch.int64 else records
    record_words = words[0, 0].numel()
    most = lists.late.shape[1]
    _land[(most, kv_heads)](
        landing, staging, mailbox, control, lists.late, lists.late_counts, tables.arrived, words, most, slots,
        record_words,
        WORDS=min(COPY_WORDS, triton.next_power_of_2(record_words)), HEADS=triton.next_power_of_2(kv_heads),
        THREADS=32 * LAND_WARPS, STEP=STEP, MAIL_READY=MAIL_READY, READY_SHIFT=READY_SHIFT, STAGED=STAGED, NEVER=NEVER,
        INTERPRETED=mailbox.device == control.device, num_warps=LAND_WARPS,
    )  # fmt: skip


def place_twin(
    chosen: Chosen,
    control: Tensor,
    layer: int,
    budget: int,
    capacity: int,
    tables: Tables,
    lists: Lists,
    mailbox: Tensor,
    uncovered: float | None = None,
) -> None:
    kv_heads, most = lists.held.shape
    step, first_group = int(control[STEP]), int(control[FIRST_GROUP])
    need = budget - int(chosen.counts.sum())
    listed = TIES_MAX if uncovered is None else 2 * TIES_MAX
    ties = chosen.ties[: min(listed, int(chosen.tie_count))].sort(descending=True).values[: max(need, 0)]
    if uncovered is not None:
        mass = (ties >> 32).int().view(torch.float32)
        ties = ties[mass.cumsum(0) - mass < chosen.stored.sum() - uncovered]
    flat = 0x7FFFFFFF - (ties & 0xFFFFFFFF)
    keys = mailbox[mail_keys(kv_heads) :][: kv_heads * most].view(kv_heads, most)
    for head in range(kv_heads):
        groups = torch.cat((chosen.groups[head, : int(chosen.counts[head])], flat[flat // capacity == head] % capacity))
        groups = (groups + first_group).sort().values.int()
        same = groups[:, None] == tables.groups[head]
        at = torch.where(same.any(1), same.int().argmax(1), -1)
        tables.used_at[head, at[at >= 0]] = step
        missed = groups[at < 0]
        misses, opened = missed.shape[0], groups.shape[0]
        fresh = tables.used_at[head].argsort(stable=True)[:misses]
        tables.groups[head, fresh] = missed
        tables.used_at[head, fresh] = step
        lists.held_counts[head], lists.late_counts[head] = opened - misses, misses
        lists.held[head, : opened - misses] = at[at >= 0].int()
        lists.late[head, :misses] = fresh.int()
        lists.missing[head, :misses] = missed
        tables.opened[head, :opened] = groups
        tables.opened_counts[head] = opened
        keys[head, :misses] = missed.long() | head << 32 | layer << 48
        mailbox[MAIL_POSTED + head] = step << STEP_SHIFT | opened << OPENED_SHIFT | misses


def land_twin(
    landing: Tensor, staging: Tensor, mailbox: Tensor, control: Tensor, lists: Lists, tables: Tables, records: Tensor
) -> None:
    counts = lists.late_counts.tolist()
    if not any(counts):
        return
    tables.arrived[0] = mailbox[MAIL_READY]
    step, where = divmod(int(mailbox[MAIL_READY]), 1 << READY_SHIFT)
    assert step == int(control[STEP]), "the host has not said whether they are there"
    if where == NEVER:
        return
    words = records.view(torch.int64).flatten(2)
    source = staging if where == STAGED else landing[2 * where :]
    fetched = source[: sum(counts) * words.shape[2]].view(-1, words.shape[2]).to(records.device)
    for head, came in enumerate(fetched.split(counts)):
        words[head, lists.late[head, : counts[head]].long()] = came
