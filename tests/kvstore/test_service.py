"""The gRPC face over a real engine in RAM, in this process: every call, every status, payloads both ways."""

import contextlib
import json
import socket
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from hga_kvd import errors, listen
from hga_kvd.config import Settings
from hga_kvd.engine import Engine
from hga_kvd.handover import Handover
from hga_kvd.landing import Landing, NotAttached
from hga_kvd.log import make_log
from hga_kvd.messages import gathered
from hga_kvd.metrics import Metrics
from hga_kvd.refusals import STATUS, SharingRefused
from hga_kvd.server import Server
from hga_kvd.service import KvdService
from hga_kvd_proto.v1 import kvd_pb2, kvd_pb2_grpc
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import generate_latest
from wire import (
    GEOMETRY,
    MESSAGE,
    Client,
    all_keys,
    append,
    open_session,
    parts,
    payload_of,
    records_of,
    refused,
    wait_for,
)

MIB = 1 << 20
CODE = grpc.StatusCode


class Log:
    """A stream that keeps what was logged."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass

    def isatty(self):
        return False


class Running:
    def __init__(self, **settings):
        self.directory = tempfile.TemporaryDirectory(prefix="kvd")
        path = Path(self.directory.name) / "k.sock"
        limits = {"ram": 32 * MIB, "message_bytes_max": MIB, "grace_s": 5, **settings}
        self.settings = Settings(listen=(f"unix:{path}", "127.0.0.1:0"), **limits)
        self.stream = Log()
        log = make_log("debug", self.stream)
        self.engine = Engine(self.settings, None, log)
        self.landing = Landing(
            self.settings.region_bytes_max, self.settings.clients_max, self.settings.regions_bytes_max
        )
        self.handover = Handover(listen.handover_path(path))
        self.metrics = Metrics(self.engine.stats, lambda: len(self.landing))
        self.service = KvdService(
            engine=self.engine,
            landing=self.landing,
            handover=self.handover,
            settings=self.settings,
            log=log,
            observe_fetch=self.metrics.fetch_seconds.observe,
            observe_wait=self.metrics.observe_wait,
        )
        self.metrics.watch_turns(self.service.calls.turns.waiting)
        self.server = Server(self.service, self.settings)
        self.watcher = threading.Thread(target=self.service.watch_clients, args=(self.handover,))
        self.watcher.start()
        self.server.start()
        self.path = path
        self.channels = [grpc.insecure_channel(target) for target in self.server.targets]
        self.stub, self.tcp_stub = (kvd_pb2_grpc.KvdStub(channel) for channel in self.channels)

    def close(self):
        for channel in self.channels:
            channel.close()
        self.server.stop(self.settings.grace_s)
        self.service.lanes.shutdown(5)
        self.handover.stop()
        self.watcher.join(10)
        assert not self.watcher.is_alive()
        self.engine.shutdown()
        self.directory.cleanup()


@pytest.fixture
def running():
    made = []

    def start(**settings):
        made.append(Running(**settings))
        return made[-1]

    yield start
    for one in made:
        one.close()


@pytest.fixture
def kvd(running):
    return running()


@pytest.fixture
def client(kvd):
    client = Client(kvd.stub, kvd.path)
    yield client
    client.socket.close()


def test_every_error_has_a_status():
    classes = {value for value in vars(errors).values() if isinstance(value, type)} - {
        errors.KvdError,
        errors.StartRefused,
    }
    assert set(STATUS) == classes | {NotAttached, SharingRefused}


def test_health_and_reflection(kvd):
    channel = kvd.channels[0]
    for name in ("", "hga_kvd.v1.Kvd"):
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=name))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    answer = next(reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([request])))
    assert "hga_kvd.v1.Kvd" in [service.name for service in answer.list_services_response.service]


def test_the_socket_is_private(kvd):
    assert kvd.path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("stub_name", ["stub", "tcp_stub"])
@pytest.mark.parametrize("part_bytes", [1, 1000, 10**6])
def test_append_and_fetch_as_bytes(kvd, stub_name, part_bytes):
    stub = getattr(kvd, stub_name)
    opened = open_session(stub)
    assert (opened.created, opened.chunk_count, opened.message_bytes_max) == (True, 0, MIB)
    assert opened.geometry == MESSAGE
    chunks = 1 if part_bytes == 1 else 3
    payload = payload_of(chunks)
    if part_bytes == 1:  # one byte a message takes its time: the last 100 only
        stream = parts(opened.session_id, payload, chunks=1, part_bytes=payload.size - 100)
        head = [next(stream), next(stream)]
        tail = [kvd_pb2.AppendRequest(payload=bytes([byte])) for byte in payload[-100:]]
        assert stub.Append(iter(head + tail)).chunk_count == 1
    else:
        assert append(stub, opened.session_id, payload, part_bytes=part_bytes) == chunks
    keys = np.random.default_rng(1).permutation(all_keys(chunks))
    answer = stub.Fetch(kvd_pb2.FetchRequest(session_id=opened.session_id, keys=keys.tobytes()))
    assert answer.payload == records_of(payload, keys).tobytes()
    assert (answer.statuses, answer.ram_records, answer.nvme_records) == (b"", len(keys), 0)


def test_append_and_fetch_through_shared_memory(kvd, client):
    session_id = open_session(kvd.stub).session_id
    payload = payload_of(2)
    client.memory[4096 : 4096 + payload.size] = payload
    header = kvd_pb2.AppendHeader(
        session_id=session_id, first_chunk=0, chunk_count=2, shared=client.range(4096, payload.size)
    )
    assert kvd.stub.Append(iter([kvd_pb2.AppendRequest(header=header)])).chunk_count == 2
    keys = all_keys(2)[::-1].copy()
    expected = records_of(payload, keys)
    offset = MIB
    answer = kvd.stub.Fetch(
        kvd_pb2.FetchRequest(
            session_id=session_id, keys=keys.tobytes(), shared=client.range(offset, expected.size + 4096)
        )
    )
    assert answer.payload == b""
    np.testing.assert_array_equal(client.memory[offset : offset + expected.size], expected.ravel())
    assert not client.memory[offset + expected.size :].any()


def test_a_fetch_of_nothing(kvd):
    session_id = open_session(kvd.stub).session_id
    assert kvd.stub.Fetch(kvd_pb2.FetchRequest(session_id=session_id)) == kvd_pb2.FetchResponse()


def test_attach_is_for_unix_sockets(kvd):
    code, sentence, _ = refused(kvd.tcp_stub.Attach, kvd_pb2.AttachRequest(region_bytes=1))
    assert code == CODE.UNIMPLEMENTED
    assert "go on with payloads in the messages" in sentence


def test_fetch_refusals(kvd, client):
    session_id = open_session(kvd.stub).session_id
    append(kvd.stub, session_id, payload_of(1))
    one = all_keys(1)[:1].tobytes()

    def fetch(**fields):
        return refused(kvd.stub.Fetch, kvd_pb2.FetchRequest(**{"session_id": session_id, "keys": one, **fields}))

    assert fetch(session_id=999)[0::2] == (CODE.NOT_FOUND, "SessionNotFound")
    assert fetch(keys=one[:-1])[0] == CODE.INVALID_ARGUMENT
    beyond = all_keys(1)[:1]
    beyond["group"] = 4
    assert fetch(keys=beyond.tobytes())[0] == CODE.OUT_OF_RANGE
    too_many = one * (kvd.settings.fetch_keys_max + 1)
    assert fetch(keys=too_many)[0] == CODE.RESOURCE_EXHAUSTED
    code, sentence, _ = fetch(keys=one * (MIB // GEOMETRY.record_bytes + 1))
    assert code == CODE.RESOURCE_EXHAUSTED
    assert "split" in sentence
    size = GEOMETRY.record_bytes
    for offset, room in ((1, size), (2 * MIB, size), (2**64 - 4096, size), (0, size - 1)):
        assert fetch(shared=client.range(offset, room))[0] == CODE.INVALID_ARGUMENT, (offset, room)
    stranger = kvd_pb2.SharedRange(client_id=client.client_id ^ 2, offset=0, bytes=size)
    assert fetch(shared=stranger)[0::2] == (CODE.UNAVAILABLE, "NotAttached")


@pytest.mark.parametrize("change", [-1, 1, -1000, 1000, 2 * MIB])
def test_payload_of_the_wrong_size_leaves_no_trace(kvd, change):
    session_id = open_session(kvd.stub).session_id
    payload = np.resize(payload_of(1), GEOMETRY.chunk_bytes + change)
    code, sentence, _ = refused(append, kvd.stub, session_id, payload, chunks=1)
    assert code == CODE.INVALID_ARGUMENT
    assert str(GEOMETRY.chunk_bytes) in sentence
    assert open_session(kvd.stub).chunk_count == 0
    assert append(kvd.stub, session_id, payload_of(1)) == 1


@given(st.lists(st.binary(max_size=9), max_size=9), st.integers(0, 40))
def test_parts_make_the_same_payload_however_they_are_cut(pieces, expected):
    whole = b"".join(pieces)
    first, *rest = pieces or [b""]
    stream = iter([kvd_pb2.AppendRequest(payload=piece) for piece in rest])
    if len(whole) != expected or not expected:
        with pytest.raises(errors.InvalidRequest, match="payload has"):
            gathered(first, stream, 1, expected or len(whole) + 1)
    else:
        assert gathered(first, stream, 1, expected).tobytes() == whole


def test_streams_of_the_wrong_shape(kvd, client):
    session_id = open_session(kvd.stub).session_id
    size = GEOMETRY.chunk_bytes
    header = kvd_pb2.AppendHeader(session_id=session_id, first_chunk=0, chunk_count=1)
    shared = kvd_pb2.AppendHeader(session_id=session_id, first_chunk=0, chunk_count=1, shared=client.range(0, size))
    wrong_size = kvd_pb2.AppendHeader(
        session_id=session_id, first_chunk=0, chunk_count=1, shared=client.range(0, size + 4096)
    )
    message = kvd_pb2.AppendRequest
    for stream in (
        [],
        [message(payload=b"x")],
        [message(header=header), message(header=header)],
        [message(header=shared), message(payload=b"x")],
        [message(header=shared, payload=b"x")],
        [message(header=wrong_size)],
    ):
        assert refused(kvd.stub.Append, iter(stream))[0] == CODE.INVALID_ARGUMENT, stream
    assert open_session(kvd.stub).chunk_count == 0


def test_the_header_is_checked_before_the_payload(kvd):
    answered = threading.Event()

    def stream(**fields):
        yield kvd_pb2.AppendRequest(header=kvd_pb2.AppendHeader(**fields))
        answered.wait(60)  # no payload comes before there is an answer

    session_id = open_session(kvd.stub).session_id
    for fields, code in (
        ({"session_id": 999, "chunk_count": 1}, CODE.NOT_FOUND),
        ({"session_id": session_id, "first_chunk": 1, "chunk_count": 1}, CODE.FAILED_PRECONDITION),
        ({"session_id": session_id, "chunk_count": 0}, CODE.INVALID_ARGUMENT),
        ({"session_id": session_id, "chunk_count": 2**32 - 1}, CODE.RESOURCE_EXHAUSTED),
    ):
        assert refused(kvd.stub.Append, stream(**fields), timeout=20)[0] == code, fields
    answered.set()


def test_a_cancelled_append_leaves_no_trace(kvd):
    session_id = open_session(kvd.stub).session_id
    halfway, go_on = threading.Event(), threading.Event()

    def stream():
        messages = list(parts(session_id, payload_of(1)))
        yield from messages[: len(messages) // 2]
        halfway.set()
        go_on.wait(30)

    call = kvd.stub.Append.future(stream())
    assert halfway.wait(30)
    call.cancel()
    go_on.set()
    with pytest.raises(grpc.FutureCancelledError):
        call.result(5)
    assert open_session(kvd.stub).chunk_count == 0
    assert append(kvd.stub, session_id, payload_of(1)) == 1


def test_a_stalled_append_is_ended(running):
    kvd = running(append_stream_s_max=0.5, rpc_threads=1)
    session_id = open_session(kvd.stub).session_id
    go_on = threading.Event()

    def stream():
        yield next(parts(session_id, payload_of(1)))
        go_on.wait(30)

    assert refused(kvd.stub.Append, stream(), timeout=60)[0] == CODE.CANCELLED
    assert append(kvd.stub, session_id, payload_of(1), part_bytes=100_000) == 1
    go_on.set()


def test_streams_that_stall_do_not_take_all_threads(running):
    kvd = running(rpc_threads=4)
    sessions = [open_session(kvd.stub, f"s{i}").session_id for i in range(4)]
    go_on = threading.Event()

    def stream(session_id):
        messages = parts(session_id, payload_of(1))
        yield next(messages)
        go_on.wait(60)
        yield from messages

    calls = [kvd.stub.Append.future(stream(session_id)) for session_id in sessions[:3]]
    wait_for(lambda: not kvd.service._streams._value)
    code, sentence, meaning = refused(append, kvd.stub, sessions[3], payload_of(1))
    assert (code, meaning) == (CODE.RESOURCE_EXHAUSTED, "LimitExceeded")
    assert "3 Append streams" in sentence
    assert kvd.stub.Stat(kvd_pb2.StatRequest(), timeout=30).sessions == 4  # a thread is left
    go_on.set()
    assert [call.result(60).chunk_count for call in calls] == [1, 1, 1]
    assert append(kvd.stub, sessions[3], payload_of(1)) == 1
    assert kvd.service._streams._value == 3


def test_payloads_on_their_way_are_limited(running):
    kvd = running(inflight_bytes_max=GEOMETRY.chunk_bytes * 3 // 2)
    session_id = open_session(kvd.stub).session_id
    other = open_session(kvd.stub, "other").session_id
    go_on = threading.Event()

    def stream():
        messages = parts(session_id, payload_of(1))
        yield next(messages)
        go_on.wait(60)
        yield from messages

    call = kvd.stub.Append.future(stream())
    wait_for(lambda: kvd.service._inflight_bytes)
    code, sentence, meaning = refused(append, kvd.stub, other, payload_of(1))
    assert (code, meaning) == (CODE.RESOURCE_EXHAUSTED, "LimitExceeded")
    assert str(GEOMETRY.chunk_bytes) in sentence
    go_on.set()
    assert call.result(20).chunk_count == 1
    assert append(kvd.stub, other, payload_of(1)) == 1


class Stalling:
    """Stands between a client and a daemon's TCP address; once `stalled`, the client gets nothing more."""

    def __init__(self, target):
        host, port = target.rsplit(":", 1)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._server = socket.create_connection((host, int(port)))
        self.target = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.stalled = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        self._client, _ = self._listener.accept()
        threading.Thread(target=self._carry, args=(self._client, self._server), daemon=True).start()
        self._carry(self._server, self._client)

    def _carry(self, source, sink):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if source is self._server and self.stalled.is_set():
                    return
                sink.sendall(data)

    def close(self):
        for one in (self._server, self._client):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        self._listener.close()


