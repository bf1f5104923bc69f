"""Bad input against the real process: a clear status and sentence for each, and after it a good fetch as before."""

import contextlib
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import grpc
import numpy as np
import pytest
from hga_kvd_proto.v1 import kvd_pb2
from wire import (
    GEOMETRY,
    MESSAGE,
    MIB,
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

CODE = grpc.StatusCode
CHUNKS = 4
PAYLOAD = payload_of(CHUNKS, seed=7)
KEYS = all_keys(CHUNKS)


def fetch_good(stub, session_id):
    answer = stub.Fetch(kvd_pb2.FetchRequest(session_id=session_id, keys=KEYS.tobytes()), timeout=20)
    assert answer.statuses == b""
    assert answer.payload == records_of(PAYLOAD, KEYS).tobytes()


@pytest.fixture(scope="module")
def served(module_daemon):
    """One daemon for the refused calls, with a flushed session "good"."""
    daemon = module_daemon(
        environment={"HGA_KVD_MESSAGE_BYTES_MAX": "1MiB", "HGA_KVD_FETCH_KEYS_MAX": "4096", "HGA_KVD_GRACE_S": "2"}
    )
    stub = daemon.stub()
    session_id = open_session(stub, "good").session_id
    append(stub, session_id, PAYLOAD)
    stub.Flush(kvd_pb2.FlushRequest(session_id=session_id))
    return daemon


@pytest.fixture
def good(served):
    """(stub, session id); after the test the daemon still serves the same bytes."""
    stub = served.stub()
    session_id = stub.Open(kvd_pb2.OpenRequest(name="good")).session_id
    yield stub, session_id
    assert served.process.poll() is None
    fetch_good(served.stub(), session_id)
    fetch_good(stub, session_id)
    assert stub.Open(kvd_pb2.OpenRequest(name="good")).chunk_count == CHUNKS


# Calls.


@pytest.mark.parametrize("session_id", [0, 999, 2**64 - 1])
def test_unknown_session(good, session_id):
    stub, _ = good
    one = KEYS[:1].tobytes()
    ask = {"session_id": session_id, "kind": "hga.v1", "chunk_count": 1}
    for call, request in (
        (stub.Fetch, kvd_pb2.FetchRequest(session_id=session_id, keys=one)),
        (stub.Flush, kvd_pb2.FlushRequest(session_id=session_id)),
        (stub.Close, kvd_pb2.CloseRequest(session_id=session_id)),
        (stub.Delete, kvd_pb2.DeleteRequest(session_id=session_id)),
        (stub.GetSummaries, kvd_pb2.GetSummariesRequest(**ask)),
        (stub.PutSummaries, kvd_pb2.PutSummariesRequest(**ask, payload=b"x")),
        (stub.Append, parts(session_id, payload_of(1))),
    ):
        code, sentence, meaning = refused(call, request, timeout=20)
        assert (code, meaning) == (CODE.NOT_FOUND, "SessionNotFound"), call
        assert str(session_id) in sentence


def test_unknown_name(good):
    stub, _ = good
    code, sentence, _ = refused(stub.Open, kvd_pb2.OpenRequest(name="nobody"))
    assert code == CODE.NOT_FOUND
    assert "nobody" in sentence


def test_wrong_geometry(good):
    stub, _ = good
    for field, value in {"layers": 3, "dtype": "float16", "rope": "x" * 4096, "model_fingerprint": "other"}.items():
        other = kvd_pb2.Geometry()
        other.CopyFrom(MESSAGE)
        setattr(other, field, value)
        code, sentence, meaning = refused(stub.Open, kvd_pb2.OpenRequest(name="good", geometry=other, create=True))
        assert (code, meaning) == (CODE.FAILED_PRECONDITION, "GeometryMismatch")
        assert field in sentence


@pytest.mark.parametrize(
    "fields",
    [
        {"layers": 0},
        {"layers": 2**32 - 1},
        {"kv_heads": 0},
        {"head_dim": 0},
        {"head_dim": 2**32 - 1},
        {"chunk_tokens": 0},
        {"group_tokens": 0},
        {"group_tokens": 17},
        {"group_tokens": 128},
        {"dtype": ""},
        {"dtype": "float128"},
        {"kv_heads": 512, "head_dim": 1024, "dtype": "float32"},
        {"rope": "x" * 100_000},
    ],
)
def test_impossible_geometry(good, fields):
    stub, _ = good
    geometry = kvd_pb2.Geometry()
    geometry.CopyFrom(MESSAGE)
    for field, value in fields.items():
        setattr(geometry, field, value)
    code, sentence, _ = refused(stub.Open, kvd_pb2.OpenRequest(name="impossible", geometry=geometry, create=True))
    assert code == CODE.INVALID_ARGUMENT
    assert "geometry" in sentence


def test_no_geometry_and_long_names(good):
    stub, _ = good
    assert refused(stub.Open, kvd_pb2.OpenRequest(name="new", create=True))[0] == CODE.INVALID_ARGUMENT
    assert refused(open_session, stub, "n" * 257)[0] == CODE.INVALID_ARGUMENT
    assert refused(open_session, stub, "n" * 100_000)[0] in (CODE.INVALID_ARGUMENT, CODE.RESOURCE_EXHAUSTED)


@pytest.mark.parametrize(
    ("field", "value"),
    [("group", CHUNKS * 4), ("group", 2**32 - 1), ("kv_head", 2), ("kv_head", 2**16 - 1), ("layer", 2)],
)
def test_key_out_of_range(good, field, value):
    stub, session_id = good
    keys = KEYS.copy()
    keys[-1][field] = value
    code, sentence, meaning = refused(stub.Fetch, kvd_pb2.FetchRequest(session_id=session_id, keys=keys.tobytes()))
    assert (code, meaning) == (CODE.OUT_OF_RANGE, "KeyOutOfRange")
    assert str(value) in sentence


def test_too_many_groups(good):
    stub, session_id = good
    keys = np.resize(KEYS, 4097)
    code, sentence, _ = refused(stub.Fetch, kvd_pb2.FetchRequest(session_id=session_id, keys=keys.tobytes()))
    assert code == CODE.RESOURCE_EXHAUSTED
    assert "4097" in sentence
    assert "4096" in sentence
    keys = np.resize(KEYS, 2000)  # few enough keys, too many bytes for a message
    code, sentence, _ = refused(stub.Fetch, kvd_pb2.FetchRequest(session_id=session_id, keys=keys.tobytes()))
    assert code == CODE.RESOURCE_EXHAUSTED
    assert str(MIB) in sentence


def test_half_a_key(good):
    stub, session_id = good
    request = kvd_pb2.FetchRequest(session_id=session_id, keys=KEYS.tobytes()[:-3])
    assert refused(stub.Fetch, request)[0] == CODE.INVALID_ARGUMENT


@pytest.mark.parametrize("change", [-GEOMETRY.chunk_bytes, -1, 1, GEOMETRY.chunk_bytes])
@pytest.mark.parametrize("part_bytes", [700, 10**6])
def test_payload_of_the_wrong_size(good, change, part_bytes):
    stub, session_id = good
    payload = np.resize(payload_of(1), GEOMETRY.chunk_bytes + change)
    code, sentence, _ = refused(append, stub, session_id, payload, CHUNKS, chunks=1, part_bytes=part_bytes)
    assert code == CODE.INVALID_ARGUMENT
    assert str(GEOMETRY.chunk_bytes) in sentence


def test_a_message_over_the_limit(good):
    stub, session_id = good
    chunks = 2 * MIB // GEOMETRY.chunk_bytes
    code, sentence, _ = refused(append, stub, session_id, payload_of(chunks), CHUNKS, part_bytes=2 * MIB)
    assert code == CODE.RESOURCE_EXHAUSTED
    assert sentence


def test_token_ids_of_the_wrong_size(good):
    stub, session_id = good
    code, _, _ = refused(append, stub, session_id, payload_of(1), CHUNKS, token_ids=b"x" * 255)
    assert code == CODE.INVALID_ARGUMENT


@pytest.mark.parametrize("first", [0, CHUNKS - 1, CHUNKS + 1, 2**63, 2**64 - 1])
def test_append_out_of_order(good, first):
    stub, session_id = good
    code, sentence, meaning = refused(append, stub, session_id, payload_of(1), first)
    assert (code, meaning) == (CODE.FAILED_PRECONDITION, "AppendOutOfOrder")
    assert str(first) in sentence
    assert str(CHUNKS) in sentence


def test_append_of_impossible_counts(good):
    stub, session_id = good
    assert refused(append, stub, session_id, payload_of(0), CHUNKS)[0] == CODE.INVALID_ARGUMENT
    code = refused(append, stub, session_id, payload_of(1), CHUNKS, chunks=2**32 - 1)[0]
    assert code == CODE.RESOURCE_EXHAUSTED


def test_append_to_a_deleted_session(good):
    stub, _ = good
    doomed = open_session(stub, "doomed").session_id
    append(stub, doomed, payload_of(1))
    stub.Delete(kvd_pb2.DeleteRequest(session_id=doomed))
    assert refused(append, stub, doomed, payload_of(1), 1)[0] == CODE.NOT_FOUND
    again = open_session(stub, "doomed")
    assert (again.created, again.chunk_count) == (True, 0)
    assert again.session_id != doomed
    stub.Delete(kvd_pb2.DeleteRequest(session_id=again.session_id))


def test_delete_in_mid_append(good):
    stub, _ = good
    doomed = open_session(stub, "doomed").session_id
    halfway, go_on = threading.Event(), threading.Event()

    def stream():
        messages = parts(doomed, payload_of(1))
        yield next(messages)
        halfway.set()
        go_on.wait(60)
        yield from messages

    call = stub.Append.future(stream(), timeout=20)
    assert halfway.wait(30)
    time.sleep(0.1)
    stub.Delete(kvd_pb2.DeleteRequest(session_id=doomed))
    go_on.set()
    assert refused(call.result)[0] == CODE.NOT_FOUND


def test_summaries_that_cannot_be(good):
    stub, session_id = good
    ask = {"session_id": session_id, "kind": "hga.v1", "first_chunk": 0, "chunk_count": 2}
    for fields, code in (
        ({"payload": b"123"}, CODE.INVALID_ARGUMENT),  # does not divide
        ({"payload": b""}, CODE.INVALID_ARGUMENT),
        ({"payload": b"12", "chunk_count": 0}, CODE.INVALID_ARGUMENT),
        ({"payload": b"12", "kind": ""}, CODE.INVALID_ARGUMENT),
        ({"payload": b"12", "kind": "k" * 65}, CODE.INVALID_ARGUMENT),
        ({"payload": b"12", "first_chunk": CHUNKS - 1}, None),
        ({"payload": b"12", "first_chunk": 2**64 - 1}, None),
        ({"payload": bytes(MIB + 2)}, CODE.RESOURCE_EXHAUSTED),
    ):
        found, sentence, _ = refused(stub.PutSummaries, kvd_pb2.PutSummariesRequest(**{**ask, **fields}))
        assert found in ((code,) if code else (CODE.INVALID_ARGUMENT, CODE.OUT_OF_RANGE)), (fields, sentence)


@pytest.mark.parametrize(
    ("call", "request_bytes"),
    [("Open", b"\xff" * 20), ("Fetch", b"\x0a\x80"), ("Append", b"\xff" * 200), ("Nonsense", b"")],
)
def test_bytes_that_are_not_the_message(served, good, call, request_bytes):
    channel = served.channel()
    path = f"/hga_kvd.v1.Kvd/{call}"
    if call == "Append":
        code = refused(channel.stream_unary(path), iter([request_bytes]), timeout=20)[0]
    else:
        code = refused(channel.unary_unary(path), request_bytes, timeout=20)[0]
    assert code in ((CODE.UNIMPLEMENTED,) if call == "Nonsense" else (CODE.INTERNAL, CODE.CANCELLED))


# Shared memory.


@pytest.fixture
def client(served, good):
    client = Client(good[0], served.socket)
    yield client
    client.socket.close()


def test_region_of_impossible_size(good):
    stub, _ = good
    assert refused(stub.Attach, kvd_pb2.AttachRequest())[0] == CODE.INVALID_ARGUMENT
    for size in ((1 << 30) + 1, 1 << 40, 2**64 - 1):
        code, sentence, _ = refused(stub.Attach, kvd_pb2.AttachRequest(region_bytes=size))
        assert code == CODE.RESOURCE_EXHAUSTED
        assert str(1 << 30) in sentence


def test_ranges_that_are_not_the_clients(good, served, client):
    stub, session_id = good
    other = Client(stub, served.socket)
    other.memory[:] = 9
    client.memory[:] = 9
    one, size = KEYS[:1].tobytes(), GEOMETRY.record_bytes
    region = 2 * MIB

    def shared(offset=0, room=size, client_id=client.client_id):
        return kvd_pb2.SharedRange(client_id=client_id, offset=offset, bytes=room)

    for bad, code in (
        (shared(offset=region), CODE.INVALID_ARGUMENT),
        (shared(offset=2**64 - 4096), CODE.INVALID_ARGUMENT),
        (shared(offset=1), CODE.INVALID_ARGUMENT),
        (shared(offset=512), CODE.INVALID_ARGUMENT),
        (shared(room=size - 1), CODE.INVALID_ARGUMENT),
        (shared(room=0), CODE.INVALID_ARGUMENT),
        (shared(client_id=0), CODE.UNAVAILABLE),
        (shared(client_id=other.client_id + 2), CODE.UNAVAILABLE),
    ):
        request = kvd_pb2.FetchRequest(session_id=session_id, keys=one, shared=bad)
        assert refused(stub.Fetch, request)[0] == code, bad
    header = kvd_pb2.AppendHeader(session_id=session_id, first_chunk=CHUNKS, chunk_count=1)
    for bad, code in (
        (shared(offset=region, room=GEOMETRY.chunk_bytes), CODE.INVALID_ARGUMENT),
        (shared(offset=1, room=GEOMETRY.chunk_bytes), CODE.INVALID_ARGUMENT),
        (shared(room=GEOMETRY.chunk_bytes - 1), CODE.INVALID_ARGUMENT),
        (shared(room=2**64 - 1), CODE.INVALID_ARGUMENT),
        (shared(room=GEOMETRY.chunk_bytes, client_id=3), CODE.UNAVAILABLE),
    ):
        header.shared.CopyFrom(bad)
        assert refused(stub.Append, iter([kvd_pb2.AppendRequest(header=header)]), timeout=20)[0] == code, bad
    attached = stub.Stat(kvd_pb2.StatRequest()).attached_clients
    other.socket.close()
    wait_for(lambda: stub.Stat(kvd_pb2.StatRequest()).attached_clients < attached)
    request = kvd_pb2.FetchRequest(session_id=session_id, keys=one, shared=other.range(0, size))
    assert refused(stub.Fetch, request)[0] == CODE.UNAVAILABLE
    assert (client.memory == 9).all()


def closed(peer):
    try:
        return peer.recv(64) == b""
    except ConnectionResetError:
        return True


def connect(path):
    peer = socket.socket(socket.AF_UNIX)
    peer.settimeout(20)
    peer.connect(str(path))
    return peer


def test_wrong_token(good, served):
    stub, _ = good
    answer = stub.Attach(kvd_pb2.AttachRequest(region_bytes=MIB))
    path = served.socket_directory / answer.handover_socket
    wrong = bytes([answer.token[0] ^ 1]) + answer.token[1:]
    for sent in (wrong, bytes(16), answer.token[::-1]):
        with connect(path) as peer:
            peer.sendall(sent)
            assert closed(peer)
    with connect(path) as peer:
        peer.sendall(answer.token)
        _, descriptors, _, _ = socket.recv_fds(peer, 1, 1)
        os.close(*descriptors)
        with connect(path) as second:
            second.sendall(answer.token)
            assert closed(second)


def test_garbage_on_the_sockets(good, served):
    stub, _ = good
    seed = random.randrange(2**32)
    source = random.Random(seed)
    names = (served.socket, served.socket.with_name(served.socket.name + ".shm"))
    for path in names:
        for size in (1, 15, 16, 17, 1000, 100_000):
            with connect(path) as peer, contextlib.suppress(BrokenPipeError, ConnectionResetError):
                peer.sendall(source.randbytes(size))
                peer.shutdown(socket.SHUT_WR)
                for _ in range(100):
                    if not peer.recv(4096):
                        break
    with connect(served.socket) as peer, contextlib.suppress(BrokenPipeError, ConnectionResetError):
        # A true HTTP/2 preface, then nonsense.
        peer.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + source.randbytes(5000))
        peer.shutdown(socket.SHUT_WR)
        while peer.recv(4096):
            pass
    silent = [connect(names[1]) for _ in range(10)]
    client = Client(stub, served.socket)  # the handover still answers
    client.socket.close()
    for peer in silent:
        peer.close()


