"""The command `hga-kvd`: options, sockets, the ready line, `stat`, metrics."""

import json
import os
import pty
import socket
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

import grpc
import pytest
from hga_kvd import liburing_engine
from hga_kvd_proto.v1 import kvd_pb2, kvd_pb2_grpc
from wire import append, open_session, payload_of


def run(*arguments, **environment):
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HGA_KVD_")}
    return subprocess.run(
        [sys.executable, "-m", "hga_kvd", *arguments],
        check=False, capture_output=True, text=True, timeout=60, env={**inherited, **environment},
    )  # fmt: skip


@pytest.fixture
def short():
    """A directory with a short name, for sockets."""
    with tempfile.TemporaryDirectory(prefix="kvd") as directory:
        yield Path(directory)


def refused(done, *said):
    """The one line on stderr of a refused start."""
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith("{")]
    assert len(lines) == 1, done.stderr
    for part in said:
        assert part in lines[0]


def test_version():
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, "hga-kvd 0.1.0\n")


def test_help_lists_the_options():
    done = run("--help")
    assert done.returncode == 0
    for option in (
        "nvme",
        "ram",
        "nvme-max",
        "listen",
        "io-engine",
        "scrub-rate",
        "log-level",
        "metrics",
        "config",
        "version",
    ):
        assert f"--{option} " in done.stdout
    assert "stat" in done.stdout


def test_the_daemon_does_not_import_torch():
    code = "import hga_kvd.__main__, sys; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_the_ready_line(daemon):
    running = daemon("--listen", "127.0.0.1:0")
    stub = running.stub()
    session_id = open_session(stub, "kept").session_id
    append(stub, session_id, payload_of(1))
    (ready,) = running.events("ready")
    assert ready["targets"][0] == running.target
    assert ready["targets"][1].startswith("127.0.0.1:")
    assert ready["ram_bytes"] >= 32 << 20
    assert (ready["nvme"], ready["sessions"], ready["pid"]) == (str(running.nvme), 0, running.pid)
    assert ready["io_engine"] in ("uring", "posix")
    with grpc.insecure_channel(ready["targets"][1]) as channel:
        answer = kvd_pb2_grpc.KvdStub(channel).Open(kvd_pb2.OpenRequest(name="kept"))
        assert (answer.session_id, answer.chunk_count) == (session_id, 1)
    running.stop()
    running.start()
    assert running.events("ready")[1]["sessions"] == 1
    assert all(json.loads(line) for line in running.log().splitlines())


@pytest.mark.parametrize("engine", ["uring", "liburing", "posix"])
def test_the_io_engine_is_chosen(daemon, engine):
    if engine == "liburing" and liburing_engine.crash():
        refused = daemon("--io-engine", engine, start=False).run()
        assert refused.returncode == 2
        assert "built for another CPU" in refused.stderr
        return
    running = daemon("--io-engine", engine)
    assert running.events("ready")[0]["io_engine"] == engine


def test_sockets_are_private_and_removed(daemon):
    running = daemon(nvme=False)
    for name in ("k.sock", "k.sock.shm"):
        assert (running.socket_directory / name).stat().st_mode & 0o177 == 0
    running.stop()
    assert [path.name for path in running.socket_directory.iterdir()] == ["k.sock.lock"]


def test_the_default_socket(daemon, short):
    running = daemon(nvme=False, environment={"XDG_RUNTIME_DIR": str(short)}, start=False)
    running.target = f"unix:{short}/hga-kvd/kvd.sock"
    running.command = lambda: [sys.executable, "-m", "hga_kvd"]
    running.start()
    assert (short / "hga-kvd").stat().st_mode & 0o777 == 0o700
    done = run("stat", XDG_RUNTIME_DIR=str(short))
    assert done.returncode == 0, done.stderr
    running.stop()


def test_a_default_directory_that_others_can_enter_is_refused(short):
    (short / "hga-kvd").mkdir()
    (short / "hga-kvd").chmod(0o750)
    refused(run(XDG_RUNTIME_DIR=str(short)), "open to other users", "chmod 700")
    (short / "hga-kvd").rmdir()
    (short / "elsewhere").mkdir(mode=0o700)
    (short / "hga-kvd").symlink_to(short / "elsewhere")
    refused(run(XDG_RUNTIME_DIR=str(short)), "is not a directory")
    refused(run(XDG_RUNTIME_DIR=str(short / "absent")), "cannot use the socket directory")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_default_directory_of_someone_else_is_refused(short):
    (short / "hga-kvd").mkdir(mode=0o700)
    os.chown(short / "hga-kvd", 12345, -1)
    refused(run(XDG_RUNTIME_DIR=str(short)), "belongs to user 12345")


