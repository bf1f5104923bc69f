"""Session.truncate and Session.fork, and sessions that begin with a stored prefix.

What is compared with is a session that never had the tokens that were taken back.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fake_connection import FakeConnection, FakeDaemon
from hga_kvd_client import SessionOptions, errors
from hga_kvd_client.client import Client
from hypothesis import given, settings
from hypothesis import strategies as st
from sequences import GEOMETRY, KV_HEADS, LAYERS, ROPE, Tokens, blocks

OPTIONS = {"sink_chunks": 1, "recent_chunks": 2, "bank_groups": 8, "flush_chunks": 2, "prefill_tile_chunks": 2}
ROUTED = SessionOptions(router="hga", topk_chunks=2, topk_groups=3, **OPTIONS)
ALL = SessionOptions(router="all", **OPTIONS)
LENGTH = 900


def open_session(connection, name="s", options=ROUTED, **arguments):
    return Client(connection).open(name, GEOMETRY, ROPE, options, **arguments)


def branch(tokens: Tokens, first: int, seed: int) -> Tokens:
    """The same tokens up to `first`, others from there on."""
    other = Tokens(LENGTH, seed)
    for name in ("q", "k", "v"):
        mine, theirs = getattr(tokens, name), getattr(other, name)
        setattr(other, name, torch.cat((mine[:, :, :first], theirs[:, :, first:]), 2))
    other.ids = np.concatenate((tokens.ids[:first], tokens.ids[first:] + 1000 * seed))
    return other


def feed(session, tokens: Tokens, end: int, size: int = 150) -> None:
    first = session.tokens
    for start, stop in blocks([size], end - first):
        tokens.run(session, first + start, first + stop)


def assert_same_steps(session, tokens: Tokens, steps: int = 8) -> None:
    """Steps of the session are, to the bit, those of one that was given its tokens and no others."""
    fresh = open_session(FakeConnection(), None, session.options)
    first = session.tokens
    feed(fresh, tokens, first)
    for token in range(first, first + steps):
        mine, theirs = tokens.run(session, token, token + 1), tokens.run(fresh, token, token + 1)
        assert torch.equal(mine, theirs)
        for layer in range(LAYERS):
            assert torch.equal(session.opened(layer), fresh.opened(layer))
    assert (
        tokens.run(session, first + steps, first + steps + 5) - tokens.dense(first + steps, first + steps + 5)
    ).abs().max() < 1e-5
    np.testing.assert_array_equal(session.known_ids(), tokens.ids[: session.tokens])


@settings(max_examples=25)
@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(0, 330)), min_size=1, max_size=5),
    st.sampled_from([ROUTED, ALL]),
    st.sampled_from(["s", None]),
)
def test_truncate_is_as_if_the_tokens_had_never_come(turns, options, name):
    daemon = FakeDaemon()
    session, tokens = open_session(FakeConnection(daemon), name, options), Tokens(LENGTH)
    for seed, (more, fewer) in enumerate(turns, 1):
        end = min(session.tokens + more, LENGTH - 20)
        feed(session, tokens, end)
        if end > 3:
            for token in range(end, end + 3):
                tokens.run(session, token, token + 1)
        session.truncate(max(0, session.tokens - fewer))
        tokens = branch(tokens, session.tokens, seed)
    assert_same_steps(session, tokens)
    if name:
        session.flush()
        again = open_session(FakeConnection(daemon), name, options)
        np.testing.assert_array_equal(again.token_ids(), tokens.ids[: again.tokens])
        assert_same_steps(again, tokens)


@pytest.mark.parametrize("back", [0, 1, 63, 64, 65, 130, 200, 400, 640, 700])
def test_truncate_reads_only_what_had_left_the_window(back):
    connection = FakeConnection()
    session, tokens = open_session(connection), Tokens(LENGTH)
    feed(session, tokens, 700)
    tokens.run(session, 700, 701)
    connection.fetched_keys.clear()
    epoch = session._stored.epoch
    session.truncate(701 - back)
    chunks = {int(key["group"]) // 4 for keys in connection.fetched_keys for key in keys}
    closed, kept = 10, 701 - back
    if kept >= closed * 64:
        assert (chunks, session._stored.epoch) == (set(), epoch)
    else:
        # Two recent chunks and the one that opens again, minus those that were in the window: 8, 9 and the open chunk.
        wanted = set(range(max(1, kept // 64 - 2), -(-kept // 64)))
        assert (chunks, session._stored.epoch) == (wanted - {8, 9, 10}, epoch + 1)
    assert_same_steps(session, branch(tokens, kept, 3))


def test_truncate_refuses_what_cannot_be():
    session = open_session(FakeConnection())
    Tokens(LENGTH).run(session, 0, 70)
    for tokens in (-1, 71):
        with pytest.raises(errors.InvalidRequest, match=f"token {tokens} in a session of 70"):
            session.truncate(tokens)
    session.close()
    with pytest.raises(errors.InvalidRequest, match="closed"):
        session.truncate(3)
    with pytest.raises(errors.InvalidRequest, match="closed"):
        session.fork()


def test_truncate_drops_the_block_at_hand():
    session, tokens = open_session(FakeConnection()), Tokens(LENGTH)
    feed(session, tokens, 300)
    session.note_tokens(tokens.ids[:9])
    session.append(0, torch.ones(KV_HEADS, 9, 16), torch.ones(KV_HEADS, 9, 16))
    session.truncate(300)
    assert_same_steps(session, tokens)


def test_another_client_that_took_tokens_back_is_noticed():
    daemon = FakeDaemon()
    tokens = Tokens(LENGTH)
    one = open_session(FakeConnection(daemon), options=ALL)
    feed(one, tokens, 700)
    one.flush()
    other = open_session(FakeConnection(daemon), options=ALL)
    other.truncate(320)
    with pytest.raises(errors.StaleEpoch):
        tokens.run(one, 700, 701)
    one.drop_block()
    daemon.restart()
    with pytest.raises(errors.StaleEpoch):
        one.flush()


@pytest.mark.parametrize("options", [ROUTED, ALL], ids=["routed", "all"])
@pytest.mark.parametrize("count", [0, 10, 64, 320, 500])
def test_forks_go_their_own_ways(count, options):
    connection = FakeConnection()
    tokens = Tokens(LENGTH)
    session = open_session(connection, options=options)
    if count:
        feed(session, tokens, count)
        tokens.run(session, count, count + 1)
    first = session.tokens
    forks = [session.fork(), session.fork("named")]
    forks.append(forks[0].fork())
    ways = [branch(tokens, first, seed) for seed in range(1, 5)]
    pairs = list(zip([session, *forks], ways, strict=True))
    for more in (70, 140):
        for one, way in pairs:
            feed(one, way, first + more, size=50)
    for one, way in pairs:
        assert_same_steps(one, way)
    assert len(connection.daemon.sessions) == 4
    for fork in forks:
        fork.close()
    assert sorted(stored["name"] for stored in connection.daemon.sessions.values()) == ["named", "s"]
    with pytest.raises(errors.InvalidRequest, match="there is a session 'named'"):
        session.fork("named")


def test_a_fork_is_between_blocks_and_copies_no_summaries():
    session, tokens = open_session(FakeConnection()), Tokens(LENGTH)
    feed(session, tokens, 500)
    fork = session.fork()
    assert fork._routing.store.groups.data_ptr() == session._routing.store.groups.data_ptr()
    assert fork._window._buffer.data_ptr() != session._window._buffer.data_ptr()
    session.append(0, torch.zeros(KV_HEADS, 1, 16), torch.zeros(KV_HEADS, 1, 16))
    with pytest.raises(errors.InvalidRequest, match="1 of 3 layers"):
        session.fork()


def test_damage_in_what_must_come_back_changes_nothing():
    connection = FakeConnection()
    session, tokens = open_session(connection), Tokens(LENGTH)
    feed(session, tokens, 800)
    tokens.run(session, 800, 801)
    connection.damaged = {(1, 0, 4 * 4 + 1)}  # chunk 4, tokens 272 to 287
    with pytest.raises(errors.RecordsDamaged, match=r"layer 1.*tokens 272 to 287"):
        session.truncate(300)
    assert session.tokens == 801
    tokens.run(session, 801, 802)
    session.truncate(256)
    connection.damaged = set()
    assert_same_steps(session, branch(tokens, 256, 3))


@pytest.mark.parametrize("name", ["s", None])
def test_what_a_replaced_daemon_lost_can_be_taken_back(name):
    daemon = FakeDaemon()
    session, tokens = open_session(FakeConnection(daemon), name), Tokens(LENGTH)
    feed(session, tokens, 800)
    if name:
        session.flush()
    daemon.restart(lambda durable: 3)
    with pytest.raises(errors.SessionLost) as caught:
        tokens.run(session, 800, 801)
    first = min(first for first, _ in caught.value.token_ranges)
    assert first == (192 if name else 0)
    session.truncate(first)
    feed(session, tokens, 800)
    assert_same_steps(session, tokens)
    assert session.stats.recoveries == 1


def test_a_damaged_window_is_salvaged_only_if_asked():
    connection = FakeConnection()
    session, tokens = open_session(connection), Tokens(LENGTH)
    feed(session, tokens, 800)
    session.flush()
    connection.damaged = {(2, 1, 4 * 11 + 2), (0, 0, 4 * 9)}  # chunks 11 and 9, of 12
    with pytest.raises(errors.RecordsDamaged, match="tokens 736 to 751"):
        open_session(connection)
    with pytest.raises(errors.RecordsDamaged):
        open_session(connection, None, token_ids=tokens.ids)
    assert len(connection.daemon.sessions) == 1
    again = open_session(connection, salvage=True)
    assert again.tokens == 576
    assert_same_steps(again, branch(tokens, 576, 2))


def test_a_new_session_begins_with_the_longest_stored_prefix():
    daemon = FakeDaemon()
    tokens = Tokens(LENGTH)
    session = open_session(FakeConnection(daemon))
    feed(session, tokens, 800)
    session.flush()
    other = branch(tokens, 650, 4)
    connection = FakeConnection(daemon)
    mine = open_session(connection, None, token_ids=torch.from_numpy(other.ids[:700]))
    assert (mine.tokens, mine.created) == (640, True)
    # One sink and two recent chunks of ten were read, and no other K/V.
    assert sum(len(keys) for keys in connection.fetched_keys) == 3 * LAYERS * KV_HEADS * 4
    assert_same_steps(mine, branch(other, 640, 5))
    for arguments in ({"tenant": "other"}, {"token_ids": other.ids[1:]}, {"token_ids": other.ids[:63]}):
        assert open_session(FakeConnection(daemon), None, **{"token_ids": other.ids, **arguments}).tokens == 0
    assert not open_session(FakeConnection(daemon)).created
