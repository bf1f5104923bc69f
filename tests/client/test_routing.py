"""Both rules against loops."""

from __future__ import annotations

import math

import pytest
import torch
from hga_kvd_client.routing import causal_union, route_all, route_hga, route_sketch
from hypothesis import given, settings
from hypothesis import strategies as st


def reference(q, chunks, groups, topk_chunks, topk_groups):
    kv_heads, ratio, dim = q.shape
    per_chunk = groups.shape[2]
    opened = torch.zeros(kv_heads, chunks.shape[1] * per_chunk, dtype=torch.bool)
    for h in range(kv_heads):
        for r in range(ratio):
            by_chunk = sorted(range(chunks.shape[1]), key=lambda c: -float(q[h, r] @ chunks[h, c]) / dim**0.5)
            inside = [(c, g) for c in by_chunk[:topk_chunks] for g in range(per_chunk)]
            inside.sort(key=lambda at: -float(q[h, r] @ groups[h, at[0], at[1]]) / dim**0.5)
            for c, g in inside[:topk_groups]:
                opened[h, c * per_chunk + g] = True
    return opened


@settings(max_examples=60)
@given(
    kv_heads=st.integers(1, 4),
    ratio=st.integers(1, 8),
    tokens=st.integers(1, 3),
    chunks=st.integers(1, 30),
    per_chunk=st.sampled_from([1, 2, 4, 8]),
    dim=st.sampled_from([4, 16, 80]),
    topk_chunks=st.integers(1, 25),
    topk_groups=st.integers(1, 40),
    seed=st.integers(0, 10000),
)
def test_hga_against_loops(kv_heads, ratio, tokens, chunks, per_chunk, dim, topk_chunks, topk_groups, seed):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(kv_heads, ratio, tokens, dim, generator=generator)
    chunk_summaries = torch.randn(kv_heads, chunks, dim, generator=generator)
    group_summaries = torch.randn(kv_heads, chunks, per_chunk, dim, generator=generator)
    together = route_hga(q, chunk_summaries, group_summaries, topk_chunks, topk_groups)
    for token in range(tokens):
        got = route_hga(q[:, :, token], chunk_summaries, group_summaries, topk_chunks, topk_groups)
        expected = reference(
            q[:, :, token].double(), chunk_summaries.double(), group_summaries.double(), topk_chunks, topk_groups
        )
        assert torch.equal(got, expected)
        assert torch.equal(got, together[:, token])
        opened = got.sum(1)
        assert opened.max() <= ratio * topk_groups
        assert opened.min() >= min(topk_groups, min(topk_chunks, chunks) * per_chunk)


@pytest.mark.parametrize("ratio", [1, 3, 16])
def test_hga_pooled_against_loops(ratio):
    q = torch.randn(2, ratio, 4, 16).double()
    chunks, groups = torch.randn(2, 20, 16).double(), torch.randn(2, 20, 4, 16).double()
    got = route_hga(q, chunks, groups, 5, 6, pooled=True)
    for h in range(2):
        for token in range(4):
            by_chunk, by_group = torch.zeros(20).double(), torch.zeros(80).double()
            for r in range(ratio):
                by_chunk += (chunks[h] @ q[h, r, token] / 4).softmax(0)
                by_group += (groups[h].reshape(80, 16) @ q[h, r, token] / 4).softmax(0)
            best = by_chunk.topk(5).indices.tolist()
            inside = sorted((c * 4 + g for c in best for g in range(4)), key=lambda at: -float(by_group[at]))
            assert got[h, token].nonzero().squeeze(1).tolist() == sorted(inside[:6])


def test_summaries_may_be_slices_of_growing_buffers():
    chunks, groups = torch.randn(2, 50, 8), torch.randn(2, 50, 4, 8)
    q = torch.randn(2, 3, 8)
    got = route_hga(q, chunks[:, 2:30], groups[:, 2:30], 5, 6)
    assert torch.equal(got, route_hga(q, chunks[:, 2:30].clone(), groups[:, 2:30].clone(), 5, 6))


