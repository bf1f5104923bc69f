"""Session over a daemon in memory: dense when every group is opened, bounded, resumable, exact in what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fake_connection import FakeConnection, FakeDaemon
from hga_kvd_client import Geometry, Rope, SessionOptions, errors
from hga_kvd_client.attending import _one_core
from hga_kvd_client.client import Client
from hga_kvd_client.geometry import KEY_DTYPE
from sequences import DIM, GEOMETRY, KV_HEADS, LAYERS, RATIO, ROPE, SCALE, Tokens, blocks

SMALL = SessionOptions(
    router="hga",
    topk_chunks=2,
    topk_groups=3,
    sink_chunks=1,
    recent_chunks=2,
    bank_groups=8,
    flush_chunks=2,
    prefill_tile_chunks=2,
)


def open_session(connection, name="s", options=SMALL, geometry=GEOMETRY):
    return Client(connection).open(name, geometry, ROPE, options)


def all_groups(**changes):
    numbers = {"topk_chunks": 1, "topk_groups": 1, "sink_chunks": 2, "recent_chunks": 2, "flush_chunks": 2}
    return SessionOptions(router="all", **{**numbers, **changes})


@pytest.mark.parametrize("name", ["named", None])
@pytest.mark.parametrize("sizes", [[1], [7], [64], [100], [300], [1, 7, 64, 1, 100]])
@pytest.mark.parametrize("bank_groups", [1, 5, 128])
def test_every_group_opened_is_dense_attention(name, sizes, bank_groups):
    tokens = Tokens(400)
    session = open_session(FakeConnection(), name, all_groups(bank_groups=bank_groups, prefill_tile_chunks=2))
    for first, end in blocks(sizes, 400):
        out = tokens.run(session, first, end)
        assert (out - tokens.dense(first, end)).abs().max() < 1e-5
    assert session.tokens == 400


@pytest.mark.parametrize(("sinks", "recent"), [(0, 1), (1, 1), (3, 2), (9, 9)])
def test_window_sizes(sinks, recent):
    tokens = Tokens(500)
    session = open_session(FakeConnection(), None, all_groups(sink_chunks=sinks, recent_chunks=recent, flush_chunks=1))
    for first, end in blocks([130, 1, 1, 63, 1], 500):
        assert (tokens.run(session, first, end) - tokens.dense(first, end)).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype):
    tokens = Tokens(400, dtype=getattr(torch, dtype))
    session = open_session(FakeConnection(), None, all_groups(), Geometry(LAYERS, KV_HEADS, DIM, dtype))
    for first, end in blocks([150, 1], 400):
        out = tokens.run(session, first, end)
        assert out.dtype == getattr(torch, dtype)
        assert (out - tokens.dense(first, end)).abs().max() < 3e-2


class _LruOfGroups:
    """A least-recently-used set, one step at a time."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.held = {}  # group -> order of use; within a step: hits first, then misses, each by place
        self.place = {}

    def misses(self, opened: list[int]) -> list[int]:
        self.step = getattr(self, "step", 0) + 1
        missed = [group for group in opened if group not in self.held]
        for group in opened:
            if group in self.held:
                self.held[group] = self.step
        places = sorted(range(self.capacity), key=lambda p: (self.held.get(self._at(p), -1), p))
        free = [p for p in places if self.held.get(self._at(p), -1) < self.step]
        for group, place in zip(missed, free, strict=False):
            old = self._at(place)
            if old is not None:
                del self.held[old], self.place[old]
            self.held[group], self.place[group] = self.step, place
        return missed

    def _at(self, place: int) -> int | None:
        return next((group for group, p in self.place.items() if p == place), None)


