"""The bank: records of one layer that were opened lately, the least recently opened ones leaving first.

Per KV head `slots` places and a page table from group to slot. A step is: `plan` what the mask opens, fetch the
misses of the plan, `keep` them; if the fetch fails, the bank is as it was. Everything opened is attended, also when
more is opened than there are slots: what does not fit is used once and not kept. Only records are on the device: what is
opened must be known to the host anyway, so the bookkeeping is there, in numpy, on whole batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Plan:
    """What one step opens. Rows of `heads`, `groups`, `slots`, `ranks` are the opened records, by head, then by group.

    slots: -1 for a miss. ranks: number within the head. missed: rows that are misses. counts: opened, [kv_heads].
    """

    heads: I64
    groups: I64
    slots: I64
    ranks: I64
    missed: I64
    counts: I64
    step: int

    @property
    def opened(self) -> int:
        return len(self.heads)

    @property
    def misses(self) -> int:
        return len(self.missed)

    def missing(self) -> tuple[I64, I64]:
        """KV heads and groups of the misses, each [misses], in storage order."""
        return self.heads[self.missed], self.groups[self.missed]


class Kept(NamedTuple):
    """Where a plan's records are: slots, a row each. over: rows that found no room, in used_once [K and V, rows, values]."""

    places: I64
    over: I64 | None = None
    used_once: Tensor | None = None


class Bank:
    """records: [K and V, kv_heads, slots, group_tokens, head_dim]; zero where nothing is held yet, so always finite."""

    GROWTH_GROUPS = 1024

    def __init__(
        self, kv_heads: int, slots: int, group_tokens: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.slots = slots
        self.records = torch.zeros(2, kv_heads, slots, group_tokens, head_dim, dtype=dtype, device=device)
        # The last column of each table is a dummy that index -1 (no slot, no group) falls on.
        self._slot_of_group = np.full((kv_heads, 1), -1, np.int32)
        self._group_of_slot = np.full((kv_heads, slots), -1, np.int64)
        self._used_at = np.full((kv_heads, slots + 1), -1, np.int64)

    def plan(self, mask: Tensor, first_group: int, step: int) -> Plan:
        """mask: bool [kv_heads, groups], groups first_group, first_group + 1, ... step: never less than before."""
        kv_heads = mask.shape[0]
        self._reserve(first_group + mask.shape[1])
        heads, columns = mask.cpu().numpy().nonzero()
        groups = columns + first_group
        slots = self._slot_of_group[heads, groups].astype(np.int64)
        self._used_at[heads, slots] = step
        counts = np.bincount(heads, minlength=kv_heads)
        return Plan(
            heads=heads,
            groups=groups,
            slots=slots,
            ranks=_ranks(heads, counts),
            missed=(slots < 0).nonzero()[0],
            counts=counts,
            step=step,
        )

    def keep(self, plan: Plan, fetched: Tensor | None) -> Kept:
        """Keeps what was fetched, as far as it fits: where everything is that the plan opened.

        fetched: [misses, K and V, group_tokens, head_dim], in the order of plan.missing(); None if there are none.
        """
        if fetched is None:
            return Kept(plan.slots)
        _, kv_heads, slots, group_tokens, dim = self.records.shape
        record = self.records.view(2, kv_heads * slots, group_tokens * dim)
        fetched = fetched.reshape(plan.misses, 2, -1).transpose(0, 1).to(record.device)
        landed, missed = self._admit(plan), plan.missed
        fits = landed >= 0
        places = plan.slots.copy()
        places[missed] = landed.clip(0)
        kept = Kept(places)
        if not fits.all():
            kept = Kept(places, missed[~fits], fetched[:, self._on_device(~fits)])
            fetched, landed, missed = fetched[:, self._on_device(fits)], landed[fits], missed[fits]
        record.index_copy_(1, self._on_device(landed + plan.heads[missed] * slots), fetched)
        return kept

    def gather(self, plan: Plan, kept: Kept) -> tuple[Tensor, Tensor, Tensor]:
        """Copies together everything the plan opened.

        Returns k, v: [kv_heads, groups * group_tokens, head_dim], padded with old records, and valid: bool [kv_heads,
        groups], False at padding.
        """
        _, kv_heads, slots, group_tokens, dim = self.records.shape
        record = self.records.view(2, kv_heads * slots, group_tokens * dim)
        width = int(plan.counts.max())
        where = np.zeros((kv_heads, width), np.int64)
        where[plan.heads, plan.ranks] = kept.places
        where += np.arange(0, kv_heads * slots, slots)[:, None]
        opened = record.index_select(1, self._on_device(where.reshape(-1)))
        if kept.over is not None and kept.used_once is not None:
            opened[:, self._on_device(plan.heads[kept.over] * width + plan.ranks[kept.over])] = kept.used_once
        k, v = opened.view(2, kv_heads, width * group_tokens, dim).unbind(0)
        return k, v, self._on_device(np.arange(width) < plan.counts[:, None])

    def forget(self, first_group: int) -> None:
        """Drops the records of groups from first_group on: what is stored there will be something else."""
        self._slot_of_group[:, first_group:] = -1
        stale = self._group_of_slot >= first_group
        self._group_of_slot[stale] = -1
        self._used_at[:, :-1][stale] = -1

    def resident_bytes(self) -> int:
        return sum(part.nbytes for part in vars(self).values() if isinstance(part, Tensor | np.ndarray))

    def _on_device(self, array: npt.NDArray[np.int64] | npt.NDArray[np.bool_]) -> Tensor:
        return torch.from_numpy(array).to(self.records.device)

    def _admit(self, plan: Plan) -> I64:
        """Gives the misses the slots used longest ago, never one used in this step. Returns slots, -1: does not fit."""
        heads, groups = plan.missing()
        used_at = self._used_at[:, :-1]
        oldest = used_at.argsort(axis=1, kind="stable")
        free = (used_at < plan.step).sum(1)
        ranks = _ranks(heads, np.bincount(heads, minlength=len(free)))
        fits = ranks < free[heads]
        slots = np.where(fits, oldest[heads, ranks.clip(max=self.slots - 1)], -1)
        heads, groups, kept = heads[fits], groups[fits], slots[fits]
        self._slot_of_group[heads, self._group_of_slot[heads, kept]] = -1
        self._slot_of_group[heads, groups] = kept
        self._group_of_slot[heads, kept] = groups
        self._used_at[heads, kept] = plan.step
        return slots

    def _reserve(self, groups: int) -> None:
        have = self._slot_of_group.shape[1] - 1
        if groups > have:
            table = self._slot_of_group
            more = max(groups, have + self.GROWTH_GROUPS) - have
            self._slot_of_group = np.pad(table[:, :-1], ((0, 0), (0, more + 1)), constant_values=-1)


def _ranks(heads: I64, counts: I64) -> I64:
    """Number of each row within its head. heads: [rows], sorted; counts: rows of each head."""
    before = counts.cumsum() - counts
    return np.arange(len(heads)) - before[heads]
