"""Sessions on CUDA tensors: dense when every group is opened, and the same groups as on the CPU when routed."""

from __future__ import annotations

import pytest
import torch
from fake_connection import FakeConnection
from hga_kvd_client import Geometry, SessionOptions
from hga_kvd_client.client import Client
from sequences import GEOMETRY, KV_HEADS, ROPE, Tokens, blocks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def on_gpu(tokens: Tokens) -> Tokens:
    tokens.q, tokens.k, tokens.v = tokens.q.cuda(), tokens.k.cuda(), tokens.v.cuda()
    return tokens


@pytest.mark.parametrize("bank_groups", [5, 128])
def test_every_group_opened_is_dense_attention(bank_groups):
    options = SessionOptions(router="all", recent_chunks=2, flush_chunks=2, bank_groups=bank_groups)
    session = Client(FakeConnection()).open("s", GEOMETRY, ROPE, options, device="cuda")
    tokens = on_gpu(Tokens(400))
    for first, end in blocks([1, 7, 64, 1, 100], 400):
        assert (tokens.run(session, first, end) - tokens.dense(first, end)).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_routes_as_on_the_cpu_and_resumes(dtype):
    options = SessionOptions(
        router="hga", topk_chunks=3, topk_groups=4, sink_chunks=1, recent_chunks=2, flush_chunks=2, bank_groups=8
    )
    geometry = Geometry(GEOMETRY.layers, KV_HEADS, GEOMETRY.head_dim, dtype)
    connection = FakeConnection()
    kind = getattr(torch, dtype)
    cpu, gpu = Tokens(900, dtype=kind), on_gpu(Tokens(900, dtype=kind))
    sessions = [Client(connection).open(device, geometry, ROPE, options, device=device) for device in ("cpu", "cuda")]
    for first, end in [*blocks([200], 800), *((t, t + 1) for t in range(800, 880))]:
        mine, theirs = cpu.run(sessions[0], first, end), gpu.run(sessions[1], first, end)
        assert theirs.device.type == "cuda"
        assert (mine - theirs.cpu()).abs().max() < (1e-4 if dtype == "float32" else 3e-2)
        if end - first == 1:
            for layer in range(geometry.layers):
                assert torch.equal(sessions[0].opened(layer), sessions[1].opened(layer).cpu())
    sessions[1].flush()
    resumed = Client(connection).open("cuda", geometry, ROPE, options, device="cuda")
    assert resumed.tokens == 832
    for first, end in [(832, 880), (880, 881)]:
        resumed_out = gpu.run(resumed, first, end)
    assert torch.equal(resumed_out, gpu.run(sessions[1], 880, 881))
    assert sessions[1].resident_bytes() > 0
