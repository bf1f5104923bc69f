"""`hga-kvd verify DIR`, `--repair` and `dump`: what is sound is called sound, what is not is named, and a store whose
manifest is lost starts again with all it had."""

import io
import json

import numpy as np
import pytest
from hga_kvd.config import Settings
from hga_kvd.engine import Engine
from hga_kvd.errors import StartRefused
from hga_kvd.filedisk import make_disk
from hga_kvd.log import make_log
from hga_kvd_proto.v1 import kvd_pb2
from wire import GEOMETRY, all_keys, append, command, open_session, payload_of, records_of, rot

CHUNKS = 6


@pytest.fixture
def engines(disk_path):
    """Makes an engine on one directory, in this process; the last one is shut down."""
    running = []

    def start():
        stop()
        log = make_log("error", io.StringIO())
        settings = Settings(nvme=disk_path, ram=8 << 20, segment_bytes=1 << 20)
        disk = make_disk(settings, log)
        try:
            running.append(Engine(settings, disk, background=False))
        except StartRefused:
            disk.shutdown()
            raise
        return running[0]

    def stop():
        while running:
            running.pop().shutdown()

    start.stop = stop
    yield start
    stop()


@pytest.fixture
def store(engines, disk_path):
    """Two sessions, one forked from the other and truncated, with summaries; no daemon on it."""
    engine = engines()
    one = engine.open("one", GEOMETRY, create=True).session_id
    engine.append(one, 0, CHUNKS, payload_of(CHUNKS), b"")
    engine.put_summaries(one, "k.v1", 0, CHUNKS, bytes(range(CHUNKS)) * 1)
    engine.flush(one)
    two = engine.fork(one, 0, 4, "two").session_id
    engine.truncate(two, 0, 2)
    engine.append(two, 2, 1, payload_of(1, seed=9), b"", epoch=1)
    engine.flush(two)
    engines.stop()
    return disk_path


def check(engine):
    sessions = {info.name: info for info in engine.list()}
    assert sorted(sessions) == ["one", "two"]
    assert (sessions["two"].epoch, sessions["two"].chunk_count, sessions["one"].chunk_count) == (1, 3, CHUNKS)
    expected = {
        "one": payload_of(CHUNKS),
        "two": np.concatenate((payload_of(CHUNKS)[: 2 * GEOMETRY.chunk_bytes], payload_of(1, seed=9))),
    }
    for name, payload in expected.items():
        keys = all_keys(sessions[name].chunk_count)
        destination = np.zeros(len(keys) * GEOMETRY.record_bytes, np.uint8)
        fetched = engine.fetch(sessions[name].session_id, keys, destination, sessions[name].epoch)
        assert fetched.statuses is None
        assert (destination.reshape(len(keys), -1) == records_of(payload, keys)).all()
    assert engine.get_summaries(sessions["one"].session_id, "k.v1", 0, CHUNKS, 1 << 20)[1] == bytes(range(CHUNKS))


def said(done, *parts):
    for part in parts:
        assert part in " ".join(done.output.split()), done.output


def files(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "LOCK"}


def test_a_sound_store(store):
    before = files(store)
    for options in ((), ("--repair",)):
        done = command("verify", store, *options)
        assert done.exit_code == 0, done.output
        said(done, "2 sessions are sound", "segment-00000001.kvs")
    report = json.loads(command("verify", store, "--json").stdout)
    assert report["sound"]
    assert [s["tokens"] for s in report["sessions"]] == [CHUNKS * 64, 3 * 64]
    assert files(store) == before


@pytest.mark.parametrize("name", ["verify", "dump"])
def test_a_directory_that_is_no_store_is_refused_and_left_alone(name, tmp_path):
    (tmp_path / "letter.txt").write_text("mine")
    done = command(name, tmp_path)
    assert done.exit_code == 2
    assert "holds no store" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_a_bad_record_is_named_in_every_session_that_has_it(store):
    rot(store, payload_of(CHUNKS), chunk=1)
    done = command("verify", store)
    assert done.exit_code == 1
    said(done, "2 of 2 sessions are damaged", "layer 0, tokens 64 to 79")


def test_a_bad_summary_is_named(store):
    segment = store / "segment-00000001.kvs"
    content = bytearray(segment.read_bytes())
    at = next(i for i in range(4096, len(content), 4096) if content[i : i + 4097] == b"\3" + bytes(4095) + b"\4")
    content[at] ^= 1
    segment.write_bytes(content)
    done = command("verify", store)
    assert done.exit_code == 1
    said(done, "summary 'k.v1' of chunk 3", "1 of 2 sessions are damaged")


def test_a_damaged_frame_is_named(store):
    segment = store / "segment-00000001.kvs"
    content = bytearray(segment.read_bytes())
    content[4096] ^= 1
    segment.write_bytes(content)
    done = command("verify", store)
    assert done.exit_code == 1
    said(done, "frames in bytes 4096 to", "layers 0 to 1, tokens 0 to 383")