# Clients that die.

DYING_CLIENT = """
import sys, time
sys.path[:0] = sys.argv[3:]
import grpc
from hga_kvd_proto.v1 import kvd_pb2, kvd_pb2_grpc
from pathlib import Path
from wire import Client, open_session, parts, payload_of

stub = kvd_pb2_grpc.KvdStub(grpc.insecure_channel("unix:" + sys.argv[1]))
client = Client(stub, Path(sys.argv[1]))
temporary = open_session(stub, "", client.client_id).session_id
stub.Append(parts(temporary, payload_of(1)))
good = open_session(stub, "good")

def stream():
    messages = list(parts(good.session_id if sys.argv[2] == "good" else temporary, payload_of(3), good.chunk_count
                          if sys.argv[2] == "good" else 1, chunks=3))
    yield from messages[: len(messages) // 2]
    print(temporary, flush=True)
    time.sleep(600)

stub.Append(stream())
"""


@pytest.mark.parametrize("into", ["good", "temporary"])
def test_a_client_killed_in_mid_append(good, served, into):
    stub, session_id = good
    before = stub.Stat(kvd_pb2.StatRequest())
    process = subprocess.Popen(
        [sys.executable, "-c", DYING_CLIENT, str(served.socket), into, str(Path(__file__).parents[1])],
        stdout=subprocess.PIPE,
    )
    try:
        temporary = int(process.stdout.readline())
        assert stub.Stat(kvd_pb2.StatRequest(session_id=temporary)).session.temporary
        time.sleep(0.2)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()

    def as_before():
        after = stub.Stat(kvd_pb2.StatRequest())
        return (after.attached_clients, after.sessions) == (before.attached_clients, before.sessions)

    wait_for(as_before)
    after = stub.Stat(kvd_pb2.StatRequest(session_id=session_id))
    assert after.session.chunk_count == CHUNKS
    assert refused(stub.Stat, kvd_pb2.StatRequest(session_id=temporary))[0] == CODE.NOT_FOUND


