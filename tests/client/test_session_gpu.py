"""Sessions on CUDA tensors, with the device's step and without: exact over what they open, whatever happens meanwhile."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fake_connection import FakeConnection
from hga_kvd_client import Geometry, SessionOptions, connect, errors
from hga_kvd_client.client import Client
from sequences import GEOMETRY, KV_HEADS, LAYERS, RATIO, ROPE, SCALE, Tokens, blocks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

OPTIONS = SessionOptions(
    router="sketch",
    sketch_groups=6,
    sketch_basis_tokens=256,
    topk_chunks=3,
    topk_groups=4,
    sink_chunks=1,
    recent_chunks=2,
    flush_chunks=2,
    bank_groups=64,
)
PLACES = (("mine", "cpu"), ("theirs", "cuda"))
TOLERANCE = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 3e-2}


def on_gpu(count: int, seed: int = 0, dtype: str = "float32") -> Tokens:
    tokens = Tokens(count, seed, getattr(torch, dtype))
    tokens.q, tokens.k, tokens.v = tokens.q.cuda(), tokens.k.cuda(), tokens.v.cuda()
    return tokens


def over_what_is_open(session, tokens: Tokens, token: int) -> torch.Tensor:
    """Attention of one token to its window and to what the session says it opened: [layers, heads, 1, dim], float64."""
    at = torch.arange(token + 1, device="cuda")
    window = (at < session.options.sink_chunks * 64) | (at >= session._window.tail_first)
    outs = []
    for layer in range(LAYERS):
        opened = session.opened(layer).repeat_interleave(16, 1)
        seen = window.expand(KV_HEADS, -1).clone()
        seen[:, : opened.shape[1]] |= opened[:, : token + 1]
        k, v = (t[layer, :, : token + 1].double().repeat_interleave(RATIO, 0) for t in (tokens.k, tokens.v))
        mask = seen.repeat_interleave(RATIO, 0)[:, None]
        q = tokens.q[layer, :, token : token + 1].double()
        outs.append(torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=SCALE))
    return torch.stack(outs)


def decode(session, tokens: Tokens, first: int, end: int, tolerance: float) -> None:
    """Token by token, each exact over what it opened; earlier results stay what they were."""
    kept = []
    for token in range(first, end):
        out = tokens.run(session, token, token + 1)
        expected = over_what_is_open(session, tokens, token)
        assert (out.double() - expected).abs().max() < tolerance, f"token {token}"
        kept.append((out, expected))
    assert all((out.double() - expected).abs().max() < tolerance for out, expected in kept)


def prompt(session, tokens: Tokens, end: int) -> None:
    for first, stop in blocks([300], end):
        tokens.run(session, first, stop)


@pytest.mark.parametrize("bank_groups", [5, 128])
def test_every_group_opened_is_dense_attention(bank_groups):
    options = SessionOptions(router="all", recent_chunks=2, flush_chunks=2, bank_groups=bank_groups)
    session = Client(FakeConnection()).open("s", GEOMETRY, ROPE, options, device="cuda")
    tokens = on_gpu(400)
    for first, end in blocks([1, 7, 64, 1, 100], 400):
        assert (tokens.run(session, first, end) - tokens.dense(first, end)).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bank_groups", [8, 64], ids=["plain", "step"])
def test_routes_as_on_the_cpu_and_resumes(dtype, bank_groups):
    options = replace(OPTIONS, router="hga", bank_groups=bank_groups)
    geometry = Geometry(LAYERS, KV_HEADS, GEOMETRY.head_dim, dtype)
    connection = FakeConnection()
    cpu, gpu = Tokens(900, dtype=getattr(torch, dtype)), on_gpu(900, dtype=dtype)
    sessions = [Client(connection).open(name, geometry, ROPE, options, device=d) for name, d in PLACES]
    for first, end in [*blocks([200], 800), *((t, t + 1) for t in range(800, 880))]:
        mine, theirs = cpu.run(sessions[0], first, end), gpu.run(sessions[1], first, end)
        assert theirs.device.type == "cuda"
        assert (mine - theirs.cpu()).abs().max() < (1e-4 if dtype == "float32" else 3e-2)
        if end - first == 1:
            for layer in range(geometry.layers):
                assert torch.equal(sessions[0].opened(layer), sessions[1].opened(layer).cpu())
    assert (sessions[1]._attending.on_device.step is not None) == (bank_groups == 64)
    sessions[1].flush()
    resumed = Client(connection).open("theirs", geometry, ROPE, options, device="cuda")
    assert resumed.tokens == 832
    for first, end in [(832, 880), (880, 881)]:
        resumed_out = gpu.run(resumed, first, end)
    assert torch.equal(resumed_out, gpu.run(sessions[1], 880, 881))
    assert sessions[1].resident_bytes() > 0


@pytest.mark.parametrize("bank_groups", [16, 128])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("router", ["sketch", "hga"])
def test_steps_are_exact_also_after_going_back_and_branching(router, dtype, bank_groups):
    options = replace(OPTIONS, router=router, bank_groups=bank_groups)
    geometry = Geometry(LAYERS, KV_HEADS, GEOMETRY.head_dim, dtype)
    session = Client(FakeConnection()).open("s", geometry, ROPE, options, device="cuda")
    tokens, tolerance = on_gpu(1000, dtype=dtype), TOLERANCE[dtype]
    prompt(session, tokens, 700)
    decode(session, tokens, 700, 780, tolerance)  # two chunks are closed on the way
    assert session._attending.on_device.step is not None
    assert not session._attending.banks
    assert 0 < session.stats.bank_bytes < session.stats.opened_groups * geometry.record_bytes
    session.truncate(770)  # the open chunk
    decode(session, tokens, 770, 775, tolerance)
    other = session.fork()
    session.truncate(600)  # closed chunks
    others = on_gpu(1000, seed=1, dtype=dtype)
    for name in ("q", "k", "v"):  # the same prompt, another future
        getattr(others, name)[:, :, :775] = getattr(tokens, name)[:, :, :775]
    for first in range(0, 20, 5):
        decode(session, tokens, 600 + first, 605 + first, tolerance)
        decode(other, others, 775 + first, 780 + first, tolerance)
    tokens.run(session, 620, 700)
    decode(session, tokens, 700, 705, tolerance)


def test_sketches_open_what_they_open_on_the_cpu():
    """But for the query's rounding to float16: the last of the budget may be another of the same mass."""
    connection = FakeConnection()
    sessions = [Client(connection).open(name, GEOMETRY, ROPE, OPTIONS, device=d) for name, d in PLACES]
    cpu, gpu = Tokens(900), on_gpu(900)
    for session, tokens in zip(sessions, (cpu, gpu), strict=True):
        prompt(session, tokens, 800)
    differ = 0
    for token in range(800, 840):
        cpu.run(sessions[0], token, token + 1)
        gpu.run(sessions[1], token, token + 1)
        for layer in range(LAYERS):
            mine, theirs = sessions[0].opened(layer), sessions[1].opened(layer).cpu()
            assert mine.sum() == theirs.sum() == 6 * KV_HEADS
            assert (mine ^ theirs).sum() <= 2
            differ += int((mine ^ theirs).sum()) // 2
    assert differ < 0.01 * 40 * LAYERS * 6 * KV_HEADS


