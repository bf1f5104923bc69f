"""One budget of groups for a layer: the KV heads compete by estimated attention mass. No sort of everything.

`pool` turns log-masses into masses, normalised per query head by all that the head can see and summed over the query
heads of a KV head, and counts them into bins of 1/32 octave. `gather` finds the bin in which the budget ends, lists the
groups above it, and keeps those in it aside as *ties*; `bank.place` takes the best of the ties. Where the budget may be
left before it is spent (`cover`), all of them are ties, so that they can be counted from the largest on. Exact, except that
among more than TIES_MAX groups in that one bin, masses within 9 % of each other, an arbitrary TIES_MAX compete.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hga_kvd_client.kernels import FIRST_GROUP, GROUPS

# Bins are the upper bits of a float32 that is not negative: 3 bits of mantissa below the exponent. The last bin ends at
# 2^5, more than 16 query heads can pool; whatever is below 2^-27 falls in the first.
BINS = 256
BIN_SHIFT = tl.constexpr(20)
BIN_FIRST = tl.constexpr((127 + 5) * 8 - 256)
TIES_MAX = 128
POOL_GROUPS = GATHER_GROUPS = 256  # groups of one program


@dataclass(frozen=True)
class Chosen:
    """What a selection leaves for `bank.place`; `take` clears it. Rows are relative groups, in no order.

    bins: int32 [BINS]. groups: int32 [kv_heads, most]; counts: int32 [kv_heads]. ties: int64 [2 * TIES_MAX], mass in the
    upper half, least place first in the lower; tie_count: int32 [1], may pass what is listed: TIES_MAX, twice that with
    `cover`. stored: float32 [kv_heads], the mass of all groups.
    """

    bins: Tensor
    groups: Tensor
    counts: Tensor
    ties: Tensor
    tie_count: Tensor
    stored: Tensor

    @classmethod
    def empty(cls, kv_heads: int, most: int, device: torch.device) -> Chosen:
        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        return cls(
            zeros(BINS), zeros(kv_heads, most), zeros(kv_heads), zeros(2 * TIES_MAX, dtype=torch.int64), zeros(1),
            zeros(kv_heads, dtype=torch.float32),
        )  # fmt: skip


@triton.jit
def _bin(mass):
    return tl.minimum(tl.maximum((mass.to(tl.int32, bitcast=True) >> BIN_SHIFT) - BIN_FIRST, 0), 255)


@triton.jit
def _places(taken, counter):
    """Where each of those taken goes in a list whose length stands at counter: at its end, in their order."""
    number = tl.sum(taken.to(tl.int32), 0)
    first = 0
    if number > 0:
        first = tl.atomic_add(counter, number)
    return first + tl.cumsum(taken.to(tl.int32), 0) - 1


@triton.jit
def _log_sum(lse, rows, head, RATIO: tl.constexpr, ROWS: tl.constexpr, MOST: tl.constexpr, BLOCK: tl.constexpr):
    """Largest and, relative to it, sum of exp(lse[:rows]) for the query heads of a KV head. lse: [rows, heads]."""
    heads = tl.num_programs(1) * RATIO
    each = tl.arange(0, ROWS)
    row = tl.arange(0, BLOCK)
    largest = tl.full((ROWS,), -1e30, tl.float32)
    total = tl.where(each < RATIO, 0.0, 1.0)
    for first in range(0, MOST, BLOCK):
        place = (first + row)[:, None] * heads + head * RATIO + each[None, :]
        inside = (first + row < rows)[:, None] & (each < RATIO)[None, :]
        part = tl.load(lse + place, mask=inside, other=float("-inf"))
        higher = tl.maximum(largest, tl.max(part, 0))
        total = total * tl.exp(largest - higher) + tl.sum(tl.exp(part - higher[None, :]), 0)
        largest = higher
    return largest, total


@triton.jit
def _pool(
    log_mass,  # [kv_heads, capacity, ratio]
    window_lse,  # [window_rows, heads]
    group_lse,  # [group_rows, heads]
    control,
    mass,  # [kv_heads, capacity]
    bins,
    stored,
    capacity,
    window_rows,
    group_rows,
    NEAR_ROWS: tl.constexpr,  # powers of two, so that few sizes are compiled
    FAR_ROWS: tl.constexpr,
    RATIO: tl.constexpr,
    ROWS: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
):
    head = tl.program_id(1)
    start = tl.program_id(0) * BLOCK
    count = tl.load(control + GROUPS).to(tl.int32)
    if start >= count:
        if start == 0:
            tl.store(stored + head, 0.0)
        return
    near, near_total = _log_sum(window_lse, window_rows, head, RATIO, ROWS, NEAR_ROWS, 16)
    far, far_total = _log_sum(group_lse, group_rows, head, RATIO, ROWS, FAR_ROWS, 128)
    higher = tl.maximum(near, far)
    everything = higher + tl.log(near_total * tl.exp(near - higher) + far_total * tl.exp(far - higher))
    each = tl.arange(0, ROWS)
    if start == 0:
        share = tl.where(each < RATIO, far_total * tl.exp(far - everything), 0.0)
        tl.store(stored + head, tl.sum(share, 0))
    group = start + tl.arange(0, BLOCK)
    inside = group < count
    place = (head.to(tl.int64) * capacity + group)[:, None] * RATIO + each[None, :]
    seen = inside[:, None] & (each < RATIO)[None, :]
    share = tl.exp(tl.load(log_mass + place, mask=seen, other=float("-inf")) - everything[None, :])
    pooled = tl.sum(tl.where(seen, share, 0.0), 1)
    tl.store(mass + head * capacity + group, pooled, mask=inside)
    found = tl.histogram(_bin(pooled), BINS, mask=inside)
    tl.atomic_add(bins + tl.arange(0, BINS), found, mask=found > 0, sem="relaxed")


@triton.jit
def _gather(
    mass,
    bins,
    control,
    groups,
    counts,
    ties,
    tie_count,
    capacity,
    budget,
    most,
    BINS: tl.constexpr,
    TIES: tl.constexpr,
    ALL_TIE: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
):
    head = tl.program_id(1)
    start = tl.program_id(0) * BLOCK
    count = tl.load(control + GROUPS).to(tl.int32)
    if start >= count:
        return
    # Groups in this bin or a higher one; the budget ends in the last bin that still has that many.
    above = tl.cumsum(tl.load(bins + tl.arange(0, BINS)), 0, reverse=True)
    last = tl.maximum(tl.sum((above >= budget).to(tl.int32), 0) - 1, 0)
    group = start + tl.arange(0, BLOCK)
    inside = group < count
    pooled = tl.load(mass + head * capacity + group, mask=inside, other=0.0)
    bin = _bin(pooled)
    if ALL_TIE:
        tied = inside & (bin >= last)
    else:
        tied = inside & (bin == last)
        taken = inside & (bin > last)
        tl.store(groups + head * most + _places(taken, counts + head), group, mask=taken)
    place = _places(tied, tie_count)
    key = (pooled.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (0x7FFFFFFF - (head * capacity + group))
    tl.store(ties + place, key, mask=tied & (place < TIES))


@triton.jit
def _gather_mask(
    mask,
    control,
    groups,
    counts,
    capacity,
    most,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
    FIRST_GROUP: tl.constexpr,
):
    head = tl.program_id(1)
    start = tl.program_id(0) * BLOCK
    count = tl.load(control + GROUPS).to(tl.int32)
    if start >= count:
        return
    group = start + tl.arange(0, BLOCK)
    place = head * capacity + tl.load(control + FIRST_GROUP).to(tl.int32) + group
    taken = tl.load(mask + place, mask=group < count, other=0) != 0
    tl.store(groups + head * most + _places(taken, counts + head), group, mask=taken)


def pool(
    log_mass: Tensor, window_lse: Tensor, group_lse: Tensor, control: Tensor, mass: Tensor, chosen: Chosen
) -> None:
    """Masses of the first control[GROUPS] groups, and their bins.

    log_mass: [kv_heads, capacity, ratio]; window_lse, group_lse: [rows, kv_heads * ratio], parts of what the head can
    see, -inf for none; mass: [kv_heads, capacity], written. All float32.
    """
    kv_heads, capacity, ratio = log_mass.shape
    for tensor in (log_mass, window_lse, group_lse, mass):
        assert tensor.dtype == torch.float32
        assert tensor.is_contiguous()
    assert mass.shape == (kv_heads, capacity)
    assert window_lse.shape[1] == group_lse.shape[1] == kv_heads * ratio
    assert ratio <= 16, "masses of more query heads would pass the last bin"
    _pool[(triton.cdiv(capacity, POOL_GROUPS), kv_heads)](
        log_mass, window_lse, group_lse, control, mass, chosen.bins, chosen.stored, capacity, window_lse.shape[0],
        group_lse.shape[0],
        NEAR_ROWS=triton.next_power_of_2(window_lse.shape[0]), FAR_ROWS=triton.next_power_of_2(group_lse.shape[0]),
        RATIO=ratio, ROWS=triton.next_power_of_2(ratio), BINS=BINS, BLOCK=POOL_GROUPS, GROUPS=GROUPS,
    )  # fmt: skip


def gather(mass: Tensor, control: Tensor, budget: int, chosen: Chosen, covers: bool = False) -> None:
    """The `budget` groups of largest mass of all KV heads, up to ties. Follows `pool`. covers: `place` may take fewer."""
    kv_heads, capacity = mass.shape
    assert 0 < budget <= min(chosen.groups.shape[1], TIES_MAX)
    assert kv_heads * capacity < 1 << 31
    _gather[(triton.cdiv(capacity, GATHER_GROUPS), kv_heads)](
        mass, chosen.bins, control, chosen.groups, chosen.counts, chosen.ties, chosen.tie_count, capacity, budget,
        chosen.groups.shape[1], BINS=BINS, TIES=2 * TIES_MAX if covers else TIES_MAX, ALL_TIE=covers, BLOCK=GATHER_GROUPS,
        GROUPS=GROUPS,
    )  # fmt: skip


def gather_mask(mask: Tensor, control: Tensor, chosen: Chosen) -> None:
    """The groups that a mask opens, from control[FIRST_GROUP] on: at most chosen.groups.shape[1] a KV head.

    mask: bool [kv_heads, groups], group 0 of the session first.
    """
    kv_heads, capacity = mask.shape
    assert mask.dtype == torch.bool
    assert mask.is_contiguous()
    block = 1024
    _gather_mask[(triton.cdiv(capacity, block), kv_heads)](
        mask.view(torch.uint8), control, chosen.groups, chosen.counts, capacity, chosen.groups.shape[1],
        BLOCK=block, GROUPS=GROUPS, FIRST_GROUP=FIRST_GROUP,
    )  # fmt: skip


def pool_twin(
    log_mass: Tensor, window_lse: Tensor, group_lse: Tensor, control: Tensor, mass: Tensor, chosen: Chosen
) -> None:
    kv_heads, _, ratio = log_mass.shape
    count = int(control[GROUPS])
    everything = torch.cat((window_lse, group_lse)).logsumexp(0).view(kv_heads, 1, ratio)
    mass[:, :count] = (log_mass[:, :count] - everything).exp().sum(2)
    chosen.stored.copy_(mass[:, :count].sum(1))
    chosen.bins.add_(torch.bincount(_bin_twin(mass[:, :count]).flatten(), minlength=BINS).int())


def gather_twin(mass: Tensor, control: Tensor, budget: int, chosen: Chosen, covers: bool = False) -> None:
    capacity, count = mass.shape[1], int(control[GROUPS])
    above = chosen.bins.flip(0).cumsum(0).flip(0)
    last = max(int((above >= budget).sum()) - 1, 0)
    bins = _bin_twin(mass[:, :count])
    if not covers:
        _listed(bins > last, chosen)
    heads, groups = (bins >= last if covers else bins == last).nonzero().unbind(1)
    keys = (mass[heads, groups].view(torch.int32).long() << 32) | (0x7FFFFFFF - (heads * capacity + groups))
    keys = keys[: 2 * TIES_MAX if covers else TIES_MAX]
    chosen.ties[: keys.shape[0]] = keys
    chosen.tie_count.fill_(heads.shape[0])


def gather_mask_twin(mask: Tensor, control: Tensor, chosen: Chosen) -> None:
    first = int(control[FIRST_GROUP])
    _listed(mask[:, first : first + int(control[GROUPS])], chosen)


def _listed(mask: Tensor, chosen: Chosen) -> None:
    for head in range(mask.shape[0]):
        groups = mask[head].nonzero().squeeze(1)
        chosen.groups[head, : groups.shape[0]] = groups.int()
        chosen.counts[head] = groups.shape[0]


def _bin_twin(mass: Tensor) -> Tensor:
    return ((mass.view(torch.int32) >> 20) - ((127 + 5) * 8 - BINS)).clamp(0, BINS - 1)
