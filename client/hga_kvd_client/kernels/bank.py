"""The bank on the device: which opened groups are held, what leaves for those that are not, and what the host must fetch.

Per KV head a table of `slots` entries: the group that each holds, and the step it was last opened in. It is searched as
a whole, 128 compares a group: no page table to grow, nothing that two tables could disagree about. `place` is the step:

- takes the selection's groups (select.Chosen) in order of place, and clears the selection;
- hits go to `held`; misses get the slots that were opened longest ago, never one opened in this step, and go to `late`;
- the keys of the misses, as the wire wants them, are written to `mailbox` in memory that the host sees; the step's
  number is written last, and the host waits for that: the one synchronisation of a layer.

The tables name a missed group from then on. If the fetch fails, the caller must `forget` the layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hga_kvd_client.kernels import CONTROL_SIZE, FIRST_GROUP, STEP
from hga_kvd_client.kernels.select import BINS, TIES_MAX, Chosen

# The mailbox, int64 [MAILBOX_KEYS + most misses]: step last done, misses, groups opened, then a word that the host
# writes: where in the source of `land` the fetched records begin, in bytes. Then keys: group, kv_head << 32, layer << 48.
MAIL_STEP, MAIL_MISSES, MAIL_OPENED, MAIL_OFFSET, MAILBOX_KEYS = 0, 1, 2, 3, 8
PLACE_WARPS = 8
COPY_WORDS = 1024  # int64 of a record that one program moves at once


@dataclass(frozen=True)
class Tables:
    """One layer's. int32. groups: [kv_heads, slots], -1: empty; used_at: [kv_heads, slots]: step, -1: never.

    opened: [kv_heads, most], the groups of the last step, sorted; opened_counts: [kv_heads].
    """

    groups: Tensor
    used_at: Tensor
    opened: Tensor
    opened_counts: Tensor

    @classmethod
    def empty(cls, kv_heads: int, slots: int, most: int, device: torch.device) -> Tables:
        def full(value: int, *shape: int) -> Tensor:
            return torch.full(shape, value, dtype=torch.int32, device=device)

        return cls(full(-1, kv_heads, slots), full(-1, kv_heads, slots), full(0, kv_heads, most), full(0, kv_heads))

    def forget(self) -> None:
        self.groups.fill_(-1)
        self.used_at.fill_(-1)


@dataclass(frozen=True)
class Lists:
    """Slots of what a step opens; shared by all layers. int32.

    held, late: [kv_heads, most] and their counts [kv_heads]. rows: [kv_heads * most], where record i of the fetch goes,
    kv_head * slots + slot. totals: [4]: rows, then counters that are zero between steps.
    """

    held: Tensor
    held_counts: Tensor
    late: Tensor
    late_counts: Tensor
    rows: Tensor
    totals: Tensor

    @classmethod
    def empty(cls, kv_heads: int, most: int, device: torch.device) -> Lists:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        return cls(
            zeros(kv_heads, most), zeros(kv_heads), zeros(kv_heads, most), zeros(kv_heads), zeros(kv_heads * most),
            zeros(4),
        )  # fmt: skip


@triton.jit
def _fenced(value, INTERPRETED: tl.constexpr):
    """The value, once every earlier write of this program can be seen by the host."""
    tl.debug_barrier()
    if not INTERPRETED:
        value = tl.inline_asm_elementwise(
            "fence.acq_rel.sys; mov.u32 $0, $1;", "=r,r", [value], dtype=tl.int32, is_pure=False, pack=1
        )
    return value


@triton.jit(do_not_specialize=["layer"])
def _place(
    chosen,
    chosen_counts,
    ties,
    tie_count,
    bins,
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
    rows,
    totals,
    mailbox,
    capacity,
    budget,
    slots,
    most,
    MOST: tl.constexpr,  # powers of two from here on
    SLOTS: tl.constexpr,
    HEADS: tl.constexpr,
    TIES: tl.constexpr,
    BINS: tl.constexpr,
    STEP: tl.constexpr,
    FIRST_GROUP: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    head, kv_heads = tl.program_id(0), tl.num_programs(0)
    step = tl.load(control + STEP).to(tl.int32)
    first_group = tl.load(control + FIRST_GROUP).to(tl.int32)

    # The best of the ties fill the budget.
    each = tl.arange(0, HEADS)
    above = tl.sum(tl.load(chosen_counts + each, mask=each < kv_heads, other=0), 0)
    tie = tl.arange(0, TIES)
    tied = tie < tl.load(tie_count)
    own = tl.load(chosen_counts + head)
    if tl.load(tie_count) > 0:
        key = tl.load(ties + tie, mask=tied, other=-1)
        rank = tl.sum((key[None, :] > key[:, None]).to(tl.int32), 1)
        flat = 0x7FFFFFFF - (key & 0xFFFFFFFF).to(tl.int32)
        mine = tied & (rank < budget - above) & (flat // capacity == head)
        place = own + tl.cumsum(mine.to(tl.int32), 0) - 1
        tl.store(chosen + head * most + place, flat % capacity, mask=mine)
        own += tl.sum(mine.to(tl.int32), 0)
    tl.debug_barrier()

    # What is held, and where. Lists are put in order by counting what comes before, all at once.
    entry = tl.arange(0, MOST)
    valid = entry < own
    group = tl.load(chosen + head * most + entry, mask=valid, other=0x7FFFFFFF - first_group) + first_group
    slot = tl.arange(0, SLOTS)
    real = slot < slots
    holds = tl.load(groups + head * slots + slot, mask=real, other=-1)
    used = tl.load(used_at + head * slots + slot, mask=real, other=0x7FFFFFFF)
    same = (holds[None, :] == group[:, None]) & valid[:, None]
    at = tl.max(tl.where(same, slot[None, :], -1), 1)
    miss = valid & (at < 0)
    again = tl.load(chosen + head * most + entry, mask=valid, other=0x7FFFFFFF - first_group) + first_group
    before = again[None, :] < group[:, None]
    order = tl.sum(before.to(tl.int32), 1)
    held_order = tl.sum((before & (at >= 0)[None, :]).to(tl.int32), 1)
    number = order - held_order
    misses = tl.sum(miss.to(tl.int32), 0)

    # The slots opened longest ago go to the misses, in order. Ages beyond 2^22 steps are as good as never.
    age = tl.where(tl.max(same.to(tl.int32), 0) > 0, 0, tl.minimum(step - used, 1 << 22))
    age = tl.where(real, age * SLOTS + (SLOTS - 1 - slot), -1)
    older = tl.where(real, age, -1)
    rank = tl.sum((older[None, :] > age[:, None]).to(tl.int32), 1)
    given = (rank[None, :] == number[:, None]) & miss[:, None] & real[None, :]
    fresh = tl.max(tl.where(given, slot[None, :], -1), 1)
    holds_now = tl.max(tl.where(given, group[:, None], -1), 0)
    tl.store(groups + head * slots + slot, tl.where(rank < misses, holds_now, holds), mask=real)
    tl.store(used_at + head * slots + slot, step, mask=real & ((rank < misses) | (age < SLOTS)))

    tl.store(opened + head * most + order, group, mask=valid)
    tl.store(opened_counts + head, own)
    tl.store(held + head * most + held_order, at, mask=at >= 0)
    tl.store(held_counts + head, own - misses)
    tl.store(late + head * most + number, fresh, mask=miss)
    tl.store(late_counts + head, misses)

    # Misses of all heads in one list.
    base = tl.atomic_add(totals + 1, misses, sem="relaxed")
    tl.atomic_add(totals + 2, own, sem="relaxed")
    tl.store(rows + base + number, head * slots + fresh, mask=miss)
    wire = group.to(tl.int64) | (head.to(tl.int64) << 32) | (layer.to(tl.int64) << 48)
    tl.store(mailbox + 8 + base + number, wire, mask=miss)
    arrived = tl.atomic_add(totals + 3, _fenced(1, INTERPRETED))
    if arrived == kv_heads - 1:
        total = tl.atomic_add(totals + 1, 0)
        tl.store(mailbox + 1, total.to(tl.int64))
        tl.store(mailbox + 2, tl.atomic_add(totals + 2, 0).to(tl.int64))
        tl.store(totals, total)
        tl.store(totals + 1 + tl.arange(0, 4), 0, mask=tl.arange(0, 4) < 3)
        tl.store(bins + tl.arange(0, BINS), 0)
        tl.store(chosen_counts + each, 0, mask=each < kv_heads)
        tl.store(tie_count, 0)
        tl.store(mailbox, _fenced(step, INTERPRETED).to(tl.int64))


@triton.jit
def _land(source, mailbox, rows, totals, records, record_words: tl.constexpr, WORDS: tl.constexpr):
    row = tl.program_id(0)
    if row >= tl.load(totals):
        return
    offset = tl.load(mailbox + 3) // 8
    to = tl.load(rows + row).to(tl.int64) * record_words
    for first in range(0, record_words, WORDS):
        word = first + tl.arange(0, WORDS)
        inside = word < record_words
        tl.store(
            records + to + word, tl.load(source + offset + row.to(tl.int64) * record_words + word, mask=inside), inside
        )


def place(
    chosen: Chosen,
    control: Tensor,
    layer: int,
    budget: int,
    capacity: int,
    tables: Tables,
    lists: Lists,
    mailbox: Tensor,
) -> None:
    """One step of a layer's bank; see the module. capacity: groups a KV head, as the selection counted them.

    mailbox: int64, pinned host memory on a GPU. control[STEP] must grow from step to step and be above 0.
    """
    kv_heads, slots = tables.groups.shape
    most = chosen.groups.shape[1]
    assert most <= slots, "everything opened in a step must fit in the bank"
    assert most & (most - 1) == 0, "lists are sorted in blocks of a power of two"
    assert lists.held.shape == lists.late.shape == tables.opened.shape == (kv_heads, most)
    assert mailbox.dtype == torch.int64
    assert mailbox.shape[0] >= MAILBOX_KEYS + kv_heads * most
    assert control.shape[0] == CONTROL_SIZE
    _place[(kv_heads,)](
        chosen.groups, chosen.counts, chosen.ties, chosen.tie_count, chosen.bins, control, layer,
        tables.groups, tables.used_at, tables.opened, tables.opened_counts,
        lists.held, lists.held_counts, lists.late, lists.late_counts, lists.rows, lists.totals, mailbox,
        capacity, budget, slots, most,
        MOST=most, SLOTS=triton.next_power_of_2(slots), HEADS=triton.next_power_of_2(kv_heads), TIES=TIES_MAX,
        BINS=BINS, STEP=STEP, FIRST_GROUP=FIRST_GROUP, INTERPRETED=mailbox.device == control.device, num_warps=PLACE_WARPS,
    )  # fmt: skip


def land(source: Tensor, mailbox: Tensor, lists: Lists, records: Tensor) -> None:
    """Copies the fetched records, straight from host memory, to their slots: record i to lists.rows[i].

    source: int64, registered host memory on a GPU; records begin mailbox[MAIL_OFFSET] bytes into it. records:
    [kv_heads, slots, ...], contiguous.
    """
    assert source.dtype == torch.int64
    assert records.is_contiguous()
    words = records.view(torch.int64) if records.dtype != torch.int64 else records
    record_words = words[0, 0].numel()
    _land[(lists.rows.shape[0],)](
        source, mailbox, lists.rows, lists.totals, words, record_words,
        WORDS=min(COPY_WORDS, triton.next_power_of_2(record_words)),
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
) -> None:
    step, first_group = int(control[STEP]), int(control[FIRST_GROUP])
    need = budget - int(chosen.counts.sum())
    ties = chosen.ties[: min(TIES_MAX, int(chosen.tie_count))].sort(descending=True).values[: max(need, 0)]
    flat = 0x7FFFFFFF - (ties & 0xFFFFFFFF)
    row = 0
    for head in range(tables.groups.shape[0]):
        groups = torch.cat((chosen.groups[head, : int(chosen.counts[head])], flat[flat // capacity == head] % capacity))
        groups = (groups + first_group).sort().values.int()
        same = groups[:, None] == tables.groups[head]
        at = torch.where(same.any(1), same.int().argmax(1), -1)
        tables.used_at[head, at[at >= 0]] = step
        missed = groups[at < 0]
        fresh = tables.used_at[head].argsort(stable=True)[: missed.shape[0]]
        tables.groups[head, fresh] = missed
        tables.used_at[head, fresh] = step
        lists.held_counts[head], lists.late_counts[head] = int((at >= 0).sum()), missed.shape[0]
        lists.held[head, : int(lists.held_counts[head])] = at[at >= 0].int()
        lists.late[head, : missed.shape[0]] = fresh.int()
        tables.opened[head, : groups.shape[0]] = groups
        tables.opened_counts[head] = groups.shape[0]
        end = row + missed.shape[0]
        lists.rows[row:end] = head * tables.groups.shape[1] + fresh.int()
        mailbox[MAILBOX_KEYS + row : MAILBOX_KEYS + end] = missed.long() | head << 32 | layer << 48
        row = end
    lists.totals[0] = row
    mailbox[MAIL_MISSES], mailbox[MAIL_OPENED] = row, int(tables.opened_counts.sum())
    for tensor in (chosen.bins, chosen.counts, chosen.tie_count):
        tensor.zero_()
    mailbox[MAIL_STEP] = step


def land_twin(source: Tensor, mailbox: Tensor, lists: Lists, records: Tensor) -> None:
    rows = lists.rows[: int(lists.totals[0])].long()
    words = records.view(torch.int64).flatten(0, 1).flatten(1)
    offset = int(mailbox[MAIL_OFFSET]) // 8
    words[rows] = source[offset : offset + rows.shape[0] * words.shape[1]].view(-1, words.shape[1]).to(words.device)