@pytest.mark.parametrize("notice", [True, False], ids=["between", "within"])
def test_a_daemon_that_is_replaced_between_or_within_steps(notice):
    """Within: the device waits for records while the session is found again, and chunks are appended from its window."""
    connection = FakeConnection()
    daemon = connection.daemon
    session = Client(connection).open("s", GEOMETRY, ROPE, replace(OPTIONS, bank_groups=16), device="cuda")
    tokens = on_gpu(1000)
    prompt(session, tokens, 700)
    for first in range(700, 760, 20):
        decode(session, tokens, first, first + 19, 1e-4)
        daemon.restart(lambda durable: durable - 1)
        daemon.sessions = {number + 10: stored for number, stored in daemon.sessions.items()}
        if notice:
            connection.notice_replacement()
        tokens.q[:, :, first + 19] *= -1  # asks for what is not in the bank
        fetches, recoveries = session.stats.fetches, session.stats.recoveries
        decode(session, tokens, first + 19, first + 20, 1e-4)
        assert session.stats.fetches > fetches
        assert session.stats.recoveries == recoveries + 1


def test_records_in_8_bits_are_attended_as_on_the_cpu():
    options = replace(OPTIONS, router="hga", kv_dtype="fp8", bank_groups=16)
    geometry = Geometry(LAYERS, KV_HEADS, GEOMETRY.head_dim, "float16")
    connection = FakeConnection()
    sessions = [Client(connection).open(name, geometry, ROPE, options, device=d) for name, d in PLACES]
    cpu, gpu = Tokens(900, dtype=torch.float16), on_gpu(900, dtype="float16")
    for session, tokens in zip(sessions, (cpu, gpu), strict=True):
        prompt(session, tokens, 700)
    for token in range(700, 780):
        mine, theirs = cpu.run(sessions[0], token, token + 1), gpu.run(sessions[1], token, token + 1)
        assert (mine - theirs.cpu()).abs().max() < 1e-2
    assert sessions[1]._attending.on_device.step is not None


