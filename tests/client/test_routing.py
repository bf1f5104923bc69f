"""The paper's rule against loops."""

from __future__ import annotations

import torch
from hga_kvd_client.routing import route_all, route_hga
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


@settings(max_examples=60, deadline=None)
@given(
    kv_heads=st.integers(1, 4),
    ratio=st.integers(1, 8),
    chunks=st.integers(1, 30),
    per_chunk=st.sampled_from([1, 2, 4, 8]),
    dim=st.sampled_from([4, 16, 80]),
    topk_chunks=st.integers(1, 25),
    topk_groups=st.integers(1, 40),
    seed=st.integers(0, 10000),
)
def test_against_loops(kv_heads, ratio, chunks, per_chunk, dim, topk_chunks, topk_groups, seed):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(kv_heads, ratio, dim, generator=generator)
    chunk_summaries = torch.randn(kv_heads, chunks, dim, generator=generator)
    group_summaries = torch.randn(kv_heads, chunks, per_chunk, dim, generator=generator)
    got = route_hga(q, chunk_summaries, group_summaries, topk_chunks, topk_groups)
    expected = reference(q.double(), chunk_summaries.double(), group_summaries.double(), topk_chunks, topk_groups)
    assert torch.equal(got, expected)
    opened = got.sum(1)
    assert opened.max() <= ratio * topk_groups
    assert opened.min() >= min(topk_groups, min(topk_chunks, chunks) * per_chunk)


def test_summaries_may_be_slices_of_growing_buffers():
    chunks, groups = torch.randn(2, 50, 8), torch.randn(2, 50, 4, 8)
    q = torch.randn(2, 3, 8)
    got = route_hga(q, chunks[:, 2:30], groups[:, 2:30], 5, 6)
    assert torch.equal(got, route_hga(q, chunks[:, 2:30].clone(), groups[:, 2:30].clone(), 5, 6))


def test_route_all():
    assert route_all(2, 5, torch.device("cpu")).tolist() == [[True] * 5] * 2