def test_answers_that_nobody_reads_are_limited(running):
    keys = np.tile(all_keys(3), 20)  # 1 MB; sockets hold a few of them
    size = len(keys) * GEOMETRY.record_bytes
    limit = 10 * size + size // 2
    kvd = running(inflight_bytes_max=limit)
    session_id = open_session(kvd.stub).session_id
    append(kvd.stub, session_id, payload_of(3))
    request = kvd_pb2.FetchRequest(session_id=session_id, keys=keys.tobytes())
    way = Stalling(kvd.server.targets[1])
    with grpc.insecure_channel(way.target) as channel:
        stub = kvd_pb2_grpc.KvdStub(channel)
        assert len(stub.Fetch(request).payload) == size
        wait_for(lambda: kvd.service._inflight_bytes == 0)
        way.stalled.set()
        calls = [stub.Fetch.future(request) for _ in range(40)]
        wait_for(lambda: kvd.service._inflight_bytes > 9 * size)
        wait_for(lambda: "together they may have" in kvd.stream.text)
        code, sentence, meaning = refused(kvd.stub.Fetch, request)
        assert (code, meaning) == (CODE.RESOURCE_EXHAUSTED, "LimitExceeded")
        assert str(limit) in sentence
        assert kvd.stub.Stat(kvd_pb2.StatRequest()).version  # small answers go on
        way.close()
        assert all(call.exception(20) for call in calls)
    wait_for(lambda: kvd.service._inflight_bytes == 0)
    assert len(kvd.stub.Fetch(request).payload) == size