def test_only_misses_are_fetched():
    connection = FakeConnection()
    session = open_session(connection)
    tokens = Tokens(700)
    tokens.run(session, 0, 600)
    connection.fetched_keys.clear()
    banks = [_LruOfGroups(SMALL.bank_groups) for _ in range(LAYERS * KV_HEADS)]
    for token in range(600, 700):
        before = len(connection.fetched_keys)
        tokens.run(session, token, token + 1)
        fetches = connection.fetched_keys[before:]
        assert len({keys["layer"][0] for keys in fetches}) == len(fetches), "one fetch a layer"
        fetched = {(layer, head, group) for keys in fetches for group, head, layer in keys.tolist()}
        expected = {
            (layer, head, group)
            for layer in range(LAYERS)
            for head in range(KV_HEADS)
            for group in banks[layer * KV_HEADS + head].misses(session.opened(layer)[head].nonzero()[:, 0].tolist())
        }
        assert fetched == expected
    stats = session.stats
    assert stats.decode_steps == 100
    assert 0 < stats.bank_hit_rate < 1
    assert stats.bank_bytes + stats.ram_bytes + stats.nvme_bytes == stats.opened_groups * GEOMETRY.record_bytes
    misses = sum(len(keys) for keys in connection.fetched_keys)
    assert misses * GEOMETRY.record_bytes == stats.ram_bytes + stats.nvme_bytes


def test_a_step_that_misses_nothing_does_not_fetch():
    connection = FakeConnection()
    session = open_session(connection, options=all_groups(bank_groups=128))
    tokens = Tokens(460)
    tokens.run(session, 0, 450)
    tokens.run(session, 450, 451)
    connection.fetched_keys.clear()
    for token in range(451, 460):
        tokens.run(session, token, token + 1)
    assert len(connection.fetched_keys) == 0


def fail_on_one_core():
    with _one_core():
        raise KeyError(f"{torch.get_num_threads()} thread")


def test_a_token_gives_torch_its_threads_back():
    connection = FakeConnection()
    session = open_session(connection)
    tokens = Tokens(460)
    tokens.run(session, 0, 450)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        tokens.run(session, 450, 455)
        assert connection.fetched_keys
        assert torch.get_num_threads() == 3
        with pytest.raises(KeyError, match="1 thread"):
            fail_on_one_core()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_routed_opens_within_limits_and_outside_the_window():
    session = open_session(FakeConnection())
    tokens = Tokens(900)
    tokens.run(session, 0, 850)
    for token in range(850, 900):
        tokens.run(session, token, token + 1)
        for layer in range(LAYERS):
            opened = session.opened(layer)
            closed = token // 64
            assert opened.shape == (KV_HEADS, closed * 4)
            assert opened.sum(1).max() <= SMALL.topk_groups * RATIO
            assert opened.sum(1).min() >= SMALL.topk_groups
            assert not opened[:, :4].any()
            assert not opened[:, (closed - 2) * 4 :].any()