# Starts that are refused.


def refused_start(daemon, expected, *options, environment=None, **place):
    """Starts a daemon that must refuse: one line on stderr that says `expected`, exit code 2."""
    made = daemon(*options, environment=environment, start=False, **place)
    done = made.run()
    assert done.returncode == 2, done.stderr
    said = [line for line in done.stderr.splitlines() if not line.startswith("{")]
    assert len(said) == 1, done.stderr
    assert said[0].startswith("hga-kvd: "), said
    assert expected in said[0], said
    assert {path.name for path in made.socket_directory.iterdir()} <= {"k.sock.lock"}, "it left a socket"
    return said[0]


def test_missing_directory(daemon, tmp_path):
    said = refused_start(daemon, str(tmp_path / "absent"), nvme=tmp_path / "absent")
    assert "exist" in said
    assert not (tmp_path / "absent").exists()


def test_a_file_instead_of_a_directory(daemon, tmp_path):
    (tmp_path / "file").write_text("mine")
    refused_start(daemon, "directory", nvme=tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_tmpfs(daemon):
    if not Path("/dev/shm").is_dir():
        pytest.skip("no /dev/shm here")
    place = Path(f"/dev/shm/hga-kvd-test-{os.getpid()}")
    place.mkdir()
    try:
        refused_start(daemon, "tmpfs", nvme=place)
        assert not [path for path in place.iterdir() if path.stat().st_size > 4096]
    finally:
        shutil.rmtree(place)


@pytest.fixture
def small_disk(disk_path):
    """A loop-mounted ext4 of 48 MiB; skipped where that is not allowed."""
    image, place = disk_path / "disk.img", disk_path / "mounted"
    place.mkdir()
    with image.open("wb") as file:
        file.truncate(48 * MIB)
    commands = (
        ["mkfs.ext4", "-q", "-m", "0", "-b", "4096", str(image)],
        ["mount", "-o", "loop", str(image), str(place)],
    )
    for command in commands:
        try:
            done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
        except FileNotFoundError as error:
            pytest.skip(f"no loop-mounted file system here: {error}")
        if done.returncode:
            pytest.skip(f"no loop-mounted file system here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True, timeout=60)


def test_read_only_directory(small_disk, daemon):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True, timeout=60)
    said = refused_start(daemon, str(small_disk), nvme=small_disk)
    assert "read-only" in said.lower() or "write" in said.lower()


def fill(place):
    """Takes the rest of the file system."""
    with (place / "ballast").open("wb") as file, contextlib.suppress(OSError):
        for size in (MIB, 4096):
            while True:
                try:
                    os.posix_fallocate(file.fileno(), file.tell(), size)
                    file.seek(size, os.SEEK_CUR)
                except OSError:
                    break


def test_full_directory(small_disk, daemon):
    fill(small_disk)
    said = refused_start(daemon, str(small_disk), nvme=small_disk)
    assert "full" in said.lower() or "space" in said.lower() or "free" in said.lower()


LIMITED = {"HGA_KVD_SEGMENT_BYTES": "1MiB", "HGA_KVD_RAM": "4MiB", "HGA_KVD_NVME_RESERVE": "4MiB"}


def append_until_full(stub, session_id):
    """Appends of 128 KiB until one is refused; returns (chunks, sentence)."""
    step = MIB // 8 // GEOMETRY.chunk_bytes
    for count in range(0, 100 * MIB // GEOMETRY.chunk_bytes, step):
        try:
            append(stub, session_id, payload_of(step, seed=count), count)
        except grpc.RpcError as error:
            if error.code() != CODE.RESOURCE_EXHAUSTED:
                raise
            return count, error.details()
    raise AssertionError("100 MiB were taken")


def check_reads_go_on(daemon, session_id, count):
    stub = daemon.stub()
    assert stub.Stat(kvd_pb2.StatRequest(session_id=session_id)).session.chunk_count == count
    step = MIB // 8 // GEOMETRY.chunk_bytes
    for first in range(0, count, step):
        keys = all_keys(step)
        expected = records_of(payload_of(step, seed=first), keys)
        keys["group"] += first * GEOMETRY.groups_per_chunk
        answer = stub.Fetch(kvd_pb2.FetchRequest(session_id=session_id, keys=keys.tobytes()), timeout=20)
        assert answer.statuses == b""
        assert answer.payload == expected.tobytes()


def check_full(running, session_id):
    """Appends end with a refusal that says why; everything acknowledged is still served."""
    count, sentence = append_until_full(running.stub(), session_id)
    assert count * GEOMETRY.chunk_bytes >= 2 * MIB, sentence
    assert "full" in sentence or "space" in sentence, sentence
    check_reads_go_on(running, session_id, count)


def test_nvme_max_is_reached(daemon):
    running = daemon("--nvme-max", "12MiB", environment=LIMITED)
    stub = running.stub()
    session_id = open_session(stub, "filling").session_id
    check_full(running, session_id)
    stub.Delete(kvd_pb2.DeleteRequest(session_id=session_id))
    append(stub, open_session(stub, "after").session_id, payload_of(1))  # there is room again
    running.stop()


def test_another_program_fills_the_disk(small_disk, daemon):
    running = daemon(nvme=small_disk, environment=LIMITED)
    stub = running.stub()
    session_id = open_session(stub, "filling").session_id
    fill(small_disk)
    check_full(running, session_id)
    (small_disk / "ballast").unlink()
    stub.Delete(kvd_pb2.DeleteRequest(session_id=session_id))
    after = open_session(stub, "good").session_id
    append(stub, after, PAYLOAD)
    stub.Flush(kvd_pb2.FlushRequest(session_id=after))
    running.stop()
    fetch_good(running.start().stub(), after)


def test_two_daemons_on_one_directory(daemon):
    first = daemon()
    said = refused_start(daemon, str(first.pid), nvme=first.nvme)
    assert str(first.nvme) in said
    stub = first.stub()
    append(stub, open_session(stub, "s").session_id, payload_of(1))


def test_a_directory_of_a_newer_format(daemon):
    made = daemon()
    stub = made.stub()
    session_id = open_session(stub, "good").session_id
    append(stub, session_id, PAYLOAD)
    stub.Flush(kvd_pb2.FlushRequest(session_id=session_id))
    made.stop()
    manifest = made.nvme / "MANIFEST"
    content = manifest.read_bytes()
    newer = content[:8] + struct.pack("<I", struct.unpack("<I", content[8:12])[0] + 1) + content[12:]
    manifest.write_bytes(newer)
    names = sorted(os.listdir(made.nvme))
    said = refused_start(daemon, "version", nvme=made.nvme)
    assert "newer" in said
    assert sorted(os.listdir(made.nvme)) == names
    assert manifest.read_bytes() == newer
    manifest.write_bytes(content)
    fetch_good(made.start().stub(), session_id)


@pytest.mark.parametrize(
    ("options", "environment", "said"),
    [
        (("--ram", "lots"), {}, "option --ram: 'lots' is not a size"),
        (("--io-engine", "warp"), {}, "option --io-engine: "),
        (("--log-level", "loud"), {}, "option --log-level: "),
        (("--listen", "nowhere"), {}, "option --listen: 'nowhere' is not an address"),
        (("--metrics", "9464"), {}, "option --metrics: '9464' is not an address"),
        ((), {"HGA_KVD_RPC_THREADS": "0"}, "environment variable HGA_KVD_RPC_THREADS: "),
        (("--config", "/nowhere.toml"), {}, "cannot read the settings file /nowhere.toml"),
    ],
)
def test_a_bad_option_value(daemon, options, environment, said):
    refused_start(daemon, said, *options, nvme=False, environment=environment)


@pytest.mark.parametrize("content", ["ram = ", "ramm = 1\n", 'ram = "lots"\n', "\0"])
def test_bad_toml(daemon, tmp_path, content):
    file = tmp_path / "kvd.toml"
    file.write_text(content)
    refused_start(daemon, str(file), "--config", str(file), nvme=False, environment={"HGA_KVD_RAM": ""})


def test_an_unknown_option(daemon):
    made = daemon("--rma", "1GiB", nvme=False, start=False)
    done = made.run()
    assert done.returncode == 2
    assert "--rma" in done.stderr
    assert "Traceback" not in done.stderr


# Stops.


# Room for one append of CHUNKS chunks on its way, or the answer that has as many, and for no other chunk beside it.
ONE_APPEND = {"HGA_KVD_INFLIGHT_BYTES_MAX": str(len(PAYLOAD) + GEOMETRY.chunk_bytes // 2)}


def begun(stub, messages, go_on):
    """An append that the daemon has begun and that stands still until `go_on`."""

    def stream():
        messages_left = iter(messages)
        yield next(messages_left)
        go_on.wait(100)
        yield from messages_left

    call = stub.Append.future(stream(), timeout=100)
    probe = open_session(stub, "").session_id

    def no_room():
        try:
            append(stub, probe, payload_of(1), stub.Stat(kvd_pb2.StatRequest(session_id=probe)).session.chunk_count)
        except grpc.RpcError as error:
            return error.code() == CODE.RESOURCE_EXHAUSTED
        return False

    wait_for(no_room)
    return call


def test_sigterm_in_mid_append_waits_for_it(daemon):
    running = daemon(environment=ONE_APPEND)
    stub = running.stub()
    session_id = open_session(stub, "s").session_id
    go_on = threading.Event()
    call = begun(stub, parts(session_id, PAYLOAD, chunks=CHUNKS), go_on)
    running.process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert running.process.poll() is None
    go_on.set()
    assert call.result(20).chunk_count == CHUNKS
    running.wait()
    running.start()
    fetch_good(running.stub(), session_id)  # the end flushed what it had acknowledged


def test_sigterm_does_not_wait_for_ever(daemon):
    running = daemon(environment={"HGA_KVD_GRACE_S": "0.5", **ONE_APPEND})
    stub = running.stub()
    session_id = open_session(stub, "s").session_id
    append(stub, session_id, PAYLOAD)
    go_on = threading.Event()
    call = begun(stub, parts(session_id, PAYLOAD, CHUNKS, chunks=CHUNKS), go_on)
    running.stop()  # the append stands still for longer than STOP_S
    go_on.set()
    assert refused(call.result)[0] in (CODE.CANCELLED, CODE.UNAVAILABLE)
    running.start()
    fetch_good(running.stub(), session_id)
    assert running.stub().Open(kvd_pb2.OpenRequest(name="s")).chunk_count == CHUNKS


def test_a_second_signal_ends_it_at_once(daemon):
    running = daemon(environment={"HGA_KVD_GRACE_S": "60", **ONE_APPEND})
    stub = running.stub()
    session_id = open_session(stub, "s").session_id
    append(stub, session_id, PAYLOAD)
    stub.Flush(kvd_pb2.FlushRequest(session_id=session_id))
    go_on = threading.Event()
    call = begun(stub, parts(session_id, PAYLOAD, CHUNKS, chunks=CHUNKS), go_on)
    running.process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    running.process.send_signal(signal.SIGINT)
    assert running.process.wait(30) == 1
    running.process = None
    go_on.set()
    assert refused(call.result)[0] in (CODE.CANCELLED, CODE.UNAVAILABLE)
    running.start()
    fetch_good(running.stub(), session_id)


def test_kill_and_restart(daemon):
    running = daemon()
    stub = running.stub()
    session_id = open_session(stub, "s").session_id
    temporary = open_session(stub, "").session_id
    append(stub, session_id, PAYLOAD)
    stub.Flush(kvd_pb2.FlushRequest(session_id=session_id))
    append(stub, session_id, payload_of(1), CHUNKS)
    running.kill()
    running.start()
    stub = running.stub()
    fetch_good(stub, session_id)
    assert refused(stub.Stat, kvd_pb2.StatRequest(session_id=temporary))[0] == CODE.NOT_FOUND
