"""What a session routes with, over a daemon in memory: sketches and their basis, the switch of "auto", routed prefill."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from fake_connection import FakeConnection, FakeDaemon
from hga_kvd_client import Geometry, SessionOptions, errors
from hga_kvd_client.client import Client
from hga_kvd_client.routing import route_hga
from hga_kvd_client.sketch import Basis, Moments, SketchSpec, encode
from hga_kvd_client.sketches import BASIS_KIND, PART_BYTES, Sketches, basis_parts, part_count, read_basis
from hga_kvd_client.summaries import Summaries
from sequences import DIM, GEOMETRY, KV_HEADS, LAYERS, RATIO, ROPE, SCALE, Tokens, blocks
from sketch_bytes import reference_decode
from test_routing import sketch_reference

CPU = torch.device("cpu")
NUMBERS = {"sink_chunks": 1, "recent_chunks": 2, "bank_groups": 8, "flush_chunks": 2, "prefill_tile_chunks": 2}
SKETCH = SessionOptions(router="sketch", sketch_groups=2, sketch_basis_tokens=200, **NUMBERS)
PLAIN = SessionOptions(router="sketch", sketch_groups=2, **NUMBERS)  # 2,048 tokens wanted, 512 at least


def changed(options, **changes):
    return SessionOptions(**{**vars(options), **changes})


def open_session(connection, name="s", options=SKETCH, geometry=GEOMETRY):
    return Client(connection).open(name, geometry, ROPE, options)


def basis_of(tokens, layer, count):
    moments = Moments(KV_HEADS, DIM, CPU)
    q = tokens.q[layer].view(KV_HEADS, RATIO, -1, DIM)
    moments.add(q[:, :, :count], tokens.k[layer, :, :count])
    return Basis.of(moments)


def reference_mask(tokens, layer, at, spec, basis, options):
    """What the token `at` opens of its routable groups: chunk by chunk, key by key."""
    closed = at // 64
    q = tokens.q[layer, :, at].view(KV_HEADS, RATIO, DIM).double() * SCALE
    log_mass = torch.empty(KV_HEADS, RATIO, (closed - 3) * 4)
    window = torch.empty(KV_HEADS, RATIO)
    for h in range(KV_HEADS):
        keys = tokens.k[layer, h].double()
        near = [*range(64), *range((closed - 2) * 64, at + 1)]
        for r in range(RATIO):
            z = basis.to_z[h].double() @ q[h, r]
            window[h, r] = math.log(sum(math.exp(float(q[h, r] @ keys[t])) for t in near))
            for chunk in range(1, closed - 2):
                one = Basis(basis.to_y[h : h + 1], basis.to_z[h : h + 1], basis.centre[h : h + 1])
                record = encode(spec, one, tokens.k[layer, h : h + 1, chunk * 64 : (chunk + 1) * 64])
                y = reference_decode(spec, record[0]).double() + basis.centre[h].double()
                for group in range(4):
                    mass = sum(math.exp(float(z @ y[group * 16 + t])) for t in range(16))
                    log_mass[h, r, (chunk - 1) * 4 + group] = math.log(mass)
    return sketch_reference(log_mass.double(), window, options.sketch_groups * KV_HEADS, options.cover)


@pytest.mark.parametrize("cover", [1.0, 0.7])
@pytest.mark.parametrize("sizes", [[1000], [100], [7, 64, 250]])
def test_sketch_opens_what_loops_say(sizes, cover):
    options = changed(SKETCH, cover=cover, sketch_groups=3)
    session = open_session(FakeConnection(), options=options)
    tokens = Tokens(560)
    for first, end in blocks(sizes, 520):
        tokens.run(session, first, end)
    for at in (520, 559):
        for step in range(session.tokens, at + 1):
            tokens.run(session, step, step + 1)
        closed = at // 64
        for layer in range(LAYERS):
            opened = session.opened(layer)
            expected = reference_mask(
                tokens, layer, at, SketchSpec.of_basis(DIM), basis_of(tokens, layer, 200), options
            )
            assert torch.equal(opened[:, 4 : (closed - 2) * 4], expected)
            assert opened.sum() == expected.sum()
            assert cover < 1 or opened.sum() == 3 * KV_HEADS


def test_too_short_a_prompt_has_plain_keys():
    session = open_session(FakeConnection(), options=PLAIN)
    tokens = Tokens(500)
    tokens.run(session, 0, 430)
    assert session._routing.store is None
    tokens.run(session, 430, 431)
    assert session._routing.store.plain
    none = Basis.none(KV_HEADS, DIM, CPU)
    for layer in range(LAYERS):
        expected = reference_mask(tokens, layer, 430, SketchSpec.plain(DIM), none, PLAIN)
        assert torch.equal(session.opened(layer)[:, 4:16], expected)


def test_the_basis_is_of_prompt_tokens_seen_before_the_first_routed_step():
    session = open_session(FakeConnection(), options=PLAIN)
    tokens = Tokens(700)
    for first, end in blocks([250], 600):
        tokens.run(session, first, end)
    tokens.run(session, 600, 601)
    mine = session._routing.store
    assert not mine.plain
    for layer in range(LAYERS):
        expected = basis_of(tokens, layer, 600)
        torch.testing.assert_close(mine.layer_basis(layer).to_z.abs(), expected.to_z.abs(), rtol=1e-3, atol=1e-4)
    tokens.run(session, 601, 690)
    assert session._routing.store is mine


@pytest.mark.parametrize("sizes", [[700], [64], [50], [300, 1, 1]])
def test_a_budget_of_everything_is_dense_attention(sizes):
    options = changed(SKETCH, sketch_groups=1000)
    session = open_session(FakeConnection(), options=options)
    tokens = Tokens(705)
    for first, end in blocks(sizes, 705):
        assert (tokens.run(session, first, end) - tokens.dense(first, end)).abs().max() < 1e-5


@pytest.mark.parametrize("prompt", [400, 700])
def test_sketches_are_the_same_however_the_prompt_came(prompt):
    tokens = Tokens(prompt + 2)
    records = []
    for sizes in ([prompt], [64], [33], [200, 5]):
        session = open_session(FakeConnection())
        for first, end in blocks(sizes, prompt):
            tokens.run(session, first, end)
        tokens.run(session, prompt, prompt + 1)
        store = session._routing.store
        assert store.count == prompt // 64
        records.append((store.packed(0, store.count), store.basis.to_y.abs()))
    for other, basis in records[1:]:
        torch.testing.assert_close(basis, records[0][1], rtol=1e-4, atol=1e-5)
        # Sums in another order move a basis by its last bits, and so a code in a thousand.
        assert (other != records[0][0]).float().mean() < 0.01


@pytest.mark.parametrize("options", [SKETCH, PLAIN])
@pytest.mark.parametrize("count", [256, 400, 640, 1000])
def test_resume_takes_basis_and_sketches_from_the_daemon(count, options):
    daemon = FakeDaemon()
    tokens = Tokens(count + 40)
    session = open_session(FakeConnection(daemon), options=options)
    for first, end in blocks([300], count):
        tokens.run(session, first, end)
    tokens.run(session, count, count + 1)
    session.flush()
    connection = FakeConnection(daemon)
    other = open_session(connection, options=options)
    recent = (other.tokens // 64 - options.recent_chunks) * 4
    read = {int(group) for keys in connection.fetched_keys for group in keys["group"]}
    assert all(group < 4 or group >= recent for group in read), "only the window is read"
    mine, theirs = session._routing.store, other._routing.store
    assert torch.equal(theirs.packed(0, theirs.count), mine.packed(0, theirs.count))
    for name in ("to_y", "to_z", "centre"):
        assert torch.equal(getattr(theirs.basis, name), getattr(mine.basis, name))
    assert theirs.plain == mine.plain
    assert theirs.kind == mine.kind
    if other.tokens <= count:
        tokens.run(other, other.tokens, count + 1)
    session.close()
    alone = FakeDaemon()
    alone.sessions = {1: {**next(iter(daemon.sessions.values()))}}
    alone.sessions[1]["chunks"] = list(alone.sessions[1]["chunks"])
    session._stored.connection, session._closed = FakeConnection(alone), False
    session._stored._session_id = 1
    for token in range(count + 1, count + 40):
        assert torch.equal(tokens.run(session, token, token + 1), tokens.run(other, token, token + 1))
        for layer in range(LAYERS):
            assert torch.equal(session.opened(layer), other.opened(layer))


def test_a_session_left_before_it_routed_leaves_its_basis():
    daemon = FakeDaemon()
    tokens = Tokens(400)
    with open_session(FakeConnection(daemon), options=changed(SKETCH, sketch_basis_tokens=300)) as session:
        tokens.run(session, 0, 350)
        assert session._routing.searching
    other = open_session(FakeConnection(daemon), options=changed(SKETCH, sketch_basis_tokens=300))
    expected = basis_of(tokens, 1, 300)
    torch.testing.assert_close(
        other._routing.store.layer_basis(1).centre.abs(), expected.centre.abs(), rtol=1e-3, atol=1e-3
    )


def test_without_a_stored_basis_another_is_found_and_said(caplog):
    daemon = FakeDaemon()
    tokens = Tokens(900)
    session = open_session(FakeConnection(daemon))
    tokens.run(session, 0, 500)
    session.flush()
    stored = next(iter(daemon.sessions.values()))["summaries"]
    for key in [key for key in stored if key[0].startswith(BASIS_KIND)]:
        del stored[key]
    other = open_session(FakeConnection(daemon))
    assert other._routing.searching
    assert "no basis" in caplog.text
    tokens.run(other, 448, 700)
    tokens.run(other, 700, 701)
    moments = Moments(KV_HEADS, DIM, CPU)
    moments.add(tokens.q[0, :, 448:648].view(KV_HEADS, RATIO, -1, DIM), tokens.k[0, :, 448:648])
    torch.testing.assert_close(
        other._routing.store.layer_basis(0).centre, Basis.of(moments).centre, rtol=1e-3, atol=1e-3
    )
    assert other._routing.store.count == 10


def test_missing_sketches_are_made_again_with_the_stored_basis(caplog):
    daemon = FakeDaemon()
    tokens = Tokens(700)
    session = open_session(FakeConnection(daemon))
    tokens.run(session, 0, 690)
    session.flush()
    tokens.run(session, 690, 691)
    stored = next(iter(daemon.sessions.values()))["summaries"]
    kind = session._routing.kind
    for chunk in (0, 4, 9):
        del stored[kind, chunk]
    other = open_session(FakeConnection(daemon))
    assert torch.equal(other._routing.store.packed(0, 10), session._routing.store.packed(0, 10))
    assert "computed again" in caplog.text
    assert (kind, 4) in stored


def test_a_damaged_basis_is_not_used(caplog):
    daemon = FakeDaemon()
    session = open_session(FakeConnection(daemon))
    tokens = Tokens(500)
    tokens.run(session, 0, 490)
    session.flush()
    stored = next(iter(daemon.sessions.values()))["summaries"]
    key = next(key for key in stored if key[0] == BASIS_KIND)
    for bad in (
        b"",
        b"SKB1",
        stored[key][:-4],
        b"XXXX" + stored[key][4:],
        stored[key][:8] + stored[key][12:] + b"1234",
    ):
        stored[key] = bad
        assert open_session(FakeConnection(daemon))._routing.searching
    assert "cannot be used" in caplog.text


def test_a_basis_in_parts():
    generator = torch.Generator().manual_seed(0)
    basis = Basis(*(torch.randn(40, 2, *shape, generator=generator) for shape in ((64, 64), (64, 64), (64,))))
    parts = basis_parts(basis)
    assert len(parts) == 3 == part_count(parts[0][1])
    assert [kind for kind, _ in parts] == ["sketch-basis.v1", "sketch-basis.v1.1", "sketch-basis.v1.2"]
    assert all(len(payload) <= PART_BYTES for _, payload in parts)
    again = read_basis(bytearray().join(payload for _, payload in parts), (40, 2, 64), CPU)
    for name in ("to_y", "to_z", "centre"):
        assert torch.equal(getattr(again, name), getattr(basis, name))
    assert basis_parts(None) == [("sketch-basis.v1.plain", b"\1")]
    with pytest.raises(ValueError, match="40"):
        read_basis(bytearray().join(payload for _, payload in parts), (41, 2, 64), CPU)


@pytest.mark.parametrize("keep", [lambda durable: durable, lambda durable: max(0, durable - 2)])
def test_a_replaced_daemon_gets_basis_and_sketches_again(keep, caplog):
    daemon = FakeDaemon()
    connection = FakeConnection(daemon)
    options = changed(SKETCH, sketch_groups=1000, recent_chunks=4, sketch_basis_tokens=100)
    session = open_session(connection, options=options)
    tokens = Tokens(1000)
    for first, end in blocks([1, 70, 1, 1, 100], 1000):
        assert (tokens.run(session, first, end) - tokens.dense(first, end)).abs().max() < 1e-5
        if session._stored.durable_chunks > 2 and first % 5 == 0:
            daemon.restart(keep)
    assert session.stats.recoveries >= 2
    session.flush()
    other = open_session(FakeConnection(daemon), options=options)
    assert other.tokens == 960
    assert torch.equal(other._routing.store.packed(0, 15), session._routing.store.packed(0, 15))
    assert "computed again" not in caplog.text
    assert "no basis" not in caplog.text


def test_auto_goes_over_to_means_when_sketches_grow_too_large():
    spec = SketchSpec.of_basis(DIM)
    options = changed(SKETCH, router="auto", topk_chunks=2, topk_groups=3)
    options = changed(options, routing_bytes_max=10 * LAYERS * KV_HEADS * spec.chunk_bytes)
    daemon = FakeDaemon()
    session = open_session(FakeConnection(daemon), options=options)
    always = open_session(FakeConnection(), options=changed(options, router="hga"))
    tokens = Tokens(800)
    for first, end in blocks([300], 640):
        tokens.run(session, first, end)
    tokens.run(always, 0, 640)
    for token in range(640, 790):
        mine, hga = tokens.run(session, token, token + 1), tokens.run(always, token, token + 1)
        assert isinstance(session._routing.store, Summaries) == (token >= 704)
        if token >= 704:
            assert torch.equal(mine, hga)
    session.flush()
    other = open_session(FakeConnection(daemon), options=options)
    assert torch.equal(other._routing.store.chunks[:, :, :12], always._routing.store.chunks[:, :, :12])


def test_state_is_what_the_design_says_and_counts():
    for router, share in (("sketch", 0.0527), ("hga", 0.0391)):
        geometry = Geometry(LAYERS, KV_HEADS, DIM, "bfloat16")
        session = open_session(FakeConnection(), None, changed(SKETCH, router=router), geometry)
        tokens = Tokens(4096, dtype=torch.bfloat16)
        for first, end in blocks([512], 4096):
            tokens.run(session, first, end)
        tokens.run(session, 4095, 4096) if session.tokens < 4096 else None
        store = session._routing.store
        packed = store.packed(0, store.count)
        assert packed.nbytes / (store.count * geometry.chunk_bytes) == pytest.approx(share, abs=1e-3)
        assert session.resident_bytes() == session._window.resident_bytes() + session._routing.resident_bytes() + sum(
            bank.resident_bytes() for bank in session._attending.banks
        )


def test_sessions_of_different_lengths_beside_each_other():
    """A batch: each sequence's session routes as if it were alone."""
    lengths = (450, 700, 90)
    daemon, texts = FakeDaemon(), [Tokens(length + 30, seed=length) for length in lengths]
    together = [open_session(FakeConnection(daemon), None) for _ in lengths]
    alone = [open_session(FakeConnection(), None) for _ in lengths]
    for session, other, tokens, length in zip(together, alone, texts, lengths, strict=True):
        tokens.run(session, 0, length)
        tokens.run(other, 0, length)
    for step in range(30):
        for session, other, tokens, length in zip(together, alone, texts, lengths, strict=True):
            at = length + step
            assert torch.equal(tokens.run(session, at, at + 1), tokens.run(other, at, at + 1))