def test_a_fetch_that_fails_is_made_again_and_damage_is_never_attended():
    connection = FakeConnection()
    session = Client(connection).open("s", GEOMETRY, ROPE, OPTIONS, device="cuda")
    tokens = on_gpu(900)
    prompt(session, tokens, 700)
    decode(session, tokens, 700, 710, 1e-4)
    tokens.q[1, :, 710] *= -1
    fetch, connection.fetch = connection.fetch, None
    with pytest.raises(TypeError):
        tokens.run(session, 710, 711)
    connection.fetch = fetch
    session.drop_block()
    connection.damaged = {(1, head, group) for head in range(KV_HEADS) for group in range(40)}
    for _ in range(2):
        with pytest.raises(errors.RecordsDamaged):
            tokens.run(session, 710, 711)
        session.drop_block()
    connection.damaged = set()
    decode(session, tokens, 710, 720, 1e-4)


def test_sessions_take_turns_on_the_lane_of_a_real_daemon(daemon):
    """Fetched records are read in the landing itself, which the next fetch, of another session, writes over."""
    hga = replace(OPTIONS, router="hga", bank_groups=16)
    with connect(daemon(nvme=False).target) as client:
        assert client.connection.transport == "lane"
        sessions = [client.open(None, GEOMETRY, ROPE, o, device="cuda") for o in (OPTIONS, hga)]
        texts = [on_gpu(900, seed) for seed in range(2)]
        for session, tokens in zip(sessions, texts, strict=True):
            prompt(session, tokens, 700)
        for token in range(700, 760):
            outs = []
            for layer in range(LAYERS):  # layer by layer: both steps are under way at once
                for session, tokens in zip(sessions, texts, strict=True):
                    if not layer:
                        session.note_tokens(tokens.ids[token : token + 1])
                    session.append(layer, tokens.k[layer, :, token : token + 1], tokens.v[layer, :, token : token + 1])
                    outs.append(session.attend(layer, tokens.q[layer, :, token : token + 1], SCALE))
            for number, (session, tokens) in enumerate(zip(sessions, texts, strict=True)):
                mine = torch.stack(outs[number::2])
                assert (mine.double() - over_what_is_open(session, tokens, token)).abs().max() < 1e-4
        for session in sessions:
            assert session._attending.on_device.step is not None
            assert session._attending.on_device.step._landing.words is not None, "read in place"
            assert session.stats.fetches > 30


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_prompt_in_many_tiles_from_a_real_daemon_is_dense_attention(daemon, dtype):
    """Tiles leave the landing while those before them are attended, and the ones after them arrive where they were."""
    geometry = Geometry(LAYERS, KV_HEADS, GEOMETRY.head_dim, dtype)
    with connect(daemon(nvme=False).target) as client:
        session = client.open(None, geometry, ROPE, replace(OPTIONS, prefill_tile_chunks=1), device="cuda")
        tokens = on_gpu(3000, dtype=dtype)
        for first, end in blocks([500], 3000):
            out = tokens.run(session, first, end)
            assert (out - tokens.dense(first, end)).abs().max() < TOLERANCE[dtype]
        assert session.stats.fetches > 5 * LAYERS * 4
