"""Round trips of the gRPC transports on this machine: medians over rounds that take turns, one client, RAM hits only.

    python bench/transports.py            # starts a daemon on a temporary socket, prints a table

Rows: a Fetch without keys (the empty unary call), 8 and 512 records of 8 KiB with payload in shared memory and as
bytes, over the unix socket and over TCP; an Append of 4 MiB each way; and a memcpy of the same bytes for scale.
"""

from __future__ import annotations

import argparse
import mmap
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import numpy as np
from hga_kvd_proto.v1 import kvd_pb2, kvd_pb2_grpc

GEOMETRY = kvd_pb2.Geometry(
    layers=4,
    kv_heads=8,
    head_dim=128,
    dtype="bfloat16",
    chunk_tokens=64,
    group_tokens=16,
    rope="",
    model_fingerprint="",
)
RECORD_BYTES, CHUNK_BYTES, CHUNKS = 8192, 4 * 8 * 4 * 8192, 8
MIB = 1 << 20


def keys(count: int) -> bytes:
    packed = np.zeros(count, np.dtype([("group", "<u4"), ("kv_head", "<u2"), ("layer", "<u2")]))
    random = np.random.default_rng(0)
    packed["group"] = random.integers(0, CHUNKS * 4, count)
    packed["kv_head"] = random.integers(0, 8, count)
    return packed.tobytes()


def run(rounds: int, calls: int) -> None:
    with tempfile.TemporaryDirectory(prefix="kvd") as directory:
        path = Path(directory) / "k.sock"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            tcp = f"127.0.0.1:{probe.getsockname()[1]}"
        command = ["-m", "hga_kvd", "--listen", str(path), "--listen", tcp, "--ram", "256MiB", "--log-level", "warning"]
        daemon = subprocess.Popen([sys.executable, *command])
        try:
            measure(path, tcp, rounds, calls)
        finally:
            daemon.send_signal(signal.SIGTERM)
            daemon.wait(30)


def measure(path: Path, tcp: str, rounds: int, calls: int) -> None:
    options = (("grpc.max_receive_message_length", -1),)
    unix_channel, tcp_channel = grpc.insecure_channel(f"unix:{path}", options), grpc.insecure_channel(tcp, options)
    grpc.channel_ready_future(unix_channel).result(30)
    unix_stub, tcp_stub = kvd_pb2_grpc.KvdStub(unix_channel), kvd_pb2_grpc.KvdStub(tcp_channel)
    attached = unix_stub.Attach(kvd_pb2.AttachRequest(region_bytes=16 * MIB))
    handover = socket.socket(socket.AF_UNIX)
    handover.connect(str(path.parent / attached.handover_socket))
    handover.sendall(attached.token)
    _, (descriptor,), _, _ = socket.recv_fds(handover, 1, 1)
    region = np.frombuffer(mmap.mmap(descriptor, attached.region_bytes), np.uint8)
    os.close(descriptor)
    session = unix_stub.Open(kvd_pb2.OpenRequest(geometry=GEOMETRY, create=True)).session_id
    data = np.random.default_rng(1).integers(0, 256, CHUNKS * CHUNK_BYTES, np.uint8)
    region[: data.size] = data

    def shared(size: int) -> kvd_pb2.SharedRange:
        return kvd_pb2.SharedRange(client_id=attached.client_id, offset=0, bytes=size)

    def append(count: int, session_id: int, through_memory: bool) -> None:
        header = kvd_pb2.AppendHeader(session_id=session_id, chunk_count=count)
        messages = [kvd_pb2.AppendRequest(header=header)]
        if through_memory:
            header.shared.CopyFrom(shared(count * CHUNK_BYTES))
            messages = [kvd_pb2.AppendRequest(header=header)]
        else:
            messages += [
                kvd_pb2.AppendRequest(payload=data[start : start + MIB].tobytes())
                for start in range(0, count * CHUNK_BYTES, MIB)
            ]
        unix_stub.Append(iter(messages))

    append(CHUNKS, session, True)

    def fetch(stub: kvd_pb2_grpc.KvdStub, count: int, through_memory: bool) -> Callable[[], object]:
        request = kvd_pb2.FetchRequest(session_id=session, keys=keys(count))
        if through_memory:
            request.shared.CopyFrom(shared(count * RECORD_BYTES))
        return lambda: stub.Fetch(request)

    def append_once(through_memory: bool) -> None:
        fresh = unix_stub.Open(kvd_pb2.OpenRequest(geometry=GEOMETRY, create=True)).session_id
        start = time.perf_counter()
        append(4, fresh, through_memory)
        took.append(time.perf_counter() - start)
        unix_stub.Close(kvd_pb2.CloseRequest(session_id=fresh))

    took: list[float] = []
    rows: dict[str, tuple[int, Callable[[], object]]] = {
        "empty call, unix": (0, fetch(unix_stub, 0, False)),
        "empty call, TCP": (0, fetch(tcp_stub, 0, False)),
    }
    for count in (8, 512):
        rows[f"fetch {count}, shared memory"] = (count * RECORD_BYTES, fetch(unix_stub, count, True))
        rows[f"fetch {count}, bytes, unix"] = (count * RECORD_BYTES, fetch(unix_stub, count, False))
        rows[f"fetch {count}, bytes, TCP"] = (count * RECORD_BYTES, fetch(tcp_stub, count, False))
    rows["append 4 MiB, shared memory"] = (4 * CHUNK_BYTES, lambda: append_once(True))
    rows["append 4 MiB, bytes, unix"] = (4 * CHUNK_BYTES, lambda: append_once(False))
    copy = np.empty(4 * MIB, np.uint8)
    rows["memcpy 4 MiB"] = (4 * MIB, lambda: np.copyto(copy, data[: 4 * MIB]))

    times: dict[str, list[float]] = {name: [] for name in rows}
    for number in range(rounds + 1):  # the first round warms up
        for name, (size, call) in rows.items():
            for _ in range(calls if size <= 8 * RECORD_BYTES else max(1, calls // 10)):
                took.clear()
                start = time.perf_counter()
                call()
                elapsed = took[0] if took else time.perf_counter() - start
                if number:
                    times[name].append(elapsed)
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, grpcio {grpc.__version__}"
    )
    print(f"{'':30}{'p50 us':>10}{'p99 us':>10}{'GB/s':>8}")
    for name, (size, _) in rows.items():
        median = statistics.median(times[name])
        rate = f"{size / median / 1e9:8.2f}" if size else ""
        print(f"{name:30}{median * 1e6:10.0f}{np.quantile(times[name], 0.99) * 1e6:10.0f}{rate}")
    handover.close()
    unix_channel.close()
    tcp_channel.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--calls", type=int, default=200, help="of the small rows in each round")
    arguments = parser.parse_args()
    run(arguments.rounds, arguments.calls)