def test_a_stale_socket_is_replaced(daemon):
    running = daemon(nvme=False)
    running.kill()
    assert running.socket.exists()
    running.start()
    assert running.stub().Stat(kvd_pb2.StatRequest()).sessions == 0


def test_a_socket_in_use_is_refused(daemon, short):
    running = daemon(nvme=False)
    refused(run("--listen", running.target), str(running.pid), str(running.socket))
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(short / "k.sock"))
        other.listen()
        refused(run("--listen", f"{short}/k.sock"), "another process answers")
        assert (short / "k.sock").exists()
    (short / "file.sock").write_text("mine")
    refused(run("--listen", f"{short}/file.sock"), "is not a socket")
    assert (short / "file.sock").read_text() == "mine"
    assert running.stub().Stat(kvd_pb2.StatRequest()).sessions == 0


def test_a_port_in_use_is_refused(daemon):
    running = daemon("--listen", "127.0.0.1:0", nvme=False)
    target = running.events("ready")[0]["targets"][1]
    refused(run("--listen", target), target)


def test_stat(daemon):
    running = daemon()
    stub = running.stub()
    append(stub, open_session(stub, "a name [bold]").session_id, payload_of(3))
    open_session(stub, "")
    done = run("stat", "--target", running.target, "--json")
    assert done.returncode == 0, done.stderr
    stats = json.loads(done.stdout)
    assert (stats["sessions"], stats["version"]) == (2, "0.1.0")
    assert [(s["name"], s["chunk_count"], s["temporary"]) for s in stats["session_list"]] == [
        ("a name [bold]", 3, False),
        ("", 0, True),
    ]
    done = run("stat", HGA_KVD_TARGET=running.target, COLUMNS="200")
    assert done.returncode == 0, done.stderr
    for part in ("a name [bold]", "(temporary)", "192", "2 x 2 x 16 bfloat16", "2 sessions", stats["io_engine"]):
        assert part in done.stdout


def test_stat_without_a_daemon(short):
    done = run("stat", "--target", f"{short}/k.sock")
    assert done.returncode == 1
    assert done.stderr.startswith(f"hga-kvd: no answer from unix:{short}/k.sock")
    assert f"`hga-kvd --listen unix:{short}/k.sock`" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    refused(run("stat", "--target", "nowhere"), "option --target: 'nowhere' is not an address")


def test_a_variable_that_is_no_setting_is_named(daemon):
    running = daemon(nvme=False, environment={"HGA_KVD_NVMEMAX": "1GiB", "HGA_KVD_TARGET": "unix:/nowhere"})
    assert [event["variable"] for event in running.events("no such setting: docs/configuration.md lists all")] == [
        "HGA_KVD_NVMEMAX"
    ]


def test_metrics(daemon):
    running = daemon("--metrics", "127.0.0.1:0", nvme=False)
    address = running.events("ready")[0]["metrics"]
    stub = running.stub()
    append(stub, open_session(stub, "s").session_id, payload_of(1))
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    assert f"hga_kvd_appended_bytes_total {float(payload_of(1).size)}" in text
    assert "hga_kvd_sessions 1.0" in text
    assert "hga_kvd_fetch_seconds_bucket" in text
    refused(run("--metrics", address, "--listen", "127.0.0.1:0"), f"cannot serve metrics on {address}")


def test_a_terminal_gets_lines_for_people(short):
    """The log on a pseudo-terminal is text, not JSON."""
    leader, follower = pty.openpty()
    target = f"{short}/k.sock"
    process = subprocess.Popen(
        [sys.executable, "-m", "hga_kvd", "--listen", target, "--ram", "32MiB"], stdin=follower, stderr=follower
    )
    os.close(follower)
    said = b""
    try:
        while b"ready" not in said:
            said += os.read(leader, 4096)
    finally:
        process.terminate()
        while True:
            try:
                os.read(leader, 4096)
            except OSError:  # its last writer is gone
                break
        assert process.wait(30) == 0
        os.close(leader)
    assert b"{" not in said


def test_a_log_that_nobody_reads_does_not_stop_it(short):
    """`hga-kvd 2>&1 | head`: the pipe breaks, the daemon goes on."""
    # Its stderr is buffered, unless this says otherwise.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-m", "hga_kvd", "--listen", f"{short}/k.sock", "--ram", "32MiB"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env=environment)
    try:
        while b"ready" not in process.stderr.readline():
            pass
        process.stderr.close()
        with grpc.insecure_channel(f"unix:{short}/k.sock") as channel:
            stub = kvd_pb2_grpc.KvdStub(channel)
            stub.Attach(kvd_pb2.AttachRequest(region_bytes=1))  # logs a line
            append(stub, open_session(stub, "s").session_id, payload_of(1))
    finally:
        process.terminate()
        assert process.wait(30) == 0