@pytest.mark.parametrize("how", ["missing", "garbage", "one bit", "empty"])
def test_a_lost_manifest_is_made_again(store, engines, how):
    manifest = store / "MANIFEST"
    whole = manifest.read_bytes()
    changed = {"garbage": b"?" * 300, "one bit": whole[:100] + bytes((whole[100] ^ 4,)) + whole[101:], "empty": b""}
    manifest.unlink() if how == "missing" else manifest.write_bytes(changed[how])
    before = files(store)
    with pytest.raises(StartRefused, match="--repair"):
        engines()
    done = command("verify", store)
    assert done.exit_code == 1
    assert files(store) == before
    said(done, "MANIFEST is missing" if how == "missing" else "MANIFEST cannot be read", "--repair")
    done = command("verify", store, "--repair")
    assert done.exit_code == 0, done.output
    said(done, "wrote a new MANIFEST", "2 sessions are sound")
    if how != "missing":
        assert (store / "MANIFEST.damaged-1").read_bytes() == changed[how]
    check(engines())


def test_a_manifest_lost_while_a_daemon_ran_is_made_again(store, engines):
    """kill -9: the open segment has more than any manifest tells, and a second segment is newer than the copy."""
    engine = engines()
    one = engine.open("one", None, create=False).session_id
    more = payload_of(80, seed=5)  # more than a segment
    engine.append(one, CHUNKS, 80, more, b"")
    engine.flush(one)
    crashed = store.parent / "crashed"
    crashed.mkdir()
    for name, content in files(store).items():
        (crashed / name).write_bytes(content)
    assert len(list(crashed.glob("segment*"))) > 1
    (crashed / "MANIFEST").write_bytes(b"?")
    done = command("verify", crashed, "--repair")
    assert done.exit_code == 0, done.output
    report = json.loads(command("verify", crashed, "--json").stdout)
    assert report["sound"]
    assert [s["tokens"] for s in report["sessions"]] == [(CHUNKS + 80) * 64, 3 * 64]


def test_without_manifest_and_copy_nothing_is_touched(store):
    (store / "MANIFEST").unlink()
    (store / "MANIFEST.copy").write_bytes(b"?")
    before = files(store)
    for options in ((), ("--repair",)):
        done = command("verify", store, *options)
        assert done.exit_code == 1
        said(done, "names and geometries of the sessions are not known")
    assert files(store) == before


def test_a_lost_segment_is_taken_out(store, engines):
    (store / "segment-00000001.kvs").unlink()
    done = command("verify", store)
    assert done.exit_code == 1
    said(done, "its file is gone", "layers 0 to 1, tokens 0 to 383")
    done = command("verify", store, "--repair")
    assert done.exit_code == 1  # startable, and still lost
    said(done, "took segment-00000001.kvs, whose file is gone, out of MANIFEST", "tokens 0 to 383")
    assert {info.name: info.damaged_records for info in engines().list()}["one"] == len(all_keys(CHUNKS))


def test_a_file_that_is_not_ours_stays(store):
    (store / "segment-00000009.kvs").write_bytes(b"mine" * 2048)
    (store / "MANIFEST").unlink()
    done = command("verify", store, "--repair")
    assert done.exit_code == 0, done.output
    said(done, "its header is not ours")
    assert (store / "segment-00000009.kvs").read_bytes() == b"mine" * 2048


def test_a_newer_store_is_refused(store):
    manifest = store / "MANIFEST"
    content = manifest.read_bytes()
    manifest.write_bytes(content[:8] + b"\x09" + content[9:])
    before = files(store)
    done = command("verify", store, "--repair")
    assert done.exit_code == 1
    said(done, "version 9")
    assert files(store) == before


def test_a_store_in_use_is_refused(daemon):
    running = daemon()
    session_id = open_session(running.stub()).session_id
    append(running.stub(), session_id, payload_of(1))
    for name in ("verify", "dump"):
        done = command(name, running.nvme)
        assert done.exit_code == 2
        said(done, f"pid {running.pid}")
    assert running.stub().Stat(kvd_pb2.StatRequest(session_id=session_id)).session.chunk_count == 1


def test_wrong_places_are_refused(tmp_path):
    assert command("verify", tmp_path / "absent").exit_code == 2
    assert command("verify", "--repair").exit_code == 2


def test_dump_lists_everything(store):
    done = command("dump", store)
    assert done.exit_code == 0
    said(
        done, "manifest: clean", "session 1 'one'", "session 2 'two'", "epoch 1", "segment-00000001.kvs: open",
        "chunks of session 1, epoch 0, chunks 0 to 5", "summaries 'k.v1', 1 bytes each, of 6 chunks",
        "link of session 2, epoch 1",
    )  # fmt: skip
