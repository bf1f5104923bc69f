"""Sketch sessions against the real daemon process: routed decode, basis and sketches that survive it, forks."""

from __future__ import annotations

from dataclasses import replace

import torch
from hga_kvd_client import Geometry, SessionOptions, connect
from sequences import GEOMETRY, KV_HEADS, LAYERS, ROPE, Tokens, blocks

OPTIONS = SessionOptions(
    router="sketch", sketch_groups=3, sketch_basis_tokens=256, sink_chunks=1, recent_chunks=2, bank_groups=8,
    flush_chunks=2, prefill_tile_chunks=3,
)  # fmt: skip


def test_resume_after_kill_9_routes_as_before(daemon):
    running = daemon()
    tokens = Tokens(800)
    with connect(running.target) as client:
        session = client.open("s", GEOMETRY, ROPE, OPTIONS)
        for first, end in blocks([300], 720):
            tokens.run(session, first, end)
        session.flush()
        running.kill()
    again = running.start()
    with connect(again.target) as client:
        other = client.open("s", GEOMETRY, ROPE, OPTIONS)
        assert other.tokens == 704
        store, kept = session._routing.store, other._routing.store
        assert torch.equal(kept.packed(0, 11), store.packed(0, 11))
        assert torch.equal(kept.basis.to_z, store.basis.to_z)
        tokens.run(other, 704, 720)
        outs = [tokens.run(other, at, at + 1) for at in range(720, 760)]
        opened = [other.opened(layer) for layer in range(LAYERS)]
        assert all(mask.sum() == 3 * KV_HEADS for mask in opened[:1])
        # A third session, which never knew the first process, steps through the same tokens.
        fresh = client.open(None, GEOMETRY, ROPE, OPTIONS)
        for first, end in blocks([300], 704):
            tokens.run(fresh, first, end)
        tokens.run(fresh, 704, 720)
        for at, out in zip(range(720, 760), outs, strict=True):
            torch.testing.assert_close(tokens.run(fresh, at, at + 1), out, atol=1e-4, rtol=1e-3)
        other.close()


def test_a_basis_larger_than_one_summary(daemon):
    geometry = Geometry(LAYERS, KV_HEADS, 256, "float32")
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(LAYERS, KV_HEADS, 700, 256, generator=generator)
    q = torch.randn(LAYERS, 2 * KV_HEADS, 700, 256, generator=generator)
    assert 2 * LAYERS * KV_HEADS * 256 * 256 * 4 == 3 << 20, "with the header, four parts"
    with connect(daemon().target) as client:
        with client.open("s", geometry, ROPE, OPTIONS) as session:
            for first, end in blocks([350], 700):
                for layer in range(LAYERS):
                    session.append(layer, k[layer, :, first:end], k[layer, :, first:end])
                    session.attend(layer, q[layer, :, first:end], 0.06)
        other = client.open("s", geometry, ROPE, OPTIONS)
        for name in ("to_y", "to_z", "centre"):
            assert torch.equal(getattr(other._routing.store.basis, name), getattr(session._routing.store.basis, name))


def test_the_basis_survives_a_kill_right_after_it_was_settled(daemon):
    running = daemon()
    tokens = Tokens(760)
    options = replace(OPTIONS, sketch_basis_tokens=2048, flush_chunks=1)
    with connect(running.target) as client:
        session = client.open("s", GEOMETRY, ROPE, options)
        # The last chunk is flushed before the first routed token settles the basis.
        for first, end in [*blocks([64], 704), (704, 724), (724, 725)]:
            tokens.run(session, first, end)
        store = session._routing.store
        running.kill()
        running.start()
        with connect(running.target) as other_client:
            other = other_client.open("s", GEOMETRY, ROPE, options)
            assert other.tokens == 704
            for name in ("to_y", "to_z", "centre"):
                assert torch.equal(getattr(other._routing.store.basis, name), getattr(store.basis, name))
            assert torch.equal(other._routing.store.packed(0, 11), store.packed(0, 11))
