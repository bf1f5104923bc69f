"""Every kernel against its twin: on the GPU where there is one, else in Triton's interpreter, on the same small shapes."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hga_kvd_client import float8
from hga_kvd_client.sketch import Basis, Moments, SketchSpec, encode

pytest.importorskip("triton", reason="the extra `client` brings triton where it exists")

from hga_kvd_client.kernels import (
    CONTROL_SIZE,
    COUNT_MASK,
    FIRST_GROUP,
    GROUPS,
    MAIL_K,
    MAIL_POSTED,
    MAIL_Q,
    MAIL_READY,
    MAIL_V,
    NEVER,
    OPENED_SHIFT,
    READY_SHIFT,
    SLOTS_MAX,
    STAGED,
    STEP,
    STEP_SHIFT,
    WINDOW_TOKENS,
    attention,
    bank,
    mail_keys,
    mail_words,
    select,
    take,
)
from hga_kvd_client.kernels import sketch as sketch_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NEEDS_GPU = pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")


def control(**numbers: int) -> torch.Tensor:
    places = {"window": WINDOW_TOKENS, "groups": GROUPS, "first": FIRST_GROUP, "step": STEP}
    made = torch.zeros(CONTROL_SIZE, dtype=torch.int64)
    for name, number in numbers.items():
        made[places[name]] = number
    return made.to(DEVICE)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)


def parts_of(count: int, heads: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((count, heads, dim), torch.nan, device=DEVICE), torch.full(
        (count, heads), torch.nan, device=DEVICE
    )


def assert_close(mine: torch.Tensor, theirs: torch.Tensor, relative: float) -> None:
    assert mine.isfinite().all()
    assert theirs.isfinite().all()
    assert (mine.double() - theirs.double()).norm() <= relative * theirs.double().norm()


@pytest.mark.parametrize(
    ("dtype", "ratio", "dim", "tokens"),
    [
        (torch.float32, 3, 16, 50),
        (torch.float32, 1, 80, 1),
        (torch.float16, 8, 128, 64),
        # The interpreter multiplies bfloat16 as if it were whole numbers.
        pytest.param(torch.bfloat16, 8, 128, 64, marks=[pytest.mark.gpu, NEEDS_GPU]),
        (torch.float16, 16, 64, 37),
    ],
)
def test_parts_of_window_and_slots_merge_into_dense_attention(dtype, ratio, dim, tokens):
    kv_heads, slots, group = 2, 6, 16
    q = normal(kv_heads, ratio, dim, dtype=dtype)
    window = normal(2, kv_heads, 70, dim, seed=1, dtype=dtype)
    records = normal(kv_heads, slots, 2, group, dim, seed=2, dtype=dtype)
    counts = torch.tensor([5, 0], dtype=torch.int32, device=DEVICE)
    chosen = torch.tensor([[4, 1, 0, 5, 2, 77], [9, 9, 9, 9, 9, 9]], dtype=torch.int32, device=DEVICE)
    results = []
    for kind in ("", "_twin"):
        out, lse = parts_of(5 + 3, kv_heads * ratio, dim)
        numbers = control(window=tokens)
        getattr(attention, f"window_parts{kind}")(q, *window, numbers, 0.3, 16, out[:5], lse[:5])
        getattr(attention, f"paged_parts{kind}")(q, records, chosen, counts, 0.3, 2, out[5:], lse[5:])
        merged, merged_lse = (
            torch.empty(kv_heads * ratio, dim, device=DEVICE),
            torch.empty(kv_heads * ratio, device=DEVICE),
        )
        getattr(attention, f"merge{kind}")(out, lse, merged, merged_lse)
        results.append((out, lse, merged, merged_lse))
    (out, lse, merged, merged_lse), (twin_out, twin_lse, twin_merged, twin_merged_lse) = results
    relative = 1e-5 if dtype == torch.float32 else 5e-3
    seen = ~twin_lse.isinf()
    assert torch.equal(lse.isinf(), twin_lse.isinf())
    assert_close(lse[seen], twin_lse[seen], relative)
    assert_close(out[seen], twin_out[seen], relative)
    assert_close(merged, twin_merged, relative)
    assert_close(merged_lse, twin_merged_lse, relative)
    for head in range(kv_heads):
        opened = records[head, chosen[head, : counts[head]].long()].double()
        k = torch.cat((window[0, head, :tokens].double(), opened[:, 0].flatten(0, 1)))
        v = torch.cat((window[1, head, :tokens].double(), opened[:, 1].flatten(0, 1)))
        dense = torch.softmax(q[head].double() @ k.T * 0.3, 1) @ v
        assert_close(merged[head * ratio : (head + 1) * ratio], dense, relative)


def test_records_in_8_bits_are_read_with_the_scales_inside_them():
    q = normal(2, 4, 32, dtype=torch.float16)
    values = normal(2, 4, 2, 16 * 32, seed=2) * 10 ** normal(2, 4, 2, 1, seed=3).clamp(-3, 2)
    values[0, 3, 1] = 0.0
    records = float8.pack(values).view(2, 4, 2, 16, 32)
    exact = float8.unpack(records.flatten(3), torch.float32).view(records.shape).double()
    slots = torch.tensor([[0, 3, 9], [2, 1, 0]], dtype=torch.int32, device=DEVICE)
    counts = torch.tensor([2, 3], dtype=torch.int32, device=DEVICE)
    found = []
    for kernel in (attention.paged_parts, attention.paged_parts_twin):
        out, lse = parts_of(2, 8, 32)
        kernel(q, records, slots, counts, 0.05, 2, out, lse)
        merged, merged_lse = torch.empty(8, 32, device=DEVICE), torch.empty(8, device=DEVICE)
        attention.merge_twin(out, lse, merged, merged_lse)
        found.append((merged, merged_lse))
    assert_close(found[0][0], found[1][0], 2e-3)
    assert_close(found[0][1], found[1][1], 2e-3)
    for head in range(2):
        k, v = exact[head, slots[head, : counts[head]].long()].transpose(0, 1).flatten(1, 2)
        dense = torch.softmax(q[head].double() @ k.T * 0.05, 1) @ v
        assert_close(found[1][0][4 * head : 4 * head + 4], dense, 1e-5)


@pytest.mark.parametrize(
    ("spec", "ratio"),
    [
        (SketchSpec.of_basis(64), 3),
        (SketchSpec.of_basis(80), 1),
        (SketchSpec(128, 32, 16), 8),
        (SketchSpec.plain(32), 2),
        (SketchSpec(32, 8, 0), 16),
    ],
)
@pytest.mark.parametrize("programs", [sketch_kernels.PROGRAMS, 5], ids=["a block each", "two blocks each"])
def test_log_mass_from_packed_sketches(spec, ratio, programs, monkeypatch):
    monkeypatch.setattr(sketch_kernels, "PROGRAMS", programs)
    kv_heads, chunks, dim = 2, 40, spec.head_dim
    first, count = 2, 37
    keys = normal(kv_heads, chunks * spec.chunk_tokens, dim, seed=1) * torch.linspace(2, 0.1, dim, device=DEVICE) + 0.5
    q = normal(kv_heads, ratio, dim, seed=2)
    moments = Moments(kv_heads, dim, torch.device(DEVICE))
    moments.add(normal(kv_heads, 1, 600, dim, seed=3), keys)
    basis = Basis.of(moments) if spec.blocks == 1 else Basis.none(kv_heads, dim, torch.device(DEVICE))
    records = torch.stack(
        [encode(spec, basis, part) for part in keys.view(kv_heads, chunks, spec.chunk_tokens, dim).unbind(1)], 1
    )
    numbers = control(groups=count * spec.groups_per_chunk, first=first * spec.groups_per_chunk)
    capacity = 5 * sketch_kernels.BLOCK_GROUPS
    found = []
    for kind in ("", "_twin"):
        z = torch.bmm(q * dim**-0.5, basis.to_z.transpose(1, 2))
        out = torch.full((kv_heads, capacity, ratio), torch.nan, device=DEVICE)
        rows = sketch_kernels.lse_rows(capacity, kv_heads)
        lse = torch.full((rows, kv_heads * ratio), torch.nan, device=DEVICE)
        getattr(sketch_kernels, f"log_mass{kind}")(spec, z, basis.centre, records, numbers, out, lse)
        found.append((out[:, : count * 4], lse))
    (out, lse), (twin_out, twin_lse) = found
    assert (out - twin_out).abs().max() < 5e-3, "nats; queries are rounded to float16"
    assert torch.equal(lse.isinf(), twin_lse.isinf())
    full = 3 if programs > 5 else 2
    assert rows == (5 if programs > 5 else 3)
    assert lse[full:].isinf().all()
    assert (lse[:full] - twin_lse[:full]).abs().max() < 5e-3


def test_log_mass_reaches_records_that_lie_2_gib_away():
    """Each factor fits in 32 bits, their product does not. The memory between the KV heads is never touched."""
    spec, kv_heads, chunks = SketchSpec.plain(32), 3, 5
    far = torch.from_numpy(np.zeros((2 << 30) + chunks * spec.chunk_bytes, np.uint8)).to(DEVICE)  # torch would touch it
    records = far.as_strided((kv_heads, chunks, spec.chunk_bytes), (1 << 30, spec.chunk_bytes, 1))
    basis = Basis.none(kv_heads, 32, torch.device(DEVICE))
    keys = normal(kv_heads, chunks, spec.chunk_tokens, 32, seed=1)
    for chunk in range(chunks):
        records[:, chunk] = encode(spec, basis, keys[:, chunk])
    z, numbers = normal(kv_heads, 2, 32, seed=2), control(groups=4 * (chunks - 1), first=4)
    found = []
    for kind in ("", "_twin"):
        out = torch.zeros(kv_heads, sketch_kernels.BLOCK_GROUPS, 2, device=DEVICE)
        lse = torch.zeros(1, kv_heads * 2, device=DEVICE)
        getattr(sketch_kernels, f"log_mass{kind}")(spec, z, basis.centre, records, numbers, out, lse)
        found.append((out[:, : 4 * (chunks - 1)], lse))
    assert (found[0][0] - found[1][0]).abs().max() < 5e-3
    assert (found[0][1] - found[1][1]).abs().max() < 5e-3


@pytest.mark.parametrize("projects", [True, False])
@pytest.mark.parametrize(("ratio", "dim"), [(3, 80), (8, 64)])
@pytest.mark.parametrize("kind", ["", "_twin"])
def test_take_reads_what_the_mailbox_points_at(kind, ratio, dim, projects):
    if kind and DEVICE == "cuda":
        pytest.skip("the twin reads addresses of the host")
    kv_heads = 2
    given = [normal(kv_heads, rows, dim, seed=n, dtype=torch.float16) for n, rows in enumerate((ratio, 1, 1))]
    mail, q = mailbox(kv_heads, 16), torch.zeros_like(given[0])
    for place, tensor in zip((MAIL_Q, MAIL_K, MAIL_V), given, strict=True):
        mail[place] = tensor.data_ptr()
    window = normal(2, kv_heads, 40, dim, seed=3, dtype=torch.float16)
    expected = window.clone()
    expected[:, :, 29] = torch.stack(given[1:]).squeeze(2)
    chosen = select.Chosen.empty(kv_heads, 16, torch.device(DEVICE))
    for tensor in (chosen.bins, chosen.counts, chosen.tie_count):
        tensor.fill_(7)
    to_z, z = normal(kv_heads, dim, dim, seed=4), torch.full((kv_heads, ratio, dim), torch.nan, device=DEVICE)
    more = (0.3, to_z, z) if projects else ()
    for numbers in (control(window=30), control(window=31)):
        getattr(take, f"take{kind}")(mail, numbers, q, *window, chosen, *more)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        mail[MAIL_K] = mail[MAIL_V] = 0  # the window has the second token
    assert torch.equal(q, given[0])
    assert torch.equal(window, expected)
    assert not any(t.any() for t in (chosen.bins, chosen.counts, chosen.tie_count))
    if projects:
        assert_close(z, torch.bmm(given[0].float() * 0.3, to_z.transpose(1, 2)), 1e-5)


def selected(mass: torch.Tensor, budget: int, most: int, twin: bool) -> tuple[select.Chosen, torch.Tensor]:
    """Runs the selection on given masses; returns it, and the mass as `pool` left it."""
    kind = "_twin" if twin else ""
    kv_heads, count = mass.shape
    capacity = count + 24
    log_mass = torch.full((kv_heads, capacity, 2), torch.nan, device=DEVICE)
    log_mass[:, :count, 0] = (mass * 0.75).log()
    log_mass[:, :count, 1] = (mass * 0.25).log()
    # What heads see beside the groups makes everything 1, so that masses stay as they were given.
    rest = 1 - log_mass[:, :count].exp().sum(1)
    window = torch.stack((rest / 4, rest * 3 / 4)).log().flatten(1).contiguous()
    groups = log_mass[:, :count].logsumexp(1).flatten()[None]
    chosen = select.Chosen.empty(kv_heads, most, torch.device(DEVICE))
    pooled = torch.full((kv_heads, capacity), torch.nan, device=DEVICE)
    numbers = control(groups=count)
    getattr(select, f"pool{kind}")(log_mass, window, groups, numbers, pooled, chosen)
    getattr(select, f"gather{kind}")(pooled, numbers, budget, chosen)
    return chosen, pooled[:, :count]


def opened(chosen: select.Chosen, capacity: int, budget: int, first: int = 0) -> set[tuple[int, int]]:
    """What the bank takes of a selection."""
    kv_heads, most = chosen.groups.shape
    tables = bank.Tables.empty(kv_heads, most, most, torch.device(DEVICE))
    lists = bank.Lists.empty(kv_heads, most, torch.device(DEVICE))
    bank.place(chosen, control(step=1, first=first), 0, budget, capacity, tables, lists, mailbox(kv_heads, most))
    counts = tables.opened_counts.tolist()
    return {(h, g) for h, n in enumerate(counts) for g in tables.opened[h, :n].tolist()}


def mailbox(kv_heads: int, most: int) -> torch.Tensor:
    return torch.full((mail_words(kv_heads, most),), -1, dtype=torch.int64, pin_memory=DEVICE == "cuda")


@pytest.mark.parametrize("spread", [0.01, 1.0, 8.0])
@pytest.mark.parametrize(("kv_heads", "count"), [(1, 40), (3, 1100)])
def test_selection_opens_the_groups_of_largest_mass(kv_heads, count, spread):
    budget, most = 29, 32
    mass = torch.softmax(normal(kv_heads, count, seed=count) * spread, 1) * 0.9
    chosen, pooled = selected(mass, budget, most, twin=False)
    twin, twin_pooled = selected(mass, budget, most, twin=True)
    assert_close(pooled, twin_pooled, 1e-4)
    # Kernel and twin round masses differently, and bins may differ at their edges; the result may not.
    best = pooled.flatten().topk(budget).indices.tolist()
    ties = int(chosen.tie_count)
    found = opened(chosen, count + 24, budget)
    assert len(found) == budget
    if ties <= select.TIES_MAX:
        assert found == {divmod(place, count) for place in best}
    else:
        # Masses within a bin's width: anything chosen is at least that close to the best.
        floor = pooled.flatten().topk(budget).values[-1] / 2 ** (1 / 8)
        assert all(pooled[h, g] >= floor for h, g in found)
    best = twin_pooled.flatten().topk(budget).values.sum()
    found = opened(twin, count + 24, budget)
    assert abs(sum(twin_pooled[h, g] for h, g in found) - best) <= best / 8


def test_selection_of_fewer_groups_than_the_budget_takes_them_all():
    mass = torch.full((2, 5), 0.1)
    mass[0, 0] = 1e-12
    chosen, _ = selected(mass.to(DEVICE), 20, 32, twin=False)
    assert opened(chosen, 29, 20, first=8) == {(h, g + 8) for h in range(2) for g in range(5)}


def test_a_mask_is_listed():
    mask = normal(3, 1500, seed=4) > 2.2
    chosen = select.Chosen.empty(3, 64, torch.device(DEVICE))
    select.gather_mask(mask, control(groups=1200, first=8), chosen)
    expected = {(h, g) for h, g in mask[:, 8:1208].nonzero().tolist()}
    assert 0 < len(expected) < 3 * 64
    assert opened(chosen, 1500, 3 * 64) == expected


@pytest.mark.parametrize("kind", ["", "_twin"])
@pytest.mark.parametrize("age", [1 << 22, 1 << 24])
def test_the_slot_opened_longest_ago_leaves_however_long_that_is(kind, age):
    """Ages and places share 32 bits."""
    slots, most, device = 512, 16, torch.device(DEVICE)
    tables, lists = bank.Tables.empty(1, slots, most, device), bank.Lists.empty(1, most, device)
    step = age + 10
    tables.groups.copy_(torch.arange(slots)[None])
    tables.used_at.fill_(step - 2)
    tables.used_at[0, 300] = step - age
    chosen = select.Chosen.empty(1, most, device)
    mask = torch.zeros(1, 600, dtype=torch.bool, device=device)
    mask[0, [7, 599]] = True
    numbers = control(step=step, groups=600)
    select.gather_mask_twin(mask, numbers, chosen)
    getattr(bank, f"place{kind}")(chosen, numbers, 0, most, 600, tables, lists, mailbox(1, most))
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    assert (int(lists.held[0, 0]), int(lists.late[0, 0])) == (7, 300)
    assert int(tables.groups[0, 300]) == 599
    assert (tables.groups[0].cpu() != torch.arange(slots)).sum() == 1
    assert tables.used_at[0, [7, 300]].tolist() == [step, step]


def test_a_bank_larger_than_it_can_be_searched_is_refused():
    slots, device = SLOTS_MAX + 1, torch.device(DEVICE)
    tables, lists = bank.Tables.empty(1, slots, 16, device), bank.Lists.empty(1, 16, device)
    with pytest.raises(AssertionError, match="slots"):
        bank.place(select.Chosen.empty(1, 16, device), control(step=1), 0, 16, 60, tables, lists, mailbox(1, 16))


@pytest.mark.parametrize(("kv_heads", "slots"), [(1, 16), (3, 24)])
def test_bank_replaces_the_least_recently_opened_and_lists_what_is_missing(kv_heads, slots):
    most, dim, layer = 16, 8, 5
    device = torch.device(DEVICE)
    sides = []
    for kind in ("", "_twin"):
        sides.append((
            getattr(bank, f"place{kind}"), getattr(bank, f"land{kind}"),
            bank.Tables.empty(kv_heads, slots, most, device), bank.Lists.empty(kv_heads, most, device),
            mailbox(kv_heads, most), torch.zeros(kv_heads, slots, 2, 4, dim, device=device),
        ))  # fmt: skip
    store = normal(kv_heads, 60, 2, 4, dim, seed=9).cpu()
    generator = torch.Generator().manual_seed(1)
    used: list[dict[int, int]] = [{} for _ in range(kv_heads)]
    for step in range(1, 12):
        mask = torch.zeros(kv_heads, 60, dtype=torch.bool)
        for head in range(kv_heads):
            mask[
                head,
                torch.randperm(60, generator=generator)[: int(torch.randint(0, most + 1, (), generator=generator))],
            ] = 1
        chosen = select.Chosen.empty(kv_heads, most, device)
        numbers = control(step=step, groups=60)
        select.gather_mask(mask.to(DEVICE), numbers, chosen)
        for place, land, tables, lists, mail, records in sides:
            place(copy.deepcopy(chosen), numbers, layer, kv_heads * most, 60, tables, lists, mail)
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            words = mail[MAIL_POSTED:][:kv_heads]
            assert (words >> STEP_SHIFT == step).all()
            assert torch.equal((words >> OPENED_SHIFT) & COUNT_MASK, mask.sum(1))
            keys = mail[mail_keys(kv_heads) :][: kv_heads * most].view(kv_heads, most)
            wire = torch.cat([row[: word & COUNT_MASK] for row, word in zip(keys, words.tolist(), strict=True)])
            heads, groups = (wire >> 32) & 0xFFFF, wire & 0xFFFFFFFF
            assert ((wire >> 48) == layer).all()
            assert torch.equal(wire, wire.sort().values), "in the order of storage"
            # In the landing, 64 bytes from its start; or in staging.
            source = torch.zeros(8 + len(wire) * 8 * dim // 2, dtype=torch.int64, pin_memory=DEVICE == "cuda")
            source[8:] = store[heads, groups].reshape(-1).view(torch.int64)
            landing, staging = (source, source[:0]) if step % 2 else (source[:0], source[8:])
            for where in (NEVER, 4 if step % 2 else STAGED):
                mail[MAIL_READY] = step << READY_SHIFT | where
                before = records.clone()
                tables.arrived.zero_()
                land(landing, staging, mail, numbers, lists, tables, records)
                if DEVICE == "cuda":
                    torch.cuda.synchronize()
                assert torch.equal(records, before) == (where == NEVER or not len(wire))
            missing = {(h, g) for h, g in mask.nonzero().tolist() if g not in used[h]}
            assert set(zip(heads.tolist(), groups.tolist(), strict=True)) == missing
        # An obvious LRU: steps of last use per group; those used longest ago leave, in no matter which order of ties.
        for head in range(kv_heads):
            now = mask[head].nonzero().squeeze(1).tolist()
            for group in now:
                used[head][group] = step
            tables, lists, records = sides[0][2], sides[0][3], sides[0][5]
            held = [g for g in tables.groups[head].tolist() if g >= 0]
            stayed = sorted(used[head][g] for g in held)
            assert stayed == sorted(sorted(used[head].values())[-slots:])
            used[head] = {g: used[head][g] for g in held}
            for slot, group in enumerate(tables.groups[head].tolist()):
                if group >= 0:
                    assert torch.equal(records[head, slot].cpu(), store[head, group])
            listed = (
                lists.held[head, : lists.held_counts[head]].tolist()
                + lists.late[head, : lists.late_counts[head]].tolist()
            )
            assert sorted(tables.groups[head, listed].tolist()) == now
        for mine, theirs in zip(vars(sides[0][2]).values(), vars(sides[1][2]).values(), strict=True):
            assert torch.equal(mine, theirs)
