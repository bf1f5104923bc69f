"""The wire as tests see it: a small geometry, payloads with an oracle, and the least client, straight on the stubs."""

import mmap
import os
import socket
import time

import grpc
import numpy as np
import pytest
from hga_kvd.__main__ import app
from hga_kvd.geometry import KEY_DTYPE, Geometry
from hga_kvd_proto import ERROR_KEY
from hga_kvd_proto import lane as layout
from hga_kvd_proto.v1 import kvd_pb2
from typer.testing import CliRunner

MIB = 1 << 20
GEOMETRY = Geometry(layers=2, kv_heads=2, head_dim=16, dtype="bfloat16", rope="10000", model_fingerprint="m")
MESSAGE = kvd_pb2.Geometry(
    layers=2, kv_heads=2, head_dim=16, dtype="bfloat16", chunk_tokens=64, group_tokens=16, rope="10000",
    model_fingerprint="m",
)  # fmt: skip


def wait_for(condition, seconds=30):
    """Returns when it holds. Nobody's speed is judged by `seconds`: a busy machine needs them, an idle one does not."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)


def payload_of(chunks, seed=0, geometry=GEOMETRY):
    return np.random.default_rng(seed).integers(0, 256, chunks * geometry.chunk_bytes, np.uint8)


def records_of(payload, keys, geometry=GEOMETRY):
    """The oracle: records as they lie in the payload."""
    parts = payload.reshape(-1, geometry.layers, geometry.kv_heads, geometry.groups_per_chunk, geometry.record_bytes)
    chunk, group = np.divmod(keys["group"], geometry.groups_per_chunk)
    return parts[chunk, keys["layer"], keys["kv_head"], group]


def all_keys(chunks, geometry=GEOMETRY):
    shape = (geometry.layers, geometry.kv_heads, chunks * geometry.groups_per_chunk)
    layer, head, group = (axis.ravel() for axis in np.indices(shape))
    keys = np.empty(layer.size, KEY_DTYPE)
    keys["layer"], keys["kv_head"], keys["group"] = layer, head, group
    return keys


def open_session(stub, name="s", client_id=0):
    return stub.Open(kvd_pb2.OpenRequest(name=name, geometry=MESSAGE, create=True, client_id=client_id))


def parts(session_id, payload, first=0, chunks=1, *, part_bytes=1000, token_ids=b""):
    yield kvd_pb2.AppendRequest(
        header=kvd_pb2.AppendHeader(session_id=session_id, first_chunk=first, chunk_count=chunks, token_ids=token_ids)
    )
    data = payload.tobytes()
    for start in range(0, len(data), part_bytes):
        yield kvd_pb2.AppendRequest(payload=data[start : start + part_bytes])


def append(stub, session_id, payload, first=0, **options):
    chunks = options.pop("chunks", payload.size // GEOMETRY.chunk_bytes)
    return stub.Append(parts(session_id, payload, first, chunks, **options), timeout=20).chunk_count


def rot(directory, payload, chunk):
    """Overwrites the first bytes of a chunk where they lie on disk."""
    wanted = payload.tobytes()[chunk * GEOMETRY.chunk_bytes :][:64]
    for path in directory.glob("segment-*.kvs"):
        place = path.read_bytes().find(wanted)
        if place > 0:
            with path.open("r+b") as file:
                file.seek(place)
                file.write(b"\xff" * 64)
            return
    raise AssertionError("these bytes are in no segment")


def command(*arguments):
    """`hga-kvd` with these arguments, in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(call, *arguments, **options):
    """(status, sentence, name of the meaning) of a call that must be refused."""
    with pytest.raises(grpc.RpcError) as raised:
        call(*arguments, **options)
    error = raised.value
    meaning = dict(error.trailing_metadata() or ()).get(ERROR_KEY)
    assert error.details()
    return error.code(), error.details(), meaning


class Client:
    """A minimal shared-memory client."""

    def __init__(self, stub, path, region_bytes=2 * MIB):
        answer = stub.Attach(kvd_pb2.AttachRequest(region_bytes=region_bytes))
        self.client_id = answer.client_id
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(30)
        self.socket.connect(str(path.parent / answer.handover_socket))
        self.socket.sendall(answer.token)
        _, (descriptor,), _, _ = socket.recv_fds(self.socket, 1, 1)
        self.memory = np.frombuffer(mmap.mmap(descriptor, answer.region_bytes), np.uint8)
        os.close(descriptor)

    def range(self, offset, size):
        return kvd_pb2.SharedRange(client_id=self.client_id, offset=offset, bytes=size)


class LaneClient(Client):
    """The same with a fast lane, and with every freedom that a client has."""

    def __init__(self, stub, path, region_bytes=2 * MIB):
        answer = stub.Attach(kvd_pb2.AttachRequest(region_bytes=region_bytes, lane=True))
        assert answer.lane_version == layout.VERSION
        self.client_id = answer.client_id
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(30)
        self.socket.connect(str(path.parent / answer.handover_socket))
        self.socket.sendall(answer.token)
        _, descriptors, _, _ = socket.recv_fds(self.socket, 1, 8)
        region, lane, self.request_bell, self.completion_bell = descriptors
        self.memory = np.frombuffer(mmap.mmap(region, answer.region_bytes), np.uint8)
        self.lane = memoryview(mmap.mmap(lane, layout.LANE_BYTES))
        self.posted_word = self.lane[layout.REQUESTS_POSTED :][:8].cast("Q")
        self.completed_word = self.lane[layout.COMPLETIONS_POSTED :][:8].cast("Q")
        for descriptor in (region, lane):
            os.close(descriptor)
        self.posted = 0

    def post(self, verb, body=b"", *, ring=True, **fields):
        """Posts one request; `sequence` and `body_bytes` may be lies."""
        at = layout.request_at(self.posted)
        self.lane[at + layout.HEADER_BYTES : at + layout.HEADER_BYTES + len(body)] = body
        names = ("session_id", "epoch", "offset", "size", "first_chunk", "chunk_count", "deadline_us")
        sequence, body_bytes = fields.pop("sequence", self.posted), fields.pop("body_bytes", len(body))
        rest = [fields.pop(name, 0) for name in names]
        assert not fields
        layout.REQUEST.pack_into(self.lane, at, sequence, verb, body_bytes, *rest)
        self.posted += 1
        self.posted_word[0] = self.posted
        if ring:
            os.eventfd_write(self.request_bell, 1)

    def completion(self, sequence=None):
        """(code, meaning, sentence) of a refusal, or (0, statuses, (chunk_count, ram_records, nvme_records))."""
        sequence = self.posted - 1 if sequence is None else sequence
        wait_for(lambda: sequence < self.completed_word[0] < layout.CLOSED)
        at = layout.completion_at(sequence)
        said, code, body_bytes, *counts = layout.COMPLETION.unpack_from(self.lane, at)
        assert said == sequence
        body = bytes(self.lane[at + layout.HEADER_BYTES :][:body_bytes])
        if not code:
            return 0, body, tuple(counts)
        meaning, _, sentence = body.decode().partition("\0")
        return next(c for c in grpc.StatusCode if c.value[0] == code), meaning, sentence

    def close(self):
        self.socket.close()
        for bell in (self.request_bell, self.completion_bell):
            os.close(bell)
