"""Sessions that decode with the device's step: here on the CPU, with the twins, beside a session without it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fake_connection import FakeConnection
from hga_kvd_client import SessionOptions, device_attending, errors
from hga_kvd_client.client import Client
from sequences import GEOMETRY, LAYERS, ROPE, Tokens, blocks

pytest.importorskip("triton", reason="the extra `client` brings triton where it exists")

OPTIONS = SessionOptions(
    router="hga",
    sketch_groups=6,
    sketch_basis_tokens=200,
    topk_chunks=3,
    topk_groups=4,
    sink_chunks=1,
    recent_chunks=2,
    flush_chunks=2,
    bank_groups=16,
)


@pytest.fixture
def _on_cpu(monkeypatch):
    monkeypatch.setattr(device_attending, "STEP_DEVICES", {"cpu", "cuda"})


def pair(monkeypatch, router="hga", kv_dtype="model"):
    """The same session twice: decoding with the step, and without."""
    options = replace(OPTIONS, router=router, kv_dtype=kv_dtype)
    sessions = [Client(FakeConnection()).open("s", GEOMETRY, ROPE, options) for _ in range(2)]
    plain = sessions[1]
    monkeypatch.setattr(plain._attending.on_device, "takes", lambda *_: False)
    return sessions


@pytest.mark.usefixtures("_on_cpu")
@pytest.mark.parametrize("why", ["bank", "rows"])
def test_what_kernels_cannot_search_or_move_is_decoded_without_them(why):
    options = replace(OPTIONS, bank_groups=513 if why == "bank" else 16)
    session, tokens = Client(FakeConnection()).open("s", GEOMETRY, ROPE, options), Tokens(701)
    if why == "rows":
        session._attending.on_device._row_bytes = 12
    for first, end in blocks([250, 250, 200, 1], 701):
        tokens.run(session, first, end)
    assert session._attending.on_device.step is None
    assert session.stats.opened_groups > 0


@pytest.mark.usefixtures("_on_cpu")
@pytest.mark.parametrize(("router", "kv_dtype"), [("hga", "model"), ("sketch", "model"), ("hga", "fp8")])
def test_decodes_as_without_it_also_after_going_back(monkeypatch, router, kv_dtype):
    sessions, tokens = pair(monkeypatch, router, kv_dtype), Tokens(900)

    def run(first, end):
        for start, stop in blocks([1], end) if first == 0 else ((t, t + 1) for t in range(first, end)):
            mine, theirs = (tokens.run(s, start, stop) for s in sessions)
            assert (mine - theirs).abs().max() < 1e-4
            for layer in range(LAYERS):
                assert torch.equal(*(s.opened(layer) for s in sessions))

    for one in sessions:
        for first, end in blocks([250], 700):
            tokens.run(one, first, end)
    run(700, 750)
    assert sessions[0]._attending.on_device.step is not None
    assert not sessions[0]._attending.banks
    for name in ("opened_groups", "routable_groups", "bank_bytes", "decode_steps", "ram_bytes", "nvme_bytes"):
        assert getattr(sessions[0].stats, name) == getattr(sessions[1].stats, name), name
    for one in sessions:
        one.truncate(560)
    run(560, 600)


@pytest.mark.usefixtures("_on_cpu")
def test_a_failed_fetch_is_made_again_as_a_whole(monkeypatch):
    (one, plain), tokens = pair(monkeypatch), Tokens(900)
    for each in (one, plain):
        tokens.run(each, 0, 700)
        for token in range(700, 720):
            tokens.run(each, token, token + 1)
    tokens.q[0, :, 720] = 9.0  # another direction: something is missing
    connection = one._stored.connection
    fetch, connection.fetch = connection.fetch, None
    with pytest.raises(TypeError):
        tokens.run(one, 720, 721)
    connection.fetch = fetch
    one.drop_block()
    assert (tokens.run(one, 720, 721) - tokens.run(plain, 720, 721)).abs().max() < 1e-4


@pytest.mark.usefixtures("_on_cpu")
def test_damage_is_never_attended(monkeypatch):
    (one, _), tokens = pair(monkeypatch), Tokens(900)
    tokens.run(one, 0, 700)
    connection = one._stored.connection
    connection.damaged = {(1, head, group) for head in range(GEOMETRY.kv_heads) for group in range(40)}
    for _ in range(2):
        with pytest.raises(errors.RecordsDamaged):
            tokens.run(one, 700, 701)
        one.drop_block()
    connection.damaged = set()
    assert tokens.run(one, 700, 701).isfinite().all()


@pytest.mark.usefixtures("_on_cpu")
def test_what_does_not_fit_in_the_bank_is_decoded_without_it():
    options = SessionOptions(router="hga", topk_chunks=3, topk_groups=4, sink_chunks=1, recent_chunks=2, flush_chunks=2,
                             bank_groups=8)  # fmt: skip
    one, tokens = Client(FakeConnection()).open("s", GEOMETRY, ROPE, options), Tokens(720)
    for first, end in blocks([700, 1, 1], 702):
        tokens.run(one, first, end)
    assert one._attending.on_device.step is None
