"""The window against a list of tokens."""

from __future__ import annotations

import copy

import torch
from hga_kvd_client.window import Window
from hypothesis import given, settings
from hypothesis import strategies as st

LAYERS, KV_HEADS, DIM, CHUNK = 2, 2, 1, 4


def values(layer: int, first: int, end: int) -> torch.Tensor:
    """[kv_heads, tokens, 1]: says layer, head and token."""
    token = torch.arange(first, end, dtype=torch.float32)
    return torch.stack([1000 * (layer * KV_HEADS + h) + token for h in range(KV_HEADS)])[..., None]


@settings(max_examples=80)
@given(sinks=st.integers(0, 3), recent=st.integers(1, 4), blocks=st.lists(st.integers(1, 23), min_size=1, max_size=15))
def test_holds_sinks_and_tail(sinks, recent, blocks):
    window = Window(LAYERS, KV_HEADS, DIM, CHUNK, sinks, recent, torch.float32, torch.device("cpu"))
    tokens = 0
    for block in blocks:
        window.drop((tokens // CHUNK - recent) * CHUNK, tokens)
        window.reserve(tokens, block)
        for layer in range(LAYERS):
            k = values(layer, tokens, tokens + block)
            window.write(layer, tokens, k, -k)
        tokens += block
        kept = list(range(min(sinks * CHUNK, tokens))) + list(range(window.tail_first, tokens))
        assert kept[-1] == tokens - 1
        for layer in range(LAYERS):
            k, v = window.layer(layer, tokens)
            expected = values(layer, 0, tokens)[:, kept]
            assert torch.equal(k, expected)
            assert torch.equal(v, -expected)
        for chunk in range(tokens // CHUNK):
            first, end = chunk * CHUNK, (chunk + 1) * CHUNK
            assert window.holds(first, end) == (first in kept)
            if first in kept:
                span = window.span(first, end)
                assert span.shape == (LAYERS, 2, KV_HEADS, CHUNK, DIM)
                assert torch.equal(span[1, 0], values(1, first, end))
        capacity = (sinks + recent + 1) * CHUNK
        assert window.resident_bytes() <= LAYERS * 2 * KV_HEADS * 4 * (capacity + max(blocks))
    window.drop((tokens // CHUNK - recent) * CHUNK, tokens)
    window.reserve(tokens, 1)
    assert window.resident_bytes() == LAYERS * 2 * KV_HEADS * 4 * (sinks + recent + 1) * CHUNK


def test_a_held_token_is_written_before_anybody_looks():
    looks = {
        "layer": lambda w: w.layer(1, 6)[0][:, 5],
        "everything": lambda w: w.everything[1, 0, :, 5],
        "span": lambda w: w.span(4, 6)[1, 0, :, 1],
        "hold": lambda w: (w.hold(0, 6, values(0, 6, 7), values(0, 6, 7)), w._written[1, 0, :, 5])[1],
        "fork": lambda w: copy.deepcopy(w).layer(1, 6)[0][:, 5],
        "rewind": lambda w: (w.drop(4, 6), w.rewind(0, 6), w._written[1, 0, :, 5])[2],
    }
    for name, look in looks.items():
        window = Window(LAYERS, KV_HEADS, DIM, CHUNK, 0, 2, torch.float32, torch.device("cpu"))
        window.reserve(0, 8)
        window.write(1, 0, values(1, 0, 5), values(1, 0, 5))
        held = values(1, 5, 6)
        window.hold(1, 5, held, held)
        assert window.take_held(0) is None
        assert torch.equal(look(window), held[:, 0]), name
        if name != "fork":
            assert window.take_held(1) is None
    window.hold(1, 5, held, held)
    assert window.take_held(1) == (held, held)
    assert window.take_held(1) is None


@given(first=st.integers(0, 5), chunks=st.integers(1, 3), cut=st.integers(0, 3), sinks=st.integers(0, 2))
def test_what_is_written_as_it_is_stored_is_the_same(first, chunks, cut, sinks):
    windows = [Window(LAYERS, KV_HEADS, DIM, CHUNK, sinks, 2, torch.float32, torch.device("cpu")) for _ in range(2)]
    first, end = (sinks + first) * CHUNK, (sinks + first + chunks) * CHUNK
    for window in windows:
        window.start_at(first)
        window.reserve(end, 0)
        window.everything.fill_(-1)
    for layer in range(LAYERS):
        k = values(layer, first, end - cut)
        windows[0].write(layer, first, k, -k)
    k = torch.stack([values(layer, first, end) for layer in range(LAYERS)])
    tiles = torch.stack([k, -k], 1).unflatten(3, (chunks, CHUNK // 2, 2))
    windows[1].write_tiles(0, first, tiles[:1], end - cut)
    windows[1].write_tiles(1, first, tiles[1:], end - cut)
    assert torch.equal(windows[0].everything, windows[1].everything)
