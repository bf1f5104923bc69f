"""Connection against a daemon with faults on order, and what it promises without a daemon."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from hga_kvd_client import errors
from hga_kvd_client.connection import Connection
from hga_kvd_client.geometry import KEY_DTYPE, Geometry
from hga_kvd_client.link import RETIRED_REGIONS_MAX
from hga_kvd_client.target import default_target
from scripted_daemon import ScriptedDaemon, unavailable, waits_for

GEOMETRY = Geometry(2, 3, 32, "float32")  # records of 4096, chunks of 96 KiB
KIB = 1 << 10


@pytest.fixture
def scripted(tmp_path_factory):
    made = []

    def start(**options) -> ScriptedDaemon:
        directory = tmp_path_factory.mktemp("d")
        made.append(ScriptedDaemon(directory, **options))
        return made[-1]

    yield start
    for daemon in made:
        daemon.stop()


@pytest.fixture
def connect():
    made = []

    def start(target: str, **options) -> Connection:
        made.append(Connection(target, **{"reconnect_s": 5, "region_bytes": 1 << 20, **options}))
        return made[-1]

    yield start
    for connection in made:
        connection.disconnect()


@contextlib.contextmanager
def given_up(connection, pattern="no answer", after_s=0.4):
    """A call that ends for want of an answer; no other call has so little time."""
    before, connection._link._deadline_s = connection._link._deadline_s, after_s
    try:
        with pytest.raises(errors.DeadlineExceeded, match=pattern):
            yield
    finally:
        connection._link._deadline_s = before


def payload(chunks: int, geometry: Geometry = GEOMETRY, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, chunks * geometry.chunk_bytes, dtype=np.uint8)


def all_keys(chunks: int, geometry: Geometry = GEOMETRY) -> np.ndarray:
    """In storage order: fetching them gives the payload back."""
    keys = np.zeros((chunks, geometry.layers, geometry.kv_heads, geometry.groups_per_chunk), KEY_DTYPE)
    keys["layer"] = np.arange(geometry.layers)[None, :, None, None]
    keys["kv_head"] = np.arange(geometry.kv_heads)[None, None, :, None]
    groups = np.arange(geometry.groups_per_chunk)[None, :] + np.arange(chunks)[:, None] * geometry.groups_per_chunk
    keys["group"] = groups[:, None, None, :]
    return keys.reshape(-1)


@pytest.mark.parametrize("transport", ["auto", "bytes"])
@pytest.mark.parametrize("geometry", [GEOMETRY, Geometry(1, 1, 5, "float16"), Geometry(3, 1, 80, "bfloat16", 48, 8)])
@pytest.mark.parametrize("region_bytes", [16 * KIB, 256 * KIB, 4 << 20])
def test_splits_give_the_same_bytes(scripted, connect, transport, geometry, region_bytes):
    daemon = scripted(message_bytes_max=32 * KIB, fetch_keys_max=50)
    connection = connect(daemon.target, transport=transport, region_bytes=region_bytes)
    assert connection.transport == ("shared" if transport == "auto" else "bytes")
    session = connection.open("s", geometry)
    sent = payload(20, geometry)
    assert connection.append(session.session_id, 0, 20, sent) == 20
    fetched = connection.fetch(session.session_id, all_keys(20, geometry))
    assert fetched.records.reshape(-1).tobytes() == sent.tobytes()
    assert fetched.ram_records + fetched.nvme_records == len(all_keys(20, geometry))
    assert fetched.statuses is None
    shared = {shared for call, shared in daemon.calls if call == "Fetch"}
    assert shared == {transport == "auto"}
    appends = {shared for call, shared in daemon.calls if call == "Append"}
    assert appends == {transport == "auto" and geometry.chunk_bytes <= region_bytes // 2}


@pytest.mark.parametrize("transport", ["auto", "bytes"])
@pytest.mark.parametrize("region_bytes", [16 * KIB, 256 * KIB, 4 << 20])  # answers in messages, in one slot, in several
def test_answers_read_ahead_survive_restarts(scripted, connect, transport, region_bytes):
    daemon = scripted(message_bytes_max=128 * KIB, fetch_keys_max=100)
    connection = connect(daemon.target, transport=transport, region_bytes=region_bytes)
    session_id = connection.open("s", GEOMETRY).session_id
    sent = payload(20)
    connection.append(session_id, 0, 20, sent)
    room = connection.ahead_bytes_max(session_id, GEOMETRY.chunk_bytes)
    assert GEOMETRY.chunk_bytes <= room <= 100 * GEOMETRY.record_bytes
    wanted = np.split(all_keys(20), 20)
    read = []
    for number, answer in enumerate(connection.records(session_id, wanted, GEOMETRY.chunk_bytes)):
        if number in (3, 19):
            daemon.restart()
        read.append(answer.records.tobytes())  # still there, though a new daemon has a new region
    assert b"".join(read) == sent.tobytes()
    in_memory = transport == "auto" and GEOMETRY.chunk_bytes <= region_bytes // 2
    assert {shared for call, shared in daemon.calls if call == "Fetch"} == {in_memory}
    assert connection.fetch(session_id, wanted[3]).records.tobytes() == read[3]


def test_a_payload_built_in_the_buffer_is_not_copied(scripted, connect):
    connection = connect(scripted().target)
    session = connection.open("s", GEOMETRY)
    buffer = connection.append_buffer(2 * GEOMETRY.chunk_bytes)
    assert np.shares_memory(buffer, connection._link.region.append_part)
    buffer[:] = payload(2)
    connection.append(session.session_id, 0, 2, buffer)
    assert connection.fetch(session.session_id, all_keys(2)).records.tobytes() == payload(2).tobytes()
    assert connection.append_buffer(1 << 30).shape == (1 << 30,)


@pytest.mark.parametrize("transport", ["auto", "bytes"])
def test_a_restart_between_and_within_calls(scripted, connect, transport):
    daemon = scripted()
    connection = connect(daemon.target, transport=transport)
    session_id = connection.open("s", GEOMETRY).session_id
    connection.append(session_id, 0, 3, payload(3))
    generation = connection.generation
    daemon.restart()
    assert connection.fetch(session_id, all_keys(3)).records.tobytes() == payload(3).tobytes()
    assert connection.notice_replacement() or connection.generation > generation
    generation = connection.generation
    assert not connection.notice_replacement()
    daemon.faults["Fetch"] = [unavailable, unavailable]
    assert connection.fetch(session_id, all_keys(3)).records.tobytes() == payload(3).tobytes()
    assert connection.generation == generation


def test_a_daemon_that_answers_slowly_is_the_same(scripted, connect):
    """A client that took it for another would give up its region, and lose its temporary sessions with it."""
    daemon = scripted()
    connection = connect(daemon.target)
    region = connection._link.region
    daemon.late_faults["Stat"] = [lambda context: time.sleep(0.3)]
    assert not connection.notice_replacement()
    assert connection._link.region is region
    daemon.restart()
    assert connection.notice_replacement()


def test_unavailable_for_too_long(scripted, connect):
    daemon = scripted()
    connection = connect(daemon.target, reconnect_s=0.5)
    session_id = connection.open("s", GEOMETRY).session_id
    connection.append(session_id, 0, 1, payload(1))
    daemon.faults["Fetch"] = [unavailable] * 100
    started = time.monotonic()
    with pytest.raises(errors.Unavailable, match="EIO"):
        connection.fetch(session_id, all_keys(1))
    assert 0.1 < time.monotonic() - started < 20
    assert connection.transport == "shared", "answers that came are no reason to give up a region"


def test_nobody_there(tmp_path):
    started = time.monotonic()
    with pytest.raises(errors.Unavailable, match=r"no daemon answered at unix:.*hga-kvd --listen"):
        Connection(f"unix:{tmp_path}/nobody.sock", reconnect_s=0.3)
    assert time.monotonic() - started < 20


def test_a_deadline_is_an_error_and_the_next_call_is_right(scripted, connect):
    daemon = scripted()
    connection = connect(daemon.target)
    session_id = connection.open("s", GEOMETRY).session_id
    connection.append(session_id, 0, 2, payload(2))
    go_on = threading.Event()
    daemon.faults["Fetch"] = [waits_for(go_on)]
    with given_up(connection, r"within 0\.4 s"):
        connection.fetch(session_id, all_keys(2))
    go_on.set()
    daemon.rest()
    assert connection.fetch(session_id, all_keys(2)).records.tobytes() == payload(2).tobytes()


def test_an_append_given_up_cannot_store_what_comes_after_it(scripted, connect):
    """The daemon reads the payload late, when the client has long built another one."""
    daemon = scripted()
    connection = connect(daemon.target)
    session_id = connection.open("s", GEOMETRY).session_id
    go_on = threading.Event()
    daemon.faults["Append"] = [waits_for(go_on)]
    buffer = connection.append_buffer(GEOMETRY.chunk_bytes)
    buffer[:] = payload(1)
    with given_up(connection):
        connection.append(session_id, 0, 1, buffer)
    # Something else is built in the buffer before the late append is read.
    other = connection.open("other", GEOMETRY).session_id
    buffer = connection.append_buffer(GEOMETRY.chunk_bytes)
    buffer[:] = payload(1, seed=1)
    connection.append(other, 0, 1, buffer)
    go_on.set()
    daemon.rest()
    # The first is repeated: it was done meanwhile, and is recognised.
    assert connection.append(session_id, 0, 1, payload(1)) == 1
    assert connection.fetch(session_id, all_keys(1)).records.tobytes() == payload(1).tobytes()
    assert connection.fetch(other, all_keys(1)).records.tobytes() == payload(1, seed=1).tobytes()
    with pytest.raises(errors.AppendOutOfOrder):
        connection.append(session_id, 0, 1, payload(1))


@pytest.mark.parametrize("transport", ["auto", "bytes"])
def test_an_append_that_was_done_but_not_answered(scripted, connect, transport):
    daemon = scripted()
    connection = connect(daemon.target, transport=transport)
    session_id = connection.open("s", GEOMETRY).session_id
    daemon.late_faults["Append"] = [unavailable]
    assert connection.append(session_id, 0, 2, payload(2)) == 2
    assert [call for call, _ in daemon.calls].count("Append") == 2
    assert len(daemon.sessions[session_id][1]) == 2
    with pytest.raises(errors.AppendOutOfOrder):
        connection.append(session_id, 1, 1, payload(1))


def test_appends_without_answer_end_in_bytes(scripted, connect, caplog):
    daemon = scripted()
    connection = connect(daemon.target)
    session_id = connection.open("s", GEOMETRY).session_id
    for chunk in range(RETIRED_REGIONS_MAX):
        go_on = threading.Event()
        daemon.late_faults["Append"] = [waits_for(go_on)]
        with given_up(connection):
            connection.append(session_id, chunk, 1, payload(1))
        go_on.set()
        daemon.rest()
        assert connection.append(session_id, chunk, 1, payload(1)) == chunk + 1
    assert connection.transport == "bytes"
    assert "as bytes" in caplog.text


def test_an_unknown_region_is_attached_again(scripted, connect):
    daemon = scripted()
    connection = connect(daemon.target)
    session_id = connection.open("s", GEOMETRY).session_id
    daemon.regions.clear()
    connection.append(session_id, 0, 1, payload(1))
    daemon.regions.clear()
    assert connection.fetch(session_id, all_keys(1)).records.tobytes() == payload(1).tobytes()
    assert connection.transport == "shared"


def test_bytes_when_the_region_is_refused(scripted, connect, caplog):
    import grpc  # noqa: PLC0415

    daemon = scripted()
    daemon.faults["Attach"] = [lambda context: context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "64 clients")]
    connection = connect(daemon.target)
    assert connection.transport == "bytes"
    assert "64 clients" in caplog.text
    session_id = connection.open("s", GEOMETRY).session_id
    connection.append(session_id, 0, 1, payload(1))
    assert connection.fetch(session_id, all_keys(1)).records.tobytes() == payload(1).tobytes()


def test_bytes_over_tcp(scripted, connect):
    daemon = scripted()
    connection = connect(f"127.0.0.1:{daemon.port}")
    assert connection.transport == "bytes"
    assert "Attach" not in [call for call, _ in daemon.calls]


def test_targets_and_wrong_use(scripted, connect, monkeypatch):
    daemon = scripted()
    assert connect(str(daemon.path)).target == daemon.target
    assert connect(f"unix://{daemon.path}").target == daemon.target
    for target in ("nonsense", "host:", ":1", "host:port"):
        with pytest.raises(errors.InvalidRequest, match="host:port"):
            Connection(target)
    with pytest.raises(errors.InvalidRequest, match="transport"):
        Connection(daemon.target, transport="carrier pigeon")
    monkeypatch.setenv("HGA_KVD_TARGET", "unix:/a/b")
    assert default_target() == "unix:/a/b"
    monkeypatch.delenv("HGA_KVD_TARGET")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1")
    assert default_target() == "unix:/run/user/1/hga-kvd/kvd.sock"
    connection = connect(daemon.target)
    with pytest.raises(errors.SessionNotFound, match="open it first"):
        connection.fetch(77, all_keys(1))
    session_id = connection.open("s", GEOMETRY).session_id
    with pytest.raises(errors.InvalidRequest, match="bytes"):
        connection.append(session_id, 0, 2, payload(1))
    connection.disconnect()
    connection.disconnect()
    with pytest.raises(errors.InvalidRequest, match="connect again"):
        connection.fetch(session_id, all_keys(1))


@pytest.mark.parametrize(
    ("call", "code", "meaning", "expected"),
    [
        ("Append", "FAILED_PRECONDITION", "", errors.AppendOutOfOrder),
        ("Open", "FAILED_PRECONDITION", "", errors.GeometryMismatch),
        ("Flush", "FAILED_PRECONDITION", "", errors.NotDurable),
        ("Append", "RESOURCE_EXHAUSTED", "LimitExceeded", errors.LimitExceeded),
        ("Append", "RESOURCE_EXHAUSTED", "StorageFull", errors.StorageFull),
        ("Fetch", "RESOURCE_EXHAUSTED", "", errors.LimitExceeded),
        ("Fetch", "UNAVAILABLE", "NotAttached", errors.NotAttached),
        ("Fetch", "OUT_OF_RANGE", "", errors.KeyOutOfRange),
        ("Fetch", "NOT_FOUND", "Unheard", errors.SessionNotFound),
        ("Fetch", "INTERNAL", "", errors.DaemonFault),
        ("Flush", "DATA_LOSS", "", errors.WriteFailed),
    ],
)
def test_errors_of_statuses(call, code, meaning, expected):
    error = errors.from_status(call, code, "the sentence", meaning)
    assert type(error) is expected
    assert "the sentence" in str(error)


def test_without_torch():
    program = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "hga_kvd"):
            raise ModuleNotFoundError(f"no {name}", name=name)
sys.meta_path.insert(0, Blocker())
import hga_kvd_client, hga_kvd_client.connection, hga_kvd_client.errors
assert hga_kvd_client.Geometry and hga_kvd_client.Connection and hga_kvd_client.SessionOptions
for name in ("connect", "Session", "Client"):
    try:
        getattr(hga_kvd_client, name)
    except ImportError as error:
        assert 'pip install "hga-kvd[client]"' in str(error), error
    else:
        raise AssertionError(name)
try:
    from hga_kvd_client import connect
except ImportError as error:
    assert "hga-kvd[client]" in str(error), error
try:
    hga_kvd_client.nothing
except AttributeError:
    print("fine")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "fine\n", done.stderr


def test_every_public_name_is_there():
    import hga_kvd_client  # noqa: PLC0415

    for name in hga_kvd_client.__all__:
        assert getattr(hga_kvd_client, name) is not None
