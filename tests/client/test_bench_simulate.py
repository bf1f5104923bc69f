"""The simulation of bench/quality.py opens and attends as a Session does that gets the tokens one by one."""

from types import SimpleNamespace

import pytest
import torch
from fake_connection import FakeConnection
from hga_kvd_client import SessionOptions
from hga_kvd_client.client import Client
from hga_kvd_client.sketch import SketchSpec
from sequences import DIM, GEOMETRY, LAYERS, RATIO, ROPE, SCALE, Tokens
from simulate import Row, Simulation, hga_rule, oracle_rule, sketch_rule

START, COUNT = 512, 704
SINKS, RECENT = 1, 2


def simulated(tokens, row):
    """Attention of tokens START and on under the row, [layers, heads, tokens, dim], and what was opened and routable."""
    model = SimpleNamespace(set_attn_implementation=lambda name: None)
    simulation = Simulation(model, START, SINKS, RECENT)
    simulation._row = row
    outs = []
    for layer in range(LAYERS):
        q, k, v = tokens.q[layer], tokens.k[layer], tokens.v[layer]
        prompt = q[:, :START].view(k.shape[0], RATIO, START, DIM), k[:, :START], v[:, :START]
        simulation._prompt[layer] = prompt
        module = SimpleNamespace(layer_idx=layer)
        out, _ = simulation._attention(module, q[None, :, START:], k[None, :, START:], v[None, :, START:], None, SCALE)
        outs.append(out[0].transpose(0, 1))
    return torch.stack(outs), int(simulation.opened), int(simulation.routable)


@pytest.mark.parametrize(
    ("options", "row"),
    [
        ({"router": "hga", "topk_chunks": 3, "topk_groups": 2}, Row("hga", hga_rule(ROPE, 3, 2, SCALE))),
        (
            {"router": "hga", "topk_chunks": 3, "topk_groups": 2, "pooled": True},
            Row("pooled", hga_rule(ROPE, 3, 2, SCALE, pooled=True)),
        ),
        (
            {"router": "sketch", "sketch_groups": 3, "sketch_basis_tokens": 512},
            Row("sketch", sketch_rule(SketchSpec.of_basis(DIM), 3, 512)),
        ),
        ({"router": "all", "kv_dtype": "fp8"}, Row("dense", None, dense=True, kv_float8=True)),
        (
            {"router": "sketch", "sketch_groups": 3, "sketch_basis_tokens": 512, "kv_dtype": "fp8"},
            Row("sketch", sketch_rule(SketchSpec.of_basis(DIM), 3, 512), kv_float8=True),
        ),
    ],
)
def test_as_a_session_that_gets_the_tokens_one_by_one(options, row):
    tokens = Tokens(COUNT)
    out, opened, routable = simulated(tokens, row)
    session = Client(FakeConnection()).open(
        None, GEOMETRY, ROPE, SessionOptions(**options, sink_chunks=SINKS, recent_chunks=RECENT, flush_chunks=1)
    )
    for first in range(0, START, 128):
        tokens.run(session, first, first + 128)
    expected = torch.cat([tokens.run(session, token, token + 1) for token in range(START, COUNT)], 2)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    assert (session.stats.opened_groups, session.stats.routable_groups) == (opened, routable)


def test_what_opens_everything_is_dense():
    tokens = Tokens(COUNT)
    expected = tokens.dense(START, COUNT)
    for rule in (oracle_rule(10**6), hga_rule(ROPE, 10**6, 10**6, SCALE, own=True)):
        out, opened, routable = simulated(tokens, Row("all", rule))
        assert opened == routable > 0
        torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)


def test_own_opens_what_hga_does_and_sees_less():
    tokens = Tokens(COUNT)
    shared, opened, _ = simulated(tokens, Row("hga", hga_rule(ROPE, 3, 2, SCALE)))
    own, same, _ = simulated(tokens, Row("own", hga_rule(ROPE, 3, 2, SCALE, own=True)))
    assert opened == same
    dense = tokens.dense(START, COUNT)
    assert (own - dense).square().mean() > 1.05 * (shared - dense).square().mean()


def test_fp8_rounds_what_is_in_closed_chunks():
    tokens = Tokens(COUNT)
    out, _, _ = simulated(tokens, Row("dense", None, dense=True, kv_float8=True))
    apart = (out - tokens.dense(START, COUNT)).abs()
    assert 0 < apart.mean() < 0.03
    # The first token of a chunk in a window of nothing but itself would be exact: its own K and V are not rounded.
    alone = Tokens(COUNT)
    alone.k[:, :, :START] = 0
    alone.q[:, :, START] = alone.k[:, :, START].repeat_interleave(RATIO, 1) * 100
    out, _, _ = simulated(alone, Row("dense", None, dense=True, kv_float8=True))
    torch.testing.assert_close(out[:, :, 0], alone.v[:, :, START].repeat_interleave(RATIO, 1), rtol=1e-5, atol=1e-5)
