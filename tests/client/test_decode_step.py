"""The decode step against the plain functions it stands for: route_sketch or route_hga, then decode_attention.

On the GPU with its kernels and graphs; elsewhere with the twins, and once with the kernels in Triton's interpreter.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hga_kvd_client.attention import decode_attention, window_scores
from hga_kvd_client.geometry import Geometry
from hga_kvd_client.routing import route_hga, route_sketch
from hga_kvd_client.sketch import Basis, Moments, SketchSpec, encode, log_mass

pytest.importorskip("triton", reason="the extra `client` brings triton where it exists")

from hga_kvd_client.decode_step import KERNELS, TWINS, DecodeStep, HgaState, SketchState

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KV_HEADS, RATIO, DIM, CHUNKS, SCALE = 2, 3, 32, 40, 32**-0.5
GEOMETRY = Geometry(2, KV_HEADS, DIM, "float32")
SINKS, WINDOW = 2, 200


class Stored:
    """A random sequence: its records by (layer, kv_head, group), windows, routing states and queries that drift."""

    def __init__(self, router: str, budget: int, cover: float = 1.0) -> None:
        self.cover = cover
        generator = torch.Generator().manual_seed(0)
        shape = (GEOMETRY.layers, KV_HEADS, CHUNKS * 64, DIM)
        self.k = torch.randn(shape, generator=generator) * torch.linspace(2, 0.2, DIM)
        self.v = torch.randn(shape, generator=generator)
        self.window = torch.randn(GEOMETRY.layers, 2, KV_HEADS, WINDOW, DIM, generator=generator).to(DEVICE)
        groups = CHUNKS * 4
        both = torch.stack((self.k, self.v), 3).view(GEOMETRY.layers, KV_HEADS, groups, 16, 2, DIM)
        self.records = both.transpose(3, 4).contiguous()  # [layers, kv_heads, groups, 2, 16, dim]
        self.states = [self._state(layer, router, budget) for layer in range(GEOMETRY.layers)]
        self.generator = generator
        self.q = torch.randn(GEOMETRY.layers, KV_HEADS, RATIO, DIM, generator=generator)

    def drift(self) -> None:
        self.q = 0.9 * self.q + 0.45 * torch.randn(self.q.shape, generator=self.generator)

    def _state(self, layer: int, router: str, budget: int) -> SketchState | HgaState:
        chunks = self.k[layer].view(KV_HEADS, CHUNKS, 64, DIM)
        if router == "hga":
            means = chunks.view(KV_HEADS, CHUNKS, 4, 16, DIM).mean(3)
            means[:, -3:] = torch.nan  # not there yet
            return HgaState(means.mean(2).to(DEVICE), means.to(DEVICE), 5, 4)
        spec = SketchSpec.of_basis(DIM)
        moments = Moments(KV_HEADS, DIM, torch.device("cpu"))
        moments.add(torch.randn(KV_HEADS, RATIO, 600, DIM), self.k[layer])
        basis = Basis.of(moments)
        records = torch.stack([encode(spec, basis, part) for part in chunks.unbind(1)], 1)
        return SketchState(spec, basis.to_z.to(DEVICE), basis.centre.to(DEVICE), records.to(DEVICE), budget, self.cover)

    def mask(self, layer: int, window_tokens: int, first: int, end: int) -> torch.Tensor:
        state, q = self.states[layer], self.q[layer].to(DEVICE)
        if isinstance(state, HgaState):
            return route_hga(q, state.chunks[:, first:end], state.groups[:, first:end], 5, 4)
        z = torch.bmm(q * SCALE, state.to_z.transpose(1, 2))
        estimated = log_mass(state.spec, z, (z * state.centre[:, None]).sum(2), state.records[:, first:end])
        near = window_scores(q, self.window[layer, 0, :, :window_tokens], SCALE).logsumexp(2)
        everything = torch.logaddexp(estimated.logsumexp(2), near)
        self.mass = (estimated - everything[..., None]).exp().sum(1)
        return route_sketch(estimated, near, state.budget, state.cover)

    def fetch(self, keys: np.ndarray, into: np.ndarray) -> np.ndarray:
        found = self.records[keys["layer"].astype(int), keys["kv_head"].astype(int), keys["group"].astype(int)]
        into[: found.nbytes] = found.reshape(-1).view(torch.uint8).numpy()
        return into[: found.nbytes].reshape(len(keys), GEOMETRY.record_bytes)


def run(router: str, calls, steps: int, slots: int, registered: bool = True, cover: float = 1.0) -> list[int]:
    budget = 12
    stored = Stored(router, budget, cover)
    most = budget if router == "sketch" else RATIO * 4
    step = DecodeStep(GEOMETRY, RATIO, slots, most, WINDOW, torch.float32, DEVICE, calls)
    landing = np.zeros(64 * GEOMETRY.record_bytes, np.uint8)
    if registered:
        step.register(landing)
    last, end, misses, total = [set() for _ in range(GEOMETRY.layers)], 30, 0, 0
    how_many = []
    for token in range(steps):
        window_tokens = 150 + token
        end += token % 4 == 3
        stored.drift()
        step.begin(token, stored.window, stored.states, SCALE, window_tokens, SINKS * 4, (end - SINKS) * 4)
        for layer in range(GEOMETRY.layers):
            k, v = stored.window[layer]
            # The token's own K and V, every other time from elsewhere.
            given = [t[:, window_tokens - 1 : window_tokens].clone() for t in (k, v)] if token % 2 else []
            for t in (k, v) if given else ():
                t[:, window_tokens - 1] = torch.nan
            step.start(layer, stored.q[layer].to(DEVICE), *given)
            keys = step.misses(layer)
            if len(keys):  # before anything else is asked of the device
                step.land(layer, stored.fetch(keys, landing))
            groups, counts = step.opened(layer)
            opened = {(h, g) for h in range(KV_HEADS) for g in groups[h, : counts[h]].tolist()}
            plain = stored.mask(layer, window_tokens, SINKS, end)
            differ = opened ^ {(h, g + SINKS * 4) for h, g in plain.nonzero().tolist()}
            # The kernel rounds the query to float16: the last of the budget may be another of nearly the same mass.
            assert not differ or (router == "sketch" and calls is KERNELS and len(differ) <= 2)
            assert len(opened) == plain.sum() or (cover < 1 and len(differ) == 1)
            mask = torch.zeros_like(plain)
            for head, group in opened:
                mask[head, group - SINKS * 4] = True
            for head, group in differ:
                assert abs(stored.mass[head, group - SINKS * 4] / stored.mass[mask].min() - 1) < 0.01
            assert step.opened_count(layer) == len(opened)
            how_many.append(len(opened))
            missing = set(zip(keys["kv_head"].tolist(), keys["group"].tolist(), strict=True))
            assert missing <= opened
            assert not missing & last[layer], "what was opened a step ago is in the bank"
            last[layer], misses, total = opened, misses + len(missing), total + len(opened)
            width = int(mask.sum(1).max())
            padded, valid = torch.zeros(KV_HEADS, width, 2, 16, DIM), torch.zeros(KV_HEADS, width, dtype=torch.bool)
            for head in range(KV_HEADS):
                chosen = mask[head].nonzero().squeeze(1).cpu() + SINKS * 4
                padded[head, : len(chosen)], valid[head, : len(chosen)] = stored.records[layer, head, chosen], True
            opened_k, opened_v = padded.transpose(1, 2).flatten(2, 3).unbind(1)
            near = (t[:, :window_tokens].cpu() for t in (k, v))
            expected = decode_attention(stored.q[layer], *near, SCALE, opened_k, opened_v, valid)
            assert (step.result().cpu().view(KV_HEADS, RATIO, DIM) - expected).abs().max() < 1e-4
    assert 0 < misses < total
    return how_many


@pytest.mark.parametrize("router", ["sketch", "hga"])
@pytest.mark.parametrize("registered", [True, False])
def test_step_opens_and_attends_as_the_plain_functions_do(router, registered):
    run(router, KERNELS if DEVICE.type == "cuda" else TWINS, steps=12, slots=16, registered=registered)


@pytest.mark.parametrize("router", ["sketch", "hga"])
def test_step_with_the_kernels(router):
    run(router, KERNELS, steps=3, slots=16)


@pytest.mark.parametrize("calls", [KERNELS] if DEVICE.type == "cuda" else [KERNELS, TWINS])
def test_step_that_opens_no_more_than_covers(calls):
    counts = run("sketch", calls, steps=3, slots=16, cover=0.12)
    assert 0 < min(counts) < 12, "less than the budget is opened"
    assert len(set(counts)) > 1


def test_a_fetch_that_failed_leaves_nothing_that_could_be_attended():
    stored = Stored("sketch", 12)
    step = DecodeStep(GEOMETRY, RATIO, 16, 12, WINDOW, torch.float32, DEVICE)
    wanted = []
    for token in range(3):
        step.begin(token, stored.window, stored.states, SCALE, 150, SINKS * 4, 100)
        step.start(0, stored.q[0].to(DEVICE))
        wanted.append(step.misses(0).copy())
        step.abandon(0)
    assert len(wanted[0]) == 12
    assert all(np.array_equal(np.sort(w), np.sort(wanted[0])) for w in wanted)


def test_what_is_opened_must_fit_in_the_bank():
    with pytest.raises(AssertionError, match="fit in the bank"):
        DecodeStep(GEOMETRY, RATIO, 16, 17, WINDOW, torch.float32, DEVICE)
