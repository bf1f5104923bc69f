"""Attention against torch's own in float64."""

from __future__ import annotations

import pytest
import torch
from hga_kvd_client import attention
from hga_kvd_client.attention import ExactAttention, FlashAttention, decode_attention, window_scores
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-5), (torch.float16, 1e-5)])
def test_decode(dtype, tolerance):
    kv_heads, ratio, dim, near, far = 3, 4, 16, 50, 24
    q = randn(kv_heads, ratio, dim, seed=1, dtype=dtype)
    window = randn(2, kv_heads, near + 9, dim, seed=2, dtype=dtype)[:, :, :near]
    opened = randn(2, kv_heads, far, dim, seed=3, dtype=dtype)
    groups, counts = 6, [24, 0, 8]
    valid = torch.arange(far) < torch.tensor(counts)[:, None]
    got = decode_attention(q, window[0], window[1], 0.37, opened[0], opened[1], valid[:, :: far // groups])
    assert got.dtype == torch.float32
    for h in range(kv_heads):
        k = torch.cat((window[0, h], opened[0, h, : counts[h]])).double()
        v = torch.cat((window[1, h], opened[1, h, : counts[h]])).double()
        expected = scaled_dot_product_attention(q[h].double()[None], k[None], v[None], scale=0.37)[0]
        assert (got[h] - expected).abs().max() < tolerance
    alone = decode_attention(q, window[0], window[1], 0.37)
    expected = scaled_dot_product_attention(q.double(), window[0].double(), window[1].double(), scale=0.37)
    assert (alone - expected).abs().max() < tolerance
    near = window_scores(q, window[0], 0.37)
    assert near.dtype == torch.float32
    assert (near - 0.37 * q.double() @ window[0].double().mT).abs().max() < tolerance
    known = decode_attention(q, window[0], window[1], 0.37, opened[0], opened[1], valid[:, :: far // groups], near)
    assert torch.equal(known, got)


@settings(max_examples=40)
@given(
    kv_heads=st.integers(1, 3),
    ratio=st.integers(1, 4),
    tokens=st.integers(1, 20),
    before=st.integers(0, 15),
    tiles=st.lists(st.integers(1, 12), max_size=4),
    scores_max=st.sampled_from([1, 50, 1 << 20]),
    window_first=st.booleans(),
    spread=st.sampled_from([1.0, 30.0]),
)
def test_exact(kv_heads, ratio, tokens, before, tiles, scores_max, window_first, spread):
    dim = 8
    q = randn(kv_heads, ratio, tokens, dim, seed=1) * spread
    far = [randn(2, kv_heads, n, dim, seed=10 + n) for n in tiles]
    window = randn(2, kv_heads, before + tokens, dim, seed=3)
    old = attention.SCORES_MAX_CPU
    attention.SCORES_MAX_CPU = scores_max
    try:
        exact = ExactAttention(q, 0.5)
        if window_first:
            exact.add(window[0], window[1], causal_offset=before)
        for tile in far:
            exact.add(tile[0], tile[1])
        if not window_first:
            exact.add(window[0], window[1], causal_offset=before)
        got = exact.result()
    finally:
        attention.SCORES_MAX_CPU = old
    k, v = torch.cat([*far, window], 2).double().repeat_interleave(ratio, 1).unbind(0)
    stored = sum(tiles)
    seen = torch.arange(stored + before + tokens) <= torch.arange(tokens)[:, None] + stored + before
    expected = scaled_dot_product_attention(q.double().flatten(0, 1), k, v, attn_mask=seen, scale=0.5)
    assert (got.flatten(0, 1) - expected).abs().max() < 2e-5 * spread


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("ratio", "tokens", "dim"), [(1, 1, 64), (3, 70, 80), (8, 130, 128)])
def test_flash_tiles_are_exact_attention(dtype, ratio, tokens, dim):
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device="cuda").to(dtype)

    q = normal(2, ratio, tokens, dim)
    assert FlashAttention.serves(q)
    both = [FlashAttention(q, 0.2), ExactAttention(q, 0.2)]
    for keys in (64, 200):
        k, v = normal(2, 2, keys, dim)
        for one in both:
            one.add(k, v)
    k, v = normal(2, 2, 30 + tokens, dim)
    for one in both:
        one.add(k, v, causal_offset=30)
    mine, exact = (one.result() for one in both)
    assert (mine - exact).norm() < (2e-3 if dtype == torch.float16 else 1.5e-2) * exact.norm()