def test_an_unexpected_error_is_internal_and_logged(kvd, monkeypatch):
    def broken():
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(kvd.engine, "list", broken)
    code, sentence, _ = refused(kvd.stub.List, kvd_pb2.ListRequest())
    assert code == CODE.INTERNAL
    assert sentence == "the daemon failed in List (ZeroDivisionError); its log has the details"
    faults = [json.loads(line) for line in kvd.stream.text.splitlines() if '"fault"' in line]
    assert "Traceback" in faults[0]["exception"]
    monkeypatch.undo()
    assert kvd.stub.List(kvd_pb2.ListRequest()) == kvd_pb2.ListResponse()


@pytest.mark.parametrize(
    ("error", "code"),
    [(OSError(5, "Input/output error"), CODE.UNAVAILABLE), (MemoryError(), CODE.RESOURCE_EXHAUSTED)],
)
def test_errors_of_the_machine(kvd, monkeypatch, error, code):
    def broken(session_id):
        raise error

    monkeypatch.setattr(kvd.engine, "record_bytes", broken)
    assert refused(kvd.stub.Fetch, kvd_pb2.FetchRequest(session_id=1))[0] == code


def test_a_long_sentence_fits_the_headers(kvd, monkeypatch):
    def broken():
        raise errors.InvalidRequest("é" * 100_000)

    monkeypatch.setattr(kvd.engine, "list", broken)
    code, sentence, _ = refused(kvd.stub.List, kvd_pb2.ListRequest())
    assert code == CODE.INVALID_ARGUMENT
    assert sentence.startswith("ééé")