def test_forget_and_fork_of_the_routing_state():
    session = open_session(FakeConnection())
    tokens = Tokens(600)
    tokens.run(session, 0, 590)
    tokens.run(session, 590, 591)
    state = session._routing
    twin = state.fork()
    before = state.store.packed(0, 9)
    twin.truncate(4)
    twin.put(4, before[4:6].flip(0))
    assert torch.equal(state.store.packed(0, 9), before)
    assert torch.equal(twin.store.packed(4, 6), before[4:6].flip(0))
    assert twin.store.kind == state.store.kind
    assert state.basis_chunk is not None
    assert twin.basis_chunk is None, "it went with its chunk and must be stored again"


# Routed prefill.


def dense_over(tokens, layer, head, at, seen):
    """Attention of one query head of token `at` over the tokens in `seen`; float64."""
    q = tokens.q[layer, head, at].double() * SCALE
    k, v = tokens.k[layer, head // RATIO, seen].double(), tokens.v[layer, head // RATIO, seen].double()
    return torch.softmax(k @ q, 0) @ v


@pytest.mark.parametrize("bank_groups", [2, 100])
def test_routed_prefill_sees_what_the_paper_says(bank_groups):
    options = SessionOptions(
        router="hga", prefill="routed", topk_chunks=2, topk_groups=1, **{**NUMBERS, "bank_groups": bank_groups}
    )
    session = open_session(FakeConnection(), options=options)
    tokens = Tokens(800)
    tokens.run(session, 0, 640)
    out = tokens.run(session, 640, 800)
    store = session._routing.store
    differs = 0
    for layer in range(LAYERS):
        q = tokens.q[layer].view(KV_HEADS, RATIO, -1, DIM)
        chunks, groups = store.chunks[layer, :, 1:8], store.groups[layer, :, 1:8]
        for start, end in ((640, 704), (704, 768), (768, 800)):
            asked = torch.zeros(KV_HEADS, 28, dtype=torch.bool)
            for at in range(start, end):
                asked |= route_hga(q[:, :, at], chunks, groups, 2, 1)
                if at % 9 == 0:
                    for head in range(KV_HEADS * RATIO):
                        far = asked[head // RATIO].repeat_interleave(16).nonzero().squeeze(1) + 64
                        seen = torch.cat((torch.arange(64), far, torch.arange(512, at + 1)))
                        expected = dense_over(tokens, layer, head, at, seen)
                        torch.testing.assert_close(out[layer, head, at - 640].double(), expected, atol=1e-5, rtol=1e-4)
                        differs += len(far) < 28 * 16
    assert differs > 100


@pytest.mark.parametrize("sizes", [[300], [64], [100, 1, 33]])
@pytest.mark.parametrize("router", ["all", "sketch"])
def test_routed_prefill_that_opens_everything_is_dense(sizes, router):
    options = changed(SKETCH, router=router, prefill="routed", sketch_groups=1000)
    session = open_session(FakeConnection(), options=options)
    tokens = Tokens(700)
    for first, end in blocks(sizes, 700):
        assert (tokens.run(session, first, end) - tokens.dense(first, end)).abs().max() < 1e-5
    assert session.stats.prefill_ram_bytes > 0


def test_routed_prefill_by_sketch_is_between_window_and_dense():
    tokens = Tokens(1000)
    errors_of = []
    for groups in (1, 4, 12):
        session = open_session(FakeConnection(), options=changed(SKETCH, prefill="routed", sketch_groups=groups))
        tokens.run(session, 0, 800)
        out = tokens.run(session, 800, 1000)
        errors_of.append(float((out - tokens.dense(800, 1000)).square().mean()))
    assert errors_of[0] > 2 * errors_of[1] > 4 * errors_of[2] > 0


# Options.


@pytest.mark.parametrize(
    ("numbers", "match"),
    [
        ({"router": "best"}, "router"),
        ({"prefill": "fast"}, "prefill"),
        ({"cover": 0.0}, "cover"),
        ({"cover": 1.5}, "cover"),
        ({"sketch_groups": 0}, "sketch_groups"),
        ({"sketch_dims": (0, 0)}, "sketch_dims"),
        ({"sketch_dims": (-1, 4)}, "sketch_dims"),
        ({"routing_bytes_max": 0}, "routing_bytes_max"),
    ],
)
def test_options_that_cannot_work(numbers, match):
    with pytest.raises(errors.InvalidRequest, match=match):
        SessionOptions(**numbers)


def test_geometries_without_sketches():
    geometry = Geometry(LAYERS, KV_HEADS, DIM, "float32", chunk_tokens=60, group_tokens=6)
    with pytest.raises(errors.InvalidRequest, match="multiple of 4"):
        open_session(FakeConnection(), geometry=geometry)
    with pytest.raises(errors.InvalidRequest, match="sketch_dims"):
        open_session(FakeConnection(), options=changed(SKETCH, sketch_dims=(DIM, 1)))
    assert isinstance(open_session(FakeConnection(), None, SessionOptions(), geometry)._routing.store, Summaries)


def test_what_routed_prefill_depends_on_is_in_its_text():
    base = SessionOptions(prefill="routed")
    texts = {
        changed(base, **change).prefill_text()
        for change in (
            {}, {"router": "hga"}, {"router": "all"}, {"router": "hga", "topk_groups": 3}, {"router": "sketch"},
            {"router": "sketch", "cover": 0.9}, {"router": "hga", "pooled": True}, {"recent_chunks": 9},
        )
    }  # fmt: skip
    assert len(texts) == 8
    assert SessionOptions().prefill_text() == "exact" == SessionOptions(router="hga", topk_groups=3).prefill_text()


def test_no_token_is_decoded_with_a_basis_that_a_crash_would_take():
    daemon, tokens = FakeDaemon(), Tokens(860)
    session = open_session(FakeConnection(daemon), options=changed(PLAIN, flush_chunks=1))
    # Chunks are flushed as they come, and none closes when the first routed token settles the basis.
    for first, end in [*blocks([64], 704), (704, 724), *((token, token + 1) for token in range(724, 780))]:
        tokens.run(session, first, end)
        if not isinstance(session._routing.store, Sketches):
            continue
        crashed = copy.deepcopy(daemon)
        crashed.restart()
        other = open_session(FakeConnection(crashed), options=session.options)
        assert not other._routing.searching
        for name in ("to_y", "to_z", "centre"):
            assert torch.equal(getattr(other._routing.store.basis, name), getattr(session._routing.store.basis, name))
        count = other._routing.count
        assert torch.equal(other._routing.store.packed(0, count), session._routing.store.packed(0, count))
    assert session.stats.flushes <= 14, "one more than chunks, and the first"