def test_resident_bytes_are_the_tensors_and_stay_bounded():
    session = open_session(FakeConnection())
    tokens = Tokens(4000)

    def tensors(thing, seen):
        if isinstance(thing, torch.Tensor):
            seen[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        elif isinstance(thing, np.ndarray):
            assert thing.base is None
            seen[thing.ctypes.data] = thing.nbytes
        elif hasattr(thing, "__dict__"):
            for value in vars(thing).values():
                tensors(value, seen)
        elif isinstance(thing, (list, tuple)):
            for value in thing:
                tensors(value, seen)
        return seen

    for first, end in blocks([500], 3500):
        tokens.run(session, first, end)
        token_bytes = LAYERS * 2 * KV_HEADS * DIM * 4
        summaries = session._routing.store.resident_bytes()
        assert session.resident_bytes() - summaries <= token_bytes * (3 * 64 + 63 + 500)
    for token in range(3500, 4000):
        tokens.run(session, token, token + 1)
        kept = sum(
            sum(tensors(part, {}).values())
            for part in (session._window, session._routing.store, *session._attending.banks)
        )
        assert session.resident_bytes() == kept
    assert session._window.resident_bytes() == token_bytes * (1 + 2 + 1) * 64
    assert session.full_bytes() == 4000 * token_bytes


@pytest.mark.parametrize("count", [64, 100, 128, 400, 1000])
def test_resume_gives_identical_outputs(count):
    daemon = FakeDaemon()
    tokens = Tokens(count + 80)
    session = open_session(FakeConnection(daemon))
    for first, end in blocks([300], count):
        tokens.run(session, first, end)
    session.flush()
    other = open_session(FakeConnection(daemon))
    assert other.tokens == count // 64 * 64
    np.testing.assert_array_equal(other.token_ids(), tokens.ids[: other.tokens])
    if other.tokens < count:
        tokens.run(other, other.tokens, count)
    # The first session steps too, on a daemon of its own that has the same chunks.
    for token in range(count, count + 80):
        session._stored.connection.daemon = _copy(daemon) if token == count else session._stored.connection.daemon
        mine, theirs = tokens.run(session, token, token + 1), tokens.run(other, token, token + 1)
        assert torch.equal(mine, theirs)
        for layer in range(LAYERS):
            assert torch.equal(session.opened(layer), other.opened(layer))


def _copy(daemon):
    copied = FakeDaemon()
    copied.next_id = daemon.next_id
    copied.sessions = {
        key: {name: value.copy() if isinstance(value, (list, dict)) else value for name, value in session.items()}
        for key, session in daemon.sessions.items()
    }
    return copied


def test_missing_summaries_are_computed_again(caplog):
    daemon = FakeDaemon()
    tokens = Tokens(700)
    session = open_session(FakeConnection(daemon))
    tokens.run(session, 0, 700)
    session.flush()
    stored = next(iter(daemon.sessions.values()))["summaries"]
    for chunk in (0, 4, 5, 9):
        del stored["hga.v1", chunk]
    other = open_session(FakeConnection(daemon))
    assert torch.equal(other._routing.store.chunks[:, :, :10], session._routing.store.chunks[:, :, :10])
    assert torch.equal(other._routing.store.groups[:, :, :10], session._routing.store.groups[:, :, :10])
    assert "computed again" in caplog.text
    assert len(stored) == 10


def test_damaged_records_are_named_and_the_step_can_be_made_again():
    connection = FakeConnection()
    session = open_session(connection, options=all_groups())
    tokens = Tokens(401)
    tokens.run(session, 0, 400)
    connection.damaged = {(1, 0, 9), (1, 0, 10), (1, 1, 12), (2, 0, 9)}
    session.note_tokens(tokens.ids[400:])
    session.append(0, tokens.k[0, :, 400:], tokens.v[0, :, 400:])
    session.attend(0, tokens.q[0, :, 400:], SCALE)
    session.append(1, tokens.k[1, :, 400:], tokens.v[1, :, 400:])
    with pytest.raises(errors.RecordsDamaged) as caught:
        session.attend(1, tokens.q[1, :, 400:], SCALE)
    assert caught.value.layer == 1
    assert caught.value.kv_heads == (0, 1)
    assert caught.value.token_ranges == ((144, 176), (192, 208))
    assert "layer 1" in str(caught.value)
    connection.damaged = set()
    out = session.attend(1, tokens.q[1, :, 400:], SCALE)
    assert (out - tokens.dense(400, 401)[1]).abs().max() < 1e-5


def test_a_refused_append_leaves_the_session_as_it_was():
    connection = FakeConnection()
    session = open_session(connection, options=all_groups())
    tokens = Tokens(301)
    tokens.run(session, 0, 300)
    connection.fail_next = errors.StorageFull("the arena is full")
    with pytest.raises(errors.StorageFull):
        tokens.run(session, 300, 301)
    assert session.tokens == 300
    assert (tokens.run(session, 300, 301) - tokens.dense(300, 301)).abs().max() < 1e-5


@pytest.mark.parametrize("keep", [lambda durable: durable, lambda durable: max(0, durable - 2)])
@pytest.mark.parametrize("notice", ["before the call", "by the error"])
def test_a_replaced_daemon_gets_the_missing_chunks_again(keep, notice, caplog):
    daemon = FakeDaemon()
    connection = FakeConnection(daemon)
    everything = {"router": "hga", "topk_chunks": 100, "topk_groups": 400}
    session = open_session(
        connection, options=SessionOptions(**everything, sink_chunks=1, recent_chunks=4, flush_chunks=2, bank_groups=3)
    )
    tokens = Tokens(1000)
    for first, end in blocks([1, 70, 1, 1, 100], 1000):
        assert (tokens.run(session, first, end) - tokens.dense(first, end)).abs().max() < 1e-5
        if session._stored.durable_chunks > 2 and first % 5 == 0:
            daemon.restart(keep)
            if notice == "before the call":
                connection.notice_replacement()
    assert session.stats.recoveries >= 2
    session.flush()
    other = open_session(FakeConnection(daemon))
    np.testing.assert_array_equal(other.token_ids(), tokens.ids[: other.tokens])
    assert other.tokens == 960
    assert "computed again" not in caplog.text


def test_a_flush_notices_chunks_that_are_gone():
    daemon = FakeDaemon()
    session = open_session(FakeConnection(daemon), options=all_groups(recent_chunks=4, flush_chunks=4))
    tokens = Tokens(600)
    for first, end in blocks([256, 64, 64, 64], 450):
        tokens.run(session, first, end)
    stored = next(iter(daemon.sessions.values()))
    assert stored["durable"] < len(stored["chunks"])
    daemon.restart()
    session.flush()
    assert stored["durable"] == len(stored["chunks"]) == 7
    assert session.stats.recoveries == 1


def test_a_lost_session_names_its_tokens():
    daemon = FakeDaemon()
    tokens = Tokens(1001)
    named, temporary = FakeConnection(daemon), FakeConnection(daemon)
    session, other = open_session(named, options=all_groups(sink_chunks=1)), open_session(temporary, None)
    tokens.run(session, 0, 1000)
    tokens.run(other, 0, 1000)
    session.flush()
    daemon.restart(lambda durable: 3)
    with pytest.raises(errors.SessionLost, match="tokens 192 to 831") as caught:
        tokens.run(session, 1000, 1001)
    assert caught.value.token_ranges == ((192, 832),)
    with pytest.raises(errors.SessionLost, match="temporary"):
        tokens.run(other, 1000, 1001)


def test_a_daemon_without_nvme_is_warned_about_once(caplog):
    connection = FakeConnection()

    def flush(session_id):
        raise errors.NotDurable("no NVMe")

    connection.flush = flush
    session = open_session(connection)
    Tokens(1000).run(session, 0, 1000)
    with pytest.raises(errors.NotDurable):
        session.flush()
    session.close()
    assert caplog.text.count("will not survive") <= 1


def test_wrong_use_is_refused_with_a_sentence():
    session = open_session(FakeConnection())
    k = torch.zeros(KV_HEADS, 5, DIM)
    with pytest.raises(errors.InvalidRequest, match="layer 0 is next"):
        session.append(1, k, k)
    with pytest.raises(errors.InvalidRequest, match="must be"):
        session.append(0, k[:, :, :3], k)
    with pytest.raises(errors.InvalidRequest, match="stores"):
        session.append(0, k.half(), k.half())
    session.note_tokens(np.zeros(4))
    with pytest.raises(errors.InvalidRequest, match="4 token ids"):
        session.append(0, k, k)
    session.note_tokens(np.zeros(5))
    session.append(0, k, k)
    with pytest.raises(errors.InvalidRequest, match="block of 5"):
        session.append(1, k[:, :4], k[:, :4])
    with pytest.raises(errors.InvalidRequest, match="q has 1 tokens"):
        session.attend(0, torch.zeros(6, 1, DIM), 1.0)
    with pytest.raises(errors.InvalidRequest, match="must follow"):
        session.attend(1, torch.zeros(6, 5, DIM), 1.0)
    with pytest.raises(errors.InvalidRequest, match="multiple of 2"):
        session.attend(0, torch.zeros(5, 5, DIM), 1.0)
    with pytest.raises(errors.InvalidRequest, match="flush_chunks"):
        SessionOptions(flush_chunks=9)
    with pytest.raises(errors.InvalidRequest, match="rotary_dim"):
        Rope((1.0,), 4)
    session.delete()
    with pytest.raises(errors.InvalidRequest, match="closed"):
        session.append(1, k, k)


def test_payload_is_laid_out_as_the_contract_says():
    daemon = FakeDaemon()
    session = open_session(FakeConnection(daemon, append_bytes_max=GEOMETRY.chunk_bytes * 2))
    tokens = Tokens(320)
    tokens.run(session, 0, 320)
    session.flush()
    for chunk, extents in enumerate(next(iter(daemon.sessions.values()))["chunks"]):
        for layer in range(LAYERS):
            for head in range(KV_HEADS):
                for group in range(4):
                    record = extents[layer, head, group].view(np.float32).reshape(2, 16, DIM)
                    at = slice(chunk * 64 + group * 16, chunk * 64 + group * 16 + 16)
                    np.testing.assert_array_equal(record[0], tokens.k[layer, head, at].numpy())
                    np.testing.assert_array_equal(record[1], tokens.v[layer, head, at].numpy())


def test_keys_of_a_prefill_tile_are_in_storage_order():
    connection = FakeConnection()
    session = open_session(connection)
    tokens = Tokens(700)
    tokens.run(session, 0, 690)
    connection.fetched_keys.clear()
    tokens.run(session, 690, 700)
    keys = np.concatenate([k for k in connection.fetched_keys if k["layer"][0] == 0])
    assert keys.dtype == KEY_DTYPE
    assert keys["group"].tolist() == [c * 4 + g for c in range(1, 8) for _ in range(KV_HEADS) for g in range(4)]
    assert keys["kv_head"].tolist() == [h for _ in range(7) for h in range(KV_HEADS) for _ in range(4)]
    assert connection.kept
    assert not any(connection.kept), "the next block reads them again"


def test_a_block_that_was_cut_short_is_dropped_and_made_again():
    daemon = FakeDaemon()
    session = open_session(FakeConnection(daemon), options=all_groups())
    tokens = Tokens(500)
    tokens.run(session, 0, 190)
    session.note_tokens(tokens.ids[:99])
    session.append(0, torch.zeros(KV_HEADS, 99, DIM), torch.zeros(KV_HEADS, 99, DIM))
    with pytest.raises(errors.InvalidRequest, match="drop_block"):
        tokens.run(session, 190, 191)
    session.drop_block()
    for first, end in ((190, 191), (191, 450)):
        assert (tokens.run(session, first, end) - tokens.dense(first, end)).abs().max() < 1e-5
    session.flush()
    np.testing.assert_array_equal(session.token_ids(), tokens.ids[:448])


def test_an_append_too_large_for_the_arena_goes_in_parts():
    connection = FakeConnection()
    taken, append = [], connection.append

    def small_arena(session_id, first_chunk, chunk_count, *rest, **more):
        if chunk_count > 2:
            raise errors.LimitExceeded(f"an append of {chunk_count} chunks; one append may have 2")
        taken.append(chunk_count)
        return append(session_id, first_chunk, chunk_count, *rest, **more)

    connection.append = small_arena
    session, tokens = open_session(connection, options=all_groups()), Tokens(600)
    tokens.run(session, 0, 590)
    assert (tokens.run(session, 590, 600) - tokens.dense(590, 600)).abs().max() < 1e-5
    assert sum(taken) == 9
    assert max(taken) == 2


def test_a_flush_in_the_middle_of_a_block():
    session = open_session(FakeConnection(), options=all_groups())
    tokens = Tokens(600)
    tokens.run(session, 0, 500)
    session.note_tokens(tokens.ids[500:600])
    for layer in range(LAYERS):
        session.append(layer, tokens.k[layer, :, 500:600], tokens.v[layer, :, 500:600])
        session.flush()
        out = session.attend(layer, tokens.q[layer, :, 500:600], SCALE)
        assert (out - tokens.dense(500, 600)[layer]).abs().max() < 1e-5
    session.flush()
    assert session.stats.appended_chunks == 9
