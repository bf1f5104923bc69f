"""The client against the real daemon process: the same by every transport, and sessions that outlive their daemon."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import time

import numpy as np
import pytest
import torch
from hga_kvd_client import Client, Geometry, Session, SessionOptions, connect, errors
from hga_kvd_client.connection import Connection
from hga_kvd_client.keys import extent_keys
from hga_kvd_proto.v1 import kvd_pb2
from sequences import GEOMETRY, ROPE, Tokens, blocks
from test_connection import all_keys, given_up, payload
from wire import wait_for

WIDE = Geometry(4, 2, 128, "bfloat16", model_fingerprint="wide")  # records of 8 KiB, chunks of 256 KiB
ODD = Geometry(2, 3, 20, "float16", chunk_tokens=24, group_tokens=8)  # records of 640 bytes
OPTIONS = SessionOptions(
    topk_chunks=4, topk_groups=4, sink_chunks=1, recent_chunks=2, bank_groups=8, flush_chunks=2, prefill_tile_chunks=3
)


@contextlib.contextmanager
def connected(target, **options):
    connection = Connection(target, **{"region_bytes": 4 << 20, **options})
    try:
        yield connection
    finally:
        connection.disconnect()


# Every transport there is: the fast lane, gRPC with payload in shared memory, and as bytes over unix socket and TCP.
TRANSPORTS = {"lane": "auto", "shared": "shared", "bytes": "bytes", "tcp": "auto"}
every_way = pytest.mark.parametrize("way", TRANSPORTS)


@contextlib.contextmanager
def connected_by(way, running, **options):
    """A connection to a daemon of `listening`, by this transport and no other. Its sessions are gone at the end."""
    target = running.events("ready")[-1]["targets"][1] if way == "tcp" else running.target
    with connected(target, transport=TRANSPORTS[way], **options) as connection:
        assert connection.transport == ("bytes" if way == "tcp" else way)
        yield connection
        for info in connection.list():
            connection.delete(info.session_id)


@pytest.fixture(scope="module")
def listening(module_daemon):
    """Daemons on their unix socket and on TCP: one for each kind, however many tests ask for it."""

    @functools.cache
    def start(*options, nvme=True, **environment):
        named = {f"HGA_KVD_{name.upper()}": value for name, value in environment.items()}
        return module_daemon(*options, "--listen", "127.0.0.1:0", nvme=nvme, environment=named)

    return start


@pytest.mark.parametrize("nvme", [True, False])
def test_all_transports_give_the_same_bytes(listening, nvme):
    # An arena of 1 MiB at most: most of what is read comes from disk.
    running = listening(*(("--ram", "4MiB") if nvme else ()), nvme=nvme)
    with connected(running.target) as connection:
        read_before = connection.stat().fetched_nvme_records
    for geometry, chunks in ((WIDE, 40), (ODD, 30)):
        sent = payload(chunks, geometry)
        keys = all_keys(chunks, geometry)
        shuffled = np.random.default_rng(1).permutation(len(keys))[:300]
        with contextlib.ExitStack() as stack:
            connections = {way: stack.enter_context(connected_by(way, running)) for way in TRANSPORTS}
            ids = {way: connection.open(way, geometry).session_id for way, connection in connections.items()}
            for way, connection in connections.items():
                for first in range(0, chunks, 10):
                    part = sent[first * geometry.chunk_bytes : (first + 10) * geometry.chunk_bytes]
                    tokens = np.arange(first, first + 10 * geometry.chunk_tokens, dtype="<u4").tobytes()
                    assert connection.append(ids[way], first, 10, part, tokens) == first + 10
                    if nvme:
                        connection.flush(ids[way])
            # What one connection wrote, all read.
            for connection in connections.values():
                for way in TRANSPORTS:
                    opened = connection.open(way, geometry)
                    assert not opened.created
                    assert opened.chunk_count == chunks
                    everything = connection.fetch(opened.session_id, keys)
                    assert everything.statuses is None
                    assert everything.records.tobytes() == sent.tobytes()
                    assert everything.ram_records + everything.nvme_records == len(keys)
                    some = connection.fetch(opened.session_id, keys[shuffled]).records
                    np.testing.assert_array_equal(some, sent.reshape(len(keys), -1)[shuffled])
            if nvme and geometry is WIDE:
                assert connections["lane"].stat().fetched_nvme_records > read_before
            told = {connections["tcp"].info(session_id).token_ids for session_id in ids.values()}
            assert len(told) == 1
            assert len(told.pop()) == 4 * chunks * geometry.chunk_tokens
            for session_id in ids.values():
                connections["lane"].delete(session_id)


@every_way
def test_big_calls_are_split(listening, way):
    running = listening(message_bytes_max="512KiB", fetch_keys_max="1000")
    with connected_by(way, running, region_bytes=2 << 20) as connection:
        session_id = connection.open("big", WIDE).session_id
        sent = payload(64, WIDE)  # 16 MiB through an append half of 1 MiB
        ids = np.arange(64 * 64, dtype="<u4")
        assert connection.append(session_id, 0, 64, sent, ids.tobytes()) == 64
        assert connection.info(session_id).token_ids == ids.tobytes()
        keys = all_keys(64, WIDE)
        assert len(keys) > 2000
        assert connection.fetch(session_id, keys).records.tobytes() == sent.tobytes()


@every_way
@pytest.mark.parametrize("size", [40960, 41000])  # read in place; through a buffer
def test_summaries_and_records_are_read_ahead(listening, way, size):
    running = listening(message_bytes_max="512KiB", fetch_keys_max="1000")
    with connected_by(way, running, region_bytes=2 << 20) as connection:
        session_id = connection.open("s", WIDE).session_id
        chunks = payload(60, WIDE)
        connection.append(session_id, 0, 60, chunks)
        sent = np.random.default_rng(1).bytes(60 * size)
        connection.put_summaries(session_id, "x", 0, 55, sent[: 55 * size])
        step = connection.ahead_bytes_max(session_id, size) // size
        assert step == (12 if connection.landing is None else 6)
        wanted = [("x", at, min(step, 55 - at)) for at in range(0, 55, step)]
        keys = [extent_keys(WIDE, 0, at, 1, WIDE.layers)[:: 1 + at % 2] for at in range(60)]
        for stored in (False, True):
            pages = [(count, page.tobytes()) for count, page in connection.summaries(session_id, wanted, size)]
            assert [count for count, _ in pages] == [count for _, _, count in wanted]
            assert b"".join(page for _, page in pages) == sent[: 55 * size]
            found = [each.records.copy() for each in connection.records(session_id, keys, WIDE.extent_bytes)]
            for at, records in enumerate(found):
                assert np.array_equal(records, chunks.reshape(60, -1, WIDE.record_bytes)[at, :: 1 + at % 2])
            if not stored:
                connection.park(session_id)
        found_first = connection.summaries(session_id, [*wanted, ("x", 55, 1)], size)
        for _, page in pages:  # all that come before the one that is not there
            assert next(found_first)[1].tobytes() == page
        with pytest.raises(errors.SummariesNotFound):
            next(found_first)
        # One that is given up leaves nothing that could arrive later.
        for _ in range(10):
            pages = connection.summaries(session_id, wanted, size)
            next(pages)
            pages.close()
            assert np.array_equal(connection.fetch(session_id, keys[0]).records, found[0])


@every_way
def test_errors_of_the_daemon_are_typed(listening, way):
    running = listening(nvme=False, fetch_bytes_max="1MiB")
    with connected_by(way, running) as connection:
        opened = connection.open("a", WIDE)
        with pytest.raises(errors.GeometryMismatch, match="head_dim"):
            connection.open("a", Geometry(4, 2, 64, "bfloat16", model_fingerprint="wide"))
        with pytest.raises(errors.InvalidRequest):
            connection.open("b", Geometry(0, 2, 64, "bfloat16"))
        with pytest.raises(errors.SessionNotFound):
            connection.open("b", None, create=False)
        with pytest.raises(
            errors.AppendOutOfOrder, match=f"starts at chunk 1, but session {opened.session_id} ends at chunk 0"
        ):
            connection.append(opened.session_id, 1, 1, payload(1, WIDE))
        with pytest.raises(errors.InvalidRequest, match="3 bytes of token ids"):
            connection.append(opened.session_id, 0, 1, payload(1, WIDE), b"123")
        connection.append(opened.session_id, 0, 1, payload(1, WIDE))
        with pytest.raises(errors.KeyOutOfRange, match="key 32 asks for layer 0, KV head 0, group 4"):
            connection.fetch(opened.session_id, all_keys(2, WIDE))
        with pytest.raises(errors.LimitExceeded, match="split"):
            connection.fetch(opened.session_id, np.tile(all_keys(1, WIDE), 5))
        with pytest.raises(errors.SummariesNotFound):
            connection.get_summaries(opened.session_id, "x", 0, 1)
        connection.put_summaries(opened.session_id, "x", 0, 1, b"12")
        assert connection.get_summaries(opened.session_id, "x", 0, 1) == (1, b"12")
        with pytest.raises(errors.NotDurable):
            connection.flush(opened.session_id)
        with pytest.raises(errors.StorageFull, match="the RAM arena of"):
            connection.append(opened.session_id, 1, 1000, np.zeros(1000 * WIDE.chunk_bytes, np.uint8))
        assert connection.info(opened.session_id).chunk_count > 1
        assert [info.name for info in connection.list()] == ["a"]
        connection.delete(opened.session_id)
        with pytest.raises(errors.SessionNotFound):
            connection.append(opened.session_id, 1, 1, payload(1, WIDE))
        connection._limits[opened.session_id] = connection._limits[connection.open("a", WIDE).session_id]
        with pytest.raises(errors.SessionNotFound, match=f"session {opened.session_id} does not exist"):
            connection.fetch(opened.session_id, all_keys(1, WIDE))
        with pytest.raises(errors.SessionNotFound):
            connection.get_summaries(connection.open("b", WIDE).session_id + 7, "x", 0, 1)
        assert connection.transport == ("bytes" if way == "tcp" else way), "a refusal is no reason to change it"


@every_way
def test_a_daemon_that_does_not_answer_is_a_deadline(listening, way):
    running = listening("--ram", "4MiB")
    with connected_by(way, running) as connection:
        session_id = connection.open("s", WIDE).session_id
        connection.append(session_id, 0, 2, payload(2, WIDE))
        os.kill(running.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, running.pid, os.WSTOPPED)  # all its threads
        try:
            with given_up(connection, r"no answer within 0\.4 s"):
                connection.fetch(session_id, all_keys(2, WIDE))
            with given_up(connection):
                connection.append(session_id, 2, 1, payload(1, WIDE, seed=2))
        finally:
            os.kill(running.pid, signal.SIGCONT)
        assert connection.append(session_id, 2, 1, payload(1, WIDE, seed=2)) == 3
        assert connection.fetch(session_id, all_keys(2, WIDE)).records.tobytes() == payload(2, WIDE).tobytes()


@pytest.mark.parametrize("transport", ["auto", "shared", "bytes"])
def test_every_group_opened_is_dense_attention(listening, transport):
    running = listening("--ram", "4MiB")
    tokens = Tokens(600)
    options = SessionOptions(router="all", recent_chunks=2, sink_chunks=1, bank_groups=8, flush_chunks=1)
    with connect(running.target, transport=transport) as client:
        for name in ("named", None):
            session = client.open(name, GEOMETRY, ROPE, options)
            for first, end in blocks([1, 100, 1, 150], 600):
                assert (tokens.run(session, first, end) - tokens.dense(first, end)).abs().max() < 1e-5
            assert session.stats.ram_bytes + session.stats.nvme_bytes > 0
            session.close()
        assert [info.name for info in client.list()] == ["named"]
        client.connection.delete(client.list()[0].session_id)


def prefilled(client: Client, name: str | None, tokens: Tokens, count: int) -> Session:
    session = client.open(name, GEOMETRY, ROPE, OPTIONS)
    for first, end in blocks([200], count):
        tokens.run(session, first, end)
    return session


@pytest.fixture(scope="module")
def unbroken(listening):
    """A sequence, and what its tokens from 1,145 on give where nothing is restarted."""
    tokens = Tokens(1170)
    with connect(listening("--ram", "4MiB").target) as client:
        session = prefilled(client, None, tokens, 1145)
        return tokens, [tokens.run(session, step, step + 1) for step in range(1145, 1170)]


@pytest.mark.parametrize(
    ("how", "transport"), [("stop", "auto"), ("kill", "auto"), ("kill", "shared"), ("stop", "bytes")]
)
def test_a_session_goes_on_over_restarts(daemon, unbroken, how, transport):
    """Decoding gives what it gives without restarts; kill -9 takes at most what the window still has."""
    running = daemon("--ram", "8MiB")
    tokens, expected = unbroken
    with connect(running.target, transport=transport) as client:
        session = prefilled(client, "broken", tokens, 1145)
        # At 1153 chunk 17 has just been appended and not flushed.
        for step in range(1145, 1170):
            if step in (1148, 1153):
                getattr(running, how)()
                running.start()
            assert torch.equal(tokens.run(session, step, step + 1), expected[step - 1145])
        session.flush()
        assert client.list()[0].durable_chunk_count == 18
        assert session.stats.recoveries >= (1 if how == "kill" else 0)
    # A new process would do just this.
    with connect(running.target, transport=transport) as client:
        session = client.open("broken", GEOMETRY, ROPE, OPTIONS)
        assert session.tokens == 1152
        np.testing.assert_array_equal(session.token_ids(), tokens.ids[:1152])
        tokens.run(session, 1152, 1169)
        assert torch.equal(tokens.run(session, 1169, 1170), expected[-1])


def test_kill_9_after_a_flush_loses_nothing(daemon):
    running = daemon()
    tokens = Tokens(700)
    with connect(running.target) as client:
        prefilled(client, "s", tokens, 650).flush()
        running.kill()
        running.start()
    with connect(running.target) as client:
        twin = prefilled(client, None, tokens, 650)
        session = client.open("s", GEOMETRY, ROPE, OPTIONS)
        assert session.tokens == 640
        tokens.run(session, 640, 650)
        for token in range(650, 700):
            assert torch.equal(tokens.run(session, token, token + 1), tokens.run(twin, token, token + 1))


def test_a_temporary_session_does_not_outlive_its_daemon_or_its_client(daemon):
    running = daemon()
    tokens = Tokens(301)
    with connect(running.target) as client:
        session = client.open(None, GEOMETRY, ROPE, OPTIONS)
        tokens.run(session, 0, 300)
        with pytest.raises(errors.NotDurable):
            session.flush()
        running.stop()
        running.start()
        with pytest.raises(errors.SessionLost, match="temporary session lost tokens 0 to 299"):
            tokens.run(session, 300, 301)
        client.open(None, GEOMETRY, ROPE, OPTIONS)
        assert len(client.list()) == 1
    with connect(running.target) as client:
        wait_for(lambda: not client.list())


def test_a_client_waits_for_its_daemon(daemon):
    running = daemon()
    with connect(running.target) as client:
        session = client.open("s", GEOMETRY, ROPE, OPTIONS)
        Tokens(300).run(session, 0, 300)
        running.kill()
        client.connection._link._reconnect_s = 0.3
        with pytest.raises(errors.Unavailable, match="no daemon answered"):
            session.flush()
        client.connection._link._reconnect_s = 20
        running.start()
        session.flush()
        assert session.tokens == 300


@pytest.mark.parametrize("transport", ["auto", "bytes"])
def test_forks_truncations_and_prefixes(daemon, transport):
    """Stored once and shared, rolled back for good; stale calls are refused by every transport."""
    running = daemon()
    tokens = np.arange(12 * 64, dtype="<u4").tobytes()
    sent, other = payload(12, WIDE), payload(2, WIDE)[::-1].copy()
    with connected(running.target, transport=transport) as connection:
        session = connection.open("a", WIDE, tenant="t").session_id
        connection.append(session, 0, 12, sent, tokens)
        opened = connection.open("b", WIDE, tenant="t", token_ids=tokens[: 8 * 256] + b"\xff" * 512)
        assert (opened.chunk_count, opened.epoch) == (8, 0)
        fork = connection.fork(session, 5, "c")
        connection.append(fork.session_id, 5, 2, other)
        assert connection.truncate(session, 3) == 1
        for stale in (
            lambda: connection.fetch(session, all_keys(1, WIDE)),
            lambda: connection.append(session, 3, 1, sent[: WIDE.chunk_bytes]),
            lambda: connection.truncate(session, 1),
            lambda: connection.fork(session),
            lambda: connection.put_summaries(session, "k", 0, 1, b"x"),
            lambda: connection.get_summaries(session, "k", 0, 1),
        ):
            with pytest.raises(errors.StaleEpoch, match="in epoch 1 now"):
                stale()
        assert connection.stat().chunks == 10
        for session_id in (session, opened.session_id, fork.session_id):
            connection.flush(session_id)
    running.kill()
    running.start()
    with connected(running.target, transport=transport) as connection:
        size = WIDE.chunk_bytes
        for name, expected in (
            ("a", sent[: 3 * size]),
            ("b", sent[: 8 * size]),
            ("c", np.concatenate((sent[: 5 * size], other))),
        ):
            found = connection.open(name, None, tenant="t")
            count = len(expected) // size
            assert (found.chunk_count, found.epoch) == (count, int(name == "a"))
            keys = all_keys(count, WIDE)
            records = connection.fetch(found.session_id, keys, epoch=found.epoch).records
            assert (records.reshape(-1) == expected).all()
        assert connection.stat().chunks == 10


@every_way
def test_a_deadline_leaves_out_and_a_prefetch_brings_in(listening, way):
    running = listening("--ram", "4MiB")
    with connected_by(way, running) as connection:
        session_id = connection.open("s", WIDE).session_id
        sent, keys = payload(40, WIDE), all_keys(40, WIDE)
        for first in range(0, 40, 4):
            part = sent[first * WIDE.chunk_bytes : (first + 4) * WIDE.chunk_bytes]
            connection.append(session_id, first, 4, part)
            connection.flush(session_id)
        records = sent.reshape(len(keys), -1)

        some = np.random.default_rng(2).permutation(len(keys))[:100]
        late_before = connection.stat().late_records
        answer = connection.fetch(session_id, keys[some], deadline_us=1)
        assert answer.statuses is not None
        late = answer.statuses == kvd_pb2.RECORD_STATUS_LATE
        assert late.any()
        assert set(answer.statuses[~late]) <= {0}
        assert answer.ram_records == np.count_nonzero(~late)
        np.testing.assert_array_equal(answer.records[~late], records[some][~late])
        assert connection.stat().late_records - late_before == np.count_nonzero(late)
        again = connection.fetch(session_id, keys[some], deadline_us=10_000_000)
        assert again.statuses is None
        np.testing.assert_array_equal(again.records, records[some])

        wanted = keys[:128]  # of the oldest chunks
        before = connection.stat().prefetched_records
        connection.prefetch(session_id, wanted)
        deadline = time.monotonic() + 10
        answered = connection.fetch(session_id, wanted)
        while answered.nvme_records and time.monotonic() < deadline:  # one that came before its prefetch read itself
            answered = connection.fetch(session_id, wanted)
        assert answered.nvme_records == 0
        assert answered.records.tobytes() == records[:128].tobytes()
        stats = connection.stat()
        assert stats.prefetched_records >= before
        assert stats.prefetch_useful_records <= stats.prefetched_records
        with pytest.raises(errors.KeyOutOfRange):
            connection.prefetch(session_id, all_keys(41, WIDE)[-1:])
        with pytest.raises(errors.StaleEpoch):
            connection.prefetch(session_id, wanted, epoch=7)
