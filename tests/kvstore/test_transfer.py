"""`hga-kvd export` and `import` against real daemons: a session comes back whole, or nothing does."""

import os

import grpc
import numpy as np
import pytest
from hga_kvd.__main__ import app
from hga_kvd.commands import transfer
from hga_kvd_proto.v1 import kvd_pb2
from typer.testing import CliRunner
from wire import GEOMETRY, all_keys, append, open_session, payload_of, records_of

CHUNKS = 40  # three batches of an export, of 16 KiB a chunk, once the batch is made small
IDS = np.arange(CHUNKS * 64, dtype="<u4").tobytes()


def run(*arguments):
    """The command, in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


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
    done = run("export", "novel", file, "--codec", codec, "--target", running.target)
    assert (done.exit_code, done.stderr) == (0, "")
    assert f"{CHUNKS * 64} tokens" in done.stdout
    assert file.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    done = run("import", file, "--name", "copy", "--target", running.target)
    assert (done.exit_code, done.stderr) == (0, "")
    assert "durable" in done.stdout
    running.kill()
    running.start()
    session = check(running.stub(), "copy", payload)
    assert session.durable_chunk_count == CHUNKS
    assert session.geometry.rope == GEOMETRY.rope


def test_into_another_daemon(running, payload, daemon, tmp_path):
    file = tmp_path / "novel.kvx"
    assert run("export", "novel", file, "--target", running.target).exit_code == 0
    other = daemon(nvme=False)
    done = run("import", file, "--target", other.target)
    assert done.exit_code == 0, done.stderr
    assert "in RAM only" in done.stdout
    check(other.stub(), "novel", payload)


def test_without_token_ids(running, tmp_path):
    stub = running.stub()
    payload = payload_of(CHUNKS, seed=3)
    append(stub, open_session(stub, "plain").session_id, payload, part_bytes=100_000)
    file = tmp_path / "plain.kvx"
    assert run("export", "plain", file, "--target", running.target).exit_code == 0
    assert run("import", file, "--name", "copy", "--target", running.target).exit_code == 0
    check(stub, "copy", payload, ids=b"")


def refused(done, said, code=1):
    assert done.exit_code == code
    assert done.stderr.count("\n") == 1, done.stderr
    assert said in done.stderr


def test_refusals_of_export(running, payload, tmp_path):
    target = ("--target", running.target)
    refused(run("export", "absent", tmp_path / "a.kvx", *target), "no session named 'absent'")
    (tmp_path / "there").write_text("kept")
    refused(run("export", "novel", tmp_path / "there", *target), "exists")
    assert (tmp_path / "there").read_text() == "kept"
    refused(run("export", "novel", tmp_path / "no" / "directory", *target), "No such file")
    refused(run("export", "novel", tmp_path / "b.kvx", "--codec", "gzip", *target), "'gzip' is not one of raw, zstd")
    assert run("export", "novel", tmp_path / "there", "--overwrite", *target).exit_code == 0
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith((".", "a", "b.k"))] == []


def test_a_bad_file_leaves_no_session(small_batches, running, payload, tmp_path):
    target = ("--target", running.target)
    file = tmp_path / "novel.kvx"
    assert run("export", "novel", file, *target).exit_code == 0
    whole = file.read_bytes()
    refused(run("import", file, *target), "a session named 'novel' exists")
    changed = bytearray(whole)
    changed[len(whole) * 3 // 4] ^= 1
    for content, said in ((changed, "checksum"), (whole[:-1], "was cut"), (b"PK", "2 bytes")):
        file.write_bytes(content)
        refused(run("import", file, "--name", "copy", *target), said)
        with pytest.raises(grpc.RpcError):
            running.stub().Open(kvd_pb2.OpenRequest(name="copy"))
    check(running.stub(), "novel", payload)


def test_a_damaged_session_is_not_exported(daemon, tmp_path):
    running = daemon()
    stub = running.stub()
    payload = payload_of(CHUNKS)
    session_id = open_session(stub, "novel").session_id
    append(stub, session_id, payload, part_bytes=100_000)
    stub.Flush(kvd_pb2.FlushRequest(session_id=session_id))
    running.stop()
    (segment,) = running.nvme.glob("segment-*.kvs")
    with segment.open("r+b") as content:
        place = content.read().find(payload.tobytes()[5 * GEOMETRY.chunk_bytes :][:64])
        assert place > 0
        os.pwrite(content.fileno(), b"\xff" * 64, place)
    running.start()
    refused(
        run("export", "novel", tmp_path / "a.kvx", "--target", running.target), "layer 0, KV head 0, tokens 320 to 335"
    )
    assert list(tmp_path.glob("*.kvx")) == []