def test_open_statuses(kvd):
    first = open_session(kvd.stub)
    again = kvd.stub.Open(kvd_pb2.OpenRequest(name="s"))
    assert (again.session_id, again.created) == (first.session_id, False)
    assert refused(kvd.stub.Open, kvd_pb2.OpenRequest(name="none"))[0] == CODE.NOT_FOUND
    assert refused(kvd.stub.Open, kvd_pb2.OpenRequest(name="x", create=True))[0] == CODE.INVALID_ARGUMENT
    other = kvd_pb2.Geometry()
    other.CopyFrom(MESSAGE)
    other.head_dim = 32
    code, sentence, meaning = refused(kvd.stub.Open, kvd_pb2.OpenRequest(name="s", geometry=other, create=True))
    assert (code, meaning) == (CODE.FAILED_PRECONDITION, "GeometryMismatch")
    assert "head_dim" in sentence
    unknown = kvd_pb2.OpenRequest(geometry=MESSAGE, create=True, client_id=77)
    assert refused(kvd.stub.Open, unknown)[0::2] == (CODE.UNAVAILABLE, "NotAttached")


def test_flush_without_nvme(kvd):
    session_id = open_session(kvd.stub).session_id
    code, _, meaning = refused(kvd.stub.Flush, kvd_pb2.FlushRequest(session_id=session_id))
    assert (code, meaning) == (CODE.FAILED_PRECONDITION, "NotDurable")


