"""The bank against an LRU of dicts: what it misses, where things land, and what it gives back."""

from __future__ import annotations

import numpy as np
import torch
from hga_kvd_client.bank import Bank
from hypothesis import given, settings
from hypothesis import strategies as st

TOKENS, DIM = 2, 3


def record(head: int, group: int) -> torch.Tensor:
    """[K and V, TOKENS, DIM], telling."""
    base = torch.arange(2 * TOKENS * DIM, dtype=torch.float32).view(2, TOKENS, DIM)
    return base + 100 * group + 100_000 * head


class Lru:
    """One KV head: slot -> (group, step of last use)."""

    def __init__(self, slots: int) -> None:
        self.slots = [(None, -1)] * slots

    def open(self, groups: list[int], step: int) -> list[int]:
        held = {group: slot for slot, (group, _) in enumerate(self.slots) if group is not None}
        for group in groups:
            if group in held:
                self.slots[held[group]] = (group, step)
        missed = [group for group in groups if group not in held]
        free = sorted((used, slot) for slot, (_, used) in enumerate(self.slots) if used < step)
        for group, (_, slot) in zip(missed, free, strict=False):
            self.slots[slot] = (group, step)
        return missed


def opens(kv_heads: int, groups: int):
    row = st.lists(st.booleans(), min_size=groups, max_size=groups)
    return st.lists(st.lists(row, min_size=kv_heads, max_size=kv_heads), min_size=1, max_size=12)


@st.composite
def cases(draw):
    kv_heads, groups = draw(st.integers(1, 3)), draw(st.integers(1, 10))
    return draw(st.integers(1, 12)), draw(st.integers(0, 3)), draw(opens(kv_heads, groups))


@settings(max_examples=120)
@given(cases())
def test_against_lru(case):
    slots, first_group, steps = case
    kv_heads = len(steps[0])
    bank = Bank(kv_heads, slots, TOKENS, DIM, torch.float32, torch.device("cpu"))
    model = [Lru(slots) for _ in range(kv_heads)]
    for step, rows in enumerate(steps):
        mask = torch.tensor(rows)
        if not mask.any():
            continue
        opened = [[first_group + g for g, on in enumerate(row) if on] for row in rows]
        expected = [(h, g) for h in range(kv_heads) for g in model[h].open(opened[h], step)]

        plan = bank.plan(mask, first_group, step)
        again = bank.plan(mask, first_group, step)  # a fetch that failed in between changes nothing
        assert np.array_equal(plan.slots, again.slots)
        heads, groups = again.missing()
        assert list(zip(heads.tolist(), groups.tolist(), strict=True)) == expected
        fetched = torch.stack([record(h, g) for h, g in expected]) if expected else None
        k, v, valid = bank.gather(again, bank.keep(again, fetched))

        for h in range(kv_heads):
            valid_tokens = valid[h].repeat_interleave(TOKENS)
            wanted = [record(h, g) for g in opened[h]]
            k_wanted = torch.cat([r[0] for r in wanted]) if wanted else torch.empty(0, DIM)
            v_wanted = torch.cat([r[1] for r in wanted]) if wanted else torch.empty(0, DIM)
            assert torch.equal(k[h][valid_tokens], k_wanted)
            assert torch.equal(v[h][valid_tokens], v_wanted)
            held = [-1 if group is None else group for group, _ in model[h].slots]
            assert bank._group_of_slot[h].tolist() == held
            for slot, group in enumerate(held):
                if group >= 0:
                    assert torch.equal(bank.records[:, h, slot], record(h, group))
        assert k.isfinite().all()
        assert v.isfinite().all()


def test_a_table_that_grows_keeps_what_it_knows():
    bank = Bank(1, 4, TOKENS, DIM, torch.float32, torch.device("cpu"))
    bank.keep(bank.plan(torch.tensor([[True, True]]), 0, 0), torch.stack([record(0, 0), record(0, 1)]))
    wide = torch.zeros(1, 5000, dtype=torch.bool)
    wide[0, [1, 4999]] = True
    plan = bank.plan(wide, 0, 1)
    assert plan.missing()[1].tolist() == [4999]
    assert bank.resident_bytes() < 4 * 2 * TOKENS * DIM * 4 + 5001 * 4 + 4 * 8 + 5 * 8 + 8 + 1
