"""Mixed-RoPE means against the obvious way: un-rotate every key, average, rotate to the middle, all in float64."""

from __future__ import annotations

import pytest
import torch
from hga_kvd_client.options import Rope
from hga_kvd_client.summaries import Summaries, Turns, mixed_mean
from hypothesis import given, settings
from hypothesis import strategies as st


def rotate(x: torch.Tensor, position: float, inv_freq: list[float]) -> torch.Tensor:
    """x: [head_dim], as Llama rotates it; float64."""
    out = x.clone()
    half = len(inv_freq)
    for i, f in enumerate(inv_freq):
        angle = torch.tensor(position * f, dtype=torch.float64)
        out[i] = x[i] * angle.cos() - x[i + half] * angle.sin()
        out[i + half] = x[i + half] * angle.cos() + x[i] * angle.sin()
    return out


def reference(keys: torch.Tensor, start: int, inv_freq: list[float], chunk_tokens: int) -> torch.Tensor:
    """keys: [n, head_dim] before RoPE, float64, at positions start, start + 1, ..."""
    n = keys.shape[0]
    half = len(inv_freq)
    rotated_mean = torch.stack([rotate(k, start + j, inv_freq) for j, k in enumerate(keys)]).mean(0)
    middle = rotate(keys.mean(0), start + (n - 1) // 2, inv_freq)
    summary = keys.mean(0)
    for i, f in enumerate(inv_freq):
        source = rotated_mean if (chunk_tokens - 1) * f > 0.5 else middle
        summary[i], summary[i + half] = source[i], source[i + half]
    return summary


@settings(max_examples=30)
@given(
    pairs=st.integers(0, 6),
    plain=st.integers(0, 5),
    n=st.integers(1, 20),
    start=st.integers(0, 5000),
    theta=st.sampled_from([10.0, 1e4, 1e6]),
    chunk_tokens=st.sampled_from([16, 20, 64]),
    seed=st.integers(0, 1000),
)
def test_against_reference(pairs, plain, n, start, theta, chunk_tokens, seed):
    dim = 2 * pairs + plain
    if not dim:
        return
    inv_freq = [theta ** (-i / max(1, pairs)) for i in range(pairs)]
    keys = torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    stored = torch.stack([rotate(k, start + j, inv_freq) for j, k in enumerate(keys)])
    turns = Turns.of_block(Rope(tuple(inv_freq), 2 * pairs), n, chunk_tokens, torch.device("cpu"))
    got = mixed_mean(stored[None, None].float(), turns)
    assert got.shape == (1, 1, dim)
    torch.testing.assert_close(got[0, 0].double(), reference(keys, start, inv_freq, chunk_tokens), atol=2e-5, rtol=1e-4)


def test_pairs_split_by_the_chunk_for_groups_too():
    # f = 0.02: fast over a chunk of 64 (1.26 rad), though a group of 16 turns by 0.3 rad only.
    turns = Turns.of_block(Rope((0.02, 0.5 / 63, 0.0079), 6), 16, 64, torch.device("cpu"))
    assert (turns.sin[:, 0] == 0).all()
    assert (turns.sin[:7, 1:] > 0).all()
    assert (turns.sin[7] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keys_are_averaged_in_float32(dtype):
    keys = torch.randn(2, 3, 64, 16).to(dtype)
    turns = Turns.of_block(Rope((1.0, 0.001), 4), 64, 64, torch.device("cpu"))
    got = mixed_mean(keys, turns)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, mixed_mean(keys.double(), turns), atol=1e-5, rtol=1e-5)


def test_buffers_grow_and_give_back_what_was_put():
    summaries = Summaries(2, 3, 4, 8, torch.float32, torch.device("cpu"))
    put = torch.randn(400, 2, 3, 5, 8)
    for first, end in ((0, 1), (1, 90), (90, 91), (91, 400), (50, 60)):
        summaries.put(first, put[first:end])
    assert summaries.count == 400
    assert torch.equal(summaries.packed(0, 400), put)
    assert torch.equal(summaries.chunks[1, 2, :400], put[:, 1, 2, 0])
    assert torch.equal(summaries.groups[1, 2, :400], put[:, 1, 2, 1:])
    assert summaries.resident_bytes() <= 1.4 * put.nbytes