def test_summaries(kvd):
    session_id = open_session(kvd.stub).session_id
    append(kvd.stub, session_id, payload_of(3))
    ask = {"session_id": session_id, "kind": "hga.v1"}
    kvd.stub.PutSummaries(kvd_pb2.PutSummariesRequest(**ask, first_chunk=0, chunk_count=2, payload=bytes(range(200))))
    answer = kvd.stub.GetSummaries(kvd_pb2.GetSummariesRequest(**ask, first_chunk=1, chunk_count=1))
    assert (answer.chunk_count, answer.payload) == (1, bytes(range(100, 200)))
    answer = kvd.stub.GetSummaries(kvd_pb2.GetSummariesRequest(**ask, first_chunk=0, chunk_count=3))
    assert (answer.chunk_count, answer.payload_bytes) == (2, 200)  # the third has none
    missing = kvd_pb2.GetSummariesRequest(**ask, first_chunk=2, chunk_count=1)
    assert refused(kvd.stub.GetSummaries, missing)[0] == CODE.NOT_FOUND
    large = kvd_pb2.PutSummariesRequest(**ask, first_chunk=0, chunk_count=1, payload=bytes(MIB + 1))
    assert refused(kvd.stub.PutSummaries, large)[0] == CODE.RESOURCE_EXHAUSTED


def test_close_and_delete(kvd):
    temporary = open_session(kvd.stub, "").session_id
    named = open_session(kvd.stub).session_id
    for session_id in (temporary, named):
        kvd.stub.Close(kvd_pb2.CloseRequest(session_id=session_id))
    assert [s.session_id for s in kvd.stub.List(kvd_pb2.ListRequest()).sessions] == [named]
    kvd.stub.Delete(kvd_pb2.DeleteRequest(session_id=named))
    assert refused(append, kvd.stub, named, payload_of(1))[0] == CODE.NOT_FOUND
    assert refused(kvd.stub.Delete, kvd_pb2.DeleteRequest(session_id=named))[0] == CODE.NOT_FOUND


