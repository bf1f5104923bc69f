"""Sessions that store K and V in 8 bits: what is stored, who sees what, and that it is the same after a restart.

That a session attends to rounded K and V as told is in test_bench_simulate.py, against masks over all keys.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from fake_connection import FakeConnection, FakeDaemon
from hga_kvd_client import SessionOptions, connect
from hga_kvd_client.client import Client
from hga_kvd_client.errors import GeometryMismatch
from hga_kvd_client.float8 import pack, unpack
from hga_kvd_client.keys import record_keys
from sequences import DIM, GEOMETRY, KV_HEADS, LAYERS, ROPE, Tokens, blocks

OPTIONS = SessionOptions(
    router="hga", topk_chunks=3, topk_groups=4, sink_chunks=1, recent_chunks=2, flush_chunks=2, kv_dtype="fp8"
)


def open_session(daemon, name="s", options=OPTIONS, geometry=GEOMETRY):
    return Client(FakeConnection(daemon)).open(name, geometry, ROPE, options)


def test_records_are_a_byte_a_value():
    daemon, tokens = FakeDaemon(), Tokens(500)
    session = open_session(daemon)
    for first, end in blocks([100, 1, 37], 500):
        tokens.run(session, first, end)
    assert session.geometry.record_bytes == 2 * 16 * DIM
    assert session.full_bytes() == 500 * LAYERS * 2 * KV_HEADS * DIM * 4
    for layer, head, group in ((0, 0, 0), (2, 1, 17), (1, 0, 23)):
        stored = session._stored.fetch(record_keys(layer, np.array([head]), np.array([group]))).records
        span = slice(16 * group, 16 * group + 16)
        both = torch.stack((tokens.k[layer, head, span], tokens.v[layer, head, span])).flatten(1)
        assert stored.tobytes() == pack(both).numpy().tobytes()


def test_the_window_is_rounded_when_a_chunk_closes():
    tokens = Tokens(200)
    session = open_session(FakeDaemon())
    tokens.run(session, 0, 190)
    assert torch.equal(session._window.layer(1, 190)[0], tokens.k[1, :, :190])
    tokens.run(session, 190, 191)
    k = session._window.layer(1, 191)[0]
    assert torch.equal(k[:, 128:], tokens.k[1, :, 128:191])
    records = tokens.k[1, :, :128].reshape(KV_HEADS, 8, -1)
    assert torch.equal(k[:, :128], unpack(pack(records), torch.float32).view(KV_HEADS, 128, DIM))


@pytest.mark.parametrize("router", ["hga", "sketch"])
def test_taken_up_it_goes_on_as_the_one_that_never_stopped(router):
    options = replace(OPTIONS, router=router, sketch_basis_tokens=512, sketch_groups=3)
    daemon, tokens = FakeDaemon(), Tokens(800)
    session = open_session(daemon, options=options)
    for first, end in [*blocks([128], 640), *((t, t + 1) for t in range(640, 704))]:
        tokens.run(session, first, end)
    session.flush()
    other = open_session(daemon, options=options)
    assert other.tokens == 704
    for token in range(704, 780):
        # Each decodes from what the daemon had at the flush.
        mine = tokens.run(other, token, token + 1)
        if token == 704:
            alone = FakeDaemon()
            alone.sessions = {1: {**next(iter(daemon.sessions.values()))}}
            alone.sessions[1]["chunks"] = list(alone.sessions[1]["chunks"])
            session._stored.connection, session._stored._session_id = FakeConnection(alone), 1
        assert torch.equal(tokens.run(session, token, token + 1), mine)


def test_a_daemon_that_lost_chunks_gets_them_again_as_they_were():
    daemon, tokens = FakeDaemon(), Tokens(800)
    session, whole = open_session(daemon), open_session(FakeDaemon())
    for first, end in [*blocks([128], 640), *((t, t + 1) for t in range(640, 800))]:
        if first == 720:
            daemon.restart(keep=lambda durable: durable)
        out = tokens.run(session, first, end)
        assert torch.equal(out, tokens.run(whole, first, end))
    assert session.stats.recoveries == 1


def test_what_is_rounded_is_not_shared_with_what_is_not():
    daemon = FakeDaemon()
    fp8, exact = open_session(daemon, "a"), open_session(daemon, "b", replace(OPTIONS, kv_dtype="model"))
    assert fp8.geometry.dtype == "float8_e4m3fn"
    assert fp8.geometry.model_fingerprint != exact.geometry.model_fingerprint
    other = open_session(daemon, "c", geometry=replace(GEOMETRY, model_fingerprint="another"))
    assert len({s.geometry for s in (fp8, exact, other)}) == 3


def test_through_a_real_daemon_also_after_a_kill(daemon):
    running, tokens = daemon(), Tokens(760)
    options = replace(OPTIONS, router="sketch", sketch_basis_tokens=256, sketch_groups=3)
    with connect(running.target) as client:
        session = client.open("s", GEOMETRY, ROPE, options)
        for first, end in blocks([352], 704):
            tokens.run(session, first, end)
        tokens.run(session, 704, 705)
        session.flush()
        outs = [tokens.run(session, at, at + 1) for at in range(705, 720)]
        assert session.stats.nvme_bytes + session.stats.ram_bytes > 0
        running.kill()
    running.start()
    with connect(running.target) as client:
        other = client.open("s", GEOMETRY, ROPE, options)
        assert other.tokens == 704
        tokens.run(other, 704, 705)
        for at, out in zip(range(705, 720), outs, strict=True):
            assert torch.equal(tokens.run(other, at, at + 1), out)
        with pytest.raises(GeometryMismatch):
            client.open("s", GEOMETRY, ROPE, replace(options, kv_dtype="model"))