def sketch_reference(log_mass, window, budget, cover):
    """[kv_heads, ratio, groups], [kv_heads, ratio], in float64 loops."""
    kv_heads, ratio, groups = log_mass.shape
    claims = []
    for h in range(kv_heads):
        for g in range(groups):
            claim = 0.0
            for r in range(ratio):
                everything = sum(math.exp(m) for m in log_mass[h, r].tolist()) + math.exp(float(window[h, r]))
                claim += math.exp(float(log_mass[h, r, g])) / everything
            claims.append((claim, h, g))
    claims.sort(reverse=True)
    left = sum(claim for claim, _, _ in claims)
    opened = torch.zeros(kv_heads, groups, dtype=torch.bool)
    for claim, h, g in claims[:budget]:
        if cover < 1 and left <= (1 - cover) * kv_heads * ratio:
            break
        opened[h, g] = True
        left -= claim
    return opened


@settings(max_examples=60)
@given(
    kv_heads=st.integers(1, 4),
    ratio=st.integers(1, 16),
    tokens=st.integers(1, 3),
    groups=st.integers(1, 40),
    budget=st.integers(1, 100),
    cover=st.sampled_from([1.0, 0.99, 0.9, 0.5]),
    seed=st.integers(0, 10000),
)
def test_sketch_against_loops(kv_heads, ratio, tokens, groups, budget, cover, seed):
    generator = torch.Generator().manual_seed(seed)
    log_mass = 3 * torch.randn(kv_heads, ratio, tokens, groups, generator=generator)
    window = 3 + 3 * torch.randn(kv_heads, ratio, tokens, generator=generator)
    together = route_sketch(log_mass, window, budget, cover)
    for token in range(tokens):
        got = route_sketch(log_mass[:, :, token], window[:, :, token], budget, cover)
        assert torch.equal(got, together[:, token])
        assert torch.equal(got, sketch_reference(log_mass[:, :, token].double(), window[:, :, token], budget, cover))
        if cover == 1:
            assert got.sum() == min(budget, kv_heads * groups)


def test_cover_opens_what_it_promises():
    log_mass = torch.tensor([[[1.0, 5.0, 2.0, 0.0, 4.0]], [[0.0, 0.0, 0.0, 0.0, 0.0]]])
    window = torch.tensor([[3.0], [20.0]])
    share = log_mass.exp() / (log_mass.exp().sum(2, keepdim=True) + window[..., None].exp())
    for cover in (0.5, 0.8, 0.95, 0.999):
        opened = route_sketch(log_mass, window, 100, cover)
        outside = float((share[:, 0] * ~opened).sum()) / 2
        assert outside <= 1 - cover
        if opened.any():
            least = float(share[:, 0][opened].min()) / 2
            assert outside + least > 1 - cover
    assert not route_sketch(log_mass, window + 20, 100, 0.9).any()
    assert route_sketch(log_mass, window, 1, 0.999).nonzero().tolist() == [[0, 1]]


def test_a_head_that_is_busy_with_its_window_claims_little():
    log_mass = torch.zeros(2, 1, 8)
    window = torch.tensor([[0.0], [9.0]])
    opened = route_sketch(log_mass, window, 8)
    assert opened.sum(1).tolist() == [8, 0]


def test_masses_far_apart_stay_finite():
    log_mass = torch.tensor([[[-1e4, 3e4, -torch.inf]]])
    opened = route_sketch(log_mass, torch.tensor([[2e4]]), 1)
    assert opened.tolist() == [[False, True, False]]


def test_causal_union():
    masks = torch.rand(2, 7, 9) < 0.2
    seen = causal_union(masks)
    for head in range(2):
        for token in range(7):
            assert seen[head, token].tolist() == masks[head, : token + 1].any(0).tolist()


def test_route_all():
    assert route_all(2, 5, torch.device("cpu")).tolist() == [[True] * 5] * 2