def test_a_dead_client_takes_its_temporary_sessions_along(kvd):
    client = Client(kvd.stub, kvd.path)
    mine = open_session(kvd.stub, "", client.client_id).session_id
    kept = {open_session(kvd.stub, "", 0).session_id, open_session(kvd.stub, "named", client.client_id).session_id}
    assert kvd.stub.Stat(kvd_pb2.StatRequest()).attached_clients == 1
    client.socket.close()
    wait_for(lambda: kvd.stub.Stat(kvd_pb2.StatRequest()).sessions != 3)
    assert {s.session_id for s in kvd.stub.List(kvd_pb2.ListRequest()).sessions} == kept
    assert mine not in kept
    assert kvd.stub.Stat(kvd_pb2.StatRequest()).attached_clients == 0


def test_list_comes_in_pages(running):
    kvd = running(message_bytes_max=4096)
    made = [open_session(kvd.stub, f"session {index}").session_id for index in range(100)]
    listed, pages, more = [], 0, True
    while more:
        answer = kvd.stub.List(kvd_pb2.ListRequest(after_session_id=listed[-1] if listed else 0))
        assert answer.ByteSize() <= 4096
        listed += [session.session_id for session in answer.sessions]
        pages, more = pages + 1, answer.more
    assert listed == sorted(made)
    assert pages > 1


def test_stat_of_a_session_pages_its_token_ids(running):
    kvd = running(message_bytes_max=4096)  # 16 chunks of token ids
    session_id = open_session(kvd.stub).session_id
    ids = np.arange(20 * 64, dtype="<u4").tobytes()
    append(kvd.stub, session_id, payload_of(20), token_ids=ids)
    first = kvd.stub.Stat(kvd_pb2.StatRequest(session_id=session_id)).session
    assert (first.chunk_count, first.name, first.geometry) == (20, "s", MESSAGE)
    rest = kvd.stub.Stat(kvd_pb2.StatRequest(session_id=session_id, first_chunk=16)).session
    assert first.token_ids + rest.token_ids == ids
    assert len(first.token_ids) == 4096
    assert refused(kvd.stub.Stat, kvd_pb2.StatRequest(session_id=999))[0] == CODE.NOT_FOUND


def test_stat_and_metrics_tell_the_same(kvd):
    session_id = open_session(kvd.stub).session_id
    append(kvd.stub, session_id, payload_of(1))
    for _ in range(3):
        kvd.stub.Fetch(kvd_pb2.FetchRequest(session_id=session_id, keys=all_keys(1).tobytes()))
    stats = kvd.stub.Stat(kvd_pb2.StatRequest())
    assert (stats.io_engine, stats.sessions, stats.fetches) == ("none", 1, 3)
    assert stats.appended_bytes == GEOMETRY.chunk_bytes
    assert stats.fetched_ram_records == 3 * all_keys(1).size
    text = generate_latest(kvd.metrics.registry).decode()
    assert f"hga_kvd_fetched_ram_records_total {float(stats.fetched_ram_records)}" in text
    assert "hga_kvd_fetch_seconds_count 3.0" in text
    assert 'hga_kvd_wait_seconds_count{size="small"} 4.0' in text
    assert 'hga_kvd_waiting_calls{size="large"} 0.0' in text
    assert 'hga_kvd_info{io_engine="none"' in text


def test_fetches_from_many_threads_while_appending(kvd, client):
    """Two ranges of one region and plain messages at the same time; every answer is exact."""
    session_id = open_session(kvd.stub).session_id
    payload = payload_of(8)
    append(kvd.stub, session_id, payload[: 4 * GEOMETRY.chunk_bytes])
    keys = all_keys(4)

    def work(index):
        random = np.random.default_rng(index)
        for _ in range(20):
            chosen = random.choice(keys, 16)
            request = kvd_pb2.FetchRequest(session_id=session_id, keys=chosen.tobytes())
            expected = records_of(payload, chosen).tobytes()
            if index < 2:
                offset = index * MIB
                request.shared.CopyFrom(client.range(offset, len(expected)))
                kvd.stub.Fetch(request)
                assert client.memory[offset : offset + len(expected)].tobytes() == expected
            else:
                assert kvd.stub.Fetch(request).payload == expected

    with ThreadPoolExecutor(4) as pool:
        done = [pool.submit(work, index) for index in range(4)]
        for chunk in range(4, 8):
            part = payload[chunk * GEOMETRY.chunk_bytes : (chunk + 1) * GEOMETRY.chunk_bytes]
            append(kvd.stub, session_id, part, first=chunk)
        for future in done:
            future.result(30)


def test_a_taken_address_refuses_the_start(kvd):
    with pytest.raises(errors.StartRefused, match="cannot listen on"):
        Server(kvd.service, kvd.settings.model_copy(update={"listen": (kvd.server.targets[1],)}))
