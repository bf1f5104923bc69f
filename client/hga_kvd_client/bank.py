"""The bank: records of one layer that were opened lately, the least recently opened ones leaving first.

Per KV head `slots` places and a page table from group to slot. A step is: `plan` what the mask opens, fetch the
misses of the plan, `take` them; if the fetch fails, the bank is as it was. Everything opened is attended, also when
more is opened than there are slots: what does not fit is used once and not kept. All bookkeeping is done on whole
batches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Plan:
    """What one step opens. Rows of `heads`, `groups`, `slots`, `ranks` are the opened records, by head, then by group.

    slots: -1 for a miss. ranks: number within the head. missed: rows that are misses. counts: opened, [kv_heads].
    """

    heads: Tensor
    groups: Tensor
    slots: Tensor
    ranks: Tensor
    missed: Tensor
    counts: Tensor
    step: int

    @property
    def opened(self) -> int:
        return self.heads.shape[0]

    @property
    def misses(self) -> int:
        return self.missed.shape[0]

    def missing(self) -> tuple[Tensor, Tensor]:
        """KV heads and groups of the misses, each [misses], in storage order."""
        return self.heads[self.missed], self.groups[self.missed]


class Bank:
    """records: [K and V, kv_heads, slots, group_tokens, head_dim]; zero where nothing is held yet, so always finite."""

    GROWTH_GROUPS = 1024

    def __init__(
        self, kv_heads: int, slots: int, group_tokens: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.slots = slots
        self.records = torch.zeros(2, kv_heads, slots, group_tokens, head_dim, dtype=dtype, device=device)
        # The last column of each table is a dummy that index -1 (no slot, no group) falls on.
        self._slot_of_group = torch.full((kv_heads, 1), -1, dtype=torch.int32, device=device)
        self._group_of_slot = torch.full((kv_heads, slots), -1, dtype=torch.int64, device=device)
        self._used_at = torch.full((kv_heads, slots + 1), -1, dtype=torch.int64, device=device)
        self._first_slot = torch.arange(0, kv_heads * slots, slots, device=device)[:, None]

    def plan(self, mask: Tensor, first_group: int, step: int) -> Plan:
        """mask: bool [kv_heads, groups], groups first_group, first_group + 1, ... step: never less than before."""
        kv_heads = mask.shape[0]
        self._reserve(first_group + mask.shape[1])
        heads, columns = mask.nonzero().unbind(1)
        groups = columns + first_group
        slots = self._slot_of_group[heads, groups].long()
        self._used_at[heads, slots] = step
        counts = torch.bincount(heads, minlength=kv_heads)
        return Plan(
            heads=heads,
            groups=groups,
            slots=slots,
            ranks=_ranks(heads, counts),
            missed=(slots < 0).nonzero().squeeze(1),
            counts=counts,
            step=step,
        )

    def take(self, plan: Plan, fetched: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Keeps what was fetched, as far as it fits, and returns everything the plan opened.

        fetched: [misses, K and V, group_tokens, head_dim], in the order of plan.missing(); None if there are none.
        Returns k, v: [kv_heads, groups * group_tokens, head_dim], padded with old records, and valid: bool [kv_heads,
        groups], False at padding.
        """
        _, kv_heads, slots, group_tokens, dim = self.records.shape
        record = self.records.view(2, kv_heads * slots, group_tokens * dim)
        place, over = plan.slots, None
        if fetched is not None:
            fetched = fetched.reshape(plan.misses, 2, -1).transpose(0, 1)
            fetched = fetched.to(record.device)
            landed = self._admit(plan)
            place = place.index_put((plan.missed,), landed)
            landed += self._first_slot[plan.heads[plan.missed], 0]
            fits = place[plan.missed] >= 0
            if bool(fits.all()):
                record[:, landed] = fetched
            else:
                record[:, landed[fits]] = fetched[:, fits]
                over = plan.missed[~fits]

        width = int(plan.counts.max())
        where = torch.zeros(kv_heads, width, dtype=torch.int64, device=record.device)
        where[plan.heads, plan.ranks] = place if over is None else place.clamp_min(0)
        where += self._first_slot
        opened = record.index_select(1, where.view(-1))
        if fetched is not None and over is not None:
            opened[:, plan.heads[over] * width + plan.ranks[over]] = fetched[:, ~fits]
        k, v = opened.view(2, kv_heads, width * group_tokens, dim).unbind(0)
        valid = torch.arange(width, device=record.device) < plan.counts[:, None]
        return k, v, valid

    def forget(self, first_group: int) -> None:
        """Drops the records of groups from first_group on: what is stored there will be something else."""
        self._slot_of_group[:, first_group:] = -1
        stale = self._group_of_slot >= first_group
        self._group_of_slot[stale] = -1
        self._used_at[:, :-1][stale] = -1

    def resident_bytes(self) -> int:
        return sum(t.nbytes for t in vars(self).values() if isinstance(t, Tensor))

    def _admit(self, plan: Plan) -> Tensor:
        """Gives the misses the slots used longest ago, never one used in this step. Returns slots, -1: does not fit."""
        heads, groups = plan.missing()
        used_at = self._used_at[:, :-1]
        oldest = used_at.argsort(dim=1, stable=True)
        free = (used_at < plan.step).sum(1)
        ranks = _ranks(heads, torch.bincount(heads, minlength=free.shape[0]))
        fits = ranks < free[heads]
        slots = oldest[heads, ranks.clamp_max(self.slots - 1)]
        slots = torch.where(fits, slots, -1)
        heads, groups, kept = heads[fits], groups[fits], slots[fits]
        self._slot_of_group[heads, self._group_of_slot[heads, kept]] = -1
        self._slot_of_group[heads, groups] = kept.int()
        self._group_of_slot[heads, kept] = groups
        self._used_at[heads, kept] = plan.step
        return slots

    def _reserve(self, groups: int) -> None:
        have = self._slot_of_group.shape[1] - 1
        if groups > have:
            table = self._slot_of_group
            more = max(groups, have + self.GROWTH_GROUPS) - have
            self._slot_of_group = torch.cat((table[:, :-1], table.new_full((table.shape[0], more + 1), -1)), 1)


def _ranks(heads: Tensor, counts: Tensor) -> Tensor:
    """Number of each row within its head. heads: [rows], sorted; counts: rows of each head."""
    before = counts.cumsum(0) - counts
    return torch.arange(heads.shape[0], device=heads.device) - before[heads]
