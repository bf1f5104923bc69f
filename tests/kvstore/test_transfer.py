"""`hga-kvd export` and `import` against real daemons: a session comes back whole, or nothing does."""

import grpc
import numpy as np
import pytest
from hga_kvd.archive import END, Head, Part, encode_head, encode_part
from hga_kvd.commands import transfer
from hga_kvd.geometry import Geometry
from hga_kvd_proto.v1 import kvd_pb2
from wire import GEOMETRY, all_keys, append, command, open_session, payload_of, records_of, rot

CHUNKS = 40  # three batches of an export, of 16 KiB a chunk, once the batch is made small
# kind, first chunk, chunks, bytes: of all, of one in the middle, of two runs
SUMMARIES = [
    ("hga.v1", 0, CHUNKS, np.random.default_rng(1).bytes(CHUNKS * 700)),
    ("basis", 7, 1, b"basis"),
    ("some", 2, 3, b"abcdef"),
    ("some", 30, 10, b"x" * 20),
]
IDS = np.arange(CHUNKS * 64, dtype="<u4").tobytes()


@pytest.fixture
def small_batches(monkeypatch):
    """Batches and parts far smaller than the session."""
    monkeypatch.setattr(transfer, "BATCH_BYTES", 15 * GEOMETRY.chunk_bytes)
    monkeypatch.setattr(transfer, "PART_BYTES", 9000)


@pytest.fixture
def running(daemon):
    return daemon()


@pytest.fixture
def payload(running):
    stub = running.stub()
    session_id = open_session(stub, "novel").session_id
    payload = payload_of(CHUNKS)
    append(stub, session_id, payload, token_ids=IDS, part_bytes=100_000)
    for kind, first, count, summaries in SUMMARIES:
        request = kvd_pb2.PutSummariesRequest(
            session_id=session_id, kind=kind, first_chunk=first, chunk_count=count, payload=summaries
        )
        stub.PutSummaries(request)
    return payload


def check(stub, name, payload, ids=IDS):
    session = stub.Open(kvd_pb2.OpenRequest(name=name))
    keys = all_keys(CHUNKS)
    answer = stub.Fetch(kvd_pb2.FetchRequest(session_id=session.session_id, keys=keys.tobytes()))
    assert not answer.statuses
    assert answer.payload == records_of(payload, keys).tobytes()
    assert stub.Stat(kvd_pb2.StatRequest(session_id=session.session_id)).session.token_ids == ids
    return session


@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_a_session_comes_back(small_batches, running, payload, tmp_path, codec):
    file = tmp_path / "novel.kvx"
    done = command("export", "novel", file, "--codec", codec, "--target", running.target)
    assert (done.exit_code, done.stderr) == (0, "")
    assert f"{CHUNKS * 64} tokens" in done.stdout
    assert file.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    done = command("import", file, "--name", "copy", "--target", running.target)
    assert (done.exit_code, done.stderr) == (0, "")
    assert "durable" in done.stdout
    running.kill()
    running.start()
    session = check(running.stub(), "copy", payload)
    assert session.durable_chunk_count == CHUNKS
    assert session.geometry.rope == GEOMETRY.rope
    for kind, first, count, summaries in SUMMARIES:
        request = kvd_pb2.GetSummariesRequest(
            session_id=session.session_id, kind=kind, first_chunk=first, chunk_count=count
        )
        answer = running.stub().GetSummaries(request)
        assert (answer.chunk_count, answer.payload) == (count, summaries)


def test_into_another_daemon(running, payload, daemon, tmp_path):
    file = tmp_path / "novel.kvx"
    assert command("export", "novel", file, "--target", running.target).exit_code == 0
    other = daemon(nvme=False)
    done = command("import", file, "--target", other.target)
    assert done.exit_code == 0, done.stderr
    assert "in RAM only" in done.stdout
    check(other.stub(), "novel", payload)


def test_without_token_ids(running, tmp_path):
    stub = running.stub()
    payload = payload_of(CHUNKS, seed=3)
    append(stub, open_session(stub, "plain").session_id, payload, part_bytes=100_000)
    file = tmp_path / "plain.kvx"
    assert command("export", "plain", file, "--target", running.target).exit_code == 0
    assert command("import", file, "--name", "copy", "--target", running.target).exit_code == 0
    check(stub, "copy", payload, ids=b"")


def refused(done, said, code=1):
    assert done.exit_code == code
    assert done.stderr.count("\n") == 1, done.stderr
    assert said in done.stderr


def test_refusals_of_export(running, payload, tmp_path):
    target = ("--target", running.target)
    refused(command("export", "absent", tmp_path / "a.kvx", *target), "no session named 'absent'")
    (tmp_path / "there").write_text("kept")
    refused(command("export", "novel", tmp_path / "there", *target), "exists")
    assert (tmp_path / "there").read_text() == "kept"
    refused(command("export", "novel", tmp_path / "no" / "directory", *target), "No such file")
    refused(
        command("export", "novel", tmp_path / "b.kvx", "--codec", "gzip", *target), "'gzip' is not one of raw, zstd"
    )
    assert command("export", "novel", tmp_path / "there", "--overwrite", *target).exit_code == 0
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith((".", "a", "b.k"))] == []


def test_a_bad_file_leaves_no_session(small_batches, running, payload, tmp_path):
    target = ("--target", running.target)
    file = tmp_path / "novel.kvx"
    assert command("export", "novel", file, *target).exit_code == 0
    whole = file.read_bytes()
    refused(command("import", file, *target), "a session named 'novel' exists")
    changed = bytearray(whole)
    changed[len(whole) * 3 // 4] ^= 1
    for content, said in ((changed, "checksum"), (whole[:-1], "was cut"), (b"PK", "2 bytes")):
        file.write_bytes(content)
        refused(command("import", file, "--name", "copy", *target), said)
        with pytest.raises(grpc.RpcError):
            running.stub().Open(kvd_pb2.OpenRequest(name="copy"))
    # Of no name, which would be a temporary session that is nobody's.
    head = Head("", Geometry(2, 2, 32, "float16"), 0)
    file.write_bytes(encode_head(head) + encode_part(Part(END, 0, 0), 0, "raw", 2))
    refused(command("import", file, *target), "does not name its session: give it a --name")
    assert running.stub().Stat(kvd_pb2.StatRequest()).sessions == 1
    check(running.stub(), "novel", payload)


def test_a_damaged_session_is_not_exported(daemon, tmp_path):
    running = daemon()
    stub = running.stub()
    payload = payload_of(CHUNKS)
    session_id = open_session(stub, "novel").session_id
    append(stub, session_id, payload, part_bytes=100_000)
    stub.Flush(kvd_pb2.FlushRequest(session_id=session_id))
    running.stop()
    rot(running.nvme, payload, chunk=5)
    running.start()
    refused(
        command("export", "novel", tmp_path / "a.kvx", "--target", running.target),
        "layer 0, KV head 0, tokens 320 to 335",
    )
    assert list(tmp_path.glob("*.kvx")) == []
