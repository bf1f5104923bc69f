"""Sketches against loops over tokens and coordinates, and against what they stand for: the keys themselves."""

from __future__ import annotations

import math

import pytest
import torch
from hga_kvd_client.sketch import (
    FLOAT8,
    Basis,
    Moments,
    SketchSpec,
    encode,
    log_mass,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from sketch_bytes import reference_decode

CPU = torch.device("cpu")


def some(kv_heads, ratio, tokens, dim, seed):
    """q, k whose dims differ a lot in scale, around a mean, as real ones do."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.logspace(0, -1.5, dim)
    mix = torch.linalg.qr(torch.randn(dim, dim, generator=generator)).Q
    k = torch.randn(kv_heads, tokens, dim, generator=generator) * spread @ mix * 4
    k += 3 * torch.randn(kv_heads, 1, dim, generator=generator)
    q = torch.randn(kv_heads, ratio, tokens, dim, generator=generator) * spread.flip(0) * 2
    return q, k


def moments_of(q, k):
    moments = Moments(k.shape[0], k.shape[2], CPU)
    for first in range(0, k.shape[1], 50):
        moments.add(q[:, :, first : first + 50], k[:, first : first + 50])
    return moments


def reference_encoding_error(spec: SketchSpec, y: torch.Tensor, decoded: torch.Tensor) -> None:
    """y, decoded: [chunk_tokens, head_dim]. Every code is the nearest one, every mean is the mean, in float8."""
    block_tokens = spec.chunk_tokens // spec.blocks
    for block in range(spec.blocks):
        rows = slice(block * block_tokens, (block + 1) * block_tokens)
        for dim in range(spec.head_dim):
            values, got = y[rows, dim], decoded[rows, dim]
            mean = values.mean().to(FLOAT8).float()
            if dim >= spec.kept:
                assert (got == mean).all()
                continue
            bits = 4 if dim < spec.dims4 else 2
            largest = (values - mean).abs().max()
            step = (largest / (2 ** (bits - 1) - 0.5)).to(FLOAT8).float()
            levels = mean + step * (torch.arange(2**bits) - 2 ** (bits - 1) + 0.5)
            best = (values[:, None] - levels).abs().min(1).values
            torch.testing.assert_close((values - got).abs(), best, atol=1e-5 * float(largest + 1), rtol=1e-4)


shapes = st.tuples(
    st.integers(1, 3),  # kv_heads
    st.sampled_from([1, 2, 3, 7, 16]),  # ratio
    st.sampled_from([8, 12, 64, 80, 96, 128, 256]),  # head_dim
)


@settings(max_examples=25)
@given(
    shape=shapes,
    chunk=st.sampled_from([(64, 16), (32, 8), (16, 16), (8, 4)]),
    four=st.floats(0, 1),
    two=st.floats(0, 1),
    per_group=st.booleans(),
    seed=st.integers(0, 999),
)
def test_bytes_and_values_against_loops(shape, chunk, four, two, per_group, seed):
    kv_heads, ratio, dim = shape
    chunk_tokens, group_tokens = chunk
    dims4 = int(four * dim)
    dims2 = max(int(two * (dim - dims4)), 0 if dims4 else 1)
    spec = SketchSpec(dim, dims4, dims2, *chunk, blocks=chunk_tokens // group_tokens if per_group else 1)
    q, k = some(kv_heads, ratio, 2 * chunk_tokens, dim, seed)
    basis = Basis.of(moments_of(q, k))
    chunks = k.view(kv_heads, 2, chunk_tokens, dim).transpose(0, 1)
    records = encode(spec, basis, chunks)
    assert records.dtype == torch.uint8
    assert records.shape == (2, kv_heads, spec.chunk_bytes)
    decoded = torch.stack([torch.stack([reference_decode(spec, r) for r in chunk]) for chunk in records])
    y = chunks @ basis.to_y.transpose(1, 2) - basis.centre[:, None]
    reference_encoding_error(spec, y[1, 0], decoded[1, 0])

    z, offset = basis.project(q[:, :, 5] * 0.3)
    got = log_mass(spec, z, offset, records.transpose(0, 1))
    assert got.shape == (kv_heads, ratio, 2 * chunk_tokens // group_tokens)
    for h in range(kv_heads):
        for r in range(ratio):
            for g in range(got.shape[2]):
                tokens = decoded[:, h].reshape(-1, dim)[g * group_tokens : (g + 1) * group_tokens]
                scores = [float(z[h, r] @ token + z[h, r] @ basis.centre[h]) for token in tokens]
                top = max(scores)
                mass = top + math.log(sum(math.exp(s - top) for s in scores))
                assert float(got[h, r, g]) == pytest.approx(mass, rel=1e-3, abs=1e-2)


@settings(max_examples=25)
@given(shape=shapes, tokens=st.integers(1, 300), seed=st.integers(0, 999))
def test_a_basis_keeps_every_product(shape, tokens, seed):
    kv_heads, ratio, dim = shape
    q, k = some(kv_heads, ratio, tokens, dim, seed)
    basis = Basis.of(moments_of(q, k))
    y = k @ basis.to_y.transpose(1, 2) - basis.centre[:, None]
    z, offset = basis.project(q.flatten(1, 2))
    exact = q.flatten(1, 2).double() @ k.double().transpose(1, 2)
    got = torch.bmm(z, y.transpose(1, 2)) + offset[..., None]
    assert (got - exact).abs().max() <= 1e-3 * exact.abs().max() + 1e-4


def test_the_basis_is_the_one_of_the_design():
    q, k = some(2, 3, 400, 16, 1)
    basis = Basis.of(moments_of(q, k))
    for head in range(2):
        every_q, every_k = q[head].reshape(-1, 16).double(), k[head].double()
        s_q = every_q.T @ every_q / len(every_q)
        s_q += 1e-4 * s_q.trace() / 16 * torch.eye(16)
        y = (every_k @ basis.to_y[head].T.double()).T
        # Coordinates do not correlate, vary by one, and are ordered by how much they move scores.
        torch.testing.assert_close(torch.cov(y, correction=0), torch.eye(16).double(), atol=1e-4, rtol=0)
        z_moment = basis.to_z[head].double() @ s_q @ basis.to_z[head].T.double()
        shares = z_moment.diagonal()
        torch.testing.assert_close(z_moment, shares.diag(), atol=float(1e-4 * shares.max()), rtol=0)
        assert (shares[:-1] >= shares[1:]).all()
        torch.testing.assert_close(shares.sum(), (s_q @ torch.cov(every_k.T, correction=0)).trace(), atol=0, rtol=1e-4)


def test_leading_coordinates_beat_plain_bits():
    """On keys with structure the sketch is closer to the true mass than 2-bit keys of nearly twice the bytes."""
    q, k = some(2, 3, 1024, 64, 3)
    chunks = k.view(2, 16, 64, 64).transpose(0, 1)
    exact = (q[:, :, 900] / 8 @ k.transpose(1, 2)).view(2, 3, 64, 16).logsumexp(3)
    errors = []
    for spec, basis in (
        (SketchSpec.of_basis(64), Basis.of(moments_of(q, k))),
        (SketchSpec.plain(64), Basis.none(2, 64, CPU)),
    ):
        got = log_mass(spec, *basis.project(q[:, :, 900] / 8), encode(spec, basis, chunks).transpose(0, 1))
        errors.append(float((got - exact).square().mean().sqrt()))
    assert SketchSpec.of_basis(64).chunk_bytes == 864
    assert SketchSpec.plain(64).chunk_bytes == 1536
    assert errors[0] < 0.7 * errors[1]
    assert errors[0] < 0.1 * float(exact.std())


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e4])
def test_keys_that_do_not_vary(value):
    k = torch.full((1, 128, 16), value)
    q = torch.full((1, 2, 128, 16), value)
    basis = Basis.of(moments_of(q, k))
    spec = SketchSpec.of_basis(16)
    mass = log_mass(
        spec, *basis.project(q[:, :, 0]), encode(spec, basis, k.view(1, 2, 64, 16).transpose(0, 1)).transpose(0, 1)
    )
    assert mass.isfinite().all()
    torch.testing.assert_close(mass, torch.full_like(mass, math.log(16) + 16 * value**2), rtol=1e-3, atol=1e-3)


def test_outliers_saturate():
    spec = SketchSpec.plain(8)
    keys = torch.zeros(1, 1, 64, 8)
    keys[0, 0, 5] = 1e6
    decoded = reference_decode(spec, encode(spec, Basis.none(1, 8, CPU), keys)[0, 0])
    assert decoded.isfinite().all()
    assert (decoded[5] > 448).all()


def test_any_number_of_layers_at_once():
    q, k = some(2, 1, 128, 16, 5)
    one, two = Basis.of(moments_of(q, k)), Basis.of(moments_of(q, 2 * k))
    both = Basis(*(torch.stack(pair) for pair in zip(vars(one).values(), vars(two).values(), strict=True)))
    spec = SketchSpec.of_basis(16)
    chunks = k.view(2, 2, 64, 16).transpose(0, 1)
    got = encode(spec, both, torch.stack((chunks, 2 * chunks), 1))
    assert torch.equal(got[:, 0], encode(spec, one, chunks))
    assert torch.equal(got[:, 1], encode(spec, two, 2 * chunks))


def test_a_kind_names_basis_and_spec():
    q, k = some(1, 1, 64, 16, 0)
    basis, other = Basis.of(moments_of(q, k)), Basis.of(moments_of(q, k * 2))
    kinds = {b.kind(s) for b in (basis, other) for s in (SketchSpec.of_basis(16), SketchSpec(16, 2, 4))}
    assert len(kinds) == 4
    assert basis.kind(SketchSpec.of_basis(16)) == Basis.of(moments_of(q, k)).kind(SketchSpec.of_basis(16))
    assert all(len(kind) == len("sketch.v1:") + 8 for kind in kinds)
